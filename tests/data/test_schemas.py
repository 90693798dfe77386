"""Rows of every form become the same three things, and a broken row is named with its place."""

from __future__ import annotations

from typing import Any

import pytest

from echelon.data.schemas import Preference, Prompt, Row, Schema, Sft, find_layout, identity, kinship, read_row
from echelon.errors import DataError
from echelon.types import Message

Cells = dict[str, Any]


def user(content: str) -> Message:
    return Message(role="user", content=content)


def said(content: str) -> Message:
    return Message(role="assistant", content=content)


def system(content: str) -> Message:
    return Message(role="system", content=content)


def read(cells: Cells, schema: Schema) -> Row:
    return read_row(cells, find_layout(cells, schema, "f:7"), schema, "f:7")


HELLO = [user("Hello"), said("Hi")]


@pytest.mark.parametrize(
    "cells",
    [
        {"messages": HELLO},
        {"messages": '[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]'},
        {"messages": [{**message, "name": None} for message in HELLO], "prompt": "something else"},
        {"prompt": "Hello", "response": "Hi"},
        {"prompt": "Hello", "response_j": "Hi", "response_k": "Go away"},
        {"prompt": "Hello", "completion": "Hi"},
        {"question": "Hello", "response": "Hi", "answer": "no"},
        {"question": "Hello", "response_j": "Hi", "response_k": "Go away"},
        {"question": "Hello", "answer": "Hi"},
        {"prompt": "Hello", "chosen": "Hi", "rejected": "Go away"},
        {"prompt": "Hello", "chosen": [said("Hi")]},
        {"prompt": "Hello", "chosen": HELLO},
        {"prompt": "Hello\n", "chosen": [user("Hello"), said("Hi")]},
        {"prompt": [user("Hello")], "completion": [said("Hi")]},
    ],
    ids=lambda cells: "+".join(cells),
)
def test_conversations_may_be_written_in_many_ways(cells: Cells) -> None:
    (first, second) = read(cells, "sft").messages  # type: ignore[union-attr]
    assert (first["role"], first["content"].strip()) == ("user", "Hello")
    assert second == said("Hi")


@pytest.mark.parametrize(
    "cells",
    [
        {"prompt": "Hello", "chosen": "Hi", "rejected": "Go away"},
        {"question": "Hello", "chosen": "Hi", "rejected": "Go away"},
        {"prompt": "Hello", "response_j": "Hi", "response_k": "Go away"},
        {"question": "Hello", "response_j": "Hi", "response_k": "Go away"},
        {"prompt": "Hello", "chosen": [said("Hi")], "rejected": [said("Go away")]},
        {"prompt": "Hello", "chosen": HELLO, "rejected": [user("Hello"), said("Go away")], "messages": HELLO},
        {"prompt": [user("Hello")], "chosen": HELLO, "rejected": "Go away"},
    ],
    ids=lambda cells: "+".join(cells),
)
def test_comparisons_may_be_written_in_many_ways(cells: Cells) -> None:
    assert read(cells, "preference") == Preference([user("Hello")], [said("Hi")], [said("Go away")])


@pytest.mark.parametrize(
    ("cells", "columns"),
    [
        ({"prompt": "Hello"}, {}),
        ({"question": "Hello", "answer": 4, "id": None}, {"answer": 4, "id": None}),
        ({"messages": HELLO[:1], "answer": "Hi"}, {"answer": "Hi"}),
        ({"messages": HELLO}, {}),
        ({"prompt": [user("Hello")], "question": "x"}, {"question": "x"}),
    ],
)
def test_prompts_keep_every_other_column(cells: Cells, columns: Cells) -> None:
    assert read(cells, "prompt") == Prompt([user("Hello")], columns)


def test_a_system_message_that_only_the_answers_repeat_belongs_to_the_prompt() -> None:
    chosen, rejected = [system("Be kind."), *HELLO], [system("Be kind."), user("Hello"), said("No")]
    row = read({"prompt": "Hello", "chosen": chosen, "rejected": rejected}, "preference")
    assert row == Preference([system("Be kind."), user("Hello")], [said("Hi")], [said("No")])
    assert read({"prompt": "Hello", "chosen": chosen}, "sft") == Sft(chosen)


