"""math-verify in its child: what it finds the same, and how it ends when it does not end by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from echelon.sandbox.algebra import Algebra, algebra_installed
from echelon.sandbox.program import Limits, ProgramError

pytestmark = pytest.mark.skipif(not algebra_installed(), reason="math-verify is not installed")


@pytest.fixture(scope="module")
def algebra() -> Iterator[Algebra]:
    with Algebra(Limits(cpu_seconds=2.0, wall_seconds=60.0, memory_mib=2048)) as algebra:
        yield algebra


@pytest.mark.parametrize(
    ("said", "right", "same"),
    [
        (r"\sqrt{12}", r"2\sqrt{3}", True),
        ("-2,1", "1,-2", True),
        ("1,-2,3", "1,-2", False),
        ("(1,2)", "(2,1)", False),
        ("(3,4)", "(3,4]", False),
        ("y = 2x+3", "2x+3", True),
        ("q-p", "p-q", False),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", True),
        (r"1-\sqrt{19},1+\sqrt{19}", r"1 \pm \sqrt{19}", True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", False),
        (r"\frac{", "3", None),
    ],
)
def test_formulas_that_mean_the_same(algebra: Algebra, said: str, right: str, same: bool | None) -> None:
    assert algebra.same(said, right) is same


def test_a_formula_that_explodes_ends_the_child_and_the_next_one_gets_another(algebra: Algebra) -> None:
    began = time.monotonic()
    with pytest.raises(ProgramError) as ended:
        algebra.same("9^{9^{9^{9}}}", "3")
    assert ended.value.cause in ("time", "crash", "raised")
    assert time.monotonic() - began < 60
    assert algebra.same("3", "3") is True


def test_a_right_answer_that_cannot_be_read_is_said(algebra: Algebra) -> None:
    with pytest.raises(ProgramError, match=r"the right answer '.*' cannot be read"):
        algebra.same("3", r"\frac{")


def test_a_child_that_was_killed_is_replaced(algebra: Algebra) -> None:
    algebra.start()
    assert algebra._child is not None
    os.kill(algebra._child.pid, 9)
    algebra._child.wait()
    assert algebra.same("1", "1") is True
