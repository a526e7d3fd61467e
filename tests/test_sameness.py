"""The scripts differ in their seams only: other changes have to be made in all."""

import ast
import difflib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The top-level blocks that differ, in order; the most lines added, removed, and hunks
# outside the docstring.
SEAMS = {
    ("raft.py", "gvm_raft.py"): (
        [
            "docstring",
            "from allocator",
            "Config",
            "choose_counts",
            "gradient_norms",
            "check",
        ],
        (85, 10, 8),
    ),
    ("gvm_raft.py", "gvm_grpo.py"): (["docstring", "advantages", "check"], (15, 12, 4)),
}
# Blocks that may only gain lines.
GROWING = ["Config", "check"]
# Settings that only the second script of a pair has.
ADDED_SETTINGS = {
    ("raft.py", "gvm_raft.py"): [
        "pilot_samples",
        "reuse_pilot",
        "prior",
        "alpha",
        "beta",
    ],
    ("gvm_raft.py", "gvm_grpo.py"): [],
}


def name(node):
    """What a top-level statement is called in SEAMS."""
    if isinstance(node, ast.ImportFrom):
        return f"from {node.module}"
    if isinstance(node, ast.Expr):
        return "docstring"
    return getattr(node, "name", None) or ast.unparse(node).splitlines()[0]


def blocks(source):
    """{name: text} of top-level statements, comments before and blank lines after."""
    lines, start, found = source.splitlines(keepends=True), 0, {}
    for node in ast.parse(source).body:
        end = node.end_lineno
        while end < len(lines) and not lines[end].strip():
            end += 1
        assert name(node) not in found, f"{name(node)} is there twice"
        found[name(node)], start = "".join(lines[start:end]), end
    return found | {"end": "".join(lines[start:])}


def settings(source):
    """{setting: its line without the comment} of Config."""
    (config,) = (node for node in ast.parse(source).body if name(node) == "Config")
    fields = [node for node in config.body if isinstance(node, ast.AnnAssign)]
    return {field.target.id: ast.unparse(field) for field in fields}


def drift(first, second, seams, added):
    """One sentence for each unwanted or missing difference between two sources."""
    first_blocks, second_blocks = blocks(first), blocks(second)
    names = list(dict.fromkeys([*second_blocks, *first_blocks]))
    differing = [n for n in names if first_blocks.get(n) != second_blocks.get(n)]
    found = [f"{n} differs" for n in differing if n not in seams]
    found += [f"{n} does not differ" for n in seams if n not in differing]
    common = [n for n in first_blocks if n in second_blocks]
    if common != [n for n in second_blocks if n in first_blocks]:
        found.append("the order differs")
    for block in set(GROWING) & set(differing) & set(common):
        texts = (first_blocks[block].splitlines(), second_blocks[block].splitlines())
        found += [
            f"{block} lost a line" for line in difflib.ndiff(*texts) if line[0] == "-"
        ]
    old, new = settings(first), settings(second)
    found += [
        f"the default of {n} differs" for n in old if n in new and old[n] != new[n]
    ]
    if [n for n in new if n not in old] != added or not old.keys() <= new.keys():
        found.append("the settings differ")
    return found


def size(first, second):
    """Lines added, lines removed, hunks of the diff outside the docstrings."""
    texts = []
    for source in (first, second):
        start = ast.parse(source).body[0].end_lineno
        texts.append(source.splitlines()[start:])
    lines = list(difflib.unified_diff(*texts, n=0))[2:]
    marks = ("+", "-", "@@")
    return tuple(sum(line.startswith(mark) for line in lines) for mark in marks)


def read(pair):
    return [(ROOT / script).read_text() for script in pair]


@pytest.mark.parametrize("pair", SEAMS)
def test_scripts_differ_in_their_seams_only(pair):
    assert drift(*read(pair), SEAMS[pair][0], ADDED_SETTINGS[pair]) == []


@pytest.mark.parametrize("pair", SEAMS)
def test_the_diff_is_short_enough_to_read(pair):
    found, most = size(*read(pair)), SEAMS[pair][1]
    assert all(n <= limit for n, limit in zip(found, most)), f"{found} exceeds {most}"


def test_the_size_of_a_diff_is_counted_outside_the_docstring():
    first = '"""One.\n\nTwo."""\n\na = 1\nb = 2\nc = 3\n'
    second = '"""Another."""\n\na = 1\nb = 4\nc = 3\nd = 5\ne = 6\n'
    assert size(first, second) == (3, 1, 2)


PLANTED = {
    "main differs": ("def main(cfg):\n", "def main( cfg):\n"),
    "update differs": ("optimizer.zero_grad()", "optimizer.zero_grad() "),
    "Response differs": (
        "@dataclass\nclass Response",
        "# new\n@dataclass\nclass Response",
    ),
    "policy_loss differs": (
        "1 - cfg.clip_low, 1 + cfg.clip_high",
        "1 - cfg.clip_high, 1 + cfg.clip_low",
    ),
    "extra differs": ("# ---- Policy\n", "def extra():\n    pass\n\n\n# ---- Policy\n"),
    "end differs": ("FlagCreatePairsOff,)))", "FlagCreatePairsOff,)))\n# new"),
    "the default of kl_coef differs": ("kl_coef: float = 0.0", "kl_coef: float = 1e-3"),
    "check lost a line": ("--updates-per-step exceeds", "--updates-per-step is above"),
    "the settings differ": ("    steps: int =", "    paces: int ="),
}


@pytest.mark.parametrize("sentence", PLANTED)
@pytest.mark.parametrize("pair", SEAMS)
def test_planted_drift_is_found(pair, sentence):
    first, second = read(pair)
    changed = second.replace(*PLANTED[sentence], 1)
    assert changed != second
    assert sentence in drift(first, changed, SEAMS[pair][0], ADDED_SETTINGS[pair])


@pytest.mark.parametrize("pair", SEAMS)
def test_a_changed_order_and_a_seam_that_closed_are_found(pair):
    first, second = read(pair)
    parts = blocks(second)
    last, swapped = SEAMS[pair][0][-1], dict(parts)
    swapped["micro_batches"] = parts["load_policy"]
    swapped["load_policy"] = parts["micro_batches"]
    seams, added = SEAMS[pair][0], ADDED_SETTINGS[pair]
    found = drift(first, "".join(swapped.values()), seams, added)
    assert found == ["the order differs"]
    assert f"{last} does not differ" in drift(first, first, seams, added)
