"""Conversations as token ids, over the kinds of chat templates there are: ids only ever grow at the end."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from echelon.errors import DataError
from echelon.text.chat import Renderer, set_up_template
from echelon.types import Message
from tests.text.templates import KINDS, TAKES_NO_SYSTEM, make_tokenizer, tokenizer

each_kind = pytest.mark.parametrize("kind", KINDS)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
asked_and_said = st.lists(st.tuples(words, words), max_size=5)
few = settings(max_examples=30, deadline=None, derandomize=True)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def conversation(exchanges: list[tuple[str, str]], last: str) -> list[Message]:
    """Questions and answers, ending with a question."""
    return [message for asked, said in exchanges for message in (user(asked), assistant(said))] + [user(last)]


def written(made: Any, ids: list[int]) -> str:
    """All of the ids as text, special tokens included."""
    return str(made.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("kind", ["tiny", "chatml", "llama", "gemma", "plain", "ours"])
def test_a_conversation_reads_as_the_template_writes_it(kind: str) -> None:
    messages = conversation([("2 + 2?", "It is 4."), ("Sure?", "Yes, quite.")], "Why?")
    if kind not in TAKES_NO_SYSTEM:
        messages = [system("Be brief."), *messages]
    made = tokenizer(kind)
    expected = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if kind == "plain":  # has no token that ends a message, so the tokenizer's EOS does
        expected = expected.replace("It is 4.\n", "It is 4.<|endoftext|>\n").replace(
            "quite.\n", "quite.<|endoftext|>\n"
        )
    assert written(made, Renderer(made).render(messages)) == expected


@each_kind
@few
@given(asked_and_said, words, words, words)
def test_a_longer_conversation_begins_with_the_shorter_one(
    kind: str, exchanges: list[tuple[str, str]], last: str, said: str, heard: str
) -> None:
    renderer = Renderer(tokenizer(kind))
    shorter = conversation(exchanges, last)
    answered = renderer.render(shorter) + renderer.action_ids(said)
    longer = renderer.render([*shorter, assistant(said), user(heard)])
    assert longer[: len(answered)] == answered
    assert longer == renderer.extend(answered, [user(heard)])


@each_kind
@few
@given(asked_and_said, words, st.lists(st.integers(0, 300), min_size=1, max_size=8), st.booleans())
def test_extending_never_changes_what_is_there(
    kind: str, exchanges: list[tuple[str, str]], last: str, action: list[int], ended: bool
) -> None:
    """Whatever was sampled, cut off or not: the model's own ids stay, and the turn is closed exactly once."""
    renderer = Renderer(tokenizer(kind))
    end = renderer.stop_ids[0]
    ids = renderer.render(conversation(exchanges, "x")) + [token for token in action if token not in renderer.stop_ids]
    cut = renderer.extend(ids, [user(last)])
    closed = renderer.extend([*ids, end], [user(last)])
    assert cut[: len(ids)] == ids
    assert closed[: len(ids) + 1] == [*ids, end]
    if kind != "plain":  # where the template closes a message, an unfinished one is closed by it
        assert cut == closed


@pytest.mark.parametrize(("kind", "bos"), [("llama", 1), ("gemma", 1), ("mistral", 1), ("spaced", 3)])
def test_bos_appears_as_often_as_the_template_says(kind: str, bos: int) -> None:
    made = tokenizer(kind)
    ids = Renderer(made).render(conversation([("a", "b"), ("c", "d")], "e"))
    assert ids.count(made.bos_token_id) == bos
    assert ids[0] == made.bos_token_id


