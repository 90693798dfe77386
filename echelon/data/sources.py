"""Where rows come from: a file, a folder or a hub id in; tables of cells out, each row with the place it stands at.

JSON lines, JSON and CSV are read by the standard library; everything else through `datasets`. Knows no schema: what the
columns mean is for `schemas`.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from echelon.errors import ConfigError, DataError, MissingExtra, did_you_mean, need

Cells = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """What to read, and the names of the settings that said so: complaints speak of them."""

    path: str
    split: str = "train"
    subset: str = ""
    streaming: bool = False
    path_setting: str = "data.path"
    split_setting: str = "data.split"
    subset_setting: str = "data.subset"

    @property
    def is_file(self) -> bool:
        """Whether it is a single file, which has neither splits nor subsets."""
        return self.place.is_file()

    @property
    def place(self) -> Path:
        """Where it would lie on this machine."""
        return Path(self.path).expanduser()


@dataclass(frozen=True, slots=True)
class Table:
    """Rows that belong together: one file, or one split of a data set."""

    name: str
    rows: Iterator[tuple[str, Cells]]
    """Of each row the place, `file:line` or `file, row number`, and its cells by column."""


def open_tables(source: Source) -> list[Table]:
    """The tables of one source; rows are read as they are taken.

    Raises DataError for what cannot be found or read, with the splits and subsets there are, and MissingExtra where
    `datasets` is needed and not installed.
    """
    if source.is_file:
        return [_open_file(source.place)]
    if source.place.is_dir():
        return _open_folder(source)
    absent = f"{source.path_setting} = {source.path}: there is no such file.{_neighbour(source.place)}"
    if source.place.suffix.lower() in _READERS or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source.path):
        raise DataError(f"{absent} Give a file ({EXTENSIONS}), a folder of them, or a hub id.")
    try:
        need("datasets", "data")
    except MissingExtra as error:
        raise MissingExtra(f"{absent} To look for it on the hub: {error}") from error
    return [_open_dataset(source)]


def _neighbour(path: Path) -> str:
    """What may have been meant: a file or folder with nearly this name."""
    there = {other.stem: other for other in path.parent.iterdir()} if path.parent.is_dir() else {}
    meant = difflib.get_close_matches(path.stem, there, n=1)
    return f" Did you mean '{there[meant[0]]}'?" if meant else ""


def _open_file(path: Path) -> Table:
    extension = path.suffix.lower()
    if extension not in _READERS:
        raise DataError(f"{path}: files ending in '{extension}' are not read. Give one of {EXTENSIONS}.")
    return Table(str(path), _READERS[extension](path))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends. Only line feeds separate them: JSON text may hold other separators."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line). Save the file as UTF-8."
                    ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def _json(path: Path) -> Iterator[tuple[str, Cells]]:
    """One object per line, or an array of objects: whichever it begins with, whatever the file is called."""
    lines = ((number, line) for number, line in _lines(path) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        yield from _json_array(path, "\n".join(line for _, line in _lines(path)))
        return
    for number, line in chain([first], lines):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _not_json(error, path, number) from error
        yield _cells(value, path, number)


def _json_array(path: Path, text: str) -> Iterator[tuple[str, Cells]]:
    """The objects of an array, each with the line it begins at."""
    if re.fullmatch(r"\s*\[\s*\]\s*", text):
        return
    decoder, white = json.JSONDecoder(), re.compile(r"[ \t\n\r]*")
    at, line, counted = text.index("["), 1, 0

    def skip(at: int) -> int:
        """The next place that is not white space; `line` becomes that of this place."""
        nonlocal line, counted
        at = white.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        return at

    while text[at] != "]":
        at = skip(at + 1)
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _not_json(error, path, line) from error
        yield _cells(value, path, line)
        at = skip(end)
        if text[at : at + 1] not in (",", "]"):
            raise DataError(
                f"{path}:{line}: not JSON: the array is not closed. Put commas between rows and ] at the end."
            )
    if skip(at + 1) < len(text):
        raise DataError(f"{path}:{line}: not JSON: something follows the array. Write one array, or no array at all.")


def _not_json(error: Exception, path: Path, line: int) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        why, line = f"{error.msg} at column {error.colno}", max(line, error.lineno)
    else:
        why = str(error)
    return DataError(f"{path}:{line}: not JSON: {why}. Write one object per line, or an array of objects.")


def _cells(value: Any, path: Path, line: int) -> tuple[str, Cells]:
    where = f"{path}:{line}"
    if not isinstance(value, dict):
        raise DataError(f'{where}: a row is an object with columns, not {value!r:.40}. Write {{"prompt": …, …}}.')
    return where, value


def _csv(path: Path) -> Iterator[tuple[str, Cells]]:
    """Rows under a header. Everything is text: no guess turns an answer of 007, NA or 1e5 into something else."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line + "\n" for _, line in _lines(path)), strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = cells
                if len(set(header)) < len(header):
                    raise DataError(f"{where}: the header names a column twice ({', '.join(header)}). Rename one.")
            elif len(cells) != len(header):
                raise DataError(
                    f"{where}: {len(cells)} cells under a header of {len(header)} columns. Put quotes around text with "
                    "commas or line breaks."
                )
            else:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: not CSV: {error}. Put quotes around text, and double the quotes in it."
        ) from error


