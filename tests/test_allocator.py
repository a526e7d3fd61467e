"""The budget in integers against brute force, a heap and exchanges, and its edges."""

import doctest
import heapq
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import allocator
from allocator import allocate, bound, estimate, weights

# ---- What other ways find


def cost(counts, w):
    """Σ wᵢ² of problems without a response, then Σ wᵢ²/nᵢ of the others, both exact."""
    pairs = [(Fraction(float(x)) ** 2, int(n)) for x, n in zip(w, counts, strict=True)]
    unserved = sum(square for square, n in pairs if n == 0)
    return unserved, sum(square / n for square, n in pairs if n > 0)


def compositions(total, parts):
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


def heap_greedy(w, budget, low, high):
    """One response at a time: first ones by weight, then by gain, weight 0 last."""
    squares = np.square(w)

    def key(i, n):
        if squares[i] == 0:
            return (2, n, i)
        return (0, -squares[i], i) if n == 0 else (1, -squares[i] / (n * (n + 1)), i)

    counts = [int(n) for n in low]
    heap = [key(i, n) for i, n in enumerate(counts) if n < high[i]]
    heapq.heapify(heap)
    for _ in range(int(budget) - sum(counts)):
        i = heapq.heappop(heap)[-1]
        counts[i] += 1
        if counts[i] < high[i]:
            heapq.heappush(heap, key(i, counts[i]))
    return counts


def last_and_next_gains(w, counts):
    """What the last response to each problem gained and what another would gain."""
    squares = np.square(w)
    first = 1e40 * squares  # more than any second response gains
    last = squares / np.maximum(counts * (counts - 1), 1)
    following = squares / np.maximum(counts * (counts + 1), 1)
    return np.where(counts > 1, last, first), np.where(counts > 0, following, first)


# ---- Random cases

WEIGHTS = {
    "ties": lambda rng, size: rng.choice([0.0, 1.0, 1.0, 2.0, 3.0, 4.0, 6.0], size),
    "roots": lambda rng, size: np.sqrt(rng.integers(0, 200, size)),
    "powers": lambda rng, size: 2.0 ** rng.integers(-6, 6, size),
    "equal": lambda rng, size: np.full(size, 0.7),
    "12 orders": lambda rng, size: 10.0 ** rng.uniform(-6, 6, size),
    "close": lambda rng, size: 1 + rng.integers(0, 4, size) * 2.0**-52,
    "pilots of 8": lambda rng, size: weights(
        rng.integers(0, 9, size) / 8, rng.choice([0.0, 1.0, 2.0, 3.0], size)
    ),
}
SEEDS = st.integers(0, 2**32)


def random_case(rng):
    """Weights, a budget below, at or above the number of problems, and tight bounds."""
    size = rng.choice([1, 2, 3, 5, 12])
    w = WEIGHTS[rng.choice(list(WEIGHTS))](rng, size)
    low = rng.integers(0, rng.choice([0, 1, 4]) + 1, size)
    high = low + rng.integers(0, rng.choice([0, 2, 99]) + 1, size)

    most = rng.choice([size - 1, size, size + 1, 20 * size])
    budget = rng.integers(low.sum(), max(low.sum(), most) + 1)
    return w, int(min(budget, high.sum())), low, high


def random_cases(seed):
    rng = np.random.default_rng(seed)
    return [random_case(rng) for _ in range(10)]


# ---- The optimum


def test_the_worked_example_of_the_docstring_holds():
    assert doctest.testmod(allocator) == (0, 2)


