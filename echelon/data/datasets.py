"""Rows to learn from and rows held out: read, checked, mixed, capped, and split so that every rerun gets the same ones.

What a row means is for `schemas`, where it comes from for `sources`; this knows neither, and no tokens and no models.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any, Generic, Literal, TypeVar, overload

from echelon.config import DataConfig
from echelon.data.schemas import Preference, Prompt, Row, Schema, Sft, find_layout, identity, kinship, read_row
from echelon.data.sources import Source, Table, open_tables
from echelon.errors import ConfigError, DataError
from echelon.seeds import derive_seed

__all__ = ["Kind", "Preference", "Prompt", "Row", "Schema", "Sft", "Split", "load_kind", "load_rows", "mix", "share"]

AnyRow = TypeVar("AnyRow")


@dataclass(frozen=True, slots=True)
class Split(Generic[AnyRow]):
    """The two sides of a data set. No row is on both."""

    train: list[AnyRow]
    held_out: list[AnyRow]


@dataclass(frozen=True, slots=True)
class Kind(Generic[AnyRow]):
    """Rows of one kind: how they are read from a source, and what tells them apart."""

    read: Callable[[Source], Iterator[AnyRow]]
    identity: Callable[[AnyRow], list[Any]]
    """What makes two rows the same one: it is not learned from where it is held out."""
    kinship: Callable[[AnyRow], list[Any]]
    """What keeps rows on one side of a split."""


@overload
def load_rows(data: DataConfig, schema: Literal["sft"], *, seed: int, name: str = "data") -> Split[Sft]: ...
@overload
def load_rows(
    data: DataConfig, schema: Literal["preference"], *, seed: int, name: str = "data"
) -> Split[Preference]: ...
@overload
def load_rows(data: DataConfig, schema: Literal["prompt"], *, seed: int, name: str = "data") -> Split[Prompt]: ...
def load_rows(data: DataConfig, schema: Schema, *, seed: int, name: str = "data") -> Split[Any]:
    """Read, check, split, mix and cap. `held_out` is empty unless the settings say what is held out.

    The seed decides only what a mixture or a stream draws; which rows are held out, or kept by a cap, is decided by
    what they say. `name` is the block of settings that complaints speak of. Raises DataError for the first row that is
    broken, ConfigError for settings that cannot work together, MissingExtra where `datasets` is needed.
    """
    kind: Kind[Any] = Kind(partial(_read, schema=schema), identity, kinship)
    return load_kind(data, kind, seed=seed, name=name)


def load_kind(data: DataConfig, kind: Kind[AnyRow], *, seed: int, name: str = "data") -> Split[AnyRow]:
    """What `load_rows` does, for rows of any kind."""
    sources = [_source(path, data, name) for path in data.path]
    _check(data, sources, name)
    explicit, leaked = _held_out(data, kind, name), 0
    known = {_digest(kind.identity(row)) for row in explicit}
    aside: list[AnyRow] = []

    def trains(row: AnyRow) -> bool:
        nonlocal leaked
        if data.eval_fraction and _share(kind.kinship(row)) < data.eval_fraction:
            aside.append(row)
            return False
        leak = bool(known) and _digest(kind.identity(row)) in known
        leaked += leak
        return not leak

    train = list(_draw([filter(trains, kind.read(source)) for source in sources], data, kind, seed))
    if leaked:
        print(f"{name}: {leaked} rows are also held out, so they are left out of training.", file=sys.stderr)
    held_out = _cap(explicit or aside, data.eval_limit, kind)
    _check_sides(data, train, held_out, name)
    return Split(train, held_out)


def share(row: Row) -> float:
    """Where a row stands between 0 and 1, by a hash of what it answers: below `eval_fraction` it is held out.

    It depends on nothing else, so a row never changes sides, and whatever answers the same prompt is on the same side:
    in conversations, comparisons and prompts alike, so that no stage learns from what a later one is tested on.
    """
    return _share(kinship(row))


def _share(kinship: list[Any]) -> float:
    return int.from_bytes(_digest(kinship)) / 2**64


def mix(sources: Sequence[Iterable[AnyRow]], weights: Sequence[float], seed: int) -> Iterator[AnyRow]:
    """Rows of several sources, each drawn from source i with probability weights[i] / sum(weights).

    Ends when the source that was drawn has no row left, so no row comes twice and the proportions hold to the end.
    """
    rng, places = random.Random(seed), [iter(source) for source in sources]
    while True:
        (drawn,) = rng.choices(places, weights)
        try:
            yield next(drawn)
        except StopIteration:
            return


def _draw(sources: Sequence[Iterator[AnyRow]], data: DataConfig, kind: Kind[AnyRow], seed: int) -> Iterable[AnyRow]:
    """The rows to train on, drawn from those of each source."""
    seeds = [derive_seed(seed, "data", number) for number in range(len(sources))]
    if data.streaming:
        streams = [_shuffled(rows, data.shuffle_buffer, seed) for rows, seed in zip(sources, seeds, strict=True)]
        return islice(mix(streams, data.weights or (1.0,), derive_seed(seed, "mixture")), data.limit)
    if not data.weights:
        return _cap(list(chain.from_iterable(sources)), data.limit, kind)
    wholes = [list(rows) for rows in sources]
    for rows, own in zip(wholes, seeds, strict=True):
        random.Random(own).shuffle(rows)
    return islice(mix(wholes, data.weights, derive_seed(seed, "mixture")), data.limit or None)


def _shuffled(rows: Iterator[AnyRow], buffer: int, seed: int) -> Iterator[AnyRow]:
    """A stream, each row drawn from the next `buffer` ones; all of it comes, once."""
    rng, waiting = random.Random(seed), list(islice(rows, buffer))
    for row in rows:
        place = rng.randrange(buffer)
        yield waiting[place]
        waiting[place] = row
    rng.shuffle(waiting)
    yield from waiting


def _cap(rows: list[AnyRow], limit: int, kind: Kind[AnyRow]) -> list[AnyRow]:
    """At most `limit` rows, chosen by a hash of what they say, in the order they came; 0 keeps all."""
    if not limit or len(rows) <= limit:
        return rows
    ranks = sorted(range(len(rows)), key=lambda place: (_digest(kind.identity(rows[place])), place))
    return [rows[place] for place in sorted(ranks[:limit])]


def _source(path: str, data: DataConfig, name: str) -> Source:
    settings = {f"{setting}_setting": f"{name}.{setting}" for setting in ("path", "split", "subset")}
    return Source(path, data.split, data.subset, data.streaming, **settings)


def _held_out(data: DataConfig, kind: Kind[AnyRow], name: str) -> list[AnyRow]:
    """The rows of eval_path or eval_split; a stream is cut where eval_limit says."""
    if not (data.eval_path or data.eval_split):
        return []
    found: list[AnyRow] = []
    for path in data.eval_path or data.path:
        source = _source(path, data, name)
        if path not in data.path:  # the subset is one of `path`; what else is held out is named in full
            source = replace(source, subset="", path_setting=f"{name}.eval_path")
        if data.eval_split:
            source = replace(source, split=data.eval_split, split_setting=f"{name}.eval_split")
        found.extend(islice(kind.read(source), data.eval_limit if data.streaming and data.eval_limit else None))
    return found


def _read(source: Source, schema: Schema) -> Iterator[Row]:
    """The rows of one source. Its tables must have the same layout, since a folder with others is rarely meant."""
    first: tuple[str, tuple[str, ...]] | None = None
    opened = []
    for table in open_tables(source):
        (where, cells), rows = _peek(table)
        layout = find_layout(cells, schema, where)
        first = first or (table.name, layout)
        if layout != first[1]:
            raise DataError(
                f"{first[0]} has {' + '.join(first[1])} and {table.name} has {' + '.join(layout)}: files of one folder "
                f"hold rows of one form. Move one away, or list the files in {source.path_setting}."
            )
        opened.append((layout, rows))
    return (read_row(cells, layout, schema, where) for layout, rows in opened for where, cells in rows)


def _peek(table: Table) -> tuple[tuple[str, Any], Iterator[tuple[str, Any]]]:
    """The first row of a table, and all of them."""
    for row in table.rows:
        return row, chain([row], table.rows)
    raise DataError(f"{table.name} holds no row. Put one JSON object on each line, or rows under a header.")


def _digest(said: list[Any]) -> bytes:
    """Eight bytes that depend on what is said alone: the same on every machine and in every version of Python."""
    text = json.dumps(said, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _check(data: DataConfig, sources: Sequence[Source], name: str) -> None:
    files = [source.path for source in sources if source.is_file]
    if not sources:
        raise ConfigError(f"{name}.path is missing: nothing says what to read. Give a file, a folder or a hub id.")
    if data.subset and len(files) == len(sources):
        raise ConfigError(
            f"{name}.subset = {data.subset}: a file has no subsets. Give a folder or a hub id, or no subset."
        )
    if data.split != "train" and len(files) == len(sources):
        raise ConfigError(
            f"{name}.split = {data.split}: {files[0]} is one file, without splits. Leave it out, or give a folder or a "
            "hub id."
        )
    if data.eval_split and not data.eval_path and files:
        raise ConfigError(
            f"{name}.eval_split = {data.eval_split}: {files[0]} is one file, without splits. Give eval_path or "
            "eval_fraction instead."
        )
    if data.streaming and len(data.path) > 1 and not data.weights:
        raise ConfigError(
            f"{name}.weights is missing: how long a stream is cannot be known, so nothing says how much of each of the "
            f"{len(data.path)} sources to take. Give a weight for each."
        )


def _check_sides(data: DataConfig, train: Sequence[Any], held_out: Sequence[Any], name: str) -> None:
    if not train:
        raise DataError(
            f"{name}.path = {', '.join(data.path)}: every row is held out, so none is left to learn from. Give other "
            "rows to hold out, or fewer."
        )
    if data.eval_fraction and not held_out:
        raise DataError(
            f"{name}.eval_fraction = {data.eval_fraction}: none of {len(train)} rows is held out, since few differ in "
            "what they answer. Raise it, or give eval_path."
        )
