"""Runs Python that nobody has vouched for, in a child process with few rights: predicates of task files, code a model
wrote. Knows nothing of tasks or rewards: a function's name and JSON in, JSON out.

On Linux the child has no files (Landlock), no network (namespace), no other processes, no system calls beyond those of
a running interpreter (seccomp), limits on memory, output, processor time and time on the clock, an environment and a
working directory with nothing in them. It does not protect against defects of the kernel or the interpreter, side
channels, or a program that lies about its own result. Where the system lacks a wall (`walls`), what is left
are limits and time-outs: there, run only programs you have read.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

MODULES = (
    "__future__",
    "abc",
    "math",
    "cmath",
    "re",
    "string",
    "json",
    "itertools",
    "functools",
    "collections",
    "operator",
    "statistics",
    "fractions",
    "decimal",
    "random",
    "datetime",
    "heapq",
    "bisect",
    "copy",
    "dataclasses",
    "enum",
    "typing",
    "textwrap",
    "difflib",
    "unicodedata",
)
"""What programs may import: nothing that reaches beyond the process."""

_CHECK_EVERY = 0.02
_STARTUP_SECONDS = 30.0
_END_SECONDS = 5.0
_LEAST_MEMORY = 64 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one call may use."""

    cpu_seconds: float = 1.0
    """Processor time of one call."""
    wall_seconds: float = 10.0
    """Time on the clock of one call: a program that sleeps uses no processor time."""
    memory_mib: int = 512
    """Address space of the child, the interpreter's own 30 MiB included."""
    output_chars: int = 100_000
    """What a call may print, and about half of how long its result may be as JSON."""


Cause: TypeAlias = Literal["raised", "time", "output", "crash"]


class ProgramError(RuntimeError):
    """A program raised, crashed, hung, took too much, or gave no JSON: one line says which, `cause` in a word.

    No `EchelonError`: in an episode it is the episode that fails, not the run.
    """

    def __init__(self, said: str, cause: Cause = "raised") -> None:
        super().__init__(said)
        self.cause: Cause = cause


