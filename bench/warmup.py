"""Can a chat model that never boxes a right answer be taught to, so that rewards come?

Updates on the solutions that data/prepare.py keeps, 17 s each for 135M parameters on a
CPU core. Prints the first and the last loss; --out is then a --model for learning.py.

Run: python bench/warmup.py --model NAME --problems gsm8k.jsonl --out runs/warm
"""

import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gvm_raft import INSTRUCTION
from verify_math import extract_answer


@dataclass(frozen=True)
class Config:
    model: str  # folder or hub name of a chat model
    problems: Path  # JSON lines with problem, answer and solution
    out: Path  # new folder for the model
    updates: int = 100
    batch: int = 8  # solutions an update
    learning_rate: float = 3e-5


def main(cfg):
    with cfg.problems.open() as file:
        rows = [row for row in map(json.loads, file) if row.get("solution")]
    if cfg.out.exists():
        raise SystemExit(f"--out {cfg.out} exists: name a new folder")
    if not rows:
        raise SystemExit(f"{cfg.problems}: no row has a solution to learn from")

    tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), cfg.learning_rate, weight_decay=0)

    random.seed(0)
    for update in trange(cfg.updates, disable=None):
        batch = random.choices(rows, k=cfg.batch)
        loss = sum(loss_of(row, model, tokenizer) for row in batch) / cfg.batch
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if update in (0, cfg.updates - 1):
            print(f"loss_of_update_{update + 1}: {loss.item():.3f}")

    model.save_pretrained(cfg.out)
    tokenizer.save_pretrained(cfg.out)


def loss_of(row, model, tokenizer):
    """Cross-entropy per token of a solution with its box, after the scripts' prompt."""
    # GSM8K marks calculations, <<48/2=24>>, and the answer, #### 24, but boxes nothing.
    text = re.sub(r"<<.*?>>", "", row["solution"]).split("####")[0].strip()
    if not extract_answer(text):
        text += f"\n\\boxed{{{row['answer']}}}"
    response = tokenizer.encode(text + tokenizer.eos_token, add_special_tokens=False)

    chat = [{"role": "user", "content": f"{row['problem']}\n{INSTRUCTION}"}]
    flags = {"add_generation_prompt": True, "return_dict": False}
    prompt = tokenizer.apply_chat_template(chat, **flags)
    ids = torch.tensor([prompt + response], device=model.device)
    labels = torch.tensor([[-100] * len(prompt) + response], device=model.device)
    return model(input_ids=ids, labels=labels).loss


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
