"""Scores of replies and of choices, with numbers that can be checked by hand."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.errors import MissingExtra
from echelon.text.metrics import (
    bleu_2,
    confusion,
    distinct_2,
    macro_f1,
    preferences,
    rouge_l,
    strategy_scores,
    text_scores,
)


def test_a_table_of_confusion_has_what_was_wanted_in_rows() -> None:
    assert confusion([0, 1, 1, 0], [0, 1, 0, 0], strategies=3) == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_every_strategy_that_occurs_counts_as_much_in_macro_f1() -> None:
    # F1 of the first: 2·2 / (3 + 2) = 0.8; of the second: 2·1 / (1 + 2) = 2/3; the third does not occur.
    assert macro_f1([[2, 1, 0], [0, 1, 0], [0, 0, 0]]) == pytest.approx((0.8 + 2 / 3) / 2)
    # One that was chosen and never wanted counts, with 0.
    assert macro_f1([[2, 0, 1], [0, 1, 0], [0, 0, 0]]) == pytest.approx((0.8 + 1.0 + 0.0) / 3)


def test_who_always_chooses_right_prefers_nothing() -> None:
    scores = strategy_scores([0, 1, 2, 2], [0, 1, 2, 2], strategies=4)
    assert (scores.accuracy, scores.macro_f1, scores.bias) == (1.0, 1.0, 0.0)
    assert scores.preference == [1.0, 1.0, 1.0, 1.0]


def test_a_strategy_chosen_in_place_of_another_three_times_as_often_is_three_times_as_strong() -> None:
    scores = strategy_scores([0, 0, 0, 1, 0], [1, 1, 1, 0, 0], strategies=2)
    assert scores.preference == pytest.approx([1.5, 0.5])
    assert scores.bias == pytest.approx(0.5)
    assert scores.accuracy == pytest.approx(1 / 5)


def test_who_always_says_the_same_prefers_it_endlessly() -> None:
    scores = strategy_scores([2] * 4, [0, 1, 2, 3], strategies=4)
    assert scores.preference == [0.0, 0.0, 4.0, 0.0]
    assert scores.bias == pytest.approx(math.sqrt(3))  # the most there is with four


def test_equal_mistakes_in_both_directions_are_no_preference() -> None:
    assert preferences([[9, 2, 2], [2, 5, 2], [2, 2, 1]]) == pytest.approx([1.0, 1.0, 1.0])


def test_the_preferences_of_a_chain_are_those_of_bradley_and_terry() -> None:
    # Strengths 4 : 2 : 1 win 4/6, 2/3 and 4/5 of their comparisons: exactly these counts, so they are the solution.
    wins = {(0, 1): 40, (1, 0): 20, (1, 2): 40, (2, 1): 20, (0, 2): 48, (2, 0): 12}
    table = [[0 if i == j else wins[j, i] for j in range(3)] for i in range(3)]
    assert preferences(table) == pytest.approx([12 / 7, 6 / 7, 3 / 7], rel=1e-4)  # after 20 rounds


def test_preferences_after_twenty_rounds_are_those_of_the_published_iteration() -> None:
    table = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 30], [1, 0, 1, 1]]  # slow enough for the 20th round to show
    strength = [1.0] * 4
    for _ in range(20):
        for i in range(4):
            rest = [j for j in range(4) if j != i]
            won = sum(table[j][i] * strength[j] / (strength[i] + strength[j]) for j in rest)
            lost = sum(table[i][j] / (strength[i] + strength[j]) for j in rest)
            strength[i] = won / lost
        mean = math.prod(strength) ** (1 / 4)
        strength = [one / mean for one in strength]
    assert preferences(table) == pytest.approx([4 * one / sum(strength) for one in strength], rel=1e-12)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_preferences_always_sum_to_the_number_of_strategies(pairs: list[tuple[int, int]]) -> None:
    scores = strategy_scores([a for a, _ in pairs], [b for _, b in pairs], strategies=5)
    assert sum(scores.preference) == pytest.approx(5)
    assert all(one >= 0 for one in scores.preference)
    assert 0 <= scores.bias <= 2 + 1e-9
    assert 0 <= scores.macro_f1 <= 1


def test_pairs_of_words_that_come_again_are_not_distinct() -> None:
    assert distinct_2(["a b a b"]) == pytest.approx(2 / 3)  # a b, b a, a b
    assert distinct_2(["I see.", "i see ."]) == pytest.approx(2 / 4)  # case and spaces do not make words differ
    assert distinct_2(["word", ""]) == 0.0


def test_bleu_2_is_the_mean_of_two_precisions_shortened() -> None:
    # 5 of 5 words, 3 of 4 pairs, and 5 words for 6: sqrt(1 · 3/4) · exp(1 - 6/5).
    found = bleu_2(["the cat on the mat"], ["the cat sat on the mat"])
    assert found == pytest.approx(math.sqrt(0.75) * math.exp(-0.2))
    assert bleu_2(["no such thing"], ["the cat sat"]) == 0.0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # The five words are a subsequence of the six: precision 1, recall 5/6. Nothing is common in the second pair.
    found = rouge_l(["the cat on the mat", "no"], ["the cat sat on the mat", "yes"])
    assert found == pytest.approx((2 * (5 / 6) / (1 + 5 / 6) + 0) / 2)


def test_replies_are_scored_by_three_numbers() -> None:
    wanted = {"text/bleu2": 1.0, "text/rouge_l": 1.0, "text/distinct2": 1.0}
    assert text_scores(["a b c"], ["a b c"]) == pytest.approx(wanted)


@pytest.mark.parametrize("library", ["sacrebleu", "rouge_score.rouge_scorer"])
def test_a_missing_library_is_named_with_what_installs_it(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=r"pip install 'echelon\[text\]'"):
        text_scores(["a"], ["b"])
