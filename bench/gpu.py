"""What a machine with GPUs makes of the three scripts, in one command. Prints markdown.

  1. The quick tests, where pytest is installed.
  2. The scripts on the tiny model, two steps, with every sampler there is (under torchrun on
     several GPUs): exit code and largest logp_shift.
  3. A step of gvm_raft.py on one GPU, for Qwen2 of 0.5 and 1.5 billion parameters (random weights,
     vocabulary 151,936) and responses of 1k and 4k tokens, 65,536 in all: sampling and update in
     tokens per second, the update's model FLOP utilisation, the time of a weight push, the share of
     statistics and allocation in a step, peak memory. Every other response counts as right.

Every part is a process of its own: one that fails is named in a line, the others go on, and the
exit code is 1. Nothing is downloaded; vllm, datasets and pytest may be missing.

Model FLOPs of the update, recomputation not counted: 6 x parameters x tokens, that is 6 x (layers'
x (P + R) + head's x R) for R tokens after a prompt of P, and causal attention's 6 x layers x hidden
size x (P + R)^2. Peaks are the cards' dense bf16 rates.

Targets: >= 40% of the peak at 1.5 billion; statistics and allocation <= 5% of a step.

Run: python bench/gpu.py [--quick] [--cpu]       (half an hour; --quick: 0.5 billion, 1k tokens)
"""

import dataclasses
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
import transformers
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gvm_raft

ROOT = Path(gvm_raft.__file__).parent
SCRIPTS = ["raft", "gvm_raft", "gvm_grpo"]
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "H20": 148, "B200": 2250, "A100": 312}
PEAKS |= {"L40S": 362, "L40": 181, "A10": 125, "4090": 165, "5090": 210}  # TFLOP/s in bf16
SHAPES = {  # hidden, intermediate, layers, heads, heads of keys and values
    "0.5B": (896, 4864, 24, 14, 2),
    "1.5B": (1536, 8960, 28, 12, 2),
    "miniature": (64, 128, 2, 2, 1),
}
VOCABULARY, EACH = 151_936, 8  # tokens; responses per problem, half of them pilots


# ---- One measurement, in a process of its own


def make_model(shape, folder):
    """A Qwen2 with random weights, and the tiny model's tokenizer with its chat template."""
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    settings = dict(zip([*names, "num_key_value_heads"], SHAPES[shape]), vocab_size=VOCABULARY)
    settings |= {"max_position_embeddings": 8192, "tie_word_embeddings": True}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings))
    model.to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gvm_raft.TINY / "model").save_pretrained(folder)


def timed(seconds, name, function):
    """The function, which adds its seconds to a list under the name when the GPU is done, too."""

    def run(*args, **settings):
        wait = torch.cuda.synchronize if torch.cuda.is_available() else int
        wait()
        start = time.perf_counter()
        result = function(*args, **settings)
        wait()
        seconds[name].append(time.perf_counter() - start)
        return result

    return run


def flops(model, responses):
    """Model FLOPs of an update on the responses, as the docstring counts them."""
    head = model.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for p in model.parameters()) - head  # tied: the table is the head
    tokens = sum(len(r.prompt_ids) + len(r.token_ids) for r in responses)
    squares = sum((len(r.prompt_ids) + len(r.token_ids)) ** 2 for r in responses)
    attention = 6 * model.config.num_hidden_layers * squares * model.config.hidden_size
    return 6 * (layers * tokens + head * sum(len(r.token_ids) for r in responses)) + attention


