"""Evaluation: play the tasks of a split and report return, turns and wins with 95 % intervals. Nothing is learned.

A model plays, or one of the environment's scripted players. The tasks come in order, again from the first when there
are more episodes than tasks, and every episode draws from a seed of its own: the same command gives the same numbers.
Unlike in training the distribution may be cut (top_k, top_p) or reduced to its mode (greedy). The directory `out` gets
evaluation.json (the average score, and of every episode what it scored, how it ended, and each step's text and reward;
where a ranker or a critic picked among candidates, all of them, with what each was thought to be worth), episodes.jsonl
and summary.json; those of an earlier evaluation, or of somebody else, are replaced only with --overwrite.

In an environment of Gymnasium (`--env-id CartPole-v1`) the model is a controller, and so may be one behind an endpoint
(`--policy api`), a perceptron or a script. Every action is kept; films, a plot and a normalised score come on demand
(docs/control-evaluation.md).

With `reference` the last utterance of every episode is also compared with the reply that the task's data hold: BLEU-2,
ROUGE-L and Distinct-2 of all of them together.

With `rounds` a solver and a coach play instead: every problem is solved, remarked on and solved again so many times,
whether or not an answer was right, and accuracy is reported for every turn (docs/rounds.md). Such an evaluation goes on
where it was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from torch import nn

from echelon import __version__
from echelon.config import ModelConfig, PlayConfig, SamplingConfig, demand, require
from echelon.data.recorded import transition_rows
from echelon.envs import EnvSpec
from echelon.errors import CheckpointError, ConfigError, DataError, need
from echelon.rollout import control_eval
from echelon.rollout.candidates import step_record
from echelon.rollout.control_eval import Control, ControlPlay, open_speaker, prepared, with_planner
from echelon.rollout.dialogue import RESPONDER, STRATEGIST, choice_record
from echelon.rollout.evaluate import Estimate, bootstrap, evaluation_record, scripted_loop, summarise
from echelon.rollout.feedback import SOLVER
from echelon.rollout.levels import has_levels, open_dialogists
from echelon.rollout.players import open_policy, speaker
from echelon.rollout.plays import env_loop
from echelon.rollout.rewards import answer_in, open_rewards, open_tasks
from echelon.rollout.roles import Role, collect
from echelon.rollout.round_players import open_round_players, run_of, solver_path
from echelon.rollout.rounds import SETTINGS, RoundFiles, Row, check_failures, play_rounds
from echelon.rollout.rounds_summary import summarise_rounds
from echelon.rollout.setup import describe, set_threads
from echelon.sampling.candidates import Chooser
from echelon.text.endpoint import used
from echelon.text.metrics import LIBRARIES, text_scores
from echelon.train.checkpoint import Label
from echelon.train.log import episode_rows, typed
from echelon.types import Env, Episode, Play, SamplingParams, Task

EPISODES, MAX_TURNS, MAX_TOKENS, MAX_PROMPT_TOKENS = 200, 100, 32, 1024
"""Where nobody says how many, and how long."""

FOLDER = "model.path"
"""What a run directory or another model means that is named before the flags."""
EXAMPLES = """\
echelon evaluate runs/archer                            the environment that it learned in, its best or newest model
echelon evaluate --model.path DIR --env twenty_questions --episodes 200 --out runs/test
echelon evaluate runs/feedback --env arithmetic --rounds 1 --greedy
echelon evaluate runs/control --env-id CartPole-v1 --episodes 100 --plot"""


@dataclass(frozen=True, kw_only=True)
class Config(ControlPlay):
    """Settings of an evaluation."""

    out: str = ""
    """Directory of the results; without it, of a run, one in it such as <run>/evaluation/step_000120_test."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Who plays: a model folder, a run directory, a checkpoint or a hub id; of a run of tosca both levels."""
    label: Label = "auto"
    """Which model of a run: that of a step, the latest, or the best that it kept; auto is the best, or else the
    latest."""
    split: Literal["train", "test"] = "test"
    """Whose tasks are played; of a data set where nothing is held out, all of them."""
    episodes: int = 0
    """How many are played; 0 plays 200, of controllers 10, with `rounds` every problem once."""
    max_turns: int = 0
    """An episode is cut off after this many turns; 0 is 100, and for controllers their environment's own end."""
    error_budget: float = 0.0
    """Fraction of the episodes that may fail; the others are what is reported."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Draw from this many most likely tokens only; 0 keeps all."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with at least this probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that the prompt or the utterance already has become less likely."""
    greedy: bool = False
    """Always take the most likely token, whatever the temperature."""
    max_tokens: int = 0
    """Longest utterance, in tokens; 0 takes 32, with `rounds` that of training."""
    max_prompt_tokens: int = 0
    """Longest prompt, in tokens; 0 takes 1024, with `rounds` that of training."""
    stop: tuple[str, ...] = ()
    """An utterance ends as soon as its text contains one of these."""
    strategist: str = ""
    """A run or folder of a strategist, which tells the model how to reply; a run of tosca has its own."""
    candidates: int = 0
    """The ranker of a rank run, or the critic of an ArCHer run, picks every utterance among this many; 1 lets the model
    say what it draws. 0 takes as many as a rank run was trained with, and 1 elsewhere."""
    rounds: int = 0
    """How often feedback and a new attempt follow a first attempt; 0 plays episodes as they are."""
    attempts: int = 1
    """First attempts at each problem (rounds); with more there is pass@k."""
    coach: str = ""
    """Who gives feedback (rounds): a run, a model folder or a hub id; empty is the coach of the run, or the model."""
    context: Literal["", "coach", "none", "fixed", "stranger", "example"] = ""
    """What comes between two attempts (rounds), in place of what did in training: the coach's words on the last one
    (coach) or on another problem (stranger), the same words always (fixed), nothing (none), or before the first attempt
    a worked example (example)."""
    reference: str = ""
    """Column of the data set, or key of a task's data, with the reply that a person gave: what is said last in every
    episode is compared with it, and nothing else has to say what an answer is worth."""
    transitions: str = ""
    """File to record every decision in, for `archer --offline`: one row per turn. One that is there is replaced only
    with overwrite."""
    overwrite: bool = False
    """Replace the evaluation that is in the directory, other files by the names of its own, and that of transitions."""

    worth = (*PlayConfig.worth, "reference")

    @property
    def count(self) -> int:
        """How many episodes are played without `rounds`."""
        return self.episodes or (control_eval.EPISODES if self.controls else EPISODES)

    @property
    def longest(self) -> int:
        """Turns after which an episode is cut off."""
        return self.max_turns or (control_eval.LONGEST if self.controls else MAX_TURNS)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, *(["model.path"] if self.player in ("model", "mlp") else []))
        because = "prompts have no scripted players. Leave player at model."
        demand(self, "player", self.player == "model" or bool(self.env), because)
        demand(self, "attempts", self.attempts >= 1, "it counts something there must be one of. Give 1 or more.")
        for name in ("episodes", "max_turns", "max_tokens", "max_prompt_tokens", "rounds"):
            demand(self, name, getattr(self, name) >= 0, "it is a count. Give 0 for the default, or more.")
        _check_rounds(self)
        demand(self, "candidates", self.candidates >= 0, "they are counted. Give 1 to let the model say what it draws.")
        demand(self, "error_budget", 0 <= self.error_budget < 1, "it is a fraction of the episodes. Give 0 to 0.99.")
        demand(self, "temperature", self.temperature >= 0, "probabilities would be turned around. Give 0 or more.")
        demand(self, "top_k", self.top_k >= 0, "it counts tokens. Give 0 to keep all.")
        demand(self, "top_p", 0 < self.top_p <= 1, "it is a probability that must be kept. Give 1 to keep all.")
        demand(self, "repetition_penalty", self.repetition_penalty > 0, "it divides. Give 1 to leave it out.")
        for name, nothing in {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "stop": ()}.items():
            here = self.player != "api" or getattr(self, name) == nothing
            demand(self, name, here, "an endpoint is not sent it. Leave it out with --policy api.")
        demand(self, "stop", "" not in self.stop, "every text contains the empty text. Leave it out.")
        at = not isinstance(self.label, int) or self.label >= 0
        demand(self, "label", at, "steps are counted from 0. Give one of those in <run>/checkpoints.")


