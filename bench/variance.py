"""Is the budget's gradient nearer to the truth than the uniform budget's?

    python bench/variance.py                  two minutes on one core
    python bench/variance.py --model runs/.../checkpoint-000010

At fixed parameters a bank of responses to m problems is drawn, with the gradient of
log P of each. The bank is then the world, and its means the truth: a step of two
responses a problem draws from it with replacement, and weighs them in six ways:
  1/|D|        gvm_raft.py's; the truth is the gradient of the problems' mean log p
  Lemma 1      r / (n p) with the true accept rate p; the same truth
  reward       r / n; the gradient of mean p
  centred      (r - mean) / (n - 1); the same
  GRPO         gvm_grpo.py's, (r - mean) / std / n
  token mean   r / (accepted tokens of the step), the mean of the authors' code; the
               truth is the uniform budget's, as others give problems other weights
Prints, by accept rate, the gradient's norm by the head, G, its ratio to 1 - p, and what
Prop. 1 and the best budget for centred weights give. Then, by budget, the mean of
||estimate - truth||² by the uniform budget's, ± 1.96 standard errors, the share of
squared bias in that of 1/|D|, that of problems without an accepted response, and last
the uniform budget's own error, by ||truth||².
Gradients are by all parameters, hashed to 2,048 numbers by random signs (within 2%).
"""

import sys
from collections import namedtuple
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gvm_grpo
import gvm_raft
from allocator import allocate, estimate, weights

HASHED = 2048  # numbers of a gradient
# By problem and response; then by problem: p, G, and weights of budgets that know both.
Bank = namedtuple("Bank", "rewards lengths gradients norms rates true_norms best")


@dataclass(frozen=True)
class Config:
    model: str = gvm_raft.Config.model  # Hugging Face folder
    problems: str = gvm_raft.Config.problems  # JSON lines
    batch: int = 128  # m, problems
    bank: int = 128  # responses to each in the bank
    each: int = 2  # responses to each in a step, on average
    replicates: int = 400  # steps for every budget
    seed: int = 0  # of all random numbers


def main(cfg):
    """Fills the bank, takes steps with every budget, prints the tables."""
    bank = fill_bank(cfg)
    print_law(bank, cfg)
    print(f"\n| budget | {' | '.join(WEIGHTS)} | bias | no hit |\n{'|---' * 9}|")
    generator, errors = np.random.default_rng(cfg.seed), {}
    for name, budget in tqdm(BUDGETS.items(), disable=None):
        errors[name], bias, missed = take_steps(budget, bank, cfg, generator)
        cells = map(compare, errors[name], errors["uniform"])
        share = bias[0] / errors[name][0].mean()
        tqdm.write(f"| {name} | {' | '.join(cells)} | {share:.0%} | {missed:.0%} |")
    cells = [f"{mean:.3f}" for mean in errors["uniform"].mean(1)]
    print(f"| uniform's own | {' | '.join(cells)} | | |")


# ---- The bank
def fill_bank(cfg):
    """Draws the responses and takes the gradient of each."""
    named = {"seed": cfg.seed, "problems_per_step": cfg.batch}
    settings = gvm_raft.Config(cfg.model, cfg.problems, **named)
    gvm_raft.start_processes()
    tokenizer = gvm_raft.load_tokenizer(settings)
    problems = gvm_raft.read_problems(cfg.problems, cfg.batch, tokenizer, settings)
    batch = gvm_raft.next_problems(problems, 0, settings)

    sampler = gvm_raft.TorchSampler(settings, tokenizer)
    progress = {"step": 0, "responses": 0, "tokens": 0}
    groups = gvm_raft.sample(batch, [cfg.bank] * cfg.batch, sampler, progress, settings)

    generator, size = np.random.default_rng(cfg.seed), sampler.model.num_parameters()
    signs = torch.from_numpy(generator.choice([-1, 1], size))
    norms = np.zeros((cfg.batch, cfg.bank))
    gradients = np.zeros((*norms.shape, HASHED), "f4")
    for i, group in enumerate(tqdm(groups, "gradients", disable=None)):
        known = {}
        for s, response in enumerate(group):
            key = tuple(response.token_ids)
            if key not in known:
                known[key] = take_gradient(sampler.model, response, settings, signs)
            gradients[i, s], norms[i, s] = known[key]

    rewards = np.array([[r.reward for r in group] for group in groups])
    lengths = np.array([[len(r.token_ids) for r in group] for group in groups])
    return make_bank(rewards, lengths, gradients, norms)


def make_bank(rewards, lengths, gradients, norms):
    """The bank, with what is true in it."""
    rates, ones = rewards.mean(1), np.ones(len(rewards))
    G = np.sqrt((rewards * norms**2).mean(1) / np.maximum(rates, 1e-9))
    centred = (rewards - rates[:, None])[:, :, None] * gradients
    deviation = np.sqrt(centred.var(1).sum(1))
    best = ones, weights(rates, G), weights(rates, ones), deviation
    return Bank(rewards, lengths, gradients, norms, rates, G, dict(zip(KNOWN, best)))


def take_gradient(model, response, settings, signs):
    """∇ log P of a response, hashed, and its norm by the head."""
    model.zero_grad()
    (logp_T,) = gvm_raft.token_logprobs(model, [response], settings)
    logp_T.sum().backward()
    flat = torch.cat([w.grad.flatten() for w in model.parameters()]) * signs
    # With random signs, number k goes to the sum k modulo HASHED.
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % HASHED))
    norm = model.get_output_embeddings().weight.grad.norm().item()
    return flat.view(-1, HASHED).sum(0).numpy(), norm


