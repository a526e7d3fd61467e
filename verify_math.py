r"""Is the boxed answer of a response right?  Rules first, math-verify second, never in the caller.

Answers get one spelling, then values of 1,500 digits, a number in the place of each variable. What
is not arithmetic goes to a worker: this file run as a script, so the caller's main module is not
run again and needs no guard. No box is wrong: the format is part of the task.
"""

import argparse
import atexit
import json
import operator
import os
import re
import resource
import signal
import subprocess
import sys
import time
import unicodedata
import zlib
from contextlib import suppress
from functools import lru_cache
from multiprocessing.connection import Connection, Pipe

import mpmath

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|(?<!(?<!\\)\\)[{}]")
BETWEEN = re.compile(r"(?:[\s$,;.&]|\\[,;:! ()\[\]]|\\q?quad|\\text\s*\{|\}|\b(?:and|or)\b)*")
BOMB = re.compile(r"\d{4}[\s)]*!|![\s)]*!|(?:\^[\s{(]*\d+[\s)]*){3}|\x00|[eE][-+]?\d{4}")
SIGN = "−- –- ⁻- ×* ÷/ ·* ≤\\le_ ≥\\ge_ ∞\\infty_ π\\pi_ √\\sqrt_ ∪\\cup_ 、, 。. "
SIGN += "½\\frac12 ¼\\frac14 ¾\\frac34 °\\degree_"
SIGN = str.maketrans({pair[0]: pair[1:].replace("_", " ") for pair in SIGN.split()})
SYNONYM = {"\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "**": "^"}
SYNONYM |= {"\\leq": "\\le ", "\\leqslant": "\\le ", "\\geq": "\\ge ", "\\geqslant": "\\ge "}
SYNONYM |= {"\\langle": "(", "\\rangle": ")", "\\cdot": "*", "\\times": "*"}
NO_UNIT = "[abc]+|[xyz]+|[pqr]+|[mn]+|is|and|or|of|mod|over|out|times|choose|squared|cubed|"
NO_UNIT += r"hundred|thousand|[mb]illion|dozen|hal\w+|quarters?"
NO_UNIT = rf"(?! *(?:(?:{NO_UNIT})\b|sin|cos|tan|ln|log|exp|arc))"
WORD = r"\\text{\1\2}"
SPELLING = [  # in this order: one spelling for what has several
    (r"\\! *|(?<=\{,)\}|\{(?=,\})", ""),
    (r"(\\\\)|\\(?:left|right|displaystyle|q?quad)(?![a-zA-Z])|\\[,;: ]|~|\s+|(?<!\\)\$", r"\1 "),
    (r"(?:[\s,;:]|(?<!\.)\.{1,2}(?!\.))+$", ""),
    (r"^([-+ ]*)(\\\$|€) *(.+)", r"\1\3\\text{\2}"),
    (r"\^ *\{? *\\circ *\}?|\\degree", r"\\text{degree}"),
    (r"\\?%", r"\\text{percent}"),
    (r"\\(?:text\w*|[mh]box|math(?:rm|bf|it|sf)|operatorname)\*? *\{ *", r"\\text{"),
    (r"\\text\{([^{}a-zA-Z€$]*|[ei]|(?<![\d}]\\text\{)(?<![\d}] \\text\{)[A-Z])\}", r"\1"),
    (r",? *(?:\\text\{,? *(?:and|or),? *\}|(?<=[^a-zA-Z ]) (?:and|or) )|;", ","),
    (r"(\\(?:sin|cos|tan|cot)) *[({]?([\d.]+)\\text\{degree\}[)}]?", r"\1{\\frac{\2\\pi}{180}}"),
    (r"(?<![\\a-zA-Z])(sqrt|pi|infty|sin|cos|tan)(?![a-zA-Z])", r"\\\1"),
    (r"\\[a-zA-Z]+|\*\*", lambda m: SYNONYM.get(m[0], m[0])),
    (r"\\(frac|sqrt) *(\d)", r"\\\1{\2}"),
    (r"\\sqrt *\[\{?([^][{}]+)\}?\]", r"\\root{\1}"),
    (r"\\\\ *(?=\\end)", ""),
    (rf"(?<=\d){NO_UNIT}( [a-zA-Z][^\W\d_]|[^\W\d_]{{3}}|[ck]m|kg|[^\W\d_a-zA-Z])([\w ./]*)", WORD),
    (r"(?<![\d.}^_/])(\d+) *(\\frac *(?:\{\d+\}|\d){2}|(?<= )\d+/\d+$)", r"(\1+\2)"),
    (r"^ *[-+]? *\d{1,3}([, ]\d{3})+(?=\.\d| *(?:$|\\text))", lambda m: re.sub("[, ]", "", m[0])),
    (r"(?<!\w) +| +(?!\w)|(?<=\d) +(?=[a-zA-Z])", ""),
    (r"(?<=\d)[eE]([-+]?\d+)(?=$|\\text)", r"*10^{\1}"),
    (r"^([a-zA-Z])=([^=]*),\1=", r"\1=\2,"),
]
SPELLING = [(re.compile(pattern), new) for pattern, new in SPELLING]
SIDE = r"(?:[-+]*(?:\d+[a-df-hj-z]?|[a-df-hj-z])(?![\da-z]))+"
LINEAR = re.compile(f"{SIDE}={SIDE}")
UNIT = {"centimeter": "cm", "inche": "in", "ft": "feet", "usd": "dollar", "\\$": "dollar"}
WORDS = r"\\text\{ *(?:(?:square|cubic|sq(?= )) *)?([^{}/^ ]*)[^{}]*\}(?:\^\{?\d\}?)?"
AFTER = re.compile(rf"(.*[^(,=+*/^-]){WORDS}|0*([\dA-F]+)_\{{?(\d+)\}}?")
NAME = (
    r"(?!\\(?:sum|prod|lim))\\?[A-Za-z][\w\\{}'|: ]*(?:\([^=()]*\))?(?:=|\\in(?![a-z]))(?:[^,=]*=)?"
)
NAME = re.compile(rf"(?s)((?:{NAME}|\([a-z](?:,[a-z])+\)=)?)(.*)")
TEXT = re.compile(r"\\text\{|(?<![\\a-zA-Z{])[A-Za-z]{4}|dots|\.\.\.|\d:\d\d|[^\0-\x7f]")

mp = mpmath.MPContext()  # of its own, so that the caller's keeps its precision
mp.dps, EPSILON = 1500, mp.mpf(10) ** -1450
TOKEN = r"\\(?:begin|end)\{[pb]matrix\}|\\(?:sin|cos|tan|cot|sec|csc|ln|pi)|\\[a-zA-Z]+|\\."
TOKEN = re.compile(TOKEN + r"|[A-Za-z](?:_\w)?|\d+\.?\d*|\.\d+|\S")
SLOW = re.compile(r"\^|\\(?:sin|cos|tan|cot|sec|csc|ln|root)")
FUNCTION = re.compile(r"(?<![\\a-zA-Z])[fghPQ]\(")  # is no product
VALUE = re.compile(r"[A-Za-z({]|\\(?!cup|end|[\\}])")  # what starts one that is a factor
OPENING = {"(": "(", "[": "[", "{": "(", "\\{": "{"}
OPENING |= {"\\begin{pmatrix}": "|", "\\begin{bmatrix}": "|"}
CLOSING = {")": ")", "]": "]", "}": ")", "\\}": "}", "\\end{pmatrix}": "|", "\\end{bmatrix}": "|"}
OPERATOR = {"+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul)}
OPERATOR |= {"/": (2, operator.truediv), "^": (4, operator.pow)}
ONE = {"\\sqrt": mp.sqrt, "\\sin": mp.sin, "\\cos": mp.cos, "\\tan": mp.tan, "\\ln": mp.ln}
ONE |= {"\\sec": mp.sec, "\\csc": mp.csc, "\\cot": mp.cot}
INVERSE = {"\\sin": mp.asin, "\\cos": mp.acos, "\\tan": mp.atan}
TWO = {"\\frac": operator.truediv}
TWO |= {"\\root": lambda n, x: mp.sign(x) * abs(x) ** (1 / n) if n % 2 == 1 else x ** (1 / n)}
CONSTANT = {"e": +mp.e, "i": mp.j, "\\pi": +mp.pi, "\\infty": mp.inf}

_idle = []  # workers and their pipes; pop and append are atomic, so threads can share it
os.register_at_fork(after_in_child=_idle.clear)
atexit.register(lambda: [(pipe.close(), worker.wait()) for worker, pipe in _idle])


def extract_answer(response: str) -> str | None:
    """The content of the last box, or of the last list of boxes; None without one."""
    tail = re.sub(r"(\\boxed|\\fbox) *(\d)", r"\1{\2}", response[-50_000:])
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
    name, text = NAME.fullmatch(text).groups()
    while match := AFTER.fullmatch(text):
        text, unit = match[1] or match[3], match[2] or match[4] or ""
    unit = unit.lower().rstrip(".").removesuffix("s")
    return text, UNIT.get(unit, unit), name.replace("\\in", "=")


@lru_cache(4096)
def values(text, point="0"):
    """The unordered values in a text, numbers or tuples; None where it is not arithmetic."""
    found = []
    if len(SLOW.findall(text)) > 20 or FUNCTION.search(text):
        return None
    with suppress(Exception):  # not arithmetic, or too much of it
        for plus, minus in ("+-", "-+") if "\\pm" in text or "\\mp" in text else ("+-",):
            signed = TOKEN.findall(text.replace("\\pm", plus).replace("\\mp", minus))
            found += parse(tokens := [point, "\\}", *reversed(signed), "\\{"])
        return found if tokens == [point] else None


def parse(tokens, binding=0):
    """The value of tokens, the next one last, up to an operator that binds no more than binding.

    A number, a list for a set, or a tuple of brackets and numbers for a pair, interval or matrix.
    """
    token = tokens.pop()
    if token in OPENING:
        items, shape = [parse(tokens)], OPENING[token]
        while (end := tokens.pop()) in (",", "\\cup", "&", "\\\\"):
            shape += end
            items.append(parse(tokens))
        value = (shape + CLOSING[end], *items) if items[1:] else items[0]
        if token == "\\{":
            value = [v for item in items for v in (item if isinstance(item, list) else [item])]
    elif token in ("+", "-"):
        value, sign = parse(tokens, 2), mp.mpf(token + "1")
        parts = [sign * item for item in value[1:]] if isinstance(value, tuple) else []
        value = (value[0], *parts) if parts else sign * value
    elif token in ONE:
        power = parse(tokens, 9) if tokens[-1] == "^" and tokens.pop() else 1
        function, power = (INVERSE[token], 1) if power == -1 else (ONE[token], power)
        value = function(parse(tokens, 9 if tokens[-1] in OPENING else 2)) ** power
    elif token in TWO:
        value = TWO[token](parse(tokens, 9), parse(tokens, 9))
    elif token in CONSTANT:
        value = CONSTANT[token]
    else:
        known = mp.mpf(zlib.crc32((tokens[0] + token).encode())) / 2**31 * (-1) ** int(tokens[0])
        value = known if token[0].isalpha() else mp.mpf(token)  # in the place of a variable
    while tokens[-1] in OPERATOR or VALUE.match(tokens[-1]):
        factor = 2 if tokens[-1] in ONE else 3, operator.mul  # as in sin 2x sin x, and in 1/2x
        strength, function = OPERATOR.get(tokens[-1], factor)
        if strength <= binding:
            break
        if tokens[-1] in OPERATOR:
            tokens.pop()
        value = function(value, parse(tokens, strength))
        if 4_600 < mp.mag(value) < mp.inf:  # not exact any more
            raise OverflowError
    return value


def same(x, y, decimal):
    """Equality of values, of a decimal to six places, of lists in any order."""
    match x, y:
        case list(), list():
            return all(any(same(v, w, decimal) for w in b) for a, b in ((x, y), (y, x)) for v in a)
        case tuple(), tuple():
            return len(x) == len(y) and all(same(v, w, decimal) for v, w in zip(x, y))
        case (mp.mpf() | mp.mpc(), mp.mpf() | mp.mpc()) if x != y:
            scale = max(abs(x), abs(y))
            rounding = min(5e-7, scale / 10**5) if decimal else max(scale, 1) * EPSILON
            return abs(x - y) <= rounding < mp.inf
    return x == y


def compare(answer, gold, timeout):
    """Whether two answers are equal, by the rules or else by a worker."""
    both = f"{answer} {gold}"
    if answer == gold or len(both) > 1000 or BOMB.search(both):
        return answer == gold != ""
    if both.isascii() and answer.isdecimal() and gold.isdecimal():
        return int(answer) == int(gold)
    (a, unit_a, name_a), (b, unit_b, name_b) = spell(answer), spell(gold)
    if not a or not b or (unit_a and unit_b and unit_a != unit_b):
        return False
    if re.search(r"=(?![^{]*\})", a + b) or (name_a and name_b and name_a != name_b):
        a, b = name_a + a, name_b + b
        if LINEAR.fullmatch(a) and LINEAR.fullmatch(b):
            # equal where the ratio of left minus right is the same at two points
            sides = [text.replace("=", "-(") + ")" for text in (a, b)]
            (p, q), (r, s) = ([values(side, point)[0] for side in sides] for point in "12")
            return bool(p and q) and same(p * s, q * r, False)
        return a == b or ("=" in a and "=" in b and _ask(a, b, timeout))
    if a == b or TEXT.search(f"{a} {b}") or (a.isalpha() and a.lower() == b.lower()):
        a, b = (re.sub(r"\\text|[\s{}.'\"()]", "", text).casefold() for text in (a, b))
        return a == b
    if (unit_a == "percent") != (unit_b == "percent"):
        part = (f"({a})/100", b) if unit_a == "percent" else (a, f"({b})/100")
        return compare(a, b, timeout / 2) or compare(*part, timeout / 2)
    x, y, decimal = values(a), values(b), "." in a + b
    if len(x or y or "") > 1 and re.search(r"[<>]|\\[lg]e(?![a-z])", a + b):
        return False
    alike = x and y and same(x, y, decimal)
    # equal where variables are positive, but not where they are negative, as √x² and x
    unsure = alike and not same(values(a, "1"), values(b, "1"), decimal)
    union = "cup" in a + b and "," in a and "," in b  # its parts may overlap
    decided = x and y and not unsure and (alike or not union)
    return alike if decided else _ask(a, b, timeout)


def verify(response: str, gold: str) -> bool:
    """Whether the boxed answer of a response is the gold answer."""
    return verify_batch([response], [gold])[0]


def verify_batch(responses: list[str], golds: list[str], timeout: float = 5.0) -> list[bool]:
    """The verdict for each response; an answer that takes more than timeout seconds is wrong."""
    pairs = list(zip(map(extract_answer, responses), map(str.strip, golds), strict=True))
    verdicts = {pair: bool(pair[0]) and compare(*pair, timeout) for pair in dict.fromkeys(pairs)}
    return [verdicts[pair] for pair in pairs]


def _ask(answer, gold, timeout):
    """A worker's verdict; False where it is late or killed."""
    deadline, worker, ready, verdict = time.monotonic() + timeout, None, False, None
    with suppress(IndexError):
        worker, pipe = _idle.pop()
    if not worker or worker.poll() is not None:  # killed from outside
        pipe, theirs = Pipe()
        command, null = [sys.executable, __file__, "--worker"], subprocess.DEVNULL
        files = {"stdin": theirs, "stdout": null, "stderr": null}
        worker = subprocess.Popen(command, **files, start_new_session=True)
        theirs.close()
    try:
        if ready := pipe.poll(timeout) and pipe.recv():
            pipe.send((answer, gold, deadline - time.monotonic()))
            verdict = pipe.recv() if pipe.poll(deadline - time.monotonic() + 0.8) else None
    except (EOFError, OSError):
        if worker.wait() == 1 and not ready:
            raise ImportError("verify_math needs math-verify: pip install math-verify") from None
    finally:
        if ready and verdict is None:  # late, dead, or Ctrl-C
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        else:
            _idle.append((worker, pipe))
    return verdict is True


def _serve(pipe):
    """The worker: a child for each answer, within limits that the kernel enforces."""
    for warm in r"(2,\sqrt{3}]\cup\{x^2-1,\frac{\pi}{2}\}", "2x-3y+4z+5=0", "1<x":
        _solve(warm, "4x-7y+8z+3=0")  # what the children need not learn
        _solve(warm, r"(-\infty,2)\cup(3,9)")
    while True:  # until the caller is gone
        pipe.send("ready")
        answer, gold, timeout = pipe.recv()
        if not (child := os.fork()):
            resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
            with suppress(Exception):
                signal.setitimer(signal.ITIMER_REAL, timeout)  # unhandled: the kernel kills
                os._exit(not _solve(answer, gold))
            os._exit(1)
        pipe.send(os.waitpid(child, 0)[1] == 0)


def _solve(answer, gold):
    """The verdict of math-verify."""
    import math_verify
    from sympy import N, Rational, Symbol
    from sympy.parsing import sympy_parser

    # sympify reads strings by parse_expr, which would evaluate them as code
    sympy_parser.parse_expr = lambda text, **_: (Symbol if text.isidentifier() else Rational)(text)
    latex = [math_verify.LatexExtractionConfig()]
    roots = [re.sub(r"\\root\{([^{}]+)\}", r"\\sqrt[\1]", text) for text in (gold, answer)]
    boxes = [f"\\boxed{{{text}}}" for text in roots]
    parsed = [math_verify.parse(box, latex, "no_fallback", parsing_timeout=None) for box in boxes]
    with suppress(Exception):  # not two numbers: math-verify would round these
        x, y = (N(tree[0].doit(), 30) for tree in parsed)
        if abs(x - y) > abs(x) / 10**5:
            return False
    bounds = gold[0] in "(["
    return math_verify.verify(*parsed, timeout_seconds=None, allow_set_relation_comp=bounds)


def main():
    """The command line; bad input is one sentence and exit code 2."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", help="JSON lines with the keys response and gold")
    parser.add_argument("--response", help="one response to verify, with --gold")
    parser.add_argument("--gold", help="its gold answer")
    args, right, number = parser.parse_args(), 0, 0
    if None not in (args.response, args.gold):
        right = verify(args.response, args.gold)
        return print(f"answer: {extract_answer(args.response)}\nright: {right}")
    if not args.file:
        parser.error("name a file, or give both --response and --gold")
    try:
        with open(args.file, "rb") as file:
            for line in tqdm(file.readlines() or [b""], unit="answer"):
                number += 1
                row = json.loads(line)
                right += verify(row["response"], row["gold"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{args.file}, line {number}: needs the texts response and gold: {error!r}")
    print(f"accuracy: {right / number:.4f} ({right} of {number})")


if __name__ == "__main__":
    _serve(Connection(0)) if sys.argv[1:] == ["--worker"] else main()
