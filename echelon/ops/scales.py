"""The scale a critic computes values on: numbers of any size as ones that a network can hit, and back.

Pure functions of tensors. What a value is of, and what it is pulled towards, is decided above.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

EDGE = 0.01
"""How close to an end of the range, as a part of it, values may start: at the end itself no gradient would be left."""


def symlog(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """sign(x)·ln(1 + |x|): near 0 the number itself, far away its order of magnitude (arXiv 2301.04104)."""
    return x.sign() * x.abs().log1p()


def symexp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """sign(x)·(e^|x| − 1), which undoes `symlog`."""
    return x.sign() * x.abs().expm1()


@dataclass(frozen=True, slots=True)
class Scale:
    """How raw outputs of a critic mean values."""

    kind: Literal["linear", "range", "symlog"] = "linear"
    """An output is the value; or goes through a sigmoid into the range; or is the symlog of the value."""
    low: float = 0.0
    high: float = 1.0
    """Ends of the range; read by `range` only."""

    def values(self, raw: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """What raw outputs mean."""
        if self.kind == "range":
            return self.low + (self.high - self.low) * raw.sigmoid()
        return symexp(raw) if self.kind == "symlog" else raw

    def compared(self, values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Values as a loss compares them: on the scale of symlog their logarithms, otherwise as they are."""
        return symlog(values) if self.kind == "symlog" else values

    def start(self, value: float) -> float:
        """The raw output that means a value. One outside the range, or at its edge, is moved inside."""
        if self.kind == "symlog":
            return float(symlog(torch.tensor(value, dtype=torch.float64)))
        if self.kind == "range":
            part = min(max((value - self.low) / (self.high - self.low), EDGE), 1 - EDGE)
            return math.log(part / (1 - part))
        return value


LINEAR = Scale()
