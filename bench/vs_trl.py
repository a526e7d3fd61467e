"""TRL's GRPOTrainer beside gvm_grpo.py --pilot-samples 0: CPU-seconds and learning curve.

Both train the tiny model on the same problems with the same rewards (verify_math.py), responses a
step, optimiser updates on disjoint mini-batches, learning rate, clip and temperature, without a KL
term, in processes of their own, one thread each, in turns. TRL normalises by the tokens of a mini-
batch (loss type dapo), which is nearest to ours, and computes entropy and clip metrics, as we do.
CPU-seconds are those of the process in training: imports, evaluation and files do not count.

  sampling   drawing and verifying the responses of a step
  update     log-probabilities, loss, backward, clip, optimiser, handing over the weights

Held-out accuracy is measured afterwards, by our sampler, on models saved every two steps.

    python -m venv trl && . trl/bin/activate && pip install -r requirements.txt trl
    python bench/vs_trl.py [--seeds 3]                         (six minutes on one core)
    python bench/vs_trl.py --quick                             (one minute: two steps, one seed)
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gvm_grpo
from verify_math import verify_batch

PARTS = ("sampling", "update")


@dataclass(frozen=True)
class Config:
    """What both train with."""

    seeds: int = 3  # runs of each
    steps: int = 10  # of sampling and updates
    problems_per_step: int = 64  # m
    samples_per_problem: int = 8  # n
    updates_per_step: int = 4  # optimiser updates
    learning_rate: float = 3e-4  # constant
    every: int = 2  # steps between saved models
    quick: bool = False  # two steps, one seed
    worker: str = ""  # used by the bench itself: "ours" or "trl", in a process of its own
    folder: str = ""  # of that process


class Clock:
    """CPU-seconds of this process by part and step; what is inside another part counts there."""

    def __init__(self):
        self.steps, self.now = [], defaultdict(float)

    def timed(self, part, function):
        def run(*args, **kwargs):
            start = time.process_time()
            result = function(*args, **kwargs)
            self.now[part] += time.process_time() - start
            return result

        return run

    def end_step(self):
        self.steps.append(dict(self.now))
        self.now.clear()


def train_ours(cfg, seed, folder, clock):
    """gvm_grpo.py's own main, with a clock around its parts and a model saved now and then."""
    sample, load = gvm_grpo.sample, gvm_grpo.TorchSampler.load
    gvm_grpo.sample = clock.timed("sampling", sample)
    gvm_grpo.update = clock.timed("update", gvm_grpo.update)
    gvm_grpo.TorchSampler.load = clock.timed("update", load)
    # evaluation is left to the end, and no part of the cost
    gvm_grpo.evaluate = lambda *_: ({"accuracy": 0.0, "pass_at_k": 0.0}, "")
    log = gvm_grpo.log

    def log_and_save(run, progress, row, line):
        log(run, progress, row, line)
        if "loss" in row:
            clock.end_step()
            if progress["step"] % cfg.every == 0:
                state["sampler"].model.save_pretrained(folder / str(progress["step"]))

    state, init = {}, gvm_grpo.TorchSampler.__init__

    def remember(self, *args):
        init(self, *args)
        state["sampler"] = self

    gvm_grpo.log, gvm_grpo.TorchSampler.__init__ = log_and_save, remember
    shared = ("steps", "problems_per_step", "samples_per_problem", "updates_per_step")
    settings = {name: getattr(cfg, name) for name in (*shared, "learning_rate")}
    gvm_grpo.main(
        gvm_grpo.Config(
            **settings,
            seed=seed,
            pilot_samples=0,
            run_dir=str(folder / "run"),
            save_every=10**6,
            sampler="torch",
        )
    )


