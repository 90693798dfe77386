"""Recorded decisions: what they become, what a file of them may say, and one line for everything it may not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from echelon.data.recorded import read_transitions, transition_rows
from echelon.data.replay import Transition, transitions
from echelon.errors import DataError
from echelon.models.lm import tiny
from echelon.text.chat import Renderer
from echelon.types import Episode, Message, Turn
from tests.test_docs import ROOT, columns, prose

PAGE = ROOT / "docs" / "algorithms" / "archer.md"


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny(["door red blue key sun moon yes no is it"], vocab_size=300, hidden=16, layers=1, heads=1)[1])


def said(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def row(seen: Any, action: str, after: Any, reward: Any = 0.0, done: Any = False, **more: Any) -> dict[str, Any]:
    return {
        "observation": seen,
        "action": action,
        "reward": reward,
        "next_observation": after,
        "terminated": done,
    } | more


TEXTS = [row("red", "sun", "red sun no", -1), row("red sun no", "moon", None, 0, True)]
"""A game of two turns told in texts, each observation the whole story so far."""
CUT = [row("blue", "sun", "blue sun no", -1, truncated=True)]


def write(folder: Path, rows: Sequence[Any], name: str = "t.jsonl") -> str:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def read(folder: Path, rows: Sequence[Any], renderer: Renderer, **settings: Any) -> list[list[Transition]]:
    return read_transitions([write(folder, rows)], renderer, **({"gamma": 0.5} | settings))


def test_rows_become_the_transitions_of_their_episodes(tmp_path: Path, renderer: Renderer) -> None:
    first, second = read(tmp_path, [*TEXTS, *CUT], renderer)
    assert [step.reward for step in first] == [-1.0, 0.0]
    assert [step.terminated for step in first] == [False, True]
    assert [step.text for step in first] == ["sun", "moon"]
    assert first[0].state == renderer.render([said("user", "red")])
    assert first[0].action == renderer.action_ids("sun")
    assert first[0].next_state == first[1].state == renderer.render([said("user", "red sun no")])
    assert first[1].next_state is None
    assert not second[0].terminated, "what was cut off would have gone on"
    assert second[0].next_state == renderer.render([said("user", "blue sun no")])


def test_an_utterance_that_said_nothing_is_a_decision_like_any_other(tmp_path: Path, renderer: Renderer) -> None:
    begun = [said("user", "which door?")]
    later = [*begun, said("assistant", ""), said("user", "say one")]
    (episode,) = read(tmp_path, [row(begun, "", later), row(later, "left", None, 1.0, True)], renderer)
    assert [len(step.action) for step in episode] == [1, len(renderer.action_ids("left"))]


def test_rewards_of_several_steps_and_returns_are_those_of_any_episode(tmp_path: Path, renderer: Renderer) -> None:
    rows = [row("a", "x", "b", 1), row("b", "x", "c", 2), row("c", "x", None, 4, True)]
    (episode,) = read(tmp_path, rows, renderer, n_step=2)
    assert [step.reward for step in episode] == [2.0, 4.0, 4.0]  # 1 + 0.5 · 2, 2 + 0.5 · 4
    assert [step.discount_steps for step in episode] == [2, 2, 1]
    assert [step.terminated for step in episode] == [False, True, True]
    assert [step.mc_return for step in episode] == [3.0, 4.0, 4.0]


def test_returns_that_are_given_are_taken_if_every_row_has_one(tmp_path: Path, renderer: Renderer) -> None:
    given = [{**TEXTS[0], "mc_return": 7}, {**TEXTS[1], "mc_return": 8.5}]
    (episode,) = read(tmp_path, given, renderer)
    assert [step.mc_return for step in episode] == [7.0, 8.5]
    (episode,) = read(tmp_path, [given[0], {**TEXTS[1], "mc_return": None}], renderer)
    assert [step.mc_return for step in episode] == [-1.0, 0.0]


def game(ending: str = "terminated") -> Episode:
    """Two turns with a renderer's tokens, as a role would have said them."""
    episode = Episode(task="game", ending=ending)  # type: ignore[arg-type]
    for index, (heard, text, reward) in enumerate((("red", "sun", -1.0), ("no. blue", "moon", 1.0))):
        turn = Turn(index, "actor", [], [], [], text, parent=index - 1 if index else None, reward=reward)
        turn.heard = [said("user", heard)]
        episode.turns.append(turn)
    if ending == "truncated":
        episode.unanswered = [said("user", "yes. red")]
    return episode


