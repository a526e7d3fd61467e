r"""Is the boxed answer of a response right?  Rules first, math-verify second, never in the caller.

1. Extract    the last balanced \boxed or \fbox. Boxes with only punctuation, "and" or "or" between
              them form a list; with other text between them the last one wins (a self-correction).
              No box is wrong: in training the format is part of the task.
2. Decide     equal spellings are right. Arithmetic is computed, exactly while it is rational, each
              variable at two values: numbers that differ are wrong, equal rationals are right.
3. Fall back  on math-verify for the rest, in a worker that imports it once and has a child answer;
              the kernel bounds the child's memory and kills it at its deadline.

Nothing in an answer is evaluated as code. The worker is this file run as a script, so the caller's
main module is not imported again and needs no guard. Linux only (fork, CPU affinity).

    python verify_math.py --response 'So it is \boxed{\frac12}.' --gold 0.5
    python verify_math.py answers.jsonl          # lines of {"response": ..., "gold": ...}
"""

import argparse
import ast
import atexit
import json
import logging
import mmap
import operator
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
import unicodedata
import zlib
from cmath import e, pi
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache

BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.S)
BETWEEN = re.compile(
    r"(?:[\s$,;.&]|\\[,;:! ()\[\]]|\\q?quad|\\text\s*\{\s*(?:and|or)\s*\}|and|or)*"
)
BOMB = re.compile(r"\d{1000}|\d{4}\s*\)?\s*!|!\s*\)?\s*!|(?:\^[\s{(]*\d+[\s)]*){3}|\x00")
FONT = r"\\(?:text\w*|[mh]box|math(?:rm|bf|it|sf)|operatorname)\*? *\{ *"
END = r"(?<![.\\])(?![\s.,;:$]*\.\.\.)[\s.,;:$]+$"
SPELLING = [  # in this order: one spelling for what has several
    (END, ""),
    (r"\\\$|^\$(?=[\d. ,]+$)", r"\\text{dollar}"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|h?phantom|approx)(?![a-zA-Z])", ""),
    (r"\$|\\! *|\*\*$", ""),
    (r"(\\\\)|\\[,;: ]|\\q?quad(?![a-z])|~|\s+", r"\1 "),
    (r"\\(?:boxed|fbox) *\{", "{"),
    (r"^ *\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\} *$", r"\1"),
    (END, ""),
    (r"\{,\}", ","),
    (r"\\(le|ge)(?:q|qslant)(?![a-z])", r"\\\1"),
    (r"\\(?:langle|lparen)(?![a-z])", "("),
    (r"\\(?:rangle|rparen)(?![a-z])", ")"),
    (r"\^ *\{? *\\circ *\}?|\\degree|°", r"\\text{degree}"),
    (r"\\?%", r"\\text{percent}"),
    (FONT + r"(.|[^{}a-zA-Z]*)\}", r"\1"),
    (FONT, r"\\text{"),
    (r",? *(?:\\text\{,? *(?:and|or),? *\}|(?<=[^a-zA-Z ]) (?:and|or) )", ","),
    (r"\*\*", "^"),
    (r"(?<![\\a-zA-Z{])(sqrt|sin|cos|tan|log|ln|pi|infty)(?![a-z])", r"\\\1"),
    (r"\\sqrt *\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(\\(?:sin|cos|tan) *\(?\{?)(\d+)\\text\{degree\}", r"\1{\\frac{\2\\pi}{180}}"),
    (r"\\[dtc]?(frac|sqrt) *([\da-z]|\\pi(?![a-z]))", r"\\\1{\2}"),
    (r"\\[dtc]?(frac *\{(?:[^{}]|\{[^{}]*\})*\}) *([\da-z]|\\pi(?![a-z]))", r"\\\1{\2}"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"(?<![\d.}^_/])(\d+) *(\\frac *\{\d+\} *\{\d+\}|(?<= )\d+/\d+$)", r"(\1+\2)"),
    (r"(?<=\d)[eE]([-+]?\d+)$", r"*10^{\1}"),
    (r"\\sqrt *\[([357])\] *\{ *-([^{}+-]*)\}", r"-\\sqrt[\1]{\2}"),
    (r"\\sqrt *\[(\d+)\] *(\{(?:[^{}]|\{[^{}]*\})*\})", r"(\2)^{1/\1}"),
    (r"(?<!\\)((?:\\[^{}]|[^,=(\\])*)\\pm((?:\\[^{}]|[^,=)\\])*)", r"\1+\2,\1-\2"),
]
SPELLING = [(re.compile(pattern), new) for pattern, new in SPELLING]
SIGN = (
    "−- –- ⁻^{-} ×* ÷/ ·* ≤\\le_ ≥\\ge_ ∞\\infty_ π\\pi_ √\\sqrt_ ∪\\cup_ 、, 。. °° €\\text{euro}"
)
SIGN = {pair[0]: pair[1:].replace("_", " ") for pair in SIGN.split()}
UNIT = """cm centimeter|m meter|mm millimeter|km kilometer|in inch inche|ft foot feet|g gram|day
|kg kilogram|s sec second|min minute|h hr hour|cent|dollar usd|euro|degree deg|rad radian|percent
|a.m am|p.m pm"""
UNIT = {name: group.split()[0] for group in UNIT.split("|") for name in group.split()}
AFTER = re.compile(
    r"(.*[^ (,=+*/^-]) *\\text\{(?:square |cubic |sq |cu )?([^{}/^ ]*)[^{}]*\}(?:\^\{?\d\}?)?"
    r"|([-+]?[\d.,/ ]*\d) *(?:square |cubic |sq |cu )?([^\W\d_a-zA-Z]|[^\W\d_]{2}[^\W\d_]*)"
    r"(?:[ ./][^\W\d_]+)*\.?(?:\^\{?\d\}?)?"
)
NAME = re.compile(r"(?=\\?[A-Za-z])[\w\\{}'|: ]*(?:\^\{-1\})?(?:\([^=()]*\))?|[^a-zA-Z]*")
RELATION = re.compile(r"[<>]|\\[lg]e(?![a-z])")
BASE = re.compile(r"0*([0-9A-F]*\d[0-9A-F]*) *_ *\{?(\d+)\}?")
WORD = re.compile(r"\\text\{|(?<![\\a-zA-Z{])[A-Za-z]{4}")
TOKEN = r"\d+\.?\d*|\.\d+|\\(?:begin|end) *\{[pb]?matrix\}|\\sqrt *\[|\\[a-zA-Z]+|\\."
TOKEN = re.compile(TOKEN + r"|[a-zA-Z](?:_\w)?|\S")
PYTHON = {"^": "**", ";": ",", "&": ",", "\\\\": ",", "\\cup": ",", "\\cdot": "*", "\\times": "*"}
PYTHON |= {"{": "(", "}": ")", "[": "(", "]": ")", "\\{": "(", "\\}": ")", "\\div": "/"}
PYTHON |= {sign: sign for sign in "+-*/(),"}
SYMBOL = ["frac", "sqrt", "pi", "infty", "alpha", "beta", "gamma", "delta", "theta", "lambda", "mu"]
SYMBOL += ["phi", "omega", "sigma", "rho"]
CONSTANT = {"pi": pi, "e": e, "i": 1j, "infty": float("inf")}
OPERATOR = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def extract_answer(response: str) -> str | None:
    r"""The content of the last box, or of the last list of boxes; None without one.

    >>> extract_answer(r"\boxed{12}, but no: \boxed{\frac{1}{2}}."), extract_answer("It is 12.")
    ('\\frac{1}{2}', None)
    """
    tail = response[-50_000:]  # one linear pass, whatever the response is
    first = min(
        (at for at in (tail.find("\\boxed"), tail.find("\\fbox")) if at >= 0), default=len(tail)
    )
    opened, boxes = [], []
    for match in BRACE.finditer(tail, first):
        if match[0] == "{" or len(match[0]) > 2:
            opened.append(match)
        elif match[0] == "}" and opened and len((start := opened.pop())[0]) > 2:
            while boxes and boxes[-1][0] > start.start():
                boxes.pop()  # a box inside this one
            boxes.append((start.start(), start.end(), match.start()))
    if not boxes:
        return (re.findall(r"\\f?box(?:ed)?\s*(-?\d[\d.,]*)", tail[first:]) or [None])[-1]
    last = len(boxes) - 1
    while last and BETWEEN.fullmatch(tail, boxes[last - 1][2] + 1, boxes[last][0]):
        last -= 1
    return ", ".join(dict.fromkeys(tail[start:end].strip() for _, start, end in boxes[last:]))


