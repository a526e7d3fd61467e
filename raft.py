"""RAFT++ (arXiv 2504.11343, the baseline of 2505.02391): rejection sampling.

One step is Algorithm 1 of 2505.02391 with a uniform budget:
  1. draw a batch of m problems;
  2. E-step: give each the same number nᵢ of responses (choose_counts);
  3. draw them from the policy, accept those with the right answer (sample);
  4. M-step: make the accepted ones likelier (advantages, policy_loss, update).
gvm_raft.py differs in line 2: it learns from pilots which problems need responses.

  Lemma 1      Σᵢ 1/(nᵢ pᵢ) Σ ∇ log P(y) over accepted y is unbiased  advantages
  Algorithm 1  1/|Dᵢ|: Lemma 1 at p̂ᵢ = |Dᵢ|/nᵢ, biased as Dᵢ can be ∅  main, advantages
  Eq. 5        the objective, log-likelihood of accepted responses    update
  Eq. 6        clipped ratio; 1/(mean length), not 1/|y|          policy_loss, update

    python SCRIPT.py                                # the tiny model in tiny/, one CPU
    torchrun --standalone --nproc-per-node 8 SCRIPT.py --sampler vllm --model ...
Tensors end in their shape: B rows, T tokens, V vocabulary, D hidden size.
"""

import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections import namedtuple
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import tyro
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, rnn
from tqdm import trange
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging as messages

from verify_math import extract_answer, gold_answer, verify_batch

TINY = Path(os.path.relpath(__file__)).parent / "tiny"
ENV = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
ENV |= {"MASTER_PORT": "0", **os.environ}  # torchrun sets all five
RANK, WORLD = int(ENV["RANK"]), int(ENV["WORLD_SIZE"])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # TF32 spoils RoPE
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
Problem = namedtuple("Problem", "index prompt_ids answer")  # index: line of its file
INSTRUCTION = "Let's reason step by step and put the final answer within \\boxed{}."


@dataclass(frozen=True)
class Config:
    """Settings; the defaults train the tiny model on one CPU core in a minute."""

    model: str = f"{TINY}/model"  # Hugging Face folder or name
    problems: str = f"{TINY}/train.jsonl"  # JSONL: problem, answer
    eval_problems: str = f"{TINY}/test.jsonl"  # the same, held out
    max_prompt_tokens: int = 1024  # longer problems are dropped

    steps: int = 40  # in all; 0 only evaluates the model
    problems_per_step: int = 128  # m of Algorithm 1
    samples_per_problem: Annotated[int, tyro.conf.arg(metavar="n")] = 2  # mean n_i, N/m
    temperature: float = 1.0  # of sampling, loss and evaluation
    max_new_tokens: int = 64  # longest response

    learning_rate: float = 4.5e-4  # of AdamW, constant
    max_grad_norm: float = 0.03  # clips gradients; large models: 1
    updates_per_step: int = 4  # on disjoint parts of the batch
    clip_low: float = 0.2  # ε_low of Eq. 6
    clip_high: float = 0.28  # ε_high of Eq. 6
    kl_coef: float = 0.0  # of the KL from the starting model

    eval_samples: int = 2  # k of average@k and pass@k
    eval_every: int = 5  # steps between evaluations
    save_every: int = 10  # steps between checkpoints
    seed: int = 0  # of all random numbers
    run_dir: str = ""  # folder; a run in it is continued
    sampler: Literal["torch", "vllm"] = "torch"  # vllm is for GPUs
    sleep: bool = False  # vllm frees memory for training
    tokens_per_batch: int = 4096  # per rank, with prompts and padding
    gradient_checkpointing: bool = False  # less memory, slower


