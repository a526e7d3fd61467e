"""GVM-GRPO (arXiv 2505.02391): GRPO with a variance-minimising budget.

One step is the paper's Algorithm 1:
  1. draw a batch of m problems;
  2. E-step: divide N responses among them, nᵢ for problem i (choose_counts);
  3. draw them from the policy, accept those with the right answer (sample);
  4. M-step: make those better than their group's mean likelier, and the worse ones
     less likely (advantages, policy_loss, update).

It differs from gvm_raft.py in line 4. --pilot-samples 0 is plain GRPO; the paper's recipe
is --pilot-samples 8 --no-reuse-pilot --prior 0.

  Lemma 1      Σᵢ 1/(nᵢ pᵢ) Σ ∇ log P(y) over accepted y is unbiased    advantages
  Algorithm 1  1/|Dᵢ| instead: Lemma 1 with p̂ᵢ = |Dᵢ|/nᵢ of the step    main, advantages
  Eq. 5        the objective: log-likelihood of accepted responses      update
  Eq. 6        clipped importance ratio; 1/|y| is 1/(mean length) here  policy_loss, update
  Eq. 7        Σᵢ 1/(1 + α/pᵢ^β) Gᵢ²/(pᵢ nᵢ), a bound on the variance   choose_counts
  Prop. 1      the nᵢ that minimise it                                  choose_counts
  Algorithm 2  p̂ᵢ and Ĝᵢ from pilots; Ĝᵢ is a root mean square here     choose_counts

    python SCRIPT.py                                      # the tiny model in tiny/, one CPU
    torchrun --standalone --nproc-per-node 8 SCRIPT.py --sampler vllm --model ...

Tensors end in their shape: B rows of a batch, T tokens, V vocabulary, D hidden size.
groups[i] holds the responses to problem i, counts[i] says how many.
"""

import json
import os
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging as transformers_logging

from allocator import allocate, bound, estimate, weights
from verify_math import extract_answer, gold_answer, verify_batch

TINY = Path(__file__).resolve().parent / "tiny"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
INSTRUCTION = "Let's reason step by step and put the final answer within \\boxed{}."


@dataclass(frozen=True)
class Config:
    """Settings; the defaults train the tiny model on one CPU core in about a minute."""

    model: str = str(TINY / "model")  # Hugging Face folder or hub name
    problems: str = str(TINY / "train.jsonl")  # JSON lines with problem and answer
    eval_problems: str = str(TINY / "test.jsonl")  # the same, held out
    max_prompt_tokens: int = 1024  # longer problems are dropped, with a count

    steps: int = 40  # E-steps and M-steps; 0 only evaluates
    problems_per_step: int = 128  # m of Algorithm 1
    samples_per_problem: int = 2  # mean of n_i, pilots included: N is m times this
    pilot_samples: int = 1  # N' of Algorithm 2; 0 is the uniform budget
    reuse_pilot: bool = True  # train on pilots; if not, they come on top of N
    prior: float = 1.0  # pseudo-pilots at the batch's accept rate; the paper has 0
    alpha: float = 1e-3  # α of Eq. 7 keeps n_i bounded as p_i goes to 0
    beta: float = 2.0  # β of Eq. 7
    temperature: float = 1.0  # of sampling, in training and evaluation
    max_new_tokens: int = 64  # longest response

    learning_rate: float = 4e-4  # of AdamW, constant
    updates_per_step: int = 4  # optimiser updates, on disjoint parts of the batch
    clip_low: float = 0.2  # ε_low of Eq. 6
    clip_high: float = 0.28  # ε_high of Eq. 6
    kl_coef: float = 0.0  # weight of the divergence from the starting model

    eval_samples: int = 4  # k of average@k and pass@k
    eval_every: int = 5  # steps between evaluations
    save_every: int = 10  # steps between checkpoints
    seed: int = 0  # of all random numbers
    run_dir: str = ""  # new: runs/<script>-<time>; a run that is there goes on
    sampler: Literal["torch", "vllm"] = "torch"  # vllm is for GPUs
    sleep: bool = False  # vllm frees its GPU memory between its turns
    tokens_per_batch: int = 4096  # of a micro-batch, with padding
    gradient_checkpointing: bool = False  # less memory, one forward pass more


