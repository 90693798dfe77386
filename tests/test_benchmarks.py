"""Every benchmark runs with one command on a small workload and ends with its JSON line."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = {path.name: path for path in sorted(FOLDER.glob("[!_]*.py")) if path.name != "curves.py"}
EXTRA = {"vllm", "vllm-turns", "trl"}
"""Peers that the core installation does not bring."""


def run(script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The script on one thread, as a person would run it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, str(script), "--quick", "--threads", "1", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def core_peers(script: Path) -> list[str]:
    """The peers in a script's TARGETS that need no extra; they are what `--peers` is given."""
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and ast.unparse(node).startswith("TARGETS"):
            assert node.value is not None
            return sorted(set(ast.literal_eval(node.value)) - EXTRA)
    raise AssertionError(f"{script.name} has no TARGETS")


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    """`benchmarks/_harness.py`, which lies in no package."""
    spec = importlib.util.spec_from_file_location("_harness", FOLDER / "_harness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["_harness"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_ratios_are_of_medians_and_rows_without_a_target_do_not_count(
    harness: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = [{"tokens": 100.0}] * 3
    results = {
        "ours": harness.Result([1.0, 2.0, 9.0], counts),  # 50 tokens/s
        "slow": harness.Result([10.0, 1.0, 10.0], counts),  # 10
        "quick": harness.Result([1.0, 1.0, 1.0], counts),  # 100
    }
    rows = harness.versus(results, count="tokens", size="tiny", targets={"slow": 4.0, "quick": None})
    assert [(row.peer, row.ours, row.theirs, row.ratio) for row in rows] == [
        ("slow", 50, 10, 5),
        ("quick", 50, 100, 0.5),
    ]
    harness.finish(rows, harness.Args(), title="", unit="tokens/s")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ratio"] == 1.25  # 5 times as fast, 4 wanted


def test_sides_that_did_not_do_the_same_work_are_not_compared(harness: ModuleType) -> None:
    harness._check_same({"ours": {"tokens": 5, "steps": 1}, "theirs": {"tokens": 5, "steps": 2}}, ["tokens"])
    with pytest.raises(RuntimeError, match="did not do the same work: tokens"):
        harness._check_same({"ours": {"tokens": 5}, "theirs": {"tokens": 4}}, ["tokens"])


@pytest.mark.parametrize("name", [path.name for path in sorted(FOLDER.glob("*.py"))])
def test_every_script_says_what_it_is_and_how_to_run_it(name: str) -> None:
    text = ast.get_docstring(ast.parse((FOLDER / name).read_text(encoding="utf-8"))) or ""
    assert name.startswith("_") or f"    python benchmarks/{name}" in f"    {text}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_ends_with_a_line_of_json_whose_ratio_is_the_smallest_over_target(name: str) -> None:
    done = run(SCRIPTS[name], "--peers", *core_peers(SCRIPTS[name]))
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    for row in line["rows"]:
        assert {"peer", "size", "ours", "theirs", "ratio", "target"} <= row.keys()
    aims = [row["ratio"] / row["target"] for row in line["rows"] if row["target"]]
    assert line["ratio"] == (pytest.approx(min(aims), rel=0.01, abs=0.001) if aims else None)


@pytest.mark.parametrize("peer", sorted(EXTRA))
def test_a_peer_that_is_not_installed_is_named_with_the_way_out(peer: str) -> None:
    if importlib.util.find_spec(peer.partition("-")[0]):
        pytest.skip(f"{peer} is installed")
    scripts = {"vllm": "rollout_group.py", "vllm-turns": "rollout_multiturn.py", "trl": "grpo_step.py"}
    done = run(SCRIPTS[scripts[peer]], "--peers", peer)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{peer} is not installed. Run: pip install -e '.[bench]'")
    assert "--peers" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_peer_or_size_is_refused_in_one_line() -> None:
    refused = run(SCRIPTS["rollout_group.py"], "--peers", "generat")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "--peers generat: there is no such peer here. There are: generate, vllm.\n"
