"""GRPO here beside TRL's GRPOTrainer: what do responses cost, and what do they teach?

    python -m venv trl && . trl/bin/activate && pip install -r requirements.txt trl
    python bench/vs_trl.py                    ten minutes on one core

gvm_grpo.py --pilot-samples 0 and TRL train the tiny model in turns, each in a process
of its own with one thread: the same number of problems, responses and updates a step,
rewards (verify_math.py), learning rate, clipping and temperature, no KL term; TRL's
loss type is dapo, the nearest to ours. CPU-seconds do not count imports, evaluation,
files, logging, and TRL's clipping of gradients:

  sampling   responses and rewards; with TRL also the log-probabilities that its update
             compares with (ours are the sampler's)
  update     log-probabilities, loss, backward, optimiser, weights for the sampler

Prints the cost per 1,000 responses, with the ratio's range over seeds; held-out
accuracy, by our sampler; and how many of our responses had no weight, as their problem
was always or never solved in the step: our update leaves them out.
"""

import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gvm_grpo
from verify_math import verify_batch


@dataclass(frozen=True)
class Config:
    """What both train with."""

    seeds: int = 3  # runs of each
    steps: int = 10  # of sampling and updates
    problems_per_step: int = 64  # m
    samples_per_problem: int = 8  # n
    updates_per_step: int = 4  # optimiser updates
    learning_rate: float = 4e-4  # constant
    eval_every: int = 2  # steps


def main(cfg):
    """Runs both in turns, seed by seed, and prints the tables."""
    if not find_spec("trl"):
        raise SystemExit("vs_trl.py needs the package trl: pip install trl")
    seconds, curves = {"TRL": [], "ours": []}, {}
    alone = {"mp_context": get_context("spawn"), "max_tasks_per_child": 1}
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place, str(seed)) for seed in range(cfg.seeds)]
        with ProcessPoolExecutor(1, **alone) as pool:
            for seed, folder in enumerate(tqdm(folders, "seeds", disable=None)):
                for who, train in {"TRL": train_trl, "ours": train_ours}.items():
                    run = pool.submit(train, cfg, seed, folder / who)
                    seconds[who].append(run.result())

        gvm_grpo.start_processes()  # only now: a process of the pool would inherit it
        curves["TRL"] = [evaluate(cfg, folder / "TRL") for folder in folders]
        files = [folder / "ours" / "metrics.jsonl" for folder in folders]
        runs = [list(map(json.loads, f.read_text().splitlines()[1:])) for f in files]
    curves["ours"] = [[x["accuracy"] for x in run if "accuracy" in x] for run in runs]
    report(cfg, seconds, curves)
    accepted = [n for run in runs for row in run for n in row.get("accepted", [])]
    idle = np.isin(accepted, [0, cfg.samples_per_problem]).mean()
    print(f"\n{idle:.0%} of our responses had no weight.")


def timed(clock, part, function):
    """The function, which adds this process's CPU-seconds to a part of the clock."""

    def run(*arguments, **settings):
        start = time.process_time()
        result = function(*arguments, **settings)
        clock[part] += time.process_time() - start
        return result

    return run


# ---- Ours
def train_ours(cfg, seed, folder):
    """CPU-seconds by part of gvm_grpo.py's own main."""
    clock = Counter()
    sample, load = gvm_grpo.sample, gvm_grpo.TorchSampler.load

    def timed_sample(*arguments, stream="train", **settings):
        part = "evaluation" if stream == "eval" else "sampling"
        return timed(clock, part, sample)(*arguments, stream=stream, **settings)

    gvm_grpo.sample = timed_sample
    gvm_grpo.update = timed(clock, "update", gvm_grpo.update)
    gvm_grpo.TorchSampler.load = timed(clock, "update", load)
    shared = asdict(cfg) | {"seed": seed, "run_dir": str(folder), "pilot_samples": 0}
    del shared["seeds"]
    with contextlib.redirect_stdout(sys.stderr):
        gvm_grpo.main(gvm_grpo.Config(**shared))
    return [clock["sampling"], clock["update"]]


