"""Dialogues on two levels: a strategist chooses, a responder writes, a user answers; played, read back, and told.

Both levels begin anew at every turn: each reads the conversation so far, as the environment tells it, in a prompt of
its own. Knows who speaks when, and which decision earned what; knows nothing of how either level learns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.data.candidates import Choice, Options
from echelon.data.options import spell
from echelon.envs import EnvSpec
from echelon.envs._shared import settle
from echelon.errors import ConfigError, DataError
from echelon.ops import options as ops
from echelon.rollout.candidates import after, step_record
from echelon.rollout.evaluate import rollout_metrics
from echelon.rollout.plays import paid_step
from echelon.rollout.roles import Role
from echelon.sampling.candidates import Offer
from echelon.sampling.choices import Strategist
from echelon.text.dialogue import DialogueState, Inventory, fit, inventory, responder_prompt, strategist_prompt
from echelon.types import Env, Episode, Message, Play, Task, Turn

STRATEGIST, RESPONDER = "strategist", "responder"
"""What the roles are called in episodes, and their parts in checkpoints."""


def strategy_loop(
    make: Callable[[Task], Env],
    strategist: Role | None,
    responder: Role,
    *,
    inventory: Inventory,
    max_turns: int = 1000,
) -> Play:
    """Strategy, reply, the user's answer, until the environment ends or `max_turns` replies were given (truncated).

    A strategist's turn is an option; its answer is the responder's turn, in whose prompt the strategy stands and which
    earns what the environment pays. Without a strategist the responder is told no strategy. Where a dialogue is cut off
    the strategist is asked once more: what it would have chosen is no turn, but the offer is kept, under the seed
    `after` the last turn, and `Episode.final` is what the responder would have read. Raises DataError for an
    environment without `state`, and for a reward that is not finite.
    """

    async def choose(state: DialogueState, episode: Episode, parent: Turn | None) -> Turn | None:
        if strategist is None:
            return parent
        asked = fitted(strategist, state, lambda known: strategist_prompt(known, inventory))
        return await strategist.act(episode, asked, parent, afresh=True)

    async def play(task: Task, episode: Episode) -> None:
        env, turn = make(task), None
        await settle(env.start())
        for _ in range(max_turns):
            state = state_of(env)
            turn = await choose(state, episode, turn)
            label = None if strategist is None or turn is None else named(inventory, turn.text)
            turn = await responder.act(episode, reading(responder, state, label), turn, afresh=True)
            step = await paid_step(env, task, turn)
            episode.metrics.update(step.info)
            if step.terminated:
                episode.ending = "terminated"
                return
            if step.truncated:
                break
        episode.ending = "truncated"
        assert turn is not None, "a dialogue has at least one reply"
        await cut_off(episode, state_of(env), turn)

    async def cut_off(episode: Episode, state: DialogueState, last: Turn) -> None:
        label = None
        if strategist is not None:
            asked = fitted(strategist, state, lambda known: strategist_prompt(known, inventory))
            prompt = strategist.state(episode, asked, None)
            said = await strategist.sampler.sample(prompt, replace(strategist.params, seed=after(last)))
            label = named(inventory, said.text)
        episode.unanswered = tuple(reading(responder, state, label))
        episode.final = responder.state(episode, episode.unanswered, None)

    return play


def state_of(env: Env) -> DialogueState:
    """What is known of a conversation. Raises DataError for an environment that does not say."""
    state = getattr(env, "state", None)
    if not isinstance(state, DialogueState):
        raise DataError(
            f"{type(env).__name__} has no `state` that is a DialogueState, so there is nothing to choose a strategy "
            "from. Use the environment dialogue, or give yours that property."
        )
    return state


def fitted(role: Role, state: DialogueState, render: Callable[[DialogueState], Sequence[Message]]) -> Sequence[Message]:
    """The prompt of a state within the role's budget of tokens: the oldest of the history goes first."""

    def count(messages: Sequence[Message]) -> int:
        return sum(map(len, role.renderer.segments(messages)))

    return render(fit(state, render, count, role.renderer.max_tokens))


