"""Wrong input ends with one sentence that names it, before anything is written."""

import json
import runpy
import shutil

import pytest
from conftest import ROOT, restored
from transformers import AutoTokenizer

import gvm_grpo
import gvm_raft
import raft
from gvm_raft import Config

MODEL = ROOT / "tiny" / "model"
GOOD = [{"problem": "1+2", "answer": "3"}, {"problem": "2*3", "answer": "6"}]
GOOD_LINE = json.dumps(GOOD[0])


@pytest.fixture
def refused(small, tmp_path):
    """The sentence with which a script refuses settings."""

    def refused(script=gvm_raft, **settings):
        before = sorted(tmp_path.rglob("*"))
        settings = small | {"run_dir": str(tmp_path / "run")} | settings
        with restored(["script.py"]), pytest.raises(SystemExit) as stop:
            script.main(script.Config(**settings))
        sentence = stop.value.code
        assert isinstance(sentence, str)  # so that the exit code is 1
        assert "\n" not in sentence and len(sentence) < 400
        assert sorted(tmp_path.rglob("*")) == before  # nothing written, nothing lost
        return sentence

    return refused


SETTINGS = [
    ({"temperature": 0.0}, "--temperature 0.0"),
    ({"temperature": -1.0}, "--temperature -1.0"),
    ({"samples_per_problem": 0, "pilot_samples": 0}, "--samples-per-problem 0"),
    ({"alpha": -1e-3}, "--alpha -0.001"),
    ({"beta": 1.5}, "--beta >= 2"),
    ({"prior": -1.0}, "--prior -1.0"),
    ({"seed": -1}, "--seed -1"),
    ({"steps": -1}, "--steps -1"),
    ({"kl_coef": -1.0}, "--kl-coef -1.0"),
    ({"clip_high": -2.0}, "--clip-high -2.0"),
    ({"learning_rate": 0.0}, "--learning-rate 0.0"),
    ({"max_grad_norm": 0.0}, "--max-grad-norm 0.0"),
    ({"tokens_per_batch": 0}, "--tokens-per-batch 0"),
    ({"pilot_samples": 4}, "--pilot-samples"),  # all of the budget
    ({"pilot_samples": -1}, "--pilot-samples"),
    ({"pilot_samples": 5}, "--pilot-samples"),
    ({"problems_per_step": 0}, "--problems-per-step"),
    ({"problems_per_step": 21}, "problems.jsonl"),
    ({"updates_per_step": 0}, "--updates-per-step"),
    ({"updates_per_step": 9}, "--updates-per-step"),
    ({"max_new_tokens": 0}, "--max-new-tokens 0"),
    ({"eval_samples": 0}, "--eval-samples 0"),
    ({"eval_every": 0}, "--eval-every 0"),
    ({"save_every": 0}, "--save-every 0"),
    ({"max_prompt_tokens": 3}, "problems.jsonl"),
    ({"problems": "no/such.jsonl"}, "no/such.jsonl"),
    ({"eval_problems": "no/such.jsonl"}, "no/such.jsonl"),
    ({"eval_problems": Config.eval_problems}, "--eval-problems"),
    ({"problems": str(ROOT / "allocator.py")}, "allocator.py, line 1"),
    ({"model": "no/such/model"}, "no/such/model"),
    ({"model": "no-such-model-anywhere"}, "no-such-model-anywhere"),
    ({"model": str(ROOT / "tests")}, "tests"),
]


@pytest.mark.parametrize(("settings", "named"), SETTINGS, ids=str)
def test_nonsense_settings_are_refused(refused, settings, named):
    assert named in refused(**settings)


def test_problems_of_ones_own_are_not_evaluated_on_the_tiny_sums(refused):
    sentence = refused(raft, eval_problems=Config.eval_problems)
    assert "--problems needs --eval-problems" in sentence


def test_grpo_with_one_response_a_problem_is_refused(refused):
    settings = {"samples_per_problem": 1, "pilot_samples": 0}
    assert "--samples-per-problem" in refused(gvm_grpo, **settings)


