"""Draws the mean return of several runs over episodes, and says how much each improved.

    python benchmarks/curves.py runs/seed_* --episodes-per-step 128 --out curves.png

The last line is JSON: for every run the mean return of its first and of its last steps, and the gain.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated

import matplotlib
import tyro

matplotlib.use("Agg")
from matplotlib import pyplot


@dataclass
class Args:
    """What to draw."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories of one recipe with the same settings but for the seed."""
    episodes_per_step: int = 128
    """Episodes each step played."""
    steps: int = 4
    """How many first and last steps are compared."""
    out: Path = Path("curves.png")
    """Where the picture goes."""
    title: str = ""
    """Above the picture."""


def main(args: Args) -> None:
    """Draw, print a line per run, and the JSON line."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    curves, rows = [], []
    for run in args.runs:
        curve = [json.loads(line)["reward/mean"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        first, last = mean(curve[: args.steps]), mean(curve[-args.steps :])
        rows.append({"run": run.name, "first": round(first, 2), "last": round(last, 2), "gain": round(last - first, 2)})
        print(f"{run}: {first:.2f} -> {last:.2f}, gain {last - first:.2f}")
        curves.append(curve)
        axes.plot([args.episodes_per_step * (step + 1) for step in range(len(curve))], curve, alpha=0.35)
    middle = [mean(values) for values in zip(*curves, strict=True)]
    episodes = [args.episodes_per_step * (step + 1) for step in range(len(middle))]
    axes.plot(episodes, middle, color="black", linewidth=2, label=f"mean of {len(curves)} runs")
    axes.set(xlabel="episodes played", ylabel="mean return", title=args.title)
    axes.legend(frameon=False)
    figure.savefig(args.out, dpi=120)
    print(json.dumps({"smallest_gain": min(row["gain"] for row in rows), "rows": rows}))


if __name__ == "__main__":
    main(tyro.cli(Args))
