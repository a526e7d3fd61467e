"""bench/speed.py in miniature."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SPEED = Path(__file__).resolve().parent.parent / "bench" / "speed.py"


def speed(*arguments):
    command = [sys.executable, SPEED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_allocation_has_a_row_for_each_number_of_problems():
    done = speed("allocation", "--sizes", 50, 60)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[-2:]
    assert rows[0].startswith("| 50 | 0.") and rows[1].startswith("| 60 | 0.")


@pytest.mark.slow
def test_norms_agree_and_sampler_and_step_have_their_rows():
    small = ["--lengths", 8, "--hidden", 16, "--vocabulary", 50, "--repeats", 1]
    done = speed("norms", "sampler", "step", *small)
    assert done.returncode == 0, done.stderr
    rows = [row for row in done.stdout.splitlines() if row.startswith("| ")]
    names = ["T", "8", "model", "tiny", "20M", "phase", "draw", "gradient_norms"]
    assert set(names) <= {row.split(" | ")[0][2:] for row in rows}
    apart = float(rows[1].split(" | ")[-1].rstrip(" |"))
    assert abs(apart) < 1e-4


@pytest.mark.slow
def test_verifier_has_a_row_for_each_file(tmp_path):
    rows = [
        {"problem": "6 times 7?", "answer": "42"},
        {"problem": "?", "answer": "x+1"},
    ]
    file = tmp_path / "two.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = speed("verifier", "--answers", file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("| two | 16 | ")


@pytest.mark.slow
@pytest.mark.parametrize("sections", [[], ["verifier"]])
def test_what_is_missing_is_said_in_one_sentence(sections):
    done = speed(*sections)
    assert done.returncode == 1
    assert done.stderr == "name sections; verifier needs --answers FILE.jsonl, too\n"
