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
from typing import Any

import pytest
import yaml

from echelon.config import loading

FOLDER = Path(__file__).parents[1] / "benchmarks"
OTHERS = ("asynchronous.py", "control.py", "curves.py", "feedback.py", "learning.py", "ray_rollouts.py", "tosca.py")
OTHERS += ("long_run.py", "weight_reload.py")
"""Scripts that time nobody beside peers."""
SCRIPTS = {path.name: path for path in sorted(FOLDER.glob("[!_]*.py")) if path.name not in OTHERS}
QUICK = ("grpo_step.py", "logprob_memory.py", "sft_step.py")
"""Scripts of which a small workload is over soon."""
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


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/learning.py`; its parts lie beside it, in no package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("learning")


def finished_run(
    out: Path, returns: list[float], *, steps: int = 10, per_step: int = 5, alone: float | None = None
) -> None:
    """A run as the worker leaves it: a test every `steps` steps, a CPU second a step, two seconds on the wall."""
    (out / "train").mkdir(parents=True)
    candidates = 1 if alone is None else 4
    job = {"per_step": per_step, "candidates": candidates, "recorded": 0, "settings": {}}
    (out / "job.json").write_text(json.dumps(job))
    total = steps * len(returns)
    metrics = [json.dumps({"step": step, "seconds": 2.0 * (step + 1)}) + "\n" for step in range(total)]
    (out / "train" / "metrics.jsonl").write_text("".join(metrics))
    clock = [json.dumps({"step": step, "cpu": float(step)}) + "\n" for step in range(2, total + 1, 2)]
    (out / "clock.jsonl").write_text("".join(clock))
    played = [(number, candidates, value) for number, value in enumerate(returns, start=1)]
    played += [] if alone is None else [(len(returns), 1, alone)]
    tests: list[dict[str, Any]] = [
        {"step": steps * number, "candidates": count, "return": value, "win": 0.0} for number, count, value in played
    ]
    (out / "tests.jsonl").write_text("".join(json.dumps(test) + "\n" for test in tests))
    (out / "done.json").write_text("{}")


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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SCRIPTS]
)
def test_a_benchmark_ends_with_a_line_of_json_whose_ratio_is_the_smallest_over_target(name: str) -> None:
    done = run(SCRIPTS[name], "--peers", *core_peers(SCRIPTS[name]))
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    for row in line["rows"]:
        assert {"peer", "size", "ours", "theirs", "ratio", "target"} <= row.keys()
    aims = [row["ratio"] / row["target"] for row in line["rows"] if row["target"]]
    assert line["ratio"] == (pytest.approx(min(aims), rel=0.01, abs=0.001) if aims else None)


def test_steps_ahead_and_in_turn_are_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the two sides of `asynchronous.py` do in a round, in this process, and what its last row counts."""
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("asynchronous")
    with script.model_folder("tiny") as folder:
        for staleness in script.PACES.values():
            counts = script.training(script.Job(folder, staleness, steps=2, rows=2, turns=2, latency=0.001))(0)
            assert counts["steps"] == 2
            assert counts["playing"] > 0 < counts["training"]
        assert script.playing(script.Job(folder, rows=4, turns=1, at_once=2))(0) == {"episodes": 4}


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


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_a_reload_without_vllm_says_how_to_install_it() -> None:
    done = run(FOLDER / "weight_reload.py")
    assert (done.returncode, done.stderr) == (2, "vllm is not installed. Run: pip install 'echelon[vllm]'\n")


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_a_reload_is_timed_and_its_log_probs_are_the_trainers() -> None:
    done = run(FOLDER / "weight_reload.py")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert row["size"] == "tiny"
    assert row["seconds"] > 0
    assert row["mismatch"] <= 1e-4


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_rollouts_by_ray_without_ray_say_how_to_install_it() -> None:
    done = run(FOLDER / "ray_rollouts.py")
    assert (done.returncode, done.stderr) == (2, "ray is not installed. Run: pip install 'echelon[ray]'\n")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_rollouts_by_ray_are_timed_beside_those_in_process() -> None:
    done = run(FOLDER / "ray_rollouts.py")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["peer"] for row in rows] == ["local", "reload (s)"]
    assert all(row["ratio"] > 0 for row in rows)


def test_a_long_run_is_written_opened_and_watched() -> None:
    done = run(FOLDER / "long_run.py")
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert {"the report is written", "processor time of a refresh"} <= {row["what"] for row in line["rows"]}
    assert all(0 < row["measured"] < row["target"] for row in line["rows"] if row["unit"] == "MiB")


def test_an_unknown_peer_or_size_is_refused_in_one_line() -> None:
    refused = run(SCRIPTS["rollout_group.py"], "--peers", "generat")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "--peers generat: there is no such peer here. There are: generate, vllm.\n"


@pytest.mark.slow
def test_learning_curves_are_run_once_and_reported_again(
    learning: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def learn(**more: Any) -> dict[str, Any]:
        words = {"task": "text_lock_12", "methods": ("grpo",), "seeds": 1, "out": out, "quick": True, **more}
        learning.main(learning.Args(**words))
        line: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return line

    out = tmp_path / "curves"
    line = learn()
    assert (line["task"], [row["method"] for row in line["rows"]]) == ("text_lock_12", ["grpo"])
    assert {path.name for path in out.iterdir()} == {f"text_lock_12{end}" for end in ("", ".json", ".md", ".png")}
    told = json.loads((out / "text_lock_12.json").read_text())["methods"]["grpo"]
    assert [point["episodes"] for point in told["curve"]] == [0, 4, 8]  # two steps of four
    assert 0 < told["curve"][1]["cpu"] <= told["cpu"]
    assert [point["policy.optim.lr"] for point in told["sweep"]] == [3e-4, 1e-3, 3e-3]
    assert [point["return"] is not None for point in told["sweep"]] == [True, False, False]  # quick: only the first

    with pytest.raises(SystemExit):
        learn()
    said = capsys.readouterr().err
    assert said.endswith("there are runs already. Continue them with --resume, or choose another --out.\n")

    seed = out / "text_lock_12" / "runs" / "grpo" / "seed_0"
    (seed / "done.json").unlink()
    tests = (seed / "tests.jsonl").read_text()
    (seed / "tests.jsonl").write_text(tests.splitlines(keepends=True)[0])
    ran = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
    assert learn(resume=True) == line
    assert {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")} == ran  # nothing was trained again
    assert (seed / "tests.jsonl").read_text() == tests  # what was missing was tested, with the same games
    assert learn(report=True) == line

    job = json.loads((seed / "job.json").read_text())
    job["settings"]["seed"] = 7
    (seed / "job.json").write_text(json.dumps(job))
    with pytest.raises(SystemExit):
        learn(resume=True)
    assert "that was run with other settings. Choose another --out" in capsys.readouterr().err


def test_what_learning_cannot_run_is_refused_in_one_line(
    learning: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(**words: Any) -> str:
        with pytest.raises(SystemExit):
            learning.main(learning.Args(**{"task": "text_lock_12", "out": tmp_path, **words}))
        return capsys.readouterr().err

    assert refused(task="chess").startswith("--task chess: there is no such task here. There are: text_lock_12,")
    assert refused(methods=("grop",)).startswith(
        "--methods grop: there is no such method here. There are: filtered_bc,"
    )
    assert refused(seeds=0) == "--seeds 0: it counts something there must be one of. Give 1 or more.\n"
    assert refused(report=True) == f"{tmp_path}/text_lock_12: nothing has run there. Leave out --report.\n"
    assert refused(resume=True) == f"{tmp_path}/text_lock_12: there is nothing to resume. Leave out --resume.\n"


def test_every_method_is_tried_equally_often_with_settings_that_its_recipe_has(
    learning: ModuleType, tmp_path: Path
) -> None:
    from _learning_setup import METHODS, TASKS, per_step, run_settings

    assert len({len(method.sweep(task)) for method in METHODS.values() for task in TASKS.values()}) == 1
    for name, task in TASKS.items():
        assert task.spec.tasks("test"), name
        for method in METHODS.values():
            recipe = importlib.import_module(f"echelon.recipes.{method.recipe}")
            for point in method.sweep(task):
                settings = run_settings(task, method, point, tmp_path, seed=1)
                (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
                cfg = loading.load(recipe.Config, [tmp_path / "run.yaml"], ["--out", str(tmp_path / "run")])
                assert cfg.keep_last > cfg.steps / cfg.save_every  # every checkpoint that is tested stays
                wanted = task.flat_episodes if method.flat else task.level_episodes
                assert method.offline or abs(cfg.steps * per_step(settings) - wanted) <= 4 * per_step(settings)


def test_learning_reports_medians_and_the_episodes_until_what_the_best_baseline_ends_with(
    learning: ModuleType, tmp_path: Path
) -> None:
    task = tmp_path / "text_lock_12"
    (task / "start").mkdir(parents=True)
    (task / "start" / "done.json").write_text(json.dumps({"warm": 0.0, "chance": 0.1, "optimum": 1.0}))
    for number, returns in enumerate(([0.1, 0.3], [0.2, 0.6], [0.5, 0.1])):  # means 0.2, 0.4, 0.3
        finished_run(task / "sweep" / "grpo" / f"point_{number}", returns)
    for seed, last in enumerate((0.3, 0.6, 0.3)):
        finished_run(task / "runs" / "grpo" / f"seed_{seed}", [0.0] * 7 + [last], steps=10, per_step=5)
        finished_run(task / "runs" / "archer" / f"seed_{seed}", [0.0, 0.6, 0.6, 0.6], steps=2, per_step=5, alone=0.2)
    finished_run(task / "runs" / "archer" / "seed_3", [1.0, 1.0, 1.0, 1.0])
    (task / "runs" / "archer" / "seed_3" / "done.json").unlink()  # not finished: not counted

    line = learning.report("text_lock_12", ("grpo", "archer"), task, tmp_path)
    told = json.loads((tmp_path / "text_lock_12.json").read_text())["methods"]
    assert (told["grpo"]["chosen"], told["grpo"]["sweep"][1]["return"]) == (1, 0.4)
    assert told["grpo"]["final"] == {"median": 0.3, "low": 0.3, "high": 0.6}
    assert (told["grpo"]["episodes"], told["grpo"]["cpu"], told["grpo"]["wall"]) == (400, 80.0, 160.0)
    assert told["archer"]["seeds"] == 3
    assert told["archer"]["alone"]["median"] == 0.2
    # Means with both neighbours: 0.3, 0.4, 0.6, 0.6 after 10, 20, 30, 40 episodes; 0.3 is reached at 10, and 400 / 10.
    assert [point["median"] for point in told["archer"]["curve"]] == pytest.approx([0, 0.3, 0.4, 0.6, 0.6])
    assert (told["archer"]["reaches"]["grpo"], told["archer"]["ratio"]["grpo"]) == (10, 40)
    assert told["grpo"]["reaches"]["grpo"] is None  # its own smoothed curve ends lower
    assert (line["ratio"], line["best_baseline"]) == (40, "grpo")
    assert "| ArCHer | 3 | 40 |" in (tmp_path / "text_lock_12.md").read_text()


def test_the_clock_of_a_resumed_run_counts_what_was_spent_and_not_what_was_lost(
    learning: ModuleType, tmp_path: Path
) -> None:
    from _learning_run import clock, read_rows

    path, run = tmp_path / "clock.jsonl", tmp_path / "train"
    run.mkdir()
    path.write_text("".join(json.dumps({"step": step, "cpu": 100.0 * step}) + "\n" for step in (1, 2, 3)))
    (run / "metrics.jsonl").write_text("{}\n{}\n")
    with clock(path, run, start=2):  # the newest checkpoint was that of step 2
        (run / "metrics.jsonl").write_text("{}\n{}\n{}\n{}\n")
    found = read_rows(path)
    assert [row["cpu"] for row in found[:2]] == [100, 200]
    assert found[-1]["step"] == 4
    assert 200 <= found[-1]["cpu"] < 205
