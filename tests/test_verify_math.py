"""What verify_math promises: right verdicts, no harm to the caller, and speed."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import verify_math
from verify_math import extract_answer, gold_answer, spell, verify, verify_batch

ROOT = Path(verify_math.__file__).parent
DATA = ROOT.parent / "shared" / "data"
SLOW_TEXT = (
    r"\boxed{\int_0^{\infty} e^{-x^{x^x}}\sin(\tan x)\,dx}"  # sympy does not come back
)
FOR_A_WORKER = (r"\boxed{|-3|}", "3")  # which no earlier step decides
WORDINGS = [
    "The answer is $\\boxed{%s}$.",
    "Hence\n\\[ \\boxed {%s.} \\]",
    "So \\fbox{$%s$}",
    "First \\boxed{7}, but that is wrong. **Answer:** $$\\boxed{ %s }$$\n\n",
    "\\boxed{\\boxed{\\displaystyle %s}} in every case.",
]


def read(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


CASES = read(ROOT / "tests" / "verify_cases.jsonl")
HOSTILE = read(
    ROOT / "tests" / "verify_hostile.jsonl"
)  # hedging, units, words, bases, lists, ...


def boxed(answer):
    return f"So the answer is $\\boxed{{{answer}}}$."


def right(answer, gold):
    return verify_batch([boxed(answer)], [gold], 20.0)[0]


def golds(*names):
    if not DATA.is_dir():
        pytest.skip(f"the shared data is not there: {DATA}")
    rows = [row for name in names for row in read(DATA / f"{name}.jsonl")]
    return list(dict.fromkeys(row["answer"] for row in rows))


def python(code, *arguments, path=(), **options):
    """Run code in a fresh process that finds the modules in path, then verify_math."""
    places = [*map(str, path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, **options
    )


def idle_worker():
    """The process of this process's idle worker."""
    _, idle = verify_math._workers[os.getpid()]
    return idle[0][0]


# ---- 1 and 2: right where it matters


def mistakes(cases):
    """The wrong answers accepted, and the right ones refused but not marked known."""
    found = verify_batch(
        [c["response"] for c in cases], [c["gold"] for c in cases], 20.0
    )
    pairs = list(zip(cases, found, strict=True))
    accepted = [case for case, verdict in pairs if verdict and not case["right"]]
    refused = [case for case, verdict in pairs if case["right"] and not verdict]
    return accepted, [case for case in refused if not case.get("known")]


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_of_the_cases_no_wrong_answer_is_accepted_and_no_right_one_refused(step):
    assert mistakes(CASES[::step]) == ([], [])


@pytest.mark.slow
def test_of_the_hostile_cases_no_wrong_answer_is_accepted_and_no_right_one_refused():
    assert mistakes(HOSTILE) == ([], [])


@pytest.mark.parametrize(("cases", "least"), [(CASES, 654), (HOSTILE, 1_000)])
def test_the_known_refusals_are_few(cases, least):
    known = [case for case in cases if case.get("known")]
    assert len(known) <= 25 and all(case["right"] for case in known)
    assert (
        len({(case["response"], case["gold"]) for case in cases}) == len(cases) >= least
    )


@pytest.mark.slow
def test_public_complaints_pay_for_nothing_wrong_and_refuse_little():
    golds()  # skips without the data
    rows = [
        row for row in read(DATA / "verify_trouble.jsonl") if row["right"] is not None
    ]
    accepted, refused = mistakes(rows)
    assert accepted == [] and len(refused) <= 15


def test_million_is_a_number_and_its_point_counts():
    assert right(r"1.5\text{ million}", "1500000")
    assert not right("1.5 million", "15 million")


def test_no_guess_of_several_is_paid():
    for answer in (
        r"x=1 \quad x=2",
        r"x=1 \lor x=2",
        "x=1, x=2",
        r"x=1 \\ x=2",
        "x=1=2",
        "1或2",
    ):
        assert not right(answer, "x=2") and not right(answer, "2")


