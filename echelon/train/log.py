"""What a run leaves to read: `metrics.jsonl`, `episodes.jsonl`, and a progress bar or plain lines while it goes on.

`run.json` says which recipe and version of this package wrote them.

Trackers that the settings ask for get the same rows.

Knows nothing of models or algorithms: names and numbers in, rows out. The clock enters the files only as `seconds`.
"""

from __future__ import annotations

import html
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from echelon import __version__
from echelon.config import LogConfig
from echelon.errors import CheckpointError
from echelon.text.endpoint import used
from echelon.train import clock
from echelon.train.trackers import Trackers
from echelon.types import Episode, Turn

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

HEADLINES = ("reward/mean", "eval/reward/mean", "accuracy", "loss")
SECONDS_BETWEEN_LINES = 10.0
LONGEST_TRANSCRIPT = 20_000
"""Characters of an episode that trackers get."""
BY_TOKEN = ("tokens", "ids", "logprobs", "advantages")
"""What a turn says of each of its tokens."""


class Log:
    """The two files of a run directory and what is shown on the console.

    `start` is the first step that this process takes. Rows of that step and later ones, left by a run that was killed,
    are cut together with a half-written last line, so the files of a resumed run equal those of an uninterrupted one
    except for `seconds`, which continues. Every row is flushed to the operating system when it is written.

    On a terminal there is a progress bar, elsewhere plain lines without control characters (the first step, the last
    one, and one every ten seconds); `quiet`, here or in `config`, shows neither. `headline` names the metrics to show;
    without it, three of the usual ones. The rate is that of this process, the time elapsed that of the run.
    `config` names trackers that get every row of metrics, with `settings` as the hyper-parameters of the run; see
    `Trackers` for how they continue, and what happens when one fails. With `settings` there is a run.json, too: the
    recipe that they are of, the version, how many steps are to be taken, and at the end that it has `ended`.
    Claim the run directory first (`Checkpoints`): the log itself refuses nothing. Of several ranks rank 0 logs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total: int,
        start: int = 0,
        name: str = "",
        quiet: bool = False,
        headline: Sequence[str] = (),
        console: Console | None = None,
        config: LogConfig = LogConfig(),
        settings: DataclassInstance | None = None,
    ) -> None:
        self._folder, metrics, episodes = folder, folder / "metrics.jsonl", folder / "episodes.jsonl"
        fresh, self._earlier = not metrics.exists(), 0.0
        if _writes():
            folder.mkdir(parents=True, exist_ok=True)
            self._earlier = _cut(metrics, start)
            _cut(episodes, start)
        else:
            metrics, episodes, config = Path(os.devnull), Path(os.devnull), LogConfig(quiet=True)
        self._metrics, self._episodes = _append_to(metrics), _append_to(episodes)
        self._began, self._used = time.monotonic(), used()
        self._start, self._total, self._headline = start, total, tuple(headline)
        self._by_token, self._tracked = config.tokens, bool(config.to)
        self._noted: set[str] = set()
        # Not what rich thinks of a pipe when colours are forced: escape codes do not belong in a file.
        watched = console.is_terminal if console else sys.stdout.isatty()
        self._display: _Bar | _Lines | None = None
        if not (quiet or config.quiet):
            display = _Bar if watched else _Lines
            self._display = display(console or Console(), name=name, total=total, start=start)
        self._about: dict[str, Any] = {}
        if settings is not None and _writes():
            recipe = type(settings).__module__.rpartition(".")[2].replace("_", "-")
            self._about = {"recipe": recipe, "version": __version__, "steps": total, "ended": False}
            self._describe()
        clock.take()  # what this process did before is not of a step
        self._trackers = Trackers(folder, config=config, settings=settings, start=start, fresh=fresh, note=self.note)

    @property
    def seconds(self) -> float:
        """Time spent training, all processes that resumed one another together."""
        return self._earlier + time.monotonic() - self._began

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row to `metrics.jsonl`. A number that is not finite becomes null, which is said once per name.

        `seconds/…` says how many of the seconds since the last row went where; see `clock.phase`. Where this process
        has asked a model behind an endpoint since then, the row says how often and for how many tokens.
        """
        asked, self._used = used(self._used), used()
        asks = {f"endpoint/{name}": number for name, number in asked.items()}
        numbers = {name: float(value) for name, value in {**values, **asks}.items()}
        phases = {f"seconds/{name}": round(spent, 3) for name, spent in clock.take().items()}
        row = {"seconds": round(self.seconds, 3), **phases, **numbers}
        self._write(self._metrics, {"step": step, **row})
        self._trackers.send(step, row)
        if self._display:
            spent = time.monotonic() - self._began
            rate = (step + 1 - self._start) / max(spent, 1e-9)
            left = max(self._total - step - 1, 0) / rate if rate > 0 else 0.0
            times = f"{_clock(self.seconds)} elapsed  {_clock(left)} left"
            self._display.show(step + 1, rate=f"{rate:.3g} step/s", times=times, numbers=self._headlines(numbers))

    def episodes(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to `episodes.jsonl`: who said what, and what it earned (see `episode_rows`). The first one goes
        to trackers, too."""
        for number, row in enumerate(rows):
            if number == 0 and self._tracked and row["turns"]:
                self._trackers.show(step, transcript(row))
            if not self._by_token:
                turns = [{name: turn[name] for name in turn if name not in BY_TOKEN} for turn in row["turns"]]
                row = {**row, "turns": turns}
            self._write(self._episodes, {"step": step, **row})

    def note(self, text: str) -> None:
        """One line for the person watching."""
        if self._display:
            self._display.note(text)

    def close(self, *, failed: bool = False) -> None:
        """End the display, close the files, and have trackers send what they still hold; harmless when repeated."""
        self._trackers.close(failed=failed)
        if self._display:
            self._display.close()
        self._metrics.close()
        self._episodes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._about:
            self._about["ended"] = True
            self._describe()
        self.close(failed=kind is not None)
        if kind is None and self._about and self._display:
            self.note(f"{self._folder}: {self._written()}. Look at it: {typed('report', str(self._folder))}")

    def _describe(self) -> None:
        """Write run.json, whole or not at all."""
        path = self._folder / "run.json"
        scratch = path.with_name(".run.json.tmp")
        try:
            scratch.write_text(json.dumps(self._about) + "\n", encoding="utf-8")
            os.replace(scratch, path)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be written ({error.strerror}). Make room there, then continue with --resume."
            ) from error

    def _written(self) -> str:
        """What this run has left, for the last line that it says."""
        newest = max((path.name for path in self._folder.glob("checkpoints/step_*")), default="")
        names = ["metrics.jsonl", "episodes.jsonl", *([f"checkpoints/{newest}"] if newest else [])]
        names += ["best"] if (self._folder / "best").is_dir() else []
        return f"{', '.join(names[:-1])} and {names[-1]}"

    def _write(self, file: TextIO, row: dict[str, Any]) -> None:
        try:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False)
        except ValueError:
            line = json.dumps(_finite(row, self._note_not_finite), ensure_ascii=False, allow_nan=False)
        try:
            file.write(line + "\n")
            file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{file.name}: cannot be written ({error.strerror}). Make room there, then continue with --resume."
            ) from error

    def _note_not_finite(self, name: str, value: float) -> None:
        if name not in self._noted:
            self._noted.add(name)
            self.note(f"{name} is {value}: written as null, here and wherever it happens again")

    def _headlines(self, numbers: Mapping[str, float]) -> str:
        names = [name for name in (self._headline or (*HEADLINES, *numbers)) if name in numbers]
        shown = list(dict.fromkeys(names))[: len(self._headline) or 3]
        return "  ".join(f"{name} {numbers[name]:.4g}" for name in shown)


def episode_rows(
    episodes: Iterable[Episode],
    *,
    decode: Mapping[str, Callable[[list[int]], str]] | None = None,
    per_turn: Mapping[str, Iterable[tuple[Turn, float]]] | None = None,
    per_token: Mapping[str, Iterable[tuple[Turn, Sequence[float]]]] | None = None,
) -> Iterator[dict[str, Any]]:
    """One row per episode for `Log.episodes`: task, seed, ending, reward, error, metrics, and its turns.

    A turn says index, role, parent, text and reward. For the roles in `decode` (role → its tokenizer's decode) it also
    says `seen`, what its prompt adds to the role's previous turn on the branch, or all of the prompt if that was no
    continuation; and its `tokens` as texts, `ids` and `logprobs`. `per_turn` adds columns to the turns it names:
    `{"advantage": zip(turns, advantages_N.tolist(), strict=True)}`, `per_token` a number for each of their tokens.
    """
    columns = {name: {id(turn): float(value) for turn, value in pairs} for name, pairs in (per_turn or {}).items()}
    lists = {name: {id(turn): _short(values) for turn, values in pairs} for name, pairs in (per_token or {}).items()}
    for episode in episodes:
        turns = []
        for turn in episode.turns:
            said = {"index": turn.index, "role": turn.role, "parent": turn.parent}
            read = decode.get(turn.role) if decode else None
            seen = {"seen": read(_new_ids(episode, turn))} if read else {}
            tokens = _tokens(turn, read) if read else {}
            extras = {name: found[id(turn)] for name, found in (columns | lists).items() if id(turn) in found}
            turns.append(said | seen | {"text": turn.text, "reward": turn.reward} | extras | tokens)
        yield {
            "task": episode.task,
            "seed": episode.seed,
            "ending": episode.ending,
            "reward": episode.reward,
            "error": episode.error,
            "metrics": dict(episode.metrics),
            "turns": turns,
        }


def transcript(row: Mapping[str, Any]) -> str:
    """A row of `episodes.jsonl` as Markdown in which nothing is HTML: who heard and said what, with its numbers."""
    lines = [f"**{html.escape(row['task'])}**: {row['ending']}, {row['reward']:.4g}"]
    for turn in row["turns"]:
        if turn.get("seen"):
            lines.append("> " + html.escape(turn["seen"]).replace("\n", "\n> "))
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in turn.items() if isinstance(value, float))
        lines.append(f"**{turn['role']}** ({numbers}): {html.escape(turn['text'])}")
    text = "\n\n".join(lines)
    return text if len(text) <= LONGEST_TRANSCRIPT else text[:LONGEST_TRANSCRIPT] + " …"


def typed(*words: str) -> str:
    """A command line of this program that can be typed where this one was: the name alone where it is found by it."""
    program = Path(sys.argv[0] or "echelon")
    found = shutil.which("echelon")
    if program.stem != "echelon":
        python = Path(sys.executable)
        name = shutil.which(python.name)
        start = [python.name if name and Path(name).samefile(python) else str(python), "-m", "echelon"]
    elif found and program.exists() and Path(found).samefile(program):
        start = ["echelon"]
    else:
        start = [str(program)]
    return shlex.join([*start, *words])


def _tokens(turn: Turn, read: Callable[[list[int]], str]) -> dict[str, Any]:
    return {"tokens": [read([token]) for token in turn.action], "ids": turn.action, "logprobs": _short(turn.logprobs)}


def _short(values: Iterable[float]) -> list[float]:
    """Rounded to what can be seen in a picture: they are many."""
    return [round(value, 4) for value in values]


def _new_ids(episode: Episode, turn: Turn) -> list[int]:
    """The part of a prompt that the role had not seen or said before on this branch."""
    earlier = [other for other in episode.path(turn)[:-1] if other.role == turn.role]
    known = earlier[-1].prompt + earlier[-1].action if earlier else []
    return turn.prompt[len(known) :] if turn.prompt[: len(known)] == known else turn.prompt


def _cut(path: Path, start: int) -> float:
    """Keep the whole rows before step `start`; returns the `seconds` of the last one kept, 0 if there is none."""
    seconds = 0.0
    if not path.exists():
        return seconds
    kept = path.with_name(f".{path.name}.tmp")
    with path.open("rb") as old, kept.open("wb") as new:
        for line in old:
            try:
                row = json.loads(line)
            except ValueError:  # half-written when the run was killed
                continue
            if row["step"] < start:
                seconds = row.get("seconds", 0.0)
                new.write(line.rstrip(b"\n") + b"\n")
        new.flush()
        os.fsync(new.fileno())
    os.replace(kept, path)
    return seconds


def _writes() -> bool:
    """Whether this process writes: rank 0, or the only one. Where nobody has loaded `train.dist` there are no ranks."""
    dist = sys.modules.get("echelon.train.dist")
    return dist is None or bool(dist.writes())


def _append_to(path: Path) -> TextIO:
    # A lone surrogate cannot be encoded; written with a backslash it is what JSON writes for it.
    return path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")


def _finite(value: Any, note: Callable[[str, float], None], name: str = "") -> Any:
    """The same value with null for every number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        note(name, value)
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item, note, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, note, name) for item in value]
    return value


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class _Lines:
    """Progress where nobody watches: whole lines, now and then."""

    def __init__(self, console: Console, *, name: str, total: int, start: int) -> None:
        self._file, self._prefix, self._total = console.file, f"{name} " if name else "", total
        self._last: float | None = None

    def show(self, done: int, *, rate: str, times: str, numbers: str) -> None:
        now = time.monotonic()
        if self._last is None or now - self._last >= SECONDS_BETWEEN_LINES or done >= self._total:
            self._last = now
            self.note(f"{self._prefix}{done}/{self._total}  {rate}  {times}  {numbers}".rstrip())

    def note(self, text: str) -> None:
        print(f"{text}\n", end="", file=self._file, flush=True)  # one piece: trackers have threads of their own

    def close(self) -> None:
        """Nothing is pending."""


class _Bar:
    """Progress on a terminal: one live bar, notes above it."""

    def __init__(self, console: Console, *, name: str, total: int, start: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
        )
        self._task = self._progress.add_task(name, total=total, completed=start, text="")
        self._progress.start()

    def show(self, done: int, *, rate: str, times: str, numbers: str) -> None:
        # The bar's own clocks run on between steps, so `times` is not needed.
        self._progress.update(self._task, completed=done, text=f"{rate}  {numbers}".rstrip())

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()
