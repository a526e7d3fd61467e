"""How good is the budget of Prop. 1 when pᵢ and Gᵢ come from a small pilot? Prints markdown tables.

Each batch has 256 problems, pᵢ from a Beta distribution, Gᵢ = (1 - pᵢ) times a lognormal number
(sigma 0.2; --law shows that the tiny models are like this), and accepted responses whose gradient
norms scatter around Gᵢ (lognormal, sigma 0.5, RMS Gᵢ). A pilot draws N'
responses of each problem, allocator.estimate and allocate set nᵢ from them, and nᵢ is judged by the
true pᵢ and Gᵢ, relative to the uniform allocation of as many responses on the same batch:

    variance  Σ cᵢ/max(nᵢ, 1), Eq. 7; a problem that gets nothing is let off with one response
    error     Σ cᵢ/nᵢ where nᵢ > 0, plus cᵢ pᵢ = Gᵢ²/(1 + α/pᵢ^β) where nᵢ = 0: the bound on the
              squared error, missing gradients included (Lemma 1's estimator, ‖gradient‖ = Gᵢ)
    dropped   share of the problems that get nothing

Run: python bench/pilot.py   (about a minute on one core; 100 batches, ± standard error over them)
     python bench/pilot.py --law tiny runs/solved   (half a minute; folders with model, test.jsonl)
"""

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import tyro
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gvm_raft
from allocator import allocate, estimate, predicted_variance, uniform, weights

SHAPES = {  # parameters of Beta; the first has mean 0.32 and 18% below 0.05
    "long tail (0.65, 1.4)": (0.65, 1.4),
    "U-shaped (0.3, 0.5)": (0.3, 0.5),
    "hard (0.3, 3)": (0.3, 3.0),
    "easy (3, 0.6)": (3.0, 0.6),
}
PILOTS = (1, 2, 4, 8, 16)
METRICS = ("variance", "error", "dropped")
EDGES = (0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95, 0.99, 1.01)  # of the classes of --law


@dataclass(frozen=True)
class Config:
    law: tuple[Path, ...] = ()  # instead, tabulate Gᵢ against pᵢ for the model in each folder
    problems: int = 400  # of --law, with 64 responses each


def draw_batch(shape, n_problems, rng):
    """True pᵢ and Gᵢ of a batch."""
    p_P = rng.beta(*shape, n_problems)
    return p_P, (1 - p_P) * rng.lognormal(0, 0.2, n_problems)


def draw_pilot(p_P, G_P, n_pilots, rng):
    """Accepted counts and the RMS norm of the accepted, NaN where there is none."""
    accepted_PS = rng.random((p_P.size, n_pilots)) < p_P[:, None]
    square_PS = G_P[:, None] ** 2 * rng.lognormal(-0.5, 1.0, accepted_PS.shape)  # mean Gᵢ²
    accepted_P = accepted_PS.sum(1)
    square_P = np.where(accepted_PS, square_PS, 0).sum(1)
    norm_P = np.sqrt(np.divide(square_P, accepted_P, out=square_P * np.nan, where=accepted_P > 0))
    return accepted_P, norm_P


def judge(count_P, p_P, G_P):
    """variance, error and dropped share of an allocation under the true pᵢ and Gᵢ."""
    c_P = weights(p_P, G_P) ** 2
    drawn_P = count_P > 0
    error = (c_P / np.maximum(count_P, 1))[drawn_P].sum() + (c_P * p_P)[~drawn_P].sum()
    return np.array(
        [predicted_variance(np.maximum(count_P, 1), p_P, G_P), error, (~drawn_P).mean()]
    )


def relative(count_P, p_P, G_P, budget):
    """The same, variance and error relative to the uniform allocation of the budget."""
    return judge(count_P, p_P, G_P) / [*judge(uniform(p_P.size, budget), p_P, G_P)[:2], 1]


def rates(accepted_P, n_pilots, norm_P, prior, centre):
    """estimate's pᵢ and Gᵢ, or with the prior centred at a fixed rate rather than the batch's."""
    p_P, G_P = estimate(accepted_P, np.full(accepted_P.size, n_pilots), norm_P, prior)
    if centre is not None:
        p_P = (accepted_P + prior * centre) / (n_pilots + prior)
    return p_P, G_P


def simulate(
    shape, prior, n_pilots, *, centre=None, per_problem=8, reuse=None, batches=100, seed=0
):
    """Mean and standard error over batches of relative(); one row per metric.

    reuse None: per_problem responses are drawn afresh and the pilot is free (the paper's account).
    Otherwise the pilot is paid out of per_problem; reuse says whether it is trained on.
    """
    rng, rows = np.random.default_rng(seed), []
    for _ in range(batches):
        p_P, G_P = draw_batch(shape, 256, rng)
        if prior == "oracle":
            estimate_P = p_P, G_P
        else:
            accepted_P, norm_P = draw_pilot(p_P, G_P, n_pilots, rng)
            estimate_P = rates(accepted_P, n_pilots, norm_P, prior, centre)
        paid = n_pilots if reuse is False else 0
        budget = (per_problem - paid) * p_P.size
        count_P = allocate(*estimate_P, budget, minimum=n_pilots if reuse else 0)
        rows.append(relative(count_P, p_P, G_P, per_problem * p_P.size))
    rows = np.array(rows)
    return rows.mean(0), rows.std(0, ddof=1) / np.sqrt(batches)


