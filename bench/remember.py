"""gvm_raft.py with budgets that remember what earlier steps said of a problem.

Where problems come again, a pilot is not all that is known of them. Two ways, by --remember:

  * pilots: the paper's pilot, but p and G come from all pilots of a problem; at every visit the
    counts of the earlier ones fade by --fade (a Beta posterior that forgets);
  * all: no pilot. p comes from all earlier responses of a problem, faded in the same way, and G is
    modelled as 1 - p: a sure policy has small gradients. A solved problem may get no response.

This is also an example of a variant: it replaces sample_counts and leaves the rest as it is. Its
memory is not in the checkpoints, so a run cannot be resumed.

Run: python bench/skills.py, then the command in its docstring with --memory
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

    remember: Literal["pilots", "all"] = "all"  # whose rewards are kept
    fade: float = 0.9  # weight of what was known at the last visit


memory = {}  # prompt -> what is known of it: accepted, drawn, sum of squared norms
pilots_only, estimate, update = gvm_raft.sample_counts, gvm_raft.estimate, gvm_raft.update


def recall(prompt_P, new_P3, fade):
    """Adds what is new of every prompt to what was known; returns both [P, 3]."""
    old_P3 = np.array([memory.get(prompt, np.zeros(3)) for prompt in prompt_P])
    memory.update(zip(prompt_P, fade * old_P3 + new_P3))
    return fade * old_P3 + new_P3


def sample_counts(problem_P, policy, sampler, progress, cfg):
    """nᵢ of every problem [P], the pilots to train on, and metrics."""
    prompt_P = [tuple(problem.prompt_ids) for problem in problem_P]
    if cfg.remember == "pilots":

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
    accept_P = (accepted_P + cfg.prior * accepted / drawn) / (drawn_P + cfg.prior)
    budget = cfg.samples_per_problem * len(problem_P)
    norm_P = np.maximum(1 - accept_P, 0.02)
    count_P = allocate(accept_P, norm_P, budget, alpha=cfg.alpha, beta=cfg.beta)
    return count_P, None, {"accept_rates": accept_P.tolist(), "grad_norms": norm_P.tolist()}


def remembering_update(policy, reference, optimizer, response_PS, cfg):
    """gvm_raft.update, after taking note of all rewards."""
    if cfg.remember == "all":
        drawn_PS = [response_S for response_S in response_PS if response_S]
        prompt_P = [tuple(response_S[0].prompt_ids) for response_S in drawn_PS]
        new_P3 = [[sum(r.reward for r in s), len(s), 0] for s in drawn_PS]
        recall(prompt_P, np.array(new_P3), cfg.fade)
    return update(policy, reference, optimizer, response_PS, cfg)


if __name__ == "__main__":
    gvm_raft.sample_counts, gvm_raft.update = sample_counts, remembering_update
    gvm_raft.main(tyro.cli(Config))