def measure(shape, length, sampler_name, folder, options):
    """A row of numbers, with all that gvm_raft.py's main makes."""
    make_model(shape, folder)
    m = max(1, (256 if options.cpu else 65_536) // length // EACH)
    sizes = {"problems_per_step": m, "samples_per_problem": EACH, "max_new_tokens": length}
    sizes |= {"tokens_per_batch": options.tokens_per_batch, "updates_per_step": 1}
    sizes["gradient_checkpointing"] = options.gradient_checkpointing
    cfg = gvm_raft.Config(model=folder, sampler=sampler_name, learning_rate=1e-6, **sizes)
    device = gvm_raft.start_processes(cfg)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    problem_P = gvm_raft.load_problems(cfg.problems, tokenizer, cfg)[:m]
    kind = gvm_raft.VLLMSampler if sampler_name == "vllm" else gvm_raft.TorchSampler
    sampler = kind(cfg, tokenizer, device)
    policy = gvm_raft.load_policy(cfg, device)
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.learning_rate, foreach=True)
    row = step(problem_P, policy, sampler, optimizer, cfg)
    sampler.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    on_gpu = device.type == "cuda"
    return row | {"bytes": torch.cuda.max_memory_allocated() if on_gpu else peak}


def step(problem_P, policy, sampler, optimizer, cfg):
    """Pilot, statistics, allocation, sampling, update and push: what they took, after a warm-up."""
    ids_ST = np.random.default_rng(0).integers(VOCABULARY, size=(EACH, cfg.max_new_tokens))
    prompt_ids, logprobs = problem_P[0].prompt_ids, np.zeros(cfg.max_new_tokens, "f4")
    warm = [gvm_raft.Response(prompt_ids, ids, logprobs, 1.0) for ids in ids_ST]
    gvm_raft.update(policy, None, optimizer, [warm], cfg)
    with torch.no_grad():
        policy(warm[:1], gvm_raft.head_grad_norms, cfg.temperature)
    sampler.load(policy)

    seconds, progress = defaultdict(list), {"step": 0, "responses": 0, "tokens": 0}
    gvm_raft.verify_batch = lambda texts, answers: [i % 2 == 0 for i in range(len(texts))]
    draw = gvm_raft.sample = timed(seconds, "sample", gvm_raft.sample)
    e_step = timed(seconds, "e_step", gvm_raft.sample_counts)
    count_P, pilot_PS, _ = e_step(problem_P, policy, sampler, progress, cfg)
    pilots = progress["tokens"]
    response_PS = draw(problem_P, count_P, sampler, progress, cfg, kept_PS=pilot_PS)
    timed(seconds, "update", gvm_raft.update)(policy, None, optimizer, response_PS, cfg)
    timed(seconds, "push", sampler.load)(policy)

    pilot, drawing, e_step, update, push = chain(*seconds.values())  # in the order they ended
    learned = [r for r in chain(*response_PS) if r.reward]
    tokens = sum(len(r.prompt_ids) + len(r.token_ids) for r in learned)
    row = {"sampled": (progress["tokens"] - pilots) / drawing, "learned": tokens / update}
    row |= {"flops": flops(policy.model, learned) / update, "push": push}
    return row | {"share": (e_step - pilot) / (e_step + drawing + update + push)}


# ---- All of them


def python(arguments, environ):
    """Runs Python: what it prints; where it fails, an exception with the last line of its error."""
    command, settings = [sys.executable, *map(str, arguments)], {"cwd": ROOT, "env": environ}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, **settings)
    if done.returncode:
        lines = ["", *filter(str.strip, (done.stdout + done.stderr).splitlines())]
        reason = next((line for line in reversed(lines) if "Error" in line), lines[-1])
        raise RuntimeError(f"exit code {done.returncode}: {reason[:200]}")
    return done.stdout


def tests(quick, environ):
    """The tests' last line; all the quick tests, or those of numbers and sampler."""
    some = ["tests/test_numbers.py", "tests/test_sampler.py"]
    whole = not quick and find_spec("datasets") and find_spec("hypothesis")
    return python(["-m", "pytest", "-q", *([] if whole else some)], environ)


