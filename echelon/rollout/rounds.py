"""Solving with feedback for a fixed number of rounds, as it is evaluated: nobody stops because an answer was right.

It plays problems, has every attempt judged, and keeps one row per problem in a file, so that an evaluation that was
killed goes on where it was. What the rows amount to is for `rounds_summary`.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from echelon.data.packing import Sampled, pack_siblings
from echelon.envs import EnvSpec
from echelon.errors import CheckpointError, EchelonError, RolloutError
from echelon.models.lm import token_logprobs
from echelon.rollout.feedback import SOLVER, Context, Shape, TemplateConfig, feedback_tree, previous, problem_alone
from echelon.rollout.rewards import Rewards, answer_in
from echelon.rollout.roles import Role
from echelon.seeds import derive_seed
from echelon.text.verify import repeats, stated_answer
from echelon.types import Episode, Task, Turn

Row = dict[str, Any]
"""One problem as it was played: `number`, `task`, `seed`, `error` and its `turns`."""

AT_ONCE = 64
"""Problems under way at the same time."""

EPISODES, SETTINGS, SUMMARY = "episodes.jsonl", "settings.json", "summary.json"


@dataclass(slots=True)
class RoundPlayers:
    """Who solves, who says something about it, and what each is shown: what it was in training, where there was any."""

    solver: Role
    coach: Role | None
    templates: TemplateConfig = field(default_factory=TemplateConfig)
    context: Context = "coach"
    fixed: str = ""
    modules: dict[str, nn.Module] = field(default_factory=dict)
    """The models by level. Of a solver that is a script there is none: nobody can say what it used feedback for."""
    tokens_per_pass: int = 4096


async def play_rounds(
    env: EnvSpec,
    tasks: Sequence[Task],
    who: RoundPlayers,
    rewards: Rewards,
    *,
    rounds: int,
    attempts: int = 1,
    seed: int = 0,
    done: Sequence[int] = (),
    record: Callable[[Row], None],
) -> None:
    """Play every problem whose number is not `done`, and `record` its row as soon as all of its attempts are judged.

    There are `attempts` first attempts at each, and each goes on for all `rounds`, right or wrong. What is sampled for
    a problem depends on the seed and its number alone. A play that raises gives a row with its error.
    """
    play = feedback_tree(
        env.make,
        who.solver,
        who.coach,
        shape=Shape(1, attempts, 1) if who.context == "example" else Shape(attempts, rounds=rounds),
        templates=who.templates,
        context=who.context,
        fixed=who.fixed,
        others=tasks if who.context == "stranger" else (),
    )
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, task: Task) -> None:
        async with slots:
            episode = Episode(task.id, seed=derive_seed(seed, number, task.id), data=task.data)
            try:
                await play(task, episode)
                row = await judged_row(number, task, episode, env, who, rewards)
            except EchelonError:
                raise
            except Exception as error:
                row = {"number": number, "task": task.id, "seed": episode.seed, "turns": []}
                row["error"] = f"{type(error).__name__}: {error}"
            record(row)

    left = [(number, task) for number, task in enumerate(tasks) if number not in set(done)]
    await all_of([one(number, task) for number, task in left])


async def all_of(work: Sequence[Awaitable[None]]) -> None:
    """Wait for all; when one raises, the others end before it is raised here."""
    running = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.gather(*running)
    except BaseException:
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        raise


async def judged_row(
    number: int, task: Task, episode: Episode, env: EnvSpec, who: RoundPlayers, rewards: Rewards
) -> Row:
    """What was said about a problem, by whom, and what each attempt was judged to be worth."""
    attempts = episode.of(SOLVER)
    verdicts = await rewards.judge([answer_in(episode, turn) for turn in attempts])
    gained: dict[int, float] = {}
    if SOLVER in who.modules:
        (alone,) = await problem_alone(env.make, [task], who.solver, who.templates)
        gained = gains(who.modules[SOLVER], attempts, alone, who.solver.params.temperature, who.tokens_per_pass)
    told: dict[int, dict[str, Any]] = {}
    for turn, verdict in zip(attempts, verdicts, strict=True):
        parsed = turn.info.get("parsed") if verdict.parsed is None else float(verdict.parsed)
        before = previous(episode, turn)
        told[turn.index] = {
            "score": turn.reward + verdict.reward,
            "answer": stated_answer(turn.text),
            **({} if parsed is None else {"parsed": bool(parsed)}),
            **({"why": verdict.why} if verdict.why else {}),
            **({} if before is None else {"repeats": repeats(turn.text, before.text)}),
            **({"gain": gained[turn.index]} if turn.index in gained else {}),
            "probability": mean_probability(turn),
        }
    turns = [
        {
            "index": turn.index,
            "role": turn.role,
            "parent": turn.parent,
            "seen": turn.heard[-1]["content"] if turn.heard else "",
            "text": turn.text,
            "tokens": len(turn.action),
            "stop": turn.stop,
            "cut": turn.info.get("cut", 0.0),
            **told.get(turn.index, {}),
        }
        for turn in episode.turns
    ]
    return {"number": number, "task": task.id, "seed": episode.seed, "error": None, "turns": turns}


def mean_probability(turn: Turn) -> float:
    """The mean probability of the tokens of an attempt: how sure its model was of what it said."""
    return sum(math.exp(logprob) for logprob in turn.logprobs) / max(1, len(turn.logprobs))


def gains(
    module: nn.Module, attempts: Sequence[Turn], alone: Sequence[int], temperature: float, tokens_per_pass: int
) -> dict[int, float]:
    """By index of each attempt that follows another turn: its log-probability per token in the prompt that it answered,
    less that in the prompt of the problem `alone`."""
    later = [turn for turn in attempts if turn.parent is not None and turn.action]
    if not later:
        return {}
    told = [Sampled(turn.prompt, turn.action, turn.logprobs) for turn in later]
    bare = [Sampled(list(alone), turn.action, turn.logprobs) for turn in later]
    means = mean_logprobs(module, [*told, *bare], temperature or 1.0, tokens_per_pass)
    return {turn.index: means[place] - means[place + len(later)] for place, turn in enumerate(later)}


def mean_logprobs(module: nn.Module, rows: Sequence[Sampled], temperature: float, tokens_per_pass: int) -> list[float]:
    """The mean log-probability of the tokens of each action, under the module as it is."""
    batch = pack_siblings(rows)
    found = torch.zeros(batch.tokens.shape)
    with torch.no_grad():
        for micro in batch.split(tokens_per_pass):
            micro = micro.to(next(module.parameters()).device)
            logprobs = token_logprobs(module, micro, temperature=temperature)
            found[micro.rows.cpu(), : logprobs.shape[1]] = logprobs.float().cpu()
    return (batch.pool(found) / batch.pool(batch.mask.float())).tolist()


class RoundFiles:
    """The directory of an evaluation: a row per problem as it is finished, and the summary when all are.

    An evaluation that has rows and no summary was killed: the same settings go on with it, others are refused.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.out = out
        self.settings = json.loads(json.dumps(settings, default=str))
        self._overwrite = overwrite

    def open(self) -> list[Row]:
        """The rows of problems that were finished before, without error. Raises CheckpointError."""
        with self._complaining():
            self.out.mkdir(parents=True, exist_ok=True)
            if self._overwrite:
                for name in (SUMMARY, EPISODES, SETTINGS):
                    (self.out / name).unlink(missing_ok=True)
            rows = self._finished()
            self._check_settings(bool(rows))
            self._write(EPISODES, "".join(line(row) for row in rows))  # without what was half-written
            self._write(SETTINGS, json.dumps(self.settings, indent=1) + "\n")
        return rows

    def append(self, row: Row) -> None:
        """Keep the row of a problem that is finished."""
        with self._complaining(), (self.out / EPISODES).open("a", encoding="utf-8") as file:
            file.write(line(row))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, rows: Sequence[Row], summary: Mapping[str, Any]) -> None:
        """All rows in the order of the problems, and the summary last."""
        with self._complaining():
            self._write(EPISODES, "".join(line(row) for row in sorted(rows, key=lambda row: row["number"])))
            self._write(SUMMARY, json.dumps(summary, indent=2) + "\n")

    def _finished(self) -> list[Row]:
        rows: dict[int, Row] = {}
        file = self.out / EPISODES
        for text in file.read_text(encoding="utf-8").split("\n") if file.is_file() else ():
            try:
                row = json.loads(text)
            except ValueError:  # half-written when it was killed
                continue
            if isinstance(row, dict) and row.get("error") is None and "number" in row:
                rows[row["number"]] = row
        return list(rows.values())

    def _check_settings(self, begun: bool) -> None:
        file = self.out / SETTINGS
        if not begun:
            return
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        names = {*known, *self.settings}
        if others := sorted(name for name in names if known.get(name) != self.settings.get(name)):
            raise CheckpointError(
                f"{self.out}: an evaluation was begun there with other settings ({', '.join(others[:3])}). Go on with "
                "those, start anew with --overwrite, or choose another --out."
            )

    def _write(self, name: str, text: str) -> None:
        scratch = self.out / f".{name}.tmp"
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")
        scratch.replace(self.out / name)

    @contextmanager
    def _complaining(self) -> Any:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{self.out}: cannot be written ({error.strerror}). Choose another --out.") from error


def line(row: Row) -> str:
    """A row of JSONL, whatever characters a model said."""
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace").decode() + "\n"


def check_failures(rows: Sequence[Row], error_budget: float) -> None:
    """Raise RolloutError where more problems failed than may."""
    failed = [row for row in rows if row["error"]]
    if len(failed) > error_budget * len(rows):
        raise RolloutError(
            f"{len(failed)} of {len(rows)} episodes failed, more than the error budget of {error_budget:.0%}. "
            f"The first, on task '{failed[0]['task']}': {failed[0]['error']}"
        )
