"""Roles that answer each other in trees, many episodes at once: the same whatever finishes first."""

from __future__ import annotations

import asyncio
from functools import cache
from itertools import accumulate, chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.config import OptimConfig
from echelon.data.packing import pack
from echelon.errors import DataError, ParseError, RolloutError
from echelon.models.lm import tiny, token_logprobs
from echelon.ops import losses
from echelon.ops.credit import group_baseline
from echelon.rollout.roles import Role, answer_all, collect
from echelon.sampling.local import LocalSampler
from echelon.sampling.scripted import ScriptedSampler
from echelon.seeds import derive_seed
from echelon.text.chat import Renderer
from echelon.train.learner import Learner
from echelon.types import Completion, Episode, Message, Play, SamplingParams, Task, Turn

TASKS = [Task("add", {"question": "2 + 3?"}), Task("double", {"question": "twice 4?"})]


@cache
def tokenizer() -> Any:
    return tiny(["2 + 3? twice 4? try again. right or wrong?"], vocab_size=320, hidden=16, layers=1, heads=1)[1]


def user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def speak(prompt: list[int], params: SamplingParams) -> str:
    return f"said {params.seed % 10_000} after {len(prompt)}"


def late(salt: int) -> Any:
    """Each request takes from 0 to 4 ms, in an order that the salt shuffles."""
    return lambda prompt, params: derive_seed(salt, params.seed) % 5 / 1000


def scripted_roles(salt: int = 0) -> dict[str, Role]:
    """A solver and a coach with one sampler, and a judge with another."""
    shared = ScriptedSampler(speak, tokenizer(), delay=late(salt))
    judge = ScriptedSampler(lambda *_: "right", tokenizer(), delay=late(salt + 1))
    renderer = Renderer(tokenizer())
    params = SamplingParams(max_tokens=40)
    return {
        name: Role(name, sampler, renderer, params)
        for name, sampler in (("solver", shared), ("coach", shared), ("judge", judge))
    }


def tree(roles: dict[str, Role]) -> Play:
    """One answer, two critiques of it, two new answers to each, and a verdict on every one of those."""

    async def play(task: Task, episode: Episode) -> None:
        question = task.data["question"]
        first = await roles["solver"].act(episode, user(question))

        async def refine(critique: Turn) -> None:
            again = await roles["solver"].act(episode, user(critique.text), critique)
            verdict = await roles["judge"].act(episode, user(f"{question} {again.text}"), again)
            verdict.reward = float(verdict.text == "right")

        async def criticise() -> None:
            critique = await roles["coach"].act(episode, user(f"{question} {first.text}"), first)
            await asyncio.gather(refine(critique), refine(critique))

        await asyncio.gather(criticise(), criticise())
        episode.ending = "terminated"

    return play


def by_place(episode: Episode) -> dict[tuple[int, ...], tuple[Any, ...]]:
    """Every turn under its place in the tree: which child of which child of which root it is."""
    found: dict[tuple[int, ...], tuple[Any, ...]] = {}

    def walk(turn: Turn | None, place: tuple[int, ...]) -> None:
        for number, child in enumerate(episode.children(turn)):
            found[*place, number] = (child.role, child.seed, child.text, child.prompt, child.action, child.reward)
            walk(child, (*place, number))

    walk(None, ())
    return found


def collected(roles: dict[str, Role], *, siblings: int = 2, seed: int = 7) -> list[Episode]:
    return asyncio.run(collect(TASKS, tree(roles), seed=seed, siblings=siblings))


def test_the_order_in_which_answers_arrive_changes_nothing() -> None:
    orders, episodes = set(), []
    for salt in range(4):
        found = collected(scripted_roles(salt))
        orders.add(tuple(turn.role for episode in found for turn in episode.turns))
        episodes.append(([episode.seed for episode in found], [by_place(episode) for episode in found]))
    assert len(orders) > 1, "the delays did not shuffle anything"
    assert all(other == episodes[0] for other in episodes)


def test_the_tree_is_what_was_played() -> None:
    for episode in collected(scripted_roles()):
        places = by_place(episode)
        assert [role for role, *_ in places.values()].count("judge") == 4
        assert set(places) == {
            (0,),
            *((0, critique) for critique in range(2)),
            *((0, critique, answer) for critique in range(2) for answer in range(2)),
            *((0, critique, answer, 0) for critique in range(2) for answer in range(2)),
        }
        assert [turn.index for turn in episode.turns] == list(range(11))
        assert all(turn.parent is None or turn.parent < turn.index for turn in episode.turns)


