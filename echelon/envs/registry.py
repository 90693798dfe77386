"""From a name to an environment: the built-in ones, and any class in a file or an importable module.

Knows how to find a class and whether it takes the settings given; whether it keeps its promises is for `check`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from echelon.envs._shared import EnvSpec
from echelon.errors import ConfigError, DataError, did_you_mean

BUILT_IN = {
    "arithmetic": "echelon.envs.arithmetic:Arithmetic",
    "dialogue": "echelon.envs.dialogue:Dialogue",
    "guess_my_city": "echelon.envs.guess_my_city:GuessMyCity",
    "guess_number": "echelon.envs.guess_number:GuessNumber",
    "maze": "echelon.envs.maze:Maze",
    "text_lock": "echelon.envs.text_lock:TextLock",
    "twenty_questions": "echelon.envs.twenty_questions:TwentyQuestions",
    "wordle": "echelon.envs.wordle:Wordle",
}

_OWN = "path/to/file.py:ClassName, package.module:ClassName or tasks.yaml"


def load_env(name: str, settings: Mapping[str, Any] | None = None, *, trust_code: bool = False) -> EnvSpec:
    """Find an environment: a built-in name, `path/to/file.py:ClassName`, `package.module:ClassName`, a file of tasks
    (`tasks.yaml`), whose Python runs only with `trust_code`, a game of TextArena (`textarena:Wordle-v0`), or an
    environment of Gymnasium (`gymnasium:CartPole-v1`).

    Raises ConfigError for an unknown name or setting, DataError for a file, module or class that cannot be used.
    """
    if name.endswith((".yaml", ".yml")):
        from echelon.envs.tasks_yaml import yaml_env

        if settings:
            raise ConfigError(f"{name} has no setting '{min(settings)}': a file of tasks says it all. Change the file.")
        return yaml_env(name, trust_code=trust_code)
    if name.startswith("textarena:"):
        from echelon.envs.textarena import textarena_env

        return textarena_env(name, settings)
    if name.startswith("gymnasium:"):
        from echelon.envs.gymnasium import gymnasium_env

        return gymnasium_env(name, settings)
    where, colon, class_name = BUILT_IN.get(name, name).rpartition(":")
    if not colon or not where or not class_name:
        built_in = ", ".join(BUILT_IN)
        raise ConfigError(
            f"There is no environment '{name}'.{did_you_mean(name, BUILT_IN)} Built in: {built_in}. Your own: {_OWN}."
        )
    module = import_code(name, where)
    cls = getattr(module, class_name, None)
    if cls is None:
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise DataError(f"{where} has no class '{class_name}'.{did_you_mean(class_name, classes)}")
    return env_spec(cls, settings, name=name)


def env_spec(cls: Any, settings: Mapping[str, Any] | None = None, *, name: str | None = None) -> EnvSpec:
    """A class you hold, with settings, as an EnvSpec. Raises as `load_env` does."""
    name = name or str(getattr(cls, "__name__", cls))
    is_class = inspect.isclass(cls)
    missing = [method for method in ("tasks", "start", "step") if not callable(getattr(cls, method, None))]
    if not is_class or missing:
        lacks = f"it has no {', '.join(f'{method}()' for method in missing)}" if missing else "it is not a class"
        raise DataError(
            f"{name} is not an environment: {lacks}. See docs/environments.md for the few methods it needs."
        )
    settings = dict(settings or {})
    takes, constructor = _settings_of(cls.tasks, skip=1), _settings_of(cls.__init__, skip=2)
    for key, value in settings.items():
        _check_setting(name, key, value, takes, constructor)
    if needed := (takes.required | constructor.required) - set(settings):
        raise ConfigError(f"{name} needs the setting '{min(needed)}'. Give it, or give the class a default.")
    return EnvSpec(name, cls, settings)


def _check_setting(name: str, key: str, value: object, tasks: _Settings, constructor: _Settings) -> None:
    known = sorted(set(tasks.types) | set(constructor.types))
    if not tasks.takes(key) and not constructor.takes(key):
        takes = f"It takes {', '.join(known)}." if known else "It takes none."
        raise ConfigError(f"{name} has no setting '{key}'.{did_you_mean(key, known)} {takes}")
    for takes_it, part, other in (
        (tasks.takes(key), "tasks()", "its constructor"),
        (constructor.takes(key), "its constructor", "tasks()"),
    ):
        if not takes_it:
            raise DataError(f"{name}: {other} takes the setting '{key}' but {part} does not. Both receive all of them.")
    wanted = constructor.types.get(key, object)
    right = isinstance(value, wanted) and not (isinstance(value, bool) and wanted in (int, float))
    if not right and not (wanted is float and isinstance(value, int)):
        raise ConfigError(f"{name}: {key} = {value!r} is not {_A[wanted]}.")


_A: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True, slots=True)
class _Settings:
    """The keyword arguments a function takes beyond its first ones."""

    types: Mapping[str, type]
    """By name; `object` where the annotation is not one of bool, int, float and str."""
    required: frozenset[str] = frozenset()
    """Those without a default."""
    others: bool = False
    """It also takes **anything."""

    def takes(self, key: str) -> bool:
        return self.others or key in self.types


def _settings_of(function: Callable[..., Any], *, skip: int) -> _Settings:
    """The first `skip` parameters (split of a bound `tasks`; self and task of a constructor) are not settings."""
    if function is object.__init__:
        return _Settings({})
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # an annotation that does not resolve says nothing about the settings
        hints = {}
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    types = {p.name: hints[p.name] if hints.get(p.name) in _A else object for p in named}
    required = frozenset(p.name for p in named if p.default is p.empty)
    return _Settings(types, required, others=any(p.kind is p.VAR_KEYWORD for p in parameters))


def import_code(name: str, where: str) -> ModuleType:
    """The module that `where` is: a path to a .py file, or the name of an importable module.

    Raises DataError, with `name` in front, for a file that is not there and for code that does not import.
    """
    return _import_file(name, Path(where)) if where.endswith(".py") else _import_module(name, where)


def _import_file(name: str, path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise DataError(f"{name}: there is no file {path}.")
    module_name = f"echelon_own_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickling look a class's module up by name
    with _importable_from(path.parent), _explained(name, f"{path} does not import"):
        spec.loader.exec_module(module)
    return module


def _import_module(name: str, where: str) -> ModuleType:
    with _importable_from(Path.cwd()), _explained(name, f"module {where} does not import"):
        return importlib.import_module(where)


@contextmanager
def _importable_from(folder: Path) -> Iterator[None]:
    """Modules next to the file, or in the working directory, can be imported while it loads."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"{name}: {what}: {type(error).__name__}: {reason}") from error
