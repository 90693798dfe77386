"""A report of runs: one page to open from a disk, with their curves, their health and what was said.

Learning curves of each level, verdicts in plain words, settings that differ, evaluations, where the time went, and the
episodes turn by turn. Runs of any recipe, several at once, also those that are still being written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from echelon.config import CommandConfig, demand
from echelon.errors import CheckpointError, ConfigError
from echelon.view.episodes import Scan, scan
from echelon.view.page import MARK, build
from echelon.view.runs import Run, find_runs, open_runs, refuse
from echelon.view.terminal import clean

FOLDERS = "runs"
"""What the folders mean that are named before the flags."""
EXAMPLES = """\
echelon report runs/archer                              writes runs/archer/report.html
echelon report runs/quickstart                          every run and evaluation below the folder, compared
echelon report runs/seed_0 runs/seed_1 --out seeds.html several by name"""


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Settings of a report."""

    runs: tuple[str, ...] = ()
    """Run directories, or folders with some below: what was --out of recipes and evaluations."""
    out: str = ""
    """The page; without it report.html, in the run or folder if there is one, and else in the working directory."""
    size: float = 5.0
    """Megabytes that the page may take: where episodes do not fit, those that say most are shown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise ConfigError(
                "runs is missing: nothing says what to look at. Name a run directory: echelon report DIR."
            )
        demand(self, "size", 1 <= self.size < math.inf, "the page itself takes part of one. Give 1 or more.")

    @property
    def page(self) -> Path:
        """Where the page goes."""
        return Path(self.out or Path(self.runs[0] if len(self.runs) == 1 else ".", "report.html"))


def main(cfg: Config) -> None:
    """Read, judge, write the page, and say where it is."""
    if cfg.dry_run:
        print("\n".join(f"{path}" for path in find_runs(cfg.runs)[0]) + f"\nwould be shown in {cfg.page}")
        return
    runs, missed = open_runs(cfg.runs)
    check_page(cfg.page)
    scans = [scan(run) for run in runs]
    write_page(cfg.page, build(runs, scans, room=int(cfg.size * 1e6)))
    print(summary(cfg.page, runs, scans))
    refuse(missed)


def check_page(page: Path) -> None:
    """Raise CheckpointError where something else than a page of ours is."""
    try:
        with page.open("rb") as file:
            ours = file.read(len(MARK)) == MARK.encode()
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"{page}: cannot be written ({error.strerror}). Choose another --out.") from error
    if not ours:
        raise CheckpointError(f"{page}: there is a file that is no report, and it stays. Choose another --out.")


def write_page(page: Path, text: str) -> None:
    """Write the page whole or not at all. Raises CheckpointError where it cannot be written."""
    scratch = page.with_name(f".{page.name}.tmp")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(text.encode("utf-8", errors="replace"))
        os.replace(scratch, page)
    except OSError as error:
        with suppress(OSError):  # where nothing can be written nothing is left behind
            scratch.unlink()
        raise CheckpointError(f"{page}: cannot be written ({error.strerror}). Choose another --out.") from error


def summary(page: Path, runs: Sequence[Run], scans: Sequence[Scan]) -> str:
    """What was read, what could not be, and what to do next."""
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    more = [f"and {len(notes) - 8} more notes, in the page"] if len(notes) > 8 else []
    played = sum(len(found.places) for found in scans)
    what = f"{len(runs)} run{'s' * (len(runs) > 1)}, {played:,} episodes"
    size = page.stat().st_size / 1e6
    return "\n".join(
        [*map(clean, notes[:8]), *more, f"{page}: {what}, {size:.1f} MB. Open it in a browser: it needs no network."]
    )
