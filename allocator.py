"""How many responses should each problem get? The variance-optimal budget, exact in integers.

The gradient estimate of Lemma 1 has variance <= Σᵢ Gᵢ²/(pᵢ nᵢ): problem i is solved at rate pᵢ, its
accepted responses have RMS gradient norm Gᵢ, nᵢ are drawn. Eq. 7 damps hopeless problems: minimise
Σᵢ cᵢ/nᵢ, cᵢ = wᵢ², with Σᵢ nᵢ = N. Over the reals nᵢ = N wᵢ / Σₗ wₗ (Prop. 1): Neyman allocation
with a pilot. Integers: one more response gains cᵢ/nᵢ - cᵢ/(nᵢ+1) = cᵢ/(nᵢ(nᵢ+1)); gains shrink, so
greedy, each response to whoever gains most, is optimal; a search for its last gain λ is its loop.
Suffix _P: one entry per problem. Example by hand: w = G/√p = 4, 2, 1, 1 (α = 0), N = 32.
>>> p, G = [0.25, 0.25, 0.25, 1.0], [2.0, 1.0, 0.5, 1.0]
>>> weights(p, G, alpha=0.0).tolist(), allocate(p, G, 32, alpha=0.0).tolist()  # 32/8 each
([4.0, 2.0, 1.0, 1.0], [16, 8, 4, 4])
>>> predicted_variance([16, 8, 4, 4], p, G, alpha=0.0)  # 16/16 + 4/8 + 1/4 + 1/4
2.0
>>> predicted_variance(uniform(4, 32), p, G, alpha=0.0)  # (16 + 4 + 1 + 1)/8
2.75
"""

import numpy as np


def weights(accept_rate_P, grad_norm_P, *, alpha=1e-3, beta=2.0):
    """The weights wᵢ of Prop. 1 as float64; 0 where pᵢ = 0 or Gᵢ = 0."""
    p_P = _column("accept_rate_P", accept_rate_P, np.size(accept_rate_P), high=1)  # pᵢ
    G_P = _column("grad_norm_P", grad_norm_P, p_P.size)  # Gᵢ
    _column("alpha", alpha, 1)
    _column("beta", beta, 1, low=2, high=100)
    p_P = np.where(p_P > 0, p_P, np.inf)  # never solved: no weight
    # wᵢ = Gᵢ / √(pᵢ + α / pᵢ^(β-1))                                                      Prop. 1
    return G_P / np.sqrt(p_P + alpha / np.maximum(_power(p_P, beta - 1), 1e-200))


def allocate(accept_rate_P, grad_norm_P, budget, *, alpha=1e-3, beta=2.0, minimum=0, maximum=None):
    """The integers nᵢ, int64, that sum to the budget and minimise Σ cᵢ/nᵢ (Eq. 7) within bounds.

    Proof: the sum is separable and each cᵢ/n convex, so a problem's gains shrink with n. So greedy
    takes the largest gains of all, and no other choice of as many gains adds up to more.
    Bounds: integers, common or per problem. First responses come first, to the largest cᵢ > 0.
    cᵢ = 0 gets its minimum, plus an even split of what the rest cannot take. Ties: lower index.
    """
    w_P = weights(accept_rate_P, grad_norm_P, alpha=alpha, beta=beta)
    budget = _column("budget", budget, 1, high=2**31 - 1, whole=True)[0]
    low_P = _column("minimum", minimum, w_P.size, high=budget, whole=True)
    high_P = _column("maximum", budget if maximum is None else maximum, w_P.size, low_P, whole=True)
    _column("sum of minimum up to", low_P.cumsum(), w_P.size, high=budget)
    _column("sum of maximum", high_P.sum(), 1, low=budget)
    # cᵢ = wᵢ², scaled by a power of two, so exactly; cᵢ = 0 becomes a gain below all others
    c_P = np.maximum(np.ldexp(w_P, -np.frexp(w_P.max())[1]) ** 2, np.where(w_P > 0, 1e-250, 1e-280))
    one_P = np.where(w_P > 0, np.clip(1, low_P, high_P), low_P)
    return _greedy(c_P, budget, *((low_P, one_P) if one_P.sum() > budget else (one_P, high_P)))


def uniform(n_problems, budget, *, minimum=0, maximum=None):
    """The most even nᵢ within the bounds; a remainder goes to the lower indices."""
    return allocate(np.zeros(n_problems), 0, budget, minimum=minimum, maximum=maximum)


