r"""Does the budget of Prop. 1 learn more per response? Prints markdown tables, draws a figure.

Every arm is a script with settings, trained on the tiny model once a seed; arms with the same seed
see the same problems in the same order. Held-out accuracy is measured every other step, against
all responses drawn for training (pilots counted), their tokens, and wall-clock seconds of the steps
(evaluation not counted; runs that share a machine wait for each other).

A mean curve joins the means over seeds, of both axes, of the evaluations. What an arm needs to a
level is where its mean curve first crosses it, linear in between. Levels are the start plus 50%,
80% and 95% of what RAFT (or --gain-of) gains in the run. The ratio is the baseline's need over the
arm's: above 1 the arm is faster. Intervals: 95%, 2,000 bootstraps over seeds, the same seeds for
arm and baseline.

Run: python bench/learning.py [--seeds 10] [--ablation] [--budgets]   (10 seconds a run on a core)
     python bench/learning.py --quick                     (two minutes on two cores, says little)
A finished run is kept in runs/learning/ and not run again: remove it when a default has changed.

A real model, on a machine with a GPU, after bench/warmup.py has left it in runs/warm:
python bench/learning.py --seeds 3 --steps 40 --problems-per-step 64 --learning-rate 1e-5 \
    --jobs 1 --eval-every 5 --out runs/real.png --extra="--model runs/warm \
    --problems gsm8k_train.jsonl --eval-problems gsm8k_test.jsonl \
    --max-new-tokens 256 --eval-samples 8"
"""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro
from matplotlib import pyplot as plt
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
ARMS = {  # arm: command line, the baseline it is compared with
    "raft": ("raft.py", "raft"),
    "gvm_raft": ("gvm_raft.py", "raft"),
    "grpo": ("gvm_grpo.py --pilot-samples 0", "grpo"),
    "gvm_grpo": ("gvm_grpo.py", "grpo"),
}
ABLATION = {  # gvm_raft's defaults are 1 pilot, re-used, prior 1, weighting algorithm1, 4 updates
    "gvm_raft, 2 pilots": ("gvm_raft.py --pilot-samples 2", "raft"),
    "gvm_raft, 4 pilots": ("gvm_raft.py --pilot-samples 4", "raft"),
    "gvm_raft, prior 0": ("gvm_raft.py --prior 0", "raft"),
    "gvm_raft, pilots thrown away": ("gvm_raft.py --no-reuse-pilot", "raft"),
    "gvm_raft, the paper's recipe": (
        "gvm_raft.py --no-reuse-pilot --prior 0 --pilot-samples 8",
        "raft",
    ),
    "raft, token": ("raft.py --weighting token", "raft, token"),
    "gvm_raft, token": ("gvm_raft.py --weighting token", "raft, token"),
    "raft, reward": ("raft.py --weighting reward", "raft, reward"),
    "gvm_raft, reward": ("gvm_raft.py --weighting reward", "raft, reward"),
    "raft, 1 update": ("raft.py --updates-per-step 1", "raft, 1 update"),
    "gvm_raft, 1 update": ("gvm_raft.py --updates-per-step 1", "raft, 1 update"),
}
BUDGETS = {
    "rounds": ("bench/budgets.py --budget rounds", "raft"),
    "remembered pilots": ("bench/budgets.py --budget pilots", "raft"),
    "remembered responses": ("bench/budgets.py --budget responses", "raft"),
}
AXES = ("responses", "tokens", "seconds")
LEVELS = (0.5, 0.8, 0.95)  # of the gain of --gain-of
STYLES = {"raft": "#0072B2", "gvm_raft": "#D55E00", "grpo": "#CC79A7", "gvm_grpo": "#009E73"}
STYLES |= {"rounds": "#000000", "remembered pilots": "#E69F00", "remembered responses": "#56B4E9"}