def main(cfg):
    """Sets up, then runs Algorithm 1, one line a line."""
    check(cfg)
    device = start_processes(cfg)
    caught = catch_signals()
    tokenizer = load_tokenizer(cfg)
    problems = read_problems(cfg.problems, tokenizer, cfg)
    eval_problems = read_problems(cfg.eval_problems, tokenizer, cfg)
    if cfg.problems_per_step > len(problems):
        raise SystemExit(
            f"--problems-per-step exceeds the {len(problems)} problems read"
        )

    folder, checkpoint, progress = open_run(cfg)
    make_sampler = VLLMSampler if cfg.sampler == "vllm" else TorchSampler
    sampler = make_sampler(cfg, tokenizer, device)
    policy = load_policy(checkpoint or cfg.model, cfg, device)
    reference = load_policy(cfg.model, cfg, device) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.learning_rate, fused=True)
    load_optimizer(checkpoint, policy, optimizer)
    sampler.load(policy)
    if progress["step"] == 0:
        log(folder, progress, *evaluate(eval_problems, sampler, progress, cfg))

    for step in range(progress["step"], cfg.steps):
        start = time.perf_counter()
        # m problems, nᵢ responses to each, one M-step                  Algorithm 1
        batch = next_problems(problems, step, cfg)
        counts, pilots, metrics = choose_counts(batch, policy, sampler, progress, cfg)
        groups = sample(batch, counts, sampler, progress, cfg, kept=pilots)
        metrics |= update(policy, reference, optimizer, groups, cfg)
        sampler.load(policy)  # which draws from the new policy from now on

        progress["step"] += 1
        progress["seconds"] += time.perf_counter() - start
        log(folder, progress, *describe(groups, metrics, progress))

        stop = sum_over_ranks([len(caught)])[0] > 0
        last = progress["step"] == cfg.steps
        if last or progress["step"] % cfg.eval_every == 0:
            log(folder, progress, *evaluate(eval_problems, sampler, progress, cfg))
        if last or stop or progress["step"] % cfg.save_every == 0:
            save(folder, policy, optimizer, tokenizer, progress)
        if stop:
            break

    if RANK == 0:
        print_summary(folder, progress, cfg)
    dist.barrier()
    sampler.close()


# ---- E-step: how many responses


def choose_counts(batch, policy, sampler, progress, cfg):
    """nᵢ of every problem, the pilots to train on, and metrics."""
    uniform = [cfg.samples_per_problem] * len(batch)
    if cfg.pilot_samples == 0:
        return uniform, None, {}

    # N' pilots a problem estimate pᵢ and Gᵢ                             Algorithm 2
    drawn = [cfg.pilot_samples] * len(batch)
    stream = "train" if cfg.reuse_pilot else "pilot"
    pilots = sample(batch, drawn, sampler, progress, cfg, stream=stream)
    accepted = [sum(r.reward for r in group) for group in pilots]
    norms = gradient_norms(policy, pilots, cfg)
    rates, norms = estimate(accepted, drawn, norms, cfg.prior)

    # nᵢ ∝ Gᵢ / √(pᵢ + α / pᵢ^(β-1))                                         Prop. 1
    w = weights(rates, norms, alpha=cfg.alpha, beta=cfg.beta)
    minimum = cfg.pilot_samples if cfg.reuse_pilot else 0
    counts = allocate(w, sum(uniform), minimum=minimum)

    # The bound on the variance that is left, relative to the uniform one      Eq. 7
    ratio = bound(w, counts) / bound(w, uniform) if w.any() else 1.0
    metrics = {"rates": rates.tolist(), "norms": norms.tolist(), "bound": ratio}
    return counts, pilots if cfg.reuse_pilot else None, metrics


