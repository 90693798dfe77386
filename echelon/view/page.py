"""One HTML file about some runs: it holds everything it needs, and asks no network for anything.

What runs say goes in as JSON inside a script element that is data, and the page writes it as text alone; only scripts
with the hashes named in its policy may run. Refuses to know files of runs (`runs`) and what numbers mean (`health`).
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from echelon import __version__
from echelon.view import health
from echelon.view.compare import early, evaluation, groups, headings, late, settings
from echelon.view.episodes import Scan, dumps, short, size, written
from echelon.view.runs import Metrics, Row, Run

LICENCE = "uPlot.LICENSE"
MARK = "<!-- a report of echelon -->"
"""Where a page of ours begins, so that nothing else is ever replaced by one."""
STYLES = ("uPlot.min.css", "page.css")
SCRIPTS = ("uPlot.iife.min.js", "base.js", "curves.js", "episodes.js", "page.js")
LIVE = "live.js"
LANGUAGE = """\
try { new Intl.NumberFormat(navigator.language); }
catch { Object.defineProperty(navigator, "language", { value: "en" }); }"""
"""uPlot writes numbers in the browser's language, and ends where that is none: of the locale POSIX en-US@posix."""
POINTS = 150_000
"""Numbers of curves that a page holds; longer runs have fewer points for each curve."""
FEWEST_BYTES = 200_000
"""What episodes may take where everything else has taken the room."""
MOST_POINTS, FEWEST_POINTS = 1_000, 40


def build(runs: Sequence[Run], scans: Sequence[Scan], *, room: int) -> str:
    """The page, in as many bytes as there is room for: episodes are shown as far as they fit, a few of them always."""
    return assemble(tell(runs, scans, room=room))


