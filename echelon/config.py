"""Settings: the blocks recipes share, and the strict road from files and flags to one frozen object.

A recipe's `Config` is a frozen dataclass made of numbers, text, tuples, one level of free mapping and blocks like those
below. `load` resolves it: class defaults < YAML files, left to right < flags. Files and flags go through the same checks,
every complaint is one line, and `__post_init__` runs once, on the merged values. Knows no model and no environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from echelon.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
Scalar = bool | int | float | str
Settings = Annotated[dict[str, Scalar], tyro.conf.arg(metavar="[KEY=VALUE ...]")]
"""Free keyword settings for something chosen by name: `env_settings: Settings = field(default_factory=dict)`.

A mapping in YAML; `--env-settings things=10 chain=true` on the command line. Later sources add keys and replace values.
"""


def demand(config: object, name: str, holds: bool, because: str) -> None:
    """Raise ConfigError `name = value: because` unless the rule holds. `because` says why it cannot work and what to do."""
    if not holds:
        raise ConfigError(f"{name} = {_show(operator.attrgetter(name)(config))}: {because}")


def require(config: object, *names: str) -> None:
    """Raise ConfigError for the first of these settings that is still empty, e.g. `require(self, "model.path")`."""
    for name in names:
        if operator.attrgetter(name)(config) == "":
            raise _missing(name)


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is held in memory."""

    path: str = ""
    """Model folder or hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. Log-probabilities and losses are float32 whatever this is."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation."""
    device: str = "auto"
    """Where it lives: cpu, cuda, cuda:1, …; auto takes an accelerator if there is one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""

    def __post_init__(self) -> None:
        demand(self, "device", self.device != "", "a model has to live somewhere. Give cpu, cuda or auto.")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean of the gradient, and of its square."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to this norm; inf leaves them alone."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate moves from its peak to its final value, after warming up."""
    warmup_steps: int = 0
    """Steps during which the learning rate rises linearly from zero."""
    final_lr_fraction: float = 0.0
    """Learning rate of the last step, as a part of the peak (schedules other than constant)."""

    def __post_init__(self) -> None:
        demand(self, "lr", 0 <= self.lr < math.inf, "a step length is finite and not negative. Try 1e-3 or less.")
        decays = 0 <= self.weight_decay < math.inf
        demand(self, "weight_decay", decays, "a negative or infinite decay makes weights explode. Give 0 or a little more.")
        averages = all(0 <= beta < 1 for beta in self.betas)
        demand(self, "betas", averages, "running means need decays from 0 up to, not including, 1. Try 0.9 and 0.999.")
        demand(self, "eps", 0 < self.eps < math.inf, "it keeps the step from dividing by zero. Give a small positive number.")
        clips = self.max_grad_norm > 0
        demand(self, "max_grad_norm", clips, "no gradient would be left. Give a positive number, or .inf to clip nothing.")
        demand(self, "warmup_steps", self.warmup_steps >= 0, "steps are counted from 0. Give 0 to start at the peak.")
        fraction = 0 <= self.final_lr_fraction <= 1
        demand(self, "final_lr_fraction", fraction, "it is a part of lr. Give a number from 0 to 1.")


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn for training: from the full distribution, so that their log-probabilities are the policy's.

    Cutting the tail (top-k, top-p) gives some tokens probability zero and spoils every ratio between old and new policy;
    those are settings of evaluation.
    """

    temperature: float = 1.0
    """Divides the logits, in sampling and in training alike."""
    max_tokens: int = 32
    """Longest completion, in tokens."""
    max_prompt_tokens: int = 1024
    """Longest prompt, in tokens."""
    stop: tuple[str, ...] = ()
    """A completion ends as soon as its text contains one of these."""

    def __post_init__(self) -> None:
        tempered = 0 < self.temperature < math.inf
        demand(self, "temperature", tempered, "training needs a distribution to draw from. Give a positive number, usually 1.")
        demand(self, "max_tokens", self.max_tokens >= 1, "a completion has at least one token. Give 1 or more.")
        demand(self, "max_prompt_tokens", self.max_prompt_tokens >= 1, "nothing could be asked. Give 1 or more.")
        demand(self, "stop", "" not in self.stop, "every text contains the empty text. Leave it out.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run has. A recipe's Config inherits it, adds its own fields, and calls `super().__post_init__()` first."""

    out: str
    """Run directory: checkpoints, metrics and episodes are written here."""
    seed: int = 0
    """All randomness of the run derives from it."""
    resume: bool = False
    """Continue from the newest whole checkpoint in the run directory, if there is one."""
    save_every: int = 50
    """Steps between checkpoints; 0 saves once, at the end."""
    keep_last: int = 2
    """Checkpoints kept; older ones are deleted."""
    threads: int = 0
    """CPU threads for tensor work; 0 leaves the number to torch. Tiny models are fastest on 1."""
    dry_run: bool = False
    """Resolve the settings, print sizes and memory, and stop before training."""

    def __post_init__(self) -> None:
        require(self, "out")
        demand(self, "seed", self.seed >= 0, "seeds are not negative. Give 0 or more.")
        demand(self, "save_every", self.save_every >= 0, "it counts steps. Give 0 to save at the end only.")
        demand(self, "keep_last", self.keep_last >= 1, "a run with no checkpoint cannot be resumed. Keep at least 1.")
        demand(self, "threads", self.threads >= 0, "threads are counted. Give 0 to leave the number to torch.")


