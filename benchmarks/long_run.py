"""What a long run costs to look at: writing its report, opening and filtering the page, watching it while it grows.

    python benchmarks/long_run.py

The run is written by hand as recipes write theirs: 1,000 steps of 100 episodes, eight turns each, with what was said
before every turn and the numbers of a critic; 300 MB in all. `echelon report` and `echelon watch --once` are processes
of their own, so their memory is all that they had at most. The page is opened in a headless Chromium (the browser
extra; without it these rows are left out): until its first view stands, and from a letter typed into the filter until
the list is what is asked for, both as the middle of several. A refresh of the watched page is what one look at the
run costs after a line was added to its files. The last line is JSON: `ratio` is the smallest of target over measured.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import tyro
from _harness import machine

BROWSER = Path(__file__).parents[1] / "build" / "browser"
"""Where `make browser` puts one."""
TEXT = "is it a thing that you would find in your house or some animal with four legs and much fur no yes"
WATCHING = """
import sys, time, resource
from echelon.view.serve import Watched
seen = Watched([sys.argv[1]], every=0.0, room=5_000_000)
seen.told()
for at in range(int(sys.argv[2])):
    with open(sys.argv[1] + "/metrics.jsonl", "a") as file:
        file.write('{"step": %d, "seconds": 1.0, "reward/mean": 1.0}\\n' % (10**6 + at))
    seen._next, began = 0.0, time.process_time()
    seen.told()
    print(time.process_time() - began)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@dataclass(kw_only=True)
class Long:
    """What is measured."""

    steps: int = 1_000
    """Steps of the run."""
    per_step: int = 100
    """Episodes of a step."""
    turns: int = 8
    """Turns of an episode."""
    repeats: int = 5
    """How often the page is opened and filtered, and the watched page refreshed."""
    threads: int = 1
    """Shown with the machine; nothing here works on more than one."""
    chromium: str = ""
    """The browser; without it, that of `make browser`, or one that is installed."""
    quick: bool = False
    """A run of 200 episodes; the numbers mean nothing."""

    def __post_init__(self) -> None:
        if self.quick:
            self.steps, self.per_step, self.repeats = 20, 10, 2


@dataclass(frozen=True)
class Row:
    """One thing, how much it took, and how much it may."""

    what: str
    measured: float
    target: float
    unit: str


def write_run(folder: Path, args: Long) -> None:
    """A run whose reward rises and whose episodes become shorter in words."""
    draw = random.Random(0)
    (folder / "checkpoints" / "step_000001").mkdir(parents=True)
    settings = f"seed: 0\nsteps: {args.steps}\nepisodes_per_step: {args.per_step}\nenv: twenty_questions\n"
    (folder / "checkpoints" / "step_000001" / "config.yaml").write_text(settings)
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "episodes.jsonl").open("w") as episodes:
        for step in range(args.steps):
            row = {"step": step, "seconds": 3.0 * step, "reward/mean": step / args.steps, "policy/entropy": 1.0}
            row |= {f"critic/number_{at}": draw.random() for at in range(20)}
            metrics.write(json.dumps(row) + "\n")
            for place in range(args.per_step):
                episodes.write(json.dumps(episode(step, place, args.turns, draw)) + "\n")


def episode(step: int, place: int, turns: int, draw: random.Random) -> dict[str, Any]:
    """One of them."""

    words = TEXT.split()

    def said() -> str:
        return " ".join(draw.choices(words, k=12))

    def turn(at: int) -> dict[str, Any]:
        numbers = {name: round(draw.gauss(0, 1), 6) for name in ("value", "advantage", "return")}
        return {"index": at, "role": "actor", "parent": at - 1 if at else None, "text": said(), "reward": -1.0} | (
            numbers | {"seen": said()}
        )

    return {
        "step": step,
        "task": f"game/{place % 40}",
        "seed": place,
        "ending": "terminated",
        "reward": -draw.random(),
        "error": None,
        "metrics": {"win": float(draw.random() < 0.5)},
        "turns": [turn(at) for at in range(turns)],
    }