def tell(runs: Sequence[Run], scans: Sequence[Scan], *, room: int) -> str:
    """What the page tells, as JSON: what it takes with the page around it is `room`."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics.columns if name != "seconds"))
    points = max(FEWEST_POINTS, min(MOST_POINTS, POINTS // max(1, len(runs) * len(names))))
    about: Row = {
        "folder": folder_of([run.path for run in runs]),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": __version__,
        "headings": headings(names),
        "runs": [describe(run, found) for run, found in zip(runs, scans, strict=True)],
        "groups": groups(runs),
        "curves": [thin(run.metrics, points) for run in runs],
        "settings": settings(runs),
        "evaluations": [
            {"run": place, "name": name, **evaluation(summary)}
            for place, run in enumerate(runs)
            for name, summary in run.evaluations.items()
        ],
    }
    left = room - size(assemble(dumps(about))) - 40 * len(runs)
    episodes = share_out(runs, scans, max(left, FEWEST_BYTES))
    for run, shown in zip(about["runs"], episodes, strict=True):
        run["shown"] = len(shown)
    return dumps(about)[:-1] + ',"episodes":[' + ",\n".join(text for several in episodes for text in several) + "]}"


def folder_of(paths: Sequence[Path]) -> str:
    """The name of the folder that several runs lie in, empty where they have only the root in common."""
    return Path(os.path.commonpath([path.resolve().parent for path in paths])).name if paths else ""


def share_out(runs: Sequence[Run], scans: Sequence[Scan], room: int) -> list[list[str]]:
    """The episodes of each run as JSON; what a small run does not need is there for the others."""
    shown: list[list[str]] = [[] for _ in runs]
    order = sorted(range(len(runs)), key=lambda place: len(scans[place].places))
    for done, place in enumerate(order):
        shown[place] = written(runs[place], place, scans[place], room // (len(order) - done))
        room -= sum(size(text) + 2 for text in shown[place])
    return shown


def asset(name: str) -> str:
    """A file that is part of every page."""
    return (resources.files("echelon.view") / "assets" / name).read_text(encoding="utf-8")


def assemble(told: str, *, live: bool = False) -> str:
    """The page around what is told. A live one asks the server that it came from, and nobody else, what is new."""
    first = f"{LANGUAGE}\n/*\n{asset(LICENCE)}*/\n{asset(SCRIPTS[0])}"
    scripts = [first, *map(asset, SCRIPTS[1:]), *([asset(LIVE)] * live)]
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    parts = {
        "connect": "'self'" if live else "'none'",
        "policy": " ".join(f"'sha256-{one}'" for one in hashes),
        "styles": "\n".join(asset(name) for name in STYLES),
        "data": told,
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    pieces = re.split(r"\{\{(\w+)\}\}", asset("page.html"))  # split first: what is told may look like a place, too
    return MARK + "\n" + "".join(parts[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def describe(run: Run, found: Scan) -> Row:
    """What is said of one run: verdicts, and where its time went."""
    metrics = run.metrics
    outcome = health.outcome_of(metrics)
    return {
        "name": run.name,
        "path": str(run.path),
        "recipe": run.recipe,
        "version": run.version,
        "state": run.state,
        "planned": run.planned,
        "done": run.done,
        "about": {name: run.settings[name] for name in ("env", "data.path", "model.path") if run.settings.get(name)},
        "steps": len(metrics.steps),
        "seconds": (metrics.finite("seconds") or [0.0])[-1],
        "perStep": run.per_step,
        "episodes": len(found.places),
        "outcome": outcome,
        "first": short(early(run, outcome), 5),
        "last": short(late(run, outcome), 5),
        "learned": verdict(health.learned(metrics)) if metrics.steps else None,
        "levels": [verdict(one) for one in health.levels(metrics)],
        "checks": [verdict(one) for one in health.checks(metrics, found)],
        "notes": run.notes,
        "phases": phases(run),
        "times": {name: short(spent, 5) for name, spent in times(run).items()},
    }


def verdict(one: health.Verdict) -> Row:
    """A verdict for the page."""
    return {"title": one.title, "state": one.state, "text": one.text}


def thin(metrics: Metrics, points: int) -> Row:
    """Curves of a run with so many points at most; each point of a longer one is the mean of `every` steps.

    `sparse` has the places of the points of those curves that not every point is one of: where no row has it.
    """
    count = len(metrics.steps)
    every = -(-count // points) if count else 1
    spans = [range(at, min(at + every, count)) for at in range(0, count, every)]
    columns: dict[str, list[float | int | None]] = {}
    sparse: dict[str, list[int]] = {}
    for name, values in metrics.columns.items():
        if all(value is None for value in values):
            continue
        columns[name] = [short(mean(values[span.start : span.stop]), 5) for span in spans]
        lacking = metrics.absent.get(name, set())
        there = [place for place, span in enumerate(spans) if not lacking.issuperset(span)]
        sparse |= {name: there} if len(there) < len(spans) else {}
    return {"every": every, "steps": [metrics.steps[span[-1]] for span in spans], "columns": columns, "sparse": sparse}


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is there."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def phases(run: Run) -> list[Row]:
    """Time and tokens by what was learning: the steps in which the same parts have a loss."""
    metrics, played = run.metrics, run.per_step or 0
    seconds = metrics["seconds"] or [None] * len(metrics.steps)
    losses = [name for name in metrics.columns if name == "loss" or (name.endswith("/loss") and name.count("/") == 1)]
    found: dict[str, dict[str, float]] = {}
    for at, now in enumerate(seconds):
        who = ", ".join(name.removesuffix("/loss") for name in losses if metrics[name][at] is not None) or "none"
        turns, tokens = _at(metrics, "episode/turns", at), _at(metrics, "turn/tokens", at)
        before = (seconds[at - 1] if at else 0.0) or 0.0
        step = {
            "steps": 1.0,
            "seconds": now - before if now is not None else 0.0,
            "episodes": float(played if turns else 0),
            "turns": played * turns,
            "tokens": played * turns * tokens or _at(metrics, "tokens", at),
        }
        earlier = found.get(who, {})
        found[who] = {name: earlier.get(name, 0.0) + value for name, value in step.items()}
    return [{"who": who, **{name: short(value, 6) for name, value in one.items()}} for who, one in found.items()]


def times(run: Run) -> dict[str, float]:
    """Seconds by what was done in them, as far as the rows say it, and the rest; empty where they say nothing."""
    before = "seconds/"
    found = {
        name.removeprefix(before): sum(run.metrics.finite(name))
        for name in run.metrics.columns
        if name.startswith(before)
    }
    total = (run.metrics.finite("seconds") or [0.0])[-1]
    return found | {"rest": max(0.0, total - sum(found.values()))} if found else {}


def _at(metrics: Metrics, name: str, place: int) -> float:
    values = metrics[name]
    return (values[place] or 0.0) if values else 0.0
