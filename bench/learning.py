"""Which arm learns more per response? Compares scripts and settings over seeds.

    python bench/learning.py raft.py gvm_raft.py "my_raft.py --prior 0.3" --seeds 5

An arm is a command line; "GRPO: gvm_grpo.py --pilot-samples 0" names it. The others are
compared with the first, seed by seed: runs of a seed see the same problems in order.
Trains what is missing: a run stays in runs/learning/, known by a hash of its settings,
script, allocator.py, verify_math.py, problems and model. Stopped, the same command goes
on. Three arms with three seeds take some five minutes on two free cores.
Prints, with 95% intervals of Student's t over seeds:
  accuracy  at the end; where the arm that draws least ends; its mean up to there; and
            the paired differences to the first arm;
  needs     of the mean curves to shares of the first arm's gain, at the first crossing.
            "2.00x": the first arm needs twice as much; intervals by a jackknife.
Draws mean curves in bands from the worst seed to the best, and a csv for --from-csv.
"""

import csv
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from matplotlib import pyplot as plt
from plot import draw_band
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("raft.py", "gvm_raft.py", "gvm_grpo.py")
# trained on: responses without the pilots that are thrown away
COSTS = ("responses", "trained on", "tokens", "seconds")
COLUMNS = ("step", *COSTS, "accuracy")
RESPONSES = COLUMNS.index("responses")
LEVELS = (0.5, 0.8, 0.95, 1.0)  # of the first arm's gain


@dataclass(frozen=True)
class Config:
    """Settings."""

    arms: tyro.conf.Positional[tuple[str, ...]] = SCRIPTS  # command lines
    seeds: int = 3  # runs of each arm
    first_seed: int = 0  # choose settings on other seeds than those you report
    extra: str = ""  # settings of all arms, as in --extra="--steps 20"
    jobs: int = os.cpu_count() or 1  # runs at a time, of one thread each
    folder: Path = ROOT / "runs" / "learning"  # of the runs
    out: Path = ROOT / "runs" / "learning.png"  # the figure, and its csv beside it
    from_csv: Path | None = None  # draw this one again and run nothing


class Arm(NamedTuple):
    """A command line, as its script understands it."""

    name: str
    command: list[str]
    sources: list[Path]  # the files that are its program
    settings: object  # its script's Config
    key: str  # a hash of all that decides what it learns, but for the seed


