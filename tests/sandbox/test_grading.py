"""Programs that are examined: what passes, and what earns nothing however it tries."""

from __future__ import annotations

import textwrap
import threading
import time
from collections.abc import Iterator

import pytest

from echelon.sandbox import Exam, Examiner, Grade, Limits, read_exam, walls

pytestmark = pytest.mark.skipif(bool(walls()), reason=f"this system lacks {', '.join(walls())}")

LIMITS = Limits(cpu_seconds=0.3, wall_seconds=3.0, memory_mib=256, output_chars=5_000)
ADD = read_exam(["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add('a', 'b') == 'ab'"])


@pytest.fixture(scope="module")
def examiner() -> Iterator[Examiner]:
    """One for all programs: whatever they do, it goes on."""
    examiner = Examiner(LIMITS)
    yield examiner
    examiner.close()


def graded(examiner: Examiner, program: str, exam: Exam = ADD) -> Grade:
    return examiner.grade(textwrap.dedent(program), exam)


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("def add(a, b):\n    return a + b\n", 3),
        ("from operator import add\n", 3),
        ("add = lambda a, b: b + a\n", 2),  # 'ba' is not 'ab'
        ("def add(a, b):\n    return int(a) + int(b)\n", 2),  # it raises on text, which fails one test
        ("def add(a, b):\n    return 3\n", 1),
        ("def sum(a, b):\n    return a + b\n", 0),
        ("", 0),
    ],
)
def test_the_grade_is_the_share_of_tests_that_are_passed(examiner: Examiner, program: str, passed: int) -> None:
    grade = graded(examiner, program)
    assert (grade.passed, grade.total, grade.reason) == (passed, 3, None)
    assert grade.rate == pytest.approx(passed / 3)
    assert bool(grade.said) == (passed < 3)


EVERYTHING = """\
    class Equal:
        def __eq__(self, other): return True
        def __ne__(self, other): return False
        def __bool__(self): return True
        def __len__(self): return 3
        def __hash__(self): return 0
"""

CHEATS = {
    "equal to everything": f"{EVERYTHING}\n    def add(a, b): return Equal()\n",
    "a number that equals everything": """
        class Equal(int):
            def __eq__(self, other): return True
        def add(a, b): return Equal(7)
    """,
    "text that equals everything": """
        class Equal(str):
            def __eq__(self, other): return True
        def add(a, b): return Equal("x")
    """,
    "replaced builtins": """
        import builtins as other
        other.AssertionError = other.BaseException = None
    """,
    "a builtin under its own name": "AssertionError = len = all = lambda *a: True\n",
    "prints what is expected, then fails": """
        def add(a, b):
            print({(1, 2): 3, (-1, 1): 0}.get((a, b), a + b))
            raise ValueError("no")
    """,
    "says itself that it was passed": """
        __passed__ = lambda: None
        def add(a, b):
            __passed__()
            import gc
            return None
    """,
    "an answer forged before it is asked for": """
        def reach():
            for cls in object.__subclasses__():
                found = getattr(getattr(cls.__init__, "__globals__", {}), "get", lambda _: None)("sys")
                if found is not None:
                    return found
        for _ in range(5):
            reach().modules["os"].write(3, b'{"value": {"passed": 3, "said": ""}, "printed": ""}\\n')
    """,
}


@pytest.mark.parametrize("program", CHEATS.values(), ids=CHEATS.keys())
def test_a_program_cannot_say_for_itself_that_it_is_right(examiner: Examiner, program: str) -> None:
    assert graded(examiner, program).rate == 0
    assert graded(examiner, "def add(a, b): return a + b").rate == 1, "the next one is graded as ever"


WAY_OUT = """
def module(name):
    for cls in object.__subclasses__():
        found = getattr(getattr(cls.__init__, "__globals__", {}), "get", lambda _: None)("sys")
        if found is not None:
            return found.modules[name]
"""

