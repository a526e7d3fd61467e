"""The scripts end to end: what they write, and what survives being stopped."""

import importlib
import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, finish, options, restored, rows, run, start
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SUMMARY = ["accuracy_before", "accuracy_after", "responses_total", "tokens_total"]
SUMMARY += ["seconds_total", "plot it"]
PILOTS = {
    "raft": {},
    "gvm_raft": {"pilot_samples": 2},
    "gvm_grpo": {"pilot_samples": 2},
}
SLOW_GRPO = pytest.param("gvm_grpo", marks=pytest.mark.slow)
EVALUATED = {"step", "responses", "tokens", "boxed", "truncated", "entropy", "accuracy"}
EVALUATED |= {"accuracy_se", "pass_at_k"}
TRAINED = {"step", "responses", "tokens", "boxed", "truncated", "entropy", "reward"}
TRAINED |= {"accept", "counts", "accepted", "loss", "kl", "logp_shift", "grad_norm"}
TRAINED |= {"updates"}


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    """Every script's run of two steps: its folder, its rows, what it printed."""
    found = {}
    for script in SCRIPTS:
        folder = tmp_path_factory.mktemp("runs") / script
        settings = small | PILOTS[script] | {"run_dir": str(folder)}
        found[script] = folder, *run(script, **settings)
    return found


@pytest.fixture(scope="module")
def long_run(small, tmp_path_factory):
    """The settings of a run of four steps, and what it leaves if nothing stops it."""
    settings = small | PILOTS["gvm_raft"]
    settings |= {"steps": 4, "eval_every": 2, "updates_per_step": 2}
    folder = tmp_path_factory.mktemp("long") / "whole"
    found, _ = run("gvm_raft", **settings, run_dir=str(folder))
    return settings, found, weights(folder)


def checkpoint(folder):
    """The only checkpoint of a run."""
    (found,) = Path(folder).glob("checkpoint-??????")
    return found


def weights(folder):
    return load_file(checkpoint(folder) / "model.safetensors")


def same_weights(first, second):
    equal = [torch.equal(first[name], second[name]) for name in first]
    return first.keys() == second.keys() and all(equal)


def train_rows(found):
    return [row for row in found if "loss" in row]


def wait_for(path, process):
    """Waits for a path, as long as the process lives."""
    while not path.exists() and process.is_alive():
        time.sleep(0.002)


def assert_equal_but_for_rounding(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-7), name


# ---- What a run leaves


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_ends_with_a_greppable_summary(done, script):
    folder, found, printed = done[script]
    lines = dict(line.split(": ") for line in printed.splitlines()[-len(SUMMARY) :])
    assert list(lines) == SUMMARY
    before, after = found[0]["accuracy"], found[-1]["accuracy"]
    assert float(lines["accuracy_before"]) == pytest.approx(before, abs=1e-4)
    assert float(lines["accuracy_after"]) == pytest.approx(after, abs=1e-4)
    assert int(lines["responses_total"]) == found[-1]["responses"]
    assert int(lines["tokens_total"]) == found[-1]["tokens"] > 0
    assert float(lines["seconds_total"]) > 0
    assert lines["plot it"] == f"python bench/plot.py {folder}"
    assert json.loads((folder / "config.json").read_text())["steps"] == 2
    assert (folder / f"{script}.py").read_text() == (ROOT / f"{script}.py").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_step_and_evaluation_is_a_row_and_a_line(done, script):
    _, found, printed = done[script]
    trained = TRAINED | (set() if script == "raft" else {"rates", "norms", "bound"})
    for row, names in zip(found, [EVALUATED, trained, trained, EVALUATED], strict=True):
        assert names <= set(row)
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert len(lines) == 4
    for line, row in zip(lines, found):
        name = "accuracy" if "accuracy" in row else "reward"
        assert f"{name} {row[name]:.3f}" in line
    columns = [line.index("| loss") for line in lines[1:3]]
    assert columns[0] == columns[1]  # aligned


def test_the_scripts_spend_the_same_budget_every_step(done):
    for _, found, _ in done.values():
        assert [row["responses"] for row in train_rows(found)] == [32, 64]
        assert [sum(row["counts"]) for row in train_rows(found)] == [32, 32]


