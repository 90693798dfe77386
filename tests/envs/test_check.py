"""`check_env` passes what keeps the rules and names, in one line, the first rule that is broken."""

import itertools
import math

import pytest

from echelon.envs import check_env
from echelon.errors import DataError
from echelon.types import Step, Task

HELLO = [{"role": "user", "content": "Hello there."}]


class Good:
    """Ends by its rules after three turns."""

    def __init__(self, task):
        self.turns = 0

    @classmethod
    def tasks(cls, split):
        return [Task(f"{split}/{i}", {"i": i}) for i in range(3)]

    def start(self):
        return HELLO

    def step(self, action):
        self.turns += 1
        return Step(HELLO, reward=1.0, terminated=self.turns == 3)


class Async(Good):
    async def start(self):
        return HELLO

    async def step(self, action):
        return Good.step(self, action)


class CutOff(Good):
    def step(self, action):
        return Step(truncated=True)


@pytest.mark.parametrize("env", [Good, Async, CutOff])
@pytest.mark.parametrize("episodes", [1, 2, 20])
def test_what_keeps_the_rules_passes(env, episodes):
    spec = check_env(env, episodes)
    assert spec.cls is env
    assert spec.name == env.__name__


def broken(**methods):
    """The good environment with some of its methods replaced."""
    return type("Bad", (Good,), methods)


def returning(value):
    return lambda self, action: value


def tasks(make):
    return classmethod(lambda cls, split: make(split))


calls = itertools.count()


def fails_on_empty(self, action):
    int(action)
    return Step(HELLO, terminated=True)


def remembers(self, action):
    type(self).said = getattr(type(self), "said", 0) + 1
    return Step(HELLO, reward=float(type(self).said), terminated=True)


def only_short(self, action):
    self.turns += 1
    if len(action) > 1000:
        raise RuntimeError("too long\nby far")
    return Step(HELLO, terminated=self.turns == 9)


END = "It is the actor's turn: end with another role."
SPEAK = "The actor needs something to answer."
NEEDS = "It needs a 'role' and a 'content', both text."
OTHERWISE = "Draw randomness from random.Random(task.seed), and keep no state on the class."
ASSISTANT = [{"role": "assistant", "content": "Hi"}]


def dog_only(split):
    return {"train": [Task("dog")]}[split]


def two_dogs(split):
    return [Task("dog"), Task("cat"), Task("dog")]


BROKEN = [
    ({"tasks": tasks(lambda split: [])}, "tasks('train') is empty. Both splits need at least one task."),
    ({"tasks": tasks(lambda split: [Task("a")] * (split == "train"))},
     "tasks('test') is empty. Both splits need at least one task."),
    ({"tasks": tasks(dog_only)}, "tasks('test') raised KeyError: 'test'"),
    ({"tasks": tasks(lambda split: ["dog"])}, "tasks('train') must list echelon.types.Task objects."),
    ({"tasks": tasks(lambda split: [Task(str(next(calls)))])},
     "tasks('train') gave other tasks when called again. Draw them from a fixed seed."),
    ({"tasks": tasks(two_dogs)}, "tasks('train') lists the id 'dog' more than once. Ids tell tasks apart."),
    ({"tasks": tasks(lambda split: [Task("dog", {"words": {"x"}})])},
     "the data of task 'dog' is not JSON (Object of type set is not JSON serializable). Use texts, numbers and lists."),
    ({"__init__": lambda self, task: 1 / 0}, "making task 'train/0' raised ZeroDivisionError: division by zero"),
    ({"start": lambda self: []}, f"start() returned no message. {SPEAK}"),
    ({"start": lambda self: "Hello"}, "start() gave 'Hello' for messages. It must be a list of role and content."),
    ({"start": lambda self: [{"role": "user"}]}, f"start() gave the message {{'role': 'user'}}. {NEEDS}"),
    ({"start": lambda self: ASSISTANT}, f"start() ends with an assistant message. {END}"),
    ({"step": returning(None)}, "step() returned None. It must return an echelon.types.Step."),
    (
        {"step": returning(Step())},
        f"step() returned no message though the episode goes on. {SPEAK[:-1]}, unless the environment says with "
        "stop_when() where one utterance of a message ends.",
    ),
    ({"step": returning(Step(ASSISTANT))}, f"step() ends with an assistant message. {END}"),
    ({"step": returning(Step([{"role": "user", "content": 3}]))},
     f"step() gave the message {{'role': 'user', 'content': 3}}. {NEEDS}"),
    ({"step": returning(Step(HELLO, math.nan))}, "step() gave the reward nan. It must be a finite number."),
    ({"step": returning(Step(HELLO, "high"))}, "step() gave the reward 'high'. It must be a finite number."),
    ({"step": returning(Step(terminated=True, truncated=True))},
     "step() is both terminated and truncated. It is one: over by the task's rules, or cut off from outside."),
    ({"step": returning(Step(terminated=True, info={"win": "yes"}))},
     "step() has an info that is not a finite number. Info is logged as numbers."),
    ({"step": returning(Step(HELLO))}, "task 'train/0' did not end within 1000 turns of random text. "
     "End it by a rule of the task (terminated) or a time limit (truncated)."),
    ({"step": remembers}, f"task 'train/0' answered the same texts differently when replayed. {OTHERWISE}"),
]  # fmt: skip


@pytest.mark.parametrize(("methods", "message"), BROKEN, ids=[message[:40] for _, message in BROKEN])
def test_a_broken_rule_is_named_in_one_line(methods, message):
    with pytest.raises(DataError) as error:
        check_env(broken(**methods), episodes=6)
    assert str(error.value) == f"Bad: {message}"


def test_texts_that_break_an_environment_are_found_and_shown():
    with pytest.raises(
        DataError, match=r"^Bad: step\('.*'\) raised ValueError: invalid literal .*\. Any text must be accepted\.$"
    ):
        check_env(broken(step=fails_on_empty))
    with pytest.raises(
        DataError,
        match=r"^Bad: step\('very long .*\.\.\.\) raised RuntimeError: too long\. Any text must be accepted\.$",
    ):
        check_env(broken(step=only_short), episodes=1)


def test_the_quick_form_is_quick_and_repeats_itself():
    with pytest.raises(DataError) as first:
        check_env(broken(step=only_short), episodes=2)
    with pytest.raises(DataError) as second:
        check_env(broken(step=only_short), episodes=2)
    assert str(first.value) == str(second.value)
