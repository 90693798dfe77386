r"""Answers in text: found where they are marked, and compared exactly."""

from __future__ import annotations

from fractions import Fraction

import pytest

from echelon.text.parse import answer_matches, as_number, final_answer, program_in, same_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
        ("#### 1\nNo, wait.\n#### 2\nSo it is 2 and not 1.", "2"),
        (r"so \boxed{\frac{1}{2}} it is, of 7", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"first \boxed{3}, then \boxed{4", "3"),
        ("The answer is 72.", "72"),
        ("between 3-5 of them", "5"),
        ("he has -4 left", "-4"),
        ("costs $1,234.50", "$1,234.50"),
        ("version v2 of it", None),
        ("nobody knows", None),
        ("####", None),
    ],
)
def test_the_answer_is_what_is_marked_or_the_last_number(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.50", Fraction(2469, 2)),
        ("-3/4", Fraction(-3, 4)),
        (r"-\dfrac{1}{2}", Fraction(-1, 2)),
        ("$5", Fraction(5)),
        (r"20\%", Fraction(20)),
        (".5", Fraction(1, 2)),
        ("0.1", Fraction(1, 10)),
        ("72.", Fraction(72)),
        ("1,23", None),
        ("1/0", None),
        ("x", None),
        ("", None),
        ("²", None),
    ],
)
def test_a_number_is_read_exactly_or_not_at_all(text: str, number: Fraction | None) -> None:
    assert as_number(text) == number


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("0.5", r"\frac{1}{2}", True),
        ("1,000", "1000.0", True),
        ("0.1", "0.10000001", False),
        ("0.3333", "1/3", False),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})", True),
        (r"\text{(C)}", "(C)", True),
        ("10", "100", False),
        ("x", "y", False),
    ],
)
def test_answers_are_the_same_number_or_the_same_text(one: str, other: str, same: bool) -> None:
    assert same_answer(one, other) is same
    assert same_answer(other, one) is same


def test_a_completion_earns_1_for_the_answer_of_its_row() -> None:
    said = ["It is 18.", "#### 17", r"\boxed{36/2}", "I do not know.", "x+1"]
    solution = "She sells 9 for 2 each.\n#### 18"
    assert answer_matches([()] * 5, said, answer=[solution, solution, "18", 18, r"\boxed{x+1}"]) == [1, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1\n", "x = 1\n"),
        ("Like so:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```\nOr better:\n```py\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1\n```\nRun it:\n```bash\npython x.py\n```", "x = 1\n"),
        ("```bash\nls\n```", "```bash\nls\n```"),
        ("```python\nx = 1\ny = ", "x = 1\ny = "),
        ("```Python3 title\nx = '```'\n```", "x = '```'\n"),
        ("  ```\n  x = 1\n  ```\n", "  x = 1\n"),
        ("```python\n```", ""),
    ],
)
def test_a_program_is_the_last_block_of_python_or_everything(text: str, program: str) -> None:
    assert program_in(text) == program
