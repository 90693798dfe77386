"""What an evaluation of a controller leaves besides numbers: every action, a plot of the return, TensorBoard, videos.

Knows flights, the steps of an episode as numbers, and Gymnasium's renderer; knows nothing of who flew. What cannot be
written is found before anything is played (`check_report`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from echelon.envs.gymnasium import as_gymnasium
from echelon.errors import CheckpointError, DataError, need
from echelon.types import Env, Message, Step, Task


@dataclass(slots=True)
class Flight:
    """One episode of a controller, step by step, as numbers."""

    task: Task
    rows: list[dict[str, Any]] = field(default_factory=list)
    """What was seen, said and done at each turn, and what it earned: the rows of actions.jsonl."""

    @property
    def actions(self) -> list[Any]:
        """What the plant was given, in order: attempts at an action that were asked for again are none."""
        return [row["action"] for row in self.rows if row["action"] is not None]

    @property
    def rewards(self) -> list[float]:
        """What each turn earned."""
        return [row["reward"] for row in self.rows]


class Flights:
    """Makes environments that remember what was done in them, each under its own task object."""

    def __init__(self, make: Callable[[Task], Env]) -> None:
        self._make = make
        self._flights: dict[int, Flight] = {}

    def make(self, task: Task) -> Env:
        """The environment of one episode. Another episode needs a task object of its own, equal or not."""
        flight = self._flights[id(task)] = Flight(task)
        return _Watched(self._make(task), flight)  # type: ignore[return-value]

    def of(self, tasks: Sequence[Task]) -> list[Flight]:
        """The flights of these task objects, in their order; empty where nothing was played."""
        return [self._flights.get(id(task), Flight(task)) for task in tasks]


class _Watched:
    """An environment that notes each step."""

    def __init__(self, env: Any, flight: Flight) -> None:
        self._env, self._flight, self._length = env, flight, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def start(self) -> Sequence[Message]:
        messages: Sequence[Message] = self._env.start()
        return messages

    def step(self, action: str) -> Step:
        seen, parsed = self._env.observation.tolist(), self._env.codec.decode_action(action)
        step: Step = self._env.step(action)
        moved = step.info["length"] > self._length
        self._flight.rows.append(
            {
                "step": self._length,
                "observation": seen,
                "text": action,
                "action": np.asarray(self._env.action).tolist() if moved else None,
                "reward": step.reward,
                "invalid": parsed.problem,
                "clipped": parsed.clipped,
            }
        )
        self._length = int(step.info["length"])
        return step


def action_rows(flights: Sequence[Flight]) -> Iterator[dict[str, Any]]:
    """Every turn of every episode: which, what was seen, said, done (`action/0` and so on by dimension), and earned."""
    for number, flight in enumerate(flights):
        for row in flight.rows:
            axes = np.atleast_1d(np.asarray(row["action"])).tolist() if row["action"] is not None else []
            yield {
                "episode": number,
                "task": flight.task.id,
                **row,
                **{f"action/{axis}": value for axis, value in enumerate(axes)},
            }


def check_report(*, plot: bool, tensorboard: bool, videos: Path | None) -> None:
    """Raise MissingExtra for a library that is not installed, CheckpointError for a folder that nothing can be written
    to."""
    if plot:
        need("matplotlib", "plot")
    if tensorboard:
        need("tensorboard", "tensorboard")
    if videos is None:
        return
    need("moviepy", "video")
    try:
        videos.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=videos):
            pass
    except OSError as error:
        because = f"no video can be written there ({error.strerror}). Choose another --video-dir."
        raise CheckpointError(f"{videos}: {because}") from error


def draw_returns(path: Path, flights: Sequence[Flight], references: Mapping[str, float], title: str) -> None:
    """The return of every episode, the mean of those so far, and what is known beside them; on the right, how each
    return came about step by step."""
    need("matplotlib", "plot").use("Agg")
    from matplotlib import pyplot  # after the backend is chosen

    returns = np.array([sum(flight.rewards) for flight in flights])
    means = np.cumsum(returns) / np.arange(1, len(returns) + 1)
    figure, (each, within) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    each.plot(np.arange(1, len(returns) + 1), returns, "o", color="tab:blue", label="episode")
    each.plot(np.arange(1, len(returns) + 1), means, color="tab:orange", label="mean so far")
    for (name, value), line in zip(references.items(), ("--", ":", "-."), strict=False):
        each.axhline(value, color="black", linestyle=line, linewidth=1, label=name)
    each.set(xlabel="episode", ylabel="return", title=title)
    each.legend(frameon=False)
    for flight in flights:
        within.plot(np.arange(1, len(flight.rewards) + 1), np.cumsum(flight.rewards), color="tab:blue", alpha=0.4)
    within.set(xlabel="step", ylabel="return so far")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_tensorboard(folder: Path, flights: Sequence[Flight], numbers: Mapping[str, float]) -> None:
    """Return and length by episode, the actions of each episode by step and dimension, and the numbers of all."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)  # event files of an earlier evaluation would be shown on top of it
    writer = SummaryWriter(str(folder))
    for number, flight in enumerate(flights):
        writer.add_scalar("episode/return", sum(flight.rewards), number)
        writer.add_scalar("episode/length", len(flight.actions), number)
        for step, action in enumerate(flight.actions):
            for axis, value in enumerate(np.atleast_1d(np.asarray(action, dtype=np.float64)).tolist()):
                writer.add_scalar(f"action_{axis}/episode_{number:03d}", value, step)
    for name, value in numbers.items():
        writer.add_scalar(f"evaluation/{name}", value, 0)
    writer.close()


def film(folder: Path, flights: Sequence[Flight], make: Callable[[], Any]) -> list[Path]:
    """Fly these episodes once more, each with its seed and its actions, and record them: `episode_000.mp4`, ….

    `make()` gives the plant, a Gymnasium environment that renders `rgb_array`. Raises DataError for one that cannot be
    rendered.
    """
    from gymnasium.wrappers import RecordVideo

    films: list[Path] = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=".film") as scratch, _quiet():
        try:
            plant = RecordVideo(make(), str(Path(scratch, "new")), episode_trigger=lambda _: True, name_prefix="film")
        except Exception as error:
            raise DataError(f"no video: the environment cannot be rendered ({error}). Leave --video out.") from error
        for number, flight in enumerate(flights):
            _fly(plant, flight)
            plant.stop_recording()  # type: ignore[no-untyped-call]
            films.append(folder / f"episode_{number:03d}.mp4")
            os.replace(Path(scratch, "new", f"film-episode-{number}.mp4"), films[-1])
        plant.close()  # type: ignore[no-untyped-call]
    return films


def _fly(plant: Any, flight: Flight) -> None:
    """Repeat a flight."""
    plant.reset(seed=flight.task.seed)
    for action in flight.actions:
        plant.step(as_gymnasium(plant.action_space, action))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of renderers and of the video writer, which are about themselves, and without a screen."""
    screen = os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if screen == "dummy":
            del os.environ["SDL_VIDEODRIVER"]