def _plain(char):
    """A digit of any script, a full-width form or a sign in its ASCII or LaTeX spelling."""
    plain = unicodedata.normalize("NFKC", char)
    if "\u2044" in plain:  # one character for a fraction
        return "\\frac{{{}}}{{{}}}".format(*plain.split("\u2044"))
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    return SIGN.get(char) or (f"^{{{plain}}}" if char.isdigit() else plain)


@lru_cache(4096)
def spell(answer):
    r"""An answer in one spelling, its unit and its name.

    >>> spell(r"x = \dfrac12\text{ cm}")
    ('\\frac{1}{2}', 'cm', 'x')
    """
    text, unit, name = (
        answer if answer.isascii() else "".join(map(_plain, answer)).replace("}^{", ""),
        "",
        "",
    )
    for pattern, new in SPELLING:
        text = pattern.sub(new, text)
    if match := re.match(r" *([a-zA-Z]) *=", text):  # x = 1, x = 2
        text = text[: match.end()] + re.sub(rf", *{match[1]} *=", ",", text[match.end() :])
    sides = re.split(r" *(?:=|\\in(?![a-z])) *", text)
    if len(sides) > 1 and NAME.fullmatch(sides[0].strip()) and "," not in "".join(sides[1:-1]):
        name, text = sides[0].strip(), sides[-1]
    text = re.sub(r"^ *([-+]?) *(\\text\{(?:dollar|euro)\}) *(.+)", r"\1\3\2", text.strip())
    while match := AFTER.fullmatch(text):
        word = (match[2] or match[4] or "").lower().rstrip(".")
        text, unit = (
            (match[1] or match[3]).strip(),
            UNIT.get(word) or UNIT.get(word.rstrip("s")) or unit,
        )
    if re.fullmatch(r"[-+]?\d{1,3}((?:,\d{3})+(?:\.\d+)?|(?: \d{3})+)", text):
        text = re.sub("[, ]", "", text)
    text = text.strip().removeprefix("+")
    return text, unit, name


