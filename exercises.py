"""Nine exercises on GVM: write the method yourself, then find out what it is worth.

    python exercises.py                  where each exercise stands
    python exercises.py 3                the text of exercise 3, and its check
    python exercises.py --at DIR         the same, for another folder than this one
    python exercises.py --handout NAME   make a student's folder, to write code in
    python exercises.py --hunt           make the logs of exercise 8
    python exercises.py --grade DIR...   marks as CSV, a row a folder, at most 20

What is written in a handout trains a model: after 1 to 6 `python gvm_raft.py` draws the
tokens that the repository's own draws (the mark "run"). A check finds the truth in
another way than the function, and says what is wrong in the student's numbers.

To teachers: solutions are public, so 7 to 9 carry the marks, and vary by the student's
name, which is the folder's. Grade from a clone, in a container: nothing here keeps a
student's code from doing what it likes.
"""

import argparse
import ast
import copy
import csv
import hashlib
import importlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent

# What a handout holds: files, tiny/, and files whose functions lose their bodies
HANDOUT = ["verify_math.py", "exercises.py", "requirements.txt", "LICENSE"]
CUT = {
    "allocator.py": ["weights", "allocate", "estimate"],
    "gvm_raft.py": ["gradient_norms", "advantages", "policy_loss"],
}
ANSWERS = """def dropped(rates, pilots):
    raise NotImplementedError("dropped")


def budget(rates, total, objective):
    raise NotImplementedError("budget")
"""


class Wrong(SystemExit):
    """Says in a sentence what is wrong in a student's numbers."""


def compare(what, yours, truth, suspects=None, rtol=1e-6, atol=1e-12):
    """Refuses numbers other than the truth, and says which mistake they look like."""
    yours, truth = np.asarray(yours, float), np.asarray(truth, float)
    if yours.shape != truth.shape:
        raise Wrong(f"{what}: yours have shape {yours.shape}, not {truth.shape}")
    right = np.isclose(yours, truth, rtol, atol)
    if right.all():
        return
    for label, numbers in (suspects or {}).items():
        if np.allclose(yours, numbers, rtol, atol):
            raise Wrong(f"{what}: yours {label}")
    i = right.argmin()
    numbers = f"{yours.flat[i]:.6g}, but should be {truth.flat[i]:.6g}"
    raise Wrong(f"{what}: number {i} is {numbers}")


def require_counts(what, counts, size, low, high, total):
    """Refuses what are not so many integers, low to high, of that sum."""
    right = counts.shape == (size,) and counts.sum() == total
    if not right or not set(counts.tolist()) <= set(range(low, high + 1)):
        numbers = f"{size} integers of {low} to {high} that sum to {total}"
        raise Wrong(f"{what}: {counts.flat[:4]} are not {numbers}")


# ---- The checks


def check_1(folder):
    """Prop. 1 (20 minutes, 1 mark): `weights` in allocator.py.

    Eq. 7 asks for the nᵢ of sum N that make Σᵢ 1/(1 + α/pᵢ^β) · Gᵢ²/(pᵢ nᵢ) least. In
    real numbers a Lagrange multiplier finds them: nᵢ = N wᵢ / Σₗ wₗ. Return the wᵢ, an
    array, in the scale in which Eq. 7 is Σᵢ wᵢ²/nᵢ. A problem that is never solved,
    pᵢ = 0, has weight 0, without a warning. Arguments may be lists.
    """
    weights = load(folder, "allocator").weights
    rates = np.array([0.02, 0.1, 0.3, 0.5, 0.9, 1.0])
    norms = np.array([1.0, 2.0, 0.5, 3.0, 1.5, 0.2])
    for alpha, beta in [(0, 2), (1e-3, 2), (1, 2), (0.1, 4)]:
        yours = weights(rates.tolist(), norms.tolist(), alpha=alpha, beta=beta)
        # Eq. 7 is Σ factor/n, and it is Σ w²/n.
        factors = 1 / (1 + alpha / rates**beta) * norms**2 / rates
        suspects = {
            "leave out α": norms / np.sqrt(rates),
            "rise with pᵢ where Eq. 7 falls": norms * np.sqrt(rates),
        }
        what = f"weights, α = {alpha}, β = {beta}"
        compare(what, yours, np.sqrt(factors), suspects)

    compare("weights where p = 0 and 1", weights([0, 1], [1, 1], alpha=0), [0, 1])


