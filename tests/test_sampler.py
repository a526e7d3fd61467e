"""The sampler without vLLM against full forward passes, the softmax and transformers' generate."""

import contextlib
from collections import Counter
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import gvm_raft
from gvm_raft import Config

CONFIG = Config()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CONFIG.model)


@pytest.fixture(scope="module")
def problems(tokenizer):
    """Tiny problems, from short to long."""
    problems = gvm_raft.load_problems(CONFIG.problems, tokenizer, CONFIG)
    return sorted(problems[:60], key=lambda problem: len(problem.prompt_ids))


@pytest.fixture(scope="module")
def sampler(tokenizer):
    return gvm_raft.TorchSampler(CONFIG, tokenizer, torch.device("cpu"))


@pytest.fixture
def draw(sampler, monkeypatch):
    """The sampler under other settings: tokens and log-probabilities of its responses."""

    def draw(prompts, seeds, **settings):
        monkeypatch.setattr(sampler, "cfg", replace(CONFIG, **settings))
        drawn = sampler(prompts, list(seeds))
        return [ids.tolist() for ids, _ in drawn], [logps for _, logps in drawn]

    return draw


def logprobs(sampler, ids, temperature=1.0):
    """Log-probabilities [T, V] of every next token, by one forward pass without a cache."""
    with torch.no_grad():
        logits = sampler.model(torch.tensor([ids]), use_cache=False).logits[0]
    return (logits / temperature).log_softmax(-1)


