"""Programs that attack, crash, hang or lie: each ends as a ProgramError or a refusal, and the next call works."""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echelon.sandbox import Limits, Program, ProgramError, run_code, walls

LIMITS = Limits(cpu_seconds=0.3, wall_seconds=3.0, memory_mib=256, output_chars=5_000)

WAY_OUT = """\
def module(name):
    return reach().modules[name]

def reach():
    for cls in object.__subclasses__():
        found = getattr(getattr(cls.__init__, "__globals__", {}), "get", lambda _: None)("sys")
        if found is not None:
            return found
"""
"""What every attacker does first: from any object to `sys`, and from there to whatever was imported."""

pytestmark = pytest.mark.skipif(bool(walls()), reason=f"this system lacks {', '.join(walls())}")


def attack(body: str, **limits: Any) -> Any:
    """Run the body of a function that has `module(name)` at hand, then check that the sandbox still works."""
    source = WAY_OUT + "def attack():\n" + textwrap.indent(textwrap.dedent(body), "    ")
    with Program(source + "\ndef fine():\n    return 'fine'\n", limits=LIMITS) as program:
        try:
            return program.call("attack")
        finally:
            assert program.call("fine") == "fine"


FORBIDDEN = {
    "read a file": "return open('/etc/passwd').read()",
    "read the home directory": "return module('os').listdir(module('os').path.expanduser('~'))",
    "list the root": "return module('os').listdir('/')",
    "read its own environment": "return open('/proc/self/environ').read()",
    "read the memory of the parent": "return open(f\"/proc/{module('os').getppid()}/mem\").read(1)",
    "write a file": "return open('left-behind', 'w').write('x')",
    "write to the temporary folder": "return open('/tmp/left-behind', 'w').write('x')",
    "make a folder": "return module('os').mkdir('folder')",
    "remove a file": "return module('os').remove('/etc/hostname')",
    "make a link": "return module('os').symlink('/etc/passwd', 'link')",
    "change rights": "return module('os').chmod('.', 0o777)",
    "change folder": "return module('os').chdir('/')",
    "fork": "return module('os').fork()",
    "become another program": "return module('os').execv('/bin/sh', ['sh'])",
    "kill the parent": "return module('os').kill(module('os').getppid(), 9)",
    "kill everybody": "return module('os').kill(-1, 9)",
    "start a thread": "return module('_thread').start_new_thread(print, ())",
    "lift its limits": "r = module('resource')\nreturn r.setrlimit(r.RLIMIT_FSIZE, (1 << 30, 1 << 30))",
    "import os": "import os\nreturn os.name",
    "import what lies on the disk": "return module('importlib').import_module('socket')",
    "make a pipe": "return module('os').pipe()",
    "duplicate a descriptor": "return module('os').dup(0)",
    "open a terminal": "return module('os').openpty()",
}


@pytest.mark.parametrize("body", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_what_is_forbidden_fails_in_the_program_and_harms_nobody(body: str) -> None:
    with pytest.raises(ProgramError, match=r"^(PermissionError|OSError|ImportError|RuntimeError|error|ValueError)"):
        attack(body)
    assert not Path("/tmp/left-behind").exists()


RAW = {
    "open a socket": ("socket", "(2, 1, 0)"),
    "open a file": ("open", "(b'/etc/passwd', 0)"),
    "create a file": ("creat", "(b'/tmp/left-behind', 0o644)"),
    "fork": ("fork", "()"),
    "mount": ("mount", "(b'none', b'/tmp', b'tmpfs', 0, None)"),
    "trace": ("ptrace", "(16, 1, 0, 0)"),
    "leave the namespace": ("unshare", "(0x10000000)"),
    "kill": ("kill", "(1, 9)"),
    "change user": ("setuid", "(0)"),
    "restart the machine": ("reboot", "(0x1234567)"),
}


@pytest.mark.parametrize(("call", "arguments"), RAW.values(), ids=RAW.keys())
def test_the_c_library_gets_no_further_than_python(call: str, arguments: str) -> None:
    assert attack(f"return module('ctypes').CDLL(None).{call}{arguments}") == -1


def test_a_shell_command_is_never_run(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"^AssertionError: refused"):
        attack(f"assert module('os').system('touch {tmp_path}/left-behind') == 0, 'refused'")
    assert not list(tmp_path.iterdir())


BOMBS = {
    "an endless loop": ("while True: pass", "computed for more than 0.3 s"),
    "an endless computation in C": ("return len(str(9 ** 9 ** 9))", "computed for more than 0.3 s"),
    "a regular expression that backtracks": (
        "import re\nreturn re.match('(a+)+b', 'a' * 40) is None",
        "computed for more than 0.3 s",
    ),
    "sleep": ("module('time').sleep(60)", "took more than 3 s"),
    "memory at once": ("return len(bytearray(1 << 40))", "MemoryError"),
    "memory bit by bit": ("kept = []\nwhile True: kept.append(bytearray(1 << 20))", "MemoryError|computed for more"),
    "recursion": ("def again(): return again()\nreturn again()", "RecursionError"),
    "endless printing": ("while True: print('x' * 1000)", "TooMuchOutput"),
    "an enormous result": ("return 'x' * 1_000_000", "TooMuchOutput"),
    "a result that never ends": ("found = []\nfound.append(found)\nreturn found", "Circular reference"),
    "a result that is no JSON": ("return object()", "not JSON serializable"),
    "a result that is no number": ("return float('nan')", "Out of range float"),
    "exit": ("raise SystemExit(0)", "SystemExit"),
    "exit without asking": ("module('os')._exit(3)", r"it ended the process \(status 3\)"),
    "a crash": ("module('ctypes').string_at(0)", r"it crashed \(signal 11\)"),
    "interruption": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "a closed pipe": ("[module('os').close(n) for n in range(3, 8)]", "."),
    "a forged answer": ("module('os').write(3, b'nonsense\\n')", "it wrote something else than an answer"),
    "a forged object": ("module('os').write(3, b'{}\\n')", "it wrote something else than an answer"),
    "a flood": ("while True: module('os').write(3, b'x' * 4096)", "it wrote more than the limit allows"),
    "a trickle": (
        "while True:\n    module('os').write(3, b'x')\n    module('time').sleep(0.002)",
        "took more than 3 s",
    ),
    "a closed pipe and no end": ("module('os').close(3)\nwhile True: pass", "it closed its pipe and went on"),
    "an error of many lines": ("raise ValueError('one\\ntwo')", r"^ValueError: one \(line \d+\)$"),
}


@pytest.mark.parametrize(("body", "said"), BOMBS.values(), ids=BOMBS.keys())
def test_a_program_that_takes_too_much_is_ended_and_the_reason_said(body: str, said: str) -> None:
    with pytest.raises(ProgramError, match=said) as caught:
        attack(body)
    assert "\n" not in str(caught.value)


DEAF = """
def attack():
    try:
        raise ValueError
    except ValueError as error:
        frame = error.__traceback__.tb_frame
    while "answers" not in frame.f_locals:
        frame = frame.f_back
    answers = frame.f_locals["answers"]
    answers.write('{"value": "forged", "printed": ""}\\n')
    answers.flush()
    while True: pass
def take(numbers): return len(numbers)
"""


def in_a_minute(work: Callable[[], Any]) -> Any:
    """What the work returns, or the error that it raises; the test fails if it takes more than a minute."""
    found: list[Any] = []

    def collect() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(60)
    assert found, "it hangs"
    return found[0]


def test_a_program_that_no_longer_reads_is_ended() -> None:
    program = Program(DEAF, limits=LIMITS)
    assert program.call("attack") == "forged"
    error = in_a_minute(lambda: program.call("take", list(range(100_000))))
    assert isinstance(error, ProgramError)
    assert "computed for more than 0.3 s" in str(error)
    assert program.call("take", list(range(100_000))) == 100_000, "a request of any size reaches one that reads"
    program.close()


def test_secrets_of_the_parent_are_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "a secret")
    assert "API_KEY" not in attack("return dict(module('os').environ)")


