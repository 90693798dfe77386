"""The simple path, for models whose attention cannot be replaced: every conversation alone, with the model's own cache.

Correct for any causal language model, and slow: nothing is batched, shared, or kept between turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from echelon.sampling.cache import Cache, Resident
from echelon.sampling.ragged import Piece


class OneByOne:
    """The next tokens of each conversation in a pass of its own; the same interface as `Ragged`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._weight = next(module.parameters())

    def __call__(self, pieces: Sequence[Piece], wanted: Sequence[int]) -> Tensor:
        """Float32 logits (wanted x vocabulary) after the last token of each of the wanted pieces."""
        logits = torch.cat([self._read(piece) for piece in pieces])
        return logits[list(wanted)]

    def _read(self, piece: Piece) -> Tensor:
        resident = piece.resident
        resident.read += piece.tokens
        resident.known = len(resident.read)
        ids = piece.tokens if resident.own_cache is not None else resident.read  # not every model has a cache
        tokens = torch.tensor([list(ids)], device=self._weight.device)
        output = self.module(input_ids=tokens, past_key_values=resident.own_cache, use_cache=True)
        resident.own_cache = getattr(output, "past_key_values", None)
        logits: Tensor = output.logits[:, -1].float()
        return logits


class Unshared(Cache):
    """Conversations that are forgotten as soon as they rest, and never found."""

    def __init__(self) -> None:
        super().__init__(budget=1)

    def find(self, ids: list[int]) -> tuple[Resident | None, int]:
        """Nothing is ever known already."""
        return None, 0

    def rest(self, resident: Resident) -> None:
        """Forgotten at once."""
        self.drop(resident)
