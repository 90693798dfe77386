"""A responder who is told its strategies by somebody who does not learn: a data set, chance, or a strategist's folder.

Knows who tells what, and plays; what a reply is worth, and how the responder learns from that, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from echelon.config import DataConfig, ModelConfig, SamplingConfig
from echelon.data.strategies import Transition, TransitionConfig, load_transitions
from echelon.envs import EnvSpec
from echelon.envs._shared import settle
from echelon.envs.states import Given, states_env
from echelon.errors import ConfigError, DataError, ParseError, did_you_mean
from echelon.models.options import OptionScorer, read_description
from echelon.rollout.dialogue import STRATEGIST, reading, spelled, state_of
from echelon.rollout.plays import paid_step
from echelon.rollout.roles import Role
from echelon.rollout.setup import model_path, open_actor
from echelon.sampling.choices import Strategist, option_score
from echelon.seeds import derive_seed
from echelon.text.dialogue import DialogueState, Inventory
from echelon.text.endpoint import Ask
from echelon.types import Env, Episode, Play, Task

Tell = Callable[[Task, int], str | None]
"""The strategy of a reply, as prompts write it, from the task and a seed; None tells none."""

SOURCES = ("data", "random", "none")
"""Who may tell, besides a strategist and a strategy's own name."""


def told_loop(make: Callable[[Task], Env], responder: Role, tell: Tell, *, max_turns: int = 1000) -> Play:
    """Strategy told, reply, the user's answer, until the environment ends, or is cut off after `max_turns` replies.

    The responder begins afresh at every turn, and every reply earns what the environment pays for it. The strategy of
    the last reply stands in `Episode.data` as `strategy`, where rewards read it. Raises DataError for an environment
    without `state`, and for a reward that is not finite.
    """

    async def play(task: Task, episode: Episode) -> None:
        env, turn = make(task), None
        await settle(env.start())
        for number in range(max_turns):
            label = tell(task, derive_seed(episode.seed, "told", number))
            turn = await responder.act(episode, reading(responder, state_of(env), label), turn, afresh=True)
            episode.data = {**task.data, "strategy": label}
            step = await paid_step(env, task, turn)
            episode.metrics.update(step.info)
            if step.terminated:
                episode.ending = "terminated"
                return
            if step.truncated:
                break
        episode.ending = "truncated"
        label = tell(task, derive_seed(episode.seed, "told", len(episode.turns)))
        episode.unanswered = tuple(reading(responder, state_of(env), label))
        episode.final = responder.state(episode, episode.unanswered, None)

    return play


def strategist_beside(role: Role) -> Role:
    """The same strategist, reading the same weights, which do not learn, for whoever plays beside the others."""
    assert isinstance(role.sampler, Strategist), "it chooses"
    return Role(role.name, role.sampler.beside(), role.renderer, role.params)


def is_strategist(source: str) -> bool:
    """Whether it names a strategist's folder; a word that names somebody else does not, even where a folder has it."""
    return source not in SOURCES and source != "" and Path(source).is_dir()


def teller(source: str, inventory: Inventory) -> Tell:
    """Who tells: `data` (the strategy of the task's row), `random`, `none`, or always the strategy of this name.

    Raises ConfigError for any other name, with a suggestion.
    """
    labels = [inventory.label(place) for place in range(len(inventory))]
    if source == "data":
        return lambda task, seed: str(task.data["strategy"])
    if source == "random":
        return lambda task, seed: labels[int(np.random.default_rng(seed).integers(len(labels)))]
    if source == "none":
        return lambda task, seed: None
    try:
        label = labels[inventory.find(source)]
    except ParseError as error:
        known = [*SOURCES, *inventory.strategies]
        raise ConfigError(
            f"strategist = {source}: it is neither a strategist's folder nor one of {', '.join(known)}."
            f"{did_you_mean(source, known)}"
        ) from error
    return lambda task, seed: label


def open_strategist(
    path: str, model: ModelConfig, sampling: SamplingConfig, *, epsilon: float = 0.0
) -> tuple[Role, Inventory]:
    """The strategist saved in a folder or a run directory, as one who acts and does not learn, and its strategies.

    It takes what it likes best, or with probability `epsilon` any. Raises DataError for a folder that no strategist was
    saved in.
    """
    folder = model_path(path, STRATEGIST)
    reading_of_q, inventory = read_description(Path(folder))
    actor = open_actor(replace(model, path=folder), sampling, name=STRATEGIST)
    scorer = OptionScorer(actor.module.requires_grad_(False), reading_of_q).eval()
    chooser = Strategist(
        option_score(scorer),
        spelled(actor.role, inventory),
        inventory.options,
        epsilon=epsilon,
    )
    return Role(STRATEGIST, chooser, actor.role.renderer, actor.role.params), inventory


def open_states(
    data: DataConfig,
    inventory: Inventory,
    columns: TransitionConfig,
    responder: Role,
    *,
    seed: int,
    judge: Ask | None = None,
    weight: float = 1.0,
) -> EnvSpec:
    """The decisions of a data set as states to reply to, each with the strategy that was chosen there.

    The row's own reply, and what it earned, are columns (`reply`, `reward`) that rewards may read. Raises DataError for
    rows that are prompts of the upper level and no conversations, and for one that does not fit sampling's budget.
    """
    rows = load_transitions(data, inventory, columns, seed=seed)
    sides = [[_given(row, inventory) for row in side] for side in (rows.train, rows.held_out)]
    for given, row in zip([*sides[0], *sides[1]], [*rows.train, *rows.held_out], strict=True):
        try:
            reading(responder, given.state, given.strategy)
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error
    return states_env(*sides, judge=judge, weight=weight, name=", ".join(data.path))


def _given(row: Transition, inventory: Inventory) -> Given:
    if not isinstance(row.state, DialogueState):
        raise DataError(
            f"{row.where}: it has a ready prompt of the upper level, and the responder reads the conversation. Add its "
            "query and history, or train on a file that has them."
        )
    columns = {"reply": row.reply, "reward": row.reward, "id": row.id}
    return Given(row.state, inventory.label(row.strategy), columns)