def check_2(folder):
    """Whole numbers (40 minutes, 1 mark): `allocate` in allocator.py.

    Return the integers nᵢ, minimum to maximum (None: no limit), that sum to the budget
    and make Σ wᵢ²/nᵢ least. With wᵢ = 0 a problem has no term, even where nᵢ = 0, and
    gets more than the minimum only if nobody else can take it. Of two with the same
    claim the first comes first.
    """
    allocate = load(folder, "allocator").allocate

    # Few problems: all there is, and of equals the one that gives the first most
    rng = np.random.default_rng(0)
    cases = [rng.lognormal(sigma=1.5, size=m) for m in [1, 2, 3, 4]]
    cases += [np.array([1.0, 1.0, 1.0]), np.array([0.0, 1.0])]
    for w, (low, high) in itertools.product(cases, [(0, 12), (1, 4), (1, 12)]):
        m = len(w)
        what = f"w = {w.round(2)}, {low} to {high}"
        ways = itertools.product(range(high, low - 1, -1), repeat=m)
        ways = np.array(list(ways))
        eq_7 = np.sum(w**2 / np.maximum(ways, 1e-9), axis=1)
        for budget in range(m, min(m * high, 12) + 1):
            yours = np.asarray(allocate(w, budget, minimum=low, maximum=high))
            require_counts(what, yours, m, low, high, budget)
            best = np.where(ways.sum(axis=1) == budget, eq_7, np.inf).argmin()
            same = (ways == yours).all(axis=1).argmax()
            if same != best:
                but = f"but {ways[best]} make it {eq_7[best]:.4g}"
                raise Wrong(f"{what}: your {yours} make Eq. 7 {eq_7[same]:.4g}, {but}")

    # Many problems: one more gains w²/(n(n+1)), never more than any last one did.
    w = rng.lognormal(sigma=1.5, size=200)
    n = np.asarray(allocate(w, 1600, minimum=1, maximum=None))
    require_counts("200 problems", n, 200, 1, 1600, 1600)
    last = n * (n - 1) / w**2
    following = n * (n + 1) / w**2
    i, j = last.argmax(), following.argmin()
    if last[i] > following[j] * (1 + 1e-9):
        move = f"one from problem {i} (n = {n[i]}) to {j} (n = {n[j]})"
        raise Wrong(f"200 problems: {move} lowers Eq. 7")


def check_3(folder):
    """Pilots (30 minutes, 1 mark): `estimate` in allocator.py, `dropped` in answers.py.

    Of drawn[i] pilots accepted[i] are right. The prior of pᵢ is a Beta distribution: it
    is worth `prior` pilots, and its mean is the accept rate of all pilots of the batch.
    p̂ᵢ is the posterior's mean; with prior 0 it is the share. Ĝᵢ is grad_norms[i] if a
    pilot was accepted. Elsewhere it is 1 - p̂ᵢ in the others' scale: times the ratio of
    Σ Ĝ to Σ (1 - p̂) over problems with an accepted pilot. Return p̂ and Ĝ, two arrays.

    With prior 0 a problem without one weighs 0: it is dropped. `dropped(rates, pilots)`
    is the share of problems expected to be, if problem i is solved at rate rates[i].
    """
    estimate = load(folder, "allocator").estimate
    accepted = np.array([0, 1, 4, 7, 0])
    drawn = np.array([8, 8, 8, 8, 4])
    norms = np.array([0, 1.5, 1, 0.25, 0])
    solved = accepted > 0
    mean = accepted.sum() / drawn.sum()
    for prior in [0, 1, 4]:
        rates, filled = estimate(list(accepted), list(drawn), list(norms), prior)

        # The posterior's mean by quadrature over the log-odds of p: dp = p (1 - p) dx
        p = 1 / (1 + np.exp(-np.linspace(-150, 150, 30_001)))[:, None]
        right = accepted + prior * mean
        failed = drawn - accepted + prior * (1 - mean)
        density = p**right * p[::-1] ** failed
        truth = accepted / drawn
        if prior:
            truth = np.sum(p * density, axis=0) / np.sum(density, axis=0)
        half = (accepted + prior / 2) / (drawn + prior)
        suspects = {"have a prior of mean 1/2": half}
        compare(f"prior {prior}, p̂", rates, truth, suspects)

        misses = 1 - truth
        scale = norms[solved].sum() / misses[solved].sum()
        suspects = {
            "are 0 without an accepted pilot": norms,
            "lack the others' scale": np.where(solved, norms, misses),
        }
        truth = np.where(solved, norms, scale * misses)
        compare(f"prior {prior}, Ĝ", filled, truth, suspects)

    # All of the pilots drawn, many times
    rng = np.random.default_rng(0)
    rates = rng.beta(0.5, 1, size=20)
    shares = np.mean(rng.binomial(8, rates, size=[100_000, 20]) == 0, axis=1)
    error = shares.std() / len(shares) ** 0.5
    suspects = {"takes all rates for their mean": (1 - rates.mean()) ** 8}
    yours = load(folder, "answers").dropped(list(rates), 8)
    compare("dropped", yours, shares.mean(), suspects, rtol=0, atol=4 * error)


