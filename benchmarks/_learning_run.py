"""One process of `learning.py`: makes the start of a task, or trains one method with one seed and tests it on the way.

    python benchmarks/_learning_run.py JOB.json

Everything is done by ordinary commands, in this process. A run leaves `train/`, the run directory of the recipe;
`clock.jsonl`, seconds of CPU after every step; `tests.jsonl`, what test games of each checkpoint returned; and last of
all `done.json`. Started again it goes on where it was. Knows one job and nothing of the others.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from _learning_setup import FULL, QUICK, SWEEP_TESTS, TASKS, Settings, Size, warm_start, write_start

from echelon import cli
from echelon.envs.players import measure

CLOCK_SECONDS = 0.1
"""How often the clock looks for new steps."""


def main(job: Mapping[str, Any]) -> None:
    """Do the job, whatever of it is done already."""
    out = Path(job["out"])
    if job["kind"] == "start":
        make_start(job, out)
    else:
        train(job, out)
        test(job, out)
        keep_newest(out / "train")


def make_start(job: Mapping[str, Any], out: Path) -> None:
    """The tiny model, its warm start, what that returns, episodes of it to learn from off-line, chance and optimum."""
    task, size = TASKS[job["task"]], size_of(job)
    if not (out / "tiny" / "config.json").exists():
        write_start(task, out, size=size)
    command("sft", warm_start(task, out), out / "warm", resume=(out / "warm" / "checkpoints").exists())
    games = {**job["tests"], "model": {"path": str(out / "warm")}}
    warm = play_games(games, out, episodes=job["final_games"])
    recorded = {"split": "train", "seed": 1, "transitions": str(out / "recorded.jsonl")}
    play_games({**games, **recorded}, out, episodes=size.recorded or task.recorded)
    drop_silent(out / "recorded.jsonl")
    chance = measure(task.spec, "random", rounds=size.chance_rounds, **({"guess": 0.5} if task.guess else {}))
    optimum = measure(task.spec, "optimal", rounds=1)
    write_done(out, {"warm": warm["return"], "chance": chance.reward, "optimum": optimum.reward})


def drop_silent(path: Path) -> None:
    """Leave out recorded episodes in which nothing was said at some turn: a file of transitions may not have them."""
    found = read_rows(path)
    silent = {row["episode"] for row in found if not row["action"].strip()}
    path.write_text("".join(json.dumps(row) + "\n" for row in found if row["episode"] not in silent), encoding="utf-8")


def train(job: Mapping[str, Any], out: Path) -> None:
    """Run the recipe, from its newest checkpoint if there is one, and note when each step was done."""
    folder, resume = out / "train", any((out / "train").glob("checkpoints/step_*/manifest.json"))
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
        (out / "clock.jsonl").unlink(missing_ok=True)
    elif rows(folder / "metrics.jsonl") == job["settings"]["steps"]:
        return
    importlib.import_module(f"echelon.recipes.{job['recipe']}")
    with clock(out / "clock.jsonl", folder, start=max(saved(folder), default=0)):
        command(job["recipe"], job["settings"], folder, resume=resume)


@contextmanager
def clock(path: Path, folder: Path, *, start: int) -> Iterator[None]:
    """Note the CPU seconds of this process whenever the run in `folder` has done another step, from `start` on.

    What a resumed run had spent before is counted, what it had to do again is not.
    """
    earlier = [row for row in read_rows(path) if row["step"] <= start]
    spent, ended, began = (earlier[-1]["cpu"] if earlier else 0.0), threading.Event(), time.process_time()
    path.write_text("".join(json.dumps(row) + "\n" for row in earlier), encoding="utf-8")

    def look(file: Any, known: int) -> int:
        if (done := rows(folder / "metrics.jsonl")) > known:
            file.write(json.dumps({"step": done, "cpu": round(spent + time.process_time() - began, 3)}) + "\n")
            file.flush()
        return max(done, known)

    def watch() -> None:
        with path.open("a", encoding="utf-8") as file:
            known = start
            while not ended.wait(CLOCK_SECONDS):
                known = look(file, known)
            look(file, known)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test(job: Mapping[str, Any], out: Path) -> None:
    """Test games of every checkpoint as it plays in training, and of the last one also without the upper level."""
    found, last = read_rows(out / "tests.jsonl"), max(saved(out / "train"))
    wanted = [(step, job["candidates"]) for step in sorted(saved(out / "train")) if step]
    if job["sweep"]:
        wanted = wanted[-SWEEP_TESTS:]
    elif job["candidates"] > 1:
        wanted.append((last, 1))
    with (out / "tests.jsonl").open("a", encoding="utf-8") as file:
        for step, candidates in wanted:
            if any((row["step"], row["candidates"]) == (step, candidates) for row in found):
                continue
            path = out / "train" / "checkpoints" / f"step_{step:06d}"
            games = {**job["tests"], "model": {"path": str(path)}, "candidates": candidates}
            played = play_games(
                games, out, episodes=job["games"] if job["sweep"] or step < last else job["final_games"]
            )
            file.write(json.dumps({"step": step, "candidates": candidates, **played}) + "\n")
            file.flush()
    write_done(out, {"steps": last})


def play_games(games: Settings, out: Path, *, episodes: int) -> dict[str, float]:
    """Play with `echelon evaluate`: mean return and wins, and how many episodes that were."""
    command("evaluate", {**games, "episodes": episodes, "overwrite": True}, out / "games")
    summary = json.loads((out / "games" / "summary.json").read_text(encoding="utf-8"))
    shutil.rmtree(out / "games")
    estimates = summary["estimates"]
    return {name: estimates[name]["mean"] for name in ("return", "win", "turns")} | {"episodes": episodes}


def command(recipe: str, settings: Mapping[str, Any], out: Path, *, resume: bool = False) -> None:
    """`echelon RECIPE OUT.yaml --out OUT` with those settings. Ends the process when it fails."""
    path = out.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")
    if status := cli.main([recipe, str(path), "--out", str(out), *(["--resume"] if resume else [])]):
        raise SystemExit(status)


def keep_newest(folder: Path) -> None:
    """Remove all checkpoints but the last one: a run that is done needs no other."""
    for step in sorted(saved(folder))[:-1]:
        shutil.rmtree(folder / "checkpoints" / f"step_{step:06d}")


def saved(folder: Path) -> list[int]:
    """The steps whose checkpoints are there."""
    return [int(path.parent.name.removeprefix("step_")) for path in folder.glob("checkpoints/step_*/manifest.json")]


def size_of(job: Mapping[str, Any]) -> Size:
    """How much is to be done."""
    return QUICK if job["quick"] else FULL


def write_done(out: Path, found: Mapping[str, Any]) -> None:
    """The file that says that nothing is left to do."""
    (out / "done.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, less a last one that is half written; none if it is not there."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def rows(path: Path) -> int:
    """How many lines a file has; none if it is not there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
