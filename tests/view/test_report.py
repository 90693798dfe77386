"""The command: one line for what cannot work, a page for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from echelon import cli
from tests.view.conftest import Write


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "runs is missing: nothing says what to look at. Name a run directory: echelon report DIR."),
        (["nowhere"], "nowhere: does not exist, and a run is a folder. Give what was --out of a recipe."),
        (["notes.html"], "notes.html: is a file, and a run is a folder. Give what was --out of a recipe."),
        (
            ["run", "--out", "notes.html"],
            "notes.html: there is a file that is no report, and it stays. Choose another --out.",
        ),
        (["run", "--out", "run"], "run: cannot be written (Is a directory). Choose another --out."),
        (
            ["run", "--out", "notes.html/x.html"],
            "notes.html/x.html: cannot be written (Not a directory). Choose another --out.",
        ),
        (["run", "--out", "x" * 254], "x" * 254 + ": cannot be written (File name too long). Choose another --out."),
        (["run", "--size", "0.5"], "size = 0.5: the page itself takes part of one. Give 1 or more."),
        (["run", "--siez", "3"], "unknown flag '--siez'. Did you mean '--size'?"),
    ],
)
def test_what_cannot_work_is_one_line(
    words: list[str], message: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write()
    Path("notes.html").write_text("mine")
    assert cli.main(["report", *words]) == 2
    assert capsys.readouterr() == ("", f"{message}\n")
    assert Path("notes.html").read_text() == "mine"


def test_the_page_of_a_run_is_in_it_and_is_replaced(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    page = write() / "report.html"
    assert cli.main(["report", "run"]) == 0
    first = page.stat().st_ino
    assert cli.main(["report", "run"]) == 0
    assert page.stat().st_ino != first
    assert capsys.readouterr().out.splitlines()[-1].startswith("run/report.html: 1 run, 0 episodes, 0.1 MB. Open it in")


def test_a_place_without_a_run_is_told_and_the_rest_is_shown(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write()
    assert cli.main(["report", "run", "nowhere"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("report.html: 1 run, 0 episodes")
    assert err == "nowhere: does not exist, and a run is a folder. Give what was --out of a recipe.\n"


def test_of_several_runs_it_is_in_the_working_directory(write: Write) -> None:
    write("a")
    write("b")
    assert cli.main(["report", "a", "b"]) == 0
    assert Path("report.html").is_file()


def test_a_dry_run_names_the_runs_and_writes_nothing(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("many/a")
    write("many/b")
    assert cli.main(["report", "many", "--dry-run"]) == 0
    assert capsys.readouterr().out == "many/a\nmany/b\nwould be shown in many/report.html\n"
    assert not Path("many/report.html").exists()


def test_what_could_not_be_read_is_told(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write(settings={"steps": 20}, metrics=[{"step": 19, "loss": 1}, "no JSON"])
    assert cli.main(["report", "run"]) == 0
    assert capsys.readouterr().out.startswith("run: metrics.jsonl: 1 lines cannot be read, and are left out.\n")
