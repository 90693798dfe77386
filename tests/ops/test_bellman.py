"""Targets and lagging networks, with numbers that can be checked by hand."""

import copy
import math

import pytest
import torch
from torch import nn

from echelon.ops.bellman import double_q_target, follow_, hard_copy_, linear_schedule, polyak_, td_target

GOES_ON, TERMINATED = torch.tensor([False]), torch.tensor([True])


def test_twin_critics_each_get_the_target_of_their_own_twin():
    rewards, next_values = torch.tensor([-1.0]), torch.tensor([[-10.0], [-12.0]])
    targets = td_target(rewards, next_values, gamma=0.95, terminated=GOES_ON)
    torch.testing.assert_close(targets, torch.tensor([[-10.5], [-12.4]]))
    targets = td_target(rewards, next_values, gamma=0.95, terminated=TERMINATED)
    assert targets.tolist() == [[-1.0], [-1.0]]


def test_dqn_takes_the_best_next_choice():
    next_q = torch.tensor([[1.0, 5.0, 2.0]])
    target = td_target(torch.tensor([3.0]), next_q.max(-1).values, gamma=0.85, terminated=GOES_ON)
    torch.testing.assert_close(target, torch.tensor([7.25]))
    assert td_target(torch.tensor([3.0]), next_q.max(-1).values, gamma=0.85, terminated=TERMINATED) == 3.0


def test_what_follows_the_end_is_not_read():
    assert td_target(torch.tensor([2.0]), torch.tensor([math.nan]), gamma=0.9, terminated=TERMINATED) == 2.0


def test_n_step_transitions_bring_their_own_discount():
    """Two steps of reward 1 and three of reward 0 at γ = .5, from a state worth 8 ahead."""
    rewards, gamma = torch.tensor([1.5, 0.0]), torch.tensor([0.25, 0.125])
    targets = td_target(rewards, torch.tensor([8.0, 8.0]), gamma=gamma, terminated=torch.tensor([False, False]))
    assert targets.tolist() == [3.5, 1.0]


def test_no_gradient_flows_through_a_target():
    value = torch.ones(1, requires_grad=True)
    assert not td_target(torch.ones(1), value, gamma=0.9, terminated=GOES_ON).requires_grad


def test_double_q_picks_online_and_values_with_the_lagging_network():
    online, lagging = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[5.0, 0.0, 9.0]])
    assert double_q_target(torch.ones(1), online, lagging, gamma=1.0, terminated=GOES_ON) == 1.0
    legal = torch.tensor([[True, False, True]])
    assert double_q_target(torch.ones(1), online, lagging, gamma=1.0, terminated=GOES_ON, legal_NK=legal) == 10.0


def test_only_a_terminated_state_may_have_no_legal_choice():
    q, legal = torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)
    assert double_q_target(torch.ones(1), q, q, gamma=1.0, terminated=TERMINATED, legal_NK=legal) == 1.0
    with pytest.raises(AssertionError, match="legal choice"):
        double_q_target(torch.ones(1), q, q, gamma=1.0, terminated=GOES_ON, legal_NK=legal)


def linear(weight: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, weight)
    return layer


def test_two_polyak_updates():
    target, online = linear(0.0), linear(1.0)
    polyak_(target, online, 0.1)
    polyak_(target, online, 0.1)
    assert target.weight.item() == pytest.approx(0.19)
    assert online.weight.item() == 1.0


def test_a_hard_copy_is_equal_and_stays_when_the_source_moves():
    target, online = linear(0.0), linear(1.0)
    hard_copy_(target, online)
    assert target.weight.item() == 1.0
    nn.init.constant_(online.weight, 5.0)
    assert target.weight.item() == 1.0


def test_a_target_follows_every_step_a_part_of_the_way_or_now_and_then_all_of_it():
    soft, hard, online = linear(0.0), linear(0.0), linear(1.0)
    seen = []
    for version in (1, 2, 3, 4):
        nn.init.constant_(online.weight, version)
        follow_(soft, online, how="polyak", tau=0.5, every=2, version=version)
        follow_(hard, online, how="hard", tau=0.5, every=2, version=version)
        seen.append((soft.weight.item(), hard.weight.item()))
    assert seen == [(0.5, 0.0), (1.25, 2.0), (2.125, 2.0), (3.0625, 4.0)]


@pytest.mark.parametrize("update", [hard_copy_, lambda target, online: polyak_(target, online, 0.5)])
def test_buffers_are_copied(update):
    online = nn.BatchNorm1d(2)
    target = copy.deepcopy(online)
    online.running_mean.fill_(3.0)
    online.num_batches_tracked.fill_(7)
    update(target, online)
    assert target.running_mean.tolist() == [3.0, 3.0]
    assert target.num_batches_tracked == 7


@pytest.mark.parametrize("update", [hard_copy_, lambda target, online: polyak_(target, online, 0.5)])
def test_a_target_that_does_not_lag_is_refused(update):
    online = linear(1.0)
    with pytest.raises(AssertionError, match="own object"):
        update(online, online)

    half_shared = nn.Sequential(online, linear(0.0))
    with pytest.raises(AssertionError, match=r"0\.weight is shared"):
        update(nn.Sequential(online, linear(0.0)), half_shared)
    with pytest.raises(AssertionError, match="same parameters"):
        update(nn.Linear(1, 1), online)


def test_a_frozen_trunk_may_be_shared():
    trunk = linear(1.0).requires_grad_(False)
    target = nn.Sequential(trunk, linear(0.0))
    polyak_(target, nn.Sequential(trunk, linear(1.0)), 0.5)
    assert [parameter.item() for parameter in target.parameters()] == [1.0, 0.5]


def test_a_schedule_is_a_line_and_then_its_end():
    rates = [linear_schedule(step, 1.0, 0.2, 4) for step in (0, 1, 2, 4, 100)]
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.2, 0.2])
    assert linear_schedule(0, 1.0, 0.2, 0) == 0.2
