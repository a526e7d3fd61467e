"""Per-response gradient norms: ours, candidates and the authors' way, in CPU-seconds. Markdown.

A Qwen2 of the 0.5B shape with random weights (hidden size 896, vocabulary 151,936, 24 layers, tied
embeddings) on one thread. All ways see the same responses in turn, again and again; the table holds
medians. A low temperature makes the softmax as peaked as a trained model's.

  * ours: one shared forward pass without a graph, then gvm_raft.head_grad_norms;
  * sketch: the same with every 8 or 32 tokens of the vocabulary folded into one, by random signs;
  * the authors': one forward and one backward pass per response, to embed_tokens.weight. Tied, as
    their Qwen2.5-Math-1.5B is, that is the output head's gradient, too; "input side" leaves it out.

First the exactness: against autograd in float64 on a small case, where the policy is unsure and
where it is sure; then in float32 against float64 at the full vocabulary.

Targets: the authors' way takes >= 3 times ours at T = 256 and >= 1.5 times at T = 1024.

Run: python bench/grad_norm.py [--repeats 3] [--layers 24] [--lengths 256 1024]      (15 minutes)
"""

import datetime
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
import tyro
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gvm_raft

PROMPT = 32  # tokens before every response
TEMPERATURE = 0.1  # logits of standard deviation 6: an entropy of about 1 nat