@torch.no_grad()
def gradient_norms(policy, groups, cfg):
    """Gᵢ [m]: root mean square of ||∇ log P(y)||₂ over accepted responses y.

    The gradient is that of the output head W, logits = W h: ∇ log P = Σₜ dₜ hₜᵀ with
    dₜ = onehot(yₜ) - softmaxₜ. In float32 dₜ loses digits where a token is surer than
    0.9996 (up to 4e-3 of the norm): good enough for a budget.
    """
    accepted = [r for group in groups for r in group if r.reward]
    squares = torch.zeros(len(groups), dtype=torch.float64)
    for micro in micro_batches(accepted, cfg.tokens_per_batch):
        rows = run_policy(policy, micro or accepted[:1], cfg)
        for response, (logit_TV, hidden_TD, target_T) in zip(micro, rows):
            d_TV = F.one_hot(target_T, logit_TV.shape[-1]) - logit_TV.softmax(-1)
            # ||Σₜ dₜ hₜᵀ||² = Σₛₜ (dₛ·dₜ)(hₛ·hₜ)
            square = ((d_TV @ d_TV.T) * (hidden_TD @ hidden_TD.T)).sum()
            squares[response.i] += square.item() / cfg.temperature**2

    # Gᵢ² = mean of ||∇ log P(y)||² over accepted y                          Lemma 1
    dist.all_reduce(squares)
    counts = np.bincount([r.i for r in accepted], minlength=len(groups))
    return np.sqrt(squares.numpy() / np.maximum(counts, 1))


# ---- M-step: what they teach


def advantages(rewards):
    """Weights of the responses to a problem, [nᵢ]: (r - mean)/std, 1/nᵢ each."""
    # 1/(nᵢ pᵢ) of Lemma 1 becomes 1/nᵢ, and rewards are centred      Algorithm 1
    centred = rewards - rewards.mean()
    return centred / max(rewards.std(), 1e-6) / len(rewards)  # 0 if all are equal


def policy_loss(logp_T, old_logp_T, weight, clip_low, clip_high):
    """Loss of each token of a response, [T]; old_logp_T are the sampler's own."""
    ratio_T = (logp_T - old_logp_T).exp()  # on-policy 1 in value, but not in gradient
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    # min(sₜ A, clip(sₜ, 1 - ε_low, 1 + ε_high) A)                             Eq. 6
    return -torch.minimum(ratio_T * weight, clipped_T * weight)


def weigh(groups, cfg):
    """The responses that teach, with their weights: every problem counts the same."""
    batch = []
    for group in filter(len, groups):
        values = advantages(np.array([r.reward for r in group])) / len(groups)
        for response, value in zip(group, values):
            response.weight = 0.0 if response.truncated else value
            if response.weight or cfg.kl_coef:
                batch.append(response)
    return batch


def update(policy, reference, optimizer, groups, cfg):
    """M-step: an optimiser update for each of updates_per_step parts of the batch."""
    sums, tokens, grad_norms = np.zeros(3), 0, []
    for part in np.array_split(np.arange(len(groups)), cfg.updates_per_step):
        # Weights are fixed before the batch is cut, so that the cuts do not matter.
        batch = weigh([groups[i] for i in part], cfg)
        if not batch:
            continue  # nothing was accepted: there is nothing to learn
        lengths = [len(r.token_ids) for r in batch]
        tokens += sum(lengths)

        for micro in micro_batches(batch, cfg.tokens_per_batch):
            turn = micro or batch[:1]  # a rank without work goes along, for no loss
            logps = token_logprobs(policy, turn, cfg)
            starts = token_logprobs(reference, turn, cfg) if reference else logps

            loss = kl = shift = 0 * logps[0].sum()
            for response, logp_T, start_T in zip(micro, logps, starts):
                old_T = torch.tensor(response.logprobs, device=logp_T.device)
                clip = cfg.clip_low, cfg.clip_high
                # Σ log P over accepted responses, through its ratio           Eq. 5
                loss = loss + policy_loss(logp_T, old_T, response.weight, *clip).sum()
                gap_T = start_T.detach() - logp_T
                kl = kl + (gap_T.exp() - gap_T - 1).sum()  # the k3 estimator
                shift = shift + (logp_T - old_T).abs().sum()

            # Eq. 6 has 1/|y|; the mean length leaves the weights as Lemma 1 wants them.
            loss = loss / np.mean(lengths)
            total = loss + cfg.kl_coef * kl / sum(lengths)
            (total * WORLD).backward()  # FSDP takes the mean over ranks
            sums += [loss.item(), kl.item(), shift.item()]

        norm = clip_grad_norm_(policy.parameters(), 1.0).full_tensor().item()
        if not np.isfinite(norm):
            raise SystemExit(
                "stopped: the gradient is not finite; lower --learning-rate"
            )
        grad_norms.append(norm)
        optimizer.step()
        optimizer.zero_grad()

    loss, kl, shift = sum_over_ranks(sums)
    return {
        "loss": loss / cfg.updates_per_step,
        "kl": kl / max(tokens, 1),
        "logp_shift": shift / max(tokens, 1),
        "grad_norm": float(np.mean(grad_norms or [0])),
        "updates": len(grad_norms),
    }


