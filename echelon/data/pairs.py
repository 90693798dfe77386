"""Preference pairs as rows: two answers to one prompt, one of which was preferred, always in the same forward pass.

Ids and indices only. Where the model can be told who sees whom, both answers share one copy of their prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from echelon.data.packing import Batch, group_rows, pack, pack_siblings
from echelon.data.schemas import Preference
from echelon.errors import DataError
from echelon.text.answers import AnswerTooLong, Spoken, prompt_for
from echelon.text.chat import Example, Renderer


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference as token ids."""

    prompt: list[int]
    chosen: Spoken
    rejected: Spoken
    margin: float = 0.0
    """By how much the chosen answer is better, where that is known."""

    @property
    def tokens(self) -> int:
        """Of the longer of its two rows."""
        return len(self.prompt) + max(len(self.chosen.ids), len(self.rejected.ids))


@dataclass(slots=True)
class Pairs:
    """P pairs in rows: turn 2p of the batch is the chosen answer of pair p, turn 2p + 1 the rejected one."""

    batch: Batch
    margin_P: Float[Tensor, "P"]
    reference_P2: Float[Tensor, "P 2"] | None
    denom: float
    """Summed losses are divided by it: the number of pairs of the whole step."""

    @property
    def tokens(self) -> Int[Tensor, "B T"]:
        """The rows, padded."""
        return self.batch.tokens

    def split(self, tokens_per_pass: int) -> list[Pairs]:
        """Micro-batches of whole pairs, at most this many tokens each (or one pair), `denom` unchanged."""
        unit_B = self._units()
        longest, rows = [0] * (int(unit_B[-1]) + 1), [0] * (int(unit_B[-1]) + 1)
        for unit, length in zip(unit_B.tolist(), self.batch.lengths.tolist(), strict=True):
            longest[unit], rows[unit] = max(longest[unit], length), rows[unit] + 1
        groups = group_rows(longest, tokens_per_pass // max(rows))
        return [self._take(torch.isin(unit_B, torch.tensor(group))) for group in groups]

    def _units(self) -> Int[Tensor, "B"]:
        """Numbers of rows that hold no pair in part: the two rows of a pair have the same."""
        chosen, rejected = self.batch.row_N[0::2], self.batch.row_N[1::2]
        begins = torch.ones(len(self.batch.tokens), dtype=torch.long)
        begins[rejected[chosen != rejected]] = 0  # rows are made in the order of pairs, so theirs are neighbours
        return begins.cumsum(0) - 1

    def _take(self, rows_B: Tensor) -> Pairs:
        batch = self.batch.only(rows_B)
        held_P = batch.index_N[0::2] // 2
        reference = None if self.reference_P2 is None else self.reference_P2[held_P]
        return replace(self, batch=batch, margin_P=self.margin_P[held_P], reference_P2=reference)

    def to(self, device: torch.device | str) -> Pairs:
        """The same pairs on another device."""
        reference = None if self.reference_P2 is None else self.reference_P2.to(device)
        return replace(self, batch=self.batch.to(device), margin_P=self.margin_P.to(device), reference_P2=reference)


def render_pairs(
    renderer: Renderer, rows: Sequence[Preference], *, max_tokens: int, drop: bool = False
) -> tuple[list[Pair], list[str]]:
    """Rows of preferences as ids, one prompt for both answers, cut from its old end where it has to be.

    Raises DataError for an answer that does not fit by itself; with `drop` such rows are left out, which is the second
    thing returned: what there is to say about it.
    """
    pairs: list[Pair] = []
    complaint = ""
    for row in rows:
        try:
            prompt, (chosen, rejected) = prompt_for(
                renderer, row.prompt, [row.chosen, row.rejected], max_tokens=max_tokens
            )
        except AnswerTooLong as error:
            if not drop:
                raise
            complaint = complaint or str(error)
            continue
        pairs.append(Pair(prompt, chosen, rejected, row.margin))
    if not complaint:
        return pairs, []
    if not pairs:
        raise DataError(f"no pair is left: {complaint}")
    return pairs, [f"{len(rows) - len(pairs)} of {len(rows)} pairs are left out: {complaint}"]


def pack_pairs(pairs: Sequence[Pair], *, share: bool, reference_P2: Float[Tensor, "P 2"] | None = None) -> Pairs:
    """Pairs as rows. With `share` the answers may share their prompt's row, where that computes less.

    `reference_P2` is log π_ref of each pair's chosen and rejected answer.
    """
    answers = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    turns = [Example(prompt, answer.ids) for prompt, answer in answers]
    batch = pack_siblings(turns) if share else pack(turns)
    for number, (_, answer) in enumerate(answers):
        if not all(answer.said):
            row, first = int(batch.row_N[number]), int(batch.first_N[number])
            heard = first + (~torch.tensor(answer.said)).nonzero()[:, 0]
            batch.mask[row, heard], batch.turn[row, heard] = False, -1
    margins = torch.tensor([pair.margin for pair in pairs])
    return Pairs(batch, margin_P=margins, reference_P2=reference_P2, denom=float(len(pairs)))


def passes(pairs: Sequence[Pair], tokens_per_pass: int, *, share: bool) -> Iterator[tuple[list[int], Pairs]]:
    """All pairs, a few of similar length at a time, and which they are: for what needs no gradient."""
    for numbers in group_rows([pair.tokens for pair in pairs], tokens_per_pass // 2):
        yield numbers, pack_pairs([pairs[number] for number in numbers], share=share)