def _check_rounds(cfg: Config) -> None:
    """What goes with rounds of feedback and what does not."""
    for name in ("attempts", "coach", "context"):
        set_at_all = getattr(cfg, name) not in ("", 1)
        demand(cfg, name, not set_at_all or cfg.rounds > 0, "it is about rounds of feedback. Give --rounds, too.")
    demand(cfg, "player", cfg.player == "model" or not cfg.rounds, "no script solves problems. Leave rounds out.")
    because = "rounds are drawn by the local engine. Leave it out."
    demand(cfg, "sampler", cfg.sampler == "local" or not cfg.rounds, because)
    for name in ("transitions", "strategist", "candidates", "reference"):
        because = "a solver and a coach play in rounds. Leave one of the two out."
        demand(cfg, name, not (getattr(cfg, name) and cfg.rounds), because)
    because = "a worked example comes before the one and only attempt. Give 1, or another context."
    demand(cfg, "rounds", cfg.rounds <= 1 or cfg.context != "example", because)


@dataclass(slots=True)
class Players:
    """Who plays, how, and what is known of every choice they made."""

    play: Play
    modules: dict[str, nn.Module]
    roles: tuple[Role, ...] = ()
    choices: Callable[[], Mapping[int, Mapping[str, Any]]] = dict
    """What every step was chosen from, by the seed of its turn; nothing where nobody picked."""


