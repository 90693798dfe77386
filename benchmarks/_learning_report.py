"""What the runs of `learning.py` found: medians over seeds, episodes needed to reach what others end with, a picture.

Reads the files of runs that are finished and ignores the others. Knows nothing of processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from _learning_run import read_rows
from _learning_setup import METHODS, TASKS, Settings

LEARNED = 0.05
"""The part of the way from the warm start to the optimum that a baseline must have come to be one to be reached."""
COLORS = {
    "filtered_bc": "tab:gray",
    "grpo": "tab:orange",
    "grpo_turn": "tab:red",
    "ppo_token": "tab:brown",
    "ppo_turn": "tab:pink",
    "archer": "tab:blue",
    "offline_iql_awr": "tab:purple",
    "rank": "tab:green",
}


def best_point(task: str, method: str, folder: Path) -> tuple[int, list[float | None]]:
    """Which point of a method's sweep is best, and what each returned: the mean of its last tests; None if missing."""
    found: list[float | None] = []
    for number in range(len(METHODS[method].sweep(TASKS[task]))):
        run = read_run(folder / "sweep" / method / f"point_{number}")
        found.append(None if run is None else mean(test["return"] for test in run["tests"]))
    known = [value for value in found if value is not None]
    return (found.index(max(known)) if known else 0), found


def report(task: str, methods: Sequence[str], folder: Path, out: Path) -> Settings:
    """Write OUT/TASK.json, .png and .md, and return what the last line says."""
    start = json.loads((folder / "start" / "done.json").read_text(encoding="utf-8"))
    runs = {method: read_runs(folder / "runs" / method) for method in methods}
    runs = {method: found for method, found in runs.items() if found}
    found = {method: summarise(task, method, folder, some, start["warm"]) for method, some in runs.items()}
    least = start["warm"] + LEARNED * (start["optimum"] - start["warm"])
    ends = {method: one["final"]["median"] for method, one in found.items() if METHODS[method].flat}
    flats = {method: end for method, end in ends.items() if end >= least}
    for one in found.values():
        one["reaches"] = {flat: reaching(one["curve"], flats[flat]) for flat in flats}
        needed = one["reaches"]
        played = {flat: found[flat]["episodes"] for flat in flats}
        one["ratio"] = {flat: fewer(played[flat], needed[flat]) for flat in flats}
    best = max(flats, key=lambda flat: flats[flat], default=None)
    ratios = [found[name]["ratio"][best] or 0.0 for name in ("archer", "rank") if best and name in found]
    chance = {name: start[name] for name in ("warm", "chance", "optimum")}
    whole = {"task": task, **chance, "best_baseline": best, "baselines": flats, "methods": found}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{task}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (out / f"{task}.md").write_text(tables(whole), encoding="utf-8")
    draw(out / f"{task}.png", whole)
    rows = [{"method": name, **one["final"], "ratio": one["ratio"]} for name, one in found.items()]
    return {"ratio": max(ratios, default=None), "task": task, "best_baseline": best, "rows": rows}


def read_run(out: Path) -> dict[str, Any] | None:
    """The tests of a finished run, each with episodes and CPU seconds until then; None of one that is not."""
    if not (out / "done.json").exists():
        return None
    job = json.loads((out / "job.json").read_text(encoding="utf-8"))
    cpu = {row["step"]: row["cpu"] for row in read_rows(out / "clock.jsonl")}
    wall = {row["step"] + 1: row["seconds"] for row in read_rows(out / "train" / "metrics.jsonl")}
    tests = [
        {**test, "episodes": test["step"] * job["per_step"], "cpu": at(cpu, test["step"]), "wall": wall[test["step"]]}
        for test in read_rows(out / "tests.jsonl")
    ]
    playing = [test for test in tests if test["candidates"] == job["candidates"]]
    alone = [test for test in tests if test["candidates"] != job["candidates"]]
    return {"job": job, "tests": playing, "alone": alone}


