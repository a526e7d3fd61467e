r"""Is the boxed answer of a response right?  The first step that can say so decides.

  1. extract   the last box that is not empty; boxes joined by a comma, "and", "or" are a list
  2. spell     one spelling for what has several: the table SPELLING, a rule a line
  3. split     a list into parts, each matched once, in any order; a tuple keeps its order
  4. names     x = 5 is 5 but not y = 5; every side of x = 2 + 3 = 5 must agree
  5. units     5 cm is 5, but neither 5 m nor 5 cm^2; the base of 1010_2 is a unit as well
  6. numbers   exact fractions: 0.5 is 50% is 1/2; a decimal of 1/3 needs six digits
  7. words     the same words in the same order, never a product of letters
  8. solve     math-verify for the rest, in a worker that may hang, crash or be killed

No box is wrong: the format is part of the task. The worker is this file run as a script,
so the caller's main module is not imported again; its start-up costs no answer its time.
`python verify_math.py --response TEXT --gold TEXT --explain` names the step that decided.
"""

import argparse
import atexit
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
from functools import lru_cache
from multiprocessing.connection import Connection, Pipe

LONGEST = 1000  # characters of an answer; what is longer is wrong unless it is the gold
START_LIMIT = 180.0  # seconds for a worker to start, on a machine however busy
WORKERS = 2  # in one process of the caller, for all its threads
MEMORY = 2**31  # bytes of a worker

# ---- Spelling: one rule a line, applied in this order, with an example

SYMBOLS = """
½=\\frac12 ⅓=\\frac13 ⅔=\\frac23 ¼=\\frac14 ¾=\\frac34 ⅕=\\frac15 ⅛=\\frac18
−=- –=- —=- ×=* ·=* ⋅=* ∙=* ÷=/ ∕=/ ∶=: ±=\\pm ∓=\\mp √=\\sqrt ∛=\\sqrt[3] ∞=\\infty
≤=\\le ≥=\\ge ⩽=\\le ⩾=\\ge ≠=\\ne ≈=\\approx ≡=\\equiv ∪=\\cup ∩=\\cap ∈=\\in ∅=\\emptyset
∨=\\lor ∧=\\land π=\\pi θ=\\theta α=\\alpha λ=\\lambda ∠=\\angle △=\\triangle °=^\\circ \ufeff= ′=' ’='
ℝ=\\mathbb{R} ℤ=\\mathbb{Z} 、=, 。=. 或=,or, 和=,and, 与=,and, ⟨=\\langle ⟩=\\rangle
"""
SYMBOLS = dict(pair.split("=", 1) for pair in SYMBOLS.split())
SYMBOLS = str.maketrans({sign: f"{text} " for sign, text in SYMBOLS.items()})

SIZE = r"left|right|[bB]igg?[lr]?|displaystyle|textstyle|[lL]arge|LARGE|huge|bf|rm|it"
FONT = r"text\w*|[mh]box|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|operatorname\*?"
WRAPPED = rf"\\(?:{FONT}) ?\{{([^{{}}]*)\}}"
FUNCTION = r"arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|exp|gcd|sqrt|pi"
MAGNITUDE = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
MAGNITUDE |= {"trillion": 10**12, "dozen": 12}
MANY = rf"(?:(?<=\d) (?:{'|'.join(MAGNITUDE)}))?"
AMOUNT = rf"((?:\d[\d.,]*)?\d{MANY})"