def main(cfg):
    """Sets up, then trains: the loop has the lines of Algorithm 1 in order."""
    check(cfg)
    start_processes()
    tokenizer = load_tokenizer(cfg)
    problems = read_problems(cfg.problems, cfg.problems_per_step, tokenizer, cfg)
    eval_problems = read_problems(cfg.eval_problems, 1, tokenizer, cfg)

    folder, checkpoint, progress = open_run(cfg)
    sampler = (VLLMSampler if cfg.sampler == "vllm" else TorchSampler)(cfg, tokenizer)
    policy, optimizer = load_trainer(checkpoint, cfg)
    reference = load_policy(cfg.model, cfg, train=False) if cfg.kl_coef else None
    sampler.load(policy)
    if progress["step"] == 0:
        log(folder, progress | evaluate(eval_problems, sampler, progress, cfg))

    caught = []  # after SIGTERM or Ctrl-C the run ends with its step
    for signum in signal.SIGTERM, signal.SIGINT:
        signal.signal(signum, lambda *_: caught.append(1))

    for step in range(progress["step"], cfg.steps):
        start = time.perf_counter()
        batch = next_problems(problems, step, cfg)  # line 1 of Algorithm 1; then 2:
        counts, pilots, metrics = choose_counts(batch, policy, sampler, progress, cfg)
        groups = sample(batch, counts, sampler, progress, cfg, kept=pilots)  # line 3
        metrics |= update(policy, reference, optimizer, groups, cfg)  # line 4
        sampler.load(policy)  # which draws from the new policy from now on

        done = progress["step"] = step + 1
        progress["seconds"] += time.perf_counter() - start
        log(folder, progress | describe(groups) | metrics)
        if done == cfg.steps or done % cfg.eval_every == 0:
            log(folder, progress | evaluate(eval_problems, sampler, progress, cfg))
        stop = sum_over_ranks(len(caught))
        if done == cfg.steps or stop or done % cfg.save_every == 0:
            save(folder, policy, optimizer, tokenizer, done)
        if stop:
            break

    if RANK == 0:
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        accuracy = [row["accuracy"] for row in rows if "accuracy" in row]
        print(f"accuracy_before: {accuracy[0]:.4f}\naccuracy_after: {accuracy[-1]:.4f}")
        for name in "responses", "tokens", "seconds":
            print(f"{name}_total: {round(progress[name], 1)}")
        if progress["step"] < cfg.steps:
            print(f"stopped at step {done}: repeat the command with --run-dir {folder}")
        print(f"plot it: python bench/plot.py {folder}")
    dist.barrier()
    sampler.close()


# ---- E-step: how many responses
def choose_counts(batch, policy, sampler, progress, cfg):
    """nᵢ of every problem, N/m each; no pilots, no metrics."""
    return [cfg.samples_per_problem] * len(batch), None, {}


# ---- M-step: what they teach
def advantages(rewards):
    """Advantages of the responses to a problem, [nᵢ]: 1/|Dᵢ| for accepted ones."""
    # 1/(nᵢ pᵢ) of Lemma 1, with p̂ᵢ = |Dᵢ|/nᵢ                             Algorithm 1
    return rewards / max(rewards.sum(), 1)


def policy_loss(logp_T, old_logp_T, advantage, cfg):
    """Loss of each token of a response, [T]; old_logp_T are the sampler's own."""
    ratio_T = (logp_T - old_logp_T).exp()  # on-policy 1 in value, but not in gradient
    clipped_T = ratio_T.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    # min(sₜ A, clip(sₜ, 1 - ε_low, 1 + ε_high) A), sₜ ratio, A advantage      Eq. 6
    return -torch.minimum(ratio_T * advantage, clipped_T * advantage)


def set_advantages(groups, cfg):
    """Sets advantages, each problem alike; returns the responses that teach."""
    teaching = []
    for group in filter(len, groups):
        values = advantages(np.array([r.reward for r in group])) / len(groups)
        for response, value in zip(group, values):
            response.advantage = 0.0 if response.truncated else value
            if response.advantage or cfg.kl_coef:
                teaching.append(response)
    return teaching


