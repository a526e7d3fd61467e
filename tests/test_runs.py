"""The scripts end to end with the tiny model: what they write, and what survives being stopped."""

import importlib
import json
import os
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

SUMMARY = [
    "accuracy_before",
    "accuracy_after",
    "responses_total",
    "tokens_total",
    "seconds_total",
]
PILOTS = {
    "raft": {},
    "gvm_raft": {"pilot_samples": 2},
    "gvm_grpo": {"pilot_samples": 2},
}
OF_RANKS = {"padding", "imbalance_split", "imbalance_sample", "imbalance_update"}
SLOW_GRPO = pytest.param("gvm_grpo", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    """Every script's run of two steps: its folder, its rows, what it printed."""
    folders = {
        script: str(tmp_path_factory.mktemp("runs") / script) for script in SCRIPTS
    }
    return {
        script: (Path(folder), *run(script, **small, **PILOTS[script], run_dir=folder))
        for script, folder in folders.items()
    }


@pytest.fixture(scope="module")
def long_run(small, tmp_path_factory):
    """The settings of a run of four steps, and what it leaves if nothing stops it."""
    settings = (
        small
        | PILOTS["gvm_raft"]
        | {"steps": 4, "eval_every": 2, "updates_per_step": 2}
    )
    folder = tmp_path_factory.mktemp("long") / "whole"
    found, _ = run("gvm_raft", **settings, run_dir=str(folder))
    return settings, found, weights(folder)


def weights(folder):
    return load_file(Path(folder) / "model" / "model.safetensors")


def same_weights(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[k], second[k]) for k in first
    )


def train_rows(found):
    return [row for row in found if "loss" in row]


def wait_for(path, process):
    """Waits for a path, as long as the process lives."""
    while not path.exists() and process.is_alive():
        time.sleep(0.002)


# ---- What a run leaves


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_ends_with_a_greppable_summary(done, script):
    folder, found, printed = done[script]
    lines = dict(line.split(": ") for line in printed.splitlines()[-len(SUMMARY) :])
    assert list(lines) == SUMMARY
    assert float(lines["accuracy_before"]) == pytest.approx(
        found[0]["accuracy"], abs=1e-4
    )
    assert float(lines["accuracy_after"]) == pytest.approx(
        found[-1]["accuracy"], abs=1e-4
    )
    assert int(lines["responses_total"]) == found[-1]["responses"]
    assert int(lines["tokens_total"]) == found[-1]["tokens"] > 0
    assert float(lines["seconds_total"]) > 0
    assert json.loads((folder / "config.json").read_text())["steps"] == 2


def test_the_scripts_spend_the_same_budget_every_step(done):
    for _, found, printed in done.values():
        assert [row["responses"] for row in train_rows(found)] == [32, 64]
        assert [sum(row["counts"]) for row in train_rows(found)] == [32, 32]
        for total in (32, 64):
            assert (
                sum(f"responses {total}" in line for line in printed.splitlines()) >= 1
            )


def test_gvm_gives_every_problem_its_pilots_and_not_all_the_same(done):
    counts = [n for row in train_rows(done["gvm_raft"][1]) for n in row["counts"]]
    assert min(counts) >= 2 and len(set(counts)) > 1
    for row in train_rows(done["gvm_raft"][1]):
        assert 0 < row["variance"] <= row["variance_uniform"]


def test_without_pilots_gvm_raft_is_raft(done, small, tmp_path):
    folder, found, _ = done["raft"]
    again, _ = run("gvm_raft", **small, pilot_samples=0, run_dir=str(tmp_path / "run"))
    assert again == found and same_weights(weights(tmp_path / "run"), weights(folder))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    done, small, tmp_path
):
    folder, found, _ = done["gvm_raft"]
    settings = small | PILOTS["gvm_raft"]
    again, _ = run("gvm_raft", **settings, run_dir=str(tmp_path / "again"))
    other, _ = run(
        "gvm_raft", **settings | {"steps": 1}, run_dir=str(tmp_path / "other"), seed=1
    )
    assert again == found and same_weights(weights(tmp_path / "again"), weights(folder))
    assert other[:2] != found[:2]