def test_every_turn_of_every_episode_draws_from_a_stream_of_its_own() -> None:
    episodes = collected(scripted_roles(), siblings=3)
    assert [episode.task for episode in episodes] == ["add"] * 3 + ["double"] * 3
    seeds = [turn.seed for episode in episodes for turn in episode.turns]
    assert len(set(seeds)) == len(seeds) == 66
    other = [turn.seed for episode in collected(scripted_roles(), seed=8) for turn in episode.turns]
    assert not set(seeds) & set(other)


def test_streams_follow_from_names_alone() -> None:
    (episode,) = asyncio.run(collect(TASKS[:1], tree(scripted_roles()), seed=7))
    assert episode.seed == derive_seed(7, 0, "add", 0)
    root = episode.turns[0]
    assert root.seed == derive_seed(episode.seed, "solver", 0)
    assert [turn.seed for turn in episode.children(root)] == [derive_seed(root.seed, "coach", n) for n in range(2)]


def test_a_role_continues_its_own_tokens_and_sees_nobody_elses() -> None:
    episode = collected(scripted_roles())[0]
    root = episode.of("solver")[0]
    renderer = scripted_roles()["solver"].renderer
    assert root.prompt == renderer.render(user("2 + 3?"))
    for again in episode.of("solver")[1:]:
        critique = episode.path(again)[1]
        assert again.prompt == renderer.extend(root.prompt + root.action, user(critique.text))
        assert again.starts == (len(root.prompt),)
    for critique in episode.of("coach"):
        assert critique.prompt == renderer.render(user(f"2 + 3? {root.text}"))
        assert critique.starts == ()


def node(index: int, role: str, parent: int | None, reward: float = 0.0) -> Turn:
    return Turn(index, role, [1], [2], [0.0], "", parent, reward=reward)


def by_hand() -> Episode:
    """A solver, two coaches of it, two answers to each: rewards 1, 0 and 1, 1, and ½ for the second critique itself."""
    turns = [node(0, "solver", None), node(1, "coach", 0), node(2, "coach", 0, 0.5)]
    turns += [
        node(3, "solver", 1, 1.0),
        node(4, "solver", 1, 0.0),
        node(5, "solver", 2, 1.0),
        node(6, "solver", 2, 1.0),
    ]
    return Episode("add", turns=turns, ending="terminated")


def test_a_role_that_begins_afresh_knows_only_what_it_is_told_now() -> None:
    async def play(task: Task, episode: Episode) -> None:
        solver = scripted_roles()["solver"]
        first = await solver.act(episode, user("2 + 3?"))
        second = await solver.act(episode, user("right or wrong?"), first, afresh=True)
        await solver.act(episode, user("try again."), second)
        episode.ending = "terminated"

    (episode,) = asyncio.run(collect(TASKS[:1], play, seed=0))
    first, second, third = episode.turns
    assert [turn.afresh for turn in episode.turns] == [False, True, False]
    assert second.parent == 0
    assert second.seed != first.seed
    assert second.prompt == Renderer(tokenizer()).render(user("right or wrong?"))
    assert third.prompt[: len(second.prompt)] == second.prompt
    assert [message["content"] for message in episode.conversation(third)] == [
        "right or wrong?",
        second.text,
        "try again.",
    ]
    batch = pack(episode.turns)
    assert len(batch.tokens) == 2, "one row for the first conversation, one for the other"
    assert batch.row_N.tolist() == [0, 1, 1]


def test_values_of_a_tree_by_hand() -> None:
    episode = by_hand()
    assert [episode.value(turn) for turn in episode.turns] == [1.0, 0.5, 1.5, 1.0, 0.0, 1.0, 1.0]
    assert episode.reward == 3.5
    assert [turn.index for turn in episode.children(None)] == [0]
    assert [turn.index for turn in episode.children(episode.turns[2])] == [5, 6]
    assert [turn.index for turn in episode.path(episode.turns[5])] == [0, 2, 5]
    assert episode.path(None) == []
    assert [turn.index for turn in episode.of("coach")] == [1, 2]


def test_the_value_in_a_chain_is_the_return() -> None:
    episode = Episode("t", turns=[node(0, "a", None, 1.0), node(1, "a", 0, 2.0), node(2, "a", 1, 4.0)])
    assert [episode.value(turn) for turn in episode.turns] == [7.0, 6.0, 4.0]


