"""What `learning.py` compares: the tasks, the methods with their settings, and the start that all methods share.

Settings are those of the recipes; of every method as many learning rates are tried.
Knows nothing of processes, seeds or results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echelon.envs import EnvSpec, load_env
from echelon.envs.players import make_player, play
from echelon.models.lm import tiny
from echelon.train.copying import learn_to_copy
from echelon.train.learner import save_module

Settings = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A game, and how much of it is played."""

    title: str
    env: str
    env_settings: Mapping[str, Any]
    max_tokens: int
    """Longest utterance."""
    flat_episodes: int
    """Episodes of methods without a critic of utterances."""
    level_episodes: int
    """Episodes of methods with one; fewer, as each costs more."""
    recorded: int
    """Episodes of the warm start that off-line learning gets."""
    prompt_tokens: int = 512
    """Longest prompt."""
    guess: bool = True
    """Whether random players guess: half of what they say is then a guess at the answer."""
    games: int = 2500
    """Games of random play to warm-start on."""
    gamma: float = 0.95
    """Discount per turn of all methods that discount turns."""
    hidden: int = 64
    """Width of the tiny model."""
    critic_episodes: int = 0
    """Replayed episodes in an update of a critic; 0 leaves it to the method."""
    policy_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """Learning rates that are tried of methods whose policy learns; as many as of the others."""
    critic_rates: tuple[float, ...] = (1e-3, 2e-3, 3e-3)
    """The same of methods that have a critic of utterances."""

    @property
    def spec(self) -> EnvSpec:
        """The environment with its settings."""
        return load_env(self.env, self.env_settings)


LOCK: Settings = {"guess": False, "gamma": 0.0, "policy_rates": (3e-4, 1e-3, 3e-3)}
"""What all locks have in common."""
TASKS = {
    "text_lock_12": Task(
        "Text lock, 12 doors", "text_lock", {"doors": 12}, 4, 2048, 256, 512, **LOCK, critic_episodes=8
    ),
    "text_lock_24": Task(
        "Text lock, 24 doors", "text_lock", {"doors": 24}, 4, 1024, 160, 256, **LOCK, critic_episodes=4
    ),
    "twenty_questions": Task("Twenty Questions, ten things", "twenty_questions", {"subset": True}, 12, 1536, 384, 384),
    "twenty_questions_all": Task("Twenty Questions, 157 things", "twenty_questions", {}, 12, 1024, 256, 256),
    "guess_my_city": Task("Guess My City, ten cities", "guess_my_city", {"subset": True}, 16, 1024, 256, 256, 768),
}
SWEEP_SEED = 100
"""The seed of sweeps, which is not reported."""
SWEEP_PART = 0.5
"""How much of a reported run a run of a sweep is."""
SWEEP_TESTS = 3
"""Tests at the end of a run of a sweep; their mean decides."""


