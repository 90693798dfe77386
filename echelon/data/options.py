"""Options as tokens: how each is written, and rows in which a language model scores all options of many states.

The options of a state hang on it like the branches of a tree, what several begin with once. What is only read, and
followed by nothing that is read, is no input: options of one token cost the state alone. Ids and indices only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from echelon.data.candidates import Options
from echelon.data.packing import group_rows, pad
from echelon.errors import DataError
from echelon.ops.options import Layout
from echelon.text.chat import Renderer
from echelon.text.dialogue import Inventory
from echelon.types import Message


@dataclass(slots=True)
class OptionBatch:
    """B rows in which N options are scored, at M tokens, which P hidden states predict."""

    tokens: Int[Tensor, "B T"]
    lengths: Int[Tensor, "B"]
    row_P: Int[Tensor, "P"]
    column_P: Int[Tensor, "P"]
    """Where the hidden states stand that scores are read from."""
    place_M: Int[Tensor, "M"]
    """Which of them each token is read from."""
    token_M: Int[Tensor, "M"]
    option_M: Int[Tensor, "M"]
    """The option that each token is part of, of the N that these rows hold."""
    weight_M: Float[Tensor, "M"]
    index_N: Int[Tensor, "N"]
    """Which options these are, of all that were laid out."""
    denom: float
    """Summed losses are divided by it: the number of decisions of the whole step."""
    positions: Int[Tensor, "B T"] | None = None
    visible: Bool[Tensor, "B T T"] | None = None
    """Where options branch: which tokens (last axis) each token may see."""
    wanted_N: Float[Tensor, "N"] | None = None
    """What Q shall be."""
    reward_N: Float[Tensor, "N"] | None = None

    def sees(self) -> Bool[Tensor, "B T T"] | None:
        """Which tokens each token may see; None in plain rows, where that is all before it."""
        return self.visible

    def split(self, tokens_per_pass: int) -> list[OptionBatch]:
        """Micro-batches of whole rows of similar length, at most this many tokens each (or one row); `denom` unchanged.

        An option is read in one row, so its Q is computed whole.
        """
        return [self._take(torch.tensor(rows)) for rows in group_rows(self.lengths.tolist(), tokens_per_pass)]

    def to(self, device: torch.device | str) -> OptionBatch:
        """The same batch on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def _take(self, rows: Int[Tensor, "b"]) -> OptionBatch:
        width = int(self.lengths[rows].max())
        held_P, row_P = _renumbered(self.row_P, rows, len(self.tokens))
        held_M, place_M = _renumbered(self.place_M, held_P, len(self.row_P))
        held_N = torch.unique(self.option_M[held_M])
        _, option_M = _renumbered(self.option_M, held_N, len(self.index_N))
        return replace(
            self,
            tokens=self.tokens[rows, :width],
            lengths=self.lengths[rows],
            row_P=row_P,
            column_P=self.column_P[held_P],
            place_M=place_M,
            token_M=self.token_M[held_M],
            option_M=option_M,
            weight_M=self.weight_M[held_M],
            index_N=self.index_N[held_N],
            positions=None if self.positions is None else self.positions[rows, :width],
            visible=None if self.visible is None else self.visible[rows, :width, :width],
            wanted_N=None if self.wanted_N is None else self.wanted_N[held_N],
            reward_N=None if self.reward_N is None else self.reward_N[held_N],
        )


def spell(renderer: Renderer, inventory: Inventory, asked: Sequence[Message]) -> list[list[int]]:
    """The tokens of every option, as they follow a prompt; `asked` is any prompt with the cue that options answer.

    Raises DataError for options that become the same tokens, and for one that the tokenizer writes with other tokens
    after the cue than alone: the model would be read at tokens that it never saw there.
    """
    tokenizer = renderer.tokenizer
    cue = str(tokenizer.apply_chat_template(list(asked), tokenize=False, add_generation_prompt=True))
    before = tokenizer.encode(cue, add_special_tokens=False)
    spelled: list[list[int]] = []
    for option in inventory.options:
        alone = list(tokenizer.encode(option, add_special_tokens=False))
        within = list(tokenizer.encode(cue + option, add_special_tokens=False))
        if not alone or within != [*before, *alone]:
            shown = [tokenizer.decode([token]) for token in within[max(0, len(before) - 1) :]]
            raise DataError(
                f"options: '{option}' alone is {_shown(tokenizer, alone)}, and where it is the answer the text ends "
                f"with {shown}: the model would be read at tokens that it never sees there. Write the options with "
                "other characters, or end the chat template's cue with a line break or a special token."
            )
        if alone in spelled:
            same = inventory.options[spelled.index(alone)]
            raise DataError(
                f"options: '{same}' and '{option}' are the same tokens {_shown(tokenizer, alone)}, so nothing tells "
                "them apart. Write one of them differently."
            )
        spelled.append(alone)
    return spelled


