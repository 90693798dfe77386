"""The replay of choices: what goes in comes out, oldest first out, and the same after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.data.candidates import CandidateReplay, Choice, Options
from echelon.errors import ConfigError, DataError

ids = st.lists(st.integers(0, 99), min_size=1, max_size=6)
options = st.builds(Options, ids, st.lists(ids, min_size=1, max_size=4))


@st.composite
def episodes(draw: st.DrawFn) -> list[Choice]:
    points = draw(st.lists(options, min_size=1, max_size=5))
    cut_off = draw(st.booleans()) and len(points) > 1
    following = [*points[1:], *([] if cut_off else [None])]
    return [
        Choice(here, draw(st.integers(0, len(here.candidates) - 1)), draw(st.floats(-9, 9)), after)
        for here, after in zip(points, following, strict=False)
    ]


def chain(length: int, *, cut_off: bool = False, at: int = 0) -> list[Choice]:
    """States that grow by what was chosen, the first candidate always."""
    state, points = [at], []
    for number in range(length + cut_off):
        points.append(Options(list(state), [[10 + number], [20 + number, 30]]))
        state = [*state, 10 + number]
    following = [*points[1:], *([] if cut_off else [None])]
    return [Choice(here, 0, float(at), after) for here, after in zip(points[:length], following, strict=True)]


def everything(replay: CandidateReplay) -> list[Choice]:
    found: list[Choice] = []
    for choice in replay.sample(60 * len(replay), seed=1):
        if choice not in found:
            found.append(choice)
    return found


@given(st.lists(episodes(), min_size=1, max_size=4))
def test_what_was_stored_is_what_is_sampled(played: list[list[Choice]]) -> None:
    replay = CandidateReplay(1000)
    replay.add(played)
    stored = [choice for episode in played for choice in episode]
    assert len(replay) == len(stored)
    assert all(choice in stored for choice in replay.sample(50, seed=0))


def test_every_decision_is_drawn_as_often_as_any_other() -> None:
    replay = CandidateReplay(100)
    replay.add([chain(3, at=1), chain(1, at=2)])
    drawn = replay.sample(4000, seed=0)
    assert sum(choice.options.state[0] == 2 for choice in drawn) == pytest.approx(1000, abs=110)
    assert len(everything(replay)) == 4


def test_nothing_follows_termination_and_something_follows_a_cut() -> None:
    replay = CandidateReplay(100)
    replay.add([chain(2, at=1), chain(2, cut_off=True, at=2)])
    over = {(c.options.state[0], len(c.options.state)): c.terminated for c in everything(replay)}
    assert over == {(1, 1): False, (1, 2): True, (2, 1): False, (2, 2): False}
    last = next(c for c in everything(replay) if c.options.state == [2, 10])
    assert last.after == Options([2, 10, 11], [[12], [22, 30]])


def test_a_state_is_kept_once_with_its_candidates() -> None:
    replay = CandidateReplay(100)
    replay.add([chain(40)])
    (stored,) = replay._stored
    assert len(stored.tokens) == 1 + 39 + 40 * 3  # the first state, what each adds, and three tokens of candidates


def test_whole_episodes_leave_oldest_first() -> None:
    replay = CandidateReplay(5)
    replay.add([chain(2, at=1), chain(2, at=2), chain(2, at=3)])
    assert len(replay) == 4
    assert {choice.options.state[0] for choice in everything(replay)} == {2, 3}


def test_a_replay_that_was_loaded_answers_the_same(tmp_path: Path) -> None:
    replay, other, small = CandidateReplay(50), CandidateReplay(50), CandidateReplay(3)
    replay.add([chain(3, at=1), [], chain(2, cut_off=True, at=2)])
    replay.save(tmp_path)
    other.add([chain(1, at=9)])
    other.load(tmp_path)
    small.load(tmp_path)
    assert other.sample(30, seed=5) == replay.sample(30, seed=5)
    assert other.sample(30, seed=6) != replay.sample(30, seed=5)
    assert {choice.options.state[0] for choice in everything(small)} == {2}
    CandidateReplay(5).save(tmp_path / "empty")
    other.load(tmp_path / "empty")
    assert len(other) == 0


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="capacity = 0: a replay must hold at least one decision"):
        CandidateReplay(0)
    with pytest.raises(DataError, match="the replay is empty"):
        CandidateReplay(1).sample(1, seed=0)
    with pytest.raises(DataError, match="an episode has 3 decisions and the replay holds 2"):
        CandidateReplay(2).add([chain(3)])
    with pytest.raises(AssertionError, match="a chain of decisions"):
        CandidateReplay(9).add([[chain(2)[1], chain(2)[0]]])