@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        ("tiny", ["<|end|>"]),
        ("chatml", ["<|im_end|>", "<|endoftext|>"]),
        ("llama", ["<|eot_id|>"]),
        ("gemma", ["<end_of_turn>", "<eos>"]),
        ("mistral", ["</s>"]),
        ("spaced", ["</s>"]),
        ("forgets thoughts", ["<|im_end|>"]),
        ("plain", ["<|endoftext|>"]),
    ],
)
def test_a_message_ends_with_the_templates_token_or_eos(kind: str, ends: list[str]) -> None:
    made = tokenizer(kind)
    renderer = Renderer(made)
    assert made.convert_ids_to_tokens(list(renderer.stop_ids)) == ends
    assert renderer.action_ids("hello")[-1] == renderer.stop_ids[0]
    assert renderer.decode(renderer.action_ids("hello, héllo")) == "hello, héllo"


def test_a_space_that_the_template_puts_before_its_end_token_is_not_a_second_end() -> None:
    made = tokenizer("spaced")
    renderer = Renderer(made)
    ids = renderer.extend(renderer.render([user("a")]) + renderer.action_ids("b"), [user("c")])
    assert written(made, ids) == "<s>[INST] a [/INST]b</s><s>[INST] c [/INST]"


def test_thoughts_that_a_template_would_drop_later_stay_as_they_were_sampled() -> None:
    made = tokenizer("forgets thoughts")
    renderer = Renderer(made)
    said = "<think>two and two</think>4"
    messages = [user("2 + 2?"), assistant(said), user("Sure?")]
    assert "<think>" not in made.apply_chat_template(messages, tokenize=False)
    assert said in written(made, renderer.render(messages))