def check_4(folder):
    """Gradient norms (60 minutes, 1 mark): `gradient_norms` in gvm_raft.py.

    groups[i] holds the responses to problem i, which is their r.i, too. Return Gᵢ, an
    array: the root mean square of ||∇ log P(y)||₂ over responses y of reward 1; 0 where
    there are none. log P(y) is a sum over the tokens of y, at cfg.temperature, and ∇ is
    with respect to the output head W alone: logits = W h. Derive ∇: a sum of outer
    products, whose norm needs no matrix as large as W. `micro_batches` cuts the work;
    `run_policy` gives logits (divided by the temperature), h and tokens of a response;
    `sum_over_ranks` adds up.
    """
    gvm_raft = load(folder, "gvm_raft")
    gvm_raft.start_processes()
    policy = gvm_raft.AutoModelForCausalLM.from_pretrained(HERE / "tiny" / "model")
    exact = copy.deepcopy(policy).double()
    policy.to(gvm_raft.DEVICE)

    # Ragged responses of few tokens, which repeat
    rng = np.random.default_rng(0)
    rewards = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 1]])
    groups = [[], [], [], []]
    for i, k in np.ndindex(4, 3):
        prompt = rng.integers(9, size=2 + k).tolist()
        drawn = rng.integers(9, size=1 + 3 * i + k).tolist()
        response = gvm_raft.Response(i, prompt, 0, drawn, [], reward=rewards[i, k])
        groups[i].append(response)

    def root_mean(squares, number):
        return np.sqrt(np.sum(rewards * squares, axis=1) / number)

    for temperature in [1.0, 0.7, 0.2]:  # at the last one the policy is sure
        cfg = gvm_raft.Config(temperature=temperature, tokens_per_batch=24)
        yours = gvm_raft.gradient_norms(policy, groups, cfg)

        whole, apart = np.zeros([2, 4, 3])
        for i, k in np.ndindex(4, 3):
            gradients = token_gradients(exact, groups[i][k], temperature)
            whole[i, k] = gradients.sum(0).square().sum()
            apart[i, k] = gradients.square().sum()
        accepted = np.maximum(rewards.sum(axis=1), 1)
        truth = root_mean(whole, accepted)
        suspects = {
            "lack a factor 1/T": truth * temperature,
            "divide by all responses": root_mean(whole, 3),
            "leave out what two tokens share": root_mean(apart, accepted),
        }
        compare(f"T = {temperature}, G", yours, truth, suspects, rtol=1e-4)


def token_gradients(policy, response, temperature):
    """The gradient of each token's log P by the output head, from autograd."""
    import torch

    ids = torch.tensor(response.prompt_ids + response.token_ids)
    logps = (policy(ids[None]).logits[0] / temperature).log_softmax(-1)
    gradients = []
    for t in range(len(response.prompt_ids), len(ids)):
        logp = logps[t - 1, ids[t]]
        head = policy.lm_head.weight
        gradients += torch.autograd.grad(logp, head, retain_graph=True)
    return torch.stack(gradients)


