"""The embedded default is small, honest and right."""

import json
import re
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvm_raft import INSTRUCTION
from verify_math import verify_batch

TINY = Path(__file__).resolve().parent.parent / "tiny"


def rows(name):
    """The problems of a file."""
    return [json.loads(line) for line in (TINY / f"{name}.jsonl").read_text().splitlines()]


def chain(problem):
    """The value of a chain of operators; Python's precedence is school's."""
    assert re.fullmatch(r"[0-9+*-]+", problem)
    return eval(problem)


def test_every_answer_is_right():
    problems = [*rows("train"), *rows("test")]
    assert all(chain(row["problem"]) == int(row["answer"]) for row in problems)


def test_train_and_test_share_no_problem():
    train, test = ({row["problem"] for row in rows(name)} for name in ("train", "test"))
    assert not train & test and len(test) >= 300 and len(train) == len(rows("train"))


def test_the_model_is_tiny_and_loads_as_any_other():
    model = AutoModelForCausalLM.from_pretrained(TINY / "model")
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert (TINY / "model/model.safetensors").stat().st_size < 5_000_000


def test_the_tokenizer_gives_back_what_it_took():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    text = f"7*8+5-3\n{INSTRUCTION}\n\\boxed{{58}} and ~any other~ ASCII."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(f"7*8\n{INSTRUCTION}")) == 4  # the instruction is one token


def test_generate_draws_and_some_of_it_is_right():
    model = AutoModelForCausalLM.from_pretrained(TINY / "model")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    torch.manual_seed(0)
    test = rows("test")[:300]
    messages = [[{"role": "user", "content": f"{r['problem']}\n{INSTRUCTION}"}] for r in test]
    settings = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt"}
    prompts = tokenizer.apply_chat_template(messages, return_dict=True, **settings)
    ids = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=48)
    texts = tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :])
    accept = np.mean(
        verify_batch([t.split("<eos>")[0] for t in texts], [r["answer"] for r in test])
    )
    assert 0.15 <= accept <= 0.35
