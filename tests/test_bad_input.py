"""Wrong input ends with exit code 2 and one sentence that names it, before anything is written."""

import json
import re
import runpy
import shutil

import pandas as pd
import pytest
from conftest import ROOT, restored
from transformers import AutoTokenizer

import gvm_raft
import raft
from gvm_raft import Config

MODEL = ROOT / "tiny" / "model"
GOOD = [{"problem": "1+2", "answer": "3"}, {"problem": "2*3", "answer": "6"}]
GOOD_LINE = json.dumps(GOOD[0])


@pytest.fixture
def refused(small, tmp_path, capsys):
    """The sentence with which a script refuses settings."""

    def refused(script=gvm_raft, **settings):
        before = sorted(tmp_path.rglob("*"))
        settings = small | {"run_dir": str(tmp_path / "run")} | settings
        with restored(["script.py"]), pytest.raises(SystemExit) as stop:
            script.main(script.Config(**settings))
        out, error = capsys.readouterr()
        assert stop.value.code == 2 and "Traceback" not in out + error
        assert (
            error.count("\n") == 1
            and error.startswith("script.py: ")
            and len(error) < 400
        )
        assert sorted(tmp_path.rglob("*")) == before  # nothing written, nothing lost
        return error

    return refused


SETTINGS = [
    ({"alpha": -1e-3}, "--alpha"),
    ({"alpha": float("nan")}, "--alpha"),
    ({"beta": 1.5}, "--beta"),
    ({"prior": -1.0}, "--prior"),
    ({"temperature": 0.0}, "--temperature"),
    ({"temperature": -1.0}, "--temperature"),
    ({"temperature": float("nan")}, "--temperature"),
    ({"temperature": float("inf")}, "--temperature"),
    ({"samples_per_problem": 0, "pilot_samples": 0}, "--samples-per-problem"),
    ({"pilot_samples": -1}, "--pilot-samples"),
    ({"pilot_samples": 5}, "--pilot-samples"),
    ({"steps": -1}, "--steps"),
    ({"learning_rate": -1e-4}, "--learning-rate"),
    ({"learning_rate": float("nan")}, "--learning-rate"),
    ({"problems_per_step": 0}, "--problems-per-step"),
    ({"problems_per_step": 21}, "--problems-per-step"),
    ({"updates_per_step": 0}, "--updates-per-step"),
    ({"updates_per_step": 9}, "--updates-per-step"),
    ({"max_new_tokens": 0}, "--max-new-tokens"),
    ({"eval_samples": 0}, "--eval-samples"),
    ({"eval_every": -1}, "--eval-every"),
    ({"save_every": 0}, "--save-every"),
    ({"kl_coef": -0.1}, "--kl-coef"),
    ({"clip_low": -0.1}, "--clip-low"),
    ({"clip_high": float("nan")}, "--clip-high"),
    ({"seed": -1}, "--seed"),
    ({"max_prompt_tokens": 3}, "3 tokens"),
    ({"resume": True, "run_dir": ""}, "--run-dir"),
    ({"resume": True, "run_dir": "no/such/run"}, "no/such/run"),
    ({"problem_column": "question"}, "question"),
    ({"problems": "no/such.jsonl"}, "no/such.jsonl"),
    ({"problems": "no/such.csv"}, "no/such.csv"),
    ({"problems": "no/such/set"}, "no/such/set"),
    ({"eval_problems": "no/such.parquet"}, "no/such.parquet"),
    ({"problems": str(ROOT / "allocator.py")}, "allocator.py"),
    ({"model": "no/such/model"}, "no/such/model"),
    ({"model": "no-such-model-anywhere"}, "no-such-model-anywhere"),
    ({"model": str(ROOT / "tests")}, "tests"),
    ({"model": ""}, "--model"),
]


@pytest.mark.parametrize(("settings", "named"), SETTINGS, ids=str)
def test_nonsense_settings_are_refused(refused, settings, named):
    assert named in refused(**settings)


