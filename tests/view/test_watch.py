"""Runs as they are written: the server, whom it answers, and the view on a terminal."""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from echelon import cli
from echelon.recipes import watch
from echelon.view import runs as runs_module
from echelon.view.runs import Metrics, Run, read_run
from echelon.view.serve import Server, Watched
from echelon.view.terminal import clean, frame, latest, pace, spark
from tests.view.conftest import Write, episode, lines, turn


@pytest.fixture
def server(write: Write) -> Iterator[Server]:
    folder = write(episodes=[episode(0, "a task", [turn("</script>hello")])])
    server = Server(Watched([str(folder)], every=0.2, room=2_000_000), 0)
    yield server
    server.close()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(), answer.headers
    connection.close()
    return found


def test_the_page_and_its_news_are_under_the_token_alone(server: Server) -> None:
    base = f"/{server.token}/"
    assert server.address == f"http://127.0.0.1:{server.port}{base}"
    assert len(server.token) >= 32
    status, page, headers = ask(server, base)
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "connect-src 'self'" in page
    assert "</script>hello" not in page
    assert headers["Referrer-Policy"] == "no-referrer"
    assert [ask(server, path)[0] for path in ("/", "/wrong/", f"/{server.token}", base + "x", base + "../etc")] == [
        404
    ] * 5
    assert ask(server, base, Host="evil.example")[0] == 403
    assert ask(server, base, Host=f"localhost:{server.port}")[0] == 200
    assert [ask(server, base, method)[0] for method in ("POST", "PUT", "DELETE", "OPTIONS")] == [403] * 4
    assert ask(server, base, "HEAD")[:2] == (200, "")


def test_it_listens_on_this_machine_alone(server: Server) -> None:
    assert server._http.server_address[0] == "127.0.0.1"


