"""What a coach that learns is worth to a solver that learns, at the same number of sampled tokens.

    python benchmarks/feedback.py --out runs/feedback
    python benchmarks/feedback.py --out runs/feedback --resume
    python benchmarks/feedback.py --out runs/feedback --report

Sums with carries, and tiny models as `examples/arithmetic.py` makes them: the solver carries where it is told to, the
coach half knows where carries belong. `joint` is `configs/feedback/arithmetic.yaml`. Of the others `flat` is GRPO of
the solver alone, `fixed` has a coach that does not learn, `alone` tries twice with nothing said in between (SCoRe, in
two stages), `stranger` has a coach that is shown another sum. `batch` and `no_improvement` are joint with a coach that
is compared with the whole step, credited with what its words changed or with what came of them (siblings that answered
one attempt would not feel the difference); `gap_half` and `gap_one` add the two-level term. `joint_knows` and
`flat_knows` begin with a student who half knows where carries belong.

Every run is a process of its own, on one thread, and stops when it has sampled its share of tokens: those of attempts
and remarks, and those a best response is judged by. Curves are of test sums, one remark and one refinement after each
attempt, sampled as in training; what counts is the last attempt, and for `flat` the only one.

OUT/feedback.json has everything, OUT/feedback_*.png the curves, OUT/feedback.md the table; the last line is JSON:
`ratio` is the final accuracy of joint over that of the best of flat, fixed, alone and stranger, medians over seeds.
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
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import tyro
import yaml

ROOT = Path(__file__).parents[1]
SETTINGS = ROOT / "configs" / "feedback" / "arithmetic.yaml"
STARTS: dict[str, tuple[str, ...]] = {"guesses": (), "knows": ("--knows", "0.3", "--guess", "0.05")}
"""Students, as flags of the example."""
CHECKS = 6
"""Checkpoints that are tested."""
ATTEMPTS = 4
"""First attempts at each test sum."""
Settings = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One of those who are compared."""

    title: str
    color: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it is told besides the settings file; names are paths."""
    start: str = "guesses"
    flat: bool = False


FLAT = {"group_size": 16, "policy.epochs": 2}
VARIANTS: dict[str, Variant] = {
    "joint": Variant("both learn", "tab:blue"),
    "flat": Variant("solver alone (GRPO)", "tab:orange", FLAT, flat=True),
    "fixed": Variant("fixed coach", "tab:green", {"coach.train": False}),
    "alone": Variant(
        "self-correction (SCoRe)", "tab:red", {"context": "none", "attempts": 4, "refinements": 4, "stages": "score"}
    ),
    "stranger": Variant("remarks on other sums", "tab:gray", {"context": "stranger"}),
    "batch": Variant("coach compared with the step", "tab:purple", {"coach.baseline": "batch"}),
    "no_improvement": Variant(
        "the same, credited with the score",
        "tab:pink",
        {"coach.baseline": "batch", "credit.improvement": False},
    ),
    "gap_half": Variant("λ = 0.5", "tab:brown", {"credit.gap": 0.5}),
    "gap_one": Variant("λ = 1", "tab:olive", {"credit.gap": 1.0}),
    "joint_knows": Variant("both learn, student half knows", "tab:cyan", start="knows"),
    "flat_knows": Variant("solver alone, half knows", "black", FLAT, start="knows", flat=True),
}
PICTURES = {
    "methods": ("joint", "flat", "fixed", "alone", "stranger"),
    "ablations": ("joint", "gap_half", "gap_one", "batch", "no_improvement"),
}
RIVALS = ("flat", "fixed", "alone", "stranger")
MEASURES = ("last", "first", "right_to_wrong", "wrong_to_right", "remarks")
"""What is told of a test: accuracy of the last and of the first attempts, flips as parts of all refinements, and how
many remarks name exactly the places where carries belong."""


@dataclass(kw_only=True)
class Args:
    """What is compared."""

    out: Path = Path("runs/feedback")
    """Where runs, numbers and pictures go."""
    seeds: int = 5
    """Runs of each variant."""
    tokens: int = 120_000
    """Tokens that each run samples."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Variants to run; all of them unless told."""
    resume: bool = False
    """Go on where an earlier command stopped; what is finished is not run again."""
    report: bool = False
    """Run nothing: write the report of what is finished."""
    quick: bool = False
    """A minute of the same code on next to nothing; the numbers mean nothing."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            sys.exit(f"--variants {unknown[0]}: there is no such variant here. There are: {', '.join(VARIANTS)}.")
        if self.quick:
            self.seeds, self.tokens = 1, 1


def main(args: Args) -> None:
    """Make the starts, run what is missing, write the report."""
    if args.out.exists() and not (args.resume or args.report):
        sys.exit(f"{args.out}: there is something already. Go on with --resume, or choose another --out.")
    if not args.report:
        args.out.mkdir(parents=True, exist_ok=True)
        for start in dict.fromkeys(VARIANTS[name].start for name in args.variants):
            make_start(args, start)
        for seed in range(args.seeds):
            for name in args.variants:
                run(args, name, seed)
    print(json.dumps(report(args)))


def make_start(args: Args, start: str) -> None:
    """The tiny model, a solver and a coach that have imitated."""
    folder = args.out / "starts" / start
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    few = ["--sums", "64", "--remarks", "64", "--copying-steps", "2"] if args.quick else []
    words = [str(ROOT / "examples" / "arithmetic.py"), "--out", str(folder), *STARTS[start], *few]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    subprocess.run([sys.executable, *words], check=True, env={**os.environ, "PYTHONPATH": path})
    for level in ("solver", "coach"):
        told = yaml.safe_load((folder / f"{level}.yaml").read_text(encoding="utf-8"))
        process("sft", {**told, "max_steps": 2} if args.quick else told, folder / level)
    (folder / "done").touch()


def run(args: Args, name: str, seed: int) -> None:
    """One run and its tests, unless they are done."""
    out = args.out / "runs" / name / f"seed_{seed}"
    if (out / "done.json").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    told = settings_of(args, name, seed)
    print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
    recipe = "grpo" if VARIANTS[name].flat else "feedback"
    found = process(recipe, told, out / "train", tested=True, flat=VARIANTS[name].flat, quick=args.quick)
    shutil.rmtree(out / "train" / "checkpoints")
    (out / "done.json").write_text(json.dumps({**found, "settings": told}, indent=1) + "\n", encoding="utf-8")


def settings_of(args: Args, name: str, seed: int) -> Settings:
    """What the recipe of a variant is told: the settings file, and what differs."""
    variant, start = VARIANTS[name], args.out / "starts" / VARIANTS[name].start
    told: Settings = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    told |= {"seed": seed, "threads": 1, "prior": "none"}
    told = put(put(told, "solver.model.path", str(start / "solver")), "coach.model.path", str(start / "coach"))
    if variant.flat:
        solver, same = told["solver"], ("env", "env_settings", "seed", "threads", "tasks_per_step")
        told = {**{key: solver[key] for key in ("model", "sampling", "policy")}, **{key: told[key] for key in same}}
        told["scale"] = "none"
    for path, value in variant.settings.items():
        told = put(told, path, value)
    if args.quick:
        told = {**told, "tasks_per_step": 2}
    told["steps"] = max(2, round(args.tokens / tokens_per_step(told)))
    if told.get("stages") == "score":
        hold = "from 0: credit.first=0 credit.kl_first=0.1"
        told["stages"] = [hold, f"from {told['steps'] // 4}: credit.first=1 credit.kl_first=0.01 credit.progress=1"]
        told["stages"] = told["stages"] if told["steps"] >= 4 else [hold]
    each = max(1, told["steps"] // CHECKS)
    return {**told, "save_every": each, "keep_last": told["steps"] + 1}


def put(settings: Mapping[str, Any], path: str, value: Any) -> Settings:
    """Settings with one more, at a path of names."""
    name, _, rest = path.partition(".")
    return {**settings, name: put(settings.get(name, {}), rest, value) if rest else value}


def tokens_per_step(told: Settings) -> float:
    """About how many tokens a step samples: an attempt has as many as a sum has digits, one more, and its end."""
    attempt = told["env_settings"]["digits"] + 2
    if "group_size" in told:
        return float(told["tasks_per_step"] * told["group_size"] * attempt)
    remark = 0 if told.get("context") == "none" else 3.9
    remarks = told["attempts"] * (told["remarks"] if remark else 1)
    judged = 2 if told.get("credit", {}).get("gap") else 1
    again = remarks * told["refinements"] * attempt * judged
    return float(told["tasks_per_step"] * (told["attempts"] * attempt + remarks * remark + again))


def process(recipe: str, told: Settings, out: Path, **tests: Any) -> Settings:
    """Run a recipe, and its tests, in a process of its own, what it says into a file; what it found.

    The process is forked from one that has imported everything, which takes longer than some of the runs.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(told, sort_keys=False), encoding="utf-8")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"echelon.recipes.{name}" for name in ("feedback", "grpo", "sft")])
    receives, sends = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(recipe, told, file, out, tests, sends))
    child.start()
    sends.close()
    child.join()
    if child.exitcode:
        sys.exit(f"echelon {recipe} {file} ended with {child.exitcode}; see {out.with_suffix('.log')}")
    return dict(receives.recv())