@dataclass(frozen=True, slots=True)
class Score:
    """A number of all replies together, which is no mean over them and has no interval."""

    mean: float
    n: int
    """How many replies."""


def main(cfg: Config) -> None:
    """Play, print a table, write the files."""
    if cfg.rounds:
        return evaluate_rounds(cfg)
    if cfg.player == "model" and run_of(solver_path(cfg.model.path, cfg.label)):
        raise ConfigError(f"rounds = 0: {cfg.model.path} learned to solve with feedback. Give --rounds 1, or more.")
    folder = speaker(cfg.model.path, cfg.label) if cfg.player in ("model", "mlp") else ""
    cfg, split = prepared(cfg, folder), split_of(cfg)
    out = results(cfg, Path(folder), split)
    check_out(cfg, out)
    check_transitions(cfg)
    env, rewards = open_tasks(cfg), open_rewards(cfg)
    tasks = env.tasks(split)
    chosen = [replace(tasks[place % len(tasks)]) for place in range(cfg.count)]
    check_references(cfg.reference, chosen)
    control = Control(cfg, env, chosen, out) if cfg.controls else None
    who = open_players(cfg, env, folder, control.flights.make if control else env.make)
    set_threads(cfg.threads, next(iter(who.modules.values()), None))
    if cfg.dry_run:
        most = cfg.count * cfg.longest * (cfg.max_tokens or MAX_TOKENS)
        return describe(who.modules, tokens_per_step=most * bool(who.roles))

    before = used()
    episodes = asyncio.run(collect(chosen, who.play, seed=cfg.seed, error_budget=cfg.error_budget))
    rewards.add(episodes)

    reported = control.estimates if control else estimates
    found: dict[str, Estimate | Score] = {**reported(episodes, tokens=bool(who.roles))}
    found |= compared(cfg.reference, episodes)
    failed = sum(episode.ending == "failed" for episode in episodes)
    lines = table(cfg, found, split, failed=failed, of=len(episodes))
    Console().print(lines)
    decode = {role.name: role.renderer.decode for role in who.roles} or None
    record = evaluation_record(episodes, who.choices())
    write(out, cfg, found, episode_rows(episodes, decode=decode), record, endpoint=used(before))
    if control:
        control.report(found, str(lines.title))
    if cfg.transitions:
        write_transitions(Path(cfg.transitions), transition_rows(episodes))
    tell_written(out)


def tell_written(out: Path) -> None:
    """Say where the results are, and how to look at what was said."""
    print(f"{out}: summary.json, episodes.jsonl. Look at them: {typed('report', str(out))}")


