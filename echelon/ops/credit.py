"""Who deserves what: rewards in, advantages out. Tensors only; no models, no episodes.

Two ways to get a baseline: a critic's values (the functions with `gae` in their name) or comparison with siblings
(those with `baseline`). Nothing here decides what a reward is, or which tokens a turn's advantage is spread over.
docs/credit.md compares them.
"""

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def discounted_returns(
    rewards: Float[Tensor, "*chains T"], *, gamma: float, bootstrap: float | Float[Tensor, "*chains"] = 0.0
) -> Float[Tensor, "*chains T"]:
    """What followed from each step of a chain: rewards[t] + γ·rewards[t+1] + …, and γ^(T−t)·bootstrap at the end."""
    return _suffix_sums(_add_to_last(rewards, bootstrap, gamma), gamma)


def gae(
    rewards: Float[Tensor, "*chains T"],
    values: Float[Tensor, "*chains T"],
    *,
    gamma: float,
    lam: float,
    bootstrap: float | Float[Tensor, "*chains"] = 0.0,
) -> tuple[Float[Tensor, "*chains T"], Float[Tensor, "*chains T"]]:
    """Generalized advantage estimation over the last dimension: (advantages, returns = advantages + values).

    `bootstrap` is the value of the state after the last step: 0 if the chain terminated there, the critic's estimate if
    it was cut off. https://arxiv.org/abs/1506.02438
    """
    next_values = _add_to_last(torch.nn.functional.pad(values[..., 1:], (0, 1)), bootstrap, 1.0)
    advantages = _suffix_sums(rewards + gamma * next_values - values, gamma * lam)
    return advantages, advantages + values


