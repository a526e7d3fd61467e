"""Numbers do not depend on how many processes share the work, idle ones among them."""

import importlib
import os
import sys

import numpy as np
import pytest
import torch
from conftest import SERVER, VOCABULARY, environments, finish, random_model

LENGTHS = [[3, 12, 5], [1], [7, 7], [2, 9, 4, 11]]  # tokens of responses, by problem
REWARDS = {
    "many": [[1, 0, 1], [1], [0, 1], [0, 0, 1, 0]],
    "one": [[0, 1, 0], [0], [0, 0], [0, 0, 0, 0]],  # most processes have nothing to do
}


def make_groups(module, rewards):
    """Random tokens with log-probabilities near the policy's, of several lengths."""
    rng, groups = np.random.default_rng(0), []
    for i, (lengths, values) in enumerate(zip(LENGTHS, REWARDS[rewards])):
        groups.append([])
        for length, reward in zip(lengths, values):
            prompt_ids = rng.integers(VOCABULARY, size=5).tolist()
            ids = rng.integers(VOCABULARY, size=length).tolist()
            logprobs = rng.normal(-3.4, 0.2, length).tolist()
            response = module.Response(i, prompt_ids, 0, ids, logprobs)
            response.reward = float(reward)
            groups[-1].append(response)
    return groups


def save_numbers(script, settings, rewards, environ, path):
    """In a process of its own: an update's gradient and the norms, saved by rank 0."""
    os.environ.update(environ)
    sys.modules.pop(script, None)  # a script reads its rank when it is imported
    module = importlib.import_module(script)
    cfg = module.Config(updates_per_step=1, max_grad_norm=float("inf"), **settings)
    module.start_processes()
    policy = module.load_policy(cfg.model, cfg)
    reference = module.load_policy(cfg.model, cfg, train=False) if cfg.kl_coef else None
    gradients = []

    class Recorder:
        def step(self):
            gradients.extend(
                p.grad.full_tensor().flatten() for p in policy.parameters()
            )

        def zero_grad(self):
            pass

    groups = make_groups(module, rewards)
    norms = module.gradient_norms(policy, groups, cfg)
    module.update(policy, reference, Recorder(), groups, cfg)
    if module.RANK == 0:
        torch.save((torch.cat(gradients), torch.tensor(norms)), path)
    module.dist.barrier()
    module.dist.destroy_process_group()


def numbers(world, folder, script, settings, rewards):
    """The gradient and the norms that so many processes find together."""
    path, started = folder / f"{world}.pt", []
    for environ in environments(world):
        arguments = script, settings, rewards, environ, path
        started.append(SERVER.Process(target=save_numbers, args=arguments))
        started[-1].start()
    assert finish(started, 120) == [0] * world
    return [found.double() for found in torch.load(path)]


@pytest.mark.parametrize(
    ("script", "settings", "rewards"),
    [
        ("gvm_grpo", {"tokens_per_batch": 40, "kl_coef": 0.1}, "many"),
        ("gvm_raft", {}, "one"),
        pytest.param(
            "gvm_raft", {"tokens_per_batch": 30}, "many", marks=pytest.mark.slow
        ),
    ],
)
def test_one_two_and_three_processes_find_the_same_numbers(
    tmp_path, script, settings, rewards
):
    random_model().save_pretrained(tmp_path)
    settings = settings | {"model": str(tmp_path)}
    arguments = tmp_path, script, settings, rewards
    gradient, norms = numbers(1, *arguments)
    assert gradient.norm() > 0 and norms.max() > 0
    for world in (2, 3):
        found, found_norms = numbers(world, *arguments)
        assert (found - gradient).norm() / gradient.norm() < 1e-6
        torch.testing.assert_close(found_norms, norms, rtol=1e-5, atol=0)
