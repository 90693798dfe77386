"""Which settings hold when: a table of stages, entered at a step or when a number has stopped getting better.

Knows lines of text and one number per step; what the settings mean is known to whoever asks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from echelon.errors import ConfigError

_LINE = re.compile(r"(?:from (?P<step>\d+)|plateau (?P<plateau>\d+)): *(?P<words>.*)")


@dataclass(frozen=True, slots=True)
class Stage:
    """Settings that hold from some point on, until the next stage begins."""

    words: tuple[str, ...]
    """`name=value`, as on the command line."""
    step: int | None
    """The step it begins at; None if it begins at a plateau."""
    patience: int
    """Steps without a new best after which it begins."""


def parse_stages(lines: Sequence[str]) -> list[Stage]:
    """Stages from lines like `from 250: credit.first=1` or `plateau 30: credit.progress=1 coach.train=true`.

    Raises ConfigError for a line that is not like that, and for a table with a gap: it begins at step 0, steps rise.
    """
    stages: list[Stage] = []
    for number, line in enumerate(lines):
        found = _LINE.fullmatch(line.strip())
        words = tuple(found["words"].split()) if found else ()
        if found is None or not all("=" in word for word in words):
            raise ConfigError(
                f"stages: '{line}' cannot be read. Write 'from 250: credit.first=1 credit.progress=10', or 'plateau "
                "30: …' for a stage that begins after 30 steps without a better last attempt."
            )
        if not words:
            raise ConfigError(f"stages: '{line}' changes nothing. Say what holds from there on, or leave it out.")
        if found["plateau"] and int(found["plateau"]) == 0:
            raise ConfigError(
                f"stages: '{line}': the stage before it is over at once. Give a patience of 1 step or more."
            )
        step = int(found["step"]) if found["step"] else None
        if number == 0 and step != 0:
            raise ConfigError(
                f"stages: the first is '{line}', and nothing says what holds before. Begin with 'from 0:'."
            )
        earlier = max((stage.step for stage in stages if stage.step is not None), default=-1)
        if step is not None and step <= earlier:
            raise ConfigError(f"stages: '{line}' comes after one that begins at {earlier}. Let their steps rise.")
        if step is not None and any(stage.step is None for stage in stages):
            raise ConfigError(
                f"stages: '{line}' comes after a plateau, and nobody knows when that is reached. Put stages with steps "
                "first."
            )
        stages.append(Stage(words, step, int(found["plateau"] or 0)))
    return stages


def settings_so_far(table: Sequence[Stage]) -> list[list[str]]:
    """All settings that hold in each stage: those of earlier stages first, so that later ones win."""
    return [[word for stage in table[: number + 1] for word in stage.words] for number in range(len(table))]


class Stages:
    """Where a run stands in its table. What it has seen is saved, so that a resumed run stands there, too."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.table = parse_stages(lines)
        self.current = 0
        self._best = -math.inf
        self._waited = 0

    def reached(self, step: int) -> int:
        """The number of the stage that holds at this step, from 0; asked once before every step."""
        while self.current + 1 < len(self.table):
            ahead = self.table[self.current + 1]
            begun = self._waited >= ahead.patience if ahead.step is None else step >= ahead.step
            if not begun:
                break
            self.current, self._best, self._waited = self.current + 1, -math.inf, 0
        return self.current

    def at(self, step: int) -> int:
        """The number of the stage that will hold at a step to come, as far as that is known: of stages that wait for a
        plateau only those that have been reached."""
        begun = [place for place, stage in enumerate(self.table) if stage.step is not None and stage.step <= step]
        return max([self.current, *begun])

    def saw(self, number: float) -> None:
        """What this step reached: larger is better."""
        better = number > self._best
        self._best, self._waited = max(number, self._best), 0 if better else self._waited + 1

    def save(self, folder: Path) -> None:
        """Where it stands."""
        folder.mkdir(parents=True, exist_ok=True)
        best = None if self._best == -math.inf else self._best
        state = {"current": self.current, "best": best, "waited": self._waited}
        (folder / "stages.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Exactly where it stood."""
        state = json.loads((folder / "stages.json").read_text())
        self.current, self._waited = state["current"], state["waited"]
        self._best = -math.inf if state["best"] is None else state["best"]
