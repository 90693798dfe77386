"""Where metrics go besides the files of a run: TensorBoard, Weights & Biases, MLflow, trackio, if they are asked for.

Each has a thread of its own, so neither a slow server nor a lost network holds up a step, and what goes wrong there is
said once and ends that tracker only. Knows names, numbers and texts; knows no model, and imports no library that is
not asked for.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
import queue
import re
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from echelon.config import LogConfig
from echelon.errors import need

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SECONDS_TO_FINISH = 30.0
"""How long the end of a run waits for trackers that still have something to send."""

WANDB_WRITES_WITHIN = 5.0
"""Seconds after which a row handed to W&B is surely on the disk, or with the server."""

MLFLOW_BATCH = {"metrics": 1000, "params": 100}
"""Most items that MLflow takes in one request."""


class Row(NamedTuple):
    """The numbers of one step; all of them finite."""

    step: int
    numbers: dict[str, float]


class Told(NamedTuple):
    """An episode of one step, as Markdown in which nothing is HTML."""

    step: int
    text: str


@dataclass(frozen=True)
class Run:
    """What a tracker is told about a run."""

    folder: Path
    project: str
    name: str
    settings: dict[str, Any]
    """Hyper-parameters: blocks of settings are mappings in it."""
    start: int
    """First step that this process takes."""
    memory: Memory
    note: Callable[[str], None]


class Tracker(Protocol):
    """One run in one tracker. It is made, used and closed by one thread, which is not the one that trains."""

    seen: int
    """The last step that earlier processes sent, −1 for none: up to here nothing is sent again."""

    def send(self, rows: Sequence[Row]) -> None:
        """Add rows, whose steps rise. May block; whatever it raises ends this tracker."""
        ...

    def show(self, told: Told) -> None:
        """Add an episode of the step whose row came last. May block; whatever it raises ends the episodes here."""
        ...

    def close(self, *, failed: bool) -> None:
        """Send what is pending and say how the run ended."""
        ...


class Memory:
    """What has to be known about a tracker to continue there: `<run>/trackers/<tracker>.json`, replaced as a whole."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self._path = path
        self._held: dict[str, Any] = {}
        if not fresh and path.exists():
            self._held = json.loads(path.read_text(encoding="utf-8"))

    def __getitem__(self, key: str) -> Any:
        """The value kept under this name; None if there is none."""
        return self._held.get(key)

    def keep(self, **values: Any) -> None:
        """Replace these values, on the disk too."""
        self._held |= values
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_name(f".{self._path.name}.tmp")
        unfinished.write_text(json.dumps(self._held), encoding="utf-8")
        os.replace(unfinished, self._path)


class Trackers:
    """The trackers of one run. Never raises once it is made: `note` gets one line for each tracker that gives up.

    `fresh` says that the run begins here; otherwise each tracker continues the run it had, and one that is new gets
    the rows of `history` (a metrics.jsonl) up to step `start` first.

    Raises MissingExtra for a library that is not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: LogConfig,
        settings: DataclassInstance | None,
        start: int,
        fresh: bool,
        note: Callable[[str], None],
    ) -> None:
        self._channels = []
        for name in config.to:
            need(name, name)
            memory = Memory(folder / "trackers" / f"{name}.json", fresh=fresh)
            named = config.name or folder.resolve().name
            tree = dataclasses.asdict(settings) if settings else {}
            run = Run(folder, config.project, named, tree, start, memory, note)
            self._channels.append(_Channel(name, run))

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hand a row to every tracker and return at once. What is not finite is left out of it."""
        if self._channels:
            row = Row(step, {name: value for name, value in numbers.items() if math.isfinite(value)})
            for channel in self._channels:
                channel.coming.put(row)

    def show(self, step: int, text: str) -> None:
        """Hand an episode of the step whose row came last to every tracker and return at once."""
        for channel in self._channels:
            channel.coming.put(Told(step, text))

    def close(self, *, failed: bool = False) -> None:
        """Wait until everything is sent, or for half a minute."""
        for channel in self._channels:
            channel.failed = failed
            channel.coming.put(None)
        until = time.monotonic() + SECONDS_TO_FINISH
        for channel in self._channels:
            channel.join(max(until - time.monotonic(), 0.0))
            if channel.is_alive():
                channel.give_up(f"had not sent everything after {SECONDS_TO_FINISH:.0f} seconds")
        self._channels = []


