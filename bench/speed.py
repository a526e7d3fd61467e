r"""How fast are the parts of this repository beside other ways to do the same?

    python bench/speed.py allocation                          half a minute
    python bench/speed.py verifier --answers FILE.jsonl ...   half a minute a file
    python bench/speed.py norms sampler step                  five minutes

allocation  allocate beside Prop. 1 rounded; problems rounded to 0 make Eq. 7 infinite.
verifier    verify_batch beside math-verify as it is usually called, on the whole text.
norms       gradient_norms beside a backward pass to the head for each response (hidden
            size 896, vocabulary 152k); both get the hidden states.
sampler     TorchSampler beside generate with log-probabilities, for 512 responses of
            the tiny model and 64 of a Llama of 20M parameters with random weights.
step        Where the CPU-seconds of a default step of gvm_raft.py go.

Prints a table each. CPU-seconds include those of workers; the ways take turns.
"""

import json
import logging
import os
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
import tyro
from math_verify import parse, verify
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vs_trl import timed

import gvm_raft
from allocator import allocate, weights
from verify_math import verify_batch

SECTIONS = ("allocation", "verifier", "norms", "sampler", "step")


@dataclass(frozen=True)
class Config:
    sections: tyro.conf.Positional[tuple[Literal[*SECTIONS], ...]]
    repeats: int = 3  # of each measurement; the least counts
    seed: int = 0  # of made-up problems and responses

    sizes: tuple[int, ...] = (10**3, 10**4, 10**5, 10**6)  # problems to share among
    each: int = 8  # responses a problem

    lengths: tuple[int, ...] = (256, 1024)  # of a response whose norm is measured
    hidden: int = 896  # of the head
    vocabulary: int = 152_000  # of the head

    answers: tuple[Path, ...] = ()  # JSON lines of problem, answer, perhaps solution
    problems: int = 500  # of each file, eight responses to each


def main(cfg):
    if not cfg.sections or ("verifier" in cfg.sections and not cfg.answers):
        raise SystemExit("name sections; verifier needs --answers FILE.jsonl, too")
    gvm_raft.start_processes()
    for name in cfg.sections:
        globals()[name](cfg)


def cpu_seconds():
    """CPU-seconds of this process and its children up to now."""
    ticks = 0
    for path in Path("/proc/self/task").glob("*/children"):
        for child in path.read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:15])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def compare(ways, *arguments, repeats=1):
    """What each way returns, and its CPU-seconds."""
    results, seconds = {}, dict.fromkeys(ways, np.inf)
    for _ in range(repeats):
        for name, way in ways.items():
            start = cpu_seconds()
            results[name] = way(*arguments)
            seconds[name] = min(seconds[name], cpu_seconds() - start)
    return results, seconds


def print_table(header, rows):
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


# ---- Allocation
def allocation(cfg):
    """CPU-seconds by number of problems, whose accept rates have a long tail."""
    rows, ways = [], {"allocate": allocate, "Prop. 1 rounded": rounded}
    for size in tqdm(cfg.sizes, "allocation", disable=None):
        generator = np.random.default_rng(cfg.seed)
        rates = generator.beta(0.65, 1.4, size)
        w = weights(rates, generator.lognormal(0, 0.5, size))

        counts, seconds = compare(ways, w, cfg.each * size, repeats=cfg.repeats)
        cells = [f"{seconds[name]:.5f} s" for name in ways]
        lost = np.mean(counts["Prop. 1 rounded"] == 0)
        rows.append([f"{size:,}", *cells, f"{lost:.2%}"])
    print_table(["problems", *ways, "rounded to 0"], rows)


def rounded(weights, budget):
    """Prop. 1 rounded down; the largest remainders get what is left."""
    shares = budget * weights / weights.sum()
    counts = np.floor(shares).astype(int)
    order = np.argsort(counts - shares, kind="stable")
    counts[order[: budget - counts.sum()]] += 1
    return counts