def test_a_part_is_never_compared_with_a_whole_list():
    assert not right("x=2", r"x=15 \text{ 或 } x=2")
    assert right(r"x=2 \text{ or } x=15", r"x=15 \text{ 或 } x=2")


def test_words_are_no_products_of_letters():
    assert not right("HTH", "HHT") and not right("BAC", "ABC") and not right("on", "no")
    assert right("yes", r"\text{Yes}")


def test_units_are_ignored_on_one_side_and_compared_on_two():
    assert right("60 km/h", "60") and right("60 miles per hour", "60 mph")
    assert not right("60 km/h", "60 km/s") and not right("5 mW", "5 MW")
    assert not right(r"7\text{ cm}^2", r"7\text{ cm}^3") and not right("2 billion", "2")


def test_the_base_of_a_number_is_compared():
    assert right("1010", "1010_2") and not right("1010_2", "1010_3")


def test_the_numbers_that_math_verify_rounds_are_told_apart():
    assert not right(r"1.6\times10^{-19}", r"9.1\times10^{-31}")
    assert not right(r"10^{-19}\sin 1", r"10^{-31}\sin 1")


def test_a_power_goes_through_the_worker_as_a_number():
    assert right("2^{10}", "1024") and not right("2^{10}", "1023")


def test_numbers_in_brackets_are_multiplied():
    assert (
        right("(11)(12)", "132")
        and not right("(11)(12)", "23")
        and not right("3(4)", "7")
    )


def test_no_wrong_list_is_right_because_one_part_cannot_be_read():
    assert right(r"3, A\cap B", r"A\cap B, 3") and not right(
        r"3, A\cap B", r"A\cap C, 3"
    )


def wrong_about_golds(*names):
    answers = golds(*names)
    pairs = [(wording % gold, gold) for gold in answers for wording in WORDINGS]
    for gold in answers:
        spelled = gold.replace("\\frac", "\\dfrac").replace(" ", "  ")
        pairs.append((WORDINGS[0] % spelled, gold))
    verdicts = verify_batch(*map(list, zip(*pairs, strict=True)))
    return [pair for pair, verdict in zip(pairs, verdicts, strict=True) if not verdict]


def test_every_gold_matches_itself():
    assert wrong_about_golds("math500", "amc23", "gsm8k_test", "svamp") == []


@pytest.mark.slow
def test_every_training_gold_matches_itself():
    assert wrong_about_golds("math_train", "gsm8k_train") == []


def test_the_golds_of_neighbours_differ():
    answers = sorted(golds("math500", "amc23", "gsm8k_test"))[::4]
    verdicts = verify_batch([boxed(answer) for answer in answers[1:]], answers[:-1])
    pairs = zip(answers[1:], answers[:-1], verdicts, strict=True)
    assert [pair for *pair, verdict in pairs if verdict] == [["90^\\circ", "90"]]


# ---- 3: cold and crowded


def sleepy_import(folder, seconds):
    """A module latex2sympy2_extended that first sleeps, then becomes the real one."""
    package = folder / "latex2sympy2_extended"
    package.mkdir()
    (package / "__init__.py").write_text(
        f"import sys, time\ntime.sleep({seconds})\nsys.path.remove({str(folder)!r})\n"
        "del sys.modules[__name__]\nimport latex2sympy2_extended\n"
    )
    return [folder]


CROWD = """
import sys
from concurrent.futures import ThreadPoolExecutor
from verify_math import verify
def work(k):
    return verify("\\\\boxed{|-%d|}" % k, str(k))
with ThreadPoolExecutor(16) as pool:
    print(sum(pool.map(work, range(1, 61))))
"""


@pytest.mark.slow
def test_60_right_answers_in_16_threads_are_right():
    assert python(CROWD).stdout == "60\n"