FILES = [
    ("bad.jsonl", f"{GOOD_LINE}\n{{'problem': 1}}\n", ["line 2", "JSON"]),
    ("bad.jsonl", f"{GOOD_LINE}\n{GOOD_LINE[:-3]}", ["line 2", "JSON"]),
    ("bad.jsonl", f"{GOOD_LINE}\n[1, 2]\n", ["line 2", "JSON object"]),
    ("bad.jsonl", f"{GOOD_LINE}\n[]\n", ["line 2", "JSON object"]),
    ("bad.jsonl", f"{GOOD_LINE}\n7\n", ["line 2", "JSON object"]),
    ("bad.jsonl", f'{GOOD_LINE}\n"text"\n', ["line 2", "JSON object"]),
    ("bad.jsonl", f"{GOOD_LINE}\nnull\n", ["line 2", "JSON object"]),
    ("bad.jsonl", b'{"problem": "\xff", "answer": "1"}', ["line 1"]),
    (
        "bad.jsonl",
        '{"question": "1+1", "answer": "2", "level": 1}',
        ["problem", "question, answer"],
    ),
    ("bad.jsonl", f'{GOOD_LINE}\n{{"problem": "1+1"}}\n', ["row 2", "answer"]),
    (
        "bad.jsonl",
        f'{GOOD_LINE}\n{{"problem": "1+1", "answer": ""}}\n',
        ["row 2", "answer"],
    ),
    (
        "bad.jsonl",
        f'{GOOD_LINE}\n{{"problem": "1+1", "answer": null}}\n',
        ["row 2", "answer"],
    ),
    (
        "bad.jsonl",
        f'{GOOD_LINE}\n{{"problem": " ", "answer": "1"}}\n',
        ["row 2", "problem"],
    ),
    ("bad.jsonl", "", ["no problem"]),
    ("bad.csv", "question,answer\n1+1,2\n", ["problem", "question, answer"]),
    ("bad.csv", "problem,answer\n1+1,2\n1+2,\n", ["answer", "empty"]),
    ("bad.csv", "problem,answer\n", ["bad.csv"]),
    ("bad.csv", "", ["bad.csv"]),
    ("bad.csv", "problem,answer\n1,2\n1,2,3,4\n", ["bad.csv"]),
    ("bad.parquet", "this is no parquet file", ["bad.parquet"]),
    ("bad.parquet", "", ["bad.parquet"]),
]


@pytest.mark.parametrize(("name", "text", "named"), FILES, ids=str)
def test_broken_files_are_refused(refused, tmp_path, name, text, named):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    sentence = refused(problems=str(tmp_path / name))
    assert all(part in sentence for part in [name, *named]), sentence


def test_a_parquet_file_without_the_column_is_refused(refused, tmp_path):
    pd.DataFrame(GOOD).rename(columns={"answer": "result"}).to_parquet(
        tmp_path / "bad.parquet"
    )
    assert "problem, result" in refused(problems=str(tmp_path / "bad.parquet"))


def test_a_folder_in_place_of_a_file_is_refused(refused, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    assert "folder.jsonl" in refused(problems=str(tmp_path / "folder.jsonl"))


BROKEN_MODELS = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut weights": lambda folder: (folder / "model.safetensors").write_bytes(b"\x10"),
    "no tokenizer": lambda folder: [
        path.unlink() for path in folder.glob("tokenizer*")
    ],
    "no config": lambda folder: (folder / "config.json").unlink(),
    "cut config": lambda folder: (folder / "config.json").write_text(
        '{"model_type": "ll'
    ),
    "unknown model": lambda folder: (folder / "config.json").write_text(
        '{"model_type": "abacus"}'
    ),
    "no chat template": lambda folder: (folder / "chat_template.jinja").unlink(),
    "broken chat template": lambda folder: (folder / "chat_template.jinja").write_text(
        "{% if %}"
    ),
}


