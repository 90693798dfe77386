"""What language models of a tenth of a million parameters learn to steer, from nothing, on two cores.

    python benchmarks/control.py --out runs/control
    python benchmarks/control.py --out runs/control --resume
    python benchmarks/control.py --out runs/control --report

Three environments of Gymnasium. In each, a model with random weights imitates the scripted expert (`expert`), another
one the same expert acting at some steps and nobody at the others (`medium`), and PPO on the environment's return goes
on from there (`ppo`). The reference line are perceptrons that read the numbers themselves, by the same three steps on
the same data (`mlp_…`). Every run is a command that docs/algorithms/control.md shows, in a process of its own on one
thread; every policy plays 100 test episodes as it was trained, drawn at temperature 1, and 100 greedily.

OUT/control.json has everything, OUT/control.png the curves, OUT/control.md the tables, OUT/TASK/seed_0/ppo_test/videos
a film; the last line is JSON: `ratio` is the least of what was reached over what is wanted, over tasks and goals.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
POLICIES = ("expert", "medium", "ppo", "mlp_expert", "mlp_medium", "mlp_ppo")
TESTED = {"": "drawn", "--greedy": "greedy"}
"""How a policy is tested: the flag, and what the test is called."""


@dataclass(frozen=True)
class Task:
    """An environment, and how it is learned."""

    title: str
    env_id: str
    data: str
    """Settings of the expert's data."""
    medium: tuple[str, ...]
    """What the data of the medium policy differ in."""
    ppo: str
    """Settings of PPO with a language model."""
    mlp: tuple[str, ...]
    """PPO with a perceptron: its settings, and flags."""
    expert: tuple[str, ...] = ()
    """What the data of the expert differ in."""
    imitation: tuple[str, ...] = ()
    """What `sft` on them differs in."""
    expert_score: float = 0.8
    """Score that imitating the expert is to reach, 0 being the random player and 1 the expert, drawn or greedy."""
    gain: float = 0.1
    """What PPO is to add to the score of the medium start, both drawn."""


TASKS: dict[str, Task] = {
    "cartpole": Task(
        "CartPole",
        "CartPole-v1",
        "cartpole_bins",
        ("--episodes", "300", "--expert-share", "0.4"),
        "cartpole_ppo",
        ("cartpole_ppo", "--warmup-steps", "2"),
        expert_score=0.79,  # a return of 400
        gain=0.6,
    ),
    "mountain_car": Task(
        "MountainCar",
        "MountainCar-v0",
        "mountain_car_bins",
        ("--episodes", "200", "--expert-share", "0.7"),
        "mountain_car_ppo",
        ("cartpole_ppo", "--env", "MountainCar-v0", "--warmup-steps", "2"),
    ),
    "pendulum": Task(
        "Pendulum",
        "Pendulum-v1",
        "pendulum_coarse",
        (),
        "pendulum_ppo",
        ("pendulum_ppo", "--warmup-steps", "2", "--steps", "60"),
        expert=("--disturbed", "0.2"),
        imitation=("--max-steps", "3500"),
    ),
}


