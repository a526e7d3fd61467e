"""GVM-GRPO (arXiv 2505.02391): GRPO with the budget that minimises the gradient's variance.
Differs from gvm_raft.py in the M-step only: every response counts, by its reward's distance from
the problem's mean in standard deviations. Its pilots estimate pᵢ and Gᵢ of the accepted responses
as there; `--pilot-samples 0` is plain GRPO, `--no-reuse-pilot --prior 0` the paper's own recipe.

One step is Algorithm 1 of the paper:
  1. draw a batch of m problems;
  2. E-step: choose how many responses nᵢ each problem gets out of the budget N (sample_counts);
  3. draw them from the policy; verify_math.py accepts those that are right;
  4. M-step: follow the gradient of their log-probabilities, weighted so that every problem counts
     the same whatever its nᵢ (advantages), with RAFT++'s importance ratio and clip (Eq. 6).

    python SCRIPT.py                                            # the embedded tiny model, one CPU
    torchrun --standalone --nproc-per-node 8 SCRIPT.py --model Qwen/Qwen2.5-Math-1.5B ...

The three scripts are equal but for sample_counts and advantages, on purpose. Left out, to stay one
file: asynchronous sampling, tensor parallelism, learning-rate schedules, experiment trackers.
Shapes: P problems, S responses of one problem (ragged: nᵢ), B responses of a batch, T tokens, K
response tokens of a batch packed without padding, V vocabulary, D hidden size.
"""

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from itertools import chain, groupby
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import tyro
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm, trange
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging as transformers_logging

from allocator import allocate, estimate, predicted_variance
from verify_math import verify_batch

TINY = Path(__file__).resolve().parent / "tiny"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
INSTRUCTION = "Let's reason step by step and put the final answer within \\boxed{}."


@dataclass(frozen=True)
class Config:
    """Settings; the defaults train the embedded tiny model on one CPU core in under two minutes."""

    model: str = str(TINY / "model")  # Hugging Face folder or hub name, with a chat template
    problems: str = str(TINY / "train.jsonl")  # .jsonl, .csv or .parquet file, or hub name[:split]
    eval_problems: str = str(TINY / "test.jsonl")  # held-out problems, in the same formats
    problem_column: str = "problem"  # column with the problem's text
    answer_column: str = "answer"  # column with the right answer
    max_prompt_tokens: int = 1024  # longer problems are dropped, with a count

    steps: int = 10  # pairs of E-step and M-step; 0 only evaluates
    problems_per_step: int = 64  # m, the batch of Algorithm 1
    samples_per_problem: int = 8  # mean responses per problem, pilots included: N = this times m
    pilot_samples: int = 1  # N' of Algorithm 2; 0: no pilot, the same n_i for every problem
    reuse_pilot: bool = True  # pilots are training responses; if not, N more are drawn (the paper)
    prior: float = 1.0  # strength of the prior on p_i, in responses; 0 is the paper's estimate
    alpha: float = 1e-3  # α of Eq. 7: keeps n_i bounded as p_i goes to 0
    beta: float = 2.0  # β of Eq. 7
    temperature: float = 1.0  # of sampling, in training and evaluation
    max_new_tokens: int = 64  # longest response
    learning_rate: float = 3e-4  # AdamW, constant, weight decay 0.01, gradient norm clipped at 1
    updates_per_step: int = 4  # optimiser updates a step, on disjoint mini-batches of problems
    weighting: Literal["algorithm1", "reward", "token"] = "algorithm1"  # 1/|D_i|; 1/n_i; token mean
    clip_low: float = 0.2  # ε_low of Eq. 6: importance ratios are clipped below 1 - this
    clip_high: float = 0.28  # ε_high of Eq. 6: and above 1 + this
    kl_coef: float = 0.0  # weight of the KL divergence from the starting model (k3 estimator)

    eval_samples: int = 4  # k of Average@k and pass@k
    eval_every: int = 0  # steps between evaluations; 0: only before and after training
    save_every: int = 5  # steps between checkpoints
    seed: int = 0  # of all random numbers
    run_dir: str = ""  # folder of the run; default runs/<script>-<time>
    resume: bool = False  # continue the run in --run-dir from its last checkpoint
    sampler: Literal["auto", "torch", "vllm"] = "auto"  # auto: vllm where CUDA and vllm are there
    sleep: bool = False  # vllm frees its GPU memory between its turns, for models that need it all
    tokens_per_batch: int = 2048  # padded tokens of a micro-batch; TorchSampler takes 32 times that
    gradient_checkpointing: bool = False  # recompute activations in the backward pass


class Problem(NamedTuple):
    """A problem as the model sees it; index is its row in the file."""

    index: int
    prompt_ids: list[int]
    answer: str


@dataclass
class Response:
    """A response: its tokens, the sampler's log-probabilities of them, reward 1 if right else 0."""

    prompt_ids: list[int]
    token_ids: np.ndarray
    logprobs: np.ndarray
    reward: float
    rank: int = 0  # of the process that drew it
    weight: float = 0.0  # of its log-probability in the objective
    kl_weight: float = 0.0  # of its divergence from the starting model