# ---- Arms and runs
def read_arm(text, extra=""):
    """The arm of a command line, judged by the script's own parser and its check."""
    name, _, command = text.rpartition(": ")
    script, *words = shlex.split(f"{command} {extra}")
    script = ROOT / script
    if not script.is_file():
        raise SystemExit(f"arm '{text}': there is no script {script}")

    sys.path.insert(0, str(script.parent))  # where its allocator lies
    spec = importlib.util.spec_from_file_location("arm", script)
    module = sys.modules["arm"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    if not {"Config", "check"} <= vars(module).keys():
        raise SystemExit(f"arm '{text}': {script} is no copy of raft.py or the others")

    settings = tyro.cli(module.Config, args=words, prog=script.name)
    module.check(settings)
    if settings.run_dir or settings.seed != module.Config.seed:
        raise SystemExit(f"arm '{text}': learning.py sets --seed and --run-dir itself")
    sources = [script, script.parent / "allocator.py", script.parent / "verify_math.py"]
    command = [sys.executable, str(script), *words]
    return Arm(name or text, command, sources, settings, make_key(sources, settings))


def make_key(sources, settings):
    """A hash of settings, program, problems and model, where these are files."""
    total = hashlib.sha256(json.dumps(asdict(settings)).encode())
    data = [Path(settings.problems), Path(settings.eval_problems)]
    for path in [*sources, *data, *sorted(Path(settings.model).glob("*"))]:
        if path.is_file():
            total.update(path.read_bytes())
    return total.hexdigest()[:10]


def check_arms(arms):
    """Refuses arms that cannot be told apart, or not be compared."""
    for i, arm in enumerate(arms):
        for other in arms[:i]:
            if arm.key == other.key or arm.name == other.name:
                both = f"'{other.name}' and '{arm.name}'"
                raise SystemExit(f"{both} have one name, or one source and settings")
        if arm.settings.eval_problems != arms[0].settings.eval_problems:
            raise SystemExit(f"'{arm.name}': other --eval-problems than the first arm")


def is_finished(folder, steps):
    """Whether a run was evaluated after its last step."""
    file = folder / "metrics.jsonl"
    rows = file.read_text().splitlines() if file.is_file() else []
    last = json.loads(rows[-1]) if rows else {}
    return last.get("step") == steps and "accuracy" in last


def train(arm, seed, folder, children):
    """Trains an arm with a seed, from the last checkpoint if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [*arm.command, "--seed", str(seed), "--run-dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / "log.txt", "a") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        children.append(child)
        child.wait()

    if not is_finished(folder, arm.settings.steps):
        end = (folder / "log.txt").read_text()[-500:]
        raise SystemExit(f"'{arm.name}' with seed {seed} did not finish: ...{end}")
    if make_key(arm.sources, arm.settings) != arm.key:
        shutil.rmtree(folder)
        raise SystemExit(f"'{arm.name}', or what it reads, changed while it ran")
    for source in filter(Path.is_file, arm.sources):  # plot.py keeps them apart
        shutil.copy(source, folder)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def run_missing(arms, seeds, cfg):
    """The folder of every arm and seed, after training what is not there."""
    folders = {}
    pool, children, waiting = ThreadPoolExecutor(cfg.jobs), [], []
    for seed in seeds:
        for arm in arms:
            stem = arm.sources[0].stem
            folder = folders[arm.name, seed] = cfg.folder / f"{stem}-{arm.key}-{seed}"
            if not is_finished(folder, arm.settings.steps):
                waiting.append(pool.submit(train, arm, seed, folder, children))

    print(f"{len(folders) - len(waiting)} runs are there, {len(waiting)} are missing")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        for run in tqdm(as_completed(waiting), "runs", len(waiting), disable=None):
            run.result()
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.terminate()  # what still runs saves itself after its step
    return folders


def read_points(folder):
    """The evaluations of a run, the values of COLUMNS each."""
    points, trained_on = [], 0
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        trained_on += sum(row.get("counts", []))
        row["trained on"] = trained_on
        if "accuracy" in row:
            points.append([round(row[name], 5) for name in COLUMNS])
    return points


def make_curves(table):
    """{arm: [seeds, columns, points]} of rows of the csv."""
    runs = {}
    for arm, seed, *point in table:
        runs.setdefault(arm, {}).setdefault(seed, []).append(point)
    curves = {}
    for arm, by_seed in runs.items():
        curves[arm] = np.array([*by_seed.values()], float).swapaxes(1, 2)
    return curves


# ---- Statistics
def t_quantile(freedom):
    """The t that Student's distribution exceeds, on both sides together, in 5%."""
    # With t = √ν tan θ its density is proportional to cos(θ)^(ν-1), |θ| < π/2.
    edges = np.linspace(0, np.pi / 2, 10_001)
    mass = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (freedom - 1))
    angle = np.interp(0.95, mass / mass[-1], edges[1:])
    return freedom**0.5 * np.tan(angle)


def interval(values):
    """The mean of values, one a seed, and its 95% interval; infinite with one seed."""
    n, mean = len(values), np.mean(values)
    half = np.inf if n < 2 else t_quantile(n - 1) * np.std(values, ddof=1) / n**0.5
    return mean, mean - half, mean + half


def jackknife(statistic, n):
    """A statistic of the seeds, as a function of their places, and its 95% interval."""
    seeds = np.arange(n)
    value = statistic(seeds)
    if n < 2:
        return value, -np.inf, np.inf
    others = np.array([statistic(seeds[seeds != i]) for i in seeds])
    mean, low, high = interval(n * value - (n - 1) * others)
    return value, value + low - mean, value + high - mean


def need(costs, accuracy, level):
    """What a curve costs until it first reaches a level; inf if it never does."""
    reached = np.flatnonzero(accuracy >= level - 1e-9)  # levels are rounded
    if reached.size == 0:
        return np.inf
    around = slice(max(reached[0] - 1, 0), reached[0] + 1)
    return np.interp(level, accuracy[around], costs[around])


def needs(first, runs, column, share):
    """What two arms' mean curves need to a share of the first one's gain."""
    base, mine = first.mean(0), runs.mean(0)
    start, end = base[-1, [0, -1]]
    level = start + share * (end - start)
    return need(base[column], base[-1], level), need(mine[column], mine[-1], level)


