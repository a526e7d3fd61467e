"""The gradient does not depend on how many processes share the work, idle ones among them."""

import importlib
import os
import socket
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SERVER, finish

LENGTHS = [
    [3, 12, 5],
    [1],
    [7, 7],
    [2, 9, 4, 11],
]  # tokens of the responses, by problem
REWARDS = {
    "many": [[1, 0, 1], [1], [0, 1], [0, 0, 1, 0]],
    "one": [
        [0, 1, 0],
        [0],
        [0, 0],
        [0, 0, 0, 0],
    ],  # all but one process have nothing to do
}


def make_responses(module, rewards):
    """Random tokens with log-probabilities near the policy's, of several lengths and rewards."""
    rng = np.random.default_rng(0)

    def draw(length, reward):
        prompt_ids, ids = (
            rng.integers(104, size=5).tolist(),
            rng.integers(104, size=length),
        )
        logprobs = rng.normal(-4.6, 0.2, length).astype("f4")
        return module.Response(prompt_ids, ids, logprobs, float(reward))

    return [
        [draw(*pair) for pair in zip(*lists)]
        for lists in zip(LENGTHS, REWARDS[rewards])
    ]


def save_gradient(script, settings, rewards, environ, path):
    """In a process of its own: the gradient of one update of the tiny model, saved by rank 0."""
    os.environ.update(environ)
    sys.modules.pop(script, None)  # a script reads its rank when it is imported
    module = importlib.import_module(script)
    cfg = replace(module.Config(), updates_per_step=1, **settings)
    device = module.start_processes(cfg)
    policy = module.load_policy(cfg, device)
    reference = (
        module.load_policy(cfg, device).requires_grad_(False) if cfg.kl_coef else None
    )
    clip, gradients = module.clip_grad_norm_, []
    module.clip_grad_norm_ = lambda weights, _: clip(weights, float("inf"))

    class Recorder:
        def step(self):
            gradients.extend(
                p.grad.full_tensor().flatten() for p in policy.parameters()
            )

        def zero_grad(self):
            pass

    module.update(policy, reference, Recorder(), make_responses(module, rewards), cfg)
    if module.RANK == 0:
        torch.save(torch.cat(gradients), path)
    module.dist.barrier()
    module.dist.destroy_process_group()


def gradient(world, folder, script, settings, rewards):
    """The gradient that so many processes find together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, started = free.getsockname()[1], []
    for rank in range(world):
        environ = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "MASTER_PORT": port,
        }
        environ = {k: str(v) for k, v in environ.items()} | {"MASTER_ADDR": "127.0.0.1"}
        arguments = script, settings, rewards, environ, folder / f"{world}.pt"
        started.append(SERVER.Process(target=save_gradient, args=arguments))
        started[-1].start()
    assert finish(started, 120) == [0] * world
    return torch.load(folder / f"{world}.pt").double()


@pytest.mark.parametrize(
    ("script", "settings", "rewards"),
    [
        ("gvm_raft", {"tokens_per_batch": 30}, "many"),
        ("gvm_grpo", {"tokens_per_batch": 40, "kl_coef": 0.1}, "many"),
        ("gvm_raft", {}, "one"),
    ],
)
def test_one_two_and_three_processes_find_the_same_gradient(
    tmp_path, script, settings, rewards
):
    one, two, three = (
        gradient(n, tmp_path, script, settings, rewards) for n in (1, 2, 3)
    )
    assert one.norm() > 0
    assert (two - one).norm() / one.norm() < 1e-6
    assert (three - one).norm() / one.norm() < 1e-6
