"""The child process of the sandbox: gives up every right it does not need, then answers calls until its pipe closes.

A script of its own that knows nothing of echelon and imports the standard library only. Each request and each answer is
one line of JSON. `lock_down` returns what the platform did not offer; the parent decides whether that is enough.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import importlib
import io
import json
import os
import platform
import random
import resource
import sys
import traceback
from typing import Any

# Numbers of the system calls that a running interpreter needs once everything is imported and every file is open.
ALLOWED_CALLS = {
    "x86_64": {
        "read": 0,
        "write": 1,
        "close": 3,
        "fstat": 5,
        "poll": 7,
        "lseek": 8,
        "mmap": 9,
        "mprotect": 10,
        "munmap": 11,
        "brk": 12,
        "rt_sigaction": 13,
        "rt_sigprocmask": 14,
        "rt_sigreturn": 15,
        "sched_yield": 24,
        "mremap": 25,
        "madvise": 28,
        "nanosleep": 35,
        "getpid": 39,
        "exit": 60,
        "gettimeofday": 96,
        "getrusage": 98,
        "times": 100,
        "sigaltstack": 131,
        "gettid": 186,
        "futex": 202,
        "clock_gettime": 228,
        "clock_getres": 229,
        "clock_nanosleep": 230,
        "exit_group": 231,
        "newfstatat": 262,
        "getrandom": 318,
        "rseq": 334,
    },
    "aarch64": {
        "lseek": 62,
        "read": 63,
        "write": 64,
        "close": 57,
        "newfstatat": 79,
        "fstat": 80,
        "ppoll": 73,
        "exit": 93,
        "exit_group": 94,
        "futex": 98,
        "nanosleep": 101,
        "clock_gettime": 113,
        "clock_getres": 114,
        "clock_nanosleep": 115,
        "sched_yield": 124,
        "sigaltstack": 132,
        "rt_sigaction": 134,
        "rt_sigprocmask": 135,
        "rt_sigreturn": 139,
        "times": 153,
        "getrusage": 165,
        "gettimeofday": 169,
        "getpid": 172,
        "gettid": 178,
        "brk": 214,
        "munmap": 215,
        "mremap": 216,
        "mmap": 222,
        "mprotect": 226,
        "madvise": 233,
        "getrandom": 278,
        "rseq": 293,
    },
}
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

NEW_USER, NEW_NET, NEW_IPC = 0x10000000, 0x40000000, 0x08000000
SET_NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2
LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, RETURN = 0x20, 0x15, 0x35, 0x06
KILL, DENY, ALLOW = 0x80000000, 0x00050001, 0x7FFF0000
LANDLOCK_CREATE, LANDLOCK_RESTRICT = 444, 446
EVERY_FILE_RIGHT = (1 << 13) - 1
"""The rights of the first version of Landlock: to execute, read, write, list, make, and remove."""


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("value", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def lock_down(memory_bytes: int) -> list[str]:
    """Give up network, files, other processes and memory beyond the limit. Returns what could not be given up."""
    missing: list[str] = []
    limits = {"FSIZE": 0, "NOFILE": 16, "NPROC": 0, "CORE": 0, "MSGQUEUE": 0, "AS": memory_bytes}
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "unshare") or library.unshare(NEW_USER | NEW_NET | NEW_IPC):
        missing.append("a network namespace")
    for name, most in limits.items():
        try:
            number = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(number)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(number, (most, most))
        except (AttributeError, ValueError, OSError):
            missing.append(f"a limit of {name}")
    if not hasattr(library, "prctl") or library.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return [*missing, "seccomp", "landlock"]
    if not _without_files(library):
        missing.append("landlock")
    if not _few_system_calls(library):
        missing.append("seccomp")
    return missing


def _without_files(library: Any) -> bool:
    """Landlock, with no exception: no path can be opened, whoever owns it."""
    rights = ctypes.c_ulonglong(EVERY_FILE_RIGHT)
    rules = library.syscall(LANDLOCK_CREATE, ctypes.byref(rights), ctypes.sizeof(rights), 0)
    if rules < 0:
        return False
    restricted = library.syscall(LANDLOCK_RESTRICT, rules, 0) == 0
    os.close(rules)
    return bool(restricted)


def _few_system_calls(library: Any) -> bool:
    """seccomp: all but the calls a running interpreter needs fail with "operation not permitted"."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ARCHITECTURES:
        return False
    code = [
        (LOAD, 0, 0, 4),
        (JUMP_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),
        (JUMP_GREATER_EQUAL, 0, 1, 0x40000000),  # the 32-bit numbering of the same calls
        (RETURN, 0, 0, DENY),
    ]
    for number in ALLOWED_CALLS[machine].values():
        code += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    code.append((RETURN, 0, 0, DENY))
    instructions = (_Instruction * len(code))(*(_Instruction(*line) for line in code))
    program = _Program(len(code), instructions)
    return bool(library.prctl(SET_SECCOMP, FILTER, ctypes.byref(program), 0, 0) == 0)


