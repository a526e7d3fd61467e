"""Is the budget's gradient nearer to the truth than the uniform budget's, at one place?

    python bench/variance.py                  six minutes on one core
    python bench/variance.py --model runs/.../checkpoint-000010

At fixed parameters a bank of responses to m problems is drawn, with the gradient of
log P of each. The bank is then the whole world: what it holds is the truth, and a step
of two responses a problem draws from it with replacement, with any budget and weights:

  1/|D|        gvm_raft.py's weights, and raft.py's; the truth is the gradient of log p
  Lemma 1      r / (n p) with the true accept rate p; the same truth
  reward       r / n; the gradient of p
  centred      (r - mean) / (n - 1); the gradient of p
  GRPO         gvm_grpo.py's: (r - mean) / std / n
  token mean   r / (accepted tokens), as the paper's authors average their loss: the
               truth is the uniform budget's, for another budget weighs problems anew

Prints two tables. By accept rate: norm of the gradient by the head, G, whether it is
c (1 - p), and what Prop. 1 and the best budget for centred weights would give. By
budget: mean of ||estimate - truth||², by the uniform budget's with as many responses,
± 1.96 standard errors; the uniform budget's own is in units of ||truth||². Problems
without an accepted response count as an estimate of 0. The last column is their share.
Gradients are those of all parameters, hashed to 2,048 numbers with random signs, which
keeps inner products up to 2%.
"""

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gvm_grpo
import gvm_raft
from allocator import allocate, estimate, weights

EDGES = 0, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 1.01  # of the classes of accept rates


@dataclass(frozen=True)
class Config:
    """Settings."""

    model: str = gvm_raft.Config.model  # Hugging Face folder
    problems: str = gvm_raft.Config.problems  # JSON lines
    batch: int = 128  # m, problems
    bank: int = 128  # responses to each in the bank
    each: int = 2  # responses to each in a step, on average
    replicates: int = 400  # steps for every budget
    dimensions: int = 2048  # of the hashed gradients
    seed: int = 0  # of all random numbers


@dataclass
class Bank:
    """Arrays by problem and response, [m, S]; gradients [m, S, dimensions]."""

    rewards: np.ndarray
    lengths: np.ndarray
    norms: np.ndarray  # of the gradient by the head, as gradient_norms takes it
    gradients: np.ndarray

    def __post_init__(self):
        self.rates = self.rewards.mean(1)  # p_i
        squares = (self.rewards * self.norms**2).mean(1)
        self.true_norms = np.sqrt(squares / np.maximum(self.rates, 1e-9))  # G_i


def main(cfg):
    """Fills the bank, takes steps with every budget, prints the tables."""
    bank = fill_bank(cfg)
    print_law(bank, cfg)

    generator = np.random.default_rng(cfg.seed)
    print(f"\n| budget | {' | '.join(WEIGHTS)} | no hit |")
    print("|---" * (len(WEIGHTS) + 2) + "|")
    uniform = {}
    for each in cfg.each, cfg.each + 8:
        uniform[each], missed = take_steps(uniform_budget, each, bank, cfg, generator)
    means = uniform[cfg.each].mean(1)
    print_row("uniform, in units of the truth", [f"{x:.3f}" for x in means], missed)

    for name, (budget, each) in tqdm(list_budgets(cfg).items(), disable=None):
        errors, missed = take_steps(budget, each, bank, cfg, generator)
        baseline = uniform[cfg.each + 8 if "counted" in name else cfg.each]
        cells = map(compare, errors, baseline)
        print_row(name, cells, missed)


# ---- The bank
def fill_bank(cfg):
    """Draws the responses and takes the gradient of each."""
    settings = gvm_raft.Config(cfg.model, cfg.problems, seed=cfg.seed)
    gvm_raft.start_processes()
    tokenizer = gvm_raft.load_tokenizer(settings)
    problems = gvm_raft.read_problems(cfg.problems, cfg.batch, tokenizer, settings)
    order = np.random.default_rng(cfg.seed).permutation(len(problems))
    batch = [problems[i] for i in order[: cfg.batch]]

    sampler = gvm_raft.TorchSampler(settings, tokenizer)
    progress = {"step": 0, "responses": 0, "tokens": 0}
    counts = [cfg.bank] * cfg.batch
    groups = gvm_raft.sample(batch, counts, sampler, progress, settings)
    sampler.close()

    model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32)
    size = sum(weight.numel() for weight in model.parameters())
    random = torch.Generator().manual_seed(cfg.seed)
    signs = torch.randint(2, (size,), generator=random) * 2.0 - 1
    shape = cfg.batch, cfg.bank
    gradients = np.zeros((*shape, cfg.dimensions), "f4")
    norms = np.zeros(shape)
    for i, group in enumerate(tqdm(groups, "gradients", disable=None)):
        known = {}
        for s, response in enumerate(group):
            key = tuple(response.token_ids)
            if key not in known:
                known[key] = take_gradient(model, response, settings, signs, cfg)
            gradients[i, s], norms[i, s] = known[key]

    rewards = np.array([[r.reward for r in group] for group in groups])
    lengths = np.array([[len(r.token_ids) for r in group] for group in groups])
    return Bank(rewards, lengths, norms, gradients)


def take_gradient(model, response, settings, signs, cfg):
    """∇ log P of a response, hashed, and its norm by the head."""
    model.zero_grad()
    (logp_T,) = gvm_raft.token_logprobs(model, [response], settings)
    logp_T.sum().backward()
    flat = torch.cat([w.grad.flatten() for w in model.parameters()]) * signs
    # With random signs, number k goes to the sum k modulo the dimensions.
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % cfg.dimensions))
    head = model.get_output_embeddings().weight
    return flat.view(-1, cfg.dimensions).sum(0).numpy(), head.grad.norm().item()