@pytest.mark.slow
def test_a_worker_that_needs_20_seconds_to_start_changes_no_verdict(tmp_path):
    done = python(CROWD, path=sleepy_import(tmp_path, 20))
    assert done.stdout == "60\n", done.stderr


def test_a_worker_that_cannot_start_is_one_clear_error(tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no such thing')\n")
    code = "from verify_math import verify\nverify(r'\\boxed{|-3|}', '3')"
    done = python(code, path=[tmp_path])
    last = done.stderr.strip().split("\n")[-1]
    assert done.returncode == 1 and last.startswith(
        "RuntimeError: verify_math has no worker"
    )
    assert "no such thing" in last and "pip install math-verify" in last


def test_the_number_of_workers_is_bounded():
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda k: right(f"|-{k}|", str(k)), range(1, 25)))
    _, idle = verify_math._workers[os.getpid()]
    assert len(idle) == 1


def absolute(number):
    return right(f"|-{number}|", str(number))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_verdicts_are_right_in_a_pool_of_processes(method):
    assert absolute(2)  # so that a forked process meets a worker that is not its own
    with ProcessPoolExecutor(3, mp_context=get_context(method)) as pool:
        assert list(pool.map(absolute, range(1, 10))) == [True] * 9
    assert absolute(3)


@pytest.mark.slow
def test_verdicts_are_right_in_a_daemonic_process():
    context = get_context("fork")
    results = context.Queue()
    process = context.Process(target=lambda: results.put(absolute(5)), daemon=True)
    process.start()
    assert results.get(timeout=120)
    process.join()


@pytest.mark.slow
def test_a_main_module_without_a_file_or_guard_is_no_obstacle():
    code = "import __main__\ndel __main__.__spec__\nprint('started')\n"
    code += "from verify_math import verify\nprint(verify(r'\\boxed{|-3|}', '3'))"
    done = python(code, "--worker")  # an argument of the caller's, not of the worker
    assert (done.stdout, done.stderr) == ("started\nTrue\n", "")