def goodness_of_fit(tokens, probability_V):
    """p-value of the chi-square test, tokens expected less than five times taken together."""
    expected_V = np.asarray(probability_V, float) * len(tokens)
    found_V, common = np.bincount(tokens, minlength=len(expected_V)), expected_V >= 5
    found = np.append(found_V[common], found_V[~common].sum())
    expected = np.append(expected_V[common], expected_V[~common].sum())
    chi_square = ((found - expected) ** 2 / expected).sum()
    half = torch.tensor((common.sum() + (expected[-1] > 0) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half, torch.tensor(chi_square / 2)).item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_equal_a_full_forward_pass(draw, sampler, problems, temperature):
    prompts = [problems[i].prompt_ids for i in (0, 0, 59, 30, 30, 30, 40, 0)]
    prompts += [problems[59].prompt_ids[:1], problems[59].prompt_ids[:6]]
    assert len(set(map(len, prompts))) > 3
    ids_B, logps_B = draw(prompts, range(10), temperature=temperature)
    for prompt, ids, logps in zip(prompts, ids_B, logps_B):
        logp_TV = logprobs(sampler, prompt + ids, temperature)[len(prompt) - 1 : -1]
        expected_T = logp_TV[torch.arange(len(ids)), ids]
        np.testing.assert_allclose(logps, expected_T, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_tokens_are_as_frequent_as_the_softmax_says(draw, sampler, problems, temperature):
    prompts = [problems[0].prompt_ids] * 3000 + [problems[59].prompt_ids] * 3000
    ids_B, _ = draw(prompts, range(6000), temperature=temperature, max_new_tokens=3)
    for prompt, ids_S in ((prompts[0], ids_B[:3000]), (prompts[-1], ids_B[3000:])):
        first = [ids[0] for ids in ids_S]
        ((start, _),) = Counter(tuple(ids[:2]) for ids in ids_S if len(ids) > 2).most_common(1)
        third = [ids[2] for ids in ids_S if len(ids) > 2 and tuple(ids[:2]) == start]
        assert len(third) > 300
        for tokens, before in ((first, prompt), (third, [*prompt, *start])):
            probability_V = logprobs(sampler, before, temperature)[-1].exp()
            assert goodness_of_fit(tokens, probability_V) > 1e-3


def test_the_chi_square_test_sees_a_wrong_temperature(draw, sampler, problems):
    prompt = problems[0].prompt_ids
    ids_B, _ = draw([prompt] * 3000, range(3000), temperature=2.0, max_new_tokens=1)
    probability_V = logprobs(sampler, prompt, 1.7)[-1].exp()
    assert goodness_of_fit([ids[0] for ids in ids_B], probability_V) < 1e-3


def test_responses_stop_at_the_end_token_or_the_limit(draw, sampler, problems):
    ids_B, _ = draw([p.prompt_ids for p in problems], range(60), max_new_tokens=20)
    ends = set(sampler.ends.tolist())
    ended = [ids for ids in ids_B if ids[-1] in ends]
    assert 0 < len(ended) < 60
    assert all(not ends & set(ids[:-1]) for ids in ids_B)
    assert all(len(ids) == 20 for ids in ids_B if ids not in ended)


def test_at_temperature_almost_zero_it_agrees_with_generate(draw, sampler, problems, tokenizer):
    ids_B, _ = draw([p.prompt_ids for p in problems[::6]], range(10), temperature=1e-4)
    for problem, ids in zip(problems[::6], ids_B):
        prompt = torch.tensor([problem.prompt_ids])
        (expected,) = sampler.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=CONFIG.max_new_tokens,
        )
        assert ids == expected[prompt.shape[1] :].tolist()


@pytest.mark.parametrize("tokens_per_batch", [1, 100])
def test_responses_do_not_depend_on_the_batch(draw, problems, tokens_per_batch):
    prompts = [problems[i].prompt_ids for i in (0, 0, 59, 20, 20, 20, 40, 59)]
    together, logps_B = draw(prompts, range(8))
    apart, again_B = draw(prompts, range(8), tokens_per_batch=tokens_per_batch)
    assert apart == together
    np.testing.assert_allclose(np.concatenate(again_B), np.concatenate(logps_B), atol=1e-5)


def test_responses_depend_on_their_seed_only(draw, problems):
    prompts = [problems[3].prompt_ids] * 4
    first, _ = draw(prompts, [1, 2, 3, 2], temperature=2.0)
    second, _ = draw(prompts, [3, 2, 1, 7], temperature=2.0)
    assert first[:3] == second[2::-1] and first[1] == first[3]
    assert len(set(map(tuple, first + second))) == 4


def test_no_prompts_give_no_responses(draw):
    assert draw([], []) == ([], [])


def draw_all(problem_P, count_P, sampler, **more):
    progress = {"step": 3, "responses": 0, "tokens": 0}
    response_PS = gvm_raft.sample(problem_P, count_P, sampler, progress, CONFIG, **more)
    found = [[(r.token_ids.tolist(), r.reward) for r in response_S] for response_S in response_PS]
    return found, response_PS, progress


@pytest.mark.parametrize("world", [2, 3])
def test_responses_do_not_depend_on_the_number_of_processes(
    monkeypatch, process_group, sampler, problems, world
):
    problem_P, count_P = problems[::12], [3, 0, 5, 1, 4]
    whole, _, _ = draw_all(problem_P, count_P, sampler)
    monkeypatch.setattr(gvm_raft, "WORLD", world)

    def gather(gathered, mine):
        gathered[:] = [mine]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    parts, sizes = [[] for _ in problem_P], []
    for rank in range(world):
        monkeypatch.setattr(gvm_raft, "RANK", rank)
        found, _, progress = draw_all(problem_P, count_P, sampler)
        sizes.append(progress["responses"])
        parts = [part + new for part, new in zip(parts, found)]
    assert parts == whole and max(sizes) - min(sizes) <= 1  # equal work


def test_no_process_waits_for_the_problems_with_long_responses(monkeypatch, problems):
    """Pilots tell how long a problem's responses are: shares are equal in tokens, not in number."""
    lengths, count_P = [40, 2, 2, 30, 2, 2, 2, 2], [5, 9, 3, 7, 9, 9, 9, 9]
    pilot_PS = [[gvm_raft.Response([0], np.zeros(n), np.zeros(n), 0.0)] for n in lengths]
    share, tokens = {}, []
    monkeypatch.setattr(gvm_raft, "WORLD", 3)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda gathered, mine: None)
    for rank in range(3):
        monkeypatch.setattr(gvm_raft, "RANK", rank)
        monkeypatch.setattr(gvm_raft, "verify_batch", lambda *_: [])
        with contextlib.suppress(TypeError):  # nothing is gathered here
            gvm_raft.sample(
                problems[:8],
                count_P,
                lambda prompts, seeds, rank=rank: share.update({rank: prompts}) or [],
                {"step": 0},
                CONFIG,
                kept_PS=pilot_PS,
            )
        length = {tuple(p.prompt_ids): n for p, n in zip(problems, lengths)}
        tokens.append(sum(length[tuple(prompt)] for prompt in share[rank]))
    work_P = (np.array(count_P) - 1) * lengths
    assert sum(tokens) == work_P.sum()
    split_over_ranks = np.bincount(np.arange(8) * 3 // 8, work_P)
    assert gvm_raft.imbalance(tokens) < 1.15 and gvm_raft.imbalance(split_over_ranks) == 1.5


def test_pilots_are_topped_up_to_the_same_responses(process_group, sampler, problems):
    problem_P, count_P = problems[::12], [3, 2, 5, 2, 4]
    whole, _, progress = draw_all(problem_P, count_P, sampler)
    _, pilot_PS, _ = draw_all(problem_P, [2] * 5, sampler)
    assert draw_all(problem_P, count_P, sampler, kept_PS=pilot_PS)[0] == whole
    assert list(map(len, whole)) == count_P and progress["responses"] == 16
    assert progress["tokens"] == sum(len(ids) for ids, _ in chain(*whole))


def test_pilots_training_and_evaluation_draw_apart(process_group, sampler, problems):
    found = [
        draw_all(problems[:20], [2] * 20, sampler, stream=s)[0] for s in ("train", "pilot", "eval")
    ]
    assert found[0] != found[1] != found[2] != found[0]


def test_the_sampler_takes_over_the_weights_of_the_policy(process_group, tokenizer):
    sampler = gvm_raft.TorchSampler(CONFIG, tokenizer, process_group)
    policy = gvm_raft.load_policy(CONFIG, process_group)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.5
    sampler.load(policy)
    for copy, weight in zip(sampler.model.parameters(), policy.parameters(), strict=True):
        assert torch.equal(copy, weight.full_tensor())
