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
Prints the cost per 1,000 responses, with the ratio's range over seeds, and held-out
accuracy at the end, by our sampler. Of the lead, our update leaves out what has no
weight, as its problem was always or never solved in the step; the share is printed.
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


def main(cfg):
    """Runs both in turns, seed by seed, and prints the tables."""
    if not find_spec("trl"):
        raise SystemExit("vs_trl.py needs the package trl: pip install trl")
    results = {"TRL": [], "ours": []}
    alone = {"mp_context": get_context("spawn"), "max_tasks_per_child": 1}
    pool = ProcessPoolExecutor(1, **alone)
    with tempfile.TemporaryDirectory() as place, pool:
        for seed in tqdm(range(cfg.seeds), "seeds", disable=None):
            for who, train in {"TRL": train_trl, "ours": train_ours}.items():
                run = pool.submit(train, cfg, seed, Path(place, f"{who}-{seed}"))
                results[who].append(run.result())
    report(cfg, results)


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
    """CPU-seconds by part of gvm_grpo.py's own main, accuracy, share without weight."""
    clock = Counter()
    sample, load = gvm_grpo.sample, gvm_grpo.TorchSampler.load

    def timed_sample(batch, counts, sampler, progress, cfg, stream="train", kept=None):
        part = "evaluation" if stream == "eval" else "sampling"
        call = batch, counts, sampler, progress, cfg, stream, kept
        return timed(clock, part, sample)(*call)

    gvm_grpo.sample = timed_sample
    gvm_grpo.update = timed(clock, "update", gvm_grpo.update)
    gvm_grpo.TorchSampler.load = timed(clock, "update", load)
    shared = asdict(cfg) | {"seed": seed, "run_dir": str(folder), "pilot_samples": 0}
    del shared["seeds"]
    with contextlib.redirect_stdout(sys.stderr):
        gvm_grpo.main(gvm_grpo.Config(**shared, eval_every=cfg.steps))

    rows = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    accepted = [n for row in rows for n in row.get("accepted", [])]
    idle = np.isin(accepted, [0, cfg.samples_per_problem]).mean()
    return [clock["sampling"], clock["update"], rows[-1]["accuracy"], idle]


# ---- TRL
def train_trl(cfg, seed, folder):
    """The same of TRL, whose generation batch is a step, and its step an update."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    clock, ours, data = Counter(), gvm_grpo.Config(), []
    for row in map(json.loads, Path(ours.problems).read_text().splitlines()):
        text = f"{row['problem']}\n{gvm_grpo.INSTRUCTION}"
        prompt = [{"role": "user", "content": text}]
        data.append({"prompt": prompt, "answer": row["answer"]})

    def reward(completions, answer, **_):
        return verify_batch([chat[0]["content"] for chat in completions], answer)

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
    rest = {"processing_class": gvm_grpo.load_tokenizer(ours)}
    trainer = GRPOTrainer(model, reward, settings, Dataset.from_list(data), **rest)

    # A training step draws first, where it has to; the optimiser's step comes after it.
    draw, train = trainer._generate_and_score_completions, trainer.training_step
    trainer._generate_and_score_completions = timed(clock, "sampling", draw)
    trainer.training_step = timed(clock, "update", train)
    optimizer = trainer.create_optimizer()
    optimizer.step = timed(clock, "update", optimizer.step)
    trainer.train()
    trainer.model.save_pretrained(folder)
    accuracy = evaluate(replace(ours, model=str(folder)), rest["processing_class"])
    return [clock["sampling"], clock["update"] - clock["sampling"], accuracy, np.nan]


def evaluate(settings, tokenizer):
    """Held-out accuracy of the model that TRL saved, by our sampler."""
    gvm_grpo.start_processes()
    problems = gvm_grpo.read_problems(settings.eval_problems, 1, tokenizer, settings)
    sampler = gvm_grpo.TorchSampler(settings, tokenizer)
    progress = {"step": settings.steps, "responses": 0, "tokens": 0}
    return gvm_grpo.evaluate(problems, sampler, progress, settings)["accuracy"]


def report(cfg, results):
    """Cost by part, then accuracy at the end."""
    trl, ours = (np.array(results[who]).T for who in ("TRL", "ours"))
    per = 1000 / (cfg.steps * cfg.problems_per_step * cfg.samples_per_problem)
    print("| CPU-seconds per 1,000 responses | TRL | ours | TRL / ours |")
    print("|---|---|---|---|")
    for name, part in {"sampling": [0], "update": [1], "both": [0, 1]}.items():
        costs = trl[part].sum(0) * per, ours[part].sum(0) * per
        cells = [name, *(f"{cost.mean():.2f}" for cost in costs)]
        ratios, ratio = costs[0] / costs[1], costs[0].mean() / costs[1].mean()
        cells.append(f"{ratio:.2f} ({ratios.min():.2f} to {ratios.max():.2f})")
        print(f"| {' | '.join(cells)} |")
    form = "{:.3f} ({:.3f} to {:.3f})".format
    ends = [form(x.mean(), x.min(), x.max()) for x in (trl[2], ours[2])]
    print(f"| accuracy at the end | {' | '.join(ends)} | |")
    print(f"\n{ours[3].mean():.0%} of our responses had an advantage of 0.")


if __name__ == "__main__":
    main(tyro.cli(Config))
