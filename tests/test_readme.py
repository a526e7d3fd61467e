"""The README says what is true: diff, line counts, flags, metrics, files, numbers."""

import difflib
import re
from dataclasses import fields
from pathlib import Path

import pytest

import gvm_raft

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
FILES = ("raft", "gvm_raft", "gvm_grpo", "allocator", "verify_math")
# flags of torchrun, data/prepare.py, exercises.py and the benches
OTHER_FLAGS = {"standalone", "nproc-per-node", "nnodes", "hold-out", "out", "seeds"}
OTHER_FLAGS |= {"problem-column", "handout", "grade", "no-reuse-pilot", "from-csv"}


def diff(first, second):
    """The lines of a diff of two scripts."""
    paths = (ROOT / f"{script}.py" for script in (first, second))
    sources = [path.read_text().splitlines() for path in paths]
    return list(difflib.unified_diff(*sources, n=0, lineterm=""))[2:]


def test_it_fits_its_page():
    lines = README.splitlines()
    assert len(lines) <= 140 and max(map(len, lines)) <= 110


def test_the_diff_it_shows_is_that_of_today():
    shown = re.search(r"```diff\n(.*?)\n```", README, flags=re.DOTALL)[1].splitlines()
    there = diff("raft", "gvm_raft") + diff("gvm_raft", "gvm_grpo")
    shown.remove("@@ gvm_raft.py, gvm_grpo.py @@")  # where the second one begins
    assert [line for line in shown if line not in there] == []
    assert any("allocate(" in line for line in shown)
    assert any("rewards.std()" in line for line in shown)


@pytest.mark.parametrize("name", FILES)
def test_the_line_counts_are_right(name):
    lines = len((ROOT / f"{name}.py").read_text().splitlines())
    row = rf"^\| `{name}\.py` \|.*\| {lines} \|$"
    assert re.search(row, README, flags=re.MULTILINE)


def test_every_flag_it_mentions_exists():
    names = {field.name.replace("_", "-") for field in fields(gvm_raft.Config)}
    found = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", README))
    assert found - names - OTHER_FLAGS == set()


def test_every_file_it_mentions_exists():
    pattern = r"((?:bench|tests|tiny|data)/[\w./]+|`\w+\.py`|\w+\.md)"
    paths = [path.strip("`.") for path in re.findall(pattern, README)]
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []


def test_the_equation_map_names_functions_that_are_there():
    sources = (ROOT / "gvm_raft.py").read_text() + (ROOT / "allocator.py").read_text()
    section = README.split("| equation |", 1)[1].split("\n\n", 1)[0]
    functions = set(re.findall(r"`(\w+)`", section))
    missing = [name for name in functions if f"def {name}(" not in sources]
    assert functions and missing == []


def test_it_explains_every_metric():
    names = {
        "reward",
        "accept",
        "counts",
        "accepted",
        "rates",
        "norms",
        "bound",
        "loss",
    }
    names |= {
        "kl",
        "entropy",
        "logp_shift",
        "grad_norm",
        "updates",
        "truncated",
        "boxed",
    }
    names |= {"accuracy", "accuracy_se", "pass_at_k", "responses", "tokens", "seconds"}
    assert {name for name in names if f"`{name}`" not in README} == set()


def test_the_numbers_of_its_claim_stand_in_results_md():
    claim = README.split("```", 2)[2].split("## Read the code", 1)[0]
    results = (ROOT / "RESULTS.md").read_text()
    numbers = re.findall(r"(?<![\w.])\d+\.\d+", claim)
    assert numbers and [number for number in numbers if number not in results] == []
