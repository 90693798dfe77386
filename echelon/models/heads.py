"""What reads a language model's hidden states: token values and utterance critics.

A head is a module with a body of its own or somebody else's; who trains it, and towards what, is decided above.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_model
from torch import Tensor, nn

from echelon.models.encoder import TextEncoder
from echelon.models.lm import attention_inputs, backbone, check_masks, evaluating, hidden_states
from echelon.ops.scales import LINEAR, Scale

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

    def forward(
        self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, "B"] | None = None, **attention: Any
    ) -> Float[Tensor, "B T"]:
        """Float32 values; the one at t has seen token t and all before it. `attention`: `attention_inputs`."""
        hidden = hidden_states(self.body, tokens, lengths, **attention)
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


def values_before(module: nn.Module, batch: Batch) -> Float[Tensor, "B T"]:
    """V of the state each sampled token was drawn in, in rows with branches too; zero elsewhere."""
    after_BT = module(batch.tokens, batch.lengths, **attention_inputs(module.body, batch))  # type: ignore[arg-type]
    return torch.where(batch.mask, after_BT.gather(1, batch.before), 0.0)


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
    """Twin Q(s, a) and twin V(s) over whole utterances (ArCHer, arXiv 2402.19446).

    With a decoder as body one causal pass yields the values of all turns of an episode laid out in one row: V(s) reads
    the hidden state of the state's last token, Q(s, a) that and the mean of the hidden states of the action's tokens.
    With `shared_body` the decoder belongs to somebody else (the actor): it is read without gradient and with nothing
    dropped, and neither trained, copied nor saved here. With a `TextEncoder` as body states and actions are read apart,
    each from its beginning: V(s) reads the state's vector, Q(s, a) both. `scale` says how outputs of the heads mean
    values.
    """

    def __init__(self, body: nn.Module, width: int, *, shared_body: bool = False, scale: Scale = LINEAR) -> None:
        super().__init__()
        self.shared_body = shared_body
        # In a tuple, so that it is not registered as a submodule.
        self.borrowed: tuple[nn.Module, ...] = (body,) if shared_body else ()
        if not shared_body:
            self.body = body
        self.config = body.config
        self.scale = scale
        self.q = nn.ModuleList([_mlp(2 * width, width) for _ in range(2)])
        self.v = nn.ModuleList([_mlp(width, width) for _ in range(2)])

    @classmethod
    def from_lm(cls, lm: nn.Module, *, shared_body: bool = False, scale: Scale = LINEAR) -> UtteranceCritic:
        """A critic whose body starts as a copy of the language model's, or is the language model's.

        Raises DataError for a model that cannot judge several actions that branch off one row.
        """
        check_masks(lm)
        body = backbone(lm) if shared_body else copy_of_body(lm)
        critic = cls(body, hidden_size(lm), shared_body=shared_body, scale=scale)
        return critic.to(next(body.parameters()).device)

    @classmethod
    def from_encoder(cls, encoder: TextEncoder, *, scale: Scale = LINEAR) -> UtteranceCritic:
        """A critic that reads texts with an encoder."""
        return cls(encoder, encoder.width, scale=scale).to(next(encoder.parameters()).device)

    @torch.no_grad()
    def start_at(self, value: float) -> None:
        """Shift all outputs so that learning starts around this value, not around zero."""
        for head in (*self.q, *self.v):
            head[-1].bias.fill_(self.scale.start(value))

    def target(self) -> UtteranceCritic:
        """A frozen copy to bootstrap from; a borrowed body stays borrowed."""
        return copy.deepcopy(self, {id(body): body for body in self.borrowed}).requires_grad_(False)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        q_at: Spans,
        v_at: Places,
        lengths: Int[Tensor, "B"] | None = None,
        **attention: Any,
    ) -> tuple[Float[Tensor, "2 Q"], Float[Tensor, "2 V"]]:
        """Twin Q of the utterances `q_at` and twin V of the states `v_at`, float32. `attention`: `attention_inputs`."""
        said, seen = self._read(tokens, q_at, v_at, lengths, attention)
        q = torch.stack([head(said)[..., 0] for head in self.q])
        v = torch.stack([head(seen)[..., 0] for head in self.v])
        return self.scale.values(q), self.scale.values(v)

    def _read(
        self, tokens: Tensor, q_at: Spans, v_at: Places, lengths: Tensor | None, attention: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """What Q and V are read from, a row for each; the heads are float32 whatever the body is."""
        if not self.shared_body and isinstance(self.body, TextEncoder):
            return self.body.read(tokens, q_at, v_at)
        if self.shared_body:
            with torch.no_grad(), evaluating(self.borrowed[0]):
                hidden = hidden_states(self.borrowed[0], tokens, lengths, **attention).float()
        else:
            hidden = hidden_states(self.body, tokens, lengths, **attention).float()
        said = torch.cat([hidden[q_at.row, q_at.state], _span_means(hidden, q_at)], dim=-1)
        return said, hidden[v_at.row, v_at.state]

    def save_pretrained(self, folder: Path) -> None:
        """The weights, and what `critic_like` needs to make a module that they fit. The folder exists."""
        save_model(self, str(folder / "model.safetensors"))
        kind = "actor" if self.shared_body else "encoder" if isinstance(self.body, TextEncoder) else "own"
        adapted = any("lora_" in name for name, _ in self.named_parameters())
        described = {"body": kind, "adapted": adapted, "scale": asdict(self.scale)}
        (folder / "critic.json").write_text(json.dumps(described), encoding="utf-8")
        if kind == "encoder":
            self.body.describe(folder / "body")  # type: ignore[operator]
        elif kind == "own":
            self.config.save_pretrained(folder / "body")  # type: ignore[operator, union-attr]


def critic_like(folder: Path, lm: nn.Module, tokenizer: Any) -> UtteranceCritic:
    """A critic made as the one saved in `folder` was, with other weights; `lm` and its tokenizer are the actor's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    described = json.loads((folder / "critic.json").read_bytes())
    kind, scale = described["body"], Scale(**described["scale"])
    device = next(lm.parameters()).device
    if kind == "encoder":
        return UtteranceCritic.from_encoder(TextEncoder.like(folder / "body", tokenizer).to(device), scale=scale)
    if kind == "own" and not described["adapted"]:
        config = AutoConfig.from_pretrained(folder / "body")
        lm = AutoModelForCausalLM.from_config(config, dtype=next(lm.parameters()).dtype).to(device)
    return UtteranceCritic.from_lm(lm, shared_body=kind == "actor", scale=scale)


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
