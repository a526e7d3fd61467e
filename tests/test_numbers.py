"""The numbers of the scripts against hand-made ones, autograd and plain references in float64."""

import math
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import gvm_grpo
import gvm_raft
import raft
from allocator import allocate, estimate
from gvm_raft import Config, Policy, Problem, Response

CONFIG = Config(updates_per_step=1)
COUNTS = [3, 1, 2, 4]


def flat(lists):
    return list(chain(*lists))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- Advantages


@pytest.mark.parametrize("script", [raft, gvm_raft])
@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("algorithm1", [[1 / 9, 0, 1 / 9, 1 / 9], [0, 0], [1 / 3]]),
        ("reward", [[1 / 12, 0, 1 / 12, 1 / 12], [0, 0], [1 / 3]]),
        ("token", [[1 / 4, 0, 1 / 4, 1 / 4], [0, 0], [1 / 4]]),
    ],
)
def test_raft_weighs_accepted_responses_only(script, weighting, expected):
    weight_PS = script.advantages(list(map(np.array, ([1.0, 0, 1, 1], [0.0, 0], [1.0]))), weighting)
    for weight_S, expected_S in zip(weight_PS, expected, strict=True):
        np.testing.assert_allclose(weight_S, expected_S, rtol=1e-12)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("algorithm1", [[1 / 12, -1 / 12, 1 / 12, -1 / 12], [0, 0], [0], [0, 0]]),
        ("reward", [[1 / 12, -1 / 12, 1 / 12, -1 / 12], [0, 0], [0], [0, 0]]),
        ("token", [[1 / 4, -1 / 4, 1 / 4, -1 / 4], [0, 0], [0], [0, 0]]),
    ],
)
def test_grpo_weighs_by_the_distance_from_the_mean(weighting, expected):
    reward_PS = list(map(np.array, ([1.0, 0, 1, 0], [0.0, 0], [1.0], [1.0, 1])))
    expected = [np.array(e) * (4 / 4 if weighting == "token" else 3 / 4) for e in expected]
    with np.errstate(all="raise"):
        weight_PS = gvm_grpo.advantages(reward_PS, weighting)
    for weight_S, expected_S in zip(weight_PS, expected, strict=True):
        np.testing.assert_allclose(weight_S, expected_S, rtol=1e-12)


def test_grpo_divides_by_the_standard_deviation_of_the_group():
    (weight_S,) = gvm_grpo.advantages([np.array([1.0, 0, 0, 0])], "algorithm1")
    std = math.sqrt(3) / 4
    np.testing.assert_allclose(weight_S, np.array([0.75, -0.25, -0.25, -0.25]) / std / 4)


@pytest.mark.parametrize("script", [raft, gvm_raft, gvm_grpo])
@pytest.mark.parametrize("weighting", ["algorithm1", "reward", "token"])
@pytest.mark.parametrize("reward_S", [[0.0], [1.0], [0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0]])
def test_advantages_are_finite_in_degenerate_groups(script, weighting, reward_S):
    with np.errstate(all="raise"):
        (weight_S,) = script.advantages([np.array(reward_S)], weighting)
    assert np.isfinite(weight_S).all() and len(weight_S) == len(reward_S)
    if script is gvm_grpo and len(set(reward_S)) == 1:
        assert not weight_S.any()


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
    logp = torch.tensor([-1.0 + math.log(ratio)], dtype=torch.float64, requires_grad=True)
    old, weight = torch.tensor([-1.0]).double(), torch.tensor([weight]).double()
    value = gvm_raft.policy_loss(logp, old, weight, 0.2, 0.28)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert logp.grad.item() == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 7, 8, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_do_not_depend_on_the_chunk(chunk, temperature):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11)
    hidden_KD, target_K = torch.randn(8, 6, requires_grad=True), torch.randint(11, (8,))
    logp_K, entropy_K = gvm_raft.token_logprobs(
        hidden_KD, target_K, [3, 5], head, temperature, chunk=chunk
    )
    expected_KV = (head(hidden_KD) / temperature).log_softmax(-1)
    expected_K = expected_KV[torch.arange(8), target_K]
    torch.testing.assert_close(logp_K, expected_K)
    torch.testing.assert_close(entropy_K, -(expected_KV.exp() * expected_KV).sum(-1))
    parameters = [hidden_KD, *head.parameters()]
    gradients = torch.autograd.grad(logp_K.square().sum(), parameters)
    expected = torch.autograd.grad(expected_K.square().sum(), parameters)
    torch.testing.assert_close(gradients, expected)


