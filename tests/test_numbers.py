"""The scripts' numbers against hand-made ones, autograd and float64 references."""

import copy
import math
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, random_model

import gvm_grpo
import gvm_raft
import raft
from allocator import allocate, bound, estimate, weights
from gvm_raft import Config, Problem, Response

ONE_UPDATE = {"updates_per_step": 1, "max_grad_norm": math.inf}  # of all, unclipped
CONFIG = Config(**ONE_UPDATE)
COUNTS = [3, 1, 2, 4]  # responses to each of the problems of an update


def flat(lists):
    return list(chain(*lists))


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---- Advantages


@pytest.mark.parametrize("script", [raft, gvm_raft])
def test_raft_weighs_accepted_responses_alike_and_others_not_at_all(script):
    found = [script.advantages(np.array(r)) for r in ([1.0, 0, 1, 1], [0.0, 0], [1.0])]
    expected = [[1 / 3, 0, 1 / 3, 1 / 3], [0, 0], [1]]
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-12)


def test_grpo_weighs_by_the_distance_from_the_mean_in_standard_deviations():
    std = math.sqrt(3) / 4
    cases = [
        ([1.0, 0, 1, 0], [1 / 4, -1 / 4, 1 / 4, -1 / 4]),
        ([1.0, 0, 0, 0], [0.75 / std / 4] + [-0.25 / std / 4] * 3),
        ([0.0, 0], [0, 0]),
        ([1.0, 1], [0, 0]),
        ([1.0], [0]),
    ]
    for rewards, expected in cases:
        with np.errstate(all="raise"):
            found = gvm_grpo.advantages(np.array(rewards))
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("script", [raft, gvm_raft, gvm_grpo])
@pytest.mark.parametrize("rewards", [[0.0], [1.0], [0.0] * 3, [1.0] * 3, [1.0, 0.0]])
def test_advantages_are_finite_in_degenerate_groups(script, rewards):
    with np.errstate(all="raise"):
        found = script.advantages(np.array(rewards))
    assert np.isfinite(found).all() and len(found) == len(rewards)


# ---- Loss


@pytest.mark.parametrize(
    ("ratio", "weight", "loss", "slope"),
    [
        (1.0, 0.5, -0.5, -0.5),  # on-policy: the gradient is not zero
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 1.0, -1.28, 0.0),  # clipped from above
        (0.5, 1.0, -0.5, -0.5),  # min() leaves what pushes back
        (0.5, -1.0, 0.8, 0.0),  # clipped from below
        (1.5, -1.0, 1.5, 1.5),
        (0.9, 0.0, 0.0, 0.0),
    ],
)
def test_loss_of_a_token_is_clipped_where_the_paper_says(ratio, weight, loss, slope):
    logp = torch.tensor([-1 + math.log(ratio)], dtype=torch.float64, requires_grad=True)
    old, cfg = torch.tensor([-1.0]).double(), Config(clip_low=0.2, clip_high=0.28)
    value = gvm_raft.policy_loss(logp, old, weight, cfg)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert logp.grad.item() == pytest.approx(slope, abs=1e-12)


# ---- Batches


def random_response(rng, i=0):
    prompt, length = rng.integers(1, 9), rng.integers(1, 13)
    ids = rng.integers(VOCABULARY, size=prompt + length).tolist()
    response = Response(i, ids[:prompt], 0, ids[prompt:], [0.0] * int(length))
    response.reward = float(rng.random() < 0.5)
    return response


def test_an_epoch_shows_every_problem_once_in_an_order_of_its_own():
    problems = [Problem(i, [0], "") for i in range(23)]

    def steps(cfg):
        drawn = [raft.next_problems(problems, step, cfg) for step in range(8)]
        return [[problem.index for problem in batch] for batch in drawn]

    found = steps(Config(problems_per_step=5))
    first, second = flat(found[:4]), flat(found[4:])
    assert len(set(first)) == len(set(second)) == 20 and first != second
    assert steps(Config(problems_per_step=5)) == found
    assert steps(Config(problems_per_step=5, seed=1))[0] != found[0]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("limit", [1, 64, 4096])
