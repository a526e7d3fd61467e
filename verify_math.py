r"""Is the boxed answer of a response right?  Rules first, math-verify second, never in the caller.

The worker is this file run as a script, so the caller's main module is not run and needs no guard.
Its start, once, is not part of an answer's time. No box is wrong: the format is part of the task.
"""

import argparse
import ast
import atexit
import json
import operator
import os
import re
import resource
import signal
import subprocess
import sys
import unicodedata
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from math import e, inf, pi
from multiprocessing.connection import Connection, Pipe

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|(?<!(?<!\\)\\)[{}]")
BETWEEN = re.compile(r"(?:[\s$,;.&]|\\[,;:! ()\[\]]|\\q?quad|\\text\s*\{|\}|\b(?:and|or)\b)*")
BOMB = re.compile(r"\d{1000}|\d{4}[\s)]*!|![\s)]*!|(?:\^[\s{(]*\d+[\s)]*){3}|\x00|[eE][-+]?\d{4}")
SIGN = "−- –- ⁻- ×* ÷/ ·* ≤\\le_ ≥\\ge_ ∞\\infty_ π\\pi_ √\\sqrt_ ∪\\cup_ 、, 。. "
SIGN += "½\\frac12 ¼\\frac14 ¾\\frac34 °\\degree_"
SIGN = str.maketrans({pair[0]: pair[1:].replace("_", " ") for pair in SIGN.split()})
SPELLING = [  # in this order: one spelling for what has several
    (r"(?<![.\\])(?![\s.,;:$]*\.\.\.)[\s.,;:$]+$", ""),
    (r"^([-+ ]*)(\\\$|€|\$(?=[\d. ,]+$)) *(.+)", r"\1\3\\text{\2}"),
    (r"\\! *|(?<=\{,)\}|\{(?=,\})", ""),
    (r"(\\\\)|\\(?:left|right|displaystyle|q?quad)(?![a-zA-Z])|\\[,;: ]|~|\s+|(?<!\\)\$", r"\1 "),
    (r"\^ *\{? *\\circ *\}?|\\degree", r"\\text{degree}"),
    (r"\\?%", r"\\text{percent}"),
    (r"\\(?:text\w*|[mh]box|math(?:rm|bf|it|sf)|operatorname)\*? *\{ *", r"\\text{"),
    (r"\\text\{([^{}a-zA-Z€$]*|[A-Zei])\}", r"\1"),
    (r",? *(?:\\text\{,? *(?:and|or),? *\}|(?<=[^a-zA-Z ]) (?:and|or) )|;", ","),
    (r"\*\*", "^"),
    (r"\\([lg]e)q(?:slant)?(?![a-z])", r"\\\1 "),
    (r"\\langle *", "("),
    (r" *\\rangle", ")"),
    (r"(?<![\\a-zA-Z])(sqrt|pi|infty|sin|cos|tan)(?![a-zA-Z])", r"\\\1"),
    (r"\\sqrt *\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt *\[([3579])\] *\{ *-(\d+)\}", r"-\\sqrt[\1]{\2}"),
    (r"(\\(?:sin|cos|tan|cot)) *\(?\{?([\d.]+)\\text\{degree\}[)}]?", r"\1{\\frac{\2\\pi}{180}}"),
    (r"\\[dtc]?frac *", r"\\frac"),
    (r"\\frac(\d|\\pi) *(\d)", r"\\frac{\1}{\2}"),
    (r"(?<=\d)( [a-zA-Z][^\W\d_]|[^\W\d_]{3}|[ck]m|kg|[^\W\d_a-zA-Z])([\w ./]*)", r"\\text{\1\2}"),
    (r"(?<![\d.}^_/])(\d+) *(\\frac *(?:\{\d+\}|\d){2}|(?<= )\d+/\d+$)", r"(\1+\2)"),
    (r"^ *[-+]? *\d{1,3}([, ]\d{3})+(?=\.\d| *(?:$|\\text))", lambda m: re.sub("[, ]", "", m[0])),
    (r"(?<!\w) +| +(?!\w)|(?<=\d) +(?=[a-zA-Z])", ""),
    (r"(?<=\d)[eE]([-+]?\d+)(?=$|\\text)", r"*10^{\1}"),
    (r"^([a-zA-Z])=([^=]*),\1=", r"\1=\2,"),
    (r"^\\\{((?:(?!\\[{}]|\\mid|[|:]).)+)\\\}$", r"\1"),
    (r"(^|,)([^,()]*)\\pm *([^,()]*)(?=,|$)", r"\1\2+\3,\2-\3"),
]
UNIT = {"centimeter": "cm", "inche": "in", "ft": "feet", "usd": "dollar", "\\$": "dollar"}
WORDS = r"\\text\{ *(?:(?:square|cubic|sq(?= )) *)?([^{}/^ ]*)[^{}]*\}(?:\^\{?\d\}?)?"
AFTER = re.compile(rf"(.*[^(,=+*/^-]){WORDS}|0*([\dA-F]+)_\{{?(\d+)\}}?")
NAME = r"(?s)((?:\\?[A-Za-z][\w\\{}'|: ]*(?:\([^=()]*\))?(?:=|\\in(?![a-z]))(?:[^,=]*=)?)?)(.*)"
TEXT = re.compile(r"\\text\{|(?<![\\a-zA-Z{])[A-Za-z]{4}|dots|\.\.\.|\d:\d\d")
RELATION = re.compile(r"[<>]|\\[lg]e(?![a-z])")
NESTED = [  # what is applied from the inside out
    (r"\^\{([^{}]*)\}", r"^(\1)"),
    (r"\\sqrt *(?:\{([^{}]*)\}|(\d))", r"((\1\2)^(1/2))"),
    (r"\\frac *(?:\{([^{}]*)\}|(\d|π)) *(?:\{([^{}]*)\}|(\d))", r"((\1\2)/(\3\4))"),
]
PYTHON = [  # arithmetic in the syntax of Python, for the sake of its syntax tree only
    (r"\\(pi|infty|cdot|times)(?![a-z]) *", lambda m: {"p": "π", "i": "∞"}.get(m[1][0], "*")),
    *NESTED * 4,
    (r"\\cup|\\\\(?![{}])|&", ","),
    (r"\\begin\{.?matrix\}|(?<!\\end)\\?[{[]", "("),
    (r"\\end\{.?matrix\}|\\?[}\]]", ")"),
    (r"(?<![\d.])0+(?=\d)", ""),
    (r"∞", "ω"),
    (r"(?<=[\w)])(?=[(a-zA-Zπω])", "*"),
    (r"\^", "**"),
]
ARITHMETIC = re.compile(r"(?!.*(?:[fghFGHPQ]\*\(|/[\w.]+\*[^*]))[-+*/(),.\da-zA-Zπω ]+")
OPERATOR = {"Add": operator.add, "Sub": operator.sub, "Mult": operator.mul}
OPERATOR |= {"Div": operator.truediv, "Pow": operator.pow}
CONSTANT = {"e": e, "i": 1j, "π": pi, "ω": inf}
SPELLING, PYTHON = ([(re.compile(p), new) for p, new in table] for table in (SPELLING, PYTHON))
_idle = []  # workers and their pipes; pop and append are atomic, so threads can share it
os.register_at_fork(after_in_child=_idle.clear)
atexit.register(lambda: [(pipe.close(), worker.wait()) for worker, pipe in _idle])