# ---- Gradient norms of the head


@pytest.mark.parametrize("chunk", [1, 7 * 9 * 4, 2**24])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("length_B", [[1], [9, 1, 4, 9, 6, 2, 1]])
def test_head_gradient_norms_equal_autograd(chunk, temperature, length_B):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 13, bias=False, dtype=torch.float64)
    hidden_KD = torch.randn(sum(length_B), 8, dtype=torch.float64)
    target_K = torch.randint(13, (sum(length_B),))
    norm_B = gvm_raft.head_grad_norms(hidden_KD, target_K, length_B, head, temperature, chunk)
    pieces = zip(hidden_KD.split(length_B), target_K.split(length_B), norm_B, strict=True)
    for hidden_TD, target_T, norm in pieces:
        logp_TV = (head(hidden_TD) / temperature).log_softmax(-1)
        (gradient,) = torch.autograd.grad(logp_TV.gather(-1, target_T[:, None]).sum(), head.weight)
        assert norm.item() == pytest.approx(gradient.norm().item(), rel=1e-10)


@pytest.mark.parametrize("tied", [False, True])
def test_head_gradient_norms_of_a_padded_batch_equal_autograd(tied):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 29}
    settings = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)
    policy = Policy(LlamaForCausalLM(settings).double().eval())
    batch = [random_response(np.random.default_rng(s), vocabulary=29) for s in range(6)]
    norm_B = policy(batch, gvm_raft.head_grad_norms, 0.8)
    head = policy.model.lm_head.weight
    for response, norm in zip(batch, norm_B, strict=True):
        ids, start = [*response.prompt_ids, *response.token_ids], len(response.prompt_ids) - 1
        out = policy.model(torch.tensor([ids]), output_hidden_states=True)
        hidden_TD = out.hidden_states[-1][0, start:-1].detach()  # tied: the output's part only
        logp_TV = (hidden_TD @ head.T / 0.8).log_softmax(-1)
        target_T1 = torch.from_numpy(response.token_ids)[:, None]
        (gradient,) = torch.autograd.grad(logp_TV.gather(-1, target_T1).sum(), head)
        assert norm.item() == pytest.approx(gradient.norm().item(), rel=1e-10)


# ---- Batches


def test_an_epoch_shows_every_problem_once_in_an_order_of_its_own():
    problems = [Problem(i, [0], "") for i in range(23)]
    cfg = Config(problems_per_step=5)
    steps = [[p.index for p in raft.next_problems(problems, step, cfg)] for step in range(8)]
    first, second = flat(steps[:4]), flat(steps[4:])
    assert len(set(first)) == len(set(second)) == 20 and first != second
    again = [[p.index for p in raft.next_problems(problems, step, cfg)] for step in range(8)]
    other = raft.next_problems(problems, 0, Config(problems_per_step=5, seed=1))
    assert again == steps and [p.index for p in other] != steps[0]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("budget", [1, 64, 4096])
def test_micro_batches_share_all_responses_within_the_budget(monkeypatch, world, count, budget):
    rng = np.random.default_rng(count)
    responses = [random_response(rng) for _ in range(count)]
    monkeypatch.setattr(gvm_raft, "WORLD", world)
    of_rank = []
    for rank in range(world):
        monkeypatch.setattr(gvm_raft, "RANK", rank)
        of_rank.append(gvm_raft.micro_batches(responses, budget))
    assert len(set(map(len, of_rank))) == 1  # the ranks step together
    batches = flat(of_rank)
    assert sorted(flat(batches)) == list(range(count))
    for batch in batches:
        sizes = [len(responses[i].prompt_ids) + len(responses[i].token_ids) for i in batch]
        assert len(batch) < 2 or len(batch) * max(sizes) <= budget


