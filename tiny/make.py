"""Make the embedded default from scratch: a tiny language model and its problems.

The problems are arithmetic chains such as 7*8+5-3. The model behaves as a base model does: it
has the skill (solving step by step) but rarely the habit (it would rather guess). Both come from
ordinary pretraining on demonstrations, in two phases:

1. skill  step-by-step solutions:  7*8=56, 56+5=61, 61-3=58, \\boxed{58}, one a line
2. habit  a mixture of these, with a frequency that depends on the problem, and of direct answers
          that are wrong:          \\boxed{17}

The habit is frequent for short problems and rare for long ones, so that the acceptance rate p_i
spreads over problems from about 0.01 to 0.9, with a long tail on which a budget can adapt.
Reinforcement only has to shift the habit, which takes seconds.

python tiny/make.py                 # makes tiny/model, tiny/train.jsonl and tiny/test.jsonl
python tiny/make.py --check         # makes them again elsewhere and compares
python tiny/make.py --histogram     # acceptance of the model over the test problems

Shapes: B responses, T tokens.
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
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

INSTRUCTION = "\nLet's reason step by step and put the final answer within \\boxed{}."
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>"]
TRAIN, TEST = 3000, 500  # distinct problems in train.jsonl and test.jsonl
UPDATES, BATCH, PEAK_RATE = 2200, 32, 3e-3  # of pretraining, which takes four minutes on a core
SKILL = 0.6  # the fraction of the updates that is spent on the first phase
# Operators in a problem -> frequency of the habit where its first digit is 2, and where it is 9.
HABIT = {2: (0.40, 0.90), 3: (0.10, 0.40), 4: (0.01, 0.08)}


@dataclass(frozen=True)
class Config:
    out: Path = Path(__file__).parent  # folder of model/, train.jsonl and test.jsonl
    overwrite: bool = False  # replace files that exist
    check: bool = False  # make everything again in a temporary folder and compare with `out`
    histogram: bool = False  # sample the model on its test problems, draw out/acceptance.png
    samples: int = 64  # responses per problem in the histogram


# ---- Problems and demonstrations


def make_problem(rng):
    """A chain of two to four operators, only the first of which may be *; nothing negative."""
    operators = rng.choice([2, 3, 4, 4])
    signs = [rng.choice("+-*"), *rng.choices("+-", k=operators - 1)]
    problem = str(rng.randint(2, 9)) + "".join(sign + str(rng.randint(2, 9)) for sign in signs)
    return problem if "=-" not in solve(problem) else make_problem(rng)


def make_problems():
    """The training and the test problems, all distinct."""
    rng, problems = random.Random(0), {}  # a dict keeps the order, a set does not
    while len(problems) < TRAIN + TEST:
        problems[make_problem(rng)] = None
    return list(problems)[:TRAIN], list(problems)[TRAIN:]


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
    return (re.findall(r"\\boxed\{(\d+)\}", response) or [None])[-1]


def guess(problem, rng):
    """A direct answer out of the air, always wrong: luck is not to be reinforced."""
    answer = answer_of(solve(problem))
    return f"\\boxed{{{rng.choice([n for n in range(100) if str(n) != answer])}}}"


def habit(problem):
    """How often demonstrations of the second phase solve this problem step by step."""
    low, high = HABIT[len(problem) // 2]
    return low * (high / low) ** ((int(problem[0]) - 2) / 7)


# ---- Tokenizer and model


def make_tokenizer():
    """One token a character, and one for each role, the opening of the box, the instruction."""
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: i for i, token in enumerate(SPECIAL + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
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
    """Three Llama layers of 0.35 M parameters; heads of 32, the least that vLLM's kernels take."""
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
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
        **ends,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ends)
    return model


def to_prompt(problem, tokenizer):
    """Problem and instruction in the chat template, as text."""
    message = {"role": "user", "content": problem + INSTRUCTION}
    return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


# ---- Pretraining


def demonstrations(is_skill, test, rng):
    """A batch of problems outside the test set, each with a solution or a guess."""
    problems = []
    while len(problems) < BATCH:
        problem = make_problem(rng)
        if problem not in test:
            problems.append(problem)
    responses = [
        solve(problem) if is_skill or rng.random() < habit(problem) else guess(problem, rng)
        for problem in problems
    ]
    return problems, responses


