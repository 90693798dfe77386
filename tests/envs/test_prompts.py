"""Prompts of a data set as an environment: answered once, worth nothing by themselves."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from echelon.data.schemas import Prompt
from echelon.envs import check_env
from echelon.envs.prompts import prompts_env
from echelon.errors import ConfigError, DataError
from echelon.types import Message, Step, Task


def asked(text: str, **columns: Any) -> Prompt:
    return Prompt([Message(role="user", content=text)], columns)


def test_each_row_is_a_task_with_its_messages_and_its_other_columns() -> None:
    env = prompts_env([asked("1+1?", answer="2"), asked("2+2?", answer="4")], [asked("3+3?", answer="6")])
    assert env.tasks("train") == [
        Task("train/0", {"answer": "2", "messages": [{"role": "user", "content": "1+1?"}]}),
        Task("train/1", {"answer": "4", "messages": [{"role": "user", "content": "2+2?"}]}),
    ]
    assert [task.id for task in env.tasks("test")] == ["test/0"]


def test_one_answer_whatever_it_says_ends_the_episode_and_earns_nothing() -> None:
    env = prompts_env([asked("1+1?")])
    one = env.make(env.tasks("train")[0])
    assert one.start() == [{"role": "user", "content": "1+1?"}]
    assert one.step("") == Step(terminated=True)


def test_it_keeps_the_promises_of_an_environment_whatever_the_columns_are() -> None:
    row = asked("When?", day=datetime.date(2024, 2, 29), parts=["a", {"b": 1}], nothing=None)
    env = prompts_env([row], [row])
    check_env(env, episodes=2)
    data = env.tasks("train")[0].data
    assert (data["day"], data["parts"], data["nothing"]) == ("2024-02-29", ["a", {"b": 1}], None)


def test_two_data_sets_do_not_share_their_tasks() -> None:
    one, other = prompts_env([asked("a")]), prompts_env([asked("b"), asked("c")])
    assert (len(one.tasks("train")), len(other.tasks("train"))) == (1, 2)


def test_without_rows_held_out_there_is_nothing_to_test_on() -> None:
    with pytest.raises(ConfigError, match=r"no prompts are held out\. Say which with data.eval_path"):
        prompts_env([asked("a")]).tasks("test")
    with pytest.raises(ConfigError, match="no split 'tests'"):
        prompts_env([asked("a")]).tasks("tests")


@pytest.mark.parametrize("messages", [[], [Message(role="user", content="a"), Message(role="assistant", content="b")]])
def test_a_prompt_that_leaves_nothing_to_answer_is_refused(messages: list[Message]) -> None:
    with pytest.raises(DataError, match=r"^my.jsonl: prompt train/1 leaves nothing to answer"):
        prompts_env([asked("a"), Prompt(messages, {})], name="my.jsonl")


def test_no_prompts_at_all_are_refused() -> None:
    with pytest.raises(DataError, match="there are no prompts"):
        prompts_env([])
