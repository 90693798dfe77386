"""Learning values from the next value: targets for critics and Q-functions, lagging networks, exploration schedules.

`polyak_` and `hard_copy_` change a module in place; everything else is a pure function. When to call them is the
recipe's decision: counted in optimizer steps, so that micro-batches do not change the algorithm.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def td_target(
    rewards_N: Float[Tensor, "N"],
    next_values: Float[Tensor, "*heads N"],
    *,
    gamma: float | Float[Tensor, "N"],
    terminated: Bool[Tensor, "N"],
) -> Float[Tensor, "*heads N"]:
    """r + γ·V(next state), and r alone where the episode *terminated*. No gradient flows through it.

    A truncated episode bootstraps: only `terminated` stops it, and the next value there is not read. For an n-step or
    semi-Markov transition `rewards_N` is Σ γ^i·r_i over its n steps and `gamma` the tensor γ^n. Leading dimensions of
    `next_values` are heads that each get their own target. DQN's target is `next_values = next_q.max(-1).values`.
    """
    return (rewards_N + gamma * torch.where(terminated, 0.0, next_values)).detach()


def double_q_target(
    rewards_N: Float[Tensor, "N"],
    next_q_online_NK: Float[Tensor, "N K"],
    next_q_target_NK: Float[Tensor, "N K"],
    *,
    gamma: float | Float[Tensor, "N"],
    terminated: Bool[Tensor, "N"],
    legal_NK: Bool[Tensor, "N K"] | None = None,
) -> Float[Tensor, "N"]:
    """Double DQN: the online network picks the next choice, the lagging one says what it is worth.

    Choices outside `legal_NK` are never picked; a row that has none must have terminated.
    https://arxiv.org/abs/1509.06461
    """
    if legal_NK is not None:
        assert bool((legal_NK.any(1) | terminated).all()), "a state that goes on must have a legal choice"
        next_q_online_NK = torch.where(legal_NK, next_q_online_NK, -math.inf)
    best_N1 = next_q_online_NK.argmax(1, keepdim=True)
    return td_target(rewards_N, next_q_target_NK.gather(1, best_N1)[:, 0], gamma=gamma, terminated=terminated)


@torch.no_grad()
def polyak_(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move every parameter of `target` the fraction `tau` of the way to `source`; buffers are copied.

    Raises AssertionError if the two are the same module or share a trainable parameter: such a target does not lag.
    Frozen parameters may be shared.
    """
    for lagging, current in _pairs(target, source):
        lagging.lerp_(current.to(lagging.dtype), tau)
    _copy_buffers_(target, source)


@torch.no_grad()
def hard_copy_(target: nn.Module, source: nn.Module) -> None:
    """Make every parameter and buffer of `target` equal to those of `source`. Raises like `polyak_`."""
    for lagging, current in _pairs(target, source):
        lagging.copy_(current)
    _copy_buffers_(target, source)


def follow_(
    target: nn.Module, source: nn.Module, *, how: Literal["hard", "polyak"], tau: float, every: int, version: int
) -> None:
    """Have the target follow after an optimizer step, the source's `version`-th: a part `tau` of the way after each
    (polyak), or all of it after every `every` of them (hard)."""
    if how == "polyak":
        polyak_(target, source, tau)
    elif version % every == 0:
        hard_copy_(target, source)


def linear_schedule(step: int, start: float, end: float, steps: int) -> float:
    """A straight line from `start` at step 0 to `end` at step `steps`, and `end` ever after (exploration rates)."""
    if step >= steps:
        return end
    return start + (end - start) * max(step, 0) / steps


def _pairs(target: nn.Module, source: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Parameters of the same name, checked to be different tensors wherever the source learns."""
    assert target is not source, "the target network must be its own object (copy.deepcopy), or it does not lag"
    lagging, current = dict(target.named_parameters()), dict(source.named_parameters())
    assert lagging.keys() == current.keys(), "target and source must have the same parameters"
    for name, parameter in current.items():
        shared = parameter.requires_grad and parameter.data_ptr() == lagging[name].data_ptr()
        assert not shared or parameter.numel() == 0, f"{name} is shared by target and source, so it does not lag"
    return [(lagging[name], parameter) for name, parameter in current.items()]


def _copy_buffers_(target: nn.Module, source: nn.Module) -> None:
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        buffer.copy_(buffers[name])