def test_micro_batches_share_all_responses_within_the_limit(
    monkeypatch, world, count, limit
):
    rng, cfg = np.random.default_rng(count), Config(tokens_per_batch=limit)
    responses = [random_response(rng) for _ in range(count)]
    monkeypatch.setattr(gvm_raft, "WORLD", world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(gvm_raft, "RANK", rank)
        shares.append(gvm_raft.micro_batches(responses, cfg))
    assert len(set(map(len, shares))) == 1  # the ranks step together
    micros = flat(shares)
    assert sorted(map(id, flat(micros))) == sorted(map(id, responses))
    for micro in micros:
        assert len(micro) < 2 or len(micro) * max(map(len, micro)) <= limit


# ---- Updates


def logprobs(model, response, temperature=1.0):
    """Log-probabilities [T] of one response, by a plain forward pass."""
    ids = torch.tensor([response.prompt_ids + response.token_ids])
    logit_TV = model(ids).logits[0, len(response.prompt_ids) - 1 : -1] / temperature
    targets = torch.tensor(response.token_ids)[:, None]
    return logit_TV.log_softmax(-1).gather(-1, targets)[:, 0]


def autograd(value, model):
    """The gradient of a number, all parameters in one vector."""
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(value, model.parameters())]
    )


@pytest.fixture(scope="module")
def plain():
    return random_model().double()


@pytest.fixture(scope="module")
def start():
    """Another model, to diverge from."""
    return random_model(noise=0.1)


@pytest.fixture(scope="module")
def policy(process_group, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    random_model().save_pretrained(folder)
    return gvm_raft.load_policy(folder, CONFIG)


@pytest.fixture
def groups(plain):
    """Responses of several lengths, COUNTS of them; some accepted, some not."""
    rng = np.random.default_rng(3)
    groups = [[random_response(rng, i) for _ in range(n)] for i, n in enumerate(COUNTS)]
    for response in flat(groups):
        response.logprobs = logprobs(plain, response).float().tolist()
    accepted = [sum(r.reward for r in group) for group in groups]
    assert min(accepted) == 0 < max(accepted)
    return groups


def off_policy(groups):
    """The same responses, drawn by a somewhat different policy."""
    rng = np.random.default_rng(5)
    for response in flat(groups):
        shift = rng.normal(0, 0.3, len(response.logprobs))
        response.logprobs = (np.array(response.logprobs, "f4") + shift).tolist()
    return groups


class Recorder:
    """An optimiser that keeps the gradients instead of following them."""

    def __init__(self, policy):
        self.policy, self.gradients = policy, []

    def step(self):
        parts = [p.grad.full_tensor().flatten() for p in self.policy.parameters()]
        self.gradients.append(torch.cat(parts))

    def zero_grad(self):
        self.policy.zero_grad()


@pytest.fixture
def gradient(policy):
    """The unclipped gradient of one update, and its metrics."""

    def gradient(groups, cfg=CONFIG, script=gvm_raft, reference=None):
        recorder = Recorder(policy)
        metrics = script.update(policy, reference, recorder, groups, cfg)
        (found,) = recorder.gradients
        return found, metrics

    return gradient


@pytest.mark.parametrize("script", [gvm_raft, gvm_grpo])
@pytest.mark.parametrize("tokens", [1, 30, 100])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_the_gradient_does_not_depend_on_the_micro_batches(
    gradient, groups, start, script, tokens, kl_coef
):
    groups, reference = off_policy(groups), start if kl_coef else None
    cfg = script.Config(**ONE_UPDATE, kl_coef=kl_coef)
    whole, metrics = gradient(groups, cfg, script, reference)
    cut = replace(cfg, tokens_per_batch=tokens)
    split, again = gradient(groups, cut, script, reference)
    assert relative(split, whole) < 1e-6
    assert again == pytest.approx(metrics, rel=1e-5)


def test_the_gradient_is_that_of_algorithm_1(gradient, groups, plain):
    found, metrics = gradient(groups)
    total, lengths = 0, []
    for group in groups:
        accepted = [r for r in group if r.reward]
        lengths += [len(r.token_ids) for r in accepted]
        for response in accepted:
            # Σᵢ 1/|Dᵢ| Σ log P(y), over m problems
            total -= logprobs(plain, response).sum() / len(accepted) / len(groups)
    expected = autograd(total, plain) / np.mean(lengths)
    assert relative(found, expected) < 1e-5
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-5)
    assert metrics["logp_shift"] < 1e-5 and metrics["kl"] == 0


