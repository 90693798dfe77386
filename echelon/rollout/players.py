"""Finds and opens what a run learned, to be played or talked to: who writes, alone or with what picks for it.

Knows folders and settings; knows nothing of what is played.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from echelon.config import ModelConfig, SamplingConfig
from echelon.envs import EnvSpec, load_env
from echelon.envs.registry import BUILT_IN
from echelon.errors import CheckpointError, DataError
from echelon.rollout.candidates import has_ranker, run_settings, saved_ranker
from echelon.rollout.critics import saved_critic
from echelon.rollout.dialogue import RESPONDER, STRATEGIST
from echelon.rollout.levels import has_levels
from echelon.rollout.setup import Actor, model_path, open_actor
from echelon.sampling.candidates import Chooser, critic_score, ranker_score
from echelon.train.checkpoint import Label
from echelon.types import SamplingParams


def speaker(path: str, label: Label) -> str:
    """The folder or hub id of the model that writes, of a run the one that the label says: its responder or its policy.

    Raises CheckpointError and DataError for a run in which nobody writes.
    """
    refusal = None
    for part in (RESPONDER, "actor"):
        try:
            return model_path(path, part, label)
        except CheckpointError as error:
            refusal = error
    with contextlib.suppress(CheckpointError):
        model_path(path, STRATEGIST, label)
        raise DataError(
            f"{path}: a strategist chooses how to reply and writes nothing. Name a model that writes, and give "
            f"--strategist {path}."
        )
    assert refusal is not None, "both parts were refused"
    raise refusal


def env_of_run(checkpoint: Path) -> EnvSpec | None:
    """The environment of a run of dialogues, which names the strategies where the settings do not; None unless it comes
    with echelon."""
    if not has_levels(checkpoint):
        return None
    settings = run_settings(checkpoint)
    name = settings.get("env") or ""
    return load_env(name, settings.get("env_settings") or {}) if name in BUILT_IN else None


def open_policy(
    folder: str, model: ModelConfig, sampling: SamplingConfig, params: SamplingParams, *, candidates: int = 0
) -> Actor:
    """The policy in a model folder, or of a hub id; `params` say how it speaks.

    Where it lies in a checkpoint beside a ranker or a critic, that one picks among so many `candidates`; 0 takes as
    many as a ranker was trained with and 1 elsewhere, and 1 lets the policy say what it draws. Raises CheckpointError
    where candidates are asked for and nobody can pick.
    """
    model = replace(model, path=folder)
    actor = open_actor(model, sampling, params=params)
    checkpoint = Path(folder).parent
    ranked = has_ranker(checkpoint)
    if (count := candidates or (int(run_settings(checkpoint)["candidates"]) if ranked else 1)) > 1:
        if ranked:
            score = ranker_score(saved_ranker(checkpoint, actor, model))
        else:
            score = critic_score(saved_critic(checkpoint / "critic", actor))
        actor.role.sampler = Chooser(actor.sampler, score, count)
    return actor