def check_5(folder):
    """Advantages (40 minutes, 1 mark): `advantages` in gvm_raft.py, then gvm_grpo.py.

    rewards is an array of the 0 and 1 of the responses to a problem. Return their
    advantages. Algorithm 1 takes the mean over accepted ones; without any, all are 0.

    For GRPO copy gvm_raft.py to gvm_grpo.py, and take there, for any rewards,
    (r - mean)/std over the group (n in the std, not n - 1), divided by n.
    Where all rewards are equal, all advantages are 0. Nothing may warn.
    """
    advantages = load(folder, "gvm_raft").advantages
    for n, p in [(1, 0.5), (2, 0.3), (6, 0.8)]:
        mean = np.zeros(n)
        for outcome in itertools.product([0.0, 1.0], repeat=n):
            rewards = np.array(outcome)
            values = advantages(rewards)
            if np.any(values[rewards == 0]):
                raise Wrong(f"rewards {outcome}: a rejected response has an advantage")
            mean += values * np.prod(np.where(rewards, p, 1 - p))

        # One of n gets 1/n on average, unless none is accepted.
        truth = np.full(n, (1 - (1 - p) ** n) / n)
        suspects = {"are 1/n for an accepted one": np.full(n, p / n)}
        compare(f"mean advantages of {n} responses at rate {p}", mean, truth, suspects)

    advantages = load(folder, "gvm_grpo").advantages
    for rewards in [[1, 0], [0, 1, 1], [1, 0, 0, 0, 1, 0, 1, 1]]:
        n = len(rewards)
        rewards = np.array(rewards, float)
        odds = rewards.mean() / (1 - rewards.mean())
        truth = np.where(rewards, odds**-0.5, -(odds**0.5)) / n
        suspects = {
            "are n times too large: no 1/n": n * truth,
            "have n - 1 in the std": truth * (1 - 1 / n) ** 0.5,
        }
        compare(f"GRPO, rewards {rewards}", advantages(rewards), truth, suspects)
        compare("GRPO, rewards 3 + r/2", advantages(3 + rewards / 2), truth)

    for rewards in [np.zeros(1), np.ones(1), np.zeros(4), np.ones(3)]:
        compare(f"GRPO, rewards {rewards}", advantages(rewards), 0 * rewards)


def check_6(folder):
    """The clip (20 minutes, 1 mark): `policy_loss` in gvm_raft.py.

    s is the ratio of a token's probability under the policy to that when it was drawn;
    A, of any sign, is its response's advantage. Return the loss of each token, minus
    Eq. 6: min(s A, clip(s, 1 - ε_low, 1 + ε_high) A). The gradient goes through logp_T.
    When s = 1 everywhere, the loss is -A: why is there something to learn?
    """
    import torch

    gvm_raft = load(folder, "gvm_raft")
    clips = gvm_raft.Config(clip_low=0.2, clip_high=0.28)
    ratios = np.array([0.5, 0.7, 0.9, 1.0, 1.2, 1.4, 2.0])
    for advantage in [2.0, 0.0, -0.5]:
        old_T = torch.full([7], -1.0, dtype=torch.float64)
        logp_T = (old_T + torch.tensor(ratios).log()).requires_grad_()
        loss_T = gvm_raft.policy_loss(logp_T, old_T, advantage, clips)
        slope_T = torch.autograd.grad(loss_T.sum(), logp_T)[0]

        # By pieces: what would push a ratio beyond its clip has no slope.
        beyond = (advantage > 0) & (ratios > 1.28) | (advantage < 0) & (ratios < 0.8)
        edge = 1.28 if advantage > 0 else 0.8
        truth = -advantage * np.where(beyond, edge, ratios)
        free = -advantage * ratios
        clipped = -advantage * ratios.clip(0.8, 1.28)
        suspects = {
            "are not clipped": free,
            "have a max for the min": np.minimum(free, clipped),
        }
        where = f"advantage {advantage}, ratios {ratios.tolist()}"
        compare(f"{where}, losses", loss_T.detach(), truth, suspects)
        compare(f"{where}, slopes", slope_T, truth * ~beyond)


