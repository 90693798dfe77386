"""What can go wrong, said once and in full: what you gave, why it cannot work, what to do.

    EchelonError
    ├── ConfigError      (ValueError)     a setting, a flag or a file of settings
    ├── DataError        (ValueError)     a data file, a model folder, a tokenizer, a chat template, an environment
    ├── ParseError       (ValueError)     text that does not say what it should
    ├── RolloutError     (RuntimeError)   an episode, or too many of them, went wrong
    ├── CheckpointError  (RuntimeError)   nothing whole to load, or nowhere to save
    └── MissingExtra     (ImportError)    an optional dependency; the message is the install line

The command line prints the message as one line and exits with 2; inside Python they are ordinary exceptions.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class EchelonError(Exception):
    """Anything echelon can explain to the person who typed the command."""


class ConfigError(EchelonError, ValueError):
    """A setting, a flag or a settings file that cannot work."""


class DataError(EchelonError, ValueError):
    """Input that cannot be used: data files, model folders, tokenizers, templates, environments."""


class ParseError(EchelonError, ValueError):
    """Text that does not contain what was asked for."""


class RolloutError(EchelonError, RuntimeError):
    """Episodes could not be played."""


class CheckpointError(EchelonError, RuntimeError):
    """A checkpoint that cannot be read or written, or a run directory that cannot be used."""


class MissingExtra(EchelonError, ImportError):
    """An optional dependency is not installed."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A suggestion ready to append to a message: " Did you mean 'group_size'?", or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def need(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{module} is not installed. Run: pip install 'echelon[{extra}]'") from error
