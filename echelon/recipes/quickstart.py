"""The whole story in a few minutes: a two-level agent learns Twenty Questions on a laptop CPU.

Builds a tiny model, warm-starts it on random play, trains it with ArCHer and, from the same start and with the same
number of episodes, with the flat baseline GRPO, plays test games with all three, and leaves a table, curve.png and
summary.json. Every stage is an ordinary command with an ordinary settings file, both kept in the run directory.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)
from rich.table import Table

from echelon.config import RunConfig, demand
from echelon.config.loading import show as in_words
from echelon.envs import EnvSpec, load_env
from echelon.envs.players import make_player, measure, play
from echelon.errors import CheckpointError, RolloutError, need
from echelon.models.lm import count_parameters, tiny
from echelon.rollout.setup import set_threads
from echelon.train.checkpoint import MAY_CHANGE
from echelon.train.copying import learn_to_copy
from echelon.train.learner import save_module
from echelon.train.log import typed
from echelon.view.runs import flat

EXAMPLES = """\
echelon quickstart                                      into runs/quickstart, in minutes
echelon quickstart --out runs/again --seed 1
echelon quickstart --resume                             go on with one that was interrupted
echelon report runs/quickstart                          what came of it, in one page"""
METHODS = {
    "warm": "warm start",
    "grpo": "GRPO (flat)",
    "archer": "ArCHer, actor",
    "archer_pick": "ArCHer, both",
}
POLL_SECONDS = 0.5
POLLS_PER_LINE = 30


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of the quickstart."""

    out: str = "runs/quickstart"
    """Run directory: every stage has a folder in it."""
    threads: int = 1
    """CPU threads of every stage: a model this small is fastest on one."""
    games: int = 2500
    """Games of random play to warm-start on."""
    copying_steps: int = 400
    """Steps in which the new model learns to repeat random tokens: its stand-in for being pretrained."""
    guess: float = 0.5
    """How often random play guesses a thing; otherwise it asks a random question."""
    steps: int = 26
    """Training steps of ArCHer."""
    episodes_per_step: int = 128
    """Episodes per step of ArCHer; GRPO gets as many in all."""
    eval_episodes: int = 500
    """Test games per method."""
    parallel: int = 2
    """Stages that run at the same time, on one thread each."""
    hidden: int = 64
    """Width of the tiny model."""
    layers: int = 2
    """Depth of the tiny model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("games", "steps", "episodes_per_step", "eval_episodes", "parallel", "layers"):
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")
        demand(self, "hidden", self.hidden % 32 == 0 and self.hidden > 0, "heads are 32 wide. Give a multiple of 32.")
        whole = self.steps * self.episodes_per_step % GROUPS == 0
        demand(self, "steps", whole, f"GRPO plays {GROUPS} episodes a step and must get as many in all. Raise it.")


GROUPS = 64
"""Episodes per step of GRPO: 8 tasks, 8 siblings each."""
MADE = ("games", "copying_steps", "guess", "hidden", "layers", "seed")
"""Settings of the model that is built and of the games it is warm-started on; they are kept in tiny.yaml."""
FREE = (MAY_CHANGE - {"steps", "epochs"}) | {"model.path", "data.path", "critic_path", "overwrite"}
"""Settings of a stage that say nothing of what came of it; the paths among them follow from `out`."""


@dataclass(slots=True)
class Stage:
    """One command of the story."""

    name: str
    recipe: str
    settings: Mapping[str, Any]
    steps: int = 0
    """Rows of metrics.jsonl when it is done; 0 for a stage that writes none."""
    process: subprocess.Popen[bytes] | None = field(default=None)
    log: IO[bytes] | None = None


def main(cfg: Config) -> None:
    """Run all stages, show the table, write curve.png and summary.json."""
    need("matplotlib", "plot")
    began, out, console = time.monotonic(), Path(cfg.out), Console()
    env_settings = {"subset": True}
    spec = load_env("twenty_questions", env_settings)
    stages = plan(cfg, out, env_settings)
    if cfg.dry_run:
        for stage in (stage for group in stages for stage in group):
            console.print(f"echelon {stage.recipe} {out / stage.name}.yaml  ({stage.steps} steps)", soft_wrap=True)
        return
    check_out(out, resume=cfg.resume)
    check_settings(cfg, out, stages)
    meanwhile = Console(quiet=cfg.log.quiet)
    prepare(cfg, out, spec, meanwhile)
    for group in stages:
        run_stages(group, out, parallel=cfg.parallel, console=meanwhile)
    summary = summarise(cfg, out, spec, seconds=time.monotonic() - began)
    draw(out, summary)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show(summary, console, out)


def plan(cfg: Config, out: Path, env_settings: Mapping[str, Any]) -> list[list[Stage]]:
    """The stages with their settings; those of one group may run at the same time."""
    game = {"env": "twenty_questions", "env_settings": dict(env_settings)}
    common = {"seed": cfg.seed, "threads": cfg.threads, "save_every": cfg.save_every, "keep_last": cfg.keep_last}
    warm = {
        "model": {"path": str(out / "tiny")},
        "data": {"path": [str(out / "random_play.jsonl")]},
        "epochs": 3,
        "optim": {"lr": 5e-3, "warmup_steps": 20, "schedule": "cosine"},
        **common,
        **log_of(cfg, "warm"),
    }
    start = {"model": {"path": str(out / "warm")}, **game, **common}
    start["sampling"] = {"max_tokens": 12, "max_prompt_tokens": 512}
    archer = {
        **start,
        "critic_path": str(out / "tiny"),
        "steps": cfg.steps,
        "episodes_per_step": cfg.episodes_per_step,
        **ARCHER,
        **log_of(cfg, "archer"),
    }
    rounds = cfg.steps * cfg.episodes_per_step // GROUPS
    grpo = {**start, "steps": rounds, "tasks_per_step": 8, "group_size": 8, **GRPO, **log_of(cfg, "grpo")}
    games = {**game, "episodes": cfg.eval_episodes, "max_tokens": 12, "max_prompt_tokens": 512, "seed": cfg.seed}
    games |= {"threads": cfg.threads, "overwrite": True}
    names = ("warm", "grpo", "archer")
    tests = [Stage(f"test_{name}", "evaluate", {"model": {"path": str(out / name)}, **games}) for name in names]
    pick = {"model": {"path": str(out / "archer")}, **games, "candidates": CANDIDATES}
    tests.append(Stage("test_archer_pick", "evaluate", pick))
    warm_steps = 3 * -(-cfg.games // 32)
    training = [Stage("archer", "archer", archer, cfg.steps), Stage("grpo", "grpo", grpo, rounds)]
    return [[Stage("warm", "sft", warm, warm_steps)], training, tests]


def log_of(cfg: Config, stage: str) -> dict[str, Any]:
    """Where the metrics of a stage go besides its files; trackers know it by its own name."""
    return {"log": {**asdict(cfg.log), "name": cfg.log.name and f"{cfg.log.name}_{stage}"}}


CANDIDATES = 4
ARCHER: dict[str, Any] = {
    "replay_capacity": 16000,
    "critic_updates": 24,
    "critic_episodes": 16,
    "value_actions": "replayed",
    "critic_optim": {"lr": 2e-3},
    "warmup_steps": 8,
    "candidates": CANDIDATES,
    "actor_episodes": 48,
    "policy": {"loss": "clipped", "optim": {"lr": 3e-4}, "entropy_coef": 0.02, "kl_coef": 0.02},
}
GRPO: dict[str, Any] = {"scale": "none", "policy": {"optim": {"lr": 1e-4}, "epochs": 4, "kl_loss": "k3"}}


def check_out(out: Path, *, resume: bool) -> None:
    """Raise CheckpointError for a directory with a quickstart in it that shall not be continued, or none that shall."""
    ours = (out / "random_play.jsonl").exists() or (out / "tiny").exists()
    try:
        empty = not out.exists() or not any(out.iterdir())
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror}). Choose another --out.") from error
    if ours and not resume:
        raise CheckpointError(
            f"{out}: there is a quickstart already. Continue it with --resume, or choose another --out."
        )
    if not ours and not empty:
        raise CheckpointError(f"{out}: there are files and no quickstart, and they stay. Choose another --out.")
    if not ours and resume:
        raise CheckpointError(f"{out}: there is no quickstart to resume. Leave out --resume.")


def check_settings(cfg: Config, out: Path, stages: Sequence[Sequence[Stage]]) -> None:
    """Raise CheckpointError for the first setting that is not the one with which a stage was done, or has begun."""
    if (out / "tiny").exists():
        check_same(out / "tiny.yaml", made_with(cfg))
    for stage in (stage for group in stages for stage in group):
        if (out / stage.name / "done").exists() or begun(out / stage.name):
            check_same(out / f"{stage.name}.yaml", stage.settings)


def check_same(file: Path, settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError for the first of these settings that the file, if it is there, has otherwise."""
    was, now = flat(settings_in(file)), flat(settings)
    for name in {**now, **was} if was else ():
        if name not in FREE and was.get(name) != now.get(name):
            flag = "eval_episodes" if name == "episodes" else name
            raise CheckpointError(
                f"{file}: what is there was made with {flag} = {in_words(was.get(name))}, and now it is "
                f"{in_words(now.get(name))}. Leave it as it was, or choose another --out."
            )


