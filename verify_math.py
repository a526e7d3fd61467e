r"""Is the boxed answer of a response right?  The first step that can say so decides.

1. extract  the last box that is not empty; boxes joined by a comma or "and" are a list
2. spell    one spelling for what has several: the tables SIGNS, UNITS and SPELLING
3. split    a list into parts, each matched once, in any order; a tuple in its order
4. names    x = 5 is 5 but not y = 5; every side of x = 2 + 3 = 5 must agree
5. units    5 cm is 5, but neither 5 m nor 5 cm^2; the base of 1010_2 is one, too
6. numbers  exact fractions: 0.5 is 50% is 1/2; a decimal of 1/3 needs six digits
7. words    the same words in the same order, never a product of letters
8. solve    math-verify for the rest, in a worker (this file as a script) that may hang
"""

import argparse
import json
import os
import re
import resource
import signal
import sys
import threading
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from multiprocessing.connection import Connection, Pipe
from subprocess import DEVNULL, PIPE, Popen
from unicodedata import normalize

IS_WORKER = __name__ == "__main__" and sys.argv[1:] == ["--worker"]
START_LIMIT = 180.0  # seconds until a worker is ready, on a machine however busy

# Signs that only stand for others, as sign~others.
SIGNS = r"""
\dfrac~\frac \tfrac~\frac \cfrac~\frac \lt~< \gt~> \leq~\le \leqslant~\le \geq~\ge
\geqslant~\ge \neq~\ne <=~\le >=~\ge !=~\ne **~^ \cdot~* \times~* \equiv~= \approx~=
\langle~( \rangle~) \vert~| \lvert~| \rvert~| \mid~| \colon~: \lor~or \vee~or \land~and
\wedge~and \ldots~... \dots~... \quad~, \qquad~, \varnothing~\emptyset \prime~' ’~' ′~'
%~percent \%~percent \circ~degrees \degree~^degrees °~^degrees ℃~^degreesC \left~ \bf~
\right~ \large~ \Large~ \displaystyle~ \inf~\infty \infinity~\infty ∞~\infty ±~\pm
\mp~\pm ½~\frac12 ⅓~\frac13 ⅔~\frac23 ¼~\frac14 ¾~\frac34 √~\sqrt ∛~\sqrt[3] −~- –~-
⁻~- ÷~/ ⁄~/ ∶~: ×~* ·~* ⋅~* ≤~\le ≥~\ge ⩽~\le ⩾~\ge ≠~\ne ≈~= ≡~= ∪~\cup ∩~\cap
∈~\in ∅~\emptyset ∨~or ∧~and π~\pi θ~\theta ℝ~\mathbb{R} 、~, 。~. 或~,or, 和~,"""
SIGNS = dict(f"{pair} ".split("~") for pair in SIGNS.split())
# Units and their synonyms; the first of a group is what they are compared by.
UNITS = r"""
m meter metre 米|cm centimeter centimetre 厘米|mm millimeter|km kilometer 公里|unit|
in inch inche|ft foot feet|yd yard|mi mile|mi/h mph|km/h kmh|g gram 克|mg milligram|
kg kilogram 公斤|lb pound|oz ounce|s sec second 秒|min minute 分钟|h hr hour 小时|
day 天|week|month|yr year 年 岁|L liter litre 升|mL ml milliliter|gal gallon|degree|
degreesC|degreesF|percent|dollar USD \$|cent ¢|euro €|sterling £|yuan 元 ¥|N newton|
J joule|kJ|W watt|kW|mW|MW|A amp|person people 人|个|rad radian"""
UNITS = {name: line.split()[0] for line in UNITS.split("|") for name in line.split()}
UNIT = "|".join(map(re.escape, sorted(UNITS, key=len, reverse=True)))
MANY = {"dozen": 12, "thousand": 1000, "million": 10**6, "billion": 10**9}
FONT = r"(?:text\w*|[mh]box|math(?:rm|bf|it|sf)|boldsymbol|bm|underline|operatorname)"
TYPED = r"arc\w{3}|sin|cos|tan|cot|log|ln|exp|gcd|sqrt|pi|floor|inf(?:ty|inity)?"
SIGN = r"\\[a-zA-Z]+|[<>!]=|\*\*|\\?%|[^\0-\x7f]"
SPELLING = [  # (pattern, replacement), in this order; each with an example
    (r"([⁻⁰¹²³⁴-⁹ⁿ]+)", r"^{\1}"),  # x⁻² -> x^{-2}
    (r"([₀-₉ₙ]+)", r"_{\1}"),  # x₁ -> x_{1}
    (r"\\!|(?<=\d)(?:\{,\}|\\,)(?=\d{3}(?!\d))|\ufeff", ""),  # 1{,}234 -> 1234
    (r"\\(?:text)?color ?\{\w*\}|\\(?:tag|phantom) ?\{\w*\}", ""),  # 5\tag{1} -> 5
    (r"\\(?:begin|end) ?\{(?:aligned|cases)\}|&(?= *=)|(?<==)&", ""),  # x&=5 -> x=5
    (r"\\\\(?!.*\\end)", ","),  # x=1 \\ x=2 -> x=1,x=2
    (r"(?<!\\)\\[,;:> ()\[\]]|~|\s+|(?<!\\)\$", " "),  # \(5\,x\) -> 5 x
    (rf"\\{FONT}(?![a-zA-Z]) ?(?:\{{([^{{}}]*)\}})?", r" \1 "),  # 5\text{cm} -> 5 cm
    (rf"(?<![\\a-zA-Z])({TYPED})(?![a-zA-Z])", r"\\\1"),  # log(x) -> \log(x)
    (SIGN, lambda sign: SIGNS.get(sign[0]) or normalize("NFKC", sign[0])),  # ≤ -> \le
    (r"^(?:[ ,.:;](?!\d))+|(?:[ ,:;]|(?<!\.)\.{1,2})+$", ""),  # 5. -> 5
    (r"\^ ?(?:\{ ?('|degrees) ?\}|('|degrees))(?: *([CF])\b)?", r" \1\2\3 "),  # 9^\circ
    (r"(?<=[\d)])\((?=-?\d)", "*("),  # 2(3) -> 2*(3)
    (r"(\\(?:sin|cos|tan)) ?\(?([\d.]+) *degrees *\)?", r"\1(\2\\pi/180)"),  # \sin9°
    (r"[bB]matrix", "pmatrix"),  # \end{bmatrix} -> \end{pmatrix}
    (r"\\frac *(\w|\\pi)", r"\\frac{\1}"),  # \frac1{x} -> \frac{1}{x}
    (r"(\\frac *\{[^{}]*\}) *(\w|\\pi)", r"\1{\2}"),  # \frac12 -> \frac{1}{2}
    (r"(\\sqrt(?:\[\d+\])?) *(?:(\w)|\(([^()]*)\))", r"\1{\2\3}"),  # \sqrt2
    (r"(\\sqrt\[[3579]\]\{)-(\d+\})", r"-\1\2"),  # \sqrt[3]{-8} -> -\sqrt[3]{8}
    (r"([_^]) ?(?:(-?\d+|\w)|\(([^()]*)\))", r"\1{\2\3}"),  # 2^10 -> 2^{10}
    # 3 x 10^8 -> 3*10^{8}
    (r"(?<=\d)(?:[eE]\+?(-?\d{1,3})(?![\d.])| ?x ?10\^\{(-?\d+)\})", r"*10^{\1\2}"),
    (r"(\.\d*)\\(?:overline|bar) ?\{(\d+)\}", lambda m: m[1] + 20 * m[2]),  # 0.\bar{3}
    (r"(?<=[\])]) *(?:U|or) *(?=[(\[][^()]*,)", r"\\cup "),  # (1,4) or (5,6)
    (r"(?<![a-zA-Z]),? *(?:or|ou)(?![a-zA-Z]) *,?", ";"),  # 1 or 2 -> 1;2
    (r",? *and *(?=[a-z] ?(?:[<>]|\\[lgn]e))", r"\\land "),  # x>1 and x<4
    (r"(?<![a-zA-Z]),? *and(?![a-zA-Z]) *,?", ","),  # 1, 2 and 3 -> 1,2,3
    (rf"(\\\$|[€£¥]) ?([\d.,]*\d(?: (?:{'|'.join(MANY)}))?)", r"\2 \1"),  # \$5
    # 1,234,567 -> 1234567
    (r"(?<![\w.,([])\d{1,3}([, ]\d{3})+(?![\d,])", lambda m: re.sub("[ ,]", "", m[0])),
    (r"\(?\\?[bp]?mod ?\{?(\w+)\}?\)?", r" mod \1"),  # 3 \pmod{5} -> 3 mod 5
    (r"^ ?[a-zA-Z] ?\\in ?(?=[\\(\[])", ""),  # x\in[1,2] -> [1,2]
    (r"^ ?\\\{(?: ?[a-z][^,<>=]*[|:])?((?:(?!\\\}).)*)\\\} ?$", r"\1"),  # \{1,2\}
    (r"([^,;]*)\\pm ?([^,;]*)", r"\1+\2,\1-\2"),  # 1\pm x -> 1+x,1-x
    (r"(?:square|sq\.?) ([^\W\d_]+)", r"\1^{2}"),  # 5 square feet -> 5 ft^{2}
    (r"cubic ([^\W\d_]+)", r"\1^{3}"),  # 5 cubic feet -> 5 ft^{3}
    (r"(?<=[a-z}]) per (?=[a-z])", "/"),  # 5 miles per hour -> 5 mi/h
    (r"(?<=\d) ?\\frac\{ ?([a-z]+) ?\}\{ ?([a-z]+) ?\}", r" \1/\2"),  # 5\frac{km}{h}
    # 5 centimeters -> 5 cm
    (rf"(?<![^\W\d_]|\\)({UNIT})(?:s|\.)?(?: old)?(?![^\W\d_])", lambda m: UNITS[m[1]]),
    (r" +(?! |[^\W_])|(?<![\w})\]']) +", ""),  # 2 + 3 apples -> 2+3 apples
    (r"^\{([^{}\\]*)\}$", r"\1"),  # {1,2} -> 1,2
    (r"(?<![a-zA-Z\\_])(?<!_\{)i(?![a-zA-Z])", "(I)"),  # 3i -> 3(I)
]
SPELLING = [(re.compile(pattern), new) for pattern, new in SPELLING]
POWERS = rf"(?:{UNIT})(?:\^\{{-?\d\}})?"
POWERS = rf"((?>{POWERS}(?:[/* ]{POWERS})*)|(?<=\d)[A-F]*_\{{\d+\}})"  # or a base
MEASURE = re.compile(rf"(.*?)(?:(?:(?<=[\d}})\]]) ?|(?<=\w) (?=\S\S)){POWERS})?")
DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
FRACTION = re.compile(rf"\\frac\{{(-?{DECIMAL})\}}\{{(-?{DECIMAL})\}}")
NUMBER = rf"([-+]*) ?(?:(\d+) (?=\d+/))?({DECIMAL})(?:[/:]({DECIMAL}))?"
NUMBER = rf"{NUMBER}(?:\*10\^\{{([-+]?\d{{1,3}})\}})?(?: ({'|'.join(MANY)})s?)?"
NAME = r"^(?![^=]*(?:not|\\(?:frac|sqrt|sum|log|sin|cos|tan)))[A-Za-z\\(|][^-=+*/^<>]*="
CHOICE = r"(?:[Oo]ption |[Cc]hoice )?\(?([A-J])(?:[).] ?((?!.*\b[A-J]\b)[^;,]*))?"
WORDS = r"(?<![\\\w])(?![pv]mat)[A-Za-z]{3}|\d \d| (?:\w{2,} |\w -?\d)|[\d)]_"
WORDS += r"|\.\.\.|'|:.*:|[^\0-\x7f]"
BOMB = r"(?s).{1000}|\d{5}[\s)}]*!|![\s)}]*!|(?:\^[\s{(]*\d+[\s)}]*){3}|\^\{?\d{5}"
PLAIN = r"(?:[\w.,+\-*/(){}\[\]=^ ]|\\(?:frac|sqrt|pi|infty))*"
NOT_NAME = r"\\[a-z]+|[^a-df-zA-HJ-Z,]"
BRACE = re.compile(r"\\\\|\\[{}]|((\\(?:boxed|fbox)\s*)?\{)|\}")
BETWEEN = r"(?:[\s$,;.&{}，、或和]|\\[,;:! ()\[\]]|\\q?quad|\\text|\b(?:and|or)\b)*"
_workers = {}  # of each process, since a forked one needs its own: a lock, idle workers


