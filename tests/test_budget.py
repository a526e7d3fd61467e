"""The scripts are short and plain enough to read, and the paper is found in them.

The budget counts Python tokens (comments and docstrings are free, an f-string is one),
so that longer lines do not help, and lines, so that a maze of small ones does not.
"""

import ast
import io
import re
import runpy
import tokenize

import pytest
from conftest import ROOT, SCRIPTS, restored

FREE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT}
FREE |= {tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}
LOOPS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef

SCRIPT = {"tokens": 5100, "tokens a line": 10.8, "lines": 680, "comprehensions": 33}
SCRIPT |= {"main": 60, "longest other function": 50, "lines of method": 290}
LIMITS = {f"{script}.py": SCRIPT for script in SCRIPTS}
LIMITS["allocator.py"] = {"lines": 100, "tokens a line": 13.0}
LIMITS["verify_math.py"] = {"lines": 360, "tokens": 3000, "tokens a line": 10.6}
LEAST = {"blank lines": 6}  # inside functions, per 100 lines of code; scripts only
BANNERS = [
    "# ---- E-step: how many responses",
    "# ---- M-step: what they teach",
    "# ---- Sampling",
    "# ---- Policy",
    "# ---- Problems, run folder, processes",
]
CALL = "main(tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,)))"


def docstrings(tree):
    """The lines of all docstrings."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | FUNCTIONS) and node.body:
            first = node.body[0]
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                lines |= set(range(first.lineno, first.end_lineno + 1))
    return lines


def count_tokens(source):
    """Python tokens, and the lines that hold them."""
    free, tokens, code, depth = docstrings(ast.parse(source)), 0, set(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]  # from Python 3.12 on f-strings have parts
        depth += kind.endswith("STRING_START")
        if token.type not in FREE and token.start[0] not in free:
            tokens += depth == 0 or (depth == 1 and kind.endswith("STRING_START"))
            code |= set(range(token.start[0], token.end[0] + 1))
        depth -= kind.endswith("STRING_END")
    return tokens, len(code)


def measure(source):
    """What the budget limits."""
    tree, lines = ast.parse(source), source.splitlines()
    tokens, code = count_tokens(source)
    inside, sizes = set(), {"main": 0, "longest other function": 0}
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            name = "main" if node.name == "main" else "longest other function"
            sizes[name] = max(sizes[name], node.end_lineno - node.lineno + 1)
            inside |= set(range(node.lineno, node.end_lineno + 1))
    blank = sum(not lines[number - 1].strip() for number in inside)
    return sizes | {
        "tokens": tokens,
        "tokens a line": tokens / code,
        "lines": len(lines),
        "comprehensions": sum(isinstance(n, LOOPS) for n in ast.walk(tree)),
        "blank lines": 100 * blank / code,
        "lines of method": lines.index(BANNERS[2]) if BANNERS[2] in lines else 0,
    }


def excess(name, source):
    """What a file has too much or too little of, a sentence each."""
    found, script = measure(source), LIMITS[name] is SCRIPT
    over = [key for key, most in LIMITS[name].items() if found[key] > most]
    under = [key for key, least in LEAST.items() if script and found[key] < least]
    sentences = [f"{key}: {found[key]:.1f}" for key in over + under]
    banners = [line for line in source.splitlines() if line.startswith("# ----")]
    if script and banners != BANNERS:
        sentences.append(f"banners: {banners}")
    if script and not source.endswith(f'\n\nif __name__ == "__main__":\n    {CALL}\n'):
        sentences.append("the last lines are not the call of main")
    return sentences


@pytest.mark.parametrize("name", LIMITS)
def test_a_file_keeps_within_its_budget(name):
    assert excess(name, (ROOT / name).read_text()) == []


LONG = "def long():\n" + "    x = 1\n" * 51 + "\n\n"
PLANTED = {
    "tokens": lambda s: s + "a = (" + "1, " * 2500 + ")\n",
    "tokens a line": lambda s: s + f"a = ({'1, ' * 4000})\n",
    "lines": lambda s: s + "# more\n" * 200,
    "comprehensions": lambda s: s + "[i for i in ()]\n" * 34,
    "main": lambda s: s.replace("    check(cfg)\n", "    check(cfg)\n" * 62, 1),
    "longest other function": lambda s: LONG + s,
    "lines of method": lambda s: s.replace(BANNERS[1], "# more\n" * 150 + BANNERS[1]),
    "blank lines": lambda s: re.sub(r"\n\n    ", "\n    ", s),
    "banners": lambda s: s.replace(BANNERS[0], BANNERS[0].replace("E-", "First ")),
    "the last lines": lambda s: s.replace("main(tyro.cli", "main(config or tyro.cli"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_excess_is_found(what):
    source = (ROOT / "gvm_raft.py").read_text()
    changed = PLANTED[what](source)
    assert changed != source
    assert what in [
        s.partition(":")[0][: len(what)] for s in excess("gvm_raft.py", changed)
    ]


def test_banners_in_another_order_are_found():
    source = (ROOT / "raft.py").read_text()
    swapped = source.replace(BANNERS[0], "X").replace(BANNERS[1], BANNERS[0])
    swapped = swapped.replace("X", BANNERS[1])
    assert any(s.startswith("banners") for s in excess("raft.py", swapped))


def test_the_counter_counts_what_is_to_be_understood():
    source = '''"""Free."""

import os  # free


def twice(x):
    """Free,
    all of it."""
    y = f"{x + 1} and {x!r:>{x}}"

    return [
        y for _ in range(2)
    ]
'''
    # import os | def twice ( x ) : | y = f | return [ y for _ in range ( 2 ) ]
    assert count_tokens(source) == (2 + 6 + 3 + 11, 6)
    found = measure(source)
    assert found["comprehensions"] == 1 and found["lines"] == 13
    assert found["longest other function"] == 8 and found["main"] == 0
    assert found["blank lines"] == pytest.approx(100 / 6)


def imports(source):
    """The modules of this repository that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
    roots = {name.partition(".")[0] for name in names}
    return {r for r in roots if (ROOT / f"{r}.py").exists() or (ROOT / r).is_dir()}


