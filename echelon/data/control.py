"""Recorded control: episodes of numbers, read from Minari or collected into it, become rows to learn from and arrays.

A row's prompt is what the codec says of an observation, its completion what it says of the action that was taken. It
knows neither models nor environments of ours: a policy is a function, and a space what Gymnasium calls one.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echelon.errors import DataError, did_you_mean, need
from echelon.seeds import derive_seed
from echelon.text.codec import Codec

EXTRA = "control"
"""The extra that brings gymnasium and minari."""

CODEC, ARRAYS, SUMMARY = "codec.json", "arrays.npz", "summary.json"
"""What lies beside the rows."""

Policy = Callable[[NDArray[np.float32], np.random.Generator], Any]
"""(observation as a vector, randomness) → an action as the environment takes it."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One episode as numbers: what was seen, what was done, what it paid."""

    observations: NDArray[np.float32]
    """(T + 1, O): the last one is that after the last action."""
    actions: NDArray[Any]
    """(T, A) float32, or (T,) int64 where actions are counted."""
    rewards: NDArray[np.float64]
    """(T,)."""
    terminated: bool
    """Whether nothing followed; else it was cut off."""

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def name(self) -> str:
        """Depends on the numbers alone, so the same episode has the same name wherever it is read from."""
        digest = hashlib.blake2b(digest_size=6)
        for part in (self.observations, self.actions, self.rewards):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Recording:
    """Episodes of one environment, and its spaces as Gymnasium has them."""

    episodes: list[Recorded]
    env_id: str
    """Empty where a dataset does not say."""
    observation_space: Any
    action_space: Any


def read_minari(name: str, *, env_id: str = "", episodes: int = 0, download: bool = False) -> Recording:
    """A Minari dataset: the folder of one, or an id among those of this machine, which `download` may add to.

    At most `episodes` of them, in their order; 0 reads all. Raises DataError for one that is not there, that holds
    another environment than `env_id`, or numbers that no codec takes; MissingExtra without the library.
    """
    minari = need("minari", EXTRA)
    need("h5py", EXTRA)
    dataset = _opened(minari, name, download)
    recorded = "" if dataset.env_spec is None else str(dataset.env_spec.id)
    if env_id and recorded and recorded != env_id:
        raise DataError(
            f"dataset {name}: it was recorded in {recorded}, and env_id is {env_id}. Give --env-id {recorded}, or a "
            "dataset of the other one."
        )
    found = [_recorded(episode, name) for episode in _first(dataset, episodes)]
    if not found:
        raise DataError(f"dataset {name}: it holds no episode. Collect some, or give another dataset.")
    return Recording(found, recorded or env_id, dataset.observation_space, dataset.action_space)


