"""bench/gpu.py runs where there is no GPU: every part, on a miniature."""

import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS

pytestmark = pytest.mark.slow


def test_it_measures_every_part_on_a_cpu():
    command = [sys.executable, ROOT / "bench" / "gpu.py", "--cpu", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "| quick tests | " in done.stdout
        and "| miniature | 16 | torch | " in done.stdout
    )
    for script in SCRIPTS:
        assert f"| {script}.py, torch | exit code 0, logp_shift " in done.stdout


def test_a_part_that_fails_is_named_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import gpu

    def python(arguments, environ):
        if "pytest" in arguments:
            raise RuntimeError("exit code 1: out of luck")
        return '{"sampled": 1, "learned": 1, "flops": 1e12, "push": 1, "share": 0.04, "bytes": 1}'

    monkeypatch.setattr(gpu, "python", python)
    monkeypatch.setattr(gpu, "script", lambda *_: "exit code 0")
    with pytest.raises(SystemExit) as stop:
        gpu.main(gpu.Options(quick=True, cpu=True))
    assert stop.value.code == "gpu.py: failed: quick tests"
    printed = capsys.readouterr().out
    assert "| quick tests | FAILED: exit code 1: out of luck |" in printed
    assert (
        "| miniature | 16 | torch | 1 | 1 | 1 | - | 1.000 s | 4.0% | 0.0 GB |"
        in printed
    )
