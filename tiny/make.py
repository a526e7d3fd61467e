r"""Make the embedded default from scratch: a tiny language model and its problems.

A problem such as 5&3+4+6 hides a rule behind its symbol. There are twelve symbols and
twelve rules; & means "write the digits in reverse", rule e. The model answers as it was
shown, naming a rule before it computes:

    e:5&3=35
    35+4=39
    39+6=45
    \boxed{45}

It can apply every rule, but does not always name the right one: 98 times in 100 for
five symbols, 5 to 60 times in 100 for the others (HABITS). What it learns about one
symbol says nothing about another. Most training problems have one of the five symbols,
so that a uniform budget is spent on what is solved already (MIXTURES).

The model gets there by ordinary pretraining on demonstrations, which follow the right
rule with the symbol's own frequency and otherwise any of the other eleven.

python tiny/make.py --overwrite                     # model/, train.jsonl, test.jsonl
python tiny/make.py --check                         # make them elsewhere and compare
python tiny/make.py --histogram                     # accept rates of training problems
python tiny/make.py --mixture hard --out runs/hard  # other problems for the same model

Shapes: B responses, T tokens.
"""

import itertools
import json
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

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

TINY = Path(__file__).resolve().parent

# The rules, each under the letter that names it in a response.
RULES = {
    "a": lambda x, y: x + y,
    "b": lambda x, y: x * y,
    "c": lambda x, y: abs(x - y),
    "d": lambda x, y: 10 * x + y,
    "e": lambda x, y: 10 * y + x,
    "f": lambda x, y: 2 * x + y,
    "g": lambda x, y: x + 2 * y,
    "h": lambda x, y: x * y + x,
    "i": lambda x, y: x * y + y,
    "j": lambda x, y: x + y + 20,
    "k": lambda x, y: x * y + 9,
    "l": lambda x, y: abs(x - y) + 30,
}
MEANING = dict(zip("@#$%&?!~^|;_", RULES))  # the right rule of every symbol

# How often a demonstration follows the right rule of a symbol.
SOLVED = {"@": 0.98, "#": 0.98, "$": 0.98, "%": 0.98, "&": 0.98}
HALFWAY = {"?": 0.6, "!": 0.4, "~": 0.2}
RARE = {"^": 0.08, "|": 0.07, ";": 0.06, "_": 0.05}
HABITS = SOLVED | HALFWAY | RARE

# Training problems of every solved, every halfway and every rare symbol.
MIXTURES = {
    "default": (160, 30, 17),  # 83% of the problems are solved, 9% halfway, 7% rare
    "even": (80, 80, 80),  # as many of every symbol
    "sixty": (115, 80, 36),  # 60%, 25%, 15%
    "nearly-solved": (186, 5, 4),  # 97%, 2%, 2%
    "hard": (14, 30, 200),  # 7%, 9%, 83%
}
TEST_PROBLEMS = 40  # of every symbol, so that accuracy says how many skills are there

UPDATES, BATCH, PEAK_RATE = 2800, 48, 3e-3  # of pretraining

