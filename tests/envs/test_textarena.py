"""Games of TextArena as environments: against a module with its interface, and the library itself where it is there."""

import enum
import importlib.util
import random
import sys
import threading
import time
from types import ModuleType

import pytest

from echelon.envs import check_env, load_env
from echelon.envs.players import corpus
from echelon.errors import ConfigError, DataError, MissingExtra
from echelon.types import Task

INSTALLED = importlib.util.find_spec("textarena") is not None

Kind = enum.Enum("Kind", ["PROMPT", "PLAYER_ACTION", "GAME_MESSAGE"])


class State:
    """What TextArena's states keep of a game."""

    def __init__(self, seed):
        random.seed(seed)
        self.said, self.rewards, self.info = [], None, {0: {"invalid_move": False}}


class Alone(State):
    """The state of a game for one player."""


class HighLow:
    """Higher or lower, the way TextArena's games are written: random numbers are Python's global ones."""

    state_type = Alone

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
    state_type = State


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


GAMES = {f"{game.__name__}-v0": game for game in (HighLow, ForTwo, ForThree, Swapped, Silent, NeedsWords, NeedsKey)}


@pytest.fixture
def textarena(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, registration = ModuleType("textarena"), ModuleType("textarena.envs.registration")
    fake.Wrapper, fake.ActionWrapper, fake.ObservationType = Wrapper, ActionWrapper, Kind
    fake.SinglePlayerState = Alone
    fake.make = lambda name, **settings: ObservationWrapper(ActionWrapper(GAMES[name](**settings)))
    registration.ENV_REGISTRY = GAMES
    monkeypatch.setitem(sys.modules, "textarena", fake)
    monkeypatch.setitem(sys.modules, "textarena.envs", ModuleType("textarena.envs"))
    monkeypatch.setitem(sys.modules, "textarena.envs.registration", registration)


def heard(step) -> str:
    (message,) = step.messages
    assert message["role"] == "user"
    return message["content"]


@pytest.mark.usefixtures("textarena")
def test_a_game_says_what_is_new_and_pays_at_its_end():
    spec = load_env("textarena:HighLow-v0", {"highest": 3})
    env = spec.make(Task("", seed=5))
    assert env.start() == [{"role": "user", "content": "Guess from 1 to 3."}]
    secret = env._game.secret
    step = env.step(str(secret % 3 + 1))  # the wrapper adds the brackets
    assert heard(step).startswith("No. A die shows ")
    assert (step.reward, step.terminated, step.info) == (0.0, False, {})
    step = env.step(f"[{secret}]")
    assert (heard(step), step.reward, step.terminated, step.truncated) == ("You found it.", 1.0, True, False)
    assert step.info == {"win": 1.0, "turns": 2.0, "invalid": 0.0}


@pytest.mark.usefixtures("textarena")
def test_an_invalid_action_that_ends_the_game_is_counted():
    env = load_env("textarena:HighLow-v0").make(Task(""))
    env.start()
    step = env.step("blorp")
    assert (heard(step), step.reward) == ("Not a number.", 0.0)
    assert step.info == {"win": 0.0, "turns": 1.0, "invalid": 1.0}


@pytest.mark.usefixtures("textarena")
def test_games_keep_every_rule_and_print_nothing(capsys):
    for game in ("HighLow", "Swapped", "Silent"):
        check_env(load_env(f"textarena:{game}-v0", {"tasks": 3}))
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("textarena")
def test_tasks_are_seeds_and_the_splits_share_none():
    spec = load_env("textarena:HighLow-v0", {"tasks": 3})
    assert [task.seed for task in spec.tasks("train")] == [0, 1, 2]
    assert [task.seed for task in spec.tasks("test")] == [1_000_000, 1_000_001, 1_000_002]
    assert len(load_env("textarena:HighLow-v0").tasks("test")) == 100


def played(spec, seeds: list[int]) -> dict[int, list[str]]:
    """Openings and answers of episodes played turn by turn side by side, the global random numbers moving meanwhile."""
    envs = {seed: spec.make(Task("", seed=seed)) for seed in seeds}
    said = {seed: [env.start()[0]["content"]] for seed, env in envs.items()}
    for _ in range(8):
        for seed, env in envs.items():
            said[seed].append(heard(env.step("0")))
            random.random()
    return said


@pytest.mark.usefixtures("textarena")
def test_episodes_side_by_side_are_the_episodes_one_by_one():
    spec = load_env("textarena:HighLow-v0")
    together = played(spec, [1, 2, 3])
    assert together == {seed: played(spec, [seed])[seed] for seed in (1, 2, 3)}
    assert len({tuple(said) for said in together.values()}) == 3


@pytest.mark.usefixtures("textarena")
def test_episodes_on_several_threads_are_the_episodes_one_by_one(monkeypatch):
    """Turns take a while, so that threads would meet in one."""
    spec = load_env("textarena:HighLow-v0")
    seeds, out = [1, 2, 3, 4], sys.stdout
    alone = {seed: played(spec, [seed])[seed] for seed in seeds}
    step, together = HighLow.step, {}

    def slowly(game, action):
        time.sleep(0.01)
        return step(game, action)

    monkeypatch.setattr(HighLow, "step", slowly)
    threads = [threading.Thread(target=lambda seed=seed: together.update(played(spec, [seed]))) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone
    assert sys.stdout is out


@pytest.mark.usefixtures("textarena")
def test_the_global_random_numbers_go_on_as_if_nobody_had_played():
    random.seed(11)
    expected = random.random()
    random.seed(11)
    env = load_env("textarena:HighLow-v0").make(Task("", seed=1))
    env.start()
    env.step("0")
    assert random.random() == expected


@pytest.mark.usefixtures("textarena")
def test_episodes_share_nothing_but_word_lists():
    spec = load_env("textarena:HighLow-v0")
    one, other = spec.make(Task("")), spec.make(Task(""))
    for env in (one, other):
        env.start()
    one.step("0")
    assert (one._game.marks, other._game.marks) == (["[0]"], [])
    assert one._game.dictionary is other._game.dictionary


@pytest.mark.usefixtures("textarena")
def test_a_reward_that_is_no_number_is_zero_and_silence_is_said():
    env = load_env("textarena:Swapped-v0").make(Task(""))
    env.start()
    step = env.step("1")
    assert (step.reward, heard(step)) == (0.0, "0.5")
    env = load_env("textarena:Silent-v0").make(Task(""))
    env.start()
    assert heard(env.step("1")) == "(nothing happens)"
    last = env.step("1")
    assert (last.reward, last.messages, last.terminated) == (0.0, [], True)


@pytest.mark.usefixtures("textarena")
def test_the_corpus_is_the_openings():
    assert "Guess from 1 to 10." in corpus(load_env("textarena:HighLow-v0", {"tasks": 2}))


@pytest.mark.usefixtures("textarena")
@pytest.mark.parametrize(
    ("name", "settings", "kind", "message"),
    [
        ("HighLo-v0", {}, ConfigError, "There is no environment 'textarena:HighLo-v0'. Did you mean 'HighLow-v0'? "
         "TextArena has 7 games and variants, such as GuessTheNumber-v0 and Wordle-v0."),
        ("HighLow-v0", {"hihgest": 3}, ConfigError, "textarena:HighLow-v0: HighLow.__init__() got an unexpected "
         "keyword argument 'hihgest'. Use the game's own settings, and 'tasks'."),
        ("ForTwo-v0", {}, DataError, "textarena:ForTwo-v0 is not a game for one player. Choose one that is, such as "
         "GuessTheNumber-v0."),
        ("ForThree-v0", {}, DataError, "textarena:ForThree-v0 is not a game for one player (This game takes 3 "
         "players). Choose one that is, such as GuessTheNumber-v0."),
        ("NeedsWords-v0", {}, DataError, "textarena:NeedsWords-v0 needs word lists of nltk. Run: "
         "python -m nltk.downloader words averaged_perceptron_tagger_eng"),
        ("NeedsKey-v0", {}, DataError, "textarena:NeedsKey-v0: TextArena cannot make it: ValueError: "
         "Please set the KEY."),
    ],
)  # fmt: skip
def test_what_cannot_be_played_says_so_in_one_line(name, settings, kind, message):
    with pytest.raises(kind) as error:
        load_env(f"textarena:{name}", settings)
    assert str(error.value) == message


@pytest.mark.usefixtures("textarena")
def test_settings_of_the_adapter_are_checked():
    with pytest.raises(
        ConfigError, match=r"^textarena:HighLow-v0: tasks = 0: there is nothing to play. Use 1 or more.$"
    ):
        load_env("textarena:HighLow-v0", {"tasks": 0}).tasks("train")
    with pytest.raises(ConfigError, match=r"textarena:HighLow-v0 has no split 'tests'"):
        load_env("textarena:HighLow-v0").tasks("tests")


def test_without_the_library_the_message_is_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "textarena", None)
    with pytest.raises(MissingExtra) as error:
        load_env("textarena:Wordle-v0")
    assert str(error.value) == "textarena is not installed. Run: pip install 'echelon[textarena]'"


real = pytest.mark.skipif(not INSTALLED, reason="TextArena is not installed")


@real
@pytest.mark.parametrize(
    "game",
    [
        *("2048", "Bandit", "Blackjack", "Countdown", "FifteenPuzzle", "FrozenLake", "GuessTheNumber", "LightsOut"),
        *("Mastermind", "Minesweeper", "PegJump", "Secretary", "Slitherlink", "Sudoku", "TowerOfHanoi"),
    ],
)
def test_games_of_the_library_keep_every_rule(game):
    check_env(load_env(f"textarena:{game}-v0", {"tasks": 4}), episodes=6)


@real
def test_guess_the_number_of_the_library():
    spec = load_env("textarena:GuessTheNumber-v0", {"max_number": 4})
    env = spec.make(Task("", seed=3))
    assert "between 1 and 4" in env.start()[0]["content"]
    step = next(step for step in (env.step(f"{number}") for number in range(1, 5)) if step.terminated)
    assert (step.reward, step.info["win"], step.info["invalid"]) == (1.0, 1.0, 0.0)
    assert "Congratulations" in heard(step)


@real
def test_a_game_of_the_library_for_two_is_refused():
    with pytest.raises(DataError, match=r"textarena:TicTacToe-v0 is not a game for one player"):
        load_env("textarena:TicTacToe-v0")