def table(title, header, lines):
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")


def cell(mean, error, metric):
    if METRICS[metric] == "dropped":
        return f"{100 * mean[metric]:.1f}%"
    return f"{mean[metric]:.3f} ± {error[metric]:.3f}"


def estimator_tables():
    """Which prior? N = 8m afresh, the pilot free, as the paper counts."""
    rules = [("oracle", None), (0, None), (0.5, None), (1, None), (2, None), (4, None), (1, 0.5)]
    results = {
        (name, rule, n): simulate(shape, rule[0], n, centre=rule[1])
        for name, shape in SHAPES.items()
        for rule in rules
        for n in PILOTS
    }
    for metric, label in enumerate(METRICS):
        lines = []
        for name, rule in dict.fromkeys(key[:2] for key in results):
            prior, centre = rule
            if metric > 0 and rule not in [("oracle", None), (0, None), (1, None)]:
                continue  # where nothing is dropped the error is the variance
            text = prior if prior == "oracle" else f"{prior:g}" + " at 1/2" * (centre is not None)
            cells = [cell(*results[name, rule, n], metric) for n in PILOTS]
            lines.append([name, text, *cells])
        title = f"**{label}**, uniform = 1" if label != "dropped" else f"**{label}**"
        table(title, ["acceptance rates", "prior", *(f"N' = {n}" for n in PILOTS)], lines)


def cost_table(per_problem):
    """Which pilot? The pilot is paid out of per_problem responses, thrown away or trained on."""
    lines = []
    for name, shape in SHAPES.items():
        for prior in (0, 1, 2):
            for reuse in (False, True):
                cells = [
                    cell(*simulate(shape, prior, n, per_problem=per_problem, reuse=reuse), 0)
                    if n < per_problem
                    else "-"
                    for n in PILOTS
                ]
                lines.append([name, f"{prior}", "re-used" if reuse else "thrown away", *cells])
    title = f"**variance**, uniform = 1, every account paying {per_problem} responses per problem"
    header = ["acceptance rates", "prior", "pilot", *(f"N' = {n}" for n in PILOTS)]
    table(title, header, lines)


@torch.no_grad()
def law(folder, n_problems):
    """How the RMS norm of at most 16 accepted responses goes with the acceptance rate."""
    cfg = gvm_raft.Config(model=str(folder / "model"), problems=str(folder / "test.jsonl"))
    tokenizer, device = AutoTokenizer.from_pretrained(cfg.model), torch.device("cpu")
    problems = gvm_raft.load_problems(cfg.problems, tokenizer, cfg)[:n_problems]
    sampler = gvm_raft.TorchSampler(cfg, tokenizer, device)
    policy = gvm_raft.load_policy(cfg, device)
    progress, counts = {"step": 0, "responses": 0, "tokens": 0}, [64] * len(problems)
    response_PS = gvm_raft.sample(problems, counts, sampler, progress, cfg)
    accept_P = np.array([np.mean([r.reward for r in response_S]) for response_S in response_PS])
    norm_P = np.full(len(problems), np.nan)
    for p in np.flatnonzero(accept_P):
        accepted = [r for r in response_PS[p] if r.reward][:16]
        norm_B = policy(accepted, gvm_raft.head_grad_norms, cfg.temperature)
        norm_P[p] = norm_B.square().mean().sqrt()
    lines = []
    for low, high in pairwise(EDGES):
        here_P = (accept_P >= low) & (accept_P < high) & (accept_P > 0)
        if here_P.any():
            p, G, spread = accept_P[here_P].mean(), norm_P[here_P].mean(), norm_P[here_P].std()
            ratio = f"{G / (1 - p):.1f}" if high < 0.99 else "-"
            lines.append([f"{p:.3f}", f"{here_P.sum()}", f"{G:.2f} ± {spread:.2f}", ratio])
    header = ["accept rate", "problems", "G, ± standard deviation", "G / (1 - p)"]
    table(f"**{folder}**: gradient norm against accept rate", header, lines)


def main(cfg):
    if cfg.law:
        gvm_raft.start_processes(gvm_raft.Config())
        for folder in cfg.law:
            law(folder, cfg.problems)
        return
    estimator_tables()
    cost_table(8)
    cost_table(16)
    cost_table(32)


if __name__ == "__main__":
    main(tyro.cli(Config))
