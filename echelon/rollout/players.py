"""Opens what a run learned, to be played or talked to: a policy, alone or with what picks among its candidates.

Knows folders and settings; knows nothing of what is played.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from echelon.config import ModelConfig, SamplingConfig
from echelon.rollout.candidates import has_ranker, run_settings, saved_ranker
from echelon.rollout.critics import saved_critic
from echelon.rollout.setup import Actor, open_actor
from echelon.sampling.best_of import critic_score
from echelon.sampling.candidates import Chooser, ranker_score
from echelon.types import SamplingParams


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