@lru_cache(4096)
def numbers(text):
    r"""The numbers in arithmetic or a list of it, at two points; () for others, None for bombs.

    The text becomes a Python expression, for the sake of its syntax tree only: it is never run.

    >>> numbers(r"\frac{3}{4}, 2^{-1}")
    ([Fraction(3, 4), Fraction(1, 2)], [Fraction(3, 4), Fraction(1, 2)])
    """
    code = ""
    for token in TOKEN.findall(re.sub(r"\} *\{", ",", text)):
        if token[0] in ".0123456789":
            token = f"'{token}'"
        elif token in PYTHON or token[:6] == "\\begin" or token[:4] == "\\end":
            token = PYTHON.get(token) or (")" if token[:4] == "\\end" else "(")
        elif token.lstrip("\\") in SYMBOL or (token[0].isalpha() and token.isascii()):
            token = token.lstrip("\\")
        else:
            return ()
        if token[0] not in "+-*/)," and code and (code[-1] in "')" or code[-1].isalnum()):
            if token[0] == "'" or (code[-1] in "fghFGHPQ" and token == "("):
                return ()
            code += "" if code[-4:] in SYMBOL[:2] else "*"
        code += token
    try:
        tree = ast.parse(code, mode="eval").body
        return _numbers(tree, 1), _numbers(tree, -1)
    except OverflowError:
        return None
    except (SyntaxError, ArithmeticError, ValueError, TypeError, MemoryError, RecursionError):
        return ()


def _numbers(tree, sign):
    if isinstance(tree, (ast.Tuple, ast.List)):
        return [number for item in tree.elts for number in _numbers(item, sign)]
    return [_number(tree, sign)]


