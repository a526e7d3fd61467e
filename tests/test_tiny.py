"""The embedded default is small, honest and right."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvm_raft import INSTRUCTION
from tiny import make
from verify_math import verify_batch

TINY = Path(__file__).resolve().parent.parent / "tiny"

# What every symbol stands for, written down once more.
FORMULA = {
    "@": "x + y",
    "#": "x * y",
    "$": "abs(x - y)",
    "%": "10 * x + y",
    "&": "10 * y + x",
    "?": "2 * x + y",
    "!": "x + 2 * y",
    "~": "x * (y + 1)",
    "^": "(x + 1) * y",
    "|": "x + y + 20",
    ";": "x * y + 9",
    "_": "abs(y - x) + 30",
}


def rows(name):
    """The problems of a file."""
    lines = (TINY / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def symbols(problems):
    """How many problems there are of every symbol."""
    return Counter(problem[1] for problem in problems)


def test_every_answer_is_right():
    for row in rows("train") + rows("test"):
        first, *sums = row["problem"].split("+")
        x, symbol, y = first
        value = eval(FORMULA[symbol], {"x": int(x), "y": int(y)})
        assert value + sum(map(int, sums)) == int(row["answer"])


def test_train_and_test_share_no_problem():
    problems = [row["problem"] for row in rows("train") + rows("test")]
    assert len(set(problems)) == len(problems)


def test_the_training_set_is_mostly_solved_and_the_test_set_has_every_symbol_alike():
    solved, halfway, rare = make.MIXTURES["default"]
    train = symbols(row["problem"] for row in rows("train"))
    assert all(train[symbol] == solved for symbol in make.SOLVED)
    assert all(train[symbol] == halfway for symbol in make.HALFWAY)
    assert all(train[symbol] == rare for symbol in make.RARE)
    assert set(symbols(row["problem"] for row in rows("test")).values()) == {40}


@pytest.mark.parametrize("mixture", make.MIXTURES)
def test_every_mixture_has_the_same_test_problems(mixture):
    train, test = make.make_problems(mixture)
    assert test == [row["problem"] for row in rows("test")]
    assert len(set(train + test)) == len(train) + len(test)
    assert 900 < len(train) < 1000


def test_the_files_are_what_make_writes(tmp_path):
    train, test = make.make_problems("default")
    for name, problems in (("train.jsonl", train), ("test.jsonl", test)):
        make.write_problems(tmp_path / name, problems)
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()


def test_a_wrong_rule_never_finds_the_right_answer():
    rng = random.Random(0)
    for symbol in make.HABITS:
        problem = make.make_problem(symbol, rng)
        answers = {make.solve(problem, rule)[1] for rule in make.RULES}
        assert len(answers) == len(make.RULES)


def test_a_demonstration_follows_the_right_rule_as_often_as_the_habit_says():
    rng = random.Random(0)
    for symbol, habit in make.HABITS.items():
        problem = make.make_problem(symbol, rng)
        right, _ = make.solve(problem, make.MEANING[symbol])
        drawn = [make.demonstrate(problem, rng) for _ in range(2000)]
        error = np.sqrt(habit * (1 - habit) / len(drawn))
        assert abs(drawn.count(right) / len(drawn) - habit) < 4 * error


def test_another_mixture_never_replaces_the_embedded_problems():
    with pytest.raises(SystemExit, match="--out"):
        make.write(make.Config(mixture="hard", overwrite=True))


def test_make_refuses_to_overwrite_and_names_the_file(tmp_path):
    make.write(make.Config(mixture="hard", out=tmp_path))
    with pytest.raises(SystemExit, match=r"train\.jsonl exists: add --overwrite"):
        make.write(make.Config(mixture="hard", out=tmp_path))


def test_check_passes_what_was_made_and_names_the_file_that_differs(tmp_path, capsys):
    cfg = make.Config(mixture="hard", out=tmp_path)
    make.write(cfg)
    check = make.Config(mixture="hard", out=tmp_path, check=True)
    make.check(check)
    assert "check passed" in capsys.readouterr().out

    lines = (tmp_path / "test.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(SystemExit, match=r"test\.jsonl"):
        make.check(check)


def test_the_model_is_tiny_and_loads_as_any_other():
    model = AutoModelForCausalLM.from_pretrained(TINY / "model")
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert (TINY / "model/model.safetensors").stat().st_size < 5_000_000


def test_the_tokenizer_gives_back_what_it_took():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    text = f"5&3+4+6\n{INSTRUCTION}\n\\boxed{{45}} and ~any other~ ASCII."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(f"5&3\n{INSTRUCTION}")) == 4  # the instruction is one


def test_generate_is_right_as_often_as_the_habits_say():
    model = AutoModelForCausalLM.from_pretrained(TINY / "model")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    torch.manual_seed(0)
    test = rows("test")
    messages = [
        [{"role": "user", "content": f"{row['problem']}\n{INSTRUCTION}"}]
        for row in test
    ]
    prompts = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=40)
    texts = tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :])
    responses = [text.split("<eos>")[0] for text in texts]
    rewards = np.array(verify_batch(responses, [row["answer"] for row in test]))

    for group in (make.SOLVED, make.HALFWAY, make.RARE):
        own = [row["problem"][1] in group for row in test]
        habit = np.mean(list(group.values()))
        assert abs(rewards[own].mean() - habit) < 0.12
