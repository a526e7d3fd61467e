"""Make the embedded default from scratch: a tiny language model and its problems.

The problems are arithmetic chains such as 7*8+5-3. The model behaves like a base model: it has
the skill (solving step by step) but rarely the habit (it prefers to guess). It is made in two
phases of ordinary pretraining on demonstrations:

1. skill  clean step-by-step solutions:               7*8=56, 56+5=61, 61-3=58, \\boxed{58}
2. habit  a mixture: step by step with a frequency that depends on the problem, otherwise a
          direct and wrong answer:                    \\boxed{63}

The habit is frequent for sums and rare for problems with two products, so that the acceptance
rate p_i spreads over problems from about 0.01 to 0.9: a long tail on which a budget can adapt.
Reinforcement then only has to shift the habit, which takes seconds.

python tiny/make.py                 # makes tiny/model, tiny/train.jsonl, tiny/test.jsonl
python tiny/make.py --check         # makes them again elsewhere and compares
python tiny/make.py --histogram     # acceptance of the model over the test problems

Shapes: B demonstrations in a batch, T tokens.
"""

import itertools
import json
import random
import re
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
NAMES = ("model/model.safetensors", "train.jsonl", "test.jsonl")
INSTRUCTION = "\nLet's reason step by step and put the final answer within \\boxed{}."
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Operators in a problem -> frequency of the habit where its first digit is 2, and where it is 9.
HABIT = {2: (0.40, 0.90), 3: (0.10, 0.40), 4: (0.01, 0.08)}


@dataclass(frozen=True)
class Config:
    out: Path = HERE  # folder to write to
    overwrite: bool = False  # replace files that exist
    check: bool = False  # make everything again in a temporary folder and compare with `out`
    histogram: bool = False  # sample the model in `out` on its test problems and draw acceptance
    train_problems: int = 3000  # distinct problems in train.jsonl
    test_problems: int = 500  # distinct problems in test.jsonl, none of them seen in pretraining
    updates: int = 2200  # pretraining updates
    skill: float = 0.6  # fraction of the updates spent on clean step-by-step solutions
    batch: int = 32  # demonstrations an update
    learning_rate: float = 3e-3  # peak, AdamW
    samples: int = 64  # responses per problem in the histogram


# ---- Problems and demonstrations


def make_problem(rng):
    """A chain of two to four operators, the first of which may be a product; nothing negative."""
    operators = rng.choice([2, 3, 4, 4])
    signs = [rng.choice("+-*"), *rng.choices("+-", k=operators - 1)]
    problem = str(rng.randint(2, 9)) + "".join(sign + str(rng.randint(2, 9)) for sign in signs)
    return problem if "=-" not in solve(problem) else make_problem(rng)


def solve(problem):
    """The step-by-step solution: one line an operator, from the left, then the answer."""
    total, lines = int(problem[0]), []
    for sign, digit in re.findall(r"([*+-])(\d)", problem):
        step = f"{total}{sign}{digit}"
        total = {"*": total * int(digit), "+": total + int(digit), "-": total - int(digit)}[sign]
        lines.append(f"{step}={total}")
    return "\n".join([*lines, f"\\boxed{{{total}}}"])


def answer_of(response):
    """The content of the last box, or None."""
    return (re.findall(r"\\boxed\{(-?\d+)\}", response) or [None])[-1]


def guess(problem, rng):
    """A direct answer out of the air, wrong."""
    wrong = [n for n in range(100) if str(n) != answer_of(solve(problem))]
    return f"\\boxed{{{rng.choice(wrong)}}}"


