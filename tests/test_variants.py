"""Own variants as the README proposes them: a copy, a few lines changed, compared."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from allocator import allocate

ROOT = Path(__file__).resolve().parent.parent
COUNTS = "    counts = allocate(w, "
MEAN = " / max(rewards.std(), 1e-6) / len(rewards)"
VARIANTS = {  # copy: script, old and new beginnings of lines
    "one_minus_p": ("gvm_raft", {COUNTS: "    counts = allocate(1 - rates, "}),
    "root": (
        "gvm_raft",
        {COUNTS: "    counts = allocate((rates * (1 - rates)) ** 0.5, "},
    ),
    "dr_grpo": (
        "gvm_grpo",
        {
            MEAN: " / len(rewards)",
            "loss = loss / np.mean(lengths)": "loss = loss / cfg.max_new_tokens",
        },
    ),
}


def write_variant(name, folder):
    """A copy of a script with some lines changed, where it finds what it imports."""
    script, changes = VARIANTS[name]
    text = (ROOT / f"{script}.py").read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, f"{script}.py has no single line with {old!r}"
        text = text.replace(old, new)
    (folder / f"{name}.py").write_text(text)


@pytest.mark.slow
def test_variants_of_a_few_lines_are_compared_in_one_command(tmp_path):
    for name in ("allocator.py", "verify_math.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    for name in VARIANTS:
        write_variant(name, tmp_path)
    (tmp_path / "gvm_raft.py").write_text((ROOT / "gvm_raft.py").read_text())

    # Two steps of the tiny problems, evaluated on a few of them
    lines = (ROOT / "tiny" / "test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[::40]))
    extra = f"--eval-problems {tmp_path}/few.jsonl --steps 2 --problems-per-step 32"
    command = [sys.executable, ROOT / "bench" / "learning.py"]
    command += [tmp_path / f"{name}.py" for name in ("gvm_raft", *VARIANTS)]
    command += ["--seeds", "1", "--jobs", "1", f"--extra={extra} --eval-samples 1"]
    command += ["--folder", tmp_path / "runs", "--out", tmp_path / "a.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    steps = {}
    for name in ("gvm_raft", *VARIANTS):
        [file] = (tmp_path / "runs").glob(f"{name}-*/metrics.jsonl")
        rows = map(json.loads, file.read_text().splitlines())
        steps[name] = [row for row in rows if "counts" in row]

    # The budgets are those of the rules, and spent whatever the rule.
    rules = {"one_minus_p": lambda p: 1 - p, "root": lambda p: (p * (1 - p)) ** 0.5}
    for name, rule in rules.items():
        for step in steps[name]:
            wanted = allocate(rule(np.array(step["rates"])), 64, minimum=1)
            assert step["counts"] == wanted.tolist()
        assert steps[name][0]["counts"] != steps["gvm_raft"][0]["counts"]
    for rows in steps.values():
        assert [sum(step["counts"]) for step in rows] == [64, 64]

    # Dr. GRPO draws what GVM-GRPO and GVM-RAFT draw at first, and learns otherwise.
    assert steps["dr_grpo"][0]["counts"] == steps["gvm_raft"][0]["counts"]
    assert steps["dr_grpo"][0]["loss"] != steps["gvm_raft"][0]["loss"]
