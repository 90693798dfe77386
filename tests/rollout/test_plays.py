"""One role in one environment: how episodes end, what follows the end, and whose mistake is whose."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from echelon.data.packing import pack
from echelon.data.replay import transitions
from echelon.errors import DataError, RolloutError
from echelon.models.lm import tiny
from echelon.rollout.plays import env_loop
from echelon.rollout.roles import Role, collect
from echelon.sampling.scripted import ScriptedSampler
from echelon.text.chat import Renderer
from echelon.types import Episode, Message, SamplingParams, Step, Task

ONE = [Task("count")]


@cache
def tokenizer() -> Any:
    return tiny(["count to three. one two"], vocab_size=320, hidden=16, layers=1, heads=1)[1]


def user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def counter(texts: Sequence[str] | None = None) -> Role:
    """Says the number of its turn, or the given texts."""
    script = texts or (lambda prompt, _: str(prompt.count(tokenizer().encode("<|assistant|>")[0])))
    return Role("actor", ScriptedSampler(script, tokenizer()), Renderer(tokenizer()), SamplingParams(max_tokens=20))


class Counting:
    """Rewards every number that is said; ends at `last`, in the way that `end` says."""

    def __init__(self, last: int, **end: bool) -> None:
        self.last, self.end, self.heard = last, end, list[str]()

    @classmethod
    def tasks(cls, split: str) -> list[Task]:
        return ONE

    def start(self) -> list[Message]:
        return [{"role": "system", "content": "Count."}, *user("one")]

    def step(self, action: str) -> Step:
        self.heard.append(action)
        ended = len(self.heard) == self.last
        info = {"said": float(len(self.heard))}
        return Step(user(f"after {action}"), reward=float(action), info=info, **(self.end if ended else {}))


class Slow(Counting):
    """The same with coroutines."""

    def start(self) -> Awaitable[list[Message]]:  # type: ignore[override]
        return self._later(super().start)

    def step(self, action: str) -> Awaitable[Step]:  # type: ignore[override]
        return self._later(super().step, action)

    async def _later(self, work: Callable[..., Any], *args: Any) -> Any:
        await asyncio.sleep(0.001)
        return work(*args)


def played(make: Callable[[], Any], role: Role | None = None, **settings: Any) -> Episode:
    play = env_loop(lambda task: make(), role or counter(), **settings)
    return asyncio.run(collect(ONE, play, seed=0))[0]


@pytest.mark.parametrize("kind", [Counting, Slow])
def test_an_episode_that_ends_by_itself_is_terminated(kind: type[Counting]) -> None:
    episode = played(lambda: kind(3, terminated=True))
    assert (episode.ending, episode.final, episode.error) == ("terminated", None, None)
    assert [turn.text for turn in episode.turns] == ["1", "2", "3"]
    assert [turn.reward for turn in episode.turns] == [1.0, 2.0, 3.0]
    assert [turn.parent for turn in episode.turns] == [None, 0, 1]
    assert (episode.reward, episode.metrics) == (6.0, {"said": 3.0})


def test_each_turn_continues_the_tokens_of_the_one_before() -> None:
    first, second, third = played(lambda: Counting(3, terminated=True)).turns
    renderer = Renderer(tokenizer())
    assert first.prompt == renderer.render([{"role": "system", "content": "Count."}, *user("one")])
    assert second.prompt == renderer.extend(first.prompt + first.action, user("after 1"))
    assert third.prompt == renderer.extend(second.prompt + second.action, user("after 2"))


class Stateless(Counting):
    """Says everything anew each time, and begins the answer."""

    afresh = True

    def start(self) -> list[Message]:
        return self.said("one")

    def step(self, action: str) -> Step:
        step = super().step(action)
        return replace(step, messages=self.said(f"after {action}"))

    def said(self, content: str) -> list[Message]:
        return [*user(content), {"role": "assistant", "content": "I say"}]


def test_where_every_prompt_is_whole_each_turn_begins_a_new_conversation() -> None:
    renderer = Renderer(tokenizer())
    episode = played(lambda: Stateless(3, truncated=True), counter(["1", "2", "3"]))
    prompts = [renderer.render(Stateless(3).said(content)) for content in ("one", "after 1", "after 2", "after 3")]
    assert [turn.prompt for turn in episode.turns] == prompts[:3]
    assert episode.final == prompts[3]
    assert [turn.parent for turn in episode.turns] == [None, 0, 1]
    assert [t.next_state for t in transitions(episode, "actor", gamma=1.0)] == prompts[1:]
    assert pack(episode.turns).tokens.shape[0] == 3
    assert episode.conversation(episode.turns[2]) == Stateless(3).said("after 2")


@pytest.mark.parametrize(("settings", "ends_at"), [({}, 3), ({"max_turns": 2}, 2)])
def test_an_episode_that_is_cut_off_is_truncated_and_knows_what_would_have_followed(
    settings: dict[str, int], ends_at: int
) -> None:
    """By the environment, or by the limit on turns: the value of the next state still counts."""
    episode = played(lambda: Counting(3, truncated=True), **settings)
    assert (episode.ending, len(episode.turns)) == ("truncated", ends_at)
    last = episode.turns[-1]
    assert episode.final == Renderer(tokenizer()).extend(last.prompt + last.action, user(f"after {ends_at}"))
    assert transitions(episode, "actor", gamma=1.0)[-1].next_state == episode.final


def test_the_last_allowed_turn_may_still_terminate() -> None:
    assert played(lambda: Counting(3, terminated=True), max_turns=3).ending == "terminated"


def test_what_is_both_over_and_cut_off_is_over() -> None:
    assert played(lambda: Counting(2, terminated=True, truncated=True)).ending == "terminated"


def test_an_environment_may_be_cut_off_without_a_last_word() -> None:
    class Silent(Counting):
        def step(self, action: str) -> Step:
            return Step(truncated=True)

    episode = played(lambda: Silent(1))
    last = episode.turns[-1]
    assert episode.final == Renderer(tokenizer()).extend(last.prompt + last.action, user(""))


class Moody(Counting):
    """Fails on some words."""

    def __init__(self, error: Exception) -> None:
        super().__init__(3, terminated=True)
        self.error = error

    def step(self, action: str) -> Step:
        if action == "2":
            raise self.error
        return super().step(action)


def test_an_environment_that_raises_costs_its_episode() -> None:
    tasks = [Task(f"t{number}") for number in range(4)]
    made: list[Any] = []

    def make(task: Task) -> Any:
        made.append(Moody(ZeroDivisionError("oops")) if task.id == "t1" else Counting(3, terminated=True))
        return made[-1]

    play = env_loop(make, counter())
    episodes = asyncio.run(collect(tasks, play, seed=0, error_budget=0.25))
    assert [episode.ending for episode in episodes] == ["terminated", "failed", "terminated", "terminated"]
    assert episodes[1].error == "ZeroDivisionError: oops"
    assert len({id(env) for env in made}) == 4, "one environment plays one episode"
    with pytest.raises(DataError, match="the episode failed"):
        transitions(episodes[1], "actor", gamma=1.0)
    with pytest.raises(RolloutError, match=r"1 of 4 episodes failed.*'t1': ZeroDivisionError: oops"):
        asyncio.run(collect(tasks, play, seed=0, error_budget=0.24))


def test_a_mistake_in_the_settings_is_not_an_episode_that_failed() -> None:
    with pytest.raises(DataError, match="the wrong file"):
        played(lambda: Moody(DataError("the wrong file")))


def test_an_observation_that_can_never_fit_is_a_mistake_in_the_settings() -> None:
    role = counter()
    role.renderer.max_tokens = 8
    with pytest.raises(DataError, match="more than the budget of 8"):
        played(lambda: Counting(3, terminated=True), role)