def _packaged(builder: str) -> Callable[[Path], Iterator[tuple[str, Cells]]]:
    """A reader of one file through `datasets`, which streams it: nothing is copied into a cache."""

    def read(path: Path) -> Iterator[tuple[str, Cells]]:
        datasets = need("datasets", "data")
        with _explained(str(path)):
            rows = datasets.load_dataset(builder, data_files=[str(path.resolve())], split="train", streaming=True)
        return _numbered(rows, str(path))

    return read


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Cells]]]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _packaged("parquet"),
    ".arrow": _packaged("arrow"),
}
EXTENSIONS = ", ".join(extension[1:] for extension in _READERS)
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_FOLDERS = {"train", "validation", "test"}
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def _open_folder(source: Source) -> list[Table]:
    """The files of one split of a folder, a folder written by `save_to_disk`, or a copy of a hub data set."""
    if _declares_configurations(source.place):
        return [_open_dataset(source)]
    folder = _inside(source)
    if any((folder / state).is_file() for state in ("dataset_dict.json", "state.json")):
        return [_open_saved(folder, source)]
    return [_open_file(file) for file in _files_of_split(folder, source)]


def _inside(source: Source) -> Path:
    """The folder a subset names: inside the source, or beginning with the source's own name (data + data/finetune)."""
    if not source.subset:
        return source.place
    places, subset = [source.place / source.subset], Path(source.subset)
    if subset.parts[0] == source.place.resolve().name:
        places.append(source.place.joinpath(*subset.parts[1:]))
    for place in places:
        if place.is_dir():
            return place
    there = _folders(source.place)
    raise DataError(
        f"{source.subset_setting} = {source.subset}: there is no such folder in {source.path}, which has "
        f"{', '.join(there) or 'none'}.{did_you_mean(subset.name, there)}"
    )


def _folders(path: Path) -> list[str]:
    return sorted(folder.name for folder in path.iterdir() if folder.is_dir() and folder.name[0] not in "._")


def _data_files(path: Path) -> list[Path]:
    files = (file for file in sorted(path.iterdir()) if file.is_file() and file.name[0] not in "._")
    return [file for file in files if file.suffix.lower() in _READERS and file.name not in _NOT_ROWS]


def _files_of_split(path: Path, source: Source) -> list[Path]:
    """The files named after the split, or in a folder named after it; all are `train` where nothing names a split."""
    files = _data_files(path)
    named = [(re.sub(r"-\d+-of-\d+$", "", file.stem), [file]) for file in files]
    inner = {source.split, *_FOLDERS}.intersection(_folders(path))
    named += [(folder, _data_files(path / folder)) for folder in sorted(inner)]
    splits: dict[str, list[Path]] = {}
    for label, members in named:
        words = [_SPLIT_WORDS[word] for word in re.split(r"[-_. ]", label.lower()) if word in _SPLIT_WORDS]
        for key in {label, *words[:1]} if members and (words or label == source.split) else ():
            splits[key] = [*splits.get(key, []), *members]
    if not splits and files:
        splits["train"] = files
    for key in (source.split, _SPLIT_WORDS.get(source.split, "")):
        if key in splits:
            return splits[key]
    if splits:
        raise DataError(f"{source.split_setting} = {source.split}: {path} has {', '.join(sorted(splits))}.")
    there = ", ".join(_folders(path))
    hint = f"It has the folders {there}: choose one with {source.subset_setting}." if there else "Put one there."
    raise DataError(f"{path}: there is no data file in this folder ({EXTENSIONS}). {hint}")


