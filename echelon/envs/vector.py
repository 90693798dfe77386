"""Environments of Gymnasium that advance together: numbers in, numbers out, and every episode from a seed of its own.

Knows nothing of policies, learning or words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from echelon.envs.gymnasium import EXTRA, PREFIX, as_gymnasium, make_simulator, space_of
from echelon.errors import CheckpointError, need

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Moved:
    """What one step did in every lane. An observation is the one the action led to, also where an episode ended."""

    observations: Floats
    """(E, D)."""
    rewards: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    """The episode is over, and nothing more is to be earned."""
    truncated: NDArray[np.bool_]
    """It was cut off, while more was to be earned."""

    @property
    def ended(self) -> NDArray[np.bool_]:
        """Where another episode has to begin."""
        return self.terminated | self.truncated


@dataclass(slots=True)
class Lane:
    """The episode that one of the environments is in."""

    seed: int = -1
    """What it began from; -1 while none has begun."""
    reward: float = 0.0
    """Earned so far."""
    began: int = 0
    """Episodes begun in this lane."""


class Lanes:
    """`count` environments of one kind, each in an episode of its own.

    Gymnasium's autoreset is off (`AutoresetMode.DISABLED`): the observation of a step is always the one its action led
    to, no step of an episode is a reset in disguise, and episodes begin where `begin` says, from the seed it is given.
    Whoever plays begins another one in every lane that ended before the next step.

    An environment cannot be asked for its state. What is saved instead is how each lane got there, its seed and its
    actions; `load` begins from the seed, takes the actions again, and refuses if that leads elsewhere.
    """

    def __init__(
        self,
        name: str,
        count: int,
        *,
        horizon: int = 0,
        flatten: bool = False,
        env_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        vector: Any = need("gymnasium.vector", EXTRA)
        self.name = name.removeprefix(PREFIX)
        make = partial(make_simulator, self.name, horizon=horizon, flatten=flatten, env_kwargs=env_kwargs)
        self._envs = vector.SyncVectorEnv([make] * count, autoreset_mode=vector.AutoresetMode.DISABLED)
        self.lanes = [Lane() for _ in range(count)]
        self._taken: list[list[Any]] = [[] for _ in range(count)]
        self.width = space_of(self._envs.single_observation_space, "observation", self.name).size
        """How many numbers an observation has."""
        self.actions = space_of(self._envs.single_action_space, "action", self.name)
        self.longest: int = self._envs.envs[0].spec.max_episode_steps
        """Steps after which an episode is cut off."""
        self.observations: Floats = np.zeros((count, self.width), dtype=np.float32)
        """(E, D): what each lane is at."""

    def __len__(self) -> int:
        return len(self.lanes)

    def begin(self, seeds: Mapping[int, int]) -> None:
        """Begin an episode in each of these lanes, from its seed; the others stay where they are."""
        if not seeds:
            return
        mask = np.zeros(len(self), dtype=np.bool_)
        mask[list(seeds)] = True
        given = [seeds.get(lane) for lane in range(len(self))]
        found, _ = self._envs.reset(seed=given, options=None if mask.all() else {"reset_mask": mask})
        self.observations = np.where(mask[:, None], self._flat(found), self.observations)
        for number, seed in seeds.items():
            self.lanes[number] = Lane(seed, began=self.lanes[number].began + 1)
            self._taken[number] = []

    def step(self, actions: NDArray[Any]) -> Moved:
        """One action in every lane, (E,) or (E, A). None of them may have ended."""
        found, rewards, terminated, truncated, _ = self._envs.step(self._applied(actions))
        self.observations = self._flat(found)
        for lane, taken, action, reward in zip(self.lanes, self._taken, actions, rewards, strict=True):
            taken.append(action)
            lane.reward += float(reward)
        return Moved(self.observations, rewards, terminated, truncated)

    def length(self, lane: int) -> int:
        """Steps of the episode that a lane is in."""
        return len(self._taken[lane])

    def save(self, folder: Path) -> None:
        """Seeds, and the actions taken since."""
        rows = [{"seed": lane.seed, "began": lane.began} for lane in self.lanes]
        (folder / "lanes.json").write_text(json.dumps(rows), encoding="utf-8")
        taken = {f"taken/{number}": np.asarray(taken) for number, taken in enumerate(self._taken) if taken}
        save_file({**taken, "observations": self.observations}, folder / "lanes.safetensors")

    def load(self, folder: Path) -> None:
        """Go to where `save` was called, action by action. Raises CheckpointError if that leads somewhere else."""
        try:
            rows = json.loads((folder / "lanes.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "lanes.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: no environments were saved there ({error}).") from error
        if len(rows) != len(self):
            raise CheckpointError(f"{folder}: {len(rows)} environments were saved, and there are {len(self)} here.")
        self.begin({number: row["seed"] for number, row in enumerate(rows) if row["seed"] >= 0})
        for number, row in enumerate(rows):
            self._retrace(number, tensors.get(f"taken/{number}", np.zeros(0)))
            self.lanes[number].began = row["began"]
        if not np.array_equal(self.observations, tensors["observations"]):
            raise CheckpointError(
                f"{folder}: {self.name} does not come back to where it was when the same actions are taken from the "
                "same seed, so a run with it cannot be continued. Start a new run with another --out."
            )

    def close(self) -> None:
        """Let the environments go."""
        self._envs.close()

    def _retrace(self, number: int, taken: NDArray[Any]) -> None:
        """Take these actions in one lane."""
        env = self._envs.envs[number]
        for action in taken:
            found, reward, *_ = env.step(as_gymnasium(env.action_space, action))
            self.observations[number] = self._flat(np.asarray(found)[None])[0]
            self.lanes[number].reward += float(reward)
            self._taken[number].append(action)

    def _applied(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Actions as Gymnasium takes them, one for each environment."""
        space = self._envs.action_space
        rounded = np.rint(actions) if np.issubdtype(space.dtype, np.integer) else actions
        return rounded.reshape(space.shape).astype(space.dtype)

    def _flat(self, found: NDArray[Any]) -> Floats:
        return np.array(found, dtype=np.float32).reshape(len(found), self.width)