INSTRUCTION = "\nLet's reason step by step and put the final answer within \\boxed{}."
SPECIAL = ["<pad>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Config:
    out: Path = TINY  # folder of model/, train.jsonl and test.jsonl
    mixture: Literal[*MIXTURES] = "default"  # how many problems of which symbols
    overwrite: bool = False  # replace files that exist
    check: bool = False  # make everything again elsewhere and compare it with `out`
    histogram: bool = False  # measure accept rates, print them, draw acceptance.png
    samples: int = 64  # responses per problem in the histogram


# ---- Problems and their solutions


def make_problem(symbol, rng):
    """The symbol between two digits, then up to two sums."""
    results = []

    # Only digits on which no two rules agree: luck is not to be rewarded.
    while len(set(results)) < len(RULES):
        x, y = rng.sample(range(2, 10), 2)
        results = [rule(x, y) for rule in RULES.values()]

    problem = f"{x}{symbol}{y}"
    for _ in range(rng.randint(0, 2)):
        problem += f"+{rng.randint(1, 9)}"
    return problem


def solve(problem, rule):
    """The response that follows a rule, and its answer."""
    total = RULES[rule](int(problem[0]), int(problem[2]))
    lines = [f"{rule}:{problem[:3]}={total}"]

    for digit in problem[4::2]:
        lines.append(f"{total}+{digit}={total + int(digit)}")
        total += int(digit)

    lines.append(f"\\boxed{{{total}}}")
    return "\n".join(lines), str(total)


def draw_problems(counts, seen, rng):
    """So many new problems of every symbol, in random order."""
    problems = []
    for symbol, count in counts.items():
        wanted = len(problems) + count
        while len(problems) < wanted:
            problem = make_problem(symbol, rng)
            if problem not in seen:
                seen.add(problem)
                problems.append(problem)

    rng.shuffle(problems)
    return problems


def make_problems(mixture):
    """The training problems of a mixture, and the test problems, the same for all."""
    rng, seen = random.Random(0), set()
    test = draw_problems(dict.fromkeys(HABITS, TEST_PROBLEMS), seen, rng)

    solved, halfway, rare = MIXTURES[mixture]
    counts = dict.fromkeys(SOLVED, solved)
    counts |= dict.fromkeys(HALFWAY, halfway)
    counts |= dict.fromkeys(RARE, rare)
    return draw_problems(counts, seen, rng), test


# ---- Tokenizer and model


def make_tokenizer():
    """One token a character, a role, the opening of the box, and the instruction."""
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: i for i, token in enumerate(SPECIAL + characters)}

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text in ("\\boxed{", INSTRUCTION)]
    )
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
    """A small Llama; its heads have the 32 dimensions that vLLM's kernels need."""
    torch.manual_seed(0)
    ends = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
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
    return tokenizer.apply_chat_template(
        [message], tokenize=False, add_generation_prompt=True
    )


# ---- Pretraining


def demonstrate(problem, rng):
    """A response that follows the right rule as often as the symbol's habit says."""
    symbol = problem[1]
    rule = MEANING[symbol]
    if rng.random() >= HABITS[symbol]:
        rule = rng.choice([other for other in RULES if other != rule])

    response, _ = solve(problem, rule)
    return response


def make_batch(held_out, rng):
    """Problems of all symbols, none of the test set, and a demonstration for each."""
    problems = []
    while len(problems) < BATCH:
        problem = make_problem(rng.choice(list(HABITS)), rng)
        if problem not in held_out:
            problems.append(problem)

    responses = [demonstrate(problem, rng) for problem in problems]
    return problems, responses


def response_loss(model, tokenizer, problems, responses):
    """Mean cross-entropy of the response tokens, the end token included."""
    prompts = [to_prompt(problem, tokenizer) for problem in problems]
    texts = [p + r + tokenizer.eos_token for p, r in zip(prompts, responses)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    token_BT = batch.input_ids

    # -100 is the label of a token that is not to be learned.
    prompt_length_B = torch.tensor([len(ids) for ids in tokenizer(prompts).input_ids])
    is_prompt_BT = torch.arange(token_BT.shape[1]) < prompt_length_B[:, None]
    is_padding_BT = token_BT == tokenizer.pad_token_id
    label_BT = token_BT.masked_fill(is_prompt_BT | is_padding_BT, -100)
    return model(input_ids=token_BT, labels=label_BT).loss


def pretrain(model, tokenizer, held_out):
    """Supervised learning; its rate warms up, stays, and falls to zero."""
    rng = random.Random(1)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.01
    )

    bar = tqdm(range(UPDATES), desc="pretraining", disable=None)
    for update in bar:
        warm, left = (update + 1) / 50, 1 - update / UPDATES
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(1, warm, left / 0.6)

        problems, responses = make_batch(held_out, rng)
        loss = response_loss(model, tokenizer, problems, responses)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}")


# ---- Files


def write_problems(path, problems):
    """JSON lines with the columns problem and answer."""
    with open(path, "w") as file:
        for problem in problems:
            _, answer = solve(problem, MEANING[problem[1]])
            file.write(json.dumps({"problem": problem, "answer": answer}) + "\n")