def token_gae(
    rewards_BT: Float[Tensor, "B T"],
    values_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    *,
    gamma: float,
    lam: float,
    bootstrap_B: Float[Tensor, "B"],
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """GAE over the sampled tokens of each row, as if the context between them were not there: (advantages, returns).

    Rows interleave spans the policy sampled (`mask_BT` true) with prompts, observations and padding. What follows a
    sampled token is the next *sampled* token of its row, however long the gap: γ and λ count sampled tokens only. The
    last one is followed by `bootstrap_B`, 0 if the episode terminated. `values_BT[b, t]` is the value of the state
    before token t, predicted without having seen it. Rewards and values in the gaps are not read; advantages and
    returns there are 0.
    """
    order = torch.argsort((~mask_BT).to(torch.uint8), dim=1, stable=True)  # each row's sampled tokens, then the rest
    sampled = mask_BT.gather(1, order)
    rewards = rewards_BT.gather(1, order)
    values = torch.where(sampled, values_BT.gather(1, order), 0.0)

    last = sampled & ~torch.nn.functional.pad(sampled[:, 1:], (0, 1))
    next_values = torch.where(last, bootstrap_B[:, None], torch.nn.functional.pad(values[:, 1:], (0, 1)))
    deltas = torch.where(sampled, rewards + gamma * next_values - values, 0.0)
    advantages = _suffix_sums(deltas, gamma * lam)
    zeros = torch.zeros_like(advantages)
    return zeros.scatter(1, order, advantages), zeros.scatter(1, order, advantages + values)


def turn_gae(
    rewards_N: Float[Tensor, "N"],
    values_N: Float[Tensor, "N"],
    episode_N: Int[Tensor, "N"],
    bootstrap_N: Float[Tensor, "N"],
    *,
    gamma: float,
    lam: float,
    steps_N: Int[Tensor, "N"] | None = None,
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """GAE in which one step is one turn, over many episodes at once: (advantages, returns).

    The turns of an episode stand next to each other, in order, under the same number in `episode_N`. `bootstrap_N` is
    read at the last turn of each episode only: the value of the final state if it was truncated, 0 if it terminated.

    Turns may last: `steps_N` says how many steps each took (1 unless told, 0 for one that time did not count), and γ
    is per step while λ stays per turn, δ_k = r_k + γ^n_k V_{k+1} − V_k and A_k = δ_k + γ^n_k λ A_{k+1}: a semi-Markov
    decision process (Sutton, Precup and Singh, Artificial Intelligence 112, 1999), r_k being what `span_rewards` says.
    """
    discount_N = torch.full_like(values_N, gamma) if steps_N is None else torch.full_like(values_N, gamma) ** steps_N
    row_N, column_N = _layout(episode_N)
    last_N = torch.ones_like(episode_N, dtype=torch.bool)
    last_N[:-1] = episode_N[1:] != episode_N[:-1]
    next_values_N = torch.where(last_N, bootstrap_N, torch.cat([values_N[1:], values_N.new_zeros(values_N[:1].shape)]))
    deltas_N = rewards_N + discount_N * next_values_N - values_N
    decays = _table(discount_N * lam, row_N, column_N)
    advantages_N = _suffix_sums(_table(deltas_N, row_N, column_N), decays)[row_N, column_N]
    return advantages_N, advantages_N + values_N


def span_rewards(
    rewards_N: Float[Tensor, "N"], span_N: Int[Tensor, "N"], steps_N: Int[Tensor, "N"], *, gamma: float
) -> tuple[Float[Tensor, "S"], Int[Tensor, "S"]]:
    """What each span of steps earned, discounted to its beginning, Σ_i γ^i r_i, and how many steps it took.

    The parts of a span stand next to each other under the same number in `span_N`, which counts from 0. `steps_N` says
    how many steps each part took: 1, or 0 for one that time did not count.
    """
    spans = int(span_N[-1]) + 1 if len(span_N) else 0
    lasted_S = steps_N.new_zeros(spans).index_add(0, span_N, steps_N)
    before_N = steps_N.cumsum(0) - steps_N  # steps of all that came earlier
    begun_S = lasted_S.cumsum(0) - lasted_S
    earned_N = rewards_N * torch.full_like(rewards_N, gamma) ** (before_N - begun_S[span_N])
    return rewards_N.new_zeros(spans).index_add(0, span_N, earned_N), lasted_S


def turn_returns(rewards_N: Float[Tensor, "N"], episode_N: Int[Tensor, "N"], *, gamma: float) -> Float[Tensor, "N"]:
    """Discounted return-to-go of every turn of many episodes, laid out as in `turn_gae`."""
    row_N, column_N = _layout(episode_N)
    return _suffix_sums(_table(rewards_N, row_N, column_N), gamma)[row_N, column_N]


def group_baseline(
    rewards_N: Float[Tensor, "N"],
    keys: Sequence[Hashable],
    *,
    scale: Literal["none", "std", "batch_std"] = "none",
    leave_one_out: bool = False,
    eps: float = 1e-6,
) -> Float[Tensor, "N"]:
    """Reward minus the mean of its comparison group. Choosing the key chooses the algorithm.

    Items with equal keys form a group. The task as key is GRPO (`scale="std"`, unbiased, plus `eps`), Dr. GRPO
    (`scale="none"`) or Lite PPO (`scale="batch_std"`, the deviation of all rewards); with `leave_one_out` the mean is
    that of the *other* members, RLOO; one key for everything compares with the whole batch; the parent turn as key
    compares answers to the same state. A group of one has nothing to compare with: it is its own mean, and gets 0.

    Three traps, computed exactly in tests/ops/test_exact_gradient.py. The plain mean contains the item itself, so the
    expected gradient is (G−1)/G of the true one. Subtracting the mean reward of a turn *index*, then summing to go, is
    biased when the policy decides when an episode ends: it never learns that going on is worth something. And where
    groups form by coincidence (siblings that happened to get that far), each turn is weighted by the chance of company.

    GRPO https://arxiv.org/abs/2402.03300, Dr. GRPO https://arxiv.org/abs/2503.20783, RLOO https://arxiv.org/abs/2402.14740,
    Lite PPO https://arxiv.org/abs/2508.08221
    """
    group_N, groups = _groups(rewards_N, keys)
    rewards = rewards_N.double()  # equal rewards must leave exactly nothing for the division by eps to enlarge
    count = _group_sums(torch.ones_like(rewards), group_N, groups)
    advantages = rewards - (_group_sums(rewards, group_N, groups) / count)[group_N]
    others = (count - 1).clamp(min=1)
    spread = (_group_sums(advantages.square(), group_N, groups) / others).sqrt()
    if leave_one_out:
        advantages = advantages * (count / others)[group_N]
    if scale == "std":
        advantages = advantages / (spread[group_N] + eps)
    elif scale == "batch_std" and len(rewards) > 1:
        advantages = advantages / (rewards.std() + eps)
    return advantages.to(rewards_N.dtype)


def same_turn_baseline(
    returns_N: Float[Tensor, "N"],
    episode_N: Int[Tensor, "N"],
    keys_E: Sequence[Hashable],
    *,
    ended: bool = True,
    scale: Literal["none", "std", "batch_std"] = "none",
    leave_one_out: bool = False,
    eps: float = 1e-6,
) -> Float[Tensor, "N"]:
    """Return-to-go of every turn minus the mean of that of its siblings' turns with the same index.

    Turns are laid out as in `turn_gae`; `episode_N` counts the episodes from 0, and those with equal `keys_E` are
    siblings. With `ended` a sibling whose episode is over by then counts too: it has 0 to go. What is subtracted then
    depends on nothing the turn does, nor on how long its episode goes on, so with `leave_one_out` and no scale the
    expected gradient is the true one. Without `ended` only siblings that got that far count, which is less noisy while
    there are some; a turn alone gets 0, so late turns are weighted by their chance of company (`group_baseline`).

    The deviation of `scale="std"` is over what the mean is over, that of "batch_std" over the turns that were played.
    """
    _, index_N = _layout(episode_N)
    keys = [(keys_E[e], t) for e, t in zip(episode_N.tolist(), index_N.tolist(), strict=True)]
    over = _ended(episode_N, keys_E) if ended else []
    compared = torch.cat([returns_N, returns_N.new_zeros(len(over))])
    own = "none" if scale == "batch_std" else scale
    advantages_N = group_baseline(compared, keys + over, scale=own, leave_one_out=leave_one_out, eps=eps)[: len(keys)]
    if scale == "batch_std" and len(returns_N) > 1:
        advantages_N = (advantages_N.double() / (returns_N.double().std() + eps)).to(returns_N.dtype)
    return advantages_N


def same_state_baseline(
    returns_N: Float[Tensor, "N"],
    episode_N: Int[Tensor, "N"],
    keys_E: Sequence[Hashable],
    states: Sequence[Hashable],
    *,
    scale: Literal["none", "std", "batch_std"] = "none",
    leave_one_out: bool = False,
) -> Float[Tensor, "N"]:
    """Return-to-go of every turn minus the mean of that of all turns siblings took in the same state.

    The step-level advantage of GiGPO, which adds it to that of the episode. A state nobody else was in gives 0, so a
    state counts by its chance of company; comparisons are fair, since equal states have equal prospects.
    https://arxiv.org/abs/2505.10978
    """
    keys = [(keys_E[e], state) for e, state in zip(episode_N.tolist(), states, strict=True)]
    return group_baseline(returns_N, keys, scale=scale, leave_one_out=leave_one_out)


def share_within(advantages_N: Float[Tensor, "N"], episode_N: Int[Tensor, "N"]) -> float:
    """How much of the variation of advantages is among the turns of an episode: 0 if each episode has one number."""
    advantages = advantages_N.double()
    count_E = torch.bincount(episode_N).clamp(min=1)
    mean_E = _group_sums(advantages, episode_N, len(count_E)) / count_E
    total = (advantages - advantages.mean()).square().sum() if len(advantages) else advantages.sum()
    within = (advantages - mean_E[episode_N]).square().sum()
    return float(within / total) if total > 1e-12 * advantages.square().sum() else 0.0


def zero_variance_groups(rewards_N: Float[Tensor, "N"], keys: Sequence[Hashable]) -> int:
    """How many comparison groups teach nothing because all their rewards are equal (a group of one included).

    Of `len(set(keys))` groups; the fraction is worth logging, since such groups cost rollouts and give no gradient.
    """
    group_N, groups = _groups(rewards_N, keys)
    empty = rewards_N.new_zeros(groups)
    low = empty.scatter_reduce(0, group_N, rewards_N, "amin", include_self=False)
    high = empty.scatter_reduce(0, group_N, rewards_N, "amax", include_self=False)
    return int((low == high).sum())


def overlong_penalty(lengths_N: Int[Tensor, "N"], *, longest: int, cache: int) -> Float[Tensor, "N"]:
    """How far a completion has come into the last `cache` of `longest` tokens: 0 before them, 1 at the end and beyond.

    DAPO subtracts it from the reward, so that an answer is not first fine and then, one token later, cut off and wrong.
    https://arxiv.org/abs/2503.14476, equation 13
    """
    assert 0 < cache <= longest, f"the last {cache} of {longest} tokens"
    return ((lengths_N - (longest - cache)) / cache).clamp(0, 1)


def _suffix_sums(
    x: Float[Tensor, "*chains T"], decay: float | Float[Tensor, "*chains T"]
) -> Float[Tensor, "*chains T"]:
    """sums[t] = x[t] + decay · sums[t+1] along the last dimension; a decay of its own for each t, or one for all."""
    sums: list[Tensor] = []
    decays: Iterable[float | Tensor] = (
        reversed(decay.unbind(-1)) if isinstance(decay, Tensor) else itertools.repeat(decay)
    )
    for column, kept in zip(reversed(x.unbind(-1)), decays, strict=False):
        sums.append(column + kept * sums[-1] if sums else column)
    return torch.stack(sums[::-1], -1) if sums else x.clone()


def _add_to_last(
    x: Float[Tensor, "*chains T"], bootstrap: float | Float[Tensor, "*chains"], factor: float
) -> Float[Tensor, "*chains T"]:
    """A copy of `x` with `factor` · `bootstrap` added at the last step."""
    total = x.clone()
    if x.shape[-1]:
        total[..., -1] += factor * bootstrap
    return total


def _layout(episode_N: Int[Tensor, "N"]) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"]]:
    """Row and column of each turn in a table with one row per episode."""
    first_N = torch.ones_like(episode_N, dtype=torch.bool)
    first_N[1:] = episode_N[1:] != episode_N[:-1]
    row_N = first_N.long().cumsum(0) - 1
    starts = first_N.nonzero()[:, 0]
    assert len(starts) == len(set(episode_N.tolist())), "the turns of one episode must stand next to each other"
    return row_N, torch.arange(len(episode_N), device=episode_N.device) - starts[row_N]


def _ended(episode_N: Int[Tensor, "N"], keys_E: Sequence[Hashable]) -> list[tuple[Hashable, int]]:
    """(key, index) of every turn that an episode did not take but its longest sibling did."""
    lengths = torch.bincount(episode_N, minlength=len(keys_E)).tolist()
    longest: dict[Hashable, int] = {}
    for key, length in zip(keys_E, lengths, strict=True):
        longest[key] = max(length, longest.get(key, 0))
    return [(key, t) for key, length in zip(keys_E, lengths, strict=True) for t in range(length, longest[key])]


def _table(x_N: Float[Tensor, "N"], row_N: Int[Tensor, "N"], column_N: Int[Tensor, "N"]) -> Float[Tensor, "E L"]:
    """The items of a flat list in a table, 0 where an episode has ended."""
    rows, columns = (int(index.max()) + 1 if len(index) else 0 for index in (row_N, column_N))
    return x_N.new_zeros(rows, columns).index_put((row_N, column_N), x_N)


def _groups(rewards_N: Float[Tensor, "N"], keys: Sequence[Hashable]) -> tuple[Int[Tensor, "N"], int]:
    """The number of each item's group, and how many groups there are."""
    assert len(keys) == len(rewards_N), f"{len(keys)} keys for {len(rewards_N)} rewards"
    assert not any(isinstance(key, Tensor) for key in keys), "tensors hash by identity: pass their numbers as keys"
    numbers: dict[Hashable, int] = {}
    group = [numbers.setdefault(key, len(numbers)) for key in keys]
    return torch.tensor(group, dtype=torch.long, device=rewards_N.device), len(numbers)


def _group_sums(x_N: Float[Tensor, "N"], group_N: Int[Tensor, "N"], groups: int) -> Float[Tensor, "G"]:
    return x_N.new_zeros(groups).index_add(0, group_N, x_N)