@dataclass(frozen=True)
class Config:
    """Settings; they name the folder of the runs."""

    seeds: int = 10  # runs per arm
    ablation: bool = False  # the variants of gvm_raft as well
    budgets: bool = False  # those of bench/budgets.py as well
    quick: bool = False  # 2 seeds, 8 steps
    only: str = ""  # arms with this in their name, and the baselines that are there
    steps: int = 12  # E-steps and M-steps
    problems_per_step: int = 16  # m; with many, the learning rate sets the pace, and not the noise
    learning_rate: float = 3e-4  # of AdamW
    eval_every: int = 2  # steps between evaluations, of one response per held-out problem
    gain_of: Literal["raft", "grpo"] = "raft"  # the arm whose gain sets the levels
    extra: str = ""  # more settings of the scripts for every run, as in --extra="--model runs/warm"
    jobs: int = os.cpu_count() or 1  # runs at a time, of one thread each
    folder: Path = ROOT / "runs" / "learning"  # of the run folders
    out: Path = ROOT / "bench" / "learning.png"  # the figure


def is_finished(folder, cfg):
    """Whether the run was evaluated after its last step."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return any(f'"step": {cfg.steps},' in line and '"accuracy"' in line for line in lines[-1:])


def run(command, seed, folder, cfg):
    """Trains one arm with one seed, from the start."""
    shutil.rmtree(folder, ignore_errors=True)
    script, *settings = command.split()
    settings += f"--steps {cfg.steps} --learning-rate {cfg.learning_rate} --seed {seed}".split()
    settings += f"--problems-per-step {cfg.problems_per_step} --eval-samples 1".split()
    settings += f"--eval-every {cfg.eval_every} --save-every 100000 {cfg.extra}".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, ROOT / script, *settings, "--run-dir", folder]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"learning.py: {' '.join(map(str, line))} failed: {done.stderr[-500:]}")
    shutil.rmtree(folder / "checkpoint")
    shutil.rmtree(folder / "model")


def read(folder):
    """[responses, tokens, seconds, accuracy] at every evaluation: [4, points]."""
    points, seconds = [], 0.0
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "accuracy" in row:
            points.append([row["responses"], row["tokens"], seconds, row["accuracy"]])
        else:
            seconds += sum(row["seconds"].values())
    return np.array(points).T


def need(x, accuracy, level):
    """Where the curve first reaches the level, linear between its points; inf if it never does."""
    reached = np.flatnonzero(accuracy >= level)
    if reached.size == 0:
        return np.inf
    i = reached[0]
    low, high = accuracy[i - 1], accuracy[i]
    return x[i - 1] + (x[i] - x[i - 1]) * (level - low) / (high - low) if i else x[0]


def measures(curves, arm, baseline, levels):
    """Final accuracy, mean accuracy, and need [axes, levels] of an arm, and how they compare."""
    points = []
    for name in (arm, baseline):
        *x, accuracy = curves[name]
        needs = np.array([[need(axis, accuracy, level) for level in levels] for axis in x])
        points.append((accuracy[-1], np.trapezoid(accuracy, x[0]) / x[0][-1], needs))
    (last, mean, needs), (base_last, base_mean, base_needs) = points
    with np.errstate(invalid="ignore"):
        gaps = [last - base_last, mean - base_mean]
        return np.array([last, mean, *gaps, *needs.ravel(), *(base_needs / needs).ravel()])


def compare(runs, arms, cfg, draws=2000):
    """{arm: (measures, low, high)} of the mean curves, bootstrapped over seeds."""
    rng, samples = np.random.default_rng(0), {arm: [] for arm in arms}
    for draw in range(draws + 1):
        pick = rng.integers(cfg.seeds, size=cfg.seeds) if draw else np.arange(cfg.seeds)
        curves = {arm: runs[arm][pick].mean(0) for arm in runs}
        start, end = curves[cfg.gain_of][-1][[0, -1]]
        levels = [start + share * (end - start) for share in LEVELS]
        for arm in arms:
            samples[arm].append(measures(curves, arm, (ARMS | ABLATION | BUDGETS)[arm][1], levels))
    bounds = (0.025, 0.975)
    return {
        arm: np.array([s[0], *np.nanquantile(s[1:], bounds, axis=0, method="nearest")])
        for arm, s in samples.items()
    }


def report(runs, arms, cfg):
    """The markdown tables."""
    results = compare(runs, arms, cfg)

    def cell(arm, k, form, interval=True):
        value, low, high = results[arm][:, k]
        known = np.isfinite(value) and (k < 13 or value > 0)  # else a level is not reached
        text = f"{value:{form}}" if known else "not reached" if k < 13 else "-"
        both = interval and (ARMS | ABLATION | BUDGETS)[arm][1] != arm and known
        return text + (f" [{low:{form}}, {high:{form}}]" if both else "")

    def table(title, header, rows):
        print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))

    header = ["arm", "final accuracy", "difference", "mean over the run", "difference", *AXES]
    totals = {arm: [f"{x:,.0f}" for x in runs[arm].mean(0)[:3, -1]] for arm in arms}
    forms = [(0, ".3f", False), (2, "+.3f"), (1, ".3f", False), (3, "+.3f")]
    rows = [[arm, *(cell(arm, *form) for form in forms), *totals[arm]] for arm in arms]
    table(f"**Accuracy**, {cfg.seeds} seeds; differences to the baseline", header, rows)
    for a, axis in enumerate(AXES):
        heads = [(f"to {100 * level:.0f}%", "ratio") for level in LEVELS]
        cells = {
            arm: [
                (cell(arm, k, ",.0f", False), cell(arm, k + 9, ".2f"))
                for k in range(4 + 3 * a, 7 + 3 * a)
            ]
            for arm in arms
        }
        rows = [[arm, *chain(*cells[arm])] for arm in arms]
        header = ["arm", *chain(*heads)]
        table(f"**Needed to reach a share of the gain of {cfg.gain_of}**, in {axis}", header, rows)


def draw(runs, arms, out):
    """Mean curves with bootstrap bands, against the three axes."""
    matplotlib.use("Agg")  # draws without a screen
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True, layout="constrained")
    rng = np.random.default_rng(0)
    for arm in arms:
        seeds = len(runs[arm])
        *x, accuracy = runs[arm].mean(0)
        means = runs[arm][rng.integers(seeds, size=(500, seeds)), -1].mean(1)
        low, high = np.quantile(means, (0.025, 0.975), axis=0)
        for panel, axis in zip(panels, x):
            panel.plot(axis, accuracy, color=STYLES[arm], lw=1.5, label=arm)
            panel.fill_between(axis, low, high, color=STYLES[arm], alpha=0.2, lw=0)
    for panel, name in zip(panels, AXES):
        panel.set(xlabel=f"{name}, pilots included", xlim=(0, None))
        panel.locator_params(axis="x", nbins=5)
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.grid(alpha=0.25, lw=0.6)
    panels[0].set(ylabel=f"held-out accuracy, {seeds} seeds")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=7, frameon=False)
    figure.savefig(out, dpi=110)
    print(f"\ndrew {out}")


def main(cfg):
    """Runs what is missing, then reports."""
    steps, seeds = (8, 2) if cfg.quick else (cfg.steps, cfg.seeds)
    cfg = Config(**vars(cfg) | {"steps": steps, "seeds": seeds})
    arms = ARMS | (ABLATION if cfg.ablation else {}) | (BUDGETS if cfg.budgets else {})
    needed = ("raft", cfg.gain_of)
    arms = {arm: value for arm, value in arms.items() if cfg.only in arm or arm in needed}
    name = f"{steps}x{cfg.problems_per_step}-lr-{cfg.learning_rate:g}-every-{cfg.eval_every}"
    place = cfg.folder / (name + re.sub(r"[^\w.]+", "-", cfg.extra))
    folders = {
        (arm, s): place / f"{arm}-{s}".replace(" ", "-") for s in range(seeds) for arm in arms
    }
    todo = [key for key, folder in folders.items() if not is_finished(folder, cfg)]
    pool = ThreadPoolExecutor(cfg.jobs)
    jobs = [pool.submit(run, arms[a][0], s, folders[a, s], cfg) for a, s in todo]
    try:
        for job in tqdm(jobs, desc="runs", disable=not jobs):
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)  # one run failed: start no others
    runs = {arm: np.array([read(folders[arm, s]) for s in range(seeds)]) for arm in arms}
    report(runs, [arm for arm in arms if arms[arm][1] in runs], cfg)
    if not cfg.only:
        draw(runs, [arm for arm in STYLES if arm in runs], cfg.out)


if __name__ == "__main__":
    main(tyro.cli(Config))
