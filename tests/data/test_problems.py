"""Problems as public data sets have them: what is asked, and what is kept for the judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from echelon.config import DataConfig
from echelon.data.datasets import load_rows
from echelon.data.schemas import Prompt
from echelon.errors import DataError

DATA = Path(__file__).parents[3] / "shared" / "data"


def rows(tmp_path: Path, *cells: dict[str, Any]) -> list[Prompt]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in cells))
    return list(load_rows(DataConfig(path=(str(file),)), "prompt", seed=0).train)


def asked(row: Prompt) -> str:
    (message,) = row.messages
    return message["content"]


def test_gsm8k_and_math_are_asked_as_they_are_and_keep_answer_and_solution(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, {"question": "2 + 2?", "answer": "Add.\n#### 4"})
    assert (asked(row), row.columns) == ("2 + 2?", {"answer": "Add.\n#### 4"})
    (row,) = rows(tmp_path, {"problem": "2 + 2?", "solution": "\\boxed{4}", "answer": "4", "level": "1"})
    assert (asked(row), row.columns) == ("2 + 2?", {"solution": "\\boxed{4}", "answer": "4", "level": "1"})
    assert row.where.endswith("rows.jsonl:1")


MBPP = {
    "task_id": 2,
    "text": "Write a function to find the shared elements of two lists.",
    "test_list": [
        "assert set(similar_elements((3, 4), (5, 4))) == set((4,))",
        "assert similar_elements((1,), (1,)) == (1,)",
    ],
    "test_setup_code": "import math",
}


def test_mbpp_names_the_function_and_shows_one_test(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, MBPP)
    assert asked(row).startswith("Write a function to find the shared elements of two lists.\n\n")
    assert "must be named `similar_elements`" in asked(row)
    assert asked(row).endswith(MBPP["test_list"][0])
    assert row.columns["tests"] == [f"import math\n{test}" for test in MBPP["test_list"]]


def test_mbpp_with_its_other_columns_is_the_same(tmp_path: Path) -> None:
    """The cleaned version has `prompt` and `test_imports`."""
    other = {"prompt": MBPP["text"], "test_list": MBPP["test_list"], "test_imports": ["import math"]}
    assert [asked(row) for row in rows(tmp_path, other)] == [asked(row) for row in rows(tmp_path, MBPP)]
    assert rows(tmp_path, other)[0].columns["tests"] == rows(tmp_path, MBPP)[0].columns["tests"]


def test_humaneval_shows_the_function_to_complete_and_keeps_its_check(tmp_path: Path) -> None:
    head = 'def add(a, b):\n    """The sum."""\n'
    check = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
    (row,) = rows(tmp_path, {"prompt": head, "test": check, "entry_point": "add", "canonical_solution": "return a + b"})
    assert f"```python\n{head.rstrip()}\n```" in asked(row)
    assert "must be named `add`" in asked(row)
    assert (row.columns["tests"], row.columns["entry_point"]) == (check, "add")


@pytest.mark.parametrize(
    "given",
    [
        {"choices": ["red", "blue"]},
        {"options": ["red", "blue"]},
        {"choices": {"text": ["red", "blue"], "label": ["1", "2"]}},
        {"choices": {"A": "red", "B": "blue"}},
    ],
)
def test_choices_are_listed_with_their_letters(tmp_path: Path, given: dict[str, Any]) -> None:
    (row,) = rows(tmp_path, {"question": "Which colour has the sky?", **given, "answer": 1})
    assert asked(row) == (
        "Which colour has the sky?\n\nA. red\nB. blue\n\nAnswer with the letter of one choice, A to B."
    )
    assert row.columns["answer"] == 1


@pytest.mark.parametrize(
    ("cells", "complaint"),
    [
        ({"question": "?", "choices": ["one"]}, "'choices' is no list of 2 to 10 choices"),
        ({"question": "?", "choices": "red"}, "'choices' is no list of 2 to 10 choices"),
        ({"question": None, "choices": ["a", "b"]}, "'question' is no text, and it is what is asked"),
        ({"text": "f", "test_list": []}, "'test_list' is no list of tests"),
        ({"text": "f", "test_list": "assert f()"}, "'test_list' is no list of tests"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path: Path, cells: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: {complaint}"):
        rows(tmp_path, cells)


@pytest.mark.parametrize(("name", "count"), [("gsm8k-test.jsonl", 1319), ("math500.jsonl", 500)])
def test_real_files_load_with_an_answer_in_every_row(name: str, count: int) -> None:
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not on this machine")
    found = load_rows(DataConfig(path=(str(DATA / name),)), "prompt", seed=0).train
    assert len(found) == count
    assert all(row.columns["answer"] for row in found)