@pytest.mark.parametrize("what", BROKEN_MODELS)
def test_broken_models_are_refused(refused, tmp_path, what):
    shutil.copytree(MODEL, tmp_path / "broken")
    BROKEN_MODELS[what](tmp_path / "broken")
    sentence = refused(model=str(tmp_path / "broken"))
    assert "broken" in sentence and ("template" in sentence) == ("template" in what)


def test_vllm_without_vllm_is_refused(refused, monkeypatch):
    monkeypatch.setattr(gvm_raft, "find_spec", lambda _: None)
    assert "pip install vllm" in refused(sampler="vllm")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_existing_run_dir_is_refused(refused, tmp_path, kind):
    folder = tmp_path / "run"
    if kind == "folder":
        folder.mkdir()
    (folder if kind == "file" else folder / "notes.txt").write_text("mine")
    assert "--run-dir" in refused(script=raft)


def test_a_run_dir_that_cannot_be_made_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "--run-dir" in refused(run_dir=str(tmp_path / "file" / "run"))


def test_a_broken_config_of_a_run_to_resume_is_refused(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"script": "gvm_')
    assert "config.json" in refused(resume=True)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--no-such-flag", "1"], "no-such-flag"),
        (["--steps", "two"], "steps"),
        (["--weighting", "heavy"], "heavy"),
        (["--temperature"], "temperature"),
    ],
)
def test_the_command_line_names_a_wrong_flag(capsys, flags, named):
    with restored(["gvm_raft.py", *flags]), pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "gvm_raft.py"), run_name="__main__")
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and named in error and "Traceback" not in out + error


def test_help_explains_every_setting_with_its_comment(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with restored(["gvm_raft.py", "--help"]), pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "gvm_raft.py"), run_name="__main__")
    text, source = capsys.readouterr().out, (ROOT / "gvm_raft.py").read_text()
    source = source.split("class Problem")[0]
    comments = dict(re.findall(r"^    (\w+): .* = .*  # (.*)$", source, re.MULTILINE))
    assert (
        stop.value.code == 0 and comments.keys() == Config.__dataclass_fields__.keys()
    )
    for name, comment in comments.items():
        assert f"--{name.replace('_', '-')}" in text
        assert re.sub(r"\W", "", comment) in re.sub(r"\W", "", text)


# ---- Good input


def test_csv_and_parquet_load_like_json_lines(tmp_path):
    table = [*GOOD, {"problem": 'a, "b" and\nc', "answer": "\\frac{1}{2}"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, table)) + "\n")
    pd.DataFrame(table).to_csv(tmp_path / "p.csv", index=False)
    pd.DataFrame(table).to_parquet(tmp_path / "p.parquet")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    kinds = ("jsonl", "csv", "parquet")
    loaded = [
        raft.load_problems(str(tmp_path / f"p.{k}"), tokenizer, raft.Config())
        for k in kinds
    ]
    assert loaded[0] == loaded[1] == loaded[2] and len(loaded[0]) == 3


def test_answers_may_be_numbers_and_columns_have_other_names(tmp_path):
    table = [{"q": "1+1", "a": 2, "level": "easy"}, {"q": "2*3", "a": 6, "level": None}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, table)))
    pd.DataFrame(table).to_csv(tmp_path / "p.csv", index=False)
    cfg, tokenizer = (
        Config(problem_column="q", answer_column="a"),
        AutoTokenizer.from_pretrained(MODEL),
    )
    for name in ("p.jsonl", "p.csv"):
        problems = gvm_raft.load_problems(str(tmp_path / name), tokenizer, cfg)
        assert [problem.answer for problem in problems] == ["2", "6"]


def test_long_problems_are_dropped_with_a_count(tmp_path, capsys):
    lines = [
        {"problem": "1+1", "answer": "2"},
        {"problem": "1" + "+1" * 50, "answer": "51"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    cfg = Config(max_prompt_tokens=40)
    (problem,) = gvm_raft.load_problems(str(tmp_path / "p.jsonl"), tokenizer, cfg)
    assert problem.answer == "2" and "dropped 1 problem" in capsys.readouterr().out
