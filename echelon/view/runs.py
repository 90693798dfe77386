"""What a run directory says: settings, curves, evaluations, and notes on whatever could not be read.

Reads files and nothing else: no models, no environments, no opinion on what the numbers mean (`health`). What is broken
or half-written becomes a note on the run; only a place where there is no run at all is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from echelon.errors import DataError

MOST_RUNS = 200
LOCKS = Path("/proc/locks")
DEEPEST = 5
"""How far below a folder that is no run itself its runs may lie."""
MARKS = ("metrics.jsonl", "episodes.jsonl", "checkpoints")
"""Any of these makes a folder a run; so does a summary of an evaluation."""
INSIDE = {"checkpoints", "best", "trackers", "wandb", "tensorboard", "mlruns", "evaluation"}
"""Folders of a run in which no other runs are looked for."""

RECIPES = {
    "archer": "actor_updates",
    "control": "plan_every",
    "control-mlp": "envs",
    "control-reward": "width",
    "dpo": "reference_free",
    "feedback": "best_response",
    "grpo": "kl_in",
    "ppo": "ema_decay",
    "rank": "min_spread",
    "responder": "replies_per_state",
    "reward": "center",
    "sft": "packing",
    "strategist": "shift",
    "tosca": "epsilon_final",
}
"""Recipe → a setting that it alone has: runs without a run.json do not name theirs."""

Row = dict[str, Any]
State = Literal["training", "finished", "stopped", "evaluated", "unknown"]
"""Whether a process writes to it now, it has taken all its steps or was ended by its recipe, or neither; or nothing was
trained there. Of a run that says neither its steps nor its end nothing is known."""


@dataclass(slots=True)
class Metrics:
    """The rows of metrics.jsonl as columns: one number per step, None where a row has none or none that is finite."""

    steps: list[int] = field(default_factory=list)
    columns: dict[str, list[float | None]] = field(default_factory=dict)
    absent: dict[str, set[int]] = field(default_factory=dict)
    """Name → places of the steps whose rows do not have it; only of names that some row lacks."""

    def __getitem__(self, name: str) -> list[float | None]:
        return self.columns.get(name, [])

    def finite(self, name: str) -> list[float]:
        """The numbers there are, in the order of the steps."""
        return [value for value in self[name] if value is not None]

    def recorded(self, name: str) -> list[float | None]:
        """The column without the steps whose rows do not have it; what is not finite stays None."""
        lacking = self.absent.get(name, ())
        return [value for place, value in enumerate(self[name]) if place not in lacking]


@dataclass(slots=True)
class Run:
    """One run directory, or one directory of an evaluation."""

    path: Path
    name: str = ""
    recipe: str = ""
    version: str = ""
    """Of this package, when the run began or was last resumed; empty where the files do not say it."""
    planned: int | None = None
    """Steps that are to be taken."""
    state: State = "unknown"
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted name → value."""
    metrics: Metrics = field(default_factory=Metrics)
    evaluations: dict[str, Row] = field(default_factory=dict)
    """Name → its summary.json, which has `estimates`."""
    notes: list[str] = field(default_factory=list)

    @property
    def episodes_file(self) -> Path:
        """What was said."""
        return self.path / "episodes.jsonl"

    @property
    def done(self) -> int:
        """Steps that are recorded."""
        return self.metrics.steps[-1] + 1 if self.metrics.steps else 0

    @property
    def per_step(self) -> int | None:
        """Episodes that a step plays, as far as the settings say; None where it learns from what is recorded."""
        here = self.settings
        if here.get("offline"):
            return None
        if "episodes_per_step" in here:
            return whole(here["episodes_per_step"])
        tasks, siblings = whole(here.get("tasks_per_step")), whole(here.get("group_size", 1))
        return tasks * siblings if tasks and siblings else None


