"""Files, folders and data sets become numbered rows; what cannot be read is named with the line."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from echelon.data.sources import Source, open_tables
from echelon.errors import ConfigError, DataError, EchelonError, MissingExtra


def read(path: Path | str, **changes: Any) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a source, their places without the folder it lies in."""
    folder = str(Path(path).parent)
    tables = open_tables(replace(Source(str(path)), **changes))
    return [(where.replace(f"{folder}/", ""), dict(cells)) for table in tables for where, cells in table.rows]


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


A, B = {"prompt": "a"}, {"prompt": "b"}
EXTENSIONS = "jsonl, json, csv, parquet, arrow"
GIVE = f"Give a file ({EXTENSIONS}), a folder of them, or a hub id."


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"}\n', (1, 2)),
        ('\n  {"prompt": "a"}\r\n\n{"prompt": "b"}', (2, 4)),
        ('\ufeff{"prompt": "a"}\n{"prompt": "b"}', (1, 2)),
        ('[{"prompt": "a"}, {"prompt": "b"}]', (1, 1)),
        ('\ufeff\n[\n  {\n    "prompt": "a"\n  },\n  {"prompt":\n "b"}\n]\n', (3, 6)),
    ],
    ids=["lines", "blank lines", "byte order mark", "array", "array over lines"],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_json_is_read_as_lines_or_as_an_array(text: str, lines: tuple[int, int], name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read(tmp_path / name) == [(f"{name}:{lines[0]}", A), (f"{name}:{lines[1]}", B)]


def test_only_line_feeds_end_a_line_of_json(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "one\u2028two\x85three"}\n{"prompt": "b"}\n', encoding="utf-8")
    assert read(tmp_path / "x.jsonl") == [("x.jsonl:1", {"prompt": "one\u2028two\x85three"}), ("x.jsonl:2", B)]


@pytest.mark.parametrize("text", ["", "\n \n", "[]", " [ \n ] \n"])
def test_a_file_may_hold_no_row(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    assert read(tmp_path / "x.json") == []


def test_rows_are_read_as_they_are_taken(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "a"}\nnot JSON\n')
    (table,) = open_tables(Source(str(tmp_path / "x.jsonl")))
    assert next(table.rows)[1] == A
    with pytest.raises(DataError, match=r"x\.jsonl:2: not JSON"):
        next(table.rows)


PER_LINE = "Write one object per line, or an array of objects."
TORN = [
    (b'{"prompt": "a"}\n{"prompt":\n', f"2: not JSON: Expecting value at column 11. {PER_LINE}"),
    (
        b'{\n  "prompt": "a"\n}\n',
        f"1: not JSON: Expecting property name enclosed in double quotes at column 2. {PER_LINE}",
    ),
    (b'{"prompt": "a"}{"prompt": "b"}\n', f"1: not JSON: Extra data at column 16. {PER_LINE}"),
    (b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "2: not UTF-8 (byte 13 of the line). Save the file as UTF-8."),
    ('{"prompt": "a"}'.encode("utf-16"), "1: not UTF-8 (byte 1 of the line). Save the file as UTF-8."),
    (b'"a"\n', "1: a row is an object with columns, not 'a'. Write {\"prompt\": …, …}."),
    (b"[1]", '1: a row is an object with columns, not 1. Write {"prompt": …, …}.'),
    (b'[{"prompt": "a"},\n{"prompt" "b"}]', f"2: not JSON: Expecting ':' delimiter at column 11. {PER_LINE}"),
    (b'[{"prompt": "a"},\n]', f"2: not JSON: Expecting value at column 1. {PER_LINE}"),
    (
        b'[{"prompt": "a"}\n{"prompt": "b"}]',
        "2: not JSON: the array is not closed. Put commas between rows and ] at the end.",
    ),
    (b'[{"prompt": "a"}\n', "1: not JSON: the array is not closed. Put commas between rows and ] at the end."),
    (b'[{"prompt": "a"}]\n[]', "2: not JSON: something follows the array. Write one array, or no array at all."),
]


@pytest.mark.parametrize(("content", "message"), TORN)
def test_json_that_cannot_be_read_is_named_with_its_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError) as error:
        read(tmp_path / "x.json")
    assert str(error.value) == f"{tmp_path}/x.json:{message}"


def test_nesting_without_end_is_an_error_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": ' + "[" * 200_000)
    with pytest.raises(DataError, match=r"x\.jsonl:1: not JSON: "):
        read(tmp_path / "x.jsonl")


def test_csv_is_text_that_nobody_guesses_at(tmp_path: Path) -> None:
    text = '\ufeffprompt,answer\n"two\nlines, and ""quotes""",007\n\nb,NA\n'
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    assert read(tmp_path / "x.csv") == [
        ("x.csv:2", {"prompt": 'two\nlines, and "quotes"', "answer": "007"}),
        ("x.csv:5", {"prompt": "b", "answer": "NA"}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,a\n1,2\n", "1: the header names a column twice (a, a). Rename one."),
        (
            "a,b\n1,2\n\n1,2,3\n",
            "4: 3 cells under a header of 2 columns. Put quotes around text with commas or line breaks.",
        ),
        ("a,b\n1\n", "2: 1 cells under a header of 2 columns. Put quotes around text with commas or line breaks."),
        (
            'a\n"b\n',
            "2: not CSV: unexpected end of data. Put quotes around text, and double the quotes in it.",
        ),
    ],
)
def test_csv_that_cannot_be_read_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError) as error:
        read(tmp_path / "x.csv")
    assert str(error.value) == f"{tmp_path}/x.csv:{message}"


def test_a_very_long_cell_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f"prompt\n{'x' * 200_000}\n")
    assert len(read(tmp_path / "x.csv")[0][1]["prompt"]) == 200_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The layout data/{finetune,reward,evaluation,rl}."""
    data = tmp_path / "data"
    write(data / "finetune/one.jsonl", A)
    write(data / "finetune/two.json", B)
    write(data / "finetune/.hidden.jsonl", "no row")
    write(data / "finetune/dataset_info.json", "no row")
    (data / "finetune/notes.txt").write_text("no row")
    write(data / "reward/train.jsonl", A)
    write(data / "reward/test.jsonl", B)
    write(data / "reward/all.jsonl", A, B)
    write(data / "evaluation/train-00000-of-00002.jsonl", A)
    write(data / "evaluation/train-00001-of-00002.jsonl", B)
    write(data / "evaluation/validation/x.jsonl", B)
    write(data / "rl/gsm8k-test.jsonl", B)
    write(data / "rl/train_gen.jsonl", A)
    write(data / "rl/heldout.jsonl", B)
    return data


@pytest.mark.parametrize("subset", ["finetune", "data/finetune"])
def test_the_files_of_a_folder_are_read_together_in_order(subset: str, folder: Path) -> None:
    assert [where for where, _ in read(folder, subset=subset)] == [
        f"data/finetune/{place}" for place in ("one.jsonl:1", "two.json:1")
    ]
    assert read(folder / "finetune") == [("finetune/one.jsonl:1", A), ("finetune/two.json:1", B)]


@pytest.mark.parametrize(
    ("subset", "split", "files"),
    [
        ("reward", "train", ["train.jsonl"]),
        ("reward", "test", ["test.jsonl"]),
        ("evaluation", "train", ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]),
        ("evaluation", "validation", ["validation/x.jsonl"]),
        ("evaluation", "val", ["validation/x.jsonl"]),
        ("rl", "test", ["gsm8k-test.jsonl"]),
        ("rl", "train_gen", ["train_gen.jsonl"]),
        ("rl", "train", ["train_gen.jsonl"]),
        ("rl", "heldout", ["heldout.jsonl"]),
    ],
)
def test_a_split_is_the_files_or_the_folder_named_after_it(
    subset: str, split: str, files: list[str], folder: Path
) -> None:
    places = [where for where, _ in read(folder, subset=subset, split=split)]
    assert places == [f"data/{subset}/{file}:1" for file in files]


WRONG_FOLDERS: list[tuple[dict[str, str], str]] = [
    (
        {},
        "data: there is no data file in this folder "
        f"({EXTENSIONS}). It has the folders evaluation, finetune, reward, rl: choose one with data.subset.",
    ),
    (
        {"subset": "fintune"},
        "data.subset = fintune: there is no such folder in data, which has evaluation, finetune, reward, rl. Did you "
        "mean 'finetune'?",
    ),
    ({"subset": "reward", "split": "dev"}, "data.split = dev: data/reward has test, train."),
    ({"subset": "finetune", "split": "test"}, "data.split = test: data/finetune has train."),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_FOLDERS)
def test_an_unknown_split_or_subset_lists_those_there_are(
    changes: dict[str, str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(DataError) as error:
        read("data", **changes)
    assert str(error.value) == message


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no data file in this folder \(.*\)\. Put one there\."):
        read(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "nothing.jsonl",
            f"data.path = nothing.jsonl: there is no such file. {GIVE}",
        ),
        (
            "prompts.json",
            f"data.path = prompts.json: there is no such file. Did you mean 'prompts.jsonl'? {GIVE}",
        ),
        (
            "./a/b/c",
            f"data.path = ./a/b/c: there is no such file. {GIVE}",
        ),
        ("notes.txt", f"notes.txt: files ending in '.txt' are not read. Give one of {EXTENSIONS}."),
    ],
)
def test_a_path_that_leads_nowhere_is_named(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "prompts.jsonl", A)
    write(tmp_path / "notes.txt", "text")
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("path", "before"),
    [
        ("x.parquet", ""),
        ("owner/name", "data.path = owner/name: there is no such file. To look for it on the hub: "),
        ("promts", "data.path = promts: there is no such file. Did you mean 'prompts'? To look for it on the hub: "),
    ],
)
def test_what_needs_the_extra_says_how_to_install_it(
    path: str, before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.parquet").touch()
    (tmp_path / "prompts").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra) as error:
        read(path)
    assert str(error.value) == f"{before}datasets is not installed. Run: pip install 'echelon[data]'"


def test_json_and_csv_need_no_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "x.csv").write_text("prompt\na\n")
    assert [cells for _, cells in read(write(tmp_path / "x.jsonl", A)) + read(tmp_path / "x.csv")] == [A, A]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in every form that `datasets` writes, and a copy of a data set of the hub."""
    datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("stored")
    train, test = dataset(A, B), dataset(B)
    train.to_parquet(folder / "x.parquet")
    train.save_to_disk(folder / "one")
    datasets.DatasetDict(train=train, test_prefs=test).save_to_disk(folder / "several")
    (folder / "one/data-00000-of-00001.arrow").rename(folder / "x.arrow")
    train.save_to_disk(folder / "one")
    hub = folder / "hub"
    (hub / "data").mkdir(parents=True)
    train.to_parquet(hub / "data/train_prefs-00000-of-00001.parquet")
    test.to_parquet(hub / "data/test_prefs-00000-of-00001.parquet")
    (hub / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: prefs\n  data_files:\n  - split: train_prefs\n"
        "    path: data/train_prefs-*\n  - split: test_prefs\n    path: data/test_prefs-*\n"
        "- config_name: other\n  data_files: data/train_prefs-*\n---\n# A data set\n"
    )
    (folder / "broken.parquet").write_bytes(b"nonsense" * 9)
    (folder / "broken.arrow").write_bytes(b"nonsense" * 9)
    train.to_parquet(folder / "torn.parquet")
    torn = bytearray((folder / "torn.parquet").read_bytes())
    torn[4:60] = b"\0" * 56
    (folder / "torn.parquet").write_bytes(torn)
    return folder