# ---- Updates


def random_response(rng, vocabulary=104):
    prompt, length = rng.integers(1, 9), rng.integers(1, 13)
    ids = rng.integers(vocabulary, size=prompt + length)
    logprobs = np.zeros(length, "f4")
    return Response(ids[:prompt].tolist(), ids[prompt:], logprobs, float(rng.random() < 0.5))


def load(noise=0.0):
    """The tiny model in float32 without shards, with noise on its weights."""
    model = AutoModelForCausalLM.from_pretrained(CONFIG.model, dtype=torch.float32).eval()
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data += noise * torch.randn_like(weight)
    return model


def logprobs(model, response, temperature=1.0):
    """Log-probabilities [T] of one response, by a plain forward pass."""
    ids = torch.tensor([[*response.prompt_ids, *response.token_ids]])
    logp_TV = (model(ids).logits[0, len(response.prompt_ids) - 1 : -1] / temperature).log_softmax(
        -1
    )
    return logp_TV.gather(-1, torch.from_numpy(response.token_ids)[:, None])[:, 0]


@pytest.fixture(scope="module")
def plain():
    return load().double()


@pytest.fixture(scope="module")
def policy(process_group):
    return gvm_raft.load_policy(CONFIG, process_group)


@pytest.fixture(scope="module")
def drawn_PS(process_group):
    """Responses of the tiny model to problems of several lengths, COUNTS of them."""
    tokenizer = AutoTokenizer.from_pretrained(CONFIG.model)
    problems = gvm_raft.load_problems(CONFIG.problems, tokenizer, CONFIG)
    problem_P = sorted(problems[:60], key=lambda p: len(p.prompt_ids))[:: 60 // len(COUNTS)]
    sampler = gvm_raft.TorchSampler(CONFIG, tokenizer, process_group)
    progress = {"step": 0, "responses": 0, "tokens": 0}
    return gvm_raft.sample(problem_P, COUNTS, sampler, progress, CONFIG)


@pytest.fixture
def response_PS(drawn_PS):
    """A copy of them to change, with rewards at random."""
    rng = np.random.default_rng(3)
    return [[replace(r, reward=float(rng.random() < 0.6)) for r in s] for s in drawn_PS]


class Recorder:
    """An optimiser that keeps the gradients instead of following them."""

    def __init__(self, policy):
        self.policy, self.gradients = policy, []

    def step(self):
        parameters = self.policy.parameters()
        self.gradients.append(torch.cat([p.grad.full_tensor().flatten() for p in parameters]))

    def zero_grad(self):
        self.policy.zero_grad()


@pytest.fixture
def gradient(monkeypatch, policy):
    """The unclipped gradient of one update, and its metrics."""

    def gradient(response_PS, cfg=CONFIG, script=gvm_raft, reference=None):
        clip = script.clip_grad_norm_
        monkeypatch.setattr(script, "clip_grad_norm_", lambda weights, _: clip(weights, math.inf))
        recorder = Recorder(policy)
        metrics = script.update(policy, reference, recorder, response_PS, cfg)
        monkeypatch.setattr(script, "clip_grad_norm_", clip)
        (found,) = recorder.gradients
        return found, metrics

    return gradient


def off_policy(response_PS):
    """The same responses, drawn by a somewhat different policy: equal ones at equal odds."""
    for response in flat(response_PS):
        rng = np.random.default_rng([*response.prompt_ids, *response.token_ids])
        shift_T = rng.normal(0, 0.3, len(response.logprobs))
        response.logprobs = response.logprobs + shift_T.astype("f4")
    return response_PS


@pytest.mark.parametrize("script", [gvm_raft, gvm_grpo])
@pytest.mark.parametrize("tokens", [1, 30, 100])
def test_gradient_does_not_depend_on_the_micro_batches(gradient, response_PS, script, tokens):
    response_PS = off_policy(response_PS)
    whole, metrics = gradient(response_PS, CONFIG, script)
    split, again = gradient(
        response_PS, Config(updates_per_step=1, tokens_per_batch=tokens), script
    )
    assert relative(split, whole) < 1e-6
    assert metrics.pop("padding") >= again.pop("padding")  # small micro-batches pad less
    assert again == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("script", [gvm_raft, gvm_grpo])
def test_equal_responses_run_once(gradient, response_PS, monkeypatch, script):
    response_PS = [[*s, *s, s[0]] for s in off_policy(response_PS)]
    share, sizes = script.micro_batches, []
    monkeypatch.setattr(script, "micro_batches", lambda r, b: sizes.append(len(r)) or share(r, b))
    once, metrics = gradient(response_PS, CONFIG, script)
    all_places = lambda responses: (responses, np.arange(len(responses)))  # noqa: E731
    monkeypatch.setattr(script, "distinct", all_places)
    each, again = gradient(response_PS, CONFIG, script)
    assert 0 < 2 * sizes[0] <= sizes[1]
    assert relative(once, each) < 1e-6
    for name in ("loss", "kl", "entropy", "logp_shift", "grad_norm"):
        assert metrics[name] == pytest.approx(again[name], rel=1e-5, abs=1e-7)


def test_distinct_responses_and_their_places():
    one = np.zeros(1, "f4")
    texts = [([1], [2], 1.0), ([1, 2], [3], 1.0), ([1], [2], 1.0), ([1], [2], 0.0)]
    batch = [gvm_raft.Response(p, np.array(t), one, reward) for p, t, reward in texts]
    different, place_B = gvm_raft.distinct(batch)
    assert different == [batch[2], batch[1], batch[3]] and place_B.tolist() == [0, 1, 0, 2]
    assert gvm_raft.distinct([])[0] == [] and gvm_raft.distinct([])[1].dtype == int


def test_gradient_is_that_of_algorithm_1(gradient, response_PS, plain):
    found, metrics = gradient(response_PS)
    m, total, lengths = len(response_PS), 0, []
    for response_S in response_PS:
        accepted_S = [r for r in response_S if r.reward]
        lengths += [len(r.token_ids) for r in accepted_S]
        for response in accepted_S:
            total -= logprobs(plain, response).sum() / len(accepted_S) / m
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, plain.parameters())])
    expected /= np.mean(lengths)
    assert relative(found.double(), expected) < 1e-5
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-5)
    assert metrics["logp_shift"] < 1e-5 and metrics["kl"] == 0


