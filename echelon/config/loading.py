"""The strict road from files and flags to one frozen object of settings.

A recipe's `Config` is a frozen dataclass of numbers, text, tuples, free mappings and blocks. `load` resolves it: class
defaults < YAML files, left to right < flags. Files and flags go through the same checks, every complaint is one line,
and `__post_init__` runs once, on the merged values. Knows no setting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from echelon.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def load(config: type[Config], files: Sequence[str | Path] = (), flags: Sequence[str] = ()) -> Config:
    """The settings of one run: class defaults, then each file in order, then flags; later ones win, key by key.

    Raises ConfigError, always one line, for an unreadable file, an unknown key or flag, a value of the wrong type, a
    missing setting, and whatever `__post_init__` refuses.
    """
    settings = settings_of(config)
    given: dict[str, object] = {}
    for file in files:
        given.update(_once(_from_tree(settings, _read(Path(file)), str(file)), str(file)))
    given.update(_from_flags(settings, flags))
    return _build(config, given)


def overridden(config: Config, words: Sequence[str]) -> Config:
    """The same settings but for those given as `block.name=value`, checked like flags. Raises ConfigError."""
    flags = [f"--{word}" for word in words]
    return _build(type(config), dict(_from_flags(settings_of(type(config)), flags)), config)


def to_yaml(config: DataclassInstance) -> str:
    """Every setting as YAML, in declaration order; `load` reads it back to an equal object."""
    return _written(dataclasses.asdict(config))


def completed(config: type[DataclassInstance], saved: str) -> dict[str, Any]:
    """What `to_yaml` wrote, before some settings existed perhaps, with the default of each that it does not know."""
    known = _complete(config, yaml.load(saved, _Loader) or {})
    return dict(yaml.load(_written(known), _Loader))  # defaults in the same form as what was written


def _complete(
    config: type[DataclassInstance], saved: Mapping[str, Any], default: object = MISSING
) -> dict[str, object]:
    """The same for one block, whose defaults are those of its class, or what `default`, such a block, holds."""
    known: dict[str, object] = dict(saved)
    for entry in dataclasses.fields(config):
        name, kind = entry.name, _kinds(config)[entry.name]
        base = class_default(entry) if default is MISSING else getattr(default, name)
        if dataclasses.is_dataclass(kind) and isinstance(saved.get(name, {}), Mapping):
            known[name] = _complete(kind, saved.get(name, {}), base)  # type: ignore[arg-type]
        elif base is not MISSING:
            known.setdefault(name, base)
    return known


def _written(tree: Mapping[str, object]) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


@functools.cache
def _kinds(config: type[DataclassInstance]) -> dict[str, Any]:
    """Name → type of the fields of one block."""
    hints = get_type_hints(config)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(config)}


def settings_of(config: type[DataclassInstance], prefix: str = "") -> dict[str, Any]:
    """Dotted name → type of every setting, the blocks themselves included."""
    settings: dict[str, Any] = {}
    for name, kind in _kinds(config).items():
        settings[prefix + name] = kind
        if dataclasses.is_dataclass(kind):
            settings |= settings_of(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
    return settings


def _build(config: type[Config], given: Mapping[str, object], default: object = MISSING, prefix: str = "") -> Config:
    """Construct the inner blocks, then the outer one; what is not given comes from `default` or from the class."""
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        name, kind = prefix + entry.name, _kinds(config)[entry.name]
        base = class_default(entry) if default is MISSING else getattr(default, entry.name)
        if dataclasses.is_dataclass(kind):
            values[entry.name] = _build(kind, given, base, f"{name}.")  # type: ignore[arg-type]
        elif get_origin(kind) is dict:
            items = {key.removeprefix(f"{name}."): given[key] for key in given if key.startswith(f"{name}.")}
            values[entry.name] = {**({} if base is MISSING else base), **items}
        elif name in given or base is not MISSING:
            values[entry.name] = given.get(name, base)
        else:
            raise missing(name)
    try:
        return config(**values)
    except ConfigError as error:  # it begins with the name of a field; say where the block sits
        raise ConfigError(f"{prefix}{error}") from error


def class_default(entry: dataclasses.Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def missing(name: str) -> ConfigError:
    return ConfigError(f"{name} is missing: nothing sets it. Put it in a settings file, or give {flag_of(name)}.")


def _from_tree(
    settings: Mapping[str, Any], tree: Mapping[object, object], file: str, prefix: str = ""
) -> Iterator[tuple[str, object]]:
    """(dotted name, value of its type) for all that a YAML mapping sets."""
    around = settings.get(prefix.removesuffix("."))
    for key, value in tree.items():
        name = f"{prefix}{key}"
        kind = get_args(around)[1] if get_origin(around) is dict else settings.get(name)
        if kind is None:
            raise ConfigError(f"{file}: unknown key '{name}'.{_suggestion(name, settings)}")
        if dataclasses.is_dataclass(kind) or get_origin(kind) is dict:
            if not isinstance(value, Mapping | None):
                raise ConfigError(f"{file}: {name} = {show(value)}: expected keys and values under it.")
            yield from _from_tree(settings, value or {}, file, f"{name}.")
        else:
            yield name, _checked(value, kind, f"{file}: {name} = {show(value)}")


def _once(pairs: Iterable[tuple[str, object]], file: str) -> dict[str, object]:
    """The pairs of one file, each name once: a block and a key with a dot may set the same."""
    given: dict[str, object] = {}
    for name, value in pairs:
        if name in given:
            raise ConfigError(f"{file}: '{name}' is set twice, in a block and with a dot. Keep one of the two.")
        given[name] = value
    return given


EVERYWHERE = {"--sampler": "sampling.sampler", "--rollout-workers": "sampling.ray.workers", "--quiet": "log.quiet"}
"""Flags that say one thing for every level: the setting that each block of that name gets."""


class _Word(str):
    """One word of the command line. It has the meaning YAML gives it where that fits, and else stands for itself."""


def _from_flags(settings: Mapping[str, Any], flags: Sequence[str]) -> Iterator[tuple[str, object]]:
    """(dotted name, value of its type) for all that flags set."""
    for flag, words in _spread(settings, _grouped(flags)):
        name = flag.removeprefix("--").replace("-", "_")
        positive = re.sub(r"(^|\.)no_", r"\1", name)
        kind, typed = settings.get(name), show(" ".join([flag, *words]))
        if kind is None and settings.get(positive) is bool and not words:
            yield positive, False
        elif kind is None or dataclasses.is_dataclass(kind):
            raise ConfigError(f"unknown flag '{flag}'.{_suggestion(name, settings, shown=flag_of)}")
        elif get_origin(kind) is dict:
            yield from _entries(name, flag, words, get_args(kind)[1])
        elif get_origin(kind) is tuple:
            yield name, _checked(words, kind, typed)
        elif len(words) > 1:
            raise ConfigError(f"unexpected '{words[1]}' after {flag} {words[0]}. Settings files come before the flags.")
        elif words:
            yield name, _checked(words[0], kind, typed)
        elif kind is bool:
            yield name, True
        else:
            raise ConfigError(f"{flag}: expected {expected(kind)} after it.")


def _spread(settings: Mapping[str, Any], flags: Iterable[tuple[str, list[_Word]]]) -> Iterator[tuple[str, list[_Word]]]:
    """The flags, those of `EVERYWHERE` once for each block that has the setting."""
    for flag, words in flags:
        ending = EVERYWHERE.get(flag, "")
        places = [name for name in settings if ending and f".{name}".endswith(f".{ending}")]
        yield from ((flag_of(place), words) for place in places) if places else [(flag, words)]


def _entries(name: str, flag: str, words: Sequence[str], kind: Any) -> Iterator[tuple[str, object]]:
    """The `key=value` words after the flag of a free mapping."""
    for word in words or [""]:
        key, equals, value = word.partition("=")
        typed = show(f"{flag} {word}")
        if not (key and equals):
            raise ConfigError(f"{typed}: expected key=value.")
        yield f"{name}.{key}", _checked(_Word(value), kind, typed)


def _grouped(flags: Sequence[str]) -> Iterator[tuple[str, list[_Word]]]:
    """Each flag with the words that follow it; `--key=value` is `--key value`, and lets a value begin with `--`."""
    starts = [at for at, word in enumerate(flags) if word.startswith("--")]
    if flags and starts[:1] != [0]:
        raise ConfigError(f"unexpected '{flags[0]}'. Flags look like --key value.")
    for start, end in itertools.pairwise([*starts, len(flags)]):
        flag, equals, value = flags[start].partition("=")
        yield flag, [_Word(word) for word in ([value] if equals else []) + list(flags[start + 1 : end])]


def _checked(value: object, kind: Any, where: str) -> object:
    """`value` as a `kind`, or a ConfigError that says where it was given and what was expected there."""
    try:
        return _fit(value, kind)
    except _Misfit:
        hint = did_you_mean(str(value), map(str, get_args(kind))) if get_origin(kind) is Literal else ""
        hint = " Put it in quotes." if kind is str and isinstance(value, bool | int | float) else hint
        raise ConfigError(f"{where}: expected {expected(kind)}.{hint}") from None


class _Misfit(Exception):
    """A value is not of the type it has to be."""


def _fit(value: object, kind: Any) -> object:
    """`value` as a `kind`: whole numbers also make floats and lists make tuples; nothing else is converted."""
    if isinstance(value, _Word):
        with contextlib.suppress(_Misfit):
            return _fit(scalar(str(value)), kind)
        return _fit(str(value), kind)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal and any(value == choice and type(value) is type(choice) for choice in inner):
        return value
    if origin is tuple and isinstance(value, list):
        inner = inner[:1] * len(value) if inner[1:] == (...,) else inner
        if len(inner) == len(value):
            return tuple(_fit(item, kind) for item, kind in zip(value, inner, strict=True))
    if origin in (Union, UnionType):
        for member in inner:
            with contextlib.suppress(_Misfit):
                return _fit(value, member)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    raise _Misfit


def expected(kind: Any) -> str:
    """A type in words, to follow "expected"."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is tuple and inner[1:] == (...,):
        return f"a list, each {expected(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}: " + ", ".join(map(expected, inner))
    if inner:
        *others, last = map(expected, inner)
        return f"{', '.join(others)} or {last}"
    return words[kind]


