"""Does the budget of Prop. 1 lower the gradient's error, response for response? Prints markdown.

At fixed parameters a bank of responses is drawn for a batch of m test problems, with the gradient
of every response over all parameters (count-sketched: squared norms and inner products keep their
values up to a few percent, the same for all rows). The bank is then the population: true pᵢ, Gᵢ and
gradients are its means, and E-step and M-step are replicated by drawing from it with replacement,
8 m responses for every row, pilots counted unless the row says that they are free.

    estimator   weight of a response      objective
    lemma 1     r / (nᵢ pᵢ), true pᵢ      mean of log pᵢ
    algorithm 1 r / |Dᵢ|                  mean of log pᵢ    gvm_raft.py and raft.py
    reward      r / nᵢ                    mean of pᵢ        their --weighting reward
    centred     (r - |Dᵢ|/nᵢ) / (nᵢ - 1)  mean of pᵢ        GRPO without its division by the std

Units: the squared norm of the objective's true gradient. error = bias² + variance is the mean of
||estimate - truth||², missing problems included; predicted is the bound that Prop. 1 minimises, its
sum over problems that get a response. cosine: to the true gradient, which is what remains once
clipping and Adam have set the length. Intervals: 95%, bootstrap over replicates.

Run: python bench/variance.py [--model runs/.../model]   (three minutes on one core)
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gvm_raft
from allocator import allocate, estimate, uniform

EACH = 8  # responses per problem
ESTIMATORS = ("lemma 1", "algorithm 1", "reward", "centred")


@dataclass(frozen=True)
class Config:
    """Settings."""

    model: str = gvm_raft.Config.model  # Hugging Face folder
    problems: str = gvm_raft.Config.eval_problems  # .jsonl of problems
    batch: int = 64  # m, problems
    bank: int = 128  # responses per problem in the bank
    replicates: int = 400  # E-steps and M-steps per row
    dimensions: int = 2048  # of the sketched gradients
    seed: int = 0  # of all random numbers


@dataclass
class Bank:
    """Of P problems and S responses: rewards, rows of gradients; true rates and RMS norms."""

    reward_PS: np.ndarray
    row_PS: np.ndarray  # index into grad_UD: equal responses share a gradient
    grad_UD: np.ndarray
    full_U: np.ndarray  # ||∇ log P|| over all parameters
    head_U: np.ndarray  # over the output head, as sample_counts takes it

    def __post_init__(self):
        self.accept_P = self.reward_PS.mean(1)
        self.full_P, self.head_P = self.norms(self.full_U), self.norms(self.head_U)

    def norms(self, norm_U):
        """Gᵢ: RMS norm of the accepted responses, 0 where there is none."""
        square_P = (norm_U[self.row_PS] ** 2 * self.reward_PS).mean(1)
        return np.sqrt(square_P / np.maximum(self.accept_P, 1e-12))


def fill_bank(cfg):
    """Draws the responses and computes their gradients."""
    settings = gvm_raft.Config(model=cfg.model, sampler="torch", seed=cfg.seed)
    device = gvm_raft.start_processes(settings)
    tokenizer = gvm_raft.AutoTokenizer.from_pretrained(cfg.model)
    problems = gvm_raft.load_problems(cfg.problems, tokenizer, settings)
    order = np.random.default_rng(cfg.seed).permutation(len(problems))[: cfg.batch]
    problem_P = [problems[i] for i in order]
    progress = {"step": 0, "responses": 0, "tokens": 0}
    sampler = gvm_raft.TorchSampler(settings, tokenizer, device)
    drawn_PS = gvm_raft.sample(problem_P, [cfg.bank] * cfg.batch, sampler, progress, settings)
    policy = gvm_raft.Policy(gvm_raft.load_model(settings, torch.float32)).to(device)
    weights = list(policy.parameters())
    head = policy.model.get_output_embeddings().weight
    random = torch.Generator().manual_seed(cfg.seed)
    size = sum(w.numel() for w in weights)
    sign = torch.randint(2, (size,), generator=random) * 2.0 - 1
    pad = (0, -size % cfg.dimensions)
    known, grads, row_PS = {}, [], np.zeros((cfg.batch, cfg.bank), int)
    for p, response_S in enumerate(tqdm(drawn_PS, desc="gradients", leave=False)):
        for s, response in enumerate(response_S):
            key = (p, *response.token_ids.tolist())
            if key not in known:
                known[key] = len(known)
                logp_K, _ = policy([response], gvm_raft.token_logprobs, 1.0)
                grad = torch.autograd.grad(logp_K.sum(), weights)
                flat = torch.cat([g.flatten() for g in grad]).cpu()
                # random signs, then every weight i goes to sum i modulo the dimensions
                sketch = torch.nn.functional.pad(flat * sign, pad).view(-1, cfg.dimensions).sum(0)
                own = next(g for g, w in zip(grad, weights) if w is head)
                grads.append((sketch.numpy(), flat.norm().item(), own.norm().item()))
            row_PS[p, s] = known[key]
    reward_PS = np.array([[r.reward for r in response_S] for response_S in drawn_PS])
    return Bank(reward_PS, row_PS, *map(np.array, zip(*grads)))


def pilot_rule(pilots, *, reuse=True, prior=1.0, norm="head", paid=True, spread=False, most=None):
    """The E-step from pilots: a function of (bank, rng) to counts and pilot columns [P, N'].

    spread: nᵢ ∝ √(pᵢ(1-pᵢ)), the spread of the rewards, instead of Prop. 1. most: a problem without
    an accepted pilot takes the mean Ĝ of those with up to so many, not estimate's share of 1 - p̂ᵢ.
    """

    def rule(bank, rng):
        m, size = bank.reward_PS.shape
        pick_PS = rng.integers(size, size=(m, pilots))
        reward_PS = np.take_along_axis(bank.reward_PS, pick_PS, 1)
        norm_U = {"head": bank.head_U, "full": bank.full_U, "one": np.ones_like(bank.head_U)}[norm]
        norm_PS = norm_U[np.take_along_axis(bank.row_PS, pick_PS, 1)]
        accepted_P = reward_PS.sum(1)
        norm_P = np.sqrt((norm_PS**2 * reward_PS).sum(1) / np.maximum(accepted_P, 1))
        budget = EACH * m - (0 if reuse or not paid else pilots * m)
        rates = estimate(accepted_P, pilots, norm_P, prior)
        few_P = (accepted_P > 0) & (accepted_P <= (most or 0))
        if few_P.any():
            rates = rates[0], np.where(accepted_P > 0, norm_P, norm_P[few_P].mean())
        if spread:
            rates = np.ones(m), np.sqrt(rates[0] * (1 - rates[0]))
        count_P = allocate(*rates, budget, minimum=pilots if reuse else 0)
        return count_P, pick_PS if reuse else pick_PS[:, :0]

    return rule


def known_rule(weigh):
    """nᵢ in proportion to weigh(p, G full, G head) of the true values, 1 or more where positive."""

    def rule(bank, rng):
        w_P = weigh(np.maximum(bank.accept_P, 1e-12), bank.full_P, bank.head_P)
        count_P = allocate(np.ones(w_P.size), w_P * (bank.accept_P > 0), EACH * w_P.size, alpha=0)
        return count_P, np.zeros((w_P.size, 0), int)

    return rule


def both_classes_rule(bank, rng):
    """nᵢ ∝ the root of the variance of (r - pᵢ) ∇ log P: accepted and rejected responses count."""
    gap_PS = bank.reward_PS - bank.accept_P[:, None]
    square_P = (gap_PS**2 * bank.full_U[bank.row_PS] ** 2).mean(1)
    mean_P = [np.linalg.norm(g @ bank.grad_UD[row]) for g, row in zip(gap_PS, bank.row_PS)]
    square_P -= (np.array(mean_P) / bank.reward_PS.shape[1]) ** 2
    w_P = np.sqrt(np.maximum(square_P, 0))
    return allocate(np.ones(w_P.size), w_P, EACH * w_P.size, alpha=0), np.zeros((w_P.size, 0), int)


def uniform_rule(bank, rng):
    """nᵢ = N/m."""
    m = len(bank.accept_P)
    return uniform(m, EACH * m), np.zeros((m, 0), int)


RULES = {
    "uniform": uniform_rule,
    "Prop. 1, true p and G": known_rule(lambda p, full, head: full / np.sqrt(p + 1e-3 / p)),
    "Prop. 1, true p and G of the head": known_rule(
        lambda p, f, head: head / np.sqrt(p + 1e-3 / p)
    ),
    "Prop. 1, true p, G = 1": known_rule(lambda p, f, h: 1 / np.sqrt(p + 1e-3 / p)),
    "Prop. 1, true p and G, α = 0": known_rule(lambda p, full, head: full / np.sqrt(p)),
    "G √((1-p)/p): centred, log p": known_rule(lambda p, full, h: full * np.sqrt((1 - p) / p)),
    "G √p: reward": known_rule(lambda p, full, h: full * np.sqrt(p)),
    "G √(p(1-p)): centred, p": known_rule(lambda p, full, h: full * np.sqrt(p * (1 - p))),
    "4 pilots, re-used, prior 1": pilot_rule(4),
    "4 pilots, re-used, prior 0": pilot_rule(4, prior=0),
    "4 pilots, re-used, prior 1, G = 1": pilot_rule(4, norm="one"),
    "4 pilots, re-used, prior 1, full G": pilot_rule(4, norm="full"),
    "4 pilots, re-used, prior 1, unsolved as hard ones": pilot_rule(4, most=1),
    "2 pilots, re-used, prior 1, unsolved as hard ones": pilot_rule(2, most=1),
    "1 pilot, re-used, prior 1, unsolved as all others": pilot_rule(1, most=1),
    "1 pilot, re-used, prior 1 (default)": pilot_rule(1),
    "1 pilot, re-used, prior 0.3": pilot_rule(1, prior=0.3),
    "4 pilots, thrown away, prior 1": pilot_rule(4, reuse=False),
    "4 pilots, thrown away, prior 0": pilot_rule(4, reuse=False, prior=0),
    "2 pilots, re-used, prior 1": pilot_rule(2),
    "2 pilots, re-used, prior 0": pilot_rule(2, prior=0),
    "2 pilots, thrown away, prior 1": pilot_rule(2, reuse=False),
    "2 pilots, thrown away, prior 0": pilot_rule(2, reuse=False, prior=0),
    "8 pilots, free, prior 0 (the paper)": pilot_rule(8, reuse=False, prior=0, paid=False),
    "σ of (r - p) ∇ log P, both classes": both_classes_rule,
    "4 pilots, re-used, prior 1, √(p(1-p))": pilot_rule(4, spread=True),
    "2 pilots, re-used, prior 1, √(p(1-p))": pilot_rule(2, spread=True),
}


def weigh(reward_B, p_B, accept_P):
    """Weights [estimators, B] of drawn responses, over m problems."""
    n_P = np.bincount(p_B, minlength=accept_P.size)
    hit_P = np.bincount(p_B, reward_B, minlength=accept_P.size)
    n_B, hit_B, p_true_B = n_P[p_B], hit_P[p_B], np.maximum(accept_P, 1e-12)[p_B]
    centred_B = np.where(n_B > 1, (reward_B - hit_B / n_B) / np.maximum(n_B - 1, 1), 0)
    weights = [reward_B / (n_B * p_true_B), reward_B / np.maximum(hit_B, 1), reward_B / n_B]
    return np.array([*weights, centred_B]) / accept_P.size


def replicate(rule, bank, cfg, rng):
    """Estimates [estimators, replicates, D], mean predicted bounds [2], mean share with no hit."""
    (m, size), unique = bank.reward_PS.shape, len(bank.grad_UD)
    weight_ERU = np.zeros((len(ESTIMATORS), cfg.replicates, unique), "f4")
    bounds, missed = [], []
    for r in range(cfg.replicates):
        count_P, kept_PS = rule(bank, rng)
        more_P = count_P - kept_PS.shape[1]
        p_B = np.concatenate(
            [np.repeat(np.arange(m), kept_PS.shape[1]), np.repeat(range(m), more_P)]
        )
        pick_B = np.concatenate([kept_PS.ravel(), rng.integers(size, size=more_P.sum())])
        reward_B = bank.reward_PS[p_B, pick_B]
        for e, weight_B in enumerate(weigh(reward_B, p_B, bank.accept_P)):
            weight_ERU[e, r] = np.bincount(bank.row_PS[p_B, pick_B], weight_B, minlength=unique)
        real = (bank.accept_P > 0) & (count_P > 0)
        p_P, G_P, n_P = bank.accept_P[real], bank.full_P[real], count_P[real]
        # Lemma 1: Σ Gᵢ²/(pᵢ nᵢ); with weights 1/nᵢ: Σ pᵢ Gᵢ²/nᵢ
        bounds.append([(G_P**2 / p_P / n_P).sum() / m**2, (G_P**2 * p_P / n_P).sum() / m**2])
        missed.append((np.bincount(p_B, reward_B, minlength=m) == 0).mean())
    return weight_ERU @ bank.grad_UD, np.mean(bounds, 0), np.mean(missed)


def truth(bank):
    """The four expectations over the bank of an unbounded draw: true gradients [estimators, D]."""
    m, size = bank.reward_PS.shape
    weight_EB = weigh(bank.reward_PS.ravel(), np.repeat(range(m), size), bank.accept_P)
    weight_EB[3] *= (size - 1) / size  # drawing with replacement, from a population
    rows = [np.bincount(bank.row_PS.ravel(), w, len(bank.grad_UD)) for w in weight_EB]
    return np.array(rows) @ bank.grad_UD


def errors(estimate_RD, true_D, rng, draws=1000):
    """bias², variance, error (first row; then bootstraps) in units of ||truth||², mean cosine."""
    gap_RD, count = estimate_RD - true_D, len(estimate_RD)
    gram_RR, scale = gap_RD @ gap_RD.T, true_D @ true_D
    pick_XR = rng.multinomial(count, np.full(count, 1 / count), size=draws) / count
    pick_XR = np.vstack([np.full(count, 1 / count), pick_XR])
    error_X = pick_XR @ gram_RR.diagonal()
    mean_X = ((pick_XR @ gram_RR) * pick_XR).sum(1)  # ||mean gap||², of noise variance/count
    variance_X = (error_X - mean_X) * count / (count - 1)
    bias_X = mean_X - variance_X / count * np.where(np.arange(draws + 1) == 0, 1, 2)  # bootstrap: 2
    cosine = estimate_RD @ true_D / np.linalg.norm(estimate_RD, axis=1).clip(1e-12) / scale**0.5
    return np.array([bias_X, variance_X, error_X]) / scale, cosine.mean()


def main(cfg):
    """Fills the bank, replicates every rule, prints a table per estimator."""
    bank, rng = fill_bank(cfg), np.random.default_rng(cfg.seed)
    true_ED = truth(bank)
    scale_E = (true_ED**2).sum(1)
    p = bank.accept_P
    print(f"{cfg.batch} problems x {cfg.bank} responses, accept rate {p.mean():.3f}, never solved")
    print(f"{(p == 0).sum()}, below 0.05 {(p < 0.05).sum()}, above 0.8 {(p > 0.8).sum()};")
    spread = [f"{g[p > 0].min():.1f} to {g.max():.1f}" for g in (bank.full_P, bank.head_P)]
    correlation = np.corrcoef(bank.full_P[p > 0], bank.head_P[p > 0])[0, 1]
    with_p = np.corrcoef(bank.full_P[p > 0], np.log(p[p > 0]))[0, 1]
    print(
        f"G of all parameters {spread[0]}, of the head {spread[1]}, correlation {correlation:.2f};"
    )
    print(f"correlation of G with log p {with_p:.2f}; {cfg.replicates} replicates, seed {cfg.seed}")
    results = {}
    for name, rule in tqdm(RULES.items(), desc="rules", leave=False):
        estimate_ERD, bounds, missed = replicate(rule, bank, cfg, rng)
        parts = [errors(x, t, rng) for x, t in zip(estimate_ERD, true_ED)]
        results[name] = parts, bounds, missed
    for e, estimator in enumerate(ESTIMATORS):
        print(f"\n**{estimator}**\n\n| budget | predicted | variance | bias² | error |", end="")
        print(f" error / uniform's | cosine | no hit |\n|{'---|' * 8}")
        for name, (parts, bounds, missed) in results.items():
            (values, cosine), (base, _) = parts[e], results["uniform"][0][e]
            shown = {0: bounds[0], 2: bounds[1]}.get(e)
            cells = [name, f"{shown / scale_E[e]:.3f}" if shown is not None else "-"]
            for k in (1, 0, 2):
                cells.append(interval(values[k]))
            cells.append(interval(values[2] / base[2]) if name != "uniform" else "1")
            print(f"| {' | '.join(cells)} | {cosine:.3f} | {100 * missed:.0f}% |")


def interval(value_X):
    """The first value, with the 95% interval of the others."""
    low, high = np.quantile(value_X[1:], (0.025, 0.975))
    return f"{value_X[0]:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main(tyro.cli(Config))