def test_discarded_pilots_are_counted(small, tmp_path):
    settings = small | {
        "pilot_samples": 3,
        "reuse_pilot": False,
        "prior": 0.0,
        "steps": 1,
    }
    found, _ = run("gvm_raft", **settings, run_dir=str(tmp_path / "run"))
    (row,) = train_rows(found)
    assert row["responses"] == 32 + 8 * 3 and sum(row["counts"]) == 32
    assert (
        min(row["counts"]) == 0 < row["accept"] < 1
    )  # the paper drops what no pilot solved


def test_the_model_it_leaves_loads_and_generates(done):
    for folder, _, _ in done.values():
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        message = [{"role": "user", "content": "1+2"}]
        inputs = tokenizer.apply_chat_template(
            message, return_dict=True, return_tensors="pt"
        )
        assert (
            model.generate(**inputs, max_new_tokens=4).shape[1]
            > inputs["input_ids"].shape[1]
        )
        start = AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "model")
        assert not same_weights(model.state_dict(), start.state_dict())


@pytest.mark.parametrize("eval_samples", [1, 3])
def test_no_steps_only_evaluate(small, tmp_path, eval_samples):
    settings = small | {
        "steps": 0,
        "eval_samples": eval_samples,
        "run_dir": str(tmp_path / "run"),
    }
    ((row,), printed) = run("raft", **settings)
    assert 0 <= row["accuracy"] <= row["pass_at_k"] <= 1 and row["responses"] == 0
    assert eval_samples > 1 or row["accuracy"] == row["pass_at_k"]
    assert f"accuracy_after: {row['accuracy']:.4f}" in printed.splitlines()


@pytest.mark.parametrize("script", ["gvm_raft", SLOW_GRPO])
def test_other_settings_run_too(small, tmp_path, script):
    settings = small | {
        "kl_coef": 0.01,
        "weighting": "token",
        "temperature": 0.9,
        "steps": 1,
    }
    settings |= {
        "gradient_checkpointing": True,
        "tokens_per_batch": 200,
        "pilot_samples": 4,
    }
    found, _ = run(script, **settings, run_dir=str(tmp_path / "run"))
    assert all(np.isfinite(row["loss"]) and row["kl"] >= 0 for row in train_rows(found))


def test_the_command_line_runs(done, small, tmp_path):
    settings = small | PILOTS["gvm_raft"] | {"run_dir": str(tmp_path / "run")}
    command = [sys.executable, ROOT / "gvm_raft.py", *options(settings)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert [line.split(": ")[0] for line in ended.stdout.splitlines()[-5:]] == SUMMARY
    assert rows(tmp_path / "run") == done["gvm_raft"][1]


# ---- Several processes


@pytest.mark.parametrize("script", ["gvm_raft", SLOW_GRPO])
def test_two_processes_learn_what_one_does(small, tmp_path, script):
    settings = small | PILOTS[script] | {"steps": 1, "updates_per_step": 1}
    settings |= {"tokens_per_batch": 300, "kl_coef": 0.1}
    one, _ = run(script, **settings, run_dir=str(tmp_path / "one"))
    two = start(
        script, tmp_path / "log", world=2, **settings, run_dir=str(tmp_path / "two")
    )
    assert finish(two) == [0, 0], (tmp_path / "log" / "0.err").read_text()
    both = zip(one, rows(tmp_path / "two"), strict=True)
    for first, second in list(both)[:2]:  # later ones follow another rounding
        assert first.keys() == second.keys()
        for key in first.keys() - OF_RANKS:
            assert second[key] == pytest.approx(first[key], rel=2e-6, abs=1e-8), key
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("script", ["gvm_raft", SLOW_GRPO])
def test_a_process_without_accepted_responses_does_not_wait_for_ever(
    small, tmp_path, script
):
    answer = json.loads(Path(small["problems"]).read_text().splitlines()[0])
    # one problem that is always solved, because its answer is what the model says; others never
    settings = small | {"problems": str(tmp_path / "p.jsonl"), "temperature": 0.01}
    settings |= {"problems_per_step": 3, "samples_per_problem": 1, "pilot_samples": 1}
    settings |= {"updates_per_step": 2, "learning_rate": 1e-9}
    lines = [answer | {"answer": greedy(answer["problem"])}]
    lines += [{"problem": f"{i}+1", "answer": "-77"} for i in (1, 2)]
    Path(settings["problems"]).write_text("\n".join(map(json.dumps, lines)))
    two = start(
        script, tmp_path / "log", world=2, **settings, run_dir=str(tmp_path / "run")
    )
    assert finish(two) == [0, 0], (tmp_path / "log" / "0.err").read_text()
    for row in train_rows(rows(tmp_path / "run")):
        assert sum(row["accepted"]) == 1
        assert row["updates"] == (
            1 if script == "gvm_raft" else 0
        )  # groups of one teach nothing


def greedy(problem):
    """What the tiny model puts in the box when it takes the likeliest token."""
    import gvm_raft

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "model")
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "model")
    message = [{"role": "user", "content": f"{problem}\n{gvm_raft.INSTRUCTION}"}]
    inputs = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    text = tokenizer.decode(
        model.generate(**inputs, do_sample=False, max_new_tokens=64)[0]
    )
    return text.split("\\boxed{")[-1].split("}")[0]