class TooMuchOutput(Exception):
    """The program printed more than it may."""


class _Printed(io.StringIO):
    """What a program prints, up to a limit."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    def write(self, text: str) -> int:
        self.left -= len(text)
        if self.left < 0:
            raise TooMuchOutput("more was printed than the limit allows")
        return super().write(text)


def guarded_import(allowed: frozenset[str]) -> Any:
    """`__import__` for the modules on the list. Not a wall: the system calls are. It makes the message clear."""
    original = builtins.__import__

    def guarded(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] not in allowed:
            raise ImportError(f"'{name}' may not be imported here; allowed are {', '.join(sorted(allowed))}")
        return original(name, *args, **kwargs)

    return guarded


def serve(setup: dict[str, Any], requests: Any, answers: Any) -> None:
    """Run the program, then call its functions, one answer for every request."""
    most = setup["output_chars"]
    inside = {**vars(builtins), "__import__": guarded_import(frozenset(setup["modules"]))}
    space: dict[str, Any] = {"__name__": "program", "__builtins__": inside}

    def ask(request: Any) -> Any:
        answers.write(json.dumps({"ask": request}) + "\n")
        answers.flush()
        return json.loads(requests.readline())

    space["ask"] = ask

    def answer(work: Any) -> None:
        printed = _Printed(most)
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                value = work()
            line = json.dumps({"value": value, "printed": printed.getvalue()}, allow_nan=False)
            if len(line) > 2 * most + 1000:
                raise TooMuchOutput(f"the result has {len(line)} characters, more than the limit allows")
        except BaseException as error:  # SystemExit and KeyboardInterrupt are the program's too
            reason = (str(error).splitlines() or [""])[0][:500]
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<program>"]
            place = f" (line {frames[-1].lineno})" if frames else ""
            line = json.dumps({"error": f"{type(error).__name__}: {reason}{place}"})
        answers.write(line + "\n")
        answers.flush()

    answer(lambda: exec(compile(setup["source"], "<program>", "exec"), space))  # the process is the wall
    for line in requests:
        request = json.loads(line)
        answer(lambda request=request: _call(space, request))


def _call(space: dict[str, Any], request: dict[str, Any]) -> Any:
    if not callable(space.get(request["function"])):
        raise NameError(f"the program defines no function '{request['function']}'")
    return space[request["function"]](*request["arguments"])


def main() -> None:
    """Set up from the first line of the input, lock down, say so, serve."""
    requests, answers = sys.stdin, os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what is written to file descriptor 1 behind Python's back goes nowhere
    setup = json.loads(requests.readline())
    for name in setup["modules"]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    random.seed(0)
    answers.write(json.dumps({"missing": lock_down(setup["memory_bytes"])}) + "\n")
    answers.flush()
    serve(setup, requests, answers)


if __name__ == "__main__":
    main()