def reading(responder: Role, state: DialogueState, label: str | None) -> Sequence[Message]:
    """What the responder reads before a reply that follows this strategy, or none."""
    return fitted(responder, state, lambda known: responder_prompt(known, label))


def named(inventory: Inventory, option: str) -> str:
    """The strategy that an option stands for, as prompts write it."""
    return inventory.label(inventory.options.index(option))


def env_inventory(env: EnvSpec, strategies: Sequence[str] = (), options: Sequence[str] = ()) -> Inventory:
    """The strategies of the settings, or else those of the environment, which it gives as `inventory(**settings)`.

    Raises ConfigError where neither names any.
    """
    if strategies:
        return inventory(list(strategies), options)
    given = getattr(env.cls, "inventory", None)
    if given is None:
        raise ConfigError(
            f"strategies: {env.name} names none, so there is nothing to choose. Give the name of an inventory, such as "
            "esconv, or list two or more strategies."
        )
    found = given(**env.settings) if callable(given) else given
    return Inventory(found.strategies, tuple(options) or found.options)


def spelled(role: Role, inventory: Inventory) -> list[list[int]]:
    """The tokens of every option, as the strategist writes them."""
    return spell(role.renderer, inventory, strategist_prompt(DialogueState(query="Hello."), inventory))


def strategy_choices(
    episode: Episode, offers: Mapping[int, Offer], extra: Mapping[int, float] | None = None
) -> list[Choice]:
    """The strategist's decisions, in order: what was chosen earns what the reply to it did.

    `extra` adds to that, by the index of the reply's turn. Only where the dialogue terminated nothing follows; one that
    was cut off is followed by the offer in the state it was cut off in.
    """
    assert episode.ending != "failed", "what a failed dialogue earned means nothing"
    decided = episode.of(STRATEGIST)
    points = [offers[turn.seed] for turn in decided]
    if episode.ending == "truncated":
        points.append(offers[after(episode.turns[-1])])
    options = [Options(point.prompt, [candidate.tokens for candidate in point.candidates]) for point in points]
    following = [*options[1:], *([None] if episode.ending == "terminated" else [])]
    found = []
    for turn, point, here, ahead in zip(decided, points, options, following, strict=False):
        (reply,) = episode.children(turn)
        found.append(Choice(here, point.chosen, reply.reward + (extra or {}).get(reply.index, 0.0), ahead))
    return found


def advantages(decided: Sequence[Turn], offers: Mapping[int, Offer]) -> Float[Tensor, "N"]:
    """A_H = Q(s, u) - Σ π(u) Q(s, u) of every choice: how much better it was thought than what is usually chosen.

    Q and π, the probabilities with which the options were chosen, are those of the moment of the choice.
    """
    points = [offers[turn.seed] for turn in decided]
    q_NK = torch.tensor([point.q for point in points])
    probs_NK = torch.tensor([[math.exp(c.logprobs[0]) if c.tokens else 0.0 for c in p.candidates] for p in points])
    return ops.advantage(q_NK, q_NK > -math.inf, torch.tensor([point.chosen for point in points]), probs_NK)


def dialogue_metrics(
    episodes: Sequence[Episode], offers: Mapping[int, Offer], inventory: Inventory | None
) -> dict[str, float]:
    """What a step logs about its dialogues: turns are replies, and what the environment reports is `dialogue/…`.

    `dialogue/satisfaction` is the mean over replies; `strategy/…` is the share of each strategy, how varied they are,
    and how clearly Q tells them apart.
    """
    played = [episode for episode in episodes if episode.ending != "failed"]
    replies = [replace(episode, turns=episode.of(RESPONDER)) for episode in episodes]
    told = {name for episode in played for name in episode.metrics}
    found = {
        f"dialogue/{name.removeprefix('episode/')}" if name.removeprefix("episode/") in told else name: number
        for name, number in rollout_metrics(replies).items()
    }
    rewards = [turn.reward for episode in played for turn in episode.of(RESPONDER)]
    found |= {"episode/turns": len(rewards) / len(played), "dialogue/satisfaction": sum(rewards) / len(rewards)}
    decided = [offers[turn.seed] for episode in played for turn in episode.of(STRATEGIST)]
    return found | (strategy_metrics(decided, inventory) if decided and inventory else {})