def extract_answer(response: str) -> str | None:
    """The content of the last box, or of the last list of boxes; None without one."""
    tail = response[-50_000:]
    if not (first := re.search(r"\\boxed|\\fbox", tail)):
        return None
    tail = re.sub(r"(\\boxed|\\fbox) *(\d)", r"\1{\2}", tail[first.start() :])
    opened, answers, end = [], [], 0
    for match in BOX.finditer(tail):
        if match[0] != "}":
            opened.append(match)
        elif opened and len((start := opened.pop())[0]) > 1 and end <= start.start():
            if not BETWEEN.fullmatch(tail, end, start.start()):
                answers = []
            answers.append(tail[start.end() : match.start()].strip())
            end = match.end()
    return ", ".join(dict.fromkeys(answers)) if answers else None


@lru_cache(4096)
def spell(answer):
    """An answer in one spelling, its unit or base, and its name: "x=" of x = 5."""
    text, unit = answer, ""
    if not text.isascii():
        text = re.sub("([⁻⁰¹²³⁴-⁹]+)", r"^{\1}", text).translate(SIGN)
        text = re.sub(r"\d", lambda m: str(int(m[0])), unicodedata.normalize("NFKC", text))
    for pattern, new in SPELLING:
        text = pattern.sub(new, text)
    name, text = re.fullmatch(NAME, text).groups()
    while match := AFTER.fullmatch(text):
        text, unit = match[1] or match[3], match[2] or match[4] or ""
    unit = unit.lower().rstrip(".").removesuffix("s")
    return text, UNIT.get(unit, unit), name.replace("\\in", "=")


@lru_cache(4096)
def numbers(text):
    """The numbers in arithmetic or in a list of it; none of them for other text."""
    for pattern, new in PYTHON:
        text = pattern.sub(new, text)
    with suppress(Exception):  # not arithmetic, or too much of it
        if ARITHMETIC.fullmatch(text):
            return values(ast.parse(text.strip(), mode="eval").body)
    return []


