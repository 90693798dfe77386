"""Gymnasium's environments as environments for language models: `gymnasium:CartPole-v1` and every other one whose
observations and actions are boxes of numbers or choices.

Knows Gymnasium's way of stepping and none of its plants; how numbers become words is the codec's. Gymnasium (Towers et
al., arXiv 2407.17032) is an optional dependency, the extra `control`.
"""

from __future__ import annotations

import importlib
import json
import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np

from echelon.envs._shared import EnvSpec, Player, need_split
from echelon.envs.experts import Expert, expert
from echelon.envs.plants import PLANTS, Plant
from echelon.errors import ConfigError, DataError, MissingExtra, did_you_mean, need
from echelon.seeds import derive_seed
from echelon.text.codec import ACTION_END, STYLES, Action, Codec, Range, Space, Style, Vector
from echelon.types import Message, Step, Task

PREFIX = "gymnasium:"
EXTRA = "control"
TEST_SEEDS = 1_000_000
"""Tasks of the test split have seeds from here on."""
LONGEST_EPISODE = 1000
"""Steps after which an environment without a time limit of its own is cut off."""
LONGEST_VECTOR = 1000
"""Numbers that an observation or action may have at most."""

Invalid = Literal["penalise", "resample", "hold", "random", "default"]
INVALID: tuple[Invalid, ...] = ("penalise", "resample", "hold", "random", "default")
Simulator: TypeAlias = Any
"""A `gymnasium.Env`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an environment of Gymnasium is played and told. Raises ConfigError for what cannot work."""

    tasks: int = 1000
    """Seeds in each split; an episode's seed is its task's."""
    horizon: int = 0
    """Steps after which an episode is truncated; 0 is the environment's own limit."""
    style: Style = "float"
    """How values are written, where it fits: boxes by `float` or `bins`, choices by `index` or `name`."""
    observation_style: str = ""
    """The same for observations alone."""
    action_style: str = ""
    """The same for actions alone."""
    decimals: int = 5
    bins: int = 999
    observation_ranges: Sequence[Sequence[float]] = ()
    """Lowest and highest value of each bin axis, where the space has no bounds or data are narrower."""
    action_ranges: Sequence[Sequence[float]] = ()
    codec: str = ""
    """A codec.json to write with instead of all that (data that a model was trained on have one)."""
    instruction: str | None = None
    """In place of the instruction made from names, units and ranges; an empty text leaves it out."""
    system: str = ""
    """A system message."""
    examples: Sequence[Any] = ()
    """Pairs of an observation and an action that are shown in every prompt."""
    invalid: Invalid = "penalise"
    """What is done where a text is no action: the default action and a penalty (penalise); ask again, and after
    `resample` times penalise; the action before once more (hold); one drawn at random; the default action."""
    resample: int = 10
    penalty: float = 1.0
    """Taken from the reward of a step whose text is no action (penalise, resample)."""
    flatten: bool = False
    """Lay the parts of a Dict or Tuple observation in a row."""
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the environment itself."""
    wrap: Callable[[Simulator, Task], Simulator] | None = None
    """Wraps the simulator of an episode, a recorder around it for example (from Python)."""

    def __post_init__(self) -> None:
        _need("invalid", self.invalid, INVALID)
        for name in ("style", "observation_style", "action_style"):
            if getattr(self, name) or name == "style":
                _need(name, getattr(self, name), STYLES)
        for name, least in (("tasks", 1), ("horizon", 0), ("resample", 0), ("decimals", 0), ("bins", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} = {value!r}: it is a count. Give a whole number of {least} or more.")
        if not isinstance(self.penalty, int | float) or not 0 <= self.penalty < math.inf:
            raise ConfigError(f"penalty = {self.penalty!r}: it is taken from the reward. Give a number of 0 or more.")
        if self.wrap is not None and not callable(self.wrap):
            raise ConfigError(f"wrap = {self.wrap!r}: it is a function (simulator, task). Leave it out of files.")
        if not isinstance(self.env_kwargs, Mapping):
            raise ConfigError(f"env_kwargs = {self.env_kwargs!r}: give settings of the environment by name.")


class GymnasiumEnv:
    """One episode of one environment. `gymnasium_env` makes a subclass for each environment and settings.

    Every `messages` it gives is a whole prompt of its own, which ends with the opening tag of the action. Any text is
    an answer; numbers out of range are clipped. Where Gymnasium says both, over and cut off, it is over.
    """

    afresh = True
    """The role begins a new conversation with every message: the state is all in the observation."""
    name: str
    id: str
    """Gymnasium's own."""
    settings: Settings
    codec: Codec

    def __init__(self, task: Task, **settings: Any) -> None:
        self._task = task
        made = self.settings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of an old version, said when it was looked up
            simulator = make_simulator(self.id, horizon=made.horizon, flatten=made.flatten, env_kwargs=made.env_kwargs)
        self._simulator = self.settings.wrap(simulator, task) if self.settings.wrap else simulator
        self._observation: Vector = np.zeros(self.codec.observation.size, dtype=np.float32)
        self._action: Action | None = None
        self._steps = self._texts = self._unread = self._clipped = self._again = 0
        self._return = 0.0

    @classmethod
    def tasks(cls, split: str, **settings: Any) -> list[Task]:
        """One task a seed, and others in each split."""
        need_split(cls.name, split)
        first = 0 if split == "train" else TEST_SEEDS
        seeds = range(first, first + cls.settings.tasks)
        return [Task(f"{cls.name}/{seed}", data={"seed": seed}, seed=seed) for seed in seeds]

    @property
    def observation(self) -> Vector:
        """The state as numbers: what the latest prompt says, before rounding. A choice is a vector of one."""
        return self._observation

    @property
    def action(self) -> Action | None:
        """What was applied last, whatever had been said; None before the first step."""
        return self._action

    @property
    def unwrapped(self) -> Simulator:
        """The environment of Gymnasium below its wrappers."""
        return self._simulator.unwrapped

    def prompt(self, *, goal: str = "") -> list[Message]:
        """The prompt for the current observation; with a goal, what a higher level wants of the next steps."""
        shown = [(seen, done) for seen, done in self.settings.examples]
        return self.codec.prompt(self._observation, system=self.settings.system, examples=shown, goal=goal)

    def stop_when(self, utterance: str) -> bool:
        """An answer ends with the closing tag."""
        return ACTION_END in utterance

    def start(self) -> list[Message]:
        """The first prompt; the state is drawn from the task's seed."""
        observation, _ = self._simulator.reset(seed=self._task.seed)
        self._observation = _flat(observation)
        return self.prompt()

    def step(self, action: str) -> Step:
        """Apply the action that a text says. `info`: the environment's own `return` and `length` so far, which
        fraction of the texts was `invalid` or `clipped`, and what was applied, number by number (`action/0`)."""
        parsed = self.codec.decode_action(action)
        self._texts += 1
        self._clipped += parsed.clipped
        self._unread += parsed.value is None
        if parsed.value is None and self.settings.invalid == "resample" and self._again < self.settings.resample:
            self._again += 1
            return Step(messages=self.prompt(), info=self._info())
        self._again = 0
        penalised = parsed.value is None and self.settings.invalid in ("penalise", "resample")
        self._action = self._instead() if parsed.value is None else parsed.value
        applied = as_gymnasium(self._simulator.action_space, self._action)
        observation, reward, terminated, truncated, _ = self._simulator.step(applied)
        self._observation = _flat(observation)
        self._steps += 1
        self._return += float(reward)
        if terminated or truncated:
            self.close()
        return Step(
            messages=self.prompt(),
            reward=float(reward) - (self.settings.penalty if penalised else 0.0),
            terminated=bool(terminated),
            truncated=bool(truncated and not terminated),
            info=self._info(),
        )

    def close(self) -> None:
        """Let go of windows and files; done by itself at the end of an episode."""
        self._simulator.close()

    @classmethod
    def utterances(cls, **settings: Any) -> list[str]:
        """Every choice, or some vectors of a box, as a model should say them."""
        space, draw = cls.codec.action, np.random.default_rng(0)
        choices = range(space.start, space.start + space.n)
        return [cls.codec.completion(action) for action in choices or [draw_action(space, draw) for _ in range(20)]]

    @classmethod
    def player(cls, kind: str = "random", seed: int = 0, **settings: Any) -> Player:
        """Plays by the last observation it reads: `random`, `constant` (the default action) or `optimal` (the scripted
        expert of the environment)."""
        _need("player", kind, ("random", "constant", "optimal"))
        acts = expert(cls.id) if kind == "optimal" else None
        return partial(_say, cls.codec, acts, None if kind == "constant" else seed)

    def _instead(self) -> Action:
        """What is done where nothing was understood."""
        if self.settings.invalid == "random":
            return draw_action(self.codec.action, np.random.default_rng([self._task.seed, self._texts]))
        if self.settings.invalid == "hold" and self._action is not None:
            return self._action
        return self.codec.default_action()

    def _info(self) -> dict[str, float]:
        numbers = [] if self._action is None else np.atleast_1d(self._action).tolist()
        return {
            "return": self._return,
            "length": float(self._steps),
            "invalid": self._unread / self._texts,
            "clipped": self._clipped / self._texts,
            **{f"action/{index}": float(number) for index, number in enumerate(numbers)},
        }


