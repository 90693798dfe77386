"""A language model read as a Q-function: what it says of the tokens of an option is what the option is worth.

No head is added and no text is written. What the values are pulled towards, and who chooses by them, is decided above.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from echelon.errors import DataError
from echelon.models import lora
from echelon.models.lm import (
    after_head,
    attention_inputs,
    backbone,
    evaluating,
    hidden_states,
    logits_of,
    output_head,
    shares_prompts,
)
from echelon.ops import options as ops
from echelon.text.dialogue import Inventory

if TYPE_CHECKING:
    from echelon.data.options import OptionBatch

FILE = "strategist.json"
"""Beside the weights: how Q is read, and the strategies."""


@dataclass(frozen=True)
class Reading:
    """How Q is read from a language model: Q(s, u) = scale · (what it says of u's tokens after s) + shift."""

    score: Literal["logit", "logprob", "prob"] = "logit"
    """What is read of a token: its logit, its log-probability or its probability."""
    normalize: Literal["mean", "sum", "informative"] = "informative"
    """The mean over an option's tokens, their sum, or the mean over those that tell the options apart."""
    scale: float = 1.0
    shift: float = 0.0
    front: int = 0
    """Tokens that all options begin with and that are not read (informative)."""
    back: int = 0
    """Tokens that all options end with and that are not read (informative)."""

    def of(self, options: Sequence[Sequence[int]]) -> Reading:
        """The same, once the tokens of all options are known."""
        front, back = ops.informative(options) if self.normalize == "informative" else (0, 0)
        return replace(self, front=front, back=back)


class OptionScorer(nn.Module):
    """Q(s, u) of every option u of a state s, read from a causal language model at the option's tokens.

    The language model stays what it is: an ordinary Hugging Face model, with or without an adapter, which is what
    learns and what is saved. `shares` says whether options may branch off one row; by default it is found out.
    """

    def __init__(self, lm: nn.Module, reading: Reading = Reading(), *, shares: bool | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.config = lm.config
        self.reading = reading
        self.shares_prompts = shares_prompts(lm) if shares is None else shares

    @property
    def layout(self) -> ops.Layout:
        """How rows of options are laid out for it (`data.options.lay_options`)."""
        reading = self.reading
        return ops.Layout(reading.front, reading.back, reading.normalize == "sum", self.shares_prompts)

    def target(self) -> OptionScorer:
        """A copy that does not learn and drops nothing, to bootstrap from. Frozen weights it shares."""
        frozen = {id(parameter): parameter for parameter in self.parameters() if not parameter.requires_grad}
        return copy.deepcopy(self, frozen).requires_grad_(False).eval()

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        row_P: Int[Tensor, "P"],
        column_P: Int[Tensor, "P"],
        place_M: Int[Tensor, "M"],
        token_M: Int[Tensor, "M"],
        option_M: Int[Tensor, "M"],
        weight_M: Float[Tensor, "M"],
        lengths: Int[Tensor, "B"] | None = None,
        *,
        options: int,
        **attention: Any,
    ) -> Float[Tensor, "N"]:
        """Q of `options` options, float32. The hidden state at each of P places predicts some of their M tokens.

        The head is applied there only: of logits, to the options' tokens alone; else to the vocabulary, in pieces.
        """
        hidden_PH = hidden_states(backbone(self.lm), tokens, lengths, **attention)[row_P, column_P]
        scores_M = token_scores(self.lm, hidden_PH, place_M, token_M, self.reading.score)
        q_N = ops.readout(scores_M, option_M, weight_M, options=options)
        return self.reading.scale * q_N + self.reading.shift

    def q(self, batch: OptionBatch) -> Float[Tensor, "N"]:
        """Q of the options of a micro-batch that is where the model is, in its order."""
        attention = attention_inputs(self.lm, batch)  # type: ignore[arg-type]
        found: Tensor = self(
            batch.tokens,
            batch.row_P,
            batch.column_P,
            batch.place_M,
            batch.token_M,
            batch.option_M,
            batch.weight_M,
            batch.lengths,
            options=len(batch.index_N),
            **attention,
        )
        return found

    @torch.no_grad()
    def values(self, batch: OptionBatch, tokens_per_pass: int) -> Float[Tensor, "N"]:
        """Q of all options of a batch, on the CPU, without gradient and with nothing dropped."""
        q_N, device = torch.zeros(len(batch.index_N)), next(self.parameters()).device
        with evaluating(self):
            for part in batch.split(tokens_per_pass):
                q_N[part.index_N] = self.q(part.to(device)).cpu()
        return q_N

    def describe(self, folder: Path, inventory: Inventory) -> None:
        """Write how Q is read, and of which options, beside the weights: `read_description` reads it."""
        described = {**asdict(self.reading), **asdict(inventory)}
        (folder / FILE).write_text(json.dumps(described, indent=1), encoding="utf-8")


def token_scores(
    lm: nn.Module, hidden_PH: Float[Tensor, "P H"], place_M: Int[Tensor, "M"], token_M: Int[Tensor, "M"], score: str
) -> Float[Tensor, "M"]:
    """What the model says of each token at its place: its logit, logprob or prob, float32."""
    head = lora.spoken_through(output_head(lm))
    plain = type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks
    if plain and score == "logit":
        return _picked_logits(lm, head, hidden_PH[place_M], token_M)
    logits_PV = logits_of(lm, hidden_PH)
    if score == "logit":
        return logits_PV[place_M, token_M]
    logprobs_M = logits_PV[place_M, token_M] - logits_PV.logsumexp(1)[place_M]
    return logprobs_M if score == "logprob" else logprobs_M.exp()


def _picked_logits(
    lm: nn.Module, head: nn.Module, hidden_MH: Float[Tensor, "M H"], token_M: Int[Tensor, "M"]
) -> Float[Tensor, "M"]:
    """One logit per hidden state, of a linear head: nothing is computed for other tokens."""
    weight, bias, (scale, cap) = head.weight, head.bias, after_head(lm)
    assert isinstance(weight, Tensor)
    logits_M = (hidden_MH.float() * weight[token_M].float()).sum(1)
    if isinstance(bias, Tensor):
        logits_M = logits_M + bias[token_M].float()
    return logits_M * scale if cap is None else cap * torch.tanh(logits_M * scale / cap)


def read_description(folder: Path) -> tuple[Reading, Inventory]:
    """How Q was read from the model in `folder`, and the strategies it chooses from.

    Raises DataError for a folder that no strategist was saved in.
    """
    try:
        described = json.loads((folder / FILE).read_bytes())
        inventory = Inventory(tuple(described.pop("strategies")), tuple(described.pop("options")))
        return Reading(**described), inventory
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} has no {FILE} that can be read, so nothing says how values are read from the model there. Give "
            "the folder of a strategist: what echelon strategist or echelon tosca saved."
        ) from error