def check_7(folder):
    """Which objective, which budget? (45 minutes, 4 marks): `budget` in answers.py.

    Let a problem have one parameter θ, and a response be right with p = sigmoid(θ): so
    ∇ log P(y) is 1 - p for a right one (that is G) and -p for a wrong one. Three
    estimates are means over the n responses to a problem, r their rewards, of

        log      r ∇ log P(y) / p         for the objective Σ log p: Lemma 1
        reward   r ∇ log P(y)             for Σ p
        centred  (r - p) ∇ log P(y)       for Σ p, with a baseline

    `budget(rates, total, objective)` returns integers n >= 1 of sum total that make the
    sum of the variances least; up to 1.001 times the least will do. Your own `allocate`
    takes any weights. For which of the three is Prop. 1 right?
    """
    budget = load(folder, "answers").budget
    rng = np.random.default_rng(number_of(folder.name))
    p = rng.beta(0.5, 0.8, size=50).clip(0.02, 0.98)
    total = 50_000
    outcomes = {  # the estimate for a right response, and for a wrong one
        "log": ((1 - p) / p, 0),
        "reward": (1 - p, 0),
        "centred": ((1 - p) ** 2, p**2),
    }
    for objective, (right, failed) in outcomes.items():
        yours = np.asarray(budget(p, total, objective))
        require_counts(objective, yours, len(p), 1, total, total)

        variances = p * (1 - p) * (right - failed) ** 2  # of one response
        least = np.sqrt(variances).sum() ** 2 / total  # Cauchy and Schwarz
        ratio = np.sum(variances / yours) / least
        paper = (1 - p) / p**0.5
        same = np.allclose(yours / total, paper / paper.sum(), rtol=0, atol=1e-3)
        if ratio > 1.001:
            whose = "Prop. 1's budget, as yours," if same else "your budget"
            raise Wrong(f"{objective}: {whose} has {ratio:.4g} times the least sum")


# Defects of gvm_raft.py: the right text, the wrong one; metrics that show it, and how
DEFECTS = {
    "A": ("logit_TV[span]", "logit_TV[1:][span]"),
    "B": (".float() / cfg.temperature", ".float()"),
    "C": ("        sampler.load(policy)", "        pass"),
    "D": (", kept=pilots)", ")"),
    "E": ("problem.index, j]", "problem.index]"),
}
SYMPTOMS = {
    "A": (["logp_shift"], "is larger than 1"),
    "B": (["logp_shift"], "is 1e-6 to 1 from the first step on"),
    "C": (["logp_shift"], "is larger than 1e-6 from the second step on"),
    "D": (["responses", "tokens"], "grow by more than the sum of the counts"),
    "E": (["pass_at_k", "accepted"], "are those of one response to each problem"),
}


def check_8(folder):
    """Read the symptoms (40 minutes, 5 marks): hunt/answer.json.

    After 1 to 6, `python exercises.py --hunt` runs your gvm_raft.py, four steps of one
    update at temperature 0.9: as it is, and with five defects, in an order of your own.
    Their metrics.jsonl become hunt/log-0.jsonl, the sound one, and log-1 to log-5.

        A  the policy's log-probabilities are those of one place further on
        B  they are not divided by the temperature
        C  the sampler never gets the new weights
        D  pilots are thrown away, not kept among the nᵢ
        E  all responses to a problem have the same random numbers

    In hunt/answer.json give each log a letter and a metric that gives the defect away:
    {"log-1": "A loss", ...}
    """
    answer = json.loads((folder / "hunt" / "answer.json").read_text())
    for k, letter in enumerate(order_of_defects(folder.name), start=1):
        guess, _, metric = answer[f"log-{k}"].partition(" ")
        if guess != letter:
            metrics, how = SYMPTOMS.get(guess, (["the letter"], "is one of A to E"))
            raise Wrong(f"log-{k} is not {guess}: then {' and '.join(metrics)} {how}")
        if metric not in SYMPTOMS[letter][0]:
            raise Wrong(f"log-{k} is {letter}, but {metric!r} does not give it away")


