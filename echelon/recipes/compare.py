"""Runs side by side: where their settings differ, what each level came to, and how they did when they were tested.

Runs that differ in their seed alone count as one, with the median and an interval: the middle half of them, of fewer
than five all of them. Runs of different recipes and versions can be compared; each shows what it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from echelon.config import CommandConfig
from echelon.errors import ConfigError, did_you_mean
from echelon.train.log import typed
from echelon.view.compare import by_level, differences, evaluated, groups
from echelon.view.episodes import short
from echelon.view.runs import Row, Run, open_runs, refuse
from echelon.view.tables import to_json, write_csv
from echelon.view.terminal import clean, clock, console, shown

FOLDERS = "runs"
"""What the folders mean that are named before the flags."""
EXAMPLES = """\
echelon compare runs/grpo runs/archer
echelon compare sweep                                   every run below the folder, seeds together
echelon compare sweep --metric policy/ eval/            metrics with these in their names
echelon compare sweep --csv compared.csv"""
COLUMNS = ("table", "under", "name", "runs", "value", "low", "high", "seeds")
"""What a CSV file of a comparison has: a row for each number or setting of each group of runs."""


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Settings of a comparison."""

    runs: tuple[str, ...] = ()
    """Run directories, or folders with some below: what was --out of recipes and evaluations."""
    metric: tuple[str, ...] = ()
    """Metrics to compare: parts of their names; without any, those that say most."""
    csv: str = ""
    """Write all of it to this file, too: a row for each number."""
    json: bool = False
    """Print it as JSON, for a program, and nothing else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise ConfigError(
                "runs is missing: nothing says what to compare. Name run directories: echelon compare A B."
            )


def main(cfg: Config) -> None:
    """Read, put side by side, show."""
    runs, missed = open_runs(cfg.runs)
    if cfg.dry_run:
        print("\n".join(str(run.path) for run in runs))
        return
    check_metrics(cfg, runs)
    found = compared(runs, cfg.metric)
    if cfg.csv:
        write_csv(Path(cfg.csv), list(flat(found)), COLUMNS)
    if cfg.json:
        print(to_json(found))
    else:
        show(cfg, runs, found)
    refuse(missed)


def check_metrics(cfg: Config, runs: Sequence[Run]) -> None:
    """Raise ConfigError for a part that is in the name of no metric."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics.columns if name != "seconds"))
    parts = [*names, *{part for name in names for part in name.split("/")}]
    for word in cfg.metric:
        if not any(word in name for name in names):
            raise ConfigError(f"metric = {word}: no run has a metric with that in its name.{did_you_mean(word, parts)}")


def compared(runs: Sequence[Run], wanted: Sequence[str] = ()) -> dict[str, Any]:
    """The groups of runs, settings in which they differ, their levels and their evaluations."""
    together = groups(runs)
    return {
        "groups": [about(group, [runs[place] for place in group["runs"]]) for group in together],
        "settings": differences(runs, together),
        "levels": rounded(by_level(runs, together, wanted), "last", "best"),
        "evaluations": rounded(evaluated(runs, together), "values"),
    }


def about(group: Row, runs: Sequence[Run]) -> Row:
    """Who is compared."""
    return {
        "name": group["name"],
        "runs": [str(run.path) for run in runs],
        "recipe": runs[0].recipe,
        "versions": sorted({run.version for run in runs if run.version}),
        "states": sorted({run.state for run in runs}),
        "steps": max(run.done for run in runs),
        "seconds": sum((run.metrics.finite("seconds") or [0.0])[-1] for run in runs),
        "notes": [f"{run.name}: {note}" for run in runs for note in run.notes],
    }


def rounded(rows: Sequence[Row], *names: str) -> list[Row]:
    """The same with numbers of six digits."""
    for row in rows:
        for name in names:
            row[name] = [one and {key: short(value, 6) for key, value in one.items()} for one in row[name]]
    return list(rows)


