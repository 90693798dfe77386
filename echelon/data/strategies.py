"""Decisions to learn strategies from: read, told what they earned, and written as tokens with all their options.

Whatever the file holds, decisions or annotated conversations, whole conversations are on one side of a split. Knows no
model: what judges a reply is a function it is handed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from echelon.config import DataConfig
from echelon.data.candidates import Choice, Options
from echelon.data.datasets import Kind, Split, load_kind
from echelon.data.dialogues import is_conversation, raw_daily_dialog, read_conversation
from echelon.data.options import spell
from echelon.data.sources import Source, open_tables
from echelon.data.transitions import PREFIX, State, Transition, TransitionConfig, read_transition
from echelon.errors import ConfigError, DataError, RolloutError
from echelon.ops.options import other_option
from echelon.seeds import derive_seed
from echelon.text.chat import Renderer
from echelon.text.dialogue import (
    DialogueState,
    Inventory,
    Judgement,
    fit,
    judge_prompt,
    parse_judgement,
    strategist_prompt,
)
from echelon.text.endpoint import Ask, Unanswered, understood
from echelon.types import Message

__all__ = [
    "State",
    "Transition",
    "TransitionConfig",
    "asked",
    "file_rewards",
    "imitation_rewards",
    "judge_rewards",
    "load_transitions",
    "option_ids",
    "transitions_to_choices",
]


def load_transitions(
    data: DataConfig,
    inventory: Inventory,
    columns: TransitionConfig,
    *,
    seed: int,
    name: str = "data",
) -> Split[Transition]:
    """The decisions of files, folders and hub ids, each a row or part of an annotated conversation.

    Split, mixed and capped as `datasets.load_rows` does, by conversations: the same ones in every rerun. Raises
    DataError for the first row that is broken or could mean two things, ConfigError for settings that cannot work.
    """
    if data.streaming:
        raise ConfigError(f"{name}.streaming = True: conversations are split whole, so all are read. Leave it out.")

    def read(source: Source) -> Iterator[Transition]:
        found: list[Transition] = []
        for table in raw_daily_dialog(source) or open_tables(source):
            for where, cells in table.rows:
                if is_conversation(cells):
                    found += read_conversation(cells, inventory, where)
                else:
                    found.append(read_transition(cells, inventory, columns, where))
        if columns.next_state_prefix != PREFIX and not any(row.after for row in found):
            raise DataError(
                f"columns.next_state_prefix = {columns.next_state_prefix}: no row of {source.path} has a next state "
                "with it. Look at its columns."
            )
        if not found:
            raise DataError(
                f"{source.path_setting} = {source.path}: there is no decision in it. Give rows, or conversations."
            )
        return iter(with_dialogues(found))

    def conversation(row: Transition) -> list[Any]:
        return [row.dialogue]

    return load_kind(data, Kind(read, identity=conversation, kinship=conversation), seed=seed, name=name)


def with_dialogues(rows: Sequence[Transition]) -> list[Transition]:
    """The same rows, each with a name of its conversation; where the file has none, it is found out.

    Rows are of one conversation when one leads to the other, or when they begin with the same words about the same
    thing. The name depends on what is said alone.
    """
    owner: dict[str, str] = {}

    def root(key: str) -> str:
        while owner.setdefault(key, key) != key:
            owner[key] = owner[owner[key]]  # half the way next time
            key = owner[key]
        return key

    for row in (row for row in rows if not row.dialogue):
        first, *others = sorted({root(key) for key in _traces(row)})
        owner.update(dict.fromkeys(others, first))  # the smallest names them all, whatever the order of the rows
    return [row if row.dialogue else replace(row, dialogue=root(_traces(row)[0])) for row in rows]


def _traces(row: Transition) -> list[str]:
    """What rows of one conversation have in common with another of them."""
    states = [state for state in (row.state, row.after) if state is not None]
    found = [[state] if isinstance(state, str) else [state.query, state.history, state.description] for state in states]
    for state in states:
        if isinstance(state, DialogueState):
            begins = state.history[0][1] if state.history else state.query
            found.append(["begins", state.description, begins])
    return [hashlib.blake2b(json.dumps(one).encode(), digest_size=8).hexdigest() for one in found]


def file_rewards(rows: Sequence[Transition]) -> list[Transition]:
    """The rows, every one with a reward. Raises DataError for the first without."""
    for row in rows:
        if row.reward is None:
            raise DataError(
                f"{row.where}: there is no reward. Add one, name its column with columns.reward_key, or take "
                "rewards from imitation or from a judge."
            )
    return list(rows)


def imitation_rewards(rows: Sequence[Transition], inventory: Inventory, *, seed: int) -> list[Transition]:
    """Every decision twice: as it was taken, for +1, and with another legal strategy, drawn uniformly, for −1.

    What followed is what followed in the conversation, so the two differ by 2, whatever comes after (straQ*,
    arXiv 2505.06987). Raises DataError where a decision had no alternative.
    """
    rng = random.Random(derive_seed(seed, "imitation"))
    found: list[Transition] = []
    for row in rows:
        legal = [not row.legal or place in row.legal for place in range(len(inventory))]
        if sum(legal) < 2:
            raise DataError(f"{row.where}: only one strategy is legal, so none is worse. Remove the row.")
        other = other_option(row.strategy, legal, rng.random())
        found += [replace(row, reward=1.0), replace(row, reward=-1.0, strategy=other, reply="", answer="")]
    return found


async def judge_rewards(rows: Sequence[Transition], ask: Ask) -> tuple[list[Transition], list[str]]:
    """The rows with what a judge says of their replies, 0 to 5, and what there is to say about those left out.

    A row is left out where the judge does not answer, or not as asked in three tries: it has no reward, which is not a
    reward of 0. Replies that are the same in the same place are judged once. Raises DataError for rows without a reply,
    and where no row is left.
    """
    prompts = [_judged(row) for row in rows]
    wanted = {prompt[0]["content"]: prompt for prompt in prompts}
    grades = await asyncio.gather(*(_grade(ask, prompt) for prompt in wanted.values()))
    graded = dict(zip(wanted, grades, strict=True))
    kept: list[Transition] = []
    complaint = ""
    for row, prompt in zip(rows, prompts, strict=True):
        grade = graded[prompt[0]["content"]]
        if isinstance(grade, Judgement):
            kept.append(replace(row, reward=float(grade.total)))
        else:
            complaint = complaint or grade
    if rows and not kept:
        raise DataError(f"none of {len(rows)} replies has a reward: {complaint}")
    left_out = f"{len(rows) - len(kept)} of {len(rows)} decisions are left out, without a reward: {complaint}"
    return kept, [left_out] if complaint else []


def _judged(row: Transition) -> list[Message]:
    if not row.reply or isinstance(row.state, str):
        missing = "no reply" if not row.reply else "a ready prompt in place of the conversation"
        raise DataError(
            f"{row.where}: a judge reads the conversation and the reply, and the row has {missing}. Add it, or take "
            "rewards from elsewhere."
        )
    return judge_prompt(row.state, row.reply, row.answer)


async def _grade(ask: Ask, prompt: list[Message]) -> Judgement | str:
    """What the judge says, or why there is nothing."""
    try:
        return await understood(ask, prompt, parse_judgement, who="the judge")
    except (Unanswered, RolloutError, TimeoutError) as error:
        return str(error) or type(error).__name__


def asked(state: State, inventory: Inventory) -> list[Message]:
    """What the upper level reads in a state: a ready prompt as it is, a conversation with the menu."""
    return [Message(role="user", content=state)] if isinstance(state, str) else strategist_prompt(state, inventory)


def option_ids(renderer: Renderer, inventory: Inventory) -> list[list[int]]:
    """The tokens of every option as they answer a prompt. Raises DataError for options that cannot be told apart, or
    that the tokenizer writes with other tokens after the cue than alone."""
    return spell(renderer, inventory, strategist_prompt(DialogueState("x"), inventory))


def transitions_to_choices(
    rows: Sequence[Transition], renderer: Renderer, inventory: Inventory, budget: int | None = None
) -> list[list[Choice]]:
    """The rows as tokens, in chains: a row and the one after it, where that begins in the state this one led to.

    A state has all K options in the order of the inventory, those that are not legal in it empty. The oldest history is
    dropped from a prompt of more than `budget` tokens. Raises DataError for one that is too long without any, and for
    rows without a reward.
    """
    written = _Written(renderer, inventory, budget)
    chains: list[list[Choice]] = []
    for row in file_rewards(rows):
        assert row.reward is not None
        after = None if row.after is None else written.options(row.after, row.legal_after, row.where)
        choice = Choice(written.options(row.state, row.legal, row.where), row.strategy, row.reward, after)
        if chains and chains[-1][-1].after == choice.options:
            chains[-1].append(choice)
        else:
            chains.append([choice])
    return chains


class _Written:
    """States as tokens, each written once."""

    def __init__(self, renderer: Renderer, inventory: Inventory, budget: int | None) -> None:
        self._renderer, self._inventory, self._budget = renderer, inventory, budget
        self._spelled = option_ids(renderer, inventory)
        self._known: dict[tuple[State, tuple[int, ...]], Options] = {}

    def options(self, state: State, legal: tuple[int, ...], where: str) -> Options:
        """A state up to the cue, and its options: empty where they are not legal."""
        if (state, legal) not in self._known:
            try:
                ids = self._prompt(state)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            places = legal or range(len(self._inventory))
            candidates = [option if place in places else [] for place, option in enumerate(self._spelled)]
            self._known[state, legal] = Options(ids, candidates)
        return self._known[state, legal]

    def _prompt(self, state: State) -> list[int]:
        if isinstance(state, DialogueState):
            state = fit(state, self._render, lambda messages: len(self._ids(messages)), self._budget)
            return self._ids(self._render(state))
        prompt = self._ids(self._render(state))
        if self._budget is not None and len(prompt) > self._budget:
            raise DataError(
                f"the ready prompt takes {len(prompt)} tokens, more than the budget of {self._budget}, and what of it "
                "may be dropped is not known. Raise max_prompt_tokens, or give the conversation."
            )
        return prompt

    def _render(self, state: State) -> list[Message]:
        return asked(state, self._inventory)

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        return [token for part in self._renderer.segments(messages) for token in part]
