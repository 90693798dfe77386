"""One forward pass over tokens of many conversations, laid end to end: no padding, whatever their lengths.

Everything but attention treats tokens alone, so a model needs no change to run them side by side: for the time of the
pass its attention function, which Hugging Face models look up by name, is one that reads each conversation's own keys
and values. Knows nothing of requests, of sampling, or of who comes next.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from echelon.models.lm import AttentionForm, backbone, logits_of
from echelon.sampling.cache import Cache, Resident, Shelf, bytes_per_key

FEW = 16
"""On a CPU up to so many queries are multiplied with their keys directly."""
ATTENTION = "echelon_ragged"
"""The name under which models find the attention function of this file."""
CALL_COST = 1 << 20
"""On a CPU a separate attention call takes about as long as reading this many bytes."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The next tokens of one conversation."""

    resident: Resident
    tokens: Sequence[int]


class Ragged:
    """A causal language model that reads the next tokens of many conversations in one pass.

    Raises DataError for a model that has other layers than full and sliding-window attention; whether it finds its
    attention function by name, as it must, `reads_like_the_model` tells.
    """

    def __init__(self, module: nn.Module) -> None:
        AttentionForm(module)
        self.module = module
        self._body = backbone(module)
        self._config = module.config.get_text_config()  # type: ignore[operator, union-attr]
        self._weight = next(module.parameters())
        self._windows = _windows(self._config)
        cost = CALL_COST // bytes_per_key(self._config, self._weight.element_size())
        self._call_cost = cost if self._weight.device.type == "cpu" else 1 << 40

    def __call__(self, pieces: Sequence[Piece], wanted: Sequence[int]) -> Tensor:
        """Float32 logits (wanted x vocabulary) after the last token of each of the wanted pieces.

        All pieces' keys and values are stored, and their tokens known from now on.
        """
        eager = self._config._attn_implementation == "eager"
        plan = _Plan(pieces, self._windows, self._call_cost, self._weight, eager=eager)
        with _attending(self._config, plan):
            hidden = self._body(input_ids=plan.ids, position_ids=plan.positions, use_cache=False).last_hidden_state
        for piece in pieces:
            piece.resident.known += len(piece.tokens)
        last = torch.tensor([plan.last[number] for number in wanted], dtype=torch.long, device=hidden.device)
        return logits_of(self.module, hidden[0, last])


@dataclass(slots=True, eq=False)
class _Call:
    """One attention call: equally many tokens each of conversations that are neighbours on a shelf, or of one."""

    shelf: Shelf
    places: slice
    width: int
    """Keys that are read of each."""
    tokens: slice
    """Which tokens of the pass ask."""
    positions: Tensor
    """Where they are in their conversations: (places, tokens of each)."""
    asking: Tensor | None = None
    """Which of the places ask, if not all do."""
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)


