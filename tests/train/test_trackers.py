"""Trackers get every row once, whatever happens to the run, and the run goes on whatever happens to a tracker.

With the real libraries, none of which reaches a network here; each is skipped where it is not installed.
"""

from __future__ import annotations

import contextlib
import html
import importlib.util
import json
import os
import pty
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from echelon.config import LogConfig, ModelConfig
from echelon.errors import ConfigError, MissingExtra
from echelon.train import trackers
from echelon.train.log import Log
from echelon.train.trackers import OPEN, Row, Run, Told, Trackers

ROOT = Path(__file__).parents[2]
NAMES = sorted(OPEN)
NUMBERS = {"loss": 0.25, "reward/mean": 1.5}

# What the libraries warn of among themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(mlflow|wandb|trackio|tensorboard|google|alembic).*"),
    pytest.mark.filterwarnings("ignore:.*noload.*"),
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
]


@dataclass(frozen=True)
class Settings:
    """Settings of a run that is only logged."""

    steps: int = 6
    lr: float = 0.5
    stop: tuple[str, ...] = ("a", "b")
    model: ModelConfig = field(default_factory=lambda: ModelConfig(path="tiny", device="cpu"))


@pytest.fixture(scope="module", autouse=True)
def _nothing_leaves_this_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    home = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)  # where MLflow puts what runs show
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
        patch.setenv("TRACKIO_DIR", str(home / "trackio"))  # read when it is imported
        yield


def tracked(name: str) -> Any:
    return pytest.param(
        name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
    )


every_tracker = pytest.mark.parametrize("tracker", [tracked(name) for name in NAMES])


@dataclass
class Kept:
    """What a tracker has of one run."""

    rows: list[tuple[int, dict[str, float]]]
    settings: dict[str, Any]


def from_tensorboard(folder: Path, project: str) -> list[Kept]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    rows: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert tag not in rows.setdefault(event.step, {})
            rows[event.step][tag] = event.value
    (content,) = (found.plugin_data.content for tag, found in events.summary_metadata.items() if "session_start" in tag)
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    settings = {
        name: getattr(value, str(value.WhichOneof("kind")))
        for name, value in HParamsPluginData.FromString(content).session_start_info.hparams.items()
    }
    return [Kept(sorted(rows.items()), settings)]


