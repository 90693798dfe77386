"""Games of TextArena as environments: against a module with its interface, and against the library where it is there."""

import enum
import importlib.util
import random
import sys
from types import ModuleType

import pytest

from echelon.envs import check_env, load_env
from echelon.envs.players import corpus
from echelon.errors import ConfigError, DataError, MissingExtra
from echelon.types import Task

INSTALLED = importlib.util.find_spec("textarena") is not None

Kind = enum.Enum("Kind", ["PROMPT", "PLAYER_ACTION", "GAME_MESSAGE"])


class State:
    """What TextArena's single-player state keeps."""

    def __init__(self, seed):
        random.seed(seed)
        self.said, self.rewards, self.info = [], None, {0: {"invalid_move": False}}


class Other(State):
    """The state of a game for two."""


class HighLow:
    """Higher or lower, the way TextArena's games are written: random numbers are Python's global ones."""

    state_type = State

    def __init__(self, highest=10):
        self.highest, self.dictionary, self.marks = highest, EnglishDictionary(), []

    def reset(self, num_players, seed=None):
        self.state = self.state_type(seed)
        self.secret = random.randint(1, self.highest)
        self.state.said.append((-1, f"Guess from 1 to {self.highest}.", Kind.PROMPT))

    def get_observation(self):
        said, self.state.said = self.state.said, []
        return 0, said

    def step(self, action):
        print("games talk to the terminal")
        self.marks.append(action)
        self.state.said.append((0, action, Kind.PLAYER_ACTION))
        guess = action.strip("[]")
        if not guess.isdigit():
            return self.end(0.0, "Not a number.", invalid=True)
        if int(guess) == self.secret:
            return self.end(1, "You found it.")
        # some games give kind and text in another order
        self.state.said.append((Kind.GAME_MESSAGE, f"No. A die shows {random.randint(1, 6)}.", -1))
        return False, {}

    def end(self, reward, reason, invalid=False):
        self.state.rewards = {0: reward}
        self.state.info[0] |= {"reason": reason, "invalid_move": invalid}
        return True, {}

    def close(self):
        return self.state.rewards, self.state.info


class EnglishDictionary:
    """Large in TextArena: copying it for every episode would cost more than the episode."""

    def __deepcopy__(self, memo):
        raise AssertionError("the word list was copied")


class ForTwo(HighLow):
    state_type = Other


class ForThree(HighLow):
    def reset(self, num_players, seed=None):
        raise ValueError("This game takes 3 players\nand not one")


class Swapped(HighLow):
    """Reward and reason in each other's place, and nothing said: some games do that."""

    def step(self, action):
        return self.end("Bad action.", 0.5)


class Silent(HighLow):
    def step(self, action):
        self.marks.append(action)
        return (True, {}) if len(self.marks) == 2 else (False, {})


class NeedsWords(HighLow):
    def __init__(self):
        raise LookupError("\n*****\n  Resource words not found.\n")


class NeedsKey(HighLow):
    def __init__(self):
        raise ValueError("Please set the KEY.")


class Wrapper:
    def __init__(self, env):
        self.env = env

    def __getattr__(self, name):
        return getattr(self.env, name)


class ActionWrapper(Wrapper):
    def action(self, action):
        return action if "[" in action else f"[{action}]"


class ObservationWrapper(Wrapper):
    def get_observation(self):
        raise AssertionError("repeats all that was ever said")


GAMES = {
    f"{game.__name__}-v0": game for game in (HighLow, ForTwo, ForThree, Swapped, Silent, NeedsWords, NeedsKey)
}


@pytest.fixture
def textarena(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, registration = ModuleType("textarena"), ModuleType("textarena.envs.registration")
    fake.Wrapper, fake.ActionWrapper, fake.ObservationType = Wrapper, ActionWrapper, Kind
    fake.SinglePlayerState = type("SinglePlayerState", (), {"__instancecheck__": None})
    fake.SinglePlayerState = State
    Other.__bases__ = (State,)
    fake.make = lambda name, **settings: ObservationWrapper(ActionWrapper(GAMES[name](**settings)))
    registration.ENV_REGISTRY = GAMES
    monkeypatch.setitem(sys.modules, "textarena", fake)
    monkeypatch.setitem(sys.modules, "textarena.envs", ModuleType("textarena.envs"))
    monkeypatch.setitem(sys.modules, "textarena.envs.registration", registration)