def gymnasium_env(name: str, settings: Mapping[str, Any] | None = None) -> EnvSpec:
    """`gymnasium:<id>` as an environment; `settings` are those of `Settings`.

    Raises MissingExtra without Gymnasium or what the environment needs besides, ConfigError for an environment or a
    setting there is not, DataError for an environment whose spaces no codec covers.
    """
    made = read_settings(name, settings or {})
    env_id = name.removeprefix(PREFIX)
    simulator = make_simulator(env_id, horizon=made.horizon, flatten=made.flatten, env_kwargs=made.env_kwargs)
    codec = codec_for(simulator, env_id, made)
    simulator.close()
    members = {"name": name, "id": env_id, "settings": made, "codec": codec}
    return EnvSpec(name, type("GymnasiumEnv", (GymnasiumEnv,), members), dict(settings or {}))


def read_settings(name: str, settings: Mapping[str, Any]) -> Settings:
    """Settings by name. ConfigError, which says whose they are, for one there is not or a value that cannot work."""
    known = [item.name for item in fields(Settings)]
    for key in settings:
        if key not in known:
            raise ConfigError(
                f"{name} has no setting '{key}'.{did_you_mean(key, known)} It takes {', '.join(known)}; those of the "
                "environment itself go into env_kwargs."
            )
    try:
        return Settings(**settings)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def make_simulator(
    env_id: str, *, horizon: int = 0, flatten: bool = False, env_kwargs: Mapping[str, Any] | None = None
) -> Simulator:
    """The environment of Gymnasium itself. Raises as `gymnasium_env` does, in a line that says what to do."""
    gymnasium = need("gymnasium", EXTRA)
    if env_id.startswith("dm_control/"):
        need("shimmy", "physics")  # importing it makes its environments known
    _check_known(gymnasium, env_id)
    spec = gymnasium.registry.get(env_id.rpartition(":")[2])
    limit = horizon or (None if spec is not None and spec.max_episode_steps else LONGEST_EPISODE)
    try:
        made = gymnasium.make(env_id, max_episode_steps=limit, disable_env_checker=True, **(env_kwargs or {}))
    except gymnasium.error.DependencyNotInstalled as error:
        raise MissingExtra(f"{env_id} needs more than Gymnasium: {_reason(error)}") from error
    except TypeError as error:
        raise ConfigError(f"{env_id}: {_reason(error)}. Give its own settings in env_kwargs, no others.") from error
    except Exception as error:
        raise DataError(f"{env_id}: Gymnasium cannot make it: {type(error).__name__}: {_reason(error)}") from error
    return gymnasium.wrappers.FlattenObservation(made) if flatten else made