def extract_answer(response: str) -> str | None:
    """The content of the last box, the inner of two, or of the last list of boxes."""
    tail = re.sub(r"(\\(?:boxed|fbox)) *(\d)", r"\1{\2}", response[-20_000:])
    opened, answers, end = [], [], 0
    for brace in BRACE.finditer(tail):
        if brace[1]:
            opened.append(brace)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            content = tail[start.end() : brace.start()].strip()
            if start[2] and start.start() >= end and spell(content[:1000]):
                if not re.fullmatch(BETWEEN, tail[end : start.start()]):
                    answers = []
                answers.append(content)
                end = brace.end()
    return ", ".join(dict.fromkeys(answers)) or None


def gold_answer(text) -> str:
    """The gold answer in a text or number of a data set; a ValueError without one."""
    text = text[0] if isinstance(text, list) and len(text) == 1 else text
    gold = str(text).split("####")[-1].strip()  # GSM8K's mark
    gold = extract_answer(gold) or gold
    if isinstance(text, list | dict | None) or gold.lower() in ("", "nan"):
        raise ValueError(f"a gold answer must be one text or number, not {text!r}")
    return gold


@lru_cache(4096)
def spell(text):
    """The text in one spelling."""
    for pattern, new in SPELLING:
        text = pattern.sub(new, text)
    return text