def check_9(folder):
    """Does it pay? (60 minutes and the machine's, 4 marks): claim.json.

    Choose two arms a and b that draw as many responses: uniform (below) and GVM, or a
    change of your own. Run each on the tiny problems for the five seeds that
    `python -c "import exercises; print(exercises.seeds('NAME'))"` prints:

        python gvm_raft.py --pilot-samples 0 --seed SEED --run-dir pays/a-SEED

    Of the last accuracies b - a has a mean over the five pairs, and a paired t interval
    at 95%. The verdict is "a" or "b", whichever is better, or "open" with 0 inside:

        {"difference": 0.1, "low": -0.2, "high": 0.4, "verdict": "open"}
    """
    claim = json.loads((folder / "claim.json").read_text())
    accuracies, settings = [], []
    for arm, seed in itertools.product("ab", seeds(folder.name)):
        run = folder / "pays" / f"{arm}-{seed}"
        config = json.loads((run / "config.json").read_text())
        *_, last = rows_of((run / "metrics.jsonl").read_text())
        if config["seed"] != seed or last["step"] != config["steps"]:
            raise Wrong(f"pays/{run.name} has another seed, or has not ended")
        accuracies.append(last["accuracy"])
        same = {"seed": arm, "run_dir": arm, "drawn": last["responses"]}
        settings.append(config | same)

    a, b = settings[0], settings[5]
    if settings != [a] * 5 + [b] * 5:
        raise Wrong("the runs of an arm differ in more than the seed")
    if a["drawn"] != b["drawn"]:
        raise Wrong(f"a draws {a['drawn']} responses, but b {b['drawn']}")

    gains = np.array(accuracies[5:]) - accuracies[:5]
    error = gains.std(ddof=1) / 5**0.5 * np.array([0, -1, 1])
    truth = gains.mean() + 2.776 * error  # t of 4 degrees of freedom
    yours = [claim["difference"], claim["low"], claim["high"]]
    suspects = {"have the normal's 1.96, not t's 2.776": gains.mean() + 1.96 * error}
    compare("difference, low and high", yours, truth, suspects, atol=1e-3)
    _, low, high = truth
    verdict = "b" if low > 0 else "a" if high < 0 else "open"
    if claim["verdict"] != verdict:
        raise Wrong(f"verdict: {low:.3f} to {high:.3f} says {verdict!r}")


def check_run(folder):
    """All in training (1 mark): your gvm_raft.py draws the repository's tokens."""
    if not (HERE / "raft.py").is_file():
        raise Wrong("the repository's run is not here: check in a clone")
    options = ["--steps", "3", "--eval-samples", "1"]
    yours = train(folder / "gvm_raft.py", *options)
    truth = train(HERE / "gvm_raft.py", *options)
    for row, right in zip(rows_of(yours), rows_of(truth), strict=True):
        for metric in ["counts", "accepted", "responses", "tokens", "accuracy"]:
            if row.get(metric) != right.get(metric):
                raise Wrong(f"step {row['step']}: the run has other {metric}")


# ---- What they need


def train(script, *options):
    """What a run of a gvm_raft.py writes to metrics.jsonl."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, script, "--run-dir", scratch, *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        if done.returncode:
            last = (done.stdout + done.stderr).strip().rpartition("\n")[2]
            raise Wrong(f"gvm_raft.py does not run (1 to 6 first?): {last}")
        return (Path(scratch) / "metrics.jsonl").read_text()


def rows_of(text):
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in text.splitlines()]


def load(folder, module):
    """A student's module, and what it imports, from their folder."""
    (folder / f"{module}.py").resolve(strict=True)  # is there
    sys.path.insert(0, str(folder))
    return importlib.import_module(module)