@pytest.mark.parametrize("script", [gvm_raft, gvm_grpo])
@pytest.mark.parametrize(
    ("temperature", "kl_coef"), [(1.0, 0.0), (0.8, 0.0), (0.8, 0.3)]
)
def test_the_gradient_is_that_of_the_clipped_objective(
    gradient, groups, plain, start, script, temperature, kl_coef
):
    settings = {"temperature": temperature, "kl_coef": kl_coef}
    cfg = script.Config(**ONE_UPDATE, **settings)
    reference, start64 = start if kl_coef else None, copy.deepcopy(start).double()
    found, metrics = gradient(off_policy(groups), cfg, script, reference)
    objective, kl, lengths, shifts, clipped = 0, 0, [], [], 0
    for group in groups:
        values = script.advantages(np.array([r.reward for r in group]))
        for response, value in zip(group, values / len(groups)):
            if value == 0 and kl_coef == 0:
                continue
            lengths.append(len(response.token_ids))
            logp_T = logprobs(plain, response, temperature)
            old_T = torch.tensor(response.logprobs, dtype=torch.float64)
            ratio_T = (logp_T - old_T).exp()
            bounded_T = ratio_T.clamp(0.8, 1.28)
            objective += torch.minimum(ratio_T * value, bounded_T * value).sum()
            gap_T = logprobs(start64, response, temperature).detach() - logp_T
            kl += (gap_T.exp() - 1 - gap_T).sum()
            shifts += (logp_T - old_T).abs().tolist()
            clipped += (ratio_T != bounded_T).sum().item()
    loss, kl = -objective / np.mean(lengths), kl / sum(lengths)
    assert clipped >= 3
    assert relative(found, autograd(loss + kl_coef * kl, plain)) < 2e-6
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
    assert metrics["kl"] == pytest.approx(kl.item() if kl_coef else 0, rel=1e-3)
    assert metrics["logp_shift"] == pytest.approx(np.mean(shifts), rel=1e-5)


@pytest.mark.parametrize("script", [gvm_raft, gvm_grpo])
def test_where_nothing_is_accepted_the_gradient_is_the_divergences(
    gradient, groups, plain, start, script
):
    cfg = script.Config(**ONE_UPDATE, kl_coef=1.0)
    start64 = copy.deepcopy(start).double()
    kl, tokens = 0, 0
    for response in flat(off_policy(groups)):
        response.reward = 0.0
        logp_T = logprobs(plain, response)
        gap_T = logprobs(start64, response).detach() - logp_T
        kl += (gap_T.exp() - 1 - gap_T).sum()
        tokens += len(response.token_ids)
    found, metrics = gradient(groups, cfg, script, start)
    assert relative(found, autograd(kl / tokens, plain)) < 1e-5
    assert metrics["kl"] == pytest.approx((kl / tokens).item(), rel=1e-3)
    assert metrics["loss"] == 0