def values(tree):
    """The numbers in a syntax tree, exact where they are rational, a variable at one value."""
    match tree:
        case ast.Tuple(items):
            return [number for item in items for number in values(item)]
        case ast.Constant(number):
            return [Fraction(str(number))]
        case ast.Name(name):
            return [CONSTANT.get(name) or Fraction(ord(name) ** 5 % 9973, 7)]
        case ast.UnaryOp(sign, item):
            return [-number if isinstance(sign, ast.USub) else number for number in values(item)]
        case ast.BinOp(left, sort, right):
            (a,), (b,) = values(left), values(right)
            if isinstance(sort, ast.Pow) and size(a) * abs(b) > 10_000:
                raise OverflowError
            value = OPERATOR[type(sort).__name__](a, b)
            cancelled = isinstance(sort, ast.Add | ast.Sub) and abs(value) < 1e-6 * abs(a)
            if size(value) > 10_000 or (cancelled and not size(value)):
                raise OverflowError  # after cancellation a float proves nothing
            return [value]
    raise ValueError


def size(number):
    exact = isinstance(number, Fraction)
    return exact and max(number.numerator.bit_length(), number.denominator.bit_length())


def near(x, y, decimal):
    """Equality, of a decimal to six places, and of what is not exact to nine digits."""
    if x == y or (size(x) and size(y)):
        return x == y or (decimal and abs(x - y) <= min(5e-7, max(abs(x), abs(y)) / 10**5))
    return abs(x - y) <= (1e-6 if decimal else 1e-9) * max(abs(x), abs(y)) < inf


def compare(answer, gold, timeout):
    """Whether two answers are equal, by the rules or else by a worker."""
    both = f"{answer} {gold}"
    if answer == gold or (both.isascii() and answer.isdecimal() and gold.isdecimal()):
        return answer.lstrip("0") == gold.lstrip("0") and gold != ""
    if len(both) > 3000 or BOMB.search(both) or both.count("{") > 80:
        return False
    (a, unit_a, name_a), (b, unit_b, name_b) = spell(answer), spell(gold)
    if not a or not b or (unit_a and unit_b and unit_a != unit_b):
        return False
    tight_answer, tight_gold = (re.sub(r"(?<!\d) +| +(?!\d)", "", text) for text in (answer, gold))
    if name_a + a == name_b + b or tight_answer == tight_gold:
        return True
    if "=" in a + b or (name_a and name_b and name_a != name_b):
        a, b = name_a + a, name_b + b
        return "=" in a and "=" in b and _ask(a, b, timeout)
    if a == b or TEXT.search(f"{a} {b}") or (a.isalpha() and a.lower() == b.lower()):
        a, b = (re.sub(r"\\text|[\s{}.'\"()]", "", text).casefold() for text in (a, b))
        return a == b
    if (unit_a == "percent") != (unit_b == "percent"):
        part = (f"({a})/100", b) if unit_a == "percent" else (a, f"({b})/100")
        return compare(a, b, timeout / 2) or compare(*part, timeout / 2)
    if bool(RELATION.search(a)) != bool(RELATION.search(b)) and not re.search(r"[(\[]", a + b):
        return False
    x, y, decimal = numbers(a), numbers(b), "." in a + b
    with suppress(OverflowError, TypeError):
        # the parts of a union may meet or overlap: [0, 1] and [1, 2] have other numbers than [0, 2]
        union = "cup" in a + b and min(len(x), len(y)) > 1
        if union and a.count("cup") == b.count("cup"):
            x_sorted, y_sorted = (
                sorted(set(v) if "[" in a + b or "]" in a + b else v) for v in (x, y)
            )
            union = x != x_sorted or y != y_sorted
        if x and y and len(x) * len(y) < 10_000 and not union:
            for here, there in (x, y), (y, x):
                if not all(any(near(v, w, decimal) for w in there) for v in here):
                    return False
            if len(x) == len(y) == 1 and (decimal or (size(x[0]) and size(y[0]))):
                return True
    return _ask(a, b, timeout)


def verify(response: str, gold: str) -> bool:
    """Whether the boxed answer of a response is the gold answer."""
    return verify_batch([response], [gold])[0]


def verify_batch(responses: list[str], golds: list[str], timeout: float = 5.0) -> list[bool]:
    """The verdict for each response; an answer that takes more than timeout seconds is wrong."""
    pairs = list(zip(map(extract_answer, responses), map(str.strip, golds), strict=True))
    verdicts = {pair: bool(pair[0]) and compare(*pair, timeout) for pair in dict.fromkeys(pairs)}
    return [verdicts[pair] for pair in pairs]


