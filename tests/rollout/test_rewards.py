"""Rewards from functions and models: what they are given, what they add, and one line for each way to go wrong."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from echelon.config import DataConfig, ModelConfig, TaskConfig
from echelon.errors import ConfigError, DataError
from echelon.models.lm import tiny
from echelon.models.reward import open_reward_module
from echelon.rollout.plays import env_loop
from echelon.rollout.rewards import CodeJudge, FunctionJudge, Reward, Rewards, open_judge, open_rewards, open_tasks
from echelon.rollout.roles import Role, collect
from echelon.sampling.scripted import ScriptedSampler
from echelon.sandbox import walls
from echelon.text.chat import Renderer
from echelon.types import Episode, Message, SamplingParams, Step, Task, Turn

FUNCTIONS = """
import helper

def length(prompts, completions, **columns):
    return [len(said) * helper.UNIT for said in completions]

async def later(prompts, completions):
    return [1.0 for _ in completions]

def matches(prompts, completions, answer):
    return [float(said == right) for said, right in zip(completions, answer, strict=True)]

def mean(prompts, completions):
    return [0.0 for _ in completions]

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    (tmp_path / "helper.py").write_text("UNIT = 2")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("mine", "helper"):
        sys.modules.pop(name, None)


def said(text: str, *, task: str = "t", **data: Any) -> Episode:
    heard = [Message(role="user", content=f"say {text}")]
    turn = Turn(0, "actor", [1], [2], [0.0], text, heard=heard, reward=10.0)
    return Episode(task, turns=[turn], ending="terminated", data=data)


def given(function: Callable[..., Any], *episodes: Episode, weight: float = 1.0) -> dict[str, float]:
    return Rewards([Reward("fn", FunctionJudge("my.py:fn", function), weight)]).add(episodes)


def test_weighted_rewards_are_added_to_the_last_turn_and_logged_as_they_were_given() -> None:
    one, other = said("a"), said("abc")
    metrics = given(lambda prompts, completions: [len(text) for text in completions], one, other, weight=0.5)
    assert (one.reward, other.reward) == (10.5, 11.5)
    assert metrics == {"reward/fn": 2.0, "reward/fn/std": 1.0}


def test_a_function_sees_conversations_texts_and_columns() -> None:
    seen: dict[str, Any] = {}

    def fn(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0.0, 0.0]

    first = said("a", answer="1", messages=["not a column"])
    second = said("b", answer="2", source="x")
    second.turns.append(Turn(1, "actor", [1, 2, 3], [4], [0.0], "c", 0, heard=[Message(role="user", content="and?")]))
    given(fn, first, second)
    assert seen == {
        "prompts": [
            [{"role": "user", "content": "say a"}],
            [
                {"role": "user", "content": "say b"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "and?"},
            ],
        ],
        "completions": ["a", "c"],
        "answer": ["1", "2"],
        "source": [None, "x"],
    }


def test_a_function_that_names_its_columns_gets_only_those() -> None:
    def fn(prompts: Any, completions: Any, answer: Any, bonus: Any = None) -> list[float]:
        assert bonus is None
        return [float(right) for right in answer]

    assert given(fn, said("a", answer="3", source="x"))["reward/fn"] == 3.0


def test_a_function_that_names_its_texts_may_leave_out_the_prompts() -> None:
    """As reward functions written for TRL do."""

    def long(answer: list[str], completions: list[str], **others: Any) -> list[float]:
        assert "prompts" in others
        return [float(len(said) + len(right)) for said, right in zip(completions, answer, strict=True)]

    def short(completions: list[str]) -> list[float]:
        return [-float(len(said)) for said in completions]

    episodes = [said("yes", answer="no")]
    Rewards([Reward("long", FunctionJudge("long", long))]).add(episodes)
    assert episodes[0].reward == 15.0  # 10 were there before
    Rewards([Reward("short", FunctionJudge("short", short))]).add(episodes)
    assert episodes[0].reward == 12.0


