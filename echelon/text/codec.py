"""Numbers as words and back: one observation as text, one action read from text, and the prompt between them.

The one codec of data conversion, training, rewards and evaluation, so that what was trained on is what is asked. Knows
spaces as plain data; no environment, no tokens, no tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from echelon.errors import ConfigError, DataError, did_you_mean
from echelon.types import Message

Style = Literal["float", "bins", "index", "name"]
Vector: TypeAlias = NDArray[np.float32]
Action: TypeAlias = int | Vector
"""What an environment's `step` takes: the number of a choice, or a flat vector."""
Range: TypeAlias = tuple[float, float]

STYLES: tuple[Style, ...] = ("float", "bins", "index", "name")
OBSERVATION, OBSERVATION_END = "<observation>", "</observation>"
ACTION, ACTION_END = "<action>", "</action>"
SEPARATOR = ", "

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True, slots=True)
class Space:
    """What a number, or a vector of them, may be: a box with bounds for each value, or one of `n` choices."""

    kind: Literal["box", "discrete"]
    low: tuple[float, ...] = ()
    """Of a box, flattened; −inf where there is no bound."""
    high: tuple[float, ...] = ()
    n: int = 0
    """How many choices there are; they are numbered from `start`."""
    start: int = 0
    names: tuple[str, ...] = ()
    """Of the values of a box, or of the choices. Empty if they have none."""
    units: tuple[str, ...] = ()
    """Of the values of a box; an empty text for one without."""

    def __post_init__(self) -> None:
        count = self.n if self.kind == "discrete" else len(self.low)
        if count < 1 or len(self.low) != len(self.high) or any(a > b for a, b in zip(self.low, self.high, strict=True)):
            raise DataError(f"a {self.kind} space with the bounds {self.low} to {self.high} and n = {self.n} is empty.")
        for what, given in (("names", self.names), ("units", self.units)):
            if given and len(given) != count:
                raise DataError(f"{len(given)} {what} for {count} values: give one each, or none: {', '.join(given)}.")

    @property
    def size(self) -> int:
        """How many numbers one element is written with: 1 for a choice."""
        return 1 if self.kind == "discrete" else len(self.low)


@dataclass(frozen=True, slots=True, eq=False)
class Parsed:
    """What a completion says: the action, or why there is none."""

    value: Action | None
    """Inside the space: numbers beyond its bounds are clipped. None if the text is not an action."""
    problem: str = ""
    """What is wrong with the text, in words; empty where `value` is not None."""
    extra: int = 0
    """Characters around the action: after the closing tag, and before an opening tag that was said again."""
    clipped: bool = False
    """Some number was out of range."""