def judge(answer, gold):
    """The verdict and what decided it, as returned by all functions down to solve."""
    if answer == gold or re.search(BOMB, f"{answer} {gold}"):
        return answer == gold != "", "same text, or too large"
    a, b = spell(answer), spell(gold)
    if a == b or not a or not b:
        return a == b != "", "spelling"

    choices = re.fullmatch(CHOICE, a), re.fullmatch(CHOICE, b)
    if all(choices) and not (choices[0][2] and choices[1][2]):
        return choices[0][1] == choices[1][1], "choice"  # its text may be missing

    parts, golds = (list(dict.fromkeys(split(text, ",;∪"))) for text in (a, b))
    if len(parts) == len(golds) == 1:
        return same(parts[0], golds[0])
    if len(parts) == len(golds):
        for part in parts:
            found = next((gold for gold in golds if same(part, gold)[0]), None)
            if found:
                golds.remove(found)
    return not golds or ("\\cup" in a + b and solve(a, b)[0]), "list"


def split(text, marks):
    """The parts between marks that stand outside brackets."""
    cut, depth = "", 0
    for char in text.replace("\\cup", "∪"):
        depth += (char in "([{") - (char in ")]}")
        cut += "\n" if char in marks and depth <= 0 else char
    return [part.strip() for part in cut.split("\n") if part.strip()]