def from_wandb(folder: Path, project: str) -> list[Kept]:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its own process writes, a moment after a run is finished
    runs: dict[str, Kept] = {}
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        kept = runs.setdefault(path.stem, Kept([], {}))
        for record in map(Record.FromString, leveldb_records(path.read_bytes()[7:])):
            if record.HasField("run"):
                assert record.run.project == project
                kept.settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("history"):
                values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                numbers = {name: json.loads(value) for name, value in values.items() if not name.startswith("_")}
                kept.rows.append((record.history.step.num, numbers))
    for kept in runs.values():
        kept.settings = dict(trackers._flat(kept.settings))
    return list(runs.values())


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: chunks with a checksum, a length and a kind, in blocks of 32 KiB."""
    at, whole = 7, b""
    content = bytes(7) + content
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def from_mlflow(folder: Path, project: str) -> list[Kept]:
    from mlflow import MlflowClient

    client = MlflowClient()
    found = []
    for run in client.search_runs([client.get_experiment_by_name(project).experiment_id]):
        rows: dict[int, dict[str, float]] = {}
        for name in run.data.metrics:
            for metric in client.get_metric_history(run.info.run_id, name):
                assert name not in rows.setdefault(metric.step, {})
                rows[metric.step][name] = metric.value
        assert run.info.status == "FINISHED"
        found.append(Kept(sorted(rows.items()), run.data.params))
    return found


def from_trackio(folder: Path, project: str) -> list[Kept]:
    from trackio.sqlite_storage import SQLiteStorage

    found = []
    for run in SQLiteStorage.get_run_records(project):
        logs = SQLiteStorage.get_logs(project, run["name"], run_id=run["id"])
        rows = [
            (row["step"], {name: value for name, value in row.items() if name not in ("step", "timestamp")})
            for row in logs
        ]
        config = SQLiteStorage.get_run_config(project, run["name"], run_id=run["id"])
        found.append(Kept(rows, dict(trackers._flat(config or {}))))
    return found


READ: dict[str, Callable[[Path, str], list[Kept]]] = {
    "tensorboard": from_tensorboard,
    "wandb": from_wandb,
    "mlflow": from_mlflow,
    "trackio": from_trackio,
}


@dataclass
class Logged:
    """A run directory and what one tracker has of it."""

    folder: Path
    tracker: str

    def run(self, start: int, stop: int, *, tracked: bool = True) -> None:
        """Log steps `start` to `stop`."""
        log_steps(self.folder, [self.tracker] if tracked else [], start, stop)

    @property
    def kept(self) -> Kept:
        (kept,) = READ[self.tracker](self.folder, project_of(self.folder))
        return kept

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.kept.rows]


def project_of(folder: Path) -> str:
    return folder.parent.name


def log_steps(folder: Path, to: Sequence[str], start: int, stop: int, then: Callable[[Log], None] = Log.close) -> None:
    config = LogConfig(to=tuple(to), project=project_of(folder))  # type: ignore[arg-type]
    log = Log(folder, total=6, start=start, quiet=True, config=config, settings=Settings())
    for step in range(start, stop):
        log.metrics(step, {"loss": 0.5 * step, "reward/mean": 1.0})
    then(log)


@pytest.fixture
def logged(tmp_path: Path, tracker: str) -> Logged:
    return Logged(tmp_path / "run", tracker)


@every_tracker
def test_a_tracker_gets_every_row_with_its_step_and_the_settings(logged: Logged) -> None:
    logged.run(0, 3)
    kept = logged.kept
    assert [step for step, _ in kept.rows] == [0, 1, 2]
    for step, numbers in kept.rows:
        assert {name: numbers[name] for name in ("loss", "reward/mean")} == {"loss": 0.5 * step, "reward/mean": 1.0}
        assert numbers["seconds"] >= 0
    assert float(kept.settings["lr"]) == 0.5
    assert kept.settings["model.path"] == "tiny"
    assert "a" in str(kept.settings["stop"])


def told_tensorboard(folder: Path) -> list[tuple[int, str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload().Tensors("episode/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]


def told_wandb(folder: Path) -> list[tuple[int, str]]:
    files = (folder / "wandb").glob("offline-run-*/files/media/html/episode_*.html")
    pages = {int(file.stem.split("_")[1]): html.unescape(file.read_text()) for file in files}
    return [(step, re.sub(r"(?s).*?<pre[^>]*>(.*)</pre>.*", r"\1", page)) for step, page in sorted(pages.items())]


def told_mlflow(folder: Path) -> list[tuple[int, str]]:
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name(project_of(folder)).experiment_id])
    place = Path(run.info.artifact_uri.removeprefix("file://")) / "episodes"
    return [(int(file.stem.split("_")[1]), file.read_text()) for file in sorted(place.iterdir())]


def told_trackio(folder: Path) -> list[tuple[int, str]]:
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_run_records(project_of(folder))
    logs = SQLiteStorage.get_logs(project_of(folder), run["name"], run_id=run["id"])
    return [(row["step"], row["episode"]["_value"]) for row in logs if "episode" in row]


TOLD = {"tensorboard": told_tensorboard, "wandb": told_wandb, "mlflow": told_mlflow, "trackio": told_trackio}


@every_tracker
def test_a_tracker_gets_the_first_episode_of_each_step_as_text(logged: Logged) -> None:
    def say(text: str) -> dict[str, Any]:
        turn = {"index": 0, "role": "actor", "seen": "well?", "text": text, "reward": 1.0, "tokens": ["no"]}
        return {"task": "t", "ending": "terminated", "reward": 1.0, "turns": [turn]}

    config = LogConfig(to=(logged.tracker,), project=project_of(logged.folder))  # type: ignore[arg-type]
    with Log(logged.folder, total=2, quiet=True, config=config, settings=Settings()) as log:
        for step in range(2):
            log.metrics(step, {"loss": 1.0})
            log.episodes(step, [say(f"yes {step}"), say("another")])
    numbers = [(step, row["loss"]) for step, row in logged.kept.rows if "loss" in row]
    assert numbers == [(0, 1.0), (1, 1.0)]
    told = TOLD[logged.tracker](logged.folder)
    assert told == [(n, f"**t**: terminated, 1\n\n> well?\n\n**actor** (reward 1): yes {n}") for n in range(2)]


@every_tracker
def test_a_tracker_that_was_left_out_for_a_while_gets_the_rows_it_missed(logged: Logged) -> None:
    logged.run(0, 1, tracked=False)
    logged.run(1, 2)
    logged.run(2, 4, tracked=False)
    logged.run(4, 6)
    assert logged.steps == [0, 1, 2, 3, 4, 5]


KILLED = """
import os, sys, time
from pathlib import Path
from tests.train.test_trackers import log_steps

