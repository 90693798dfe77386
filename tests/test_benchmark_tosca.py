"""What `benchmarks/tosca.py` makes of finished runs, and that it runs from its one command."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def tosca(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "tosca", raising=False)
    return importlib.import_module("tosca")


def made(folder: Path, seed: int, value: float) -> None:
    """A finished run with two evaluations and a last test."""
    out = folder / f"seed_{seed}"
    (out / "test").mkdir(parents=True)
    (out / "done.json").write_text(json.dumps({"cpu": 10.0 + seed, "settings": {"episodes-per-step": 16}}))
    names = ("reward/mean", "dialogue/win", "dialogue/satisfaction")
    rows: list[dict[str, float]] = [{"step": step, **{f"eval/{n}": value - step for n in names}} for step in (1, 3)]
    rows.insert(1, {"step": 2})
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    estimates: dict[str, Any] = {name: {"mean": value} for name in ("return", "win", "satisfaction")}
    (out / "test" / "summary.json").write_text(json.dumps({"estimates": estimates}))


def test_curves_are_medians_over_seeds_and_final_numbers_those_of_the_last_test(
    tosca: ModuleType, tmp_path: Path
) -> None:
    for seed, value in enumerate((4.0, 6.0, 9.0)):
        made(tmp_path, seed, value)
    (tmp_path / "seed_3").mkdir()  # one that has not finished is left out
    found = tosca.summarise(tosca.finished(tmp_path))
    assert [point["episodes"] for point in found["curve"]] == [32, 64]
    assert found["curve"][0]["return"] == {"median": 5.0, "low": 3.0, "high": 8.0}
    assert found["final"]["return"] == {"median": 6.0, "low": 4.0, "high": 9.0}
    assert (found["seeds"], found["cpu"], found["runs"]) == (3, 11.0, [4.0, 6.0, 9.0])


def test_a_ratio_is_over_the_best_of_the_others_and_missing_where_one_is(tosca: ModuleType) -> None:
    ends = {"joint": 9.0, "random": 3.0, "alone": 6.0}
    assert tosca.over(ends, "joint", ("random", "alone", "gamma_0")) == 1.5
    assert tosca.over(ends, "joint_far", ("alone",)) is None
    assert tosca.over(ends, "joint", ("alone_far",)) is None


@pytest.mark.slow
def test_it_runs_resumes_and_ends_with_its_json_line(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, str(FOLDER / "tosca.py"), "--quick", "--out", str(tmp_path / "out")]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *words], capture_output=True, text=True, timeout=600, env=environment, check=False
        )

    first = run("--variants", "joint", "alone")
    assert first.returncode == 0, first.stderr
    last = json.loads(first.stdout.splitlines()[-1])
    assert last["seeds"] == {"joint": 1, "alone": 1}
    assert (tmp_path / "out" / "tosca_return.png").stat().st_size > 1000
    again = run("--resume", "--variants", "joint", "alone")
    assert json.loads(again.stdout.splitlines()[-1]) == last
    assert "seed 0" not in again.stderr  # nothing is run twice
    assert "Go on with --resume" in run().stderr
