"""What the tests of the scripts share: small settings, and runs in this and in other processes."""

import contextlib
import io
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["raft", "gvm_raft", "gvm_grpo"]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

# processes forked from one that has imported everything start at once
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["gvm_raft", "transformers.models.llama.modeling_llama"])


def pytest_configure():
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="gvm-tests-")


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"])  # nothing outlives the tests


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Settings of a run of seconds, on 20 of the tiny problems."""
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    lines = (ROOT / "tiny" / "train.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:20]))
    settings = {"problems": str(path), "eval_problems": str(path), "eval_samples": 1}
    settings |= {"problems_per_step": 8, "samples_per_problem": 4, "max_new_tokens": 32}
    return settings | {"steps": 2, "save_every": 1}


@pytest.fixture(scope="module")
def process_group():
    """A process group of one, for what is sharded or gathered."""
    import gvm_raft

    with restored():
        yield gvm_raft.start_processes(gvm_raft.Config())


@contextlib.contextmanager
def restored(argv=()):
    """Undoes what main() does to this process, whether it ends well or not."""
    import torch.distributed as dist

    before = sys.argv, dict(os.environ), signal.getsignal(signal.SIGINT)
    sys.argv = list(argv) or sys.argv
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.argv, environ, handler = before
        os.environ.clear()
        os.environ.update(environ)
        signal.signal(signal.SIGINT, handler)


def run(script, **settings):
    """main() in this process: the rows of metrics.jsonl and what was printed."""
    module = __import__(script)
    with restored([f"{script}.py"]), contextlib.redirect_stdout(io.StringIO()) as out:
        module.main(module.Config(**settings))
    return rows(settings["run_dir"]), out.getvalue()


def rows(folder):
    """The rows of metrics.jsonl but for their times."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def options(settings):
    """Settings as a command line."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        switch = isinstance(value, bool)
        flags += [f"--{flag}" if value else f"--no-{flag}"] if switch else [f"--{flag}", str(value)]
    return flags


def start(script, log, world=1, **settings):
    """The script's command line as processes of their own; each writes log/<rank>.out and .err."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Path(log).mkdir(exist_ok=True)
    argv = [str(ROOT / f"{script}.py"), *options(settings)]
    started = []
    for rank in range(world):
        environ = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        environ = {name: str(value) for name, value in environ.items()}
        environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "HF_DATASETS_CACHE": os.environ["HF_DATASETS_CACHE"],
        }
        started.append(SERVER.Process(target=child, args=(argv, environ, f"{log}/{rank}")))
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
    """Waits for processes and returns their exit codes; None for one that hangs, which is ended."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes
