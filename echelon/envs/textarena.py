"""Games of TextArena as environments: `textarena:GuessTheNumber-v0` and every other one that is played alone.

Knows TextArena's way of playing and none of its games. TextArena (Guertler et al., arXiv 2504.11442) is an optional
dependency, the extra `textarena`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from echelon.envs._shared import EnvSpec, need_at_least, need_split, user
from echelon.errors import ConfigError, DataError, did_you_mean, need
from echelon.types import Message, Step, Task

PREFIX = "textarena:"
TEST_SEEDS = 1_000_000
"""Tasks of the test split have seeds from here on."""
WORD_DATA = "python -m nltk.downloader words averaged_perceptron_tagger_eng"

_GLOBALS = threading.RLock()
"""Random numbers and standard output belong to the process, and rollouts may play on several threads."""


class TextArena:
    """One game of TextArena. The reward is the game's own and comes with its last turn; every end is `terminated`.

    `textarena_env` makes a subclass for each game. What the game says becomes one message a turn, without its echo of
    the player's words. Seeds decide everything: the games draw from Python's global random numbers, and each episode
    keeps its own state of them, so that episodes may be played side by side, and on several threads.
    """

    name: str
    game: Any
    """The game itself, without wrappers and not started; each episode plays a copy."""
    spoken: Sequence[Callable[[str], str]]
    """What its wrappers make of an action, the outermost first (they add missing brackets)."""
    observation: Any
    """TextArena's ObservationType."""

    def __init__(self, task: Task, *, tasks: int = 100, **game: Any) -> None:
        self._seed, self._turns = task.seed, 0
        self._random = random.Random(task.seed).getstate()
        self._game = _copy(self.game)

    @classmethod
    def tasks(cls, split: str, *, tasks: int = 100, **game: Any) -> list[Task]:
        """One task a seed, `tasks` of them, and others in each split. All other settings are the game's own."""
        need_split(cls.name, split)
        need_at_least(cls.name, "tasks", tasks, 1, "there is nothing to play")
        first = 0 if split == "train" else TEST_SEEDS
        return [Task(f"{cls.name}/{seed}", seed=seed) for seed in range(first, first + tasks)]

    def start(self) -> list[Message]:
        """The rules and the first position, as the game tells them."""
        with self._playing():
            self._game.reset(num_players=1, seed=self._seed)
            return user(self._heard())

    def step(self, action: str) -> Step:
        """Play an action. What the game calls invalid it answers itself; the second one in a row usually ends it."""
        self._turns += 1
        for wrapped in self.spoken:
            action = wrapped(action)
        with self._playing():
            ended, _ = self._game.step(action)
            heard = self._heard()
            if not ended:
                return Step(messages=user(heard or "(nothing happens)"))
            rewards, about = self._game.close()
        reward, about = _number(rewards), about.get(0, {})
        reason = str(about.get("reason") or "")
        told = "\n".join(part for part in (heard, reason if reason not in heard else "") if part)
        invalid = bool(about.get("invalid_move"))
        return Step(
            messages=user(told) if told else [],
            reward=reward,
            terminated=True,
            info={"win": float(reward >= 1), "turns": float(self._turns), "invalid": float(invalid)},
        )

    def _heard(self) -> str:
        """What the game has said since it was last asked, but for its echo of the player."""
        _, said = self._game.get_observation()
        return "\n".join(_text(part) for part in said if self.observation.PLAYER_ACTION not in part).strip()

    @contextmanager
    def _playing(self) -> Iterator[None]:
        with _apart(self._random) as left:
            yield
        self._random = left()


@contextmanager
def _apart(state: Any) -> Iterator[Callable[[], Any]]:
    """Python's global random numbers are in this state in here, and as they were outside; nothing is printed. One
    thread at a time is in here.

    Gives the function that tells, after the block, in which state they were left.
    """
    with _GLOBALS:
        outside, inside = random.getstate(), state
        random.setstate(state)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield lambda: inside
        finally:
            inside = random.getstate()
            random.setstate(outside)


def textarena_env(name: str, settings: Mapping[str, Any] | None = None) -> EnvSpec:
    """`textarena:<game>` as an environment; `settings` are `tasks` and the game's own.

    Raises MissingExtra without TextArena, ConfigError for a game or a setting it does not have, DataError for a game
    that cannot be made here or takes more than one player.
    """
    textarena = need("textarena", "textarena")
    settings = dict(settings or {})
    known = need("textarena.envs.registration", "textarena").ENV_REGISTRY
    game = name.removeprefix(PREFIX)
    if game not in known:
        listed = f"TextArena has {len(known)} games and variants, such as GuessTheNumber-v0 and Wordle-v0."
        raise ConfigError(f"There is no environment '{name}'.{did_you_mean(game, known)} {listed}")
    made = _make(textarena, name, {key: value for key, value in settings.items() if key != "tasks"})
    spoken = []
    while isinstance(made, textarena.Wrapper):
        if isinstance(made, textarena.ActionWrapper):
            spoken.append(made.action)
        made = made.env
    _check_alone(textarena, name, made)
    members = {"name": name, "game": made, "spoken": tuple(spoken), "observation": textarena.ObservationType}
    return EnvSpec(name, type("TextArena", (TextArena,), members), settings)


def _make(textarena: Any, name: str, settings: dict[str, Any]) -> Any:
    """The game with its wrappers. Games with word lists look for them, and download them, when they are made."""
    try:
        with _apart(random.Random(0).getstate()):  # some games draw when they are made
            return textarena.make(name.removeprefix(PREFIX), **settings)
    except Exception as error:
        if type(error) is LookupError:  # nltk's own, with a page of text
            raise DataError(f"{name} needs word lists of nltk. Run: {WORD_DATA}") from error
        if settings and isinstance(error, TypeError) and "argument" in str(error):
            raise ConfigError(f"{name}: {_reason(error)}. Use the game's own settings, and 'tasks'.") from error
        raise DataError(f"{name}: TextArena cannot make it: {type(error).__name__}: {_reason(error)}") from error


def _check_alone(textarena: Any, name: str, made: Any) -> None:
    """Raise DataError for a game that one player cannot play."""
    trial, reason = _copy(made), ""
    try:
        with _apart(random.Random(0).getstate()):
            trial.reset(num_players=1, seed=0)
    except Exception as error:  # games say in many ways that they want others
        reason = f" ({_reason(error)})"
    if reason or not isinstance(trial.state, textarena.SinglePlayerState):
        raise DataError(f"{name} is not a game for one player{reason}. Choose one that is, such as GuessTheNumber-v0.")


def _copy(game: Any) -> Any:
    """Another game like this one. They share their word lists, which are large and only ever read."""
    lists = [value for value in vars(game).values() if type(value).__name__ == "EnglishDictionary"]
    return copy.deepcopy(game, {id(value): value for value in lists})


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _text(part: Sequence[Any]) -> str:
    """The words of an observation, which some games give in another order than (sender, text, kind)."""
    return next((field for field in part if isinstance(field, str)), "")


def _number(rewards: Any) -> float:
    """The player's reward. Where a game gives none, or a text in its place, it is 0."""
    reward = (rewards or {}).get(0)
    return float(reward) if isinstance(reward, int | float) and math.isfinite(reward) else 0.0