# ---- Verifier
ENDINGS = ["So the answer is $\\boxed{%s}$.", "\\[\\boxed{%s}\\]", "Thus \\boxed{%s}."]


def verifier(cfg):
    """Responses per CPU-second, by file."""
    logging.disable()  # math-verify reports what it cannot parse
    ways = {"verify_batch": verify_batch, "math-verify": math_verify_batch}
    compare(ways, ["\\boxed{\\sin^2 x}"], ["1-\\cos^2 x"])  # imports, starts a worker
    rows = []
    for path in cfg.answers:
        problems = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        cases = make_responses(problems[: cfg.problems], random.Random(cfg.seed))
        total = dict.fromkeys(ways, 0)
        for start in tqdm(range(0, len(cases), 800), path.stem, disable=None):
            responses, golds = zip(*cases[start : start + 800], strict=True)
            _, seconds = compare(ways, responses, golds)
            total = {name: total[name] + seconds[name] for name in ways}

        ratio = total["math-verify"] / total["verify_batch"]
        speeds = [f"{len(cases) / spent:,.0f}/s" for spent in total.values()]
        rows.append([path.stem, f"{len(cases):,}", *speeds, f"{ratio:.1f}"])
    print_table(["problems of", "responses", *ways, "ratio"], rows)


def math_verify_batch(responses, golds):
    """math-verify on the whole text, with the gold in a box."""
    pairs = zip(responses, golds, strict=True)
    return [verify(parse(f"\\boxed{{{gold}}}"), parse(text)) for text, gold in pairs]


def make_responses(problems, generator):
    """Eight responses to each problem, half of them right, with its answer."""
    cases = []
    for row in problems:
        gold, other = row["answer"], generator.choice(problems)["answer"]
        wrong = re.sub(r"\d", lambda digit: str(int(digit[0]) % 9 + 1), gold)
        right = [gold, gold.replace(" ", ""), gold.replace("\\frac", "\\dfrac")]
        answers = [*right, f" {gold} ", wrong, other]
        endings = [generator.choice(ENDINGS) % answer for answer in answers]
        endings += ["\\boxed{}", f"The answer is {gold}"]

        # The reasoning is the data's solution, where there is one, else the problem.
        text = re.sub(r"<<.*?>>|####.*", "", row.get("solution", row["problem"]))
        cases += [(f"{text}\n{ending}", gold) for ending in endings]
    return cases


# ---- Norms, sampler, step
def start():
    """What a default run of gvm_raft.py has at hand."""
    settings = gvm_raft.Config()
    tokenizer = gvm_raft.load_tokenizer(settings)
    problems = gvm_raft.read_problems(settings.problems, 1, tokenizer, settings)
    ours = gvm_raft.TorchSampler(settings, tokenizer)
    return settings, tokenizer, problems, ours, *gvm_raft.load_trainer(None, settings)


def norms(cfg):
    """CPU-seconds a response, by its length T, and how far the norms are apart."""
    rows = []
    for length in tqdm(cfg.lengths, "norms", disable=None):
        generator = torch.Generator().manual_seed(cfg.seed)
        head_VD = torch.randn(cfg.vocabulary, cfg.hidden, generator=generator) * 0.02
        hidden_TD = torch.randn(length, cfg.hidden, generator=generator)
        target_T = torch.randint(cfg.vocabulary, (length,), generator=generator)
        response = gvm_raft.Response(0, [1], 0, target_T.tolist(), [], reward=1.0)

        def gram(head_VD, hidden_TD, target_T, response):
            rows = [(hidden_TD @ head_VD.T, hidden_TD, target_T)]
            with mock.patch.object(gvm_raft, "run_policy", lambda *_: rows):
                return gvm_raft.gradient_norms(None, [[response]], gvm_raft.Config())[0]

        def backward(head_VD, hidden_TD, target_T, _):
            head_VD = head_VD.requires_grad_()
            F.cross_entropy(hidden_TD @ head_VD.T, target_T, reduction="sum").backward()
            norm, head_VD.grad = head_VD.grad.norm().item(), None
            return norm

        ways = {"gradient_norms": gram, "a backward pass": backward}
        arguments = head_VD, hidden_TD, target_T, response
        found, spent = compare(ways, *arguments, repeats=cfg.repeats)
        ours, other = found.values()
        cells = [f"{seconds:.2f} s" for seconds in spent.values()]
        ratio = spent["a backward pass"] / spent["gradient_norms"]
        rows.append([f"{length}", *cells, f"{ratio:.2f}", f"{ours / other - 1:.0e}"])
    print_table(["T", *ways, "ratio", "apart"], rows)


