"""What reads a language model's hidden states: token values and utterance critics.

A head is a module with a body of its own or somebody else's; who trains it, and towards what, is decided above.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from echelon.models.lm import backbone, check_masks, hidden_states

if TYPE_CHECKING:
    from echelon.data.packing import Batch


class TokenValue(nn.Module):
    """V of the state after every token: a causal body with one scalar read from each hidden state.

    The scalar starts at zero, so that an untrained critic changes no advantage.
    """

    def __init__(self, body: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_lm(cls, lm: nn.Module) -> TokenValue:
        """A value model whose body starts as a copy of the language model's. Of one with an adapter, the adapter's copy
        and the scalar learn."""
        body = copy_of_body(lm)
        return cls(body, hidden_size(lm)).to(next(body.parameters()).device)

    @classmethod
    @torch.no_grad()
    def from_scorer(cls, scorer: Any) -> TokenValue:
        """A value model that starts as a reward model (a sequence classifier with one label): its body and its head.

        What that model would score if the text ended after each token is the first guess of what will be earned. A head
        that says nothing yet, of a reward model that has not learned, stays one.
        """
        inner = scorer.get_base_model() if hasattr(scorer, "peft_config") else scorer
        critic = cls(inner.base_model, hidden_size(inner))
        critic.head.weight.copy_(inner.score.weight)
        if inner.score.bias is not None:
            critic.head.bias.copy_(inner.score.bias)
        return critic.to(inner.score.weight.device)

    @torch.no_grad()
    def start_at(self, value: float) -> None:
        """Shift all values so that learning starts around this one, not around zero."""
        self.head.bias.fill_(value)

    def forward(self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, "B"] | None = None) -> Float[Tensor, "B T"]:
        """Float32 values; the one at t has seen token t and all before it."""
        hidden = hidden_states(self.body, tokens, lengths)
        values: Tensor = self.head(hidden.float())[..., 0]
        return values


def token_values(module: nn.Module, batch: Batch) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B"]]:
    """V before each token, which is V of the state it was sampled in, and V after each row's last token.

    The first is what generalised advantage estimation compares with rewards; it has not seen the token it judges. The
    second is what a truncated row bootstraps from.
    """
    after_BT = module(batch.tokens, batch.lengths)
    before_BT = torch.cat([torch.zeros_like(after_BT[:, :1]), after_BT[:, :-1]], dim=1)
    return before_BT, after_BT.gather(1, batch.lengths[:, None] - 1)[:, 0]


@dataclass(slots=True)
class Places:
    """Where N states end in a batch of rows."""

    row: Int[Tensor, "N"]
    state: Int[Tensor, "N"]
    """Column of the state's last token."""


@dataclass(slots=True)
class Spans(Places):
    """Where N utterances lie in a batch of rows, and the states they answer end."""

    first: Int[Tensor, "N"]
    """Column of the utterance's first token."""
    last: Int[Tensor, "N"]
    """Column of its last token; those between belong to it too."""


class UtteranceCritic(nn.Module):
    """Twin Q(s, a) and twin V(s) over whole utterances (ArCHer, arXiv 2402.19446), read from one causal pass.

    V(s) reads the hidden state of the state's last token; Q(s, a) reads that and the mean of the hidden states of the
    action's tokens. So a whole episode laid out in one row yields the values of all its turns. With `shared_body` the
    body belongs to somebody else (the actor): it is read without gradient, and neither trained, copied nor saved here.
    """

    def __init__(self, body: nn.Module, width: int, *, shared_body: bool = False) -> None:
        super().__init__()
        self.shared_body = shared_body
        if shared_body:
            self._borrowed = (body,)  # in a tuple, so that it is not registered as a submodule
        else:
            self.body = body
        self.config = body.config
        self.q = nn.ModuleList([_mlp(2 * width, width) for _ in range(2)])
        self.v = nn.ModuleList([_mlp(width, width) for _ in range(2)])

    @classmethod
    def from_lm(cls, lm: nn.Module, *, shared_body: bool = False) -> UtteranceCritic:
        """A critic whose body starts as a copy of the language model's, or is the language model's.

        Raises DataError for a model that cannot judge several actions that branch off one row.
        """
        check_masks(lm)
        body = backbone(lm) if shared_body else copy_of_body(lm)
        critic = cls(body, hidden_size(lm), shared_body=shared_body)
        return critic.to(next(body.parameters()).device)

    @torch.no_grad()
    def start_at(self, value: float) -> None:
        """Shift all outputs so that learning starts around this value, not around zero."""
        for head in (*self.q, *self.v):
            head[-1].bias.fill_(value)

    def target(self) -> UtteranceCritic:
        """A frozen copy to bootstrap from; a borrowed body stays borrowed."""
        twin = copy.deepcopy(self) if not self.shared_body else UtteranceCritic(self._borrowed[0], 1, shared_body=True)
        if self.shared_body:
            twin.q, twin.v = copy.deepcopy(self.q), copy.deepcopy(self.v)
        return twin.requires_grad_(False)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        q_at: Spans,
        v_at: Places,
        lengths: Int[Tensor, "B"] | None = None,
        **attention: Any,
    ) -> tuple[Float[Tensor, "2 Q"], Float[Tensor, "2 V"]]:
        """Twin Q of the utterances `q_at` and twin V of the states `v_at`, float32. `attention`: `attention_inputs`."""
        if self.shared_body:
            with torch.no_grad():
                hidden = hidden_states(self._borrowed[0], tokens, lengths, **attention)
        else:
            hidden = hidden_states(self.body, tokens, lengths, **attention)
        hidden = hidden.float()  # the heads are float32 whatever the body is
        said = torch.cat([hidden[q_at.row, q_at.state], _span_means(hidden, q_at)], dim=-1)
        seen = hidden[v_at.row, v_at.state]
        q = torch.stack([head(said)[..., 0] for head in self.q])
        v = torch.stack([head(seen)[..., 0] for head in self.v])
        return q, v


def _span_means(hidden: Float[Tensor, "B T H"], at: Spans) -> Float[Tensor, "N H"]:
    """Mean hidden state of each utterance's tokens."""
    lengths = at.last - at.first + 1
    owner = torch.arange(len(lengths), device=hidden.device).repeat_interleave(lengths)
    begins = torch.cumsum(lengths, 0) - lengths
    column = at.first[owner] + torch.arange(len(owner), device=hidden.device) - begins[owner]
    sums = hidden.new_zeros(len(lengths), hidden.shape[-1]).index_add(0, owner, hidden[at.row[owner], column])
    return sums / lengths[:, None]


def copy_of_body(lm: nn.Module) -> nn.Module:
    """The decoder of a language model as a module of its own, an adapter on it included; in a copy nothing is dropped.

    What is frozen below an adapter is frozen in the copy: there, too, only the adapter learns.
    """
    body = copy.deepcopy(backbone(lm))
    for part in body.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return body


def hidden_size(lm: nn.Module) -> int:
    """Width of the hidden states a language model's head reads."""
    return int(lm.config.get_text_config().hidden_size)  # type: ignore[operator, union-attr]


def _mlp(inputs: int, width: int) -> nn.Module:
    last = nn.Linear(2 * width, 1)
    nn.init.normal_(last.weight, std=1e-2)  # small but not zero: a zero layer would send no gradient below it
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, 2 * width), nn.GELU(), last)