class _Channel(threading.Thread):
    """Rows and episodes on their way to one tracker."""

    def __init__(self, name: str, run: Run) -> None:
        super().__init__(name=f"tracker-{name}", daemon=True)
        self.coming: queue.SimpleQueue[Row | Told | None] = queue.SimpleQueue()
        self.failed = False
        self._shows = True
        self._tracker, self._run, self._silent = name, run, False
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:  # whatever it is, the run does not depend on it
            self.give_up(f"{type(error).__name__}: {error}")

    def give_up(self, because: str) -> None:
        """Say once that this tracker is lost."""
        if not self._silent:
            self._silent = True
            self._miss("metrics", because, "All of them")

    def _work(self) -> None:
        tracker = OPEN[self._tracker](self._run)
        if earlier := list(_history(self._run.folder / "metrics.jsonl", tracker.seen + 1, self._run.start)):
            tracker.send(earlier)
        ended = False
        while not ended:
            waiting = [self.coming.get()]
            while waiting[-1] is not None and not self.coming.empty():
                waiting.append(self.coming.get())
            ended = waiting[-1] is None
            news = [item for item in waiting if item is not None and item.step > tracker.seen]
            for kind, items in itertools.groupby(news, type):
                if kind is Row:
                    tracker.send([item for item in items if isinstance(item, Row)])
                else:
                    self._show(tracker, [item for item in items if isinstance(item, Told)])
        tracker.close(failed=self.failed)

    def _show(self, tracker: Tracker, told: Sequence[Told]) -> None:
        """Episodes may need a place of their own, such as MLflow's store of artifacts: numbers go on without it."""
        try:
            for one in told if self._shows else ():
                tracker.show(one)
        except Exception as error:
            self._shows = False
            self._miss("episodes", f"{type(error).__name__}: {error}", "They")

    def _miss(self, what: str, because: str, which: str) -> None:
        reason = textwrap.shorten(because, 240, placeholder=" …")
        self._run.note(f"{self._tracker} gets no more {what} ({reason}). {which} are in {what}.jsonl.")


def _history(path: Path, start: int, stop: int) -> Iterator[Row]:
    """The rows of a metrics.jsonl from step `start` up to, not including, step `stop`."""
    if start >= stop:
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            step = row.pop("step")
            if step >= start:
                yield Row(step, {name: value for name, value in row.items() if value is not None})
            if step == stop - 1:  # what follows is being written right now
                return