def predicted_variance(count_P, accept_rate_P, grad_norm_P, *, alpha=1e-3, beta=2.0):
    """Σ cᵢ/nᵢ of Eq. 7 over cᵢ > 0, up to a common factor; inf if such a problem has nᵢ = 0."""
    c_P = weights(accept_rate_P, grad_norm_P, alpha=alpha, beta=beta) ** 2
    n_P = _column("count_P", count_P, c_P.size)
    return np.inf if (n_P[c_P > 0] == 0).any() else float((c_P[c_P > 0] / n_P[c_P > 0]).sum())


def estimate(accepted_P, drawn_P, norm_P, prior=1.0):
    """p̂ᵢ and Ĝᵢ of Algorithm 2 from drawn pilots and the RMS gradient norm of those accepted.

    p̂ᵢ adds prior more pilots, accepted at the batch's rate (0: the paper's p̂ᵢ). Without an accepted
    one Ĝᵢ is 1 - p̂ᵢ, as a softmax's gradient, in the scale of the other problems; 1 if all fail."""
    n_P = _column("drawn_P", drawn_P, np.size(accepted_P), low=1)
    a_P = _column("accepted_P", accepted_P, n_P.size, high=n_P)
    G_P = _column("norm_P", norm_P, n_P.size, skip=a_P == 0)
    _column("prior", prior, 1)
    p_P = (a_P + prior * a_P.sum() / n_P.sum()) / (n_P + prior)
    miss_P, hit_P = np.maximum(1 - p_P, 1e-3), a_P > 0
    scale = G_P[hit_P].sum() / miss_P[hit_P].sum() if hit_P.any() else 1.0
    return p_P, np.where(hit_P, G_P, scale * miss_P)


def _greedy(c_P, budget, few_P, many_P):
    """Greedy from few_P up to many_P: close in on λ until no problem has two gains left."""
    dear, cheap = 2 * c_P.max(), c_P.min() / (budget + 1) ** 2  # buys nothing, buys everything
    price, step = (np.sqrt(c_P).sum() / (budget + c_P.size / 2)) ** 2, 1.25  # λ of Prop. 1
    while (many_P - few_P).max() > 1:
        # n(n+1) >= c/λ  <=>  n >= √(c/λ + ¼) - ½; rounding can miss by one, so compare the gains
        n_P = np.ceil(np.sqrt(c_P / price + 0.25) - 0.5)
        n_P = n_P + (_gain(c_P, n_P) > price) - (_gain(c_P, n_P - 1) <= price)
        n_P = np.clip(n_P, few_P, many_P)
        if n_P.sum() > budget:
            many_P, cheap, price = n_P, price, price * step
        else:
            few_P, dear, price = n_P, price, price / step
        price = price if cheap < price < dear else np.sqrt(cheap) * np.sqrt(dear)
        step *= step
    rest = int(budget - few_P.sum())
    best = np.argsort((few_P - many_P) * _gain(c_P, few_P), kind="stable")[:rest]
    return few_P.astype(np.int64) + np.bincount(best, minlength=c_P.size)


def _gain(c_P, n_P):
    """cᵢ/(nᵢ(nᵢ+1)), what response nᵢ+1 takes off Eq. 7; more, but finite, for nᵢ = 0."""
    return c_P / np.maximum(n_P * (n_P + 1), 0.5)


def _power(base_P, exponent):
    """base^exponent from √ and ·, which all platforms round alike; they do not agree on pow."""
    if exponent < 1:
        return np.sqrt(_power(base_P, 2 * exponent)) if exponent else np.ones_like(base_P)
    return base_P * _power(base_P, exponent - 1)


def _column(name, value, size, low=0, high=1e100, whole=False, skip=False):
    """The value as floats, one per problem; a ValueError names it and the first offending index."""
    x_P = np.asarray(value, float) if np.ndim(value) else np.full(size, value, float)
    if x_P.shape != (size,) or size == 0:
        raise ValueError(f"{name}[{min(size, len(x_P))}]: shape {x_P.shape}, not ({size or '>0'},)")
    good_P = (x_P >= low) & (x_P <= high) & ((x_P == x_P.round()) | (not whole)) | skip
    for i in np.flatnonzero(~good_P):
        low, high = np.broadcast_to(low, size)[i], np.broadcast_to(high, size)[i]
        raise ValueError(f"{name}[{i}] = {x_P[i]} is not{' an integer' * whole} in [{low}, {high}]")
    return x_P
