"""Every recipe still takes the steps it took when its golden curve was drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.regenerate import RUNS, curves, file_of

RELATIVE, ABSOLUTE = 1e-4, 1e-6
"""Processors round float32 differently, by 1e-7 at first; what AdamW makes of that in 8 steps stays well below."""


@pytest.mark.parametrize("recipe", RUNS)
def test_a_recipe_reproduces_its_golden_curve(recipe: str, tmp_path: Path) -> None:
    golden = json.loads(file_of(recipe).read_text(encoding="utf-8"))
    found = curves(recipe, tmp_path)
    assert found.keys() == golden.keys()
    for name, curve in golden.items():
        # Meant to differ? Then: python tests/golden/regenerate.py <recipe>, and show both curves with the change.
        assert found[name] == pytest.approx(curve, rel=RELATIVE, abs=ABSOLUTE), name


@pytest.mark.parametrize("recipe", RUNS)
def test_a_golden_curve_says_something(recipe: str) -> None:
    golden = json.loads(file_of(recipe).read_text(encoding="utf-8"))
    assert golden.keys() == set(RUNS[recipe].metrics)
    assert all(len(set(curve)) > 1 for curve in golden.values()), "a number that never changes guards nothing"
