"""data/prepare.py: data becomes problem files, or is refused in a sentence."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import prepare

from verify_math import gold_answer

ROOT = Path(__file__).resolve().parent.parent
SHARED = sorted((ROOT.parent / "shared" / "data").glob("[!v]*.jsonl"))
ROWS = [{"problem": f"1+{i}", "answer": str(1 + i)} for i in range(10)]


@pytest.fixture
def made(tmp_path, capsys):
    """Runs main() on a source: the new file's rows and what was printed."""

    def made(source, **settings):
        if not isinstance(source, str):
            source = save(tmp_path / "rows.jsonl", source)
        out = tmp_path / "out.jsonl"
        prepare.main(prepare.Config(source=str(source), out=out, **settings))
        return rows(out), capsys.readouterr().out

    return made


@pytest.fixture
def refused(tmp_path, made):
    """The sentence that refuses a source, after which all files are as before."""

    def refused(source, **settings):
        if not isinstance(source, str):
            source = save(tmp_path / "rows.jsonl", source)
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as stop:
            made(source, **settings)
        assert contents(tmp_path) == before
        sentence = str(stop.value)
        assert sentence.count("\n") == 0 and len(sentence) < 400
        return sentence

    return refused


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.iterdir()}


def rows(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def save(path, content):
    """Rows, text or bytes as a file; gzipped if its name says so. Returns the name."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def answers(problems):
    return [problem["answer"] for problem in problems]


# ---- Sources


def as_csv(frame):
    return frame.to_csv(index=False)


def as_parquet(frame):
    return frame.to_parquet()


def as_list(frame):
    return json.dumps(frame.to_dict("records"), indent=2)


def as_lines(frame):
    return frame.to_dict("records")


KINDS = {".csv": as_csv, ".parquet": as_parquet, ".json": as_list, ".jsonl": as_lines}


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_problems(made, tmp_path, kind, gz):
    path = tmp_path / f"source{kind}{gz}"
    assert made(save(path, KINDS[kind](pd.DataFrame(ROWS))))[0] == ROWS


def test_json_lines_may_be_called_json(made, tmp_path):
    assert made(save(tmp_path / "source.json", ROWS))[0] == ROWS


HUB = {
    "openai/gsm8k": ("openai/gsm8k", None, "train"),
    "openai/gsm8k:test": ("openai/gsm8k", None, "test"),
    "openai/gsm8k:main:train": ("openai/gsm8k", "main", "train"),
}


@pytest.mark.parametrize("source", HUB)
def test_hub_sets_are_named_with_split_and_configuration(made, monkeypatch, source):
    def load_dataset(name, config, split):
        assert (name, config, split) == HUB[source]
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert made(source)[0] == ROWS


def test_a_hub_set_that_fails_is_refused_with_the_reason_of_the_library(
    refused, monkeypatch
):
    def load_dataset(name, config, split):
        raise ValueError("Config name is missing.\nPick one of ['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sentence = refused("openai/gsm8k")
    assert "openai/gsm8k" in sentence and "['main', 'socratic']" in sentence


README = """---
configs:
- config_name: main
  data_files: [{split: train, path: a.jsonl}, {split: test, path: b.jsonl}]
- config_name: socratic
  data_files: c.jsonl
---
"""


def test_the_library_itself_finds_configuration_and_split(made, refused, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text(README)
    for name in "abc":
        save(folder / f"{name}.jsonl", [{"problem": name, "answer": "1"}])
    assert "['main', 'socratic']" in refused(str(folder))
    assert "validation" in refused(f"{folder}:main:validation")

    sources = {"main:train": "a", "main:test": "b", "socratic:train": "c"}
    for source, name in sources.items():
        problems, _ = made(f"{folder}:{source}", overwrite=True)
        assert problems == [{"problem": name, "answer": "1"}]


def test_csv_stays_text(made, tmp_path):
    kept = ["12345678901234567", "NA", "None", "007", "1.50", "1e5", "true"]
    text = "problem,answer\n" + "".join(
        f"p{i},{value}\n" for i, value in enumerate(kept)
    )
    assert answers(made(save(tmp_path / "source.csv", text))[0]) == kept


def test_numbers_keep_their_digits(made, tmp_path):
    text = '{"problem": "p", "answer": 12345678901234567}\n'
    text += '{"problem": "q", "answer": 1.50}\n'
    problems = made(save(tmp_path / "source.jsonl", text))[0]
    assert answers(problems) == ["12345678901234567", "1.50"]


@pytest.mark.parametrize("kind", [".csv", ".jsonl"])
def test_marks_line_ends_blank_lines_and_u2028_are_read_right(made, tmp_path, kind):
    text = {
        ".csv": '\r\nproblem,answer\r\n\r\n"1\u2028+\r\n1",2\r\n\r\n\r\n2+2,4\r\n\r\n',
        ".jsonl": '\r\n{"problem": "1\u2028+\\r\\n1", "answer": "2"}\r\n\r\n \t\r\n'
        '{"problem": "2+2", "answer": "4"}\r\n\r\n',
    }[kind]
    path = save(tmp_path / f"source{kind}", text.encode("utf-8-sig"))
    assert [list(row.values()) for row in made(path)[0]] == [
        ["1\u2028+\r\n1", "2"],
        ["2+2", "4"],
    ]


# ---- Answers, solutions and problems


def test_gsm8k_solutions_become_answers_and_stay_as_solutions(made):
    solution = "Half of 48 is <<48/2=24>>24.\nSo 48+24 = 72.\n#### 72"
    problems, _ = made(
        [{"question": "Clips?", "answer": solution}], problem_column="question"
    )
    assert problems == [{"problem": "Clips?", "answer": "72", "solution": solution}]


def test_boxed_solutions_become_answers_and_stay_as_solutions(made):
    solution = r"As $\boxed{x}$ is nested, it is $\boxed{\frac{1}{\sqrt{2}}}$."
    problems, _ = made(
        [{"problem": "p", "solution": solution}], answer_column="solution"
    )
    answer = r"\frac{1}{\sqrt{2}}"
    assert problems == [{"problem": "p", "answer": answer, "solution": solution}]


@pytest.mark.parametrize(
    "text", ["42", r"\boxed{42}", r"$\boxed{42}$", "#### 42", 42, ["42"]]
)
def test_an_answer_alone_is_no_solution(made, text):
    assert made([{"problem": "p", "answer": text}])[0] == [
        {"problem": "p", "answer": "42"}
    ]


def test_a_column_of_solutions_beside_the_answers_stays(made):
    row = {
        "problem": "p",
        "answer": "42",
        "solution": "It is 6 * 7, so 42.",
        "level": 3,
    }
    assert made([row])[0] == [
        {name: row[name] for name in ("problem", "answer", "solution")}
    ]


def test_a_prepared_file_can_be_prepared_again(made, tmp_path):
    first, _ = made([{"problem": "p", "answer": "6 * 7 = 42 #### 42"}])
    assert made(str(tmp_path / "out.jsonl"), overwrite=True)[0] == first


def test_lists_of_one_are_unwrapped(made):
    row = {"problem": ["1+1"], "answer": ["It is 2. #### 2"]}
    expected = {"problem": "1+1", "answer": "2", "solution": "It is 2. #### 2"}
    assert made([row])[0] == [expected]


SYSTEM = {"role": "system", "content": "Think."}
USER = {"role": "user", "content": "1+1"}
ASSISTANT = {"role": "assistant", "content": "2"}


@pytest.mark.parametrize(
    "messages", [[USER], [SYSTEM, USER], [SYSTEM, USER, ASSISTANT]]
)
def test_of_messages_the_users_text_is_the_problem(made, messages):
    assert made([{"problem": messages, "answer": "2"}])[0][0]["problem"] == "1+1"


def test_messages_and_lists_in_a_parquet_file_are_read_alike(made, tmp_path):
    frame = pd.DataFrame([{"problem": [SYSTEM, USER], "answer": ["2"]}])
    path = save(tmp_path / "source.parquet", frame.to_parquet())
    assert made(path)[0] == [{"problem": "1+1", "answer": "2"}]


NO_PROBLEM = {
    "two users": [USER, ASSISTANT, USER],
    "no user": [SYSTEM],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "1+1"}]}],
    "other keys": [{"from": "human", "value": "1+1"}],
    "two texts": ["1+1", "1+2"],
    "no text": [],
    "object": {"text": "1+1"},
    "NaN": float("nan"),
    "null": None,
    "number": 7,
    "blank": " \n",
}


@pytest.mark.parametrize("flaw", NO_PROBLEM)
def test_a_problem_that_is_not_one_text_is_refused_with_its_row(refused, flaw):
    flawed = {"problem": NO_PROBLEM[flaw], "answer": "2"}
    assert "row 2: the problem" in refused([ROWS[0], flawed])
    assert "row 2: the problem" in refused([ROWS[0], flawed], drop_unanswered=True)


NO_ANSWER = {
    "object": {"ground_truth": "2"},
    "two": ["3", "4"],
    "many": ["3"] * 999,
    "empty list": [],
    "NaN": float("nan"),
    "null": None,
    "blank": " ",
    "no number": "I do not know ####",
    "proof": "proof",
    "notfound": "notfound",
    "no box": "It follows that " + "the sum grows, " * 30,
}


@pytest.mark.parametrize("flaw", [*NO_ANSWER, "missing"])
def test_a_row_without_one_answer_is_refused_or_left_out_and_counted(
    made, refused, flaw
):
    flawed = {"problem": "p", "answer": NO_ANSWER.get(flaw)}
    if flaw == "missing":
        del flawed["answer"]
    sentence = refused([ROWS[0], flawed, ROWS[1]])
    assert "row 2" in sentence and "--drop-unanswered" in sentence

    problems, printed = made([ROWS[0], flawed, ROWS[1], flawed], drop_unanswered=True)
    assert problems == ROWS[:2]
    assert "4 rows read, 2 kept; 2 left out: " in printed


def test_the_summary_says_how_many_rows_came_and_went_and_why(made, tmp_path):
    flaws = ["proof", "notfound", "proof", None]
    source = ROWS + [{"problem": "p", "answer": flaw} for flaw in flaws]
    _, printed = made(source, drop_unanswered=True)
    problems, report = printed.splitlines()
    assert problems == f"{tmp_path / 'out.jsonl'}: 10 problems"
    counts, *reasons = report.split("; ")
    assert counts == f"{tmp_path / 'rows.jsonl'}: 14 rows read, 10 kept"
    for reason, start in zip(
        reasons, ("2 left out: 'proof'", "1 left out: 'notf", "1 left out: ")
    ):
        assert reason.startswith(start)
    assert len(reasons) == 3


def test_rows_that_are_all_left_out_make_no_file(refused):
    flawed = {"problem": "p", "answer": "proof"}
    assert "2 left out: 'proof'" in refused([flawed, flawed], drop_unanswered=True)


# ---- Refusals


@pytest.mark.parametrize("column", ["problem_column", "answer_column"])
def test_a_missing_column_is_refused_with_those_there(refused, column):
    sentence = refused(ROWS, **{column: "text"})
    assert "problem, answer" in sentence and "--problem-column" in sentence


BROKEN = {
    "no.jsonl": (None, "No such file"),
    "no.csv.gz": (None, "No such file"),
    "bad.jsonl": ('{"problem": "p", "answer": "1"}\n\n{"problem": p}\n', "line 3"),
    "cut.jsonl": ('{"problem": "p", "answer": "1"}\n{"problem": "p", "ans', "line 2"),
    "list.json": ('[{"problem": "p", "answer": "1"},\n7]', "row 2"),
    "text.jsonl": ('{"problem": "p", "answer": "1"}\n"text"\n', "row 2"),
    "latin.jsonl": (b'{"problem": "\xff", "answer": "1"}', "utf-8"),
    "zipped.jsonl": (gzip.compress(b"{}"), "utf-8"),
    "bad.parquet": ("this is no parquet file", "parquet"),
    "wide.csv": ("problem,answer\np,1\np,1,2\n", "row 2"),
    "narrow.csv": ("problem,answer\np,1\np\n", "row 2"),
    "open.csv": ('problem,answer\np,1\n"p,2\n', "unexpected end"),
    "empty.csv": ("", "0 rows"),
    "header.csv": ("problem,answer\n", "0 rows"),
    "empty.jsonl": ("\n\n", "0 rows"),
    "notes.txt": ("problem,answer\np,1\n", "notes.txt"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_refused_by_name(refused, tmp_path, name):
    content, named = BROKEN[name]
    if content is not None:
        save(tmp_path / name, content)
    sentence = refused(str(tmp_path / name))
    assert name in sentence and named in sentence


def test_a_gzipped_file_that_is_none_or_is_cut_is_refused(refused, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b"plain text")
    assert "rows.jsonl.gz" in refused(str(path))
    path.write_bytes(gzip.compress(b"{}" * 99)[:-9])
    assert "rows.jsonl.gz" in refused(str(path))


# ---- Files


def test_a_limit_reads_the_first_rows(made):
    assert made(ROWS, limit=3)[0] == ROWS[:3]


def test_problems_held_out_are_drawn_by_seed_and_printed(made, tmp_path):
    drawn = []
    for seed in (0, 0, 1):
        kept, printed = made(ROWS, hold_out=4, seed=seed, overwrite=True)
        drawn.append(rows(tmp_path / "out_held_out.jsonl"))
        assert len(kept) == 6 and len(drawn[-1]) == 4
        assert sorted(answers(kept + drawn[-1])) == sorted(answers(ROWS))
        assert f"{tmp_path / 'out_held_out.jsonl'}: 4 problems" in printed
    assert drawn[0] == drawn[1] != drawn[2]
    assert answers(drawn[0]) == [
        "1",
        "3",
        "7",
        "10",
    ]  # in every process, on every machine


def test_rows_of_one_problem_are_held_out_together(made, tmp_path):
    kept, _ = made(ROWS + ROWS + ROWS[:1], hold_out=5)
    held_out = rows(tmp_path / "out_held_out.jsonl")
    assert len(kept) + len(held_out) == 21
    assert not {row["problem"] for row in kept} & {row["problem"] for row in held_out}


@pytest.mark.parametrize("number", [-1, 10, 11])
def test_holding_out_all_problems_or_fewer_than_none_is_refused(refused, number):
    assert f"--hold-out {number}" in refused(ROWS + ROWS, hold_out=number)


@pytest.mark.parametrize("name", ["out.jsonl", "out_held_out.jsonl"])
def test_files_that_exist_are_kept_unless_overwritten(made, refused, tmp_path, name):
    (tmp_path / name).write_text("mine")
    sentence = refused(ROWS, hold_out=2)
    assert name in sentence and "--overwrite" in sentence
    assert len(made(ROWS, hold_out=2, overwrite=True)[0]) == 8
    assert len(rows(tmp_path / "out_held_out.jsonl")) == 2


def test_problems_held_out_before_do_not_return_to_the_training_file(
    made, refused, tmp_path
):
    made(ROWS, hold_out=2)
    assert "out_held_out.jsonl" in refused(ROWS, overwrite=True)
    (tmp_path / "out_held_out.jsonl").unlink()
    assert len(made(ROWS, overwrite=True)[0]) == len(ROWS)


def test_folders_are_never_replaced(refused, tmp_path):
    (tmp_path / "out_held_out.jsonl").mkdir()
    assert "out_held_out.jsonl" in refused(ROWS, hold_out=2, overwrite=True)


def test_a_disk_that_fills_up_leaves_no_file_and_no_part_of_one(
    refused, tmp_path, monkeypatch
):
    write_text = Path.write_text

    def full(path, text):
        if "held_out" in path.name:
            raise OSError(28, "No space left on device")
        return write_text(path, text)

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left" in refused(ROWS, hold_out=2)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    source = save(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(SystemExit, match="no such folder"):
        prepare.main(
            prepare.Config(source=source, out=tmp_path / "no such folder" / "out")
        )


def test_the_command_line_makes_a_file_of_a_file(tmp_path):
    table = "question,result\n1+1,It is 2. #### 2\n1+2,\n"
    source, out = save(tmp_path / "rows.csv.gz", table), tmp_path / "out.jsonl"
    command = [sys.executable, ROOT / "data" / "prepare.py", source, "--out", out]
    command += ["--problem-column", "question", "--answer-column", "result"]
    done = subprocess.run(
        [*command, "--drop-unanswered"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{source}: 2 rows read, 1 kept; 1")
    assert rows(out) == [
        {"problem": "1+1", "answer": "2", "solution": "It is 2. #### 2"}
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.stem)
def test_real_sets_go_through_whole(made, path):
    """GSM8K's solutions hold the answers that stand beside them, but write 1,080."""
    source = rows(path)
    problems, printed = made(str(path))
    assert f"{len(source)} rows read, {len(source)} kept" in printed
    assert [gold_answer(answer) for answer in answers(problems)] == answers(problems)
    if "solution" in source[0]:
        again, _ = made(str(path), answer_column="solution", overwrite=True)
        plain = [answer.replace(",", "") for answer in answers(again)]
        assert plain == answers(problems)