def test_siblings_of_one_parent_are_compared_with_each_other_only() -> None:
    """Two episodes of one task: critiques and answers compare below one parent, first answers across episodes."""
    episodes = [by_hand(), by_hand()]
    episodes[1].turns[4].reward = 1.0  # the second time, all answers are right
    nodes = [(episode, turn) for episode in episodes for turn in episode.turns]
    keys = [(e.task, t.role, None if t.parent is None else (id(e), t.parent)) for e, t in nodes]
    values = torch.tensor([episode.value(turn) for episode, turn in nodes])
    assert values.tolist() == [1.0, 0.5, 1.5, 1, 0, 1, 1, 1.25, 1.0, 1.5, 1, 1, 1, 1]
    advantages = group_baseline(values, keys).tolist()
    assert advantages[:7] == [-0.125, -0.5, 0.5, 0.5, -0.5, 0.0, 0.0]
    assert advantages[7:] == [0.125, -0.25, 0.25, 0.0, 0.0, 0.0, 0.0]


def test_turns_of_each_role_are_packed_apart() -> None:
    episodes = collected(scripted_roles())
    for role, rows in (("solver", 4 * 4), ("coach", 4 * 2), ("judge", 4 * 4)):
        turns = [turn for episode in episodes for turn in episode.of(role)]
        batch = pack(turns)
        assert len(batch.tokens) == rows  # a first answer shares the row of the answer that continues it
        for index, turn in enumerate(turns):
            row, first, last = batch.row_N[index], batch.first_N[index], batch.last_N[index]
            assert batch.tokens[row, : last + 1].tolist() == turn.prompt + turn.action
            assert first == len(turn.prompt)


def model_roles() -> tuple[dict[str, Role], Any, Any]:
    learning, _ = tiny(["2 + 3?"], vocab_size=300, hidden=32, layers=1, heads=2, seed=1)
    frozen, tokens = tiny(["2 + 3?"], vocab_size=300, hidden=32, layers=1, heads=2, seed=2)
    frozen.requires_grad_(False)
    shared, judge = LocalSampler(learning, tokens), LocalSampler(frozen, tokens)
    renderer, params = Renderer(tokens), SamplingParams(max_tokens=6)
    pairs = (("solver", shared), ("coach", shared), ("judge", judge))
    return {name: Role(name, sampler, renderer, params) for name, sampler in pairs}, learning, frozen


def test_one_update_changes_both_roles_of_a_shared_learner_and_nothing_else() -> None:
    roles, learning, frozen = model_roles()
    before = collected(roles)
    weights = [parameter.clone() for parameter in frozen.parameters()]
    learner = Learner(learning, OptimConfig(lr=0.1))

    def loss_fn(module: Any, batch: Any) -> Any:
        return losses.token_sum(losses.nll(token_logprobs(module, batch)), batch.mask, batch.denom), {}

    for role in ("solver", "coach"):
        batch = pack([turn for episode in before for turn in episode.of(role)])
        assert batch.logprobs is not None
        with torch.no_grad():
            torch.testing.assert_close(token_logprobs(learning, batch), batch.logprobs, atol=1e-4, rtol=0)
    verdicts = pack([turn for episode in before for turn in episode.of("judge")])
    learner.update([pack([turn for episode in before for turn in episode.of("coach")])], loss_fn)
    roles["solver"].sampler.load(learner.weights(), learner.version)

    after = collected(roles)
    for role in ("solver", "coach"):
        said, now = ([turn.action for e in episodes for turn in e.of(role)] for episodes in (before, after))
        assert said != now
        assert {turn.version for episode in after for turn in episode.of(role)} == {1}
    assert {turn.version for episode in after for turn in episode.of("judge")} == {0}
    assert all(one.equal(other) for one, other in zip(frozen.parameters(), weights, strict=True))
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert verdicts.logprobs is not None
    torch.testing.assert_close(token_logprobs(frozen, verdicts), verdicts.logprobs, atol=1e-4, rtol=0)


def budget_role(budget: int | None) -> Role:
    answers = ScriptedSampler(lambda prompt, _: "yes" * (1 + len(prompt) % 4), tokenizer())
    return Role("actor", answers, Renderer(tokenizer(), max_tokens=budget), SamplingParams(max_tokens=30))


heard = st.lists(st.text("abc ", max_size=20), min_size=1, max_size=8)