# ---- Tables and figure
def print_table(title, header, rows):
    """A table in markdown."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    print(f"\n{title}\n")
    for row in [header, ["-" * width for width in widths], *rows]:
        print(f"| {' | '.join(map(str.ljust, row, widths))} |")


def bracket(values, form, unit=""):
    """A value and its interval, as text."""
    value, low, high = values
    both = f" [{low:{form}}, {high:{form}}]" if np.isfinite(high) else ""
    return f"{value:{form}}{unit}{both}"


def report_accuracy(curves):
    """Prints how accurate the arms become."""
    first, *_ = curves.values()
    shortest = min(runs[:, RESPONSES, -1].min() for runs in curves.values())
    grid = np.linspace(0, shortest, 1001)

    def measure(runs):
        paths = np.array([np.interp(grid, run[RESPONSES], run[-1]) for run in runs])
        return [runs[:, -1, -1], paths[:, -1], paths.mean(1)]

    rows = []
    for name, runs in curves.items():
        cells = [name, *(f"{total:,.0f}" for total in runs.mean(0)[1:-1, -1])]
        for values, base in zip(measure(runs), measure(first)):
            cells.append(f"{values.mean():.3f}")
            if runs is not first:
                cells[-1] += ", " + bracket(interval(values - base), "+.3f")
        rows.append(cells)
    at = f"{shortest:,.0f} responses"
    header = ["arm", *COSTS, "accuracy at the end", f"at {at}", f"mean to {at}"]
    print_table(f"**Accuracy**, {len(first)} seeds, and difference [95%]", header, rows)


def report_needs(curves):
    """Prints what the arms need to come as far as the first."""
    first, *_ = curves.values()
    rows = []
    for column, cost in enumerate(COSTS, start=1):
        for name, runs in curves.items():
            cells = [need_cell(first, runs, column, share) for share in LEVELS]
            rows.append([name, cost, *cells])
    header = ["arm", "in", *map("{:.0%}".format, LEVELS)]
    print_table("**Needed to shares of the first arm's gain**, [95%]", header, rows)


def need_cell(first, runs, column, share):
    """A need, and how many times it goes into the first arm's."""

    def log_ratio(seeds):
        base, mine = needs(first[seeds], runs[seeds], column, share)
        return np.log(base / mine)

    base, mine = needs(first, runs, column, share)
    if not np.isfinite(mine):
        return "not reached"
    if runs is first or base == 0 or mine == 0:  # 0: the start is there already
        return f"{mine:,.0f}"
    with np.errstate(all="ignore"):  # without some seeds it may not be reached
        ratio = np.exp(jackknife(log_ratio, len(runs)))
    return f"{mine:,.0f}, {bracket(ratio, '.2f', 'x')}"


def draw(curves, out):
    """Mean accuracy against the costs, with bands from the worst seed to the best."""
    settings = {"figsize": (11, 4), "sharey": True, "layout": "constrained"}
    figure, panels = plt.subplots(1, 3, **settings)
    for panel, cost in zip(panels, ("responses", "tokens", "seconds")):
        column = COLUMNS.index(cost)
        for number, (name, runs) in enumerate(curves.items()):
            draw_band(panel, runs[:, column], runs[:, -1], name, number)
        panel.set(xlabel=f"{cost} of training")

    panels[0].set(ylabel=f"held-out accuracy, {len(runs)} seeds")
    labels = panels[0].get_legend_handles_labels()
    columns = max(1, 100 // max(map(len, curves)))
    figure.legend(*labels, loc="outside upper center", ncols=columns)
    figure.savefig(out, dpi=110)


def main(cfg):
    """Runs what is missing, then reports."""
    if cfg.from_csv:
        with open(cfg.from_csv, newline="") as file:
            _, *table = csv.reader(file)
    else:
        arms = [read_arm(text, cfg.extra) for text in cfg.arms]
        check_arms(arms)
        seeds = range(cfg.first_seed, cfg.first_seed + max(cfg.seeds, 1))
        table = []
        for (name, seed), folder in run_missing(arms, seeds, cfg).items():
            table += [[name, seed, *point] for point in read_points(folder)]
        cfg.out.parent.mkdir(parents=True, exist_ok=True)
        with open(cfg.out.with_suffix(".csv"), "w", newline="") as file:
            csv.writer(file).writerows([["arm", "seed", *COLUMNS], *table])

    curves = make_curves(table)
    report_accuracy(curves)
    report_needs(curves)
    draw(curves, cfg.out)
    print(f"\ndrew {cfg.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
