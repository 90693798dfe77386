"""Language models in place of the rules: the user of a dialogue, and the judge of its replies.

Both are asked for a strict form. What cannot be read is asked for again; in the end it fails the episode, since a
reward that nobody gave is missing and not zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast, get_args

from echelon.envs.dialogue_user import PLANS, Mood, Persona, Reaction, Status
from echelon.envs.dialogue_words import DEGREES, FEELINGS, TOPICS, fluent, names
from echelon.errors import ParseError
from echelon.text.dialogue import ASSISTANT, USER, DialogueState, judge_prompt, parse_judgement
from echelon.text.endpoint import Ask, understood
from echelon.types import Message

NEEDS: Mapping[str, str] = {
    "exploration": "You want to be asked about it twice, then comforted, and only then helped with advice.",
    "validation": "You want to be asked about it once, then hear that your feeling is seen, then that it is all right, "
    "and only then be helped with advice.",
    "advice": "You want to be asked about it once, and then you want practical advice, twice. You want no comfort.",
}
"""What a language model is told of a need, which nobody else hears."""
assert NEEDS.keys() == PLANS.keys()

FIELDS = ("says", "feels", "accepts", "helps", "status")


@dataclass(slots=True)
class Counts:
    """What went wrong and was made good."""

    unreadable: int = 0
    """Replies of a user or judge that were not in the form asked for."""

    def note(self) -> None:
        self.unreadable += 1


async def ask_judge(ask: Ask, state: DialogueState, reply: str, answer: str, counts: Counts) -> Mapping[str, bool]:
    """The five dimensions of satisfaction, as a language model sees them. Raises Unanswered when it does not say."""
    messages = judge_prompt(state, reply, answer)
    judgement = await understood(ask, messages, parse_judgement, who="the judge", on_garbage=counts.note)
    return judgement.dimensions


async def ask_user(
    ask: Ask,
    persona: Persona,
    state: DialogueState,
    mood: Mood,
    reply: str,
    earlier: tuple[str, ...],
    *,
    patience: int,
    counts: Counts,
) -> Reaction:
    """How a language model in the user's role reacts. Raises Unanswered when it does not say so in the form asked for.

    The judgement takes its word for what it accepted, what helped and what it feels; the wording is judged by rule.
    After `patience` replies that it did not accept it leaves, whatever it says.
    """
    messages = user_prompt(persona, state, reply)
    heard = await understood(ask, messages, parse_reaction, who="the user", on_garbage=counts.note)
    lost = mood.lost + (not heard.accepts)
    tired = lost >= patience and heard.status == "stays"
    after = Mood(heard.intensity, lost=lost, status="leaves" if tired else heard.status)
    judgement = {
        "acceptance": heard.accepts,
        "effectiveness": heard.helps,
        "sensitivity": names(reply, (*FEELINGS[persona.feeling], *TOPICS[persona.topic])),
        "fluency": fluent(reply, earlier),
        "emotion improvement": heard.intensity < mood.intensity,
    }
    return Reaction(heard.says, after, judgement)


@dataclass(frozen=True, slots=True)
class Heard:
    """What a language model says in the user's role."""

    says: str
    intensity: int
    accepts: bool
    helps: bool
    status: Status


def user_prompt(persona: Persona, state: DialogueState, reply: str) -> list[Message]:
    """What a language model reads that plays the user: who it is, what was said, and the form to answer in."""
    said = [*state.history, (USER, state.query), (ASSISTANT, reply)]
    lines = [
        f"Play the user in this conversation. You have trouble with your {persona.topic} and feel {state.emotion}.",
        NEEDS[persona.need],
        "Advice before its turn makes you leave; what you do not need costs your patience. Never say what you need.",
        *(f"{speaker}: {' '.join(text.split())}" for speaker, text in said),
        "How do you react to the last reply? Answer with these five lines only:",
        "says: <your next words, on one line>",
        f"feels: <{', '.join(DEGREES)}: how strong your feeling is now>",
        "accepts: <yes or no: do you take the reply up>",
        "helps: <yes or no: does it help with what you need now>",
        f"status: <{', '.join(get_args(Status))}>",
    ]
    return [Message(role="user", content="\n".join(lines))]


def parse_reaction(text: str) -> Heard:
    """The five lines that `user_prompt` asks for. Raises ParseError for anything more or less."""
    found: dict[str, str] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, value = (part.strip() for part in line.partition(":"))
        if name.lower() not in FIELDS or name.lower() in found or not value:
            raise ParseError(f"{line!r:.80} is not one of the five lines of a reaction, such as 'accepts: yes'.")
        found[name.lower()] = value if name.lower() == "says" else value.lower().rstrip(".")
    if missing := [name for name in FIELDS if name not in found]:
        raise ParseError(f"the reaction says nothing of {', '.join(missing)}.")
    for name, allowed in (("feels", DEGREES), ("status", get_args(Status))):
        if found[name] not in allowed:
            raise ParseError(f"{name}: {found[name]!r:.40} is none of {', '.join(allowed)}.")
    for name in ("accepts", "helps"):
        if found[name] not in ("yes", "no"):
            raise ParseError(f"{name}: {found[name]!r:.40} is neither yes nor no.")
    return Heard(
        says=found["says"],
        intensity=DEGREES.index(found["feels"]),
        accepts=found["accepts"] == "yes",
        helps=found["helps"] == "yes",
        status=cast(Status, found["status"]),
    )