def _check_known(gymnasium: Any, env_id: str) -> None:
    """Raise ConfigError for an id that Gymnasium, or the module named before it, does not have."""
    module, colon, bare = env_id.rpartition(":")
    if colon:
        try:
            importlib.import_module(module)
        except (ImportError, ValueError) as error:
            raise MissingExtra(f"{env_id} is of the module '{module}': {_reason(error)}. Install it.") from error
    if bare not in gymnasium.registry:
        such = "such as CartPole-v1, Acrobot-v1, MountainCar-v0 and Pendulum-v1"
        raise ConfigError(
            f"Gymnasium has no environment '{bare}'.{did_you_mean(bare, gymnasium.registry)} "
            f"It has {len(gymnasium.registry)}, {such}; those of another module are written module:id."
        )


def codec_for(simulator: Simulator, env_id: str, settings: Settings | None = None) -> Codec:
    """The codec of an environment: its spaces with the names of their values, written as the settings say.

    With `settings.codec` that one, if it is for these spaces. Raises ConfigError or DataError.
    """
    settings = settings or Settings()
    plant = PLANTS.get(env_id.rpartition(":")[2].rpartition("-v")[0], Plant())
    seen = space_of(simulator.observation_space, "observation", env_id, plant.observation, plant.observation_units)
    done = space_of(simulator.action_space, "action", env_id, plant.action, plant.action_units)
    if settings.codec:
        return _read_codec(settings.codec, env_id, seen, done)
    return Codec(
        observation=seen,
        action=done,
        observation_style=_style(seen, settings.observation_style, settings.style),
        action_style=_style(done, settings.action_style, settings.style),
        decimals=settings.decimals,
        bins=settings.bins,
        observation_ranges=_ranges("observation_ranges", settings.observation_ranges),
        action_ranges=_ranges("action_ranges", settings.action_ranges),
        plant=f"You control {plant.about or env_id}.",
        instruction=settings.instruction,
    )