# ---- Settings and problems


def refuse(sentence):
    """Wrong input: one sentence on stderr and exit code 2."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once a node: its files may differ
        print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def attempt(complaint, function, *args, **settings):
    """function(*args, **settings); whatever it raises becomes one sentence."""
    try:
        return function(*args, **settings)
    except Exception as error:  # libraries and hubs raise dozens of types
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        refuse(f"{complaint} ({reason.splitlines()[0]})")


def check(cfg):
    """Refuses settings that make no sense, before anything is loaded or written."""
    least = {"steps": 0, "eval_every": 0, "seed": 0, "temperature": 0.01}
    least |= {"pilot_samples": 0, "beta": 2}
    if cfg.reuse_pilot and cfg.pilot_samples > cfg.samples_per_problem:
        refuse("--pilot-samples exceeds --samples-per-problem: the pilots are part of the budget")
    for name, value in asdict(cfg).items():
        low = least.get(name, int(type(value) is int))  # counts start at 1, other numbers at 0
        if not isinstance(value, str) and not low <= value < float("inf"):
            refuse(f"--{name.replace('_', '-')} must be at least {low}, not {value}")
    if cfg.updates_per_step > cfg.problems_per_step:
        refuse("--updates-per-step exceeds --problems-per-step: every update needs a problem")
    if cfg.sampler == "vllm" and not find_spec("vllm"):
        refuse("--sampler vllm needs the package vllm: pip install vllm")
    if cfg.resume and not (Path(cfg.run_dir) / "config.json").is_file():
        refuse(f"--resume continues the run in --run-dir, but there is none in '{cfg.run_dir}'")


def read_rows(path):
    """The rows, as dicts, of a .jsonl, .csv or .parquet file or of a hub data set name[:split]."""
    kind = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}.get(Path(path).suffix)
    if kind and not Path(path).is_file():
        refuse(f"{path}: no such file")
    if kind == "json":
        for number, line in enumerate(Path(path).read_bytes().rstrip().splitlines(), start=1):
            row = attempt(f"{path}, line {number}: not valid JSON", json.loads, line)
            if not isinstance(row, dict):
                refuse(f"{path}, line {number}: not a JSON object")
            yield row
        return
    from datasets import load_dataset, logging  # slow to import

    logging.set_verbosity(logging.CRITICAL)
    name, _, split = (kind or path).partition(":")
    source = {"data_files": path if kind else None, "split": split or "train"}
    complaint = f"{path} is no file or hub data set that can be read"
    yield from attempt(complaint, load_dataset, name, **source)


def load_problems(path, tokenizer, cfg):
    """Problems through the model's chat template; over-long ones are dropped, with a count."""
    problems, complaint = [], f"--model {cfg.model}: its chat template fails"
    encode = partial(attempt, complaint, tokenizer.apply_chat_template, return_dict=False)
    for index, row in enumerate(read_rows(path)):
        for column in (cfg.problem_column, cfg.answer_column):
            if row.get(column) is None or not str(row[column]).strip():
                there = ", ".join(row)
                refuse(f"{path}, row {index + 1}: column '{column}' is empty or not among {there}")
        message = {"role": "user", "content": f"{row[cfg.problem_column]}\n{INSTRUCTION}"}
        prompt_ids = encode([message], add_generation_prompt=True)
        problems.append(Problem(index, prompt_ids, str(row[cfg.answer_column])))
    kept = [p for p in problems if len(p.prompt_ids) <= cfg.max_prompt_tokens]
    if RANK == 0 and len(kept) < len(problems):
        print(f"{path}: dropped {len(problems) - len(kept)} problems of too many tokens")
    return kept or refuse(f"{path}: holds no problem of at most {cfg.max_prompt_tokens} tokens")