@given(heard, st.integers(20, 80), st.integers(0, 2))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_over_budget_whole_exchanges_go_and_the_rest_stays_token_for_token(
    observations: list[str], budget: int, examples: int
) -> None:
    """Instruction, latest observation and cue are in every prompt; what is dropped is the oldest; ids never change."""
    role, episode = budget_role(budget), Episode("t")
    renderer = Renderer(tokenizer())
    opening = [
        message for n in range(examples) for message in (*user(f"so {n}"), Message(role="assistant", content="no"))
    ]
    kept = renderer.segments([*opening, *user("Rules. Go.")])
    turn: Turn | None = None
    for number in range(len(observations) + 1):
        messages: list[Message] = [*opening, *user("Rules. Go.")] if number == 0 else user(observations[number - 1])
        if number:
            assert turn is not None
            kept = [*kept, renderer.extend(turn.action, messages)]
        head, *rest = kept
        if len(head) + len(rest[-1] if rest else []) > budget:
            with pytest.raises(DataError, match=f"more than the budget of {budget}"):
                asyncio.run(role.act(episode, messages, turn))
            return
        turn = asyncio.run(role.act(episode, messages, turn))
        assert len(turn.prompt) <= budget
        kept = [head, *rest[len(rest) - len(turn.starts) :]]
        assert turn.prompt == list(chain.from_iterable(kept))
        assert turn.starts == tuple(accumulate(len(part) for part in kept[:-1]))


def test_first_messages_with_examples_can_be_cut_later_too() -> None:
    """Exchanges that the first messages already contain are exchanges like those that follow."""
    role, episode = budget_role(45), Episode("t")
    shown = [*user("first?"), Message(role="assistant", content="b" * 12), *user("second?")]
    one = asyncio.run(role.act(episode, shown))
    assert len(one.starts) == 1
    two = asyncio.run(role.act(episode, user("c" * 20), one))
    assert "bbb" not in role.renderer.decode(two.prompt)
    assert "first?" in role.renderer.decode(two.prompt)


async def fine(task: Task, episode: Episode) -> None:
    await asyncio.sleep(0.001)
    episode.ending = "terminated"


def failing(error: Exception, on: set[str]) -> Play:
    async def play(task: Task, episode: Episode) -> None:
        if task.id in on:
            raise error
        await fine(task, episode)

    return play


MANY = [Task(f"t{number}") for number in range(10)]


def test_a_failed_episode_is_data_and_the_others_go_on() -> None:
    episodes = asyncio.run(collect(MANY, failing(KeyError("lost"), {"t3"}), seed=0))
    assert [episode.ending for episode in episodes].count("terminated") == 9
    assert (episodes[3].ending, episodes[3].error) == ("failed", "KeyError: 'lost'")


@pytest.mark.parametrize(("budget", "enough"), [(0.2, True), (0.19, False), (0.0, False)])
def test_the_error_budget_is_a_fraction_of_the_episodes(budget: float, enough: bool) -> None:
    play = failing(ValueError("no such door"), {"t3", "t8"})
    if enough:
        assert len(asyncio.run(collect(MANY, play, seed=0, error_budget=budget))) == 10
        return
    expected = (
        rf"2 of 10 episodes failed, more than the error budget of {budget:.0%}\. .*'t3': ValueError: no such door"
    )
    with pytest.raises(RolloutError, match=expected):
        asyncio.run(collect(MANY, play, seed=0, error_budget=budget))


def test_a_mistake_of_ours_stops_all_episodes_at_once() -> None:
    finished: list[str] = []

    async def play(task: Task, episode: Episode) -> None:
        if task.id == "t0":
            await asyncio.sleep(0)
            raise ParseError("the settings are wrong")
        await asyncio.sleep(0.05)
        finished.append(task.id)

    async def later() -> None:
        with pytest.raises(ParseError, match="the settings are wrong"):
            await collect(MANY, play, seed=0)
        await asyncio.sleep(0.1)

    asyncio.run(later())
    assert finished == [], "no episode may go on after collect has given up"


def test_fresh_actions_in_given_states() -> None:
    role = scripted_roles()["solver"]
    states = [[5, 6], [7], [7]]
    said = asyncio.run(answer_all(role, states, seed=3))
    again = asyncio.run(answer_all(role, states, seed=3))
    assert [sample.prompt for sample in said] == states
    assert [sample.action for sample in said] == [sample.action for sample in again]
    assert said[1].action != said[2].action, "the same state twice is drawn twice"


def test_a_role_stops_where_its_model_ends_a_message_unless_told_otherwise() -> None:
    sampler = ScriptedSampler([Completion([1], [0.0], "", "stop")] * 2, tokenizer())
    renderer = Renderer(tokenizer())
    for given_ids, expected in (((), renderer.stop_ids), ((9,), (9,))):
        role = Role("actor", sampler, renderer, SamplingParams(stop_ids=given_ids))
        asyncio.run(role.act(Episode("t"), user("x")))
        assert sampler.asked[-1][1].stop_ids == expected