def collect_minari(env: Any, policy: Policy, folder: Path, *, dataset_id: str, episodes: int, seed: int) -> Path:
    """Play a Gymnasium environment with a policy into a new Minari dataset below `folder`, and return where it lies.

    The same arguments play the same episodes; the environment must cut off those that would not end. What lay there
    under the same name is replaced.
    """
    minari = need("minari", EXTRA)
    need("h5py", EXTRA)
    place = folder / dataset_id
    shutil.rmtree(place, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with _datasets_in(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about authors and links, which a dataset made here does not have
        collector = _collector(minari)(env)
        for number in range(episodes):
            _play(collector, policy, seed=derive_seed(seed, "episode", number))
        collector.create_dataset(dataset_id, eval_env=env.spec, algorithm_name=dataset_id)
        collector._tmp_dir.cleanup()  # the collector's close would close the caller's environment too
    return place


def distinct(episodes: Sequence[Recorded]) -> list[Recorded]:
    """Every episode once, in order: one that was collected twice would weigh twice, and could be on both sides."""
    return list({episode.name: episode for episode in episodes}.values())


def held_out(episodes: Sequence[Recorded], fraction: float, *, seed: int) -> set[str]:
    """The names of the episodes to hold out: whole ones, at least one if any, chosen by the seed and their name."""
    if not fraction:
        return set()
    if len(episodes) < 2:
        raise DataError(
            f"eval_fraction = {fraction}: there is one episode, so none can be held out. Give more episodes, or "
            "eval_fraction = 0."
        )
    count = min(max(1, round(fraction * len(episodes))), len(episodes) - 1)
    ranked = sorted((episode.name for episode in episodes), key=lambda name: derive_seed(seed, "held out", name))
    return set(ranked[:count])


def returns_to_go(rewards: NDArray[np.float64], gamma: float) -> NDArray[np.float64]:
    """The discounted sum of every reward and those after it."""
    total, found = 0.0, np.zeros(len(rewards))
    for step in range(len(rewards) - 1, -1, -1):
        total = float(rewards[step]) + gamma * total
        found[step] = total
    return found


def control_rows(
    episode: Recorded, codec: Codec, *, gamma: float = 1.0, system: str = "", examples: Sequence[Any] = ()
) -> Iterator[dict[str, Any]]:
    """One row for each step: the prompt, opened, the completion that closes it, and the numbers behind both."""
    to_go = returns_to_go(episode.rewards, gamma)
    for step in range(len(episode)):
        observation, action = episode.observations[step], episode.actions[step]
        yield {
            "messages": codec.prompt(observation, system=system, examples=examples),
            "completion": codec.completion(action),
            "observation": _plain(observation),
            "action": _plain(action),
            "reward": float(episode.rewards[step]),
            "return_to_go": float(to_go[step]),
            "episode": episode.name,
            "step": step,
        }


def control_arrays(episodes: Sequence[Recorded], aside: set[str], *, gamma: float = 1.0) -> dict[str, NDArray[Any]]:
    """All steps (N of them) of all episodes as arrays by name; `held_out` says which steps are not to learn from.

    observations, next_observations (N, O); actions (N, A) or (N,); rewards, return_to_go, terminated, truncated,
    held_out, step and episode (N,): the last is the place of the episode in the order they have here.
    """
    lengths = [len(episode) for episode in episodes]
    ends = np.cumsum(lengths) - 1
    terminated, truncated = np.zeros(sum(lengths), bool), np.zeros(sum(lengths), bool)
    terminated[ends] = [episode.terminated for episode in episodes]
    truncated[ends] = [not episode.terminated for episode in episodes]
    return {
        "observations": np.concatenate([episode.observations[:-1] for episode in episodes]),
        "next_observations": np.concatenate([episode.observations[1:] for episode in episodes]),
        "actions": np.concatenate([episode.actions for episode in episodes]),
        "rewards": np.concatenate([episode.rewards for episode in episodes]),
        "return_to_go": np.concatenate([returns_to_go(episode.rewards, gamma) for episode in episodes]),
        "terminated": terminated,
        "truncated": truncated,
        "held_out": np.repeat([episode.name in aside for episode in episodes], lengths),
        "episode": np.repeat(np.arange(len(episodes)), lengths),
        "step": np.concatenate([np.arange(length) for length in lengths]),
    }


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a folder that `control-data` wrote, or of its `arrays.npz`. Raises DataError for anything else."""
    file = path / ARRAYS if path.is_dir() else path
    wanted = {"observations", "actions", "rewards", "return_to_go", "held_out"}
    try:
        with np.load(file, allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in opened.files}
    except FileNotFoundError as error:
        raise DataError(f"{file}: there is no such file. Make it with echelon control-data.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not the arrays of echelon control-data ({error}).") from error
    if missing := sorted(wanted - arrays.keys()):
        raise DataError(f"{file}: it has no {', '.join(missing)}. Make it with echelon control-data.")
    return arrays


def read_codec(path: Path) -> Codec | None:
    """The codec that lies beside rows, given a file of them or their folder; None where none does."""
    file = (path if path.is_dir() else path.parent) / CODEC
    return Codec.from_json(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def write_rows(path: Path, rows: Iterator[Mapping[str, Any]]) -> int:
    """Put rows in place of what is in a file, all of them or none; how many there are."""
    unfinished, count = path.with_name(f".{path.name}.new"), 0
    with unfinished.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    unfinished.replace(path)
    return count


def _opened(minari: Any, name: str, download: bool) -> Any:
    """The dataset of a folder or an id."""
    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            return minari.MinariDataset(_data_folder(folder))
        return minari.load_dataset(name, download=download)
    except FileNotFoundError as error:
        known = list(minari.list_local_datasets())
        meant = did_you_mean(name, known)
        there = f" There are: {', '.join(known[:8])}." if known and not meant else ""
        raise DataError(
            f"dataset {name}: there is no such folder, and no such dataset on this machine.{meant}{there} Give "
            "--download to fetch it, or --env-id alone to collect one."
        ) from error
    except DataError:
        raise
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"dataset {name}: it cannot be opened ({line}). Give the folder or the id of one.") from error


def _data_folder(folder: Path) -> Path:
    """Where the data of a dataset lies that is in this folder, or is the only one below it."""
    for place in (folder, folder / "data"):
        if (place / "metadata.json").is_file():
            return place
    below = sorted(file.parent for file in folder.glob("**/data/metadata.json"))
    if len(below) == 1:
        return below[0]
    names = ", ".join(str(place.parent.relative_to(folder)) for place in below) or "none"
    raise DataError(f"dataset {folder}: one Minari dataset was expected in it, and there are: {names}. Name one.")


def _first(dataset: Any, episodes: int) -> Iterator[Any]:
    count = min(episodes, dataset.total_episodes) if episodes else dataset.total_episodes
    yield from dataset.iterate_episodes(dataset.episode_indices[:count])


def _recorded(episode: Any, name: str) -> Recorded:
    """An episode of Minari as vectors. Raises DataError for what is not one array of numbers, or not finite."""
    parts = {"observation": episode.observations, "action": episode.actions}
    for what, value in parts.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iufb":
            raise DataError(
                f"dataset {name}: an {what} is {type(value).__name__}, and a codec takes one array of numbers. Flatten "
                "the space (gymnasium.wrappers.FlattenObservation) and collect again."
            )
        if not np.isfinite(value).all():
            raise DataError(f"dataset {name}: episode {episode.id} has an {what} that is not finite. Leave it out.")
    length = len(episode.rewards)
    actions = np.asarray(episode.actions)
    counted = actions.ndim == 1 and actions.dtype.kind in "iub"
    return Recorded(
        np.asarray(episode.observations, np.float32).reshape(length + 1, -1),
        actions.astype(np.int64) if counted else actions.astype(np.float32).reshape(length, -1),
        np.asarray(episode.rewards, np.float64),
        bool(episode.terminations[-1]),
    )


def _collector(minari: Any) -> Any:
    """Minari's DataCollector, without JAX, which it would import at every step to append a number to a list."""
    buffers = importlib.import_module("minari.data_collector.episode_buffer")

    class Buffer(buffers.EpisodeBuffer):  # type: ignore[name-defined, misc]
        def add_step_data(self, step: dict[str, Any]) -> Buffer:
            self.observations.append(step["observation"])
            self.actions.append(step["action"])
            self.rewards.append(step["reward"])
            self.terminations.append(step["terminated"])
            self.truncations.append(step["truncated"])
            return self

    class Collector(minari.DataCollector):  # type: ignore[misc]
        def reset(self, **given: Any) -> Any:
            observation, info = super().reset(**given)
            begun: Any = self._buffer  # type: ignore[has-type]
            self._buffer = Buffer(begun.id, begun.seed, None, [observation], [])
            return observation, info

    return Collector


def _play(collector: Any, policy: Policy, *, seed: int) -> None:
    """One episode of a policy, seeded."""
    rng = np.random.default_rng(seed)
    observation, _ = collector.reset(seed=seed % 2**31)
    over = False
    while not over:
        action = policy(np.asarray(observation, np.float32).reshape(-1), rng)
        observation, _, terminated, truncated, _ = collector.step(action)
        over = terminated or truncated


@contextmanager
def _datasets_in(folder: Path) -> Iterator[None]:
    """Minari keeps its datasets where the environment variable says."""
    name = "MINARI_DATASETS_PATH"
    before = os.environ.get(name)
    os.environ[name] = str(folder.absolute())
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _plain(value: Any) -> Any:
    """Numbers as JSON has them, each with the fewest digits that are read back as the same number."""
    array = np.asarray(value)
    if array.dtype.kind == "f":
        return [float(str(number)) for number in array.reshape(-1)] if array.ndim else float(str(array))
    return array.tolist()
