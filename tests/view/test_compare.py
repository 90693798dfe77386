"""Runs side by side, as numbers and as the command prints them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from echelon import cli
from echelon.view.compare import best, by_level, groups, late, spread
from echelon.view.runs import open_runs
from tests.view.conftest import Write


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(level: float, **more: float) -> list[dict[str, Any]]:
    """Ten steps of a reward that ends at `level` after it was one higher once."""
    return [{"step": at, "seconds": at + 1.0, "reward/mean": level + (at == 6), **more} for at in range(10)]


@pytest.fixture
def seeds(write: Write) -> None:
    """Five seeds of one experiment, one run of another with a larger rate, and an evaluation in the first."""
    for seed, level in enumerate([0.0, 1.0, 2.0, 3.0, 10.0]):
        write(f"a/seed_{seed}", metrics=rows(level), settings={"seed": seed, "steps": 10, "lr": 0.1, "out": str(seed)})
    write("b", metrics=rows(5.0, **{"critic/loss": 2.0}), settings={"seed": 0, "steps": 10, "lr": 0.2, "out": "b"})
    for place, mean in (("a/seed_0", 1.0), ("a/seed_1", 3.0), ("b", 7.0)):
        folder = Path(place, "evaluation", "test")
        folder.mkdir(parents=True)
        found = {"episodes": 4, "estimates": {"return": {"mean": mean, "low": mean - 1, "high": mean + 1, "n": 4}}}
        (folder / "summary.json").write_text(json.dumps(found))


def test_a_spread_is_the_median_and_the_middle_half_of_five_or_all_of_fewer() -> None:
    assert spread([3.0, 1.0, None, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "runs": 3}
    assert spread([0.0, 1.0, 2.0, 3.0, 10.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "runs": 5}
    assert spread([None]) is None


def test_the_last_is_a_mean_of_the_last_fifth_and_the_best_a_single_step(write: Write) -> None:
    write("run", metrics=[{"step": at, "reward/mean": at % 4, "loss": at, "policy/loss": at} for at in range(20)])
    (run,), _ = open_runs(["run"])
    assert late(run, "reward/mean") == 1.5  # 0, 1, 2, 3
    assert (best(run, "reward/mean"), best(run, "loss"), best(run, "policy/loss")) == (3.0, 0.0, None)


def test_seeds_are_one_group_with_its_median_and_interval(seeds: None) -> None:
    runs, _ = open_runs(["a", "b"])
    together = groups(runs)
    assert [group["name"] for group in together] == ["a", "b"]
    row = next(row for row in by_level(runs, together) if row["metric"] == "reward/mean")
    assert row["last"][0] == {"median": 2.0, "low": 1.0, "high": 3.0, "runs": 5}
    assert row["best"] == [
        {"median": 3.0, "low": 2.0, "high": 4.0, "runs": 5},
        {"median": 6.0, "low": 6.0, "high": 6.0, "runs": 1},
    ]
    critic = next(row for row in by_level(runs, together, ["critic"]) if row["metric"] == "critic/loss")
    assert (critic["heading"], critic["last"][0]) == ("Upper level: critic of utterances", None)


def test_the_command_shows_what_differs_what_it_came_to_and_evaluations(
    seeds: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", "a", "b", "--csv", "all.csv"]) == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "lr 0.1 0.2" in lines
    assert not any(line.startswith(("seed ", "out ")) for line in lines)
    assert "Outcome reward/mean 2 [1, 3] best 3 5 best 6" in lines
    assert "test return 2 [1, 3] 7 [6, 8]" in lines
    assert "\x1b" not in out
    assert lines[-1].endswith("echelon report a b")
    with open("all.csv", newline="") as file:
        found = list(csv.DictReader(file))
    kept = {(row["table"], row["name"], row["runs"]): (row["value"], row["low"], row["seeds"]) for row in found}
    assert kept["setting", "lr", "b"] == ("0.2", "", "")
    assert kept["last", "reward/mean", "a"] == ("2", "1", "5")
    assert kept["evaluation", "return", "b"] == ("7", "6", "1")


def test_a_program_gets_json_and_nothing_else(seeds: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "a", "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [group["name"] for group in found["groups"]] == ["a", "b"]
    assert found["settings"] == [{"setting": "lr", "values": ["0.1", "0.2"]}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "runs is missing: nothing says what to compare. Name run directories: echelon compare A B."),
        (["b", "--csv", "notes.csv"], "notes.csv: there is a file that is no such table, and it stays. Choose another"),
        (["b", "--csv", "notes.csv/x.csv"], "notes.csv/x.csv: cannot be written ("),
        (
            ["b", "--metric", "critc"],
            "metric = critc: no run has a metric with that in its name. Did you mean 'critic'?",
        ),
        (["b", "--metric", "critic/", "nosuch"], "metric = nosuch: no run has a metric with that in its name.\n"),
        (["nowhere"], "nowhere: does not exist, and a run is a folder."),
    ],
)
def test_what_cannot_work_is_one_line(
    words: list[str], message: str, seeds: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("notes.csv").write_text("mine")
    assert cli.main(["compare", *words]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert Path("notes.csv").read_text() == "mine"


def test_a_place_without_a_run_is_told_and_the_rest_is_shown(seeds: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "a", "nowhere", "b"]) == 2
    out, err = capsys.readouterr()
    assert "reward/mean" in out
    assert err == "nowhere: does not exist, and a run is a folder. Give what was --out of a recipe.\n"


def test_runs_of_other_recipes_and_versions_show_what_they_have(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write("one", settings={"steps": 20, "kl_in": "loss"})
    (one / "run.json").write_text('{"recipe": "grpo", "version": "0.9.0", "steps": 20, "ended": true}')
    write("two", metrics=[{"step": 0, "loss": 1.0}], settings={"steps": 20, "packing": True})
    assert cli.main(["compare", "one", "two"]) == 0
    out = capsys.readouterr().out
    assert "grpo 0.9.0" in out
    assert "2 settings are of some of them only: see --json or --csv" in out