def same(a, b):
    """Compare two parts: their names, then the values of all sides."""
    sides, golds = split(a, "="), split(b, "=")
    if len(sides) == len(golds) == 2:
        return same_value(sides[1], golds[1]) if sides[0] == golds[0] else solve(a, b)
    sides, golds = (split(re.sub(NAME, "", text), "=") for text in (a, b))
    # False comes before True: every side has to agree.
    return min((same_value(x, y) for x in sides for y in golds), default=(False, ""))


def same_value(a, b):
    """Compare two values: units, numbers, tuples, words, and what is left."""
    (a, unit), (b, gold_unit) = (MEASURE.fullmatch(text).groups() for text in (a, b))
    if unit and gold_unit and unit != gold_unit:
        return False, "units"
    x, y = number(a), number(b)
    if x is not None and y is not None:
        x_part = x / 100 if unit == "percent" else x
        y_part = y / 100 if gold_unit == "percent" else y
        tolerance = min(Fraction(5, 10**7), abs(y) / 10**5) if "." in a + b else 0
        return min(abs(x - y), abs(x_part - y_part)) <= tolerance, "numbers"

    tuples = [re.fullmatch(r"([(\[])(.*,.*)([)\]])", text) for text in (a, b)]
    if all(tuples):
        parts, golds = (split(found[2], ",;") for found in tuples)
        if tuples[0].group(1, 3) != tuples[1].group(1, 3) or len(parts) != len(golds):
            return False, "tuple"
        return min(same(*pair) for pair in zip(parts, golds, strict=True))

    return solve(a, b)


def number(text):
    """The exact value of a number, None for anything else."""
    found = re.fullmatch(NUMBER, FRACTION.sub(r" \1/\2", text).strip())
    if not found or not Fraction(found[4] or 1):
        return None
    signs, whole, top, bottom, power, many = found.groups()
    value = Fraction(top) / Fraction(bottom or 1) + int(whole or 0)
    value *= Fraction(10) ** int(power or 0) * MANY.get(many, 1)
    return -value if signs.count("-") % 2 else value


def solve(answer, gold):
    """Compare words here, and ask math-verify in a worker."""
    a, b = (re.sub(r"(?<!\d) | (?!\d)", "", t) for t in (answer, gold))
    if a == b or re.search(WORDS, f"{answer};{gold}") or (a.isalpha() and b.isalpha()):
        return a.casefold() == b.casefold(), "words"
    if re.fullmatch(PLAIN, answer + gold):
        texts, golds = (re.split(rf"({DECIMAL})", text) for text in (answer, gold))
        changed = sum(float(x) != float(y) for x, y in zip(texts[1::2], golds[1::2]))
        names, gold_names = (set(re.sub(NOT_NAME, "", t)) for t in (answer, gold))
        if names != gold_names or (texts[::2] == golds[::2] and changed == 1):
            return False, "other names, or one other number"
    if not IS_WORKER:
        raise NotImplementedError
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from math_verify import verify as compare
    from sympy import N

    config, verdict = ConversionConfig(False, lowercase_symbols=False), False
    with suppress(Exception):  # what is not mathematics
        x, y = (latex2sympy(t, None, True, False, None, config) for t in (answer, gold))
        with suppress(Exception):  # what has no value
            symbols = sorted(x.free_symbols | y.free_symbols, key=str)
            point = {symbol: i + 3 for i, symbol in enumerate(symbols)}
            gap, size = (abs(N(z.subs(point).doit(), 30)) for z in (x - y, y))
            if gap > size / 10**5:
                return False, "value"
            if "." in answer + gold and not point and gap < min(5e-7, size / 10**5):
                return True, "value"
        verdict = compare(y, x, timeout_seconds=None, allow_set_relation_comp=True)
    return verdict, "solve"