def strategy_metrics(decided: Sequence[Offer], inventory: Inventory) -> dict[str, float]:
    """Shares of the strategies that were chosen, their entropy in nats, and the spread of Q over what was offered."""
    chosen = Counter(offer.chosen for offer in decided)
    shares = [chosen[place] / len(decided) for place in range(len(inventory))]
    found = {f"strategy/{slug(name)}": share for name, share in zip(inventory.strategies, shares, strict=True)}
    legal = [[q for q in offer.q if q > -math.inf] for offer in decided]
    return found | {
        "strategy/entropy": -sum(share * math.log(share) for share in shares if share),
        "strategy/explored": sum(offer.explored for offer in decided) / len(decided),
        "strategy/spread": sum(max(q) - min(q) for q in legal) / len(decided),
    }


def slug(name: str) -> str:
    """A name as metrics write it: `reflection_of_feelings`."""
    return "_".join("".join(letter if letter.isalnum() else " " for letter in name.casefold()).split())


def strategy_rows(
    rows: Iterator[dict[str, Any]], episodes: Sequence[Episode], offers: Mapping[int, Offer], inventory: Inventory
) -> Iterator[dict[str, Any]]:
    """Rows of `episode_rows` whose strategist's turns also say which `strategy` was `chosen`, and the `candidates`:
    every option with its strategy and Q."""
    for row, episode in zip(rows, episodes, strict=True):
        for said, turn in zip(row["turns"], episode.turns, strict=True):
            if turn.role == STRATEGIST and turn.seed in offers:
                said |= choice_record(offers[turn.seed], inventory)
        yield row


def choice_record(offer: Offer, inventory: Inventory) -> dict[str, Any]:
    """One choice for a person to read: the Q table, and what was taken. An option that was not legal has no Q."""
    record = step_record(offer)
    for listed, name in zip(record["candidates"], inventory.strategies, strict=True):
        listed |= {"strategy": name, "q": listed["q"] if math.isfinite(listed["q"]) else None}
    return {"strategy": inventory.strategies[offer.chosen], **record}


@dataclass(slots=True)
class Dialogists:
    """Who plays a dialogue: the strategist, if there is one, the responder, and the strategies they speak of."""

    strategist: Role | None
    responder: Role
    inventory: Inventory

    @property
    def chooser(self) -> Strategist | None:
        """What chooses, and keeps its offers."""
        sampler = None if self.strategist is None else self.strategist.sampler
        return sampler if isinstance(sampler, Strategist) else None

    def through(self, roles: Mapping[str, Role]) -> Dialogists:
        """The same, each by the role of its name there. One who chooses and has none there does not learn."""
        strategist = roles.get(STRATEGIST)
        if strategist is None and self.strategist is not None and self.chooser is not None:
            own = self.strategist
            strategist = Role(own.name, self.chooser.beside(), own.renderer, own.params)
        return Dialogists(strategist, roles[RESPONDER], self.inventory)

    def take(self) -> dict[int, Offer]:
        """All offers since the last time, by the seed of the turn."""
        return {} if self.chooser is None else self.chooser.take()

    def play(self, make: Callable[[Task], Env], *, max_turns: int) -> Play:
        """How they play."""
        return strategy_loop(make, self.strategist, self.responder, inventory=self.inventory, max_turns=max_turns)