@pytest.mark.parametrize("ending", ["terminated", "truncated"])
def test_an_episode_that_is_written_and_read_is_the_episode(ending: str, tmp_path: Path, renderer: Renderer) -> None:
    episode = game(ending)
    conversation: list[Message] = []
    for turn in episode.turns:
        conversation += turn.heard
        turn.prompt, turn.action = renderer.render(conversation), renderer.action_ids(turn.text)
        conversation.append(said("assistant", turn.text))
    if ending == "truncated":
        episode.final = renderer.render([*conversation, *episode.unanswered])
    (found,) = read(tmp_path, list(transition_rows([episode])), renderer)
    assert found == transitions(episode, "actor", gamma=0.5)
    assert found[1].state[: len(found[0].state + found[0].action)] == found[0].state + found[0].action


def test_failed_episodes_are_not_recorded_and_others_keep_their_number() -> None:
    failed = game()
    failed.ending = "failed"
    rows = list(transition_rows([game(), failed, game()]))
    assert [row["episode"] for row in rows] == [0, 0, 2, 2]


def test_episodes_that_rows_cannot_tell_are_refused() -> None:
    tree, silent, other = game(), game("truncated"), game()
    tree.turns[1].parent = None
    other.turns[1].role = "coach"
    silent.unanswered = [said("user", "")]
    for episode, reason in ((tree, "several roles or branches"), (other, "several roles or branches")):
        with pytest.raises(DataError, match=reason):
            list(transition_rows([episode]))
    with pytest.raises(DataError, match="task 'game': nothing was said after turn 2"):
        list(transition_rows([silent]))


GOOD: Mapping[str, list[Any]] = {
    "done instead of terminated": [
        {**{k: v for k, v in one.items() if k != "terminated"}, "done": one["terminated"]} for one in TEXTS
    ],
    "both, the same": [{**one, "done": one["terminated"]} for one in TEXTS],
    "flags as numbers": [{**one, "terminated": int(one["terminated"]), "truncated": 0} for one in TEXTS],
    "episodes by name": [{**one, "episode": "a"} for one in TEXTS] + [{**CUT[0], "episode": "b"}],
    "other columns": [{**one, "trajectory_reward": -1, "question": 3} for one in TEXTS],
    "what was seen after the end": [TEXTS[0], {**TEXTS[1], "next_observation": "red sun no moon yes"}],
    "nothing said": [{**CUT[0], "action": ""}],
}


@pytest.mark.parametrize("name", GOOD)
def test_what_a_file_may_say_besides(name: str, tmp_path: Path, renderer: Renderer) -> None:
    assert [len(episode) for episode in read(tmp_path, GOOD[name], renderer)] in ([2], [2, 1], [1])


def without(one: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in one.items() if name not in names}


