"""bench/learning.py and bench/plot.py: statistics, refusals, and both in miniature."""

import csv
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import learning
import plot

ROOT = learning.ROOT
SMALL = "--steps 2 --problems-per-step 8 --eval-samples 1 --eval-every 1"


def run(script, *arguments):
    command = [sys.executable, ROOT / "bench" / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def curves(accuracy):
    """Runs [seeds, columns, points] with a step, a response and a token a point."""
    accuracy = np.array(accuracy, float)
    costs = [np.broadcast_to(np.arange(accuracy.shape[1]), accuracy.shape)] * 5
    return np.stack([*costs, accuracy], axis=1)


# ---- learning.py: statistics


def test_t_quantiles_are_those_of_the_tables():
    known = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423}
    for freedom, value in known.items():
        assert learning.t_quantile(freedom) == pytest.approx(value, abs=2e-4)
    assert learning.t_quantile(10_000) == pytest.approx(1.96, abs=1e-3)


def test_an_interval_is_the_one_computed_by_hand():
    half = 4.3027 / 3**0.5  # the deviation of 1, 2, 3 is 1
    by_hand = (2, 2 - half, 2 + half)
    assert learning.interval([1, 2, 3]) == pytest.approx(by_hand, abs=1e-4)


def test_an_interval_of_three_seeds_covers_the_truth_in_95_percent():
    draws = np.random.default_rng(0).normal(size=(2000, 3))
    found = [learning.interval(draw) for draw in draws]
    assert np.mean([low < 0 < high for _, low, high in found]) == pytest.approx(
        0.95, abs=0.015
    )


def test_one_seed_has_no_interval():
    assert learning.interval([0.5])[1:] == (-np.inf, np.inf)
    assert learning.bracket(learning.interval([0.5]), ".2f") == "0.50"


def test_the_jackknife_of_a_mean_is_its_t_interval():
    values = np.array([0.3, 0.1, 0.7, 0.2])
    found = learning.jackknife(lambda seeds: values[seeds].mean(), 4)
    assert found == pytest.approx(learning.interval(values))


def test_a_level_is_reached_between_two_evaluations():
    costs, accuracy = np.array([0, 10, 20, 30]), np.array([0.2, 0.4, 0.3, 0.8])
    assert learning.need(costs, accuracy, 0.3) == pytest.approx(5)
    assert learning.need(costs, accuracy, 0.4) == 10
    assert learning.need(costs, accuracy, 0.6) == pytest.approx(26)
    assert learning.need(costs, accuracy, 0.1) == 0
    assert learning.need(costs, accuracy, 0.8 + 1e-12) == 30  # rounding is forgiven
    assert learning.need(costs, accuracy, 0.9) == np.inf


def test_an_arm_twice_as_fast_needs_half():
    first = curves([[0.1, 0.3, 0.5, 0.7, 0.9], [0.3, 0.4, 0.5, 0.6, 0.7]])
    fast = curves([[0.1, 0.5, 0.9, 0.9, 0.9], [0.3, 0.5, 0.7, 0.7, 0.7]])
    assert learning.needs(first, fast, 1, share=0.5) == pytest.approx((2, 1))
    assert learning.need_cell(first, fast, 1, share=0.5) == "1, 2.00x [2.00, 2.00]"
    assert (
        learning.need_cell(fast, first * [[[1]] * 5 + [[0.5]]], 1, 1) == "not reached"
    )


def test_a_csv_prints_and_draws_again_without_training(tmp_path, capsys):
    rows = [["arm", "seed", *learning.COLUMNS]]
    for arm, end in (("raft.py", 0.7), ("GRPO, mine", 0.9)):
        for seed in (0, 1):
            rows.append([arm, seed, 0, 0, 0, 0, 0, 0.5])
            rows.append([arm, seed, 5, 100, 100, 2000, 7.5, end + 0.01 * seed])
    text = "\n".join(",".join(f'"{x}"' for x in row) for row in rows)
    (tmp_path / "a.csv").write_text(text)
    paths = {"out": tmp_path / "a.svg", "from_csv": tmp_path / "a.csv"}
    learning.main(learning.Config(**paths))
    printed = capsys.readouterr().out
    assert (
        "| GRPO, mine | 100 " in printed and "0.905, +0.200 [+0.200, +0.200]" in printed
    )
    assert "GRPO, mine" in (tmp_path / "a.svg").read_text()
    assert (tmp_path / "a.csv").read_text() == text


