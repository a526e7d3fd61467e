"""Draws run folders: accuracy against responses, and the budget against the accept rate.

Left: held-out accuracy against all responses drawn so far, pilots counted. Runs that differ in the
seed only are thin lines with their mean and a band from the worst to the best. A run without
periodic evaluations shows the accept rate of its training responses as well, dotted.
Right: the responses nᵢ that a problem got in a step against its accept rate pᵢ as the E-step
estimated it (raft: as the responses themselves show it); a mark's area is the number of problems.
The line is Proposition 1 for a problem of median Gᵢ in a middling step, its band spans the steps.

Run: python bench/plot.py runs/* [--out FILE.png]
"""

import json
import sys
from itertools import chain
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from allocator import weights

# Okabe and Ito's colours, which colour-blind readers tell apart, and marks for readers on paper
STYLES = {"raft": ("#0072B2", "s"), "gvm_raft": ("#D55E00", "o"), "gvm_grpo": ("#009E73", "^")}
SPARE = [("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X"), ("#999999", "*")]
SAME = {"script", "seed", "run_dir", "resume", "steps", "eval_every", "save_every"}


def refuse(sentence):
    """Wrong input: one sentence on stderr and exit code 2."""
    print(f"plot.py: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def read_run(folder):
    """Settings and rows of metrics.jsonl; a last line that is still being written is left out."""
    if not folder.is_dir():
        refuse(f"{folder}: no such folder")
    for name in ("config.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            refuse(f"{folder} is no run folder: it holds no {name}")
    try:
        config = json.loads((folder / "config.json").read_text()) | {}
        *lines, _ = (folder / "metrics.jsonl").read_text().split("\n")
        rows = [json.loads(line) | {} for line in lines]
        curve(rows, config["script"] and "accuracy")
    except (ValueError, KeyError, TypeError) as error:
        refuse(f"{folder}: config.json or metrics.jsonl is damaged ({error!r})")
    return (config, rows) if rows else refuse(f"{folder}: metrics.jsonl is empty")


def group_runs(runs):
    """Rows of runs by label: the script, and the settings in which the runs of a script differ."""
    groups = {}
    for config, rows in runs:
        kin = [other for other, _ in runs if other["script"] == config["script"]]
        differ = [k for k in config.keys() - SAME if any(c.get(k) != config[k] for c in kin)]
        label = ", ".join([config["script"], *(f"{k} {config[k]}" for k in sorted(differ))])
        groups.setdefault(label, (config, []))[1].append(rows)
    return groups


def curve(rows, name):
    """[2, points]: the responses drawn before the policy was measured, and the measured values."""
    before = [0, *(row["responses"] for row in rows)]  # a step measures, then learns
    drawn = [b if "counts" in row else row["responses"] for b, row in zip(before, rows)]
    return np.array([(x, row[name]) for x, row in zip(drawn, rows) if name in row]).reshape(-1, 2).T


def draw_accuracy(axes, label, runs, color, marker):
    """Left: a line a run; with several, their mean and the band from the worst to the best."""
    curves = [xy for xy in (curve(rows, "accuracy") for rows in runs) if xy.size]
    for x, y in curves:
        axes.plot(x, y, color=color, lw=0.8, alpha=0.5)
    if curves:  # a run with two points says nothing about the way between them
        curves = [xy for xy in curves if xy.shape[1] > 2] or curves
        end = min(x[-1] for x, _ in curves)
        grid = np.unique(np.concatenate([x[x <= end] for x, _ in curves]))
        values = np.array([np.interp(grid, x, y) for x, y in curves])
        name = label + f", mean of {len(curves)} runs" * (len(curves) > 1)
        axes.plot(grid, values.mean(0), color=color, lw=2, marker=marker, alpha=0.85, label=name)
        axes.fill_between(grid, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
    sparse = [curve(rows, "accept") for rows in runs if curve(rows, "accuracy").shape[1] < 3]
    for i, (x, y) in enumerate(sparse):
        name = None if i else f"{label}, accepted in training"
        axes.plot(x, y, color=color, lw=1.2, ls=":", label=name)


def draw_budget(axes, label, config, rows, color, marker):
    """Right: nᵢ against pᵢ in all steps, and Proposition 1 at the median Gᵢ."""
    pairs, scales = [], []
    least = config.get("pilot_samples", 0) * config.get("reuse_pilot", 0)
    penalty = {name: config[name] for name in ("alpha", "beta") if name in config}
    for row in [row for row in rows if "counts" in row]:
        count_P = np.array(row["counts"])
        accept_P = np.array(row.get("accept_rates", row["accepted"] / count_P.clip(1)))
        pairs += zip(accept_P.round(2), count_P)
        # nᵢ = scale · Gᵢ / √(pᵢ + α / pᵢ^(β-1)) where no bound holds nᵢ; the median of scale · Gᵢ
        free_P = (count_P > least) & (accept_P > 0)
        if "accept_rates" in row and free_P.any():
            scales.append(np.median(count_P[free_P] / weights(accept_P[free_P], 1.0, **penalty)))
    if pairs:
        spot, size = np.unique(pairs, axis=0, return_counts=True)
        look = {"c": color, "marker": marker, "alpha": 0.45, "lw": 0, "label": label}
        axes.scatter(*spot.T, 8 + 150 * size / size.max(), **look)
    if scales:
        p = np.linspace(0.001, 1, 1000)
        curves = np.quantile(scales, [[0], [0.5], [1]]) * weights(p, 1.0, **penalty)
        low, middle, high = curves.clip(least)
        axes.plot(p, middle, color=color, lw=2, label="Proposition 1 at the median $G_i$")
        axes.fill_between(p, low, high, color=color, alpha=0.1, lw=0)


def main(folders: Annotated[list[Path], tyro.conf.Positional], out: Path = Path("runs.png")):
    """Draws run folders into one picture.

    Args:
        folders: run folders, as in runs/*
        out: the picture; its suffix chooses the format
    """
    if not folders:
        refuse("name at least one run folder, as in runs/*")
    if not out.parent.is_dir():
        refuse(f"--out {out}: no such folder as {out.parent}")
    groups, known = group_runs([read_run(folder) for folder in folders]), dict(STYLES)
    matplotlib.use("Agg")  # draws without a screen
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    spare = iter(SPARE * len(groups))
    for label, (config, runs) in groups.items():
        style = known.pop(config["script"], None) or next(spare)
        draw_accuracy(left, label, runs, *style)
        draw_budget(right, label, config, list(chain(*runs)), *style)
    left.set(xlabel="responses drawn so far, pilots included", ylabel="held-out accuracy")
    left.set(xlim=(0, None), ylim=(0, 1.02))
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    right.set(xlabel="accept rate $p_i$ of a problem, as estimated", xlim=(-0.02, 1.03))
    right.set(ylabel="responses $n_i$ to it in a step (log scale)")
    right.set_yscale("symlog", base=2, linthresh=1, linscale=0.5)  # log with a place for nᵢ = 0
    right.set_ylim(bottom=-0.2)
    right.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    right.yaxis.set_major_formatter("{x:.0f}")
    for axes in [axes for axes in (left, right) if axes.get_legend_handles_labels()[0]]:
        axes.grid(alpha=0.25, lw=0.6)
        axes.legend(frameon=False, fontsize=9, loc="lower right" if axes is left else "upper left")
    figure.get_layout_engine().set(wspace=0.06)
    try:
        figure.savefig(out, dpi=150)
    except ValueError as error:  # an unknown suffix
        refuse(f"--out {out}: {error}")
    print(f"drew {len(folders)} runs into {out}")


if __name__ == "__main__":
    tyro.cli(main)