def made_with(cfg: Config) -> dict[str, Any]:
    """The settings of what `prepare` makes."""
    return {name: getattr(cfg, name) for name in MADE}


def settings_in(file: Path) -> dict[str, Any]:
    """What was written there; nothing where there is no such file. Raises CheckpointError where it cannot be read."""
    try:
        return dict(yaml.safe_load(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{file}: it cannot be read, so nobody knows what its stage was made with. Choose another --out."
        ) from error


def prepare(cfg: Config, out: Path, spec: EnvSpec, console: Console) -> None:
    """The tiny model with its tokenizer, and games in which questions and guesses are drawn at random. The model comes
    last and whole: where there is none, all of it is made again."""
    if (out / "tiny").exists():
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror}). Choose another --out.") from error
    set_threads(cfg.threads)
    tasks = spec.tasks("train")
    dialogues = [
        play(spec, tasks[number % len(tasks)], make_player(spec, "random", seed=number, guess=cfg.guess))
        for number in range(cfg.games)
    ]
    with (out / "random_play.jsonl").open("w", encoding="utf-8") as file:
        # The game's last word is not answered, so nothing is learned from it.
        file.writelines(json.dumps({"messages": list(dialogue.messages[:-1])}) + "\n" for dialogue in dialogues)
    said = [message["content"] for dialogue in dialogues for message in dialogue.messages]
    module, tokenizer = tiny(said, hidden=cfg.hidden, layers=cfg.layers, heads=cfg.hidden // 32, seed=cfg.seed)
    console.print(f"built a model of {count_parameters(module):,} parameters and {cfg.games:,} games of random play")
    watch = partial(track, description="learning to copy", console=console, disable=hidden(console))
    learn_to_copy(module, tokenizer, steps=cfg.copying_steps, seed=cfg.seed, watch=watch)
    unfinished = out / ".tmp-tiny"
    shutil.rmtree(unfinished, ignore_errors=True)
    save_module(module, unfinished, tokenizer)
    write_settings(out / "tiny.yaml", made_with(cfg))
    unfinished.rename(out / "tiny")


def write_settings(file: Path, settings: Mapping[str, Any]) -> None:
    file.write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")


def hidden(console: Console) -> bool:
    """Whether nobody sees bars."""
    return console.quiet or not console.is_terminal


def run_stages(stages: Sequence[Stage], out: Path, *, parallel: int, console: Console) -> None:
    """Run commands as processes of their own, some at a time, and show how far each is."""
    waiting = [stage for stage in stages if not (out / stage.name / "done").exists()]
    running: list[Stage] = []
    polls = 0
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with ExitStack() as stack:
        bars = stack.enter_context(Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden(console)))
        tasks = {stage.name: bars.add_task(stage.name, total=stage.steps or 1, start=False) for stage in waiting}
        stack.callback(stop, running)
        while waiting or running:
            while waiting and len(running) < parallel:
                stage = waiting.pop(0)
                start(stage, out, console)
                bars.start_task(tasks[stage.name])
                running.append(stage)
            time.sleep(POLL_SECONDS)
            polls += 1
            if not console.is_terminal and polls % POLLS_PER_LINE == 0:
                done = {stage.name: rows(out / stage.name / "metrics.jsonl") for stage in running}
                far = [f"{s.name} {done[s.name]}/{s.steps}" if s.steps else s.name for s in running]
                console.print("  ".join(far), highlight=False)
            for stage in list(running):
                bars.update(tasks[stage.name], completed=rows(out / stage.name / "metrics.jsonl"))
                if finished(stage, out):
                    bars.update(tasks[stage.name], completed=stage.steps or 1)
                    running.remove(stage)
                    if not console.is_terminal:
                        console.print(f"{stage.name}: done")


