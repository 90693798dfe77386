"""What the coupled loop of ToSCA is worth: both levels learning together, against all that is simpler.

    python benchmarks/tosca.py --out runs/tosca
    python benchmarks/tosca.py --out runs/tosca --resume
    python benchmarks/tosca.py --out runs/tosca --report

All variants begin as the same tiny responder, which has imitated replies that follow their strategy only partly, and
play the same number of dialogues with a user who can be helped only in the order its hidden need asks for. `joint` is
the loop; `random` chooses strategies by chance; `alone` has no strategies at all; `sequential` lets the responder learn
first and then the strategist, as the published code did; `gamma_0` is joint with a strategist that looks no further
than the next answer. In `joint_far` and `alone_far`, the same as joint and alone, a reply also answers for what the
replies after it earn. Every run is a process of its own on one thread. Curves are of test users that nobody has met in
training, strategies as Q likes them best; episodes on the axis are dialogues of training.

OUT/tosca.json has everything, OUT/tosca_return.png and OUT/tosca_solved.png the curves, OUT/tosca.md the table; the
last line is JSON: `ratio` is the final return of joint over that of the best of those that are simpler, medians over
seeds, `ratio_far` that of joint_far over alone_far.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from typing import Any

import tyro

from echelon.envs import load_env
from echelon.envs.dialogue import Dialogue
from echelon.rollout.evaluate import scripted_loop
from echelon.rollout.roles import collect

ROOT = Path(__file__).parents[1]
STRATEGIES = "small"
LEARNS: dict[str, object] = {
    "env": "dialogue",
    "sampling.max-tokens": 20,
    "max-turns": 10,
    "episodes-per-step": 16,
    "epsilon": 0.6,
    "high-updates": 4,
    "high-batch": 32,
    "high.target-every": 5,
    "low.shaping.kl-coef": 0.1,
    "low.policy.optim.lr": 3e-4,
    "low.policy.minibatches": 2,
    "low.value-optim.lr": 1e-3,
    "eval-every": 8,
    "eval-episodes": 36,
    "save-every": 8,
    "threads": 1,
}
"""What all runs are told."""
VARIANTS: dict[str, dict[str, object]] = {
    "joint": {},
    "sequential": {"mode": "sequential"},
    "random": {"choose": "random", "mode": "lower"},
    "alone": {"choose": "none", "mode": "lower"},
    "gamma_0": {"high.gamma": 0},
    "joint_far": {"low.horizon": "episode"},
    "alone_far": {"choose": "none", "mode": "lower", "low.horizon": "episode"},
}
"""What each is told besides; the first is what the others are compared with."""
SIMPLER = ("sequential", "random", "alone", "gamma_0")
TITLES = {
    "joint": "joint",
    "sequential": "one level after the other",
    "random": "random strategies",
    "alone": "responder alone",
    "gamma_0": "joint, γ = 0",
    "joint_far": "joint, credit over turns",
    "alone_far": "responder alone, credit over turns",
}
COLORS = {
    "joint": "tab:blue",
    "sequential": "tab:orange",
    "random": "tab:green",
    "alone": "tab:brown",
    "gamma_0": "tab:red",
    "joint_far": "tab:cyan",
    "alone_far": "tab:pink",
}
MEASURES = {"return": "reward/mean", "solved": "dialogue/win", "satisfaction": "dialogue/satisfaction"}
"""What is told of an evaluation, and what it is called in metrics.jsonl behind "eval/"."""
TESTED = {"return": "return", "solved": "win", "satisfaction": "satisfaction"}
"""The same in summary.json of the last test."""
TESTS = 180
"""Dialogues of the last test, which the final numbers are of: each of the test users five times."""


@dataclass(kw_only=True)
class Args:
    """What is compared."""

    out: Path = Path("runs/tosca")
    """Where runs, numbers and pictures go."""
    seeds: int = 5
    """Runs of each variant."""
    steps: int = 32
    """Training steps of each run, of 16 dialogues."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Variants to run; all of them unless told."""
    resume: bool = False
    """Go on where an earlier command stopped; what is finished is not run again."""
    report: bool = False
    """Run nothing: write the report of what is finished."""
    quick: bool = False
    """A minute of the same code on next to nothing; the numbers mean nothing."""

    def __post_init__(self) -> None:
        if self.quick:
            self.seeds, self.steps = 1, 2


def main(args: Args) -> None:
    """Make the start, run what is missing, write the report."""
    if args.out.exists() and not (args.resume or args.report):
        sys.exit(f"{args.out}: there is something already. Go on with --resume, or choose another --out.")
    if not args.report:
        args.out.mkdir(parents=True, exist_ok=True)
        make_start(args)
        for seed in range(args.seeds):
            for variant in args.variants:
                run(args, variant, seed)
    print(json.dumps(report(args)))