def verify(response: str, gold: str) -> bool:
    """Whether the boxed answer of a response is the gold answer."""
    return verify_batch([response], [gold])[0]


def verify_batch(responses: list, golds: list, timeout: float = 5.0) -> list[bool]:
    """The verdict for each response; wrong where it takes more than timeout seconds."""
    answers = [extract_answer(response) or "" for response in responses]
    golds = [gold_answer(gold) if str(gold).strip() else "" for gold in golds]
    pairs = list(zip(answers, golds, strict=True))
    verdicts = {pair: decide(*pair, timeout)[0] for pair in dict.fromkeys(pairs)}
    return [verdicts[pair] for pair in pairs]


def decide(answer, gold, timeout=5.0):
    """The verdict and what decided it, in this process or else in a worker."""
    with suppress(NotImplementedError):
        return judge(answer, gold)
    return ask(answer, gold, timeout), "solve"


def ask(answer, gold, timeout):
    """A worker's verdict; wrong where it is late or dies of the question."""
    lock, idle = _workers.setdefault(os.getpid(), (threading.Lock(), []))
    with lock:
        process, pipe = idle.pop() if idle else start_worker()
        if process.poll() is not None:  # killed while it was idle
            process, pipe = start_worker()
        verdict = None
        try:
            with suppress(EOFError, OSError):
                pipe.send_bytes(json.dumps([answer, gold, timeout]).encode())
                verdict = pipe.recv_bytes() if pipe.poll(timeout + 0.5) else None
        finally:
            if verdict:
                idle.append((process, pipe))
            else:
                process.kill()
    return verdict == b"right"


def start_worker():
    """A process that is ready for questions, and its pipe; or an error, no verdict."""
    pipe, theirs = Pipe()
    options = {"stdin": theirs, "stdout": DEVNULL, "stderr": PIPE, "process_group": 0}
    process = Popen([sys.executable, __file__, "--worker"], **options)
    theirs.close()
    with suppress(EOFError, OSError):
        if pipe.poll(START_LIMIT) and pipe.recv_bytes():
            return process, pipe
    process.kill()
    reason = process.stderr.read().decode(errors="replace").strip().split("\n")[-1]
    reason = reason or "it was killed or too slow"
    raise RuntimeError(f"verify_math has no worker: {reason}; pip install math-verify")


def serve(pipe):
    """The worker: answer questions until the caller is gone; no text is run as code."""
    from latex2sympy2_extended import latex2sympy2
    from sympy import Rational, Symbol
    from sympy.parsing import sympy_parser as parser

    parser.parse_expr = lambda t, **_: (Symbol if t.isidentifier() else Rational)(t)
    latex2sympy2.latex2sympy = lru_cache(256)(latex2sympy2.latex2sympy)
    judge(r"x<\sqrt8;y=x", r"(-\infty,2\sqrt2);x=y")  # imports what is needed
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))  # bytes
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    pipe.send_bytes(b"ready")
    while True:
        answer, gold, timeout = json.loads(pipe.recv_bytes())
        verdict = False
        signal.setitimer(signal.ITIMER_PROF, timeout + 2)  # kills where Python cannot
        with suppress(Exception, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, timeout)
            verdict = judge(answer, gold)[0]
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send_bytes(b"right" if verdict else b"wrong")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--response", required=True, help="a response, with its box")
    parser.add_argument("--gold", required=True, help="the gold answer or solution")
    parser.add_argument("--explain", action="store_true", help="name what decided")
    args = parser.parse_args()
    try:
        answer, gold = extract_answer(args.response) or "", gold_answer(args.gold)
        verdict, step = decide(answer, gold)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"verify_math.py: {error}") from None
    print(f"right: {verdict}" + f" ({step})" * args.explain)


if __name__ == "__main__":
    serve(Connection(0)) if IS_WORKER else main()