# ---- Sampling


class Problem(NamedTuple):
    """A problem as the model reads it; index is its line in the file."""

    index: int
    prompt_ids: list[int]
    answer: str


@dataclass
class Response:
    """A response: where it belongs, what the sampler draws, what the verifier finds."""

    i: int  # place of its problem in the batch
    prompt_ids: list[int]
    seed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of token_ids when drawn
    truncated: bool = False  # no end token: counts as wrong, teaches nothing
    boxed: bool = False  # holds an answer in a box
    reward: float = 0.0  # 1 if the answer is right
    weight: float = 0.0  # in the objective

    def __len__(self):
        return len(self.prompt_ids) + len(self.token_ids)


def sample(batch, counts, sampler, progress, cfg, *, stream="train", kept=None):
    """Groups of counts[i] verified responses, the kept ones first; on all ranks."""
    groups = kept or [[] for _ in batch]
    new = []
    for i, problem in enumerate(batch):
        for number in range(len(groups[i]), counts[i]):
            # A response has random numbers of its own, whichever rank draws it.
            key = [cfg.seed, *stream.encode(), progress["step"], problem.index, number]
            seed = np.random.SeedSequence(key).generate_state(1)[0]
            new.append(Response(i, problem.prompt_ids, int(seed)))

    mine = new[RANK::WORLD]
    sampler.draw(mine)
    ids = [r.token_ids for r in mine]
    texts = sampler.tokenizer.batch_decode(ids, skip_special_tokens=True)
    verdicts = verify_batch(texts, [batch[r.i].answer for r in mine])
    for response, text, right in zip(mine, texts, verdicts):
        response.boxed = extract_answer(text) is not None
        response.reward = float(right and not response.truncated)

    shares = [None] * WORLD
    dist.all_gather_object(shares, mine)
    for rank, share in enumerate(shares):
        new[rank::WORLD] = share
    for response in new:
        groups[response.i].append(response)
        progress["responses"] += 1
        progress["tokens"] += len(response.token_ids)
    return groups


def evaluate(problems, sampler, progress, cfg):
    """Average@k and pass@k of held-out problems, as metrics and as a line."""
    counts = [cfg.eval_samples] * len(problems)
    free = dict(progress)  # evaluation is not part of the budget
    groups = sample(problems, counts, sampler, free, cfg, stream="eval")
    rewards = np.array([[r.reward for r in group] for group in groups])
    row = averages(groups)
    row["accuracy"] = rewards.mean()
    row["accuracy_se"] = rewards.mean(1).std() / len(problems) ** 0.5  # over problems
    row["pass_at_k"] = rewards.max(1).mean()
    line = f"accuracy {row['accuracy']:.3f} ± {row['accuracy_se']:.3f}"
    line += (
        f" | pass@{cfg.eval_samples} {row['pass_at_k']:.3f} | boxed {row['boxed']:.3f}"
    )
    return row, line


def averages(groups):
    """Means over responses, and over their tokens."""
    responses = [r for group in groups for r in group]
    return {
        "boxed": np.mean([r.boxed for r in responses]),
        "truncated": np.mean([r.truncated for r in responses]),
        "entropy": -np.mean([logp for r in responses for logp in r.logprobs]),
    }