def response_loss(model, tokenizer, problems, responses):
    """Mean cross-entropy of the response tokens, the end token included."""
    prompts = [to_prompt(problem, tokenizer) for problem in problems]
    texts = [p + r + tokenizer.eos_token for p, r in zip(prompts, responses, strict=True)]
    token_BT = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
    prompt_length_B = torch.tensor([len(ids) for ids in tokenizer(prompts).input_ids])
    is_prompt_BT = torch.arange(token_BT.shape[1]) < prompt_length_B[:, None]
    label_BT = token_BT.masked_fill(is_prompt_BT | (token_BT == tokenizer.pad_token_id), -100)
    return model(input_ids=token_BT, labels=label_BT).loss


def pretrain(model, tokenizer, test):
    """Skill, then habit; the learning rate warms up, stays, and falls to zero from 40% on."""
    rng, test = random.Random(1), set(test)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    bar = tqdm(range(UPDATES), desc="pretraining")
    for update in bar:
        is_skill = update < SKILL * UPDATES
        loss = response_loss(model, tokenizer, *demonstrations(is_skill, test, rng))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        schedule = min(1, (update + 1) / 50, (1 - update / UPDATES) / 0.6)
        optimizer.param_groups[0]["lr"] = PEAK_RATE * schedule
        optimizer.step()
        bar.set_postfix_str(f"{'skill' if is_skill else 'habit'}, loss {loss.item():.3f}")


# ---- Files


def write(cfg):
    """Make and write the model with its tokenizer, and both problem files."""
    for path in (cfg.out / name for name in ("model", "train.jsonl", "test.jsonl")):
        if path.exists() and not cfg.overwrite:
            sys.exit(f"{path} exists; --overwrite replaces it")
    folder, (train, test) = cfg.out / "model", make_problems()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    pretrain(model, tokenizer, test)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Release 5 of transformers writes the name of an internal class that older readers lack.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for name, problems in (("train", train), ("test", test)):
        lines = [json.dumps({"problem": p, "answer": answer_of(solve(p))}) for p in problems]
        (cfg.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def check(cfg, tolerance=1e-3):
    """Make all again elsewhere: problems and tokenizer are equal in every byte, weights nearly."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        write(replace(cfg, out=made))
        paths = [*made.glob("*.jsonl"), *made.glob("model/tokenizer*"), *made.glob("model/*.jinja")]
        names = sorted(str(path.relative_to(made)) for path in paths)
        differing = [n for n in names if (made / n).read_bytes() != (cfg.out / n).read_bytes()]
        new, old = (load_file(root / "model/model.safetensors") for root in (made, cfg.out))
    difference = max((new[name] - old[name]).abs().max().item() for name in old)
    print(f"compared: {', '.join(names)}\ndiffering: {', '.join(differing) or 'none'}")
    print(f"largest difference of a weight: {difference:.2e} (tolerance {tolerance:.0e})")
    if differing or difference > tolerance:
        sys.exit("check: failed")
    print("check: passed")


# ---- Acceptance


def acceptance(cfg):
    """The acceptance rate at temperature 1 of every test problem."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(cfg.out / "model")
    tokenizer = AutoTokenizer.from_pretrained(cfg.out / "model")
    rows = [json.loads(line) for line in (cfg.out / "test.jsonl").read_text().splitlines()]
    rates = []
    for start in tqdm(range(0, len(rows), 16), desc="sampling"):
        part = rows[start : start + 16]
        prompts = [to_prompt(row["problem"], tokenizer) for row in part]
        prompt = tokenizer(prompts, padding=True, return_tensors="pt")
        options = {"num_return_sequences": cfg.samples, "max_new_tokens": 64, "top_k": 0}
        token_BT = model.generate(**prompt, **options, do_sample=True)
        responses = iter(tokenizer.batch_decode(token_BT, skip_special_tokens=True))
        for row in part:
            group = itertools.islice(responses, cfg.samples)
            rates.append(sum(answer_of(r) == row["answer"] for r in group) / cfg.samples)
    return rates


def histogram(cfg):
    """Print and draw how the acceptance rates are spread over the test problems."""
    import matplotlib.pyplot as plt

    rates = acceptance(cfg)
    edges = [0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01]
    for low, high in itertools.pairwise(edges):
        count = sum(low <= rate < high for rate in rates)
        print(f"p {low:.2f} to {min(high, 1):.2f} {count:4d} {'#' * (count // 2)}")
    print(f"acceptance: {sum(rates) / len(rates):.3f}")
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.hist(rates, bins=[i / 40 for i in range(41)])
    axes.set_xlabel(f"acceptance rate of a problem ({cfg.samples} responses, T = 1)")
    axes.set_ylabel(f"problems, of {len(rates)}")
    figure.savefig(cfg.out / "acceptance.png", dpi=120)


def main(cfg):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    (check if cfg.check else histogram if cfg.histogram else write)(cfg)


if __name__ == "__main__":
    main(tyro.cli(Config))