def number_of(text):
    """A large number that the text stands for."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def order_of_defects(name):
    """The letters of log-1 to log-5 in exercise 8."""
    return sorted(DEFECTS, key=lambda letter: number_of(name + letter))


def seeds(name):
    """The five seeds of exercise 9."""
    return [number_of(name) % 10_000 + k for k in range(5)]


# ---- Commands

CHECKS = [check_1, check_2, check_3, check_4, check_5, check_6, check_run]
CHECKS += [check_7, check_8, check_9]
CHECKS = {check.__name__.removeprefix("check_"): check for check in CHECKS}
MARKS = dict.fromkeys(CHECKS, 1) | {"7": 4, "8": 5, "9": 4}


def verdict(label, folder):
    """What a check says, in a sentence."""
    try:
        with np.errstate(divide="raise", invalid="raise"):
            CHECKS[label](folder)
        return "passes"
    except NotImplementedError:
        return "not written yet"
    except FileNotFoundError as error:
        return f"not handed in: {error.filename}"
    except Wrong as error:
        return f"wrong: {error}"
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = [f for f in frames if Path(f.filename).parent == folder] or frames
        place = f"{Path(places[-1].filename).name}, line {places[-1].lineno}"
        return f"wrong: {type(error).__name__} in {place}: {error}"


def make_handout(target):
    """Copies what a student gets, without the bodies of what they are to write."""
    if target.exists():
        raise Wrong(f"{target} is there already")
    shutil.copytree(HERE / "tiny", target / "tiny")
    for name in HANDOUT:
        shutil.copy(HERE / name, target)
    for name, functions in CUT.items():
        (target / name).write_text(cut(HERE / name, functions))
    (target / "answers.py").write_text(ANSWERS)
    print(f"{target} is ready, named after its student; in it: python exercises.py")


def cut(path, functions):
    """The source without the bodies of the functions, which keep their docstrings."""
    source = path.read_text()
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and node.name in functions:
            body = [f'    raise NotImplementedError("{node.name}")\n']
            lines[node.body[0].end_lineno : node.end_lineno] = body
    return "".join(lines)


def hunt(folder):
    """Makes the logs of exercise 8: of a sound run, and of one with each defect."""
    source = (folder / "gvm_raft.py").read_text()
    options = ["--steps", "4", "--updates-per-step", "1", "--temperature", "0.9"]
    script = folder / "planted.py"
    defects = [("", "")] + [DEFECTS[letter] for letter in order_of_defects(folder.name)]
    for k, (right, wrong) in enumerate(tqdm(defects, disable=None)):
        script.write_text(source.replace(right, wrong))
        rows = train(script, *options)
        (folder / "hunt").mkdir(exist_ok=True)
        (folder / "hunt" / f"log-{k}.jsonl").write_text(rows)
    script.unlink()


def grade(folders):
    """Prints the marks as CSV, and on stderr what each check says."""
    table = csv.writer(sys.stdout)
    table.writerow(["student", *CHECKS, "total"])
    for folder in folders:
        marks = []
        for label, mark in MARKS.items():
            said = check_apart(label, folder)
            print(f"{folder.name}, {label}: {said}", file=sys.stderr)
            marks.append(mark if said == "passes" else 0)
        table.writerow([folder.name, *marks, sum(marks)])
        sys.stdout.flush()


def check_apart(label, folder, seconds=120):
    """What a check says in a process of its own, which a crash or a hang may end."""
    command = [sys.executable, __file__, label, "--at", folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"takes more than {seconds} s"
    last = (done.stderr + done.stdout).strip().rpartition("\n")[2]
    if not last.startswith(f"exercise {label}: "):
        return f"crashes with exit code {done.returncode}: {last}"
    return last.removeprefix(f"exercise {label}: ")


def main():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("exercise", nargs="?", choices=CHECKS)
    parser.add_argument("--at", type=Path, default=HERE, metavar="DIR")
    parser.add_argument("--handout", type=Path, metavar="DIR")
    parser.add_argument("--grade", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--hunt", action="store_true")
    args = parser.parse_args()
    sys.dont_write_bytecode = True  # in a student's folder

    if args.handout:
        return make_handout(args.handout)
    folders = [folder.resolve() for folder in args.grade or [args.at]]
    for folder in folders:
        if not folder.is_dir():
            raise Wrong(f"{folder}: no such folder")
    if args.grade:
        return grade(folders)
    if args.hunt:
        return hunt(folder)

    if args.exercise:
        print(CHECKS[args.exercise].__doc__)
        said = verdict(args.exercise, folder)
        print(f"exercise {args.exercise}: {said}")
        return sys.exit(said != "passes")
    for label, check in CHECKS.items():
        if label != "run":
            title = check.__doc__.partition(" (")[0]
            print(f"{label}  {title:<34}{verdict(label, folder)}", flush=True)


if __name__ == "__main__":
    main()