class TorchSampler:
    """Draws responses with its own copy of the weights and transformers' cache."""

    def __init__(self, cfg, tokenizer, device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = load_model(cfg.model, dtype).to(device).eval()
        self.tokenizer, self.cfg = tokenizer, cfg
        ends = self.model.generation_config.eos_token_id or []  # one, several or none
        ends = np.hstack([tokenizer.eos_token_id, ends]).astype(int)
        self.ends = torch.tensor(ends, device=device)

    @torch.inference_mode()
    def draw(self, rows):
        """Fills in the tokens and log-probabilities of responses, at most 512 at once."""
        if len(rows) > 512:
            self.draw(rows[512:])
        rows = rows[:512]
        # A prompt runs once for all its responses, padded on the left.
        prompts = {row.i: torch.tensor(row.prompt_ids) for row in rows}
        ids_BT = pad_sequence([*prompts.values()], True, -1, "left").to(self.ends)
        ids_BT, mask_BT = ids_BT.clamp(min=0), (ids_BT >= 0).long()
        places = list(prompts)
        keep_B = torch.tensor([places.index(row.i) for row in rows]).to(self.ends)
        cache = DynamicCache(config=self.model.config)

        limit = self.cfg.max_new_tokens
        uniform = [1 - np.random.default_rng(row.seed).random(limit) for row in rows]
        uniform_BT = torch.tensor(np.stack(uniform), device=ids_BT.device)  # in (0, 1]
        for t in trange(limit, desc="sample", leave=False, disable=RANK > 0 or None):
            position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
            inputs = {"attention_mask": mask_BT, "position_ids": position_BT}
            inputs |= {"past_key_values": cache, "logits_to_keep": 1}
            logit_BV = self.model(ids_BT, **inputs).logits[:, -1].float()
            if t == 0:  # from one row a prompt to one row a response
                cache.batch_select_indices(keep_B)
                logit_BV, mask_BT = logit_BV[keep_B], mask_BT[keep_B]

            # the first token whose cumulative probability reaches the uniform number
            logp_BV = (logit_BV / self.cfg.temperature).log_softmax(-1)
            cdf_BV = logp_BV.exp().cumsum(-1, dtype=torch.float64)
            token_B = (cdf_BV < uniform_BT[:, t, None] * cdf_BV[:, -1:]).sum(-1)
            logp_B = logp_BV.gather(-1, token_B[:, None])[:, 0]
            for row, token, logp in zip(rows, token_B.tolist(), logp_B.tolist()):
                row.token_ids.append(token)
                row.logprobs.append(logp)

            keep_B = (~torch.isin(token_B, self.ends)).nonzero()[:, 0]
            if len(keep_B) < len(rows):  # drop the rows that have ended
                rows = [rows[b] for b in keep_B.tolist()]
                if not rows:
                    break
                cache.batch_select_indices(keep_B)
                token_B, mask_BT = token_B[keep_B], mask_BT[keep_B]
                uniform_BT = uniform_BT[keep_B]
            ids_BT, mask_BT = token_B[:, None], F.pad(mask_BT, (0, 1), value=1)

        for row in rows:
            row.truncated = True

    def load(self, policy):
        """Copies the policy's weights, gathered from their shards."""
        for target, weight in zip(self.model.parameters(), policy.parameters()):
            target.data.copy_(weight.data.to(target.dtype).full_tensor())

    def close(self):
        """Leaves the process group."""
        dist.destroy_process_group()


class VLLMSampler:
    """Draws responses with vLLM, one engine a process beside the trainer."""

    def __init__(self, cfg, tokenizer, device):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read at the import
        from vllm import LLM, SamplingParams

        self.tokenizer, self.sleeps = tokenizer, cfg.sleep
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        limits = {"temperature": cfg.temperature, "max_tokens": cfg.max_new_tokens}
        plain = {"logprobs": 0, "flat_logprobs": True, "detokenize": False}
        self.settings = partial(SamplingParams, **limits, **plain)
        self.llm = LLM(
            cfg.model,
            dtype=self.dtype,
            max_model_len=-1,  # the model's own limit, or what fits into memory
            distributed_executor_backend="external_launcher",  # torchrun's processes
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled
            gpu_memory_utilization=0.7
            if cfg.sleep
            else 0.4,  # the trainer has the rest
            enable_sleep_mode=cfg.sleep,
            enforce_eager=device.type != "cuda",
        )
        self.rest()

    def draw(self, responses):
        """Fills in the tokens and log-probabilities of responses."""
        self.wake()
        prompts = [{"prompt_token_ids": r.prompt_ids} for r in responses]
        settings = [self.settings(seed=r.seed) for r in responses]
        bar = RANK == 0 and sys.stderr.isatty()
        outputs = self.llm.generate(prompts, settings, use_tqdm=bar)
        for response, output in zip(responses, outputs):
            drawn = output.outputs[0]
            response.token_ids = list(drawn.token_ids)
            response.logprobs = list(drawn.logprobs.logprobs)
            response.truncated = drawn.finish_reason == "length"
        self.rest()

    def load(self, policy):
        """Streams the weights into the engine, which forgets prefixes of old ones."""
        self.wake()
        named = policy.named_parameters()
        full = ((name, w.data.to(self.dtype).full_tensor()) for name, w in named)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": full})
        assert self.llm.reset_prefix_cache(), "vLLM keeps prefixes under old weights"

    def wake(self):
        """Takes back the memory that the engine left to the trainer."""
        torch.cuda.empty_cache()  # what the trainer holds but does not use
        if self.llm.llm_engine.is_sleeping():
            self.llm.wake_up()

    def rest(self):
        """With --sleep, leaves the memory to the trainer; weights wait on the host."""
        if self.sleeps:
            self.llm.sleep(level=1)

    def close(self):
        """Ends the engine, and the process group with it."""
        self.llm.llm_engine.engine_core.shutdown()


# ---- Policy


def load_model(source, dtype):
    """A causal language model in Hugging Face's format, without dropout."""
    config = AutoConfig.from_pretrained(source)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype)


