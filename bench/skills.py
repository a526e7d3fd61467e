r"""A harder problem set than tiny/: twelve skills that share nothing, from solved to hopeless.

In tiny/ one habit solves all problems, so that easy ones teach hard ones. Here a problem such as
5&3+4+6 hides a rule behind its symbol. The model knows all twelve rules and names one before it
computes (e:53=38, ...), but for each symbol it names the right one at its own rate, from 0.9 down
to 0.012, and no symbol teaches another. This is where a budget can matter most: solved problems
need no responses, and rare ones need many. The training set is small, as real ones are: with 32
problems a step, each of the 240 comes again every seven or eight steps.

Run: python bench/skills.py     (four minutes on one core; makes runs/skills/), then

python bench/learning.py --budgets --folder runs/learning-skills --out bench/skills.png \
    --steps 56 --problems-per-step 32 --learning-rate 8e-4 --eval-every 4 \
    --extra="--samples-per-problem 4 --updates-per-step 2 --tokens-per-batch 16384 \
    --model runs/skills/model --problems runs/skills/train.jsonl \
    --eval-problems runs/skills/test.jsonl"                        (20 minutes on two cores)

With --solved 0.97 the model is sure of nine symbols, as one is late in training, and the right
rules of the other three are --rare in its demonstrations. 97% of the training problems have one of
the nine, so that nearly all of a uniform budget is spent on what is solved. The test set has as
many problems of each rare symbol as of the nine together: its accuracy shows what is still missing.

python bench/skills.py --solved 0.97 --train 960 --out runs/solved, then
python bench/learning.py --folder runs/learning-solved --out bench/solved.png \
    --steps 104 --problems-per-step 120 --learning-rate 4.5e-4 --eval-every 4 \
    --extra="--samples-per-problem 2 --tokens-per-batch 16384 --model runs/solved/model \
    --problems runs/solved/train.jsonl --eval-problems runs/solved/test.jsonl"
                                                                       (35 minutes on two cores)
"""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tiny"))
import make

ROOT = Path(__file__).resolve().parent.parent
RULES = {
    "a": lambda a, b: a + b,
    "b": lambda a, b: a * b,
    "c": lambda a, b: abs(a - b),
    "d": lambda a, b: 10 * a + b,
    "e": lambda a, b: 10 * b + a,
    "f": lambda a, b: 2 * a + b,
    "g": lambda a, b: a + 2 * b,
    "h": lambda a, b: a * b + a,
    "i": lambda a, b: a * b + b,
    "j": lambda a, b: a + b + 20,
    "k": lambda a, b: a * b + 9,
    "l": lambda a, b: abs(a - b) + 30,
}
MEANING = dict(zip("@#$%&?!~^|;_", RULES))  # the right rule of every symbol
HABIT = dict(zip(MEANING, [0.9, 0.6, 0.42, 0.3, 0.2, 0.14, 0.1, 0.07, 0.045, 0.03, 0.02, 0.012]))


@dataclass(frozen=True)
class Config:
    out: Path = ROOT / "runs" / "skills"  # folder of model/, train.jsonl and test.jsonl
    overwrite: bool = False  # replace files that exist
    train: int = 240  # problems; with few, their accept rates are worth remembering
    solved: float = 0.0  # share of them with one of nine symbols that the model is sure of
    rare: tuple[float, float, float] = (0.015, 0.01, 0.007)  # then, rates of the other symbols


def make_problem(rng, symbols=tuple(MEANING)):
    """A symbol between two digits on which no two rules agree, then up to two sums."""
    results = []
    while len({*results}) < len(RULES):
        a, b = rng.sample(range(2, 10), 2)
        results = [rule(a, b) for rule in RULES.values()]
    symbol = rng.choice(symbols)
    rest = "".join("+" + str(rng.randint(1, 9)) for _ in range(rng.randint(0, 2)))
    return f"{a}{symbol}{b}{rest}"


def make_nearly_solved(cfg):
    """The training problems, mostly solved, and 400 test problems, a quarter of them solved."""
    rng, seen = random.Random(0), {}
    symbols = tuple(MEANING)
    sure, rare = symbols[:9], symbols[9:]

    def draw(some, count):
        new = {}
        while len(new) < count:
            problem = make_problem(rng, some)
            if problem not in seen:
                new[problem] = seen[problem] = None
        return list(new)

    test = [problem for some in (sure, *rare) for problem in draw(some, 100)]
    easy = round(cfg.solved * cfg.train)
    train = draw(sure, easy) + draw(rare, cfg.train - easy)
    rng.shuffle(train)
    return train, test


def solve(problem, rule=None):
    """The rule's letter and result, the sums, then the answer; by default with the right rule."""
    rule = rule or MEANING[problem[1]]
    total = RULES[rule](int(problem[0]), int(problem[2]))
    lines = [f"{rule}:{problem[:3]}={total}"]
    for digit in re.findall(r"\+(\d)", problem):
        lines.append(f"{total}+{digit}={total + int(digit)}")
        total += int(digit)
    return "\n".join([*lines, f"\\boxed{{{total}}}"])


def demonstrations(is_skill, test, rng):
    """A batch of problems outside the test set: any rule at first, then by the symbols' habits."""
    problems, responses = [], []
    while len(problems) < make.BATCH:
        problem = make_problem(rng)
        if problem in test:
            continue
        right = MEANING[problem[1]]
        others = [rule for rule in RULES if is_skill or rule != right]
        sure = not is_skill and rng.random() < HABIT[problem[1]]
        problems.append(problem)
        responses.append(solve(problem, right if sure else rng.choice(others)))
    return problems, responses


def main(cfg):
    """Makes the model and its problems with the functions of tiny/make.py, but these."""
    if not 0 < cfg.train <= 16_000:
        sys.exit(f"skills.py: --train must be between 1 and 16000, not {cfg.train}")
    for rate in (cfg.solved, *cfg.rare):
        if not 0 <= rate <= 1:
            sys.exit(f"skills.py: --solved and --rare are between 0 and 1, not {rate}")
    make.make_problem, make.solve, make.demonstrations = make_problem, solve, demonstrations
    make.TRAIN, make.UPDATES, make.BATCH = cfg.train, 2600, 48
    if cfg.solved:
        HABIT.update(zip(MEANING, [0.995] * 9 + [*cfg.rare]))
        make.make_problems = lambda: make_nearly_solved(cfg)
    make.main(make.Config(out=cfg.out, overwrite=cfg.overwrite))


if __name__ == "__main__":
    main(tyro.cli(Config))