def start(stage: Stage, out: Path, console: Console) -> None:
    """Write the settings file and start the command."""
    settings = out / f"{stage.name}.yaml"
    write_settings(settings, stage.settings)
    command = [stage.recipe, str(settings), "--out", str(out / stage.name)]
    if begun(out / stage.name):
        command.append("--resume")
    console.print("echelon " + " ".join(command), style="dim", highlight=False, soft_wrap=True)
    stage.log = (out / f"{stage.name}.log").open("ab")
    command = [sys.executable, "-m", "echelon", *command]
    stage.process = subprocess.Popen(command, stdout=stage.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def begun(folder: Path) -> bool:
    """Whether a stage has something to go on from."""
    return any((folder / "checkpoints").glob("step_*"))


def finished(stage: Stage, out: Path) -> bool:
    """Whether a command has ended well. Raises RolloutError when it has ended badly."""
    assert stage.process is not None
    assert stage.log is not None
    status = stage.process.poll()
    if status is None:
        return False
    stage.log.close()
    log = out / f"{stage.name}.log"
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = lines[-1] if lines else "nothing"
        raise RolloutError(f"the stage '{stage.name}' ended with status {status} and said: {said} See {log}.")
    (out / stage.name / "done").touch()
    return True


def stop(running: Sequence[Stage]) -> None:
    """End what still runs; each stage can be resumed."""
    for stage in running:
        if stage.process is not None and stage.process.poll() is None:
            stage.process.terminate()
            stage.process.wait()
        if stage.log is not None:
            stage.log.close()


def rows(path: Path) -> int:
    """How many lines a file has; none if it is not there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def summarise(cfg: Config, out: Path, spec: EnvSpec, *, seconds: float) -> dict[str, Any]:
    """Per method: episodes and seconds of training, mean return and win rate with their intervals, seeds."""
    methods = {}
    for name, title in METHODS.items():
        estimates = json.loads((out / f"test_{name}" / "summary.json").read_text())["estimates"]
        run = out / name.removesuffix("_pick")
        curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        learned, drawn = name != "warm", name in ("grpo", "archer_pick")
        methods[name] = {
            "title": title,
            "episodes": cfg.steps * cfg.episodes_per_step if learned else 0,
            "seconds": curve[-1]["seconds"],
            "return": estimates["return"],
            "win": estimates["win"],
            "seeds": [cfg.seed],
            "curve": [row["reward/mean"] for row in curve] if drawn else [],
        }
    references = {"random": measure(spec, "random", rounds=100).reward, "optimal": measure(spec, "optimal").reward}
    return {"env": spec.name, "env_settings": dict(spec.settings), "seconds": seconds, **references, "methods": methods}


def draw(out: Path, summary: Mapping[str, Any]) -> None:
    """Mean return of the training episodes over the number played."""
    need("matplotlib", "plot").use("Agg")
    from matplotlib import pyplot  # after the backend is chosen

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, method in summary["methods"].items():
        curve, reached = method["curve"], method["return"]["mean"]
        if name == "warm":
            axes.axhline(reached, color="gray", linestyle=":", label=method["title"])
            continue
        color = {"grpo": "tab:orange", "archer": "tab:green", "archer_pick": "tab:blue"}[name]
        label = method["title"] + ("" if curve else ": test games")
        axes.plot(method["episodes"], reached, "o", color=color, label=None if curve else label)
        if curve:
            per_step = method["episodes"] / len(curve)
            width = max(1, round(256 / per_step))
            smooth = [sum(curve[max(0, end - width) : end]) / min(width, end) for end in range(1, len(curve) + 1)]
            axes.plot([per_step * (step + 1) for step in range(len(curve))], smooth, color=color, label=label)
    axes.axhline(summary["optimal"], color="black", linestyle="--", linewidth=1, label="optimal player")
    axes.set(xlabel="episodes played", ylabel="mean return", title="Twenty Questions, ten things")
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, 0.93), frameon=False)
    figure.savefig(out / "curve.png", dpi=150)
    pyplot.close(figure)


def show(summary: Mapping[str, Any], console: Console, out: Path) -> None:
    """The table."""
    table = Table(
        "", "episodes", "s", "return", "wins", title="Twenty Questions, ten things: test games", box=SIMPLE_HEAD
    )
    for method in summary["methods"].values():
        ours, win = method["return"], method["win"]
        table.add_row(
            method["title"],
            f"{method['episodes']:,}" if method["episodes"] else "",
            f"{method['seconds']:.0f}",
            f"{ours['mean']:.2f} [{ours['low']:.2f}, {ours['high']:.2f}]",
            f"{win['mean']:.0%} [{win['low']:.0%}, {win['high']:.0%}]",
        )
    table.add_row("optimal player", "", "", f"{summary['optimal']:.2f}", "", end_section=True)
    table.caption = f"95 % intervals; {summary['seconds']:.0f} s since this command was started"
    for column in table.columns:
        column.no_wrap = True
    console.print(table)
    console.print(f"the curve: {out / 'curve.png'}   the numbers: {out / 'summary.json'}")
    page = typed("report", str(out))
    console.print(f"what each level learned and said, in one page: {page}", soft_wrap=True, highlight=False)
