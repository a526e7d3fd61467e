r"""Throughput of verify_batch beside plain math-verify on the full text, one core each.

Eight responses to a problem: four right ones in different formats, three wrong ones (a digit
changed, or the answer to another problem), and a malformed one. The reasoning is the data's
solution where there is one, else the problem restated. Both verifiers see the same responses, in
turns, pinned to the same core. Where they disagree, the label of the response says who is right.

    python bench/verify.py data/gsm8k_test.jsonl data/math500.jsonl
"""

import argparse
import json
import logging
import os
import random
import re
import sys
import time
from pathlib import Path

import math_verify

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import verify_math
from verify_math import extract_answer, verify_batch

ENDINGS = [
    "So the answer is $\\boxed{%s}$.",
    "\\[\\boxed{%s}\\]",
    "**Answer:** \\boxed{%s}",
    "Thus $x = \\boxed{%s}.$",
]


def spoil(answer, other, generator):
    """A wrong answer that looks like a right one."""
    digits = [match.start() for match in re.finditer(r"\d", answer)]
    if not digits or generator.random() < 0.2:
        return other
    at = generator.choice(digits)
    return answer[:at] + str((int(answer[at]) + generator.randint(1, 8)) % 9 + 1) + answer[at + 1 :]


def make_responses(rows, generator):
    """Tuples of response, gold and whether the response is right."""
    for row in rows:
        gold = row["answer"]
        text = re.sub(r"<<.*?>>", "", row.get("solution", row["problem"])).split("####")[0]
        other = generator.choice(rows)["answer"]
        wrong = [spoil(gold, other, generator) for _ in range(3)]
        answers = [
            gold,
            gold.replace("\\frac", "\\dfrac"),
            gold.replace(" ", ""),
            f" {gold} ",
            *wrong,
        ]
        for answer, ending in zip(answers, generator.choices(ENDINGS, k=7), strict=True):
            yield f"{text}\n{ending % answer}", gold, answer not in wrong or answer == gold
        yield (
            text
            + "\n"
            + generator.choice(
                ["\\boxed{", "\\boxed{}", "The answer is " + gold, "\\boxed{" + gold]
            ),
            gold,
            False,
        )


def plain(response, gold):
    """math-verify as its documentation uses it, with the gold in a box."""
    return math_verify.verify(math_verify.parse(f"\\boxed{{{gold}}}"), math_verify.parse(response))


def measure(path, problems, seed):
    """Print throughput and disagreements for one file."""
    generator = random.Random(seed)
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    cases = list(make_responses(generator.sample(rows, min(problems, len(rows))), generator))
    asked, ask = [], verify_math._ask
    verify_math._ask = lambda *request: asked.append(request) or ask(*request)
    seconds, found = (
        {"math-verify": 0.0, "verify_math": 0.0},
        {"math-verify": [], "verify_math": []},
    )
    for start in range(0, len(cases), 800):  # a sampling round of 100 problems
        part = cases[start : start + 800]
        begin = time.perf_counter()
        found["math-verify"] += [plain(response, gold) for response, gold, _ in part]
        middle = time.perf_counter()
        found["verify_math"] += verify_batch([case[0] for case in part], [case[1] for case in part])
        seconds["math-verify"] += middle - begin
        seconds["verify_math"] += time.perf_counter() - middle
    verify_math._ask = ask
    print(
        f"\n{Path(path).stem}: {len(cases)} responses, {sum(case[2] for case in cases)} right ones"
    )
    for name, verdicts in found.items():
        errors = [verdict != case[2] for verdict, case in zip(verdicts, cases, strict=True)]
        print(
            f"{name}: {len(cases) / seconds[name]:,.0f} responses/s, {sum(errors)} verdicts wrong"
        )
    print(f"ratio: {seconds['math-verify'] / seconds['verify_math']:.1f}")
    pairs = {(extract_answer(case[0]), case[1]) for case in cases} - {
        (None, case[1]) for case in cases
    }
    print(f"distinct answers: {len(pairs)}, of them {len(asked)} left to the worker")
    boxless = 0
    for (response, gold, right), theirs, ours in zip(cases, *found.values(), strict=True):
        answer = extract_answer(response)
        boxless += ours != theirs and not answer
        if ours != theirs and answer:
            who = "verify_math" if ours == right else "math-verify"
            print(f"  {who} is right: answer {answer!r}, gold {gold!r}, verify_math says {ours}")
    print(f"responses without a closed, filled box that math-verify accepts: {boxless}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", help="JSON lines with problem and answer")
    parser.add_argument("--problems", type=int, default=500, help="problems from each file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    begin = time.perf_counter()
    verify_batch(["\\boxed{[0,1]\\cup[1,2]}"], ["[0,2]"])
    plain("\\boxed{\\sin^2 x}", "1-\\cos^2 x")
    print(
        f"start and first answer of a worker: {time.perf_counter() - begin:.1f} s, once a process"
    )
    for path in args.files:
        measure(path, args.problems, args.seed)


if __name__ == "__main__":
    main()
