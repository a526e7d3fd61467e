"""Draws run folders: any metric as a curve, and where the budget of a step went.

    python bench/plot.py runs/* [--metric entropy] [--against tokens] [--at 1 20 40]

Left: a metric of metrics.jsonl. Runs that differ in the seed only become their mean, in
a band from the lowest to the highest; other settings or another source are a curve of
their own, whose name says what differs. Metrics of a training step are those of the
policy that it starts with, so they stand where the step starts.
Right: the responses nᵢ that each problem got in a step against the weight wᵢ that its
pilots' rate and norm give it, for the first run of each curve. The line is Prop. 1,
nᵢ ∝ wᵢ, above what re-used pilots take: a script that follows it has its marks there.
"""

import json
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Literal

import matplotlib
import numpy as np
import tyro
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from allocator import weights

matplotlib.use("Agg")  # draws without a screen
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
plt.rcParams |= {"axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False}
RUNS = Path(__file__).resolve().parent.parent / "runs"
# Okabe and Ito's colours, which colour-blind readers tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass(frozen=True)
class Config:
    folders: tyro.conf.Positional[tuple[Path, ...]]  # of runs, as in runs/*
    metric: str = "accuracy"  # of evaluations, or else of training steps
    training: bool = False  # of training steps, where evaluations have it, too
    against: Literal["responses", "tokens", "seconds", "step"] = "responses"
    at: tuple[int, ...] = ()  # steps whose budget is drawn; none: one in the middle
    out: Path = RUNS / "plot.png"  # its suffix is the format


def read_runs(folders):
    """(config, rows) of the folders that hold a run; the others are named."""
    runs = []
    for folder in folders:
        try:
            config = json.loads((folder / "config.json").read_text())
            *lines, _ = (folder / "metrics.jsonl").read_text().split("\n")
            rows = [json.loads(line) for line in lines]  # a last half line is left out
            source = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
        except (OSError, ValueError):
            print(f"left out {folder}: it holds no run, or a damaged one")
            continue
        config["source"] = f"{zlib.crc32(b''.join(source)):x}"
        if rows:
            runs.append((config, rows))
    if not runs:
        raise SystemExit("none of these folders holds a run; name some, as in runs/*")
    return runs


def group_runs(runs):
    """{name: runs}: a group is all that differ in nothing but the seed."""
    own = ("seed", "run_dir")
    kinds = [{k: v for k, v in config.items() if k not in own} for config, _ in runs]
    groups = {}
    for kind, run in zip(kinds, runs):
        kin = [other for other in kinds if other["script"] == kind["script"]]
        differ = [k for k in kind if any(other.get(k) != kind[k] for other in kin)]
        settings = [f"--{k.replace('_', '-')} {kind[k]}" for k in differ]
        groups.setdefault(" ".join([kind["script"], *settings]), []).append(run)
    return groups


def find_curve(rows, cfg):
    """[points, 2]: where a metric was measured, and its values."""
    evaluations, steps = [], []
    for row, before in zip(rows, rows[:1] + rows):
        value = row.get(cfg.metric)
        if "accuracy" in row and isinstance(value, (int, float)):
            evaluations.append((row[cfg.against], value))
        elif isinstance(value, (int, float)):
            steps.append((before[cfg.against], value))
    return np.array(steps if cfg.training or not evaluations else evaluations)


def draw_band(axes, x, y, name, number):
    """The mean of curves [runs, points], and a band from the lowest to the highest."""
    look = {"color": COLOURS[number % 7], "ls": ("-", "--", ":")[number // 7 % 3]}
    mean, low, high = y.mean(0), y.min(0), y.max(0)
    axes.plot(x.mean(0), mean, label=fill(name, 60), **look)
    axes.fill_between(x.mean(0), low, high, color=look["color"], alpha=0.15, lw=0)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def draw_metric(axes, groups, cfg):
    """Left: a curve a group."""
    for number, (name, runs) in enumerate(groups.items()):
        curves = [find_curve(rows, cfg) for _, rows in runs]
        curves = [curve for curve in curves if len(curve)]
        if not curves:
            print(f"{name} has no {cfg.metric}")
            continue
        length = min(map(len, curves))  # of the run that has come least far
        x, y = np.stack([curve[:length] for curve in curves]).transpose(2, 0, 1)
        name += f", {len(curves)} runs" * (len(curves) > 1)
        draw_band(axes, x, y, name, number)
    if not axes.lines:
        pairs = [pair for row in runs[0][1] for pair in row.items()]
        known = sorted({key for key, x in pairs if isinstance(x, (int, float))})
        raise SystemExit(f"--metric {cfg.metric}: there are {', '.join(known)}")
    axes.set(xlabel=f"{cfg.against} of training", ylabel=cfg.metric)
    axes.legend(fontsize=7).set_in_layout(False)


def draw_budget(axes, groups, at):
    """Right: the counts of steps against the weights of Proposition 1."""
    pairs = []
    for name, ((config, rows), *_) in groups.items():
        steps = {row["step"]: row for row in rows if "rates" in row}
        middle = list(steps)[len(steps) // 2 :][:1]
        for step in set(at) - set(steps):
            print(f"{name} has no pilots in step {step}")
        pairs += [(name, config, steps[k]) for k in at or middle if k in steps]

    for number, (name, config, row) in enumerate(pairs):
        rates, counts = np.array(row["rates"]), np.array(row["counts"])
        w = weights(rates, row["norms"], alpha=config["alpha"], beta=config["beta"])
        least = config["pilot_samples"] * config["reuse_pilot"]
        free = (counts > least) & (w > 0)
        color = COLOURS[number % 7]
        faces = np.where(rates < rates.mean(), "white", color)
        axes.scatter(w, counts, 30, faces, edgecolors=color, alpha=0.7, zorder=3)
        if free.any():
            x = np.geomspace(w[w > 0].min(), w.max(), 500)
            y = np.maximum(least, counts[free].sum() / w[free].sum() * x)
            axes.plot(x, y, color=color, label=fill(f"{name}, step {row['step']}", 60))

    axes.set(xlabel="weight $w_i$ in the step", ylabel="responses $n_i$", xscale="log")
    axes.set_yscale("symlog", base=2, linthresh=1)  # with a place for 0
    axes.set_ylim(bottom=-0.3)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_title("lines: Prop. 1; open: solved less often than the mean", size=10)
    if axes.lines:
        axes.legend(fontsize=7).set_in_layout(False)


def main(cfg):
    """Draws what the folders hold."""
    runs = read_runs(cfg.folders)
    groups = group_runs(runs)
    adaptive = any("rates" in row for _, rows in runs for row in rows)
    size = {"figsize": (12 if adaptive else 7, 4.5), "layout": "constrained"}
    figure, panels = plt.subplots(1, 1 + adaptive, squeeze=False, **size)
    draw_metric(panels[0, 0], groups, cfg)
    if adaptive:
        draw_budget(panels[0, 1], groups, cfg.at)
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(cfg.out, dpi=130)
    print(f"drew {len(runs)} runs into {cfg.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