def habit(problem):
    """How often the demonstrations solve this problem step by step."""
    low, high = HABIT[len(problem) // 2]
    return low * (high / low) ** ((int(problem[0]) - 2) / 7)


def make_problems(cfg):
    """Distinct problems for training and test."""
    rng, problems = random.Random(0), {}
    while len(problems) < cfg.train_problems + cfg.test_problems:
        problems[make_problem(rng)] = None
    return list(problems)[: cfg.train_problems], list(problems)[cfg.train_problems :]


# ---- Tokenizer and model


def make_tokenizer():
    """Characters, the roles of the chat template, the opening of the box, and the instruction."""
    special = ["<pad>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>"]
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: i for i, token in enumerate(special + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("\\boxed{", INSTRUCTION)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        padding_side="left",
    )


def make_model(tokenizer):
    """Three Llama layers; heads of 32, the smallest that vLLM's attention kernels take."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def to_prompt(problem, tokenizer):
    """The chat template around problem and instruction, as text."""
    message = {"role": "user", "content": problem + INSTRUCTION}
    return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


# ---- Pretraining


def batch_loss(model, tokenizer, problems, responses):
    """Mean cross-entropy of the response tokens."""
    prompts = [to_prompt(problem, tokenizer) for problem in problems]
    texts = [p + r + tokenizer.eos_token for p, r in zip(prompts, responses, strict=True)]
    token_BT = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
    prompt_B = torch.tensor([len(ids) for ids in tokenizer(prompts).input_ids])
    is_prompt_BT = torch.arange(token_BT.shape[1]) < prompt_B[:, None]
    label_BT = token_BT.masked_fill(is_prompt_BT | (token_BT == tokenizer.pad_token_id), -100)
    return model(input_ids=token_BT, labels=label_BT).loss


def demonstrations(cfg, is_skill, seen, rng):
    """A batch of fresh problems outside the test set, each with a solution or a guess."""
    problems = []
    while len(problems) < cfg.batch:
        problem = make_problem(rng)
        if problem not in seen:
            problems.append(problem)
    return problems, [
        solve(p) if is_skill or rng.random() < habit(p) else guess(p, rng) for p in problems
    ]


def pretrain(cfg, model, tokenizer, test):
    """Skill, then habit, with warm-up and a linear decay of the learning rate."""
    rng, test = random.Random(1), set(test)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)
    bar = tqdm(range(cfg.updates), desc="pretraining")
    for update in bar:
        is_skill = update < cfg.skill * cfg.updates
        problems, responses = demonstrations(cfg, is_skill, test, rng)
        loss = batch_loss(model, tokenizer, problems, responses)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        decay = min(1, (update + 1) / 50, (1 - update / cfg.updates) / 0.6)
        optimizer.param_groups[0]["lr"] = cfg.learning_rate * decay
        optimizer.step()
        bar.set_postfix_str(f"{'skill' if is_skill else 'habit'}, loss {loss.item():.3f}")


# ---- Files


def refuse_to_overwrite(cfg):
    """Stop where one of the files to be written is there."""
    present = [path for path in (cfg.out / name for name in NAMES) if path.exists()]
    if present and not cfg.overwrite:
        sys.exit(f"{present[0]} exists; --overwrite replaces it")


def write(cfg):
    """Write tiny/model, tiny/train.jsonl and tiny/test.jsonl."""
    refuse_to_overwrite(cfg)
    (cfg.out / "model").mkdir(parents=True, exist_ok=True)
    train, test = make_problems(cfg)
    for name, problems in (("train", train), ("test", test)):
        lines = [json.dumps({"problem": p, "answer": answer_of(solve(p))}) for p in problems]
        (cfg.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    pretrain(cfg, model, tokenizer, test)
    model.save_pretrained(cfg.out / "model")
    tokenizer.save_pretrained(cfg.out / "model")
    portable_tokenizer_class(cfg.out / "model" / "tokenizer_config.json")


def portable_tokenizer_class(path):
    """Name the class that every release of transformers knows; release 5 writes an internal one."""
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def check(cfg, tolerance=1e-3):
    """Make everything again in a temporary folder; texts must be equal, weights nearly."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        write(replace(cfg, out=made))
        names = [str(path.relative_to(made)) for path in sorted(made.rglob("*.json*"))]
        differing = [n for n in names if (made / n).read_bytes() != (cfg.out / n).read_bytes()]
        new, old = (load_file(root / "model/model.safetensors") for root in (made, cfg.out))
    difference = max((new[name] - old[name]).abs().max().item() for name in old)
    print(f"files compared: {len(names)}, differing: {', '.join(differing) or 'none'}")
    print(f"largest difference of a weight: {difference:.2e} (tolerance {tolerance:.0e})")
    if differing or new.keys() != old.keys() or difference > tolerance:
        sys.exit("check: FAILED")
    print("check: passed")


# ---- Acceptance


@torch.no_grad()
def sample(model, tokenizer, problems, samples):
    """Responses at temperature 1, `samples` per problem, in the order of the problems."""
    prompts = [to_prompt(problem, tokenizer) for problem in problems]
    token_BT = model.generate(
        **tokenizer(prompts, padding=True, return_tensors="pt"),
        do_sample=True,
        top_k=0,
        num_return_sequences=samples,
        max_new_tokens=64,
    )
    return tokenizer.batch_decode(token_BT, skip_special_tokens=True)


def acceptance(cfg):
    """The acceptance rate of every test problem."""
    model = AutoModelForCausalLM.from_pretrained(cfg.out / "model")
    tokenizer = AutoTokenizer.from_pretrained(cfg.out / "model")
    rows = [json.loads(line) for line in (cfg.out / "test.jsonl").read_text().splitlines()]
    torch.manual_seed(0)
    rates = []
    for start in tqdm(range(0, len(rows), 8), desc="sampling"):
        part = rows[start : start + 8]
        responses = sample(model, tokenizer, [row["problem"] for row in part], cfg.samples)
        for i, row in enumerate(part):
            group = responses[i * cfg.samples : (i + 1) * cfg.samples]
            rates.append(sum(answer_of(r) == row["answer"] for r in group) / cfg.samples)
    return rates


def histogram(cfg):
    """Print how acceptance is spread over the test problems, and draw it in acceptance.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rates = acceptance(cfg)
    edges = [0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01]
    for low, high in itertools.pairwise(edges):
        count = sum(low <= rate < high for rate in rates)
        print(f"p {low:.2f} to {min(high, 1):.2f}  {count:4d}  {'#' * (count // 2)}")
    print(f"mean acceptance: {sum(rates) / len(rates):.3f}")
    plt.figure(figsize=(6, 3))
    plt.hist(rates, bins=[i / 40 for i in range(41)])
    plt.xlabel(f"acceptance rate of a problem ({cfg.samples} responses, T = 1)")
    plt.ylabel(f"problems of {len(rates)}")
    plt.tight_layout()
    plt.savefig(cfg.out / "acceptance.png", dpi=120)


def main(cfg):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    (check if cfg.check else histogram if cfg.histogram else write)(cfg)


if __name__ == "__main__":
    main(tyro.cli(Config))
