"""A stand-in for pretraining: a new model learns to repeat random tokens, so that it can look back at what was said.

Knows nothing of language, or of what the model is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from echelon.config import OptimConfig
from echelon.data.packing import Batch, copies, pack
from echelon.models.lm import token_logprobs
from echelon.ops import losses
from echelon.seeds import derive_seed
from echelon.train.learner import Learner


def learn_to_copy(
    module: nn.Module,
    tokenizer: Any,
    *,
    steps: int,
    seed: int,
    watch: Callable[[range], Iterable[int]] = iter,
) -> None:
    """Teach the model to repeat random tokens (`copies`). `watch` may show how far it is."""
    optim = OptimConfig(lr=5e-3, betas=(0.9, 0.98), warmup_steps=min(30, steps), schedule="linear")
    learner = Learner(module, optim, total_steps=max(1, steps), name="tiny", tokenizer=tokenizer)
    for step in watch(range(steps)):
        rows = copies(64, vocabulary=len(tokenizer), seed=derive_seed(seed, "copies", step))
        learner.update([pack(rows)], copying_loss)


def copying_loss(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Negative log-likelihood of what is said again."""
    return losses.token_sum(losses.nll(token_logprobs(module, batch)), batch.mask, batch.denom), {}