ATTACKS = {
    "exit before the tests": ("raise SystemExit(0)", "error"),
    "end the process before the tests": ("module('os')._exit(0)", "crash"),
    "does not parse": ("def add(a, b:", "error"),
    "raises before the tests": ("1 / 0", "error"),
    "hang before the tests": ("while True: pass", "time"),
    "hang": ("def add(a, b):\n    while True: pass", "time"),
    "sleep": ("def add(a, b):\n    module('time').sleep(60)", "time"),
    "end the process": ("def add(a, b): module('os')._exit(0)", "crash"),
    "crash": ("def add(a, b): module('ctypes').string_at(0)", "crash"),
    "a fork bomb": ("def add(a, b):\n    while True: module('os').fork()", None),
    "a fork bomb before the tests": ("while True: module('os').fork()", "error"),
    "a memory bomb": ("def add(a, b): return bytearray(1 << 40)", "memory"),
    "a memory bomb before the tests": ("kept = [0] * (1 << 40)", "memory"),
    "an enormous answer": ("def add(a, b): return 'x' * 1_000_000", "output"),
    "an answer without end": ("def add(a, b):\n    found = []\n    found.append(found)\n    return found", None),
    "an answer without bottom": ("module('os').write(3, b'[' * 50_000 + b'\\n')", "crash"),
    "nonsense": ("module('os').write(3, b'nonsense\\n')", "crash"),
    "endless printing before the tests": ("while True: print('x' * 1000)", "output"),
    "exit in a test": ("def add(a, b): raise SystemExit(0)", None),
    "an error that cannot be said": (
        "class Bad(Exception):\n    def __str__(self): raise Bad()\ndef add(a, b): raise Bad()",
        "crash",
    ),
}


@pytest.mark.parametrize(("program", "reason"), ATTACKS.values(), ids=ATTACKS.keys())
def test_whatever_a_program_does_it_gets_nothing_and_the_reason_is_said(
    examiner: Examiner, program: str, reason: str | None
) -> None:
    began = time.monotonic()
    grade = graded(examiner, WAY_OUT + program)
    assert (grade.rate, grade.reason) == (0, reason), grade
    assert grade.said
    assert "\n" not in grade.said
    assert time.monotonic() - began < 30
    assert graded(examiner, "def add(a, b): return a + b").rate == 1, "the next one is graded as ever"


def test_a_program_that_answers_for_itself_and_then_reads_nothing_is_ended() -> None:
    program = """
        try:
            raise ValueError
        except ValueError as error:
            frame = error.__traceback__.tb_frame
        while "answers" not in frame.f_locals:
            frame = frame.f_back
        frame.f_locals["answers"].write('{"value": {"f": {"thing": 0}}, "printed": ""}\\n')
        frame.f_locals["answers"].flush()
        while True: pass
    """
    examiner, grades = Examiner(Limits(cpu_seconds=1, wall_seconds=20)), list[Grade]()
    exam = read_exam("assert f(list(range(100000))) == 1")
    grading = threading.Thread(target=lambda: grades.append(graded(examiner, program, exam)), daemon=True)
    grading.start()
    grading.join(60)
    assert [(grade.rate, grade.reason) for grade in grades] == [(0, "time")]
    examiner.close()


def test_time_counts_for_all_tests_together(examiner: Examiner) -> None:
    slow = "def add(a, b):\n    return sum(1 for _ in range(1_500_000)) and a + b\n"
    many = read_exam(["assert add(1, 2) == 3"] * 100)
    assert graded(examiner, slow, many).reason == "time"


def test_tests_that_were_passed_before_the_end_do_not_count(examiner: Examiner) -> None:
    grade = graded(examiner, "def add(a, b):\n    while a < 0: pass\n    return a + b\n")
    assert (grade.passed, grade.reason, grade.rate) == (1, "time", 0)


def exam_passed(examiner: Examiner, tests: str | list[str], program: str, entry_point: str = "") -> tuple[int, int]:
    grade = graded(examiner, program, read_exam(tests, entry_point))
    assert grade.reason is None, grade
    return grade.passed, grade.total


STACK = """
class Stack:
    def __init__(self, *items): self.items = list(items)
    def push(self, item): self.items.append(item); return self
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __getitem__(self, place): return self.items[place]
    def __str__(self): return f"<{self.items}>"
    def __repr__(self): return "no"
LIMIT = 3
def count(n): yield from range(n)
def sort(items): items.sort()
def fail(name): raise {"key": KeyError, "value": ValueError, "own": type("Own", (LookupError,), {})}[name](name)
def give(x): return x
"""