def test_turns_that_both_answers_share_belong_to_the_prompt() -> None:
    shared = [user("Hello"), said("Hi"), user("How are you?")]
    row = read({"prompt": "Hello", "chosen": [*shared, said("Fine")], "rejected": [*shared, said("Bad")]}, "preference")
    assert row == Preference(shared, [said("Fine")], [said("Bad")])


def test_answers_that_part_at_what_the_user_says_keep_the_assistants_words_before_it() -> None:
    chosen = [said("Hi"), user("Thanks"), said("Welcome")]
    rejected = [said("Hi"), user("What?"), said("Hi!")]
    row = read({"prompt": "Hello", "chosen": chosen, "rejected": rejected}, "preference")
    assert row == Preference([user("Hello")], chosen, rejected)


@pytest.mark.parametrize(("written", "margin"), [(0.5, 0.5), (2, 2.0), ("1.5", 1.5), (-1, -1.0)])
def test_a_margin_is_a_number_however_it_is_written(written: object, margin: float) -> None:
    cells = {"prompt": "Hello", "chosen": "Hi", "rejected": "No", "margin": written}
    assert read(cells, "preference").margin == margin  # type: ignore[union-attr]


def test_numbers_and_truth_values_are_read_as_the_words_they_were() -> None:
    """Readers of tables guess types: PandaLM's answer `True` is true in its JSON."""
    row = read({"prompt": "Is it?", "chosen": True, "rejected": 4.5}, "preference")
    assert row == Preference([user("Is it?")], [said("True")], [said("4.5")])


def test_an_answer_that_was_compared_may_be_silence() -> None:
    row = read({"prompt": "Hello", "chosen": "", "rejected": "No"}, "preference")
    assert row == Preference([user("Hello")], [said("")], [said("No")])
    assert read({"prompt": "Hello", "chosen": ""}, "sft") == Sft([user("Hello"), said("")])


def test_a_system_message_and_tools_may_take_part() -> None:
    tool = Message(role="tool", content="3")
    messages = [system(""), user("1+2?"), said("add(1, 2)"), tool, said("3")]
    assert read({"messages": messages}, "sft") == Sft(messages)


WRONG_COLUMNS: list[tuple[Schema, str, str]] = [
    ("sft", "prompt", "They fit the schema prompt."),
    ("sft", "mesages", "Did you mean 'messages'?"),
    ("sft", "text", ""),
    ("preference", "question answer", "They fit the schema sft, prompt."),
    ("preference", "prompt chosen", "They fit the schema sft, prompt."),
    ("preference", "question response_j response_kk", "They fit the schema sft, prompt."),
    ("prompt", "instruction output", ""),
]


@pytest.mark.parametrize(("schema", "columns", "hint"), WRONG_COLUMNS)
def test_columns_that_fit_no_form_are_listed_with_those_that_would(schema: Schema, columns: str, hint: str) -> None:
    needs = {
        "sft": "messages, or prompt or question with response, response_j, completion or chosen, or question with "
        "answer",
        "preference": "prompt or question with chosen and rejected, or with response_j and response_k",
        "prompt": "prompt, question, problem or messages, or question with choices or options, text or prompt with "
        "test_list, or prompt with test and entry_point",
    }
    expected = (
        f"f:7: the columns {', '.join(columns.split())} do not make rows of the schema {schema}, which needs "
        f"{needs[schema]}. {hint}"
    )
    with pytest.raises(DataError) as error:
        find_layout(columns.split(), schema, "f:7")
    assert str(error.value) == expected.strip()


def test_what_is_said_to_be_needed_is_what_is_taken() -> None:
    """The columns a message names are those of the forms, no more and no fewer."""
    from echelon.data.schemas import _LAYOUTS, _NEEDS

    for schema, layouts in _LAYOUTS.items():
        named = {word.strip(",") for word in _NEEDS[schema].split()} - {"or", "with", "and"}
        assert named == {column for layout in layouts for column in layout}


