"""The runs below a folder: which recipe each is of, how far it is, and what it came to.

A table to be filtered and sorted, or the same as CSV or JSON. Reads run directories of any recipe and version, those
that are being written too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from echelon.config import CommandConfig, demand
from echelon.errors import ConfigError, did_you_mean
from echelon.train.log import typed
from echelon.view.runs import Run, find_runs, read_run, refuse, short_names
from echelon.view.tables import COLUMNS, listed, order, parse_condition, to_json, write_csv
from echelon.view.terminal import clean, clock, console, shown

FOLDERS = "folders"
"""What the folders mean that are named before the flags."""
EXAMPLES = """\
echelon runs                                            all below runs/
echelon runs sweep --recipe grpo --where "reward/mean>0.5" --sort last --reverse
echelon runs --state stopped                            what --resume could continue
echelon runs --metric policy/entropy --csv runs.csv"""
MOST = 10_000
SHOWN = ("run", "recipe", "state", "steps", "seconds", "outcome", "first", "last", "best")
"""Columns on a terminal; the files have all of them."""


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Settings of the list."""

    folders: tuple[str, ...] = ()
    """Where to look: runs, and folders with some below; without any, runs/ if it is there, else here."""
    recipe: tuple[str, ...] = ()
    """Only runs of these recipes."""
    find: str = ""
    """Only runs whose path has this in it."""
    state: Literal["", "training", "finished", "stopped", "evaluated", "unknown"] = ""
    """Only runs that are being trained, have come to their end, were interrupted, or are evaluations."""
    where: tuple[str, ...] = ()
    """Only runs of which all of this holds: `reward/mean>0.5` of the last fifth, `env=maze` of settings."""
    metric: tuple[str, ...] = ()
    """More columns: metrics, as means over the last fifth of the steps."""
    sort: str = "run"
    """Column by which runs are ordered."""
    reverse: bool = False
    """The other way round: the largest first."""
    csv: str = ""
    """Write the table to this file, too."""
    json: bool = False
    """Print the table as JSON, for a program, and nothing else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (*COLUMNS, *self.metric)
        because = f"it is no column.{did_you_mean(self.sort, known)} There are: {', '.join(known)}."
        demand(self, "sort", self.sort in known, because)

    @property
    def places(self) -> tuple[str, ...]:
        """Where to look."""
        return self.folders or ("runs" if Path("runs").is_dir() else ".",)


def main(cfg: Config) -> None:
    """Find, filter, sort, show."""
    paths, missed = find_runs(cfg.places, most=MOST)
    if cfg.dry_run:
        print("\n".join(map(str, paths)))
        return
    runs = [read_run(path) for path in paths]
    for run, name in zip(runs, short_names(paths), strict=True):
        run.name = name
    check_metrics(cfg, runs)
    rows = chosen(cfg, runs)
    columns = (*COLUMNS, *cfg.metric)
    if cfg.csv:
        write_csv(Path(cfg.csv), rows, columns)
    if cfg.json:
        print(to_json({"runs": rows}))
    else:
        show(cfg, rows, of=len(runs))
    refuse(missed)


def check_metrics(cfg: Config, runs: Sequence[Run]) -> None:
    """Raise ConfigError for a metric that no run has."""
    known = list(dict.fromkeys(name for run in runs for name in run.metrics.columns))
    for name in cfg.metric:
        if name not in known:
            raise ConfigError(f"metric = {name}: no run has a metric of that name.{did_you_mean(name, known)}")


def chosen(cfg: Config, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows of the runs that are meant, in order."""
    conditions = [parse_condition(text, runs) for text in cfg.where]
    rows = []
    for run in runs:
        row = listed(run, cfg.metric)
        meant = (not cfg.recipe or run.recipe in cfg.recipe) and cfg.find in str(run.path)
        meant = meant and cfg.state in ("", run.state) and all(one.holds(run, row) for one in conditions)
        if meant:
            rows.append(row)
    return order(rows, cfg.sort, reverse=cfg.reverse)


def show(cfg: Config, rows: Sequence[dict[str, Any]], *, of: int) -> None:
    """The table, what was written, and what to do next."""
    out, columns = console(), (*SHOWN, *cfg.metric)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    numbers = {"steps", "seconds", "first", "last", "best", *cfg.metric}
    for name in columns:
        table.add_column(clean(name), justify="right" if name in numbers else "left", overflow="fold")
    for row in rows:
        cells = {**row, "steps": steps(row), "seconds": "–" if row["seconds"] is None else clock(row["seconds"])}
        table.add_row(*(Text(clean(cell(cells[name]))) for name in columns))
    if rows:
        out.print(table)
    out.print(f"{len(rows)} of {of} runs" if len(rows) != of else f"{of} run{'s' * (of != 1)}", highlight=False)
    if cfg.csv:
        out.print(f"{cfg.csv}: the table with {len(COLUMNS) + len(cfg.metric)} columns", highlight=False, markup=False)
    if rows:
        names = [row["path"] for row in rows[:2]]
        what = typed("report", *names) if len(rows) == 1 else f"{typed('compare', *names)}   {typed('report', *names)}"
        out.print(f"Look closer: {what}", highlight=False, markup=False, soft_wrap=True)


def steps(row: dict[str, Any]) -> str:
    """Steps that are recorded, of those planned where more are."""
    done, planned = row["steps"], row["planned"]
    if not done and not planned:
        return "–"
    return f"{done or 0:,} of {planned:,}" if planned and planned != done else f"{done:,}"


def cell(value: object) -> str:
    """What a column says, for a person."""
    return str(value) or "–" if isinstance(value, str) else shown(value if isinstance(value, int | float) else None)