def _number(tree, sign):
    match tree:
        case ast.Constant(text):
            return Fraction(text)
        case ast.Name(name):
            return CONSTANT.get(name) or sign * Fraction(zlib.crc32(name.encode()) % 997 + 2, 7)
        case ast.UnaryOp(sort, item):
            return -_number(item, sign) if isinstance(sort, ast.USub) else _number(item, sign)
        case ast.Call(ast.Name("sqrt"), [item]):
            return _number(item, sign) ** 0.5
        case ast.Call(ast.Name("frac"), [above, below]):
            return _number(above, sign) / _number(below, sign)
        case ast.BinOp(left, ast.Pow(), right):
            a, b = _number(left, sign), _number(right, sign)
            if isinstance(a, Fraction) and isinstance(b, Fraction) and _bits(a) * abs(b) > 30_000:
                raise OverflowError
            return a**b
        case ast.BinOp(left, sort, right):
            a = _number(left, sign)
            value = OPERATOR[type(sort)](a, _number(right, sign))
            if isinstance(value, Fraction) and _bits(value) > 30_000:
                raise OverflowError
            if not isinstance(value, Fraction) and abs(value) < 1e-6 * abs(a):
                raise ValueError  # after cancellation a float proves nothing
            return value
    raise ValueError


def _bits(value):
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _near(a, b, decimal):
    """Equality; a decimal may be rounded to six places, or to six digits of an endless value."""
    exact = isinstance(a, Fraction) and isinstance(b, Fraction)
    if a == b or (exact and not decimal):
        return a == b
    try:
        gap, size = abs(a - b), max(abs(a), abs(b)) * 1.0
    except OverflowError:
        return False
    endless = not exact or any(10**60 % value.denominator for value in (a, b))
    if not decimal or size == float("inf"):
        return gap <= 1e-9 * size < float("inf")
    return (gap <= 5e-7 and gap <= 1e-5 * size) or (endless and gap <= 1e-6 * size)


def compare(answer, gold, solve=lambda answer, gold: None):
    """True, False, or what solve says where the rules cannot tell."""
    if answer == gold:
        return bool(gold)
    if answer.isdecimal() and gold.isdecimal() and answer.isascii() and gold.isascii():
        return answer.lstrip("0") == gold.lstrip("0")
    if (
        max(len(answer), len(gold)) > 2000
        or BOMB.search(answer)
        or answer.count("{") + answer.count("(") > 80
    ):
        return False
    (a, unit_a, name_a), (b, unit_b, name_b) = spell(answer), spell(gold)
    if not a or not b or (unit_a and unit_b and unit_a != unit_b):
        return False
    if (name_a == name_b or not name_a or not name_b) and a.replace(" ", "") == b.replace(" ", ""):
        return True
    if bool(RELATION.search(a)) != bool(RELATION.search(b)) and not ("(" in a + b or "[" in a + b):
        return False
    if "=" in a + b or (name_a and name_b and name_a != name_b):
        a, b = (f"{name}={text}" if name else text for name, text in ((name_a, a), (name_b, b)))
        return solve(a, b) if "=" in a and "=" in b else False
    if re.search(r"dots|\.\.\.|\d:\d\d", a + b):
        return False
    base_a, base_b = BASE.fullmatch(a), BASE.fullmatch(b)
    if base_a or base_b:
        if base_a and base_b and base_a[2] != base_b[2]:
            return False
        return (base_a[1] if base_a else a) == (base_b[1] if base_b else b)
    if WORD.search(a) or WORD.search(b):
        a, b = (re.sub(r"\\text|[\s{}.'\"()]", "", text).casefold() for text in (a, b))
        return a == b
    if (unit_a == "percent") != (unit_b == "percent"):
        part = (f"({a})/100", b) if unit_a else (a, f"({b})/100")
        verdicts = compare(a, b, solve), compare(*part, solve)
        return True if True in verdicts else None if None in verdicts else False
    x, y, decimal = numbers(a), numbers(b), "." in a + b
    if x is None or y is None:
        return False
    for p, q, union in [
        (x, y, "cup" in a and "cup" not in b),
        (y, x, "cup" in b and "cup" not in a),
    ]:
        for here, there in zip(p, q, strict=False):  # both points, unless one side has none
            # the parts of a union may meet: the numbers of [0, 1] and [1, 2] are not all in [0, 2]
            if not union and not all(any(_near(v, w, decimal) for w in there) for v in here):
                return False
    single = x and y and len(x[0]) == len(y[0]) == 1
    exact = single and isinstance(x[0][0], Fraction) and isinstance(y[0][0], Fraction)
    return True if exact or (single and decimal) else solve(a, b)