def test_gvm_gives_every_problem_its_pilots_and_not_all_the_same(done):
    trained = train_rows(done["gvm_raft"][1])
    counts = [n for row in trained for n in row["counts"]]
    assert min(counts) >= 2 and len(set(counts)) > 1
    assert all(0 < row["bound"] <= 1 for row in trained)


def test_without_pilots_gvm_raft_is_raft(done, small, tmp_path):
    folder, found, _ = done["raft"]
    settings = small | {"pilot_samples": 0, "run_dir": str(tmp_path / "run")}
    again, _ = run("gvm_raft", **settings)
    assert again == found and same_weights(weights(tmp_path / "run"), weights(folder))


def test_the_same_seed_gives_the_same_run_and_another_another(done, small, tmp_path):
    folder, found, _ = done["gvm_raft"]
    settings = small | PILOTS["gvm_raft"]
    again, _ = run("gvm_raft", **settings, run_dir=str(tmp_path / "again"))
    assert again == found
    assert same_weights(weights(tmp_path / "again"), weights(folder))
    settings |= {"steps": 1, "seed": 1, "run_dir": str(tmp_path / "other")}
    other, _ = run("gvm_raft", **settings)
    assert other[:2] != found[:2]


def test_the_papers_recipe_runs_and_its_pilots_are_counted(small, tmp_path):
    settings = small | {"pilot_samples": 8, "reuse_pilot": False, "prior": 0.0}
    settings |= {"steps": 1, "run_dir": str(tmp_path / "run")}
    found, _ = run("gvm_raft", **settings)
    (row,) = train_rows(found)
    assert row["responses"] == 32 + 8 * 8 and sum(row["counts"]) == 32
    counts, accepted = np.array(row["counts"]), np.array(row["accepted"])
    drawn = counts > 0  # the recipe gives nothing to a problem without a right pilot
    assert not drawn.all()
    assert row["accept"] == pytest.approx(np.mean(accepted[drawn] / counts[drawn]))


def test_its_checkpoint_loads_with_transformers_and_generates(done):
    message = [{"role": "user", "content": "1+2"}]
    settings = {"return_dict": True, "return_tensors": "pt"}
    start = AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "model")
    for folder, _, _ in done.values():
        model = AutoModelForCausalLM.from_pretrained(checkpoint(folder))
        tokenizer = AutoTokenizer.from_pretrained(checkpoint(folder))
        inputs = tokenizer.apply_chat_template(message, **settings)
        drawn = model.generate(**inputs, max_new_tokens=4)
        assert drawn.shape[1] > inputs["input_ids"].shape[1]
        assert model.dtype == start.dtype
        assert not same_weights(model.state_dict(), start.state_dict())


@pytest.mark.parametrize("eval_samples", [1, 3])
def test_no_steps_only_evaluate(small, tmp_path, eval_samples):
    settings = small | {"steps": 0, "eval_samples": eval_samples}
    ((row,), printed) = run("raft", **settings, run_dir=str(tmp_path / "run"))
    assert 0 <= row["accuracy"] <= row["pass_at_k"] <= 1 and row["responses"] == 0
    assert eval_samples > 1 or row["accuracy"] == row["pass_at_k"]
    spread = (row["accuracy"] * (1 - row["accuracy"]) / 20) ** 0.5
    assert 0 < row["accuracy_se"] <= spread + 1e-9
    assert eval_samples > 1 or row["accuracy_se"] == pytest.approx(spread)
    assert f"accuracy_after: {row['accuracy']:.4f}" in printed.splitlines()


@pytest.mark.parametrize("script", ["gvm_raft", SLOW_GRPO])
def test_other_settings_run_too(small, tmp_path, script):
    settings = small | {"kl_coef": 0.01, "temperature": 0.9, "steps": 1}
    settings |= {"gradient_checkpointing": True, "tokens_per_batch": 200}
    found, _ = run(script, **settings, run_dir=str(tmp_path / "run"))
    (row,) = train_rows(found)
    assert row["kl"] > 0 and row["updates"] == 4


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(done, small, tmp_path):
    _, found, _ = done["gvm_raft"]
    settings = small | PILOTS["gvm_raft"] | {"run_dir": str(tmp_path / "run")}
    again, _ = run("gvm_raft", **settings, gradient_checkpointing=True)
    for first, second in zip(found[:2], again[:2]):
        assert_equal_but_for_rounding(first, second)