def test_a_column_that_is_not_there_is_named_with_those_that_are() -> None:
    def fn(prompts: Any, completions: Any, answer: Any) -> list[float]:
        return []

    with pytest.raises(
        DataError, match=r"^reward my.py:fn: it needs the column 'answer', and the columns are: label, n"
    ):
        given(fn, said("a", label="3", n=1))


def test_only_episodes_that_did_not_fail_are_judged() -> None:
    failed = said("b")
    failed.ending = "failed"
    assert given(lambda prompts, completions: [1.0] * len(completions), said("a"), failed)["reward/fn"] == 1.0
    assert failed.reward == 10.0
    assert given(lambda prompts, completions: [], failed) == {}


def test_none_abstains() -> None:
    one, other = said("a"), said("b")
    assert given(lambda prompts, completions: [None, 3.0], one, other) == {"reward/fn": 3.0, "reward/fn/std": 0.0}
    assert (one.reward, other.reward) == (10.0, 13.0)
    assert given(lambda prompts, completions: [None], said("a")) == {"reward/fn": 0.0, "reward/fn/std": 0.0}


@pytest.mark.parametrize("numbers", [[1, True], (1.0, 1.0), np.array([1.0, 1.0]), torch.ones(2), [np.float32(1), 1]])
def test_any_sequence_of_numbers_will_do(numbers: Any) -> None:
    assert given(lambda prompts, completions: numbers, said("a"), said("b"))["reward/fn"] == 1.0


def test_async_functions_run_at_the_same_time() -> None:
    order: list[str] = []

    def slow(name: str) -> Callable[..., Any]:
        async def fn(prompts: Any, completions: Any) -> list[float]:
            order.append(name)
            await asyncio.sleep(0)
            order.append(name)
            return [1.0]

        return fn

    rewards = Rewards([Reward(name, FunctionJudge(name, slow(name))) for name in "ab"])
    assert rewards.add([said("x")]) == {"reward/a": 1.0, "reward/a/std": 0.0, "reward/b": 1.0, "reward/b/std": 0.0}
    assert order == ["a", "b", "a", "b"]


