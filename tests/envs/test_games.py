"""The rules of the built-in games, and what chance and the best play earn in them."""

import math

import pytest

from echelon.envs import check_env, load_env
from echelon.envs.guess_number import number_in
from echelon.envs.knowledge import properties, things, understand
from echelon.envs.players import corpus, make_player, measure, play
from echelon.envs.text_lock import KEYS, fitting
from echelon.envs.twenty_questions import TwentyQuestions, bound, plan
from echelon.errors import ConfigError, DataError
from echelon.types import Env, Task

DOG = Task("twenty_questions/dog", {"thing": "dog"})
ALL_SETTINGS = [
    ("twenty_questions", {}),
    ("twenty_questions", {"subset": True, "max_turns": 3}),
    ("guess_number", {}),
    ("guess_number", {"low": -3, "high": 3, "max_turns": 1}),
    ("text_lock", {}),
    ("text_lock", {"doors": 1, "keys": 12, "sparse": True}),
    ("text_lock", {"chain": True, "lock": 7}),
]


def heard(step) -> str:
    (message,) = step.messages
    assert message["role"] == "user"
    return message["content"]


@pytest.mark.parametrize(("name", "settings"), ALL_SETTINGS)
def test_built_in_environments_keep_every_rule(name, settings):
    spec = check_env(load_env(name, settings))
    assert isinstance(spec.make(spec.tasks("train")[0]), Env)


def test_a_game_of_twenty_questions():
    env = TwentyQuestions(DOG)
    (opening,) = env.start()
    assert opening["content"] == "Guess my thing in 20 yes/no questions, like: Is it alive? Is it a dog?"
    for said, answer in [
        ("Is it alive?", "Yes."),
        ("Is it bigger than a chair?", "No."),
        ("Is it a cat?", "No."),
        ("Blorp?", "I did not understand."),
    ]:
        step = env.step(said)
        assert (heard(step), step.reward, step.terminated, step.info) == (answer, -1.0, False, {})
    step = env.step("Is it the dog?")
    assert (heard(step), step.reward, step.terminated, step.truncated) == ("Yes.", 0.0, True, False)
    assert step.info == {"win": 1.0, "turns": 5.0}


def test_the_twentieth_turn_without_the_answer_is_the_end_by_the_rules():
    env = TwentyQuestions(DOG)
    steps = [env.step("Is it a cat?") for _ in range(20)]
    assert [step.terminated for step in steps] == [False] * 19 + [True]
    assert not any(step.truncated for step in steps)
    assert sum(step.reward for step in steps) == -20
    assert steps[-1].info == {"win": 0.0, "turns": 20.0}


def test_a_win_at_the_last_turn_is_a_win():
    env = TwentyQuestions(DOG, max_turns=2)
    env.step("Is it a cat?")
    assert env.step("dog").info == {"win": 1.0, "turns": 2.0}


def test_every_canonical_question_is_answered_by_the_table_for_every_thing():
    for task in TwentyQuestions.tasks("train"):
        thing = next(thing for thing in things() if thing.name == task.data["thing"])
        env = TwentyQuestions(task, max_turns=1000)
        for prop, question in zip(properties(), TwentyQuestions.questions(), strict=True):
            assert heard(env.step(question)) == ("Yes." if prop.key in thing.properties else "No.")


def test_every_utterance_of_the_players_is_understood():
    for subset in (False, True):
        assert all(understand(text) for text in TwentyQuestions.utterances(subset=subset))
    assert len(TwentyQuestions.utterances()) == 67 + 157
    assert len(TwentyQuestions.guesses(subset=True)) == 10


def test_both_splits_of_twenty_questions_list_every_thing_once():
    assert TwentyQuestions.tasks("train") == TwentyQuestions.tasks("test")
    assert [task.data["thing"] for task in TwentyQuestions.tasks("train")] == [thing.name for thing in things()]
    assert len(TwentyQuestions.tasks("train", subset=True)) == 10


def chance(things: int, guess: float = 0.5, turns: int = 20) -> tuple[float, float]:
    """Exact mean return and turns of a player who names a random thing with probability `guess` each turn."""
    wrong = 1 - guess / things
    return -sum(wrong**turn for turn in range(1, turns + 1)), sum(wrong**turn for turn in range(turns))


