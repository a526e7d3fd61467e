"""Supervised warm-up of a small chat model on worked solutions, before it can learn from rewards.

A model such as SmolLM2-135M-Instruct almost never boxes a right answer, so that rejection sampling
has nothing to accept. A few updates on GSM8K's training solutions teach the format and raise the
accept rate to a few percent. Prompts are built as the scripts build them.

Run: python bench/warmup.py --model DIR --problems gsm8k_train.jsonl --out DIR
     (JSON lines with problem, answer and solution; GSM8K's <<calculator>> marks are removed)
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gvm_raft import INSTRUCTION


@dataclass(frozen=True)
class Config:
    """Settings."""

    model: str  # Hugging Face folder or hub name
    problems: Path  # JSON lines with the columns problem, answer and solution
    out: Path  # new folder for the warmed-up model
    updates: int = 100
    batch: int = 8  # solutions an update
    longest: int = 160  # tokens; longer solutions are left out
    learning_rate: float = 3e-5
    seed: int = 0


def main(cfg):
    """Plain cross-entropy on the solutions' tokens."""
    if cfg.out.exists():
        sys.exit(f"warmup.py: --out {cfg.out} exists already")
    torch.manual_seed(cfg.seed)
    tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32)
    pairs = []
    for row in map(json.loads, cfg.problems.read_bytes().splitlines()):
        message = {"role": "user", "content": f"{row['problem']}\n{INSTRUCTION}"}
        prompt = tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, return_dict=False
        )
        solution = re.sub(r"<<.*?>>", "", row["solution"].split("####")[0]).strip()
        response = tokenizer.encode(f"{solution}\n\\boxed{{{row['answer']}}}")
        if len(response) < cfg.longest:
            pairs.append((prompt, [*response, tokenizer.eos_token_id]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, weight_decay=0.0)
    bar = trange(cfg.updates, desc="warm-up")
    for _ in bar:
        chosen = [pairs[i] for i in torch.randint(len(pairs), (cfg.batch,)).tolist()]
        ids_BT = pad_sequence([torch.tensor(p + r) for p, r in chosen], True)
        label_BT = pad_sequence([torch.tensor([-100] * len(p) + r) for p, r in chosen], True, -100)
        loss = model(input_ids=ids_BT, labels=label_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    model.save_pretrained(cfg.out)
    tokenizer.save_pretrained(cfg.out)
    print(f"loss_after: {loss.item():.3f}")


if __name__ == "__main__":
    main(tyro.cli(Config))