def test_what_was_heard_may_be_several_messages_and_other_roles() -> None:
    renderer = Renderer(tokenizer("chatml"))
    ids = renderer.extend([5], [{"role": "tool", "content": "42"}, system("Hurry."), user("So?")])
    assert written(renderer.tokenizer, ids[1:]) == (
        "<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>system\nHurry.<|im_end|>\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_messages_that_only_look_alike_are_told_apart() -> None:
    """Separators inside a message must not make it look like two, nor one speaker like another."""
    renderer = Renderer(tokenizer("tiny"))
    assert renderer.extend([5], [user("a")]) != renderer.extend([5], [system("a")])
    assert renderer.extend([5], [user("a"), user("b")]) != renderer.extend([5], [user("a\x1fuser\x1eb")])


def test_a_message_may_quote_the_renderers_own_marker() -> None:
    renderer = Renderer(tokenizer("chatml"))
    ids = renderer.extend([5], [user("@@what-the-assistant-said@@ twice: @@what-the-assistant-said@@")])
    assert written(renderer.tokenizer, ids).count("@@what-the-assistant-said@@") == 2


@each_kind
@few
@given(asked_and_said, words, words)
def test_examples_are_the_prompts_and_answers_of_the_conversation(
    kind: str, exchanges: list[tuple[str, str]], last: str, said: str
) -> None:
    renderer = Renderer(tokenizer(kind))
    messages = [*conversation(exchanges, last), assistant(said)]
    examples = renderer.examples(messages)
    assert len(examples) == len(exchanges) + 1
    for index, example in enumerate(examples):
        assert example.prompt == renderer.render(messages[: 2 * index + 1])
        assert example.action == renderer.action_ids(messages[2 * index + 1]["content"])
    assert renderer.examples([*messages, user("unanswered")]) == examples


def test_a_tokenizer_without_a_padding_token_works() -> None:
    assert tokenizer("llama").pad_token is None
    assert Renderer(tokenizer("llama")).render([user("hello")])


def test_a_tokenizer_without_a_template_is_refused() -> None:
    made = make_tokenizer(template=None, special=[], eos_token="</s>")
    with pytest.raises(DataError, match=r"has no chat template.*Use an instruction-tuned model, or set"):
        Renderer(made)


def test_a_tokenizer_without_a_template_is_given_questions_and_answers() -> None:
    made = make_tokenizer(template=None, special=[], eos_token="</s>")
    assert set_up_template(made)
    renderer = Renderer(made)
    messages = [system("Be brief."), *conversation([("2 + 2?", "4")], "Sure?")]
    expected = "Be brief.\n\nQuestion: 2 + 2?\n\nAnswer:\n4</s>\n\nQuestion: Sure?\n\nAnswer:\n"
    assert written(made, renderer.render(messages)) == expected
    assert made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    assert made.apply_chat_template([*messages, assistant("Yes")], tokenize=False) == expected + "Yes</s>"
    assert renderer.stop_ids == (made.eos_token_id,)
    (first, last) = renderer.examples([*messages, assistant("Yes")])
    assert written(made, first.action) == "4</s>"
    whole = made.apply_chat_template([*messages, assistant("Yes")], tokenize=True, return_dict=False)
    assert [*last.prompt, *last.action] == whole, "ours are the ids that anybody who uses the template gets"


def test_other_roles_are_named_as_they_are() -> None:
    made = make_tokenizer(template=None, special=[], eos_token="</s>")
    set_up_template(made)
    messages = [user("Time?"), assistant("clock()"), {"role": "tool", "content": "12:30"}]
    assert written(made, Renderer(made).render(messages)).endswith("</s>\n\nTool: 12:30\n\nAnswer:\n")


def test_a_template_that_is_there_is_left_alone() -> None:
    made = tokenizer("chatml")
    assert not set_up_template(made)
    assert made.chat_template == KINDS["chatml"]["template"]


def test_the_plain_template_begins_as_the_tokenizer_begins_every_text() -> None:
    made = make_tokenizer(template=None, special=[], bos_token="<s>", eos_token="</s>")
    set_up_template(made)
    assert Renderer(made).render([user("a")])[0] != made.bos_token_id, "this one puts nothing before a text"
    made = make_tokenizer(template=None, special=[], bos_token="<s>", eos_token="</s>")
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    set_up_template(made)
    ids = Renderer(made).render([user("a")])
    assert written(made, ids) == "<s>Question: a\n\nAnswer:\n"
    assert ids.count(made.bos_token_id) == 1


def test_no_template_is_set_up_where_no_message_could_end() -> None:
    with pytest.raises(DataError, match=r"neither a chat template nor an EOS token.*Set tokenizer\.eos_token"):
        set_up_template(make_tokenizer(template=None, special=[]))


def test_a_template_without_any_end_is_refused() -> None:
    made = make_tokenizer(template=KINDS["plain"]["template"], special=[])
    with pytest.raises(DataError, match=r"no end-of-turn token.*no EOS.*Set tokenizer\.eos_token"):
        Renderer(made)


@pytest.mark.parametrize("change", ["| upper", "| truncate(5)", "[:0]"])
def test_a_template_that_alters_answers_is_refused(change: str) -> None:
    template = KINDS["chatml"]["template"].replace("message.content", f"(message.content {change})")
    with pytest.raises(DataError, match="does not repeat assistant messages word for word"):
        Renderer(make_tokenizer(**{**KINDS["chatml"], "template": template}))


def test_a_template_that_cannot_open_the_answer_is_refused() -> None:
    template = KINDS["chatml"]["template"].split("{% if add_generation_prompt")[0]
    with pytest.raises(DataError, match=r"ignores add_generation_prompt.*Add the cue"):
        Renderer(make_tokenizer(**{**KINDS["chatml"], "template": template}))


@pytest.mark.parametrize(
    ("messages", "roles"),
    [([system("Be brief."), user("x")], r"\[system, user\]"), ([user("x"), user("y")], r"\[user, user\]")],
)
def test_roles_a_template_refuses_are_named(messages: list[Message], roles: str) -> None:
    with pytest.raises(DataError, match=rf"refuses the roles {roles}: .*Many templates take no system message"):
        Renderer(tokenizer("gemma")).render(messages)


@pytest.mark.parametrize("messages", [[], [assistant("y")]])
def test_a_prompt_must_leave_something_to_answer(messages: list[Message]) -> None:
    with pytest.raises(DataError, match="nothing to answer"):
        Renderer(tokenizer("tiny")).render(messages)


@pytest.mark.parametrize(
    "messages", [[assistant("y"), user("x")], [user("x"), assistant("y"), assistant("z"), user("x")]]
)
def test_a_conversation_must_begin_with_an_instruction_and_alternate(messages: list[Message]) -> None:
    with pytest.raises(DataError, match="cannot be rendered: it must begin with an instruction"):
        Renderer(tokenizer("tiny")).render(messages)


@each_kind
@few
@given(asked_and_said, words, words)
def test_an_answer_that_is_begun_is_continued_and_not_closed(
    kind: str, exchanges: list[tuple[str, str]], last: str, begun: str
) -> None:
    made = tokenizer(kind)
    renderer, messages = Renderer(made), conversation(exchanges, last)
    begun_ids = made.encode(begun, add_special_tokens=False)
    ids = renderer.render([*messages, assistant(begun)])
    assert ids == renderer.render(messages) + begun_ids
    assert renderer.extend(ids, [user(last), assistant(begun)]) == renderer.extend(ids, [user(last)]) + begun_ids
    assert renderer.extend(ids, [assistant(begun)]) == ids + begun_ids


def test_what_was_begun_reads_as_if_it_had_been_said() -> None:
    made = tokenizer("chatml")
    ids = Renderer(made).render([user("<observation>1</observation>"), assistant("<action>")])
    assert written(made, ids) == (
        "<|im_start|>user\n<observation>1</observation><|im_end|>\n<|im_start|>assistant\n<action>"
    )


parts = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=9), min_size=1, max_size=8)