def work(recipe: str, told: Settings, file: Path, out: Path, tests: Settings, sends: Connection) -> None:
    """What a process of its own does: one command, and tests of what it left."""
    from echelon import cli

    with out.with_suffix(".log").open("a", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    began = time.process_time()
    if status := cli.main([recipe, str(file), "--out", str(out)]):
        sys.exit(status)
    found: Settings = {"cpu": round(time.process_time() - began, 2)}
    if tests:
        found["tests"] = tested(told, out, flat=tests["flat"], few=tests["quick"])
    sends.send(found)
    sys.exit(0)


def tested(told: Settings, out: Path, *, flat: bool, few: bool) -> list[dict[str, float]]:
    """Test sums played by every checkpoint, with the tokens that had been sampled until then."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    sampled = [0.0]
    for row in rows:
        sampled.append(sampled[-1] + tokens_of(told, row))
    found = []
    for folder in sorted((out / "checkpoints").glob("step_*")):
        step = int(folder.name.removeprefix("step_"))
        found.append({"step": step, "tokens": sampled[step], **played(told, folder, flat=flat, few=few)})
    return found


def tokens_of(told: Settings, row: Mapping[str, float]) -> float:
    """Tokens that a step sampled, those of a best response's attempts included."""
    episodes = told["tasks_per_step"] * told.get("group_size", 1)
    tokens = row["turn/tokens"] * row["episode/turns"] * episodes
    if told.get("credit", {}).get("gap"):
        again = told["attempts"] * told["remarks"] * told["refinements"] * told["tasks_per_step"]
        tokens += again * row["solver/length"]
    return tokens


def played(told: Settings, folder: Path, *, flat: bool, few: bool) -> dict[str, float]:
    """What a checkpoint reaches on the test sums, as its levels play in training but with one turn after each."""
    from echelon.config import ModelConfig, SamplingConfig
    from echelon.envs import load_env
    from echelon.rollout.feedback import COACH, SOLVER, Shape, TemplateConfig, feedback_tree
    from echelon.rollout.feedback_credit import described, lay_tree
    from echelon.rollout.roles import collect
    from echelon.rollout.setup import open_actor

    spec = load_env(told["env"], told["env_settings"])
    tasks = spec.tasks("test")[: 4 if few else None]
    context = told.get("context", "coach")
    coached = not flat and context != "none"
    sampling = SamplingConfig(**(told if flat else told["solver"])["sampling"])
    roles = {}
    for name, part in ((SOLVER, "actor" if flat else SOLVER), *(((COACH, COACH),) if coached else ())):
        roles[name] = open_actor(ModelConfig(path=str(folder / part)), sampling, name=name).role
    play = feedback_tree(
        spec.make,
        roles[SOLVER],
        roles.get(COACH),
        shape=Shape(ATTEMPTS, 1, 1, rounds=0 if flat else 1),
        templates=TemplateConfig(**(told.get("templates") or {"solve": "{question}"})),  # GRPO adds no words
        context="none" if flat else context,
        others=tasks,
    )
    tree = lay_tree(asyncio.run(collect(tasks, play, seed=1000 + told["seed"])))
    told_of = described(tree)
    found = {"first": told_of["accuracy/turn1"], "last": told_of["accuracy/turn1" if flat else "accuracy/turn2"]}
    found |= {name: told_of[f"flips/{name}"] for name in ("right_to_wrong", "wrong_to_right") if not flat}
    if coached:
        found["remarks"] = right_remarks(tree, tasks, told["env_settings"])
    return found


def right_remarks(tree: Any, tasks: Sequence[Any], sums: Settings) -> float:
    """The part of the remarks that name exactly the places where carries belong."""
    from echelon.envs.arithmetic import PLACES, carried

    right = []
    for place in (~tree.solver_N).nonzero()[:, 0].tolist():
        data = tasks[int(tree.episode_N[place])].data
        belongs = [PLACES[p] for p in carried(data["one"], data["other"], sums["digits"], sums["base"])]
        right.append(tree.turns[place].text.split() == ["carry", *(belongs or ["nothing"])])
    return sum(right) / len(right)


def report(args: Args) -> dict[str, Any]:
    """Write feedback.json, .md and the pictures; what the last line says."""
    found = {name: summarise(runs) for name in args.variants if (runs := finished(args.out / "runs" / name))}
    (args.out / "feedback.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (args.out / "feedback.md").write_text(table(found), encoding="utf-8")
    for picture, names in PICTURES.items():
        draw(args.out / f"feedback_{picture}.png", {name: found[name] for name in names if name in found})
    ends = {name: one["final"]["last"]["median"] for name, one in found.items()}
    rivals = [ends[name] for name in RIVALS if name in ends]
    ratio = round(ends["joint"] / max(*rivals, 1e-9), 3) if rivals and "joint" in ends else None
    return {"ratio": ratio, "final": ends, "seeds": {name: one["seeds"] for name, one in found.items()}}


def finished(folder: Path) -> list[dict[str, Any]]:
    """The finished runs of a variant, by seed."""
    paths = sorted(folder.glob("seed_*/done.json"), key=lambda path: int(path.parent.name.removeprefix("seed_")))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One variant over its seeds: curves with their bands, and what it ends with."""
    curve = []
    for tests in zip(*(run["tests"] for run in runs), strict=True):
        known = [name for name in MEASURES if name in tests[0]]
        point = {name: spread([test[name] for test in tests]) for name in known}
        curve.append({"tokens": median(test["tokens"] for test in tests), **point})
    return {
        "seeds": len(runs),
        "cpu": median(run["cpu"] for run in runs),
        "tokens": curve[-1]["tokens"],
        "final": {name: value for name, value in curve[-1].items() if name != "tokens"},
        "runs": [run["tests"][-1]["last"] for run in runs],
        "settings": runs[0]["settings"],
        "curve": curve,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def table(found: Mapping[str, Any]) -> str:
    """The final numbers as Markdown: medians over seeds, least and most in brackets."""
    lines = [
        "| | last attempt | first attempt | right → wrong | wrong → right | remarks right | tokens | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        cells = [shown(one["final"].get(measure)) for measure in MEASURES]
        lines.append(f"| {VARIANTS[name].title} | {' | '.join(cells)} | {one['tokens']:,.0f} | {one['cpu']:.0f} |")
    return "\n".join(lines) + "\n"


def shown(values: Mapping[str, float] | None) -> str:
    """Median, and least to most, in percent."""
    if values is None:
        return ""
    return f"{values['median']:.1%} [{values['low']:.1%}, {values['high']:.1%}]"


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """Accuracy of the last attempt over tokens, with bands from the least to the most of the seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=100)
    for name, one in found.items():
        tokens = [point["tokens"] for point in one["curve"]]
        values = [[point["last"][which] for point in one["curve"]] for which in ("median", "low", "high")]
        axes.plot(tokens, values[0], color=VARIANTS[name].color, label=VARIANTS[name].title, linewidth=2)
        axes.fill_between(tokens, values[1], values[2], color=VARIANTS[name].color, alpha=0.15, linewidth=0)
    axes.set(xlabel="tokens sampled in training", ylabel="test sums right at the last attempt", ylim=(0, 1))
    axes.legend(loc="upper left", fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Args))