def test_the_line_says_where_responses_are_cut(small, tmp_path):
    settings = small | {"max_new_tokens": 3, "steps": 1, "run_dir": str(tmp_path / "r")}
    found, printed = run("raft", **settings)
    (row,) = train_rows(found)
    assert row["truncated"] == 1 and row["reward"] == row["updates"] == 0
    (line,) = [line for line in printed.splitlines() if "reward" in line]
    assert "grad 0.00" in line and "truncated 1.00" in line
    assert "--max-new-tokens" in line


def test_the_command_line_runs_and_leaves_no_bars_in_a_log(done, small, tmp_path):
    settings = small | PILOTS["gvm_raft"] | {"run_dir": str(tmp_path / "run")}
    assert finish(start("gvm_raft", tmp_path / "log", **settings)) == [0]
    printed = (tmp_path / "log" / "0.out").read_text().splitlines()
    assert [line.split(": ")[0] for line in printed[-len(SUMMARY) :]] == SUMMARY
    assert (tmp_path / "log" / "0.err").read_text() == ""
    assert rows(tmp_path / "run") == done["gvm_raft"][1]


# ---- Several processes


@pytest.mark.parametrize("script", ["gvm_raft", SLOW_GRPO])
def test_two_processes_learn_what_one_does(small, tmp_path, script):
    settings = small | PILOTS[script] | {"steps": 1, "updates_per_step": 1}
    settings |= {"tokens_per_batch": 300, "kl_coef": 0.1}
    one, _ = run(script, **settings, run_dir=str(tmp_path / "one"))
    settings["run_dir"] = str(tmp_path / "two")
    two = start(script, tmp_path / "log", world=2, **settings)
    assert finish(two) == [0, 0], (tmp_path / "log" / "0.err").read_text()
    found = rows(tmp_path / "two")
    for first, second in zip(one[:2], found[:2]):  # later ones follow another rounding
        assert_equal_but_for_rounding(first, second)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["gvm_raft", "gvm_grpo"])
def test_a_process_without_accepted_responses_does_not_wait_for_ever(
    small, tmp_path, script
):
    line = Path(small["problems"]).read_text().splitlines()[0]
    problem = json.loads(line)["problem"]
    # One problem is always solved, as its answer is what the model says; others never.
    table = [{"problem": problem, "answer": greedy(problem)}]
    table += [{"problem": f"{i}+1", "answer": "-77"} for i in (1, 2)]
    settings = small | {"problems": str(tmp_path / "p.jsonl"), "temperature": 0.01}
    settings |= {"problems_per_step": 3, "samples_per_problem": 2, "pilot_samples": 1}
    settings |= {"updates_per_step": 2, "learning_rate": 1e-9}
    Path(settings["problems"]).write_text("\n".join(map(json.dumps, table)))
    settings["run_dir"] = str(tmp_path / "run")
    two = start(script, tmp_path / "log", world=2, **settings)
    assert finish(two) == [0, 0], (tmp_path / "log" / "0.err").read_text()
    for row in train_rows(rows(tmp_path / "run")):
        assert sum(np.array(row["accepted"]) > 0) == 1
        assert row["updates"] == (script == "gvm_raft")  # equal rewards teach nothing


def greedy(problem):
    """What the tiny model puts in the box when it takes the likeliest token."""
    import gvm_raft

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "model")
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "model")
    message = [{"role": "user", "content": f"{problem}\n{gvm_raft.INSTRUCTION}"}]
    settings = {"add_generation_prompt": True, "return_dict": True}
    inputs = tokenizer.apply_chat_template(message, return_tensors="pt", **settings)
    (ids,) = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    return tokenizer.decode(ids).split("\\boxed{")[-1].split("}")[0]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def torchrun(folder, settings, world=2):
    """The README's command for a node, in a session of its own, as of a shell."""
    command = [*TORCHRUN, f"--nproc-per-node={world}", str(ROOT / "gvm_raft.py")]
    command += options(settings)
    with open(folder / "log", "w") as log:
        own = {"stdout": log, "stderr": log, "start_new_session": True}
        return subprocess.Popen(command, cwd=folder, **own)


@pytest.mark.slow
def test_torchrun_starts_two_processes(small, tmp_path):
    settings = small | PILOTS["gvm_raft"] | {"updates_per_step": 1}
    one, _ = run("gvm_raft", **settings, run_dir=str(tmp_path / "one"))
    settings["run_dir"] = str(tmp_path / "two")
    assert torchrun(tmp_path, settings).wait(300) == 0, (tmp_path / "log").read_text()
    found = rows(tmp_path / "two")
    assert_equal_but_for_rounding(train_rows(one)[0], train_rows(found)[0])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whom", ["torchrun", "all of them"])
def test_torchrun_is_stopped_after_a_step_and_continues(
    long_run, tmp_path, number, whom
):
    """A scheduler tells torchrun, a terminal tells torchrun and its processes."""
    settings = long_run[0] | {"run_dir": str(tmp_path / "run"), "steps": 400}
    settings["save_every"] = 1000
    process = torchrun(tmp_path, settings)
    while not (tmp_path / "run" / "metrics.jsonl").exists() or (
        len(rows(tmp_path / "run")) < 3
    ):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    tell = os.kill if whom == "torchrun" else os.killpg
    tell(process.pid, number)
    process.wait(100)  # its exit code is torchrun's own
    stopped = rows(tmp_path / "run")
    step = stopped[-1]["step"]
    assert checkpoint(tmp_path / "run").name == f"checkpoint-{step:06d}"
    assert "repeat the command" in (tmp_path / "log").read_text()

    settings["steps"] = step + 1
    process = torchrun(tmp_path, settings)
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    found = rows(tmp_path / "run")
    assert found[: len(stopped)] == stopped and found[-1]["step"] == step + 1


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_continues_on_one(long_run, tmp_path):
    settings = long_run[0] | {"run_dir": str(tmp_path / "run")}
    two = start("gvm_raft", tmp_path / "log", world=2, **settings)
    wait_for(tmp_path / "run" / "checkpoint-000002", two[0])
    for process in two:
        process.kill()
    assert finish(two) == [-signal.SIGKILL] * 2
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    # the kill may come before the checkpoint of step 1 is removed
    newest = max((tmp_path / "run").glob("checkpoint-??????"))
    before = len((newest / "metrics.jsonl").read_text().splitlines())

    found, _ = run("gvm_raft", **settings)
    assert found[-1]["step"] == 4
    settings["run_dir"] = str(tmp_path / "again")
    assert finish(start("gvm_raft", tmp_path / "log", world=2, **settings)) == [0, 0]
    on_two = rows(tmp_path / "again")
    assert found[:before] == on_two[:before]
    assert_equal_but_for_rounding(found[before], on_two[before])


# ---- Stopped and continued


def assert_continues(settings, expected, expected_weights):
    """The same command ends a run as if it had not been stopped."""
    found, _ = run("gvm_raft", **settings)
    assert found == expected
    assert same_weights(weights(settings["run_dir"]), expected_weights)


@pytest.mark.parametrize(
    "step", [pytest.param("000001", marks=pytest.mark.slow), "000003"]
)
def test_a_killed_run_continues_as_if_nothing_had_happened(long_run, tmp_path, step):
    settings = long_run[0] | {"run_dir": str(tmp_path / "run")}
    (process,) = start("gvm_raft", tmp_path / "log", **settings)
    wait_for(tmp_path / "run" / f"checkpoint-{step}", process)
    process.kill()
    assert finish([process]) == [-signal.SIGKILL]
    mine = tmp_path / "run" / "checkpoint-000003-mine"
    mine.mkdir()  # not a checkpoint of ours
    draft = tmp_path / "run" / "checkpoint.part"
    draft.mkdir()  # killed while saving
    (draft / "model.safetensors").write_text("half of it")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "resp')  # killed while logging
    assert_continues(settings, *long_run[1:])
    assert mine.is_dir() and not draft.exists()


@pytest.mark.slow
def test_a_run_may_be_killed_at_any_moment(long_run, tmp_path):
    settings = long_run[0] | {"run_dir": str(tmp_path / "run")}
    for delay in np.random.default_rng(0).uniform(0.2, 3, 20):
        (process,) = start("gvm_raft", tmp_path / "log", **settings)
        process.join(delay)
        process.kill()
        (code,) = finish([process])
        error = (tmp_path / "log" / "0.err").read_text()
        assert code in (0, -signal.SIGKILL), error
    assert_continues(settings, *long_run[1:])


def interrupted(monkeypatch, number, settings, step):
    """A run that gets a signal in the middle of a step; what it printed."""
    module = importlib.import_module("gvm_raft")
    update, calls = module.update, []

    def spoiled(*arguments):
        calls.append(number)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return update(*arguments)

    monkeypatch.setattr(module, "update", spoiled)
    _, printed = run("gvm_raft", **settings)
    monkeypatch.setattr(module, "update", update)
    assert len(calls) == step
    return printed


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(
    long_run, tmp_path, monkeypatch, number
):
    settings = long_run[0] | {"run_dir": str(tmp_path / "run"), "save_every": 9}
    printed = interrupted(monkeypatch, number, settings, step=1)
    assert f"at step 1: repeat the command with --run-dir {tmp_path / 'run'}" in printed
    assert checkpoint(tmp_path / "run").name == "checkpoint-000001"
    assert rows(tmp_path / "run")[-1]["step"] == 1
    assert_continues(settings, *long_run[1:])


def test_a_run_without_a_folder_of_its_own_name_continues_by_what_it_printed(
    small, tmp_path, monkeypatch
):
    small = small | {"model": str(ROOT / "tiny" / "model")}  # from any folder
    monkeypatch.chdir(tmp_path)
    printed = interrupted(monkeypatch, signal.SIGTERM, small, step=1)
    (folder,) = (tmp_path / "runs").iterdir()
    (line,) = [line for line in printed.splitlines() if "--run-dir" in line]
    name = line.split("--run-dir ")[1].split()[0]
    assert (tmp_path / name).samefile(folder)
    found, _ = run("gvm_raft", **small, run_dir=name)
    assert [row["step"] for row in train_rows(found)] == [1, 2]
    assert list((tmp_path / "runs").iterdir()) == [folder]


@pytest.mark.slow
def test_a_process_that_gets_sigterm_ends_well(long_run, tmp_path):
    settings = long_run[0] | {"run_dir": str(tmp_path / "run")}
    (process,) = start("gvm_raft", tmp_path / "log", **settings)
    wait_for(tmp_path / "run" / "checkpoint-000001", process)
    os.kill(process.pid, signal.SIGTERM)
    (code,) = finish([process])
    assert code in (0, 128 + signal.SIGTERM)
    assert (tmp_path / "log" / "0.err").read_text() == ""
    assert_continues(settings, *long_run[1:])


@pytest.fixture(scope="module")
def template(long_run, tmp_path_factory):
    """The settings of a run that stopped after two of four steps, and a copy of it."""
    folder = tmp_path_factory.mktemp("stopped")
    settings = long_run[0] | {"run_dir": str(folder / "run")}
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupted(monkeypatch, signal.SIGTERM, settings, step=2)
    shutil.copytree(folder / "run", folder / "copy")
    return settings, folder / "copy"


@pytest.fixture
def stopped(template):
    """The settings of that run, as it stopped."""
    settings, copy = template
    shutil.rmtree(settings["run_dir"])
    shutil.copytree(copy, settings["run_dir"])
    return settings


@pytest.mark.parametrize(
    "harm", [pytest.param("shorter", marks=pytest.mark.slow), "half a line", "gone"]
)
def test_metrics_are_repaired_from_the_checkpoint(stopped, long_run, harm):
    path = Path(stopped["run_dir"]) / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text[:700] if harm == "half a line" else text.split("\n")[0])
    if harm == "gone":
        path.unlink()
    assert_continues(stopped, *long_run[1:])


def test_more_steps_continue_a_run_that_was_at_its_end(long_run, tmp_path):
    settings = long_run[0] | {"run_dir": str(tmp_path / "run")}
    run("gvm_raft", **settings | {"steps": 2})
    assert_continues(settings, *long_run[1:])