@given(parts, st.integers(1, 60))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_budget_drops_the_oldest_exchanges_and_nothing_else(segments: list[list[int]], budget: int) -> None:
    renderer = Renderer(tokenizer("tiny"), max_tokens=budget)
    head, *exchanges = segments
    needed = len(head) + (len(exchanges[-1]) if exchanges else 0)
    if needed > budget:
        with pytest.raises(DataError, match=f"alone take {needed} tokens, more than the budget of {budget}"):
            renderer.join(segments)
        return
    ids, starts = renderer.join(segments)
    kept = exchanges[len(exchanges) - len(starts) :]
    assert ids == [*head, *chain.from_iterable(kept)]
    assert [ids[start : start + len(part)] for start, part in zip(starts, kept, strict=True)] == kept
    assert len(ids) <= budget
    assert len(kept) == len(exchanges) or len(ids) <= max(needed, budget * 3 // 4)
    if sum(map(len, segments)) <= budget:
        assert kept == exchanges
    elif exchanges:
        more = len(ids) + len(exchanges[-len(kept) - 1]) if len(kept) < len(exchanges) else len(ids)
        assert kept == exchanges or more > max(needed, budget * 3 // 4)  # no more was dropped than had to be


def test_a_shortened_prompt_has_room_for_the_next_turns() -> None:
    """A quarter of the budget is freed at once, so that not every turn starts a row of its own."""
    renderer = Renderer(tokenizer("tiny"), max_tokens=100)
    ids, starts = renderer.join([[0] * 10] + [[1] * 10] * 10)
    assert len(ids) == 70
    assert starts == (10, 20, 30, 40, 50, 60)


@given(asked_and_said, words, st.integers(10, 200))
@few
def test_over_budget_the_instruction_the_latest_question_and_the_cue_stay(
    exchanges: list[tuple[str, str]], last: str, budget: int
) -> None:
    made = tokenizer("chatml")
    messages = [system("Rules."), *conversation(exchanges, last)]
    segments = Renderer(made).segments(messages)
    if len(segments[0]) + len(exchanges and segments[-1]) > budget:
        with pytest.raises(DataError, match="Raise max_prompt_tokens or shorten them: neither can be dropped"):
            Renderer(made, max_tokens=budget).render(messages)
        return
    ids = Renderer(made, max_tokens=budget).render(messages)
    head = made.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    cue = made.apply_chat_template(messages[-1:], tokenize=False, add_generation_prompt=True)
    assert len(ids) <= budget
    assert written(made, ids).startswith(head)
    assert written(made, ids).endswith(cue)