def results(cfg: Config, folder: Path, what: str) -> Path:
    """Where the files go: `out`, else a directory in the run that the model in `folder` is of, named for `what`."""
    if not cfg.out and (Path(cfg.model.path) / "checkpoints").is_dir():
        model = folder.name if folder.name == "best" else folder.parent.name
        return Path(cfg.model.path, "evaluation", f"{model}_{what}")
    require(cfg, "out")
    return Path(cfg.out)


def open_players(cfg: Config, env: EnvSpec, folder: str, make: Callable[[Task], Env]) -> Players:
    """Who plays the environments that `make` makes: a script, or whoever else says no tokens; the model in a folder, or
    the levels that it is one of, as they are evaluated: from a distribution that may be cut, or greedily."""
    if cfg.player != "model":
        player, modules = open_speaker(cfg, env, folder, speech(cfg))
        return Players(scripted_loop(make, player, name=cfg.player, max_turns=cfg.longest), modules)
    params = replace(speech(cfg), max_tokens=cfg.max_tokens or MAX_TOKENS)
    sampling = SamplingConfig(max_prompt_tokens=cfg.max_prompt_tokens or MAX_PROMPT_TOKENS, sampler=cfg.sampler)
    if cfg.strategist or has_levels(Path(folder).parent):
        return open_levels(cfg, env, folder, sampling, params)
    actor = open_policy(folder, cfg.model, sampling, params, candidates=cfg.candidates)
    if cfg.controls and (both := with_planner(folder, actor, cfg.model, sampling)):
        return Players(both.play(make, max_turns=cfg.longest), {"actor": actor.module}, tuple(both.roles()))
    chooser = actor.role.sampler if isinstance(actor.role.sampler, Chooser) else None

    def choices() -> dict[int, dict[str, Any]]:
        return {seed: step_record(offer) for seed, offer in (chooser.take() if chooser else {}).items()}

    play = env_loop(make, actor.role, max_turns=cfg.longest)
    return Players(play, {"actor": actor.module}, (actor.role,), choices)


def speech(cfg: Config) -> SamplingParams:
    """How an evaluated model speaks; lengths are 0 where nobody said them."""
    return SamplingParams(
        max_tokens=cfg.max_tokens,
        temperature=0.0 if cfg.greedy else cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        repetition_penalty=cfg.repetition_penalty,
        stop=cfg.stop,
    )


