"""Which episodes are shown, and what becomes of their texts and numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from echelon.view.episodes import Place, chosen_order, compact, cut, dumps, halving, scan, short, written
from echelon.view.runs import Run
from tests.view.conftest import Write, episode, turn

HERE = Place(3, 0, 7, "maze/1")


def test_nothing_in_the_data_ends_the_script_it_stands_in() -> None:
    told = dumps({"text": "</script><!-- \u2028 <script>"})
    assert "<" not in told
    assert "\u2028" not in told
    assert json.loads(told) == {"text": "</script><!-- \u2028 <script>"}


def test_a_text_of_ten_megabytes_keeps_its_ends_and_says_what_is_missing() -> None:
    assert cut("short") == "short"
    assert cut("a" * 10_000_000 + "z") == ["a" * 5000, 9_994_001, "a" * 999 + "z"]


def test_half_a_surrogate_pair_is_replaced() -> None:
    assert cut("a\ud800b") == "a\ufffdb"


def test_numbers_keep_four_digits() -> None:
    assert [short(one) for one in (0.123456, -7.111400127, 20.0, 1e-9, None)] == [0.1235, -7.111, 20, 1e-9, None]


def test_every_beginning_of_the_order_is_spread_evenly() -> None:
    assert halving(list(range(9)))[:5] == [0, 8, 4, 2, 6]
    assert sorted(halving(list(range(100)))) == list(range(100))
    assert halving([5]) == [5]


def test_the_first_and_the_last_step_come_first_and_every_episode_once() -> None:
    places = [Place(number, 0, number // 4, f"task/{number % 4}") for number in range(80)]
    order = list(chosen_order(places))
    assert [place.step for place in order[:8]] == [0] * 4 + [19] * 4
    assert order[8].step == 10
    assert sorted(order) == places


def test_a_chain_says_no_parents_and_a_tree_says_them() -> None:
    chain = compact(episode(0, "a", [turn("x"), turn("y")]), HERE)
    assert [set(one) for one in chain["t"]] == [{"r", "x", "w"}] * 2
    tree = compact(episode(0, "a", [turn("x"), turn("y"), turn("z", parent=0)]), HERE)
    assert [one.get("p") for one in tree["t"]] == [None, None, 0]


def test_candidates_are_told_once_with_their_count_best_first() -> None:
    drawn = [{"q": 0.1, "text": "no"}, {"q": 0.5, "text": "yes"}, {"q": 0.1, "text": "no"}]
    said = compact(episode(0, "a", [turn("no", candidates=drawn, chosen=2, explored=True)]), HERE)["t"][0]
    assert said["c"] == [[0.5, "yes", "", 1], [0.1, "no", "", 2]]
    assert (said["k"], said["e"]) == (1, 1)


def test_what_was_taken_is_told_however_many_candidates_there_are() -> None:
    drawn = [{"q": -place, "text": str(place)} for place in range(100)]
    said = compact(episode(0, "a", [turn("99", candidates=drawn, chosen=99)]), HERE)["t"][0]
    assert said["c"][said["k"]][1] == "99"
    assert said["cm"] == 100 - len(said["c"])


def test_what_a_recipe_adds_is_told_under_its_name() -> None:
    said = compact(episode(0, "a", [turn("x", advantage=0.5, answer="1", parsed=True, tokens=3)]), HERE)["t"][0]
    assert said["n"] == {"advantage": 0.5, "tokens": 3}
    assert said["o"] == {"answer": "1", "parsed": True}


def test_tokens_come_with_every_column_of_their_length() -> None:
    row = turn("a b", tokens=["a", " b"], ids=[1, 2], logprobs=[-0.5, -1.0], other=[1.0])
    said = compact(episode(0, "a", [row]), HERE)["t"][0]
    assert said["z"] == {"tokens": ["a", " b"], "ids": [1, 2], "logprobs": [-0.5, -1]}


def test_of_very_many_turns_the_middle_is_left_out() -> None:
    said = compact(episode(0, "a", [turn("x")] * 5000), HERE)
    assert (len(said["t"]), said["gap"]) == (1000, [500, 4000])
    assert said["t"][500]["i"] == 4500


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"turns": None},
        {"turns": [1, None, {}, {"text": None, "role": None, "parent": "x", "index": True}]},
        {"turns": [turn("x", candidates=[1, {}], chosen="a"), turn("y", tokens=[]), turn("z", candidates=7)]},
        {"task": 5, "reward": "much", "metrics": [1], "ending": 3, "error": {"a": 1}},
        episode(0, "a", [turn("x", parent=0), turn("y", parent=99), turn("z", parent=-1, index=10**30)]),
    ],
)
def test_a_row_of_any_shape_can_be_told(row: dict[str, Any], write: Write) -> None:
    dumps(compact(row, HERE))
    assert len(scan(Run(write(episodes=[row]))).places) == 1


def test_repeated_utterances_and_attempts_that_ignore_feedback_are_counted(write: Write) -> None:
    talk = episode(0, "a", [turn("Is it red?"), turn("Is it red?"), turn("Is it big?")])
    taught = [turn("1", "solver"), turn("no", "coach"), turn("1", "solver"), turn("no", "coach"), turn("2", "solver")]
    found = scan(Run(write(episodes=[talk, episode(1, "b", taught)])))
    assert (found.tallies[0].again, found.tallies[0].repeated) == (2, 1)
    assert (found.tallies[1].told, found.tallies[1].unmoved) == (2, 1)


def test_episodes_fill_the_room_there_is_and_no_more(write: Write) -> None:
    run = Run(write(episodes=[episode(step, "a", [turn("word " * 40)] * 5) for step in range(100)]))
    shown = written(run, 0, scan(run), 20_000)
    assert 0 < sum(map(len, shown)) <= 20_000
    steps = [json.loads(text)["s"] for text in shown]
    assert steps == sorted(steps)
    assert {0, 99, 50} <= set(steps)


def test_an_episode_that_would_crowd_out_the_others_is_shortened(write: Write) -> None:
    run = Run(write(episodes=[episode(0, "a", [turn("word " * 2000)] * 20)]))
    (shown,) = written(run, 0, scan(run), 50_000)
    assert len(shown) < 12_500
