"""How the levels interact: coroutines that fill an episode with turns, rewards and an ending."""

from __future__ import annotations

import math
from collections.abc import Callable

from echelon.envs._shared import settle
from echelon.errors import DataError
from echelon.rollout.roles import Role
from echelon.types import Env, Episode, Message, Play, Step, Task, Turn


def env_loop(make: Callable[[Task], Env], actor: Role, *, max_turns: int = 1000) -> Play:
    """One role in one environment until it ends, or is cut off after `max_turns` (truncated, not terminated).

    An environment with `stop_when(text)` ends utterances itself, and may answer nothing between them: the role then
    goes on with its message. In one with the attribute `afresh` every answer is a whole prompt of its own, and the role
    begins a new conversation with each. Raises DataError, which ends the run, for a reward that is not finite: one
    would spoil what all others teach.
    """

    async def play(task: Task, episode: Episode) -> None:
        env = make(task)
        stop_when = getattr(env, "stop_when", None)
        afresh = bool(getattr(env, "afresh", False))
        messages = await settle(env.start())
        turn: Turn | None = None
        for _ in range(max_turns):
            turn = await actor.act(episode, messages, turn, afresh=afresh, stop_when=stop_when)
            step = await paid_step(env, task, turn)
            episode.metrics.update(step.info)
            messages = step.messages
            if step.terminated:
                episode.ending = "terminated"
                return
            if step.truncated:
                break
        episode.ending = "truncated"
        # What follows was not played, but its value still counts. An environment may end without a last observation.
        unseen = [] if stop_when else [Message(role="user", content="")]
        episode.unanswered = tuple(messages or unseen)
        episode.final = actor.state(episode, episode.unanswered, None if afresh else turn)

    return play


async def paid_step(env: Env, task: Task, turn: Turn) -> Step:
    """What the environment answers to a turn, which gets the reward. Raises DataError for one that is not finite."""
    step = await settle(env.step(turn.text))
    if not math.isfinite(step.reward):
        raise DataError(
            f"{type(env).__name__}: task '{task.id}': step() gave the reward {step.reward}. It must be a finite number."
        )
    turn.reward += step.reward
    return step
