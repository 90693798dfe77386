"""The list of runs: what it says, which it means, in which order."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from echelon import cli
from echelon.view import runs as runs_module
from echelon.view.runs import read_run
from tests.view.conftest import Write


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    monkeypatch.chdir(tmp_path)
    write("runs/done", settings={"steps": 20, "env": "maze"})
    write("runs/half", settings={"steps": 40, "env": "wordle"}, metrics=[{"step": 0, "reward/mean": 0.25, "kl": 3}])
    (Path("runs/half") / "run.json").write_text('{"recipe": "ppo", "version": "1.2.3", "steps": 40, "ended": false}')
    test = Path("runs/test")
    test.mkdir()
    (test / "summary.json").write_text('{"recipe": "evaluate", "estimates": {"return": {"mean": 4.5}}}')


def names(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert cli.main(["runs", "--json", *words]) == 0
    return [row["run"] for row in json.loads(capsys.readouterr().out)["runs"]]


def test_every_run_has_a_line_that_says_what_it_came_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs"]) == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert f"done – finished 20 0:00:40 reward/mean 0.175 {1.775:.3g} 1.95" in lines
    assert "half ppo stopped 1 of 40 – reward/mean 0.25 0.25 0.25" in lines
    assert "test evaluate evaluated – – return – 4.5 –" in lines
    assert "3 runs" in lines
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--recipe", "ppo"], ["half"]),
        (["--find", "al"], ["half"]),
        (["--state", "finished"], ["done"]),
        (["--where", "reward/mean>1"], ["done"]),
        (["--where", "reward/mean<=0.25", "kl>=3"], ["half"]),
        (["--where", "env=maze"], ["done"]),
        (["--where", "env!=maze"], ["half"]),
        (["--where", "last>1"], ["done", "test"]),
        (["--where", "version=1.2.3"], ["half"]),
        (["--where", "steps>=20"], ["done"]),
        (["--where", "steps<=40"], ["done", "half"]),
        (["--sort", "last", "--reverse"], ["test", "done", "half"]),
        (["--sort", "steps"], ["half", "done", "test"]),
        (["--sort", "kl", "--metric", "kl"], ["half", "done", "test"]),
    ],
)
def test_filters_and_orders(words: list[str], found: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert names(capsys, *words) == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--where", "reward"], "where = reward: it compares nothing. Give NAME>NUMBER or NAME=VALUE, in quotes."),
        (
            ["--where", "enw=maze"],
            "where = enw=maze: no run has a metric or setting of that name. Did you mean",
        ),
        (["--where", "env>maze"], "where = env>maze: 'maze' is no number. Compare text with = or !=."),
        (["--sort", "lats"], "sort = lats: it is no column. Did you mean 'last'? There are: run, recipe,"),
        (["nowhere"], "nowhere: does not exist, and a run is a folder."),
        (["--csv", "notes.csv"], "notes.csv: there is a file that is no such table, and it stays."),
        (["--csv", "notes.csv/x.csv"], "notes.csv/x.csv: cannot be written ("),
        (["--csv", "notes.csv/x/y.csv"], "notes.csv/x/y.csv: cannot be written ("),
        (["--csv", "."], ".: cannot be written (Is a directory). Choose another --csv."),
        (["--csv", "/"], "/: cannot be written (Is a directory). Choose another --csv."),
        (["--csv", "x" * 254], "x" * 254 + ": cannot be written (File name too long). Choose another --csv."),
        (["--metric", "kll"], "metric = kll: no run has a metric of that name. Did you mean 'kl'?"),
        (["--metric", "kl", "steps", "--recipe", "ppo"], "metric = steps: no run has a metric of that name."),
    ],
)
def test_what_cannot_work_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes.csv").write_text("mine")
    assert cli.main(["runs", *words]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(message)
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("data.path=rows.jsonl", ["lists/many", "lists/one"]),
        ("data.path=rows.jsonl,more.jsonl", ["lists/many"]),
        ("data.path=rows.jsonl, more.jsonl", ["lists/many"]),
        ("data.path!=more.jsonl", ["lists/one"]),
        ("data.path!=rows.jsonl", []),
        ("optim.betas=0.90", ["lists/one"]),
        ("optim.betas>0.5", []),
    ],
)
def test_a_list_is_each_of_its_entries_and_all_of_them(
    where: str, found: list[str], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write("runs/lists/one", settings={"data": {"path": ["rows.jsonl"]}, "optim": {"betas": [0.9, 0.95]}})
    write("runs/lists/many", settings={"data": {"path": ["rows.jsonl", "more.jsonl"]}})
    assert names(capsys, "--where", where, "--find", "lists/") == found


def test_a_column_is_never_a_setting_of_the_same_name(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("runs/begun", settings={"steps": 100}, metrics=[])
    assert names(capsys, "--where", "steps>=50") == []
    assert names(capsys, "--where", "planned>=50") == ["begun"]


def test_a_run_that_learns_from_what_is_recorded_plays_no_episodes(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write("recorded", settings={"steps": 20, "episodes_per_step": 4, "offline": ["games.jsonl"]})
    assert cli.main(["runs", "recorded", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["episodes"] is None


def test_a_place_without_a_run_is_told_and_the_rest_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", "runs", "nowhere"]) == 2
    out, err = capsys.readouterr()
    assert "3 runs" in out
    assert err.startswith("nowhere: does not exist")


def test_the_table_goes_into_a_file_that_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert cli.main(["runs", "--csv", "out/runs.csv", "--metric", "kl"]) == 0
    with open("out/runs.csv", newline="") as file:
        found = {row["run"]: row for row in csv.DictReader(file)}
    assert (found["half"]["kl"], found["done"]["kl"], found["test"]["last"]) == ("3", "", "4.5")


def test_what_is_written_to_now_is_being_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Path("runs/half/.lock")
    lock.write_text("1\n")
    table = tmp_path / "locks"
    table.write_text(f"1: FLOCK  ADVISORY  WRITE 99 fe:00:{lock.stat().st_ino} 0 EOF\n")
    monkeypatch.setattr(runs_module, "LOCKS", table)
    run = read_run(Path("runs/half"))
    assert (run.state, run.notes[-1]) == ("training", "1 of 40 steps are recorded: it is being trained.")
    table.write_text("")
    assert read_run(Path("runs/half")).state == "stopped"


def test_a_run_that_its_recipe_ended_early_is_finished() -> None:
    (Path("runs/half") / "run.json").write_text('{"recipe": "sft", "version": "1", "steps": 40, "ended": true}')
    run = read_run(Path("runs/half"))
    assert (run.state, run.recipe, run.version, run.planned) == ("finished", "sft", "1", 40)
    assert not any("steps are recorded" in note for note in run.notes)


@pytest.mark.parametrize("text", ["{", "[]", '{"recipe": 3, "steps": "many"}', "\x00"])
def test_a_broken_run_json_is_as_good_as_none(text: str) -> None:
    (Path("runs/done") / "run.json").write_text(text)
    run = read_run(Path("runs/done"))
    assert (run.recipe, run.version, run.planned, run.state) == ("", "", 20, "finished")