def _declares_configurations(path: Path) -> bool:
    """Whether a folder says itself which files make which split, as data sets on the hub do in their README."""
    readme = path / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    head = text.split("---")[1] if text.startswith("---") else ""
    return any(line.startswith("configs:") for line in head.splitlines())


def _open_saved(path: Path, source: Source) -> Table:
    """A folder written by `save_to_disk`."""
    datasets = need("datasets", "data")
    with _explained(str(path)):
        rows = datasets.load_from_disk(str(path))
    splits = rows if isinstance(rows, dict) else {str(rows.split or "train"): rows}
    if source.split not in splits:
        raise DataError(f"{source.split_setting} = {source.split}: {path} has {', '.join(splits)}.")
    return Table(str(path), _numbered(splits[source.split], f"{path} [{source.split}]"))


def _open_dataset(source: Source) -> Table:
    """A data set of the hub, or a folder that is laid out like one. A subset with a slash is a folder inside it."""
    datasets = need("datasets", "data")
    subset = {"data_dir": source.subset} if "/" in source.subset else {"name": source.subset or None}
    try:
        with _quiet(datasets):
            rows = datasets.load_dataset(source.path, split=source.split, streaming=source.streaming, **subset)
    except Exception as error:
        raise _not_loaded(source, error) from error
    return Table(source.path, _numbered(rows, f"{source.path} [{source.split}]"))


def _not_loaded(source: Source, error: Exception) -> Exception:
    """Why a data set could not be loaded, with the subsets or splits it has if that is the reason."""
    path, split, subset = source.path, source.split, source.subset
    if isinstance(error, ConnectionError | FileNotFoundError) and not source.place.exists():
        return DataError(
            f"{source.path_setting} = {path}: there is no such file, and the hub gave no data set of this name "
            f"({_first_line(error)}). Check the name and the connection.{_neighbour(source.place)}"
        )
    datasets = need("datasets", "data")
    with contextlib.suppress(Exception), _quiet(datasets):
        subsets = datasets.get_dataset_config_names(path)
        if "/" not in subset and (subset not in subsets if subset else len(subsets) > 1 and "default" not in subsets):
            problem = f"{source.subset_setting} = {subset}" if subset else f"{source.subset_setting} is missing"
            return ConfigError(f"{problem}: {path} has {', '.join(subsets)}.{did_you_mean(subset, subsets)}")
        splits = datasets.get_dataset_split_names(path, subset if subset in subsets else None)
        if re.split(r"[\[+]", split)[0] not in splits:
            hint = did_you_mean(split, splits)
            return DataError(f"{source.split_setting} = {split}: {path} has {', '.join(splits)}.{hint}")
    return DataError(f"{path}: could not be loaded: {_first_line(error)}")


def _numbered(rows: Iterable[Cells], name: str) -> Iterator[tuple[str, Cells]]:
    """Rows with their numbers, from 1."""
    found = iter(rows)
    number = 0
    while True:
        number += 1
        with _explained(f"{name}, row {number}"):
            try:
                cells = next(found)
            except StopIteration:
                return
        yield f"{name}, row {number}", cells


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """What a file makes `datasets` raise, as one line."""
    try:
        with _quiet(need("datasets", "data")):
            yield
    except Exception as error:
        raise DataError(f"{where}: could not be read: {_first_line(error)}") from error


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without the log lines of `datasets`, which repeat what it raises."""
    logging = datasets.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _first_line(error: BaseException) -> str:
    """The innermost reason, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