def sketched(hidden_KD, target_K, length_B, head, temperature, chunk=2**22, fold=8):
    """gvm_raft.head_grad_norms, with the odds folded before their inner products: an estimate."""
    hidden_BTD = pad_sequence((hidden_KD.float() / temperature).split(length_B), True)
    target_BT = pad_sequence(target_K.split(length_B), True)
    logit_BTT = hidden_BTD @ head.weight[target_BT].float().mT
    own_BT1, rest_BT1, gram_BTT, start = logit_BTT.diagonal(0, 1, 2)[..., None], 0, 0, 0
    for weight_VD in head.weight.split(max(fold, chunk // target_BT.numel() // fold * fold)):
        odds_BTV = (hidden_BTD @ weight_VD.T.float()).sub_(own_BT1).clamp_(max=30).exp_()
        here = ((target_BT >= start) & (target_BT < start + len(weight_VD))).nonzero(as_tuple=True)
        odds_BTV[*here, target_BT[here] - start] = 0
        rest_BT1 = rest_BT1 + odds_BTV.sum(-1, keepdim=True)
        folded_BTF = sketch(odds_BTV, fold, start)
        gram_BTT, start = gram_BTT + folded_BTF @ folded_BTF.mT, start + len(weight_VD)
    same_BTT = target_BT[:, :, None] == target_BT[:, None]
    odds_BTT = (logit_BTT - own_BT1).clamp(max=30).exp()
    cross_BTT = torch.where(same_BTT, -rest_BT1 / 2, odds_BTT) * rest_BT1.mT
    hidden_BTD = hidden_BTD / (1 + rest_BT1)
    square_B = ((gram_BTT - cross_BTT - cross_BTT.mT) * (hidden_BTD @ hidden_BTD.mT)).sum((1, 2))
    return square_B.clamp(min=0).sqrt()


def sketch(odds_BTV, fold, seed):
    """Columns summed into one in fold as many, with random signs: inner products on average."""
    sign_V = torch.randint(2, odds_BTV.shape[-1:], generator=torch.Generator().manual_seed(seed))
    odds_BTV = torch.nn.functional.pad(
        odds_BTV * (2 * sign_V.to(odds_BTV) - 1), (0, -odds_BTV.shape[-1] % fold)
    )
    return odds_BTV.unflatten(-1, (fold, -1)).sum(-2)


def authors(model, batch, temperature, tied):
    """The authors' estimate: one forward and one backward pass per response, to embed_tokens."""
    table, norms = model.get_input_embeddings().weight, []
    for r in batch:
        ids_1T = torch.tensor([[*r.prompt_ids, *r.token_ids]])
        hidden_TD = model.base_model(ids_1T, use_cache=False).last_hidden_state[0]
        hidden_TD = hidden_TD[len(r.prompt_ids) - 1 : -1]
        logit_TV = hidden_TD @ (table if tied else table.detach()).T / temperature
        target_T1 = torch.from_numpy(r.token_ids)[:, None]
        (gradient,) = torch.autograd.grad(
            logit_TV.log_softmax(-1).gather(1, target_T1).sum(), table
        )
        norms.append(gradient.norm().item())
    return torch.tensor(norms)


@torch.no_grad()
def exact(hidden_KD, target_K, length_B, head, temperature):
    """In float64, from the gradient itself, in pieces of the vocabulary."""
    norms = []
    for hidden_TD, target_T in zip(hidden_KD.split(length_B), target_K.split(length_B)):
        hidden_TD, square, start = hidden_TD.double() / temperature, 0.0, 0
        pieces = [weight_VD.double() for weight_VD in head.weight.split(8192)]
        logsums = [torch.logsumexp(hidden_TD @ weight_VD.T, -1) for weight_VD in pieces]
        logsum_T1 = torch.stack(logsums).logsumexp(0)[:, None]
        for weight_VD in pieces:
            d_TV = -(hidden_TD @ weight_VD.T - logsum_T1).exp()
            d_TV += target_T[:, None] == start + torch.arange(len(weight_VD))
            square, start = square + (d_TV.T @ hidden_TD).square().sum(), start + len(weight_VD)
        norms.append(square.sqrt())
    return torch.stack(norms)


def proof():
    """Largest relative errors against autograd in float64, unsure and sure policies, padding."""
    torch.manual_seed(0)
    head, length_B = torch.nn.Linear(16, 97, bias=False, dtype=torch.float64), [1, 9, 40, 5]
    found = {}
    for sure in (0.0, 5.0, 12.0):
        hidden_KD = torch.randn(sum(length_B), 16, dtype=torch.float64)
        target_K = torch.randint(97, (sum(length_B),))
        towards_KD = head.weight.detach()[target_K]
        hidden_KD += sure * towards_KD / towards_KD.square().sum(-1, keepdim=True)
        norms = []
        for hidden_TD, target_T in zip(hidden_KD.split(length_B), target_K.split(length_B)):
            logp_T = (head(hidden_TD) / 0.7).log_softmax(-1).gather(-1, target_T[:, None])
            norms.append(torch.autograd.grad(logp_T.sum(), head.weight)[0].norm())
        work, norm_B = (hidden_KD, target_K, length_B, head, 0.7), torch.stack(norms)
        for chunk in (1, 1000, 2**22):
            with torch.no_grad():
                found_B = gvm_raft.head_grad_norms(*work, chunk=chunk)
            error = (found_B / norm_B - 1).abs().max().item()
            found[sure] = np.maximum(found.get(sure, 0.0), error)  # keeps a NaN
    return found


WAYS = {
    "ours: gvm_raft.head_grad_norms": gvm_raft.head_grad_norms,
    "sketch of 8 to 1": sketched,
    "sketch of 32 to 1": partial(sketched, fold=32),
}


def cpu_seconds(function, *args):
    """CPU-seconds of a call, and its result."""
    start = time.process_time()
    result = function(*args)
    return time.process_time() - start, result


@torch.no_grad()
def likely_targets(hidden_KD, target_K, length_B, head, temperature):
    """Tokens drawn where the states are: likely ones, as a response's are; and the entropy."""
    drawn, entropy = [], 0.0
    for hidden_TD in hidden_KD.split(256):
        logp_TV = (head(hidden_TD) / temperature).log_softmax(-1)
        drawn.append(torch.multinomial(logp_TV.exp(), 1)[:, 0])
        entropy -= (logp_TV.exp() * logp_TV).sum().item() / len(hidden_KD)
    return torch.cat(drawn), entropy


def compare(model, length, responses):
    """CPU-seconds per response by way, largest relative errors, and the entropy."""
    policy, tokens = gvm_raft.Policy(model), model.config.vocab_size
    rng = np.random.default_rng(length)
    rows = rng.integers(tokens, size=(responses, PROMPT + length))
    one = np.zeros(1, "f4")
    batch = [gvm_raft.Response(row[:PROMPT].tolist(), row[PROMPT:], one, 1.0) for row in rows]
    with torch.no_grad():
        forward, work = cpu_seconds(policy, batch, lambda *work: work, TEMPERATURE)
    hidden_KD, _, length_B, head, _ = work
    target_K, entropy = likely_targets(*work)
    work = hidden_KD, target_K, length_B, head, TEMPERATURE
    truth_B, seconds, errors = exact(*work), {"forward pass": forward / responses}, {}
    for name, measure in WAYS.items():
        with torch.no_grad():
            spent, norm_B = cpu_seconds(measure, *work)
        seconds[name] = (forward + spent) / responses
        errors[name] = (norm_B / truth_B - 1).abs().max().item()
    for name, tied in (("the authors', tied", True), ("the authors', input side", False)):
        seconds[name] = cpu_seconds(authors, model, batch, TEMPERATURE, tied)[0] / responses
    return seconds, errors, entropy


def main(
    repeats: int = 3,
    layers: int = 24,
    lengths: Annotated[tuple[int, ...], tyro.conf.arg(metavar="T ...")] = (256, 1024),
    tokens: int = 1024,
    vocabulary: int = 151_936,
    hidden: int = 896,
):
    """Measures per-response gradient norms in CPU-seconds, ours beside the authors'.

    Args:
        repeats: times everything is measured; the table holds medians
        layers: of the model; the 0.5B shape has 24
        lengths: of the responses, in tokens
        tokens: of the responses that share a forward pass
        vocabulary: of the model
        hidden: size of the states
    """
    torch.set_num_threads(1)
    found = proof()
    print("Largest relative error against autograd in float64 (97 tokens, padded batch):\n")
    print("| targets' logits raised by | error |\n|---|---|")
    for sure, error in found.items():
        print(f"| {sure:g} | {error:.1e} |")
    if not max(found.values()) <= 1e-10:
        raise SystemExit("grad_norm.py: a norm differs from autograd's")

    sizes = {"hidden_size": hidden, "num_attention_heads": 14, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 4864, "num_hidden_layers": layers, "vocab_size": vocabulary}
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**sizes, tie_word_embeddings=True)
    model = transformers.Qwen2ForCausalLM(config).eval()
    print(f"\n{datetime.date.today()}, torch {torch.__version__}, transformers", end=" ")
    print(f"{transformers.__version__}, one thread, float32, {layers} layers, {repeats} repeats")
    for length in lengths:
        runs = [compare(model, length, max(1, tokens // length)) for _ in tqdm(range(repeats))]
        middle = {name: np.median([run[0][name] for run in runs]) for name in runs[0][0]}
        print(f"\nT = {length}, batch of {max(1, tokens // length)}, ", end="")
        print(f"{PROMPT} tokens of prompt, entropy {runs[0][2]:.2f} nats\n")
        print("| way | CPU-seconds per response | authors' tied | input side | error |")
        print("|---|---|---|---|---|")
        for name, spent in middle.items():
            ratios = [middle[f"the authors', {way}"] / spent for way in ("tied", "input side")]
            error = f"{runs[0][1][name]:.1e}" if name in WAYS else ""
            print(f"| {name} | {spent:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {error} |")


if __name__ == "__main__":
    tyro.cli(main)
