"""Decisions of one role, by hand; and a ring that must behave like a list of episodes."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.data.packing import pack
from echelon.data.replay import Replay, Transition, examples, mc_returns, transitions
from echelon.errors import ConfigError, DataError
from echelon.types import Episode, Turn


def turn(index: int, role: str, reward: float, parent: int | None, prompt: list[int] | None = None) -> Turn:
    prompt = prompt if prompt is not None else list(range(3 * index + 1))
    return Turn(index, role, prompt, [100 + index, 7], [-0.5, -1.0], f"said {index}", parent, version=4, reward=reward)


def chain(*rewards: float, ending: Any = "terminated", final: list[int] | None = None) -> Episode:
    turns = [turn(i, "actor", reward, i - 1 if i else None) for i, reward in enumerate(rewards)]
    return Episode(task="t", turns=turns, ending=ending, final=final)


def test_a_turn_leads_to_the_next_turn_of_its_role() -> None:
    first, second, last = transitions(chain(-1.0, -1.0, 5.0), "actor", gamma=0.5)
    assert first == Transition(
        state=[0],
        action=[100, 7],
        reward=-1.0,
        next_state=[0, 1, 2, 3],
        terminated=False,
        discount_steps=1,
        logprobs=[-0.5, -1.0],
        text="said 0",
        version=4,
        mc_return=-0.25,  # -1 + .5 (-1 + .5 · 5)
    )
    assert (second.reward, second.next_state, second.mc_return) == (-1.0, [0, 1, 2, 3, 4, 5, 6], 1.5)
    assert (last.reward, last.next_state, last.terminated, last.mc_return) == (5.0, None, True, 5.0)


def test_a_truncated_episode_bootstraps_from_its_final_state() -> None:
    last = transitions(chain(1.0, 2.0, ending="truncated", final=[9, 9]), "actor", gamma=0.5)[-1]
    assert (last.next_state, last.terminated, last.discount_steps) == ([9, 9], False, 1)


def test_nothing_is_bootstrapped_from_what_lies_behind_the_end_of_a_task() -> None:
    last = transitions(chain(1.0, 2.0, final=[9, 9]), "actor", gamma=0.5)[-1]
    assert (last.next_state, last.terminated) == (None, True)


def test_a_truncated_episode_without_a_final_state_is_never_taken_for_a_terminated_one() -> None:
    with pytest.raises(DataError, match=r"truncated but carries no final state.*Set episode\.final"):
        transitions(chain(1.0, ending="truncated"), "actor", gamma=0.5)


def test_a_failed_episode_is_refused() -> None:
    with pytest.raises(DataError, match="the episode failed"):
        transitions(chain(1.0, ending="failed"), "actor", gamma=0.5)


def levels() -> Episode:
    """strategist, responder, responder, strategist, responder."""
    roles = ["strategist", "responder", "responder", "strategist", "responder"]
    rewards = [1.0, 2.0, 4.0, 8.0, 16.0]
    parents = [None, 0, 1, 2, 3]
    turns = [turn(i, *each) for i, each in enumerate(zip(roles, rewards, parents, strict=True))]
    return Episode(task="t", turns=turns, ending="terminated")


def test_rewards_of_other_roles_in_between_belong_to_the_same_step() -> None:
    high = transitions(levels(), "strategist", gamma=0.5)
    assert [t.reward for t in high] == [7.0, 24.0]  # 1+2+4 and 8+16, undiscounted within the step
    assert [t.mc_return for t in high] == [19.0, 24.0]  # 7 + .5 · 24
    assert high[0].next_state == levels().turns[3].prompt
    assert high[1].terminated


def test_rewards_before_the_first_turn_of_a_role_belong_to_none_of_its_decisions() -> None:
    low = transitions(levels(), "responder", gamma=0.5)
    assert [t.reward for t in low] == [2.0, 12.0, 16.0]
    assert [t.mc_return for t in low] == [12.0, 20.0, 16.0]


def test_a_role_that_never_spoke_has_no_transitions() -> None:
    assert transitions(levels(), "coach", gamma=0.5) == []


def test_n_steps_add_discounted_rewards_and_say_how_many_there_were() -> None:
    found = transitions(chain(1.0, 2.0, 4.0, 8.0), "actor", gamma=0.5, n_step=2)
    assert [t.reward for t in found] == [2.0, 4.0, 8.0, 8.0]  # 1 + .5 · 2, 2 + .5 · 4, 4 + .5 · 8, 8
    assert [t.terminated for t in found] == [False, False, True, True]
    assert [t.discount_steps for t in found] == [2, 2, 2, 1]
    assert found[0].next_state == chain(1.0, 2.0, 4.0, 8.0).turns[2].prompt


def test_n_steps_cut_short_by_truncation_bootstrap_with_the_steps_there_were() -> None:
    found = transitions(chain(1.0, 2.0, ending="truncated", final=[9]), "actor", gamma=0.5, n_step=5)
    assert [(t.reward, t.discount_steps, t.next_state) for t in found] == [(2.0, 2, [9]), (2.0, 1, [9])]


def tree() -> Episode:
    """solver 0 → coach 1 → solver 3, and → coach 2 → solvers 4 and 5."""
    nodes = [
        ("solver", 1, None),
        ("coach", 2, 0),
        ("coach", 4, 0),
        ("solver", 8, 1),
        ("solver", 16, 2),
        ("solver", 32, 2),
    ]
    return Episode(task="t", turns=[turn(i, *node) for i, node in enumerate(nodes)], ending="terminated")


def test_a_tree_gives_one_transition_per_successor() -> None:
    found = transitions(tree(), "solver", gamma=0.5)
    states = [t.prompt for t in tree().turns]
    assert [(t.state, t.reward, t.next_state) for t in found] == [
        (states[0], 3.0, states[3]),  # 1 + 2
        (states[0], 5.0, states[4]),  # 1 + 4
        (states[0], 5.0, states[5]),
        (states[3], 8.0, None),
        (states[4], 16.0, None),
        (states[5], 32.0, None),
    ]
    # 1 + mean(2 + .5 · 8, 4 + mean(.5 · 16, .5 · 32))
    assert [t.mc_return for t in found] == [12.0, 12.0, 12.0, 8.0, 16.0, 32.0]


def test_without_discount_the_return_is_the_value_of_the_turn() -> None:
    episode = tree()
    first, second = (episode.value(turn) for turn in episode.of("coach"))
    assert [t.mc_return for t in transitions(episode, "coach", gamma=1.0)] == [first, second, second]
    assert (first, second) == (10.0, 28.0)  # 2 + 8, 4 + mean(16, 32)


def test_one_final_state_cannot_end_several_branches() -> None:
    episode = replace(tree(), ending="truncated", final=[1])
    with pytest.raises(DataError, match="several branches but one final state"):
        transitions(episode, "solver", gamma=0.5)


tokens = st.lists(st.integers(0, 3), max_size=4)
numbers = st.floats(-10, 10, width=32)


@st.composite
def transition_lists(draw: st.DrawFn) -> list[Transition]:
    """Mostly conversations whose states extend one another; sometimes a state that starts anew."""
    found, state = [], draw(tokens)
    for _ in range(draw(st.integers(0, 5))):
        action, more, terminated = draw(tokens), draw(tokens), draw(st.booleans())
        following = draw(tokens) if draw(st.integers(0, 3)) == 0 else state + action + more
        found.append(
            Transition(
                state=state,
                action=action,
                reward=draw(numbers),
                next_state=None if terminated else following,
                terminated=terminated,
                discount_steps=draw(st.integers(1, 3)),
                logprobs=[draw(numbers) for _ in action],
                text=draw(st.text(max_size=3)),
                version=draw(st.integers(0, 2**40)),
                mc_return=draw(numbers),
            )
        )
        state = following
    return found


@given(st.lists(transition_lists(), max_size=8), st.integers(5, 12))
@settings(max_examples=200, deadline=None)
def test_the_ring_is_a_list_that_forgets_whole_episodes_oldest_first(
    episodes: list[list[Transition]], capacity: int
) -> None:
    replay, expected = Replay(capacity), list[list[Transition]]()
    for found in episodes:
        replay.add([found])
        if found:
            number = expected[-1][0].episode + 1 if expected else 0
            expected.append([replace(t, episode=number) for t in found])
        while sum(map(len, expected)) > capacity:
            expected.pop(0)
        assert list(replay.episodes()) == expected
        assert len(replay) == sum(map(len, expected))
        if expected:
            flat = [t for found in expected for t in found]
            picks = np.random.Generator(np.random.Philox(3)).integers(len(flat), size=20)
            assert replay.sample(20, seed=3) == [flat[pick] for pick in picks]
            assert all(found in expected for found in replay.sample_episodes(4, seed=3))


@given(st.lists(transition_lists(), max_size=6))
@settings(max_examples=50, deadline=None)
def test_a_loaded_replay_answers_the_same_seeds_and_continues_the_same(
    tmp_path_factory: pytest.TempPathFactory, episodes: list[list[Transition]]
) -> None:
    folder = tmp_path_factory.mktemp("replay")
    replay, loaded = Replay(8), Replay(8)
    replay.add(episodes)
    replay.save(folder)
    loaded.add([[Transition([1], [2], 0.0, None, True)]])  # to be replaced
    loaded.load(folder)
    assert list(loaded.episodes()) == list(replay.episodes())
    for one in (replay, loaded):
        one.add([[Transition([1], [2], 1.0, None, True, text="new")] * 5])
    assert loaded.sample(16, seed=5) == replay.sample(16, seed=5)
    assert loaded.sample_episodes(3, seed=5) == replay.sample_episodes(3, seed=5)


def test_long_states_that_part_late_are_kept_apart() -> None:
    """As where a budget of tokens leaves the beginning of a prompt and drops what follows it."""
    same, there = list(range(40)), Replay(10)
    found = [
        Transition([*same, 50], [51, 52], 0.1, [*same, 60, 61], terminated=False),
        Transition([*same, 60, 61], [62], 0.7, None, terminated=True),
    ]
    there.add([found])
    (kept,) = there.episodes()
    assert kept == [replace(each, episode=0) for each in found], "rewards to the last digit, too"


def test_a_smaller_replay_loads_the_newest_episodes(tmp_path: Path) -> None:
    replay, smaller = Replay(10), Replay(2)
    replay.add([[Transition([i], [i], float(i), None, True)] for i in range(4)])
    replay.save(tmp_path)
    smaller.load(tmp_path)
    assert [found[0].reward for found in smaller.episodes()] == [2.0, 3.0]


def test_every_transition_is_drawn_equally_often_and_so_is_every_episode() -> None:
    replay = Replay(10)
    replay.add([transitions(chain(0.0), "actor", gamma=1.0), transitions(chain(1.0, 1.0, 1.0), "actor", gamma=1.0)])
    rewards = [t.reward for t in replay.sample(4000, seed=0)]
    assert np.mean(rewards) == pytest.approx(0.75, abs=0.03)
    lengths = [len(found) for found in replay.sample_episodes(4000, seed=0)]
    assert np.mean(lengths) == pytest.approx(2.0, abs=0.06)
    assert [t.reward for t in replay.sample(4000, seed=1)] != rewards


def test_the_transitions_of_a_sampled_episode_pack_into_one_row() -> None:
    turns = [turn(0, "actor", 0.0, None, [5]), turn(1, "actor", 0.0, 0, [5, 100, 7, 6])]
    replay = Replay(10)
    replay.add([transitions(Episode("t", turns=turns, ending="terminated"), "actor", gamma=1.0)])
    batch = pack(replay.sample_episodes(1, seed=0)[0])
    assert batch.tokens.tolist() == [[5, 100, 7, 6, 101, 7]]


def test_a_hundred_thousand_transitions_of_two_hundred_tokens_fit_well_under_100_megabytes() -> None:
    def episode(number: int) -> list[Transition]:
        row = np.random.default_rng(number).integers(0, 150_000, 400).tolist()
        ends = range(40, 400, 36)  # ten states of 40 to 364 tokens, 202 on average
        return [
            Transition(
                row[:end],
                row[end : end + 16],
                0.0,
                row[: end + 36],
                False,
                logprobs=[-1.0] * 16,
                text=f"{number:032}{end:032}",
            )
            for end in ends
        ]

    replay = Replay(100_000)
    tracemalloc.start()
    replay.add(map(episode, range(200)))
    measured = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(replay) == 2000
    assert measured == pytest.approx(replay.nbytes, rel=0.1)  # the estimate is honest
    assert replay.nbytes * 50 < 60e6


def test_an_episode_longer_than_the_replay_is_refused() -> None:
    with pytest.raises(DataError, match=r"an episode has 3 transitions and the replay holds 2.*Raise"):
        Replay(2).add([transitions(chain(0.0, 0.0, 0.0), "actor", gamma=1.0)])


def test_an_empty_replay_says_so() -> None:
    with pytest.raises(DataError, match="the replay is empty"):
        Replay(2).sample(1, seed=0)
    with pytest.raises(DataError, match="the replay is empty"):
        Replay(2).sample_episodes(1, seed=0)


def test_a_replay_holds_at_least_one_transition() -> None:
    with pytest.raises(ConfigError, match="capacity = 0"):
        Replay(0)


def test_the_best_episodes_are_drawn_alone() -> None:
    """Returns 0, 3, 1, 3, 2: the upper two fifths are the second and the fourth."""
    replay = Replay(100)
    replay.add([transitions(chain(reward), "actor", gamma=1.0) for reward in (0.0, 3.0, 1.0, 3.0, 2.0)])
    for top, expected in ((0.4, {1, 3}), (0.6, {1, 3, 4}), (0.2, {3}), (0.01, {3}), (1.0, {0, 1, 2, 3, 4})):
        drawn = replay.sample_episodes(60, seed=1, top=top)
        assert {episode[0].episode for episode in drawn} == expected
        assert drawn == replay.sample_episodes(60, seed=1, top=top)


def test_the_best_are_those_whose_return_from_the_first_state_is_highest() -> None:
    replay = Replay(100)
    replay.add([transitions(chain(*rewards), "actor", gamma=0.5) for rewards in ((0.0, 5.0), (3.0, 0.0))])
    assert replay.sample_episodes(1, seed=0, top=0.5)[0][0].mc_return == 3.0  # 2.5 for the other, whose end is better


def test_what_was_said_and_what_followed_are_read_from_transitions() -> None:
    found = [transitions(chain(1.0, 2.0), "actor", gamma=0.5), transitions(chain(4.0), "actor", gamma=0.5)]
    assert mc_returns(found).tolist() == [2.0, 2.0, 4.0]
    assert [(example.prompt, example.action) for example in examples(found)] == [
        (step.state, step.action) for episode in found for step in episode
    ]
    assert pack(examples(found)).logprobs is None, "nobody knows with which probability it was said"
