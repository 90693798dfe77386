"""Dialogue: support a user whose need is hidden, by strategies that help only in the order that the need sets.

The environment hears the words of a reply and nothing of the strategy behind it. Its user and its judge follow rules,
or are language models. Knows the conversation and two scripted players; how the user reacts is in `dialogue_user`,
what words do in `dialogue_words`, and what a language model is asked in `dialogue_models`.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

from echelon.envs._shared import Player, exchanges, need_kind, need_split
from echelon.envs.dialogue_models import Counts, ask_judge, ask_user
from echelon.envs.dialogue_user import PLANS, Mood, Persona, Reaction, hear, opening, rate, react, reply_to
from echelon.envs.dialogue_words import (
    AFFIRMATION,
    FEELINGS,
    OTHERS,
    QUESTION,
    REFLECTION,
    SUGGESTIONS,
    TOPICS,
    say,
    wordings,
)
from echelon.errors import ConfigError, did_you_mean
from echelon.text.dialogue import ASSISTANT, INVENTORIES, USER, DialogueState, Inventory, responder_prompt
from echelon.text.endpoint import Ask, endpoint_settings, shared_endpoint
from echelon.types import Message, Step, Task

SMALL = Inventory((QUESTION, REFLECTION, AFFIRMATION, SUGGESTIONS, OTHERS))
"""Five strategies with which every user can be helped."""

HELD_OUT = 5
"""One situation (topic, feeling, intensity) in five is for tests, with every need."""

INTENSITIES = (3, 4)

LONGEST_REPLY = 2000
"""Characters of a reply that are heard."""


@dataclass(frozen=True)
class Settings:
    """The settings of the environment, checked. Raises ConfigError for what cannot work."""

    strategies: str = "esconv"
    patience: int = 3
    user: str | Ask = "rules"
    judge: str | Ask = "rules"
    endpoint: Mapping[str, Any] = field(default_factory=dict)
    """Those that begin with `endpoint_`."""

    def __post_init__(self) -> None:
        known = ["strategies", "patience", "user", "judge", *(f"endpoint_{name}" for name in endpoint_settings())]
        for name in self.endpoint:
            if name not in known:
                raise ConfigError(f"dialogue has no setting '{name}'.{did_you_mean(name, known)}")
        if self.strategies not in ("esconv", "small"):
            raise ConfigError(
                f"dialogue: strategies = {self.strategies}: its user knows those of ESConv. Use 'esconv' for all eight "
                "or 'small' for five."
            )
        if not 1 <= self.patience <= 3:
            raise ConfigError(f"dialogue: patience = {self.patience}: a user leaves after 1 to 3 wasted turns.")
        self.ask("user")
        self.ask("judge")
        if self.endpoint and "endpoint" not in (self.user, self.judge):
            raise ConfigError(
                f"dialogue: {min(self.endpoint)} is set and nobody is asked there. Set user or judge to 'endpoint'."
            )

    def inventory(self) -> Inventory:
        """The strategies to choose from."""
        return SMALL if self.strategies == "small" else INVENTORIES["esconv"]

    def ask(self, name: str) -> Ask | None:
        """Whom to ask for the `user` or the `judge`; None where rules decide."""
        who = getattr(self, name)
        if callable(who):
            return who  # type: ignore[no-any-return]
        if who not in ("rules", "endpoint"):
            raise ConfigError(f"dialogue: {name} = {who!r}. Use 'rules' or 'endpoint'.")
        if who == "rules":
            return None
        return shared_endpoint({name.removeprefix("endpoint_"): value for name, value in self.endpoint.items()})


def settings_from(
    *,
    strategies: str = "esconv",
    patience: int = 3,
    user: str | Ask = "rules",
    judge: str | Ask = "rules",
    **endpoint: Any,
) -> Settings:
    """Settings as they are given by keyword."""
    return Settings(strategies, patience, user, judge, endpoint)


class Dialogue:
    """Reply to a user until its trouble is solved or it leaves: the reward of a turn is its satisfaction, 0 to 5.

    Both ends are `terminated`. The user that follows rules is gone, content or not, after seven turns at most.
    """

    def __init__(
        self,
        task: Task,
        *,
        strategies: str = "esconv",
        patience: int = 3,
        user: str | Ask = "rules",
        judge: str | Ask = "rules",
        **endpoint: Any,
    ) -> None:
        settings = Settings(strategies, patience, user, judge, endpoint)
        self._patience = patience
        self._user, self._judge = settings.ask("user"), settings.ask("judge")
        self._persona = Persona.of(task.data)
        self._mood = Mood(self._persona.intensity)
        self._query = opening(self._persona)
        self._history: tuple[tuple[str, str], ...] = ()
        self._judgements: list[Mapping[str, bool]] = []
        self._counts = Counts()

    @classmethod
    def tasks(
        cls,
        split: str,
        *,
        strategies: str = "esconv",
        patience: int = 3,
        user: str | Ask = "rules",
        judge: str | Ask = "rules",
        **endpoint: Any,
    ) -> list[Task]:
        """A user of every need in every situation; a fifth of the situations is the test split."""
        need_split("dialogue", split)
        Settings(strategies, patience, user, judge, endpoint)
        situations = list(product(TOPICS, FEELINGS, INTENSITIES))
        random.Random("situations").shuffle(situations)
        held_out = len(situations) // HELD_OUT
        return [
            Task(
                id=f"dialogue/{split}/{number}/{place}",
                data={"need": need, "topic": topic, "feeling": feeling, "intensity": intensity},
            )
            for number, (topic, feeling, intensity) in enumerate(
                situations[:held_out] if split == "test" else situations[held_out:]
            )
            for place, need in enumerate(PLANS)
        ]

    @classmethod
    def inventory(cls, **settings: Any) -> Inventory:
        """The strategies to choose from, with these settings."""
        return settings_from(**settings).inventory()

    @property
    def state(self) -> DialogueState:
        """The conversation as it stands: all that either level may know."""
        return DialogueState(
            query=self._query,
            history=self._history,
            emotion=self._mood.emotion(self._persona.feeling),
            description=self._persona.situation(),
        )

    @property
    def hidden(self) -> tuple[str, Mood]:
        """What nobody may know but tests and scripts: the need, and how far its user has come."""
        return self._persona.need, self._mood

    def start(self) -> list[Message]:
        """How the conversation begins, with the request for a reply."""
        return responder_prompt(self.state)

    def step(self, action: str) -> Step | Awaitable[Step]:
        """Say a reply to the user, who answers. A coroutine where a language model is asked."""
        reply = " ".join(action.split())[:LONGEST_REPLY]
        if self._user is None and self._judge is None:
            return self._advance(reply, self._hear(reply))
        return self._consult(reply)

    def _hear(self, reply: str) -> Reaction:
        return hear(self._persona, self._mood, reply, self._earlier, patience=self._patience)

    @property
    def _earlier(self) -> tuple[str, ...]:
        return tuple(text for speaker, text in self._history if speaker == ASSISTANT)

    async def _consult(self, reply: str) -> Step:
        if self._user is None:
            reaction = self._hear(reply)
        else:
            reaction = await ask_user(
                self._user,
                self._persona,
                self.state,
                self._mood,
                reply,
                self._earlier,
                patience=self._patience,
                counts=self._counts,
            )
        if self._judge is not None:
            judgement = await ask_judge(self._judge, self.state, reply, reaction.says, self._counts)
            reaction = Reaction(reaction.says, reaction.mood, judgement)
        return self._advance(reply, reaction)

    def _advance(self, reply: str, reaction: Reaction) -> Step:
        self._history += ((USER, self._query), (ASSISTANT, reply))
        self._query, self._mood = reaction.says, reaction.mood
        self._judgements.append(reaction.judgement)
        ended = self._mood.status != "stays"
        heard = reaction.says if ended else f"Emotion: {self.state.emotion}\n{USER}: {reaction.says}"
        return Step(
            messages=[Message(role="user", content=heard)],
            reward=float(sum(reaction.judgement.values())),
            terminated=ended,
            info=self._info(),
        )

    def _info(self) -> dict[str, float]:
        """Means over the turns so far, and how it stands."""
        turns = len(self._judgements)
        info = {
            name.replace(" ", "_"): sum(judgement[name] for judgement in self._judgements) / turns
            for name in self._judgements[0]
        }
        return {
            "satisfaction": sum(info.values()),
            **info,
            "intensity": float(self._mood.intensity),
            "win": float(self._mood.status == "solved"),
            "left": float(self._mood.status == "leaves"),
            "turns": float(turns),
            **({} if self._user is None and self._judge is None else {"unreadable": float(self._counts.unreadable)}),
        }

    @classmethod
    def utterances(cls, **settings: Any) -> list[str]:
        """Everything a scripted player may say."""
        return wordings()

    @classmethod
    def player(
        cls,
        kind: str,
        seed: int = 0,
        *,
        follows: float = 1.0,
        sensitive: float = 1.0,
        gamma: float = 1.0,
        **settings: Any,
    ) -> Player:
        """A scripted player of one episode, of the user that follows rules.

        `random` carries out any strategy, `optimal` the one with the highest expected return there is for somebody who
        does not know the need; `gamma` discounts it, and 0 takes the best next turn. `follows` and `sensitive` are how
        well they word it (see `say`).
        """
        need_kind("dialogue", kind)
        known = settings_from(**settings)
        strategies = known.inventory().strategies
        plan = best(strategies, known.patience, gamma)

        def speak(messages: Sequence[Message]) -> str:
            possible = cls._possible(messages, known.patience)
            draw = random.Random(f"{seed}/{len(messages)}")
            act = draw.choice(strategies)
            if kind == "optimal":
                act = plan.move(tuple(env.hidden for env in possible))[2]
            return say(act, possible[0].state, draw, follows=follows, sensitive=sensitive)

        return speak

    @classmethod
    def _possible(cls, messages: Sequence[Message], patience: int) -> list[Dialogue]:
        """The dialogues with users of all needs that would have gone as this one did."""
        envs = [cls(task, patience=patience) for task in _begin_with(messages[0]["content"])]
        for said, answered in exchanges(messages):
            envs = [env for env in envs if env._answers(said) == answered] or envs
        return envs

    def _answers(self, said: str) -> str:
        step = self.step(said)
        assert isinstance(step, Step)
        return step.messages[0]["content"]


@cache
def _begin_with(opening: str) -> list[Task]:
    """The users, whatever their need, whose dialogue begins with this message."""
    tasks = [*Dialogue.tasks("train"), *Dialogue.tasks("test")]
    return [task for task in tasks if Dialogue(task).start()[0]["content"] == opening]


Beliefs = tuple[tuple[str, Mood], ...]
"""Equally likely hidden states: a need, and how far its user has come."""


class Plan:
    """The best play of one who knows the user's rules, and of its need what was said: exact, by dynamic programming.

    What may be done at a turn is to carry out any strategy, in sensitive words or others, fluently.
    """

    def __init__(self, strategies: Sequence[str], patience: int, gamma: float) -> None:
        self._options = [(act, sensitive) for act in strategies for sensitive in (True, False)]
        self._patience, self._gamma = patience, gamma
        self._moves: dict[Beliefs, tuple[float, float, str, bool]] = {}

    def move(self, beliefs: Beliefs) -> tuple[float, float, str, bool]:
        """The expected (discounted) return from here on, the turns it takes, and the strategy and whether in sensitive
        words. Of equal returns the one with fewer turns.
        """
        if beliefs not in self._moves:
            moves = [(*self._value(beliefs, *option), *option) for option in self._options]
            self._moves[beliefs] = max(moves, key=lambda move: (round(move[0], 9), -move[1]))
        return self._moves[beliefs]

    def _value(self, beliefs: Beliefs, act: str, sensitive: bool) -> tuple[float, float]:
        value = turns = 0.0
        heard: dict[tuple[str, int], list[tuple[str, Mood]]] = {}
        for need, mood in beliefs:
            after = react(need, mood, act, sensitive, patience=self._patience)
            value += sum(rate(mood, after, act, fluently=True).values())
            if after.status == "stays":
                persona = Persona(need, next(iter(TOPICS)), next(iter(FEELINGS)), INTENSITIES[0])
                heard.setdefault((reply_to(persona, mood, after, 1), after.intensity), []).append((need, after))
        for left in heard.values():
            later = self.move(tuple(left))
            value += self._gamma * later[0] * len(left)
            turns += later[1] * len(left)
        return value / len(beliefs), 1 + turns / len(beliefs)


@cache
def best(strategies: tuple[str, ...], patience: int = 3, gamma: float = 1.0) -> Plan:
    """The plan that the optimal player follows."""
    return Plan(strategies, patience, gamma)


def bound(*, strategies: str = "esconv", patience: int = 3, gamma: float = 1.0) -> float:
    """The expected return that no player beats who does not know the need."""
    plan = best(Settings(strategies, patience).inventory().strategies, patience, gamma)
    values = [plan.move(tuple((need, Mood(intensity)) for need in PLANS))[0] for intensity in INTENSITIES]
    return sum(values) / len(values)
