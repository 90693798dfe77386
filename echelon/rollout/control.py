"""A controller acts at every step of an environment; a planner may set it a goal every so many steps.

Plays, and says whose a reward is: decisions of the controller last one step, those of the planner until the next plan.
Knows neither models nor how anything learns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from echelon.envs._shared import settle
from echelon.ops import credit
from echelon.rollout.plays import paid_step
from echelon.rollout.roles import Role
from echelon.types import Env, Episode, Message, Play, Sampler, Step, Task, Turn

Observation: TypeAlias = NDArray[np.float32]

CONTROLLER, PLANNER = "controller", "planner"
GOAL, GOAL_END = "<goal>", "</goal>"
QUESTION = "Do not act yet. Say in a few words what to aim for in the next {steps} steps, between <goal> and </goal>."
"""What the planner is asked, in place of the action."""


@dataclass(slots=True)
class Seen:
    """What an episode's numbers were, beside its words."""

    observations: list[Observation] = field(default_factory=list)
    """The observation each turn answered, turn by turn, and the one after the last."""
    steps: list[int] = field(default_factory=list)
    """How many steps of the environment each turn took: 1, or 0 for a plan and for an action that was asked again."""

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON types."""
        return {"observations": [each.tolist() for each in self.observations], "steps": self.steps}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Seen:
        """What `to_json` made this of."""
        return cls([np.asarray(each, dtype=np.float32) for each in saved["observations"]], saved["steps"])


class Controllers:
    """Who acts: the controller, and the planner if there is one, which speaks every `plan_every` steps.

    Two roles with the same sampler share weights. `take` gives what was seen, by the seed of the episode.
    """

    def __init__(
        self, controller: Role, planner: Role | None = None, *, plan_every: int = 0, question: str = QUESTION
    ) -> None:
        self.controller = controller
        self.planner = planner
        self.plan_every = plan_every
        self.question = question
        self._seen: dict[int, Seen] = {}

    def roles(self) -> list[Role]:
        """The levels, the upper one first."""
        return [role for role in (self.planner, self.controller) if role is not None]

    def greedy(self) -> Controllers:
        """The same levels at temperature 0."""
        return self._other(
            lambda role: Role(role.name, role.sampler, role.renderer, replace(role.params, temperature=0.0))
        )

    def through(self, samplers: Mapping[str, Sampler]) -> Controllers:
        """The same levels by other samplers."""
        return self._other(lambda role: Role(role.name, samplers[role.name], role.renderer, role.params))

    def _other(self, way: Callable[[Role], Role]) -> Controllers:
        planner = None if self.planner is None else way(self.planner)
        return Controllers(way(self.controller), planner, plan_every=self.plan_every, question=self.question)

    def take(self) -> dict[int, Seen]:
        """What was seen in the episodes since the last call, by the seed of each."""
        seen, self._seen = self._seen, {}
        return seen

    def play(self, make: Callable[[Task], Env], *, max_turns: int) -> Play:
        """An episode, cut off after `max_turns` answers of the controller (truncated, not terminated).

        Every answer is to a prompt of its own: what the environment says, with the goal in force. A goal stays in
        force for `plan_every` steps of the environment; saying one takes no time and earns nothing itself.
        """

        async def play(task: Task, episode: Episode) -> None:
            env, seen = make(task), self._seen.setdefault(episode.seed, Seen())
            messages = await settle(env.start())
            seen.observations.append(observed(env))
            turn: Turn | None = None
            plan, left, before = "", 0, 0
            for _ in range(max_turns):
                if self.planner is not None and left <= 0:
                    turn = await self.planner.act(episode, self.asked(messages), turn, afresh=True)
                    plan, left = goal_in(turn.text), self.plan_every
                    seen.steps.append(0)
                    seen.observations.append(seen.observations[-1])
                shown = with_goal(messages, plan)
                turn = await self.controller.act(
                    episode, shown, turn, afresh=True, stop_when=getattr(env, "stop_when", None)
                )
                step = await paid_step(env, task, turn)
                episode.metrics.update(step.info)
                messages, now = step.messages, clock(step, before)
                seen.steps.append(now - before)
                left, before = left - (now - before), now
                seen.observations.append(observed(env))
                if step.terminated or step.truncated:
                    break
            episode.ending = "terminated" if step.terminated else "truncated"
            if episode.ending == "truncated" and messages:
                episode.unanswered = tuple(with_goal(messages, plan))
                episode.final = self.controller.state(episode, episode.unanswered, None)

        return play

    def asked(self, messages: Sequence[Message]) -> list[Message]:
        """What the planner hears: what the controller would, then the question, and the opening of the answer."""
        *before, last = _without_opening(messages)
        said = f"{last['content']}\n\n{self.question.replace('{steps}', str(self.plan_every))}"
        return [*before, Message(role=last["role"], content=said), Message(role="assistant", content=GOAL)]


def observed(env: Env) -> Observation:
    """The numbers an environment shows, as float32; none where it shows words only."""
    return np.asarray(getattr(env, "observation", ()), dtype=np.float32).reshape(-1).copy()


def clock(step: Step, before: int) -> int:
    """How many steps the environment has taken, if it had taken so many before the answer: its own count, `length`,
    does not go on where an answer was no action and is asked for again. Without a count every answer is a step."""
    return round(step.info.get("length", before + 1))


def goal_in(text: str) -> str:
    """The goal that a planner said, on one line."""
    return " ".join(text.partition(GOAL_END)[0].split())


def with_goal(messages: Sequence[Message], goal: str) -> list[Message]:
    """What the controller hears when a goal is in force: the same, and before its last paragraph, which is the
    observation, a paragraph with the goal (as `Codec.prompt` writes one)."""
    if not goal:
        return list(messages)
    shown = _without_opening(messages)
    before, between, last = shown[-1]["content"].rpartition("\n\n")
    shown[-1] = Message(role=shown[-1]["role"], content=f"{before}{between}Goal: {goal}\n\n{last}")
    return [*shown, *messages[len(shown) :]]


def _without_opening(messages: Sequence[Message]) -> list[Message]:
    """Messages without the beginning of the answer that may stand at their end."""
    shown = list(messages)
    return shown[:-1] if shown[-1]["role"] == "assistant" else shown


@dataclass(slots=True)
class Decisions:
    """The decisions of one level in the episodes of a step: episode by episode, in order."""

    role: str
    turns: list[Turn]
    """They carry its words; the numbers below are theirs, in this order."""
    rewards_S: Float[Tensor, "S"]
    """What each earned until the next one, discounted to its own time."""
    steps_S: Int[Tensor, "S"]
    """How many steps of the environment that took."""
    episode_S: Int[Tensor, "S"]
    observations_SO: Float[Tensor, "S O"]
    """What was seen when it was taken."""

    def only(self, places: Int[Tensor, "K"]) -> Decisions:
        """These decisions alone, in the order given: to learn from, not to assign credit to."""
        turns = [self.turns[place] for place in places.tolist()]
        numbers = (self.rewards_S, self.steps_S, self.episode_S, self.observations_SO)
        return Decisions(self.role, turns, *(number[places] for number in numbers))


def decisions(episodes: Sequence[Episode], seen: Mapping[int, Seen], role: str, *, gamma: float) -> Decisions:
    """What one level decided, and what all turns earned from there until it decided again."""
    turns: list[Turn] = []
    owners: list[int] = []
    observations: list[Observation] = []
    parts: list[tuple[float, int, int]] = []
    for number, episode in enumerate(episodes):
        earlier, shown = len(turns), seen[episode.seed]
        for turn, took, observation in zip(episode.turns, shown.steps, shown.observations[:-1], strict=True):
            if turn.role == role:
                turns.append(turn)
                owners.append(number)
                observations.append(observation)
            if len(turns) > earlier:  # before a controller's first decision there is a plan, which earns nothing
                parts.append((turn.reward, len(turns) - 1, took))
    rewards, spans, steps = zip(*parts, strict=True)
    rewards_S, steps_S = credit.span_rewards(
        torch.tensor(rewards), torch.tensor(spans), torch.tensor(steps), gamma=gamma
    )
    return Decisions(role, turns, rewards_S, steps_S, torch.tensor(owners), torch.from_numpy(np.stack(observations)))


def returns_to_go(level: Decisions, *, gamma: float) -> Float[Tensor, "S"]:
    """What each decision and all that follow it earned, discounted by the steps between."""
    nothing_S = torch.zeros_like(level.rewards_S)
    given = (level.rewards_S, nothing_S, level.episode_S, nothing_S)
    return credit.turn_gae(*given, gamma=gamma, lam=1.0, steps_N=level.steps_S)[1]


def with_critic(
    level: Decisions, values_S: Float[Tensor, "S"], final_E: Float[Tensor, "E"], *, gamma: float, lam: float
) -> tuple[Float[Tensor, "S"], Float[Tensor, "S"]]:
    """Advantages over a critic's values, and the returns it is to learn; `final_E` follows each episode's last step."""
    given = (level.rewards_S, values_S, level.episode_S, final_E[level.episode_S])
    return credit.turn_gae(*given, gamma=gamma, lam=lam, steps_N=level.steps_S)


def with_siblings(
    level: Decisions,
    earned_S: Float[Tensor, "S"],
    keys_E: Sequence[Hashable],
    *,
    whose: Literal["episode", "turn"],
    scale: Literal["none", "std", "batch_std"],
) -> Float[Tensor, "S"]:
    """Advantages over what siblings earned: of the whole episode, or from the decision with the same number on.

    Siblings began in the same state. One that is over by then has nothing to go. `earned_S` is the return-to-go.
    """
    if whose == "turn":
        return credit.same_turn_baseline(earned_S, level.episode_S, keys_E, scale=scale)
    first_S = torch.ones_like(level.episode_S, dtype=torch.bool)
    first_S[1:] = level.episode_S[1:] != level.episode_S[:-1]
    return credit.group_baseline(earned_S[first_S], keys_E, scale=scale)[level.episode_S]