def verify(response: str, gold: str) -> bool:
    r"""Whether the boxed answer of a response is the gold answer.

    >>> verify(r"We get \boxed{x = 0.5}.", r"\frac{1}{2}"), verify("It is 0.5.", "0.5")
    (True, False)
    """
    return verify_batch([response], [gold])[0]


def verify_batch(responses: list[str], golds: list[str], timeout: float = 5.0) -> list[bool]:
    """The verdict for each response; an answer that takes more than timeout seconds is wrong."""
    pairs = [
        (extract_answer(text), gold.strip()) for text, gold in zip(responses, golds, strict=True)
    ]
    verdicts = {pair: bool(pair[0]) and compare(*pair) for pair in dict.fromkeys(pairs)}
    if undecided := [pair for pair, verdict in verdicts.items() if verdict is None]:
        _fall_back(undecided, verdicts, timeout)
    return [verdicts[pair] is True for pair in pairs]


_idle = []  # workers; list.pop and list.append are atomic, so that threads can share it
os.register_at_fork(after_in_child=_idle.clear)


def _fall_back(pairs, verdicts, timeout):
    """Let workers fill in the verdicts, one pair at a time; a worker that dies loses one pair."""
    todo, busy, poll = pairs[::-1], {}, select.poll()
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        while todo or busy:
            while todo and len(busy) < max(1, min(share, 4, 1 + len(pairs) // 16)):
                worker, patience = _worker()
                pair = todo.pop()
                poll.register(worker.stdout, select.POLLIN)
                busy[worker.stdout.fileno()] = worker, pair, time.monotonic() + timeout + patience
                with suppress(BrokenPipeError):
                    request = [timeout, time.monotonic() + timeout + 0.6, *pair]
                    worker.stdin.write(json.dumps(request).encode() + b"\n")
            pause = min(deadline for _, _, deadline in busy.values()) - time.monotonic()
            ready = {fd for fd, _ in poll.poll(max(0, 1000 * pause))}
            for fd, (worker, pair, deadline) in list(busy.items()):
                if fd not in ready and time.monotonic() < deadline:
                    continue
                reply = worker.stdout.read(1) if fd in ready else b""
                if reply == b"?":
                    raise ModuleNotFoundError(
                        "verify_math needs math-verify: pip install math-verify"
                    )
                verdicts[pair] = reply == b"1"
                poll.unregister(fd)
                del busy[fd]
                _idle.append(worker) if reply else _stop(worker)
    finally:
        for worker, _, _ in busy.values():
            _stop(worker)


def _worker():
    """An idle worker or a new one, and how many seconds more than its time limit it may take."""
    with suppress(IndexError):
        while True:
            worker = _idle.pop()
            if worker.poll() is None:
                return worker, 0.8
            _stop(worker)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    code = [sys.executable, os.path.abspath(__file__), "--worker"]
    return subprocess.Popen(code, bufsize=0, start_new_session=True, **pipes), 60


def _stop(worker):
    worker.terminate()
    try:
        worker.wait(timeout=1)
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    worker.stdin.close()
    worker.stdout.close()


@atexit.register
def _stop_all():
    while _idle:
        _stop(_idle.pop())


def _serve():
    """The worker: import math-verify, fork a child that answers, and another when that one dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = os.dup(1)
    os.dup2(2, 1)
    try:
        solve = _solver()
    except ImportError:
        return os.write(out, b"?")
    asked, child = mmap.mmap(-1, 1), 0  # shared with the child: 1 while it owes an answer

    def leave(*_):
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os._exit(0)

    signal.signal(signal.SIGTERM, leave)
    while True:
        if not (child := os.fork()):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            _answer(solve, asked, out)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return None  # the caller is gone
        if asked[0]:
            os.write(out, b"0")
            asked[0] = 0


def _answer(solve, asked, out):
    for line in iter(os.fdopen(0, "rb", buffering=0).readline, b""):
        asked[0] = 1
        timeout, deadline, *pair = json.loads(line)
        left = max(0.01, timeout / 2, min(timeout, deadline - time.monotonic()))
        signal.setitimer(signal.ITIMER_REAL, left)  # nobody handles the signal: the kernel kills
        try:
            verdict = compare(*pair, solve) is True
        except (Exception, MemoryError):
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        asked[0] = 0
        os.write(out, b"1" if verdict else b"0")
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 2**19:  # kilobytes
            os._exit(1)
    os._exit(0)


def _solver():
    """math-verify as solve(answer, gold), with a numerical check of what it says."""
    logging.disable()
    import math_verify
    import sympy

    def literal(
        text, **_
    ):  # sympify evaluates strings by parse_expr: here it reads numbers and names
        if text.isidentifier():
            return {"E": sympy.E, "I": sympy.I, "pi": sympy.pi}.get(text) or sympy.Symbol(text)
        return sympy.Integer(text) if text.isdecimal() else sympy.Float(text)

    sympy.parsing.sympy_parser.parse_expr = literal
    config = [math_verify.LatexExtractionConfig()]

    def value(tree, names, k):
        point = {
            name: sympy.Rational((-1) ** k * (7 + 3 * i + k), 11) for i, name in enumerate(names)
        }
        point |= {name: sympy.I for name in names if name.name == "i"}
        return complex(sympy.N(tree.subs(point).doit(), 30))

    def solve(answer, gold):
        boxed = [f"\\boxed{{{text}}}" for text in (answer, gold)]
        (a, b) = (
            math_verify.parse(text, config, "no_fallback", parsing_timeout=None) for text in boxed
        )
        if not a or not b:
            return False
        bound = re.fullmatch(
            r"(?:[^a-zA-Z\\]|\\[a-z]+ ?)*[a-zA-Z] *(?:[<>]|\\[lg]e )(?:[^a-zA-Z]|\\[a-z]+)*", answer
        )
        right = math_verify.verify(b, a, timeout_seconds=None, allow_set_relation_comp=bool(bound))
        with suppress(Exception):
            names = sorted(a[0].free_symbols | b[0].free_symbols, key=str)
            for k in range(4):
                x, y = value(a[0], names, k), value(b[0], names, k)
                if not abs(x - y) <= (1e-5 if right else 1e-12) * max(abs(x), abs(y)):
                    return False
            return True
        return right

    solve(r"\frac{\sqrt{3}}{2}", "x^2-1")  # fills caches that every child inherits
    return solve


def main():
    """The command line; bad input is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", help="JSON lines with the keys response and gold")
    parser.add_argument("--response", help="one response to verify, with --gold")
    parser.add_argument("--gold", help="its gold answer")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds for one answer")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    if (args.file is None) == (args.response is None) or (args.response is None) != (
        args.gold is None
    ):
        parser.error("give either a file or both --response and --gold")
    if args.file is None:
        print(f"answer: {extract_answer(args.response)}")
        print(f"right: {verify_batch([args.response], [args.gold], args.timeout)[0]}")
        return
    from tqdm import tqdm

    rows, right = [], 0
    try:
        with open(args.file, "rb") as file:
            for line in file:
                row = json.loads(line)
                rows.append((row["response"] + "", row["gold"] + ""))
    except OSError as error:
        parser.error(f"cannot read {args.file}: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        parser.error(
            f"{args.file}, line {len(rows) + 1}: not a JSON object with the texts response and gold"
        )
    if not rows:
        parser.error(f"{args.file} has no lines")
    with tqdm(total=len(rows), unit="answer") as bar:
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256]
            right += sum(verify_batch(*map(list, zip(*part, strict=True)), args.timeout))
            bar.update(len(part))
    print(f"accuracy: {right / len(rows):.4f} ({right} of {len(rows)})")


if __name__ == "__main__":
    _serve() if sys.argv[1:] == ["--worker"] else main()
