"""What a set of episodes is worth: means with bootstrap intervals, and the numbers people compare.

Who played does not matter; scripted players, which need no model, play here too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from echelon.envs._shared import settle
from echelon.envs.players import Player
from echelon.seeds import derive_seed
from echelon.types import Env, Episode, Message, Play, Task, Turn

Talker = Player | Callable[[Sequence[Message]], Awaitable[str]]
"""Whoever speaks in one episode without tokens: messages in, words out, at once or later."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean, and the interval that holds 95 % of the means of samples drawn from the values with replacement."""
    assert len(values) > 0, "no values"
    sample = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(derive_seed(seed, "bootstrap")).integers(0, len(sample), (resamples, len(sample)))
    low, high = np.quantile(sample[draws].mean(1), [0.025, 0.975])
    return Estimate(float(sample.mean()), float(low), float(high), len(sample))


def summarise(episodes: Sequence[Episode]) -> dict[str, Estimate]:
    """`return`, `turns`, and every number the environment reported, over the episodes that did not fail."""
    played = [episode for episode in episodes if episode.ending != "failed"]
    assert played, "every episode failed"
    found = {
        "return": bootstrap([episode.reward for episode in played]),
        "turns": bootstrap([float(len(episode.turns)) for episode in played]),
        "length": bootstrap([float(sum(len(turn.action) for turn in episode.turns)) for episode in played]),
    }
    for name in sorted({name for episode in played for name in episode.metrics} - set(found)):
        found[name] = bootstrap([episode.metrics[name] for episode in played if name in episode.metrics])
    return found


def rollout_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """What every training step logs about its episodes. Failed ones are counted and otherwise left out."""
    played = [episode for episode in episodes if episode.ending != "failed"]
    turns = [turn for episode in played for turn in episode.turns]
    texts = [turn.text for turn in turns]
    rewards = np.array([episode.reward for episode in played])
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "episode/turns": len(turns) / len(played),
        "episode/failed": float(len(episodes) - len(played)),
        "episode/truncated": float(np.mean([episode.ending == "truncated" for episode in played])),
        "turn/tokens": float(np.mean([len(turn.action) for turn in turns])),
        "turn/cut_off": float(np.mean([turn.stop == "length" for turn in turns])),
        "turn/distinct": len(set(texts)) / len(texts),
    }
    for name in sorted({name for episode in played for name in episode.metrics}):
        metrics[f"episode/{name}"] = float(np.mean([e.metrics[name] for e in played if name in e.metrics]))
    return metrics


def evaluation_record(
    episodes: Sequence[Episode], choices: Mapping[int, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Every step of every episode: who said what, what it earned, and from what it was chosen (`choices`, by the seed
    of the turn). `average_score` is over the episodes that did not fail, None if all did."""
    scores = [episode.reward for episode in episodes if episode.ending != "failed"]
    return {
        "average_score": sum(scores) / len(scores) if scores else None,
        "episodes": [
            {
                "task": episode.task,
                "seed": episode.seed,
                "ending": episode.ending,
                "error": episode.error,
                "score": None if episode.ending == "failed" else episode.reward,
                "text": "".join(turn.text for turn in episode.turns),
                "steps": [
                    {"role": turn.role, "text": turn.text, "reward": turn.reward, **(choices or {}).get(turn.seed, {})}
                    for turn in episode.turns
                ],
            }
            for episode in episodes
        ],
    }


def scripted_loop(
    make: Callable[[Task], Env],
    player: Callable[..., Talker],
    *,
    name: str,
    max_turns: int = 1000,
) -> Play:
    """`env_loop` for whoever speaks without tokens, a script or a model behind an endpoint: `player(seed=…)` plays the
    episode with that seed, and may be async. It is told the dialogue so far; of an environment that says everything
    anew each time (`afresh`), what it said last."""

    async def play(task: Task, episode: Episode) -> None:
        env, say = make(task), player(seed=episode.seed)
        heard, afresh = list(await settle(env.start())), bool(getattr(env, "afresh", False))
        messages = list(heard)
        for index in range(max_turns):
            said = await settle(say(messages))
            step = await settle(env.step(said))
            parent = index - 1 if index else None
            turn = Turn(index, name, prompt=[], action=[], logprobs=[], text=said, parent=parent, heard=tuple(heard))
            turn.afresh, turn.reward, heard = afresh, step.reward, list(step.messages)
            episode.turns.append(turn)
            episode.metrics.update(step.info)
            if afresh:
                messages.clear()
            else:
                messages.append(Message(role="assistant", content=said))
            messages += step.messages
            if step.terminated or step.truncated:
                episode.ending = "terminated" if step.terminated else "truncated"
                break
        episode.unanswered = tuple(heard)

    return play