@dataclass(kw_only=True)
class Args:
    """What is run."""

    out: Path = Path("runs/control")
    """Where data, runs, numbers and the picture go."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Environments; all of them unless told."""
    seeds: int = 5
    """Runs of each."""
    parallel: int = 2
    """Seeds that run at the same time."""
    resume: bool = False
    """Go on where an earlier command stopped; what is finished is not run again."""
    report: bool = False
    """Run nothing: write the report of what is finished."""
    quick: bool = False
    """A minute of the same commands on next to nothing; the numbers mean nothing."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.tasks if name not in TASKS]:
            sys.exit(f"--tasks {unknown[0]}: there is no such task here. There are: {', '.join(TASKS)}.")
        self.seeds = 1 if self.quick else self.seeds


def main(args: Args) -> None:
    """Make the data, run what is missing, write the report."""
    if args.out.exists() and not (args.resume or args.report):
        sys.exit(f"{args.out}: there is something already. Go on with --resume, or choose another --out.")
    if not args.report:
        for name in args.tasks:
            record(args, name)
        with ThreadPoolExecutor(args.parallel) as pool:
            jobs = [(name, seed) for name in args.tasks for seed in range(args.seeds)]
            list(pool.map(lambda job: learn(args, *job), jobs))
    print(json.dumps(report(args)))


def record(args: Args, name: str) -> None:
    """The data of both policies."""
    task, few = TASKS[name], ["--episodes", "4"] if args.quick else []
    for policy, flags in (("expert", task.expert), ("medium", ("--policy", "medium", *task.medium))):
        settings = CONFIGS / "control_data" / f"{task.data}.yaml"
        stage(args.out / name / "data" / policy, ["control-data", settings, *flags, *few])


def learn(args: Args, name: str, seed: int) -> None:
    """All runs of a task with one seed, and their tests."""
    task, data, out = TASKS[name], args.out / name / "data", args.out / name / f"seed_{seed}"
    same: list[Any] = ["--seed", seed, "--threads", 1]
    short = ["--max-steps", "4"] if args.quick else []
    for policy, differs in (("expert", task.imitation), ("medium", ())):
        rows = ["--data.path", data / policy / "train.jsonl", "--data.eval-path", data / policy / "test.jsonl"]
        stage(out / policy, ["sft", CONFIGS / "sft" / "controller.yaml", *rows, *differs, *same, *short])
    few = ["--steps", "2", "--warmup-steps", "0"] if args.quick else []
    tiny = ["--tasks-per-step", "2", "--max-turns", "20"] if args.quick else []
    settings = CONFIGS / "control" / f"{task.ppo}.yaml"
    stage(out / "ppo", ["control", settings, "--model.path", out / "medium", *same, *few, *tiny])
    cloned = ["control-mlp", CONFIGS / "control_mlp" / "cartpole_bc.yaml", "--env", task.env_id, *same, *few[:2]]
    for policy in ("expert", "medium"):
        stage(out / f"mlp_{policy}", [*cloned, "--data", data / policy])
    best, *flags = task.mlp
    improved = ["control-mlp", CONFIGS / "control_mlp" / f"{best}.yaml", *flags, "--start", out / "mlp_medium"]
    stage(out / "mlp_ppo", [*improved, *same, *few])
    for policy in POLICIES:
        test(args, task, out, policy, seed)


def test(args: Args, task: Task, out: Path, policy: str, seed: int) -> None:
    """What a policy earns."""
    who = ["--policy", "mlp", "--model.path", out / policy] if policy.startswith("mlp") else [out / policy]
    how = [] if policy.startswith("mlp") else ["--max-tokens", "8", "--max-prompt-tokens", "64"]
    episodes = ["--episodes", "2" if args.quick else "100", "--normalise", "--seed", seed, "--threads", 1]
    for flag, name in TESTED.items():
        words = ["evaluate", *who, "--env-id", task.env_id, *how, *episodes, *([flag] if flag else [])]
        film = ["--video", 1] if seed == 0 and policy == "ppo" and not flag else []
        stage(out / f"{policy}_test" / name, [*words, *film])


def stage(out: Path, words: Sequence[Any]) -> None:
    """One command, unless it is done; how long it took stands beside what it wrote."""
    done = out.with_name(f"{out.name}.done.json")
    if done.exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "echelon", *map(str, words), "--out", str(out)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    print(f"{out.parent.name}/{out.name}: echelon {words[0]}", file=sys.stderr, flush=True)
    began = time.monotonic()
    with out.with_name(f"{out.name}.log").open("w", encoding="utf-8") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)} ended with {child.returncode}; see {log.name}")
    took = {"cpu": round(used.ru_utime + used.ru_stime, 1), "wall": round(time.monotonic() - began, 1)}
    done.write_text(json.dumps(took | {"command": command[2:]}) + "\n", encoding="utf-8")


def report(args: Args) -> dict[str, Any]:
    """Write control.json, control.md and the picture; what the last line says."""
    found = {name: one for name in args.tasks if (one := summarise(args.out / name))}
    (args.out / "control.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (args.out / "control.md").write_text("\n".join(table(name, one) for name, one in found.items()), encoding="utf-8")
    draw(args.out / "control.png", found)
    reached = {}
    for name, one in found.items():
        score = {policy: {how: one[policy][how]["score"]["median"] for how in TESTED.values()} for policy in POLICIES}
        reached[f"{name} expert"] = max(score["expert"].values()) / TASKS[name].expert_score
        reached[f"{name} gain"] = (score["ppo"]["drawn"] - score["medium"]["drawn"]) / TASKS[name].gain
    ratios = {name: round(ratio, 3) for name, ratio in reached.items()}
    return {"ratio": min(ratios.values(), default=None), "reached": ratios}


def summarise(folder: Path) -> dict[str, Any]:
    """A task over its seeds: what each policy earns, what it took, and the curves of learning on the return."""
    seeds = [seed for seed in sorted(folder.glob("seed_*")) if (seed / "mlp_ppo_test" / "greedy.done.json").exists()]
    if not seeds:
        return {}
    found: dict[str, Any] = {"seeds": len(seeds)}
    for policy in POLICIES:
        times = [read(seed / f"{policy}.done.json") for seed in seeds]
        found[policy] = {unit: median(one[unit] for one in times) for unit in ("cpu", "wall")}
        for how in TESTED.values():
            tests = [read(seed / f"{policy}_test" / how / "summary.json")["estimates"] for seed in seeds]
            found[policy][how] = {
                name: spread([one[name]["mean"] for one in tests])
                for name in ("return", "score", "invalid")
                if name in tests[0]
            }
    found["curves"] = {name: [curve(seed / name / "metrics.jsonl") for seed in seeds] for name in ("ppo", "mlp_ppo")}
    return found


def curve(path: Path) -> list[tuple[float, float]]:
    """(steps of the environment so far, return of the episodes that were played) of each training step."""
    points, steps = [], 0.0
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        steps = row["samples"] if "samples" in row else steps + row["controller/decisions"]
        if "reward/mean" in row:
            points.append((steps, row.get("episode/return", row["reward/mean"])))
    return points


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def table(name: str, one: Mapping[str, Any]) -> str:
    """The numbers of a task as Markdown: medians over seeds, least and most in brackets."""
    lines = [f"**{TASKS[name].title}**, {one['seeds']} seeds", ""]
    lines += ["| policy | return, drawn | score | return, greedy | score | CPU s |", "|---|---|---|---|---|---|"]
    for policy in POLICIES:
        cells = []
        for how in TESTED.values():
            cells += [shown(one[policy][how]["return"], 1), shown(one[policy][how]["score"], 2)]
        lines.append(f"| `{policy}` | {' | '.join(cells)} | {one[policy]['cpu']:.0f} |")
    return "\n".join(lines) + "\n"


def shown(values: Mapping[str, float], digits: int) -> str:
    """Median, and least to most."""
    return f"{values['median']:.{digits}f} [{values['low']:.{digits}f}, {values['high']:.{digits}f}]"


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """Return of the episodes played, over steps of the environment, one line per seed; tests as level lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, max(len(found), 1), figsize=(4.6 * max(len(found), 1), 3.8), dpi=90, squeeze=False
    )
    for place, (name, one) in zip(axes[0], found.items(), strict=False):
        for which, color, label in (
            ("ppo", "tab:blue", "PPO from medium"),
            ("mlp_ppo", "tab:gray", "the same, perceptron"),
        ):
            for number, points in enumerate(one["curves"][which]):
                place.plot(*zip(*points, strict=True), color=color, alpha=0.7, label=None if number else label)
        levels = (("expert", "tab:green", "imitates the expert"), ("medium", "tab:orange", "medium start"))
        for policy, color, label in levels:
            place.axhline(one[policy]["drawn"]["return"]["median"], color=color, linestyle="--", label=label)
        place.set(title=TASKS[name].title, xlabel="steps of the environment", ylabel="return, drawn")
        place.set_xscale("log")
        place.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7, loc="upper left")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Args))
