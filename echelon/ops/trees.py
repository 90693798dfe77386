"""What the turns of a tree are worth: own rewards, what followed, and what changed from one attempt to the next.

A tree is the list of its turns' parents: -1 for a root, and always an earlier turn. Several trees may stand one after
the other. Tensors only; who speaks in which turn is given.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def child_mean(x_N: Float[Tensor, "N"], parent_N: Int[Tensor, "N"]) -> tuple[Float[Tensor, "N"], Bool[Tensor, "N"]]:
    """The mean over each turn's children, 0 where there are none, and where there are some."""
    has = parent_N >= 0
    sums = torch.zeros_like(x_N).index_add(0, parent_N[has], x_N[has])
    counts = torch.bincount(parent_N[has], minlength=len(x_N))
    return sums / counts.clamp(min=1), counts > 0


def tree_values(own_N: Float[Tensor, "N"], parent_N: Int[Tensor, "N"], *, gamma: float = 1.0) -> Float[Tensor, "N"]:
    """What followed from each turn: its own reward plus γ times the mean value of its children. In a chain, the return.

    Siblings exclude each other, so their values are averaged: each is a sample of what the parent leads to.
    """
    values, parents = own_N.double().tolist(), parent_N.tolist()
    counts = torch.bincount(parent_N[parent_N >= 0], minlength=len(parents)).tolist()
    for turn in range(len(parents) - 1, -1, -1):
        parent = parents[turn]
        assert parent < turn, "a turn answers an earlier one"
        if parent >= 0:
            values[parent] += gamma * values[turn] / counts[parent]
    return torch.tensor(values, dtype=own_N.dtype)


def attempt_before(parent_N: Int[Tensor, "N"], solver_N: Bool[Tensor, "N"]) -> Int[Tensor, "N"]:
    """The nearest attempt above each turn, -1 where there is none."""
    found: list[int] = []
    solver = solver_N.tolist()
    for parent in parent_N.tolist():
        found.append(parent if parent < 0 or solver[parent] else found[parent])
    return torch.tensor(found, dtype=torch.long)
