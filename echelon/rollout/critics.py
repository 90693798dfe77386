"""Critics of whole utterances beside an actor: a new one for a run, and the one that a run saved.

Knows which kinds there are and where they come from; how they learn is for `train.critic`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open

from echelon.config import LoraConfig, ModelConfig, SamplingConfig
from echelon.errors import CheckpointError, DataError
from echelon.models.encoder import TextEncoder
from echelon.models.heads import UtteranceCritic, critic_like
from echelon.models.lm import load_tokenizer
from echelon.ops.scales import LINEAR, Scale
from echelon.rollout.setup import Actor, model_path, open_actor
from echelon.seeds import derive_seed
from echelon.train.learner import load_module

Body = Literal["own", "actor", "encoder"]


def new_critic(
    actor: Actor,
    model: ModelConfig,
    sampling: SamplingConfig,
    *,
    body: Body = "own",
    path: str = "",
    lora: LoraConfig = LoraConfig(),
    scale: Scale = LINEAR,
    seed: int,
) -> UtteranceCritic:
    """A critic whose heads are drawn from the seed, its body a copy of the actor's or of the model at `path`, the
    actor's own, or the encoder at `path`. `model` says how what is loaded is held.

    Raises DataError for a decoder that reads other tokens than the actor's, and for what cannot be loaded.
    """
    base = actor.module
    if body == "encoder":
        trust = model.trust_remote_code
        encoder = TextEncoder.load(path, actor.tokenizer, dtype=model.dtype, trust_remote_code=trust)
        encoder.to(next(base.parameters()).device)
    elif path:
        if load_tokenizer(model_path(path)).get_vocab() != actor.tokenizer.get_vocab():
            raise DataError(
                f"critic_path = {path}: its tokenizer is not the actor's, so it would misread the actor's "
                "tokens. Use a model with the same tokenizer, or leave critic_path empty."
            )
        base = open_actor(replace(model, path=path), sampling, lora=lora).module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "critic"))
        if body == "encoder":
            return UtteranceCritic.from_encoder(encoder, scale=scale)
        return UtteranceCritic.from_lm(base, shared_body=body == "actor", scale=scale)


def saved_critic(folder: Path, actor: Actor) -> UtteranceCritic:
    """The critic that was learned beside the actor. Raises CheckpointError when there is none."""
    file = folder / "model.safetensors"
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: there is no critic, so nobody can pick among candidates. Name a run of archer, or leave "
            "candidates at 1."
        )
    if (folder / "critic.json").is_file():
        critic = critic_like(folder, actor.module, actor.tokenizer)
    else:  # an older one, which says nothing of itself
        with safe_open(file, framework="pt") as saved:
            shared = not any(name.startswith("body.") for name in saved.keys())  # noqa: SIM118 (not a mapping)
        critic = UtteranceCritic.from_lm(actor.module, shared_body=shared)
    load_module(critic, folder)
    return critic
