"""The exercises do not go stale: they fit the repository, and refuse what is wrong."""

import ast
import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, restored

import exercises

ANSWERS = '''"""Solutions of what the repository does not hold."""

import numpy as np

from allocator import allocate


def dropped(rates, pilots):
    return np.mean((1 - np.array(rates)) ** pilots)


def budget(rates, total, objective):
    p = np.array(rates)
    roots = {
        "log": (1 - p) ** 1.5 / p**0.5,
        "reward": (1 - p) ** 1.5 * p**0.5,
        "centred": (p * (1 - p)) ** 0.5 * abs(1 - 2 * p),
    }
    return allocate(roots[objective], total, minimum=1)
'''
MODULES = ["allocator", "verify_math", "gvm_raft", "gvm_grpo", "answers"]
ACCURACIES = {"a": [0.5, 0.6, 0.5, 0.7, 0.6], "b": [0.6, 0.8, 0.6, 0.7, 0.7]}


def copy(target):
    """What a student called like the folder hands in who has solved everything."""
    exercises.make_handout(target)
    for name in [*exercises.CUT, "gvm_grpo.py"]:
        shutil.copy(ROOT / name, target)
    (target / "answers.py").write_text(ANSWERS)

    answer = {}
    for k, letter in enumerate(exercises.order_of_defects(target.name), start=1):
        answer[f"log-{k}"] = f"{letter} {exercises.SYMPTOMS[letter][0][0]}"
    (target / "hunt").mkdir()
    (target / "hunt" / "answer.json").write_text(json.dumps(answer, indent=1))

    for arm, accuracies in ACCURACIES.items():
        for seed, accuracy in zip(exercises.seeds(target.name), accuracies):
            run = target / "pays" / f"{arm}-{seed}"
            run.mkdir(parents=True)
            config = {"arm": arm, "steps": 40, "seed": seed, "run_dir": run.name}
            (run / "config.json").write_text(json.dumps(config))
            row = {"step": 40, "responses": 10240, "accuracy": accuracy}
            (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    claim = {"difference": 0.1, "low": 0.012, "high": 0.188, "verdict": "b"}
    (target / "claim.json").write_text(json.dumps(claim, indent=1))


@pytest.fixture(scope="module")
def alice(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solved") / "alice"
    copy(folder)
    return folder


def said(label, folder):
    """What a check says; the modules of other tests stay as they are."""
    path = sys.path[:]
    known = {name: sys.modules.pop(name, None) for name in MODULES}
    try:
        with restored():
            return exercises.verdict(label, folder)
    finally:
        sys.path[:] = path
        for name, module in known.items():
            sys.modules.pop(name, None)
            if module:
                sys.modules[name] = module


def command(*words, folder=ROOT):
    """The exit code and output of `python exercises.py ...` in the folder."""
    line = [sys.executable, "exercises.py", *map(str, words)]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("label", [*"123456789"])
def test_the_repository_passes_every_check(label, alice):
    assert said(label, alice) == "passes"


@pytest.mark.parametrize("label", [*"1234567"])
def test_in_a_fresh_handout_nothing_is_written_yet(label, tmp_path):
    exercises.make_handout(tmp_path / "fresh")
    assert said(label, tmp_path / "fresh") == "not written yet"


def test_a_handout_holds_no_solution(tmp_path):
    exercises.make_handout(tmp_path / "fresh")
    names = {path.name for path in (tmp_path / "fresh").iterdir()}
    assert names == {*exercises.HANDOUT, *exercises.CUT, "tiny", "answers.py"}
    for name, functions in exercises.CUT.items():
        fresh = (tmp_path / "fresh" / name).read_text()
        assert fresh.count("raise NotImplementedError") == len(functions)
    allocator = (tmp_path / "fresh" / "allocator.py").read_text()
    assert "def bound" in allocator and "λ" not in allocator


@pytest.mark.parametrize("name", exercises.CUT)
def test_cut_functions_keep_their_docstrings_and_leave_no_helpers(name):
    text = exercises.cut(ROOT / name, exercises.CUT[name])
    nodes = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
    functions = {node.name: node for node in nodes}
    for function in exercises.CUT[name]:
        assert ast.get_docstring(functions[function])
        assert len(functions[function].body) == 2
    helpers = [function for function in functions if function.startswith("_")]
    assert [helper for helper in helpers if text.count(f"{helper}(") == 1] == []


def test_every_defect_of_the_hunt_can_be_planted():
    source = (ROOT / "gvm_raft.py").read_text()
    for right, _ in exercises.DEFECTS.values():
        assert source.count(right) == 1


MISTAKES = [
    # check, file, right text, wrong text, words of the hint
    ("1", "allocator.py", "rates + alpha / rates ** (beta - 1)", "rates", "out α"),
    ("1", "allocator.py", "return norms / np.sqrt(", "return norms * np.sqrt(", "rise"),
    ("1", "allocator.py", "rates > 1e-30", "rates > -1", "invalid value"),
    ("2", "allocator.py", "(idle, 1, w**2)", "(idle, 1, w)", "but [1 4] make it"),
    ("2", "allocator.py", "return counts", "return counts + 1", "sum to 1"),
    ("2", "allocator.py", "return counts", "return counts[::-1]", "make Eq. 7"),
    (
        "2",
        "allocator.py",
        "minimum, w",
        "np.multiply(minimum, 0), w",
        "integers of 1 to 4",
    ),
    (
        "2",
        "allocator.py",
        'np.argsort(-gains, kind="stable")',
        "len(w) - 1 - np.argsort(-gains[::-1])",
        "your [1 1 2] make",
    ),
    ("2", "allocator.py", "few < many", "few <= many", "integers of 1 to 4"),
    (
        "2",
        "allocator.py",
        "return counts",
        "return counts if len(w) < 9 else np.full(len(w), int(budget) // len(w))",
        "lowers Eq. 7",
    ),
    ("3", "allocator.py", "prior * batch_rate", "prior / 2", "prior of mean 1/2"),
    ("3", "allocator.py", "scale * misses)", "misses)", "lack the others' scale"),
    ("3", "allocator.py", "scale * misses)", "norms)", "are 0 without an accepted"),
    ("3", "answers.py", "(1 - np.array(rates))", "(1 - np.mean(rates))", "their mean"),
    ("3", "answers.py", "np.mean((1", "np.sum((1", "is 4.1"),
    ("4", "gvm_raft.py", " / cfg.temperature**2", "", "lack a factor 1/T"),
    (
        "4",
        "gvm_raft.py",
        "maximum(count_accepted(groups)",
        "maximum(list(map(len, groups))",
        "divide by all",
    ),
    (
        "4",
        "gvm_raft.py",
        "* (hidden_TD @",
        "* torch.eye(len(d_TV)) * (hidden_TD @",
        "two",
    ),
    (
        "5",
        "gvm_raft.py",
        "max(rewards.sum(), 1)",
        "len(rewards)",
        "1/n for an accepted",
    ),
    ("5", "gvm_raft.py", "max(rewards.sum(), 1)", "rewards.sum()", "invalid value"),
    ("5", "gvm_grpo.py", " / len(rewards)\n", "\n", "no 1/n"),
    ("5", "gvm_grpo.py", "rewards.std()", "rewards.std(ddof=1)", "n - 1 in the std"),
    ("5", "gvm_grpo.py", "max(rewards.std(), 1e-6)", "rewards.std()", "invalid value"),
    ("6", "gvm_raft.py", "-torch.minimum(", "-torch.maximum(", "max for the min"),
    (
        "6",
        "gvm_raft.py",
        ".clamp(1 - cfg.clip_low, 1 + cfg.clip_high)",
        "",
        "not clipped",
    ),
    ("6", "gvm_raft.py", "old_logp_T).exp()", "old_logp_T).exp().detach()", "grad"),
    (
        "7",
        "answers.py",
        '"log": (1 - p) ** 1.5',
        '"log": (1 - p)',
        "Prop. 1's budget, as yours",
    ),
    (
        "7",
        "answers.py",
        "allocate(roots[objective]",
        "allocate(roots[objective]**2",
        "times the least",
    ),
    ("8", "hunt/answer.json", '"log-1": "', '"log-1": "B ', "log-1 is not B"),
    ("8", "hunt/answer.json", '"log-1": "', '"log-1": "Z ', "is one of A to E"),
    ("8", "hunt/answer.json", "logp_shift", "loss", "'loss' does not give it away"),
    ("9", "claim.json", "0.012", "0.038", "number 1 is 0.038"),
    ("9", "claim.json", '0.012,\n "high": 0.188', '0.038,\n "high": 0.162', "1.96"),
    ("9", "claim.json", '"b"', '"open"', "says 'b'"),
]


@pytest.mark.parametrize(("label", "file", "right", "wrong", "words"), MISTAKES)
def test_a_planted_mistake_is_named(label, file, right, wrong, words, alice, tmp_path):
    folder = tmp_path / "alice"
    shutil.copytree(alice, folder)
    source = (folder / file).read_text()
    assert right in source
    (folder / file).write_text(source.replace(right, wrong))
    hint = said(label, folder)
    assert hint.startswith("wrong: ") and words in hint, hint


def test_an_answer_is_not_the_same_for_everybody():
    names = ["alice", "bob", "carol", "dave"]
    assert len({tuple(exercises.order_of_defects(name)) for name in names}) > 1
    assert len({tuple(exercises.seeds(name)) for name in names}) == 4


@pytest.mark.parametrize("label", [*"89"])
def test_what_alice_hands_in_is_no_answer_of_bob(label, alice, tmp_path):
    shutil.copytree(alice, tmp_path / "bob")
    assert said(label, tmp_path / "bob").startswith(("wrong: ", "not handed in: "))


# ---- Command lines


@pytest.mark.slow
def test_the_commands_work_from_a_clone_and_from_a_handout(tmp_path):
    code, out, _ = command()
    assert code == 0 and out.count("passes") == 5
    assert command("--handout", tmp_path / "alice")[0] == 0
    code, out, _ = command(folder=tmp_path / "alice")
    assert code == 0 and out.count("not written yet") == 7
    code, _, error = command("--hunt", folder=tmp_path / "alice")
    assert code == 1 and error.startswith("gvm_raft.py does not run (1 to 6 first?)")
    code, out, _ = command("1")
    assert code == 0 and "Eq. 7 asks" in out and out.endswith("exercise 1: passes\n")
    assert command("1", "--at", tmp_path / "alice")[0] == 1
    for words in [["--handout", tmp_path], ["--at", "nowhere"], ["--grade", "nowhere"]]:
        code, _, error = command(*words)
        assert code == 1 and error.count("\n") == 1


@pytest.mark.slow
def test_grades_are_full_partial_and_zero(alice, tmp_path):
    partial, empty = tmp_path / "bob", tmp_path / "carol"
    copy(partial)
    source = (partial / "gvm_raft.py").read_text()
    source = source.replace("rewards / max(rewards.sum(), 1)", "rewards / len(rewards)")
    (partial / "gvm_raft.py").write_text(source)
    empty.mkdir()
    code, out, error = command("--grade", alice, partial, empty)
    assert code == 0, error
    rows = list(csv.DictReader(out.splitlines()))
    assert [row["total"] for row in rows] == ["20", "18", "0"], error
    assert rows[1]["5"] == rows[1]["run"] == "0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("while True: pass", "takes more than 5 s"),
        ("import os; os._exit(0)", "crashes with exit code 0"),
        ("raise SystemExit(0)", "SystemExit in allocator.py, line 1"),
    ],
)
def test_a_crash_or_a_hang_costs_one_check(line, words, tmp_path):
    (tmp_path / "allocator.py").write_text(line)
    assert words in exercises.check_apart("1", tmp_path, seconds=5)


@pytest.mark.slow
def test_the_logs_of_the_hunt_show_the_symptoms(tmp_path):
    copy(tmp_path / "alice")
    shutil.rmtree(tmp_path / "alice" / "hunt")
    exercises.hunt(tmp_path / "alice")
    logs = {}
    for path in (tmp_path / "alice" / "hunt").glob("*.jsonl"):
        logs[path.stem] = list(map(json.loads, path.read_text().splitlines()))
    letters = enumerate(exercises.order_of_defects("alice"), start=1)
    names = {letter: f"log-{k}" for k, letter in letters} | {"none": "log-0"}

    for letter, name in names.items():
        first, *steps, last = logs[name]
        shifts = np.array([row["logp_shift"] for row in steps])
        assert (shifts > 1).all() == (letter == "A")
        assert (shifts[0] > 1e-6) == (letter in "AB")
        assert (shifts[1:] > 1e-6).all() == (letter in "ABC")
        drawn = sum(sum(row["counts"]) for row in steps)
        assert (last["responses"] > drawn) == (letter == "D")
        assert (first["pass_at_k"] == first["accuracy"]) == (letter == "E")