def die(log):
    until = time.monotonic() + 60
    while time.monotonic() < until and any(not channel.coming.empty() for channel in log._trackers._channels):
        time.sleep(0.05)
    time.sleep(2)
    os._exit(9)

log_steps(Path(sys.argv[1]), sys.argv[2:], 0, 5, die)
"""


def test_the_run_in_a_tracker_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    folder, installed = tmp_path / "run", [name for name in NAMES if importlib.util.find_spec(name)]
    env = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # else it is this process's
    done = subprocess.run([sys.executable, "-c", KILLED, folder, *installed], cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 9, done.stderr.decode()
    log_steps(folder, installed, 3, 6)  # the newest checkpoint says: 3 steps are done
    for name in installed:
        (kept,) = READ[name](folder, project_of(folder))
        # What W&B, offline, may have lost with the process is sent again.
        steps = [step for step, _ in kept.rows]
        assert (sorted(set(steps)) if name == "wandb" else steps) == [0, 1, 2, 3, 4, 5], name
        assert all(numbers["loss"] == 0.5 * step for step, numbers in kept.rows), name


@every_tracker
def test_a_new_run_in_a_directory_that_was_emptied_by_hand_is_a_new_run_there(logged: Logged) -> None:
    logged.run(0, 2)
    (logged.folder / "metrics.jsonl").unlink()
    logged.run(0, 3)
    kept = READ[logged.tracker](logged.folder, project_of(logged.folder))
    assert [0, 1, 2] in [[step for step, _ in run.rows] for run in kept]


@every_tracker
def test_a_number_that_is_not_finite_is_left_out(logged: Logged) -> None:
    config = LogConfig(to=(logged.tracker,), project=project_of(logged.folder))  # type: ignore[arg-type]
    with Log(logged.folder, total=1, quiet=True, config=config, settings=Settings()) as log:
        log.metrics(0, {"loss": float("nan"), "kl": float("inf"), "reward/a.py:b c, d": 2.0})
    ((_, numbers),) = logged.kept.rows
    assert {"loss", "kl"}.isdisjoint(numbers)
    assert 2.0 in numbers.values()


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_a_server_that_is_not_there_is_one_line_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with Log(tmp_path, total=3, config=LogConfig(to=("mlflow",))) as log:
        for step in range(3):
            log.metrics(step, NUMBERS)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    said = [line for line in capsys.readouterr().out.splitlines() if "mlflow" in line]
    assert len(said) == 1
    assert said[0].startswith("mlflow gets no more metrics (MlflowException: API request to http://127.0.0.1:9")
    assert said[0].endswith("All of them are in metrics.jsonl.")


LOGGED_OUT = """
import sys
from pathlib import Path
from echelon.config import LogConfig
from echelon.train.log import Log
with Log(Path(sys.argv[1]), total=1, config=LogConfig(to=("wandb",))) as log:
    log.metrics(0, {"loss": 1.0})