# ---- Budgets: functions of (each, bank, generator) to counts [m] and kept pilots [m, N']
def uniform_budget(each, bank, generator):
    return np.full(len(bank.rates), each), np.zeros((len(bank.rates), 0), int)


def known(weigh):
    """n_i ∝ what a function makes of the bank."""

    def budget(each, bank, generator):
        counts = allocate(weigh(bank), each * len(bank.rates))
        return counts, np.zeros((len(counts), 0), int)

    return budget


def from_pilots(pilots, *, reuse=True, prior=1.0, weigh=weights):
    """n_i ∝ weigh(p̂, Ĝ), as choose_counts of gvm_raft.py makes it."""

    def budget(each, bank, generator):
        m, size = bank.rewards.shape
        picks = generator.integers(size, size=(m, pilots))
        rewards = np.take_along_axis(bank.rewards, picks, axis=1)
        squares = np.take_along_axis(bank.norms, picks, axis=1) ** 2 * rewards
        accepted = rewards.sum(1)
        norms = np.sqrt(squares.sum(1) / np.maximum(accepted, 1))
        rates, norms = estimate(accepted, [pilots] * m, norms, prior)
        counts = allocate(weigh(rates, norms), each * m, minimum=pilots * reuse)
        return counts, picks[:, : pilots * reuse]

    return budget


def spread(bank):
    """Root of the variance of (r - p) ∇ log P: the best weights for centred rewards."""
    centred = bank.rewards - bank.rates[:, None]
    parts = centred[:, :, None] * bank.gradients
    return np.sqrt(parts.var(1).sum(1))


def list_budgets(cfg):
    """Every budget by its name, and how many responses a problem it may spend."""
    n, thrown = cfg.each, from_pilots(1, reuse=False)
    paper = from_pilots(8, reuse=False, prior=0)
    return {
        "Prop. 1, true p and G": (known(prop_1), n),
        "Prop. 1, true p, G = 1": (known(lambda b: weights(b.rates, b.rates > 0)), n),
        "1 pilot, re-used, prior 1: default": (from_pilots(1), n),
        "the same, prior 0": (from_pilots(1, prior=0), n),
        "the same, thrown away": (thrown, n - 1),
        "the same, n ∝ 1 - p": (from_pilots(1, weigh=lambda p, G: 1 - p), n),
        "the same, n ∝ √(p (1 - p))": (from_pilots(1, weigh=deviation), n),
        "the paper's 8 pilots, not counted": (paper, n),
        "the paper's 8 pilots, counted": (paper, n),
        "best for centred, true": (known(spread), n),
    }


def prop_1(bank):
    return weights(bank.rates, bank.true_norms)


def deviation(rates, norms):
    return np.sqrt(rates * (1 - rates))


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
    """With responses picks[i] of the bank to each problem: a gradient for each weight."""
    total, tokens = np.zeros((len(WEIGHTS), bank.gradients.shape[-1])), 0
    for i, chosen in enumerate(picks):
        if len(chosen):
            rewards = bank.rewards[i, chosen]
            rows = [weigh(rewards, bank.rates[i]) for weigh in WEIGHTS.values()]
            total += np.array(rows) @ bank.gradients[i, chosen]
            tokens += rewards @ bank.lengths[i, chosen]
    total[:-1] /= len(picks)
    total[-1] /= max(tokens, 1)
    return total


def take_steps(budget, each, bank, cfg, generator):
    """Squared errors [weights, replicates], by ||truth||²; share of problems missed."""
    size = bank.rewards.shape[1]
    truth = estimate_gradients([np.arange(size)] * len(bank.rates), bank)
    errors, missed = [], []
    for _ in range(cfg.replicates):
        counts, kept = budget(each, bank, generator)
        new = [generator.integers(size, size=n - kept.shape[1]) for n in counts]
        picks = [np.append(old, more) for old, more in zip(kept, new)]
        gap = estimate_gradients(picks, bank) - truth
        errors.append((gap**2).sum(1) / (truth**2).sum(1))
        hits = [bank.rewards[i, chosen].sum() for i, chosen in enumerate(picks)]
        missed.append(np.mean(np.array(hits) == 0))
    return np.array(errors).T, np.mean(missed)


# ---- Tables
def compare(errors, baseline):
    """Ratio of the means, ± 1.96 standard errors."""
    ratio = errors.mean() / baseline.mean()
    parts = [x.std() / x.mean() / len(x) ** 0.5 for x in (errors, baseline)]
    return f"{ratio:.2f} ± {1.96 * ratio * np.hypot(*parts):.2f}"


def print_row(name, cells, missed):
    tqdm.write(f"| {name} | {' | '.join(cells)} | {missed:.0%} |")


def print_law(bank, cfg):
    """G against 1 - p, and two budgets, by accept rate."""
    print("| accept rate | problems | G | G / (1 - p) | Prop. 1's n | best centred n |")
    print("|---" * 6 + "|")
    total = cfg.each * cfg.batch
    ours, best = allocate(prop_1(bank), total), allocate(spread(bank), total)
    for low, high in pairwise(EDGES):
        here = (bank.rates >= low) & (bank.rates < high)
        if here.any():
            G, miss = bank.true_norms[here].mean(), 1 - bank.rates[here].mean()
            law = f"{G / miss:.1f}" if miss else "-"
            print(
                f"| {low:g} to {min(high, 1):g} | {here.sum()} | {G:.3f} | {law}",
                end="",
            )
            print(f" | {ours[here].mean():.1f} | {best[here].mean():.1f} |")


if __name__ == "__main__":
    main(tyro.cli(Config))