SPELLING = [
    (r"\\!|(?<=\d)(?:\{,\}|\\,)(?=\d{3}(?!\d))", ""),  # 1{,}234 -> 1234
    (r"\\\\(?=\s*\\end)", ""),  # the empty last row of a matrix
    (r"\\color ?\{\w*\}|\\(?:tag|phantom) ?\{[^{}]*\}|\\textcolor\{\w*\}", ""),
    (r"\\(?:begin|end) ?\{(?:aligned|cases|array)\}(?:\{\w*\})?|&(?= *=)|(?<==)&", ""),
    (r"\\\\(?!.*\\end)|\\q?quad", ","),  # x=1 \quad x=2 -> x=1,x=2
    (r"\\[,;:> ]|~|\s+|(?<!\\)\$", " "),  # one kind of space
    (WRAPPED, r" \1 "),  # \text{cm} -> cm
    (WRAPPED, r" \1 "),  # \text{\textbf{C}} -> C
    (r" +", " "),
    (
        rf"\\(?:{SIZE}|{FONT})(?![a-zA-Z])",
        "",
    ),  # \left( -> (, \mathbf{\frac12} -> {\frac12}
    (r"\^ ?\{? ?\\circ ?\}? ?([CF])?\b|\\degree|\\circ", r" degrees\1 "),  # 90^\circ
    (r"(\\(?:sin|cos|tan|cot)) ?\(?([\d.]+) degrees ?\)?", r"\1(\2\\pi/180)"),
    (r"years old", "years"),
    (r"\\begin\{bmatrix\}", r"\\begin{pmatrix}"),
    (r"\\end\{bmatrix\}", r"\\end{pmatrix}"),
    (r"\\?%", " percent "),  # 5\% -> 5 percent
    (r"\^? ?\{?\\prime\}?", "'"),  # 15^{\prime} -> 15'
    (r"\\[dtc]frac", r"\\frac"),  # \dfrac -> \frac
    (r"\\dbinom|\\tbinom", r"\\binom"),
    (r"\\frac ?(\w|\\pi)", r"\\frac{\1}"),  # \frac12 -> \frac{1}2
    (r"(\\frac ?\{[^{}]*\}) ?(\w|\\pi)", r"\1{\2}"),  # \frac{1}2 -> \frac{1}{2}
    (r"\{(\w+) ?\\choose ?(\w+)\}", r"\\binom{\1}{\2}"),
    (r"\{(\d+) ?\\over ?(\d+)\}", r"\\frac{\1}{\2}"),  # {1\over 2} -> \frac{1}{2}
    (r"(\\sqrt(?:\[\d+\])?) ?(\w)", r"\1{\2}"),  # \sqrt2 -> \sqrt{2}
    (r"!=|\\not ?=|\\neq?(?![a-z])", r"\\ne "),
    (r"<=|\\leq?(?:slant|q)?(?![a-z])", r"\\le "),
    (r">=|\\geq?(?:slant|q)?(?![a-z])", r"\\ge "),
    (r"\\lt(?![a-z])", "<"),
    (r"\\gt(?![a-z])", ">"),
    (r"\\langle|\\lparen", "("),
    (r"\\rangle|\\rparen", ")"),
    (r"\\[lr]?vert(?![a-z])", "|"),
    (r"\\colon(?![a-z])", ":"),
    (r"\\(?:approx|equiv)(?![a-z])", "="),  # every side has to agree
    (r"\\(?:cdot|times)(?![a-z])|(?<=\d) ?x ?(?=10 ?\^)", "*"),
    (r"\*\*", "^"),
    (r"(?<=\d)[eE]([-+]?\d{1,3})(?![\d.])", r"*10^{\1}"),  # 1e-3 -> 1*10^{-3}
    (r"([_^]) ?(-?\d+|\w)", r"\1{\2}"),  # 2^10 -> 2^{10}
    (r"\^ ?\(([^()]*)\)", r"^{\1}"),  # 2^(1/3) -> 2^{1/3}
    (r"\\(?:ldots|dots|cdots|dotsc)(?![a-z])", "..."),
    (r"(?<=[\])]) ?(?:U|,?or,?) ?(?=[(\[])", r"\\cup "),  # (1,4) or (5,6), as intervals
    (r"(?<![a-zA-Z]),? ?(?:or|ou|\\lor|\\vee)(?![a-zA-Z]) ?,?", ";"),  # 1 or 2 -> 1;2
    (r"(hours?|degrees|feet|minutes) and (?=\d)", r"\1 "),  # 3 hours and 20 minutes
    (r"(?<![a-zA-Z]),? ?(?:and|\\land|\\wedge)(?![a-zA-Z]) ?,?", ","),  # 1 and 2 -> 1,2
    (rf"\\\$ ?{AMOUNT}|{AMOUNT} ?\\\$", r"\1\2 dollars"),  # \$5 -> 5 dollars
    (rf"€ ?{AMOUNT}|{AMOUNT} ?€", r"\1\2 euros"),
    (rf"£ ?{AMOUNT}|{AMOUNT} ?£", r"\1\2 sterling"),
    (
        r"(?<![\w.,([])(\d{1,3})((?:[, ]\d{3})+)(?![\d,])",
        lambda m: re.sub("[, ]", "", m[0]),
    ),
    (rf"(?<![\\a-zA-Z])({FUNCTION}|infty)(?![a-zA-Z])", r"\\\1"),  # sin(x) -> \sin(x)
    (r"(?<![\\a-zA-Z])inf(?:inity)?(?![a-zA-Z])", r"\\infty"),
    (r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\\a-zA-Z])floor\(([^()]*)\)", r"\\lfloor \1\\rfloor"),
    (r"\\[bp]?mod(?![a-z]) ?\{?(\w+)\}?|\(mod (\w+)\)", r" mod \1\2"),
    (r"\\\}\\cup ?\\\{", ","),  # \{1\}\cup\{2\} -> \{1,2\}
    (r"^[a-zA-Z] ?\\in ?(?=[\\(\[])", ""),  # x\in[1,2] -> [1,2]
    (r"^ ?\\\{ ?[a-z] ?(?:\\in ?\\mathbb\{R\})? ?(?:\\mid|[:|])(.*)\\\} ?$", r"\1"),
    (r"^\](?=.*,)", "("),  # ]1,2] -> (1,2]
    (r"(?<=.)\[$", ")"),  # [1,2[ -> [1,2)
    (r"^(?:[ ,.:;](?!\d))+|(?:[ ,:;]|(?<!\.)\.)+$", ""),
    (r" +(?![\w\\])|(?<![\w})\]']) +", ""),  # spaces stay between words
    (r"^\{((?:[^{}]|\{[^{}]*\})*)\}$", r"\1"),  # {\frac12} -> \frac12
    (r"^\(([^(),]*)\)$", r"\1"),  # (C) -> C
]
SPELLING = [(re.compile(pattern), new) for pattern, new in SPELLING]