def space_of(space: Any, what: str, env_id: str, names: Sequence[str] = (), units: Sequence[str] = ()) -> Space:
    """A space of Gymnasium as plain data, with names if they are as many as its values.

    Raises DataError for one that is neither a box of some numbers nor a choice.
    """
    kind = type(space).__name__
    if kind == "Discrete":
        fitting = tuple(names) if len(names) == int(space.n) else ()
        return Space("discrete", n=int(space.n), start=int(space.start), names=fitting)
    refused = f"{env_id}: its {what} is {_a(kind)}, and a codec writes boxes of numbers and choices."
    if kind != "Box":
        hint = " Set flatten to lay its parts in a row." if kind in ("Dict", "Tuple") and what == "observation" else ""
        raise DataError(f"{refused}{hint or ' Choose another environment.'}")
    if len(space.shape) >= 2 and space.dtype == np.uint8:
        raise DataError(f"{env_id}: its {what} is an image of the shape {space.shape}, which no codec writes as words.")
    low, high = (tuple(np.asarray(side, dtype=np.float64).reshape(-1).tolist()) for side in (space.low, space.high))
    if not 1 <= len(low) <= LONGEST_VECTOR:
        raise DataError(f"{env_id}: its {what} has {len(low)} numbers; a codec writes 1 to {LONGEST_VECTOR}.")
    if len(names) != len(low):
        return Space("box", low, high)
    return Space("box", low, high, names=tuple(names), units=tuple(units))


