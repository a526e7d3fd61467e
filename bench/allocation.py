"""Time and loss of allocate beside a plain loop over Prop. 1 and a heap. Prints markdown tables.

Run: python bench/allocation.py   (three minutes on one core; times are CPU-seconds, best of 3 or 1)
"""

import heapq
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from allocator import allocate, predicted_variance, weights


def plain_loop(rate_P, norm_P, budget, alpha=1e-3):
    """Prop. 1 problem by problem, rounded down; the largest remainders get what is left."""
    weight_P = []
    for p, G in zip(rate_P, norm_P, strict=True):
        weight_P.append(G / (p + alpha / p) ** 0.5 if p > 0 else 0.0)
    unit = budget / sum(weight_P)
    share_P = [unit * w for w in weight_P]
    count_P = [int(share) for share in share_P]
    order = sorted(range(len(share_P)), key=lambda i: count_P[i] - share_P[i])
    for i in order[: budget - sum(count_P)]:
        count_P[i] += 1
    return count_P


def heap_greedy(rate_P, norm_P, budget, alpha=1e-3):
    """One response after the other to the largest gain cᵢ/(n(n+1)); one each to begin with."""
    c_P = [G * G / (p + alpha / p) for p, G in zip(rate_P, norm_P, strict=True)]
    count_P = [1] * len(c_P)
    heap = [(-c / 2, i) for i, c in enumerate(c_P)]
    heapq.heapify(heap)
    for _ in range(budget - len(c_P)):
        i = heap[0][1]
        count_P[i] += 1
        heapq.heapreplace(heap, (-c_P[i] / (count_P[i] * (count_P[i] + 1)), i))
    return count_P


def problems(size, rng):
    """Acceptance rates with a long tail, mean 0.32, and lognormal norms."""
    return rng.beta(0.65, 1.4, size), rng.lognormal(0, 0.5, size)


def cpu_seconds(function, *arguments, repeats):
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        function(*arguments)
        seconds.append(time.process_time() - start)
    return min(seconds)


def time_table():
    print(
        "| problems | allocate | plain loop, residual rounding | heap greedy |\n|---|---|---|---|"
    )
    for size in 10 ** np.arange(2, 8):
        rate_P, norm_P = problems(size, np.random.default_rng(0))
        lists, budget = (rate_P.tolist(), norm_P.tolist()), 8 * int(size)
        repeats = 3 if size <= 10**6 else 1
        cells = [cpu_seconds(allocate, rate_P, norm_P, budget, repeats=repeats)]
        cells.append(
            cpu_seconds(plain_loop, *lists, budget, repeats=repeats if size < 10**6 else 1)
        )
        if size <= 10**6:
            cells.append(cpu_seconds(heap_greedy, *lists, budget, repeats=3 if size < 10**5 else 1))
        row = [f"{seconds:.5f} s" for seconds in cells] + ["not run"] * (3 - len(cells))
        print(f"| {size} | {' | '.join(row)} |", flush=True)


def loss_table(size=1024, batches=50):
    """A problem rounded to 0 makes Σ cᵢ/nᵢ infinite, so rounding is also judged repaired.

    Repaired: zeros are raised to one, and the exact allocation may spend as much as that costs.
    """
    print("\n| budget | problems rounded to 0 | batches with Σ cᵢ/nᵢ = ∞ |", end="")
    print(" Σ cᵢ/nᵢ repaired, over exact | largest of the batches |\n|---|---|---|---|---|")
    for factor in (1, 2, 4, 8, 16, 32):
        rng, rows = np.random.default_rng(0), []
        for _ in range(batches):
            rate_P, norm_P = problems(size, rng)
            rounded_P = np.array(plain_loop(rate_P, norm_P, factor * size))
            repaired_P = np.maximum(rounded_P, weights(rate_P, norm_P) > 0)
            exact_P = allocate(rate_P, norm_P, repaired_P.sum())
            repaired, exact = (
                predicted_variance(count_P, rate_P, norm_P) for count_P in (repaired_P, exact_P)
            )
            rows.append([repaired / exact - 1, (rounded_P != repaired_P).mean()])
        loss, zero = np.array(rows).T
        error = loss.std(ddof=1) / batches**0.5
        print(f"| {factor}m | {zero.mean():.2%} | {(zero > 0).mean():.0%} |", end="")
        print(f" +{loss.mean():.4%} ± {error:.4%} | +{loss.max():.4%} |")


if __name__ == "__main__":
    time_table()
    loss_table()
