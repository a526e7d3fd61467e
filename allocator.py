"""How many responses should each problem get? The variance-optimal budget, in integers.

Problem i is solved at rate pᵢ, accepted responses have gradients of RMS norm Gᵢ, and nᵢ
responses are drawn: the gradient estimate has a variance of at most Σᵢ Gᵢ²/(pᵢ nᵢ)
(Lemma 1). Eq. 7 weighs down what is hardly ever solved. With Σᵢ nᵢ = N, minimise

    Σᵢ 1/(1 + α/pᵢ^β) · Gᵢ²/(pᵢ nᵢ) = Σᵢ wᵢ²/nᵢ,    wᵢ² = Gᵢ²/(pᵢ + α/pᵢ^(β-1)).

In real numbers nᵢ = N wᵢ / Σₗ wₗ does it (Prop. 1). In integers one response more gains
wᵢ²/(nᵢ(nᵢ+1)), and taking the largest gains is best. Proof: a problem's gains shrink as
it gets more, so the largest can be taken in order. No other N gains add up to more.

>>> w = weights([0.25, 0.25, 0.25, 1.0], [2.0, 1.0, 0.5, 1.0], alpha=0)  # 4, 2, 1, 1
>>> allocate(w, 32).tolist(), bound(w, [16, 8, 4, 4]), bound(w, [8, 8, 8, 8])
([16, 8, 4, 4], 2.0, 2.75)
"""

import numpy as np


def weights(accept_rates, grad_norms, *, alpha=1e-3, beta=2.0):
    """The weights wᵢ of Prop. 1; 0 where pᵢ = 0 or Gᵢ = 0."""
    rates = _numbers("accept_rates", accept_rates, high=1)  # pᵢ
    norms = _numbers("grad_norms", grad_norms, rates)  # Gᵢ
    _numbers("alpha", alpha)
    _numbers("beta", beta, low=2, high=9)
    rates = np.where(rates > 1e-30, rates, np.inf)  # never solved: weight 0
    return norms / np.sqrt(rates + alpha / rates ** (beta - 1))  # wᵢ of Prop. 1


def allocate(weights, budget, *, minimum=0, maximum=None):
    """The integers nᵢ that sum to the budget and make Σ wᵢ²/nᵢ least, within bounds.
    Weight 0 gets its minimum, and an even share of what the others cannot take."""
    w = _numbers("weights", weights)
    low = _numbers("minimum", minimum, w, whole=True)
    high = 1e9 if maximum is None else maximum
    high = _numbers("maximum", high, w, low, 1e9, whole=True)
    _numbers("budget", budget, low=low.sum(), high=high.sum(), whole=True)

    # Idle problems keep their minimum, unless all others have their maximum.
    idle = w < 1e-60
    ends = np.where(idle, low, high)
    low, high = (ends, high) if ends.sum() < budget else (low, ends)
    squares = np.where(idle, 1, w**2)
    first = np.clip(1, low, high)  # comes before any second: without it the sum is ∞
    few, many = (low, first) if first.sum() > budget else (first, high)

    # Buy while the last response gains wᵢ²/(n(n-1)) >= λ, its price. Bisect log λ.
    cheap, dear = 1e-140, 1e120
    while (many - few).max() > 1:
        price = np.sqrt(cheap * dear)
        counts = np.floor(np.sqrt(squares / price + 0.25) + 0.5)
        counts = np.clip(counts, low, high)
        if counts.sum() > budget:
            many, cheap = counts, price
        else:
            few, dear = counts, price

    # One more for the largest next gains spends the rest. Ties: the lower index.
    gains = (few < many) * squares / np.maximum(few * (few + 1), 1)
    best = np.argsort(-gains, kind="stable")
    counts = few.astype(int)
    counts[best[: int(budget) - counts.sum()]] += 1
    return counts


def bound(weights, counts):
    """Σ wᵢ²/nᵢ over wᵢ > 0; infinite where such an nᵢ is 0."""
    w = _numbers("weights", weights)
    n = np.where(w > 0, _numbers("counts", counts, w), 1)
    return float(np.sum(w**2 / n)) if n.all() else np.inf  # Eq. 7; Lemma 1 if α = 0


def estimate(accepted, drawn, grad_norms, prior=1.0):
    """p̂ᵢ and Ĝᵢ from pilots, with prior more drawn, and solved at the batch's rate.
    Ĝᵢ where none was accepted: proportional to 1 - p̂ᵢ, on the scale of the others."""
    drawn = _numbers("drawn", drawn, low=1)
    accepted = _numbers("accepted", accepted, drawn, high=drawn)
    solved = accepted > 0
    norms = _numbers("grad_norms", grad_norms, drawn, where=solved)
    _numbers("prior", prior)
    batch_rate = accepted.sum() / drawn.sum()
    rates = (accepted + prior * batch_rate) / (drawn + prior)  # Algorithm 2: prior 0
    misses = np.maximum(1 - rates, 1e-3)
    scale = norms[solved].sum() / misses[solved].sum() if solved.any() else 1.0
    return rates, np.where(solved, norms, scale * misses)


def _numbers(name, values, like=None, low=0, high=1e60, whole=False, where=True):
    """The values as floats, one a problem; a ValueError names the first that is bad."""
    column = np.asarray(values, float)
    size = column.size if like is None else like.size
    if column.ndim == 0:
        column = np.full(size, column)
    if column.shape != (size,):
        raise ValueError(f"{name}[{min(size, len(column))}]: not {size} values")
    nearest = np.fmin(np.fmax(column.round() if whole else column, low), high)
    for i in np.flatnonzero(where & (column != nearest)):
        raise ValueError(f"{name}[{i}] = {column[i]}; nearest allowed: {nearest[i]}")
    return column