def make_start(args: Args) -> None:
    """The tiny model, replies to imitate, and a responder that imitated them."""
    start, done = args.out / "start", args.out / "start" / "done"
    if done.exists():
        return
    shutil.rmtree(start, ignore_errors=True)
    few = ["--dialogues", "60", "--copying-steps", "5"] if args.quick else ["--hidden", "64"]
    words = [str(ROOT / "examples" / "dialogue.py"), "--strategies", STRATEGIES, "--out", str(start), *few]
    subprocess.run([sys.executable, *words], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    learns = {"data.path": start / "replies.jsonl", "rows-per-step": 64, "epochs": 1 if args.quick else 3}
    learns |= {"optim.lr": 5e-3, "optim.schedule": "linear", "save-every": 0, "threads": 1}
    words = ["sft", "--model.path", str(start / "tiny"), "--out", str(start / "responder")]
    command([*words, *flags(learns)], args.out / "start.log")
    done.touch()


def run(args: Args, variant: str, seed: int) -> None:
    """One run, begun or gone on with, and its last test, unless they are finished."""
    out = args.out / "runs" / variant / f"seed_{seed}"
    if not (out / "done.json").exists():
        train(args, variant, seed, out)
    if not (out / "test" / "summary.json").exists():
        told = {"env": "dialogue", "model.path": out, "out": out / "test", "episodes": 4 if args.quick else TESTS}
        told |= {"max-turns": LEARNS["max-turns"], "max-tokens": LEARNS["sampling.max-tokens"], "threads": 1}
        command(["evaluate", "--env-settings", f"strategies={STRATEGIES}", *flags(told)], out.with_suffix(".log"))


def train(args: Args, variant: str, seed: int, out: Path) -> None:
    """The learning of a run."""
    told = {**LEARNS, **VARIANTS[variant], "steps": args.steps, "seed": seed}
    if args.quick:
        told |= {"episodes-per-step": 2, "eval-every": 1, "eval-episodes": 2, "high-updates": 1, "max-turns": 2}
    begun = any((out / "checkpoints").glob("step_*")) if out.exists() else False
    words = ["tosca", "--responder.path", str(args.out / "start" / "responder"), "--out", str(out)]
    words += ["--env-settings", f"strategies={STRATEGIES}", *flags(told), *(["--resume"] if begun else [])]
    print(f"{variant}, seed {seed}", file=sys.stderr, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    seconds = command(words, out.with_suffix(".log"))
    for checkpoint in sorted((out / "checkpoints").glob("step_*"))[:-1]:
        shutil.rmtree(checkpoint)
    (out / "done.json").write_text(
        json.dumps({"cpu": seconds, "settings": {**told, "strategies": STRATEGIES}}, default=str)
    )


def flags(settings: Mapping[str, object]) -> list[str]:
    """Settings as words of a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def command(words: Sequence[str], log: Path) -> float:
    """Run a recipe in a process of its own, its output into a file; the CPU seconds it took.

    The process is forked from one that has imported everything, which takes longer than some of the runs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"echelon.recipes.{name}" for name in ("tosca", "sft", "evaluate")])
    receives, sends = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(list(words), log, sends))
    process.start()
    sends.close()
    process.join()
    if process.exitcode:
        sys.exit(f"echelon {' '.join(words)} ended with {process.exitcode}; see {log}")
    return float(receives.recv())


def work(words: list[str], log: Path, sends: Connection) -> None:
    """What a process of its own does: one command, on one thread."""
    from echelon import cli

    with log.open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    status = cli.main(words)
    sends.send(time.process_time())
    sys.exit(status)