def dataset(*rows: dict[str, str]) -> Any:
    import datasets

    return datasets.Dataset.from_list(list(rows))


@pytest.fixture
def here(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within that folder, with a cache of its own."""
    import datasets

    monkeypatch.chdir(stored)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("path", "changes", "place"),
    [
        ("x.parquet", {}, "x.parquet"),
        ("x.arrow", {}, "x.arrow"),
        ("one", {}, "one [train]"),
        ("several", {}, "several [train]"),
        ("hub", {"subset": "prefs", "split": "train_prefs"}, "hub [train_prefs]"),
        ("hub", {"subset": "prefs", "split": "train_prefs", "streaming": True}, "hub [train_prefs]"),
        ("hub/data", {"split": "train_prefs"}, "data/train_prefs-00000-of-00001.parquet"),
    ],
)
def test_what_datasets_wrote_is_read_through_it(path: str, changes: dict[str, Any], place: str) -> None:
    assert read(path, **changes) == [(f"{place}, row 1", A), (f"{place}, row 2", B)]


@pytest.mark.usefixtures("here")
def test_a_part_of_a_split_may_be_asked_for() -> None:
    assert read("hub", subset="prefs", split="train_prefs[1:]") == [("hub [train_prefs[1:]], row 1", B)]
    assert read("several", split="test_prefs") == [("several [test_prefs], row 1", B)]


WRONG: list[tuple[str, dict[str, str], type[EchelonError], str]] = [
    ("several", {"split": "test"}, DataError, "data.split = test: several has train, test_prefs."),
    ("one", {"split": "test"}, DataError, "data.split = test: one has train."),
    (
        "hub",
        {"subset": "prefs"},
        DataError,
        "data.split = train: hub has train_prefs, test_prefs. Did you mean 'train_prefs'?",
    ),
    ("hub", {"subset": "pref"}, ConfigError, "data.subset = pref: hub has prefs, other. Did you mean 'prefs'?"),
    ("hub", {}, ConfigError, "data.subset is missing: hub has prefs, other."),
    ("broken.parquet", {}, DataError, "broken.parquet: could not be read: Parquet magic bytes not found in footer. …"),
    ("broken.arrow", {}, DataError, "broken.arrow: could not be read: Not an Arrow file"),
    ("torn.parquet", {}, DataError, "torn.parquet, row 1: could not be read: …"),
    ("nobody/nothing", {}, DataError, "data.path = nobody/nothing: there is no such file, and the hub gave no data …"),
]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("path", "changes", "kind", "message"), WRONG)
def test_what_datasets_cannot_read_is_one_line(
    path: str, changes: dict[str, str], kind: type[EchelonError], message: str
) -> None:
    """And `datasets` logs no second one. `…` at the end of a message stands for any end of the line."""
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[method-assign]
    logging.getLogger("datasets").addHandler(handler)
    with pytest.raises(kind) as error:
        read(path, **changes)
    logging.getLogger("datasets").removeHandler(handler)
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith(message[:-1]) if message.endswith("…") else said == message
    assert logged == []


def test_what_reads_files_brings_no_tensors() -> None:
    words: Sequence[str] = (sys.executable, "-c", "import sys, echelon.data.datasets; sys.exit('torch' in sys.modules)")
    assert subprocess.run(words, check=False).returncode == 0
