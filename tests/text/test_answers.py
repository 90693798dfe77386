"""A prompt loses its oldest words, an answer none, and the template around them stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.errors import DataError
from echelon.text.answers import AnswerTooLong, prompt_for, spoken
from echelon.text.chat import Renderer
from echelon.types import Message
from tests.text.templates import KINDS, TAKES_NO_SYSTEM, tokenizer

few = settings(max_examples=40, deadline=None, derandomize=True)


def said(role: str, content: str) -> Message:
    return Message(role=role, content=content)


def asked(*texts: str) -> list[Message]:
    """User and assistant in turn."""
    return [said("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]


ANSWER = [said("assistant", "the answer")]


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_fits_is_the_prompt_and_the_answer_as_in_play(kind: str) -> None:
    renderer = Renderer(tokenizer(kind))
    prompt = asked("hello", "user", "system")
    ids, (answer,) = prompt_for(renderer, prompt, [ANSWER], max_tokens=1000)
    assert ids == renderer.render(prompt)
    assert answer.ids == renderer.action_ids("the answer")
    assert all(answer.said)


def test_the_oldest_exchange_goes_first_and_no_more_than_must() -> None:
    renderer = Renderer(tokenizer("tiny"))
    prompt = asked("first", "a" * 10, "b" * 10, "c" * 10, "d" * 10, "e" * 10, "last")
    whole, answers = prompt_for(renderer, prompt, [ANSWER], max_tokens=1000)
    cut, _ = prompt_for(renderer, prompt, [ANSWER], max_tokens=len(whole) + len(answers[0].ids) - 1)
    assert cut == renderer.render([prompt[0], *prompt[3:]])
    one_exchange = len(renderer.render([prompt[0], *prompt[5:]])) + len(answers[0].ids)
    assert prompt_for(renderer, prompt, [ANSWER], max_tokens=one_exchange)[0] == renderer.render(
        [prompt[0], *prompt[5:]]
    )


@pytest.mark.parametrize("kind", list(KINDS))
def test_then_the_beginning_of_the_prompts_text_goes_and_the_template_stays(kind: str) -> None:
    renderer = Renderer(tokenizer(kind))
    text = "".join(f"{number} " for number in range(100))
    budget = Renderer(tokenizer(kind), max_tokens=60)  # of prompts in play: it drops nothing here
    assert prompt_for(renderer, asked(text), [ANSWER], max_tokens=60) == prompt_for(
        budget, asked(text), [ANSWER], max_tokens=60
    )
    ids, (answer,) = prompt_for(renderer, asked(text), [ANSWER], max_tokens=60)
    assert len(ids) + len(answer.ids) <= 60
    assert answer.ids == renderer.action_ids("the answer")
    kept = next(n for n in range(len(text)) if renderer.render(asked(text[n:])) == ids)
    assert 0 < kept < len(text)
    assert len(renderer.render(asked(text[kept - 1 :]))) + len(answer.ids) > 60  # one character more would not fit


def test_the_system_message_is_the_last_to_lose_words() -> None:
    renderer = Renderer(tokenizer("chatml"))
    prompt = [said("system", "be brief"), *asked("long " * 50)]
    ids, _ = prompt_for(renderer, prompt, [ANSWER], max_tokens=80)
    text = tokenizer("chatml").decode(ids)
    assert "be brief" in text
    assert text.endswith("long <|im_end|>\n<|im_start|>assistant\n")
    bare = len(renderer.render([said("system", ""), said("user", "")])) + len(renderer.action_ids("the answer"))
    ids, _ = prompt_for(renderer, prompt, [ANSWER], max_tokens=bare + 3)
    assert "long" not in tokenizer("chatml").decode(ids)
    assert "ief<|im_end|>" in tokenizer("chatml").decode(ids)


def test_all_answers_see_the_prompt_that_the_longest_leaves_room_for() -> None:
    renderer = Renderer(tokenizer("tiny"))
    long = [said("assistant", "word " * 8)]
    ids, (short, longer) = prompt_for(renderer, asked("x" * 200), [ANSWER, long], max_tokens=100)
    assert len(ids) + len(longer.ids) == 100
    assert len(short.ids) < len(longer.ids)
    assert prompt_for(renderer, asked("x" * 200), [long], max_tokens=100)[0] == ids


def test_an_answer_that_does_not_fit_is_refused_not_cut() -> None:
    renderer = Renderer(tokenizer("tiny"))
    with pytest.raises(AnswerTooLong) as caught:
        prompt_for(renderer, asked("hi"), [[said("assistant", "word " * 30)]], max_tokens=40)
    assert str(caught.value).startswith("the answer that begins 'word word word")
    assert "max_tokens = 40 leaves no room for a prompt. An answer is never cut" in str(caught.value)


@few
@given(
    texts=st.lists(st.text(alphabet="ab c", min_size=1, max_size=40), min_size=1, max_size=7),
    answers=st.lists(st.text(alphabet="xyz ", max_size=12), min_size=1, max_size=3),
    system=st.booleans(),
    max_tokens=st.integers(20, 120),
    kind=st.sampled_from(sorted(set(KINDS) - TAKES_NO_SYSTEM)),
)
def test_whatever_is_cut_the_row_fits_and_keeps_cue_and_answer(
    texts: list[str], answers: list[str], system: bool, max_tokens: int, kind: str
) -> None:
    renderer = Renderer(tokenizer(kind))
    rule, texts = [said("system", "rule")] * system, texts[: len(texts) - (len(texts) + 1) % 2]
    given_answers = [[said("assistant", text)] for text in answers]
    longest = max(len(renderer.action_ids(text)) for text in answers)
    try:
        ids, found = prompt_for(renderer, rule + asked(*texts), given_answers, max_tokens=max_tokens)
    except AnswerTooLong:
        bare = [said("system", "")] * system + asked(*[""] * min(3, len(texts)))
        assert len(renderer.render(bare)) + longest > max_tokens
        return
    assert len(ids) + longest <= max_tokens
    assert [answer.ids for answer in found] == [renderer.action_ids(text) for text in answers]
    assert ids[-1] == renderer.render(asked(""))[-1]


def test_an_answer_of_several_messages_says_which_tokens_the_assistant_said() -> None:
    renderer: Any = Renderer(tokenizer("tiny"))
    found = spoken(renderer, [said("assistant", "a"), said("user", "b"), said("assistant", "c")])
    text = [tokenizer("tiny").decode([token]) for token in found.ids]
    assert "".join(text) == "a<|end|><|user|>b<|end|><|assistant|>c<|end|>"
    assert [token for token, own in zip(text, found.said, strict=True) if own] == ["a", "<|end|>", "c", "<|end|>"]


@pytest.mark.parametrize("roles", [[], ["user"], ["assistant", "user"], ["user", "assistant"]])
def test_an_answer_begins_and_ends_with_the_assistant(roles: list[str]) -> None:
    with pytest.raises(DataError, match="its first and its last message must be the assistant's"):
        spoken(Renderer(tokenizer("tiny")), [said(role, "x") for role in roles])


def test_two_messages_of_the_assistant_in_a_row_are_refused() -> None:
    with pytest.raises(DataError, match="two assistant messages may not follow each other"):
        spoken(Renderer(tokenizer("tiny")), [said("assistant", "x")] * 2)
