"""The benches behind the README's claims, in miniature: variance.py and vs_trl.py."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import variance
import vs_trl

BENCH = Path(variance.__file__).parent


def run(script, *arguments):
    command = [sys.executable, BENCH / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("|")]


def made_up_bank(problems=4, size=50, seed=0):
    """Accept rates of 0.1 to 0.9, and gradients that depend on the reward."""
    generator = np.random.default_rng(seed)
    rates = np.linspace(0.1, 0.9, problems)
    rewards = (generator.random((problems, size)) < rates[:, None]).astype(float)
    gradients = generator.normal(size=(problems, size, 3)) + rewards[:, :, None]
    lengths = generator.integers(5, 20, size=(problems, size))
    norms = np.linalg.norm(gradients, axis=2)
    return variance.make_bank(rewards, lengths, gradients, norms)


# ---- variance.py


def test_a_step_of_the_whole_bank_is_the_truth_of_every_weight():
    bank = made_up_bank()
    whole = [np.arange(50)] * 4
    found, hits = variance.estimate_gradients(whole, bank)
    gap = bank.rewards - bank.rates[:, None]
    truth = {
        "Lemma 1": bank.rewards / bank.rates[:, None] / 50 / 4,
        "reward": bank.rewards / 50 / 4,
        "centred": gap / 49 / 4,
        "GRPO": gap / np.sqrt(bank.rates * (1 - bank.rates))[:, None] / 50 / 4,
        "token mean": bank.rewards / (bank.rewards * bank.lengths).sum(),
    }
    truth["1/\\|D\\|"] = truth["Lemma 1"]
    for name, gradient in zip(variance.WEIGHTS, found, strict=True):
        by_hand = np.einsum("ms,msd->d", truth[name], bank.gradients)
        assert gradient == pytest.approx(by_hand), name
    assert hits == pytest.approx(bank.rewards.sum(1))


def test_the_mean_of_many_steps_is_the_truth_where_weights_are_unbiased():
    bank, generator = made_up_bank(), np.random.default_rng(1)
    truth, _ = variance.estimate_gradients([np.arange(50)] * 4, bank)
    found = []
    for _ in range(2000):
        picks = [generator.integers(50, size=n) for n in (2, 3, 4, 5)]
        found.append(variance.estimate_gradients(picks, bank)[0])
    gap = np.abs(np.mean(found, axis=0) - truth)
    error = np.std(found, axis=0) / 2000**0.5

    agrees = dict(zip(variance.WEIGHTS, (gap < 4 * error).all(1)))
    assert agrees["Lemma 1"] and agrees["reward"] and agrees["centred"]
    assert not agrees["1/\\|D\\|"] and not agrees["GRPO"]


def test_every_budget_spends_what_it_may_and_keeps_its_pilots():
    bank = made_up_bank()
    for name, budget in variance.BUDGETS.items():
        counts, kept = budget(3, bank, np.random.default_rng(0))
        paid = 1 if "thrown away" in name else 0
        assert counts.sum() == (3 - paid) * 4, name
        reused = "1 pilot" in name or "prior 0" in name or "1 - p" in name
        assert kept.shape == (4, int(reused)), name
        assert np.all(counts >= kept.shape[1]), name


def test_prop_1_is_below_the_uniform_budget_in_lemma_1s_variance():
    bank = made_up_bank(problems=8)
    settings = variance.Config(each=3, replicates=400)
    errors = []
    for name in ("uniform", "Prop. 1, true p and G"):
        generator = np.random.default_rng(0)
        budget = variance.BUDGETS[name]
        found, bias, _ = variance.take_steps(budget, bank, settings, generator)
        errors.append(found[list(variance.WEIGHTS).index("Lemma 1")].mean())
        # 1/|D| is biased where nothing is accepted, Lemma 1 is not, up to its noise.
        by_hit, unbiased, *_ = bias / found.mean(1)
        assert by_hit > 0.02 and unbiased < 0.01
    assert errors[1] < errors[0]


def test_a_comparison_gives_the_ratio_of_means_and_its_error():
    errors, baseline = np.array([1.0, 3.0]), np.array([4.0, 4.0])
    # the deviation of 1 and 3 is 1, that of their mean 1/√2
    assert variance.compare(errors, baseline) == f"0.50 ± {1.96 / 4 / 2**0.5:.2f}"


@pytest.mark.slow
def test_variance_prints_the_law_and_a_row_for_each_budget():
    rows = run("variance.py", "--batch", 8, "--bank", 16, "--replicates", 5)
    assert rows[0].startswith("| accept rate | problems | G | G / (1 - p) |")
    assert sum(int(row.split("|")[2]) for row in rows[2:] if " to " in row) == 8
    for name in variance.BUDGETS:
        (row,) = [row for row in rows if row.startswith(f"| {name} |")]
        assert row.count("±") == len(variance.WEIGHTS)


# ---- vs_trl.py


def test_the_clock_counts_cpu_seconds_by_part():
    clock = vs_trl.Counter()
    work = vs_trl.timed(clock, "work", lambda n, times: sum(range(n)) * times)
    assert work(10, times=2) == 90 and work(10**6, times=1) > 0
    assert clock["work"] > 0 and list(clock) == ["work"]


def test_the_report_divides_costs_by_responses_and_means_by_seeds(capsys):
    cfg = vs_trl.Config(seeds=2, steps=2, problems_per_step=50, samples_per_problem=10)
    nan = float("nan")
    results = {"TRL": [[4, 6, 0.5, nan], [6, 8, 0.6, nan]]}
    results["ours"] = [[1, 2, 0.5, 0.2], [2, 1, 0.7, 0.4]]
    vs_trl.report(cfg, results)
    printed = capsys.readouterr().out
    assert "| sampling | 5.00 | 1.50 | 3.33 (3.00 to 4.00) |" in printed
    assert "| both | 12.00 | 3.00 | 4.00 (3.33 to 4.67) |" in printed
    assert "| 0.550 (0.500 to 0.600) | 0.600 (0.500 to 0.700) | |" in printed
    assert "30% of our responses" in printed


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("trl"), reason="needs TRL, as bench/vs_trl.py says")
def test_vs_trl_has_a_row_for_each_part_and_both_accuracies():
    small = {"--problems-per-step": 8, "--samples-per-problem": 4, "--steps": 2}
    flags = [flag for pair in small.items() for flag in pair]
    rows = run("vs_trl.py", "--seeds", 1, *flags)
    for part in ("sampling", "update", "both"):
        (row,) = [row for row in rows if row.startswith(f"| {part} |")]
        assert all(float(cell.split()[0]) > 0 for cell in row.split("|")[2:5])
    assert rows[-3].startswith("| accuracy at the end | 0.")


@pytest.mark.skipif(bool(find_spec("trl")), reason="TRL is here")
def test_without_trl_it_says_so_in_one_sentence():
    with pytest.raises(SystemExit, match="needs the package trl: pip install"):
        vs_trl.main(vs_trl.Config())
