"""Rows by hand, and the bookkeeping that carries numbers between turns, tokens and micro-batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.data.packing import (
    Batch,
    Sampled,
    group_rows,
    pack,
    pack_branches,
    pack_documents,
    pack_siblings,
    pack_transitions,
    pad,
)
from echelon.data.replay import Transition, transitions
from echelon.text.chat import Example
from echelon.types import Episode, Turn

few = settings(max_examples=60, deadline=None, derandomize=True)


def said(prompt: list[int], action: list[int]) -> Sampled:
    return Sampled(prompt, action, [-float(token) for token in action])


CHAIN = [said([1, 2], [3, 4]), said([1, 2, 3, 4, 5], [6])]
"""A conversation: 1 2 is heard, 3 4 said, 5 heard, 6 said."""
OTHER = said([7], [8])


def test_turns_that_continue_each_other_share_a_row() -> None:
    batch = pack([*CHAIN, OTHER])
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 0, 0, 0, 0]]
    assert batch.lengths.tolist() == [6, 2]
    assert batch.mask.int().tolist() == [[0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0]]
    assert batch.turn.tolist() == [[-1, -1, 0, 0, -1, 1], [-1, 2, -1, -1, -1, -1]]
    assert batch.before.tolist() == [[0, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4]]
    assert (batch.row_N.tolist(), batch.state_N.tolist()) == ([0, 0, 1], [1, 4, 0])
    assert (batch.first_N.tolist(), batch.last_N.tolist()) == ([2, 5, 1], [3, 5, 1])
    assert (batch.turns, batch.denom) == (3, 4.0)
    assert batch.logprobs is not None
    assert batch.logprobs.tolist() == [[0, 0, -3, -4, 0, -6], [0, -8, 0, 0, 0, 0]]
    assert batch.by_turn(batch.logprobs) == [[-3, -4], [-6], [-8]]


def test_a_turn_that_changes_what_was_said_before_begins_a_row() -> None:
    assert pack([CHAIN[0], said([1, 2, 3, 9, 5], [6])]).tokens.tolist() == [[1, 2, 3, 4, 0, 0], [1, 2, 3, 9, 5, 6]]


def test_siblings_with_one_prompt_never_share_tokens() -> None:
    batch = pack([said([1, 2], [3])] * 2)
    assert batch.tokens.tolist() == [[1, 2, 3], [1, 2, 3]]
    assert batch.turn.tolist() == [[-1, -1, 0], [-1, -1, 1]]


def test_rows_for_supervised_learning_have_no_behaviour_log_probs() -> None:
    assert pack([Example([1], [2])]).logprobs is None


def test_a_turn_without_tokens_is_a_mistake() -> None:
    for layout in (pack, pack_branches):
        with pytest.raises(AssertionError, match="a turn without tokens cannot be trained on"):
            layout([said([1], [])])


def test_numbers_of_turns_reach_their_tokens_and_come_back() -> None:
    batch = pack([*CHAIN, OTHER])
    x_N = torch.tensor([0.5, 2.0, -1.0])
    assert batch.spread(x_N).tolist() == [[0, 0, 0.5, 0.5, 0, 2], [0, -1, 0, 0, 0, 0]]
    assert batch.at_end(x_N).tolist() == [[0, 0, 0, 0.5, 0, 2], [0, -1, 0, 0, 0, 0]]
    assert batch.pool(batch.spread(x_N)).tolist() == [1.0, 2.0, -1.0]
    assert batch.pool(batch.at_end(x_N)).tolist() == x_N.tolist()
    assert batch.pool(torch.full((2, 6), 99.0)).tolist() == [198, 99, 99]  # only sampled tokens are counted


def test_branches_share_the_states_and_see_only_their_own() -> None:
    """One state 1 2 with the answers 5 and 6 7, and the longer state 1 2 3 with the answer 8."""
    batch = pack_branches([said([1, 2], [5]), said([1, 2, 3], [8]), said([1, 2], [6, 7])])
    assert batch.tokens.tolist() == [[1, 2, 3, 5, 8, 6, 7]]
    assert batch.turn.tolist() == [[-1, -1, -1, 0, 1, 2, 2]]
    assert batch.before[0, 3:].tolist() == [1, 2, 1, 5]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 2, 3, 2, 3]]
    assert batch.visible is not None
    assert batch.visible[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 1, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1, 1],
    ]


def test_documents_fill_rows_longest_first_and_see_only_themselves() -> None:
    """Documents of 6, 2, 3 and 1 tokens in rows of at most 8: 6 + 2 and 3 + 1."""
    batch = pack_documents([*CHAIN, OTHER, said([9, 10], [11]), said([], [12])], max_tokens=8)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 0, 0, 0, 0]]
    assert batch.lengths.tolist() == [8, 4]
    assert batch.turn.tolist() == [[-1, -1, 0, 0, -1, 1, -1, 2], [-1, -1, 3, 4, -1, -1, -1, -1]]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 0, 0, 0, 0, 0]]
    assert (batch.row_N.tolist(), batch.state_N.tolist()) == ([0, 0, 0, 1, 1], [1, 4, 6, 1, 2])
    assert batch.denom == 6.0
    visible = batch.sees()
    assert visible is not None
    assert visible[0].int().tolist() == torch.block_diag(torch.ones(6, 6), torch.ones(2, 2)).tril().int().tolist()
    one = torch.ones(1, 1)  # padding sees itself, since a token that sees nothing is not a number
    assert visible[1].int().tolist() == torch.block_diag(torch.ones(3, 3), *[one] * 5).tril().int().tolist()


def test_plain_rows_need_no_word_about_who_sees_whom() -> None:
    assert pack(CHAIN).sees() is None
    branches = pack_branches(CHAIN)
    assert branches.sees() is branches.visible


def test_a_document_longer_than_a_row_has_one_of_its_own() -> None:
    batch = pack_documents([said([1, 2, 3], [4, 5]), said([6], [7]), said([8], [9])], max_tokens=4)
    assert batch.lengths.tolist() == [5, 4]


@few
@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(40, 80))
def test_rows_of_documents_keep_every_token_within_the_limit_and_no_two_fit_together(
    lengths: list[int], max_tokens: int
) -> None:
    documents = [said([number] * (length - 1), [number]) for number, length in enumerate(lengths, 1)]
    batch = pack_documents(documents, max_tokens=max_tokens)
    assert int(batch.lengths.sum()) == sum(lengths)
    assert int(batch.lengths.max()) <= max_tokens
    assert all(a + b > max_tokens for a, b in zip(batch.lengths[:-1].tolist(), batch.lengths[1:].tolist(), strict=True))
    ends = batch.tokens[batch.row_N, batch.last_N]
    assert ends.tolist() == list(range(1, len(lengths) + 1))


def test_states_that_are_no_prefixes_of_each_other_branch_in_rows_of_their_own() -> None:
    batch = pack_branches([said([1, 2], [5]), said([1, 3], [6]), said([1, 3, 4], [7])])
    assert batch.tokens.tolist() == [[1, 2, 5, 0, 0], [1, 3, 4, 6, 7]]


turns_of_episodes = st.lists(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4), min_size=1, max_size=6
)


def conversations(shape: list[list[tuple[int, int]]]) -> list[Sampled]:
    """Each turn hears and says so many tokens; no two tokens are the same."""
    fresh = iter(range(1, 10_000))
    found: list[Sampled] = []
    for turns in shape:
        ids: list[int] = []
        for heard, spoken in turns:
            ids = [*ids, *(next(fresh) for _ in range(heard))]
            found.append(said(ids, [next(fresh) for _ in range(spoken)]))
            ids = [*ids, *found[-1].action]
    return found


@given(turns_of_episodes, st.sampled_from([pack, pack_branches]))
@few
def test_every_turn_can_be_read_back_from_its_row(shape: list[list[tuple[int, int]]], layout: object) -> None:
    turns = conversations(shape)
    batch = pack(turns) if layout is pack else pack_branches(turns)
    assert len(batch.tokens) == len(shape)
    assert batch.denom == sum(len(turn.action) for turn in turns)
    for index, turn in enumerate(turns):
        row, first, last = (int(x[index]) for x in (batch.row_N, batch.first_N, batch.last_N))
        assert batch.tokens[row, first : last + 1].tolist() == turn.action
        assert batch.tokens[row, batch.state_N[index]] == turn.prompt[-1]
        assert batch.tokens[row, batch.before[row, first : last + 1]].tolist() == [turn.prompt[-1], *turn.action[:-1]]
        if batch.visible is not None:
            assert batch.tokens[row, batch.visible[row, last]].tolist() == turn.prompt + turn.action


@given(turns_of_episodes, st.integers(1, 60), st.integers(0, 99))
@few
def test_micro_batches_hold_every_turn_once_and_know_whose_it_is(
    shape: list[list[tuple[int, int]]], budget: int, seed: int
) -> None:
    turns = conversations(shape)
    batch = pack(turns)
    x_N = torch.randn(len(turns), generator=torch.Generator().manual_seed(seed))
    batch.advantages = batch.spread(x_N)
    parts = batch.split(budget)
    assert sorted(row for part in parts for row in part.rows.tolist()) == list(range(len(shape)))
    assert sorted(index for part in parts for index in part.index_N.tolist()) == list(range(len(turns)))
    pooled = torch.zeros(len(turns))
    for part in parts:
        assert part.tokens.numel() <= budget or len(part.tokens) == 1
        assert part.tokens.shape[1] == part.lengths.max()
        assert (part.denom, part.turns) == (batch.denom, batch.turns)
        assert part.advantages is not None
        assert part.advantages.equal(part.spread(x_N))
        assert part.tokens[part.row_N, part.last_N].tolist() == [turns[n].action[-1] for n in part.index_N.tolist()]
        assert part.at_end(x_N).sum().item() == pytest.approx(x_N[part.index_N].sum().item(), abs=1e-5)
        pooled += part.pool(part.at_end(x_N))
    torch.testing.assert_close(pooled, x_N)


@given(turns_of_episodes, st.integers(1, 5), st.integers(0, 9))
@few
def test_mini_batches_partition_the_rows_and_count_their_own_tokens(
    shape: list[list[tuple[int, int]]], count: int, seed: int
) -> None:
    batch = pack(conversations(shape))
    parts = batch.shuffle_split(count, seed=seed)
    assert len(parts) == min(count, len(shape))
    rows = [row[:length].tolist() for part in parts for row, length in zip(part.tokens, part.lengths, strict=True)]
    assert sorted(rows) == sorted(
        row[:length].tolist() for row, length in zip(batch.tokens, batch.lengths, strict=True)
    )
    assert max(len(part.tokens) for part in parts) - min(len(part.tokens) for part in parts) <= 1
    for part in parts:
        assert part.denom == part.mask.sum()
        assert part.counted == part.denom
        assert [micro.rows.tolist() for micro in part.split(1)] == [[row] for row in part.lengths.argsort(stable=True)]
    again = batch.shuffle_split(count, seed=seed)
    assert all(one.tokens.equal(other.tokens) for one, other in zip(parts, again, strict=True))


def test_rows_left_out_still_count_in_the_denominator() -> None:
    batch = pack([*CHAIN, OTHER])
    kept = batch.only(torch.tensor([False, True]))
    assert kept.tokens.tolist() == [[7, 8]]
    assert (kept.denom, kept.counted, kept.turns, kept.rows.tolist()) == (4.0, 1.0, 3, [0])
    assert (kept.index_N.tolist(), kept.row_N.tolist()) == ([2], [0])
    assert [micro.counted for micro in kept.split(100)] == [1.0]


def test_the_order_of_mini_batches_follows_the_seed() -> None:
    batch = pack(conversations([[(1, 1)]] * 12))
    orders = {tuple(batch.shuffle_split(3, seed=seed)[0].tokens[:, 0].tolist()) for seed in range(5)}
    assert len(orders) == 5


def test_rows_of_similar_length_share_a_pass() -> None:
    assert group_rows([3, 9, 3, 30, 9], 20) == [[0, 2], [1, 4], [3]]


def test_a_pass_costs_as_much_as_a_64th_of_the_budget() -> None:
    assert group_rows([10, 73], 4096) == [[0, 1]]  # 63 tokens of padding are cheaper than another pass
    assert group_rows([10, 75], 4096) == [[0], [1]]


def all_cuts(rows: list[int]) -> list[list[list[int]]]:
    """Every way to cut a list into groups of neighbours."""
    if not rows:
        return [[]]
    return [[rows[:end], *rest] for end in range(1, len(rows) + 1) for rest in all_cuts(rows[end:])]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(1, 1500))
@few
def test_no_other_cut_computes_less(lengths: list[int], budget: int) -> None:
    def cost(groups: list[list[int]]) -> float:
        padded = [len(group) * max(group) for group in groups]
        allowed = all(size <= budget or len(group) == 1 for size, group in zip(padded, groups, strict=True))
        return sum(padded) + len(groups) * budget / 64 if allowed else float("inf")

    groups = group_rows(lengths, budget)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    found = cost([[lengths[row] for row in group] for group in groups])
    assert found == pytest.approx(min(cost(cut) for cut in all_cuts(sorted(lengths))))


def test_rows_are_padded_on_the_right() -> None:
    tokens, lengths = pad([[1], [2, 3, 4]])
    assert tokens.tolist() == [[1, 0, 0], [2, 3, 4]]
    assert lengths.tolist() == [1, 3]


def test_moving_a_batch_keeps_what_is_not_a_tensor() -> None:
    batch = replace(pack([*CHAIN, OTHER]), values=torch.ones(2, 6))
    moved = batch.to("cpu")
    assert isinstance(moved, Batch)
    assert (moved.turns, moved.denom, moved.returns) == (batch.turns, batch.denom, None)
    assert moved.values is not None
    assert moved.values.equal(torch.ones(2, 6))


def episode(*turns: Sampled, ending: str = "terminated", final: list[int] | None = None) -> Episode:
    taken = [
        Turn(i, "a", t.prompt, t.action, t.logprobs, "", i - 1 if i else None, reward=i) for i, t in enumerate(turns)
    ]
    return Episode("t", turns=taken, ending=ending, final=final)  # type: ignore[arg-type]


def test_an_episodes_transitions_share_one_row() -> None:
    found = transitions(episode(*CHAIN, ending="truncated", final=[1, 2, 3, 4, 5, 6, 9]), "a", gamma=0.9)
    batch = pack_transitions([*found, *transitions(episode(OTHER), "a", gamma=0.9)])
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 9], [7, 8, 0, 0, 0, 0, 0]]
    assert batch.row_N.tolist() == [0, 0, 1]
    assert (batch.state_N.tolist(), batch.action_N.tolist()) == ([1, 4, 0], [3, 5, 1])
    assert (batch.next_row_N.tolist()[:2], batch.next_N.tolist()[:2]) == ([0, 0], [4, 6])
    assert (batch.reward_N.tolist(), batch.steps_N.tolist()) == ([0, 1, 0], [1, 1, 1])
    assert (batch.terminated_N.tolist(), batch.denom) == ([False, False, True], 3.0)


@pytest.mark.parametrize("n_step", [1, 2, 3])
def test_with_several_steps_the_row_is_still_shared(n_step: int) -> None:
    turns = conversations([[(2, 1), (1, 2), (3, 1), (1, 1), (2, 2)]])
    batch = pack_transitions(transitions(episode(*turns), "a", gamma=0.9, n_step=n_step))
    assert len(batch.tokens) == 1
    for index, turn in enumerate(turns):
        assert batch.tokens[0, batch.state_N[index]] == turn.prompt[-1]
        assert batch.tokens[0, batch.action_N[index]] == turn.action[-1]
        if not batch.terminated_N[index]:
            assert batch.tokens[0, batch.next_N[index]] == turns[index + n_step].prompt[-1]


def test_a_next_state_that_forgot_the_beginning_lies_in_a_row_of_its_own() -> None:
    """An over-long conversation was cut: the next state does not extend this one."""
    step = Transition([1, 2, 3], [4], reward=1.0, next_state=[1, 4, 5], terminated=False)
    batch = pack_transitions([step])
    assert batch.tokens.tolist() == [[1, 2, 3, 4], [1, 4, 5, 0]]
    assert (batch.row_N.tolist(), batch.next_row_N.tolist(), batch.next_N.tolist()) == ([0], [1], [2])


def test_micro_batches_of_transitions_keep_their_targets() -> None:
    steps = [
        transition
        for turns in (CHAIN, [OTHER], [said([1], [2, 3])])
        for transition in transitions(episode(*turns), "a", gamma=0.9)
    ]
    batch = pack_transitions(steps)
    batch.q_target = torch.stack([torch.arange(4.0), 10 + torch.arange(4.0)])
    parts = batch.split(6)
    assert [part.index_N.tolist() for part in parts] == [[2], [3], [0, 1]]
    assert [part.lengths.tolist() for part in parts] == [[2], [3], [6]]
    for part in parts:
        assert part.q_target is not None
        assert part.q_target[0].tolist() == part.index_N.tolist()
        assert part.q_target[1].tolist() == [10 + n for n in part.index_N.tolist()]
        assert part.reward_N.tolist() == [steps[n].reward for n in part.index_N.tolist()]
        assert part.tokens[part.row_N, part.action_N].tolist() == [steps[n].action[-1] for n in part.index_N.tolist()]
        assert part.denom == 4.0


def siblings(prompt: list[int], answers: list[int]) -> list[Sampled]:
    return [Sampled(prompt, [7] * count, [-1.0] * count) for count in answers]


def test_answers_to_one_prompt_share_its_row_unless_they_are_long() -> None:
    short = pack_siblings([*siblings([1] * 200, [5, 9, 3]), *siblings([2] * 150, [4, 4, 4])])
    assert short.lengths.tolist() == [217, 162]
    assert short.visible is not None
    assert short.denom == 29
    long = pack_siblings(siblings([1] * 20, [900] * 8))
    assert long.lengths.tolist() == [920] * 8, "attention over 7220 tokens costs more than reading 20 again"
    assert long.visible is None
