"""`benchmarks/feedback.py`: the same tokens for everybody, settings that the recipes have, medians over seeds."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from echelon.config import loading

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("feedback_benchmark", FOLDER / "feedback.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["feedback_benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_variant_has_settings_of_its_recipe_and_samples_the_same_tokens(bench, tmp_path):
    args = bench.Args(out=tmp_path)
    for name, variant in bench.VARIANTS.items():
        told = bench.settings_of(args, name, seed=3)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(told))
        recipe = importlib.import_module(f"echelon.recipes.{'grpo' if variant.flat else 'feedback'}")
        cfg = loading.load(recipe.Config, [tmp_path / "run.yaml"], ["--out", str(tmp_path / "run")])
        assert cfg.seed == 3
        assert cfg.steps * bench.tokens_per_step(told) == pytest.approx(args.tokens, rel=0.05), name
        assert cfg.keep_last > cfg.steps / cfg.save_every, "every checkpoint that is tested stays"


def test_tokens_are_those_of_all_turns_and_of_the_attempts_a_best_response_is_judged_by(bench):
    told = {"tasks_per_step": 2, "attempts": 2, "remarks": 3, "refinements": 2}
    row = {"turn/tokens": 4.0, "episode/turns": 20.0, "solver/length": 5.0}  # 2 + 6 + 12 turns an episode
    assert bench.tokens_of(told, row) == 4 * 20 * 2
    assert bench.tokens_of(told | {"credit": {"gap": 1.0}}, row) == 4 * 20 * 2 + 2 * 12 * 5
    assert bench.tokens_of({"tasks_per_step": 2, "group_size": 8}, {"turn/tokens": 5, "episode/turns": 1}) == 80


def test_a_path_of_names_sets_one_setting_and_leaves_the_others(bench):
    assert bench.put({"a": {"b": 1, "c": 2}}, "a.b", 3) == {"a": {"b": 3, "c": 2}}
    assert bench.put({}, "a.b", 3) == {"a": {"b": 3}}


def finished(folder: Path, lasts: list[float]) -> None:
    tests = [{"tokens": 100.0 * n, "first": 0.1, "last": last, "right_to_wrong": 0.0} for n, last in enumerate(lasts)]
    folder.mkdir(parents=True)
    (folder / "done.json").write_text(json.dumps({"cpu": 2.0, "tests": tests, "settings": {}}))


def test_the_report_has_medians_over_finished_runs_and_compares_with_the_best_rival(bench, tmp_path):
    for seed, (joint, flat, fixed) in enumerate([(0.9, 0.3, 0.5), (0.7, 0.2, 0.4), (0.8, 0.1, 0.6)]):
        for name, last in (("joint", joint), ("flat", flat), ("fixed", fixed)):
            finished(tmp_path / "runs" / name / f"seed_{seed}", [0.1, last])
    (tmp_path / "runs" / "stranger" / "seed_0").mkdir(parents=True)  # not finished: not counted
    line = bench.report(bench.Args(out=tmp_path, report=True))
    assert line["final"] == {"joint": 0.8, "flat": 0.2, "fixed": 0.5}
    assert line["ratio"] == 1.6
    found = json.loads((tmp_path / "feedback.json").read_text())
    assert found["joint"]["curve"][1]["last"] == {"median": 0.8, "low": 0.7, "high": 0.9}
    assert [point["tokens"] for point in found["joint"]["curve"]] == [0, 100]
    assert "| both learn | 80.0% [70.0%, 90.0%] |" in (tmp_path / "feedback.md").read_text()
    assert (tmp_path / "feedback_methods.png").stat().st_size < 150_000


def test_a_variant_that_is_not_there_is_refused_in_one_line(bench):
    with pytest.raises(SystemExit, match=r"--variants jiont: there is no such variant here\. There are: joint, flat"):
        bench.Args(variants=("jiont",))