def at(cpu: Mapping[int, float], step: int) -> float:
    """CPU seconds after a step: when the clock first saw it or a later one."""
    return next((seconds for known, seconds in sorted(cpu.items()) if known >= step), max(cpu.values(), default=0.0))


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The finished runs of a method, by seed."""
    paths = sorted(folder.glob("seed_*"), key=lambda path: int(path.name.removeprefix("seed_")))
    return [run for path in paths if (run := read_run(path)) is not None]


def summarise(task: str, method: str, folder: Path, runs: Sequence[Mapping[str, Any]], warm: float) -> dict[str, Any]:
    """One method over its seeds: settings, sweep, curves with their bands, what it ends with."""
    smooth = [smoothed([test["return"] for test in run["tests"]]) for run in runs]
    first, (chosen, returns) = runs[0], best_point(task, method, folder)
    tried = METHODS[method].sweep(TASKS[task])
    recorded = first["job"]["recorded"]
    curve = [
        {
            "episodes": recorded or first["tests"][number]["episodes"],
            "cpu": median(run["tests"][number]["cpu"] for run in runs),
            "wall": median(run["tests"][number]["wall"] for run in runs),
            **spread([values[number] for values in smooth]),
        }
        for number in range(len(first["tests"]))
    ]
    begin = {"episodes": recorded, "cpu": 0.0, "wall": 0.0, "median": warm, "low": warm, "high": warm}
    ends = [run["tests"][-1] for run in runs]
    alone = [run["alone"][-1]["return"] for run in runs if run["alone"]]
    return {
        "title": METHODS[method].title,
        "seeds": len(runs),
        "episodes": curve[-1]["episodes"],
        "cpu": curve[-1]["cpu"],
        "wall": curve[-1]["wall"],
        "final": spread([test["return"] for test in ends]),
        "win": median(test["win"] for test in ends),
        "alone": spread(alone) if alone else None,
        "sweep": [{**point, "return": value} for point, value in zip(tried, returns, strict=True)],
        "chosen": chosen,
        "settings": first["job"]["settings"],
        "curve": [begin, *curve],
        "runs": [[test["return"] for test in run["tests"]] for run in runs],
    }


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each with the one before and the one after it."""
    return [mean(values[max(0, place - 1) : place + 2]) for place in range(len(values))]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def reaching(curve: Sequence[Mapping[str, float]], wanted: float) -> float | None:
    """Episodes after which the median has reached a return, in between two tests on the line; None if it never does."""
    for before, after in pairwise(curve):
        if after["median"] >= wanted:
            rise = after["median"] - before["median"]
            part = max(0.0, (wanted - before["median"]) / rise) if rise > 0 else 1.0
            return float(round(before["episodes"] + part * (after["episodes"] - before["episodes"])))
    return None


def fewer(played: float, needed: float | None) -> float | None:
    """How many times fewer episodes that are; None for what is never reached."""
    return None if needed is None else round(played / max(needed, 1.0), 2)


def tables(whole: Mapping[str, Any]) -> str:
    """What it comes to, in Markdown."""
    lines = [
        f"chance {whole['chance']:.3g}, warm start {whole['warm']:.3g}, optimum {whole['optimum']:.3g}",
        "",
        "| method | seeds | episodes | CPU s | final return [least, most] | lower level alone | setting taken |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in whole["methods"].values():
        alone = shown(one["alone"]) if one["alone"] else ""
        taken = ", ".join(f"`{k}` {v:g}" for k, v in one["sweep"][one["chosen"]].items() if k != "return")
        lines.append(
            f"| {one['title']} | {one['seeds']} | {one['episodes']:,} | {one['cpu']:.0f} | {shown(one['final'])} "
            f"| {alone} | {taken} |"
        )
    flats = list(whole["baselines"])
    if not flats:
        return "\n".join(lines) + "\n"
    lines += ["", "| episodes until the final return of | " + " | ".join(METHODS[name].title for name in flats) + " |"]
    lines.append("|---|" + "---|" * len(flats))
    for one in whole["methods"].values():
        cells = [reached(one["reaches"][flat], one["ratio"][flat]) for flat in flats]
        lines.append(f"| {one['title']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(value: Mapping[str, float]) -> str:
    """Median and band."""
    return f"{value['median']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"


def reached(episodes: float | None, ratio: float | None) -> str:
    """Episodes, and how many times fewer than the baseline played."""
    return "not reached" if episodes is None else f"{episodes:,.0f} ({ratio:g}×)"


def draw(path: Path, whole: Mapping[str, Any]) -> None:
    """Medians with bands from the least to the most, over episodes and over CPU seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot  # after the backend is chosen

    figure, both = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for name, one in whole["methods"].items():
        for axes, axis in zip(both, ("episodes", "cpu"), strict=True):
            curve = one["curve"]
            if METHODS[name].offline and axis == "episodes":
                axes.plot(one["episodes"], curve[-1]["median"], "D", color=COLORS[name], label=one["title"])
                continue
            x = [point[axis] for point in curve]
            style = "--" if METHODS[name].flat else "-"
            axes.plot(x, [point["median"] for point in curve], style, color=COLORS[name], label=one["title"])
            band = [point["low"] for point in curve], [point["high"] for point in curve]
            axes.fill_between(x, *band, color=COLORS[name], alpha=0.12, linewidth=0)
    for axes, label in zip(both, ("episodes", "CPU seconds of training"), strict=True):
        axes.axhline(whole["optimum"], color="black", linestyle=":", linewidth=1)
        axes.axhline(whole["chance"], color="black", linestyle=":", linewidth=1)
        axes.set(xlabel=label)
    both[0].set(ylabel="return of test games", title=TASKS[whole["task"]].title)
    both[0].set_xscale(
        "symlog", linthresh=min((one["curve"][1]["episodes"] for one in whole["methods"].values()), default=1)
    )
    both[0].set_xlim(left=0)
    for axes in both:
        axes.annotate("optimum", (0.01, whole["optimum"]), xycoords=("axes fraction", "data"), fontsize=7, va="top")
        axes.annotate("chance", (0.99, whole["chance"]), xycoords=("axes fraction", "data"), fontsize=7, ha="right")
    both[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