_Side: TypeAlias = tuple[str, Space, Style, tuple[Range, ...]]
"""Of the observation or the action: what it is called, its space, how it is written, the ranges of bins."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How the observations and actions of one environment are written.

    Styles: `float` writes numbers with `decimals` digits after the point; `bins` writes whole numbers from 0 to `bins`,
    round(bins·(x − lo)/(hi − lo)); `index` and `name` write a choice by its number or its name. Boxes take the first
    two, choices the last two. Values are separated by ", " everywhere.
    Raises ConfigError where a style does not fit its space, or bins have no finite range.
    """

    observation: Space
    action: Space
    observation_style: Style = "float"
    action_style: Style = "float"
    decimals: int = 5
    bins: int = 999
    observation_ranges: tuple[Range, ...] = ()
    """Lowest and highest value of each bin axis; empty takes the bounds of the space."""
    action_ranges: tuple[Range, ...] = ()
    plant: str = ""
    """What is controlled, in a sentence or two; the instruction begins with it."""
    instruction: str | None = None
    """In place of the instruction that is made from all of this; an empty text leaves it out."""

    def __post_init__(self) -> None:
        if self.decimals < 0 or self.bins < 1:
            raise ConfigError(
                f"decimals = {self.decimals}, bins = {self.bins}: digits are counted from 0, and one bin makes two "
                "numbers. Give decimals of 0 or more and bins of 1 or more."
            )
        for what, space, style, ranges in self._sides():
            _check_style(what, space, style, ranges)

    def encode_observation(self, observation: Any) -> str:
        """`<observation>v1, v2, …</observation>`. DataError for a wrong count, NaN or an infinite value."""
        _, space, style, ranges = self._sides()[0]
        return OBSERVATION + self._encode("observation", observation, space, style, ranges) + OBSERVATION_END

    def decode_observation(self, text: str) -> Vector:
        """The last observation that is written in a text, to within one quantum. DataError if there is none."""
        _, opening, rest = text.rpartition(OBSERVATION)
        values, closing, _ = rest.partition(OBSERVATION_END)
        if not opening or not closing:
            raise DataError(f"no {OBSERVATION}…{OBSERVATION_END} in {_short(text)}.")
        _, space, style, ranges = self._sides()[0]
        parsed = self._decode(values, space, style, ranges)
        if parsed.value is None:
            raise DataError(f"{_short(values)} is not an observation: {parsed.problem}.")
        return np.atleast_1d(np.asarray(parsed.value, dtype=np.float32))

    def encode_action(self, action: Any) -> str:
        """The text between the action tags. DataError for a wrong count, NaN or an infinite value."""
        _, space, style, ranges = self._sides()[1]
        return self._encode("action", action, space, style, ranges)

    def completion(self, action: Any) -> str:
        """What is said after `prompt`: the action and its closing tag."""
        return self.encode_action(action) + ACTION_END

    def decode_action(self, completion: str) -> Parsed:
        """The action that a completion says, up to its first closing tag; any text is accepted.

        The prompt has the opening tag already. A completion that says it again (a chat API that cannot continue a
        message) is read from there.
        """
        inside, closing, after = completion.partition(ACTION_END)
        before, _, values = inside.rpartition(ACTION)
        if not closing:
            return Parsed(None, f"it does not end with {ACTION_END}")
        _, space, style, ranges = self._sides()[1]
        parsed = self._decode(values, space, style, ranges)
        return Parsed(parsed.value, parsed.problem, len(before) + len(after), parsed.clipped)

    def prompt(
        self, observation: Any, *, system: str = "", examples: Sequence[tuple[Any, Any]] = (), goal: str = ""
    ) -> list[Message]:
        """What a model is asked: the instruction, examples (observation, action), a goal if there is one, and the
        observation; then the assistant's message, begun with the opening tag and to be continued with `completion`.
        """
        shown = [self.encode_observation(seen) + "\n" + ACTION + self.completion(done) for seen, done in examples]
        parts = [
            self.instructions(),
            "\n".join(["Examples:", *shown]) if shown else "",
            f"Goal: {goal}" if goal else "",
            self.encode_observation(observation),
        ]
        messages = [Message(role="system", content=system)] if system else []
        return [
            *messages,
            Message(role="user", content="\n\n".join(part for part in parts if part)),
            Message(role="assistant", content=ACTION),
        ]

    def instructions(self) -> str:
        """What is controlled, what the observation's values mean and in which order, how to answer."""
        if self.instruction is not None:
            return self.instruction
        seen = f"The observation is {self._described(*self._sides()[0])}, between {OBSERVATION} and {OBSERVATION_END}."
        done = f"The action is {self._described(*self._sides()[1])}."
        asked = f"Answer with the action between {ACTION} and {ACTION_END} and nothing else."
        return "\n".join(part for part in (self.plant, seen, done, asked) if part)

    def default_action(self) -> Action:
        """The first choice; of a box, 0 where it is inside and else the nearest bound."""
        if self.action.kind == "discrete":
            return self.action.start
        return _clip(np.zeros(self.action.size), self.action)[0]

    def to_json(self) -> dict[str, Any]:
        """Everything needed to make the same codec again, as JSON types (infinite bounds as texts)."""
        found: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        for side in ("observation", "action"):
            space = getattr(self, side)
            found[side] = {item.name: _plain(getattr(space, item.name)) for item in fields(space)}
        return {key: _plain(value) for key, value in found.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Codec:
        """The codec that `to_json` described. DataError for anything else."""
        known = {item.name for item in fields(cls)}
        if wrong := [key for key in data if key not in known]:
            raise DataError(f"a codec has no '{wrong[0]}'.{did_you_mean(wrong[0], known)} It has {', '.join(known)}.")
        try:
            made = dict(data)
            for side in ("observation", "action"):
                made[side] = _space_from(data[side])
                made[f"{side}_ranges"] = tuple((float(lo), float(hi)) for lo, hi in data.get(f"{side}_ranges", ()))
            return cls(**made)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a codec: {type(error).__name__}: {error}. Make the file again.") from error

    def _sides(self) -> tuple[_Side, _Side]:
        return (
            ("observation", self.observation, self.observation_style, self.observation_ranges),
            ("action", self.action, self.action_style, self.action_ranges),
        )

    def _encode(self, what: str, value: Any, space: Space, style: Style, ranges: tuple[Range, ...]) -> str:
        numbers = np.asarray(value, dtype=np.float64).reshape(-1)
        if len(numbers) != space.size:
            raise DataError(f"{len(numbers)} numbers for an {what} of {space.size}: {numbers[:8].tolist()}.")
        if not np.isfinite(numbers).all():
            raise DataError(f"the {what} {numbers.tolist()} has a value that is not a finite number.")
        if space.kind == "discrete":
            return _choice_text(what, float(numbers[0]), space, style)
        if style == "bins":
            lo, width = _axes(space, ranges)
            shares = np.divide(numbers - lo, width, out=np.zeros_like(numbers), where=width > 0)
            return SEPARATOR.join(str(round(self.bins * share)) for share in np.clip(shares, 0, 1).tolist())
        return SEPARATOR.join(_decimal(number, self.decimals) for number in numbers.tolist())

    def _decode(self, text: str, space: Space, style: Style, ranges: tuple[Range, ...]) -> Parsed:
        """What stands between two tags, in a style. The value is inside the space."""
        words = [word.strip() for word in text.split(",")]
        if style == "name":
            return _named(text.strip(), space)
        if len(words) != space.size:
            return Parsed(None, f"{len(words)} {'value' if len(words) == 1 else 'values'} where {space.size} belong")
        pattern, kind = (_NUMBER, "a number") if style == "float" else (_WHOLE, "a whole number")
        for word in words:
            if _endless(word):
                return Parsed(None, f"{_short(word)} is not finite")
            if not pattern.fullmatch(word):
                return Parsed(None, f"{_short(word)} is not {kind}")
        numbers = np.array([float(word) for word in words])
        if space.kind == "discrete":
            return _numbered(int(words[0]), space)
        if style == "float":
            value, beyond = _clip(numbers, space)
            return Parsed(value, clipped=beyond)
        lo, width = _axes(space, ranges)
        value, beyond = _clip(lo + np.clip(numbers, 0, self.bins) / self.bins * width, space)
        return Parsed(value, clipped=beyond or bool(((numbers < 0) | (numbers > self.bins)).any()))

    def _described(self, what: str, space: Space, style: Style, ranges: tuple[Range, ...]) -> str:
        """What the values are, in words: "2 numbers: position (m), velocity (m/s)", "one of 0 (left), 1 (right)"."""
        if space.kind == "discrete":
            numbers = [str(space.start + index) for index in range(space.n)]
            if style == "name":
                return "one of " + SEPARATOR.join(space.names)
            if not space.names:
                return f"a whole number from {numbers[0]} to {numbers[-1]}"
            return "one of " + SEPARATOR.join(f"{a} ({b})" for a, b in zip(numbers, space.names, strict=True))
        count = "number" if space.size == 1 else "numbers"
        ends: Sequence[Range] = tuple(zip(space.low, space.high, strict=True))
        if style == "bins":
            lo, width = _axes(space, ranges)
            count = f"whole {count} from 0 to {self.bins}"
            ends = tuple(zip(lo.tolist(), (lo + width).tolist(), strict=True))
        count = f"{'a' if space.size == 1 else space.size} {count}"
        axes = [_axis(space, index, end) for index, end in enumerate(ends)]
        if space.size == 1:
            return f"{count}: {axes[0]}" if axes[0] else count
        if len(set(axes)) == 1:
            return f"{count}, each {axes[0]}" if axes[0] else count
        return f"{count}, in this order: " + SEPARATOR.join(axis or "any number" for axis in axes)


def measured_ranges(values: Any, *, outside: float = 0.0) -> tuple[Range, ...]:
    """Ranges for bins from data (rows of vectors): per column its extremes, or the quantiles with `outside` beyond
    each of them. A column that never changes gets a range of one around it."""
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2 or not len(rows) or not np.isfinite(rows).all():
        raise DataError(f"ranges are measured on rows of finite numbers, and these have the shape {rows.shape}.")
    lo, hi = np.quantile(rows, [outside, 1 - outside], axis=0)
    flat = hi <= lo
    return tuple(zip((lo - flat / 2).tolist(), (hi + flat / 2).tolist(), strict=True))


def _check_style(what: str, space: Space, style: str, ranges: tuple[Range, ...]) -> None:
    setting = f"{what}_style"
    fits = ("float", "bins") if space.kind == "box" else ("index", "name")
    if style not in fits:
        why = "numbers are written as" if space.kind == "box" else "choices are written by"
        raise ConfigError(f"{setting} = {style!r}: {why} '{fits[0]}' or '{fits[1]}'.{did_you_mean(style, fits)}")
    if style == "name" and len({name.casefold() for name in space.names}) != space.n:
        raise ConfigError(
            f"{setting} = 'name': the {what} has no names of its own for its {space.n} choices. Use 'index'."
        )
    if style != "bins":
        return
    if ranges and (len(ranges) != space.size or not all(math.isfinite(lo) and lo < hi < math.inf for lo, hi in ranges)):
        raise ConfigError(
            f"{what}_ranges = {ranges}: bins need a finite lowest and a higher highest value for each of the "
            f"{space.size} values. Give that many pairs."
        )
    endless = [index for index, ends in enumerate(zip(space.low, space.high, strict=True)) if not _bounded(*ends)]
    if endless and not ranges:
        raise ConfigError(
            f"{setting} = 'bins': value {endless[0]} of the {what} has no bounds. Give {what}_ranges, a lowest and a "
            "highest value for each (quantiles of data will do), or use 'float'."
        )


def _bounded(lo: float, hi: float) -> bool:
    """Bounds as large as a float can be are none."""
    return hi - lo < 1e30


def _axes(space: Space, ranges: tuple[Range, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where each bin axis begins and how long it is."""
    lo, hi = np.array(ranges or tuple(zip(space.low, space.high, strict=True)), dtype=np.float64).T
    return lo, hi - lo


def _clip(numbers: NDArray[np.float64], space: Space) -> tuple[Vector, bool]:
    """The nearest vector inside a box, and whether it is another one."""
    largest = float(np.finfo(np.float32).max)
    inside = np.clip(numbers, np.maximum(space.low, -largest), np.minimum(space.high, largest))
    return inside.astype(np.float32), bool((inside != numbers).any())


def _decimal(number: float, decimals: int) -> str:
    text = f"{number:.{decimals}f}"
    return text if float(text) else f"{0:.{decimals}f}"  # there is no minus zero


def _choice_text(what: str, number: float, space: Space, style: Style) -> str:
    index = int(number) - space.start
    if number != int(number) or not 0 <= index < space.n:
        raise DataError(f"{number:g} is no choice of the {what}: {space.start} to {space.start + space.n - 1}.")
    return space.names[index] if style == "name" else str(int(number))


def _named(text: str, space: Space) -> Parsed:
    found = [index for index, name in enumerate(space.names) if name.casefold() == text.casefold()]
    if not found:
        return Parsed(None, f"{_short(text)} is none of {SEPARATOR.join(space.names)}")
    return Parsed(space.start + found[0])


def _numbered(number: int, space: Space) -> Parsed:
    if not 0 <= number - space.start < space.n:
        return Parsed(None, f"{_short(str(number))} is none of {space.start} to {space.start + space.n - 1}")
    return Parsed(number)


def _endless(word: str) -> bool:
    """Whether a word says NaN or infinity, or is a number too large to be one."""
    if _NUMBER.fullmatch(word):
        return not math.isfinite(float(word))
    return word.lstrip("+-").lower() in ("nan", "inf", "infinity")


def _axis(space: Space, index: int, ends: Range) -> str:
    name = space.names[index] if space.names else ""
    unit = space.units[index] if space.units else ""
    span = f"{ends[0] + 0.0:.6g} to {ends[1] + 0.0:.6g}" if _bounded(*ends) else ""
    inside = " ".join(part for part in (span, unit) if part)
    if not name:
        return f"from {inside}" if span else inside
    return f"{name} ({inside})" if inside else name


def _plain(value: Any) -> Any:
    """JSON types; an infinite number is a text, which JSON has no number for."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _space_from(data: Mapping[str, Any]) -> Space:
    made: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    made["low"], made["high"] = (tuple(float(x) for x in data[side]) for side in ("low", "high"))
    return Space(**made)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
