"""Untrusted Python in a child process with few rights. What that does and does not protect against: `program`."""

from echelon.sandbox.program import MODULES, Limits, Program, ProgramError, run_code, walls

__all__ = ["MODULES", "Limits", "Program", "ProgramError", "run_code", "walls"]