@pytest.mark.parametrize(
    ("script", "weighting", "temperature", "kl_coef"),
    [
        (gvm_raft, "algorithm1", 1.0, 0.0),
        (gvm_raft, "reward", 1.0, 0.3),
        (gvm_raft, "token", 0.8, 0.0),
        (gvm_grpo, "algorithm1", 0.8, 0.3),
        (gvm_grpo, "token", 1.0, 0.0),
    ],
)
def test_gradient_is_that_of_the_clipped_objective(
    gradient, response_PS, plain, process_group, script, weighting, temperature, kl_coef
):
    reference, other = (Policy(load(0.02)), load(0.02).double()) if kl_coef else (None, plain)
    settings = {"weighting": weighting, "temperature": temperature, "kl_coef": kl_coef}
    cfg = script.Config(updates_per_step=1, **settings)
    response_PS = off_policy(response_PS)
    found, metrics = gradient(response_PS, cfg, script, reference)

    weight_PS = script.advantages([np.array([r.reward for r in s]) for s in response_PS], weighting)
    objective = kl = 0
    lengths = []
    for response_S, weight_S in zip(response_PS, weight_PS):
        for response, weight in zip(response_S, weight_S):
            logp_T = logprobs(plain, response, temperature)
            ratio_T = (logp_T - torch.from_numpy(response.logprobs)).exp()
            clipped_T = ratio_T.clamp(0.8, 1.28)
            objective += torch.minimum(ratio_T * weight, clipped_T * weight).sum()
            gap_T = logprobs(other, response, temperature).detach() - logp_T
            kl += (gap_T.exp() - 1 - gap_T).sum() / len(response_S) / len(response_PS)
            lengths += [len(response.token_ids)] if weight else []
    loss, kl = -objective / np.mean(lengths), kl / np.mean(lengths)
    total = loss + kl_coef * kl
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, plain.parameters())])
    assert relative(found.double(), expected) < 1e-4
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert metrics["kl"] == pytest.approx(kl.item() if kl_coef else 0, rel=1e-3)


