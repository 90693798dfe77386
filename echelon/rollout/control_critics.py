"""What a state is worth to a controller: a critic that reads the numbers of an observation, or the words of a prompt.

One critic for all levels, since the return that follows a state is the same for a plan and for an action. Knows how
values are read and learned; whose a reward is, `echelon.rollout.control` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from echelon.config import OptimConfig
from echelon.data.packing import pack
from echelon.models.heads import TokenValue
from echelon.models.mlp import ValueMlp
from echelon.ops import losses
from echelon.rollout.control import Decisions, Seen
from echelon.seeds import derive_seed
from echelon.train.learner import Learner, average
from echelon.train.value import before_turns, state_values, update_value, values_of
from echelon.types import Episode

FORGET = 0.1
"""How far the scale of returns moves towards those of a step, the first time excepted."""


@dataclass(frozen=True, slots=True)
class Fitting:
    """How a critic learns in one step."""

    optim: OptimConfig
    epochs: int
    minibatches: int
    tokens_per_pass: int
    total_steps: int
    """Optimizer steps of the whole run, for a schedule."""


class Critic(Protocol):
    """Says what states are worth, and learns it."""

    learner: Learner

    def look(self, levels: Sequence[Decisions], earned: Sequence[Float[Tensor, "S"]]) -> None:
        """Take in what observations and returns are like, before the values of a step are asked for."""
        ...

    def values(self, level: Decisions) -> Float[Tensor, "S"]:
        """V of the state each decision was taken in."""
        ...

    def finals(self, played: Sequence[Episode], seen: Mapping[int, Seen]) -> Float[Tensor, "E"]:
        """V of the state each truncated episode was cut off in; 0 for those that terminated."""
        ...

    def fit(self, levels: Sequence[Decisions], returns: Sequence[Float[Tensor, "S"]], *, seed: int) -> dict[str, float]:
        """Learn these returns; what to log, under "value/"."""
        ...


class VectorCritic:
    """Reads the numbers of an observation, on their common scale; learns on the scale of what was earned (PopArt)."""

    def __init__(self, module: ValueMlp, fitting: Fitting) -> None:
        self.module, self.fitting = module, fitting
        self.learner = Learner(module, fitting.optim, total_steps=fitting.total_steps, name="value")

    def look(self, levels: Sequence[Decisions], earned: Sequence[Float[Tensor, "S"]]) -> None:
        """Count the observations in, and move the scale of values; the first returns set it."""
        forget = FORGET if self.module.norm.count else 1.0
        self.module.norm.see(torch.cat([level.observations_SO for level in levels]))
        self.module.rescale_(torch.cat(list(earned)), forget=forget)

    @torch.no_grad()
    def values(self, level: Decisions) -> Float[Tensor, "S"]:
        """V of the state each decision was taken in."""
        return self.module.values(level.observations_SO)

    @torch.no_grad()
    def finals(self, played: Sequence[Episode], seen: Mapping[int, Seen]) -> Float[Tensor, "E"]:
        """V of the state each truncated episode was cut off in; 0 for those that terminated."""
        last_EO = torch.from_numpy(np.stack([seen[episode.seed].observations[-1] for episode in played]))
        cut_off_E = torch.tensor([episode.ending == "truncated" for episode in played])
        return torch.where(cut_off_E, self.module.values(last_EO), 0.0)

    def fit(self, levels: Sequence[Decisions], returns: Sequence[Float[Tensor, "S"]], *, seed: int) -> dict[str, float]:
        """Half the mean squared error, in random mini-batches."""
        observations_SO, returns_S = torch.cat([level.observations_SO for level in levels]), torch.cat(list(returns))
        with torch.no_grad():
            expected = self.module.values(observations_SO).mean().item()
        how = {"epochs": self.fitting.epochs, "minibatches": self.fitting.minibatches, "seed": seed}
        logged = fit_numbers(self.learner, observations_SO, returns_S, **how)
        return {"value/mean": expected, "value/return": returns_S.mean().item(), **logged}


def fit_numbers(
    value: Learner,
    observations_SO: Float[Tensor, "S O"],
    returns_S: Float[Tensor, "S"],
    *,
    epochs: int,
    minibatches: int,
    seed: int,
) -> dict[str, float]:
    """Move the values of a `ValueMlp` towards returns, in random mini-batches; what to log, under "value/"."""
    logged = []
    for epoch in range(epochs):
        draw = torch.Generator().manual_seed(derive_seed(seed, "value", epoch))
        for rows in torch.randperm(len(returns_S), generator=draw).chunk(minibatches):
            logged.append(value.update([_Rows(observations_SO[rows], returns_S[rows])], _squared_error))
    return {f"value/{name}": number for name, number in average(logged).items()}


@dataclass(frozen=True, slots=True)
class _Rows:
    """Observations and the returns that followed."""

    observations_SO: Float[Tensor, "S O"]
    returns_S: Float[Tensor, "S"]

    def to(self, device: torch.device | str) -> _Rows:
        return _Rows(self.observations_SO.to(device), self.returns_S.to(device))


def _squared_error(module: nn.Module, rows: Any) -> tuple[Tensor, dict[str, float]]:
    """Half the mean of it, in units of the deviation of returns."""
    assert isinstance(module, ValueMlp)
    errors_S = losses.squared_error(module(rows.observations_SO), module.compared(rows.returns_S))
    return 0.5 * errors_S.mean(), {}


class TextCritic:
    """Reads the words of a prompt: a value model of tokens, asked before the first token of an answer."""

    def __init__(self, module: TokenValue, fitting: Fitting) -> None:
        self.module, self.fitting = module, fitting
        self.learner = Learner(module, fitting.optim, total_steps=fitting.total_steps, name="value")

    def look(self, levels: Sequence[Decisions], earned: Sequence[Float[Tensor, "S"]]) -> None:
        """A head that says nothing yet begins at the mean return."""
        if not self.module.head.weight.any():
            self.module.start_at(float(torch.cat(list(earned)).mean()))

    def values(self, level: Decisions) -> Float[Tensor, "S"]:
        """V of the state each decision was taken in."""
        batch = pack(level.turns)
        return before_turns(batch, values_of(self.learner, batch, self.fitting.tokens_per_pass))

    def finals(self, played: Sequence[Episode], seen: Mapping[int, Seen]) -> Float[Tensor, "E"]:
        """V of the prompt that was left unanswered where an episode was truncated; 0 for the others."""
        states = [episode.final if episode.ending == "truncated" else None for episode in played]
        return state_values(self.learner, states, self.fitting.tokens_per_pass)

    def fit(self, levels: Sequence[Decisions], returns: Sequence[Float[Tensor, "S"]], *, seed: int) -> dict[str, float]:
        """Half the mean squared error where values are read."""
        batch = pack([turn for level in levels for turn in level.turns])
        read_BT = torch.zeros_like(batch.mask)
        read_BT[batch.row_N, batch.first_N] = True
        batch.returns = batch.spread(torch.cat(list(returns)))
        batch.values = torch.zeros_like(batch.returns)  # no value is bounded by its old one
        return update_value(
            self.learner,
            batch,
            read_BT=read_BT,
            epochs=self.fitting.epochs,
            minibatches=self.fitting.minibatches,
            clip=None,
            tokens_per_pass=self.fitting.tokens_per_pass,
            seed=seed,
        )