def process(*words: str) -> tuple[float, float, float, str]:
    """A process to its end: seconds, those of the processor, MiB at most, and what it printed."""
    began = time.perf_counter()
    started = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    said = started.stdout.read()
    _, status, used = os.wait4(started.pid, 0)
    assert status == 0, said
    return time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, said


def in_browser(page: Path, args: Long) -> Iterator[Row]:
    """Opening and filtering; nothing where there is no browser."""
    ours = BROWSER / "chromium"
    name = args.chromium or (str(ours) if ours.is_file() else shutil.which("chromium") or "")
    if not name or importlib.util.find_spec("playwright") is None:
        print("no browser: pip install 'echelon[browser]' and make browser", file=sys.stderr)
        return
    from playwright.sync_api import sync_playwright

    opened, filtered = [], []
    with sync_playwright() as api:
        fonts = {"FONTCONFIG_PATH": str(BROWSER / "fonts")} if name == str(ours) else {}
        browser = api.chromium.launch(executable_path=name, args=["--no-sandbox"], env={**os.environ, **fonts})
        for _ in range(args.repeats):
            tab = browser.new_page(viewport={"width": 1440, "height": 900})
            began = time.perf_counter()
            tab.goto(page.as_uri())
            tab.wait_for_selector("#main > *")
            opened.append(time.perf_counter() - began)
            tab.evaluate("location.hash = 'episodes'")
            tab.wait_for_selector("#search")
            filtered.append(tab.evaluate(FILTERED) / 1000)
            tab.close()
        browser.close()
    yield Row("the page opens", median(opened), 3.0, "s")
    yield Row("a filter is typed and the list follows", median(filtered), 0.3, "s")


FILTERED = """async () => {
  const box = document.getElementById("search"), status = document.querySelector("[role=status]:not(#live)");
  const before = status.textContent, began = performance.now();
  box.value = "four legs";
  box.dispatchEvent(new Event("input"));
  while (status.textContent === before) await new Promise((go) => setTimeout(go, 1));
  document.body.getBoundingClientRect();
  return performance.now() - began;
}"""


def measured(folder: Path, args: Long) -> Iterator[Row]:
    """Everything, one after the other."""
    seconds, cpu, memory, _ = process("-m", "echelon", "report", str(folder))
    yield Row("the report is written", seconds, 60.0, "s")
    yield Row("processor time of writing it", cpu, 60.0, "s")
    yield Row("memory of writing it", memory, 2048.0, "MiB")
    yield from in_browser(folder / "report.html", args)
    seconds, _, memory, _ = process("-m", "echelon", "watch", str(folder), "--once")
    yield Row("a look on the terminal", seconds, 60.0, "s")
    yield Row("memory of that look", memory, 2048.0, "MiB")
    *refreshes, memory = map(float, process("-c", WATCHING, str(folder), str(args.repeats))[3].split())
    yield Row("processor time of a refresh", median(refreshes), 60.0, "s")
    yield Row("memory of the watching server", memory, 2048.0, "MiB")


def main(args: Long) -> None:
    """Write the run, measure, print, and the JSON line last."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch, "run")
        write_run(folder, args)
        size = (folder / "episodes.jsonl").stat().st_size / 1e6
        print(f"{args.steps * args.per_step:,} episodes, {size:,.0f} MB", flush=True)
        rows = []
        for row in measured(folder, args):
            rows.append(row)
            print(f"{row.what:<42} {row.measured:10.3f} {row.unit:<4} of {row.target:g}", flush=True)
        page = (folder / "report.html").stat().st_size / 1e6
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"the page is {page:.1f} MB; this script itself needs {own:.0f} MiB")
    print(machine(args.threads))
    ratio = min(row.target / max(row.measured, 1e-9) for row in rows)
    print(json.dumps({"ratio": round(ratio, 3), "rows": [asdict(row) for row in rows]}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Long, description=__doc__))