def test_a_mini_batch_in_which_nothing_is_accepted_makes_no_update(policy, response_PS):
    for response in flat(response_PS):
        response.reward = 0.0
    recorder = Recorder(policy)
    cfg = Config(updates_per_step=2)
    metrics = gvm_raft.update(policy, None, recorder, response_PS, cfg)
    assert metrics["updates"] == 0 and metrics["loss"] == 0 and recorder.gradients == []
    response_PS[0][0].reward = 1.0
    metrics = gvm_raft.update(policy, None, recorder, response_PS, cfg)
    assert metrics["updates"] == len(recorder.gradients) == 1


def test_the_divergence_is_per_token_even_if_nothing_is_accepted(policy, response_PS):
    reference, cfg = Policy(load(0.02)), Config(updates_per_step=1, kl_coef=0.1)
    kl = []
    for reward in (1.0, 0.0):
        for response in flat(response_PS):
            response.reward = reward
        kl.append(gvm_raft.update(policy, reference, Recorder(policy), response_PS, cfg)["kl"])
    assert kl[0] == pytest.approx(kl[1], rel=1e-4)


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_every_mini_batch_of_problems_makes_an_update(policy, response_PS, updates):
    for response_S in response_PS:
        response_S[0].reward = 1.0
    recorder = Recorder(policy)
    metrics = gvm_raft.update(policy, None, recorder, response_PS, Config(updates_per_step=updates))
    assert metrics["updates"] == len(recorder.gradients) == updates
    assert all(gradient.norm() <= 1.0001 for gradient in recorder.gradients)


# ---- Budget


@pytest.mark.parametrize("tokens", [20, 16384])
@pytest.mark.parametrize("reuse", [True, False])
def test_the_budget_is_proposition_1_of_the_pilots(
    monkeypatch, policy, plain, response_PS, tokens, reuse
):
    cfg = Config(pilot_samples=3, samples_per_problem=6, reuse_pilot=reuse, tokens_per_batch=tokens)
    problem_P = [Problem(i, [0], "") for i in range(4)]
    rng = np.random.default_rng(0)
    pilot_PS = [[random_response(rng) for _ in range(3)] for _ in problem_P]
    monkeypatch.setattr(gvm_raft, "sample", lambda *_, **__: pilot_PS)
    count_P, kept_PS, metrics = gvm_raft.sample_counts(problem_P, policy, None, {}, cfg)
    square_PS = [[] for _ in problem_P]
    for square_S, pilot_S in zip(square_PS, pilot_PS):
        for pilot in (pilot for pilot in pilot_S if pilot.reward):
            logp = logprobs(plain, pilot).sum()
            (head_gradient,) = torch.autograd.grad(logp, plain.lm_head.weight)
            square_S.append(head_gradient.square().sum().item())
    accepted_P = [len(square_S) for square_S in square_PS]
    norm_P = [math.sqrt(sum(s) / len(s)) if s else math.nan for s in square_PS]
    assert min(accepted_P) == 0 < max(accepted_P)  # both kinds are there
    accept_P, norm_P = estimate(accepted_P, [3] * 4, norm_P, cfg.prior)
    expected_P = allocate(accept_P, norm_P, 24, minimum=3 if reuse else 0)
    assert list(count_P) == expected_P.tolist() and sum(count_P) == 24
    assert kept_PS is (pilot_PS if reuse else None)
    assert 0 < metrics["variance"] <= metrics["variance_uniform"]


def test_without_pilots_the_budget_is_uniform():
    cfg, problem_P = Config(pilot_samples=0, samples_per_problem=5), [SimpleNamespace()] * 3
    for script in (raft, gvm_raft, gvm_grpo):
        count_P, kept_PS, metrics = script.sample_counts(problem_P, None, None, {}, cfg)
        assert list(count_P) == [5, 5, 5] and kept_PS is None and metrics == {}
