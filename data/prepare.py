r"""Makes the problem files of the scripts from csv, parquet, json and hub sets.

Run: python data/prepare.py openai/gsm8k:main:train --problem-column question --out FILE

FILE gets JSON lines with "problem" and "answer". Where the answer column holds whole
solutions (GSM8K's "... #### 42", MATH's \boxed{42}) their answers are taken out, and
"solution" keeps the whole for bench/warmup.py, as it keeps a column of that name.
"""

import csv
import gzip
import io
import json
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from verify_math import gold_answer


@dataclass(frozen=True)
class Config:
    source: tyro.conf.Positional[str]  # a file, or a hub set: name[[:config]:split]
    out: Path  # the file to make
    problem_column: str = "problem"
    answer_column: str = "answer"  # answers, or solutions that hold them
    limit: int | None = None  # read so many rows only
    hold_out: int = 0  # so many problems go to <out>_held_out.jsonl instead
    seed: int = 0  # of the draw of those
    drop_unanswered: bool = False  # leave out rows without one answer, with a count
    overwrite: bool = False  # replace files that exist


def main(cfg):
    """All rows are read and judged before anything is written."""
    held_out = cfg.out.with_name(f"{cfg.out.stem}_held_out.jsonl")
    for path in [cfg.out, held_out] if cfg.hold_out else [cfg.out]:
        if path.is_dir() or (path.exists() and not cfg.overwrite):
            raise SystemExit(f"{path} exists: name another, or say --overwrite")
    if held_out.exists() and not cfg.hold_out:
        raise SystemExit(
            f"{held_out} would be in {cfg.out}, too: remove it, or hold out"
        )
    try:
        rows = islice(read_rows(cfg.source), cfg.limit)
    except Exception as error:  # of many libraries
        raise SystemExit(f"{cfg.source}: {' '.join(str(error).split())}") from error

    problems, left_out, number = [], Counter(), 0
    for number, row in enumerate(rows, start=1):
        where = f"{cfg.source}, row {number}"
        if not isinstance(row, dict) or None in row:  # csv: more fields than names
            raise SystemExit(f"{where}: not one value for each column")
        if number == 1 and not {cfg.problem_column, cfg.answer_column} <= row.keys():
            hint = "--problem-column and --answer-column choose"
            raise SystemExit(f"{where}: its columns are {', '.join(row)}; {hint}")
        try:
            problems.append(make_problem(row, cfg, where))
        except ValueError as error:
            reason = str(error)[:200]  # what it quotes may be long
            if not cfg.drop_unanswered:
                raise SystemExit(f"{where}: {reason}; or --drop-unanswered") from None
            left_out[reason] += 1

    reasons = [f"; {count} left out: {why}" for why, count in left_out.most_common(9)]
    report = f"{cfg.source}: {number} rows read, {len(problems)} kept{''.join(reasons)}"

    # Rows of one problem stay together: none is both trained on and held out.
    texts = sorted({row["problem"] for row in problems})
    if not 0 <= cfg.hold_out < len(texts):
        raise SystemExit(f"--hold-out {cfg.hold_out} leaves no problem: {report}")
    chosen = set(random.Random(cfg.seed).sample(texts, cfg.hold_out))
    files = {cfg.out: [row for row in problems if row["problem"] not in chosen]}
    if cfg.hold_out:
        files[held_out] = [row for row in problems if row["problem"] in chosen]

    # All files or none: they take their places when the last is complete.
    try:
        with tempfile.TemporaryDirectory(dir=cfg.out.parent) as unfinished:
            for path, rows in files.items():
                lines = [json.dumps(row) + "\n" for row in rows]
                Path(unfinished, path.name).write_text("".join(lines))
            for path, rows in files.items():
                Path(unfinished, path.name).replace(path)
                print(f"{path}: {len(rows)} problems")
    except OSError as error:
        raise SystemExit(f"nothing is written: {error}") from None
    print(report)


def make_problem(row, cfg, where):
    """A line of the new file; a ValueError if the row has no answer, and only then."""
    solution = row.get(cfg.answer_column)
    if isinstance(solution, list) and len(solution) == 1:
        solution = solution[0]
    answer = gold_answer(solution)
    # NuminaMath's words for none, or a solution without a box; MATH's longest has 159.
    if answer.lower() in ("proof", "notfound") or len(answer) > 300:
        raise ValueError(f"{answer[:40]!r} is no answer")

    # A problem may be a list of one text, or of messages, of which the user's counts.
    value = row.get(cfg.problem_column)
    parts = value if isinstance(value, list) else [value]
    if all(isinstance(part, dict) for part in parts):
        parts = [part.get("content") for part in parts if part.get("role") == "user"]
    if len(parts) != 1 or not isinstance(parts[0], str) or not parts[0].strip():
        raise SystemExit(f"{where}: the problem is not one text but {value!r:.60}")

    # A solution says more than its answer: \boxed{42} alone teaches no reasoning.
    if len(str(solution).replace(answer, "").split()) < 2:
        solution = row.get("solution")
    whole = {"solution": solution} if isinstance(solution, str) else {}
    return {"problem": parts[0], "answer": answer} | whole


def read_rows(source):
    """The rows of a file or hub set, as dictionaries."""
    kind = Path(source.removesuffix(".gz")).suffix.lower()
    if kind not in (".csv", ".json", ".jsonl", ".parquet"):
        import datasets  # takes seconds, which files need not wait for

        name, _, rest = source.partition(":")
        config, _, split = (rest or "train").rpartition(":")
        return datasets.load_dataset(name, config or None, split=split)

    data = Path(source).read_bytes()
    data = gzip.decompress(data) if source.endswith(".gz") else data
    if kind == ".parquet":
        return parquet.read_table(io.BytesIO(data)).to_pylist()
    text = data.decode("utf-8-sig")  # with a byte-order mark or without
    if kind == ".csv":  # all of it text: guessing types would cost digits
        return list(csv.DictReader(io.StringIO(text.lstrip(), newline=""), strict=True))

    # One value after the other, so that an error names its line; a list holds rows.
    rows, place = [], 0
    while place < len(text):
        if text[place].isspace():
            place += 1
        else:
            value, place = json.JSONDecoder(parse_float=str).raw_decode(text, place)
            rows += value if isinstance(value, list) else [value]
    return rows


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