@pytest.mark.parametrize(("subset", "count", "expected"), [(True, 10, -12.1887), (False, 157, -19.3445)])
def test_chance_in_twenty_questions(subset, count, expected):
    reward, turns = chance(count)
    assert reward == pytest.approx(expected, abs=1e-4)
    got = measure(load_env("twenty_questions", {"subset": subset}), "random", rounds=3000 // count)
    assert got.reward == pytest.approx(reward, abs=4 * got.error)
    assert got.turns == pytest.approx(turns, abs=4 * got.error)


def test_the_guess_probability_of_the_random_player_is_an_option():
    spec = load_env("twenty_questions", {"subset": True})
    got = measure(spec, "random", rounds=300, guess=1.0)
    assert got.reward == pytest.approx(chance(10, guess=1.0)[0], abs=4 * got.error)


def test_optimal_play_on_the_subset_is_exactly_the_bound():
    got = measure(load_env("twenty_questions", {"subset": True}), "optimal")
    assert (got.reward, got.turns, got.wins) == pytest.approx((-2.8, 3.8, 1.0))
    assert bound(10) == pytest.approx(-2.8)


def test_greedy_play_on_all_things_wins_always_and_is_near_the_bound():
    got = measure("twenty_questions", "optimal")
    assert got.reward == pytest.approx(-1111 / 157)  # -7.08
    assert got.wins == 1.0
    assert bound(157) == pytest.approx(-6.777, abs=5e-4)


@pytest.mark.parametrize("subset", [True, False])
def test_the_plan_expects_what_it_gets(subset):
    everything = (1 << len(things(subset))) - 1
    got = measure(load_env("twenty_questions", {"subset": subset}), "optimal")
    assert plan(subset).move(everything)[0] == pytest.approx(got.reward)


@pytest.mark.parametrize(("count", "expected"), [(1, 0), (2, -0.5), (3, -1), (4, -1.5)])
def test_the_bound_by_hand(count, expected):
    """Up to four things guessing one after the other is best: 0, 1, 2, 3 turns lost with equal probability."""
    assert bound(count) == expected


def test_random_players_never_listen_and_optimal_ones_do():
    spec = load_env("twenty_questions", {"subset": True})
    dialogues = {
        kind: [play(spec, task, make_player(spec, kind, seed=3)) for task in spec.tasks("test")] for kind in KINDS
    }
    said = {
        kind: {
            tuple(m["content"] for m in d.messages if m["role"] == "assistant")[:2]
            for d in played
            if len(d.rewards) > 1
        }
        for kind, played in dialogues.items()
    }
    assert len(said["random"]) == 1
    assert len(said["optimal"]) > 1


KINDS = ("random", "optimal")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["twenty_questions", "guess_number", "text_lock"])
def test_players_are_functions_of_seed_and_dialogue(name, kind):
    spec = load_env(name)
    task = spec.tasks("train")[3]
    player = make_player(spec, kind, seed=5)
    first = play(spec, task, player)
    assert play(spec, task, player) == first == play(spec, task, make_player(spec, kind, seed=5))


def test_a_game_of_guess_the_number():
    spec = load_env("guess_number")
    env = spec.make(Task("guess_number/7", {"number": 7}))
    assert env.start() == [{"role": "user", "content": "Guess my number from 1 to 10."}]
    answers = [heard(env.step(said)) for said in ("5", "Is it 9?", "4 or 6", "seven")]
    assert answers == ["Higher.", "Lower.", "Say one number.", "Say one number."]
    step = env.step("7!")
    assert (heard(step), step.reward, step.terminated, step.info) == ("Correct.", 0.0, True, {"win": 1.0, "turns": 5.0})


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), ("-7", -7), ("it is 7.", 7), ("", None), ("1 2", None), ("9" * 5000, None), ("٣", None)],
)
def test_the_one_number_in_a_text(text, number):
    assert number_in(text) == number


def test_bisection_and_chance_in_guess_the_number():
    """One number at depth 1, two at 2, four at 3, three at 4: 2.9 turns. Chance loses 0.9 + ... + 0.9^5."""
    got = measure("guess_number", "optimal")
    assert (got.reward, got.turns, got.wins) == pytest.approx((-1.9, 2.9, 1.0))
    got = measure("guess_number", "random", rounds=300)
    assert got.reward == pytest.approx(-3.68559, abs=4 * got.error)


def rewards_of(settings, said) -> list[float]:
    """Rewards of a row of four doors with the hints red, blue, green, red; `said` tells which words are right."""
    env = load_env("text_lock", {"doors": 4, "keys": 3, **settings}).make(Task("row", {"hints": HINTS}))
    env.start()
    opens = fitting(3, 0)
    wrong = {key: next(other for other in KEYS[:3] if other != key) for key in KEYS[:3]}
    words = [opens[hint] if right else wrong[opens[hint]] for hint, right in zip(HINTS, said, strict=False)]
    steps = [env.step(word) for word in words]
    assert [step.terminated for step in steps] == [False] * (len(steps) - 1) + [True]
    assert [heard(step)[:2] for step in steps] == ["ok" if right else "no" for right in said]
    return [step.reward for step in steps]


HINTS = ["red", "blue", "green", "red"]


