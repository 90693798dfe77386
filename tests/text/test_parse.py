r"""Answers in text: found where they are marked, and compared exactly."""

from __future__ import annotations

from fractions import Fraction

import pytest

from echelon.text.parse import as_number, marked_answer, program_in


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
        ("#### 1\nNo, wait.\n#### 2\nSo it is 2 and not 1.", "2"),
        (r"so \boxed{\frac{1}{2}} it is, of 7", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"first \boxed{3}, then \boxed{4", "3"),
        ("The answer is 72.", None),
        ("nobody knows", None),
        ("####", None),
    ],
)
def test_the_answer_is_what_is_marked(text: str, answer: str | None) -> None:
    assert marked_answer(text) == answer


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
        ("3" * 4400, None),
        ("1/" + "3" * 4400, None),
        ("3" * 1000, Fraction(10**1000 - 1, 3)),
    ],
)
def test_a_number_is_read_exactly_or_not_at_all(text: str, number: Fraction | None) -> None:
    assert as_number(text) == number


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