ALTERNATE = "Begin with the user's, after a system message if there is one, and let user and assistant take turns."
LIST = '[{"role": …, "content": …}, …]'
BROKEN: list[tuple[Schema, Cells, str]] = [
    ("sft", {"prompt": "Hello", "response": None}, "'response' is null. Fill it in, or remove the row."),
    ("sft", {"prompt": "Hello", "response": float("nan")}, "'response' is null. Fill it in, or remove the row."),
    ("sft", {"prompt": " ", "response": "Hi"}, "'prompt' is empty. Fill it in, or remove the row."),
    ("sft", {"question": "Hello", "answer": "\n"}, "'answer' is empty. Fill it in, or remove the row."),
    ("sft", {"question": "2?", "answer": {"a": 1}}, "'answer' is an object, not text. Write text, or remove the row."),
    ("sft", {"messages": None}, "'messages' is null. Fill it in, or remove the row."),
    ("sft", {"messages": "Hello"}, f"'messages' is text, not a list of messages. Write {LIST}."),
    ("sft", {"messages": {"role": "user"}}, f"'messages' is an object, not a list of messages. Write {LIST}."),
    ("sft", {"messages": []}, "'messages' is an empty list, so nothing is said. Remove the row."),
    ("sft", {"messages": ["Hello"]}, f"message 1 of 'messages' has no role and content. Write {LIST}."),
    ("sft", {"messages": [{"role": "user"}]}, f"message 1 of 'messages' has no role and content. Write {LIST}."),
    (
        "sft",
        {"messages": [user("Hello"), {"role": "asistant", "content": "Hi"}]},
        "message 2 of 'messages' has the role 'asistant'. Roles are system, user, assistant, tool. Did you mean "
        "'assistant'?",
    ),
    (
        "sft",
        {"messages": [user("Hello"), {"role": "assistant", "content": None}]},
        "message 2 of 'messages' is null. Fill it in, or remove the row.",
    ),
    (
        "sft",
        {"messages": [user("Hello"), {"role": "assistant", "content": [{"type": "text"}]}]},
        "message 2 of 'messages' is a list, not text. Write text, or remove the row.",
    ),
    (
        "sft",
        {"messages": [user("Hello"), said("")]},
        "message 2 of 'messages' is empty. Fill it in, or remove the row.",
    ),
    (
        "sft",
        {"messages": [user("Hello")]},
        "no message is the assistant's, so there is nothing to learn from. Remove the line.",
    ),
    (
        "sft",
        {"messages": [*HELLO, user("Bye")]},
        "the last message is the user's, and nothing is learned from it. Let the conversation end with the "
        "assistant's.",
    ),
    (
        "sft",
        {"messages": [user("Hello"), user("Hello?"), said("Hi")]},
        f"the roles of 'messages' do not alternate: message 2 is the user's and follows the user's. {ALTERNATE}",
    ),
    (
        "sft",
        {"messages": [said("Hi")]},
        f"the roles of 'messages' do not alternate: message 1 is the assistant's and comes first. {ALTERNATE}",
    ),
    (
        "sft",
        {"messages": [user("Hello"), system("Be kind."), said("Hi")]},
        f"the roles of 'messages' do not alternate: message 2 is the system's and follows the user's. {ALTERNATE}",
    ),
    (
        "sft",
        {"messages": [*HELLO, Message(role="tool", content="3"), user("So?"), said("3")]},
        f"the roles of 'messages' do not alternate: message 4 is the user's and follows the tool's. {ALTERNATE}",
    ),
    (
        "sft",
        {"prompt": HELLO, "response": "Hi"},
        "the last message of 'prompt' is the assistant's, so there is nothing to answer. Let it end with the user's.",
    ),
    (
        "sft",
        {"prompt": "\ud800", "response": "Hi"},
        "'prompt' holds half of a surrogate pair (character 1), which no tokenizer takes. Write the character in full, "
        "or remove it.",
    ),
    (
        "preference",
        {"prompt": "Hello", "chosen": "Hi", "rejected": "Hi"},
        "'chosen' and 'rejected' are the same, so nothing is preferred. Remove the row.",
    ),
    (
        "preference",
        {"prompt": "Hello", "chosen": "Hi", "rejected": [said("Hi")]},
        "'chosen' and 'rejected' are the same, so nothing is preferred. Remove the row.",
    ),
    (
        "preference",
        {"prompt": "Hello", "chosen": "Hi", "rejected": None},
        "'rejected' is null. Fill it in, or remove the row.",
    ),
    (
        "preference",
        {"prompt": "Hello", "chosen": [user("Bye"), said("Hi")], "rejected": "No"},
        "'chosen' does not begin with the prompt. Begin with its messages, unchanged, or give the answer alone.",
    ),
    (
        "preference",
        {"prompt": "Hello", "chosen": [said("Hi"), said("Hi")], "rejected": "No"},
        "the roles of 'chosen' do not alternate: message 3 is the assistant's and follows the assistant's. "
        f"{ALTERNATE}",
    ),
    (
        "preference",
        {"prompt": "Hello", "chosen": HELLO[:1], "rejected": "No"},
        "the last message of 'chosen' is not the assistant's. Let it end with the answer.",
    ),
    (
        "preference",
        {"prompt": "Hello", "chosen": [system("Be kind."), *HELLO], "rejected": "No"},
        "'chosen' and 'rejected' begin with different system messages, so they do not answer the same prompt. Give "
        "both the same one.",
    ),
    *[
        (
            "preference",
            {"prompt": "Hello", "chosen": "Hi", "rejected": "No", "margin": margin},
            f"'margin' is {margin!r}, not a finite number. Write by how much the chosen answer is better, or 0.",
        )
        for margin in (float("nan"), float("inf"), None, "much", True)
    ],
    ("prompt", {"prompt": None}, "'prompt' is null. Fill it in, or remove the row."),
    ("prompt", {"question": ""}, "'question' is empty. Fill it in, or remove the row."),
    (
        "prompt",
        {"prompt": HELLO},
        "the last message of 'prompt' is the assistant's, so there is nothing to answer. Let it end with the user's.",
    ),
    (
        "prompt",
        {"messages": "[1"},
        "'messages' is text that is not JSON (Expecting ',' delimiter: line 1 column 3 (char 2)). Write a list of "
        "messages.",
    ),
]