FILES = {
    "cut": (f"{GOOD_LINE}\n{GOOD_LINE[:-3]}", "line 2"),
    "single quotes": (f"{GOOD_LINE}\n\n{{'problem': 1}}\n", "line 3"),
    "a list": (f"{GOOD_LINE}\n[1, 2]\n", "line 2"),
    "a number": (f"{GOOD_LINE}\n7\n", "line 2"),
    "null": (f"{GOOD_LINE}\nnull\n", "line 2"),
    "other names": ('{"question": "1+1", "answer": "2"}', "question"),
    "no answer": (f'{GOOD_LINE}\n{{"problem": "1+1"}}\n', "line 2"),
    "empty answer": (f'{GOOD_LINE}\n{{"problem": "1+1", "answer": ""}}\n', "line 2"),
    "null answer": (f'{GOOD_LINE}\n{{"problem": "1+1", "answer": null}}', "line 2"),
    "list answer": ('{"problem": "1+1", "answer": ["2", "3"]}\n', "line 1"),
    "dict answer": ('{"problem": "1+1", "answer": {"value": 2}}\n', "line 1"),
    "NaN answer": ('{"problem": "1+1", "answer": NaN}\n', "line 1"),
    "empty problem": (f'{GOOD_LINE}\n{{"problem": " ", "answer": "1"}}\n', "line 2"),
    "list problem": ('{"problem": ["1+1"], "answer": "2"}\n', "line 1"),
    "dict problem": ('{"problem": {"text": "1+1"}, "answer": "2"}\n', "line 1"),
    "NaN problem": ('{"problem": NaN, "answer": "2"}\n', "line 1"),
    "nothing": ("", "too few"),
    "blank lines": ("\n  \n", "too few"),
}


@pytest.mark.parametrize("what", FILES)
def test_broken_files_are_refused_with_their_line(refused, tmp_path, what):
    text, named = FILES[what]
    (tmp_path / "bad.jsonl").write_text(text)
    settings = {"problems_per_step": 1, "updates_per_step": 1}
    sentence = refused(problems=str(tmp_path / "bad.jsonl"), **settings)
    assert "bad.jsonl" in sentence and named in sentence, sentence


def test_a_folder_in_place_of_a_file_is_refused(refused, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    assert "folder.jsonl" in refused(problems=str(tmp_path / "folder.jsonl"))


def write(path, text):
    path.write_text(text)


def own_code(folder):
    """A model whose code comes with it, as of many a hub model."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "abacus", "architectures": ["Abacus"]}
    config["auto_map"] = {
        "AutoConfig": "abacus.AbacusConfig",
        "AutoModelForCausalLM": "abacus.Abacus",
    }
    write(folder / "config.json", json.dumps(config))
    write(folder / "abacus.py", "raise RuntimeError('code of the model ran')\n")


BROKEN = {
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("token*")],
    "no config": lambda folder: (folder / "config.json").unlink(),
    "cut config": lambda folder: write(folder / "config.json", '{"model_type": "ll'),
    "unknown": lambda folder: write(folder / "config.json", '{"model_type": "abacus"}'),
    "no chat template": lambda folder: (folder / "chat_template.jinja").unlink(),
    "code of its own": own_code,
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_models_are_refused(refused, tmp_path, monkeypatch, what):
    shutil.copytree(MODEL, tmp_path / "broken")
    BROKEN[what](tmp_path / "broken")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    sentence = refused(model=str(tmp_path / "broken"))
    assert "broken" in sentence and ("template" in sentence) == ("template" in what)


@pytest.mark.parametrize("what", ["no weights", "cut weights"])
def test_a_model_without_its_weights_is_named(small, tmp_path, what):
    """The run's folder is made before the weights are loaded, but has nothing in it."""
    shutil.copytree(MODEL, tmp_path / "broken")
    path = tmp_path / "broken" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    if what == "no weights":
        path.unlink()
    settings = small | {"run_dir": str(tmp_path / "run")}
    settings["model"] = str(tmp_path / "broken")
    with restored(["raft.py"]), pytest.raises((SystemExit, Exception)) as stop:
        raft.main(raft.Config(**settings))
    last = str(stop.value).strip().splitlines()[-1]
    assert any(word in last for word in ("broken", "safetensors", "HeaderT", "header"))
    shutil.copytree(MODEL, tmp_path / "broken", dirs_exist_ok=True)
    with restored(["raft.py"]):  # once mended, the same command goes on
        raft.main(raft.Config(**settings | {"steps": 2}))


def test_vllm_without_vllm_is_refused(refused, monkeypatch):
    monkeypatch.setattr(gvm_raft, "find_spec", lambda _: None)
    assert "pip install vllm" in refused(sampler="vllm")


def test_a_file_in_place_of_the_run_folder_is_left_alone(small, tmp_path):
    (tmp_path / "run").write_text("mine")
    settings = small | {"run_dir": str(tmp_path / "run"), "steps": 0}
    with restored(["raft.py"]), pytest.raises((SystemExit, OSError), match="run"):
        raft.main(raft.Config(**settings))
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--no-such-flag", "1"], "no-such-flag"),
        (["--steps", "two"], "steps"),
        (["--sampler", "dice"], "dice"),
        (["--temperature"], "temperature"),
    ],
)
def test_the_command_line_names_a_wrong_flag(capsys, flags, named):
    with restored(["gvm_raft.py", *flags]), pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "gvm_raft.py"), run_name="__main__")
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and named in error
    assert "Traceback" not in out + error