def update(policy, reference, optimizer, groups, cfg):
    """M-step: an optimiser update for each of updates_per_step parts of the batch."""
    sums, tokens, grad_norms = np.zeros(3), 0, []
    for part in range(cfg.updates_per_step):
        # Advantages are fixed before micro-batches are cut: these cuts do not matter.
        teaching = set_advantages(groups[part :: cfg.updates_per_step], cfg)
        if not teaching:
            continue  # there is nothing to learn

        lengths = [len(r.token_ids) for r in teaching]
        tokens += sum(lengths)

        for micro in micro_batches(teaching, cfg):
            turn = micro or teaching[:1]  # an idle rank joins in what FSDP gathers
            logps = token_logprobs(policy, turn, cfg)
            references = token_logprobs(reference, turn, cfg) if reference else logps

            loss = kl = shift = 0 * logps[0].sum()  # 0 with a graph, for idle ranks
            for response, logp_T, reference_T in zip(micro, logps, references):
                old_T = logp_T.new_tensor(response.logprobs)
                # Σ advantage log P over responses, through its ratio          Eq. 5
                loss = loss + policy_loss(logp_T, old_T, response.advantage, cfg).sum()
                gap_T = reference_T - logp_T
                kl = kl + (gap_T.expm1() - gap_T).sum()  # the k3 estimator
                shift = shift + (logp_T - old_T).abs().sum()

            # Eq. 6 has 1/|y|; the mean length leaves the sum as Lemma 1 wants it.
            loss = loss / np.mean(lengths)
            total_loss = loss + cfg.kl_coef * kl / sum(lengths)
            (total_loss * WORLD).backward()  # FSDP takes the mean over ranks
            sums += [loss.item(), kl.item(), shift.item()]

        most = cfg.max_grad_norm
        norm = clip_grad_norm_(policy.parameters(), most, error_if_nonfinite=True)
        grad_norms.append(norm.full_tensor().item())
        optimizer.step()
        optimizer.zero_grad()

    loss, kl, shift = sum_over_ranks(sums)
    metrics = {"loss": loss / cfg.updates_per_step, "kl": kl / max(tokens, 1)}
    metrics |= {"logp_shift": shift / max(tokens, 1), "updates": len(grad_norms)}
    return metrics | {"grad_norm": np.mean(grad_norms or 0)}


# ---- Sampling
@dataclass
class Response:
    """A response: where it belongs, what the sampler draws, what the verifier finds."""

    i: int  # place of its problem in the batch
    prompt_ids: list[int]
    seed: int
    token_ids: list[int]
    logprobs: list[float]  # of token_ids when drawn
    truncated: bool = False  # no end token: counts as wrong, teaches nothing
    boxed: bool = False  # holds an answer in a box
    reward: float = 0.0  # 1 if the answer is right
    advantage: float = 0.0  # 0: teaches nothing

    def __len__(self):
        return len(self.prompt_ids) + len(self.token_ids)


def sample(batch, counts, sampler, progress, cfg, stream="train", kept=None):
    """Fills the kept groups up to counts[i] verified responses each, on all ranks."""
    groups, new = kept or [[] for _ in batch], []
    for i, problem in enumerate(batch):
        for j in range(len(groups[i]), counts[i]):
            # A response has random numbers of its own, whichever rank draws it.
            key = [cfg.seed, *stream.encode(), progress["step"], problem.index, j]
            seed = np.random.SeedSequence(key).generate_state(1).item()
            new.append(Response(i, problem.prompt_ids, seed, [], []))

    mine = new[RANK::WORLD]
    if mine:
        sampler.draw(mine)

    texts = [sampler.decode(r.token_ids, skip_special_tokens=True) for r in mine]
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


def count_accepted(groups):
    """|Dᵢ| of every problem, the number of its accepted responses."""
    return np.array([sum(r.reward for r in group) for group in groups])