def raises(prompts: Any, completions: Any) -> list[float]:
    return [1 / (text != "bad") for text in completions]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, r"raised ZeroDivisionError: division by zero on task 'second'\.$"),
        (lambda prompts, completions: [0.0], r"returned 1 numbers for 2 completions\. It must return one for each"),
        (lambda prompts, completions: 0.5, r"returned 0\.5\. It must return a list of numbers"),
        (lambda prompts, completions: "ab", r"returned 'ab'\. It must return a list of numbers"),
        (lambda prompts, completions: [0.0, "1"], r"gave '1' on task 'second'\. It must be a finite number, or None"),
        (lambda prompts, completions: [0.0, float("nan")], r"gave nan on task 'second'"),
        (lambda prompts, completions: [float("inf"), 0.0], r"gave inf on task 'first'"),
    ],
)
def test_what_goes_wrong_is_one_line_with_the_function_and_the_task(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(DataError, match=r"^reward my\.py:fn: " + message) as caught:
        given(function, said("good", task="first"), said("bad", task="second"))
    assert "\n" not in str(caught.value)


def test_a_function_that_fails_on_all_together_and_on_none_alone_is_said_to() -> None:
    def fn(prompts: Any, completions: Any) -> list[float]:
        assert len(completions) == 1
        return [1.0]

    with pytest.raises(DataError, match="on the 2 completions of a step together, and on none of them alone"):
        given(fn, said("a"), said("b"))


def test_functions_are_found_in_files_and_modules(folder: Path) -> None:
    specs = ("mine.py:length", "mine:later", f"{folder}/mine.py:mean")
    rewards = open_rewards(TaskConfig(out="x", env="x", reward=specs, reward_weights=(1.0, 2.0, 3.0)))
    assert [(reward.name, reward.weight) for reward in rewards.rewards] == [
        ("length", 1.0),
        ("later", 2.0),
        (specs[2], 3.0),  # "reward/mean" is the mean of all
    ]
    episode = said("abc")
    rewards.add([episode])
    assert episode.reward == 10 + 6 + 2


def test_two_functions_of_the_same_name_are_told_apart(folder: Path) -> None:
    (folder / "other.py").write_text("def length(prompts, completions): return [0.0] * len(completions)")
    rewards = open_rewards(TaskConfig(out="x", env="x", reward=("mine.py:length", "other.py:length")))
    assert [reward.name for reward in rewards.rewards] == ["mine.py:length", "other.py:length"]


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("mine.py", ConfigError, r"reward mine.py: which function of the file\? Give mine.py:function"),
        (":length", ConfigError, r"reward :length: expected path/to/file.py:function"),
        ("gone.py:length", DataError, r"reward gone.py:length: there is no file"),
        ("mine.py:lenght", DataError, r"mine.py has no function 'lenght'. Did you mean 'length'\?"),
        ("mine.py:number", DataError, r"mine.py has no function 'number'"),
        ("gone:length", DataError, r"reward gone:length: module gone does not import: ModuleNotFoundError"),
        ("runs/gone", DataError, r"runs/gone"),
    ],
)
def test_a_reward_that_is_not_there_is_one_line(folder: Path, spec: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        open_judge(spec)
    assert "\n" not in str(caught.value)


def test_no_rewards_add_nothing() -> None:
    episode = said("a")
    assert open_rewards(TaskConfig(out="x", env="x")).add([episode]) == {}
    assert episode.reward == 10.0


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with a head of random weights."""
    folder = tmp_path_factory.mktemp("model")
    module, tokenizer = tiny(["say a b c please"], vocab_size=300, hidden=16, layers=1, heads=2)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reward, tokenizer, _ = open_reward_module(ModelConfig(path=str(folder), device="cpu"))
    torch.nn.init.normal_(reward.score.weight)
    reward.save_pretrained(folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    return folder / "rm"


def test_a_reward_model_scores_the_conversation_with_the_completion(scorer: Path) -> None:
    rewards = open_rewards(TaskConfig(out="x", env="x", reward=(str(scorer),)), device="cpu")
    assert [reward.name for reward in rewards.rewards] == ["rm"]
    one, other = said("a b"), said("c please")
    metrics = rewards.add([one, other])
    model = rewards.rewards[0].judge.model
    conversations = [[*e.turns[0].heard, Message(role="assistant", content=e.turns[0].text)] for e in (one, other)]
    scores = model.score(conversations).tolist()
    assert [one.reward - 10, other.reward - 10] == pytest.approx(scores, abs=1e-5)
    assert scores[0] != scores[1]
    assert metrics["reward/rm"] == pytest.approx(sum(scores) / 2)


def test_a_reward_model_whose_score_is_not_finite_is_one_line(scorer: Path) -> None:
    judge = open_judge(str(scorer), device="cpu")
    with torch.no_grad():
        judge.model.module.score.weight.fill_(float("nan"))
    with pytest.raises(DataError, match=r"the model scored nan on task 'second'"):
        Rewards([Reward("rm", judge)]).add([said("a", task="second")])


def test_prompts_of_a_data_set_are_tasks_and_too_long_ones_are_found_at_once(tmp_path: Path) -> None:
    rows = [{"question": "1+1?", "answer": "2"}, {"question": "why " * 50, "answer": "3"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = TaskConfig(out="x", data=DataConfig(path=(str(tmp_path / "rows.jsonl"),)), reward=("mine.py:length",))
    assert [task.data["answer"] for task in open_tasks(cfg).tasks("train")] == ["2", "3"]
    _, tokenizer = tiny(["why 1+1?"], vocab_size=300, hidden=16, layers=1, heads=2)
    open_tasks(cfg, Renderer(tokenizer, max_tokens=300))
    message = (
        r"rows.jsonl: 1 of 2 prompts take more than sampling.max_prompt_tokens = 40 tokens; the longest, train/1, "
    )
    with pytest.raises(DataError, match=message):
        open_tasks(cfg, Renderer(tokenizer, max_tokens=40))


def test_the_conversation_of_a_turn_is_what_its_role_heard_and_said_before_it() -> None:
    _, tokenizer = tiny(["go on 1 2 3 yes no"], vocab_size=300, hidden=16, layers=1, heads=2)

    class Talk:
        def __init__(self, task: Task) -> None:
            self.turns = 0

        def start(self) -> list[Message]:
            return [Message(role="system", content="talk"), Message(role="user", content="1")]

        def step(self, action: str) -> Step:
            self.turns += 1
            return Step([Message(role="user", content=f"after {action}")], terminated=self.turns == 2)

    sampler = ScriptedSampler(["yes", "no"], tokenizer)
    role = Role("actor", sampler, Renderer(tokenizer), SamplingParams())
    (episode,) = asyncio.run(collect([Task("t", {"answer": 1})], env_loop(Talk, role), seed=0))
    assert episode.data == {"answer": 1}
    first, second = episode.turns
    assert episode.conversation(first) == [
        {"role": "system", "content": "talk"},
        {"role": "user", "content": "1"},
    ]
    assert episode.conversation(second) == [
        *episode.conversation(first),
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "after yes"},
    ]


needs_walls = pytest.mark.skipif(bool(walls()), reason="this system lacks a wall of the sandbox")
ADD = "Of course:\n```python\ndef add(a, b):\n    return a + b\n```\nThat is it."
TESTS = ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]


def wrote(text: str, **columns: Any) -> Episode:
    episode = said(text)
    episode.data = {"tests": TESTS, **columns}
    return episode


@needs_walls
def test_programs_earn_the_share_of_their_tests_that_they_pass_and_bad_endings_are_counted() -> None:
    rewards = open_rewards(TaskConfig(out="x", env="x", reward=("code",), reward_weights=(2.0,)))
    episodes = [
        wrote(ADD),
        wrote("def add(a, b): return 4"),
        wrote("while True: pass"),
        wrote("def add(a, b): return bytearray(1 << 40)"),
        wrote("I do not know."),
        wrote("import os\nos._exit(0)"),
        wrote("def double(x): return 2 * x", tests="assert candidate(2) == 4", entry_point="double"),
        wrote("anything", tests=None),
    ]
    before = [episode.reward for episode in episodes]
    metrics = rewards.add(episodes)
    earned = [episode.reward - start for episode, start in zip(episodes, before, strict=True)]
    assert earned == [2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0]
    assert metrics["reward/code"] == pytest.approx(2.5 / 7), "who has no tests is not judged"
    counted = {name: metrics[f"reward/code/{name}"] for name in ("time", "memory", "output", "crash", "error")}
    assert counted == {"time": 1, "memory": 1, "output": 0, "crash": 0, "error": 2}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tests": "assert ("}, r"reward code: the tests of task 'one': a test does not parse"),
        ({"tests": []}, r"reward code: the tests of task 'one': there must be a test"),
        ({"tests": 3}, r"reward code: the tests of task 'one' are 3, and the entry point ''. Give a text or a list"),
        ({"entry_point": 3}, r"and the entry point 3\. Give"),
    ],
)
def test_tests_that_cannot_be_used_are_one_line(columns: dict[str, Any], message: str) -> None:
    episode = wrote(ADD, **columns)
    episode.task = "one"
    with pytest.raises(DataError, match=message):
        Rewards([Reward("code", CodeJudge())]).add([episode])


def test_code_without_tests_says_which_columns_there_are() -> None:
    episode = said(ADD)
    episode.data = {"answer": "3"}
    with pytest.raises(DataError, match=r"reward code: it needs the column 'tests', and the columns are: answer\."):
        Rewards([Reward("code", CodeJudge())]).add([episode])
