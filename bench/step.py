"""CPU-seconds of every phase of a step, beside the plain ways to do the same. Prints markdown.

A step is the E-step and M-step of gvm_raft.py, called as its main calls them; learning rate 0 keeps
the weights as they are, so that every repeat does the same work. Measured in one process and on one
thread, all variants in turn, over and over; the tables hold medians. Children of the process do not
count (verify_math.py leaves answers that are not plain numbers to one).

Targets, for the tiny model:
  * pilot statistics and allocation (norms of the accepted pilots, estimate, allocate) take less
    than 5% of a step;
  * our sampler is not slower than transformers' generate that returns log-probabilities as well;
  * nothing is quadratic in the number of responses: time per response does not grow.

Run: python bench/step.py [--repeats 5] [--model ... --problems ...]   (five minutes on one core)
"""

import datetime
import platform
import sys
import time
from collections import defaultdict
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Annotated

import math_verify
import numpy as np
import torch
import transformers
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gvm_raft

PHASES = ["sampling", "bookkeeping", "verification", "allocation", "update", "weight hand-over"]
EACH = 8  # responses per problem


class Clock:
    """CPU-seconds by phase; what a phase spends in another one counts there."""

    def __init__(self):
        self.seconds, self.inner = defaultdict(float), [0.0]

    def timed(self, name, function):
        """The function, with its time booked under the name."""

        def run(*args, **kwargs):
            self.inner.append(0.0)
            start = time.process_time()
            result = function(*args, **kwargs)
            spent = time.process_time() - start
            self.seconds[name] += spent - self.inner.pop()
            self.inner[-1] += spent
            return result

        return run

    def take(self):
        """The seconds since the last call, by phase."""
        seconds, self.seconds = self.seconds, defaultdict(float)
        return seconds


