"""Rows of tokens for the learners: turns in, `Batch` out, with numbers carried between turns and tokens.

Knows ids and indices only. Consecutive turns whose prompts continue each other become one row, so an episode of T
turns costs one forward pass, not T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Said(Protocol):
    """What can be packed: something seen, and something said in answer (a `Turn`, an `Example`)."""

    @property
    def prompt(self) -> list[int]: ...
    @property
    def action(self) -> list[int]: ...


@dataclass(slots=True)
class Batch:
    """B rows of T tokens holding N turns. Position t describes token t given the tokens before it.

    Rows are padded on the right and say how long they are, so no padding id and no attention mask is needed: a causal
    model never lets a token see what comes after it.
    """

    tokens: Int[Tensor, "B T"]
    lengths: Int[Tensor, "B"]
    mask: Bool[Tensor, "B T"]
    """True on sampled tokens: the ones that train."""
    turn: Int[Tensor, "B T"]
    """Which turn a sampled token belongs to; −1 elsewhere."""
    row_N: Int[Tensor, "N"]
    """Each turn's row."""
    first_N: Int[Tensor, "N"]
    """Position of the first token of each turn's action."""
    last_N: Int[Tensor, "N"]
    """Position of the last token of each turn's action."""
    denom: float
    """Summed losses are divided by it: the same in all micro-batches and ranks of one step."""
    rows: Int[Tensor, "B"]
    """Which rows of the batch it was split from these are."""
    logprobs: Float[Tensor, "B T"] | None = None
    """Under the distribution the tokens were sampled from."""
    advantages: Float[Tensor, "B T"] | None = None
    ref_logprobs: Float[Tensor, "B T"] | None = None
    values: Float[Tensor, "B T"] | None = None
    returns: Float[Tensor, "B T"] | None = None

    def spread(self, x_N: Float[Tensor, "N"]) -> Float[Tensor, "B T"]:
        """One number per turn, given to each of its tokens; zero elsewhere."""
        return torch.where(self.mask, x_N.to(self.tokens.device)[self.turn.clamp_min(0)], 0.0)

    def pool(self, x_BT: Float[Tensor, "B T"]) -> Float[Tensor, "N"]:
        """Sum over each turn's tokens."""
        pooled = x_BT.new_zeros(len(self.row_N))
        return pooled.index_add(0, self.turn[self.mask], x_BT[self.mask])

    def at_end(self, x_N: Float[Tensor, "N"]) -> Float[Tensor, "B T"]:
        """One number per turn, placed on the last token of its action; zero elsewhere."""
        placed = x_N.new_zeros(self.tokens.shape)
        placed[self.row_N, self.last_N] = x_N
        return placed

    def split(self, tokens_per_pass: int) -> list[Batch]:
        """Micro-batches of rows of similar length, each at most this many tokens (or one row), `denom` unchanged."""
        return [self._take(torch.tensor(rows)) for rows in group_rows(self.lengths.tolist(), tokens_per_pass)]

    def _take(self, rows: Int[Tensor, "b"]) -> Batch:
        width = int(self.lengths[rows].max())
        rows = rows.to(self.tokens.device)
        taken: dict[str, Any] = {"rows": rows, "lengths": self.lengths[rows]}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.ndim == 2:
                taken[field.name] = value[rows, :width]
        return replace(self, **taken)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            **{
                field.name: value.to(device)
                for field in fields(self)
                if isinstance(value := getattr(self, field.name), Tensor)
            },
        )


def pack(turns: Sequence[Said], *, denom: float | None = None) -> Batch:
    """Turns as rows. A turn that continues the row of the turn before it joins that row.

    Give the turns of one role, episode by episode. `denom` is the number of sampled tokens unless said otherwise.
    Behaviour log-probs are packed when the turns carry them.
    """
    if not turns:
        raise ValueError("no turns to pack")
    ids, placed = lay_out([(turn.prompt, turn.action) for turn in turns])
    tokens, lengths = pad(ids)
    mask, owner = torch.zeros_like(tokens, dtype=torch.bool), torch.full_like(tokens, -1)
    logprobs = torch.zeros(tokens.shape) if all(hasattr(turn, "logprobs") for turn in turns) else None
    for index, (turn, (row, start)) in enumerate(zip(turns, placed, strict=True)):
        stop = start + len(turn.action)
        mask[row, start:stop] = True
        owner[row, start:stop] = index
        if logprobs is not None:
            logprobs[row, start:stop] = torch.tensor(turn.logprobs)  # type: ignore[attr-defined]
    row_N = torch.tensor([row for row, _ in placed])
    first_N = torch.tensor([start for _, start in placed])
    return Batch(
        tokens=tokens,
        lengths=lengths,
        mask=mask,
        turn=owner,
        row_N=row_N,
        first_N=first_N,
        last_N=first_N + torch.tensor([len(turn.action) for turn in turns]) - 1,
        denom=float(mask.sum()) if denom is None else denom,
        rows=torch.arange(len(ids)),
        logprobs=logprobs,
    )


def lay_out(said: Sequence[tuple[list[int], list[int]]]) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Rows of ids, and for each (prompt, action) its row and where its action starts in it."""
    rows: list[list[int]] = []
    placed: list[tuple[int, int]] = []
    for prompt, action in said:
        assert action, "a turn without tokens cannot be trained on"
        if rows and prompt[: len(rows[-1])] == rows[-1]:
            rows[-1] = prompt + action
        else:
            rows.append(prompt + action)
        placed.append((len(rows) - 1, len(prompt)))
    return rows, placed


def pad(ids: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B"]]:
    """Rows of different lengths as one tensor, filled on the right with zeros that nothing reads, and the lengths."""
    lengths = torch.tensor([len(row) for row in ids])
    tokens = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
    for row, row_ids in enumerate(ids):
        tokens[row, : len(row_ids)] = torch.tensor(row_ids)
    return tokens, lengths


def group_rows(lengths: Sequence[int], tokens_per_pass: int) -> Iterator[list[int]]:
    """Row numbers in groups of similar length whose padded size stays within the budget; at least one row each."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        if group and (len(group) + 1) * lengths[row] > tokens_per_pass:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def by_rows(batch: Batch, tokens_per_pass: int, fn: Callable[[Batch], Tensor]) -> Float[Tensor, "B T"]:
    """Apply a function of (b, t) → (b, t) to micro-batches and put the results back in the batch's own order."""
    out = torch.zeros(batch.tokens.shape)
    for micro in batch.split(tokens_per_pass):
        out[micro.rows, : micro.tokens.shape[1]] = fn(micro).to(out)
    return out