class _Plan:
    """What the attention function has to know about one pass."""

    def __init__(
        self, pieces: Sequence[Piece], windows: Sequence[int | None], call_cost: int, weight: Tensor, *, eager: bool
    ) -> None:
        self.windows, self.eager = windows, eager
        self.call_cost = call_cost
        self.device, self.dtype = weight.device, weight.dtype
        order = sorted(range(len(pieces)), key=lambda number: _sorting(pieces[number]))
        ids: list[int] = []
        positions: list[int] = []
        written: dict[int, tuple[Shelf, list[int], list[int]]] = {}
        self.last = [0] * len(pieces)
        for number in order:
            piece, resident = pieces[number], pieces[number].resident
            count = len(piece.tokens)
            _, tokens, places = written.setdefault(id(resident.shelf), (resident.shelf, [], []))
            tokens += range(len(ids), len(ids) + count)
            places += [resident.place] * count
            ids += piece.tokens
            positions += range(resident.known, resident.known + count)
            self.last[number] = len(ids) - 1
        self.ids = torch.tensor([ids], device=self.device)
        self.positions = torch.tensor([positions], device=self.device)
        self.writes = [
            (shelf, self._tensor(tokens), self._tensor(places)) for shelf, tokens, places in written.values()
        ]
        self.calls = list(self._calls([pieces[number] for number in order]))

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, extra: Any
    ) -> Tensor:
        """What each token of the pass, (1, heads, tokens, width), takes from its own conversation: (1, tokens, heads,
        width)."""
        layer: int = module.layer_idx
        for shelf, tokens, places in self.writes:
            for store, states in zip(shelf.layer(layer, key, value), (key, value), strict=True):
                store[places, :, self.positions[0, tokens]] = states[0, :, tokens].transpose(0, 1)
        answers = []
        for call in self.calls:
            keys, values = call.shelf.layer(layer, key, value)
            keys, values = keys[call.places, :, : call.width], values[call.places, :, : call.width]
            asked = query[0, :, call.tokens]
            asked = asked.view(len(asked), -1, call.positions.shape[1], asked.shape[-1]).transpose(0, 1)
            if call.asking is not None:
                spread = asked.new_zeros(len(call.positions), *asked.shape[1:])
                asked = spread.index_copy_(0, call.asking, asked)
            mask = self._mask(call, self.windows[layer])
            answer = self._attention(module, asked, keys, values, mask, scaling, extra)
            if call.asking is not None:
                answer = answer[call.asking]
            answers.append(answer.flatten(0, 1))
        return (answers[0] if len(answers) == 1 else torch.cat(answers))[None]

    def _attention(
        self,
        module: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        extra: Any,
    ) -> Tensor:
        """(places, tokens, heads, width), by the function that the model itself would have called."""
        if self.eager:
            eager = sys.modules[type(module).__module__].eager_attention_forward
            answer: Tensor = eager(module, query, keys, values, mask, scaling=scaling, **extra)[0]
        elif self.device.type != "cpu":
            answer = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, keys, values, mask, scaling=scaling, **extra)[0]
        elif query.shape[2] <= FEW and (mask is not None or query.shape[2] == 1) and self.dtype == torch.float32:
            answer = _few_tokens_each(query, keys, values, mask, scaling)
        else:  # the same without copies of the keys for every head of a group
            answer = scaled_dot_product_attention(
                query,
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None and query.shape[2] > 1,
                scale=scaling,
                enable_gqa=query.shape[1] != keys.shape[1],
            ).transpose(1, 2)
        return answer

    def _mask(self, call: _Call, window: int | None) -> Tensor | None:
        """Added to the scores of a call: 0 where a token may look, a large negative number elsewhere."""
        if window not in call.masks:
            tokens = call.positions.shape[1]
            lowest, highest = int(call.positions[:, -1].min()), int(call.positions.max())
            causal = lowest == highest == call.width - 1 and (tokens == 1 or tokens == call.width)
            if causal and not (self.eager and tokens > 1) and (window is None or highest < window):
                call.masks[window] = None
            else:
                distance = call.positions[:, None, :, None] - torch.arange(call.width, device=self.device)
                hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
                mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
                call.masks[window] = mask.masked_fill_(hidden, torch.finfo(self.dtype).min)
        return call.masks[window]

    def _calls(self, pieces: Sequence[Piece]) -> Iterator[_Call]:
        """Pieces of one length on neighbouring places share a call, as long as what is read in vain, between them and
        beyond the ends of the shorter conversations, costs less than another call."""
        start, width, token = 0, 0, 0
        for number, piece in enumerate([*pieces, None]):
            begin, count = pieces[start], len(pieces[start].tokens)
            length = 0 if piece is None else piece.resident.known + count
            if number > start and (piece is None or not self._joins(begin, pieces[number - 1], piece, width, length)):
                stop = token + count * (number - start)
                yield self._call([each.resident for each in pieces[start:number]], slice(token, stop), count, width)
                start, width, token = number, 0, stop
            if piece is not None:
                width = max(width, piece.resident.known + len(piece.tokens))

    def _joins(self, first: Piece, last: Piece, piece: Piece, width: int, length: int) -> bool:
        if len(piece.tokens) != len(first.tokens) or piece.resident.shelf is not first.resident.shelf:
            return False
        place = first.resident.place
        together = (piece.resident.place + 1 - place) * max(width, length)
        apart = (last.resident.place + 1 - place) * width + length
        return len(piece.tokens) * (together - apart) <= self.call_cost

    def _call(self, residents: Sequence[Resident], tokens: slice, count: int, width: int) -> _Call:
        shelf, first, last = residents[0].shelf, residents[0].place, residents[-1].place
        positions = self.positions[0, tokens].view(-1, count)
        if last - first + 1 == len(residents):
            return _Call(shelf, slice(first, last + 1), width, tokens, positions)
        asking = self._tensor([resident.place - first for resident in residents])
        spread = positions.new_zeros(last - first + 1, count).index_copy_(0, asking, positions)
        return _Call(shelf, slice(first, last + 1), width, tokens, spread, asking)

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)


def _few_tokens_each(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention as two batched products: for few queries per place faster than the kernel that is made for many."""
    places, heads, count, width = query.shape
    groups = keys.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    asked = (query * scale).reshape(places * groups, heads // groups * count, width)
    scores = torch.bmm(asked, keys.flatten(0, 1).transpose(1, 2))
    if mask is not None:
        scores.view(places, heads, count, -1).add_(mask)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(places, heads, count, -1).transpose(1, 2)


def _sorting(piece: Piece) -> tuple[int, int, int, int]:
    """Those that may share a call next to each other."""
    resident = piece.resident
    return len(piece.tokens), resident.shelf.capacity, id(resident.shelf), resident.place


def _windows(config: Any) -> list[int | None]:
    """How far back each layer looks; None is all the way."""
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    return [window if kinds is None or kinds[layer] == "sliding_attention" else None for layer in range(layers)]


_current: ContextVar[_Plan] = ContextVar("the pass that is under way")


@contextmanager
def _attending(config: Any, plan: _Plan) -> Iterator[None]:
    """Within, the model's attention is that of the plan."""
    own, token = config._attn_implementation, _current.set(plan)
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = own
        _current.reset(token)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    assert attention_mask is None, "the pass has masks of its own"
    return _current.get().attend(module, query, key, value, scaling, extra), None


AttentionInterface.register(ATTENTION, _attend)


@torch.inference_mode()
def reads_like_the_model(model: Ragged) -> bool:
    """Whether two conversations in one pass, and then one more token of each, get the model's own logits."""
    cache = Cache(1)
    conversations = [[1, 2, 3, 4, 5, 6, 7], [7, 2, 4]]
    residents = [cache.open(ids[:-1], len(ids), None, 0, must=True) for ids in conversations]
    for start, stop in ((0, -1), (-1, None)):
        pieces = [
            Piece(resident, ids[start:stop])
            for resident, ids in zip(residents, conversations, strict=True)
            if resident is not None
        ]
        found = model(pieces, range(2))
    device = found.device
    own = [model.module(input_ids=torch.tensor([ids], device=device), use_cache=False) for ids in conversations]
    expected = torch.cat([output.logits[:, -1] for output in own]).float()
    tolerance = 1e-3 if own[0].logits.dtype == torch.float32 else 0.03
    return bool((found - expected).abs().mean() <= tolerance * expected.std())