UNITS = """
m meter metre 米|cm centimeter centimetre 厘米|mm millimeter|km kilometer kilometre 公里 千米
in inch inche|ft foot feet|yd yard|mi mile|mi/h mph|km/h kmh kph|g gram 克|mg milligram
kg kilogram 千克 公斤|lb pound|oz ounce|t ton tonne 吨|s sec second 秒|ms millisecond
min minute 分钟|h hr hour 小时|day 天|week|month|year yr 年 岁|L l liter litre 升|mL ml milliliter
gal gallon|degree|degreesC celsius|degreesF fahrenheit|rad radian|dollar USD|cent|euro
sterling|yuan 元|percent|N newton|J joule|W watt|kW kilowatt|mW milliwatt|MW megawatt|V volt
A amp ampere|Hz hertz|Pa pascal|K kelvin|unit|people person 人|point|个|acre|mol mole
"""
UNITS = [line.split() for line in UNITS.replace("\n", "|").split("|") if line]
UNITS = {word: line[0] for line in UNITS for word in line}
WORD = rf"(?:{'|'.join(sorted(UNITS, key=len, reverse=True))})s?(?![^\W\d_])"
WORD = rf"(?:(?:square|sq\.?|cubic) )?{WORD}(?:\^\{{-?\d\}})?"
UNIT = rf"(.*(?:(?<=[\d}})\]]) ?|(?<=\w) )(?<!\d(?=[a-zA-Z]\b)))({WORD}(?:(?: ?/ ?| per | |\*){WORD})*)"
UNIT = re.compile(UNIT)
BASE = re.compile(r"0*(\d[\dA-F]*)_\{?(\d+)\}?")

DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
NUMBER = rf"([-+]*) ?(?:(\d+) )?({DECIMAL})(?:[/:]({DECIMAL}))?(?:\*10\^\{{([-+]?\d{{1,3}})\}})?"
NUMBER = re.compile(rf"{NUMBER}(?: ({'|'.join(MAGNITUDE)})s?)?")
NAME = re.compile(
    r"(?!.*\\(?:frac|sqrt|sum|int|lim|log|sin|cos|tan))[A-Za-z\\(|][\w\\{}|'(), ]*"
)
CHOICE = re.compile(r"(?:[Oo]ption |[Cc]hoice )?\(?([A-J])(?:[).] ?(.*))?")
WORDS = re.compile(
    r"(?<![\\a-zA-Z\d_])(?![pvb]matrix)[A-Za-z]{3,}|\d \d|\.\.\.|'|:.*:|[^\0-\x7f]|^[A-Za-z]{2,}$"
)
BOMB = re.compile(r"\d{4}[\s)}]*!|![\s)}]*!|(?:\^[\s{(]*\d+[\s)}]*){3}|\d{5}\}")


@lru_cache(4096)
def spell(text):
    """The text in one spelling."""
    text = re.sub("([⁻⁰¹²³⁴-⁹]+)", r"^{\1}", text)
    text = unicodedata.normalize("NFKC", text.translate(SYMBOLS)).translate(SYMBOLS)
    text = re.sub(r"\d", lambda digit: str(int(digit[0])), text)
    for pattern, new in SPELLING:
        text = pattern.sub(new, text)
    return text


# ---- Extraction

BRACE = re.compile(r"\\\\|\\[{}]|\\(?:boxed|fbox)\s*\{|[{}]")
BETWEEN = re.compile(r"(?:[\s$,;.&{}]|\\[,;:! ()\[\]]|\\q?quad|\\text|\band\b|\bor\b)*")


def extract_answer(response: str) -> str | None:
    """The content of the last box, or of the last list of boxes; None without one."""
    tail = re.sub(r"(\\boxed|\\fbox) *(\d)", r"\1{\2}", response[-20_000:])
    opened, answers, end = [], [], 0
    for brace in BRACE.finditer(tail):
        if brace[0].endswith("{") and brace[0] != "\\{":
            opened.append(brace)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            content = tail[start.end() : brace.start()].strip()
            is_box = len(start[0]) > 1 and start.start() >= end
            if is_box and (len(content) > LONGEST or spell(content)):
                if not BETWEEN.fullmatch(tail, end, start.start()):
                    answers = []
                answers.append(content)
                end = brace.end()
    return ", ".join(dict.fromkeys(answers)) or None


def gold_answer(text) -> str:
    """The gold answer in a data set's text; a ValueError where there is none.

    >>> gold_answer("So 6 * 7 = 42.\n#### 42"), gold_answer(r"Hence $\\boxed{x^2}$.")
    ('42', 'x^2')
    """
    if isinstance(text, list) and len(text) == 1:
        text = text[0]
    if isinstance(text, (list, dict)):
        raise ValueError(f"a gold answer must be one text or number, not {text!r}")

    text = str("" if text is None else text).split("####")[-1].strip()
    text = extract_answer(text) or text
    if not text or text.lower() == "nan":
        raise ValueError("a gold answer is empty or not a number: remove its problem")
    return text


# ---- The steps


