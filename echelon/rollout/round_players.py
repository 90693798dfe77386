"""Opens who solves and who says something about it, from a run of feedback or from any models, to be evaluated.

Knows folders and the settings of runs; what is played, and what comes of it, is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from echelon.config import LoraConfig, ModelConfig, SamplingConfig
from echelon.errors import CheckpointError, ConfigError
from echelon.rollout.candidates import run_settings
from echelon.rollout.feedback import COACH, SOLVER, TemplateConfig
from echelon.rollout.feedback_levels import LevelConfig, Sharing, open_actors
from echelon.rollout.levels import level_path
from echelon.rollout.players import speaker
from echelon.rollout.roles import Role
from echelon.rollout.rounds import RoundPlayers
from echelon.rollout.setup import Actor, model_path
from echelon.train.checkpoint import Label
from echelon.types import SamplingParams

UNTRAINED = {"max_tokens": 512, "max_prompt_tokens": 2048}
"""Lengths where no run says them: a solution is longer than an utterance."""


def solver_path(path: str, label: Label = "auto") -> str:
    """The folder or hub id of who solves: of a run of feedback its solver, else the model that writes.

    Raises CheckpointError for a run in which nobody writes.
    """
    try:
        return model_path(path, SOLVER, label)
    except CheckpointError:
        return speaker(path, label)


def run_of(folder: str) -> dict[str, Any]:
    """The settings of the run of feedback whose solver lies in a folder; none for any other model."""
    checkpoint = Path(folder).parent
    if Path(folder).name != SOLVER or not (checkpoint / "manifest.json").is_file():
        return {}
    return dict(run_settings(checkpoint))


def open_round_players(
    folder: str,
    *,
    model: ModelConfig,
    params: SamplingParams,
    coach: str = "",
    context: str = "",
    max_prompt_tokens: int = 0,
) -> RoundPlayers:
    """The solver in a folder (`solver_path`) and the coach beside it, with the templates and the context of their run.

    `coach` is another one, a run, a folder or a hub id; where neither names any, the solver's model is the coach, too.
    `context` replaces that of the run. `params` say how both speak; `max_tokens` of 0, no `stop`, and
    `max_prompt_tokens` of 0 are what they were in training. Raises ConfigError and CheckpointError.
    """
    run = run_of(folder)
    context = context or run.get("context") or "coach"
    coached = context in ("coach", "stranger", "example")
    if coach and not coached:
        raise ConfigError(f"coach = {coach}: nobody speaks where context = {context}. Leave it out, or give a context.")
    beside = Path(folder).parent / COACH
    paths, shared = {SOLVER: folder}, False
    if coached:
        paths[COACH] = (
            level_path(coach, COACH, "actor") if coach else str(beside) if run and beside.is_dir() else folder
        )
        shared = paths[COACH] == folder
    sampling = {name: sampling_of(run, name, params, max_prompt_tokens) for name in paths}
    levels = {name: LevelConfig(replace(model, path=path), sampling[name]) for name, path in paths.items()}
    if shared:
        levels[COACH] = replace(levels[COACH], model=replace(model, path=""))
    views = run.get("weights") == "adapters" and coached and not coach
    weights: Sharing = "shared" if shared else "adapters" if views else "separate"
    actors = open_actors(levels, weights=weights, lora=LoraConfig(), seed=0)
    return RoundPlayers(
        speaking(actors[SOLVER], SOLVER, params, sampling[SOLVER]),
        speaking(actors[COACH], COACH, params, sampling[COACH]) if coached else None,
        templates=TemplateConfig(**run.get("templates", {})),
        context=context,  # type: ignore[arg-type]
        fixed=str(run.get("fixed") or "There may be a mistake in it."),
        modules={name: actor.module for name, actor in actors.items() if name == SOLVER or not shared},
    )


def sampling_of(run: Mapping[str, Any], name: str, params: SamplingParams, max_prompt_tokens: int) -> SamplingConfig:
    """How long the prompts and answers of a level may be, and what ends them: as asked for, or else as in training."""
    trained: Mapping[str, Any] = (run.get(name) or {}).get("sampling") or UNTRAINED
    return SamplingConfig(
        max_tokens=params.max_tokens or int(trained["max_tokens"]),
        max_prompt_tokens=max_prompt_tokens or int(trained["max_prompt_tokens"]),
        stop=params.stop or tuple(trained.get("stop") or ()),
    )


def speaking(actor: Actor, name: str, params: SamplingParams, sampling: SamplingConfig) -> Role:
    """A level that speaks as `params` say, and as long as it may."""
    own = replace(params, max_tokens=sampling.max_tokens, stop=sampling.stop)
    return Role(name, actor.sampler, actor.role.renderer, own)