class Loop:
    """The resources of gvm_raft.main, with a clock in every phase."""

    def __init__(self, cfg):
        self.cfg, self.clock = cfg, Clock()
        device = gvm_raft.start_processes(cfg)
        torch.set_num_threads(1)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model)
        self.problems = gvm_raft.load_problems(cfg.problems, self.tokenizer, cfg)
        self.sampler = gvm_raft.TorchSampler(cfg, self.tokenizer, device)
        self.policy = gvm_raft.load_policy(cfg, device)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.0)
        timed = self.clock.timed
        self.draw = timed("sampling", self.sampler)
        self.draw.tokenizer = self.tokenizer
        self.load = timed("weight hand-over", self.sampler.load)
        self.update = timed("update", gvm_raft.update)
        self.sample_counts = timed("allocation", gvm_raft.sample_counts)
        gvm_raft.sample = timed("bookkeeping", gvm_raft.sample)  # seeds, decoding, records
        gvm_raft.verify_batch = timed("verification", gvm_raft.verify_batch)

    def step(self, size, step):
        """A step of so many responses: CPU-seconds by phase, problems, responses."""
        m = max(1, size // EACH)
        cfg = replace(self.cfg, problems_per_step=m, samples_per_problem=EACH)
        cfg = replace(cfg, updates_per_step=min(m, cfg.updates_per_step))
        progress = {"step": step, "responses": 0, "tokens": 0}
        problem_P = gvm_raft.next_problems(self.problems, step, cfg)
        self.clock.take()
        work = problem_P, self.policy, self.draw, progress, cfg
        count_P, pilot_PS, _ = self.sample_counts(*work)
        response_PS = gvm_raft.sample(
            problem_P, count_P, self.draw, progress, cfg, kept_PS=pilot_PS
        )
        self.update(self.policy, None, self.optimizer, response_PS, cfg)
        self.load(self.policy)
        return self.clock.take(), problem_P, response_PS


def cpu_seconds(function, *args):
    """CPU-seconds of a call, and its result."""
    start = time.process_time()
    result = function(*args)
    return time.process_time() - start, result


def our_sampler(loop, problem_P, step):
    """All responses at once: the uniform budget of raft.py."""
    prompts = [p.prompt_ids for p in problem_P for _ in range(EACH)]
    return loop.sampler(prompts, list(range(step * len(prompts), (step + 1) * len(prompts))))


@torch.inference_mode()
def generate(loop, problem_P, with_logprobs):
    """The same with transformers' generate and its dynamic cache; log-probabilities as it does."""
    longest = max(len(p.prompt_ids) for p in problem_P)
    pads = [longest - len(p.prompt_ids) for p in problem_P]
    ids_PT = torch.tensor([[0] * n + p.prompt_ids for n, p in zip(pads, problem_P)])
    mask_PT = torch.tensor([[0] * n + [1] * (longest - n) for n in pads])
    out = loop.sampler.model.generate(
        ids_PT.repeat_interleave(EACH, 0),
        attention_mask=mask_PT.repeat_interleave(EACH, 0),
        do_sample=True,
        top_k=0,  # its default of 50 is another distribution
        temperature=loop.cfg.temperature,
        max_new_tokens=loop.cfg.max_new_tokens,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=with_logprobs,
    )
    if with_logprobs:
        scores = out.scores
        loop.sampler.model.compute_transition_scores(out.sequences, scores, normalize_logits=True)
    return out.sequences


def norms_by_backward(loop, accepted, weight, through):
    """Gᵢ with one forward and backward pass per response: gradient of log P(y) by the weight."""
    model, norms = loop.sampler.model, []
    for r in accepted:
        ids_1T = torch.tensor([[*r.prompt_ids, *r.token_ids]])
        with torch.set_grad_enabled(through):
            hidden_1TD = model.base_model(ids_1T, use_cache=False).last_hidden_state
        logit_TV = model.get_output_embeddings()(hidden_1TD[0, len(r.prompt_ids) - 1 : -1])
        logp_TV = (logit_TV / loop.cfg.temperature).log_softmax(-1)
        target_T1 = torch.from_numpy(r.token_ids)[:, None]
        (gradient,) = torch.autograd.grad(logp_TV.gather(1, target_T1).sum(), weight)
        norms.append(gradient.square().sum().sqrt().item())
    return norms


@torch.no_grad()
def norms_at_once(loop, accepted):
    """Gᵢ as sample_counts has it: micro-batches, one forward pass, the Gram identity."""
    norm_B = torch.zeros(len(accepted))
    for index in gvm_raft.micro_batches(accepted, loop.cfg.tokens_per_batch):
        batch = [accepted[i] for i in index]
        norm_B[index] = loop.policy(batch, gvm_raft.head_grad_norms, loop.cfg.temperature)
    return norm_B.tolist()


def plain_verify(texts, answers):
    """math-verify on the full text of every response."""
    pairs = zip(texts, answers)
    return [math_verify.verify(math_verify.parse(a), math_verify.parse(t)) for t, a in pairs]


def alternatives(loop, problem_P, response_PS, step):
    """CPU-seconds of a step's work done in other ways, by name."""
    responses = list(chain(*response_PS))
    pilots = chain(*(response_S[: loop.cfg.pilot_samples] for response_S in response_PS))
    accepted = [r for r in pilots if r.reward]
    ids = [r.token_ids for r in responses]
    texts = loop.tokenizer.batch_decode(ids, skip_special_tokens=True)
    answers = [p.answer for p, s in zip(problem_P, response_PS) for _ in s]
    model = loop.sampler.model
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    seconds, results = {}, {}
    for name, *call in (
        ("sample ours", our_sampler, loop, problem_P, step),
        ("sample generate+", generate, loop, problem_P, True),
        ("sample generate", generate, loop, problem_P, False),
        ("norms ours", norms_at_once, loop, accepted),
        ("norms head", norms_by_backward, loop, accepted, head, False),
        ("norms embedding", norms_by_backward, loop, accepted, embedding, True),
        ("verify ours", gvm_raft.verify_batch, texts, answers),
        ("verify plain", plain_verify, texts, answers),
    ):
        seconds[name], results[name] = cpu_seconds(*call)
    if not np.allclose(results["norms ours"], results["norms head"], rtol=1e-3):
        raise SystemExit("step.py: the norms of the Gram identity and of autograd differ")
    seconds["accepted pilots"] = len(accepted)
    seconds["accepted"] = sum(r.reward for r in responses) / len(responses)
    seconds["tokens"] = sum(map(len, ids)) / len(ids)
    verdicts = zip(results["verify ours"], results["verify plain"])
    seconds["same verdict"] = np.mean([a == b for a, b in verdicts])
    return seconds


def report(steps, others, sizes):
    """Prints the tables, from the seconds of all repeats."""
    middle = {name: np.median([other[name] for other in others]) for name in others[0]}
    phase = {n: {p: np.median([s[p] for s in steps[n]]) for p in PHASES} for n in sizes}
    total = {n: np.median([sum(s.values()) for s in steps[n]]) for n in sizes}
    print("\n| CPU-seconds per 512 responses |", *(f"{n} responses a step |" for n in sizes))
    print("|---|" + "---|" * len(sizes))
    for name in PHASES:
        cells = [f"{phase[n][name] * 512 / n:.4f} ({phase[n][name] / total[n]:.1%})" for n in sizes]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"| the step | {' | '.join(f'{total[n] * 512 / n:.3f}' for n in sizes)} |")
    print(
        f"\n{middle['accepted']:.0%} accepted, {middle['tokens']:.1f} tokens per response; ", end=""
    )
    print(f"norms of {middle['accepted pilots']:.0f} accepted pilots; ", end="")
    print(f"{middle['same verdict']:.1%} of the verdicts the same.")
    print("\n| the same work | CPU-seconds | times ours |\n|---|---|---|")
    for name, kind, text in (
        ("sample ours", "sample", "sampling all at once, log-probabilities kept: ours"),
        ("sample generate+", "sample", "transformers generate, with log-probabilities"),
        ("sample generate", "sample", "transformers generate, without"),
        ("norms ours", "norms", "gradient norms of accepted pilots: ours"),
        ("norms head", "norms", "autograd per response, output head"),
        ("norms embedding", "norms", "autograd per response, embed_tokens (the authors')"),
        ("verify ours", "verify", "verification: ours"),
        ("verify plain", "verify", "math-verify on the full text"),
    ):
        ratio = np.median([other[name] / max(other[f"{kind} ours"], 1e-9) for other in others])
        print(f"| {text} | {middle[name]:.4f} | {ratio:.2f} |")


