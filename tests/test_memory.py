"""Peak memory at the size of Qwen's vocabulary: no tensor of all tokens by all of the vocabulary.

In a process of its own and in float32, over the memory of inputs, output head and its gradient. The
gradient comes in pieces: autograd may hold a piece, the sum so far and the new sum at once.
"""

import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow
TOKENS, HIDDEN, VOCABULARY = 2048, 896, 151_936
WEIGHT = VOCABULARY * HIDDEN * 4 / 1e6  # of the head, and of its gradient: 545 MB
LOGITS = TOKENS * VOCABULARY * 4 / 1e6  # what must not be there: 1245 MB
# with all logits at once, the sum of a function's own share and theirs would pass these
LIMITS = {"head_grad_norms": 0.5 * LOGITS, "token_logprobs": 3 * WEIGHT + 0.25 * LOGITS}

PROBE = """
import resource, sys
import torch
import gvm_raft

def peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

name, tokens, hidden, vocabulary, chunk = sys.argv[1], *map(int, sys.argv[2:])
head = torch.nn.Linear(hidden, vocabulary, bias=False)
head.weight.grad = torch.zeros_like(head.weight).add_(0.0)  # written: pages count when touched
hidden_KD, target_K = torch.randn(tokens, hidden, requires_grad=True), torch.arange(tokens)
settings, before = {"chunk": chunk} if chunk else {}, peak_megabytes()
with torch.set_grad_enabled(name == "token_logprobs"):
    found = getattr(gvm_raft, name)(hidden_KD, target_K, [tokens], head, 1.0, **settings)
if name == "token_logprobs":
    found[0].sum().backward()
print(peak_megabytes() - before)
"""


def peak_megabytes(name, chunk=0):
    """Of a call for one long response; chunk 0 is the function's own."""
    sizes = map(str, (TOKENS, HIDDEN, VOCABULARY, chunk))
    command = [sys.executable, "-c", PROBE, name, *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize("name", LIMITS)
def test_the_logits_of_a_response_are_never_there_at_once(name):
    assert peak_megabytes(name) < LIMITS[name]


@pytest.mark.parametrize("name", LIMITS)
def test_the_limit_sees_them_when_they_are(name):
    assert peak_megabytes(name, chunk=2**40) > LIMITS[name]