# ---- Budgets: functions of (each, bank, generator) to n_i and the pilots that are kept
def known(name):
    """n_i ∝ true weights of the bank."""

    def budget(each, bank, generator):
        counts = allocate(bank.best[name], each * len(bank.rates))
        return counts, np.zeros((len(counts), 0), int)

    return budget


def from_pilots(pilots, *, reuse=True, paid=True, prior=1.0, weigh=weights):
    """n_i ∝ weigh(p̂, Ĝ), as choose_counts of gvm_raft.py makes it."""

    def budget(each, bank, generator):
        m, size = bank.rewards.shape
        picks = generator.integers(size, size=(m, pilots))
        rewards = np.take_along_axis(bank.rewards, picks, axis=1)
        squares = np.take_along_axis(bank.norms, picks, axis=1) ** 2 * rewards
        accepted = rewards.sum(1)
        norms = np.sqrt(squares.sum(1) / np.maximum(accepted, 1))
        rates, norms = estimate(accepted, [pilots] * m, norms, prior)

        total = m * (each - pilots * (paid and not reuse))
        counts = allocate(weigh(rates, norms), total, minimum=pilots * reuse)
        return counts, picks[:, : pilots * reuse]

    return budget


KNOWN = "uniform", "Prop. 1, true p and G", "Prop. 1, true p, G = 1", "best for centred"
BUDGETS = {name: known(name) for name in KNOWN}
BUDGETS |= {
    "1 pilot, re-used, prior 1: default": from_pilots(1),
    "the same, prior 0": from_pilots(1, prior=0),
    "the same, thrown away": from_pilots(1, reuse=False),
    "the same, n ∝ 1 - p": from_pilots(1, weigh=lambda p, G: 1 - p),
    "the paper's 8 pilots, free": from_pilots(8, reuse=False, paid=False, prior=0),
}


# ---- Steps: weights of a problem's responses, from rewards [n_i] and the true rate
WEIGHTS = {
    "1/\\|D\\|": lambda rewards, rate: gvm_raft.advantages(rewards),
    "Lemma 1": lambda rewards, rate: rewards / max(len(rewards) * rate, 1e-9),
    "reward": lambda rewards, rate: rewards / len(rewards),
    "centred": lambda r, rate: (r - r.mean()) / max(len(r) - 1, 1),
    "GRPO": lambda rewards, rate: gvm_grpo.advantages(rewards),
    "token mean": lambda rewards, rate: rewards,
}


def estimate_gradients(picks, bank):
    """A gradient for each weight, and accepted responses, of picks[i] to problem i."""
    total, hits, tokens = 0, np.zeros(len(picks)), 0
    for i, chosen in enumerate(picks):
        rewards = bank.rewards[i, chosen]
        if len(rewards):
            rows = [weigh(rewards, bank.rates[i]) for weigh in WEIGHTS.values()]
            total = total + np.array(rows) @ bank.gradients[i, chosen]
            tokens += rewards @ bank.lengths[i, chosen]
            hits[i] = rewards.sum()
    scales = [len(picks)] * (len(WEIGHTS) - 1) + [max(tokens, 1)]
    return total / np.array(scales)[:, None], hits


def take_steps(budget, bank, cfg, generator):
    """Errors [weights, replicates] and squared bias [weights] by ||truth||², misses."""
    size = bank.rewards.shape[1]
    truth, _ = estimate_gradients([np.arange(size)] * len(bank.rates), bank)
    errors, missed, mean, scale = [], [], 0, (truth**2).sum(1)
    for _ in range(cfg.replicates):
        counts, kept = budget(cfg.each, bank, generator)
        new = [generator.integers(size, size=n - kept.shape[1]) for n in counts]
        picks = [np.append(old, more) for old, more in zip(kept, new)]
        found, hits = estimate_gradients(picks, bank)
        errors.append(((found - truth) ** 2).sum(1) / scale)
        missed.append(np.mean(hits == 0))
        mean = mean + found / cfg.replicates
    bias = ((mean - truth) ** 2).sum(1) / scale
    return np.array(errors).T, bias, np.mean(missed)


# ---- Tables
def compare(errors, baseline):
    """Ratio of the means, ± 1.96 standard errors."""
    ratio = errors.mean() / baseline.mean()
    parts = [x.std() / x.mean() / len(x) ** 0.5 for x in (errors, baseline)]
    return f"{ratio:.2f} ± {1.96 * ratio * np.hypot(*parts):.2f}"


def print_law(bank, cfg):
    """G against 1 - p, and two budgets, by accept rate."""
    print("| accept rate | problems | G | G / (1 - p) | Prop. 1's n | best centred n |")
    print("|---" * 6 + "|")
    ours = allocate(bank.best["Prop. 1, true p and G"], cfg.each * cfg.batch)
    best = allocate(bank.best["best for centred"], cfg.each * cfg.batch)
    for low, high in pairwise((0, 0.05, 0.2, 0.5, 0.8, 0.95, 1.01)):
        here = (bank.rates >= low) & (bank.rates < high)
        if here.any():
            norm, miss = bank.true_norms[here].mean(), 1 - bank.rates[here].mean()
            row = here.sum(), norm, norm / miss, ours[here].mean(), best[here].mean()
            print(f"| {low:g} to {high:.2g} | {' | '.join(f'{x:.3g}' for x in row)} |")


if __name__ == "__main__":
    main(tyro.cli(Config))
