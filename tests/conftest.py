"""What the tests share: small settings, and runs in this and other processes."""

import contextlib
import io
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["raft", "gvm_raft", "gvm_grpo"]
VOCABULARY = 29  # of random_model
# Tolerances are those of float32; bench/gpu.py tests a GPU. One thread is best.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

# Processes forked from one that has imported everything start at once.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["gvm_raft", "transformers.models.llama.modeling_llama"])


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Settings of a run of seconds, on 20 of the tiny problems."""
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    lines = (ROOT / "tiny" / "train.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:20]))
    settings = {"problems": str(path), "eval_problems": str(path), "eval_samples": 1}
    settings |= {"problems_per_step": 8, "samples_per_problem": 4}
    return settings | {"max_new_tokens": 32, "steps": 2, "save_every": 1}


@pytest.fixture(scope="module")
def process_group():
    """A process group of one, for what is sharded or gathered."""
    import gvm_raft

    with restored():
        gvm_raft.start_processes()
        yield


def random_model(tied=False, scale=4.0, noise=0.0):
    """A small model in float32 that is sure of nothing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": VOCABULARY}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).eval()
    for weight in model.parameters():
        weight.data = scale * weight.data + noise * torch.randn_like(weight)
    return model


@contextlib.contextmanager
def restored(argv=()):
    """Undoes what main() does to this process, whether it ends well or not."""
    import torch.distributed as dist

    signals = signal.SIGINT, signal.SIGTERM
    before = sys.argv, dict(os.environ), [signal.getsignal(s) for s in signals]
    sys.argv = list(argv) or sys.argv
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.argv, environ, handlers = before
        os.environ.clear()
        os.environ.update(environ)
        for number, handler in zip(signals, handlers):
            signal.signal(number, handler)


def run(script, **settings):
    """main() in this process: the rows of metrics.jsonl and what was printed."""
    module = __import__(script)
    printed = io.StringIO()
    with restored([f"{script}.py"]), contextlib.redirect_stdout(printed):
        module.main(module.Config(**settings))
    found = rows(settings["run_dir"]) if "run_dir" in settings else []
    return found, printed.getvalue()


def rows(folder):
    """The rows of metrics.jsonl but for their times."""
    found = []
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        found.append(json.loads(line, parse_constant=pytest.fail))  # no NaN
        found[-1].pop("seconds")
    return found


def options(settings):
    """Settings as a command line."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def environments(world):
    """What torchrun tells each of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port)}
    return [shared | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]


def start(script, log, world=1, **settings):
    """A command line as so many processes; each writes log/<rank>.out and .err."""
    Path(log).mkdir(exist_ok=True)
    argv = [str(ROOT / f"{script}.py"), *options(settings)]
    started = []
    for rank, environ in enumerate(environments(world)):
        arguments = argv, environ, f"{log}/{rank}"
        started.append(SERVER.Process(target=child, args=arguments))
        started[-1].start()
    return started


def child(argv, environ, log):
    """Runs a script as its command line does, with its output in files."""
    os.environ.update(environ)
    for descriptor, ending in ((1, "out"), (2, "err")):
        file = os.open(f"{log}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def finish(processes, seconds=300):
    """Waits for processes and returns their exit codes; None for one that hangs."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes
