"""What ranks candidate utterances: one number per utterance, read where it ends.

A decoder of its own with one linear layer on it. What the number is pulled towards is decided above.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from echelon.models.heads import copy_of_body, hidden_size
from echelon.models.lm import hidden_states, shares_prompts
from echelon.ops.ranking import value_bias


class Ranker(nn.Module):
    """Q(s, c): what is earned from state s on if c is said there, read from the hidden state of c's last token.

    With `bounded`, Q is squashed into (0, 1). That is part of what is saved: a ranker that is loaded says what it said.
    """

    bounded: Tensor

    def __init__(self, body: nn.Module, width: int, *, bounded: bool = False, shares: bool = True) -> None:
        super().__init__()
        self.body = body
        self.config = body.config
        self.head = nn.Linear(width, 1)
        self.shares_prompts = shares
        """Whether the candidates of a state may branch off one row."""
        self.register_buffer("bounded", torch.tensor(bounded))
        nn.init.normal_(self.head.weight, std=5e-2)  # small but not zero: a zero layer would send no gradient below it
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_lm(cls, lm: nn.Module, *, bounded: bool = False) -> Ranker:
        """A ranker whose body starts as a copy of the language model's, an adapter on it included."""
        body = copy_of_body(lm)
        ranker = cls(body, hidden_size(lm), bounded=bounded, shares=shares_prompts(lm))
        return ranker.to(next(body.parameters()).device)

    @torch.no_grad()
    def start_at(self, value: float) -> None:
        """Shift Q so that learning starts around this value, not around zero."""
        self.head.bias.fill_(value_bias(value, bounded=bool(self.bounded)))

    def target(self) -> Ranker:
        """A frozen copy to bootstrap from."""
        return copy.deepcopy(self).requires_grad_(False)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        row_N: Int[Tensor, "N"],
        last_N: Int[Tensor, "N"],
        lengths: Int[Tensor, "B"] | None = None,
        **attention: Any,
    ) -> Float[Tensor, "N"]:
        """Q of the utterances whose last tokens stand in these rows and columns, float32. `attention`: of branches."""
        hidden = hidden_states(self.body, tokens, lengths, **attention)
        q_N: Tensor = self.head(hidden[row_N, last_N].float())[:, 0]
        return q_N.sigmoid() if self.bounded else q_N