def _suggestion(name: str, settings: Mapping[str, Any], shown: Callable[[str], str] = str) -> str:
    """The setting that was meant: this name in another block, nearly this name in its own, or a part of the block."""
    block, _, leaf = name.rpartition(".")
    siblings = [other for other in settings if other != name and other.rpartition(".")[0] == block]
    places = {sibling.rpartition(".")[2]: sibling for sibling in siblings}
    same = [other for other in settings if other.endswith(f".{leaf}")]
    parts = [other for other in settings if other.startswith(f"{name}.")]
    meant = same or [places[close] for close in difflib.get_close_matches(leaf, places, n=1)] or parts
    return did_you_mean(shown(meant[0]), [shown(meant[0])]) if meant else ""


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def show(value: object) -> str:
    """A value as one short line, the way it would be written in YAML."""
    if not isinstance(value, str):
        value = yaml.dump(value, Dumper=_Dumper, default_flow_style=True).removesuffix("\n...\n")
    return textwrap.shorten(value, 60, placeholder=" …")


def _read(file: Path) -> Mapping[object, object]:
    """The mapping in a YAML file, nothing for an empty one; one line whatever is wrong with it."""
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        nearby = [path.name for path in file.parent.glob("*.y*ml")]
        raise ConfigError(f"{file}: no such file.{did_you_mean(file.name, nearby)}") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not a text file (byte {error.start} is not UTF-8).") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{file}: {line}{error.problem}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, Mapping | None):
        raise ConfigError(f"{file}: {show(tree)}: expected keys and values.")
    return tree or {}


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: `1e-3` is a number and `no`, `1:30`, `010` are text. No key comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is set twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads."""


_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
for _yaml in (_Loader, _Dumper):
    _yaml.yaml_implicit_resolvers = {}
    for _name, _pattern in _SCALARS.items():
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"({_pattern})\Z"), None)
_Dumper.add_representer(
    tuple, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def scalar(text: str) -> object:
    """What a plain scalar means in YAML: a number, true or false, null, or the text itself."""
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    return loader.construct_object(yaml.ScalarNode(tag, text))
