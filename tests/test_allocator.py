"""The budget of Prop. 1 in integers against brute force, greedy and exchange, and its edges."""

import doctest
import heapq
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import allocator
from allocator import allocate, estimate, predicted_variance, uniform, weights
from bench.pilot import SHAPES, simulate


def cost(count_P, c_P):
    """(Σ cᵢ without a response, Σ cᵢ/nᵢ over the rest): in this order, summed exactly."""
    pairs = [(Fraction(float(c)), int(n)) for c, n in zip(c_P, count_P, strict=True)]
    return sum(c for c, n in pairs if n == 0), sum(c / n for c, n in pairs if n > 0)


def compositions(total, parts):
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


def heap_greedy(c_P, budget, low_P, high_P):
    """One response at a time: first ones by cᵢ, others by gain, cᵢ = 0 last; ties by index."""

    def key(i, n):
        if c_P[i] == 0:
            return (2, n, i)
        return (0, -c_P[i], i) if n == 0 else (1, -c_P[i] / (n * (n + 1)), i)

    count_P = [int(low) for low in low_P]
    heap = [key(i, n) for i, n in enumerate(count_P) if n < high_P[i]]
    heapq.heapify(heap)
    for _ in range(int(budget) - sum(count_P)):
        i = heapq.heappop(heap)[-1]
        count_P[i] += 1
        if count_P[i] < high_P[i]:
            heapq.heappush(heap, key(i, count_P[i]))
    return count_P


NORMS = {
    "ties": lambda rng, size: rng.choice([0.0, 1.0, 1.0, 2.0, 3.0, 4.0, 6.0], size),
    "equal": lambda rng, size: np.full(size, 0.7),
    "12 orders": lambda rng, size: 10.0 ** rng.uniform(-6, 6, size),
    "close": lambda rng, size: 1 + rng.integers(0, 4, size) * 2.0**-52,
}
RATES = {
    "pilots of 64": lambda rng, size: rng.integers(0, 65, size) / 64,
    "1/64 or 1": lambda rng, size: rng.choice([1 / 64, 1.0], size),
    "any": lambda rng, size: rng.uniform(0, 1, size),
}


def case(rng):
    """Rates, norms, a budget below, at or above the number of problems, bounds that may bind."""
    size = rng.choice([1, 2, 3, 5, 12])
    rate_P = RATES[rng.choice(list(RATES))](rng, size)
    norm_P = NORMS[rng.choice(list(NORMS))](rng, size)
    low_P = rng.integers(0, rng.choice([0, 1, 4]) + 1, size)
    high_P = low_P + rng.integers(0, rng.choice([0, 2, 99]) + 1, size)
    least, most = low_P.sum(), rng.choice([size - 1, size, size + 1, 20 * size])
    budget = np.clip(rng.integers(least, max(least, most) + 1), least, high_P.sum())
    return rate_P, norm_P, int(budget), low_P, high_P


def ten_cases(seed):
    rng = np.random.default_rng(seed)
    return [case(rng) for _ in range(10)]


SEEDS = st.integers(0, 2**32)
TEN_CASES = SEEDS.map(ten_cases)


def solve(one_case, **options):
    rate_P, norm_P, budget, low_P, high_P = one_case
    count_P = allocate(rate_P, norm_P, budget, minimum=low_P, maximum=high_P, **options)
    c_P = weights(rate_P, norm_P, **options) ** 2
    return count_P, c_P, low_P, high_P


def test_the_worked_example_of_the_docstring_holds():
    assert doctest.testmod(allocator) == (0, 4)


@pytest.mark.parametrize("alpha, beta", [(0.0, 2.0), (1e-3, 2.0), (0.1, 2.3), (1e-3, 5.0)])
def test_weights_are_those_of_proposition_1(alpha, beta):
    p_P, G_P = np.array([1 / 64, 0.3, 1.0]), np.array([1.0, 2.0, 0.5])
    expected_P = G_P / np.sqrt(p_P + alpha / p_P ** (beta - 1))
    np.testing.assert_allclose(weights(p_P, G_P, alpha=alpha, beta=beta), expected_P, rtol=1e-12)


def test_problems_never_solved_or_without_a_gradient_weigh_nothing():
    assert weights([0, 0.5, 0.5], [1, 0, 1])[:2].tolist() == [0, 0]
    assert allocate([0, 0.5, 0.5], [1, 0, 1], 8).tolist() == [0, 0, 8]


