"""Runs as the rows of a table: what is said of each, which of them are meant, in which order; and files of such rows.

Runs in, rows out; what a condition names is looked up among what is listed, the metrics and the settings.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echelon.errors import CheckpointError, ConfigError, did_you_mean
from echelon.view import health
from echelon.view.compare import best, early, late
from echelon.view.episodes import short
from echelon.view.runs import Row, Run

COLUMNS = (
    *("run", "recipe", "version", "state", "steps", "planned", "episodes", "seconds"),
    *("outcome", "first", "last", "best", "path"),
)
CONDITION = re.compile(r"\s*([^<>=!]+?)\s*(<=|>=|!=|<|>|==?)\s*(.*?)\s*")


def listed(run: Run, metrics: Sequence[str] = ()) -> Row:
    """What a table says of a run. `first` and `last` are means over the first and the last fifth of the steps of what
    it is for, `best` is of one step; of an evaluation, `last` is its mean. More metrics are as they are at last."""
    name = health.outcome_of(run.metrics)
    tested = run.evaluations.get("", {}).get("estimates", {})
    outcome = name or next((one for one in ("return", "accuracy") if isinstance(tested.get(one), dict)), "")
    ends: list[float | None] = [early(run, name), late(run, name), best(run, name)]
    if not name and outcome:
        ends[1] = tested[outcome].get("mean")
    return {
        "run": run.name,
        "recipe": run.recipe,
        "version": run.version,
        "state": run.state,
        "steps": run.done or None,
        "planned": run.planned,
        "episodes": run.per_step * len(run.metrics.steps) if run.per_step else None,
        "seconds": max(run.metrics.finite("seconds"), default=None),
        "outcome": outcome,
        **{key: short(value, 6) for key, value in zip(("first", "last", "best"), ends, strict=True)},
        "path": str(run.path),
        **{metric: short(late(run, metric), 6) for metric in metrics},
    }


@dataclass(frozen=True, slots=True)
class Condition:
    """What a run must be: a column, a metric or a setting compared with a value. A run that lacks it is not meant.

    What is called as a column is the column; of a metric and a setting of one name it is the metric, if there is one.
    """

    name: str
    sign: str
    value: str

    def holds(self, run: Run, row: Mapping[str, Any]) -> bool:
        """Whether the run is so. Numbers are compared as numbers, everything else as text; a list is equal to each of
        its entries, and to all of them with commas between them."""
        found = row[self.name] if self.name in row else late(run, self.name)
        if found is None and self.name not in COLUMNS:
            found = run.settings.get(self.name)
        if isinstance(found, list | tuple):
            return self._holds_of_list(found)
        return found is not None and self._holds_of(found)

    def _holds_of_list(self, found: Sequence[Any]) -> bool:
        if self.sign in ("<", ">", "<=", ">="):
            return False
        same = Condition(self.name, "=", self.value)
        whole = ",".join(part.strip() for part in self.value.split(","))
        there = any(same._holds_of(one) for one in found) or ",".join(map(str, found)) == whole
        return there == (self.sign != "!=")

    def _holds_of(self, found: object) -> bool:
        try:
            mine, theirs = float(found), float(self.value)  # type: ignore[arg-type]  # what is no number is text
        except (TypeError, ValueError):
            said = str(found).lower() if isinstance(found, bool) else str(found)
            return (said == self.value) == (self.sign != "!=")
        return {
            "<": mine < theirs,
            ">": mine > theirs,
            "<=": mine <= theirs,
            ">=": mine >= theirs,
            "!=": mine != theirs,
        }.get(self.sign, mine == theirs)


def parse_condition(text: str, runs: Sequence[Run]) -> Condition:
    """A condition such as `reward/mean>0.5` or `env=maze`. Raises ConfigError for what is none, for a name that no run
    has, and for an order of what is no number."""
    match = CONDITION.fullmatch(text)
    if match is None or not match[3]:
        raise ConfigError(f"where = {text}: it compares nothing. Give NAME>NUMBER or NAME=VALUE, in quotes.")
    name, sign, value = match.groups()
    known = [*COLUMNS, *{one for run in runs for one in (*run.metrics.columns, *run.settings)}]
    if name not in known:
        raise ConfigError(f"where = {text}: no run has a metric or setting of that name.{did_you_mean(name, known)}")
    if sign in ("<", ">", "<=", ">="):
        try:
            float(value)
        except ValueError as error:
            raise ConfigError(f"where = {text}: {value!r} is no number. Compare text with = or !=.") from error
    return Condition(name, sign, value)


def order(rows: Sequence[Row], name: str, *, reverse: bool) -> list[Row]:
    """Rows by a column, those without a value last."""

    def key(row: Row) -> tuple[int, Any]:
        value = row[name]
        return (0, value) if isinstance(value, int | float) else (1, str(value))

    there = [row for row in rows if row[name] not in (None, "")]
    return sorted(there, key=key, reverse=reverse) + [row for row in rows if row[name] in (None, "")]


def to_json(value: object) -> str:
    """JSON for a program."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write rows, or replace a file with the same columns. Raises CheckpointError where another file is, or none can
    be written."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    scratch = path.parent / f".{path.name}.tmp"  # "." and "/", which have no name, are folders: that is told below
    try:
        if path.exists() and path.read_bytes().partition(b",")[0].strip() != columns[0].encode():
            raise CheckpointError(f"{path}: there is a file that is no such table, and it stays. Choose another --csv.")
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text.getvalue(), encoding="utf-8", errors="replace")
        os.replace(scratch, path)
    except OSError as error:
        with suppress(OSError):  # where nothing can be written nothing is left behind
            scratch.unlink()
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}). Choose another --csv.") from error
