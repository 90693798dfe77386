"""Runs as they train: the page of `report` from this machine to this machine, or a view on the terminal.

The page is at an address with a random part that is printed once; nobody without it sees anything, and nothing but this
machine can connect. Nothing is written. Ctrl-C ends it; runs go on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.live import Live

from echelon.config import CommandConfig, demand
from echelon.errors import ConfigError
from echelon.train.log import typed
from echelon.view.runs import Run, find_runs, refuse
from echelon.view.serve import Server, Watched
from echelon.view.terminal import console, frame

FOLDERS = "runs"
"""What the folders mean that are named before the flags."""
EXAMPLES = """\
echelon watch runs/archer                               the page, at an address that is printed
echelon watch runs/quickstart                           every run below the folder, those to come too
echelon watch runs/archer --terminal                    both levels, the latest episode, rate and time left
echelon watch runs/archer --terminal --once             one look, then end"""


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Settings of watching."""

    runs: tuple[str, ...] = ()
    """Run directories, or folders with some below, also such as come later."""
    terminal: bool = False
    """A view on the terminal in place of the page."""
    once: bool = False
    """Look once at the runs on the terminal, and end; where the output is no terminal it is always so."""
    port: int = 0
    """Port of the page on 127.0.0.1; 0 takes one that is free."""
    every: float = 2.0
    """Seconds between two looks."""
    size: float = 5.0
    """Megabytes that the page may take: where episodes do not fit, those that say most are shown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise ConfigError("runs is missing: nothing says what to watch. Name a run directory: echelon watch DIR.")
        demand(
            self, "port", 0 <= self.port < 65536, "ports go from 1 to 65535. Give one of these, or 0 for a free one."
        )
        demand(self, "every", 0.1 <= self.every < math.inf, "looking takes time itself. Give 0.1 or more.")
        demand(self, "size", 1 <= self.size < math.inf, "the page itself takes part of one. Give 1 or more.")


def main(cfg: Config) -> None:
    """Look, until it is enough."""
    paths, missed = find_runs(cfg.runs)
    if cfg.dry_run:
        print("\n".join(map(str, paths)))
        return
    watched = Watched(cfg.runs, every=cfg.every, room=int(cfg.size * 1e6))
    try:
        if cfg.terminal or cfg.once:
            look(cfg, watched)
        else:
            serve(cfg, watched)
    except KeyboardInterrupt:
        print(f"\nNo longer watched. To keep the page: {typed('report', *cfg.runs)}")
    refuse(missed)


def serve(cfg: Config, watched: Watched) -> None:
    """The page, until Ctrl-C."""
    watched.told()  # what cannot be read is said before anybody looks
    server = Server(watched, cfg.port)
    print(f"{server.address}\nOpen it in a browser on this machine: it follows the runs. Ctrl-C ends it.", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        server.close()


def look(cfg: Config, watched: Watched) -> None:
    """The view on the terminal, until Ctrl-C, or until nothing is being trained any more."""
    out = console()
    runs = watched.runs()
    if cfg.once or not out.is_terminal:
        out.print(frame(*first(runs)))
    else:
        with Live(frame(*first(runs)), console=out, auto_refresh=False, vertical_overflow="crop") as live:
            while any(run.state == "training" for run in runs) or not any(map(begun, runs)):
                time.sleep(cfg.every)
                runs = watched.runs()
                live.update(frame(*first(runs)), refresh=True)
    end = f"All of it in one page: {typed('report', *cfg.runs)}"
    out.print(end, highlight=False, markup=False, soft_wrap=True)


def begun(run: Run) -> bool:
    """Whether it has a step, or is an evaluation, which never has one."""
    return bool(run.done) or run.state == "evaluated"


def first(runs: Sequence[Run]) -> tuple[Run, list[Run]]:
    """The run that was written to last, and the others."""

    def written(run: Run) -> float:
        try:
            return (run.path / "metrics.jsonl").stat().st_mtime
        except OSError:
            return 0.0

    latest = max(runs, key=written)
    return latest, [run for run in runs if run is not latest]
