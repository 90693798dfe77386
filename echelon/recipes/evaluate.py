"""Evaluation: play the tasks of a split and report return, turns and wins with 95 % intervals. Nothing is learned.

A model plays, or one of the environment's scripted players. The tasks come in order, again from the first when there
are more episodes than tasks, and every episode draws from a seed of its own: the same command gives the same numbers.
Unlike in training the distribution may be cut (top_k, top_p) or reduced to its mode (greedy). The directory `out` gets
episodes.jsonl, every turn of it, and summary.json; those of an earlier evaluation are replaced only with --overwrite.
Where a ranker or a critic picked among candidates, evaluation.json has all of them, with what each was thought to be
worth, which was taken, and what the episode scored.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from echelon.config import ModelConfig, SamplingConfig, TaskConfig, demand, require
from echelon.data.recorded import transition_rows
from echelon.envs.players import make_player
from echelon.errors import CheckpointError
from echelon.rollout.candidates import evaluation_record, has_ranker, run_settings, saved_ranker
from echelon.rollout.critics import saved_critic
from echelon.rollout.evaluate import Estimate, bootstrap, scripted_loop, summarise
from echelon.rollout.plays import env_loop
from echelon.rollout.rewards import open_rewards, open_tasks
from echelon.rollout.roles import collect
from echelon.rollout.setup import Actor, describe, model_path, open_actor, set_threads
from echelon.sampling.best_of import critic_score
from echelon.sampling.candidates import Chooser, ranker_score
from echelon.train.log import episode_rows
from echelon.types import Episode, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    """Settings of an evaluation."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Who plays: a model folder, a run directory, a checkpoint or a hub id."""
    player: Literal["model", "random", "optimal"] = "model"
    """The model, or a scripted player of the environment instead."""
    split: Literal["train", "test"] = "test"
    """Whose tasks are played."""
    episodes: int = 200
    """How many are played."""
    max_turns: int = 100
    """An episode is cut off after this many turns."""
    error_budget: float = 0.0
    """Fraction of the episodes that may fail; the others are what is reported."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Draw from this many most likely tokens only; 0 keeps all."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with at least this probability."""
    greedy: bool = False
    """Always take the most likely token, whatever the temperature."""
    max_tokens: int = 32
    """Longest utterance, in tokens."""
    max_prompt_tokens: int = 1024
    """Longest prompt, in tokens."""
    stop: tuple[str, ...] = ()
    """An utterance ends as soon as its text contains one of these."""
    candidates: int = 0
    """The ranker of a rank run, or the critic of an ArCHer run, picks every utterance among this many; 1 lets the model
    say what it draws. 0 takes as many as a rank run was trained with, and 1 elsewhere."""
    transitions: str = ""
    """File to record every decision in, for `archer --offline`: one row per turn; one that is there is replaced."""
    overwrite: bool = False
    """Replace the evaluation that is in the directory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, *(["model.path"] if self.player == "model" else []))
        because = "prompts have no scripted players. Leave player at model."
        demand(self, "player", self.player == "model" or bool(self.env), because)
        for name in ("episodes", "max_turns", "max_tokens", "max_prompt_tokens"):
            demand(self, name, getattr(self, name) >= 1, "it counts something there must be one of. Give 1 or more.")
        demand(self, "candidates", self.candidates >= 0, "they are counted. Give 1 to let the model say what it draws.")
        demand(self, "error_budget", 0 <= self.error_budget < 1, "it is a fraction of the episodes. Give 0 to 0.99.")
        demand(self, "temperature", self.temperature >= 0, "probabilities would be turned around. Give 0 or more.")
        demand(self, "top_k", self.top_k >= 0, "it counts tokens. Give 0 to keep all.")
        demand(self, "top_p", 0 < self.top_p <= 1, "it is a probability that must be kept. Give 1 to keep all.")
        demand(self, "stop", "" not in self.stop, "every text contains the empty text. Leave it out.")
        demand(self, "resume", not self.resume, "an evaluation is not resumed. Run it again, with --overwrite.")


def main(cfg: Config) -> None:
    """Play, print a table, write the files."""
    out = Path(cfg.out)
    check_out(out, overwrite=cfg.overwrite)
    env, rewards = open_tasks(cfg), open_rewards(cfg)
    actor = open_player(cfg) if cfg.player == "model" else None
    set_threads(cfg.threads, actor.module if actor else None)
    if cfg.dry_run:
        modules = {} if actor is None else {"actor": actor.module}
        return describe(modules, tokens_per_step=cfg.episodes * cfg.max_turns * cfg.max_tokens if actor else 0)

    if actor is None:
        play = scripted_loop(env.make, partial(make_player, env, cfg.player), name=cfg.player, max_turns=cfg.max_turns)
    else:
        play = env_loop(env.make, actor.role, max_turns=cfg.max_turns)
    tasks = env.tasks(cfg.split)
    chosen = [tasks[place % len(tasks)] for place in range(cfg.episodes)]
    episodes = asyncio.run(collect(chosen, play, seed=cfg.seed, error_budget=cfg.error_budget))
    rewards.add(episodes)

    found = estimates(episodes, tokens=actor is not None)
    Console().print(table(cfg, found))
    decode = None if actor is None else {actor.role.name: actor.role.renderer.decode}
    write(out, cfg, found, episode_rows(episodes, decode=decode), offered(actor, episodes))
    if cfg.transitions:
        record(Path(cfg.transitions), transition_rows(episodes))


def open_player(cfg: Config) -> Actor:
    """The model as it is evaluated: from a distribution that may be cut, or greedily."""
    params = SamplingParams(
        max_tokens=cfg.max_tokens,
        temperature=0.0 if cfg.greedy else cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        stop=cfg.stop,
    )
    actor = open_actor(cfg.model, SamplingConfig(max_prompt_tokens=cfg.max_prompt_tokens), params=params)
    checkpoint = Path(model_path(cfg.model.path)).parent
    ranked = has_ranker(checkpoint)
    if (candidates := cfg.candidates or (run_settings(checkpoint)["candidates"] if ranked else 1)) > 1:
        if ranked:
            score = ranker_score(saved_ranker(checkpoint, actor, cfg.model))
        else:
            score = critic_score(saved_critic(checkpoint / "critic", actor))
        actor.role.sampler = Chooser(actor.sampler, score, candidates)
    return actor


def offered(actor: Actor | None, episodes: Sequence[Episode]) -> dict[str, Any] | None:
    """What evaluation.json says; None where nobody picked."""
    chooser = actor.role.sampler if actor else None
    return evaluation_record(episodes, chooser.take()) if isinstance(chooser, Chooser) else None


def estimates(episodes: Sequence[Episode], *, tokens: bool) -> dict[str, Estimate]:
    """What is reported: `summarise`, and the fraction that was cut off. A scripted player says no tokens to count."""
    found = summarise(episodes)
    if not tokens:
        del found["length"]
    cut_off = [float(episode.ending == "truncated") for episode in episodes if episode.ending != "failed"]
    return {**found, "truncated": bootstrap(cut_off)}


def table(cfg: Config, found: Mapping[str, Estimate]) -> Table:
    """Means and intervals, for a person."""
    who = cfg.model.path if cfg.player == "model" else f"{cfg.player} player"
    lines = Table(
        "",
        "mean",
        "95 % interval",
        "episodes",
        title=f"{who} in {cfg.env or ', '.join(cfg.data.path)}, {cfg.split} split",
    )
    for name, estimate in found.items():
        interval = f"{estimate.low:.3f} to {estimate.high:.3f}"
        lines.add_row(name, f"{estimate.mean:.3f}", interval, str(estimate.n))
    if failed := cfg.episodes - found["return"].n:
        lines.caption = f"{failed} of {cfg.episodes} episodes failed and are left out"
    return lines


def check_out(out: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError where a training run is, or an evaluation that shall stay."""
    if (out / "checkpoints").exists() or (out / "metrics.jsonl").exists():
        raise CheckpointError(f"{out}: a training run is kept there, and its files stay. Choose another --out.")
    if (out / "summary.json").exists() and not overwrite:
        raise CheckpointError(f"{out}: there is an evaluation already. Replace it with --overwrite, or change --out.")


def write(
    out: Path,
    cfg: Config,
    found: Mapping[str, Estimate],
    rows: Iterable[Mapping[str, Any]],
    evaluation: Mapping[str, Any] | None = None,
) -> None:
    """episodes.jsonl first and summary.json last: a summary is there only when everything is."""
    summary = {
        "episodes": cfg.episodes,
        "failed": cfg.episodes - found["return"].n,
        "estimates": {name: asdict(estimate) for name, estimate in found.items()},
        "config": asdict(cfg),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("summary.json", "evaluation.json"):
            (out / name).unlink(missing_ok=True)
        write_rows(out / "episodes.jsonl", rows)
        if evaluation is not None:
            text = json.dumps(evaluation, indent=1, ensure_ascii=False)
            (out / "evaluation.json").write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror}). Choose another --out.") from error


def record(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the transitions of the episodes. Raises CheckpointError where they cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, rows)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}). Choose another --transitions.") from error


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSONL file."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
