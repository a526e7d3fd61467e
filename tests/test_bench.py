"""The scripts of bench/ that draw and time."""

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


def run(script, *arguments):
    command = [sys.executable, BENCH / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def made_up_run(folder, script="gvm_raft", seed=0):
    """Three evaluations and two steps of three problems."""
    folder.mkdir()
    config = {"script": script, "seed": seed, "pilot_samples": 2, "reuse_pilot": True}
    (folder / "config.json").write_text(json.dumps(config | {"alpha": 1e-3, "beta": 2.0}))
    step = {"counts": [2, 9, 13], "accepted": [2, 3, 0], "accept": 0.4}
    step |= {"accept_rates": [0.8, 0.4, 0.1]} if script != "raft" else {}
    rows = [{"responses": 0, "accuracy": 0.2}]
    for responses in (24, 48):
        rows += [{"responses": responses} | step, {"responses": responses, "accuracy": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_plot_draws_runs_of_several_scripts_and_seeds(tmp_path):
    runs = [made_up_run(tmp_path / f"gvm{seed}", seed=seed) for seed in (0, 1)]
    runs.append(made_up_run(tmp_path / "raft", script="raft"))
    done = run("plot.py", *runs, "--out", tmp_path / "runs.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flaw", ["folder", "metrics.jsonl", "rows", "JSON"])
def test_plot_refuses_what_is_no_run_folder_in_one_sentence(tmp_path, flaw, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCH)
    import plot

    metrics = made_up_run(tmp_path / "run") / "metrics.jsonl"
    {
        "folder": lambda: metrics.parent.rename(tmp_path / "elsewhere"),
        "metrics.jsonl": metrics.unlink,
        "rows": lambda: metrics.write_text(""),
        "JSON": lambda: metrics.write_text("no JSON\n"),
    }[flaw]()
    with pytest.raises(SystemExit) as stop:
        plot.main([tmp_path / "run"], out=tmp_path / "runs.png")
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "runs.png").exists()


def test_the_nearly_solved_set_keeps_its_shares_and_its_test_problems_apart(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import skills

    cfg = skills.Config(solved=0.95, train=200)
    train, test = skills.make_nearly_solved(cfg)
    assert (train, test) == skills.make_nearly_solved(cfg)
    assert len({*train, *test}) == 200 + 400
    rare = list(skills.MEANING)[9:]
    assert sum(problem[1] in rare for problem in train) == 10
    assert [sum(problem[1] == symbol for problem in test) for symbol in rare] == [100] * 3


@pytest.mark.slow
def test_step_reports_every_phase():
    small = {"--repeats": 1, "--responses": 16, "--max-new-tokens": 16}
    done = run("step.py", *chain(*small.items()), "--sizes", 16, 32)
    assert done.returncode == 0, done.stderr
    for phase in ("sampling", "verification", "allocation", "update", "weight hand-over"):
        assert f"| {phase} |" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["rounds", "pilots", "responses"])
def test_other_budgets_draw_as_many_responses(tmp_path, budget):
    """The same eight problems in both steps, so that there is something to remember."""
    rows = (BENCH.parent / "tiny" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(rows[:8]))
    few = ["--problems", tmp_path / "few.jsonl", "--eval-problems", tmp_path / "few.jsonl"]
    sizes = ["--steps", 2, "--problems-per-step", 8, "--samples-per-problem", 4]
    folder = tmp_path / "run"
    done = run("budgets.py", "--budget", budget, *few, *sizes, "--run-dir", folder)
    assert done.returncode == 0, done.stderr[-500:]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    counts = [row["counts"] for row in steps if "counts" in row]
    assert [sum(n) for n in counts] == [32, 32] and len(set(counts[-1])) > 1
    again = run("budgets.py", "--budget", budget, *few, "--run-dir", folder, "--resume")
    assert again.returncode == 2 and again.stderr.count("\n") == 1
