"""Does an environment keep its promises? Plays it with awkward texts and says in one line which rule it breaks.

Knows the protocol in `echelon.types.Env` and nothing about any game.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, TypeVar

from echelon.envs._shared import SPLITS, EnvSpec, run_sync, settle
from echelon.envs.registry import env_spec, load_env
from echelon.errors import DataError, EchelonError
from echelon.types import Message, Step, Task

T = TypeVar("T")

LONGEST_EPISODE = 1000
"""Turns within which an episode has to end, whatever is said."""

AWKWARD = (
    "",
    " ",
    "\n",
    "?!.,;",
    "yes",
    "no",
    "Is it alive?",
    "7",
    "-1",
    "<|end|>",
    '{"a": [',
    "%s {} \\",
    "naïve 東京 🙂 \u202e",
)
LONG = "very long " * 2_000


def check_env(
    env: type[Any] | EnvSpec | str, episodes: int = 20, *, settings: Mapping[str, Any] | None = None, seed: int = 0
) -> EnvSpec:
    """Play an environment with awkward texts; DataError with one line naming the rule it breaks, else its EnvSpec.

    Checked: both splits list tasks, in the same order twice, with unique ids and JSON data; `start` and `step` return
    well-formed messages and finite rewards for empty, broken, very long and non-ASCII text; an episode ends
    within 1000 turns, and either terminates or is truncated; two copies given the same texts do the same.
    Plain and async methods are both fine. `episodes` are spread over the tasks of both splits; each is played twice.
    """
    if isinstance(env, EnvSpec):
        spec = env
    else:
        spec = load_env(env, settings) if isinstance(env, str) else env_spec(env, settings)
    tasks = [task for split in SPLITS for task in _tasks(spec, split)]
    draw = random.Random(seed)
    chosen = tasks if episodes >= len(tasks) else draw.sample(tasks, k=episodes)
    run_sync(_Check(spec).episodes([chosen[i % len(chosen)] for i in range(episodes)], draw))
    return spec


def _tasks(spec: EnvSpec, split: str) -> list[Task]:
    call = f"tasks('{split}')"
    with _raises_nothing(spec, call):
        tasks, again = spec.tasks(split), spec.tasks(split)
    _rule(spec, bool(tasks), f"{call} is empty. Both splits need at least one task.")
    _rule(spec, all(isinstance(task, Task) for task in tasks), f"{call} must list echelon.types.Task objects.")
    _rule(spec, tasks == again, f"{call} gave other tasks when called again. Draw them from a fixed seed.")
    ids = [task.id for task in tasks]
    twice = next((name for name in ids if ids.count(name) > 1), None) if len(set(ids)) < len(ids) else None
    _rule(spec, twice is None, f"{call} lists the id '{twice}' more than once. Ids tell tasks apart.")
    for task in tasks:
        try:
            json.dumps(dict(task.data))
        except (TypeError, ValueError) as error:
            _rule(spec, False, f"the data of task '{task.id}' is not JSON ({error}). Use texts, numbers and lists.")
    return tasks


class _Check:
    """Plays episodes of one environment."""

    def __init__(self, spec: EnvSpec) -> None:
        self._spec = spec

    async def episodes(self, tasks: Sequence[Task], draw: random.Random) -> None:
        for task in tasks:
            texts: list[str] = []
            first = await self._play(task, texts, draw)
            second = await self._play(task, texts, None)
            same = first == second
            self._rule(same, f"task '{task.id}' answered the same texts differently when replayed. {_SEED}")

    async def _play(self, task: Task, texts: list[str], draw: random.Random | None) -> list[Any]:
        """Everything the environment returned. With `draw` texts are made up and noted; without, replayed."""
        with _raises_nothing(self._spec, f"making task '{task.id}'"):
            env = self._spec.make(task)
        opening = await self._call("start()", env.start)
        self._messages("start()", opening)
        self._rule(len(opening) > 0, "start() returned no message. The actor needs something to answer.")
        self._turn("start()", opening, env)
        heard = list(opening)
        returned: list[Any] = [list(opening)]
        for turn in range(LONGEST_EPISODE):
            if draw is not None:
                texts.append(_text(draw, heard, turn))
            elif turn == len(texts):
                return returned
            step = await self._call(f"step({_short(texts[turn])})", env.step, texts[turn])
            self._step(step, env)
            heard += step.messages
            returned.append((list(step.messages), step.reward, step.terminated, step.truncated, dict(step.info)))
            if step.terminated or step.truncated:
                return returned
        raise DataError(
            f"{self._spec.name}: task '{task.id}' did not end within {LONGEST_EPISODE} turns of random text. "
            "End it by a rule of the task (terminated) or a time limit (truncated)."
        )

    async def _call(self, call: str, method: Any, *arguments: str) -> Any:
        with _raises_nothing(self._spec, call):
            return await settle(method(*arguments))

    def _step(self, step: Any, env: Any) -> None:
        self._rule(isinstance(step, Step), f"step() returned {_short(step)}. It must return an echelon.types.Step.")
        self._messages("step()", step.messages)
        ended = step.terminated or step.truncated
        self._rule(
            bool(step.messages) or ended or hasattr(env, "stop_when"),
            "step() returned no message though the episode goes on. The actor needs something to answer, unless the "
            "environment says with stop_when() where one utterance of a message ends.",
        )
        if step.messages and not ended:
            self._turn("step()", step.messages, env)
        number = isinstance(step.reward, Real) and math.isfinite(step.reward)
        self._rule(number, f"step() gave the reward {step.reward!r}. It must be a finite number.")
        self._rule(
            not (step.terminated and step.truncated),
            "step() is both terminated and truncated. It is one: over by the task's rules, or cut off from outside.",
        )
        numbers = all(isinstance(value, Real) and math.isfinite(value) for value in step.info.values())
        self._rule(numbers, "step() has an info that is not a finite number. Info is logged as numbers.")

    def _turn(self, call: str, messages: Sequence[Message], env: Any) -> None:
        """The actor is to speak next; where every message is a whole prompt its own may be begun for it."""
        self._rule(
            messages[-1]["role"] != "assistant" or (len(messages) > 1 and getattr(env, "afresh", False)),
            f"{call} ends with an assistant message. It is the actor's turn: end with another role.",
        )

    def _messages(self, call: str, messages: Any) -> None:
        listed = isinstance(messages, Sequence) and not isinstance(messages, str)
        self._rule(listed, f"{call} gave {_short(messages)} for messages. It must be a list of role and content.")
        for message in messages:
            whole = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            self._rule(
                whole, f"{call} gave the message {_short(message)}. It needs a 'role' and a 'content', both text."
            )

    def _rule(self, kept: bool, broken: str) -> None:
        _rule(self._spec, kept, broken)


_SEED = "Draw randomness from random.Random(task.seed), and keep no state on the class."


def _text(draw: random.Random, heard: Sequence[Message], turn: int) -> str:
    """Something to say: the awkward texts, one very long one, or words the environment used itself."""
    if turn == 1:
        return LONG
    words = heard[draw.randrange(len(heard))]["content"].split()
    if words and draw.random() < 0.5:
        return " ".join(draw.choices(words, k=draw.randint(1, 3)))
    return draw.choice(AWKWARD)


def _rule(spec: EnvSpec, kept: bool, broken: str) -> None:
    if not kept:
        raise DataError(f"{spec.name}: {broken}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def _raises_nothing(spec: EnvSpec, call: str) -> Iterator[None]:
    try:
        yield
    except EchelonError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        hint = ". Any text must be accepted." if call.startswith("step") else ""
        raise DataError(f"{spec.name}: {call} raised {type(error).__name__}: {reason}{hint}") from error