def describe(groups):
    """Metrics of the responses of a step or an evaluation."""
    responses = [r for group in groups for r in group]
    counts, accepted = np.array([len(g) for g in groups]), count_accepted(groups)

    return {
        "counts": counts,
        "accepted": accepted,
        "reward": accepted.sum() / counts.sum(),
        "accept": np.mean((accepted / counts)[counts > 0]),  # every problem alike
        "boxed": np.mean([r.boxed for r in responses]),
        "truncated": np.mean([r.truncated for r in responses]),
        "entropy": -np.mean(np.concatenate([r.logprobs for r in responses])),
    }


def evaluate(problems, sampler, progress, cfg):
    """Average@k and pass@k of held-out problems, outside the budget and progress."""
    counts = [cfg.eval_samples] * len(problems)
    row = describe(sample(problems, counts, sampler, dict(progress), cfg, "eval"))

    rates = row.pop("accepted") / row.pop("counts")
    row |= {"accuracy": row.pop("reward"), "pass_at_k": np.mean(rates > 0)}
    return row | {"accuracy_se": rates.std() / len(rates) ** 0.5}  # over problems


class TorchSampler:
    """Draws responses with its own copy of the parameters and a cache."""

    def __init__(self, cfg, tokenizer):
        model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=DTYPE)
        self.model = model.to(DEVICE)
        self.decode, self.cfg = tokenizer.decode, cfg
        ends = model.generation_config.eos_token_id  # one, several or None
        self.ends = {tokenizer.eos_token_id, *np.ravel(ends)}
        self.close = dist.destroy_process_group

    @torch.inference_mode()
    def draw(self, rows):
        """Fills in tokens and log-probabilities of responses, at most 512 at once."""
        if rows[512:]:
            self.draw(rows[512:])
        rows = rows[:512]
        # A prompt runs once for all its responses, padded on the left with a masked -1.
        prompts = {row.i: torch.tensor(row.prompt_ids) for row in rows}
        ids_BT = rnn.pad_sequence([*prompts.values()], True, -1, "left").to(DEVICE)
        ids_BT, mask_BT = ids_BT.clamp(0), (ids_BT >= 0).long()
        cache = DynamicCache(config=self.model.config)

        limit = self.cfg.max_new_tokens
        numbers = [np.random.default_rng(row.seed).random(limit) for row in rows]
        random_BT = torch.from_numpy(1 - np.array(numbers)).to(DEVICE)  # in (0, 1]
        for t in trange(limit, leave=False, disable=RANK > 0 or None):
            position_BT = (mask_BT.cumsum(-1) - mask_BT)[:, -ids_BT.shape[1] :]
            inputs = {"attention_mask": mask_BT, "position_ids": position_BT}
            inputs |= {"past_key_values": cache, "logits_to_keep": 1}
            logit_BV = self.model(ids_BT, **inputs).logits[:, -1].float()
            if t == 0:  # cache and logits had a row a prompt; from now on, a response
                parents = [list(prompts).index(row.i) for row in rows]
                cache.batch_select_indices(parents)
                logit_BV, mask_BT = logit_BV[parents], mask_BT[parents]

            # the first token whose cumulative probability reaches its random number
            logp_BV = (logit_BV / self.cfg.temperature).log_softmax(-1)
            cdf_BV = logp_BV.exp().cumsum(-1, dtype=torch.float64)
            token_B = (cdf_BV < random_BT[:, t, None] * cdf_BV[:, -1:]).sum(-1)
            logp_B = logp_BV.gather(-1, token_B[:, None])[:, 0]
            for row, token, logp in zip(rows, token_B.tolist(), logp_B.tolist()):
                row.token_ids.append(token)
                row.logprobs.append(logp)

            live = [b for b, r in enumerate(rows) if r.token_ids[-1] not in self.ends]
            if not live:
                return
            if len(live) < len(rows):
                cache.batch_select_indices(live)
                rows, random_BT = [rows[b] for b in live], random_BT[live]
                token_B, mask_BT = token_B[live], mask_BT[live]
            ids_BT, mask_BT = token_B[:, None], F.pad(mask_BT, (0, 1), value=1)

        for row in rows:
            row.truncated = True

    def load(self, policy):
        """Copies the policy's parameters, gathered from their shards."""
        for target, source in zip(self.model.parameters(), policy.parameters()):
            target.data.copy_(source.data.full_tensor())