def flat(found: dict[str, Any]) -> Iterator[Row]:
    """All of it, a row for each number."""
    called = [group["name"] for group in found["groups"]]
    for row in found["settings"]:
        for name, value in zip(called, row["values"], strict=True):
            yield {"table": "setting", "name": row["setting"], "runs": name, "value": value}
    numbers = [("last", row["heading"], row["metric"], row["last"]) for row in found["levels"]]
    numbers += [("best", row["heading"], row["metric"], row["best"]) for row in found["levels"]]
    numbers += [("evaluation", row["evaluation"], row["estimate"], row["values"]) for row in found["evaluations"]]
    for kind, under, what, values in numbers:
        for name, one in zip(called, values, strict=True):
            if one is not None:
                spread = {"value": one["median"], "low": one["low"], "high": one["high"], "seeds": one["runs"]}
                yield {"table": kind, "under": under, "name": what, "runs": name, **spread}


def show(cfg: Config, runs: Sequence[Run], found: dict[str, Any]) -> None:
    """Four tables, what was written, and what to do next."""
    out = console()
    called = [group["name"] for group in found["groups"]]
    table = columns(["", "recipe", "runs", "state", "steps", "time"])
    for group in found["groups"]:
        versions = f" {', '.join(group['versions'])}" if group["versions"] else ""
        states, time = ", ".join(group["states"]), clock(group["seconds"]) if group["seconds"] else "–"
        cells = [group["name"], (group["recipe"] or "–") + versions, str(len(group["runs"])), states]
        table.add_row(*(Text(clean(one)) for one in (*cells, f"{group['steps']:,}", time)))
    out.print(table)
    if len(called) > 1:
        tell_settings(out, called, found["settings"])
    levels = [
        [row["heading"], row["metric"], *(told(*pair) for pair in zip(row["last"], row["best"], strict=True))]
        for row in found["levels"]
    ]
    once = dict.fromkeys(row[0] for row in levels)
    levels = [[row[0] if once.pop(row[0], "") is None else "", *row[1:]] for row in levels]
    tell(out, "the last fifth of the steps, and the best step", ["level", "metric", *called], levels)
    tests = [[row["evaluation"] or "–", row["estimate"], *map(told, row["values"])] for row in found["evaluations"]]
    tell(out, "evaluations", ["evaluation", "", *called], tests)
    for note in [note for group in found["groups"] for note in group["notes"]][:8]:
        out.print(Text(clean(note), style="dim"))
    if cfg.csv:
        out.print(f"{cfg.csv}: all of it, a row for each number", highlight=False, markup=False)
    next_ = typed("report", *cfg.runs)
    out.print(f"Their curves and episodes in one page: {next_}", highlight=False, markup=False, soft_wrap=True)


def tell_settings(out: Console, called: Sequence[str], rows: Sequence[Row]) -> None:
    """Settings that all of them have; those that only some recipes know are counted."""
    shared = [row for row in rows if "–" not in row["values"]]
    tell(out, "settings that differ", ["setting", *called], [[row["setting"], *row["values"]] for row in shared])
    if len(rows) > len(shared):
        out.print(f"{len(rows) - len(shared)} settings are of some of them only: see --json or --csv", style="dim")


def columns(names: Sequence[str]) -> Table:
    """An empty table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(Text(clean(name)), overflow="fold")
    return table


def tell(out: Console, title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table under its title, if it has a row."""
    if not rows:
        return
    table = columns(names)
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    out.print(Text(title, style="bold"))
    out.print(table)


def told(last: Row | None, best: Row | None = None) -> str:
    """A number with its interval, and the best one where there is a best."""
    if last is None:
        return "–"
    interval = f" [{shown(last['low'])}, {shown(last['high'])}]" if last["low"] not in (None, last["high"]) else ""
    top = f"  best {shown(best['median'])}" if best else ""
    return f"{shown(last['median'])}{interval}{top}"