@pytest.mark.parametrize("script", [gvm_raft, gvm_grpo])
def test_a_truncated_response_teaches_nothing(gradient, groups, script):
    groups[0][0].reward, groups[0][1].reward = 0.0, 1.0
    cut = copy.deepcopy(groups)
    cut[0][0].truncated = True  # a wrong one: it has a weight in GRPO only
    for response, again in zip(flat(groups), flat(cut)):
        response.logprobs = again.logprobs = [x + 0.1 for x in response.logprobs]
    whole, _ = gradient(groups, CONFIG, script)
    found, _ = gradient(cut, CONFIG, script)
    assert cut[0][0].advantage == 0
    assert (relative(found, whole) > 1e-3) == (script is gvm_grpo)
    assert cut[0][1].advantage == groups[0][1].advantage  # the others keep theirs


def test_a_part_in_which_nothing_is_accepted_makes_no_update(policy, groups):
    for response in flat(groups):
        response.reward = 0.0
    recorder, cfg = Recorder(policy), Config(updates_per_step=2)
    metrics = gvm_raft.update(policy, None, recorder, groups, cfg)
    assert metrics["updates"] == 0 and metrics["loss"] == 0
    assert recorder.gradients == []
    groups[0][0].reward = 1.0
    metrics = gvm_raft.update(policy, None, recorder, groups, cfg)
    assert metrics["updates"] == len(recorder.gradients) == 1


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_every_part_of_the_problems_makes_an_update(policy, groups, updates):
    for group in groups:
        group[0].reward = 1.0
    recorder = Recorder(policy)
    cfg = Config(updates_per_step=updates, max_grad_norm=1e-3)
    metrics = gvm_raft.update(policy, None, recorder, groups, cfg)
    assert metrics["updates"] == len(recorder.gradients) == updates
    norms = [gradient.norm().item() for gradient in recorder.gradients]
    assert norms == pytest.approx([1e-3] * updates, rel=1e-3)  # clipped


# ---- Policy


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_padding_and_temperature_leave_the_log_probabilities_right(
    policy, groups, plain, temperature
):
    responses, cfg = flat(groups), Config(temperature=temperature)
    found = gvm_raft.token_logprobs(policy, responses, cfg)
    assert len({len(r) for r in responses}) > 2  # some are padded
    for logp_T, response in zip(found, responses, strict=True):
        expected_T = logprobs(plain, response, temperature)
        torch.testing.assert_close(logp_T.double(), expected_T, rtol=0, atol=1e-5)


# ---- Gradient norms of the output head


def head_norm(model, response, temperature):
    """||∇ log P(y)|| by the output head alone, by autograd in float64."""
    exact = copy.deepcopy(model).double()
    head = exact.get_output_embeddings().weight
    ids = torch.tensor([response.prompt_ids + response.token_ids])
    states = exact(ids, output_hidden_states=True).hidden_states[-1][0]
    hidden_TD = states[len(response.prompt_ids) - 1 : -1].detach()
    logp_TV = (hidden_TD @ head.T / temperature).log_softmax(-1)
    total = logp_TV.gather(-1, torch.tensor(response.token_ids)[:, None]).sum()
    return torch.autograd.grad(total, head)[0].norm().item()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [1, 40, 4096])
def test_gradient_norms_equal_autograd_in_float64(process_group, tied, tokens):
    model, rng = random_model(tied), np.random.default_rng(0)
    cfg = Config(temperature=0.8, tokens_per_batch=tokens)
    groups = [[random_response(rng, i) for _ in range(i % 4)] for i in range(12)]
    found = gvm_raft.gradient_norms(model, groups, cfg)
    for group, norm in zip(groups, found, strict=True):
        norms = [head_norm(model, r, 0.8) for r in group if r.reward]
        expected = math.sqrt(np.mean(np.square(norms))) if norms else 0
        assert norm == pytest.approx(expected, rel=1e-5)
    assert (found > 0).any() and (found == 0).any()  # both kinds are there