BAD: Mapping[str, tuple[list[Any], str]] = {
    "no rows": ([], "t.jsonl holds no row. Put one decision on each line."),
    "not JSON": (["{"], ":1: not JSON: "),
    "a column is missing": ([without(TEXTS[0], "reward")], ":1: 'reward' is missing; there is observation, action, "),
    "a column has nearly the right name": (
        [{**without(TEXTS[0], "observation"), "observations": "red"}],
        ":1: 'observation' is missing; there is action, reward, next_observation, terminated, observations. "
        "Is it 'observations'?",
    ),
    "no flag says whether it is over": (
        [without(TEXTS[0], "terminated")],
        ":1: neither 'done' nor 'terminated' is there. Say of every row whether the task is over.",
    ),
    "two flags disagree": ([{**TEXTS[0], "done": True}], ":1: 'done' and 'terminated' disagree. Keep one of them, "),
    "over and cut off": ([{**TEXTS[1], "truncated": True}], ":1: it says both that the task was over and that it was"),
    "a flag is no flag": ([{**TEXTS[0], "terminated": "maybe"}], ":1: 'terminated' is 'maybe'. Write true or false."),
    "a flag is a number that is neither": ([{**CUT[0], "truncated": 2}], ":1: 'truncated' is 2. Write true or false."),
    "an observation is null": ([{**TEXTS[0], "observation": None}], ":1: 'observation' is null. Fill it in"),
    "an observation is empty": ([{**TEXTS[0], "observation": " "}], ":1: 'observation' is empty. Fill it in"),
    "an observation has other keys": (
        [{**TEXTS[0], "observation": [{"text": "red"}]}],
        ":1: message 1 of 'observation' has no role and content.",
    ),
    "an observation ends with the actor": (
        [{**TEXTS[0], "observation": [said("user", "red"), said("assistant", "sun")]}],
        ":1: the last message of 'observation' is the assistant's, so there is nothing to answer.",
    ),
    "an action is no text": ([{**TEXTS[0], "action": 7}], ":1: 'action' is 7, not text. Write what was said."),
    "half a character": ([{**TEXTS[0], "action": "\ud83d"}], ":1: 'action' holds half of a surrogate pair"),
    "a reward is no number": ([{**TEXTS[0], "reward": "good"}], ":1: 'reward' is 'good', not a finite number."),
    "a reward is true": ([{**TEXTS[0], "reward": True}], ":1: 'reward' is True, not a finite number."),
    "a reward is not finite": (
        ['{"observation": "a", "action": "b", "reward": NaN, "next_observation": "c", "done": false}'],
        ":1: 'reward' is nan, not a finite number.",
    ),
    "a return is no number": ([{**TEXTS[0], "mc_return": "?"}], ":1: 'mc_return' is '?', not a finite number."),
    "nothing comes next": (
        [{**TEXTS[0], "next_observation": None}],
        ":1: 'next_observation' is null and the task is not over. Say what was seen next.",
    ),
    "a link is broken": (
        [TEXTS[0], {**TEXTS[1], "observation": "red sun yes"}],
        ":2: the link is broken: its observation is not the next_observation of FILE:1. Give the rows of an episode in "
        "order, all of them, and say in both what was seen between them.",
    ),
    "a row is left out": ([TEXTS[0], *CUT], ":2: the link is broken: its observation is not the next_observation"),
    "the file ends too early": (
        TEXTS[:1],
        ":1: the file ends within an episode. Set terminated (the task was over) or truncated (it would have gone on)",
    ),
    "an episode begins within another": (
        [{**TEXTS[0], "episode": 1}, {**TEXTS[1], "episode": 2}],
        ":2: episode 2 begins before 1 is over. Set terminated or truncated in FILE:1, or give the rows",
    ),
    "an episode goes on after its end": (
        [{**CUT[0], "episode": 1}, {**CUT[0], "episode": 1}],
        ":2: episode 1 is over already. Give the rows of an episode one after the other, and every episode a name",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_file_is_one_line_with_its_place(name: str, tmp_path: Path, renderer: Renderer) -> None:
    rows, message = BAD[name]
    with pytest.raises(DataError) as refused:
        read(tmp_path, rows, renderer)
    found = str(refused.value).replace(f"{tmp_path}/t.jsonl", "FILE").removeprefix("FILE")
    assert found.startswith(message.removeprefix("t.jsonl"))
    assert "\n" not in found


def test_a_file_that_is_not_there_is_named_with_its_setting(tmp_path: Path, renderer: Renderer) -> None:
    write(tmp_path, TEXTS, "random.jsonl")
    with pytest.raises(DataError, match=r"^offline = .*randon.jsonl: there is no such file. Did you mean"):
        read_transitions([str(tmp_path / "randon.jsonl")], renderer, gamma=1.0)


def test_a_prompt_that_is_too_long_is_named_with_its_place(tmp_path: Path, renderer: Renderer) -> None:
    short = Renderer(renderer.tokenizer, max_tokens=4)
    with pytest.raises(DataError, match=r"t.jsonl:1: the instruction and the latest observation alone take"):
        read(tmp_path, [{**CUT[0], "observation": "red " * 9}], short)


def test_several_files_are_read_one_after_the_other(tmp_path: Path, renderer: Renderer) -> None:
    paths = [write(tmp_path, rows, f"{number}.jsonl") for number, rows in enumerate((CUT, TEXTS))]
    assert [len(episode) for episode in read_transitions(paths, renderer, gamma=1.0)] == [1, 2]


def test_the_page_lists_every_kind_of_bad_row() -> None:
    listed = {row["what is wrong"] for row, _ in columns(prose(PAGE), "what is wrong")}
    assert listed == set(BAD)