@pytest.mark.slow
def test_an_alarm_of_the_caller_goes_off_and_spoils_nothing():
    rings = []
    before = signal.signal(signal.SIGALRM, lambda *_: rings.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        assert verify_batch([SLOW_TEXT, FOR_A_WORKER[0]], ["1", "3"], 1.0) == [
            False,
            True,
        ]
    finally:
        signal.signal(signal.SIGALRM, before)
    assert rings == [1]


@pytest.mark.slow
def test_an_alarm_that_raises_ends_the_verification_and_its_worker():
    class Alarm(Exception):
        pass

    def ring(*_):
        raise Alarm

    assert verify(*FOR_A_WORKER)
    worker = idle_worker()
    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Alarm):
            verify_batch([SLOW_TEXT], ["1"], 30.0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert worker.wait(10) == -signal.SIGKILL
    assert verify(*FOR_A_WORKER)


# ---- 4: bombs

NESTED = 100_000
BOMBS = {
    "power tower": r"\boxed{2^{4^{8^{16}}}}",
    "tower in text": "\\boxed{9^9^9^9^9}",
    "tower of letters": "\\boxed{x^{x^{x^{x^{x}}}}}",
    "tower in a function": r"\boxed{\sin(10^{10^{10^{10}}})}",
    "power of a power": r"\boxed{(((7^{99999})^{99999})^{99999})}",
    "power of a power of less": r"\boxed{((7^{9999})^{9999})^{9999}}",
    "factorial": r"\boxed{99999999!}",
    "factorial of a sum": r"\boxed{(9999999+9)!}",
    "factorial of a factorial": r"\boxed{((9!)!)!}",
    "binomial": r"\boxed{\binom{99999999}{4999999}}",
    "million digits": "\\boxed{" + "7" * 1_000_000 + "}",
    "4500 digits": "\\boxed{" + "7" * 4500 + "}",
    "400 digits in a power": "\\boxed{x+2^{" + "7" * 400 + "}}",
    "nested braces": "\\boxed{" + "{" * NESTED + "1" + "}" * NESTED + "}",
    "nested boxes": "\\boxed{" * NESTED + "1" + "}" * NESTED,
    "nested brackets": "\\boxed{" + "(" * 450 + "x" + ")" * 450 + "}",
    "nested fractions": "\\boxed{" + "\\frac{1}{" * 90 + "x" + "}" * 90 + "}",
    "unclosed boxes": "\\boxed{" * 1_000_000,
    "boxes in a row": "\\boxed{1}," * 500_000,
    "ten megabytes": "x" * 10_000_000 + "\\boxed{6}",
    "ten megabytes in a box": "\\boxed{" + "x+" * 5_000_000 + "5}",
    "NUL": "\\boxed{5\0}",
    "surrogate": "\\boxed{\ud800}",
    "blanks": "\\boxed{1}" + " " * 1_000_000 + "\\boxed{2",
    "powers": "\\boxed{" + "x^x" * 330 + "}",
    "equal signs": "\\boxed{" + "x=" * 490 + "y}",
    "separators": "\\boxed{1}" + ", and " * 100_000 + "x\\boxed{2}",
    "list": "\\boxed{" + "x," * 480 + "y}",
    "list of signs": "\\boxed{" + "\\pm x," * 160 + "y}",
    "regex, dollars": "\\boxed{" + "$" * 999 + "}",
    "regex, texts": "\\boxed{" + "\\text{" * 160 + "}",
    "regex, blanks": "\\boxed{1" + " " * 990 + "x}",
    "regex, signs": "\\boxed{" + "\\pm" * 320 + "}",
    "regex, commas": "\\boxed{" + "1,234" * 190 + "}",
    "regex, units": "\\boxed{6" + " km/h" * 190 + "}",
    "regex, units and more": "\\boxed{5" + " km/h" * 190 + "!}",
    "hanging integral": SLOW_TEXT,
    "long sum": r"\boxed{\sum_{k=1}^{10^9} \sin(k!)}",
    "code": '\\boxed{__import__("os").system("kill -9 " + str(os.getppid()))}',
    "code in words": r"\boxed{\operatorname{exec}(\text{import os; os._exit(7)})}",
}


def bomb_is_wrong_in_time(name, gold="5"):
    assert verify(*FOR_A_WORKER)
    start = time.monotonic()
    assert verify_batch([BOMBS[name]], [gold], timeout=1.0) == [False]
    assert time.monotonic() - start < 2.0
    assert verify_batch([FOR_A_WORKER[0], BOMBS[name]], [FOR_A_WORKER[1], "6"], 1.0)[0]


def test_bombs_are_wrong_in_time():
    for name in (
        "power tower",
        "million digits",
        "nested braces",
        "NUL",
        "regex, texts",
    ):
        bomb_is_wrong_in_time(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_every_bomb_is_wrong_in_time(name):
    bomb_is_wrong_in_time(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["power tower", "hanging integral", "power of a power of less"]
)
def test_a_bomb_as_gold_is_wrong_in_time(name):
    assert verify(*FOR_A_WORKER)
    start = time.monotonic()
    assert not verify_batch([boxed("x+5")], [BOMBS[name]], timeout=1.0)[0]
    assert time.monotonic() - start < 2.0


@pytest.mark.slow
def test_bombs_leave_the_memory_of_the_caller_alone():
    code = """
import re, sys
sys.path.insert(0, "tests")
from test_verify_math import BOMBS, verify_batch
verify_batch(list(BOMBS.values()), ["5"] * len(BOMBS), timeout=0.5)
assert not {"sympy", "math_verify", "torch"} & set(sys.modules)
status = open("/proc/self/status").read()
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) // 1024)
"""
    done = python(
        code, cwd=ROOT
    )  # getrusage would count the memory of the process that starts it
    assert int(done.stdout) < 500, done.stderr


def test_a_killed_worker_is_replaced():
    assert verify(*FOR_A_WORKER)
    worker = idle_worker()
    worker.kill()
    worker.wait()
    assert verify(*FOR_A_WORKER)


@pytest.mark.slow
def test_a_worker_killed_at_work_is_wrong_for_its_answer_only():
    assert verify(*FOR_A_WORKER)
    threading.Timer(0.5, idle_worker().kill).start()
    assert verify_batch([SLOW_TEXT, r"\boxed{|-4|}"], ["1", "4"], timeout=3.0) == [
        False,
        True,
    ]


def test_a_late_answer_does_not_make_the_next_one_wait():
    assert verify(*FOR_A_WORKER)
    worker = idle_worker()
    pairs = [(SLOW_TEXT, "1"), FOR_A_WORKER, (SLOW_TEXT, "2")]
    assert verify_batch(*map(list, zip(*pairs, strict=True)), timeout=0.5) == [
        False,
        True,
        False,
    ]
    assert (
        idle_worker() is worker
    )  # which gave up by itself, so that no other had to start


CALLER = """
import os, time, verify_math
verify_math.verify(r"\\boxed{|-3|}", "3")
print(verify_math._workers[os.getpid()][1][0][0].pid, flush=True)
"""


def gone(pid, seconds):
    end = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_no_process_is_left_after_exit():
    assert gone(int(python(CALLER).stdout), 10)


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("end", ["kill", "terminate", "ctrl-c"])
def test_no_process_is_left_when_the_caller_ends_early(busy, end):
    last = (
        f"verify_math.verify_batch([{SLOW_TEXT!r}], ['1'], 3.0)"
        if busy
        else "time.sleep(99)"
    )
    start = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    caller = subprocess.Popen(
        [sys.executable, "-c", start + CALLER + last],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    worker = int(caller.stdout.readline())
    time.sleep(0.5)
    signals = {
        "kill": signal.SIGKILL,
        "terminate": signal.SIGTERM,
        "ctrl-c": signal.SIGINT,
    }
    caller.send_signal(signals[end])
    caller.communicate()
    assert gone(worker, 15)  # within its time limit


@pytest.mark.slow
def test_nothing_in_an_answer_is_evaluated():
    code = r"""
import sys, verify_math
from multiprocessing.connection import Pipe
verify_math.IS_WORKER = True
pairs = [("3", "x+1"), (r"\frac{2.5}{7}", r"\sqrt{2}")]
pairs += [("2x+y=3", "x<3"), (r"\sqrt2", "x")]
pairs += [("f(x)+abc", r"\mathrm{exec}(1)"), ("(1,2)+x", "y"), (r"\gcd(4,6)", "|2|")]
def record(event, args):
    if event in ("compile", "exec"):
        print(event, args)
ours, theirs = Pipe()
ours.send_bytes(b'["1", "1", 1]')
ours.close()
try:
    verify_math.serve(theirs)
except (EOFError, OSError):
    pass
def judge_all():
    for pair in pairs:
        verify_math.judge(*pair)
judge_all()
sys.addaudithook(record)  # after lazy imports
judge_all()
"""
    done = python(code)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


# ---- 5: the gold and the box


def test_the_gold_is_read_from_a_data_set_as_it_is():
    assert gold_answer("She has 6 * 7 = 42.\n#### 42") == "42"
    assert (
        gold_answer(r"Hence $\boxed{3}$, so the area is $\boxed{\frac{x}{2}}$.")
        == r"\frac{x}{2}"
    )
    assert [gold_answer(gold) for gold in (7, 0, 2.5, " x ", ["5"])] == [
        "7",
        "0",
        "2.5",
        "x",
        "5",
    ]
    assert verify(boxed(42), "So it is 42.\n#### 42")


@pytest.mark.parametrize(
    "bad", ["", " ", "####", None, float("nan"), "nan", [], ["1", "2"], {"answer": 1}]
)
def test_a_gold_that_is_none_is_one_sentence(bad):
    with pytest.raises(ValueError, match="a gold answer must be one text or number"):
        gold_answer(bad)


def test_a_bad_gold_is_never_a_zero_reward():
    for bad in (None, float("nan"), ["1", "2"], {"answer": 1}):
        with pytest.raises(ValueError):
            verify_batch([boxed(1)], [bad])


def test_the_last_box_that_is_not_empty_is_the_answer():
    assert (
        extract_answer(
            r"\boxed{4}. No: \boxed{5}. Check: \boxed{} \boxed{\,} \fbox{$$}"
        )
        == "5"
    )
    assert extract_answer(r"\boxed{\boxed{5}") == "5" and extract_answer("5") is None


def test_boxes_in_a_row_are_a_list():
    assert extract_answer(r"$\boxed{1}$, $\boxed{2}$ and $\boxed{3}$.") == "1, 2, 3"
    assert (
        extract_answer(r"\boxed{1} is wrong, \boxed{2}\text{ or }\boxed{3}") == "2, 3"
    )


def test_bad_lengths_are_an_error():
    with pytest.raises(ValueError):
        verify_batch(["\\boxed{1}"], [])


# ---- 6: speed


def test_plain_answers_start_no_process_and_import_no_sympy():
    code = """
import sys, verify_math
verify_math.Popen = None
answers = ["18", "x=18", "18.0", "$18$", "17", "3/4", "\\\\frac34", "1,800", "-2"]
answers += ["18 apples", "18 dollars", "x+2", "y=3", "(1,2)", "red"]
texts = ["\\\\boxed{" + answer + "}" for answer in answers]
texts += ["18", "\\\\boxed{}", "\\\\boxed{18"]
found = verify_math.verify_batch(texts, ["18"] * len(texts))
found += verify_math.verify_batch(["\\\\boxed{\\\\sqrt{3}x+1}"], ["\\\\sqrt{3}x+2"])
print(found.count(True), "sympy" in sys.modules)
"""
    done = python(code)
    assert done.stdout == "5 False\n", done.stderr


def test_duplicate_pairs_are_verified_once(monkeypatch):
    seen = []
    monkeypatch.setattr(
        verify_math, "decide", lambda a, b, _: (bool(seen.append((a, b))), "")
    )
    verify_batch(["\\boxed{1}", "so \\boxed{1}", "\\boxed{2}"] * 9, ["1"] * 27)
    assert seen == [("1", "1"), ("2", "1")]


@pytest.mark.slow
def test_it_works_under_torchrun(tmp_path):
    pytest.importorskip("torch")
    script = tmp_path / "train.py"
    script.write_text(
        "from verify_math import verify_batch\n"
        f"print(verify_batch([r'\\boxed{{|-3|}}', {SLOW_TEXT!r}], ['3', '1'], 2.0))\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, script], env=environment, capture_output=True, text=True
    )
    assert done.stdout.count("[True, False]") == 2, done.stderr


# ---- 7: readable, usable by itself

TABLE = re.search(
    r"(?s)\nSPELLING = \[.*?\n\]\n", Path(verify_math.__file__).read_text()
)[0]
RULES = [line for line in TABLE.splitlines() if line.strip().startswith(("(", "#"))]


def examples():
    """Each rule's place with the example in its comment, or in the line above."""
    place, above = 0, None
    for line in RULES:
        comment = (
            line.split("# ", 1)[-1]
            if "  # " in line or line.strip()[0] == "#"
            else None
        )
        if line.strip()[0] == "#":
            above = comment
        else:
            yield place, comment or above
            place, above = place + 1, None


def test_every_spelling_rule_is_a_line_and_has_an_example_that_it_changes(monkeypatch):
    found = list(examples())
    assert len(found) == len(verify_math.SPELLING)
    for place, example in found:
        assert example, verify_math.SPELLING[place]
        before, _, after = example.partition(" -> ")
        spell.cache_clear()
        spelled = spell(before)
        assert not after or spelled == after, (before, spelled)
        others = verify_math.SPELLING[:place] + verify_math.SPELLING[place + 1 :]
        with monkeypatch.context() as patch:
            patch.setattr(verify_math, "SPELLING", others)
            spell.cache_clear()
            assert spell(before) != spelled, example
    spell.cache_clear()


def test_the_docstring_names_the_steps_in_their_order():
    text = ast.get_docstring(ast.parse(Path(verify_math.__file__).read_text()))
    steps = re.findall(r"(?m)^ *\d\. (\w+)", text)
    assert steps == [
        "extract",
        "spell",
        "split",
        "names",
        "units",
        "numbers",
        "words",
        "solve",
    ]


def command(*arguments):
    script = [sys.executable, ROOT / "verify_math.py", *arguments]
    return subprocess.run(script, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("answer", "gold", "line"),
    [
        ("x=0.5", r"\frac12", "right: True (numbers)"),
        ("60 km/h", "60 km/s", "right: False (units)"),
        ("HTH", "HHT", "right: False (words)"),
        pytest.param(
            r"\sin^2 x", r"1-\cos^2 x", "right: True (solve)", marks=pytest.mark.slow
        ),
    ],
)
def test_the_command_line_says_what_decided(answer, gold, line):
    done = command("--response", boxed(answer), "--gold", gold, "--explain")
    assert (done.stdout, done.stderr) == (line + "\n", "")


def test_the_command_line_is_brief_without_explain():
    done = command("--response", boxed(5), "--gold", "5")
    assert (done.stdout, done.stderr) == ("right: True\n", "")


def test_bad_arguments_are_one_sentence():
    for arguments in (
        [],
        ["--response", "a"],
        ["--gold", "a"],
        ["--response", "a", "--gold", ""],
    ):
        done = command(*arguments)
        assert (
            done.returncode in (1, 2) and "Traceback" not in done.stderr and done.stderr
        )


# ---- Fuzz

PIECES = r"\frac { } ( ) [ ] \sqrt ^ _ 1 23 . , x \pi - + = <"
PIECES += r" \text{ \boxed{ \{ \} \\ & \pm % $ ! \cup"
PIECES = [
    *PIECES.split(),
    " ",
    "\\le",
    "e",
    "i",
    "½",
    "٣",
    "cm",
    "or",
    "and",
    "million",
    "'",
    ":",
]
LATEX = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
FRACTIONS = st.fractions(max_denominator=50).map(str)
NUMBERS = FRACTIONS | st.decimals(-99, 99, places=2).map(str) | st.integers().map(str)
QUICK = settings(max_examples=60, deadline=None)
LONG = settings(max_examples=5_000, deadline=None)


def rules_hold(text, gold):
    answer = extract_answer(text)
    assert answer is None or isinstance(answer, str)
    with suppress(NotImplementedError):  # left to a worker
        assert verify_math.judge(text, gold)[0] in (True, False)
    assert not gold or verify_math.judge(gold, gold)[0]


def values_are_symmetric(a, b):
    one, other = verify(f"\\boxed{{{a}}}", b), verify(f"\\boxed{{{b}}}", a)
    assert one == other


test_fuzz_text = QUICK(given(st.text(), st.text())(rules_hold))
test_fuzz_latex = QUICK(given(LATEX, LATEX)(rules_hold))
test_fuzz_values = QUICK(given(NUMBERS, NUMBERS)(values_are_symmetric))
test_fuzz_text_long = pytest.mark.slow(LONG(given(st.text(), st.text())(rules_hold)))
test_fuzz_latex_long = pytest.mark.slow(LONG(given(LATEX, LATEX)(rules_hold)))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(LATEX, LATEX)
def test_fuzz_the_worker(text, gold):
    if gold.strip():
        assert verify_batch([f"\\boxed{{{text}}}"], [gold], timeout=2.0)[0] in (
            True,
            False,
        )