@settings(max_examples=150, deadline=None)
@given(SEEDS, st.integers(1, 4), st.integers(0, 9), st.sampled_from(list(WEIGHTS)))
@example(seed=3, size=3, budget=2, kind="12 orders")  # floats lose the least weight
def test_no_other_way_to_spend_the_budget_is_better(seed, size, budget, kind):
    rng = np.random.default_rng(seed)
    w = WEIGHTS[kind](rng, size)
    low = rng.integers(0, budget // size + 1, size)
    high = low + rng.integers(0, 9, size)
    high[0] = budget
    counts = allocate(w, budget, minimum=low, maximum=high)

    ways = np.array(list(compositions(budget, size)))
    inside = ways[((low <= ways) & (ways <= high)).all(1)]
    least_unserved, least = min(cost(way, w) for way in inside)
    unserved, spent = cost(counts, w)
    assert counts.sum() == budget
    assert unserved == least_unserved and spent <= least * (1 + Fraction(1, 10**12))


@settings(max_examples=250, deadline=None)
@given(SEEDS)
def test_the_answer_is_that_of_one_response_at_a_time_from_a_heap(seed):
    for w, budget, low, high in random_cases(seed):
        counts = allocate(w, budget, minimum=low, maximum=high)
        assert counts.dtype == np.int64
        assert counts.tolist() == heap_greedy(w, budget, low, high)


@settings(max_examples=250, deadline=None)
@given(SEEDS)
def test_no_move_of_one_response_to_another_problem_helps(seed):
    for w, budget, low, high in random_cases(seed):
        counts = allocate(w, budget, minimum=low, maximum=high)
        assert counts.sum() == budget
        assert (low <= counts).all() and (counts <= high).all()

        last, following = last_and_next_gains(w, counts)
        gives, takes = (counts > low) & (w > 0), (counts < high) & (w > 0)
        if gives.any() and takes.any():
            assert following[takes].max() <= last[gives].min() * (1 + 1e-12)


@pytest.mark.parametrize("kind", ["a pilot's", "12 orders", "equal"])
def test_no_move_helps_among_a_million_problems_either(kind):
    rng, size = np.random.default_rng(0), 10**6
    w = weights(rng.beta(0.65, 1.4, size), rng.lognormal(0, 0.5, size))
    w = w if kind == "a pilot's" else WEIGHTS[kind](rng, size)
    counts = allocate(w, 8 * size + 7)
    assert counts.sum() == 8 * size + 7 and counts.min() >= 1

    last, following = last_and_next_gains(w, counts)
    assert following.max() <= last[counts > 1].min() * (1 + 1e-12)


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_problems_without_weight_get_only_what_nobody_else_can_take(seed):
    for w, budget, low, high in random_cases(seed):
        counts = allocate(w, budget, minimum=low, maximum=high)
        idle = w == 0
        assert (counts == low)[idle].all() or (counts == high)[~idle].all()
        if (counts[~idle & (high > 0)] == 0).any():
            assert (counts <= np.maximum(low, 1)).all()


def test_what_the_others_cannot_take_is_split_evenly_among_problems_without_weight():
    counts = allocate([0, 5, 0, 1, 0], 12, maximum=[9, 2, 9, 2, 9])
    assert counts.tolist() == [3, 2, 3, 2, 2]
    counts = allocate([0, 5, 0], 9, minimum=[0, 0, 4], maximum=[9, 2, 9])
    assert counts.tolist() == [3, 2, 4]


def test_a_budget_below_the_number_of_problems_serves_the_largest_weights():
    assert allocate([3, 1, 5, 2, 0], 3).tolist() == [1, 0, 1, 1, 0]
    assert allocate([3, 1, 5, 2, 0], 4).tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("size, budget", [(1, 0), (1, 7), (5, 3), (5, 5), (5, 17)])
def test_ties_go_to_the_lower_index_and_no_weight_at_all_means_uniform(size, budget):
    even = [budget // size + (i < budget % size) for i in range(size)]
    assert allocate(np.full(size, 0.7), budget).tolist() == even
    assert allocate(np.zeros(size), budget).tolist() == even


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_permuting_the_problems_permutes_the_answer_up_to_ties(seed):
    rng = np.random.default_rng(seed)
    for w, budget, low, high in random_cases(seed):
        order = rng.permutation(w.size)
        once = allocate(w, budget, minimum=low, maximum=high)
        again = allocate(w[order], budget, minimum=low[order], maximum=high[order])
        costs = np.array([cost(once, w), cost(again, w[order])], float)
        np.testing.assert_allclose(costs[0], costs[1], rtol=1e-12)
        if len(set(w)) == w.size and bound(w, once) < np.inf:
            assert again.tolist() == once[order].tolist()


def test_the_scale_of_the_weights_does_not_matter_and_extremes_do_not_overflow():
    w = np.array([1.0, 2.0, 3.0, 1e-12])
    expected = allocate(w, 50).tolist()
    for power in (-150, -40, 40, 150):
        assert allocate(np.ldexp(w, power), 50).tolist() == expected
    assert allocate([1e-59, 1e59], 10**9).tolist() == [1, 10**9 - 1]


def test_another_rule_is_another_weight():
    rates = np.array([0.0, 0.5, 0.75, 1.0])
    assert allocate(1 - rates, 14).tolist() == [8, 4, 2, 0]
    assert allocate(rates, 9).tolist() == [0, 2, 3, 4]


def test_the_arguments_are_left_as_they_were():
    w, low, high = np.ones(3), np.zeros(3), np.full(3, 9.0)
    allocate(w, 2, minimum=low, maximum=high)
    assert w.tolist() == [1, 1, 1] and low.tolist() == [0, 0, 0]
    assert high.tolist() == [9, 9, 9]


# ---- The weights and the bound


@pytest.mark.parametrize("alpha, beta", [(0, 2), (1e-3, 2), (0.1, 2.3), (1e-3, 5)])
def test_squared_weights_are_the_coefficients_of_eq_7(alpha, beta):
    rates, norms = np.array([1 / 64, 0.3, 1.0]), np.array([1.0, 2.0, 0.5])
    coefficients = 1 / (1 + alpha / rates**beta) * norms**2 / rates
    w = weights(rates, norms, alpha=alpha, beta=beta)
    np.testing.assert_allclose(w**2, coefficients, rtol=1e-12)


def test_problems_never_solved_or_without_a_gradient_weigh_nothing():
    w = weights([0, 0.5, 0.5], [1, 0, 1])
    assert w[:2].tolist() == [0, 0]
    assert allocate(w, 8).tolist() == [0, 0, 8]


@pytest.mark.parametrize("alpha", [0, 1e-3])
@pytest.mark.parametrize("beta", [2, 3.5, 9])
def test_no_accept_rate_is_too_small_for_a_weight(alpha, beta):
    w = weights([5e-324, 1e-200, 1e-25, 1.0], np.ones(4), alpha=alpha, beta=beta)
    assert np.isfinite(w).all() and allocate(w, 9).sum() == 9


def test_harder_problems_get_more_until_they_are_hopeless():
    counts = allocate(weights([1.0, 0.25, 0.04, 1e-4], np.ones(4)), 1000)
    assert counts[0] < counts[1] < counts[2] > counts[3]


def test_the_bound_is_a_sum_over_problems_with_weight_and_infinite_without_a_response():
    w = weights([0.25, 1.0, 0.0], [1.0, 3.0, 1.0], alpha=0)
    assert bound(w, [4, 3, 0]) == 4 / 4 + 9 / 3
    assert bound(w, [4, 0, 3]) == np.inf
    assert bound([0, 0], [0, 5]) == 0


def test_integers_cost_at_most_a_percent_more_than_the_reals_of_proposition_1():
    rng = np.random.default_rng(0)
    w = weights(rng.beta(0.65, 1.4, 128), rng.lognormal(0, 0.5, 128))
    reals = w.sum() ** 2 / 1024  # Σ wᵢ²/nᵢ at nᵢ = N wᵢ / Σₗ wₗ
    assert reals <= bound(w, allocate(w, 1024)) <= 1.01 * reals


# ---- Pilots


def test_an_estimate_without_prior_is_the_papers():
    rates, norms = estimate([0, 2, 8], [8, 8, 8], [np.nan, 1.0, 3.0], prior=0)
    assert rates.tolist() == [0, 0.25, 1] and norms[1:].tolist() == [1, 3]
    assert weights(rates, norms)[0] == 0  # what failed is dropped, whatever its norm


def test_a_prior_pulls_towards_the_accept_rate_of_the_batch():
    rates, _ = estimate([0, 4], [4, 4], [np.nan, 1.0], prior=4)
    assert rates.tolist() == [0.25, 0.75]


def test_an_unsolved_problem_has_the_norm_of_a_softmax_at_its_rate():
    measured = [np.nan, 6.0, 8.0, 1.0, np.nan]
    rates, norms = estimate([0, 1, 1, 4, 0], [4] * 5, measured)
    scale = (6 + 8 + 1) / (1 - rates[1:4]).sum()
    expected = [scale * (1 - rates[0]), 6, 8, 1, scale * (1 - rates[4])]
    np.testing.assert_allclose(norms, expected)


def test_a_batch_in_which_nothing_is_solved_has_norms_of_one_and_a_uniform_budget():
    rates, norms = estimate([0, 0], [8, 8], [np.nan, np.nan])
    assert rates.tolist() == [0, 0] and norms.tolist() == [1, 1]
    w = weights(rates, norms)
    assert allocate(w, 16).tolist() == [8, 8] and bound(w, [8, 8]) == 0


def test_an_estimate_stays_finite_where_all_pilots_but_one_problems_are_accepted():
    rates, norms = estimate([0, 8, 8], [8] * 3, [np.nan, 1e-3, 1e-3], prior=0)
    assert rates.tolist() == [0, 1, 1] and norms[0] == 1  # 1e-3 / max(1 - 1, 1e-3)


@pytest.mark.parametrize("pilots", [1, 2, 4])
def test_one_pilot_is_enough_to_find_the_few_unsolved_problems(pilots):
    rng = np.random.default_rng(0)
    rates = np.where(np.arange(64) < 60, 0.99, 0.05)
    accepted = rng.binomial(pilots, rates)
    assert not accepted[60:].any()

    norms = (1 - rates) * rng.lognormal(0, 0.5, 64)
    w = weights(*estimate(accepted, np.full(64, pilots), norms))
    counts = allocate(w, 4 * 64 + 64 * pilots, minimum=pilots)
    assert counts[60:].min() > 5 * np.median(counts)


# ---- What a small pilot costs

RATES = {  # parameters of a Beta distribution
    "long tail": (0.65, 1.4),
    "U-shaped": (0.3, 0.5),
    "hard": (0.3, 3.0),
    "easy": (3.0, 0.6),
}


def draw_problems(shape, rng):
    """True accept rates and norms, which fall as 1 - p."""
    rates = rng.beta(*RATES[shape], 256)
    return rates, (1 - rates) * rng.lognormal(0, 0.2, 256)


def draw_pilots(rates, norms, pilots, rng):
    """How many are accepted, and the root mean square of their scattered norms."""
    accepted = rng.random((256, pilots)) < rates[:, None]
    squares = norms[:, None] ** 2 * rng.lognormal(-0.5, 1.0, accepted.shape)
    mean = (squares * accepted).sum(1) / np.maximum(accepted.sum(1), 1)
    return accepted.sum(1), np.where(accepted.any(1), np.sqrt(mean), np.nan)


def simulate(shape, pilots, *, prior=1, reuse=None, each=8, batches=10):
    """The bound over the uniform budget's, and the share of problems it leaves out.

    reuse None: the pilots are free. Otherwise they are paid out of each problem's
    responses, and trained on or thrown away. A dropped problem is let off with one.
    """
    rng, rows = np.random.default_rng(0), []
    for _ in range(batches):
        rates, norms = draw_problems(shape, rng)
        guess = rates, norms
        if pilots:
            accepted, measured = draw_pilots(rates, norms, pilots, rng)
            guess = estimate(accepted, np.full(256, pilots), measured, prior)

        budget = 256 * (each - pilots if reuse is False else each)
        counts = allocate(weights(*guess), budget, minimum=pilots if reuse else 0)
        w = weights(rates, norms)
        ratio = bound(w, np.maximum(counts, 1)) / bound(w, np.full(256, each))
        rows.append([ratio, (counts == 0).mean()])
    return np.mean(rows, 0)


@pytest.mark.parametrize("pilots", [2, 4, 8, 16])
@pytest.mark.parametrize("shape", RATES)
def test_a_smoothed_pilot_lies_between_the_truth_and_the_papers_pilot(shape, pilots):
    best, _ = simulate(shape, 0)
    smoothed, dropped = simulate(shape, pilots)
    papers, papers_dropped = simulate(shape, pilots, prior=0)
    assert best < 0.9 and dropped == 0
    assert best < smoothed < min(papers + 0.03, 1.15)
    if shape != "easy":
        assert papers > 2 and papers_dropped > 0.1  # dropped problems are what costs


@pytest.mark.parametrize("shape", ["long tail", "U-shaped", "easy"])
@pytest.mark.parametrize("each, pilots", [(8, 4), (16, 8), (32, 16)])
def test_a_reused_pilot_beats_uniform_at_equal_cost_and_a_discarded_one_does_not(
    shape, each, pilots
):
    reused, _ = simulate(shape, pilots, reuse=True, each=each)
    discarded, _ = simulate(shape, pilots, reuse=False, each=each)
    assert reused < min(0.95, 0.8 * discarded)
    assert (discarded > 1.3) == (shape != "easy")  # sure problems have small gradients


# ---- Bad input, and the source


def complaint(function, *arguments, **options):
    with pytest.raises(ValueError) as error:
        function(*arguments, **options)
    return str(error.value)


@pytest.mark.parametrize(
    "rates, norms, options, named",
    [
        ([0.5, 1.5, np.nan], 1, {}, "accept_rates[1]"),
        ([0.5, 0.5, -0.1], 1, {}, "accept_rates[2]"),
        ([np.nan, 0.5, 0.5], 1, {}, "accept_rates[0]"),
        ([[0.5, 0.5]], 1, {}, "accept_rates["),
        ([0.5] * 3, [1, np.nan, 1], {}, "grad_norms[1]"),
        ([0.5] * 3, [1, 1, np.inf], {}, "grad_norms[2]"),
        ([0.5] * 3, [-1, 1, 1], {}, "grad_norms[0]"),
        ([0.5] * 3, [1, 1], {}, "grad_norms[2]"),
        ([0.5] * 3, [1, 1, 1, 1], {}, "grad_norms[3]"),
        ([0.5] * 3, 1, {"alpha": -1e-3}, "alpha"),
        ([0.5] * 3, 1, {"alpha": np.nan}, "alpha"),
        ([0.5] * 3, 1, {"beta": 1.9}, "beta"),
        ([0.5] * 3, 1, {"beta": np.inf}, "beta"),
    ],
)
def test_bad_rates_and_norms_are_named_with_their_first_offending_index(
    rates, norms, options, named
):
    assert complaint(weights, rates, norms, **options).startswith(named)


@pytest.mark.parametrize(
    "w, budget, options, named",
    [
        ([1, np.nan, -1], 12, {}, "weights[1]"),
        ([[1, 1]], 12, {}, "weights["),
        ([1, 1, 1], -1, {}, "budget"),
        ([1, 1, 1], 12.5, {}, "budget"),
        ([1, 1, 1], np.nan, {}, "budget"),
        ([1], 10**9 + 1, {}, "budget"),
        ([1, 1, 1], 12, {"minimum": 5}, "budget"),
        ([1, 1, 1], 12, {"maximum": 3}, "budget"),
        ([1, 1, 1], 12, {"minimum": -1}, "minimum[0]"),
        ([1, 1, 1], 12, {"minimum": [0, 0.5, 0]}, "minimum[1]"),
        ([1, 1, 1], 12, {"minimum": [0, 0]}, "minimum[2]"),
        ([1, 1, 1], 12, {"maximum": [9, 9, 9.5]}, "maximum[2]"),
        ([1, 1, 1], 12, {"minimum": [0, 2, 2], "maximum": [9, 9, 1]}, "maximum[2]"),
    ],
)
def test_a_bad_budget_or_bound_is_named(w, budget, options, named):
    assert complaint(allocate, w, budget, **options).startswith(named)


def test_a_complaint_says_what_would_do():
    said = complaint(allocate, [1, 1, 1], 12, minimum=5)
    assert said == "budget[0] = 12.0; nearest allowed: 15.0"
    said = complaint(weights, [0.5, 1.5], 1)
    assert said == "accept_rates[1] = 1.5; nearest allowed: 1.0"


@pytest.mark.parametrize(
    "change, named",
    [
        ({"accepted": [9, 1]}, "accepted[0]"),
        ({"drawn": [8, 0]}, "drawn[1]"),
        ({"grad_norms": [1, np.nan]}, "grad_norms[1]"),
        ({"grad_norms": [1]}, "grad_norms[1]"),
        ({"prior": -1}, "prior"),
    ],
)
def test_a_bad_pilot_is_named(change, named):
    pilot = {"accepted": [1, 1], "drawn": [8, 8], "grad_norms": [1, 1]} | change
    assert complaint(estimate, **pilot).startswith(named)


def test_counts_below_zero_are_named():
    assert complaint(bound, [1, 1, 1], [1, -1, 1]).startswith("counts[1]")


@pytest.mark.parametrize("tag", ["Lemma 1", "Eq. 7", "Prop. 1", "Algorithm 2"])
def test_each_equation_is_named_on_the_line_that_computes_it(tag):
    lines = Path(allocator.__file__).read_text(encoding="utf-8").splitlines()
    code = [line for line in lines if "  # " in line and tag in line.split("  # ")[1]]
    assert len(code) == 1