@settings(max_examples=150, deadline=None)
@given(SEEDS, st.integers(1, 4), st.integers(0, 9), st.sampled_from(list(NORMS)))
@example(seed=3, size=3, budget=2, norms="12 orders")  # a float sum hides the smallest cᵢ
def test_no_composition_of_the_budget_is_better(seed, size, budget, norms):
    rng = np.random.default_rng(seed)
    norm_P = NORMS[norms](rng, size)
    low_P = rng.integers(0, budget // size + 1, size)
    high_P = low_P + rng.integers(0, 9, size)
    high_P[0] = budget
    c_P = weights(np.ones(size), norm_P) ** 2
    count_P = allocate(np.ones(size), norm_P, budget, minimum=low_P, maximum=high_P)
    inside = (
        np.array(n)
        for n in compositions(budget, size)
        if all(low <= k <= high for low, k, high in zip(low_P, n, high_P, strict=True))
    )
    assert count_P.sum() == budget
    unserved, best = cost(count_P, c_P)
    least_unserved, least = min(cost(n, c_P) for n in inside)
    assert unserved == least_unserved and best <= least * (1 + Fraction(1, 10**9))


@settings(max_examples=220, deadline=None)
@given(TEN_CASES, st.sampled_from([(0.0, 2.0), (1e-3, 2.0), (1e-3, 3.5)]))
def test_the_answer_is_that_of_greedy_one_response_at_a_time(ten_cases, alpha_beta):
    alpha, beta = alpha_beta
    for one_case in ten_cases:
        count_P, c_P, low_P, high_P = solve(one_case, alpha=alpha, beta=beta)
        assert count_P.dtype == np.int64
        assert count_P.tolist() == heap_greedy(c_P, one_case[2], low_P, high_P)


@settings(max_examples=220, deadline=None)
@given(TEN_CASES)
def test_no_move_of_one_response_helps(ten_cases):
    for one_case in ten_cases:
        n_P, c_P, low_P, high_P = solve(one_case)
        assert n_P.sum() == one_case[2] and (low_P <= n_P).all() and (n_P <= high_P).all()
        first = 1e40  # what a first response gains, times cᵢ: more than any other
        loss_P = c_P * np.where(n_P > 1, 1 / np.maximum(n_P * (n_P - 1), 1), first)
        gain_P = c_P * np.where(n_P > 0, 1 / np.maximum(n_P * (n_P + 1), 1), first)
        gives_P, takes_P = (n_P > low_P) & (c_P > 0), (n_P < high_P) & (c_P > 0)
        if gives_P.any() and takes_P.any():
            assert gain_P[takes_P].max() <= loss_P[gives_P].min() * (1 + 1e-12)


@settings(max_examples=100, deadline=None)
@given(TEN_CASES)
def test_problems_without_weight_get_only_what_nobody_else_can_take(ten_cases):
    for one_case in ten_cases:
        count_P, c_P, low_P, high_P = solve(one_case)
        idle_P = c_P == 0
        assert (count_P == low_P)[idle_P].all() or (count_P == high_P)[~idle_P].all()
        if (count_P[~idle_P & (high_P > 0)] == 0).any():
            assert (count_P <= np.maximum(low_P, 1)).all()


@pytest.mark.parametrize("budget, expected", [(3, [1, 0, 1, 1, 0]), (4, [1, 1, 1, 1, 0])])
def test_a_budget_below_the_number_of_problems_serves_the_largest_weights(budget, expected):
    assert allocate(np.ones(5), [3, 1, 5, 2, 0], budget).tolist() == expected


@settings(max_examples=50, deadline=None)
@given(TEN_CASES, SEEDS)
def test_permuting_the_problems_permutes_the_answer_up_to_ties(ten_cases, seed):
    for one_case in ten_cases:
        rate_P, norm_P, budget, low_P, high_P = one_case
        count_P, c_P, *_ = solve(one_case)
        order = np.random.default_rng(seed).permutation(len(c_P))
        shuffled = (rate_P[order], norm_P[order], budget, low_P[order], high_P[order])
        again_P, again_c_P, *_ = solve(shuffled)
        for again, once in zip(cost(again_P, again_c_P), cost(count_P, c_P), strict=True):
            assert float(again) == pytest.approx(float(once), rel=1e-12)
        if len(set(c_P)) == len(c_P):
            assert again_P.tolist() == count_P[order].tolist()


@pytest.mark.parametrize("n, budget", [(1, 0), (1, 7), (5, 3), (5, 5), (5, 17)])
def test_ties_go_to_the_lower_index_and_no_weights_at_all_means_uniform(n, budget):
    even_P = [budget // n + (i < budget % n) for i in range(n)]
    assert allocate(np.full(n, 0.3), np.full(n, 0.7), budget).tolist() == even_P
    assert allocate(np.zeros(n), np.ones(n), budget).tolist() == even_P
    assert uniform(n, budget).tolist() == even_P


def test_the_scale_of_the_norms_does_not_matter_and_extremes_do_not_overflow():
    p_P, G_P = [0.1, 0.5, 1.0, 1e-300], np.array([1.0, 2.0, 3.0, 1.0])
    expected = allocate(p_P, G_P, 50).tolist()
    for power in (-300, -40, 40, 300):
        assert allocate(p_P, np.ldexp(G_P, power), 50).tolist() == expected
    assert allocate([1.0, 1.0], [1e-90, 1e90], 2**31 - 1).tolist() == [1, 2**31 - 2]


def test_the_arguments_are_left_as_they_were():
    low_P = np.zeros(3)
    allocate(np.ones(3), np.ones(3), 2, minimum=low_P)
    assert low_P.tolist() == [0, 0, 0]


OK = {"accept_rate_P": [0.5, 0.5, 0.5], "grad_norm_P": [1.0, 1.0, 1.0], "budget": 12}


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"accept_rate_P": [0.5, 1.5, np.nan]}, r"accept_rate_P\[1\]"),
        ({"accept_rate_P": [0.5, 0.5, -0.1]}, r"accept_rate_P\[2\]"),
        ({"accept_rate_P": [np.nan, 0.5, 0.5]}, r"accept_rate_P\[0\]"),
        ({"accept_rate_P": []}, r"accept_rate_P\[0\]"),
        ({"accept_rate_P": [[0.5, 0.5]]}, r"accept_rate_P\["),
        ({"grad_norm_P": [1, np.nan, 1]}, r"grad_norm_P\[1\]"),
        ({"grad_norm_P": [1, 1, np.inf]}, r"grad_norm_P\[2\]"),
        ({"grad_norm_P": [-1, 1, 1]}, r"grad_norm_P\[0\]"),
        ({"grad_norm_P": [1, 1]}, r"grad_norm_P\[2\]"),
        ({"grad_norm_P": [1, 1, 1, 1]}, r"grad_norm_P\[3\]"),
        ({"budget": -1}, "budget"),
        ({"budget": 12.5}, "budget"),
        ({"budget": np.nan}, "budget"),
        ({"budget": 2**31}, "budget"),
        ({"alpha": -1e-3}, "alpha"),
        ({"alpha": np.nan}, "alpha"),
        ({"beta": 1.9}, "beta"),
        ({"beta": np.inf}, "beta"),
        ({"minimum": -1}, r"minimum\[0\]"),
        ({"minimum": [0, 0.5, 0]}, r"minimum\[1\]"),
        ({"minimum": [0, 0]}, r"minimum\[2\]"),
        ({"minimum": 5}, r"minimum up to\[2\]"),
        ({"maximum": 3}, r"maximum"),
        ({"minimum": [0, 2, 2], "maximum": [9, 9, 1]}, r"maximum\[2\]"),
    ],
)
def test_bad_input_is_a_value_error_that_names_the_argument_and_the_index(change, complaint):
    arguments = OK | change
    with pytest.raises(ValueError, match=complaint):
        allocate(**arguments)