@pytest.mark.parametrize(("schema", "cells", "message"), BROKEN)
def test_a_broken_row_is_named_with_its_place(schema: Schema, cells: Cells, message: str) -> None:
    with pytest.raises(DataError) as error:
        read(cells, schema)
    assert str(error.value) == f"f:7: {message}"


def test_a_row_without_a_column_that_the_first_row_has_is_named() -> None:
    with pytest.raises(DataError, match=r"^f:8: 'response' is missing, and the first row has it\."):
        read_row({"prompt": "Hello"}, ("prompt", "response"), "sft", "f:8")


OPENED = [user("Which way?"), said("<go>")]


def test_a_completion_goes_on_with_the_last_message_or_is_one_of_its_own() -> None:
    layout = find_layout(["completion", "messages", "reward"], "sft", "f:1")
    opened = read_row({"messages": OPENED, "completion": "left</go>", "reward": 1}, layout, "sft", "f:1")
    assert opened == Sft(OPENED, "left</go>")
    assert (identity(opened), kinship(opened)) == ([OPENED, "left</go>"], [OPENED])
    own = read_row({"messages": OPENED[:1], "completion": "left"}, layout, "sft", "f:1")
    assert own == Sft([OPENED[0], said("left")])


def test_a_step_of_an_episode_is_a_row_of_its_own_and_stays_with_its_episode() -> None:
    cells = {"messages": OPENED, "completion": "left</go>", "episode": "a", "step": 3}
    layout = find_layout(cells, "sft", "f:1")
    one, later, other = (
        read_row({**cells, **place}, layout, "sft", "f:1") for place in ({}, {"step": 4}, {"episode": "b"})
    )
    assert len({str(identity(row)) for row in (one, later, other)}) == 3
    assert (kinship(one), kinship(later), kinship(other)) == (["a"], ["a"], ["b"])


def test_a_prompt_keeps_the_beginning_of_its_answer_where_a_completion_says_that_it_is_one() -> None:
    cells = {"messages": OPENED, "completion": "left</go>"}
    row = read_row(cells, find_layout(cells, "prompt", "f:1"), "prompt", "f:1")
    assert row == Prompt(OPENED, {"completion": "left</go>"}, "f:1")
    assert kinship(row) == [OPENED]


@pytest.mark.parametrize("completion", [None, "", " ", ["left"]])
def test_a_completion_is_text(completion: Any) -> None:
    with pytest.raises(DataError, match=r"^f:1: 'completion' is "):
        read_row({"messages": OPENED, "completion": completion}, ("messages", "completion"), "sft", "f:1")