class Program:
    """Source code in a child process of its own; its functions are called by name.

    The child starts with the first call and lives until `close`; after a crash or a time-out the next call starts
    another. State that a program keeps between calls is its own affair. Calls are safe from several threads.
    """

    def __init__(self, source: str, *, limits: Limits = Limits(), modules: Sequence[str] = MODULES) -> None:
        self.source, self.limits, self.modules = source, limits, tuple(modules)
        self._child: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Program] | None = None
        self._unread = b""
        self._lock = threading.Lock()
        self.missing: tuple[str, ...] = ()

    def call(self, function: str, *arguments: Any, asked: Callable[[Any], Any] | None = None) -> Any:
        """What the function returns for these arguments, all of them JSON. Raises ProgramError.

        With `asked`, the program may call `ask` with JSON and gets what `asked` returns for it; what that raises ends
        the child and passes through.
        """
        with self._lock:
            self.start()
            self._send({"function": function, "arguments": arguments}, self.limits)
            return self._answer(asked)["value"]

    def start(self) -> str:
        """Have the source run, unless it has already; returns what it printed. Raises ProgramError if it fails."""
        if self._child is not None and self._child.poll() is None:
            return ""
        self.close()
        home = tempfile.mkdtemp(prefix="echelon-sandbox-")
        worker = str(Path(__file__).with_name("worker.py"))
        self._child = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-B", worker],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=home,
            env={"PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8"},
            start_new_session=True,
        )
        self._end = weakref.finalize(self, remove_child, self._child, home)
        setup = {
            "source": self.source,
            "modules": self.modules,
            "memory_bytes": max(_LEAST_MEMORY, self.limits.memory_mib << 20),
            "output_chars": self.limits.output_chars,
        }
        patient = Limits(_STARTUP_SECONDS, _STARTUP_SECONDS)  # Python itself starts and imports
        self._send(setup, patient)
        self.missing = tuple(self._receive(patient)["missing"])
        try:
            return str(self._answer()["printed"])
        except ProgramError:
            self.close()
            raise

    def close(self) -> None:
        """End the child; harmless when repeated, and done by itself when the program is no longer used."""
        if self._end is not None:
            self._end()
        self._child, self._end, self._unread = None, None, b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, asked: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        answer = self._receive(self.limits)
        while asked is not None and answer.keys() == {"ask"}:
            try:
                self._send(asked(answer["ask"]), self.limits)
            except BaseException:
                self.close()
                raise
            answer = self._receive(self.limits)
        if "error" in answer:
            raise ProgramError(str(answer["error"]))
        if not {"value", "printed"} <= answer.keys():
            self.close()
            raise ProgramError("it wrote something else than an answer", "crash")
        return answer

    def _send(self, message: Any, limits: Limits) -> None:
        """One line for the child, which must read it within its limits."""
        assert self._child is not None
        assert self._child.stdin is not None
        pipe = self._child.stdin.fileno()
        check = self._watch(limits)
        left = memoryview(json.dumps(message).encode() + b"\n")
        while left:
            check()
            if not select.select([], [pipe], [], _CHECK_EVERY)[1]:
                continue
            try:
                left = left[os.write(pipe, left[: select.PIPE_BUF]) :]  # so much never blocks
            except OSError:
                raise self._gone() from None

    def _receive(self, limits: Limits) -> dict[str, Any]:
        """The next line from the child, as long as it stays within its limits."""
        assert self._child is not None
        assert self._child.stdout is not None
        pipe = self._child.stdout.fileno()
        check = self._watch(limits)
        most = 12 * limits.output_chars + 10_000  # a character is up to six bytes of JSON, result and print-out
        while b"\n" not in self._unread:
            check()
            if not select.select([pipe], [], [], _CHECK_EVERY)[0]:
                continue
            part = os.read(pipe, 1 << 16)
            self._unread += part
            if not part:
                raise self._gone()
            if len(self._unread) > most:
                self.close()
                raise ProgramError("it wrote more than the limit allows", "output")
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            self.close()
            raise ProgramError("it wrote something else than an answer", "crash")
        return answer

    def _watch(self, limits: Limits) -> Callable[[], None]:
        """A check that what follows stays within its time. To be called often: it looks now and then."""
        began, used = time.monotonic(), self.processor_seconds()
        looked = began

        def check() -> None:
            nonlocal looked
            if time.monotonic() - looked >= _CHECK_EVERY:
                self.check_time(began, used, limits)
                looked = time.monotonic()

        return check

    def check_time(self, began: float, used: float, limits: Limits | None = None) -> None:
        """End the child and raise ProgramError if it has taken too long since a time and `processor_seconds`."""
        limits = limits or self.limits
        spent, waited = self.processor_seconds() - used, time.monotonic() - began
        if spent > limits.cpu_seconds:
            self.close()
            raise ProgramError(f"it computed for more than {limits.cpu_seconds:g} s and was ended", "time")
        if waited > limits.wall_seconds:
            self.close()
            raise ProgramError(f"it took more than {limits.wall_seconds:g} s and was ended", "time")

    def processor_seconds(self) -> float:
        """What the child has computed so far; where the system does not say, the time on the clock."""
        assert self._child is not None
        try:
            fields = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return time.monotonic()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _gone(self) -> ProgramError:
        """Why the child is gone, which it is within a moment of the end of its pipe, if it plays no tricks."""
        assert self._child is not None
        try:
            status = self._child.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.close()
            return ProgramError("it closed its pipe and went on", "crash")
        self.close()
        if status < 0:
            return ProgramError(f"it crashed (signal {-status})", "crash")
        return ProgramError(f"it ended the process (status {status})", "crash")


def remove_child(child: subprocess.Popen[bytes], home: str) -> None:
    """The child and its working directory."""
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    shutil.rmtree(home, ignore_errors=True)


def run_code(source: str, *, limits: Limits = Limits(cpu_seconds=5.0), modules: Sequence[str] = MODULES) -> str:
    """Run a whole program once, in a child of its own, and return what it printed. Raises ProgramError."""
    with Program(source, limits=limits, modules=modules) as program:
        return program.start()


def walls() -> tuple[str, ...]:
    """What this system lacks of the sandbox's walls; nothing where all of them stand."""
    with Program("") as program:
        program.start()
        return program.missing
