"""What all engines share that draw from a copy of the weights: whether there can be one, and how much it may read.

Knows neither who holds the copy nor how weights get there.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from echelon.errors import ConfigError


def check_copyable(module: nn.Module, sampler: str) -> None:
    """Raise ConfigError for a module whose full weights one process cannot give to this kind of sampler."""
    if getattr(module, "is_quantized", False):
        raise ConfigError(
            f"sampling.sampler = {sampler}: it draws from a copy of the weights that learn, and model.quantization "
            "leaves none that could be copied. Use --sampler local."
        )


def check_alone(sampler: str) -> None:
    """Raise ConfigError on several ranks, for an engine that one process gives weights and asks."""
    if (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(
            f"sampling.sampler = {sampler}: one process gives it weights and asks it, and this run has {ranks} ranks. "
            "Use --sampler local or ray, or start it without torchrun."
        )


def within(module: nn.Module, longest: int) -> int:
    """So many tokens, or as many as the model has positions where these are fewer."""
    config: Any = module.config
    return min(longest, getattr(config.get_text_config(), "max_position_embeddings", None) or longest)
