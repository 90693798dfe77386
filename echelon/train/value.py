"""How a value model of tokens learns: towards returns, where it is read, and what it says of states.

Knows neither episodes nor where returns come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from echelon.data.packing import Batch, group_rows, pad
from echelon.models.heads import token_values, values_before
from echelon.ops import credit, losses
from echelon.seeds import derive_seed
from echelon.train.learner import Learner, average
from echelon.train.policy import passes


def update_value(
    value: Learner,
    batch: Batch,
    *,
    read_BT: Bool[Tensor, "B T"],
    epochs: int,
    minibatches: int,
    clip: float | None,
    tokens_per_pass: int,
    seed: int,
) -> dict[str, float]:
    """Fit the value model to `batch.returns` where it is read: before the tokens of `read_BT`."""
    tokens = float(read_BT.sum())
    logged = passes(
        value,
        replace(batch, mask=read_BT, denom=tokens, counted=tokens),
        partial(value_loss, clip=clip),
        epochs=epochs,
        minibatches=minibatches,
        tokens_per_pass=tokens_per_pass,
        seed=derive_seed(seed, "value"),
    )
    return {f"value/{name}": number for name, number in average(logged).items()}


def value_loss(module: nn.Module, batch: Batch, *, clip: float | None) -> tuple[Tensor, dict[str, float]]:
    """Half the mean squared error where the mask is; with `clip`, of the worse of the value and the clipped value."""
    values = values_before(module, batch)
    old = losses.require(batch.values, "values", "Judge the batch first.")
    returns = losses.require(batch.returns, "returns", "Judge the batch first.")
    stats, free = {"mean": values.detach(), "return": returns}, 0.5 * losses.squared_error(values, returns, batch.mask)
    if clip is None:
        loss = free
    else:
        loss = losses.clipped_value(values, old, returns, batch.mask, clip=clip)
        stats["clipped"] = (loss > free).float()
    return losses.token_sum(loss, batch.mask, batch.denom), losses.reduce_stats(stats, batch.mask, batch.denom)


def values_of(value: Learner, batch: Batch, tokens_per_pass: int) -> Float[Tensor, "B T"]:
    """V of the state before every token of the batch, on the CPU."""
    return value.evaluate(batch, lambda module, micro: token_values(module, micro)[0], tokens_per_pass)


def gae_of_chains(
    batch: Batch,
    chain_N: Int[Tensor, "N"],
    rewards_BT: Float[Tensor, "B T"],
    values_BT: Float[Tensor, "B T"],
    *,
    gamma: float,
    lam: float,
    after_C: Float[Tensor, "C"],
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """GAE over the tokens of each chain of turns, in whichever rows they lie: (advantages, returns), 0 elsewhere.

    `chain_N`, which never decreases, says which chain each turn belongs to: with a chain for every turn nothing leaks
    from one to the next, though they may share a row. What follows the last token of a chain is worth `after_C`.
    """
    order = batch.turn[batch.mask].argsort(stable=True)
    row_K, column_K = (index[order] for index in batch.mask.nonzero(as_tuple=True))
    chain_K = chain_N[batch.turn[row_K, column_K]]
    tokens_C = chain_K.bincount(minlength=len(after_C))
    place_K = torch.arange(len(chain_K)) - (tokens_C.cumsum(0) - tokens_C)[chain_K]
    sampled_CL = torch.arange(int(tokens_C.max())) < tokens_C[:, None]

    def chained(x_BT: Float[Tensor, "B T"]) -> Float[Tensor, "C L"]:
        return torch.zeros(sampled_CL.shape).index_put((chain_K, place_K), x_BT[row_K, column_K])

    def in_rows(x_CL: Float[Tensor, "C L"]) -> Float[Tensor, "B T"]:
        return torch.zeros_like(rewards_BT).index_put((row_K, column_K), x_CL[chain_K, place_K])

    found = credit.token_gae(
        chained(rewards_BT), chained(values_BT), sampled_CL, gamma=gamma, lam=lam, bootstrap_B=after_C
    )
    return in_rows(found[0]), in_rows(found[1])


def before_turns(batch: Batch, values_BT: Float[Tensor, "B T"]) -> Float[Tensor, "N"]:
    """V of the state each turn answered: the value before its first token."""
    return values_BT[batch.row_N, batch.state_N + 1]


@torch.no_grad()
def state_values(value: Learner, states: Sequence[Sequence[int] | None], tokens_per_pass: int) -> Float[Tensor, "E"]:
    """V after the last token of each state, on the CPU; 0 where there is none, since nothing follows."""
    values_E = torch.zeros(len(states))
    asked = [(number, state) for number, state in enumerate(states) if state is not None]
    assert all(len(state) for _, state in asked), "a state that is to be valued has tokens"
    for group in group_rows([len(state) for _, state in asked], tokens_per_pass):
        tokens, lengths = pad([asked[place][1] for place in group])
        values = value.module(tokens.to(value.device)).cpu()
        values_E[[asked[place][0] for place in group]] = values[torch.arange(len(group)), lengths - 1]
    return values_E