def split(text, marks=",;"):
    """The parts between marks that stand outside brackets."""
    parts, depth = [""], 0
    for char in text.replace("\\cup", "\0").replace("\\{", "{").replace("\\}", "}"):
        depth += (char in "([{") - (char in ")]}")
        if char in marks and depth <= 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def list_of(text):
    """The parts of a list or set, each once, with a plus-minus as two."""
    if text.startswith("\\{") and text.endswith("\\}") and text.count("\\{") == 1:
        text = text[2:-2]
    parts = []
    for part in split(text, ",;\0"):
        if "\\pm" in part or "\\mp" in part:
            parts.append(re.sub(r"\\pm ?", "+", re.sub(r"\\mp ?", "-", part)))
            part = re.sub(r"\\pm ?", "-", re.sub(r"\\mp ?", "+", part))
        parts.append(part)
    return list(dict.fromkeys(parts))


def judge(answer, gold, solve):
    """Whether two answers are the same, and the step that decided."""
    if answer == gold:
        return bool(answer), "same text"
    if max(len(answer), len(gold)) > LONGEST:
        return False, "too long"
    a, b = spell(answer), spell(gold)
    if not a or not b:
        return False, "empty"
    if a == b:
        return True, "same spelling"

    choices = CHOICE.fullmatch(a), CHOICE.fullmatch(b)
    if all(choices) and not all(choice[2] for choice in choices):
        return choices[0][1] == choices[1][1], "choice"

    relation = re.search(r"[<>]|\\[lg]e ", a + b)
    if relation and ";" in a + b and "," in a + b and (";" in a) != (";" in b):
        return False, "and is not or"
    parts, golds = list_of(a), list_of(b)
    if len(parts) == len(golds) == 1:
        return same(parts[0], golds[0], solve)
    if len(parts) == len(golds) and match(parts, golds, solve):
        return True, "list"
    if "\\cup" in a + b:
        return solve(a, b), "solve"
    return False, "list"


def match(parts, golds, solve):
    """Whether each part is another one of the golds."""
    left = list(golds)
    for part in parts:
        found = next((gold for gold in left if same(part, gold, solve)[0]), None)
        if found is None:
            return False
        left.remove(found)
    return True


def same(a, b, solve):
    """Whether two parts of lists are the same, by their names and then by their values."""
    sides, gold_sides = split(a, "="), split(b, "=")
    if len(sides) == len(gold_sides) == 1:
        return same_value(a, b, solve)
    if len(sides) == len(gold_sides) == 2:
        if sides[0] == gold_sides[0]:
            return same_value(sides[1], gold_sides[1], solve)
        return solve(a, b), "equation"
    if len(sides) == len(gold_sides):
        return all(x == y for x, y in zip(sides, gold_sides, strict=True)), "equation"

    if len(sides) > 1 and NAME.fullmatch(sides[0]):
        sides.pop(0)
    if len(gold_sides) > 1 and NAME.fullmatch(gold_sides[0]):
        gold_sides.pop(0)
    if min(len(sides), len(gold_sides)) > 1:
        return False, "equation"
    for x in sides:
        for y in gold_sides:
            verdict, step = same_value(x, y, solve)
            if not verdict:
                return False, step
    return True, step


def same_value(a, b, solve):
    """Whether two values are the same: units, numbers, tuples, words, and what is left."""
    if a == b:
        return True, "same spelling"
    (a, unit), (b, gold_unit) = value_and_unit(a), value_and_unit(b)
    if unit and gold_unit and unit != gold_unit:
        return False, "units"

    x, y = number(a), number(b)
    if x is not None and y is not None:
        decimal = "." in a + b
        if close(x, y, decimal):
            return True, "numbers"
        x = x / 100 if unit == "percent" != gold_unit else x
        y = y / 100 if gold_unit == "percent" != unit else y
        return close(x, y, decimal), "numbers"

    tuples = [re.fullmatch(r"([(\[])(.*,.*)([)\]])", text) for text in (a, b)]
    if all(tuples):
        parts, golds = split(tuples[0][2]), split(tuples[1][2])
        alike = tuples[0][1] + tuples[0][3] == tuples[1][1] + tuples[1][3]
        if not alike or len(parts) != len(golds):
            return False, "tuple"
        return all(
            same(p, q, solve)[0] for p, q in zip(parts, golds, strict=True)
        ), "tuple"

    if WORDS.search(a) or WORDS.search(b):
        return plain(a) == plain(b), "words"
    return solve(a, b), "solve"


