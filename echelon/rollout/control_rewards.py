"""What an action text is worth beside recorded control: that it can be read, that it is the expert's, what a network
makes of it.

It reads the completion with the codec that lies beside the data, and the numbers in the columns of its row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from echelon.data.control import CODEC, read_codec
from echelon.errors import ConfigError, DataError
from echelon.models.reward_mlp import RewardMLP
from echelon.rollout.verifiers import Answer
from echelon.text.codec import Action, Codec, Parsed

Control = Literal["format", "imitation", "imitation_discrete"]

UNREAD = -10.0
"""What a text earns that says no action: less than any action does."""


class ActionJudge:
    """The rewards of single actions beside those of a data set; `counts` has the share that said none.

    `format`: 1 for an action and its closing tag alone, a tenth less than 0 for each character around them (9 at most).
    `imitation`: minus the mean square of the distance to the row's action, in units of half the range of each value.
    `imitation_discrete`: 0 for the row's action as it is written, −1 for another. A text without an action: −10.
    """

    def __init__(self, kind: Control, codec: Codec) -> None:
        self.kind, self.codec = kind, codec
        self.counts: dict[str, float] = {}
        if kind == "imitation" and codec.action.kind == "discrete":
            raise ConfigError(
                "reward imitation: it measures how far an action is from the recorded one, and the actions of this "
                "data are choices. Give imitation_discrete."
            )

    async def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        """What each answer is worth."""
        parsed = [self.codec.decode_action(answer.completion) for answer in answers]
        self.counts = {"unparsed": sum(said.value is None for said in parsed) / max(1, len(parsed))}
        return [self._worth(*pair) for pair in zip(parsed, answers, strict=True)]

    def _worth(self, said: Parsed, answer: Answer) -> float:
        if said.value is None:
            return UNREAD
        if self.kind == "format":
            return 1.0 if not said.extra else -min(said.extra, 90) / 10
        right = recorded_action(answer.columns, self.codec, f"task '{answer.task}'", f"reward {self.kind}")
        if self.kind == "imitation_discrete":
            return -float(self.codec.encode_action(said.value) != self.codec.encode_action(right))
        distance = (np.asarray(said.value) - np.asarray(right)) / _half_ranges(self.codec)
        return -float(np.mean(distance**2))


class RewardMLPJudge:
    """The reward that a network trained by `control-reward` gives the action of a completion in the state of its row.

    A text that says no action gets the deviation of the data's rewards less than the lowest of them.
    """

    def __init__(self, path: str, module: RewardMLP, codec: Codec | None = None) -> None:
        self.name, self.module, self.codec = path, module, codec or _own_codec(path, module)
        self.counts: dict[str, float] = {}
        self._unread = float(module.lowest - module.reward_std[0])
        own, shape = module.settings, self.codec.action
        here = {"observations": self.codec.observation.size, "actions": shape.size, "choices": shape.n}
        if wrong := [name for name, value in here.items() if own[name] != value]:
            raise DataError(
                f"reward {path}: it was trained on {own[wrong[0]]} {wrong[0]}, and the data has {here[wrong[0]]}. "
                "Train one on data of this environment with control-reward."
            )

    async def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        """What each answer is worth."""
        parsed = [self.codec.decode_action(answer.completion) for answer in answers]
        self.counts = {"unparsed": sum(said.value is None for said in parsed) / max(1, len(parsed))}
        read = [place for place, said in enumerate(parsed) if said.value is not None]
        worth: list[float | None] = [self._unread] * len(answers)
        if not read:
            return worth
        size = self.codec.observation.size
        seen = [_numbers(answers[place].columns, "observation", size, answers[place].task, self.name) for place in read]
        done = np.stack([np.asarray(parsed[place].value, np.float32) for place in read])
        scores = self.module.score(torch.from_numpy(np.stack(seen)), torch.from_numpy(done))
        for place, score in zip(read, scores.tolist(), strict=True):
            worth[place] = score
        return worth


def codec_beside(paths: Sequence[str]) -> Codec | None:
    """The codec of the data that these paths name, None where there is none. Raises DataError where they differ."""
    found = {path: codec for path in paths if (codec := read_codec(Path(path).expanduser())) is not None}
    if not found:
        return None
    first, *others = found
    for other in others:
        if found[other] != found[first]:
            raise DataError(
                f"data.path: {first} and {other} are written with different codecs, and one of them reads all "
                "completions. Make both with the same settings of control-data."
            )
    return found[first]


def need_codec(kind: str, codec: Codec | None) -> Codec:
    """Raise ConfigError where nothing says how actions are written."""
    if codec is None:
        raise ConfigError(
            f"reward {kind}: it reads actions, and nothing says how they are written: there is no {CODEC} beside "
            "data.path. Give the train.jsonl of a folder made by echelon control-data."
        )
    return codec


def recorded_action(columns: Mapping[str, Any], codec: Codec, where: str, who: str) -> Action:
    """The action of a row, as the codec has it. Raises DataError, naming the row, for what it could not write."""
    value = columns.get("action")
    try:
        codec.encode_action(value if value is not None else ())
    except (DataError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: {who}: the column 'action' is {str(value)[:60]}, not an action ({str(error)[:120]}). Make the "
            "rows with echelon control-data."
        ) from error
    assert value is not None
    return int(np.asarray(value).reshape(())) if codec.action.kind == "discrete" else np.asarray(value, np.float32)


def _half_ranges(codec: Codec) -> NDArray[np.float64]:
    """Half of what each value of the action spans; 1 where there is no bound, or none to speak of."""
    low, high = np.array(codec.action.low), np.array(codec.action.high)
    half = (high - low) / 2
    return np.where(np.isfinite(half) & (half > 0) & (half < 1e30), half, 1.0)


def _own_codec(path: str, module: RewardMLP) -> Codec:
    if not module.codec:
        raise DataError(
            f"reward {path}: it has no codec, and none lies beside data.path. Train it with control-reward."
        )
    return Codec.from_json(module.codec)


def _numbers(columns: Mapping[str, Any], name: str, size: int, task: str, path: str) -> NDArray[np.float32]:
    """A column of numbers. Raises DataError, naming the task, for anything else."""
    try:
        found = np.asarray(columns[name], np.float32).reshape(-1)
    except (KeyError, TypeError, ValueError):
        found = np.zeros(0, np.float32)
    if len(found) != size or not np.isfinite(found).all():
        raise DataError(
            f"reward {path}: the column '{name}' of task '{task}' is not {size} numbers. Give rows of control-data."
        )
    return found