@pytest.mark.parametrize(
    ("settings", "said", "rewards"),
    [
        ({}, [1, 0, 1, 1], [0.25, 0, 0.25, 0.25]),
        ({"sparse": True}, [1, 0, 1, 1], [0, 0, 0, 0.75]),
        ({"chain": True}, [1, 1, 0], [0.25, 0.25, 0]),
        ({"chain": True}, [1, 1, 1, 1], [0.25, 0.25, 0.25, 0.25]),
        ({"chain": True, "sparse": True}, [1, 1, 0], [0, 0, 0.5]),
    ],
)
def test_what_a_row_of_doors_pays(settings, said, rewards):
    assert rewards_of(settings, said) == rewards


def test_what_a_row_of_doors_says():
    env = load_env("text_lock", {"doors": 4, "keys": 3}).make(Task("row", {"hints": HINTS}))
    assert env.start()[0]["content"] == "Say the key of each door. Keys: sun moon star. Hint: red"
    right = fitting(3, 0)["red"]
    assert heard(env.step(f"I say {right.upper()}!")) == "ok. Hint: blue"
    assert heard(env.step("sun moon star")) == "no. Hint: green"


def test_chance_and_optimum_of_the_text_lock():
    assert measure("text_lock", "optimal").reward == pytest.approx(1.0)
    additive = measure("text_lock", "random", rounds=8)
    assert additive.reward == pytest.approx(1 / 6, abs=4 * additive.error)
    chain = measure(load_env("text_lock", {"chain": True}), "random", rounds=20)
    expected = sum(6.0**-opened for opened in range(1, 13)) / 12
    assert chain.reward == pytest.approx(expected, abs=4 * chain.error)


def test_the_lock_is_fixed_and_another_lock_is_another_pairing():
    assert sorted(fitting(6, 0).values()) == sorted(KEYS[:6])
    assert len({tuple(fitting(6, lock).items()) for lock in range(5)}) == 5
    rows = {split: [task.data["hints"] for task in load_env("text_lock").tasks(split)] for split in ("train", "test")}
    assert not any(row in rows["train"] for row in rows["test"])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("twenty_questions", {"max_turns": 0}, "twenty_questions: max_turns = 0: a game needs a turn. Use 1 or more."),
        (
            "guess_number",
            {"low": 5, "high": 1},
            "guess_number: low = 5, high = 1: there is no number between. Swap them.",
        ),
        ("text_lock", {"doors": 0}, "text_lock: doors = 0: there is nothing to open. Use 1 or more."),
        ("text_lock", {"keys": 13}, "text_lock: keys = 13: there are words for 2 to 12 keys. Use one of those."),
    ],
)
def test_settings_that_make_no_game(name, settings, message):
    with pytest.raises(ConfigError) as error:
        check_env(load_env(name, settings))
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["twenty_questions", "guess_number", "text_lock"])
def test_an_unknown_split_is_named(name):
    with pytest.raises(
        ConfigError, match=rf"^{name} has no split 'tests'. Use 'train' or 'test'. Did you mean 'test'\?$"
    ):
        load_env(name).tasks("tests")


def test_a_task_of_other_settings_is_refused():
    task = load_env("text_lock", {"keys": 12}).tasks("train")[0]
    with pytest.raises(DataError, match="text_lock: with 2 keys no door shows"):
        load_env("text_lock", {"keys": 2}).make(task)


def test_an_unknown_player_is_named():
    with pytest.raises(ConfigError, match=r"guess_number has no 'best' player. Use 'random' or 'optimal'"):
        make_player("guess_number", "best")


def test_an_environment_without_players_says_how_to_get_them():
    class Silent:
        @classmethod
        def tasks(cls, split):
            return [Task("only")]

        def __init__(self, task): ...

        start = step = __init__

    from echelon.envs.registry import env_spec

    with pytest.raises(DataError, match=r"Silent has no scripted players. Give it a classmethod player\(kind, seed"):
        make_player(env_spec(Silent))


@pytest.mark.parametrize("name", ["twenty_questions", "guess_number", "text_lock"])
def test_the_corpus_holds_all_that_is_said(name):
    spec = load_env(name)
    texts = corpus(spec)
    assert set(spec.cls.utterances()) <= set(texts)
    assert texts == corpus(spec)
    env = spec.make(spec.tasks("train")[0])
    assert {env.start()[0]["content"], heard(env.step(""))} <= set(texts)
    assert all(isinstance(text, str) and text for text in texts if text)


def test_openings_are_short():
    for name in ("twenty_questions", "guess_number", "text_lock"):
        spec = load_env(name)
        (message,) = spec.make(spec.tasks("train")[0]).start()
        assert len(message["content"].split()) < 25
        assert message["content"].isascii()


def test_returns_are_finite_for_every_task_and_player():
    for name, settings in ALL_SETTINGS:
        spec = load_env(name, settings)
        for kind in KINDS:
            assert math.isfinite(measure(spec, kind).reward)