def evaluate_rounds(cfg: Config) -> None:
    """Solve, hear, solve again, on every problem; go on with an evaluation that was killed."""
    folder = solver_path(cfg.model.path, cfg.label)
    split = split_of(cfg)
    out = results(cfg, Path(folder), f"{Path((*cfg.data.path, cfg.env)[0]).stem}_{split}_rounds_{cfg.rounds}")
    check_out(cfg, out)
    env, rewards = open_tasks(cfg), open_rewards(cfg)
    lengths = {"max_prompt_tokens": cfg.max_prompt_tokens}
    who = open_round_players(
        folder, model=cfg.model, params=speech(cfg), coach=cfg.coach, context=cfg.context, **lengths
    )
    set_threads(cfg.threads, who.modules[SOLVER])
    tasks = env.tasks(split)
    chosen = [tasks[place % len(tasks)] for place in range(cfg.episodes or len(tasks))]
    if cfg.dry_run:
        each = who.solver.params.max_tokens * (cfg.rounds + 1)
        each += who.coach.params.max_tokens * cfg.rounds if who.coach else 0
        return describe(who.modules, tokens_per_step=len(chosen) * cfg.attempts * each)

    left_out = {"overwrite": False, "dry_run": False, "threads": 0, "out": str(out)}
    files = RoundFiles(out, {**asdict(cfg), **left_out, "solver": folder}, overwrite=cfg.overwrite)
    rows = files.open()

    def record(row: Row) -> None:
        rows.append(row)
        files.append(row)
        if len(rows) % max(1, len(chosen) // 10) == 0:
            print(f"{len(rows)} of {len(chosen)} problems", file=sys.stderr)

    done, before = [row["number"] for row in rows], used()
    how = {"rounds": cfg.rounds, "attempts": cfg.attempts, "seed": cfg.seed}
    asyncio.run(play_rounds(env, chosen, who, rewards, done=done, record=record, **how))
    check_failures(rows, cfg.error_budget)
    found, failed = summarise_rounds(rows), sum(row["error"] is not None for row in rows)
    Console().print(table(cfg, found, split, failed=failed, of=len(rows)))
    estimates = {name: asdict(estimate) for name, estimate in found.items()}
    asked = {"endpoint": counts} if (counts := used(before)) else {}
    files.finish(
        rows, {"episodes": len(rows), "failed": failed, "estimates": estimates, **asked, "config": asdict(cfg)}
    )
    tell_written(out)


def split_of(cfg: Config) -> str:
    """Whose tasks are played: where no part of the prompts is held out, all of them."""
    held_out = cfg.data.eval_path or cfg.data.eval_split or cfg.data.eval_fraction
    return "train" if cfg.data.path and not held_out else cfg.split


def open_levels(cfg: Config, env: EnvSpec, folder: str, sampling: SamplingConfig, params: SamplingParams) -> Players:
    """A strategist, who chooses what it values most, and the responder in a folder."""
    demand(cfg, "transitions", not cfg.transitions, "two levels play, and its rows are those of one. Leave it out.")
    who = open_dialogists(folder, model=cfg.model, sampling=sampling, params=params, env=env, strategist=cfg.strategist)

    def choices() -> dict[int, dict[str, Any]]:
        return {seed: choice_record(offer, who.inventory) for seed, offer in who.take().items()}

    roles = (*([who.strategist] if who.strategist else []), who.responder)
    modules = {RESPONDER: who.responder.sampler.module}  # type: ignore[attr-defined]
    return Players(who.play(env.make, max_turns=cfg.longest), modules, roles, choices)


def estimates(episodes: Sequence[Episode], *, tokens: bool) -> dict[str, Estimate]:
    """What is reported: `summarise`, and the fraction that was cut off. A scripted player says no tokens to count, and
    a strategist's choice is no turn."""
    found = summarise([replace(e, turns=[turn for turn in e.turns if turn.role != STRATEGIST]) for e in episodes])
    if not tokens:
        del found["length"]
    cut_off = [float(episode.ending == "truncated") for episode in episodes if episode.ending != "failed"]
    return {**found, "truncated": bootstrap(cut_off)}


def check_references(column: str, tasks: Iterable[Task]) -> None:
    """Raise DataError for the first task without a reply to compare with, MissingExtra where libraries are missing."""
    if not column:
        return
    for task in tasks:
        if not isinstance(reply := task.data.get(column), str) or not reply.strip():
            has = ", ".join(task.data) or "none"
            why = f"has no text in '{column}', so nothing can be compared with it. Its columns are: {has}."
            raise DataError(f"reference = {column}: task '{task.id}' {why}")
    for library in LIBRARIES:
        need(library, "text")


def compared(column: str, episodes: Iterable[Episode]) -> dict[str, Score]:
    """What was said last in every episode that did not fail, beside the reply of a person; nothing without a column."""
    played = [(e, e.turns[-1]) for e in episodes if column and e.ending != "failed" and e.turns]
    if not played:
        return {}
    said = [answer_in(episode, turn).completion for episode, turn in played]
    scores = text_scores(said, [episode.data[column] for episode, _ in played])
    return {name: Score(value, len(played)) for name, value in scores.items()}


def table(cfg: Config, found: Mapping[str, Estimate | Score], split: str, *, failed: int, of: int) -> Table:
    """Means and intervals, for a person."""
    named = {"model": cfg.model.path, "mlp": cfg.model.path, "api": cfg.api.get("model")}
    who = named.get(cfg.player, f"{cfg.player} player")
    lines = Table(
        "",
        "mean",
        "95 % interval",
        "episodes",
        title=f"{who} in {cfg.env or ', '.join(cfg.data.path)}, {split} split",
    )
    for name, estimate in found.items():
        interval = f"{estimate.low:.3f} to {estimate.high:.3f}" if isinstance(estimate, Estimate) else ""
        lines.add_row(name, f"{estimate.mean:.3f}", interval, str(estimate.n))
    if failed:
        lines.caption = f"{failed} of {of} episodes failed and are left out"
    return lines


def check_out(cfg: Config, out: Path) -> None:
    """Raise CheckpointError where a training run is, where files are that shall stay, or where none can be written."""
    check_place(out, "--out")
    if (out / "checkpoints").exists() or (out / "metrics.jsonl").exists():
        raise CheckpointError(f"{out}: a training run is kept there, and its files stay. Choose another --out.")
    if cfg.overwrite:
        return
    if (out / "summary.json").exists():
        raise CheckpointError(f"{out}: there is an evaluation already. Replace it with --overwrite, or change --out.")
    there = [name for name in written(cfg) if (out / name).exists() and (out / name).stat().st_size]
    if there and not (cfg.rounds and begun(out)):
        raise CheckpointError(
            f"{out}: {there[0]} is there and no summary.json, so it is of no whole evaluation. Replace it with "
            "--overwrite, or choose another --out."
        )


def written(cfg: Config) -> list[str]:
    """What an evaluation writes besides its summary, which comes last."""
    if cfg.rounds:
        return ["episodes.jsonl", SETTINGS]
    more = [*(["actions.jsonl"] if cfg.controls else []), *(["return.png"] if cfg.plot else [])]
    return ["episodes.jsonl", "evaluation.json", *more]


def begun(out: Path) -> bool:
    """Whether an evaluation with rounds was killed there, which goes on: its settings say so."""
    try:
        return "rounds" in json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def check_transitions(cfg: Config) -> None:
    """Raise CheckpointError for a file of transitions that shall stay, or where none can be written."""
    if not cfg.transitions:
        return
    path = Path(cfg.transitions)
    check_place(path, "--transitions", file=True)
    if path.exists() and not cfg.overwrite:
        raise CheckpointError(
            f"{path}: there is such a file already. Replace it with --overwrite, or choose another --transitions."
        )


def check_place(path: Path, flag: str, *, file: bool = False) -> None:
    """Raise CheckpointError where no folder, or else no file, can be written. Nothing is made."""
    try:
        there = nearest(path)
        replaced = file and there == path.absolute()
        folder = there.parent if replaced else there
        why = "" if os.access(folder, os.W_OK | os.X_OK) else "Permission denied"
        why = why if folder.is_dir() else "Not a directory"
        if replaced and not there.is_file():
            why = "Is a directory" if there.is_dir() else "Not a file"
    except OSError as error:
        why = f"{error.strerror}"
    if why:
        raise CheckpointError(f"{path}: cannot be written ({why}). Choose another {flag}.")


def nearest(path: Path) -> Path:
    """The path, or the first folder above it that is there. Raises OSError where nobody may look."""
    for place in (path.absolute(), *path.absolute().parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            place.stat()
            return place
    return Path("/")


def write(
    out: Path,
    cfg: Config,
    found: Mapping[str, Estimate | Score],
    rows: Iterable[Mapping[str, Any]],
    evaluation: Mapping[str, Any],
    *,
    endpoint: Mapping[str, int],
) -> None:
    """episodes.jsonl first and summary.json last: a summary is there only when everything is."""
    summary = {
        "recipe": "evaluate",
        "version": __version__,
        "episodes": cfg.count,
        "failed": cfg.count - found["return"].n,
        "estimates": {name: asdict(estimate) for name, estimate in found.items()},
        **({"endpoint": endpoint} if endpoint else {}),
        "config": asdict(cfg),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").unlink(missing_ok=True)
        write_rows(out / "episodes.jsonl", rows)
        text = json.dumps(evaluation, indent=1, ensure_ascii=False)
        (out / "evaluation.json").write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror}). Choose another --out.") from error


def write_transitions(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the transitions of the episodes, all or none. Raises CheckpointError where they cannot be written."""
    whole = path.resolve()  # a link stays one
    scratch = whole.with_name(f".{whole.name}.tmp")
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
        write_rows(scratch, rows)
        scratch.replace(whole)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}). Choose another --transitions.") from error


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSONL file."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