def test_predicted_variance_is_eq_7_and_infinite_without_a_response():
    p_P, G_P = [0.25, 1.0, 0.0], [1.0, 3.0, 1.0]
    assert predicted_variance([4, 3, 0], p_P, G_P, alpha=0.0) == 4 / 4 + 9 / 3
    assert predicted_variance([4, 0, 3], p_P, G_P) == np.inf
    with pytest.raises(ValueError, match=r"count_P\[1\]"):
        predicted_variance([1, -1, 1], p_P, G_P)


def test_a_pilot_estimate_without_prior_is_the_papers():
    p_P, G_P = estimate([0, 2, 8], [8, 8, 8], [np.nan, 1.0, 3.0], prior=0)
    assert p_P.tolist() == [0, 0.25, 1] and G_P[1:].tolist() == [1, 3]
    assert weights(p_P, G_P)[0] == 0  # a problem that failed is dropped, whatever its norm
    p_P, G_P = estimate([0, 0], [8, 8], [np.nan, np.nan])
    assert p_P.tolist() == [0, 0] and G_P.tolist() == [1, 1]


def test_an_unsolved_problem_has_the_norm_of_a_softmax_at_its_rate():
    p_P, G_P = estimate([0, 1, 1, 4, 0], [4] * 5, [np.nan, 6.0, 8.0, 1.0, np.nan])
    scale = (6 + 8 + 1) / (1 - p_P[1:4]).sum()
    np.testing.assert_allclose(G_P, [scale * (1 - p_P[0]), 6, 8, 1, scale * (1 - p_P[4])])


