"""The README says what is true: its diffs, line counts, flags, metrics, files and numbers."""

import difflib
import re
from dataclasses import fields
from pathlib import Path

import pytest

import gvm_raft
import raft

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = ("raft", "gvm_raft", "gvm_grpo")


def diff(first, second):
    """The hunks of a diff, each a list of lines."""
    sources = [
        (ROOT / f"{script}.py").read_text().splitlines() for script in (first, second)
    ]
    hunks = []
    for line in list(difflib.unified_diff(*sources, n=0, lineterm=""))[2:]:
        if line.startswith("@@"):
            hunks.append([])
        else:
            hunks[-1].append(line)
    return hunks


def test_the_first_diff_is_the_e_step_of_today():
    shown = re.findall(r"```diff\n(.*?)\n```", README, flags=re.DOTALL)[0].splitlines()
    assert shown in diff("raft", "gvm_raft")
    assert any("allocate(" in line for line in shown) and len(shown) <= 30


def test_the_second_diff_is_whole():
    shown = re.findall(r"```diff\n(.*?)\n```", README, flags=re.DOTALL)[1].splitlines()
    assert shown == [line for hunk in diff("gvm_raft", "gvm_grpo") for line in hunk]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_line_counts_are_right(script):
    lines = len((ROOT / f"{script}.py").read_text().splitlines())
    assert re.search(
        rf"^\| `{script}\.py` \|.*\| {lines} \|$", README, flags=re.MULTILINE
    )


def test_every_flag_it_mentions_exists():
    flags = {
        name.replace("_", "-")
        for name in (field.name for field in fields(gvm_raft.Config))
    }
    others = {"standalone", "nproc-per-node", "response", "gold", "nnodes", "node-rank"}
    others |= {
        "rdzv-backend",
        "rdzv-endpoint",
        "no-reuse-pilot",
        "seeds",
        "out",
        "solved",
    }
    assert set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", README)) <= flags | others


def test_every_file_it_mentions_exists():
    paths = re.findall(r"`((?:bench|tests|tiny)/[\w./]+|\w+\.py|\w+\.md)`", README)
    known = {"make.py"}
    assert [p for p in paths if p not in known and not (ROOT / p).exists()] == []


def test_it_explains_every_metric():
    text = (ROOT / "gvm_raft.py").read_text()
    names = set(re.findall(r'(?:row|metrics)\["(\w+)"\]', text))
    names |= {
        "loss",
        "kl",
        "entropy",
        "logp_shift",
        "grad_norm",
        "updates",
        "counts",
        "accepted",
    }
    assert {name for name in names if f"`{name}`" not in README} == set()


def test_the_numbers_of_its_results_stand_in_results_md():
    section = README.split("## Results", 1)[1].split("\n## ", 1)[0]
    results = (ROOT / "RESULTS.md").read_text()
    numbers = re.findall(r"(?<![\w.])\d+\.\d+", section)
    assert numbers and [number for number in numbers if number not in results] == []


def test_shared_settings_are_one_text():
    """The README's table of settings serves all three scripts."""
    shared = {field.name for field in fields(raft.Config)}
    assert shared < {field.name for field in fields(gvm_raft.Config)}