def _shown(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in ids]


def lay_options(asked: Sequence[Options], layout: Layout, *, chosen: Sequence[int] | None = None) -> OptionBatch:
    """Rows that score every option of each state, or of each only the chosen one; options come state by state.

    An empty option is not legal in its state: it is left out. Where options may not branch off one row, those that go
    on from different beginnings have rows of their own.
    """
    rows: list[_Row] = []
    reads: list[tuple[_Row, list[int], int, int]] = []
    for number, options in enumerate(asked):
        legal = [option for option in options.candidates if option]
        assert options.state, "a state has tokens"
        assert legal, "a state that goes on has a legal option"
        picked = legal if chosen is None else [options.candidates[chosen[number]]]
        assert all(picked), "what was chosen must have been legal"
        homes = _homes([option[: len(option) - layout.back - 1] for option in picked], layout.branches)
        own = {home: _Row(len(rows) + place, options.state) for place, home in enumerate(dict.fromkeys(homes))}
        rows += own.values()
        for option, home in zip(picked, homes, strict=True):
            own[home].grow(option[: len(option) - layout.back - 1])
            reads.append((own[home], option, layout.front, len(option) - layout.back))
    return _batch(rows, reads, total=layout.total)


def _homes(fed: Sequence[list[int]], branches: bool) -> list[int]:
    """Which of these paths each lies on: all on one, where they may branch, or else on the first that it begins."""
    if branches:
        return [0] * len(fed)
    lasting = [n for n, path in enumerate(fed) if not any(len(o) > len(path) and o[: len(path)] == path for o in fed)]
    return [next(n for n in lasting if fed[n][: len(path)] == path) for path in fed]


class _Row:
    """A state and what hangs on it: a tree whose nodes are beginnings of options."""

    def __init__(self, number: int, state: list[int]) -> None:
        self.number, self.trunk = number, len(state)
        self.ids, self.positions = list(state), list(range(len(state)))
        self.column: dict[tuple[int, ...], int] = {(): len(state) - 1}
        """Beginning of an option → where its last token stands."""

    def grow(self, path: list[int]) -> None:
        """Add what is not there yet of this beginning."""
        for depth, token in enumerate(path):
            if tuple(path[: depth + 1]) not in self.column:
                self.column[tuple(path[: depth + 1])] = len(self.ids)
                self.ids.append(token)
                self.positions.append(self.trunk + depth)

    @property
    def plain(self) -> bool:
        """Whether every token sees all that is before it."""
        return self.positions == list(range(len(self.ids)))

    def sees_(self, visible_TT: Bool[Tensor, "T T"]) -> None:
        """Have what hangs on the state see the state, what it hangs on and itself, in a mask of plain rows."""
        for path, column in self.column.items():
            if path:
                visible_TT[column] = visible_TT[self.column[path[:-1]]]
                visible_TT[column, column] = True


def _batch(rows: Sequence[_Row], reads: Sequence[tuple[_Row, list[int], int, int]], *, total: bool) -> OptionBatch:
    tokens, lengths = pad([row.ids for row in rows])
    places: dict[tuple[int, int], int] = {}
    found: list[tuple[int, int, int, float]] = []
    for number, (row, option, start, stop) in enumerate(reads):
        for at in range(start, stop):
            where = (row.number, row.column[tuple(option[:at])])
            weight = 1.0 if total else 1 / (stop - start)
            found.append((places.setdefault(where, len(places)), option[at], number, weight))
    row_P, column_P = torch.tensor(list(places)).T
    place, token, option_of, weights = zip(*found, strict=True)
    batch = OptionBatch(
        tokens=tokens,
        lengths=lengths,
        row_P=row_P,
        column_P=column_P,
        place_M=torch.tensor(place),
        token_M=torch.tensor(token),
        option_M=torch.tensor(option_of),
        weight_M=torch.tensor(weights),
        index_N=torch.arange(len(reads)),
        denom=float(len(reads)),
    )
    if all(row.plain for row in rows):
        return batch
    visible = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril().repeat(len(rows), 1, 1)
    for row in rows:
        row.sees_(visible[row.number])
    return replace(batch, positions=pad([row.positions for row in rows])[0], visible=visible)


def _renumbered(
    owner_X: Int[Tensor, "X"], kept: Int[Tensor, "k"], count: int
) -> tuple[Int[Tensor, "x"], Int[Tensor, "x"]]:
    """Which items belong to what is kept of `count` things, and the new number of what each belongs to."""
    new = torch.full((count,), -1)
    new[kept] = torch.arange(len(kept))
    held = (new[owner_X] >= 0).nonzero()[:, 0]
    return held, new[owner_X[held]]