def test_gradient_norms_of_sure_tokens_are_good_enough_for_a_budget(process_group):
    """1 - p loses digits in float32, but then the norm is small, too."""
    gaps = []
    for scale in (10, 30, 50, 100):
        model = random_model()
        model.lm_head.weight.data *= scale
        for seed in range(8):
            response = likeliest(model, random_response(np.random.default_rng(seed)))
            exact = copy.deepcopy(model).double()
            gap = 1 - logprobs(exact, response).exp().min().item()
            (norm,) = gvm_raft.gradient_norms(model, [[response]], Config())
            expected = head_norm(model, response, 1.0)
            assert norm == pytest.approx(expected, rel=4e-3, abs=1e-5)
            if gap > 1e-4:
                assert norm == pytest.approx(expected, rel=4e-3)
            gaps.append(gap)
    assert min(gaps) < 1e-5 and np.median(gaps) > 1e-4  # sure ones and others


def likeliest(model, response):
    """The response with the model's likeliest tokens, accepted."""
    length, response.token_ids = len(response.token_ids), []
    with torch.no_grad():
        for _ in range(length):
            ids = torch.tensor([response.prompt_ids + response.token_ids])
            response.token_ids.append(model(ids).logits[0, -1].argmax().item())
    response.reward = 1.0
    return response


# ---- Budget


@pytest.mark.parametrize("reuse", [True, False])
def test_the_budget_is_proposition_1_of_the_pilots(
    monkeypatch, policy, plain, process_group, reuse
):
    cfg = Config(pilot_samples=3, samples_per_problem=6, reuse_pilot=reuse)
    rng = np.random.default_rng(0)
    batch = [Problem(i, [0], "") for i in range(4)]
    pilots = [[random_response(rng, i) for _ in range(3)] for i in range(4)]
    for response in pilots[2]:
        response.reward = 0.0
    streams = []

    def sample(batch, counts, sampler, progress, cfg, stream):
        streams.append((list(counts), stream))
        return pilots

    monkeypatch.setattr(gvm_raft, "sample", sample)
    counts, kept, metrics = gvm_raft.choose_counts(batch, policy, None, {}, cfg)
    assert streams == [([3] * 4, "train" if reuse else "pilot")]

    accepted = [sum(r.reward for r in group) for group in pilots]
    norms = []
    for group in pilots:
        found = [head_norm(plain, r, 1.0) for r in group if r.reward]
        norms.append(math.sqrt(np.mean(np.square(found))) if found else 0)
    assert min(accepted) == 0 < max(accepted)  # both kinds are there
    rates, norms = estimate(accepted, [3] * 4, norms, cfg.prior)
    w = weights(rates, norms, alpha=cfg.alpha, beta=cfg.beta)
    expected = allocate(w, 24, minimum=3 if reuse else 0)
    assert list(counts) == list(expected) and sum(counts) == 24
    assert kept is (pilots if reuse else None)
    ratio = bound(w, expected) / bound(w, [6] * 4)
    assert 0 < metrics["bound"] == pytest.approx(ratio, rel=1e-4)
    np.testing.assert_allclose(metrics["rates"], rates)
    np.testing.assert_allclose(metrics["norms"], norms, rtol=1e-4)


def test_pilots_of_which_none_is_accepted_leave_a_budget(monkeypatch, policy):
    """Without a prior all weights are 0: there is nothing to compare."""
    batch = [Problem(i, [0], "") for i in range(4)]
    pilots = [[Response(i, [1], 0, [2], [0.0])] for i in range(4)]
    monkeypatch.setattr(gvm_raft, "sample", lambda *_, **__: pilots)
    cfg = Config(pilot_samples=1, prior=0.0, samples_per_problem=3)
    with np.errstate(all="raise"):
        counts, _, metrics = gvm_raft.choose_counts(batch, policy, None, {}, cfg)
    assert list(counts) == [3] * 4 and metrics["bound"] == 1


def test_without_pilots_the_budget_is_uniform():
    cfg, batch = Config(pilot_samples=0, samples_per_problem=5), [None] * 3
    for script in (raft, gvm_raft, gvm_grpo):
        counts, kept, metrics = script.choose_counts(batch, None, None, {}, cfg)
        assert list(counts) == [5, 5, 5] and kept is None and metrics == {}