"""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_nobody_being_logged_in_is_said_and_asks_nothing_on_a_terminal(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    env = {**kept, "HOME": str(tmp_path), "COLUMNS": "200"}
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", LOGGED_OUT, str(tmp_path / "run")],
        cwd=ROOT,
        env=env,
        stdin=inside,
        stdout=inside,
        stderr=inside,
    )
    os.close(inside)
    said = b""
    with os.fdopen(terminal, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # how a terminal ends
        while piece := screen.read(4096):
            said += piece
    assert process.wait(timeout=60) == 0
    assert said.count(b"wandb gets no more metrics (UsageError: No API key configured. Use `wandb login` to log") == 1
    assert b"Enter your choice" not in said
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1


@dataclass
class Fake:
    """A tracker that breaks, or waits, where the test says so."""

    breaks: str = ""
    waits: threading.Event | None = None
    seen: int = -1
    got: list[int] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)

    def open(self, run: Run) -> Fake:
        self.reach("open")
        return self

    def send(self, rows: Sequence[Row]) -> None:
        self.reach("send")
        self.got += [row.step for row in rows]

    def show(self, told: Told) -> None:
        self.reach("show")
        self.told.append(told)

    def close(self, *, failed: bool) -> None:
        self.reach("close")
        self.ended.append(failed)

    def reach(self, place: str) -> None:
        if self.waits and place == self.breaks:
            self.waits.wait()
        elif place == self.breaks:
            raise ConnectionError(f"lost\nwhile  {place}")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setitem(OPEN, "wandb", fake.open)
    monkeypatch.setattr(trackers, "need", lambda module, extra: None)
    return fake


FAKE = LogConfig(to=("wandb",)) if importlib.util.find_spec("wandb") else LogConfig()


@pytest.mark.skipif(not FAKE.to, reason="wandb is not installed")
@pytest.mark.parametrize("place", ["open", "send", "close"])
def test_a_tracker_that_breaks_is_said_once_and_the_rows_are_in_the_file(
    tmp_path: Path, fake: Fake, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    fake.breaks = place
    with Log(tmp_path, total=9, config=FAKE) as log:
        for step in range(9):
            log.metrics(step, NUMBERS)
            time.sleep(0.01)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 9
    line = f"wandb gets no more metrics (ConnectionError: lost while {place}). All of them are in metrics.jsonl."
    assert [said for said in capsys.readouterr().out.splitlines() if "wandb" in said] == [line]
    assert fake.got == ([] if place != "close" else list(range(9)))


@pytest.mark.skipif(not FAKE.to, reason="wandb is not installed")
@pytest.mark.parametrize("place", ["open", "send", "close"])
def test_a_tracker_that_hangs_holds_up_no_step_and_is_given_up_at_the_end(
    tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    monkeypatch.setattr(trackers, "SECONDS_TO_FINISH", 0.2)
    fake.breaks, fake.waits = place, threading.Event()
    began = time.monotonic()
    with Log(tmp_path, total=100, config=FAKE) as log:
        for step in range(100):
            log.metrics(step, NUMBERS)
    assert time.monotonic() - began < 5
    fake.waits.set()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 100
    said = [line for line in capsys.readouterr().out.splitlines() if "wandb" in line]
    line = "wandb gets no more metrics (had not sent everything after 0 seconds). All of them are in metrics.jsonl."
    assert said == [line]


@pytest.mark.skipif(not FAKE.to, reason="wandb is not installed")
def test_where_episodes_cannot_be_kept_numbers_go_on(tmp_path: Path, fake: Fake) -> None:
    fake.breaks, notes = "show", []
    several = Trackers(tmp_path, config=FAKE, settings=None, start=0, fresh=True, note=notes.append)
    for step in range(3):
        several.send(step, {"loss": 1.0})
        several.show(step, "said")
    several.close()
    assert (fake.got, fake.told) == ([0, 1, 2], [])
    assert notes == ["wandb gets no more episodes (ConnectionError: lost while show). They are in episodes.jsonl."]


@pytest.mark.skipif(not FAKE.to, reason="wandb is not installed")
def test_a_run_that_ends_with_an_error_is_closed_as_a_failed_one(tmp_path: Path, fake: Fake) -> None:
    def interrupted() -> None:
        with Log(tmp_path, total=9, quiet=True, config=FAKE) as log:
            log.metrics(0, NUMBERS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (fake.got, fake.ended) == ([0], [True])
    with Log(tmp_path, total=9, start=1, quiet=True, config=FAKE) as log:
        log.metrics(1, NUMBERS)
    assert fake.ended == [True, False]


NOTHING = """
import sys, threading
from pathlib import Path
from echelon.train.log import Log
with Log(Path(sys.argv[1]), total=1, quiet=True) as log:
    log.metrics(0, {"loss": 1.0})
    assert threading.active_count() == 1
assert {"torch", "tensorboard", "wandb", "mlflow", "trackio"}.isdisjoint(sys.modules), "imported"
"""


def test_nothing_is_imported_started_or_written_that_was_not_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", NOTHING, folder], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == ["episodes.jsonl", "metrics.jsonl"]


def test_a_tracker_that_is_not_installed_is_refused_with_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"^wandb is not installed. Run: pip install 'echelon\[wandb\]'$"):
        LogConfig(to=("wandb",))


def test_a_tracker_is_named_once_and_a_project_has_a_name() -> None:
    with pytest.raises(ConfigError, match="a tracker gets every row once"):
        LogConfig(to=("mlflow", "mlflow"))
    with pytest.raises(ConfigError, match="trackers file runs under a name"):
        LogConfig(project="")