def load_policy(source, cfg, device):
    """The model in float32, sharded over all ranks; it computes in bf16 on CUDA."""
    # TF32 must stay off: rotary embeddings multiply positions in float32.
    model = load_model(source, "auto").train(cfg.gradient_checkpointing)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    half = torch.bfloat16 if device.type == "cuda" else None
    precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh(device.type, (WORLD,))
    # Sharded even after a forward pass without a backward one: others read the shards.
    settings = {"mesh": mesh, "mp_policy": precision, "reshard_after_forward": True}
    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module.float(), **settings)  # moves it to the device, too
    return fully_shard(model.float(), **settings)


def run_policy(policy, responses, cfg):
    """Logits [T, V], last hidden states [T, D] and tokens [T] of each response."""
    ids = [torch.tensor(r.prompt_ids + r.token_ids) for r in responses]
    # The padding is on the right, where causal attention does not look.
    ids_BT = pad_sequence(ids, batch_first=True).to(policy.device)
    output = policy(ids_BT, use_cache=False, output_hidden_states=True)
    rows = []
    for b, response in enumerate(responses):
        start, end = len(response.prompt_ids), len(response)
        logit_TV = output.logits[b, start - 1 : end - 1].float() / cfg.temperature
        hidden_TD = output.hidden_states[-1][b, start - 1 : end - 1].float()
        rows.append((logit_TV, hidden_TD, ids_BT[b, start:end]))
    return rows


def token_logprobs(policy, responses, cfg):
    """Log-probabilities of the tokens of each response, a list of [T]."""
    logps = []
    for logit_TV, _, target_T in run_policy(policy, responses, cfg):
        logps.append(-F.cross_entropy(logit_TV, target_T, reduction="none"))
    return logps