def _start():
    """A worker that has imported math-verify, and the pipe to it."""
    pipe, theirs = Pipe()
    command, null = [sys.executable, __file__, "--worker"], subprocess.DEVNULL
    files = {"stdin": theirs, "stdout": null, "stderr": null, "start_new_session": True}
    worker = subprocess.Popen(command, **files)
    theirs.close()
    with suppress(EOFError):
        if not pipe.poll(60) or pipe.recv_bytes():
            return worker, pipe
    raise ImportError("verify_math needs math-verify: pip install math-verify")


def _ask(answer, gold, timeout):
    """A worker's verdict; one that does not come in time is False."""
    worker, reply = None, b""
    with suppress(IndexError):
        while not worker or worker.poll() is not None:  # killed from outside
            worker, pipe = _idle.pop()
    if not worker or worker.poll() is not None:
        worker, pipe = _start()
    with suppress(EOFError, OSError):
        try:
            pipe.send((answer, gold, timeout))
            reply = pipe.poll(timeout + 0.8) and pipe.recv_bytes()
        finally:
            if reply:
                _idle.append((worker, pipe))
            else:  # late, dead, or Ctrl-C
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
    return reply == b"True"


def _serve(pipe):
    """The worker: a child for each answer, within limits that the kernel enforces."""
    solve = _solver()
    pipe.send_bytes(b"ready")
    for answer, gold, timeout in iter(pipe.recv, None):
        if not (child := os.fork()):
            resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
            signal.setitimer(signal.ITIMER_REAL, timeout)  # nothing handles it: the kernel kills
            verdict = False
            with suppress(Exception):
                verdict = solve(answer, gold)
            os._exit(not verdict)
        pipe.send_bytes(str(os.waitpid(child, 0)[1] == 0).encode())


def _solver():
    """math-verify as solve(answer, gold), with numerical checks of what it says."""
    import math_verify
    from sympy import I, N, Rational, Symbol
    from sympy.parsing import sympy_parser

    def solve(answer, gold):
        boxes = [f"\\boxed{{{text}}}" for text in (answer, gold)]
        a, b = (math_verify.parse(box, latex, "no_fallback", parsing_timeout=None) for box in boxes)
        with suppress(Exception):  # not numbers
            names = sorted(a[0].free_symbols | b[0].free_symbols, key=str)
            point = {name: Rational((-1) ** k * (3 * k - 7), 11) for k, name in enumerate(names)}
            point |= {name: I for name in names if name.name == "i"}
            x, y = (N(tree[0].subs(point).doit(), 50) for tree in (a, b))
            exact = 1e-6 if "." in answer + gold else 1e-45
            gap = abs(x - y) / (abs(x) + abs(y))
            if not exact < gap < 1e-5:
                return bool(gap <= exact)
        bounds = gold[0] in "(["
        return math_verify.verify(b, a, timeout_seconds=None, allow_set_relation_comp=bounds)

    # sympify reads strings by parse_expr, which would evaluate them as code
    sympy_parser.parse_expr = lambda text, **_: (Symbol if text.isidentifier() else Rational)(text)
    latex = [math_verify.LatexExtractionConfig()]
    for warm in (
        r"(2,\sqrt{3}]\cup\{x^2-1,\frac{\pi}{2}\}",
        "2x-3y+4z+5=0",
        r"\cot x-\sin^2x",
        "1<x",
    ):
        solve(warm, r"\begin{pmatrix}1&2\\3&4\end{pmatrix}")  # what children need not learn
        solve(warm, "4x-7y+8z+3=0")
    return solve


def main():
    """The command line; bad input is one sentence and exit code 2."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", help="JSON lines with the keys response and gold")
    parser.add_argument("--response", help="one response to verify, with --gold")
    parser.add_argument("--gold", help="its gold answer")
    args, pairs = parser.parse_args(), []
    if None not in (args.response, args.gold):
        right = verify(args.response, args.gold)
        return print(f"answer: {extract_answer(args.response)}\nright: {right}")
    if not args.file:
        parser.error("name a file, or give both --response and --gold")
    try:
        with open(args.file, "rb") as file:
            for row in map(json.loads, file.readlines() or [""]):
                pairs.append((row["response"] + "", row["gold"] + ""))
    except OSError as error:
        parser.error(f"{args.file}: {error.strerror}")
    except (ValueError, KeyError, TypeError) as error:
        line = f"{args.file}, line {len(pairs) + 1}"
        parser.error(f"{line}: not a JSON object with the texts response and gold ({error!r})")
    right = sum(verify(*pair) for pair in tqdm(pairs, unit="answer"))
    print(f"accuracy: {right / len(pairs):.4f} ({right} of {len(pairs)})")


if __name__ == "__main__":
    _serve(Connection(0)) if sys.argv[1:] == ["--worker"] else main()
