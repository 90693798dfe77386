"""Untrusted Python in a child process with few rights. What that does and does not protect against: `program`."""

from echelon.sandbox.grading import Exam, Examiner, Grade, read_exam
from echelon.sandbox.program import MODULES, Limits, Program, ProgramError, run_code, walls

__all__ = [
    "MODULES",
    "Exam",
    "Examiner",
    "Grade",
    "Limits",
    "Program",
    "ProgramError",
    "read_exam",
    "run_code",
    "walls",
]