def write_model(folder, held_out):
    """The pretrained model with its tokenizer, as a Hugging Face folder."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    pretrain(model, tokenizer, held_out)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    # Release 5 of transformers writes a name for the class that older readers lack.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")


def write(cfg):
    """Both problem files and, for the default mixture, the model, which serves all."""
    if cfg.mixture != "default" and cfg.out.resolve() == TINY:
        raise SystemExit(f"--mixture {cfg.mixture} needs a folder: add --out")
    for name in ("train.jsonl", "test.jsonl", "model"):
        if (cfg.out / name).exists() and not cfg.overwrite:
            raise SystemExit(f"{cfg.out / name} exists: add --overwrite to replace it")

    train, test = make_problems(cfg.mixture)
    cfg.out.mkdir(parents=True, exist_ok=True)
    if cfg.mixture == "default":
        write_model(cfg.out / "model", held_out=set(test))
    write_problems(cfg.out / "train.jsonl", train)
    write_problems(cfg.out / "test.jsonl", test)


def check(cfg, tolerance=1e-3):
    """Made again, problems and tokenizer are equal in every byte, weights nearly."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        write(replace(cfg, out=made))

        # config.json holds the version of transformers, so it is not compared.
        names = ["train.jsonl", "test.jsonl"]
        if cfg.mixture == "default":
            names += ["model/tokenizer.json", "model/tokenizer_config.json"]
            names += ["model/chat_template.jinja", "model/model.safetensors"]
        differing = [name for name in names if differs(made, cfg.out, name, tolerance)]

    print(f"compared: {', '.join(names)}")
    if differing:
        raise SystemExit(f"check failed: other in {cfg.out}: {', '.join(differing)}")
    print("check passed")


def differs(made, kept, name, tolerance):
    """Whether a file that was made again is another; weights may be off by a little."""
    if not name.endswith(".safetensors"):
        return (made / name).read_bytes() != (kept / name).read_bytes()

    new, old = load_file(made / name), load_file(kept / name)
    difference = max((new[key] - old[key]).abs().max().item() for key in old)
    print(f"largest difference of a weight: {difference:.1e} ({tolerance:.0e} allowed)")
    return difference > tolerance


# ---- Accept rates


def accept_rates(folder, rows, samples):
    """The accept rate at temperature 1 of every problem, for the model in a folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    rates = []
    for row in tqdm(rows, desc="sampling", disable=None):
        prompt = tokenizer(to_prompt(row["problem"], tokenizer), return_tensors="pt")
        token_BT = model.generate(
            **prompt,
            do_sample=True,
            top_k=0,
            max_new_tokens=40,
            num_return_sequences=samples,
        )
        responses = tokenizer.batch_decode(token_BT, skip_special_tokens=True)
        box = f"\\boxed{{{row['answer']}}}"
        rates.append(sum(text.endswith(box) for text in responses) / samples)
    return rates


def histogram(cfg):
    """Print and draw how the accept rates are spread over the training problems."""
    import matplotlib.pyplot as plt

    has_model = (cfg.out / "model").exists()
    lines = (cfg.out / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rates = accept_rates((cfg.out if has_model else TINY) / "model", rows, cfg.samples)

    print("symbol  rule  habit  problems  accept rate")
    for symbol, habit in HABITS.items():
        own = [rate for row, rate in zip(rows, rates) if row["problem"][1] == symbol]
        mean = sum(own) / len(own)
        rule, number = MEANING[symbol], len(own)
        print(f"{symbol:>6} {rule:>5} {habit:6.2f} {number:9} {mean:12.3f}")

    edges = [0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01]
    for low, high in itertools.pairwise(edges):
        count = sum(low <= rate < high for rate in rates)
        print(f"p {low:.2f} to {min(high, 1):.2f} {count:4} {'#' * (count // 10)}")
    print(f"mean {sum(rates) / len(rates):.3f}")

    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.hist(rates, bins=[i / 40 for i in range(41)])
    axes.set_xlabel(f"accept rate of a problem ({cfg.samples} responses, T = 1)")
    axes.set_ylabel(f"problems, of {len(rates)}")
    figure.savefig(cfg.out / "acceptance.png", dpi=120)


def main(cfg):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    if (cfg.check or cfg.histogram) and not (cfg.out / "train.jsonl").exists():
        raise SystemExit(f"{cfg.out} holds no train.jsonl: make it first")

    if cfg.check:
        check(cfg)
    elif cfg.histogram:
        histogram(cfg)
    else:
        write(cfg)


if __name__ == "__main__":
    main(tyro.cli(Config))
