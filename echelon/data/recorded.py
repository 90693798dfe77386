"""Decisions that somebody recorded, as rows of a file: episodes out of them for a replay, and episodes into them.

One row per decision (schema `utterance_transition`): what was seen, what was said, what that earned, what was seen
next. The rows of an episode stand together and in order. Knows no model and no environment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from echelon.data.replay import Transition, transitions
from echelon.data.schemas import read_prompt
from echelon.data.sources import Source, open_tables
from echelon.errors import DataError, did_you_mean
from echelon.text.chat import Renderer
from echelon.types import Episode, Message, Turn

OVER = ("done", "terminated")
NEEDED = ("observation", "action", "reward", "next_observation")
KNOWN = (*NEEDED, *OVER, "truncated", "episode", "mc_return")
_TRUE, _FALSE = (True, 1, "true", "True", "1"), (False, 0, "false", "False", "0", None, "")


@dataclass(frozen=True, slots=True)
class Decision:
    """One row, checked by itself."""

    where: str
    episode: object
    """What the column `episode` says, None without one."""
    seen: list[Message]
    said: str
    reward: float
    next: list[Message] | None
    """None where nobody says what came after, which only the end of the task allows."""
    terminated: bool
    truncated: bool
    mc_return: float | None

    @property
    def ends(self) -> bool:
        """Whether it is the last of its episode."""
        return self.terminated or self.truncated


def read_transitions(
    paths: Sequence[str], renderer: Renderer, *, gamma: float, n_step: int = 1, setting: str = "offline"
) -> list[list[Transition]]:
    """The episodes of files, folders or hub ids, each as the transitions that `transitions` makes of an episode.

    Observations and actions become tokens by the renderer: an observation that is text as the message of a user, a list
    as a conversation. `setting` is the name of the setting the paths come from. Raises DataError, beginning with the
    place of the row, for the first row that is broken or does not continue the one before it.
    """
    found = []
    for path in paths:
        for table in open_tables(Source(path, path_setting=setting)):
            episodes = list(_episodes(_decision(cells, where) for where, cells in table.rows))
            if not episodes:
                raise DataError(f"{table.name} holds no row. Put one decision on each line.")
            found += [_transitions(decisions, renderer, gamma, n_step) for decisions in episodes]
    return found


def transition_rows(episodes: Iterable[Episode]) -> Iterator[dict[str, Any]]:
    """The rows of such a file, of episodes in which one role spoke; failed ones are left out.

    Raises DataError for what cannot be told in them: other roles or branches, and observations without words.
    """
    for number, episode in enumerate(episodes):
        if episode.ending == "failed":
            continue
        seen: list[Message] = []
        for turn in episode.turns:
            last = turn is episode.turns[-1]
            _check_tellable(episode, turn)
            seen = [*seen, *turn.heard]
            answer = Message(role="assistant", content=turn.text)
            after = episode.unanswered if last else episode.turns[turn.index + 1].heard
            ending = episode.ending if last else ""
            if ending != "terminated" and not any(message["content"].strip() for message in after):
                raise DataError(
                    f"task '{episode.task}': nothing was said after turn {turn.index + 1}, so no row can tell what was "
                    "seen next. Only environments that answer every utterance can be recorded."
                )
            yield {
                "episode": number,
                "observation": seen,
                "action": turn.text,
                "reward": turn.reward,
                "next_observation": None if ending == "terminated" else [*seen, answer, *after],
                "terminated": ending == "terminated",
                "truncated": ending == "truncated",
            }
            seen = [*seen, answer]


def _check_tellable(episode: Episode, turn: Turn) -> None:
    chain = turn.parent == (turn.index - 1 if turn.index else None)
    if not chain or turn.role != episode.turns[0].role:
        raise DataError(
            f"task '{episode.task}': several roles or branches do not make a row of decisions. Record episodes in "
            "which one role answers an environment."
        )


def _decision(cells: Mapping[str, Any], where: str) -> Decision:
    for column in NEEDED:
        if column not in cells:
            others = [name for name in cells if name not in KNOWN]
            meant = did_you_mean(column, others).replace("Did you mean", "Is it").rstrip()
            raise DataError(f"{where}: '{column}' is missing; there is {', '.join(cells) or 'nothing'}.{meant}")
    given = [name for name in OVER if name in cells]
    if not given:
        raise DataError(
            f"{where}: neither 'done' nor 'terminated' is there. Say of every row whether the task is over."
        )
    over = {_flag(cells[name], name, where) for name in given}
    cut = _flag(cells.get("truncated"), "truncated", where)
    if len(over) > 1:
        raise DataError(f"{where}: 'done' and 'terminated' disagree. Keep one of them, or say the same in both.")
    if over == {True} and cut:
        raise DataError(
            f"{where}: it says both that the task was over and that it was cut off. Only one of them can be true: "
            "after the end nothing follows, and what was cut off would have gone on."
        )
    after = cells["next_observation"]
    if after is None and over == {False}:
        raise DataError(f"{where}: 'next_observation' is null and the task is not over. Say what was seen next.")
    return Decision(
        where=where,
        episode=cells.get("episode"),
        seen=_seen(cells, "observation", where),
        said=_said(cells["action"], where),
        reward=_number(cells["reward"], "reward", where),
        next=None if over == {True} else _seen(cells, "next_observation", where),
        terminated=over == {True},
        truncated=cut,
        mc_return=None if cells.get("mc_return") is None else _number(cells["mc_return"], "mc_return", where),
    )


def _seen(cells: Mapping[str, Any], column: str, where: str) -> list[Message]:
    return read_prompt(cells[column], column, where, may_be_empty=True)


def _said(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: 'action' is {value!r:.40}, not text. Write what was said.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: 'action' holds half of a surrogate pair, which no tokenizer takes.") from error
    return value


def _number(value: Any, column: str, where: str) -> float:
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: '{column}' is {value!r:.40}, not a finite number. Write a number.")
    return number


def _flag(value: Any, column: str, where: str) -> bool:
    if isinstance(value, list | dict) or value not in (*_TRUE, *_FALSE):
        raise DataError(f"{where}: '{column}' is {value!r:.40}. Write true or false.")
    return value in _TRUE


def _episodes(decisions: Iterable[Decision]) -> Iterator[list[Decision]]:
    """Rows that belong together: up to an end, each continuing the one before."""
    episode: list[Decision] = []
    closed: set[object] = set()
    for decision in decisions:
        if episode:
            _check_link(episode[-1], decision)
        elif decision.episode is not None:
            if str(decision.episode) in closed:
                raise DataError(
                    f"{decision.where}: episode {decision.episode!r} is over already. Give the rows of an episode one "
                    "after the other, and every episode a name of its own."
                )
            closed.add(str(decision.episode))
        episode.append(decision)
        if decision.ends:
            yield episode
            episode = []
    if episode:
        raise DataError(
            f"{episode[-1].where}: the file ends within an episode. Set terminated (the task was over) or truncated "
            "(it would have gone on) in its last row."
        )


def _check_link(before: Decision, after: Decision) -> None:
    if before.episode != after.episode:
        raise DataError(
            f"{after.where}: episode {after.episode!r} begins before {before.episode!r} is over. Set terminated or "
            f"truncated in {before.where}, or give the rows that are missing."
        )
    if before.next != after.seen:
        raise DataError(
            f"{after.where}: the link is broken: its observation is not the next_observation of {before.where}. Give "
            "the rows of an episode in order, all of them, and say in both what was seen between them."
        )


def _transitions(decisions: Sequence[Decision], renderer: Renderer, gamma: float, n_step: int) -> list[Transition]:
    episode, last = Episode(task=decisions[0].where), decisions[-1]
    for index, decision in enumerate(decisions):
        prompt, action = _ids(decision.seen, renderer, decision.where), renderer.action_ids(decision.said)
        parent = index - 1 if index else None
        turn = Turn(index, "actor", prompt, action, logprobs=[], text=decision.said, parent=parent)
        turn.reward = decision.reward
        episode.turns.append(turn)
    episode.ending = "terminated" if last.terminated else "truncated"
    episode.final = None if last.next is None else _ids(last.next, renderer, last.where)
    found = transitions(episode, "actor", gamma=gamma, n_step=n_step)
    given = [decision.mc_return for decision in decisions if decision.mc_return is not None]
    if len(given) < len(found):
        return found
    return [replace(one, mc_return=value) for one, value in zip(found, given, strict=True)]


def _ids(messages: Sequence[Message], renderer: Renderer, where: str) -> list[int]:
    try:
        return renderer.render(messages)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