def main(
    repeats: int = 5,
    responses: int = 512,
    sizes: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (128, 512, 2048),
    model: str = gvm_raft.Config.model,
    problems: str = gvm_raft.Config.problems,
    max_new_tokens: int = gvm_raft.Config.max_new_tokens,
):
    """Measures every phase of a step beside the plain ways to do the same.

    Args:
        repeats: times everything is measured; the tables hold medians
        responses: of a step that is compared with the alternatives
        sizes: responses of the steps whose times show how cost grows
        model: folder or hub name
        problems: file or hub name
        max_new_tokens: longest response
    """
    loop = Loop(gvm_raft.Config(model=model, problems=problems, max_new_tokens=max_new_tokens))
    steps, others = defaultdict(list), []
    loop.step(2 * EACH, 0)  # warm up
    sizes = sorted({*sizes, responses})
    for repeat in tqdm(range(repeats), desc="repeats"):
        for size in sizes:
            seconds, problem_P, response_PS = loop.step(size, repeat)
            steps[size].append(seconds)
            if size == responses:
                others.append(alternatives(loop, problem_P, response_PS, repeat))
    print(
        f"{datetime.date.today()}, python {platform.python_version()}, torch {torch.__version__},"
    )
    print(
        f"transformers {transformers.__version__}, {repeats} repeats; {responses} responses a step,"
    )
    print(f"{EACH} per problem, {loop.cfg.pilot_samples} of them pilots")
    report(steps, others, sizes)


if __name__ == "__main__":
    tyro.cli(main)