def find_runs(given: Sequence[str], *, most: int = MOST_RUNS) -> tuple[list[Path], list[str]]:
    """The run directories that are meant: those given, and those below a folder that is none itself; and a line on
    each place where there is none.

    Raises DataError where there is none at all, and for more than can be shown.
    """
    found: dict[Path, Path] = {}
    missed: list[str] = []
    for word in given:
        folder = Path(word)
        below = [folder] if is_run(folder) else list(_below(folder, DEEPEST))
        found |= {path.resolve(): path for path in below}
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            missed.append(f"{word}: {what}, and a run is a folder. Give what was --out of a recipe.")
        elif not below:
            missed.append(
                f"{word}: no run is there or below: no metrics.jsonl, episodes.jsonl, checkpoints or summary.json with "
                "estimates. Give what was --out of a recipe, or make a first one: echelon quickstart."
            )
    if not found:
        raise DataError(" ".join(missed))
    if len(found) > most:
        raise DataError(f"{len(found)} runs: {most} can be shown at once. Name fewer.")
    return list(found.values()), missed


def open_runs(given: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Those runs as they are read, each with a name that tells it apart, and the lines on places without one."""
    paths, missed = find_runs(given)
    runs = [read_run(path) for path in paths]
    for run, name in zip(runs, short_names(paths), strict=True):
        run.name = name
    return runs, missed


def refuse(missed: Sequence[str]) -> None:
    """Raise DataError for places that held no run, once the others are shown."""
    if missed:
        raise DataError(" ".join(missed))


def is_run(folder: Path) -> bool:
    """Whether a recipe that trains or evaluates has written here."""
    return any((folder / mark).exists() for mark in MARKS) or bool(_summary(folder))


def _below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return
    for path in inner:
        if is_run(path):
            yield path
        elif depth > 1 and path.name not in INSIDE:
            yield from _below(path, depth - 1)


def read_run(path: Path) -> Run:
    """All of a run but its episodes, which are read by `episodes`."""
    run = Run(path)
    run.settings, named = _settings(path, run.notes)
    run.metrics = read_metrics(path / "metrics.jsonl", run.notes)
    about = _about(path)
    run.recipe = about.get("recipe") or named or recipe_of(run.settings)
    run.version = about.get("version", "")
    run.planned = whole(about.get("steps")) or whole(run.settings.get("steps"))
    if own := _summary(path):
        run.evaluations[""] = own
    for folder in sorted((path / "evaluation").glob("*/")) if (path / "evaluation").is_dir() else ():
        if found := _summary(folder):
            run.evaluations[folder.name] = found
    run.state = _state(run, ended=about.get("ended") is True)
    _tell_progress(run)
    return run


def _about(path: Path) -> Row:
    """What run.json or the summary of an evaluation says of who wrote it; nothing where it cannot be read."""
    for name in ("run.json", "summary.json"):
        try:
            found = json.loads((path / name).read_text(encoding="utf-8", errors="replace"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            said = {key: found[key] for key in ("recipe", "version") if isinstance(found.get(key), str)}
            return said | {key: found[key] for key in ("steps", "ended") if key in found}
    return {}


def _state(run: Run, *, ended: bool) -> State:
    if not run.metrics.steps and run.evaluations and not (run.path / "metrics.jsonl").exists():
        return "evaluated"
    if _locked(run.path / ".lock"):
        return "training"
    if ended or (run.planned and run.done >= run.planned):
        return "finished"
    return "stopped" if run.planned else "unknown"


def _locked(path: Path) -> bool:
    """Whether a process on this machine holds the lock of a run. Looks into the table of locks rather than trying the
    lock, which could keep a run from beginning; where there is no such table, nobody is said to hold it."""
    try:
        inode = path.stat().st_ino
        return any(line.split()[1:2] == ["FLOCK"] and f":{inode} " in line for line in LOCKS.read_text().splitlines())
    except OSError:
        return False


def _tell_progress(run: Run) -> None:
    if not run.done and not run.evaluations:
        run.notes.append("No step is recorded yet: the curves begin with the first row of metrics.jsonl.")
    elif run.planned and 0 < run.done < run.planned and run.state != "finished":
        what = (
            "it is being trained"
            if run.state == "training"
            else "it was interrupted, or is being trained on another machine"
        )
        run.notes.append(f"{run.done} of {run.planned} steps are recorded: {what}.")


def recipe_of(settings: Mapping[str, Any]) -> str:
    """The recipe whose settings these are, by the one that it alone has; empty if it is none that is known."""
    return next((name for name, key in RECIPES.items() if key in settings), "")


def read_metrics(path: Path, notes: list[str]) -> Metrics:
    """The curves of a run. A step that was taken twice counts as it was taken last."""
    by_step: dict[int, Row] = {}
    for _, row in rows(path, notes):
        if isinstance(row.get("step"), int):
            by_step[row["step"]] = row
    metrics = Metrics(sorted(by_step))
    names = dict.fromkeys(name for row in by_step.values() for name in row if name != "step")
    broken: dict[str, int] = {}
    for name in names:
        metrics.columns[name] = column = [number(by_step[step].get(name)) for step in metrics.steps]
        absent = {place for place, step in enumerate(metrics.steps) if name not in by_step[step]}
        metrics.absent |= {name: absent} if absent else {}
        gaps = column.count(None) - len(absent)
        broken |= {name: gaps} if gaps else {}
    if broken:
        listed = ", ".join(f"{name} in {count} of {len(by_step)} steps" for name, count in list(broken.items())[:5])
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        notes.append(f"Not finite, so left out of its curve: {listed}{more}.")
    return metrics


def rows(path: Path, notes: list[str]) -> Iterator[tuple[int, Row]]:
    """(offset, row) of every whole row of a JSONL file; what is none is counted in one note at the end."""
    if not path.is_file():
        return
    unreadable, half, garbled, offset = 0, False, 0, 0
    try:
        with path.open("rb") as file:
            for line in file:
                row, clean = parse(line)
                garbled += not clean
                if row is not None:
                    yield offset, row
                elif line.strip():
                    half = not line.endswith(b"\n")
                    unreadable += not half
                offset += len(line)
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}.")
    if half:
        notes.append(f"The last line of {path.name} is only half written, and left out.")
    if unreadable:
        notes.append(f"{path.name}: {unreadable} lines cannot be read, and are left out.")
    if garbled:
        notes.append(f"{path.name}: {garbled} lines are not valid UTF-8; what is wrong in them is shown as \ufffd.")


def parse(line: bytes) -> tuple[Row | None, bool]:
    """A row of JSONL, None if the line is none, and whether its characters were all right."""
    clean = True
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        text, clean = line.decode("utf-8", errors="replace"), False
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None, clean
    return (row, clean) if isinstance(row, dict) else (None, clean)


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def whole(value: object) -> int | None:
    """A positive whole number, or None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _settings(path: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    """The settings of a run, of its newest checkpoint that has them, or of an evaluation; and which recipe it was, if
    that is certain."""
    files = sorted(path.glob("checkpoints/step_*/config.yaml"), key=lambda file: (len(file.parent.name), file))
    for file in reversed(files):
        try:
            return flat(dict(yaml.safe_load(file.read_text(encoding="utf-8")))), ""
        except (OSError, ValueError, TypeError, yaml.YAMLError):
            notes.append(f"{file.relative_to(path)} cannot be read.")
    config = (_summary(path) or {}).get("config")
    if isinstance(config, Mapping):
        return flat(config), "evaluate"
    if (path / "metrics.jsonl").exists():
        notes.append("No checkpoint with a config.yaml, so its settings are not known.")
    return {}, ""


def _summary(folder: Path) -> Row | None:
    """The summary of an evaluation, if there is one and it has estimates."""
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("estimates"), dict) else None


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names that tell runs apart: their paths without what all of them begin and end with."""
    parts = [path.resolve().parts for path in paths]
    if len(parts) == 1:
        return [parts[0][-1]]
    while len({row[0] for row in parts}) == 1 and all(len(row) > 1 for row in parts):
        parts = [row[1:] for row in parts]
    while len({row[-1] for row in parts}) == 1 and all(len(row) > 1 for row in parts):
        parts = [row[:-1] for row in parts]
    return ["/".join(row) for row in parts]


def seedless(name: str) -> str:
    """The name of a run without what says which seed it is: `archer/seed_3` is `archer`; of `seed_3` alone, `seeds`."""
    return re.sub(r"[/_.-]*\b(seed|s)[_-]?\d+\b|[/_.-]+\d+$", "", name).lstrip("/") or "seeds"