@dataclass(frozen=True)
class Method:
    """An algorithm, how it is set, and what is tried of it."""

    title: str
    recipe: str
    settings: Mapping[str, Any]
    rate: str
    """The learning rate that is tried, dotted."""
    by_env: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further settings, by environment."""
    flat: bool = True
    """Whether nothing in it knows what an utterance is worth in its state, so that it is a baseline."""
    offline: bool = False
    """Whether it learns from recorded episodes instead of playing."""
    discounts: bool = False
    """Whether it discounts turns."""

    def sweep(self, task: Task) -> tuple[Settings, ...]:
        """What is tried of it."""
        values = task.policy_rates if self.rate == POLICY else task.critic_rates
        return tuple({self.rate: value} for value in values)


GROUPS = {"tasks_per_step": 4, "group_size": 8, "policy": {"epochs": 4}}
PPO = {"episodes_per_step": 32, "warmup_steps": 4, "value_optim": {"lr": 1e-3}, "value_epochs": 4}
POLICY = "policy.optim.lr"

METHODS = {
    "filtered_bc": Method(
        "filtered BC",
        "archer",
        {
            "episodes_per_step": 32,
            "warmup_steps": 0,
            "replay_capacity": 16000,
            "critic_updates": 0,
            "critic_body": "actor",
            "credit": "none",
            "actor_actions": "replayed",
            "actor_top": 0.1,
            "actor_updates": 2,
            "policy": {"loss": "awr"},
        },
        POLICY,
    ),
    "grpo": Method("GRPO", "grpo", {**GROUPS, "tasks_per_step": 8}, POLICY),
    "grpo_turn": Method("GRPO, credit per turn", "grpo", {**GROUPS, "credit": "turn"}, POLICY, discounts=True),
    "ppo_token": Method("PPO, tokens", "ppo", {**PPO, "policy": {"epochs": 4}}, POLICY),
    "ppo_turn": Method(
        "PPO, turns",
        "ppo",
        {**PPO, "credit": "turn", "policy": {"epochs": 4}},
        POLICY,
        discounts=True,
    ),
    "archer": Method(
        "ArCHer",
        "archer",
        {
            "critic_path": "tiny",
            "episodes_per_step": 16,
            "replay_capacity": 100000,
            "critic_updates": 25,
            "critic_episodes": 12,
            "value_actions": "replayed",
            "critic_optim": {"weight_decay": 0.1},
            "warmup_steps": 2,
            "candidates": 16,
            "freeze_actor": True,
        },
        "critic_optim.lr",
        by_env={
            "text_lock": {
                "critic_path": "",
                "episodes_per_step": 8,
                "critic_updates": 60,
                "critic_optim": {"weight_decay": 0.3},
                "warmup_steps": 1,
                "candidates": 32,
            },
        },
        flat=False,
        discounts=True,
    ),
    "offline_iql_awr": Method(
        "off-line IQL + AWR",
        "archer",
        {
            "critic_path": "tiny",
            "steps": 40,
            "warmup_steps": 10,
            "critic_updates": 16,
            "value_actions": "replayed",
            "expectile": 0.9,
            "critic_optim": {"lr": 2e-3},
            "actor_updates": 2,
            "actor_actions": "replayed",
            "policy": {"loss": "awr", "awr_beta": 1},
        },
        POLICY,
        by_env={
            "text_lock": {
                "critic_path": "",
                "critic_updates": 60,
                "critic_optim": {"lr": 2e-3, "weight_decay": 0.3},
                "actor_updates": 8,
                "policy": {"loss": "awr", "awr_beta": 50},  # a door pays a twelfth
            },
        },
        flat=False,
        offline=True,
        discounts=True,
    ),
    "rank": Method(
        "rank",
        "rank",
        {
            "ranker_path": "tiny",
            "episodes_per_step": 16,
            "candidates": 16,
            "epsilon": 0.3,
            "ranker_updates": 16,
            "ranker_batch": 32,
            "ranker_optim": {"weight_decay": 0.1},
            "target_every": 50,
            "generator": "frozen",
        },
        "ranker_optim.lr",
        by_env={
            "text_lock": {
                "ranker_path": "",
                "episodes_per_step": 8,
                "candidates": 32,
                "ranker_updates": 20,
                "ranker_batch": 96,
                "ranker_optim": {"weight_decay": 0.3},
            },
        },
        flat=False,
        discounts=True,
    ),
}


@dataclass(frozen=True)
class Size:
    """How much is done of everything: for numbers, or to see that it works."""

    copying_steps: int = 400
    games: int = 0
    """Games of the warm start; 0 takes the task's."""
    episodes: float = 1.0
    """The part of a task's episodes that is played."""
    recorded: int = 0
    """Recorded episodes; 0 takes the task's."""
    test_games: int = 100
    """Of every checkpoint."""
    picked_games: int = 40
    """The same where every utterance is picked among several, and a game costs as many times more."""
    final_times: int = 3
    """How many times as many games the last checkpoint plays."""
    checkpoints: int = 8
    """Tests of a run, at equal distances."""
    chance_rounds: int = 20
    points: int | None = None
    """Points of a sweep that are tried; all of them unless told."""
    cut: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By recipe, settings that replace those of the method."""


FULL = Size()
QUICK = Size(
    copying_steps=3,
    games=32,
    episodes=0.0,
    recorded=16,
    test_games=4,
    picked_games=4,
    final_times=1,
    checkpoints=2,
    chance_rounds=1,
    points=1,
    cut={
        "grpo": {"tasks_per_step": 2, "group_size": 2},
        "ppo": {"episodes_per_step": 4, "warmup_steps": 0, "value_epochs": 1},
        "archer": {"episodes_per_step": 4, "warmup_steps": 0, "critic_updates": 1, "actor_episodes": 4},
        "rank": {"episodes_per_step": 2, "warmup_steps": 0, "ranker_updates": 1, "candidates": 2},
    },
)


def write_start(task: Task, out: Path, *, size: Size = FULL) -> None:
    """A tiny model that can copy, in `out/tiny`, and games of random players in `out/random_play.jsonl`."""
    spec, out = task.spec, Path(out)
    tasks, options = spec.tasks("train"), {"guess": 0.5} if task.guess else {}
    dialogues = [
        play(spec, tasks[number % len(tasks)], make_player(spec, "random", seed=number, **options))
        for number in range(size.games or task.games)
    ]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "random_play.jsonl").open("w", encoding="utf-8") as file:
        # The game's last word is not answered, so nothing is learned from it.
        file.writelines(json.dumps({"messages": list(dialogue.messages[:-1])}) + "\n" for dialogue in dialogues)
    said = [message["content"] for dialogue in dialogues for message in dialogue.messages]
    module, tokenizer = tiny(said, hidden=task.hidden, layers=2, heads=task.hidden // 32, seed=0)
    learn_to_copy(module, tokenizer, steps=size.copying_steps, seed=0)
    save_module(module, out / "tiny", tokenizer)


def warm_start(task: Task, out: Path) -> Settings:
    """Settings of `sft` that imitate random play."""
    return {
        "model": {"path": str(out / "tiny")},
        "data": {"path": [str(out / "random_play.jsonl")]},
        "epochs": 3,
        "optim": {"lr": 5e-3, "warmup_steps": 20, "schedule": "cosine"},
        "save_every": 0,
        "threads": 1,
    }


def run_settings(
    task: Task,
    method: Method,
    point: Mapping[str, Any],
    start: Path,
    *,
    seed: int,
    size: Size = FULL,
    part: float = 1.0,
) -> Settings:
    """Settings of a recipe for one run: the task's, the method's, then those of a point of its sweep.

    `part` of the task's episodes is played, or, off-line, of the method's steps taken.
    """
    settings: Settings = {
        "model": {"path": str(start / "warm")},
        "sampling": {"max_tokens": task.max_tokens, "max_prompt_tokens": task.prompt_tokens},
        "threads": 1,
        "seed": seed,
        **method.settings,
        **method.by_env.get(task.env, {}),
        **size.cut.get(method.recipe, {}),
    }
    if method.offline:
        settings["offline"] = [str(start / "recorded.jsonl")]
    else:
        settings |= {"env": task.env, "env_settings": dict(task.env_settings)}
        episodes = task.flat_episodes if method.flat else task.level_episodes
        settings["steps"] = episodes // per_step(settings)
    # As many steps between one test and the next, everywhere.
    between = max(1, round(settings["steps"] * size.episodes * part / size.checkpoints))
    settings["steps"] = between * size.checkpoints
    if method.discounts:
        settings["gamma"] = task.gamma
    if task.critic_episodes and settings.get("critic_updates"):
        settings["critic_episodes"] = task.critic_episodes
    for name in ("critic_path", "ranker_path"):
        if settings.get(name) == "tiny":  # before its warm start, or else the actor itself
            settings[name] = str(start / "tiny")
    for name, value in point.items():
        settings = put(settings, name.split("."), value)
    # Every test is of a checkpoint, so all of them stay.
    return {**settings, "save_every": between, "keep_last": settings["steps"] + 1}


def per_step(settings: Mapping[str, Any]) -> int:
    """Episodes a step plays; 0 where none are played."""
    if "tasks_per_step" in settings:
        return int(settings["tasks_per_step"] * settings["group_size"])
    return 0 if "offline" in settings else int(settings["episodes_per_step"])


def put(settings: Mapping[str, Any], names: list[str], value: Any) -> Settings:
    """Settings with one more, at a path of names."""
    inner = settings.get(names[0], {})
    return {**settings, names[0]: put(inner, names[1:], value) if len(names) > 1 else value}
