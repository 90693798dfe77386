"""Runs on a terminal: both levels as a table with sparklines, the latest episode, how fast it goes and what is left.

Runs in, things that rich can print out; reads one line of one file besides, the latest episode. What a model says is
text: control characters are shown as pictures of themselves.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from echelon.view import health
from echelon.view.compare import NAMED, best, early, headings, importance, late
from echelon.view.episodes import Scan
from echelon.view.runs import Metrics, Row, Run, number, parse

BARS = "▁▂▃▄▅▆▇█"
WIDEST_SPARK = 32
MOST_TURNS, LONGEST_SAID = 8, 240
MOST_METRICS = 6
"""Of each level."""
TAIL = 4_000_000
"""Bytes at the end of episodes.jsonl in which the latest whole row is looked for."""
COLORS = {"upper": "magenta", "lower": "cyan", "outcome": "bold", "reward": "green", "bad": "red", "warn": "yellow"}


def console() -> Console:
    """The terminal; elsewhere a place as wide as what is printed, without colours, so that nothing is cut."""
    found = Console()
    return found if found.is_terminal else Console(width=4_000, color_system=None)


def frame(run: Run, others: Sequence[Run] = ()) -> RenderableType:
    """One look at a run, and a line on each of the others."""
    parts: list[RenderableType] = [title(run), metrics_table(run)]
    if others:
        parts.append(lines([run, *others]))
    parts += [Text(f"! {clean(verdict.text)}", style=COLORS[verdict.state]) for verdict in worrying(run)[:4]]
    episode = latest(run)
    if episode:
        parts.append(said(episode))
    parts += [Text(clean(note), style="dim") for note in run.notes[:4]]
    return Group(*parts)


def worrying(run: Run) -> list[health.Verdict]:
    """Checks that found something, of the metrics alone: utterances are counted in the report."""
    return [one for one in health.checks(run.metrics, Scan()) if one.state in ("bad", "warn")]


def title(run: Run) -> Text:
    """Who it is and how far."""
    text = Text(clean(run.name), style="bold")
    what = " ".join(word for word in (run.recipe, run.version) if word)
    of = f" of {run.planned:,}" if run.planned else ""
    parts = [what, run.state if run.state != "unknown" else "", f"step {run.done:,}{of}", *pace(run)]
    return text.append("  " + " · ".join(part for part in parts if part), style="not bold")


def pace(run: Run) -> list[str]:
    """Steps a second over the last of them, the time it took, and what is left at that rate."""
    steps, seconds = run.metrics.steps, run.metrics["seconds"]
    known = [(step, at) for step, at in zip(steps, seconds, strict=False) if at is not None]
    if not known:
        return []
    found = [f"{clock(known[-1][1])} so far"]
    first, last = known[max(0, len(known) - 11)], known[-1]
    if last[1] > first[1]:
        rate = (last[0] - first[0]) / (last[1] - first[1])
        found.insert(0, f"{rate:.3g} steps a second" if rate >= 1 else f"{1 / rate:.3g} s a step" if rate > 0 else "")
        if run.planned and run.done < run.planned and rate > 0:
            found.append(f"{clock((run.planned - run.done) / rate)} left")
    return [part for part in found if part]


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(min(seconds, 1e9))))


def metrics_table(run: Run) -> Table:
    """What each level came to: the first fifth of the steps, the last one, the best step, and the curve."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("level", "metric"):
        table.add_column(name, no_wrap=name == "metric", overflow="ellipsis", ratio=None)
    for name in ("first", "last", "best"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("over the steps", no_wrap=True)
    names = [name for name in run.metrics.columns if name != "seconds" and run.metrics.finite(name)]
    for heading, kind, listed in headings(names):
        chosen = [name for name in listed if importance(name) < NAMED][:MOST_METRICS]
        for place, name in enumerate(chosen):
            numbers = [early(run, name), late(run, name), best(run, name)]
            cells = [Text(shown(value)) for value in numbers]
            style, last = COLORS.get(kind, ""), place + 1 == len(chosen)
            level = Text(heading if not place else "", style=style)
            table.add_row(level, Text(clean(name)), *cells, Text(spark(run.metrics, name), style), end_section=last)
    return table


def spark(metrics: Metrics, name: str, width: int = WIDEST_SPARK) -> str:
    """A curve as bars, each the mean of as many of the steps that have it; a gap where no number is finite."""
    values = metrics.recorded(name)
    every = -(-len(values) // width) if values else 1
    means = []
    for at in range(0, len(values), every):
        there = [value for value in values[at : at + every] if value is not None]
        means.append(sum(there) / len(there) if there else None)
    finite = [value for value in means if value is not None]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    top = len(BARS) - 1
    return "".join(
        " " if value is None else BARS[round(top * (value - low) / span)] if 0 < span < float("inf") else BARS[0]
        for value in means
    )


def lines(runs: Sequence[Run]) -> Table:
    """One line a run: how far it is and what it is for."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "recipe", "state", "step", "outcome", "last", ""):
        table.add_column(name, justify="right" if name in ("step", "last") else "left")
    for run in runs:
        name = health.outcome_of(run.metrics)
        cells = [
            run.name,
            run.recipe,
            run.state,
            f"{run.done:,}",
            name,
            shown(late(run, name)),
            spark(run.metrics, name),
        ]
        table.add_row(*(Text(clean(cell)) for cell in cells))
    return table


def latest(run: Run) -> Row | None:
    """The last whole row of episodes.jsonl; None where there is none within its last megabytes."""
    try:
        with run.episodes_file.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            rows = file.read(TAIL).split(b"\n")
    except OSError:
        return None
    whole = rows[1 if size > TAIL else 0 :]
    return next((row for line in reversed(whole) if line.strip() and (row := parse(line)[0])), None)


def said(episode: Row) -> RenderableType:
    """An episode in a few lines: who said what, and what it earned."""
    earned = number(episode.get("reward"))
    head = Text("the latest episode: ", style="dim").append(clean(str(episode.get("task", "")))[:120], style="bold")
    head.append(f"  step {episode.get('step', '?')}, return {shown(earned)}", style="dim")
    found = episode.get("turns")
    turns = [turn for turn in found if isinstance(turn, dict)] if isinstance(found, list) else []
    roles = list(dict.fromkeys(str(turn.get("role", "?")) for turn in turns))
    body = Table.grid(padding=(0, 1))
    body.add_column(no_wrap=True)
    body.add_column(overflow="fold")
    for place, turn in enumerate(turns[:MOST_TURNS]):
        role = str(turn.get("role", "?"))
        style = ("cyan", "magenta", "green", "yellow")[roles.index(role) % 4]
        if isinstance(turn.get("seen"), str) and (told := turn["seen"].strip()):  # of a first prompt, how it ends
            body.add_row("", Text(shortened(told if place else told[-LONGEST_SAID:]), style="dim"))
        value = number(turn.get("reward"))
        text = Text(shortened(str(turn.get("text") or turn.get("strategy") or "")))
        body.add_row(
            Text(clean(role)[:20], style=style), text.append(f"  {shown(value)}" if value else "", style="dim")
        )
    if len(turns) > MOST_TURNS:
        body.add_row("", Text(f"and {len(turns) - MOST_TURNS} more turns", style="dim"))
    return Group(head, body)


def shortened(text: str) -> str:
    """A text on one line, or its beginning."""
    line = " ".join(clean(text[: 4 * LONGEST_SAID]).split())
    return line if len(line) <= LONGEST_SAID else line[:LONGEST_SAID] + "…"


def clean(text: str) -> str:
    """Text without anything that a terminal would obey: control characters as the pictures that Unicode has of them,
    marks that turn the direction of writing as a replacement character."""
    return "".join(
        one
        if one in "\n\t" or one.isprintable()
        else chr(0x2400 + ord(one))
        if ord(one) < 0x20
        else "␡"
        if one == "\x7f"
        else "\ufffd"
        for one in text
    )


def shown(value: float | None) -> str:
    """A number as people read it; a dash for none."""
    return "–" if value is None else health.show(value)