# ---- Good input


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def read(path, tokenizer, **settings):
    return gvm_raft.read_problems(str(path), 1, tokenizer, Config(**settings))


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n  \n"])
def test_byte_order_marks_and_line_ends_do_not_matter(tmp_path, tokenizer, start, end):
    lines = [json.dumps(row).encode() for row in GOOD]
    (tmp_path / "p.jsonl").write_bytes(start + end.join(lines) + end)
    problems = read(tmp_path / "p.jsonl", tokenizer)
    assert [problem.answer for problem in problems] == ["3", "6"]
    assert len(problems[0].prompt_ids) == len(problems[1].prompt_ids) > 3


def test_text_may_hold_every_line_separator_of_unicode(tmp_path, tokenizer):
    row = {"problem": "1+1\u2028\u2029\x85\x0b\x0c", "answer": "2"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row, ensure_ascii=False))
    (problem,) = read(tmp_path / "p.jsonl", tokenizer)
    assert problem.answer == "2"


def test_golds_are_read_by_the_verifier(tmp_path, tokenizer):
    golds = [2, 2.5, "so it is\n#### 1,234", "thus $\\boxed{\\frac{1}{2}}$."]
    rows = [json.dumps({"problem": "1+1", "answer": gold}) for gold in golds]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    found = [problem.answer for problem in read(tmp_path / "p.jsonl", tokenizer)]
    assert found[:2] == ["2", "2.5"] and found[3] == "\\frac{1}{2}"
    assert found[2].replace(",", "") == "1234"


def test_long_problems_are_dropped_with_a_count(tmp_path, tokenizer, capsys):
    rows = [GOOD[0], {"problem": "1" + "+1" * 50, "answer": "51"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (problem,) = read(tmp_path / "p.jsonl", tokenizer, max_prompt_tokens=40)
    assert problem.answer == "3"
    assert "p.jsonl: 1 problem" in capsys.readouterr().out


def test_a_prompt_has_one_token_of_beginning(tmp_path, tokenizer):
    """Where the template writes it, the tokenizer does not write it again."""
    shutil.copytree(MODEL, tmp_path / "model")
    bos = tokenizer.pad_token
    path = tmp_path / "model" / "tokenizer.json"
    rules = json.loads(path.read_text())
    text = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    begin = {"id": bos, "ids": [tokenizer.pad_token_id], "tokens": [bos]}
    rules["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, text[0]],
        "pair": [{"SpecialToken": {"id": bos, "type_id": 0}}, *text],
        "special_tokens": {bos: begin},
    }
    path.write_text(json.dumps(rules))
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": bos}))
    path = tmp_path / "model" / "chat_template.jinja"
    path.write_text("{{ bos_token }}" + path.read_text())

    changed = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert changed.encode("1+1") == [changed.bos_token_id, *tokenizer.encode("1+1")]
    (tmp_path / "p.jsonl").write_text(GOOD_LINE)
    (problem,) = read(tmp_path / "p.jsonl", changed)
    (plain,) = read(tmp_path / "p.jsonl", tokenizer)
    assert problem.prompt_ids == [changed.bos_token_id, *plain.prompt_ids]