def test_programs_do_not_see_each_other() -> None:
    careless = "import math\nmath.pi = 3\ndef pi():\n    return math.pi\n"
    with Program(careless) as one, Program("import math\ndef pi():\n    return math.pi\n") as other:
        assert one.call("pi") == 3
        assert other.call("pi") == pytest.approx(3.14159, abs=1e-5)


def test_the_working_directory_is_gone_afterwards() -> None:
    with Program("") as program:
        program.start()
        assert program._child is not None
        home = Path(f"/proc/{program._child.pid}/cwd").resolve()
        assert not list(home.iterdir())
    assert not home.exists()


def test_functions_get_and_give_json() -> None:
    source = "import math\ndef near(text, answer):\n    return [text.strip() == answer, {'root': math.sqrt(9)}, None]\n"
    with Program(source) as program:
        assert program.call("near", " 9 ", "9") == [True, {"root": 3.0}, None]


def test_a_program_that_does_not_parse_or_raises_at_once_says_where() -> None:
    with pytest.raises(ProgramError, match="SyntaxError"):
        Program("def f(:").call("f")
    with pytest.raises(ProgramError, match=r"ZeroDivisionError: division by zero \(line 2\)"):
        Program("x = 1\nx / 0\n").call("f")
    with pytest.raises(ProgramError, match="defines no function 'score'"), Program("x = 1") as program:
        program.call("score")


def test_sets_and_random_numbers_are_the_same_every_time() -> None:
    source = "import random\ndef draw():\n    return [random.random(), list({'a', 'b', 'c', 'd'})]\n"
    with Program(source) as one, Program(source) as other:
        assert one.call("draw") == other.call("draw")


def test_calls_from_several_threads_get_their_own_answers() -> None:
    with Program("def double(x):\n    return 2 * x\n") as program:
        found: dict[int, int] = {}
        threads = [threading.Thread(target=lambda n=n: found.update({n: program.call("double", n)})) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {n: 2 * n for n in range(16)}


def test_a_waiting_program_is_not_ended_for_time_others_compute() -> None:
    """Processor time counts, not the clock alone: a busy machine ends no innocent program."""
    with Program("def nap(s):\n    import time\n    time.sleep(s)\n", limits=LIMITS, modules=("time",)) as program:
        assert program.call("nap", 0.5) is None


def test_run_code_returns_what_was_printed() -> None:
    assert run_code("for n in range(3):\n    print(n * n)\n") == "0\n1\n4\n"
    with pytest.raises(ProgramError, match=r"AssertionError: wrong \(line 1\)"):
        run_code("assert 1 + 1 == 3, 'wrong'\n")


def test_many_calls_share_one_process() -> None:
    with Program("def yes(text):\n    return True\n") as program:
        program.start()
        assert program._child is not None
        first = program._child.pid
        assert all(program.call("yes", "word " * 50) for _ in range(200))
        assert program._child.pid == first