def sampler(cfg):
    """Tokens per CPU-second of both ways to sample."""
    settings, tokenizer, problems, ours, _, _ = start()
    shape = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 32_000}
    larger = LlamaConfig(**shape, num_hidden_layers=4, num_attention_heads=4)
    ways, rows = {"TorchSampler": draw, "generate": generate}, []
    for name, count in {"tiny": 512, "20M": 64}.items():
        if name == "20M":
            ours.model = LlamaForCausalLM(larger).eval()
        batch = [problem for problem in problems[: count // 4] for _ in range(4)]
        prompts = {"input_ids": [problem.prompt_ids for problem in batch]}
        padded = tokenizer.pad(prompts, padding_side="left", return_tensors="pt")
        tokens, cost = compare(ways, batch, padded, ours, settings, repeats=cfg.repeats)
        ahead, behind = (tokens[way] / cost[way] for way in ways)
        cells = [f"{ahead:,.0f}/s", f"{behind:,.0f}/s", f"{ahead / behind:.2f}"]
        rows.append([name, f"{count}", *cells])
    print_table(["model", "responses", *ways, "ratio"], rows)


def draw(batch, padded, ours, settings):
    """The tokens that TorchSampler draws."""
    rows = [(p.index, p.prompt_ids, i, [], []) for i, p in enumerate(batch)]
    drawn = [gvm_raft.Response(*row) for row in rows]
    ours.draw(drawn)
    return sum(len(response.token_ids) for response in drawn)


@torch.inference_mode()
def generate(batch, padded, ours, settings):
    """The tokens that transformers' generate draws, with their log-probabilities."""
    more = {"do_sample": True, "max_new_tokens": settings.max_new_tokens, "top_k": 0}
    more |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    found = ours.model.generate(**padded, eos_token_id=[*ours.ends], **more)
    new_BT = found.sequences[:, padded["input_ids"].shape[1] :]
    torch.stack(found.logits, 1).log_softmax(-1).gather(-1, new_BT[..., None])
    return int((new_BT != 0).sum())


def step(cfg):
    """CPU-seconds of a step by phase, over an epoch."""
    settings, _, problems, ours, policy, optimizer = start()
    progress, spent = {"step": 0, "responses": 0, "tokens": 0}, Counter()
    phases = ["verify_batch", "gradient_norms", "estimate", "allocate", "update"]
    for owner, name in [(ours, "draw"), *((gvm_raft, phase) for phase in phases)]:
        setattr(owner, name, timed(spent, name, getattr(owner, name)))
    steps, start_time = 7, time.process_time()
    for number in range(steps):
        batch = gvm_raft.next_problems(problems, number, settings)
        world = ours, progress, settings
        counts, pilots, _ = gvm_raft.choose_counts(batch, policy, *world)
        groups = gvm_raft.sample(batch, counts, *world, kept=pilots)
        gvm_raft.update(policy, None, optimizer, groups, settings)
        ours.load(policy)
        progress["step"] += 1

    total = time.process_time() - start_time
    spent["rest"] = total - spent.total()
    rows = [[k, f"{x / steps:.3f} s", f"{x / total:.1%}"] for k, x in spent.items()]
    print_table(["phase", "CPU-seconds a step", "share"], rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