def as_gymnasium(space: Any, action: Action) -> Any:
    """An action of a codec as the environment's `step` takes it: in its shape and type."""
    if type(space).__name__ == "Discrete":
        return int(action)
    flat = np.asarray(action).reshape(space.shape)
    return np.rint(flat).astype(space.dtype) if np.issubdtype(space.dtype, np.integer) else flat.astype(space.dtype)


def disturbed(simulator: Simulator, share: float) -> Simulator:
    """The simulator, which at this part of the steps does something at random in place of what it is told. What it does
    depends on the seed that an episode begins with."""
    gymnasium: Any = need("gymnasium", EXTRA)
    space = space_of(simulator.action_space, "action", "the simulator")

    class Disturbed(gymnasium.ActionWrapper):  # type: ignore[misc]
        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            self.draw = np.random.default_rng(derive_seed(seed or 0, "disturbed"))
            return super().reset(seed=seed, options=options)

        def action(self, action: Any) -> Any:
            if self.draw.random() >= share:
                return action
            return as_gymnasium(simulator.action_space, draw_action(space, self.draw))

    made: Simulator = Disturbed(simulator)
    return made


def draw_action(space: Space, draw: np.random.Generator) -> Action:
    """A choice or a vector at random: uniform between bounds, and where one is missing normal around 0, clipped."""
    if space.kind == "discrete":
        return int(space.start + draw.integers(space.n))
    low, high = np.array(space.low), np.array(space.high)
    bounded = np.isfinite(low) & np.isfinite(high)
    uniform = draw.uniform(np.where(bounded, low, 0.0), np.where(bounded, high, 1.0))
    drawn = np.where(bounded, uniform, draw.standard_normal(space.size))
    return np.clip(drawn, low, high).astype(np.float32)


def _say(codec: Codec, acts: Expert | None, seed: int | None, messages: Sequence[Message]) -> str:
    """What a scripted player says: as an expert acts, at random with a seed, or else always the same."""
    heard = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    if acts is not None:
        return codec.completion(acts(codec.decode_observation(heard)))
    if seed is None:
        return codec.completion(codec.default_action())
    draw = np.random.default_rng([seed, len(messages), zlib.crc32(heard.encode())])
    return codec.completion(draw_action(codec.action, draw))


def _flat(observation: Any) -> Vector:
    return np.asarray(observation, dtype=np.float32).reshape(-1)


def _style(space: Space, own: str, both: Style) -> Style:
    """The style of one side: its own, or the common one where that fits its space."""
    fits: tuple[Style, ...] = ("float", "bins") if space.kind == "box" else ("index", "name")
    return cast(Style, own or (both if both in fits else fits[0]))  # one that does not fit is refused by the codec


def _ranges(name: str, given: Sequence[Sequence[float]]) -> tuple[Range, ...]:
    try:
        return tuple((float(lo), float(hi)) for lo, hi in given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} = {given!r}: give pairs of a lowest and a highest value.") from error


def _read_codec(path: str, env_id: str, seen: Space, done: Space) -> Codec:
    try:
        codec = Codec.from_json(json.loads(Path(path).read_text()))
    except (OSError, ValueError) as error:
        raise DataError(f"codec = {path}: {_reason(error)}") from error
    for what, has, needs in (("observation", codec.observation, seen), ("action", codec.action, done)):
        if (has.kind, has.size, has.n, has.start) != (needs.kind, needs.size, needs.n, needs.start):
            raise ConfigError(
                f"codec = {path} is of another environment: its {what} has {has.n or has.size} "
                f"{'choices' if has.n else 'numbers'}, that of {env_id} {needs.n or needs.size} "
                f"{'choices' if needs.n else 'numbers'}. Leave codec out, or give the one of its data."
            )
    return codec


def _need(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        listed = ", ".join(known)
        raise ConfigError(f"{name} = {value!r}: it is one of {listed}.{did_you_mean(str(value), known)}")


def _a(kind: str) -> str:
    return f"a {kind} space"


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