class VLLMSampler:
    """Draws responses with vLLM, one engine a process beside the trainer."""

    def __init__(self, cfg, tokenizer):
        from vllm import LLM, SamplingParams

        self.decode, self.sleeps = tokenizer.decode, cfg.sleep
        self.params = SamplingParams
        base = {"temperature": cfg.temperature, "max_tokens": cfg.max_new_tokens}
        self.limits = base | {"logprobs": 0, "flat_logprobs": True, "detokenize": False}
        self.llm = LLM(
            cfg.model,
            dtype=DTYPE,
            max_model_len=-1,  # the model's own limit, or what fits into memory
            distributed_executor_backend="external_launcher",  # torchrun's processes
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled
            gpu_memory_utilization=0.7 if cfg.sleep else 0.4,  # beside the trainer
            enable_sleep_mode=cfg.sleep,
            enforce_eager=DEVICE == "cpu",
        )
        self.close = self.llm.llm_engine.engine_core.shutdown  # ends the group, too
        if cfg.sleep:
            self.llm.sleep()

    def draw(self, responses):
        """Fills in the tokens and log-probabilities of responses."""
        self.wake()
        prompts = [{"prompt_token_ids": r.prompt_ids} for r in responses]
        params = [self.params(seed=r.seed, **self.limits) for r in responses]
        outputs = self.llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
        for response, output in zip(responses, outputs):
            completion = output.outputs[0]
            response.token_ids = list(completion.token_ids)
            response.logprobs = list(completion.logprobs.logprobs)
            response.truncated = completion.finish_reason == "length"
        if self.sleeps:  # the trainer needs the memory; parameters wait on the host
            self.llm.sleep()

    def load(self, policy):
        """Streams parameters into the engine, which forgets prefixes of old ones."""
        self.wake()
        named = policy.named_parameters()
        tensors = ((name, w.data.to(DTYPE).full_tensor()) for name, w in named)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        assert self.llm.reset_prefix_cache(), "vLLM keeps prefixes of old parameters"

    def wake(self):
        """Takes back the memory that the engine left to the trainer."""
        torch.cuda.empty_cache()  # what the trainer holds but does not use
        if self.llm.llm_engine.is_sleeping():
            self.llm.wake_up()


