"""gvm_raft.py with other budgets than Proposition 1 of one pilot, for bench/learning.py --budgets.

By --budget, every step draws as many responses as gvm_raft.py's:

  * rounds: one response for every problem, then more for those without an accepted one, round after
    round, up to --most of them; what is left when all are solved is spread evenly;
  * pilots: the paper's pilot, but p and G come from all pilots of a problem; at every visit the
    counts of the earlier ones fade by --fade (a Beta posterior that forgets);
  * responses: no pilot. p comes from all earlier responses of a problem, faded in the same way, and
    G is modelled as 1 - p: a sure policy has small gradients. A solved problem may get none.

This is also an example of a variant: it replaces sample_counts and leaves the rest as it is. What
it remembers is not in the checkpoints, so a run cannot be resumed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gvm_raft
from allocator import allocate


@dataclass(frozen=True)
class Config(gvm_raft.Config):
    """gvm_raft.py's settings, and:"""

    budget: Literal["rounds", "pilots", "responses"] = "rounds"
    most: int = 8  # responses to an unsolved problem in rounds
    fade: float = 0.9  # weight of what was known at the last visit


memory = {}  # prompt -> what is known of it: accepted, drawn, sum of squared norms
pilots_only, estimate, update = gvm_raft.sample_counts, gvm_raft.estimate, gvm_raft.update


def recall(prompt_P, new_P3, fade):
    """Adds what is new of every prompt to what was known; returns both [P, 3]."""
    old_P3 = np.array([memory.get(prompt, np.zeros(3)) for prompt in prompt_P])
    memory.update(zip(prompt_P, fade * old_P3 + new_P3))
    return fade * old_P3 + new_P3


def in_rounds(problem_P, sampler, progress, cfg):
    """One response each, then to the unsolved alone; the same budget as the others'."""
    count_P, drawn_PS = np.ones(len(problem_P), int), None
    left = (cfg.samples_per_problem - 1) * len(problem_P)
    while True:
        counts = count_P.tolist()
        drawn_PS = gvm_raft.sample(problem_P, counts, sampler, progress, cfg, kept_PS=drawn_PS)
        hit_P = np.array([any(r.reward for r in drawn_S) for drawn_S in drawn_PS])
        open_P = np.flatnonzero(~hit_P & (count_P < cfg.most))[:left]
        if open_P.size == 0:
            break
        # four at a time where the budget allows it: every round is a call of the sampler
        more_P = np.minimum(cfg.most - count_P[open_P], 4 if 4 * open_P.size <= left else 1)
        count_P[open_P] += more_P
        left -= more_P.sum()
    count_P += left // len(problem_P) + (np.arange(len(problem_P)) < left % len(problem_P))
    return count_P.tolist(), drawn_PS, {}


def sample_counts(problem_P, policy, sampler, progress, cfg):
    """nᵢ of every problem [P], the pilots to train on, and metrics."""
    prompt_P = [tuple(problem.prompt_ids) for problem in problem_P]
    if cfg.budget == "rounds":
        return in_rounds(problem_P, sampler, progress, cfg)
    if cfg.budget == "pilots":

        def estimate_from_all(accepted_P, drawn_P, norm_P, prior):
            square_P = np.where(np.array(accepted_P) > 0, np.square(norm_P) * accepted_P, 0)
            seen_P3 = recall(prompt_P, np.stack([accepted_P, drawn_P, square_P], -1), cfg.fade)
            accepted_P, drawn_P, square_P = seen_P3.T
            norm_P = np.sqrt(square_P / np.maximum(accepted_P, 1e-9))
            return estimate(accepted_P, drawn_P, norm_P, prior)

        gvm_raft.estimate = estimate_from_all
        return pilots_only(problem_P, policy, sampler, progress, cfg)
    accepted_P, drawn_P, _ = np.array([memory.get(p, np.zeros(3)) for p in prompt_P]).T
    accepted, drawn, _ = sum(memory.values(), np.array([0.5, 1, 0]))  # of all problems
    prior = max(cfg.prior, 1e-3)  # or a problem that is new has no rate
    accept_P = (accepted_P + prior * accepted / drawn) / (drawn_P + prior)
    budget = cfg.samples_per_problem * len(problem_P)
    norm_P = np.maximum(1 - accept_P, 0.02)
    count_P = allocate(accept_P, norm_P, budget, alpha=cfg.alpha, beta=cfg.beta)
    return count_P, None, {"accept_rates": accept_P.tolist(), "grad_norms": norm_P.tolist()}


def remembering_update(policy, reference, optimizer, response_PS, cfg):
    """gvm_raft.update, after taking note of all rewards."""
    if cfg.budget == "responses":
        drawn_PS = [response_S for response_S in response_PS if response_S]
        prompt_P = [tuple(response_S[0].prompt_ids) for response_S in drawn_PS]
        new_P3 = [[sum(r.reward for r in s), len(s), 0] for s in drawn_PS]
        recall(prompt_P, np.array(new_P3), cfg.fade)
    return update(policy, reference, optimizer, response_PS, cfg)


def main(cfg):
    """gvm_raft.main with these budgets."""
    if cfg.resume:
        gvm_raft.refuse("--resume: what was remembered is not in the checkpoint; start a new run")
    if cfg.fade > 1:
        gvm_raft.refuse(f"--fade must be at most 1, not {cfg.fade}: old counts would grow")
    if cfg.budget == "pilots" and cfg.pilot_samples == 0:
        gvm_raft.refuse("--budget pilots needs --pilot-samples of at least 1")
    gvm_raft.sample_counts, gvm_raft.update = sample_counts, remembering_update
    gvm_raft.main(cfg)


if __name__ == "__main__":
    main(tyro.cli(Config))