def script(name, sampler, gpus, environ):
    """Two steps on the tiny model: the largest mean |log ratio| of the policy to the sampler."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", gpus]
    with tempfile.TemporaryDirectory() as folder:
        line = [*(torchrun if gpus > 1 else []), ROOT / f"{name}.py", "--sampler", sampler]
        line += ["--steps", 2, "--updates-per-step", 1, "--eval-samples", 1, "--run-dir"]
        python([*line, f"{folder}/run"], environ)
        rows = map(json.loads, (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
        shifts = [row["logp_shift"] for row in rows if "logp_shift" in row]
    return f"exit code 0, logp_shift {max(shifts):.1e}"


def report(said, rows, card, count):
    """Prints the tables."""
    there = {name: found[0] for name, found in packages_distributions().items()}
    print(f"{datetime.date.today()}, {count} x {card}, python {sys.version.split()[0]},", end=" ")
    for name in ("torch", "transformers", "vllm", "datasets"):
        print(f"{name} {version(there[name])}," if name in there else f"no {name},", end=" ")
    print(f"`python bench/gpu.py {' '.join(sys.argv[1:])}`\n\n| part | result |\n|---|---|")
    for name, text in said.items():
        print(f"| {name.replace(' | ', ', ')} | {text} |")
    peak = next((peak for name, peak in PEAKS.items() if name in card), 0)  # TFLOP/s
    print(f"\nPeak of {card} in bf16: {f'{peak} TFLOP/s' if peak else 'not known'}.\n")
    print("| model | tokens | sampler | sampled/s | learned/s | TFLOP/s", end=" ")
    print("| of peak (1.5B: >= 40%) | push | statistics, allocation (<= 5%) | peak memory |")
    print("|---" * 10 + "|")
    for name, row in rows.items():
        rate = row["flops"] / 1e12
        print(f"| {name} | {row['sampled']:,.0f} | {row['learned']:,.0f} | {rate:.3g}", end=" ")
        print(f"| {f'{rate / peak:.0%}' if peak else '-'} | {row['push']:.3f} s", end=" ")
        print(f"| {row['share']:.1%} | {row['bytes'] / 1e9:.1f} GB |")


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures the scripts on this machine."""

    quick: bool = False  # fewer tests, the smallest model, 1k tokens
    cpu: bool = False  # on the CPU, with a miniature model
    tokens_per_batch: int = 8192  # padded tokens of a micro-batch
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    part: str = ""  # shape:length:sampler, one measurement: the command starts itself with these


def main(options):
    """All parts, then the tables."""
    if options.part:
        shape, length, sampler = options.part.split(":")
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(shape, int(length), sampler, folder, options)))
        return
    if not options.cpu and not torch.cuda.is_available():
        raise SystemExit("gpu.py: there is no CUDA here; --cpu does the same on a miniature")
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.cpu:
        environ |= {"CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": "1"}
    gpus = 0 if options.cpu else torch.cuda.device_count()
    samplers = ["torch"] + ["vllm"] * (find_spec("vllm") is not None)
    jobs = {"quick tests": (tests, options.quick, environ)} if find_spec("pytest") else {}
    jobs |= {
        f"{name}.py, {s}": (script, name, s, gpus, environ) for s in samplers for name in SCRIPTS
    }
    shapes = ["miniature"] if options.cpu else ["0.5B", "1.5B"][: 1 if options.quick else 2]
    lengths = [16] if options.cpu else [1024, 4096][: 1 if options.quick else 2]
    own = [__file__, *sys.argv[1:], "--part"]
    for row in product(shapes, map(str, lengths), samplers):
        jobs[" | ".join(row)] = (python, [*own, ":".join(row)], environ)

    said, rows, failed = {}, {}, []
    for name, (job, *args) in (bar := tqdm(jobs.items())):
        bar.set_description(name)
        try:
            found = job(*args).strip().splitlines()[-1]
            (rows if job is python else said)[name] = json.loads(found) if job is python else found
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            failed.append(name)
            said[name] = f"FAILED: {error}"
    report(said, rows, torch.cuda.get_device_name() if gpus else "CPU", max(1, gpus))
    sys.exit(f"gpu.py: failed: {'; '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main(tyro.cli(Options))
