r"""Is the boxed answer of a response right?  Rules first, math-verify second, never in the caller.

The worker for math-verify is this file run as a script, so the caller's main module needs no guard.
No box is wrong: in training the format is part of the task.
"""

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import unicodedata
from contextlib import suppress
from fractions import Fraction
from multiprocessing.connection import Connection, Pipe

BETWEEN = re.compile(r"(?:[\s$,;.&]|\\[,;:! ()\[\]]|\\q?quad|\\text\s*\{|\}|\b(?:and|or)\b)*")
BOMB = re.compile(r"\d{1000}|\d{4}[\s)]*!|![\s)]*!|(?:\^[\s{(]*\d+[\s)]*){3}|\x00|[eE][-+]?\d{4}")
SIGN = "−- –- ×* ÷/ ·* ≤\\le_ ≥\\ge_ ∞\\infty_ π\\pi_ √\\sqrt_ ∪\\cup_ 、, 。. "
SIGN += "²^2 ³^3 ½\\frac12 ¼\\frac14 ¾\\frac34 °\\degree_"
SIGN = str.maketrans({pair[0]: pair[1:].replace("_", " ") for pair in SIGN.split()})
SPELLING = [  # in this order: one spelling for what has several
    (r"(?<![.\\])(?![\s.,;:$]*\.\.\.)[\s.,;:$]+$", ""),
    (r"^([-+ ]*)(\\\$|€|\$(?=[\d. ,]+$)) *(.+)", r"\1\3\\text{\2}"),
    (r"(\\\\)|\\(?:left|right|displaystyle|q?quad)(?![a-zA-Z])|\\[,;:! ]|~|\s+|(?<!\\)\$", r"\1 "),
    (r"\^ *\{? *\\circ *\}?|\\degree", r"\\text{degree}"),
    (r"\\?%", r"\\text{percent}"),
    (r"\\(?:text\w*|[mh]box|math(?:rm|bf|it|sf)|operatorname)\*? *\{ *", r"\\text{"),
    (r"\\text\{([^{}a-zA-Z€$]*|[A-Zei])\}", r"\1"),
    (r"\{,\}|,? *(?:\\text\{,? *(?:and|or),? *\}|(?<=[^a-zA-Z ]) (?:and|or) )|;", ","),
    (r"\\?sqrt *\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\[dtc]?frac *(?:(\d|\\pi)|\{([^{}]*)\}) *(?:(\d)|\{([^{}]*)\})", r"\\frac{\1\2}{\3\4}"),
    (r"(?<=\d)( [a-zA-Z][^\W\d_]|[^\W\d_]{3}|[ck]m|kg|[^\W\d_a-zA-Z])([\w ./]*)", r"\\text{\1\2}"),
    (r"^(-?\d+) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    (r"(?<![a-zA-Z]) +| +(?![a-zA-Z])", ""),
    (r"^([-+]?)\\frac\{(\d+)\}\{(\d+)\}(?=$|\\text)", r"\1\2/\3"),
    (r"^([-+]?\d{1,3}),(\d{3})(?:,(\d{3}))?(\.\d+)?(?=$|\\text)", r"\1\2\3\4"),
    (r"^([a-zA-Z])=([^=]*),\1=", r"\1=\2,"),
    (r"^([-+]?[\d.]+)(?:\*|\\times|\\cdot)10\^(?:\{(-?\d+)\}|(\d+))$", r"\1e\2\3"),
]
UNIT = {"centimeter": "cm", "inche": "in", "ft": "feet", "usd": "dollar", "\\$": "dollar"}
WORDS = r"\\text\{ *(?:(?:square|cubic|sq) )?([^{}/^ ]*)[^{}]*\}(?:\^\{?\d\}?)?"
AFTER = re.compile(rf"(.*[^(,=+*/^-]){WORDS}|0*([\dA-F]+)_\{{?(\d+)\}}?")
NAME = re.compile(r"(?s)((?:\\?[A-Za-z][\w\\{}'|: ]*(?:\([^=()]*\))?=(?:[^,=]*=)?)?)(.*)")
PLAIN = r"[\w +*/,()\[\]{}&-]|(?<=[a-df-hj-z])\^|\\(?:frac|pi|infty|pm|sqrt(?!\[)|begin|end|[\\{}])"
PLAIN = re.compile(f"(?:{PLAIN})*")
_lock, _worker, _pipe = threading.Lock(), None, None
os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock(), _worker=None))