# ---- TRL
def train_trl(cfg, seed, folder):
    """The same of TRL, whose generation batch is a step, and its step an update."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    clock, ours, data = Counter(), gvm_grpo.Config(), []
    for row in map(json.loads, Path(ours.problems).read_text().splitlines()):
        text = f"{row['problem']}\n{gvm_grpo.INSTRUCTION}"
        prompt = [{"role": "user", "content": text}]
        data.append({"prompt": prompt, "answer": row["answer"]})

    def reward(completions, answer, **_):
        return verify_batch([chat[0]["content"] for chat in completions], answer)

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            step = state.global_step / cfg.updates_per_step
            if step % cfg.eval_every == 0:
                model.save_pretrained(folder / f"{step:.0f}")

    updates, n = cfg.updates_per_step, cfg.samples_per_problem
    each = cfg.problems_per_step * n // updates
    sizes = {"max_steps": cfg.steps * updates, "steps_per_generation": updates}
    sizes |= {"num_generations": n, "per_device_train_batch_size": each}
    sizes |= {"max_completion_length": ours.max_new_tokens}
    method = {"loss_type": "dapo", "beta": 0.0, "temperature": ours.temperature}
    method |= {"top_k": 0, "epsilon": ours.clip_low, "epsilon_high": ours.clip_high}
    adam = {"learning_rate": cfg.learning_rate, "lr_scheduler_type": "constant"}
    adam |= {"weight_decay": 0.01, "max_grad_norm": ours.max_grad_norm}
    engine = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    engine |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    arguments = sizes | method | adam | engine | {"seed": seed}
    settings = GRPOConfig(str(folder), **arguments)
    model = AutoModelForCausalLM.from_pretrained(ours.model, dtype=torch.float32)
    rest = {"processing_class": gvm_grpo.load_tokenizer(ours), "callbacks": [Save()]}
    trainer = GRPOTrainer(model, reward, settings, Dataset.from_list(data), **rest)

    # A training step draws first, where it has to; the optimiser's step comes after it.
    draw, train = trainer._generate_and_score_completions, trainer.training_step
    trainer._generate_and_score_completions = timed(clock, "sampling", draw)
    trainer.training_step = timed(clock, "update", train)
    optimizer = trainer.create_optimizer()
    optimizer.step = timed(clock, "update", optimizer.step)
    trainer.train()
    return [clock["sampling"], clock["update"] - clock["sampling"]]


def evaluate(cfg, folder):
    """Held-out accuracy of the models that TRL saved, by our sampler."""
    ours, curve = gvm_grpo.Config(), []
    tokenizer = gvm_grpo.load_tokenizer(ours)
    problems = gvm_grpo.read_problems(ours.eval_problems, 1, tokenizer, ours)
    for step in range(cfg.eval_every, cfg.steps + 1, cfg.eval_every):
        settings = replace(ours, model=str(folder / str(step)))
        sampler = gvm_grpo.TorchSampler(settings, tokenizer)
        progress = {"step": step, "responses": 0, "tokens": 0}
        row = gvm_grpo.evaluate(problems, sampler, progress, settings)
        curve.append(row["accuracy"])
    return curve


def report(cfg, seconds, curves):
    """Cost by part, then accuracy by step."""
    responses = cfg.steps * cfg.problems_per_step * cfg.samples_per_problem
    print("| CPU-seconds per 1,000 responses | TRL | ours | TRL / ours |")
    print("|---|---|---|---|")
    for name, columns in {"sampling": [0], "update": [1], "both": [0, 1]}.items():
        trl = np.array(seconds["TRL"])[:, columns].sum(1) * 1000 / responses
        ours = np.array(seconds["ours"])[:, columns].sum(1) * 1000 / responses
        span = f"{min(trl / ours):.2f} to {max(trl / ours):.2f}"
        print(f"| {name} | {trl.mean():.2f} | {ours.mean():.2f}", end=" | ")
        print(f"{trl.mean() / ours.mean():.2f} ({span}) |")

    steps = range(cfg.eval_every, cfg.steps + 1, cfg.eval_every)
    print(f"\n| accuracy after step | {' | '.join(map(str, steps))} |")
    print("|---" * (len(steps) + 1) + "|")
    for who, runs in curves.items():
        points = np.array(runs).T
        cells = [f"{x.mean():.3f} ({x.min():.3f} to {x.max():.3f})" for x in points]
        print(f"| {who} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(tyro.cli(Config))