def test_a_finished_run_comes_to_the_same_end_again(done, small):
    folder, found, _ = done["raft"]
    before = weights(folder)
    again, printed = run("raft", **small, run_dir=str(folder))
    assert again == found and same_weights(weights(folder), before)
    lines = printed.splitlines()[-len(SUMMARY) :]
    assert [line.split(": ")[0] for line in lines] == SUMMARY


@pytest.mark.parametrize(
    ("script", "changed", "named"),
    [
        ("raft", {"learning_rate": 1e-3}, "learning_rate"),
        ("raft", {"seed": 7, "save_every": 1}, "seed"),
        ("gvm_raft", {}, "script"),
    ],
)
def test_other_settings_than_those_of_the_run_are_refused(
    done, small, script, changed, named
):
    folder = done["raft"][0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        run(script, **small | changed, run_dir=str(folder))
    assert named in stop.value.code and "\n" not in stop.value.code
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_folder_of_a_model_is_no_run_and_stays_as_it_is(small, tmp_path):
    shutil.copytree(ROOT / "tiny" / "model", tmp_path / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(SystemExit) as stop:
        run("raft", **small, run_dir=str(tmp_path / "model"))
    assert "other settings" in stop.value.code
    assert before == {
        path: path.read_bytes() for path in (tmp_path / "model").iterdir()
    }


def test_a_second_plain_run_has_a_folder_of_its_own(small, tmp_path, monkeypatch):
    small = small | {"model": str(ROOT / "tiny" / "model"), "steps": 0}
    monkeypatch.chdir(tmp_path)
    for samples in (1, 2):
        run("raft", **small | {"eval_samples": samples})
        time.sleep(1)  # two processes would not need it
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all(folder.name.startswith("raft-") for folder in folders)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_tiny_model_is_found_from_any_folder(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with restored():
        cfg = runpy.run_path(str(ROOT / f"{script}.py"), run_name=script)["Config"]()
    assert not Path(cfg.model).is_absolute()  # --help is short, and runs may move
    assert Path(cfg.model).samefile(ROOT / "tiny" / "model")
    assert Path(cfg.problems).is_file() and Path(cfg.eval_problems).is_file()


def test_no_process_writes_before_all_have_read(small, tmp_path, monkeypatch):
    """Else one that comes late reads a config.json of which half is written."""
    script, folder = importlib.import_module("gvm_raft"), tmp_path / "run"
    there = []
    monkeypatch.setattr(script.dist, "barrier", lambda: there.append(folder.exists()))
    script.open_run(script.Config(**small, run_dir=str(folder)))
    assert folder.exists() and there[:1] == [False]


# ---- Disks and numbers that fail


def contents(folder):
    """What a checkpoint holds, byte for byte."""
    return {path.name: path.read_bytes() for path in checkpoint(folder).iterdir()}


def test_a_full_disk_leaves_the_last_checkpoint(stopped, long_run):
    folder = Path(stopped["run_dir"])
    before = contents(folder)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limit[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            run("gvm_raft", **stopped)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "cannot be written" in stop.value.code and "\n" not in stop.value.code
    (folder / "checkpoint.part").rename(folder / "part")  # it may stay
    assert contents(folder) == before
    assert_continues(stopped, *long_run[1:])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_broken_checkpoint_is_named_and_left_alone(stopped, name):
    path = checkpoint(stopped["run_dir"]) / name
    path.write_bytes(path.read_bytes()[:1000])
    before = contents(stopped["run_dir"])
    with pytest.raises(SystemExit) as stop:
        run("gvm_raft", **stopped)
    assert str(path.parent) in stop.value.code and "does not load" in stop.value.code
    assert contents(stopped["run_dir"]) == before


def test_a_gradient_that_is_not_finite_stops_the_run(small, tmp_path, monkeypatch):
    script = importlib.import_module("gvm_raft")
    policy_loss, folder = script.policy_loss, tmp_path / "run"

    def spoiled(*arguments):
        harm = torch.nan if (folder / "checkpoint-000001").exists() else 1
        return policy_loss(*arguments) * harm

    monkeypatch.setattr(script, "policy_loss", spoiled)
    with pytest.raises((SystemExit, RuntimeError), match="finite"):
        run("gvm_raft", **small, run_dir=str(folder))
    assert checkpoint(folder).name == "checkpoint-000001"