def plain(text):
    """Words without case and spaces, but for those between digits."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text).casefold()


def value_and_unit(text):
    """A value and the name of its unit, if it has one that is known."""
    if found := BASE.fullmatch(text):
        return found[1], f"base {found[2]}"
    if not (found := UNIT.fullmatch(text)):
        return text, None
    unit = re.sub(r"(?:square|sq\.?) ([^\W\d_]+)", r"\1^{2}", found[2])
    unit = re.sub(r"cubic ([^\W\d_]+)", r"\1^{3}", unit)
    unit = re.sub(r" ?(?:/|per) ?", "/", unit)
    unit = re.sub(
        r"[^\W\d_]+", lambda m: UNITS.get(m[0]) or UNITS[m[0].removesuffix("s")], unit
    )
    return found[1].strip(), unit


@lru_cache(4096)
def number(text):
    """The exact value of a number, None for anything else."""
    text = re.sub(rf"\\frac\{{(-?{DECIMAL})\}}\{{(-?{DECIMAL})\}}", r" \1/\2", text)
    text = re.sub(r"^ |(?<=[-+]) ", "", text)
    if not (found := NUMBER.fullmatch(text)):
        return None
    signs, whole, top, bottom, power, magnitude = found.groups()
    value = Fraction(top)
    if bottom:
        if not Fraction(bottom):
            return None
        value /= Fraction(bottom)
    value = (value + int(whole or 0)) * Fraction(10) ** int(power or 0)
    value *= MAGNITUDE.get(magnitude, 1)
    return -value if signs.count("-") % 2 else value


def close(x, y, decimal):
    """Equality, of a decimal and a fraction that has none to six digits."""
    if x == y:
        return True
    endless = any(10**60 % value.denominator for value in (x, y))
    return decimal and endless and abs(x - y) <= min(Fraction(5, 10**7), abs(y) / 10**5)


# ---- The public functions


def verify(response: str, gold: str) -> bool:
    """Whether the boxed answer of a response is the gold answer."""
    return verify_batch([response], [gold])[0]


def verify_batch(responses: list, golds: list, timeout: float = 5.0) -> list[bool]:
    """The verdict for each response; an answer that takes longer than timeout is wrong."""
    answers = [extract_answer(response) or "" for response in responses]
    golds = [gold_answer(gold) if gold or gold == 0 else "" for gold in golds]
    verdicts = {}
    for pair in zip(answers, golds, strict=True):
        if pair not in verdicts:
            verdicts[pair] = explain(*pair, timeout)[0]
    return [verdicts[pair] for pair in zip(answers, golds, strict=True)]


class Undecided(Exception):
    """The caller's steps do not decide: a worker has to."""


def undecided(answer, gold):
    raise Undecided


def explain(answer, gold, timeout=5.0):
    """The verdict on an answer, and the step that decided."""
    try:
        return judge(answer, gold, undecided)
    except Undecided:
        if BOMB.search(answer) or BOMB.search(gold):
            return False, "too large to compute"
        return ask(answer, gold, timeout), "solve"


# ---- The worker

_idle = []  # workers that wait for a question
_slots = threading.BoundedSemaphore(WORKERS)


def forget_workers():
    """A forked process starts its own workers: those of its parent would mix the answers."""
    global _slots
    _idle.clear()
    _slots = threading.BoundedSemaphore(WORKERS)


os.register_at_fork(after_in_child=forget_workers)
atexit.register(lambda: [process.kill() for process, _ in _idle])


def start_worker():
    """A process and a pipe to it."""
    pipe, theirs = Pipe()
    command = [sys.executable, __file__, "--worker"]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    theirs.close()
    return process, pipe


