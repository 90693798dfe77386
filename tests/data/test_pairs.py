"""Pairs stay together in rows and micro-batches, and sharing a prompt's row changes no number."""

from __future__ import annotations

import pytest
import torch

from echelon.data.pairs import Pair, Pairs, pack_pairs, passes, render_pairs
from echelon.data.schemas import Preference
from echelon.text.answers import AnswerTooLong, Spoken
from echelon.text.chat import Renderer
from echelon.types import Message
from tests.text.templates import tokenizer


def pair(prompt: list[int], chosen: list[int], rejected: list[int], margin: float = 0.0) -> Pair:
    return Pair(prompt, *(Spoken(ids, [True] * len(ids)) for ids in (chosen, rejected)), margin)


SHORT = pair([1, 2], [3], [4, 5])
LONG = pair([6, 7, 8, 9, 10, 11], [12], [13], 0.5)


def answers(pairs: Pairs) -> list[list[int]]:
    """The tokens of every answer, in the order chosen, rejected, chosen, …"""
    batch = pairs.batch
    places = zip(batch.row_N.tolist(), batch.first_N.tolist(), batch.last_N.tolist(), strict=True)
    return [batch.tokens[row, first : last + 1].tolist() for row, first, last in places]


def test_a_pair_is_two_rows_and_the_answers_alternate() -> None:
    packed = pack_pairs([SHORT, LONG], share=False)
    assert packed.tokens.tolist()[0][:3] == [1, 2, 3]
    assert packed.batch.lengths.tolist() == [3, 4, 7, 7]
    assert answers(packed) == [[3], [4, 5], [12], [13]]
    assert (packed.denom, packed.margin_P.tolist()) == (2.0, [0.0, 0.5])


def test_answers_share_the_row_of_their_prompt_where_that_computes_less() -> None:
    packed = pack_pairs([SHORT, LONG], share=True)
    assert packed.batch.lengths.tolist() == [5, 8]
    assert packed.tokens.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0], [6, 7, 8, 9, 10, 11, 12, 13]]
    assert answers(packed) == [[3], [4, 5], [12], [13]]


@pytest.mark.parametrize("share", [False, True])
def test_micro_batches_hold_whole_pairs_with_their_own_margins_and_references(share: bool) -> None:
    reference = torch.arange(6.0).view(3, 2)
    packed = pack_pairs([LONG, SHORT, LONG], share=share, reference_P2=reference)
    parts = packed.split(1)  # one pair each
    assert sorted(map(tuple, (part.reference_P2.flatten().tolist() for part in parts))) == [(0, 1), (2, 3), (4, 5)]
    for part in parts:
        number = int(part.reference_P2[0, 0]) // 2
        assert answers(part) == [[[12], [13]], [[3], [4, 5]], [[12], [13]]][number]
        assert part.margin_P.tolist() == [[0.5, 0.0, 0.5][number]]
        assert part.denom == 3.0
    (whole,) = packed.split(10_000)
    assert answers(whole) == answers(packed)


def test_a_row_that_continues_the_rejected_answer_keeps_both_pairs_in_one_micro_batch() -> None:
    """The prompt of the second pair is the conversation that the first one's rejected answer ends."""
    packed = pack_pairs([SHORT, pair([1, 2, 4, 5, 6], [7], [8])], share=False)
    assert packed.batch.row_N.tolist() == [0, 1, 1, 2]
    (only,) = packed.split(1)
    assert answers(only) == [[3], [4, 5], [7], [8]]


def test_a_pass_stays_within_its_budget() -> None:
    packed = pack_pairs([SHORT, LONG, SHORT, LONG, SHORT], share=False)
    parts = packed.split(16)
    assert sum(len(part.margin_P) for part in parts) == 5
    assert all(part.tokens.numel() <= 16 for part in parts)


def test_what_others_say_within_an_answer_is_not_learned_from() -> None:
    several = Pair([1], Spoken([2, 3, 4], [True, False, True]), Spoken([5], [True]))
    packed = pack_pairs([several], share=False)
    assert packed.batch.mask.int().tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    assert packed.batch.pool(packed.batch.mask.float()).tolist() == [2.0, 1.0]
    assert packed.batch.last_N.tolist() == [3, 1]


def test_passes_visit_every_pair_once() -> None:
    pairs = [LONG, SHORT, LONG, SHORT]
    seen = []
    for numbers, packed in passes(pairs, 16, share=False):
        assert answers(packed)[::2] == [pairs[number].chosen.ids for number in numbers]
        seen += numbers
    assert sorted(seen) == [0, 1, 2, 3]


def preference(prompt: str, chosen: str, rejected: str) -> Preference:
    made = ((role, text) for role, text in (("user", prompt), ("assistant", chosen), ("assistant", rejected)))
    asked, good, bad = (Message(role=role, content=text) for role, text in made)
    return Preference([asked], [good], [bad])


def test_both_answers_of_a_rendered_pair_see_the_same_prompt() -> None:
    renderer = Renderer(tokenizer("tiny"))
    (found,), notes = render_pairs(renderer, [preference("x" * 100, "yes", "no " * 8)], max_tokens=50)
    assert notes == []
    assert found.tokens == 50
    assert found.prompt[-1] == renderer.render([Message(role="user", content="")])[-1]


def test_a_pair_with_an_answer_that_is_too_long_is_refused_or_left_out() -> None:
    renderer = Renderer(tokenizer("tiny"))
    rows = [preference("a", "b", "c"), preference("a", "b", "c" * 200)]
    with pytest.raises(AnswerTooLong, match="the answer that begins 'ccc"):
        render_pairs(renderer, rows, max_tokens=60)
    pairs, (note,) = render_pairs(renderer, rows, max_tokens=60, drop=True)
    assert len(pairs) == 1
    assert note.startswith("1 of 2 pairs are left out: the answer that begins 'ccc")
    with pytest.raises(ValueError, match="no pair is left"):
        render_pairs(renderer, rows[1:], max_tokens=60, drop=True)
