"""bench/warmup.py: worked solutions teach a model the format, in miniature."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvm_raft import INSTRUCTION

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import warmup

TINY = Path(__file__).resolve().parent.parent / "tiny"


@pytest.fixture
def problems(tmp_path):
    """64 tiny problems with solutions as GSM8K writes them."""
    lines = (TINY / "train.jsonl").read_text().splitlines()[:64]
    rows = [json.loads(line) for line in lines]
    for row in rows:
        value = row["answer"]
        row["solution"] = f"Hm.<<{row['problem']}={value}>>\n#### {value}"
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def prompt_of(problem, tokenizer):
    chat = [{"role": "user", "content": f"{problem}\n{INSTRUCTION}"}]
    return tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    ("solution", "taught"),
    [
        ("It is <<1+1=2>>2.\n#### 2", "It is 2.\n\\boxed{2}"),
        ("It is $\\boxed{2}$.", "It is $\\boxed{2}$."),
    ],
)
def test_the_loss_is_of_the_boxed_solution_and_its_end_alone(solution, taught):
    model, tokenizer = load(TINY / "model")
    row = {"problem": "1+1", "answer": "2", "solution": solution}
    with torch.no_grad():
        loss = warmup.loss_of(row, model, tokenizer).item()

        prompt = tokenizer.encode(prompt_of("1+1", tokenizer), add_special_tokens=False)
        response = tokenizer.encode(taught, add_special_tokens=False)
        ids = torch.tensor([*prompt, *response, tokenizer.eos_token_id])
        logp = model(ids[None]).logits[0, :-1].log_softmax(-1)
    logp = logp[range(len(ids) - 1), ids[1:]][len(prompt) - 1 :]
    assert loss == pytest.approx(-logp.mean().item(), rel=1e-5)


@pytest.mark.slow
def test_solutions_teach_their_format_for_other_problems(problems, tmp_path, capsys):
    warm = tmp_path / "warm"
    settings = {"model": str(TINY / "model"), "problems": problems, "out": warm}
    warmup.main(warmup.Config(**settings, updates=80, learning_rate=1e-3))
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert float(printed["loss_of_update_80"]) < float(printed["loss_of_update_1"]) / 3

    other = json.loads((TINY / "test.jsonl").read_text().splitlines()[0])["problem"]
    boxed = r"Hm\.\n\\boxed\{\d+\}"
    assert not re.fullmatch(boxed, greedy_response(TINY / "model", other))
    assert re.fullmatch(boxed, greedy_response(warm, other))


def greedy_response(folder, problem):
    model, tokenizer = load(folder)
    inputs = tokenizer(
        prompt_of(problem, tokenizer), add_special_tokens=False, return_tensors="pt"
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=32)[0]
    return tokenizer.decode(ids[inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_a_folder_that_exists_is_kept(problems, tmp_path):
    with pytest.raises(SystemExit, match="new folder"):
        warmup.main(warmup.Config(str(TINY / "model"), problems, tmp_path))
    assert list(tmp_path.iterdir()) == [problems]


def test_problems_without_solutions_are_refused(tmp_path):
    out = tmp_path / "warm"
    with pytest.raises(SystemExit, match="no row has a solution"):
        warmup.main(warmup.Config(str(TINY / "model"), TINY / "train.jsonl", out))
    assert not out.exists()