def wait_until_ready(process, pipe):
    """Read the worker's "ready"; a worker that cannot start is an error, never a verdict."""
    with suppress(EOFError, ConnectionError):
        if pipe.poll(START_LIMIT):
            return pipe.recv_bytes()
    process.kill()
    reason = (process.stderr.read().decode(errors="replace").split("\n")[-2:] or [""])[
        0
    ]
    raise RuntimeError(
        f"verify_math cannot start its worker ({reason or 'no reason given'}): "
        "pip install math-verify, or wait until the machine is less busy"
    )


def ask(answer, gold, timeout):
    """A worker's verdict; False where it is late or dies of the question."""
    with _slots:
        process, pipe = _idle.pop() if _idle else start_worker()
        if process.poll() is not None:  # killed while it waited
            process, pipe = start_worker()
        healthy = False
        try:
            wait_until_ready(process, pipe)
            with suppress(EOFError, ConnectionError):
                pipe.send_bytes(json.dumps([answer, gold, timeout]).encode())
                if pipe.poll(timeout + 0.5):
                    verdict = pipe.recv_bytes() == b"right"
                    healthy = True
                    return verdict
            return False
        finally:
            if healthy:
                _idle.append((process, pipe))
            else:
                process.kill()
                process.wait()


def serve(pipe):
    """Answer questions until the caller is gone."""
    solve = solver()
    for answer, gold in [
        (r"\sqrt{8}", r"2\sqrt{2}"),
        ("x<3", r"(-\infty,3)"),
        ("2x=y", "y=2x"),
    ]:
        judge(
            answer, gold, solve
        )  # what is imported late must not cost an answer its time
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGALRM, signal.default_int_handler)

    while True:
        pipe.send_bytes(b"ready")
        answer, gold, timeout = json.loads(pipe.recv_bytes())
        verdict = False
        with suppress(Exception, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, timeout)
            verdict = judge(answer, gold, solve)[0]
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send_bytes(b"right" if verdict else b"wrong")


def solver():
    """A function that compares two LaTeX texts with math-verify."""
    import math_verify
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy.parsing import sympy_parser

    def number_or_symbol(text, **_):
        return sympy.Symbol(text) if text.isidentifier() else sympy.Rational(text)

    # sympify would evaluate a text as code
    sympy_parser.parse_expr = number_or_symbol
    config = ConversionConfig(lowercase_symbols=False)

    @lru_cache(256)
    def parse(text):
        text = re.sub(r"(?<![a-zA-Z\\_])(?<!_\{)i(?![a-zA-Z])", "(I)", text)
        return latex2sympy(
            text,
            is_real=True,
            convert_degrees=True,
            normalization_config=None,
            conversion_config=config,
        )

    def solve(answer, gold):
        try:
            x, y = parse(answer), parse(gold)
        except Exception:  # not mathematics
            return False
        with suppress(Exception):  # not two numbers
            difference = abs(sympy.N(x.doit(), 30) - sympy.N(y.doit(), 30))
            if difference > abs(sympy.N(y.doit(), 30)) / 10**5:
                return False
        return math_verify.verify(
            y, x, timeout_seconds=None, allow_set_relation_comp=True
        )

    return solve


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--response", required=True, help="a response, with its box")
    parser.add_argument("--gold", required=True, help="the gold answer, or a solution")
    parser.add_argument(
        "--explain", action="store_true", help="name the step that decided"
    )
    args = parser.parse_args()
    try:
        answer, gold = extract_answer(args.response) or "", gold_answer(args.gold)
        verdict, step = explain(answer, gold)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"verify_math.py: {error}") from None
    print(f"answer: {answer or None}\nright: {verdict}")
    if args.explain:
        print(f"spelled: {spell(answer)}\ngold: {spell(gold)}\nstep: {step}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        serve(Connection(0))
    else:
        main()
