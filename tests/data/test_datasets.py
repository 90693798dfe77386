"""Which rows are learned from and which are held out: the same ones in every rerun, and none on both sides."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from echelon.config import DataConfig
from echelon.data.datasets import Preference, Prompt, Row, Schema, Sft, Split, load_rows, mix, share
from echelon.errors import ConfigError, DataError
from echelon.types import Message

SHARED = Path(__file__).parents[3] / "shared" / "data"


def write(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(path: Path, rows: range) -> str:
    return write(path, *({"prompt": f"{number}"} for number in rows))


def load(*paths: str, schema: Schema = "prompt", seed: int = 0, **settings: Any) -> Split[Any]:
    return load_rows(DataConfig(path=paths, **settings), schema, seed=seed)


def asked(rows: list[Any]) -> list[str]:
    return [row.messages[0]["content"] for row in rows]


def prompt(content: str) -> list[Message]:
    return [Message(role="user", content=content)]


def answer(content: str) -> list[Message]:
    return [Message(role="assistant", content=content)]


@pytest.fixture
def hundred(tmp_path: Path) -> str:
    return numbered(tmp_path / "hundred.jsonl", range(100))


def test_without_settings_every_row_is_learned_from_in_order(hundred: str) -> None:
    rows = load(hundred)
    assert asked(rows.train) == [str(number) for number in range(100)]
    assert rows.held_out == []


def test_the_three_schemas_of_one_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"prompt": "Hello", "chosen": "Hi", "rejected": "No", "margin": 2})
    assert load(path, schema="sft").train == [Sft([*prompt("Hello"), *answer("Hi")])]
    assert load(path, schema="preference").train == [Preference(prompt("Hello"), answer("Hi"), answer("No"), 2.0)]
    columns = {"chosen": "Hi", "rejected": "No", "margin": 2}
    assert load(path, schema="prompt").train == [Prompt(prompt("Hello"), columns)]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(st.lists(texts, min_size=1), st.floats(0, 1), st.floats(0, 1), st.randoms())
def test_the_side_of_a_row_depends_on_nothing_else(
    contents: list[str], one: float, other: float, rng: random.Random
) -> None:
    """Not on the order, the neighbours or the fraction: raising that only moves rows to the held-out side."""
    rows = [Prompt(prompt(content), {"id": number}) for number, content in enumerate(contents)]
    shares = {row.messages[0]["content"]: share(row) for row in rows}
    rng.shuffle(rows)
    assert [share(row) for row in rows] == [shares[row.messages[0]["content"]] for row in rows]
    assert all(0 <= value < 1 for value in shares.values())
    low, high = sorted((one, other))
    assert {name for name, value in shares.items() if value < low} <= {
        name for name, value in shares.items() if value < high
    }


@given(st.lists(st.sampled_from("abcdef"), min_size=6), st.floats(0.05, 0.95))
def test_duplicates_never_end_up_on_both_sides(tmp_path_factory: Any, contents: list[str], fraction: float) -> None:
    path = write(tmp_path_factory.mktemp("x") / "x.jsonl", *({"prompt": content} for content in contents))
    try:
        rows = load(path, eval_fraction=fraction)
    except DataError:  # all rows fell on one side
        assume(False)
    assert not set(asked(rows.train)) & set(asked(rows.held_out))
    assert Counter(asked(rows.train) + asked(rows.held_out)) == Counter(contents)


def test_the_hash_of_a_row_is_the_same_on_every_machine() -> None:
    """By hand: printf '[[{"content":"Hello \\u2014 \\u4f60\\u597d","role":"user"}]]' | b2sum -l 64"""
    row = Prompt(prompt("Hello — 你好"), {"answer": 1})
    assert share(row) == 0x1418626B52DA01BB / 2**64
    code = "from echelon.data.datasets import *; print(share(Prompt([dict(content='Hello — 你好', role='user')])))"
    words = (sys.executable, "-X", "utf8", "-c", code)
    for seed in ("1", "2"):
        printed = subprocess.run(words, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout
        assert float(printed) == share(row)


def test_whatever_answers_a_prompt_is_on_the_side_of_the_prompt() -> None:
    """So nothing that one stage learned from is what a later one is tested on."""
    place = share(Prompt(prompt("Hello")))
    assert share(Preference(prompt("Hello"), answer("Hi"), answer("No"), 1.0)) == place
    assert share(Preference(prompt("Hello"), answer("Hi!"), answer("Hi"))) == place
    assert share(Sft([*prompt("Hello"), *answer("Hi")])) == place
    assert share(Sft([*prompt("Hello"), *answer("Hi"), *prompt("Hello"), *answer("Hi")])) != place


def test_the_part_held_out_is_about_what_was_asked_for(tmp_path: Path) -> None:
    """Ten thousand rows and a quarter: the standard deviation is 43 rows."""
    rows = load(numbered(tmp_path / "x.jsonl", range(10_000)), eval_fraction=0.25)
    assert len(rows.held_out) == pytest.approx(2500, abs=3 * 43)
    assert len(rows.train) + len(rows.held_out) == 10_000


def test_a_new_row_leaves_the_others_where_they_were(tmp_path: Path) -> None:
    before = load(numbered(tmp_path / "x.jsonl", range(200)), eval_fraction=0.3)
    after = load(numbered(tmp_path / "x.jsonl", range(199, -100, -1)), eval_fraction=0.3, seed=7)
    assert set(asked(before.train)) < set(asked(after.train))
    assert set(asked(before.held_out)) < set(asked(after.held_out))


def test_a_cap_takes_the_same_rows_whatever_the_seed_and_more_of_them_when_it_is_raised(hundred: str) -> None:
    ten, other, thirty = (load(hundred, limit=limit, seed=seed) for limit, seed in ((10, 0), (10, 1), (30, 0)))
    assert len(ten.train) == 10
    assert ten == other
    assert set(asked(ten.train)) < set(asked(thirty.train))
    assert asked(thirty.train) == sorted(asked(thirty.train), key=int)
    assert asked(thirty.train) != [str(number) for number in range(30)]
    assert len(load(hundred, limit=1000).train) == 100


def test_a_cap_moves_no_row_to_the_other_side(hundred: str) -> None:
    whole = load(hundred, eval_fraction=0.3)
    capped = load(hundred, eval_fraction=0.3, limit=5, eval_limit=3)
    assert (len(capped.train), len(capped.held_out)) == (5, 3)
    assert set(asked(capped.train)) < set(asked(whole.train))
    assert set(asked(capped.held_out)) < set(asked(whole.held_out))


def test_rows_held_out_may_have_a_file_of_their_own(hundred: str, tmp_path: Path) -> None:
    rows = load(hundred, eval_path=(numbered(tmp_path / "other.jsonl", range(100, 110)),), eval_limit=4)
    assert len(rows.train) == 100
    assert len(rows.held_out) == 4


def test_rows_held_out_may_be_a_split_of_the_folder(tmp_path: Path) -> None:
    numbered(tmp_path / "data/rl/train.jsonl", range(5))
    numbered(tmp_path / "data/rl/test.jsonl", range(5, 8))
    rows = load(str(tmp_path / "data"), subset="data/rl", eval_split="test")
    assert (asked(rows.train), asked(rows.held_out)) == (["0", "1", "2", "3", "4"], ["5", "6", "7"])
    numbered(tmp_path / "data/evaluation/test.jsonl", range(5, 8))
    own = load(str(tmp_path / "data"), subset="rl", eval_path=(str(tmp_path / "data/evaluation"),), eval_split="test")
    assert own == rows


def test_rows_that_are_held_out_too_are_left_out_of_training(
    hundred: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = load(hundred, eval_path=(numbered(tmp_path / "other.jsonl", range(97, 110)),), eval_limit=1)
    assert asked(rows.train) == [str(number) for number in range(97)]
    assert capsys.readouterr().err == "data: 3 rows are also held out, so they are left out of training.\n"


def test_sides_that_differ_by_what_is_said_do_not_leak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.jsonl", {"prompt": "Hello", "chosen": "Hi", "rejected": "No", "id": 1})
    other = write(tmp_path / "other.jsonl", {"prompt": "Hello", "chosen": "Hi", "rejected": "Go", "id": 1})
    same = write(tmp_path / "same.jsonl", {"question": "Hello", "response_j": "Hi", "response_k": "No", "id": 2})
    assert len(load(one, schema="preference", eval_path=(other,)).train) == 1
    assert capsys.readouterr().err == ""
    with pytest.raises(DataError, match="every row is held out"):
        load(one, schema="preference", eval_path=(same,))


sources = st.lists(st.integers(1, 30), min_size=1, max_size=4)


@given(sources, st.data(), st.integers(0, 10))
def test_a_mixture_repeats_nothing_keeps_the_order_and_ends_with_a_source(
    sizes: list[int], data: st.DataObject, seed: int
) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    wholes = [[(source, row) for row in range(size)] for source, size in enumerate(sizes)]
    drawn = list(mix(wholes, weights, seed))
    assert drawn == list(mix(wholes, weights, seed))
    parts = [[row for row in drawn if row[0] == source] for source in range(len(sizes))]
    assert all(part == whole[: len(part)] for part, whole in zip(parts, wholes, strict=True))
    assert any(part == whole for part, whole in zip(parts, wholes, strict=True))


def test_a_mixture_has_the_proportions_asked_for() -> None:
    """Of 8000 draws three quarters come from the first: the standard deviation is 39."""
    drawn = [next_ for next_, _ in zip(mix(["a" * 9000, "b" * 9000], (3, 1), 0), range(8000), strict=False)]
    assert drawn.count("a") == pytest.approx(6000, abs=3 * 39)


def test_a_mixture_of_files_is_shuffled_by_the_seed_and_stops_with_the_first_that_ends(
    hundred: str, tmp_path: Path
) -> None:
    small = numbered(tmp_path / "small.jsonl", range(100, 110))
    rows = asked(load(hundred, small, weights=(0.5, 0.5)).train)
    assert rows == asked(load(hundred, small, weights=(1, 1)).train)
    assert rows != asked(load(hundred, small, weights=(1, 1), seed=1).train)
    assert len(set(rows)) == len(rows) < 40
    assert {row for row in rows if len(row) == 3} == {str(number) for number in range(100, 110)}
    assert [row for row in rows if len(row) < 3] != [str(number) for number in range(len(rows) - 10)]
    assert asked(load(hundred, small, weights=(1, 1), limit=5).train) == rows[:5]


def test_without_weights_sources_follow_each_other(hundred: str, tmp_path: Path) -> None:
    small = numbered(tmp_path / "small.jsonl", range(100, 110))
    assert asked(load(hundred, small).train) == [str(number) for number in range(110)]


def test_a_stream_is_read_no_further_than_it_must(tmp_path: Path) -> None:
    path = Path(numbered(tmp_path / "x.jsonl", range(20)))
    path.write_text(path.read_text() + "not JSON\n")
    rows = asked(load(str(path), streaming=True, limit=10, shuffle_buffer=5).train)
    assert len(set(rows)) == 10
    assert set(rows) < {str(number) for number in range(16)}
    assert rows != sorted(rows, key=int)
    assert rows == asked(load(str(path), streaming=True, limit=10, shuffle_buffer=5).train)
    assert rows != asked(load(str(path), streaming=True, limit=10, shuffle_buffer=5, seed=1).train)
    in_order = load(str(path), streaming=True, limit=10, shuffle_buffer=1).train
    assert asked(in_order) == [str(number) for number in range(10)]


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 5))
def test_a_stream_taken_whole_is_every_row_once(size: int, buffer: int, seed: int) -> None:
    from echelon.data.datasets import _shuffled

    assert sorted(_shuffled(iter(range(size)), buffer, seed)) == list(range(size))


def test_a_stream_may_be_mixed_and_split(hundred: str, tmp_path: Path) -> None:
    other = numbered(tmp_path / "other.jsonl", range(100, 200))
    settings: dict[str, Any] = {"streaming": True, "limit": 30, "weights": (1, 1), "eval_fraction": 0.3}
    rows, whole = load(hundred, other, **settings), load(hundred, other, eval_fraction=0.3)
    assert len(rows.train) == 30
    assert set(asked(rows.train)) < set(asked(whole.train))
    assert set() < set(asked(rows.held_out)) <= set(asked(whole.held_out))
    assert {len(content) == 3 for content in asked(rows.train)} == {True, False}


def test_what_a_stream_holds_out_is_cut_where_it_says(hundred: str, tmp_path: Path) -> None:
    other = numbered(tmp_path / "other.jsonl", range(100, 200))
    rows = load(hundred, streaming=True, limit=3, eval_path=(other,), eval_limit=2)
    assert asked(rows.held_out) == ["100", "101"]


def test_parquet_streams_too(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
    datasets.disable_progress_bars()
    path = tmp_path / "x.parquet"
    datasets.Dataset.from_list([{"question": f"{number}", "answer": number} for number in range(50)]).to_parquet(path)
    whole = load(str(path), eval_fraction=0.2)
    assert len(whole.train) + len(whole.held_out) == 50
    assert whole.train[0].columns == {"answer": int(whole.train[0].messages[0]["content"])}
    part = load(str(path), streaming=True, limit=5, shuffle_buffer=10)
    assert set(asked(part.train)) < {str(number) for number in range(15)}


def wrong(tmp_path: Path) -> list[tuple[tuple[str, ...], dict[str, Any], type[Exception], str]]:
    numbered(tmp_path / "a.jsonl", range(9))
    numbered(tmp_path / "b.jsonl", range(9))
    write(tmp_path / "mixed/a.jsonl", {"prompt": "Hello", "response": "Hi"})
    write(tmp_path / "mixed/b.jsonl", {"messages": [*prompt("Hello"), *answer("Hi")]})
    write(tmp_path / "one.jsonl", {"prompt": "Hello"}, {"prompt": "Hello"})
    (tmp_path / "none.jsonl").write_text("\n")
    write(tmp_path / "torn.jsonl", {"prompt": "Hello"}, {"prompt": None})
    sft = {"schema": "sft"}
    return [
        ((), {}, ConfigError, "data.path is missing: nothing says what to read. Give a file, a folder or a hub id."),
        (
            ("none.jsonl",),
            {},
            DataError,
            "none.jsonl holds no row. Put one JSON object on each line, or rows under a header.",
        ),
        (("torn.jsonl",), {}, DataError, "torn.jsonl:2: 'prompt' is null. Fill it in, or remove the row."),
        (
            ("a.jsonl",),
            sft,
            DataError,
            "a.jsonl:1: the columns prompt do not make rows of the schema sft, which needs messages, or prompt or "
            "question with response, response_j, completion or chosen, or question with answer. They fit the schema "
            "prompt.",
        ),
        (
            ("mixed",),
            sft,
            DataError,
            "mixed/a.jsonl has prompt + response and mixed/b.jsonl has messages: files of one folder hold rows of one "
            "form. Move one away, or list the files in data.path.",
        ),
        (
            ("a.jsonl",),
            {"subset": "x"},
            ConfigError,
            "data.subset = x: a file has no subsets. Give a folder or a hub id, or no subset.",
        ),
        (
            ("a.jsonl",),
            {"eval_split": "test"},
            ConfigError,
            "data.eval_split = test: a.jsonl is one file, without splits. Give eval_path or eval_fraction instead.",
        ),
        (
            ("mixed",),
            {**sft, "eval_split": "test"},
            DataError,
            "data.eval_split = test: mixed has train.",
        ),
        (
            ("a.jsonl",),
            {"eval_path": ("c.jsonl",)},
            DataError,
            "data.eval_path = c.jsonl: there is no such file. Give a file (jsonl, json, csv, parquet, arrow), a folder "
            "of them, or a hub id.",
        ),
        (
            ("a.jsonl", "b.jsonl"),
            {"streaming": True, "limit": 5},
            ConfigError,
            "data.weights is missing: how long a stream is cannot be known, so nothing says how much of each of the 2 "
            "sources to take. Give a weight for each.",
        ),
        (
            ("a.jsonl",),
            {"eval_path": ("b.jsonl",)},
            DataError,
            "data.path = a.jsonl: every row is held out, so none is left to learn from. Give other rows to hold out, "
            "or fewer.",
        ),
        (
            ("one.jsonl",),
            {"eval_fraction": 0.01},
            DataError,
            "data.eval_fraction = 0.01: none of 2 rows is held out, since few differ in what they answer. Raise it, or "
            "give eval_path.",
        ),
    ]


@pytest.mark.parametrize("case", range(12))
def test_what_cannot_work_is_one_line(case: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, settings, kind, message = wrong(tmp_path)[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as error:
        load(*paths, **settings)
    assert str(error.value) == message


def test_complaints_name_the_block_of_settings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^ptx\.path = nowhere\.jsonl: there is no such file"):
        load_rows(DataConfig(path=("nowhere.jsonl",)), "sft", seed=0, name="ptx")


REAL: list[tuple[str, Schema, int]] = [
    ("gsm8k-train.jsonl", "sft", 7473),
    ("gsm8k-test.jsonl", "prompt", 1319),
    ("math500.jsonl", "prompt", 500),
    ("pandalm-preferences.jsonl", "sft", 894),
    ("pandalm-preferences.jsonl", "preference", 894),
    ("pandalm-preferences.jsonl", "prompt", 894),
]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent: there are no real files to read")
@pytest.mark.parametrize(("name", "schema", "size"), REAL)
def test_real_files_are_read_whole(name: str, schema: Schema, size: int) -> None:
    rows = load(str(SHARED / name), schema=schema, eval_fraction=0.1)
    assert len(rows.train) + len(rows.held_out) == size
    assert 0.05 * size < len(rows.held_out) < 0.15 * size
    assert not set(map(first_words, rows.train)) & set(map(first_words, rows.held_out))


def first_words(row: Row) -> str:
    return (row.prompt if isinstance(row, Preference) else row.messages)[0]["content"]
