"""Playing environments without a model: scripted players, whole dialogues, and what chance and the best play earn.

An environment offers players through a classmethod `player(kind, seed, **settings)`, and lists what they may say
in `utterances(**settings)`; the built-in ones do both, and yours may. Print the table of any of them with
`python -m echelon.envs.players twenty_questions subset=true`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from echelon.envs._shared import EnvSpec, Player, run_sync, settle
from echelon.envs.registry import load_env
from echelon.errors import DataError, EchelonError, RolloutError
from echelon.types import Message, Task

__all__ = ["Dialogue", "Player", "Summary", "corpus", "make_player", "measure", "play"]

LONGEST_EPISODE = 1000
"""Turns after which a dialogue is given up."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One episode played by a script."""

    task: Task
    messages: tuple[Message, ...]
    rewards: tuple[float, ...]
    """One a turn."""
    info: Mapping[str, float]
    """Of the last step."""

    @property
    def total(self) -> float:
        """The episode's return, undiscounted."""
        return sum(self.rewards)


@dataclass(frozen=True, slots=True)
class Summary:
    """Means over episodes."""

    episodes: int
    reward: float
    """The return."""
    error: float
    """Standard error of the mean return."""
    turns: float
    wins: float | None
    """Mean of `info["win"]`; None where the environment does not tell."""


def make_player(spec: EnvSpec | str, kind: str = "random", *, seed: int = 0, **options: Any) -> Player:
    """A fresh player of one episode, `random` or `optimal`; `options` are the player's own (`guess=0.5`).

    Calling it never changes it: the same dialogue always gets the same next utterance.
    """
    spec = _spec(spec)
    make = getattr(spec.cls, "player", None)
    if make is None:
        raise DataError(f"{spec.name} has no scripted players. Give it a classmethod player(kind, seed, **settings).")
    player: Player = make(kind, seed, **options, **spec.settings)
    return player


def play(spec: EnvSpec | str, task: Task, player: Player) -> Dialogue:
    """Play one episode of `task` to its end. RolloutError when it has none within 1000 turns."""
    return run_sync(_play(_spec(spec), task, player))


async def _play(spec: EnvSpec, task: Task, player: Player) -> Dialogue:
    env = spec.make(task)
    messages = list(await settle(env.start()))
    rewards: list[float] = []
    while len(rewards) < LONGEST_EPISODE:
        said = player(messages)
        step = await settle(env.step(said))
        messages += [Message(role="assistant", content=said), *step.messages]
        rewards.append(step.reward)
        if step.terminated or step.truncated:
            return Dialogue(task, tuple(messages), tuple(rewards), dict(step.info))
    raise RolloutError(f"{spec.name}: task {task.id} did not end within {LONGEST_EPISODE} turns.")


def measure(spec: EnvSpec | str, kind: str, *, rounds: int = 1, split: str = "test", **options: Any) -> Summary:
    """Mean return, turns and wins of a scripted player over every task of a split, `rounds` times each."""
    spec = _spec(spec)
    tasks = spec.tasks(split)

    async def everything() -> list[Dialogue]:
        episodes = [(index, task, seed) for seed in range(rounds) for index, task in enumerate(tasks)]
        return [
            await _play(spec, task, make_player(spec, kind, seed=seed * len(tasks) + index, **options))
            for index, task, seed in episodes
        ]

    dialogues = run_sync(everything())
    count = len(dialogues)
    mean = sum(dialogue.total for dialogue in dialogues) / count
    wins = [dialogue.info["win"] for dialogue in dialogues if "win" in dialogue.info]
    return Summary(
        episodes=count,
        reward=mean,
        error=math.sqrt(sum((dialogue.total - mean) ** 2 for dialogue in dialogues)) / count,
        turns=sum(len(dialogue.rewards) for dialogue in dialogues) / count,
        wins=sum(wins) / count if len(wins) == count else None,
    )


def corpus(spec: EnvSpec | str, *, rounds: int = 1, split: str = "train") -> list[str]:
    """What the environment and its players say, message by message: the text to train a tiny tokenizer on.

    Every canonical utterance, the answer to no text at all, then the dialogues of the random and the optimal player on
    every task of the split. An environment without players gives its opening messages instead of dialogues.
    """
    spec = _spec(spec)
    list_utterances = getattr(spec.cls, "utterances", None)
    said: list[str] = list(list_utterances(**spec.settings)) if list_utterances else []
    tasks = spec.tasks(split)

    async def dialogues() -> list[Message]:
        env = spec.make(tasks[0])
        heard = [*await settle(env.start()), *(await settle(env.step(""))).messages]
        for index, task in enumerate(tasks * rounds):
            if not hasattr(spec.cls, "player"):
                heard += await settle(spec.make(task).start())
                continue
            for kind in ("random", "optimal"):
                heard += (await _play(spec, task, make_player(spec, kind, seed=index))).messages
        return heard

    return said + [message["content"] for message in run_sync(dialogues())]


def _spec(spec: EnvSpec | str) -> EnvSpec:
    return load_env(spec) if isinstance(spec, str) else spec


def table(spec: EnvSpec, *, episodes: int = 10_000) -> str:
    """What chance and the best play earn, as the lines of a Markdown table.

    Chance is an estimate with its standard error; the optimal player plays every task once, which is exact.
    """
    tasks = len(spec.tasks("test"))
    rows = ["| player | return | turns | wins | episodes |", "|---|---|---|---|---|"]
    for kind, rounds in (("random", -(-episodes // tasks)), ("optimal", 1)):
        got = measure(spec, kind, rounds=rounds)
        reward = f"{got.reward:.3f}" + (f" ± {got.error:.3f}" if kind == "random" else "")
        wins = "-" if got.wins is None else f"{got.wins:.1%}"
        rows.append(f"| {kind} | {reward} | {got.turns:.2f} | {wins} | {got.episodes} |")
    return "\n".join(rows)


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`["subset=true", "max_turns=5"]` as settings: true, false, numbers, or text."""
    split = (pair.partition("=") for pair in pairs)
    return {key: _value(text) for key, _, text in split}


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def main(arguments: Sequence[str]) -> int:
    """`python -m echelon.envs.players <environment> [setting=value …]`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(main.__doc__)
        return 0
    try:
        print(table(load_env(arguments[0], parse_settings(arguments[1:]))))
    except EchelonError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