def load(config: type[Config], files: Sequence[str | Path] = (), flags: Sequence[str] = ()) -> Config:
    """The settings of one run: class defaults, then each file in order, then flags; later ones win, key by key.

    Raises ConfigError, always one line, for an unreadable file, an unknown key or flag, a value of the wrong type, a
    missing setting, and whatever `__post_init__` refuses.
    """
    settings = _settings(config)
    given: dict[str, object] = {}
    for file in files:
        given.update(_from_tree(settings, _read(Path(file)), str(file)))
    given.update(_from_flags(settings, flags))
    return _build(config, given)


def to_yaml(config: DataclassInstance) -> str:
    """Every setting as YAML, in declaration order; `load` reads it back to an equal object."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


@functools.cache
def _kinds(config: type[DataclassInstance]) -> dict[str, Any]:
    """Name → type of the fields of one block."""
    hints = get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def _settings(config: type[DataclassInstance], prefix: str = "") -> dict[str, Any]:
    """Dotted name → type of every setting, the blocks themselves included."""
    settings: dict[str, Any] = {}
    for name, kind in _kinds(config).items():
        settings[prefix + name] = kind
        if dataclasses.is_dataclass(kind):
            settings |= _settings(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
    return settings


def _build(config: type[Config], given: Mapping[str, object], default: object = MISSING, prefix: str = "") -> Config:
    """Construct the inner blocks, then the outer one; what is not given comes from `default` or from the class."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, kind = prefix + field.name, _kinds(config)[field.name]
        base = _class_default(field) if default is MISSING else getattr(default, field.name)
        if dataclasses.is_dataclass(kind):
            values[field.name] = _build(kind, given, base, f"{name}.")  # type: ignore[type-var, arg-type]
        elif get_origin(kind) is dict:
            entries = {key.removeprefix(f"{name}."): given[key] for key in given if key.startswith(f"{name}.")}
            values[field.name] = {**({} if base is MISSING else base), **entries}
        elif name in given or base is not MISSING:
            values[field.name] = given.get(name, base)
        else:
            raise _missing(name)
    try:
        return config(**values)
    except ConfigError as error:  # it begins with the name of a field; say where the block sits
        raise ConfigError(f"{prefix}{error}") from error


def _class_default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _missing(name: str) -> ConfigError:
    return ConfigError(f"{name} is missing: nothing sets it. Put it in a settings file, or give {_flag(name)}.")


def _from_tree(
    settings: Mapping[str, Any], tree: Mapping[object, object], file: str, prefix: str = ""
) -> Iterator[tuple[str, object]]:
    """(dotted name, value of its type) for all a YAML mapping sets."""
    around = settings.get(prefix.removesuffix("."))
    for key, value in tree.items():
        name = f"{prefix}{key}"
        kind = get_args(around)[1] if get_origin(around) is dict else settings.get(name)
        if kind is None:
            raise ConfigError(f"{file}: unknown key '{name}'.{_suggestion(name, settings)}")
        if dataclasses.is_dataclass(kind) or get_origin(kind) is dict:
            if not isinstance(value, Mapping | None):
                raise ConfigError(f"{file}: {name} = {_show(value)}: expected keys and values.")
            yield from _from_tree(settings, value or {}, file, f"{name}.")
        else:
            yield name, _checked([value], kind, f"{file}: {name} = {_show(value)}")


def _from_flags(settings: Mapping[str, Any], flags: Sequence[str]) -> Iterator[tuple[str, object]]:
    """(dotted name, value of its type) for all that flags set. Words have their YAML meaning, or stand for themselves."""
    for flag, words in _grouped(flags):
        name = flag.removeprefix("--").replace("-", "_")
        kind, typed = settings.get(name), " ".join([flag, *words])
        block, _, leaf = name.rpartition(".")
        positive = f"{block}.{leaf}".lstrip(".").replace("no_", "", 1) if leaf.startswith("no_") else ""
        if kind is None and settings.get(positive) is bool and not words:
            yield positive, False
        elif kind is None or dataclasses.is_dataclass(kind):
            raise ConfigError(f"unknown flag '{flag}'.{_suggestion(name, settings, _flag)}")
        elif get_origin(kind) is dict:
            for word in words:
                entry, equals, text = word.partition("=")
                if not (entry and equals):
                    raise ConfigError(f"{flag} {word}: expected key=value.")
                yield f"{name}.{entry}", _checked([_scalar(text), text], get_args(kind)[1], f"{flag} {word}")
        elif get_origin(kind) is tuple:
            yield name, _checked([words], kind, typed)
        elif len(words) > 1:
            raise ConfigError(f"unexpected '{words[1]}' after {flag} {words[0]}. Settings files come before the flags.")
        elif not words and kind is not bool:
            raise ConfigError(f"{flag}: expected {_expected(kind)} after it.")
        else:
            yield name, _checked([_scalar(words[0]), words[0]] if words else [True], kind, typed)
