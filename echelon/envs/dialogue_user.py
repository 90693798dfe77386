"""A simulated user who wants to be asked, comforted and helped in an order of its own, and the rules of how it reacts.

Knows what the strategies do to it, and its own words. How a reply is recognised as a strategy is for `dialogue_words`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from echelon.envs.dialogue_words import (
    ACT,
    AFFIRMATION,
    COMFORT,
    DEGREES,
    DISCLOSURE,
    EXPLORE,
    FEELINGS,
    MOST_WORDS,
    REFLECTION,
    TOPICS,
    act_of,
    fluent,
    names,
    words,
)

PLANS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "exploration": (EXPLORE, EXPLORE, COMFORT, ACT),
    "validation": (EXPLORE, (REFLECTION,), (DISCLOSURE, AFFIRMATION), ACT),
    "advice": (EXPLORE, ACT, ACT),
}
"""What a user needs (hidden) → the strategies that help it, stage by stage. No other order does."""

STRONGEST = len(DEGREES) - 1

Status = Literal["stays", "solved", "leaves"]

OPENINGS = (
    "I feel {emotion} about my {topic}.",
    "It is my {topic}. I feel {emotion}.",
    "My {topic} makes me feel {emotion}.",
)
HINTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "exploration": (
        ("There is more to tell about my {topic}.", "That is only half of the story."),
        ("Now you know it all. I am just {emotion}.", "That was all of it. I feel {emotion}."),
    ),
    "validation": (
        ("Nobody sees how {feeling} I am.", "They all say that it is nothing."),
        ("Yes, you see it. But am I too weak for this?", "Yes. But maybe it is my own fault."),
    ),
    "advice": (
        ("I do not want to talk. I want to do something.", "I only want to know what to do now."),
        ("Good, I did not know that. And what else?", "I can use that. What comes next?"),
    ),
}
"""Need → what the user says when one stage is done, when two are."""
READY = ("Thank you. What can I do about my {topic}?", "That is good to hear. How do I go on?")
SOLVED = ("That is it. Thank you, I am calm now.", "I will do that. Thank you for everything.")
TEMPTED = ("Oh, maybe I can try that.", "I see. Maybe that does it.")
HURRIED = ("You do not even know my story. Goodbye.", "That did not work. You never asked me. Goodbye.")
TIRED = ("This does not help me. Goodbye.", "I have no time for this. Goodbye.")
PUT_OFF = ("No.", "Hm.")


@dataclass(frozen=True, slots=True)
class Persona:
    """Who the user is: what an episode starts from."""

    need: str
    topic: str
    feeling: str
    intensity: int
    """Of the feeling, at the start: 3 or 4 of `DEGREES`."""

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Persona:
        """From the data of a task."""
        return cls(data["need"], data["topic"], data["feeling"], data["intensity"])

    def situation(self) -> str:
        """What everybody may know: the topic, and nothing of the need."""
        return f"Trouble with my {self.topic}."


@dataclass(frozen=True, slots=True)
class Mood:
    """How far a user has come. With a need it is the whole hidden state."""

    intensity: int
    done: int = 0
    """Stages of its plan that are behind it."""
    lost: int = 0
    """Patience lost."""
    hurried: int = 0
    """How often it was given advice too early: from the first time on it is friendly still, and lost."""
    status: Status = "stays"

    def emotion(self, feeling: str) -> str:
        """The feeling with its strength, in words."""
        return f"{DEGREES[self.intensity]} {feeling}" if self.intensity else DEGREES[0]


def react(need: str, mood: Mood, act: str, sensitive: bool, *, patience: int) -> Mood:
    """The user's mood after a strategy was carried out, in words that name what it talks of or feels, or do not.

    What its plan asks for next helps: a stage is done, comfort lowers the intensity, and the end of the plan solves it.
    Advice before its turn seems to help as well, even twice, but such a user is lost: it leaves with the next turn that
    is anything else. All that does not help, and what is insensitive, costs patience; the `patience`-th time it leaves.
    A user who lost patience twice does not feel better any more.
    """
    hurries = sensitive and act in ACT
    if mood.hurried:
        if hurries and mood.hurried == 1:
            return replace(mood, hurried=2)
        return replace(mood, intensity=min(mood.intensity + 2, STRONGEST), status="leaves")
    relief = int(mood.lost < 2)
    plan = PLANS[need]
    if sensitive and act in plan[mood.done]:
        done = mood.done + 1
        if done == len(plan):
            return replace(mood, done=done, intensity=0 if relief else mood.intensity, status="solved")
        return replace(mood, done=done, intensity=mood.intensity - (relief if act in COMFORT else 0))
    if hurries:
        return replace(mood, hurried=1, intensity=mood.intensity - relief)
    lost, worse = mood.lost + 1, min(mood.intensity + 1, STRONGEST)
    return replace(mood, lost=lost, intensity=worse, status="leaves" if lost >= patience else "stays")


def rate(before: Mood, after: Mood, act: str, *, fluently: bool) -> dict[str, bool]:
    """The five dimensions of satisfaction, by rule.

    Only what helps, or seems to, is accepted and sensitive; a user who lost patience accepts nothing any more. Only
    advice at its turn is effective.
    """
    helps = after.done > before.done
    welcome = helps or after.hurried > before.hurried
    return {
        "acceptance": welcome and not before.lost,
        "effectiveness": helps and act in ACT,
        "sensitivity": welcome,
        "fluency": fluently,
        "emotion improvement": after.intensity < before.intensity,
    }


@dataclass(frozen=True, slots=True)
class Reaction:
    """What a reply did to a user."""

    says: str
    mood: Mood
    judgement: Mapping[str, bool]


def opening(persona: Persona) -> str:
    """The user's first words. They are the same whatever it needs."""
    return _draw(persona, OPENINGS, 0, Mood(persona.intensity))


def hear(persona: Persona, mood: Mood, reply: str, earlier: tuple[str, ...], *, patience: int) -> Reaction:
    """How the user reacts to a reply, of which it hears the words alone; `earlier` are the replies before it."""
    act = act_of(reply) if len(words(reply)) <= MOST_WORDS else ""
    named = FEELINGS[persona.feeling] if act in COMFORT else TOPICS[persona.topic]
    after = react(persona.need, mood, act, names(reply, named), patience=patience)
    judgement = rate(mood, after, act, fluently=fluent(reply, earlier))
    return Reaction(reply_to(persona, mood, after, len(earlier) + 1), after, judgement)


def reply_to(persona: Persona, before: Mood, after: Mood, turn: int) -> str:
    """What the user says after its mood changed, at this turn."""
    if after.status == "solved":
        return _draw(persona, SOLVED, turn, after)
    if after.status == "leaves":
        return _draw(persona, HURRIED if before.hurried else TIRED, turn, after)
    if after.hurried:
        return _draw(persona, TEMPTED, turn, after)
    hints = (OPENINGS, *HINTS[persona.need], READY)[after.done]
    said = _draw(persona, hints, turn, after)
    return said if after.done > before.done else f"{_draw(persona, PUT_OFF, turn, after)} {said}"


def _draw(persona: Persona, wordings: tuple[str, ...], turn: int, mood: Mood) -> str:
    """One of the wordings. Which one does not depend on the need, so that it gives nothing away."""
    draw = random.Random(f"{persona.topic}/{persona.feeling}/{persona.intensity}/{turn}")
    said = draw.choice(wordings)
    return said.format(topic=persona.topic, feeling=persona.feeling, emotion=mood.emotion(persona.feeling))