def test_news_come_when_files_have_changed(server: Server, tmp_path: Path) -> None:
    path = f"/{server.token}/data"
    _, first, headers = ask(server, path)
    tag = headers["ETag"]
    assert json.loads(first)["runs"][0]["steps"] == 20
    assert ask(server, path, **{"If-None-Match": tag})[:2] == (304, "")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "reward/mean": NaN}\n{"step": 21, "rewa')
    server.watched._next = 0.0
    status, second, headers = ask(server, path, **{"If-None-Match": tag})
    assert (status, json.loads(second)["runs"][0]["steps"]) == (200, 21)
    assert headers["ETag"] != tag


def test_runs_that_come_later_come_after_the_others(server: Server, write: Write, tmp_path: Path) -> None:
    write("many/b")
    watched = Watched([str(tmp_path / "many")], every=1.0, room=2_000_000)
    assert [run.name for run in watched.runs()] == ["b"]
    write("many/a")
    assert [run.path.name for run in watched.runs()] == ["b", "a"]


def test_a_port_in_use_is_one_line(
    write: Write, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["watch", str(tmp_path / "run"), "--port", str(server.port)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    why = "cannot be listened on (Address already in use). Give another, or leave it out for a free one."
    assert err == f"port = {server.port}: {why}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "runs is missing: nothing says what to watch. Name a run directory: echelon watch DIR."),
        (["nowhere"], "nowhere: does not exist, and a run is a folder. Give what was --out of a recipe."),
        (["run", "--port", "70000"], "port = 70000: ports go from 1 to 65535. Give one of these, or 0 for a free one."),
        (["run", "--every", "0"], "every = 0.0: looking takes time itself. Give 0.1 or more."),
    ],
)
def test_what_cannot_work_is_one_line(
    words: list[str], message: str, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(write().parent)
    assert cli.main(["watch", *words]) == 2
    assert capsys.readouterr() == ("", f"{message}\n")


def test_an_interruption_ends_it_well(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", stop)
    assert cli.main(["watch", str(write())]) == 0
    out, err = capsys.readouterr()
    address = out.splitlines()[0]
    match = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/[\w-]{32}/", address)
    assert match
    assert out.splitlines()[-1].startswith("No longer watched. To keep the page: ")
    assert err == ""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", int(match[1])))


def seen(run: Run, width: int = 100) -> str:
    out = Console(file=io.StringIO(), width=width, color_system=None)
    out.print(frame(run))
    return out.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_a_frame_shows_both_levels_the_latest_episode_and_what_is_left(write: Write) -> None:
    metrics = [
        {"step": at, "seconds": 2.0 * (at + 1), "reward/mean": at, "critic/loss": 9 - at / 3, "policy/entropy": 1.0}
        for at in range(20)
    ]
    talk = [episode(at, "talk", [turn(f"I hear you, {at}.", reward=1.0, seen="sad")], at) for at in range(3)]
    folder = write(metrics=metrics, episodes=talk, settings={"steps": 50, "episodes_per_step": 4})
    with (folder / "episodes.jsonl").open("a") as file:
        file.write('{"step": 3, "tas')
    run = read_run(folder)
    text = seen(run)
    assert pace(run) == ["2 s a step", "0:00:40 so far", "0:01:00 left"]
    for words in ("step 20 of 50", "Upper level: critic of utterances", "Lower level: policy", "I hear you, 2.", "sad"):
        assert words in text
    assert "▁▁▂▂" in text
    assert seen(run, 40)


def test_a_run_that_has_only_begun_has_a_frame(write: Write) -> None:
    assert "No step is recorded yet" in seen(read_run(write(metrics=[])))


def test_a_curve_with_gaps_keeps_them() -> None:
    metrics = Metrics([0, 1, 2, 3], {"a": [0.0, None, 7.0, 3.5], "b": [None] * 4, "c": [1.0] * 4})
    assert [spark(metrics, name) for name in "abc"] == ["▁ █▅", "", "▁▁▁▁"]
    sparse = Metrics([0, 1, 2, 3, 4], {"a": [0.0, None, None, None, 7.0]}, absent={"a": {1, 3}})
    assert spark(sparse, "a") == "▁ █", "steps that do not have it are none of the curve"
    assert spark(Metrics([0, 1], {"a": [-1.7e308, 1.7e308]}), "a") == "▁▁"
    assert len(spark(Metrics(list(range(1000)), {"a": [float(at) for at in range(1000)]}), "a")) <= 32


def test_what_a_model_says_obeys_nobody(write: Write) -> None:
    folder = write(episodes=[episode(0, "\x1b]0;taken\x07", [turn("\x1b[2J[red]\x9b31m\u202e", role="\x1b[1m")])])
    text = seen(read_run(folder))
    assert not set("\x1b\x07\x9b\u202e") & set(text)
    assert "␛[2J[red]\ufffd31m" in text
    assert clean("a\tb\nc") == "a\tb\nc"


def test_the_latest_episode_is_the_last_whole_one(write: Write) -> None:
    folder = write(episodes=[episode(0, "first", []), episode(1, "second", [])])
    with (folder / "episodes.jsonl").open("ab") as file:
        file.write(b'[1]\n\n{"step": 2, "task": "thi')
    found = latest(read_run(folder))
    assert found is not None
    assert found["task"] == "second"
    (folder / "episodes.jsonl").write_text(lines([]))
    assert latest(read_run(folder)) is None


def test_where_the_output_is_no_terminal_it_looks_once(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["watch", str(write()), "--terminal"]) == 0
    out = capsys.readouterr().out
    assert "reward/mean" in out
    assert "\x1b" not in out


class Waited(Exception):
    """What a test raises in place of the time between two looks."""


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is a terminal, and nobody waits."""

    def wait(seconds: float) -> None:
        raise Waited

    monkeypatch.setattr(watch, "console", lambda: Console(file=io.StringIO(), force_terminal=True))
    monkeypatch.setattr(watch.time, "sleep", wait)


def evaluation(folder: Path) -> Path:
    """The directory of an evaluation."""
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text('{"recipe": "evaluate", "estimates": {"return": {"mean": 4.5}}}')
    return folder


def test_on_a_terminal_it_ends_when_runs_and_evaluations_have(terminal: None, write: Write, tmp_path: Path) -> None:
    assert cli.main(["watch", str(write("done")), "--terminal"]) == 0
    assert cli.main(["watch", str(evaluation(tmp_path / "test")), "--terminal"]) == 0


def test_on_a_terminal_a_run_that_has_only_begun_is_waited_for(
    terminal: None, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*folders: Path) -> None:
        cfg = watch.Config(runs=tuple(map(str, folders)), terminal=True)
        watch.look(cfg, Watched(cfg.runs, every=cfg.every, room=2_000_000))

    begun, test = write("begun", metrics=[]), evaluation(tmp_path / "test")
    with pytest.raises(Waited):
        look(begun)
    (begun / ".lock").write_text("1\n")
    (tmp_path / "locks").write_text(f"1: FLOCK  ADVISORY  WRITE 99 fe:00:{(begun / '.lock').stat().st_ino} 0 EOF\n")
    monkeypatch.setattr(runs_module, "LOCKS", tmp_path / "locks")
    with pytest.raises(Waited):
        look(begun, test)