# ---- learning.py: what it refuses, and what it leaves alone


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        (["raft.py", "nothing.py"], "there is no script"),
        (["raft.py", "raft.py --pilot-samples 3"], "--pilot-samples"),
        (["raft.py", "gvm_raft.py --prior much"], "--prior"),
        (["raft.py", "gvm_raft.py --pilot-samples 9"], "--pilot-samples"),
        (["raft.py", "bench/learning.py"], "no copy of raft.py"),
        (["raft.py", "raft.py --steps 40"], "'raft.py' and 'raft.py --steps 40'"),
        (["raft.py --seed 3"], "--seed"),
        (["raft.py", "raft.py --eval-problems other.jsonl"], "--eval-problems"),
    ],
)
def test_arms_are_refused_before_anything_runs(arms, words, tmp_path, capsys):
    cfg = learning.Config(
        arms, folder=tmp_path / "runs", out=tmp_path / "new" / "a.png"
    )
    with pytest.raises(SystemExit) as stop:
        learning.main(cfg)
    assert stop.value.code not in (0, None)
    assert words in str(stop.value) + capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_run_is_known_by_settings_source_and_problems(tmp_path):
    for name in ("raft.py", "allocator.py", "verify_math.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    (tmp_path / "few.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    text = f"{tmp_path}/raft.py --problems {tmp_path}/few.jsonl --eval-problems x"
    keys = [learning.read_arm(text).key, learning.read_arm(text, "--kl-coef 1").key]
    for name in ("raft.py", "allocator.py", "verify_math.py", "few.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write("\n")
        keys.append(learning.read_arm(text).key)
    assert len(set(keys)) == 6 and learning.read_arm(text).key == keys[-1]


def test_an_arm_may_have_a_name():
    assert learning.read_arm("GRPO: gvm_grpo.py --pilot-samples 0").name == "GRPO"
    plain = learning.read_arm("gvm_grpo.py --pilot-samples 0")
    assert plain.name == "gvm_grpo.py --pilot-samples 0"


def test_by_default_nothing_is_written_outside_the_ignored_folder():
    assert "runs/" in (ROOT / ".gitignore").read_text().splitlines()
    config = learning.Config()
    for path in (config.out, config.folder, plot.Config(()).out):
        assert path.is_relative_to(ROOT / "runs")


# ---- plot.py


def made_up_run(folder, source="", **settings):
    """Three evaluations and two steps of three problems; their folder."""
    folder.mkdir()
    config = {"script": "gvm_raft", "seed": 0, "run_dir": str(folder)}
    config |= {"alpha": 1e-3, "beta": 2.0, "pilot_samples": 1, "reuse_pilot": True}
    config |= settings
    (folder / "config.json").write_text(json.dumps(config))
    (folder / f"{config['script']}.py").write_text(source)

    def row(step, **values):
        return {"step": step, "responses": 24 * step} | values

    budget = {"counts": [2, 9, 13], "rates": [0.8, 0.4, 0.1], "norms": [1, 2, 1]}
    rows = [row(0, accuracy=0.2, boxed=0.5)]
    for step in (1, 2):
        rows.append(row(step, reward=step / 10, boxed=step / 2, **budget))
        rows.append(row(step, accuracy=0.2 + step / 10, boxed=0.7))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + '{"step": 3, "resp')
    return folder


def test_only_runs_that_differ_in_the_seed_are_merged(tmp_path):
    kinds = [{"seed": 0}, {"seed": 1}, {"prior": 0.3}, {"script": "raft"}]
    kinds += [{"script": "raft", "source": "# another"}]
    folders = [made_up_run(tmp_path / str(i), **kind) for i, kind in enumerate(kinds)]
    groups = plot.group_runs(plot.read_runs(folders))
    assert {name: len(runs) for name, runs in groups.items()} == {
        "gvm_raft": 2,
        "gvm_raft --prior 0.3": 1,
        "raft --source 0": 1,
        f"raft --source {zlib.crc32(b'# another'):x}": 1,
    }


def test_a_step_is_drawn_where_it_starts_and_an_evaluation_where_it_is(tmp_path):
    [(_, rows)] = plot.read_runs([made_up_run(tmp_path / "run")])

    def points(**settings):
        return plot.find_curve(rows, plot.Config((), **settings)).round(9).tolist()

    assert points() == [[0, 0.2], [24, 0.3], [48, 0.4]]
    assert points(metric="reward") == [[0, 0.1], [24, 0.2]]
    assert points(metric="boxed", against="step") == [[0, 0.5], [1, 0.7], [2, 0.7]]
    assert points(metric="boxed", training=True) == [[0, 0.5], [24, 1.0]]


def test_the_line_of_proposition_1_goes_through_counts_that_follow_it(tmp_path):
    rates, norms = np.array([0.9, 0.5, 0.25, 0.04]), np.ones(4)
    w = plot.weights(rates, norms)
    folder = made_up_run(tmp_path / "run")
    steps = [{"step": 7, "rates": list(rates), "norms": [1] * 4}]
    steps[0]["counts"] = list(np.maximum(1, 3 * w))
    config = json.loads((folder / "config.json").read_text())
    axes = plot.plt.figure().add_subplot()
    plot.draw_budget(axes, {"gvm_raft": [(config, steps)]}, at=[7])
    x, y = axes.lines[0].get_data()
    assert np.interp(w, x, y) == pytest.approx(steps[0]["counts"], rel=1e-3)
    assert axes.get_legend().texts[0].get_text() == "gvm_raft, step 7"


def test_an_unknown_metric_is_refused_with_those_that_are_there(tmp_path):
    cfg = plot.Config(
        (made_up_run(tmp_path / "run"),), "acuracy", out=tmp_path / "a.png"
    )
    with pytest.raises(SystemExit, match="acuracy: there are accuracy, boxed, respo"):
        plot.main(cfg)
    assert not cfg.out.exists()


def test_folders_that_hold_no_run_are_left_out(tmp_path, capsys):
    good, bad = made_up_run(tmp_path / "good"), made_up_run(tmp_path / "bad")
    (bad / "metrics.jsonl").write_text("no JSON\n")
    plot.main(plot.Config((good, bad, tmp_path), at=(2, 9), out=tmp_path / "a.png"))
    printed = capsys.readouterr().out
    assert printed.count("left out") == 2 and "drew 1 runs" in printed
    assert "gvm_raft has no pilots in step 9" in printed
    with pytest.raises(SystemExit, match="none of these folders"):
        plot.main(plot.Config((bad,), out=tmp_path / "b.png"))


# ---- Both in miniature


def points(path):
    """Rows of a csv of learning.py without the seconds, which differ each time."""
    return [row[:6] + row[7:] for row in csv.reader(path.open())]


@pytest.mark.slow
def test_learning_runs_what_is_missing_and_plot_draws_it(tmp_path):
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    )
    before = {
        name: (ROOT / name).stat().st_mtime for name in tracked.stdout.split("\n")
    }
    lines = (ROOT / "tiny" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:8]))
    for name in ("raft.py", "allocator.py", "verify_math.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")

    few = f"--problems {tmp_path}/few.jsonl --eval-problems {tmp_path}/few.jsonl"
    arms = [f"mine: {tmp_path}/raft.py --learning-rate 2e-4", "gvm_raft.py"]
    settings = ["--seeds", 2, "--first-seed", 5, "--jobs", 1, f"--extra={few} {SMALL}"]
    settings += ["--folder", tmp_path / "runs", "--out", tmp_path / "figure.png"]
    done = run("learning.py", *arms, *settings)
    assert done.returncode == 0, done.stderr
    assert "0 runs are there, 4 are missing" in done.stdout
    found = points(tmp_path / "figure.csv")
    assert [row[0] for row in found].count("mine") == 2 * 3

    # A finished run stays; an unfinished one goes on; a changed source is another run.
    unfinished = next((tmp_path / "runs").glob("gvm_raft-*-6")) / "metrics.jsonl"
    unfinished.write_text(
        "".join(unfinished.read_text().splitlines(keepends=True)[:-1])
    )
    again = run("learning.py", *arms, *settings)
    assert "3 runs are there, 1 are missing" in again.stdout
    assert points(tmp_path / "figure.csv") == found
    with open(tmp_path / "raft.py", "a") as file:
        file.write("# another\n")
    other = run("learning.py", *arms, *settings)
    assert "2 runs are there, 2 are missing" in other.stdout

    drawn = run("plot.py", *(tmp_path / "runs").iterdir(), "--out", tmp_path / "b.png")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    after = {name: (ROOT / name).stat().st_mtime for name in before}
    assert after == before