@pytest.mark.parametrize("n_pilots", [1, 2, 4])
def test_one_pilot_is_enough_to_find_the_few_unsolved_problems(n_pilots):
    rng = np.random.default_rng(0)
    true_P = np.where(np.arange(64) < 60, 0.99, 0.05)
    accepted_P = rng.binomial(n_pilots, true_P)
    assert not accepted_P[60:].any()
    p_P, G_P = estimate(accepted_P, [n_pilots] * 64, (1 - true_P) * rng.lognormal(0, 0.5, 64))
    count_P = allocate(p_P, G_P, 4 * 64 + 64 * n_pilots, minimum=n_pilots)
    assert count_P[60:].min() > 5 * np.median(count_P)


def test_an_estimate_stays_finite_where_all_pilots_but_one_problems_are_accepted():
    p_P, G_P = estimate([0, 8, 8], [8] * 3, [np.nan, 1e-3, 1e-3], prior=0)
    assert p_P.tolist() == [0, 1, 1] and np.isfinite(G_P).all()


def test_a_prior_pulls_towards_the_rate_of_the_batch():
    p_P, _ = estimate([0, 4], [4, 4], [np.nan, 1.0], prior=4)
    assert p_P.tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"accepted_P": [9, 1]}, r"accepted_P\[0\]"),
        ({"drawn_P": [8, 0]}, r"drawn_P\[1\]"),
        ({"norm_P": [1, np.nan]}, r"norm_P\[1\]"),
        ({"norm_P": [1]}, r"norm_P\[1\]"),
        ({"prior": -1}, "prior"),
    ],
)
def test_a_bad_pilot_is_a_value_error(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        estimate(**({"accepted_P": [1, 1], "drawn_P": [8, 8], "norm_P": [1, 1]} | change))


@pytest.mark.parametrize("n_pilots", [2, 4, 8, 16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_smoothed_pilot_lies_between_the_oracle_and_the_papers_pilot(shape, n_pilots):
    oracle, smoothed, papers = (
        simulate(shape, prior, n_pilots, batches=10)[0] for prior in ("oracle", 1, 0)
    )
    assert oracle[0] < smoothed[0] < min(papers[0] + 0.03, 1.15)
    assert oracle[0] < 0.9 and smoothed[2] == 0
    if shape != SHAPES["easy (3, 0.6)"]:
        assert papers[0] > 2 and papers[2] > 0.1  # dropped problems are what costs


@pytest.mark.parametrize("name", ["long tail (0.65, 1.4)", "U-shaped (0.3, 0.5)", "easy (3, 0.6)"])
@pytest.mark.parametrize("per_problem, n_pilots", [(8, 4), (16, 8), (32, 16)])
def test_a_reused_pilot_beats_uniform_at_equal_cost_and_a_discarded_one_does_not(
    name, per_problem, n_pilots
):
    options = {"per_problem": per_problem, "batches": 10}
    reused, _ = simulate(SHAPES[name], 1, n_pilots, reuse=True, **options)
    discarded, _ = simulate(SHAPES[name], 1, n_pilots, reuse=False, **options)
    assert reused[0] < min(0.95, 0.8 * discarded[0])
    assert (discarded[0] > 1.3) == (name != "easy (3, 0.6)")  # sure problems have small gradients


def test_a_million_problems_take_at_most_half_a_cpu_second():
    rng = np.random.default_rng(0)
    p_P, G_P = rng.beta(0.65, 1.4, 10**6), rng.lognormal(0, 0.5, 10**6)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        count_P = allocate(p_P, G_P, 8 * 10**6)
        seconds.append(time.process_time() - start)
    assert count_P.sum() == 8 * 10**6
    assert min(seconds) <= 0.5