def report(args: Args) -> dict[str, Any]:
    """Write tosca.json, .md and the pictures; what the last line says."""
    found = {variant: summarise(runs) for variant in args.variants if (runs := finished(args.out / "runs" / variant))}
    whole = {"lines": lines(args), "variants": found}
    (args.out / "tosca.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (args.out / "tosca.md").write_text(table(whole), encoding="utf-8")
    for measure, title in (("return", "satisfaction summed over a dialogue"), ("solved", "users who were helped")):
        draw(args.out / f"tosca_{measure}.png", whole, measure, title)
    ends = {variant: one["final"]["return"]["median"] for variant, one in found.items()}
    ratios = {"ratio": over(ends, "joint", SIMPLER), "ratio_far": over(ends, "joint_far", ("alone_far",))}
    return {**ratios, "final": ends, "seeds": {variant: one["seeds"] for variant, one in found.items()}}


def over(ends: Mapping[str, float], variant: str, others: Sequence[str]) -> float | None:
    """What a variant ends with, as a multiple of the best of others; None where one is missing."""
    found = [ends[other] for other in others if ends.get(other)]
    return round(ends[variant] / max(found), 3) if found and variant in ends else None


def finished(folder: Path) -> list[dict[str, Any]]:
    """The finished runs of a variant, by seed: evaluations, the last test, CPU seconds, settings."""
    runs = []
    for path in sorted(folder.glob("seed_*/done.json"), key=lambda path: int(path.parent.name.removeprefix("seed_"))):
        done = json.loads(path.read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        each = int(done["settings"]["episodes-per-step"])
        tests = [
            {"episodes": (row["step"] + 1) * each, **{name: row[f"eval/{key}"] for name, key in MEASURES.items()}}
            for row in rows
            if "eval/reward/mean" in row
        ]
        summary = path.parent / "test" / "summary.json"
        if summary.exists():
            last = json.loads(summary.read_text(encoding="utf-8"))["estimates"]
            runs.append({"tests": tests, "last": {name: last[key]["mean"] for name, key in TESTED.items()}, **done})
    return runs


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One variant over its seeds: curves with their bands, and what it ends with."""
    curve = [
        {"episodes": tests[0]["episodes"], **{name: spread([test[name] for test in tests]) for name in MEASURES}}
        for tests in zip(*(run["tests"] for run in runs), strict=True)
    ]
    ends = {name: [run["last"][name] for run in runs] for name in MEASURES}
    return {
        "seeds": len(runs),
        "cpu": median(run["cpu"] for run in runs),
        "final": {name: spread(values) for name, values in ends.items()},
        "runs": ends["return"],
        "settings": runs[0]["settings"],
        "curve": curve,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def lines(args: Args) -> dict[str, dict[str, float]]:
    """What scripted players earn from the same users: by chance, at best, and at best looking one turn ahead."""
    spec = load_env("dialogue", {"strategies": STRATEGIES})
    found = {}
    for name, kind, how in (
        ("chance", "random", {}),
        ("myopic", "optimal", {"gamma": 0.0}),
        ("optimum", "optimal", {}),
    ):
        player = partial(Dialogue.player, kind, strategies=STRATEGIES, **how)
        play = scripted_loop(spec.make, player, name=name)
        tasks = spec.tasks("test") * (1 if args.quick or kind == "optimal" else 20)
        episodes = asyncio.run(collect(tasks, play, seed=0))
        solved = mean(episode.metrics["win"] for episode in episodes)
        found[name] = {"return": mean(episode.reward for episode in episodes), "solved": solved}
    return found


def table(whole: Mapping[str, Any]) -> str:
    """The final numbers as Markdown: medians over seeds, least and most in brackets."""
    rows = ["| | return | users helped | satisfaction per reply | seeds | CPU s |", "|---|---|---|---|---|---|"]
    for variant, one in whole["variants"].items():
        cells = [shown(one["final"][name], percent=name == "solved") for name in MEASURES]
        rows.append(f"| {TITLES[variant]} | {' | '.join(cells)} | {one['seeds']} | {one['cpu']:.0f} |")
    for name, line in whole["lines"].items():
        rows.append(f"| {name}, scripted | {line['return']:.2f} | {line['solved']:.0%} | | | |")
    return "\n".join(rows) + "\n"


def shown(values: Mapping[str, float], *, percent: bool) -> str:
    """Median, and least to most."""
    middle, low, high = (
        f"{values[name]:.0%}" if percent else f"{values[name]:.2f}" for name in ("median", "low", "high")
    )
    return f"{middle} [{low}, {high}]"


def draw(path: Path, whole: Mapping[str, Any], measure: str, title: str) -> None:
    """Curves of one measure, with bands from the least to the most of the seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=110)
    for variant, one in whole["variants"].items():
        episodes = [point["episodes"] for point in one["curve"]]
        values = [[point[measure][name] for point in one["curve"]] for name in ("median", "low", "high")]
        axes.plot(episodes, values[0], color=COLORS[variant], label=TITLES[variant], linewidth=2)
        axes.fill_between(episodes, values[1], values[2], color=COLORS[variant], alpha=0.15, linewidth=0)
    for name, style in (("optimum", "-"), ("myopic", "-."), ("chance", ":")):
        level = whole["lines"][name][measure]
        axes.axhline(level, color="black", linewidth=1, linestyle=style)
        axes.annotate(name, (1, level), xycoords=("axes fraction", "data"), xytext=(3, -3), textcoords="offset points")
    axes.set_xlabel("dialogues of training")
    axes.set_ylabel(title)
    axes.legend(loc="upper left", fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Args))