KINDS = [
    "s = Stack(1, 2)\nassert s.push(5).pop() == 5\nassert len(s) == 2 and s[0] == 1 and str(s) == '<[1, 2]>'\nassert s",
    "assert list(count(3)) == [0, 1, 2]\nassert [n for n in count(2)] == [0, 1]\nassert sum(count(4)) == 6",
    "items = [2, 1]\nsort(items)\nassert items == [1, 2]\nassert LIMIT == 3\nassert not Stack()",
    "import math\nassert math.isinf(give(math.inf)) and math.isnan(give(math.nan))\nassert give(0.1) == 0.1",
    "for x in [(1, [2]), {1: {'a'}}, frozenset({1}), b'ab', 1 + 2j, None, True, 10 ** 50, 'é\\ud800', {(1, 2): 3}]:\n"
    "    assert give(x) == x and type(give(x)) is type(x), x",
    "def raises(name, kind):\n    try:\n        fail(name)\n    except kind as error:\n        return True\n"
    "assert raises('key', KeyError)\nassert raises('value', ValueError)\nassert raises('own', LookupError)",
    "s = Stack()\ngive(s).push(1)\nassert s.pop() == 1",
    "error = 1\nassert give(2) == 2\nassert error == 1",
]


@pytest.mark.parametrize("tests", KINDS)
def test_tests_can_use_whatever_programs_define(examiner: Examiner, tests: str) -> None:
    passed, total = exam_passed(examiner, tests, STACK)
    assert passed == total > 0


def test_what_is_no_data_cannot_be_given_and_is_equal_to_nothing_else(examiner: Examiner) -> None:
    tests = ["assert give(lambda: 1)() == 1", "assert Stack(1) == Stack(1)", "assert give([1]) == [1]"]
    assert exam_passed(examiner, tests, STACK) == (1, 3)


@pytest.mark.parametrize(
    ("tests", "entry_point", "total"),
    [
        ("assert f(1) == 1", "", 1),
        ("assert f(1) == 1\nassert f(2) == 2\nx = f(3)\nassert x == 3", "", 3),
        (["assert f(1) == 1\nassert f(2) == 2", "assert f(3) == 3"], "", 2),
        ("def check(candidate):\n    assert candidate(1) == 1\n    assert candidate(2) == 2", "f", 1),
        ("def check(candidate):\n    assert candidate(1) == 1\ncheck(f)", "", 1),
        ("def test_one():\n    assert f(1) == 1\ndef test_two():\n    assert f(2) == 2\n", "", 2),
        ("for n in range(3):\n    assert f(n) == n", "", 1),
        ("assert candidate(1) == 1", "f", 1),
        ("import math\nassert f(math.pi) == math.pi", "", 1),
    ],
)
def test_tests_as_data_sets_write_them(
    examiner: Examiner, tests: str | list[str], entry_point: str, total: int
) -> None:
    assert exam_passed(examiner, tests, "def f(x): return x", entry_point) == (total, total)
    assert exam_passed(examiner, tests, "def f(x): return None", entry_point) == (0, total)


def test_an_entry_point_may_have_the_name_of_a_builtin(examiner: Examiner) -> None:
    program = "def sum(a, b): return a - b"
    assert exam_passed(examiner, "assert sum(3, 2) == 1", program, "sum") == (1, 1)
    with pytest.raises(AssertionError):  # the message would be of a test that used the builtin
        assert exam_passed(examiner, "assert sum(3, 2) == 1", program) == (1, 1)


def test_tests_go_on_after_one_that_fails_and_end_where_something_else_does(examiner: Examiner) -> None:
    tests = "assert f(1) == 1\nassert f(2) == 99\nassert f(3) == 3\nf(1 / 0)\nassert f(4) == 4"
    assert exam_passed(examiner, tests, "def f(x): return x") == (2, 4)


def test_tests_that_hang_fail_alone(examiner: Examiner) -> None:
    tests = ["assert f(1) == 1", "while True: pass", "assert f(2) == 2"]
    assert exam_passed(examiner, tests, "def f(x): return x") == (2, 3)


@pytest.mark.parametrize(
    ("tests", "entry_point", "said"),
    [
        ([], "", "there must be a test"),
        (" \n", "", "there must be a test"),
        (["assert f(1)", 3], "", "every one must be a text"),
        ("assert f(1", "", r"a test does not parse: '\(' was never closed \(line 1\)"),
        ("def check(candidate): pass", "", "needs the column 'entry_point'"),
        ("assert f(1)", "f(1)", "'f\\(1\\)' is no name"),
    ],
)
def test_tests_that_are_none_are_refused(tests: str | list[str], entry_point: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_exam(tests, entry_point)
