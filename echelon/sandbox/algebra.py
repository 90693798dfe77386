r"""Whether two formulas in LaTeX mean the same, asked of the math-verify library in a child process.

Formulas that a model wrote can make it compute for hours or until memory ends (`9^{9^{9^9}}`), so it runs within limits
and is ended when it breaks one. Knows nothing of answers or rewards.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

from echelon.sandbox.program import Limits, Program, remove_child

LIMITS = Limits(cpu_seconds=4.0, wall_seconds=30.0, memory_mib=2048, output_chars=1000)
"""What one comparison may use."""

_STARTUP = Limits(cpu_seconds=60.0, wall_seconds=120.0)


def algebra_installed() -> bool:
    """Whether the library is there."""
    return importlib.util.find_spec("math_verify") is not None


class Algebra(Program):
    """math-verify in a child that stays from one comparison to the next; after a hang or a crash there is another.

    The child may use memory and time up to its limits, writes no file and starts no process. It runs the library, not
    Python that a model wrote.
    """

    def __init__(self, limits: Limits = LIMITS) -> None:
        super().__init__("", limits=limits)

    def same(self, said: str, right: str) -> bool | None:
        """Whether `said` means what `right` means; None where the library cannot read `said`.

        Raises ProgramError where it hangs, crashes, takes too much, or cannot read `right`.
        """
        value = self.call("same", said, right)
        assert value is None or isinstance(value, bool)
        return value

    def start(self) -> str:
        """Have the library loaded, unless it is. Raises ProgramError if it cannot be."""
        if self._child is not None and self._child.poll() is None:
            return ""
        self.close()
        home = tempfile.mkdtemp(prefix="echelon-algebra-")
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-B", str(Path(__file__).with_name("algebra_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=home,
            env={"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )
        self._end = weakref.finalize(self, remove_child, self._child, home)
        self._send({"memory_bytes": self.limits.memory_mib << 20}, _STARTUP)
        self._receive(_STARTUP)
        return ""
