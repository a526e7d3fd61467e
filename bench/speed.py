r"""How fast are the parts of this repository beside other ways to do the same?

    python bench/speed.py allocation                          half a minute
    python bench/speed.py verifier --answers FILE.jsonl ...   half a minute a file

allocation  allocate beside Prop. 1 rounded to integers, and beside a heap that spends
            one response at a time. A problem rounded to 0 makes the bound infinite.
verifier    verify_batch beside math-verify as it is usually called, on the whole text.

Prints a markdown table each. CPU-seconds include those of workers. Ways to do the same
take turns, so that a busy machine slows them alike.
"""

import heapq
import json
import logging
import os
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from math_verify import parse, verify
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from allocator import allocate, weights
from verify_math import verify_batch


@dataclass(frozen=True)
class Config:
    sections: tyro.conf.Positional[tuple[Literal["allocation", "verifier"], ...]]
    repeats: int = 3  # of each measurement; the least counts
    seed: int = 0  # of made-up problems and responses

    sizes: tuple[int, ...] = (10**3, 10**4, 10**5, 10**6)  # problems to share among
    each: int = 8  # responses a problem
    heap_up_to: int = 10**5  # problems; for a million a heap takes half a minute

    answers: tuple[Path, ...] = ()  # JSON lines of problem, answer, perhaps solution
    problems: int = 500  # of each file, eight responses to each


def main(cfg):
    if not cfg.sections or ("verifier" in cfg.sections and not cfg.answers):
        raise SystemExit("name sections; verifier needs --answers FILE.jsonl, too")
    sections = {"allocation": allocation, "verifier": verifier}
    for name in cfg.sections:
        sections[name](cfg)


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
    header = ["problems", "allocate", "Prop. 1 rounded", "heap", "rounded to 0"]
    rows = []
    for size in tqdm(cfg.sizes, "allocation", disable=None):
        generator = np.random.default_rng(cfg.seed)
        rates = generator.beta(0.65, 1.4, size)
        w = weights(rates, generator.lognormal(0, 0.5, size))

        ways = {"allocate": allocate, "rounded": rounded, "heap": from_a_heap}
        if size > cfg.heap_up_to:
            del ways["heap"]
        counts, seconds = compare(ways, w, cfg.each * size, repeats=cfg.repeats)
        cells = [f"{seconds[name]:.5f} s" for name in ways] + ["not run"]
        rows.append([f"{size:,}", *cells[:3], f"{np.mean(counts['rounded'] == 0):.2%}"])
    print_table(header, rows)


def rounded(weights, budget):
    """Prop. 1 rounded down; the largest remainders get what is left."""
    shares = budget * weights / weights.sum()
    counts = np.floor(shares).astype(int)
    order = np.argsort(counts - shares, kind="stable")
    counts[order[: budget - counts.sum()]] += 1
    return counts


def from_a_heap(weights, budget):
    """One response to each problem, then one at a time to the largest gain."""
    squares = [weight**2 for weight in weights.tolist()]
    counts = [1] * len(squares)
    heap = [(-square / 2, i) for i, square in enumerate(squares)]
    heapq.heapify(heap)
    for _ in range(budget - len(counts)):
        i = heap[0][1]
        counts[i] += 1
        heapq.heapreplace(heap, (-squares[i] / (counts[i] * (counts[i] + 1)), i))
    return np.array(counts)


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


if __name__ == "__main__":
    main(tyro.cli(Config))
