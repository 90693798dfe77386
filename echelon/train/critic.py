"""How a critic of whole utterances learns: what its twins are pulled towards, and what it says of a batch.

Knows no replay and no environment, and not where fresh actions come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from echelon.data.packing import Batch, CriticBatch, Said, pack_branches, pack_transitions
from echelon.data.replay import Transition
from echelon.models.heads import Places, Spans, UtteranceCritic, values_before
from echelon.models.lm import attention_inputs
from echelon.ops import bellman, losses


def asked_states(turns: int, count: int, seed: int) -> list[int]:
    """At which of an episode's states V is learned from a fresh action, in order: at `count` of them, 0 for all."""
    if not count or count >= turns:
        return list(range(turns))
    return sorted(np.random.default_rng(seed).choice(turns, count, replace=False).tolist())


def with_targets(
    target: UtteranceCritic,
    episodes: Sequence[Sequence[Transition]],
    fresh: Sequence[Mapping[int, Said]] | None,
    *,
    gamma: float,
    tokens_per_pass: int,
) -> CriticBatch:
    """Rows of transitions, with what Q shall be at all of them, and V where a fresh action is given.

    `fresh` has for each episode what would be said now, by the number of the turn. None pulls V everywhere towards Q̄
    of the action that was said then.
    """
    batch = pack_transitions([transition for episode in episodes for transition in episode])
    batch = batch.to(next(target.parameters()).device)
    q_2N = bootstrap_(batch, target, gamma=gamma)
    if fresh is None:
        batch.v_target = q_2N
        return batch
    begin_E = np.cumsum([0, *map(len, episodes)])[:-1].tolist()
    answers = {begin + turn: said for begin, asked in zip(begin_E, fresh, strict=True) for turn, said in asked.items()}
    batch.v_target = torch.full_like(q_2N, math.nan)
    batch.v_denom = float(len(answers))
    q_fresh_2N, _ = judge(target, pack_branches(list(answers.values())), tokens_per_pass)
    batch.v_target[:, list(answers)] = q_fresh_2N.to(batch.v_target)
    return batch


@torch.no_grad()
def bootstrap_(batch: CriticBatch, target: UtteranceCritic, *, gamma: float) -> Float[Tensor, "2 N"]:
    """Set what Q is pulled towards, r + γⁿ·V̄(s'), each twin with its own V̄; returns Q̄ of the actions in the batch."""
    ahead = Places(batch.next_row_N, batch.next_N)
    q_2N, next_v_2N = target(batch.tokens, said_in(batch), ahead, batch.lengths)
    gamma_N = gamma**batch.steps_N
    batch.q_target = bellman.td_target(batch.reward_N, next_v_2N, gamma=gamma_N, terminated=batch.terminated_N)
    found: Tensor = q_2N
    return found


def critic_loss(module: nn.Module, batch: CriticBatch, *, expectile: float = 0.5) -> tuple[Tensor, dict[str, float]]:
    """Mean squared error of both Q and both V, each against its own target; V counts where it has one.

    Errors are those on the critic's scale. Those of V that would raise it weigh 2·expectile, the others
    2·(1 − expectile): at ½, V is a mean; towards 1, the best of what its targets are of (implicit Q-learning).
    """
    q_target = losses.require(batch.q_target, "q_target", "Call with_targets first.")
    v_target = losses.require(batch.v_target, "v_target", "Call with_targets first.")
    q_2N, v_2N = module(batch.tokens, said_in(batch), Places(batch.row_N, batch.state_N), batch.lengths)
    assert isinstance(module, UtteranceCritic)
    compared = module.scale.compared
    q_loss = losses.squared_error(compared(q_2N), compared(q_target)).sum() / batch.denom
    asked = ~v_target.isnan()
    error = torch.where(asked, compared(v_target.nan_to_num()) - compared(v_2N), 0.0)
    v_loss = 2 * losses.expectile(error, expectile).sum() / batch.v_denom
    means = {"q_mean": q_2N.mean(0).sum() / batch.denom, "q_target": q_target.mean(0).sum() / batch.denom}
    stats = {"q_loss": q_loss, "v_loss": v_loss, "v_mean": v_2N.mean(0).sum() / batch.denom, **means}
    return q_loss + v_loss, {name: value.item() for name, value in stats.items()}


def said_in(batch: CriticBatch) -> Spans:
    """Where the actions of a batch of transitions lie."""
    return Spans(batch.row_N, batch.state_N, batch.state_N + 1, batch.action_N)


@torch.no_grad()
def judge(critic: UtteranceCritic, batch: Batch, tokens_per_pass: int) -> tuple[Tensor, Tensor]:
    """Twin Q of every packed action and twin V of the state it answered, (2, N) each, on the CPU."""
    q_2N, v_2N = torch.zeros(2, batch.turns), torch.zeros(2, batch.turns)
    for micro in batch.split(tokens_per_pass):
        micro = micro.to(next(critic.parameters()).device)
        said = Spans(micro.row_N, micro.state_N, micro.first_N, micro.last_N)
        seen = Places(micro.row_N, micro.state_N)
        q, v = critic(micro.tokens, said, seen, micro.lengths, **attention_inputs(critic, micro))
        index_N = micro.index_N.cpu()
        q_2N[:, index_N], v_2N[:, index_N] = q.cpu(), v.cpu()
    return q_2N, v_2N


def baseline_loss(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Mean over tokens of (V_η(s, what was said before the token) − A)², A the whole utterance's advantage."""
    goal = losses.require(batch.returns, "returns", "Set batch.returns before the update.")
    error = losses.squared_error(values_before(module, batch), goal, batch.mask)
    return losses.token_sum(error, batch.mask, batch.denom), {}