def next_problems(problems, step, cfg):
    """The m problems of a step; every epoch has its own random order and full steps only."""
    epoch, place = divmod(step, len(problems) // cfg.problems_per_step)
    order = np.random.default_rng([cfg.seed, epoch]).permutation(len(problems))
    return [problems[i] for i in order[place * cfg.problems_per_step :][: cfg.problems_per_step]]


def load_model(cfg, dtype):
    """The starting model."""
    complaint = f"--model {cfg.model} cannot be loaded"
    return attempt(complaint, AutoModelForCausalLM.from_pretrained, cfg.model, dtype=dtype)


# ---- Sampling


class TorchSampler:
    """Draws responses with its own copy of the weights and transformers' cache, on any device."""

    def __init__(self, cfg, tokenizer, device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = load_model(cfg, dtype).to(device).eval()
        self.tokenizer, self.cfg, self.device = tokenizer, cfg, device
        self.close = lambda: None  # nothing to shut down
        ends = [tokenizer.eos_token_id, self.model.generation_config.eos_token_id]  # or a list
        self.ends = torch.tensor(np.hstack([end for end in ends if end is not None])).to(device)

    def __call__(self, prompts, seeds):
        """One response per prompt, from its own seed: [(token ids [T], log-probabilities [T])]."""
        longest = max(map(len, prompts), default=0) + self.cfg.max_new_tokens
        size = max(1, 32 * self.cfg.tokens_per_batch // longest)
        starts = range(0, len(prompts), size)
        return [r for i in starts for r in self.draw(prompts[i : i + size], seeds[i : i + size])]

    @torch.inference_mode()
    def draw(self, prompts, seeds):
        """A batch of responses, each token by the inverse of its cumulative distribution."""
        limit, groups = self.cfg.max_new_tokens, [(p, len(list(g))) for p, g in groupby(prompts)]
        # a uniform number in (0, 1] per token, from the response's own generator
        uniform_BT = np.stack([1 - np.random.default_rng(s).random(limit, "f4") for s in seeds])
        uniform_BT = torch.from_numpy(uniform_BT).to(self.device)
        token_BT = torch.full_like(uniform_BT, -1, dtype=torch.long)  # -1 stays after the end
        logp_BT, live_B = uniform_BT.clone(), torch.arange(len(prompts), device=self.device)
        ids_BT = pad_sequence([torch.tensor(p) for p, _ in groups], True, -1, "left").to(live_B)
        mask_BT, cache = (ids_BT >= 0).long(), DynamicCache(config=self.model.config)
        for t in trange(limit, desc="sample", leave=False, disable=RANK > 0):
            place_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
            inputs = ids_BT.clamp(min=0), mask_BT, place_BT, cache
            out = self.model(*inputs, use_cache=True, logits_to_keep=1)
            logit_BV = out.logits[:, -1].float()
            if t == 0:  # each prompt ran once: repeat it for its responses
                row_B = torch.repeat_interleave(torch.tensor([n for _, n in groups])).to(live_B)
                cache.batch_select_indices(row_B)
                logit_BV, mask_BT = logit_BV[row_B], mask_BT[row_B]
            logps_BV = (logit_BV / self.cfg.temperature).log_softmax(-1)
            cdf_BV = logps_BV.exp().cumsum(-1)
            # the first token whose cumulative probability reaches the uniform number
            token_B = (cdf_BV < uniform_BT[live_B, t, None] * cdf_BV[:, -1:]).sum(-1)
            token_BT[live_B, t] = token_B
            logp_BT[live_B, t] = logps_BV.gather(-1, token_B[:, None])[:, 0]
            ended_B = torch.isin(token_B, self.ends)
            if ended_B.all():
                break
            if ended_B.any():  # drop the finished rows
                keep = (~ended_B).nonzero()[:, 0]
                live_B, token_B, mask_BT = live_B[keep], token_B[keep], mask_BT[keep]
                cache.batch_select_indices(keep)
            ids_BT, mask_BT = token_B[:, None], torch.nn.functional.pad(mask_BT, (0, 1), value=1)
        pairs = zip(token_BT.cpu().numpy(), logp_BT.cpu().numpy())
        return [(ids_T[ids_T >= 0], logp_T[ids_T >= 0]) for ids_T, logp_T in pairs]

    def load(self, policy):
        """Copies the policy's weights, gathered from their shards."""
        for target, weight in zip(self.model.parameters(), policy.parameters()):
            target.data.copy_(weight.data.to(target.dtype).full_tensor())


class VLLMSampler:
    """Draws responses with vLLM, one engine per process beside the trainer."""

    def __init__(self, cfg, tokenizer, device):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vllm is imported
        from vllm import LLM, SamplingParams

        self.tokenizer, on_gpu = tokenizer, device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        limits = {"temperature": cfg.temperature, "max_tokens": cfg.max_new_tokens}
        self.params = partial(SamplingParams, logprobs=0, **limits)
        self.llm = LLM(
            cfg.model,
            dtype=self.dtype,
            max_model_len=-1,  # the model's own limit, or what fits into memory
            distributed_executor_backend="external_launcher",  # torchrun's processes
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled
            gpu_memory_utilization=0.7 if cfg.sleep else 0.4,  # the trainer needs the rest
            enable_sleep_mode=cfg.sleep and on_gpu,
            enforce_eager=not on_gpu,
        )
        self.sleeps = cfg.sleep
        self.close = self.llm.llm_engine.engine_core.shutdown  # and the process group with it

    def __call__(self, prompts, seeds):
        """One response per prompt, from its own seed: [(token ids [T], log-probabilities [T])]."""
        self.wake()
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [self.params(seed=seed) for seed in seeds]
        bar = RANK == 0 and partial(tqdm, leave=False)
        drawn = [o.outputs[0] for o in self.llm.generate(requests, params, use_tqdm=bar)]
        if self.sleeps:
            self.llm.sleep(level=1)  # the weights wait in the host's memory
        logprobs = [[at[i].logprob for i, at in zip(d.token_ids, d.logprobs)] for d in drawn]
        return [(np.array(d.token_ids), np.array(p, "f4")) for d, p in zip(drawn, logprobs)]

    def load(self, policy):
        """Streams the weights into the engine, which forgets prefixes cached under the old ones."""
        self.wake()
        named = policy.model.named_parameters()
        weights = ((name, weight.data.to(self.dtype).full_tensor()) for name, weight in named)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()

    def wake(self):
        """Takes back the memory that the engine left to the trainer, if it did."""
        if self.llm.llm_engine.is_sleeping():
            torch.cuda.empty_cache()  # what the trainer keeps but does not use
            self.llm.wake_up()


def sample(problem_P, count_P, sampler, progress, cfg, *, stream="train", kept_PS=None):
    """Tops every problem up from its kept responses to count_P verified ones: [P][S], all ranks."""
    response_PS = [list(kept_S) for kept_S in kept_PS] if kept_PS else [[] for _ in problem_P]
    jobs = [(p, s) for p, n in enumerate(count_P) for s in range(len(response_PS[p]), n)]
    # equal shares of the tokens to expect, whatever the nᵢ: no rank waits for the hardest problems
    length_PS = [[len(r.token_ids) for r in response_S] for response_S in response_PS]
    typical = np.mean(list(chain(*length_PS)) or 1)  # of a problem without kept responses
    cost_P = [np.mean(length_S or typical) for length_S in length_PS]
    ahead = np.cumsum([0, *(cost_P[p] for p, _ in jobs)])
    rank_J = (ahead[1:] + ahead[:-1]) / 2 * WORLD // max(ahead[-1], 1)
    share = [job for job, rank in zip(jobs, rank_J) if rank == RANK]
    name = int.from_bytes(stream.encode())  # pilots, training and evaluation share no random number
    keys = [(cfg.seed, name, progress["step"], problem_P[p].index, s) for p, s in share]
    seeds = [int(np.random.SeedSequence(key).generate_state(1)[0]) for key in keys]
    drawn = sampler([problem_P[p].prompt_ids for p, _ in share], seeds)
    texts = [sampler.tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in drawn]
    rewards = verify_batch(texts, [problem_P[p].answer for p, _ in share])
    mine = [(p, *pair, float(r), RANK) for (p, _), pair, r in zip(share, drawn, rewards)]
    dist.all_gather_object(gathered := [None] * WORLD, mine)
    for p, ids, logprobs, *verdict in chain(*gathered):
        if not np.isfinite(logprobs.sum()):
            raise SystemExit("stopped: the policy is not finite; the last checkpoint is good")
        response_PS[p].append(Response(problem_P[p].prompt_ids, ids, logprobs, *verdict))
        progress["responses"] += 1
        progress["tokens"] += len(ids)
    return response_PS


def evaluate(problems, sampler, progress, cfg):
    """Average@k and pass@k, k = eval_samples, at the sampling temperature: metrics and a line."""
    count_P, apart = [cfg.eval_samples] * len(problems), dict(progress)  # not in the budget
    response_PS = sample(problems, count_P, sampler, apart, cfg, stream="eval")
    reward_PS = np.array([[r.reward for r in response_S] for response_S in response_PS])
    row = {"accuracy": reward_PS.mean().item(), "pass_at_k": reward_PS.max(-1).mean().item()}
    return row, f"accuracy {row['accuracy']:.3f} | pass@{cfg.eval_samples} {row['pass_at_k']:.3f}"


# ---- Policy


class Policy(torch.nn.Module):
    """The model behind one forward pass, so that FSDP gathers the output head for it, too."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, measure, temperature):
        """measure(states [K, D], targets [K], lengths [B], head, temperature) of B responses."""
        head = self.model.get_output_embeddings()
        device = head.weight.device
        ids_BT = pad_sequence([torch.tensor([*r.prompt_ids, *r.token_ids]) for r in batch], True)
        # no mask: attention is causal and the padding on the right; h[t] predicts token t + 1
        out = self.model.base_model(ids_BT.to(device), use_cache=False)
        rows = zip(out.last_hidden_state, batch)
        hidden_KD = torch.cat([h[len(r.prompt_ids) - 1 :][: len(r.token_ids)] for h, r in rows])
        target_K = torch.from_numpy(np.concatenate([r.token_ids for r in batch])).to(device)
        return measure(hidden_KD, target_K, [len(r.token_ids) for r in batch], head, temperature)


def token_logprobs(hidden_KD, target_K, length_B, head, temperature, chunk=512):
    """Log-probability and entropy [K] of response tokens, with at most chunk rows of logits."""

    def measure(hidden_KD, target_K):
        logp_KV = (head(hidden_KD).float() / temperature).log_softmax(-1)
        entropy_K = -(logp_KV.detach().exp() * logp_KV.detach()).sum(-1)
        return logp_KV.gather(-1, target_K[:, None])[:, 0], entropy_K

    pieces = zip(hidden_KD.split(chunk), target_K.split(chunk))
    pairs = [checkpoint(measure, *piece, use_reentrant=False) for piece in pieces]
    return [torch.cat(values) for values in zip(*pairs)]


def load_policy(cfg, device):
    """The model in float32, sharded over all processes; it computes in bf16 on CUDA."""
    model = load_model(cfg, torch.float32)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    policy = Policy(model).train(cfg.gradient_checkpointing)  # eval mode: no dropout
    half = torch.bfloat16 if device.type == "cuda" else None
    precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh(device.type, (WORLD,))
    for module in [m for m in model.modules() if type(m).__name__ in model._no_split_modules]:
        fully_shard(module, mesh=mesh, mp_policy=precision)  # moves its own weights to the device
    # resharded after a forward pass without a backward pass, too: load() and save() read shards
    return fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=True)


def distinct(responses):
    """The different ones among the responses, and which of them each one is: its place [B]."""
    texts = [(r.reward, tuple(r.prompt_ids), r.token_ids.tobytes()) for r in responses]
    once = dict(zip(texts, responses))
    place = {text: i for i, text in enumerate(once)}
    return list(once.values()), np.array([place[text] for text in texts], int)


def micro_batches(responses, budget):
    """This rank's micro-batches, lists of indices: length-sorted, at most budget padded tokens."""
    size_B = [len(r.prompt_ids) + len(r.token_ids) for r in responses]
    budget = min(budget, -(-len(size_B) // WORLD) * max(size_B, default=0))  # work for all ranks
    batches = []
    for i in sorted(range(len(responses)), key=lambda i: -size_B[i]):
        if not batches or (len(batches[-1]) + 1) * size_B[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(i)
    # FSDP's ranks step together: every rank gets as many batches, an empty one is an idle turn
    return (batches + [[]] * (-len(batches) % WORLD))[RANK::WORLD]


# ---- E-step: how many responses


def head_grad_norms(hidden_KD, target_K, length_B, head, temperature, chunk=2**22):
    """||∇_W log P(y)||₂ [B] for the output head W from a forward pass; chunk numbers at a time."""
    dtype = torch.promote_types(hidden_KD.dtype, torch.float32)
    hidden_BTD = pad_sequence((hidden_KD.to(dtype) / temperature).split(length_B), True)
    target_BT = pad_sequence(target_K.split(length_B), True)
    logit_BTT = hidden_BTD @ head.weight[target_BT].to(dtype).mT  # at place t, of token yₛ
    own_BT1, rest_BT1, gram_BTT, start = logit_BTT.diagonal(0, 1, 2)[..., None], 0, 0, 0
    for weight_VD in head.weight.split(max(1, chunk // target_BT.numel())):  # of the vocabulary
        # odds of every other token against yₜ, sum rₜ; up to e³⁰ their products fit float32
        odds_BTV = (hidden_BTD @ weight_VD.T.to(dtype)).sub_(own_BT1).clamp_(max=30).exp_()
        here = ((target_BT >= start) & (target_BT < start + len(weight_VD))).nonzero(as_tuple=True)
        odds_BTV[*here, target_BT[here] - start] = 0
        rest_BT1 = rest_BT1 + odds_BTV.sum(-1, keepdim=True)
        gram_BTT, start = gram_BTT + odds_BTV @ odds_BTV.mT, start + len(weight_VD)
    same_BTT = target_BT[:, :, None] == target_BT[:, None]
    odds_BTT = (logit_BTT - own_BT1).clamp(max=30).exp()
    # ||Σₜ dₜhₜᵀ||² = Σₛₜ (dₛ·dₜ)(hₛ·hₜ), dₜ = (rₜ onehot(yₜ) - oddsₜ) / (1 + rₜ); padding has h = 0
    cross_BTT = torch.where(same_BTT, -rest_BT1 / 2, odds_BTT) * rest_BT1.mT
    hidden_BTD = hidden_BTD / (1 + rest_BT1)
    square_B = ((gram_BTT - cross_BTT - cross_BTT.mT) * (hidden_BTD @ hidden_BTD.mT)).sum((1, 2))
    return square_B.clamp(min=0).sqrt()


@torch.no_grad()
def sample_counts(problem_P, policy, sampler, progress, cfg):
    """nᵢ of every problem [P], the pilots to train on, and metrics (Algorithm 2, Proposition 1)."""
    m, pilots = len(problem_P), cfg.pilot_samples  # N'
    uniform_P = [cfg.samples_per_problem] * m
    if pilots == 0:
        return uniform_P, None, {}
    stream = "train" if cfg.reuse_pilot else "pilot"
    pilot_PS = sample(problem_P, [pilots] * m, sampler, progress, cfg, stream=stream)
    accepted_P = [int(sum(r.reward for r in pilot_S)) for pilot_S in pilot_PS]
    different, place_B = distinct([r for r in chain(*pilot_PS) if r.reward])
    square_D = torch.zeros(len(different), dtype=torch.float64)
    for index in micro_batches(different, cfg.tokens_per_batch):
        norm_B = policy([different[i] for i in index or [0]], head_grad_norms, cfg.temperature)
        square_D[index] = norm_B[: len(index)].double().cpu() ** 2
    dist.all_reduce(square_D)
    # Gᵢ² = mean of ||∇ log P||² over the accepted responses                               Lemma 1
    norm_P = [square_S.mean().sqrt().item() for square_S in square_D[place_B].split(accepted_P)]
    accept_P, norm_P = estimate(accepted_P, [pilots] * m, norm_P, cfg.prior)  # pᵢ, Gᵢ
    penalty, least = {"alpha": cfg.alpha, "beta": cfg.beta}, pilots if cfg.reuse_pilot else 0
    count_P = allocate(accept_P, norm_P, sum(uniform_P), minimum=least, **penalty)  # nᵢ, Prop. 1
    metrics = {"accept_rates": accept_P.tolist(), "grad_norms": norm_P.tolist()}
    metrics["variance"] = predicted_variance(count_P, accept_P, norm_P, **penalty)
    metrics["variance_uniform"] = predicted_variance(uniform_P, accept_P, norm_P, **penalty)
    return count_P, pilot_PS if cfg.reuse_pilot else None, metrics


# ---- M-step: what they teach


def advantages(reward_PS, weighting):
    """Weights [P][S]: (r - mean)/std over the problem, 1/nᵢ each, over m problems (GRPO)."""
    # equal rewards, a group of one among them: advantage 0
    standard_PS = [(r - r.mean()) / max(r.std(), 1e-6) if len(r) else r for r in reward_PS]
    m, used = len(reward_PS), sum(np.count_nonzero(a) for a in standard_PS)
    return [a / max(used, 1) if weighting == "token" else a / len(a) / m for a in standard_PS]


def policy_loss(logp_K, old_logp_K, weight_K, clip_low, clip_high):
    """Loss of every token [K]; old_logp_K are the sampler's own log-probabilities."""
    ratio_K = (logp_K - old_logp_K).exp()  # sₜ: on-policy it is 1 in value but not in gradient
    clipped_K = ratio_K.clamp(1 - clip_low, 1 + clip_high)
    # min(sₜ A, clip(sₜ, 1 - ε_low, 1 + ε_high) A)                                            Eq. 6
    return -torch.minimum(ratio_K * weight_K, clipped_K * weight_K)


def weigh(response_PS, cfg):
    """The responses of a mini-batch that have a gradient, with their weights fixed once for all."""
    weight_PS = advantages([np.array([r.reward for r in s]) for s in response_PS], cfg.weighting)
    return [
        replace(response, weight=float(weight), kl_weight=1 / len(response_PS) / len(response_S))
        for response_S, weight_S in zip(response_PS, weight_PS)
        for response, weight in zip(response_S, weight_S)
        if weight or cfg.kl_coef
    ]


def imbalance(work_R):
    """The busiest rank's work over the mean: at 1 no rank waits for another."""
    return float(np.max(work_R) / np.mean(work_R)) if np.any(work_R) else 1.0


def update(policy, reference, optimizer, response_PS, cfg):
    """M-step: an optimiser update for each mini-batch of problems; its metrics on all ranks."""
    device, grad_norms, sums = next(policy.parameters()).device, [], torch.zeros(6 + WORLD)
    for part in np.array_split(range(len(response_PS)), cfg.updates_per_step):
        batch = weigh([response_PS[p] for p in part], cfg)
        weighted = [r for r in batch if r.weight] or batch
        mean_length = np.mean([len(r.token_ids) for r in weighted] or 1)  # makes the loss per token
        different, place_B = distinct(batch)  # equal ones run once, for the sum of their weights
        weight_D = np.bincount(place_B, [r.weight for r in batch])
        kl_weight_D = np.bincount(place_B, [r.kl_weight for r in batch])
        sums_D = zip(different, weight_D, kl_weight_D)
        batch = [replace(r, weight=weight, kl_weight=kl_weight) for r, weight, kl_weight in sums_D]
        for index in micro_batches(batch, cfg.tokens_per_batch):
            micro = [batch[i] for i in index] or [replace(batch[0], weight=0.0, kl_weight=0.0)]
            logp_K, entropy_K = policy(micro, token_logprobs, cfg.temperature)
            rows = [np.broadcast_arrays(r.logprobs, r.weight, r.kl_weight) for r in micro]
            old_K, weight_K, kl_weight_K = torch.from_numpy(np.hstack(rows)).float().to(device)
            loss_K = policy_loss(logp_K, old_K, weight_K, cfg.clip_low, cfg.clip_high)
            start_K = reference(micro, token_logprobs, cfg.temperature)[0] if reference else logp_K
            gap_K = start_K - logp_K  # 0 without a reference
            k3_K = (gap_K.exp() - gap_K - 1) * kl_weight_K
            loss, kl = loss_K.sum() / mean_length, k3_K.sum() / mean_length
            ((loss + cfg.kl_coef * kl) * WORLD).backward()  # FSDP averages over ranks
            means_K = torch.stack([entropy_K, (logp_K - old_K).abs(), torch.ones_like(old_K)])
            parts = torch.stack([loss, kl, *(means_K * kl_weight_K).sum(-1)])
            sums[:5] += parts.detach().cpu()
            size_B = [len(r.prompt_ids) + len(r.token_ids) for r in micro]
            sums[5] += sum(size_B)
            sums[6 + RANK] += len(micro) * max(size_B)
        if batch:  # else nothing was accepted: nothing to learn
            grad_norms.append(clip_grad_norm_(policy.parameters(), 1.0).full_tensor().item())
            if not np.isfinite(grad_norms[-1]):
                raise SystemExit("stopped: the gradient is not finite; the last checkpoint is good")
            optimizer.step()
            optimizer.zero_grad()
    dist.all_reduce(sums)
    loss, kl, entropy, shift, total, tokens, *padded_R = sums.tolist()
    metrics = {"loss": loss / cfg.updates_per_step, "kl": kl / cfg.updates_per_step}
    metrics["imbalance_update"] = imbalance(padded_R)
    metrics["padding"] = 1 - tokens / (sum(padded_R) or 1)  # share of a forward pass on padding
    metrics |= {"entropy": entropy / (total or 1), "logp_shift": shift / (total or 1)}
    return metrics | {"grad_norm": np.mean(grad_norms or 0).item(), "updates": len(grad_norms)}


# ---- Run


def open_run(cfg):
    """The run's folder; an existing one is neither written over nor resumed with other settings."""
    script = Path(sys.argv[0]).stem
    name = [cfg.run_dir or f"runs/{script}-{datetime.now():%Y%m%d-%H%M%S-%f}"]
    dist.broadcast_object_list(name)  # the ranks' clocks may differ
    folder = Path(name[0])
    settings = {"script": script} | asdict(cfg) | {"run_dir": "", "resume": False}
    if cfg.resume:
        text = (folder / "config.json").read_text()
        saved = attempt(f"{folder}/config.json is broken", json.loads, text)
        changed = [f"{k} was {saved.get(k)}" for k in settings if saved.get(k) != settings[k]]
        if changed:
            refuse(f"--resume cannot change the settings of {folder}: {', '.join(changed)}")
    elif RANK == 0:
        if folder.exists() and (folder.is_file() or any(folder.iterdir())):
            refuse(f"--run-dir {folder} exists; choose another, or continue it with --resume")
        attempt("--run-dir cannot be made", folder.mkdir, parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def save(folder, policy, optimizer, progress):
    """Writes a checkpoint under another name, then renames it: it is whole or not there."""
    done = folder / "checkpoint" / f"{progress['step']:06d}"
    part = done.with_suffix(".part")
    model, optim = dcp_state.get_state_dict(policy, optimizer)
    dcp.save({"model": model, "optim": optim}, checkpoint_id=part)
    if RANK == 0:
        (part / "progress.json").write_text(json.dumps(progress))
        part.rename(done)
        for old in set(done.parent.iterdir()) - {done}:
            shutil.rmtree(old)


def restore(folder, policy, optimizer):
    """Loads the last checkpoint if there is one, cuts metrics.jsonl to it, returns the progress."""
    progress = {"step": 0, "responses": 0, "tokens": 0, "seconds": 0.0, "metrics_bytes": 0}
    for done in sorted((folder / "checkpoint").glob("*[0-9]"))[-1:]:
        model, optim = dcp_state.get_state_dict(policy, optimizer)
        dcp.load({"model": model, "optim": optim}, checkpoint_id=done)
        dcp_state.set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
        progress = json.loads((done / "progress.json").read_text())
    if RANK == 0:
        with open(folder / "metrics.jsonl", "ab") as file:
            file.truncate(progress["metrics_bytes"])
    return progress


def export(folder, policy, tokenizer):
    """Writes the model in Hugging Face format."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp_state.get_model_state_dict(policy.model, options=options)
    if RANK == 0:
        policy.model.save_pretrained(folder / "model", state_dict=weights)
        tokenizer.save_pretrained(folder / "model")


def log(folder, progress, row, line):
    """Appends a row to metrics.jsonl and prints a line."""
    if RANK == 0:
        row = {name: progress[name] for name in ("step", "responses", "tokens")} | row
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
            progress["metrics_bytes"] = file.tell()
        print(f"step {progress['step']:4d} | {line}", flush=True)


def summary(response_PS, row, progress):
    """What a step's row and line say of its responses."""
    counts = [len(response_S) for response_S in response_PS]
    accepted = [int(sum(r.reward for r in response_S)) for response_S in response_PS]
    row = {"counts": counts, "accepted": accepted, "reward": sum(accepted) / sum(counts)} | row
    row["accept"] = np.mean([a / max(n, 1) for a, n in zip(accepted, counts)]).item()  # per problem
    # tokens that every rank drew, and would have drawn if the problems were split over the ranks
    m, length_B = len(counts), [len(r.token_ids) for r in chain(*response_PS)]
    rank_B = [r.rank for r in chain(*response_PS)]
    split_B = np.repeat(np.arange(m) * WORLD // m, counts)
    row["imbalance_split"] = imbalance(np.bincount(split_B, length_B, WORLD))
    row["imbalance_sample"] = imbalance(np.bincount(rank_B, length_B, WORLD))
    line = f"reward {row['reward']:.3f} | accept {row['accept']:.3f} | loss {row['loss']:+.3f}"
    ratio = (row.get("variance") or 1) / (row.get("variance_uniform") or 1)  # 1 without a pilot
    line += f" | n {min(counts)}..{max(counts)} | variance {ratio:.2f}x"
    line += "" if row["updates"] else " | no update: no response carries weight"
    line += f" | grad {row['grad_norm']:.2f} | responses {progress['responses']:,}"
    return row, line + f" | {sum(row['seconds'].values()):.1f} s"


def start_processes(cfg):
    """Joins the process group, of one without torchrun; returns this process's device."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"} | dict(os.environ)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # 1 is best for tiny models
    torch.manual_seed(cfg.seed)
    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    return device


def main(cfg):
    """Prepares the run, then Algorithm 1, one line a line."""
    start = time.perf_counter()
    farewell = "interrupted; the same command continues with the run's --run-dir and --resume"
    signal.signal(signal.SIGINT, lambda *_: sys.exit(RANK or farewell))
    check(cfg)
    device = start_processes(cfg)
    complaint = f"--model {cfg.model} is no folder or hub name of a model with a tokenizer"
    tokenizer = attempt(complaint, AutoTokenizer.from_pretrained, cfg.model)
    if not tokenizer.chat_template:
        refuse(f"--model {cfg.model}: its tokenizer has no chat template")
    problems = load_problems(cfg.problems, tokenizer, cfg)
    eval_problems = load_problems(cfg.eval_problems, tokenizer, cfg)
    if cfg.problems_per_step > len(problems):
        refuse(f"--problems-per-step exceeds the {len(problems)} problems of {cfg.problems}")
    has_vllm = device.type == "cuda" and find_spec("vllm") is not None
    use_vllm = cfg.sampler == "vllm" or (cfg.sampler == "auto" and has_vllm)
    sampler = (VLLMSampler if use_vllm else TorchSampler)(cfg, tokenizer, device)
    policy = load_policy(cfg, device)
    reference = load_policy(cfg, device).requires_grad_(False) if cfg.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.learning_rate, foreach=True)
    folder = open_run(cfg)
    progress = restore(folder, policy, optimizer)
    sampler.load(policy)
    if progress["step"] == 0:
        log(folder, progress, *evaluate(eval_problems, sampler, progress, cfg))
        progress["seconds"] = time.perf_counter() - start
    for step in range(progress["step"], cfg.steps):
        clock = [time.perf_counter()]
        problem_P = next_problems(problems, step, cfg)  # B_t: m problems
        # E-step: nᵢ responses for problem i, some of them drawn already, y ~ P(·|xᵢ)
        count_P, pilot_PS, row = sample_counts(problem_P, policy, sampler, progress, cfg)
        clock.append(time.perf_counter())
        response_PS = sample(problem_P, count_P, sampler, progress, cfg, kept_PS=pilot_PS)
        clock.append(time.perf_counter())
        row |= update(policy, reference, optimizer, response_PS, cfg)  # M-step: θ
        sampler.load(policy)  # the sampler draws from the new θ
        clock.append(time.perf_counter())
        row["seconds"] = dict(zip(("pilot", "sample", "update"), np.diff(clock).round(3).tolist()))
        progress["step"] = step + 1
        log(folder, progress, *summary(response_PS, row, progress))
        last = step + 1 == cfg.steps
        if last or (step + 1) % (cfg.eval_every or cfg.steps) == 0:
            log(folder, progress, *evaluate(eval_problems, sampler, progress, cfg))
        progress["seconds"] += time.perf_counter() - clock[0]
        if last or (step + 1) % cfg.save_every == 0:
            save(folder, policy, optimizer, progress)

    export(folder, policy, tokenizer)
    if RANK == 0:
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        accuracy = [row["accuracy"] for row in rows if "accuracy" in row]
        print(f"accuracy_before: {accuracy[0]:.4f}\naccuracy_after: {accuracy[-1]:.4f}")
        print(f"responses_total: {progress['responses']}\ntokens_total: {progress['tokens']}")
        print(f"seconds_total: {progress['seconds']:.1f}")
    dist.barrier()
    sampler.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Config))