class _TensorBoard:
    """Event files in `<run>/tensorboard`. What a killed process wrote after its checkpoint is purged and sent again."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        began = run.memory["sent"] is not None
        self.seen = min(run.memory["sent"], run.start - 1) if began else -1
        self._memory = run.memory
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=self.seen + 1)
        if not began and run.settings:
            plain = bool | int | float
            flat = {name: value if isinstance(value, plain) else str(value) for name, value in _flat(run.settings)}
            for summary in hparams(flat, {}):  # type: ignore[no-untyped-call]
                self._writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]
        run.note(f"tensorboard --logdir {run.folder / 'tensorboard'}")

    def send(self, rows: Sequence[Row]) -> None:
        for step, numbers in rows:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._memory.keep(sent=rows[-1].step)

    def show(self, told: Told) -> None:
        self._writer.add_text("episode", told.text, told.step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _WandB:
    """A run of Weights & Biases, its files under `<run>/wandb`. Its environment variables choose server and mode.

    It would also collect the code, the machine and what is printed: all of that stays here.
    """

    def __init__(self, run: Run) -> None:
        wandb = need("wandb", "wandb")
        wandb.setup(wandb.Settings(silent=True))  # else it asks for a login in the middle of the run
        names = ("x_disable_stats", "x_disable_meta", "x_disable_machine_info", "disable_git", "disable_code")
        wanted = {**dict.fromkeys(names, True), "save_code": False, "x_save_requirements": False, "console": "off"}
        wanted |= {"finish_timeout": SECONDS_TO_FINISH, "x_transaction_log_flush_interval": 1.0}
        known = {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
        identity = run.memory["run"] or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=identity,
            resume="allow",
            reinit="create_new",
            dir=str(run.folder),
            config=run.settings,
            allow_val_change=True,
            settings=wandb.Settings(silent=True, **known),
        )
        run.memory.keep(run=identity)
        self._memory, self._sent = run.memory, [(0.0, -1 if run.memory["sent"] is None else run.memory["sent"])]
        self.seen = self._run.step - 1 if self._run.resumed else self._sent[0][1]
        run.note(f"wandb sync {Path(self._run.dir).parent}" if self._run.offline else f"wandb: {self._run.url}")

    def send(self, rows: Sequence[Row]) -> None:
        for step, numbers in rows:
            self._run.log(numbers, step=step)
        self._sent.append((time.monotonic(), rows[-1].step))
        # A kill takes what its own process has not written yet: rows count as sent when they are some seconds old.
        while len(self._sent) > 1 and self._sent[1][0] < time.monotonic() - WANDB_WRITES_WITHIN:
            del self._sent[0]
        self._memory.keep(sent=self._sent[0][1])

    def show(self, told: Told) -> None:
        page = need("wandb", "wandb").Html(f"<pre style='white-space: pre-wrap'>{told.text}</pre>", inject=False)
        self._run.log({"episode": page}, step=told.step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
        self._memory.keep(sent=self._sent[-1][1])


class _MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or in its own default place. What it has is asked of the store itself."""

    def __init__(self, run: Run) -> None:
        mlflow = need("mlflow", "mlflow")
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it narrates the making of its tables
        self._entities, self._client, self.seen = mlflow.entities, mlflow.MlflowClient(), -1
        self._id = self._known(run.memory["run"], mlflow.exceptions.MlflowException)
        if self._id:
            history = self._client.get_metric_history(self._id, "seconds")
            self.seen = max((metric.step for metric in history), default=-1)
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(self._experiment(run.project), run_name=run.name).info.run_id
            run.memory.keep(run=self._id)
            settings = ((_mlflow_name(name), str(value)[:6000]) for name, value in _flat(run.settings))
            self._log("params", [mlflow.entities.Param(name, value) for name, value in settings])
        run.note(f"mlflow: run {self._id} of experiment {run.project}")

    def send(self, rows: Sequence[Row]) -> None:
        now = int(time.time() * 1000)
        metric = self._entities.Metric
        pairs = ((step, name, value) for step, numbers in rows for name, value in numbers.items())
        self._log("metrics", [metric(_mlflow_name(name), value, now, step) for step, name, value in pairs])

    def show(self, told: Told) -> None:
        self._client.log_text(self._id, told.text, f"episodes/step_{told.step:06d}.md")

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")

    def _log(self, what: str, items: list[Any]) -> None:
        size = MLFLOW_BATCH[what]
        for start in range(0, len(items), size):
            self._client.log_batch(self._id, **{what: items[start : start + size]})

    def _known(self, identity: str | None, unknown: type[Exception]) -> str | None:
        """The run, if the store has it: it may be another store than the last time."""
        try:
            return identity and self._client.get_run(identity).info.run_id
        except unknown as error:
            if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))


def _mlflow_name(name: str) -> str:
    """What MLflow allows in a name: letters, digits, _ - . : / and spaces, and no empty part."""
    return re.sub(r"/+", "/", re.sub(r"[^\w\-.:/ ]", "_", name)).strip("/")


class _Trackio:
    """A run of trackio, in its local store unless its environment variables name a Space or a server."""

    def __init__(self, run: Run) -> None:
        trackio = need("trackio", "trackio")
        common = {"project": run.project, "name": run.name, "config": run.settings, "embed": False}
        common |= {"auto_log_gpu": False, "auto_log_cpu": False}
        known = run.memory["run"]
        self._run = trackio.init(**common, resume="allow" if known else "never")
        if known and self._run.id != known:  # it goes by the name, which another run has taken since
            self._run.finish()
            self._run = trackio.init(**common, resume="never")
        run.memory.keep(run=self._run.id)
        self.seen = self._run._next_step - 1

    def send(self, rows: Sequence[Row]) -> None:
        for step, numbers in rows:
            self._run.log(numbers, step=step)

    def show(self, told: Told) -> None:
        self._run.log({"episode": need("trackio", "trackio").Markdown(told.text)}, step=told.step)

    def close(self, *, failed: bool) -> None:
        self._run.finish()


OPEN: dict[str, Callable[[Run], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}
"""Tracker → how its run is opened."""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name → value of every setting."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
