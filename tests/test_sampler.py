"""The sampler without vLLM against full forward passes, the softmax and generate."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import gvm_raft
from gvm_raft import Config, Response

CONFIG = Config()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CONFIG.model)


@pytest.fixture(scope="module")
def problems(tokenizer):
    """Tiny problems, from short to long."""
    problems = gvm_raft.read_problems(CONFIG.problems, 1, tokenizer, CONFIG)
    return sorted(problems[:60], key=lambda problem: len(problem.prompt_ids))


@pytest.fixture(scope="module")
def sampler(tokenizer):
    return gvm_raft.TorchSampler(CONFIG, tokenizer)


@pytest.fixture
def draw(sampler, monkeypatch):
    """Responses to prompts from seeds, under other settings."""

    def draw(prompts, seeds, **settings):
        monkeypatch.setattr(sampler, "cfg", replace(CONFIG, **settings))
        places = {tuple(prompt): i for i, prompt in enumerate(prompts)}
        pairs = zip(prompts, seeds, strict=True)
        rows = [Response(places[tuple(p)], p, seed, [], []) for p, seed in pairs]
        sampler.draw(rows)
        return rows

    return draw


def tokens(responses):
    return [response.token_ids for response in responses]


def logprobs(sampler, ids, temperature=1.0):
    """Log-probabilities [T, V] of every next token, by one pass without a cache."""
    with torch.no_grad():
        logits = sampler.model(torch.tensor([ids]), use_cache=False).logits[0]
    return (logits / temperature).log_softmax(-1)


def goodness_of_fit(found, probabilities):
    """p-value of the chi-square test; tokens expected less than 5 times are one."""
    expected = np.asarray(probabilities, float) * len(found)
    found, common = np.bincount(found, minlength=len(expected)), expected >= 5
    found = np.append(found[common], found[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    chi_square = ((found - expected) ** 2 / expected).sum()
    freedom = common.sum() + (expected[-1] > 0) - 1
    half = torch.tensor([freedom, chi_square], dtype=torch.float64) / 2
    return torch.special.gammaincc(*half).item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_equal_a_full_forward_pass(
    draw, sampler, problems, temperature
):
    prompts = [problems[i].prompt_ids for i in (0, 0, 59, 30, 30, 30, 40, 0)]
    prompts += [problems[59].prompt_ids[:1], problems[59].prompt_ids[:6]]
    assert len(set(map(len, prompts))) > 2
    for response in draw(prompts, range(10), temperature=temperature):
        ids = response.token_ids
        whole_TV = logprobs(sampler, response.prompt_ids + ids, temperature)
        expected_TV = whole_TV[len(response.prompt_ids) - 1 : -1]
        expected_T = expected_TV[torch.arange(len(ids)), ids]
        np.testing.assert_allclose(response.logprobs, expected_T, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_tokens_are_as_frequent_as_the_softmax_says(
    draw, sampler, problems, temperature
):
    prompts = [problems[0].prompt_ids] * 3000 + [problems[59].prompt_ids] * 3000
    settings = {"temperature": temperature, "max_new_tokens": 2}
    drawn = tokens(draw(prompts, range(6000), **settings))
    for prompt, part in ((prompts[0], drawn[:3000]), (prompts[-1], drawn[3000:])):
        first = Counter(ids[0] for ids in part)
        probability_V = logprobs(sampler, prompt, temperature)[-1].exp()
        assert goodness_of_fit([ids[0] for ids in part], probability_V) > 1e-3

        token, _ = first.most_common(1)[0]  # and what follows the commonest one
        second = [ids[1] for ids in part if ids[0] == token and len(ids) == 2]
        probability_V = logprobs(sampler, [*prompt, token], temperature)[-1].exp()
        assert goodness_of_fit(second, probability_V) > 1e-3


def test_the_test_of_frequencies_sees_another_temperature(draw, sampler, problems):
    prompt = problems[0].prompt_ids
    drawn = draw([prompt] * 3000, range(3000), temperature=1.5, max_new_tokens=1)
    probability_V = logprobs(sampler, prompt, 1.7)[-1].exp()
    assert goodness_of_fit([ids[0] for ids in tokens(drawn)], probability_V) < 1e-3


def test_responses_stop_at_the_end_token_or_are_truncated(draw, sampler, problems):
    drawn = draw([p.prompt_ids for p in problems], range(60), max_new_tokens=20)
    ends = set(sampler.ends)
    assert 0 < sum(response.truncated for response in drawn) < 60
    for response in drawn:
        ids = response.token_ids
        assert not ends & set(ids[:-1]) and len(ids) == len(response.logprobs)
        assert response.truncated == (ids[-1] not in ends)
        assert len(ids) == 20 or not response.truncated


def test_each_of_several_end_tokens_stops_it(tmp_path, tokenizer, problems):
    shutil.copytree(CONFIG.model, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    (seven,) = tokenizer.encode("7")  # some responses have none
    ends = [tokenizer.eos_token_id, seven]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ends}))
    cfg = Config(model=str(tmp_path / "model"))
    sampler = gvm_raft.TorchSampler(cfg, tokenizer)
    drawn = [Response(i, p.prompt_ids, i, [], []) for i, p in enumerate(problems)]
    sampler.draw(drawn)
    last = Counter(ids[-1] for ids in tokens(drawn))
    assert set(last) == set(ends)
    assert all(seven not in ids[:-1] for ids in tokens(drawn))


def test_at_temperature_almost_zero_it_agrees_with_generate(draw, sampler, problems):
    prompts = [problem.prompt_ids for problem in problems[::6]]
    settings = {"do_sample": False, "max_new_tokens": CONFIG.max_new_tokens}
    for response in draw(prompts, range(10), temperature=1e-4):
        ids_BT = torch.tensor([response.prompt_ids])
        settings["attention_mask"] = torch.ones_like(ids_BT)
        (expected,) = sampler.model.generate(ids_BT, **settings)
        assert response.token_ids == expected[ids_BT.shape[1] :].tolist()


def test_a_prompt_runs_once_for_all_its_responses(draw, sampler, problems, monkeypatch):
    sizes, forward = [], sampler.model.forward

    def counted(ids_BT, **inputs):
        sizes.append(tuple(ids_BT.shape))
        return forward(ids_BT, **inputs)

    monkeypatch.setattr(sampler.model, "forward", counted)
    prompts = [problems[0].prompt_ids] * 30 + [problems[59].prompt_ids] * 50
    draw(prompts, range(80))
    assert sizes[0] == (2, len(problems[59].prompt_ids))
    assert sizes[1] == (80, 1)  # no cell is empty: only what is new runs
    assert all(size == 1 for _, size in sizes[1:])
    rows = [size for size, _ in sizes[1:]]
    assert (
        rows == sorted(rows, reverse=True) and rows[-1] < 80
    )  # ended ones are dropped


def test_responses_do_not_depend_on_the_batch(draw, problems):
    prompts = [problems[i].prompt_ids for i in (0, 0, 59, 20, 20, 20, 40, 59)]
    together = draw(prompts, range(8))
    for prompt, seed, response in zip(prompts, range(8), together):
        (alone,) = draw([prompt], [seed])
        assert alone.token_ids == response.token_ids
        np.testing.assert_allclose(alone.logprobs, response.logprobs, atol=1e-5)


def test_more_responses_than_fit_are_drawn_in_turns(draw, problems):
    prompts = [problems[i % 50].prompt_ids for i in range(1100)]
    drawn = draw(prompts, range(1100), max_new_tokens=3)
    assert all(1 <= len(ids) <= 3 for ids in tokens(drawn))
    for i in (0, 511, 512, 1099):
        (alone,) = draw([prompts[i]], [i], max_new_tokens=3)
        assert alone.token_ids == drawn[i].token_ids


def test_responses_depend_on_their_seed_only(draw, problems):
    prompts = [problems[3].prompt_ids] * 4
    first = tokens(draw(prompts, [1, 2, 3, 2], temperature=9.0))
    second = tokens(draw(prompts, [3, 2, 1, 7], temperature=9.0))
    assert first[:3] == second[2::-1] and first[1] == first[3]
    assert len(set(map(tuple, first + second))) == 4


# ---- Groups of verified responses


def draw_all(batch, counts, sampler, **more):
    progress = {"step": 3, "responses": 0, "tokens": 0}
    groups = gvm_raft.sample(batch, counts, sampler, progress, CONFIG, **more)
    found = [[(r.token_ids, r.reward, r.boxed) for r in group] for group in groups]
    return found, groups, progress


def test_no_responses_are_no_trouble(process_group, sampler, problems):
    found, _, progress = draw_all(problems[:3], [0, 0, 0], sampler)
    assert found == [[], [], []] and progress["responses"] == 0


def test_a_group_has_as_many_responses_as_asked_for(process_group, sampler, problems):
    counts = [3, 0, 5, 1, 4]
    _, groups, progress = draw_all(problems[::12], counts, sampler)
    assert [len(group) for group in groups] == counts
    responses = list(chain(*groups))
    assert progress["responses"] == 13
    assert progress["tokens"] == sum(len(r.token_ids) for r in responses)
    for i, problem in enumerate(problems[::12]):
        assert all(r.i == i and r.prompt_ids == problem.prompt_ids for r in groups[i])


def test_right_answers_are_rewarded_if_they_come_to_an_end(
    process_group, sampler, tokenizer, problems, monkeypatch
):
    texts = ["\\boxed{%s}", "2+2", "\\boxed{-77}", "\\boxed{%s}"]

    def drawn(responses):
        for response, text in zip(responses, texts, strict=True):
            text = text.replace("%s", problems[0].answer)
            response.token_ids = tokenizer.encode(text)
        responses[3].truncated = True

    monkeypatch.setattr(sampler, "draw", drawn)
    _, (group,), _ = draw_all(problems[:1], [4], sampler)
    assert [r.reward for r in group] == [1, 0, 0, 0]
    assert [r.boxed for r in group] == [True, False, True, True]


@pytest.mark.parametrize("world", [2, 3])
def test_responses_do_not_depend_on_the_number_of_processes(
    monkeypatch, process_group, sampler, problems, world
):
    batch, counts = problems[::12], [3, 0, 5, 1, 4]
    whole, _, progress = draw_all(batch, counts, sampler)
    monkeypatch.setattr(gvm_raft, "WORLD", world)
    shares = {}

    def stop(gathered, mine):
        shares[gvm_raft.RANK] = mine
        raise InterruptedError  # before the others' shares are needed

    def gather(gathered, mine):
        gathered[:] = [shares[rank] for rank in range(world)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", stop)
    for rank in range(world):
        monkeypatch.setattr(gvm_raft, "RANK", rank)
        with pytest.raises(InterruptedError):
            draw_all(batch, counts, sampler)
    sizes = [len(share) for share in shares.values()]
    assert sum(sizes) == 13 and max(sizes) - min(sizes) <= 1  # equal work
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    found, _, again = draw_all(batch, counts, sampler)
    assert found == whole and again == progress


def test_pilots_are_topped_up_to_the_same_responses(process_group, sampler, problems):
    batch, counts = problems[::12], [3, 2, 5, 2, 4]
    whole, _, progress = draw_all(batch, counts, sampler)
    _, pilots, _ = draw_all(batch, [2] * 5, sampler)
    assert draw_all(batch, counts, sampler, kept=pilots)[0] == whole
    assert progress["responses"] == 16


def test_pilots_training_and_evaluation_draw_apart(process_group, sampler, problems):
    found = {}
    for stream in ("train", "pilot", "eval"):
        texts, _, _ = draw_all(problems[:20], [2] * 20, sampler, stream=stream)
        found[str(texts)] = stream
    assert len(found) == 3


def test_it_takes_over_the_weights_of_the_policy(process_group, tokenizer):
    sampler = gvm_raft.TorchSampler(CONFIG, tokenizer)
    policy = gvm_raft.load_policy(CONFIG.model, CONFIG)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.5
    sampler.load(policy)
    pairs = zip(sampler.model.parameters(), policy.parameters(), strict=True)
    for copied, weight in pairs:
        assert torch.equal(copied, weight.full_tensor())