# ---- Policy
def load_policy(source, cfg, train=True):
    """The model in float32, sharded over all ranks; it computes in bf16 on CUDA."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    precision = MixedPrecisionPolicy(param_dtype=DTYPE, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh(DEVICE, (WORLD,))
    # Sharded even after a forward pass without backward: sampler and save read shards.
    sharding = {"mesh": mesh, "mp_policy": precision, "reshard_after_forward": True}
    for layer in list(model.modules()):  # sharding renames classes
        if type(layer).__name__ in model._no_split_modules:
            layer.training = cfg.gradient_checkpointing  # its switch; children: eval
            fully_shard(layer.float(), **sharding)  # moves it to the device, too
    return fully_shard(model.float(), **sharding).requires_grad_(train)


def run_policy(policy, responses, cfg):
    """Logits [T, V], last hidden states [T, D] and tokens [T] of each response."""
    ids = [torch.tensor(r.prompt_ids + r.token_ids) for r in responses]
    # The padding is on the right, where causal attention does not look.
    ids_BT = rnn.pad_sequence(ids, batch_first=True).to(DEVICE)
    result = policy(ids_BT, use_cache=False, output_hidden_states=True)
    outputs, columns = [], (ids_BT, result.logits, result.hidden_states[-1])
    for response, ids_T, logit_TV, hidden_TD in zip(responses, *columns):
        span = slice(len(response.prompt_ids) - 1, len(response) - 1)
        logit_TV = logit_TV[span].float() / cfg.temperature  # of the next token
        outputs.append((logit_TV, hidden_TD[span].float(), ids_T[1:][span]))
    return outputs


def token_logprobs(policy, responses, cfg):
    """Log-probabilities of the tokens of each response, a list of [T]."""
    outputs = run_policy(policy, responses, cfg)
    return [-F.cross_entropy(x_TV, y_T, reduction="none") for x_TV, _, y_T in outputs]


def micro_batches(responses, cfg):
    """This rank's batches of like length, of at most tokens_per_batch with padding."""
    responses = sorted(responses, key=len, reverse=True)
    batches = []
    while responses:
        size = max(1, cfg.tokens_per_batch // len(responses[0])) * WORLD
        batches.append(responses[RANK:size:WORLD])
        responses = responses[size:]
    return batches


# ---- Problems, run folder, processes
def check(cfg):
    """Refuses the commonest mistakes before anything is loaded or written."""
    zero = "steps pilot_samples prior alpha clip_low clip_high kl_coef seed"  # may be 0
    for name, value in asdict(cfg).items():
        if type(value) in (int, float) and value <= 0 and (value or name not in zero):
            raise SystemExit(f"--{name.replace('_', '-')} {value} is too small")
    if cfg.updates_per_step > cfg.problems_per_step:
        raise SystemExit("--updates-per-step exceeds --problems-per-step")
    if cfg.problems != Config.problems and cfg.eval_problems == Config.eval_problems:
        raise SystemExit("--problems needs --eval-problems other than the tiny ones")
    if cfg.sampler == "vllm" and not find_spec("vllm"):
        raise SystemExit("--sampler vllm needs its package: pip install vllm")


def load_tokenizer(cfg):
    """The model's tokenizer, with a chat template."""
    try:
        AutoConfig.from_pretrained(cfg.model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model {cfg.model}: {str(error).splitlines()[0]}") from None
    if not tokenizer.chat_template:
        raise SystemExit(f"--model {cfg.model} has no chat template; take a chat model")
    return tokenizer


def read_problems(path, least, tokenizer, cfg):
    """Problems of a JSON-lines file, at least so many, through the chat template."""
    if not Path(path).is_file():
        raise SystemExit(f"{path}: no such file; data/prepare.py makes them")
    lines, problems = Path(path).read_text("utf-8-sig").split("\n"), []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, answer = row.get("problem"), gold_answer(row.get("answer"))
            assert isinstance(text, str) and text.strip(), "the problem is no text"
        except Exception as error:
            raise SystemExit(f"{path}, line {number}: {error} in {line:.80}") from None

        chat = [{"role": "user", "content": f"{text}\n{INSTRUCTION}"}]
        options = {"add_generation_prompt": True, "return_dict": False}
        prompt_ids = tokenizer.apply_chat_template(chat, **options)
        if len(prompt_ids) <= cfg.max_prompt_tokens:
            problems.append(Problem(number, prompt_ids, answer))
    if RANK == 0:
        print(f"{path}: {len(problems)} problems of at most --max-prompt-tokens")
    if len(problems) < least:
        raise SystemExit(f"{path}: too few problems, {least} are needed")
    return problems


def next_problems(problems, step, cfg):
    """The m problems of a step; every epoch has a random order of its own."""
    m = cfg.problems_per_step
    epoch, place = divmod(step, len(problems) // m)
    order = np.random.default_rng([cfg.seed, epoch]).permutation(len(problems))
    return [problems[i] for i in order[place * m :][:m]]


def open_run(cfg):
    """The run's folder; where it holds a run, the last checkpoint and its progress."""
    script = Path(sys.argv[0]).stem
    default = f"runs/{script}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = Path(cfg.run_dir or default)
    config = folder / "config.json"
    settings = asdict(cfg) | {"script": script, "run_dir": ""}  # folders may move
    if config.is_file():
        saved = json.loads(config.read_text()) | {"steps": cfg.steps}
        if changed := [x for x in settings.items() if x not in saved.items()]:
            raise SystemExit(f"{folder} has other settings than {dict(changed)}")

    progress, history = dict.fromkeys(["step", "responses", "tokens", "seconds"], 0), ""
    checkpoint = max(folder.glob("checkpoint-??????"), default=None)
    if checkpoint:  # lines of later steps will be written again
        history = (checkpoint / "metrics.jsonl").read_text()
        last = json.loads(history.splitlines()[-1])
        progress = {name: last[name] for name in progress}

    dist.barrier()  # all have read
    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps(settings, indent=2))
        (folder / "metrics.jsonl").write_text(history)
        shutil.copy(__file__, folder)
    return folder, checkpoint, progress


def save(folder, policy, optimizer, tokenizer, step):
    """Writes a checkpoint, a Hugging Face folder, under another name and renames it."""
    final = folder / f"checkpoint-{step:06d}"
    draft = folder / "checkpoint.part"
    tensors, state = dcp.get_state_dict(policy, optimizer, options=WHOLE)
    if RANK > 0:
        return

    try:
        policy.save_pretrained(draft, state_dict=tensors)
        tokenizer.save_pretrained(draft)
        torch.save(state, draft / "optimizer.pt")
        shutil.copy(folder / "metrics.jsonl", draft)
        draft.rename(final)
    except Exception as error:
        raise SystemExit(f"{final} cannot be written: {error}") from None

    for old in set(folder.glob("checkpoint-??????")) - {final}:
        shutil.rmtree(old)


def load_trainer(checkpoint, cfg):
    """The policy and its optimiser, as the checkpoint has them where there is one."""
    try:
        policy = load_policy(checkpoint or cfg.model, cfg)
        state = checkpoint and torch.load(checkpoint / "optimizer.pt", mmap=True)
    except Exception as error:
        raise SystemExit(f"{checkpoint or cfg.model} does not load: {error}") from None

    optimizer = torch.optim.AdamW(policy.parameters(), cfg.learning_rate, fused=True)
    if checkpoint:  # sharded anew over however many ranks there are
        dcp.set_optimizer_state_dict(policy, optimizer, state, options=WHOLE)
    return policy, optimizer


def log(folder, row):
    """Appends a row to metrics.jsonl and prints its line."""
    if RANK > 0:
        return
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row, default=np.ndarray.tolist) + "\n")

    if "accuracy" in row:
        line = f"accuracy {row['accuracy']:.3f} ± {row['accuracy_se']:.3f} | pass@k "
        line += f"{row['pass_at_k']:.3f} | boxed {row['boxed']:.3f}"
    else:
        line = (
            f"reward {row['reward']:.3f} | accept {row['accept']:.3f} | n "
            f"{min(row['counts']):2d}..{max(row['counts']):<3d} | bound "
            f"{row.get('bound', 1):.2f} | loss {row['loss']:+.3f} | grad "
            f"{row['grad_norm']:.3f} | responses {row['responses']:6,d}"
        )
    if row["truncated"] > 0.01:
        line += f" | truncated {row['truncated']:.2f}: raise --max-new-tokens?"
    print(f"step {row['step']:4d} | {line} | {row['seconds']:.0f} s", flush=True)


def sum_over_ranks(values):
    """Sums a number, or each of a list, over the ranks."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def start_processes():
    """Joins the process group, of one without torchrun, and quietens the libraries."""
    os.environ |= ENV
    torch.set_num_threads(int(ENV.get("OMP_NUM_THREADS", 1)))  # 1 is best if tiny
    warnings.simplefilter("ignore")
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    if DEVICE == "cuda":
        torch.cuda.set_device(int(ENV["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo")


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,)))
