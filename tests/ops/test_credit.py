"""Advantages against numbers worked out by hand, and against the recursions written out longhand."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echelon.ops.credit import (
    discounted_returns,
    gae,
    group_baseline,
    overlong_penalty,
    same_state_baseline,
    same_turn_baseline,
    share_within,
    token_gae,
    turn_gae,
    turn_returns,
    zero_variance_groups,
)

REWARDS = torch.tensor([-0.1, 0.2, 1.0])
VALUES = torch.tensor([0.5, 0.4, 0.3])
OUTCOMES = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
SAME = ["task"] * 5

numbers = st.floats(-5, 5, width=32)
fractions = st.floats(0, 1, width=32)


def test_gae_of_an_episode_that_terminated():
    advantages, returns = gae(REWARDS, VALUES, gamma=0.9, lam=0.8)
    torch.testing.assert_close(advantages, torch.tensor([0.17328, 0.574, 0.7]))
    torch.testing.assert_close(returns, torch.tensor([0.67328, 0.974, 1.0]))


def test_gae_of_a_truncated_episode_bootstraps():
    advantages, _ = gae(REWARDS, VALUES, gamma=0.9, lam=0.8, bootstrap=0.6)
    torch.testing.assert_close(advantages, torch.tensor([0.453216, 0.9628, 1.24]))


def test_returns_by_hand():
    torch.testing.assert_close(
        discounted_returns(torch.tensor([1.0, 2.0, 4.0]), gamma=0.5, bootstrap=8.0), torch.tensor([4.0, 6.0, 8.0])
    )


def test_several_chains_at_once_each_with_its_own_bootstrap():
    rewards, bootstrap = torch.stack([REWARDS, REWARDS]), torch.tensor([0.0, 0.6])
    advantages, _ = gae(rewards, torch.stack([VALUES, VALUES]), gamma=0.9, lam=0.8, bootstrap=bootstrap)
    torch.testing.assert_close(advantages, torch.tensor([[0.17328, 0.574, 0.7], [0.453216, 0.9628, 1.24]]))
    returns = discounted_returns(rewards, gamma=1.0, bootstrap=bootstrap)
    torch.testing.assert_close(returns, torch.tensor([[1.1, 1.2, 1.0], [1.7, 1.8, 1.6]]))


def test_chains_of_no_steps_are_fine():
    empty = torch.zeros(2, 0)
    assert gae(empty, empty, gamma=0.9, lam=0.8)[0].shape == (2, 0)
    assert discounted_returns(empty, gamma=0.9).shape == (2, 0)


def test_inputs_are_left_alone():
    rewards, values = REWARDS.clone(), VALUES.clone()
    gae(rewards, values, gamma=0.9, lam=0.8, bootstrap=0.6)
    discounted_returns(rewards, gamma=0.9, bootstrap=0.6)
    assert rewards.equal(REWARDS)
    assert values.equal(VALUES)


def longhand_gae(steps, bootstrap, gamma, lam):
    """GAE over (reward, value) pairs, one step after another."""
    advantages, next_value, next_advantage = [], bootstrap, 0.0
    for reward, value in reversed(steps):
        next_advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        next_value = value
        advantages.append(next_advantage)
    return advantages[::-1]


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12), numbers, fractions, fractions)
def test_gae_is_its_recursion_and_with_lambda_one_the_returns(steps, bootstrap, gamma, lam):
    rewards, values = torch.tensor(steps, dtype=torch.float64).T
    advantages, returns = gae(rewards, values, gamma=gamma, lam=lam, bootstrap=bootstrap)
    assert advantages.tolist() == pytest.approx(longhand_gae(steps, bootstrap, gamma, lam), abs=1e-9)
    torch.testing.assert_close(returns, advantages + values)

    expected, total = [], bootstrap
    for reward, _ in reversed(steps):
        total = reward + gamma * total
        expected.append(total)
    assert discounted_returns(rewards, gamma=gamma, bootstrap=bootstrap).tolist() == pytest.approx(expected[::-1])
    _, monte_carlo = gae(rewards, values, gamma=gamma, lam=1.0, bootstrap=bootstrap)
    assert monte_carlo.tolist() == pytest.approx(expected[::-1], abs=1e-9)


def test_token_gae_hops_over_what_was_not_sampled():
    """The three steps of the hand-computed example with a prompt, an observation and padding around them."""
    junk = math.nan
    mask = torch.tensor([[False, True, False, False, True, True, False]])
    rewards = torch.tensor([[junk, -0.1, junk, junk, 0.2, 1.0, junk]])
    values = torch.tensor([[junk, 0.5, junk, junk, 0.4, 0.3, junk]])
    advantages, returns = token_gae(rewards, values, mask, gamma=0.9, lam=0.8, bootstrap_B=torch.tensor([0.6]))
    torch.testing.assert_close(advantages, torch.tensor([[0, 0.453216, 0, 0, 0.9628, 1.24, 0]]))
    torch.testing.assert_close(returns, torch.tensor([[0, 0.953216, 0, 0, 1.3628, 1.54, 0]]))


@st.composite
def token_rows(draw):
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 14))
    cells = st.tuples(numbers, numbers, st.booleans())
    table = draw(st.lists(st.lists(cells, min_size=length, max_size=length), min_size=rows, max_size=rows))
    return table, draw(st.lists(numbers, min_size=rows, max_size=rows))


@given(token_rows(), fractions, fractions)
def test_token_gae_is_gae_over_the_sampled_tokens_of_each_row(rows, gamma, lam):
    table, bootstraps = rows
    rewards, values, mask = (torch.tensor([[cell[i] for cell in row] for row in table]) for i in range(3))
    rewards, values = rewards.double(), values.double()
    bootstrap_B = torch.tensor(bootstraps, dtype=torch.float64)
    advantages, returns = token_gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap_B=bootstrap_B)
    for b, row in enumerate(table):
        expected = longhand_gae([(r, v) for r, v, sampled in row if sampled], bootstraps[b], gamma, lam)
        assert advantages[b][mask[b]].tolist() == pytest.approx(expected, abs=1e-9)
    assert advantages[~mask].abs().sum() == 0
    torch.testing.assert_close(returns, torch.where(mask, advantages + values, 0.0))

    rewards[~mask], values[~mask] = math.inf, math.nan
    again, returns_again = token_gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap_B=bootstrap_B)
    assert again.equal(advantages)
    assert returns_again.equal(returns)


def test_a_row_without_sampled_tokens_has_no_advantages():
    zeros = torch.zeros(1, 3)
    none = torch.zeros(1, 3, dtype=torch.bool)
    advantages, returns = token_gae(zeros + 1, zeros, none, gamma=1.0, lam=1.0, bootstrap_B=torch.ones(1))
    assert advantages.equal(zeros)
    assert returns.equal(zeros)


def test_turn_gae_of_two_episodes_by_hand():
    """The first terminated, the second was truncated: bootstraps count at the last turn of an episode only."""
    rewards, values = torch.cat([REWARDS, REWARDS]), torch.cat([VALUES, VALUES])
    episode = torch.tensor([4, 4, 4, 2, 2, 2])
    bootstrap = torch.tensor([9.0, 9.0, 0.0, 9.0, 9.0, 0.6])
    advantages, returns = turn_gae(rewards, values, episode, bootstrap, gamma=0.9, lam=0.8)
    torch.testing.assert_close(advantages, torch.tensor([0.17328, 0.574, 0.7, 0.453216, 0.9628, 1.24]))
    torch.testing.assert_close(returns, advantages + values)


@st.composite
def turn_lists(draw):
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    ids = draw(st.permutations(range(len(lengths))))
    return [(i, draw(st.lists(st.tuples(numbers, numbers), min_size=n, max_size=n)), draw(numbers)) for i, n in
            zip(ids, lengths, strict=True)]  # fmt: skip


@given(turn_lists(), fractions, fractions)
def test_turn_gae_is_gae_of_each_episode(episodes, gamma, lam):
    steps = [step for _, turns, _ in episodes for step in turns]
    rewards, values = torch.tensor(steps, dtype=torch.float64).T
    episode = torch.tensor([i for i, turns, _ in episodes for _ in turns])
    bootstrap = torch.tensor([b for _, turns, b in episodes for _ in turns], dtype=torch.float64)
    advantages, _ = turn_gae(rewards, values, episode, bootstrap, gamma=gamma, lam=lam)
    expected = [a for _, turns, b in episodes for a in longhand_gae(turns, b, gamma, lam)]
    assert advantages.tolist() == pytest.approx(expected, abs=1e-9)

    zeros = [a for _, turns, _ in episodes for a in longhand_gae([(r, 0.0) for r, _ in turns], 0.0, gamma, 1.0)]
    assert turn_returns(rewards, episode, gamma=gamma).tolist() == pytest.approx(zeros, abs=1e-9)


def test_turns_of_one_episode_must_stand_together():
    ones = torch.ones(3)
    with pytest.raises(AssertionError, match="next to each other"):
        turn_returns(ones, torch.tensor([0, 1, 0]), gamma=1.0)
    with pytest.raises(AssertionError, match="next to each other"):
        turn_gae(ones, ones, torch.tensor([0, 1, 0]), ones, gamma=1.0, lam=1.0)


def test_no_turns_at_all_are_fine():
    empty = torch.zeros(0)
    nobody = torch.zeros(0, dtype=torch.long)
    assert turn_gae(empty, empty, nobody, empty, gamma=1.0, lam=1.0)[0].shape == (0,)
    assert turn_returns(empty, nobody, gamma=1.0).shape == (0,)
    assert group_baseline(empty, []).shape == (0,)
    assert zero_variance_groups(empty, []) == 0


def test_one_call_per_algorithm():
    grpo = group_baseline(OUTCOMES, SAME, scale="std")
    torch.testing.assert_close(grpo, torch.tensor([1.095443, -0.730295, -0.730295, 1.095443, -0.730295]))
    dr_grpo = group_baseline(OUTCOMES, SAME)
    torch.testing.assert_close(dr_grpo, torch.tensor([0.6, -0.4, -0.4, 0.6, -0.4]))
    rloo = group_baseline(OUTCOMES, SAME, leave_one_out=True)
    torch.testing.assert_close(rloo, torch.tensor([0.75, -0.5, -0.5, 0.75, -0.5]))


def test_the_deviation_of_the_batch_is_that_of_all_rewards():
    """Two groups with means 2 and 12, deviations √2 and √8; all four together have mean 7 and variance 110/3."""
    rewards, keys = torch.tensor([1.0, 3.0, 10.0, 14.0]), ["a", "a", "b", "b"]
    unit = math.sqrt((36 + 16 + 9 + 49) / 3)
    expected = torch.tensor([-1.0, 1.0, -2.0, 2.0]) / unit
    torch.testing.assert_close(group_baseline(rewards, keys, scale="batch_std"), expected, atol=1e-5, rtol=1e-5)
    one_key = group_baseline(rewards, SAME[:4], scale="batch_std")
    torch.testing.assert_close(one_key, group_baseline(rewards, SAME[:4], scale="std"))


def test_being_long_costs_more_and_more():
    """Ten tokens are allowed, the last four cost."""
    lengths = torch.tensor([1, 6, 7, 8, 10, 11, 99])
    assert overlong_penalty(lengths, longest=10, cache=4).tolist() == [0, 0, 0.25, 0.5, 1, 1, 1]
    with pytest.raises(AssertionError, match="the last 0 of 10"):
        overlong_penalty(lengths, longest=10, cache=0)


def test_a_group_of_one_gets_nothing():
    rewards, keys = torch.tensor([1.0, 5.0, 0.0]), ["a", "alone", "a"]
    for scale in ("none", "std", "batch_std"):
        for leave_one_out in (False, True):
            assert group_baseline(rewards, keys, scale=scale, leave_one_out=leave_one_out)[1] == 0


def test_equal_rewards_leave_exactly_nothing():
    """In float32 the mean of seven 0.1 is not 0.1, and dividing the rest by eps would make a signal of it."""
    assert group_baseline(torch.full((7,), 0.1), ["a"] * 7, scale="std").abs().max() < 1e-8


def test_zero_variance_groups_are_counted():
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 3.0])
    assert zero_variance_groups(rewards, ["equal", "equal", "mixed", "mixed", "alone"]) == 2


def test_tensors_as_keys_are_refused():
    """Equal tensors hash differently: every item would be a group of one and nothing would train."""
    with pytest.raises(AssertionError, match="identity"):
        group_baseline(torch.ones(2), list(torch.zeros(2)))
    with pytest.raises(AssertionError, match="3 keys for 2 rewards"):
        group_baseline(torch.ones(2), [0, 0, 0])


@given(
    st.lists(st.tuples(numbers, st.sampled_from(["a", ("b", 1), None])), min_size=1, max_size=15),
    st.sampled_from(["none", "std", "batch_std"]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_group_baseline_is_a_loop_over_a_dict(items, scale, leave_one_out, random):
    rewards, keys = [reward for reward, _ in items], [key for _, key in items]
    expected = []
    for i, key in enumerate(keys):
        group = [rewards[j] for j in range(len(keys)) if keys[j] == key]
        others = [rewards[j] for j in range(len(keys)) if keys[j] == key and j != i]
        advantage = rewards[i] - statistics.fmean(others if leave_one_out else group) if others else 0.0
        deviating = {"none": [], "std": group, "batch_std": rewards}[scale]
        divisor = statistics.stdev(deviating) + 1e-6 if len(deviating) > 1 else 1.0
        expected.append(advantage / divisor)
    x = torch.tensor(rewards, dtype=torch.float64)
    got = group_baseline(x, keys, scale=scale, leave_one_out=leave_one_out)
    assert got.tolist() == pytest.approx(expected, abs=1e-6)

    order = list(range(len(keys)))
    random.shuffle(order)
    shuffled = group_baseline(x[order], [keys[i] for i in order], scale=scale, leave_one_out=leave_one_out)
    torch.testing.assert_close(shuffled, got[order], atol=1e-6, rtol=1e-6)


TO_GO = torch.tensor([3.0, 1.0, 5.0])
OWNER = torch.tensor([0, 0, 1])
"""Two siblings: the first took two turns, with 3 and 1 to go, the second one, with 5."""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [-1.0, 0.5, 1.0]),  # the second turn: 1 and, for the sibling that is done, 0
        ({"leave_one_out": True}, [-2.0, 1.0, 2.0]),
        ({"scale": "std"}, [-(0.5**0.5), 0.5**0.5, 0.5**0.5]),
        ({"scale": "batch_std"}, [-0.5, 0.25, 0.5]),  # the deviation of 3, 1 and 5 is 2
        ({"ended": False}, [-1.0, 0.0, 1.0]),  # nobody else got to the second turn
    ],
)
def test_turns_are_compared_with_the_same_turn_of_their_siblings(settings, expected):
    got = same_turn_baseline(TO_GO, OWNER, ["task", "task"], **settings)
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_turns_of_other_groups_are_not_compared_with():
    together = same_turn_baseline(torch.cat([TO_GO, TO_GO + 100]), torch.cat([OWNER, OWNER + 2]), ["a", "a", "b", "b"])
    assert together.tolist() == [-1.0, 0.5, 1.0, -1.0, 50.5, 1.0]
    assert same_turn_baseline(TO_GO, OWNER, ["a", "b"]).tolist() == [0.0, 0.0, 0.0]


def test_turns_are_compared_with_what_siblings_did_in_the_same_state():
    """Two were in a, one of them in b later, where nobody else was; the third began in c."""
    returns, owner, states = torch.tensor([3.0, 1.0, 5.0, 9.0]), torch.tensor([0, 0, 1, 2]), ["a", "b", "a", "c"]
    assert same_state_baseline(returns, owner, ["t"] * 3, states).tolist() == [-1.0, 0.0, 1.0, 0.0]
    assert same_state_baseline(returns, owner, ["t"] * 3, states, leave_one_out=True).tolist() == [-2.0, 0.0, 2.0, 0.0]
    assert same_state_baseline(returns, owner, ["t", "u", "t"], states).tolist() == [0.0] * 4


@st.composite
def sibling_turns(draw):
    """Episodes as (key, [(return, state), …])."""
    turns = st.lists(st.tuples(numbers, st.integers(0, 2)), min_size=1, max_size=4)
    return draw(st.lists(st.tuples(st.sampled_from("ab"), turns), min_size=1, max_size=6))


@given(sibling_turns(), st.sampled_from(["none", "std"]), st.booleans(), st.booleans())
def test_same_turn_baseline_is_a_loop_over_siblings(episodes, scale, leave_one_out, ended):
    expected = []
    for i, (key, turns) in enumerate(episodes):
        for t, (own, _) in enumerate(turns):
            found = []
            for j, (other_key, other) in enumerate(episodes):
                if other_key == key and (len(other) > t or ended):
                    found.append((j, other[t][0] if len(other) > t else 0.0))
            expected.append(less_its_group(own, i, found, scale, leave_one_out))
    got = same_turn_baseline(*flat(episodes), ended=ended, scale=scale, leave_one_out=leave_one_out)
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


@given(sibling_turns(), st.sampled_from(["none", "std"]), st.booleans())
def test_same_state_baseline_is_a_loop_over_all_turns_of_siblings(episodes, scale, leave_one_out):
    every = [(key, state, value) for key, turns in episodes for value, state in turns]
    expected = []
    for i, (key, state, own) in enumerate(every):
        found = [(j, other[2]) for j, other in enumerate(every) if other[:2] == (key, state)]
        expected.append(less_its_group(own, i, found, scale, leave_one_out))
    states = [state for _, turns in episodes for _, state in turns]
    got = same_state_baseline(*flat(episodes), states, scale=scale, leave_one_out=leave_one_out)
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


def less_its_group(own, number, found, scale, leave_one_out):
    """Of (number, value) pairs that include its own; one alone gets 0."""
    if len(found) == 1:
        return 0.0
    mean = statistics.fmean(value for j, value in found if not leave_one_out or j != number)
    return (own - mean) / (statistics.stdev(value for _, value in found) + 1e-6 if scale == "std" else 1.0)


def flat(episodes):
    returns = torch.tensor([value for _, turns in episodes for value, _ in turns], dtype=torch.float64)
    owner = torch.tensor([i for i, (_, turns) in enumerate(episodes) for _ in turns])
    return returns, owner, [key for key, _ in episodes]


def test_which_part_of_the_variation_is_within_episodes():
    owner = torch.tensor([0, 0, 1, 1])
    assert share_within(torch.tensor([1.0, 1.0, -1.0, -1.0]), owner) == 0
    assert share_within(torch.tensor([1.0, -1.0, 1.0, -1.0]), owner) == 1
    assert share_within(torch.tensor([3.0, 1.0, -1.0, -3.0]), owner) == pytest.approx(0.2)  # 4 of 20
    assert share_within(torch.full((4,), 0.1), owner) == 0
    assert share_within(torch.tensor([5.0, 3.0, 1.0, -1.0]), owner) == pytest.approx(0.2)  # about their mean, 2