@pytest.mark.slow
def test_torchrun_starts_two_processes(small, tmp_path):
    settings = small | PILOTS["gvm_raft"] | {"updates_per_step": 1}
    one, _ = run("gvm_raft", **settings, run_dir=str(tmp_path / "one"))
    settings["run_dir"] = str(tmp_path / "two")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
    ]
    command = [*torchrun, ROOT / "gvm_raft.py", *options(settings)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    first, second = train_rows(one)[0], train_rows(rows(tmp_path / "two"))[0]
    for key in first.keys() - OF_RANKS:
        assert second[key] == pytest.approx(first[key], rel=2e-6, abs=1e-8), key


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_continues_on_one_with_the_same_loss(
    long_run, tmp_path
):
    settings = long_run[0] | {"run_dir": str(tmp_path / "run")}
    two = start("gvm_raft", tmp_path / "log", world=2, **settings)
    wait_for(tmp_path / "run" / "checkpoint" / "000002", two[0])
    for process in two:
        process.kill()
    assert finish(two) == [-signal.SIGKILL] * 2
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    before = rows(tmp_path / "run")
    found, _ = run("gvm_raft", **settings, resume=True)
    settings["run_dir"] = str(tmp_path / "again")
    assert finish(
        start("gvm_raft", tmp_path / "log", world=2, **settings, resume=True)
    ) == [0, 0]
    on_two = rows(tmp_path / "again")
    assert (
        found[: len(before)] == on_two[: len(before)] == before
        and found[-1]["step"] == 4
    )
    first, second = found[len(before)], on_two[len(before)]
    for key in first.keys() - OF_RANKS:
        assert second[key] == pytest.approx(first[key], rel=2e-6, abs=1e-8), key


# ---- Stopped and continued


def assert_resumes(settings, expected, expected_weights):
    """A run that was stopped ends as if it had not been."""
    found, _ = run("gvm_raft", **settings, resume=True)
    assert found == expected and same_weights(
        weights(settings["run_dir"]), expected_weights
    )


@pytest.mark.parametrize(
    "checkpoint", [pytest.param("000001", marks=pytest.mark.slow), "000003"]
)
def test_a_killed_run_resumes_as_if_nothing_had_happened(
    long_run, tmp_path, checkpoint
):
    settings = long_run[0] | {"run_dir": str(tmp_path / "run")}
    (process,) = start("gvm_raft", tmp_path / "log", **settings)
    wait_for(tmp_path / "run" / "checkpoint" / checkpoint, process)
    process.kill()
    assert finish([process]) == [-signal.SIGKILL]
    (tmp_path / "run" / "checkpoint" / "000009.part").mkdir()  # killed while saving
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "resp')  # killed while logging
    assert_resumes(settings, *long_run[1:])


@pytest.mark.slow
def test_a_run_may_be_killed_at_any_moment(long_run, tmp_path):
    settings = long_run[0] | {"run_dir": str(tmp_path / "run")}
    (process,) = start("gvm_raft", tmp_path / "log", **settings)
    for delay in np.random.default_rng(0).uniform(0.2, 3, 20):
        process.join(delay)
        process.kill()
        (code,) = finish([process])
        assert code in (0, -signal.SIGKILL), (tmp_path / "log" / "0.err").read_text()
        resume = (tmp_path / "run" / "config.json").exists()
        (process,) = start("gvm_raft", tmp_path / "log", **settings, resume=resume)
    finish([process])
    assert_resumes(settings, *long_run[1:])


def test_a_finished_run_resumes_to_the_same_end(done, small):
    folder, found, _ = done["raft"]
    before = weights(folder)
    again, printed = run("raft", **small, run_dir=str(folder), resume=True)
    assert again == found and same_weights(weights(folder), before)
    assert [line.split(": ")[0] for line in printed.splitlines()[-5:]] == SUMMARY


@pytest.mark.parametrize(
    ("script", "changed", "named"),
    [
        ("raft", {"learning_rate": 1e-3}, "learning_rate"),
        ("raft", {"steps": 3}, "steps"),
        ("gvm_raft", {}, "script"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    done, small, capsys, script, changed, named
):
    folder = done["raft"][0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        run(script, **small | changed, run_dir=str(folder), resume=True)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and named in error
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_starting_over_a_run_is_refused(done, small, capsys):
    folder = done["raft"][0]
    with pytest.raises(SystemExit) as stop:
        run("raft", **small, run_dir=str(folder))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "exists" in error
    assert rows(folder) == done["raft"][1]


def test_a_second_plain_run_has_a_folder_of_its_own(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, settings = importlib.import_module("raft"), small | {"steps": 0}
    for _ in range(2):
        with restored(["raft.py"]):
            script.main(script.Config(**settings))
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2 and all(
        folder.name.startswith("raft-") for folder in folders
    )


@pytest.mark.parametrize(
    "moment",
    [pytest.param("metrics.jsonl", marks=pytest.mark.slow), "checkpoint/000003"],
)
def test_interrupting_ends_with_one_sentence_and_can_be_resumed(
    long_run, tmp_path, moment
):
    settings = long_run[0] | {"run_dir": str(tmp_path / "run")}
    (process,) = start("gvm_raft", tmp_path / "log", **settings)
    wait_for(tmp_path / "run" / moment, process)
    os.kill(process.pid, signal.SIGINT)
    (code,) = finish([process])
    error = (tmp_path / "log" / "0.err").read_bytes().decode()
    assert code not in (0, None, -signal.SIGINT) and "Traceback" not in error
    (line,) = [
        line for line in error.splitlines() if line.strip() and "it/s]" not in line
    ]
    assert "interrupted" in line and "--resume" in line
    assert_resumes(settings, *long_run[1:])


# ---- Numbers that are none


def test_a_loss_that_is_not_finite_stops_the_run(small, tmp_path, monkeypatch):
    script = importlib.import_module("gvm_raft")
    settings = small | {"run_dir": str(tmp_path / "run"), "updates_per_step": 2}
    policy_loss, checkpoint = (
        script.policy_loss,
        tmp_path / "run" / "checkpoint" / "000001",
    )

    def spoiled(*arguments):
        return policy_loss(*arguments) * (torch.nan if checkpoint.exists() else 1)

    monkeypatch.setattr(script, "policy_loss", spoiled)
    with pytest.raises(SystemExit) as stop:
        run("gvm_raft", **settings)
    assert "finite" in str(stop.value.code) and "\n" not in stop.value.code
    assert (checkpoint / "progress.json").exists() and not (
        tmp_path / "run" / "model"
    ).exists()


def test_weights_that_are_not_finite_stop_the_run(small, tmp_path, monkeypatch):
    script = importlib.import_module("raft")
    update = script.update

    def spoiled(policy, *arguments):
        metrics = update(policy, *arguments)
        next(policy.parameters()).data.fill_(torch.nan)
        return metrics

    monkeypatch.setattr(script, "update", spoiled)
    with pytest.raises(SystemExit) as stop:
        run("raft", **small, run_dir=str(tmp_path / "run"))
    assert "finite" in str(stop.value.code)
