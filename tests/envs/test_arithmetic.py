"""Sums: where carries belong, what an answer is, which sums there are, and what cannot be asked for."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.envs import check_env, load_env
from echelon.envs.arithmetic import PLACES, TASKS, Arithmetic, carried, column_sum, last_number, question, spell
from echelon.envs.players import measure
from echelon.errors import ConfigError
from echelon.types import Task

SUM = Task("arithmetic/385+47", {"one": 385, "other": 47})
ALL_SETTINGS = [
    {},
    {"spaced": True},
    {"digits": 1, "carries": 1},
    {"digits": 2, "carries": 2},
    {"digits": 5, "carries": 0},
    {"digits": 4, "base": 3, "spaced": True},
]


@pytest.mark.parametrize("settings", ALL_SETTINGS)
def test_it_keeps_every_rule(settings):
    check_env(load_env("arithmetic", settings))


def test_an_answer_is_right_or_wrong_and_that_is_all_there_is_to_hear():
    for answer, reward, parsed in [
        ("432", 1, 1),
        ("It is 0432.", 1, 1),
        ("422", 0, 1),
        ("432 or 433", 0, 1),
        ("", 0, 0),
    ]:
        env = Arithmetic(SUM)
        (asked,) = env.start()
        assert asked["content"] == "385 + 047 ="
        step = env.step(answer)
        assert (step.reward, step.terminated, step.truncated) == (reward, True, False)
        assert step.info == {"win": float(reward), "parsed": float(parsed)}
        assert [message["content"] for message in step.messages] == ["Right." if reward else "Wrong."]


def test_spaced_digits_are_asked_and_answered_apart():
    env = Arithmetic(SUM, spaced=True)
    assert env.start()[0]["content"] == "3 8 5 + 0 4 7 ="
    assert env.step("0 4 3 2").reward == 1
    assert Arithmetic(SUM).step("0 4 3 2").reward == 0, "written apart they are four numbers, of which the last is 2"


@pytest.mark.parametrize(
    ("one", "other", "places"),
    [
        (123, 456, []),
        (385, 47, [1, 2]),  # 5 + 7 = 12, then 8 + 4 + 1 = 13
        (999, 1, [1, 2, 3]),  # the carry from the ones runs through
        (990, 10, [2, 3]),
        (500, 500, [3]),
    ],
)
def test_where_carries_belong(one, other, places):
    assert carried(one, other, 3) == places
    assert column_sum(one, other, 3, places) == one + other


def test_a_sum_without_its_carries_is_wrong_at_their_places():
    # 385 + 047: 12 -> 2, 12 -> 2, 3 -> 3
    assert column_sum(385, 47, 3, []) == 322
    assert column_sum(385, 47, 3, [1]) == 332
    assert column_sum(385, 47, 3, [2]) == 422
    assert column_sum(385, 47, 3, [3]) == 1322, "a carry where none belongs is made all the same"


@given(st.integers(0, 999), st.integers(0, 999))
def test_only_the_carries_that_belong_give_the_sum(one, other):
    subsets = itertools.chain.from_iterable(itertools.combinations((1, 2, 3), size) for size in range(4))
    right = [list(places) for places in subsets if column_sum(one, other, 3, places) == one + other]
    assert right == [carried(one, other, 3)]


@pytest.mark.parametrize(
    ("text", "spaced", "number"),
    [
        ("12 and 0045", False, 45),
        ("1 2", False, 2),
        ("1 2", True, 12),
        ("1 2  3", True, 3),  # two spaces part numbers
        ("carry 1 then 0 9 .", True, 9),
        ("none", True, None),
        ("9" * 18, False, 10**18 - 1),
    ],
)
def test_the_answer_is_the_last_number(text, spaced, number):
    assert last_number(text, spaced=spaced) == number


@pytest.mark.parametrize("settings", ALL_SETTINGS)
def test_no_sum_is_in_both_splits_and_all_have_their_carries(settings):
    train, test = (Arithmetic.tasks(split, **settings) for split in ("train", "test"))
    assert {task.id for task in train}.isdisjoint(task.id for task in test)
    assert len({task.id for task in train}) == len(train)
    assert train
    assert test
    digits, carries, base = settings.get("digits", 3), settings.get("carries", 1), settings.get("base", 10)
    for task in [*train, *test]:
        one, other = task.data["one"], task.data["other"]
        assert len(carried(one, other, digits, base)) >= carries
        assert int(str(task.data["answer"]), base) == one + other
        assert task.data["question"] == question(one, other, digits, settings.get("spaced", False), base)


def test_in_another_base_digits_carry_sooner():
    task = Task("arithmetic/17+5", {"one": 17, "other": 5})
    settings = {"digits": 3, "spaced": True, "base": 3}
    env = Arithmetic(task, **settings)
    assert env.start()[0]["content"] == "1 2 2 + 0 1 2 ="
    assert carried(17, 5, 3, 3) == [1, 2]
    assert column_sum(17, 5, 3, [1, 2], 3) == 22
    assert spell(22, 4, True, 3) == "0 2 1 1"
    assert spell(column_sum(17, 5, 3, [], 3), 4, True, 3) == "0 1 0 1", "every digit without its carry"
    assert env.step("0 2 1 1").reward == 1
    assert Arithmetic(task, **settings).step("0 0 2 2").reward == 0, "22 in tens"
    assert Arithmetic(task, **settings).step("0 2 1 3").info["parsed"] == 0, "there is no 3"
    assert measure(load_env("arithmetic", settings), "optimal", rounds=1).reward == 1


def test_there_are_as_many_sums_as_told_where_there_are_so_many():
    assert {split: len(Arithmetic.tasks(split)) for split in TASKS} == TASKS
    few = len(Arithmetic.tasks("train", digits=1)) + len(Arithmetic.tasks("test", digits=1))
    assert few == 45, "of a hundred sums of two digits these are 10 or more"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"digits": 0}, "a number has digits"),
        ({"digits": 6}, "there are names for 5 places"),
        ({"carries": 4}, "at most one for each of 3 digits"),
        ({"carries": -1}, "at most one for each of 3 digits"),
        ({"base": 1}, "digits are 0 to 9, and one needs two of them"),
        ({"base": 16}, "digits are 0 to 9, and one needs two of them"),
    ],
)
def test_sums_that_there_cannot_be(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Arithmetic.tasks("train", **settings)


def test_the_optimal_player_adds_and_the_random_one_does_not():
    spec = load_env("arithmetic", {"spaced": True})
    assert measure(spec, "optimal", rounds=1).reward == 1
    assert measure(spec, "random", rounds=5).reward < 0.02
    assert len(PLACES) == 5
    assert spell(45, 4, True) == "0 0 4 5"