def test_no_file_leans_on_another_but_for_the_two_that_every_script_may_use():
    for script in SCRIPTS:
        found = imports((ROOT / f"{script}.py").read_text())
        expected = {"verify_math"} if script == "raft" else {"verify_math", "allocator"}
        assert found == expected
    for module in ("allocator", "verify_math"):
        assert imports((ROOT / f"{module}.py").read_text()) == set()


# ---- Equations

TAGS = ["Lemma 1", "Algorithm 1", "Eq. 5", "Eq. 6"]
PILOT_TAGS = [*TAGS, "Eq. 7", "Prop. 1", "Algorithm 2"]


def equation_map(source):
    """{tag: names of functions} of the table in the docstring."""
    found = {}
    for line in ast.get_docstring(ast.parse(source)).splitlines():
        row = re.fullmatch(r"  ((?:Eq\.|Lemma|Prop\.|Algorithm) \d)  +.*  (\S.*)", line)
        if row:
            found[row[1]] = row[2].split(", ")
    return found


def comments(source):
    """{function: its comments}."""
    by_line = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            by_line[token.start[0]] = token.string
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTIONS):
            lines = range(node.lineno, node.end_lineno + 1)
            found[node.name] = " ".join(by_line.get(number, "") for number in lines)
    return found


def lost(source, tags):
    """Equations that are missing from the map or from a function that it names."""
    table, found = equation_map(source), comments(source)
    missing = [f"{tag} in the map" for tag in tags if tag not in table]
    for tag, functions in table.items():
        for name in functions:
            if tag not in found.get(name, ""):
                missing.append(f"{tag} in {name}")
    return missing


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_equation_is_in_the_map_and_where_it_is_computed(script):
    tags = TAGS if script == "raft" else PILOT_TAGS
    assert lost((ROOT / f"{script}.py").read_text(), tags) == []


@pytest.mark.parametrize("tag", PILOT_TAGS)
def test_a_lost_equation_is_found(tag):
    source = (ROOT / "gvm_raft.py").read_text()
    docstring = source.split('"""')[1]
    without = source.replace(docstring, docstring.replace(f"  {tag} ", "  "), 1)
    assert f"{tag} in the map" in lost(without, PILOT_TAGS)
    code = source.replace(docstring, "")
    without = source.replace(code[6:], code[6:].replace(tag, ""))
    assert any(s.startswith(f"{tag} in ") for s in lost(without, PILOT_TAGS))


# ---- Settings


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_is_one_line_in_the_source_and_in_help(
    script, capsys, monkeypatch
):
    source = (ROOT / f"{script}.py").read_text()
    config = source.split("class Config:")[1].split("\n\n\n")[0]
    fields = re.findall(r"^    (\w+): .+ = .*  # (.*)$", config, re.MULTILINE)
    module = __import__(script)
    assert [name for name, _ in fields] == list(module.Config.__dataclass_fields__)
    assert len(fields) <= 30

    # in a terminal of the usual width
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(ROOT)
    with restored([f"{script}.py", "--help"]), pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert stop.value.code == 0
    box = capsys.readouterr().out.split("show this help message and exit")[1]
    lines = [line.strip("│ ") for line in box.splitlines() if "--" in line]
    assert len(lines) == len(fields) == box.count("default: ")
    for (name, comment), line in zip(fields, lines):
        flag = name.replace("_", "-")
        pattern = rf"--(no-)?{flag}( \S+)? +{re.escape(comment)} \(default: .*\)"
        assert re.fullmatch(pattern, line) and len(line) <= 76, line