def micro_batches(responses, limit):
    """This rank's batches of like length, each of at most limit tokens with padding."""
    responses = sorted(responses, key=len, reverse=True)
    batches = []
    while responses:
        size = max(1, limit // len(responses[0])) * WORLD  # that of all ranks
        batches.append(responses[RANK:size:WORLD])
        responses = responses[size:]
    return batches


# ---- Problems, run folder, processes


def check(cfg):
    """Refuses settings that make no sense, before anything is loaded or written."""
    zero = {"steps", "learning_rate", "clip_low", "kl_coef", "seed"}
    zero |= {"pilot_samples", "prior", "alpha"}
    if cfg.reuse_pilot and cfg.pilot_samples > cfg.samples_per_problem:
        raise SystemExit("--pilot-samples exceeds --samples-per-problem, its budget")
    if cfg.beta < 2:
        raise SystemExit(f"--beta must be at least 2, not {cfg.beta}")
    if cfg.samples_per_problem < 2:
        raise SystemExit("--samples-per-problem must be at least 2: GRPO compares")
    for name, value in asdict(cfg).items():
        if type(value) in (int, float) and not (
            value > 0 or value == 0 and name in zero
        ):
            raise SystemExit(f"--{name.replace('_', '-')} {value} is too small")
    if cfg.updates_per_step > cfg.problems_per_step:
        raise SystemExit("--updates-per-step exceeds --problems-per-step")
    if cfg.problems != Config.problems and cfg.eval_problems == Config.eval_problems:
        raise SystemExit(
            "--problems needs --eval-problems (data/prepare.py --hold-out)"
        )


def load_tokenizer(cfg):
    """The model's tokenizer, with a chat template."""
    try:
        AutoConfig.from_pretrained(cfg.model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(cfg.model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise SystemExit(f"--model {cfg.model} cannot be loaded: {reason}") from None
    if not tokenizer.chat_template:
        raise SystemExit(f"--model {cfg.model} has no chat template; take a chat model")
    return tokenizer


def read_problems(path, tokenizer, cfg):
    """Problems of a JSON-lines file, through the chat template."""
    if not Path(path).is_file():
        raise SystemExit(f"{path}: no such file; data/prepare.py makes them")
    messages, answers = [], []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = row["problem"]
                answers.append(gold_answer(row["answer"]))
                if not isinstance(text, str) or not text.strip():
                    raise ValueError("the problem is no text")
            except (KeyError, TypeError, ValueError) as error:
                where = f"{path}, line {number}, {line.strip():.80}..."
                raise SystemExit(f"{where}: {error}") from None
            messages.append([{"role": "user", "content": f"{text}\n{INSTRUCTION}"}])

    settings = {"add_generation_prompt": True, "return_dict": False}
    prompts = tokenizer.apply_chat_template(messages, **settings) if messages else []
    rows = enumerate(zip(prompts, answers))
    problems = [
        Problem(i, *row) for i, row in rows if len(row[0]) <= cfg.max_prompt_tokens
    ]
    if RANK == 0 and len(problems) < len(prompts):
        print(
            f"{path}: {len(prompts) - len(problems)} problems exceed --max-prompt-tokens"
        )
    if not problems:
        raise SystemExit(f"{path}: no problem is left")
    return problems


def next_problems(problems, step, cfg):
    """The m problems of a step; every epoch has a random order of its own."""
    m = cfg.problems_per_step
    epoch, place = divmod(step, len(problems) // m)
    order = np.random.default_rng([cfg.seed, epoch]).permutation(len(problems))
    return [problems[i] for i in order[place * m : (place + 1) * m]]


def open_run(cfg):
    """The run's folder; where it holds a run, the last checkpoint and its progress."""
    script = Path(sys.argv[0]).stem
    names = [cfg.run_dir or f"runs/{script}-{datetime.now():%Y%m%d-%H%M%S-%f}"]
    dist.broadcast_object_list(names)  # the ranks' clocks differ
    folder = Path(names[0])
    config, metrics = folder / "config.json", folder / "metrics.jsonl"
    settings = {"script": script} | asdict(cfg)
    if metrics.is_file():
        saved = json.loads(config.read_text()) | {"steps": cfg.steps}
        if changed := dict(settings.items() - saved.items()):
            raise SystemExit(f"--run-dir {folder} holds a run without {changed}")

    progress = {"step": 0, "responses": 0, "tokens": 0, "seconds": 0.0}
    checkpoint, rows = None, ""
    for checkpoint in sorted(folder.glob("checkpoint-*[0-9]"))[-1:]:
        progress = json.loads((checkpoint / "progress.json").read_text())
        rows = (checkpoint / "metrics.jsonl").read_text()  # later ones come again
    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps(settings, indent=2) + "\n")
        metrics.write_text(rows)
    return folder, checkpoint, progress


def save(folder, policy, optimizer, tokenizer, progress):
    """Writes a checkpoint, a Hugging Face folder, under another name and renames it."""
    done = folder / f"checkpoint-{progress['step']:06d}"
    part = done.with_suffix(".part")
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = dcp_state.get_state_dict(policy, optimizer, options=options)
    if RANK > 0:
        return
    try:
        policy.save_pretrained(part, state_dict=weights)
        tokenizer.save_pretrained(part)
        torch.save(state, part / "optimizer.pt")
        (part / "progress.json").write_text(json.dumps(progress))
        shutil.copy(folder / "metrics.jsonl", part)
        part.rename(done)
    except Exception as error:
        raise SystemExit(f"{done} cannot be written: {error}") from None
    for old in folder.glob("checkpoint-*"):
        if old != done:
            shutil.rmtree(old)


def load_optimizer(checkpoint, policy, optimizer):
    """The optimiser's state, sharded anew over however many ranks there are."""
    if checkpoint:
        state = torch.load(checkpoint / "optimizer.pt", mmap=True)
        options = dcp_state.StateDictOptions(full_state_dict=True)
        dcp_state.set_optimizer_state_dict(policy, optimizer, state, options=options)


def describe(groups, metrics, progress):
    """What a step's row of metrics.jsonl and its line on the screen say."""
    counts = np.array([len(group) for group in groups])
    accepted = np.array([sum(r.reward for r in group) for group in groups])
    reward = accepted.sum() / counts.sum()
    accept = np.mean(accepted / np.maximum(counts, 1))  # every problem alike
    row = {"reward": reward, "accept": accept} | averages(groups) | metrics
    row |= {"counts": counts.tolist(), "accepted": accepted.tolist()}
    line = (
        f"reward {reward:.3f} | accept {accept:.3f} | n {counts.min():2d}..{counts.max():<3d}"
        f" | bound {metrics.get('bound', 1):.2f} | loss {row['loss']:+.3f}"
        f" | grad {row['grad_norm']:.2f} | responses {progress['responses']:6,d}"
    )
    if row["updates"] == 0:
        line += " | no update: no response has weight"
    if row["truncated"] > 0.01:
        line += f" | truncated {row['truncated']:.2f}"
    if row["truncated"] == 1:
        line += ": raise --max-new-tokens"
    return row, line


def log(folder, progress, row, line):
    """Appends a row to metrics.jsonl and prints a line."""
    if RANK == 0:
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(progress | row) + "\n")
        print(
            f"step {progress['step']:4d} | {line} | {progress['seconds']:.0f} s",
            flush=True,
        )


def print_summary(folder, progress, cfg):
    """What the run comes to, a quantity a line, and how to look at it."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    accuracy = [row["accuracy"] for row in rows if "accuracy" in row]
    print(f"accuracy_before: {accuracy[0]:.4f}\naccuracy_after: {accuracy[-1]:.4f}")
    print(
        f"responses_total: {progress['responses']}\ntokens_total: {progress['tokens']}"
    )
    print(f"seconds_total: {progress['seconds']:.1f}")
    if progress["step"] < cfg.steps:
        print(f"stopped: the same command with --run-dir {folder} goes on")
    print(f"plot it: python bench/plot.py {folder}")


def catch_signals():
    """A list that SIGTERM or Ctrl-C fills, to stop after the step; a second one kills."""
    caught = []

    def handle(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return caught


def sum_over_ranks(values):
    """Sums a list of numbers over the ranks."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def start_processes(cfg):
    """Joins the process group, of one without torchrun; returns this rank's device."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= alone | dict(os.environ)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # best if tiny
    torch.manual_seed(cfg.seed)
    warnings.simplefilter("ignore")  # of libraries, about names that change
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    return torch.device("cuda")


if __name__ == "__main__":
    main(tyro.cli(Config))
