"""What all engines share that draw from a copy of the weights: whether there can be one, of all of them or of an
adapter alone, and how much it may read.

Knows neither who holds the copy nor how weights get there.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from echelon.errors import ConfigError
from echelon.models import lora


def rank_count() -> int:
    """How many ranks this run has, whether or not they have found each other yet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_copyable(module: nn.Module, sampler: str) -> None:
    """Raise ConfigError for a module whose weights cannot be copied for this kind of sampler."""
    if getattr(module, "is_quantized", False):
        raise ConfigError(
            f"sampling.sampler = {sampler}: it draws from a copy of the weights that learn, and model.quantization "
            "leaves none that could be copied. Use --sampler local."
        )


def check_alone(sampler: str) -> None:
    """Raise ConfigError on several ranks, for an engine that one process gives weights and asks."""
    if (ranks := rank_count()) > 1:
        raise ConfigError(
            f"sampling.sampler = {sampler}: one process gives it weights and asks it, and this run has {ranks} ranks. "
            "Use --sampler local, vllm or ray, or start it without torchrun."
        )


def check_adapter(module: nn.Module) -> None:
    """Raise ConfigError for a module of which vLLM cannot be given the adapter apart from the base."""
    if not lora.has_adapters(module):
        raise ConfigError(
            f"sampling.adapters = apart: {type(module).__name__} has no adapter, so its weights are all there is. Give "
            "lora.rank, or leave it out."
        )
    known: Any = module
    full = [name for own in known.peft_config.values() for name in own.modules_to_save or ()]
    if full:
        raise ConfigError(
            f"sampling.adapters = apart: lora.modules_to_save = {', '.join(sorted(full))} trains layers in full, which "
            "are no adapter to vLLM. Leave one of the two out."
        )


def within(module: nn.Module, longest: int) -> int:
    """So many tokens, or as many as the model has positions where these are fewer."""
    config: Any = module.config
    return min(longest, getattr(config.get_text_config(), "max_position_embeddings", None) or longest)