def train_trl(cfg, seed, folder, clock):
    """The same with TRL: a generation batch is our step, an optimiser step one of its updates."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    ours = gvm_grpo.Config()
    rows = map(json.loads, Path(ours.problems).read_text().splitlines())
    data = [
        {
            "prompt": [{"role": "user", "content": f"{r['problem']}\n{gvm_grpo.INSTRUCTION}"}],
            "answer": r["answer"],
        }
        for r in rows
    ]

    def reward(completions, answer, **_):
        return list(map(float, verify_batch([c[0]["content"] for c in completions], answer)))

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % cfg.updates_per_step == 0:
                clock.end_step()
                step = state.global_step // cfg.updates_per_step
                if step % cfg.every == 0:
                    kwargs["model"].save_pretrained(folder / str(step))

    settings = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=cfg.problems_per_step
        * cfg.samples_per_problem
        // cfg.updates_per_step,
        steps_per_generation=cfg.updates_per_step,
        num_generations=cfg.samples_per_problem,
        max_steps=cfg.steps * cfg.updates_per_step,
        max_completion_length=ours.max_new_tokens,
        learning_rate=cfg.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        temperature=1.0,
        top_k=0,
        epsilon=ours.clip_low,
        epsilon_high=ours.clip_high,
        beta=0.0,
        loss_type="dapo",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_steps=cfg.updates_per_step,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    model = AutoModelForCausalLM.from_pretrained(ours.model, dtype=torch.float32)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(ours.model),
        callbacks=[Watch()],
    )
    generate, step = trainer._generate_and_score_completions, trainer.training_step
    trainer._generate_and_score_completions = clock.timed("sampling", generate)
    # training_step draws first where it has to; the optimiser is stepped outside of it
    trainer.training_step = clock.timed("training step", step)
    create = trainer.create_optimizer

    def create_timed():
        optimizer = create()
        optimizer.step = clock.timed("update", optimizer.step)
        return optimizer

    trainer.create_optimizer = create_timed
    trainer.train()
    for seconds in clock.steps:
        seconds["update"] += seconds.pop("training step") - seconds["sampling"]


def evaluate(folders):
    """Held-out accuracy of saved models, 4 responses a problem at T = 1, by our sampler."""
    import torch
    from transformers import AutoTokenizer

    cfg, found = gvm_grpo.Config(), []
    tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    problems = gvm_grpo.load_problems(cfg.eval_problems, tokenizer, cfg)
    gvm_grpo.start_processes(cfg)
    for folder in tqdm(folders, desc="evaluate"):
        weights = gvm_grpo.replace(cfg, model=str(folder))
        sampler = gvm_grpo.TorchSampler(weights, tokenizer, torch.device("cpu"))
        progress = {"step": 0, "responses": 0, "tokens": 0}
        found.append(gvm_grpo.evaluate(problems, sampler, progress, cfg)[0]["accuracy"])
    return found


def interval(values):
    """Mean and the range of the seeds."""
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def report(cfg, seconds, curves):
    """Markdown: cost by part and step, and the curves."""
    n = cfg.problems_per_step * cfg.samples_per_problem
    print(
        f"\n| CPU-seconds per {n} responses, mean over steps and seeds | TRL | ours | TRL / ours |"
    )
    print("|---|---|---|---|")
    for part in (*PARTS, "both"):
        each = {
            who: [
                [sum(step.get(p, 0) for p in (PARTS if part == "both" else [part])) for step in run]
                for run in runs
            ]
            for who, runs in seconds.items()
        }
        trl, ours = (np.mean(each[who]) for who in ("trl", "ours"))
        ratios = [np.mean(a) / np.mean(b) for a, b in zip(each["trl"], each["ours"])]
        print(f"| {part} | {trl:.2f} | {ours:.2f} | {trl / ours:.2f} ", end="")
        print(f"({min(ratios):.2f} to {max(ratios):.2f} over seeds) |")
    steps = [str(s) for s in range(cfg.every, cfg.steps + 1, cfg.every)]
    print(f"\n| held-out accuracy after step | {' | '.join(steps)} |\n|---|{'---|' * len(steps)}")
    for who in ("trl", "ours"):
        print(f"| {who} | {' | '.join(map(interval, zip(*curves[who])))} |")


def main(cfg):
    """Runs both in turns, seed by seed, and prints the tables."""
    if cfg.quick:
        cfg = Config(seeds=1, steps=2)
    if cfg.worker:
        clock, folder = Clock(), Path(cfg.folder)
        train = {"ours": train_ours, "trl": train_trl}[cfg.worker]
        train(cfg, cfg.seeds, folder, clock)
        (folder / "seconds.json").write_text(json.dumps(clock.steps))
        return
    if not find_spec("trl"):
        sys.exit("vs_trl.py needs the package trl, in an environment of its own: pip install trl")
    seconds, models = defaultdict(list), defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        bar = tqdm(total=2 * cfg.seeds, desc="runs")
        for seed in range(cfg.seeds):
            for who in ("trl", "ours"):
                folder = Path(place) / f"{who}-{seed}"
                folder.mkdir()
                settings = vars(cfg) | {"worker": who, "seeds": seed, "folder": folder}
                settings.pop("quick")
                flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
                line = [sys.executable, __file__, *flags]
                done = subprocess.run(line, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"vs_trl.py: {' '.join(line)} failed: {done.stderr[-2000:]}")
                seconds[who].append(json.loads((folder / "seconds.json").read_text()))
                steps = range(cfg.every, cfg.steps + 1, cfg.every)
                models[who].append([folder / str(step) for step in steps])
                bar.update()
        bar.close()
        order = [m for who in ("trl", "ours") for run in models[who] for m in run]
        accuracy = np.reshape(evaluate(order), (2, cfg.seeds, -1))
    report(cfg, seconds, dict(zip(("trl", "ours"), accuracy.tolist())))


if __name__ == "__main__":
    main(tyro.cli(Config))
