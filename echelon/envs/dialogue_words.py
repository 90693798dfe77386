"""What the words of a reply do: which strategy they carry out, what they name, whether they are fluent.

Reads English by lexical cues, and writes replies the same way. Knows no user: what a reply does to one is for
`dialogue_user`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from echelon.errors import ConfigError, did_you_mean
from echelon.text.dialogue import DialogueState


def words(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall(r"[a-z']+", text.lower())


QUESTION, RESTATEMENT = "Question", "Restatement or Paraphrasing"
REFLECTION, DISCLOSURE, AFFIRMATION = "Reflection of Feelings", "Self-disclosure", "Affirmation and Reassurance"
SUGGESTIONS, INFORMATION, OTHERS = "Providing Suggestions", "Information", "Others"

EXPLORE = (QUESTION, RESTATEMENT)
COMFORT = (REFLECTION, DISCLOSURE, AFFIRMATION)
ACT = (SUGGESTIONS, INFORMATION)
STAGES = (EXPLORE, COMFORT, ACT)
"""Which strategies serve which stage of a supporting conversation; `Others` serves none."""

TOPICS = {
    "job": ("job", "work", "boss"),
    "exam": ("exam", "test", "school"),
    "friend": ("friend", "friends"),
    "money": ("money", "rent"),
    "sister": ("sister", "family"),
    "sleep": ("sleep", "nights"),
}
"""Topic → the words that name it."""

FEELINGS = {
    "sad": ("sad", "down"),
    "anxious": ("anxious", "worried"),
    "angry": ("angry", "mad"),
    "lonely": ("lonely", "alone"),
    "ashamed": ("ashamed", "guilty"),
}
"""Feeling → the words that name it."""

DEGREES = ("calm", "a bit", "quite", "very", "terribly")
"""How strong a feeling of intensity 0 to 4 is."""

CUES = {
    RESTATEMENT: ("so you say", "so you mean", "in other words", "if i understand", "you are saying"),
    REFLECTION: ("you feel", "you sound", "you seem", "sounds like", "you must be", "i can see"),
    DISCLOSURE: ("i was", "i have been", "i felt", "me too", "i know it"),
    AFFIRMATION: ("it is all right", "it is okay", "you are strong", "not your fault", "i believe in you", "you will"),
    SUGGESTIONS: ("you could", "try to", "why not", "i suggest", "have you tried", "what about"),
    INFORMATION: ("most people", "many people", "experts say", "studies show", "it is known"),
}
"""Strategy → phrases that carry it out. A question is a question mark without any of these."""

ASKS = frozenset(words("what who when where why how which can could do does did is are was tell"))

MOST_WORDS = 16
"""A reply longer than this is not taken in."""

SENSITIVE = {
    QUESTION: (
        "What happened with your {topic}?",
        "Can you tell me about your {topic}?",
        "How long has your {topic} been like this?",
        "What is the worst part of your {topic}?",
    ),
    RESTATEMENT: ("So you say your {topic} is the problem.", "In other words, your {topic} is too much."),
    REFLECTION: ("You feel {feeling}, I can see that.", "It sounds like you are {feeling}."),
    DISCLOSURE: ("I was {feeling} once.", "I know it, I have been {feeling}."),
    AFFIRMATION: ("It is all right to be {feeling}.", "You are strong, {feeling} or not."),
    SUGGESTIONS: (
        "You could make a plan for your {topic}.",
        "Try to take your {topic} in small steps.",
        "Why not ask somebody about your {topic}?",
    ),
    INFORMATION: ("Most people have trouble with their {topic}.", "Experts say that a plan for your {topic} helps."),
    OTHERS: ("Okay, I see.", "Hello there.", "Thank you for the message.", "Good day to you."),
}
"""Strategy → wordings that carry it out and name what the user talks of or feels."""

BLAND = {
    QUESTION: ("What happened?", "Can you tell me more?", "How long has it been like this?"),
    RESTATEMENT: ("So you say there is a problem.", "In other words, it is too much."),
    REFLECTION: ("You feel something, I can see that.", "It sounds like a lot."),
    DISCLOSURE: ("I was like you once.", "I know it, I have been there."),
    AFFIRMATION: ("It is all right.", "You are strong."),
    SUGGESTIONS: ("You could make a plan.", "Try to take small steps.", "Why not ask somebody?"),
    INFORMATION: ("Most people have trouble.", "Experts say that a plan helps."),
    OTHERS: SENSITIVE[OTHERS],
}
"""The same without naming anything: carried out, and insensitive."""


def act_of(reply: str) -> str:
    """The strategy a reply carries out. One that serves two stages at once is muddled, and does nothing: `Others`."""
    said = words(reply)
    plain = f" {' '.join(said)} "
    found = [act for act, cues in CUES.items() if any(f" {cue} " in plain for cue in cues)]
    if not found and "?" in reply and ASKS & set(said):
        found = [QUESTION]
    served = {stage for stage in STAGES for act in found if act in stage}
    return found[0] if len(served) == 1 else OTHERS


def names(text: str, meant: Iterable[str]) -> bool:
    """Whether a text has one of these words."""
    return not set(words(text)).isdisjoint(meant)


def found_in(text: str, families: Mapping[str, tuple[str, ...]]) -> str | None:
    """The first family of words (a topic, a feeling) that a text names."""
    return next((name for name, meant in families.items() if names(text, meant)), None)


def fluent(reply: str, earlier: Sequence[str] = ()) -> bool:
    """Whether a reply is a sentence: two to sixteen words, none twice in a row, ended by a mark, not said before."""
    said = words(reply)
    stutters = any(left == right for left, right in pairwise(said))
    ended = reply.rstrip().endswith((".", "?", "!"))
    return 2 <= len(said) <= MOST_WORDS and not stutters and ended and said not in [words(text) for text in earlier]


def say(
    strategy: str, state: DialogueState, rng: random.Random, *, follows: float = 1.0, sensitive: float = 1.0
) -> str:
    """A scripted reply that carries out a strategy with probability `follows`, and else is small talk.

    With probability `sensitive` it names the topic or the feeling in `state`; else it names none, or a wrong one.
    Drawn from `rng` among wordings not used yet in the history, while there are any. Raises ConfigError for a strategy
    without wordings.
    """
    if strategy not in SENSITIVE:
        raise ConfigError(f"there are no wordings for '{strategy}'.{did_you_mean(strategy, SENSITIVE)}")
    act = strategy if rng.random() < follows else OTHERS
    topic = found_in(f"{state.description} {state.query}", TOPICS)
    feeling = found_in(state.emotion, FEELINGS)
    wordings = SENSITIVE[act]
    if rng.random() >= sensitive or (feeling if act in COMFORT else topic) is None:
        topic = rng.choice([name for name in TOPICS if name != topic])
        feeling = rng.choice([name for name in FEELINGS if name != feeling])
        wordings = rng.choice([wordings, BLAND[act]])
    replies = [wording.format(topic=topic, feeling=feeling) for wording in wordings]
    earlier = {text for _, text in state.history}
    return rng.choice([reply for reply in replies if reply not in earlier] or replies)


def wordings() -> list[str]:
    """Every reply that `say` may give."""
    return [
        wording.format(topic=topic, feeling=feeling)
        for there in (SENSITIVE, BLAND)
        for act in there
        for wording in there[act]
        for topic in (TOPICS if "{topic}" in wording else ("",))
        for feeling in (FEELINGS if "{feeling}" in wording else ("",))
    ]