def extract_answer(response: str) -> str | None:
    """The content of the last box, or of the last list of boxes; None without one."""
    tail = re.sub(r"(\\boxed|\\fbox) *(\d)", r"\1{\2}", response[-50_000:])
    opened, answers, end = [], [], 0
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{|(?<!(?<!\\)\\)[{}]", tail):
        if match[0] != "}":
            opened.append(match)
        elif opened and len((start := opened.pop())[0]) > 1 and end <= start.start():
            if not BETWEEN.fullmatch(tail, end, start.start()):
                answers = []
            answers.append(tail[start.end() : match.start()].strip())
            end = match.end()
    return ", ".join(dict.fromkeys(answers)) if answers else None


def spell(answer):
    """An answer in one spelling, its unit or base, and its name: "x=" of x = 5."""
    text, unit = unicodedata.normalize("NFKC", answer.translate(SIGN)), ""
    for pattern, new in SPELLING:
        text = re.sub(pattern, new, text)
    name, text = NAME.fullmatch(text).groups()
    while match := AFTER.fullmatch(text):
        text, unit = match[1] or match[3], match[2] or match[4] or ""
    unit = unit.lower().rstrip(".").removesuffix("s")
    return text, UNIT.get(unit, unit), name


def compare(answer, gold, timeout):
    """Whether two answers are equal, by the rules or else by the worker."""
    both = f"{answer} {gold}"
    if answer == gold or len(both) > 3000 or BOMB.search(both) or both.count("{") > 80:
        return answer == gold != ""
    (a, unit_a, name_a), (b, unit_b, name_b) = spell(answer), spell(gold)
    if not a or not b or (unit_a and unit_b and unit_a != unit_b):
        return False
    if "=" in a + b or (name_a and name_b and name_a != name_b):
        a, b = name_a + a, name_b + b
        return "=" in a and "=" in b and _ask(a, b, timeout)
    with suppress(ValueError, ZeroDivisionError):  # not plain numbers
        x, y = Fraction(a), Fraction(b)
        scale = Fraction(100) ** ((unit_b == "percent") - (unit_a == "percent"))
        rounding = min(Fraction(5, 10**7), abs(y) / 10**5) if "." in a + b else 0
        return min(abs(x - y), abs(x * scale - y)) <= rounding
    if a == b or re.search(r"\\text\{|(?<![\\a-zA-Z{])[A-Za-z]{4}|dots|\.\.\.|\d:\d\d", a + b):
        a, b = (re.sub(r"\\text|[\s{}.'\"()]", "", text).casefold() for text in (a, b))
        return a == b
    match = re.fullmatch(r"(|.*\D)(\d+)(|\D.*)\n\1(\d+)\3", f"{a}\n{b}")
    if match and PLAIN.fullmatch(a) and ("," not in a or a[0] in "(["):  # and so ordered
        return False  # alike but for one number
    return _ask(a, b, timeout)


def verify(response: str, gold: str) -> bool:
    """Whether the boxed answer of a response is the gold answer."""
    return verify_batch([response], [gold])[0]


def verify_batch(responses: list[str], golds: list[str], timeout: float = 5.0) -> list[bool]:
    """The verdict for each response; an answer that takes more than timeout seconds is wrong."""
    pairs = list(zip(map(extract_answer, responses), map(str.strip, golds), strict=True))
    verdicts = {pair: bool(pair[0]) and compare(*pair, timeout) for pair in dict.fromkeys(pairs)}
    return [verdicts[pair] for pair in pairs]


def _ask(answer, gold, timeout):
    """The worker's verdict. A worker that is late or dead is replaced, and its answer wrong."""
    global _worker, _pipe
    reply, patience = b"", timeout + 0.8
    with _lock, suppress(EOFError, OSError):
        try:
            if not _worker or _worker.poll() is not None:
                (_pipe, theirs), patience = Pipe(), timeout + 60  # to import math-verify
                command, null = [sys.executable, __file__, "--worker"], subprocess.DEVNULL
                _worker = subprocess.Popen(command, stdin=theirs, stdout=null, stderr=null)
                theirs.close()
            _pipe.send((answer, gold, timeout))
            reply = _pipe.poll(patience) and _pipe.recv_bytes()
        finally:
            if not reply:
                _worker.kill()
                _worker.wait()
    assert _worker.returncode != 1, "verify_math needs math-verify: pip install math-verify"
    return reply == b"True"


def _serve(pipe):
    """The worker: import math-verify, then answer requests until the caller is gone."""
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
            x, y = (N(tree[0].subs(point).doit(), 30) for tree in (a, b))
            exact = 1e-6 if "." in answer + gold else 1e-25
            gap = abs(x - y) / (abs(x) + abs(y))
            if not exact < gap < 1e-5:
                return bool(gap <= exact)
        bounds = gold[0] in "(["
        return math_verify.verify(b, a, timeout_seconds=None, allow_set_relation_comp=bounds)

    # sympify reads strings by parse_expr, which would evaluate them as code
    sympy_parser.parse_expr = lambda text, **_: (Symbol if text.isidentifier() else Rational)(text)
    latex = [math_verify.LatexExtractionConfig()]
    solve(r"(2,\sqrt{3}]\cup\{x^2-1,\frac{\pi}{2}\}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}")
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    for answer, gold, timeout in iter(pipe.recv, None):
        signal.setitimer(signal.ITIMER_REAL, timeout + 0.5)  # nothing handles it: the kernel kills
        verdict = False
        with suppress(Exception):
            verdict = solve(answer, gold)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send_bytes(str(verdict).encode())


def main():
    """The command line; bad input is one sentence and exit code 2."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", help="JSON lines with the keys response and gold")
    parser.add_argument("--response", help="one response to verify, with --gold")
    parser.add_argument("--gold", help="its gold answer")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds for one answer")
    args, pairs = parser.parse_args(), []
    if None not in (args.response, args.gold):
        verdict = verify(args.response, args.gold)
        print(f"answer: {extract_answer(args.response)}\nright: {verdict}")
        return
    try:
        with open(args.file or "", "rb") as file:
            for row in map(json.loads, file.readlines() or [""]):
                pairs.append((row["response"] + "", row["gold"] + ""))
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"line {len(pairs) + 1} has no texts response and gold: {error!r}")
    right = sum(verify_batch([a], [b], args.timeout)[0] for a, b in tqdm(pairs, unit="answer"))
    print(f"accuracy: {right / max(1, len(pairs)):.4f} ({right} of {len(pairs)})")


if __name__ == "__main__":
    _serve(Connection(0)) if sys.argv[1:] == ["--worker"] else main()
