"""Decisions of every form become the same transitions, whole conversations stay together, and options become tokens."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from echelon.config import DataConfig
from echelon.data.candidates import CandidateReplay, Options
from echelon.data.strategies import (
    Transition,
    TransitionConfig,
    file_rewards,
    imitation_rewards,
    judge_rewards,
    load_transitions,
    option_ids,
    transitions_to_choices,
    with_dialogues,
)
from echelon.data.transitions import read_transition, strategy_index
from echelon.errors import ConfigError, DataError
from echelon.text.chat import PLAIN_CHAT_TEMPLATE, Renderer
from echelon.text.dialogue import ASSISTANT, INVENTORIES, USER, DialogueState, Inventory, strategist_prompt
from echelon.text.endpoint import Unanswered
from echelon.types import Message
from tests.text.templates import KINDS, tokenizer

ESCONV, DAILY = INVENTORIES["esconv"], INVENTORIES["daily_dialog"]
ESCONV_FILE = Path(__file__).parent / "files" / "esconv_format.json"
Cells = dict[str, Any]


def read(cells: Cells, inventory: Inventory = ESCONV, **columns: Any) -> Transition:
    return read_transition(cells, inventory, TransitionConfig(**columns), "f:7")


def load(*paths: str | Path, inventory: Inventory = ESCONV, columns: Cells | None = None, **settings: Any) -> Any:
    data = DataConfig(path=tuple(map(str, paths)), **settings)
    return load_transitions(data, inventory, TransitionConfig(**(columns or {})), seed=0)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


HISTORY = ((USER, "I lost my job."), (ASSISTANT, "I am sorry."))
HERE = {"emotion": "fear", "description": "jobs", "history": HISTORY, "query": "What now?"}
NEXT = {**HERE, "history": [*HISTORY, (USER, "What now?"), (ASSISTANT, "Rest.")], "query": "I will."}
CANONICAL = {"id": "7", "state": HERE, "strategy": "Question", "reward": 3.0, "next_state": NEXT, "terminated": False}


def flat(state: Cells, prefix: str = "") -> Cells:
    return {prefix + key: value for key, value in state.items()}


def test_a_row_of_our_own_form_is_read_as_it_says() -> None:
    row = read(CANONICAL)
    assert row.state == DialogueState("What now?", HISTORY, "fear", "jobs")
    assert isinstance(row.after, DialogueState)
    assert row.after.history[-1] == (ASSISTANT, "Rest.")
    assert (row.id, row.strategy, row.reward, row.terminated, row.truncated) == ("7", 0, 3.0, False, False)
    assert row.answer == "I will."


LINES = "User: I lost my job.\nAssistant: I am sorry."
OBJECTS = [
    [{"role": "user", "content": "I lost my job."}, {"role": "assistant", "content": "I am sorry."}],
    [{"speaker": "seeker", "text": "I lost my job."}, {"speaker": "supporter", "text": "I am sorry."}],
    [{"from": "human", "utterance": "I lost my job."}, {"from": "gpt", "utterance": "I am sorry."}],
    [{"from": "Human", "value": "I lost my job."}, {"role": "sys", "text": "I am sorry."}],
]


@pytest.mark.parametrize(
    "cells",
    [
        {"emo": "fear", "desc": "jobs", "hist": LINES, "current_query": "What now?", "stra": "(1)", "rsat": 3},
        {
            "user_emotion": "fear",
            "situation": "jobs",
            "dialogue_history": LINES,
            "utterance": "What now?",
            "action": "A",
        },
        {"emotion": "fear", "topic": "jobs", "history": OBJECTS[0], "input": "What now?", "label": "question"},
        {**flat(HERE), "history": OBJECTS[1], "selected_strategy": "Question", "satisfaction": "3.0"},
        {**flat(HERE), "history": OBJECTS[2], "predicted_strategy": "Question", "score": 3},
        {**flat(HERE), "history": json.dumps(OBJECTS[3]), "strategy": "Question", "reward": ""},
        {**flat(HERE), "history": LINES.splitlines(), "strategy": "(1) Question", "done": True},
        {"state": json.dumps(HERE), "strategy": "Question", "is_terminal": "true"},
        {"state": {"emo": "fear", "desc": "jobs", "hist": LINES, "input": "What now?"}, "strategy": "Question"},
    ],
    ids=lambda cells: "+".join(cells),
)
def test_columns_may_have_other_names(cells: Cells) -> None:
    row = read(cells)
    assert row.state == DialogueState("What now?", HISTORY, "fear", "jobs")
    assert row.strategy == 0
    assert row.reward in (None, 3.0)
    assert row.terminated  # nothing says what follows, and nothing says that something does


@pytest.mark.parametrize("prefix", ["next_", "then_"])
def test_the_next_state_has_the_same_columns_behind_a_prefix(prefix: str) -> None:
    row = read({**flat(HERE), "strategy": "A", **flat(NEXT, prefix)}, next_state_prefix=prefix)
    assert row.after == read(CANONICAL).after
    silent = {key: value for key, value in NEXT.items() if key in ("history", "query")}
    again = read({**flat(HERE), "strategy": "A", **flat(silent, prefix)}, next_state_prefix=prefix)
    assert again.after == row.after  # what is felt and described goes on


def test_settings_name_columns_that_are_called_anything() -> None:
    cells = {"input": "…the whole prompt…", "next_input": "…the next…", "u": "B", "r": 4, "over": 0, "action": "A"}
    columns = {"strategy_key": "u", "reward_key": "r", "done_key": "over", "current_input_key": "input"}
    row = read(cells, **columns)
    assert (row.state, row.after, row.strategy, row.reward) == ("…the whole prompt…", "…the next…", 1, 4.0)
    assert read({**cells, "n": "other"}, **columns, next_input_key="n").after == "other"


def test_ready_prompts_are_taken_where_there_is_no_conversation() -> None:
    cells = {"current_prompt": "P", "next_prompt": "N", "strategy": "A"}
    assert (read(cells).state, read(cells).after) == ("P", "N")
    assert read({**cells, "next_prompt": None}).terminated
    assert read({**cells, "query": "Hello", "next_query": "Bye"}).state == DialogueState("Hello")


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ({"next_state": NEXT}, (False, False)),
        ({"next_state": NEXT, "done": False}, (False, False)),
        ({"next_state": NEXT, "done": True}, (True, False)),
        ({"next_state": NEXT, "done": True, "truncated": True}, (False, True)),
        ({"next_state": NEXT, "terminated": False, "truncated": True}, (False, True)),
        ({"next_state": None}, (True, False)),
        ({"done": 1}, (True, False)),
        ({"terminal": "True"}, (True, False)),
        ({}, (True, False)),
    ],
)
def test_a_conversation_ends_where_the_row_says_so(ending: Cells, expected: tuple[bool, bool]) -> None:
    row = read({"state": HERE, "strategy": "A", **ending})
    assert (row.terminated, row.truncated) == expected
    assert row.terminated == (row.after is None)


@pytest.mark.parametrize(
    ("cells", "complaint"),
    [
        ({"strategy": "A"}, "the columns strategy hold no state"),
        ({"state": "words", "strategy": "A"}, "'state' is 'words', not an object"),
        ({"query": "Hi"}, "the columns query hold no strategy.*strategy_key"),
        ({"query": "Hi", "strategy": "Qestion"}, r"'Qestion' is none of the strategies.*Did you mean 'Question'\?"),
        (
            {"query": "Hi", "strategy": 1},
            "the number 1, and nothing says whether the first one is 0 or 1. Set columns.index_base",
        ),
        ({"query": "Hi", "strategy": "1"}, "the number 1, and nothing says whether the first one is 0 or 1"),
        ({"query": "Hi", "strategy": 1.5}, "the strategy is 1.5"),
        ({"query": "Hi", "strategy": True}, "the strategy is True"),
        ({"query": "Hi", "strategy": "A", "action": "B"}, "strategy and action differ. Set columns.strategy_key"),
        ({"query": "Hi", "strategy": "A", "reward": 1, "score": 2}, "reward and score differ. Set columns.reward_key"),
        ({"query": "Hi", "strategy": "A", "reward": 5.5}, "the reward is 5.5, and rewards are numbers from 0 to 5"),
        (
            {"query": "Hi", "strategy": "A", "reward": -1},
            "the reward is -1, and rewards are numbers from 0 to 5.*reward_r",
        ),
        ({"query": "Hi", "strategy": "A", "reward": "good"}, "the reward is 'good'"),
        ({"query": "Hi", "strategy": "A", "reward": True}, "the reward is True"),
        ({"query": "Hi", "strategy": "A", "done": False}, r"goes on \(done is false\), and there is no next state"),
        ({"query": "Hi", "strategy": "A", "terminated": False}, r"goes on \(done is false\)"),
        ({"query": "Hi", "strategy": "A", "truncated": True}, r"was cut off \(truncated\), and there is no next state"),
        ({"query": "Hi", "strategy": "A", "done": "perhaps"}, "'done' is 'perhaps', neither true nor false"),
        ({"query": "Hi", "history": [{"text": "x"}], "strategy": "A"}, "utterance 1 of the history does not say who"),
        ({"query": "Hi", "history": 3, "strategy": "A"}, "the history is 3"),
        ({"query": ["Hi"], "strategy": "A"}, "stands where text should be"),
        (
            {**flat(HERE), "strategy": "A", "next_query": "Yes"},
            "the next state has a query and no history.*next_history",
        ),
        ({"query": "Hi", "strategy": "A", "next_prompt": "P"}, "the next state is a ready prompt and this one is not"),
        (
            {"current_prompt": "P", "strategy": "A", "next_query": "x"},
            "this state is a ready prompt and the next one is n",
        ),
        ({"query": "Hi", "strategy": "A", "legal": ["B", "C"]}, "Question was chosen, and is not among the legal ones"),
        ({"query": "Hi", "strategy": "A", "legal": "A"}, "'legal' is 'A', not a list"),
        (
            {"query": "Hi", "strategy": "A", "legal": ["A"], "next_query": "x"},
            "nothing says it of the next state.*next_leg",
        ),
    ],
)
def test_a_row_that_is_broken_or_could_mean_two_things_is_named(cells: Cells, complaint: str) -> None:
    with pytest.raises(DataError, match=f"^f:7: .*{complaint}"):
        read(cells)


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        (
            {"strategy_key": "strat"},
            r"columns.strategy_key = strat: the row has query, strategy. Did you mean 'strategy'\?",
        ),
        ({"reward_key": "r"}, "columns.reward_key = r: the row has query, strategy"),
        ({"done_key": "d"}, "columns.done_key = d: the row has"),
        ({"current_input_key": "prompt"}, "columns.current_input_key = prompt: the row has"),
        ({"next_input_key": "prompt"}, "columns.next_input_key = prompt: the row has"),
    ],
)
def test_a_setting_that_names_no_column_is_named(columns: Cells, complaint: str) -> None:
    with pytest.raises(DataError, match=f"^f:7: {complaint}"):
        read({"query": "Hi", "strategy": "A"}, **columns)


@pytest.mark.parametrize(
    "columns", [{"next_state_prefix": ""}, {"reward_range": (1.0, 1.0)}, {"reward_range": (5.0, 0.0)}]
)
def test_settings_that_cannot_work_are_refused(columns: Cells) -> None:
    with pytest.raises(ConfigError, match=next(iter(columns))):
        TransitionConfig(**columns)


@pytest.mark.parametrize(
    ("said", "base", "place"), [(0, 0, 0), (7, 0, 7), (1, 1, 0), (8, 1, 7), ("8", 1, 7), (2.0, 1, 1)]
)
def test_numbers_count_from_where_the_setting_says(said: Any, base: int, place: int) -> None:
    assert strategy_index(said, ESCONV, base, "f:7") == place


@pytest.mark.parametrize(("said", "base"), [(-1, 0), (8, 0), (0, 1), (9, 1), ("0", 1)])
def test_a_number_outside_is_refused(said: Any, base: int) -> None:
    with pytest.raises(
        DataError, match=f"f:7: the strategy is the number .* with index_base = {base} they are {base} to"
    ):
        strategy_index(said, ESCONV, base, "f:7")


def test_an_option_in_brackets_never_asks_for_a_base() -> None:
    assert [strategy_index("(1)", ESCONV, base, "f:7") for base in (None, 0, 1)] == [0, 0, 0]


def test_history_in_lines_goes_on_until_somebody_else_is_named() -> None:
    said = "A summary.\nUser: I read\nhttp://a.b: nothing.\nTherapist: Yes?\nMary Ann: I too."
    row = read({"query": "Hi", "history": said, "strategy": "A"})
    assert isinstance(row.state, DialogueState)
    assert row.state.history == (
        ("", "A summary."),
        (USER, "I read http://a.b: nothing."),
        (ASSISTANT, "Yes?"),
        ("Mary Ann", "I too."),
    )


def test_esconv_becomes_one_decision_for_every_reply() -> None:
    rows = load(ESCONV_FILE).train
    first = [row for row in rows if row.where.endswith("esconv_format.json:2")]
    assert [ESCONV.strategies[row.strategy] for row in first] == [
        "Question",
        "Reflection of Feelings",
        "Providing Suggestions",
        "Affirmation and Reassurance",
    ]  # the opening "Hello!" answers nothing
    assert first[0].state == DialogueState(
        query="Hi. My shop closes next month. I do not know what to do.",
        history=((ASSISTANT, "Hello! I am here to listen."),),
        emotion="anxiety",
        description="job crisis: The shop I work in closes next month.",
    )
    assert first[0].reply == "How long have you worked there?"
    assert first[0].answer == "Nine years."
    assert [row.after for row in first] == [*(row.state for row in first[1:]), None]
    goes_on = first[2].state
    assert isinstance(goes_on, DialogueState)
    assert goes_on.query == ""  # the supporter spoke last
    assert goes_on.history[-2:] == ((USER, "Nine years."), (ASSISTANT, "You must feel lost after so long."))
    assert first[-1].answer == "Thank you, I feel better."
    assert {row.reward for row in rows} == {None}
    assert len({row.dialogue for row in rows}) == 12
    assert len({row.id for row in rows}) == len(rows) == 41  # 43 replies, of which two open a conversation


def esconv(*said: tuple[str, str, str | None], **told: str) -> Cells:
    names = {"usr": "text", "seeker": "content", "speaker": "content"}
    dialog = [
        {"speaker": who, names.get(who, "content"): words, "annotation": {"strategy": strategy} if strategy else {}}
        for who, words, strategy in said
    ]
    return {**told, "dialog": dialog}


def test_esconv_is_read_in_the_forms_it_is_published_in(tmp_path: Path) -> None:
    plain = esconv(("seeker", "Hi", None), ("supporter", "Yes?", "Question"), emotion_type="fear", situation="s")
    flat = {
        "emotion_type": "fear",
        "situation": "s",
        "dialog": [
            {"speaker": "usr", "text": " Hi\n"},
            {"speaker": "sys", "text": "Yes?", "strategy": "Question"},
        ],
    }
    other = esconv(("speaker", "Hi", None), ("listener", "Yes?", "Questions"), emotion_type="fear", situation="s")
    forms = [plain, flat, other, {"text": json.dumps(plain)}, {**plain, "dialog": json.dumps(plain["dialog"])}]
    for number, cells in enumerate(forms):
        (row,) = load(write(tmp_path / f"{number}.jsonl", cells)).train
        assert (row.state, row.strategy, row.reply) == (DialogueState("Hi", (), "fear", "s"), 0, "Yes?")


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ([("seeker", "Hi", None), ("supporter", "Yes?", None)], "utterance 2 is the supporter's and has no strategy"),
        ([("seeker", "Hi", None), ("supporter", "Yes?", "Ask")], "utterance 2: 'Ask' is none of the strategies"),
        (
            [("seeker", "Hi", None), ("moderator", "Stop", None)],
            "utterance 2 is by 'moderator'. Speakers are seeker and",
        ),
        ([("seeker", None, None)], "utterance 1 is not"),
    ],
)
def test_a_conversation_that_is_broken_is_named(tmp_path: Path, said: list[Any], complaint: str) -> None:
    path = write(tmp_path / "a.jsonl", esconv(*said))
    with pytest.raises(DataError, match=rf"a\.jsonl:1: {complaint}"):
        load(path)


TALK = ["Hello .", "Hi , how are you ?", "Fine . Come in !", "I will ."]
FORMS: dict[str, Cells] = {
    "hub": {"dialog": TALK, "act": [1, 2, 3, 4], "emotion": [0, 0, 4, 0]},
    "hub, newer": {"utterances": TALK, "acts": [1, 2, 3, 4], "emotions": [0, 0, 4, 0]},
    "named": {
        "dialogue": [
            {"text": text, "act": act, "emotion": emotion}
            for text, act, emotion in zip(
                TALK,
                ["inform", "question", "directive", "commissive"],
                ["no_emotion", "no_emotion", "happiness", "no_emotion"],
                strict=True,
            )
        ]
    },
}


def raw(folder: Path, *talks: Cells, split: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    suffix = f"_{split}" if split else ""
    lines = {f"dialogues_{split or 'text'}.txt": [" __eou__ ".join(talk["dialog"]) + " __eou__" for talk in talks]}
    for what in ("act", "emotion"):
        lines[f"dialogues_{what}{suffix}.txt"] = [" ".join(map(str, talk[what])) + " " for talk in talks]
    for name, content in lines.items():
        (folder / name).write_text("".join(f"{line}\n" for line in content))
    return folder


@pytest.mark.parametrize("form", [*FORMS, "raw"])
def test_daily_dialog_becomes_one_decision_for_every_answer(form: str, tmp_path: Path) -> None:
    path = raw(tmp_path / "d", FORMS["hub"]) if form == "raw" else write(tmp_path / "d.jsonl", FORMS[form])
    rows = load(path, inventory=DAILY).train
    assert [DAILY.strategies[row.strategy] for row in rows] == ["Question", "Directives", "Commissive"]
    first, second, third = rows
    assert first.state == DialogueState("Hello .")
    assert second.state == DialogueState("Hi , how are you ?", ((ASSISTANT, "Hello ."),))
    assert third.state == DialogueState(
        "Fine . Come in !", ((USER, "Hello ."), (ASSISTANT, "Hi , how are you ?")), emotion="happiness"
    )
    assert (first.after, second.after, third.after) == (third.state, None, None)  # whoever spoke speaks again two later
    assert (first.answer, second.answer, third.answer) == ("Fine . Come in !", "I will .", "")
    assert len({row.dialogue for row in rows}) == 1


def test_raw_daily_dialog_has_splits_and_topics(tmp_path: Path) -> None:
    raw(tmp_path / "train", FORMS["hub"], split="train")
    raw(tmp_path / "test", {**FORMS["hub"], "dialog": ["a", "b", "c", "d"]}, split="test")
    rows = load(tmp_path, inventory=DAILY, eval_split="test")
    assert (rows.train[0].reply, rows.held_out[0].reply) == (TALK[1], "b")
    whole = raw(tmp_path / "whole", FORMS["hub"])
    (whole / "dialogues_topic.txt").write_text("8\n")
    assert load(whole, inventory=DAILY).train[0].state == DialogueState("Hello .", description="work")
    assert load(whole / "dialogues_text.txt", inventory=DAILY).train[0].state == DialogueState(
        "Hello .", (), "", "work"
    )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"act": [1, 2, 3]}, "4 utterances, 3 acts and 4 emotions"),
        ({"act": [1, 0, 3, 4]}, "utterance 2: the strategy is the number 0; with index_base = 1 they are 1 to 4"),
        ({"act": [1, 2, 5, 4]}, "utterance 3: the strategy is the number 5"),
        ({"act": [1, "x", 3, 4]}, "utterance 2: 'x' is none of the strategies"),
        ({"emotion": [0, 9, 0, 0]}, "the emotion 9 is none of DailyDialog's"),
        ({"dialog": ["a", 2, "b", "c"]}, "an utterance is not text"),
    ],
)
def test_broken_daily_dialog_is_named(tmp_path: Path, change: Cells, complaint: str) -> None:
    with pytest.raises(DataError, match=rf"d\.jsonl:1: {complaint}"):
        load(write(tmp_path / "d.jsonl", {**FORMS["hub"], **change}), inventory=DAILY)


def test_daily_dialog_has_its_own_strategies(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Set strategies to daily_dialog"):
        load(write(tmp_path / "d.jsonl", FORMS["hub"]))


def test_raw_files_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    folder = raw(tmp_path / "a", FORMS["hub"])
    (folder / "dialogues_act.txt").write_text("1 2 3 4\n1 2\n")
    with pytest.raises(DataError, match="its lines and those of the files beside it are not as many"):
        load(folder, inventory=DAILY)
    (folder / "dialogues_act.txt").unlink()
    with pytest.raises(DataError, match=r"dialogues_act\.txt does not lie beside it"):
        load(folder, inventory=DAILY)


def test_no_conversation_is_on_both_sides_whatever_the_order() -> None:
    rows = load(ESCONV_FILE, eval_fraction=0.4)
    sides = [{row.dialogue for row in side} for side in (rows.train, rows.held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 12
    assert 2 <= len(sides[1]) <= 8
    assert load(ESCONV_FILE, eval_fraction=0.4) == rows


def test_a_conversation_held_out_elsewhere_is_not_learned_from(tmp_path: Path, capsys: Any) -> None:
    talks = json.loads(ESCONV_FILE.read_text())
    (tmp_path / "held.json").write_text(json.dumps(talks[3:5]))
    rows = load(ESCONV_FILE, eval_path=(str(tmp_path / "held.json"),))
    assert len({row.dialogue for row in rows.train}) == 10
    assert "are also held out, so they are left out of training" in capsys.readouterr().err


def chain(*said: str, start: str = "") -> list[Cells]:
    """Rows of one conversation without a name."""
    states = []
    history: list[tuple[str, str]] = []
    for words in said:
        states.append({"query": words, "history": list(history), "description": start})
        history += [(USER, words), (ASSISTANT, "Yes.")]
    after = [*states[1:], None]
    return [{"state": s, "strategy": "A", "next_state": n} for s, n in zip(states, after, strict=True)]


def test_rows_without_a_name_are_of_one_conversation_when_one_leads_to_the_other() -> None:
    rows = [*chain("a", "b", "c"), *chain("x", "y"), *chain("a", "b", start="elsewhere")]
    prompts = [
        {"current_prompt": p, "next_prompt": n, "strategy": "A"} for p, n in (("1", "2"), ("2", "3"), ("7", None))
    ]
    named = with_dialogues([read(cells) for cells in [*rows, *prompts]])
    names = [row.dialogue for row in named]
    assert [names.index(name) for name in names] == [0, 0, 0, 3, 3, 5, 5, 7, 7, 9]
    backwards = with_dialogues([read(cells) for cells in [*rows, *prompts][::-1]])
    assert [row.dialogue for row in backwards] == names[::-1]  # it depends on what is said alone
    windowed = [{**row, "state": {**row["state"], "history": row["state"]["history"][-2:]}} for row in rows[:3]]
    windowed = [
        {**row, "next_state": None if n is None else n["state"]}
        for row, n in zip(windowed, [*windowed[1:], None], strict=True)
    ]
    assert len({row.dialogue for row in with_dialogues([read(cells) for cells in windowed])}) == 1


def test_a_name_in_the_file_is_the_name_of_the_conversation() -> None:
    rows = [read({**cells, "dialogue_id": name}) for name in ("p", "q") for cells in chain("a", "b")]
    assert [row.dialogue for row in with_dialogues(rows)] == ["p", "p", "q", "q"]


def test_a_broken_row_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", CANONICAL, {**CANONICAL, "reward": 7})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the reward is 7"):
        load(path)
    assert load(path, columns={"reward_range": (0.0, 7.0)}).train[1].reward == 7.0


def test_rows_are_read_from_tables(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('query,history,strategy,reward,next_query,done\nHi,"User: a\nAssistant: b",(2),4,,\n')
    (row,) = load(path).train
    assert row.state == DialogueState("Hi", ((USER, "a"), (ASSISTANT, "b")))
    assert (row.strategy, row.reward, row.terminated) == (1, 4.0, True)


def test_a_prefix_that_no_column_has_is_not_taken_for_the_end_of_every_conversation(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"query": "Hi", "strategy": "A", "next_query": "Yes"})
    with pytest.raises(DataError, match=r"columns\.next_state_prefix = nxt_: no row of .*rows\.jsonl has a next state"):
        load(path, columns={"next_state_prefix": "nxt_"})


def test_streams_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.streaming = True: conversations are split whole"):
        load(ESCONV_FILE, streaming=True, limit=3)
    with pytest.raises(DataError, match="there is no decision in it"):
        load(write(tmp_path / "a.jsonl", esconv(("supporter", "Hi", "Question"))))


def test_imitation_pairs_every_decision_with_one_that_was_not_taken() -> None:
    rows = load(ESCONV_FILE).train * 40
    both = imitation_rewards(rows, ESCONV, seed=0)
    taken, other = both[::2], both[1::2]
    assert [(row.state, row.strategy, row.after) for row in taken] == [
        (row.state, row.strategy, row.after) for row in rows
    ]
    assert {row.reward for row in taken} == {1.0}
    assert {row.reward for row in other} == {-1.0}
    assert all(a.strategy != b.strategy and a.state == b.state for a, b in zip(taken, other, strict=True))
    drawn = Counter(b.strategy for a, b in zip(taken, other, strict=True) if a.strategy == 0)
    assert set(drawn) == set(range(1, 8))  # uniformly among the seven others
    assert max(drawn.values()) < 1.4 * sum(drawn.values()) / 7
    assert imitation_rewards(rows, ESCONV, seed=0) == both
    assert imitation_rewards(rows, ESCONV, seed=1) != both


def test_imitation_draws_what_is_legal() -> None:
    row = read({"query": "Hi", "strategy": "A", "legal": ["A", "C"]})
    assert [found.strategy for found in imitation_rewards([row], ESCONV, seed=0)] == [0, 2]
    alone = read({"query": "Hi", "strategy": "A", "legal": ["A"]})
    with pytest.raises(DataError, match="f:7: only one strategy is legal"):
        imitation_rewards([alone], ESCONV, seed=0)


def test_rewards_of_the_file_must_all_be_there() -> None:
    row = read(CANONICAL)
    assert file_rewards([row]) == [row]
    with pytest.raises(DataError, match="f:7: there is no reward"):
        file_rewards([row, read({"query": "Hi", "strategy": "A"})])


class Judge:
    """Says yes to fluency always, and to sensitivity where the reply speaks of feelings."""

    def __init__(self, silent_on: str = "@", garbage_on: str = "@") -> None:
        self.asked: list[str] = []
        self.silent_on, self.garbage_on = silent_on, garbage_on

    async def __call__(self, messages: Sequence[Message]) -> str:
        prompt = messages[0]["content"]
        self.asked.append(prompt)
        if self.silent_on in prompt:
            raise Unanswered("no answer within 1 seconds")
        if self.garbage_on in prompt:
            return "What a lovely reply!"
        felt = "yes" if re.search(r"\(the reply\): .*feel", prompt) else "no"
        no = "\n".join(f"{name}: no" for name in ("acceptance", "effectiveness", "emotion improvement"))
        return f"{no}\nsensitivity: {felt}\nfluency: yes"


REPLIES = [
    {"query": "I am sad.", "strategy": "C", "reply": "You feel low."},
    {"query": "I am sad.", "strategy": "A", "reply": "Why?"},
    {"query": "I am sad.", "strategy": "C", "reply": "You feel low."},
]


def test_a_judge_grades_every_reply_once() -> None:
    judge = Judge()
    graded, said = asyncio.run(judge_rewards([read(cells) for cells in REPLIES], judge))
    assert [row.reward for row in graded] == [2.0, 1.0, 2.0]
    assert (len(judge.asked), said) == (2, [])


@pytest.mark.parametrize("fault", ["silent_on", "garbage_on"])
def test_what_a_judge_does_not_grade_is_left_out_and_never_a_zero(fault: str) -> None:
    judge = Judge(**{fault: "reply): Why?"})
    graded, (said,) = asyncio.run(judge_rewards([read(cells) for cells in REPLIES], judge))
    assert [row.reward for row in graded] == [2.0, 2.0]
    assert said.startswith("1 of 3 decisions are left out, without a reward: the judge")
    with pytest.raises(DataError, match="none of 3 replies has a reward: the judge"):
        asyncio.run(judge_rewards([read(cells) for cells in REPLIES], Judge(**{fault: "reply"})))


def test_a_judge_needs_a_reply_and_a_conversation() -> None:
    for cells, missing in (({"query": "Hi"}, "no reply"), ({"current_prompt": "P", "reply": "x"}, "a ready prompt")):
        with pytest.raises(DataError, match=f"f:7: a judge reads .* the row has {missing}"):
            asyncio.run(judge_rewards([read({**cells, "strategy": "A"})], Judge()))


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_end_with_the_cue_and_options_are_what_follows(kind: str) -> None:
    renderer = Renderer(tokenizer(kind))
    rows = [read({**CANONICAL, "strategy": "(2)"})]
    ((choice,),) = transitions_to_choices(rows, renderer, ESCONV)
    assert choice.options.state == renderer.render(strategist_prompt(rows[0].state, ESCONV))  # type: ignore[arg-type]
    assert [renderer.decode(option) for option in choice.options.candidates] == list(ESCONV.options)
    assert (choice.chosen, choice.reward) == (1, 3.0)
    assert choice.after is not None


def test_rows_that_follow_one_another_are_a_chain_that_a_replay_keeps() -> None:
    rows = [read({**cells, "reward": 1}) for cells in [*chain("a", "b", "c"), *chain("x", "y")]]
    chains = transitions_to_choices(rows, Renderer(tokenizer("ours")), ESCONV)
    assert [len(one) for one in chains] == [3, 2]
    assert chains[0][0].after == chains[0][1].options
    assert [one[-1].terminated for one in chains] == [True, True]
    both = imitation_rewards(rows, ESCONV, seed=0)
    replay = CandidateReplay(100)
    replay.add(transitions_to_choices(both, Renderer(tokenizer("ours")), ESCONV))
    assert len(replay) == 10


def test_options_that_are_not_legal_are_empty() -> None:
    cells = {**CANONICAL, "legal": ["Question", "C"], "next_legal": ["B"]}
    ((choice,),) = transitions_to_choices([read(cells)], Renderer(tokenizer("ours")), ESCONV)
    assert choice.after is not None
    assert [bool(option) for option in choice.options.candidates] == [True, False, True, *[False] * 5]
    assert [bool(option) for option in choice.after.candidates] == [False, True, *[False] * 6]


def test_the_oldest_history_is_dropped_and_the_query_and_the_menu_stay() -> None:
    renderer = Renderer(tokenizer("ours"))
    long = [(USER if n % 2 == 0 else ASSISTANT, f"word {n} " * 5) for n in range(40)]
    row = read({"query": "What now?", "history": long, "strategy": "A", "reward": 1})
    bare = renderer.render(strategist_prompt(DialogueState("What now?"), ESCONV))
    ((choice,),) = transitions_to_choices([row], renderer, ESCONV, len(bare) + 200)
    said = renderer.decode(choice.options.state)
    assert len(bare) < len(choice.options.state) <= len(bare) + 200
    assert "word 39" in said
    assert "word 0 " not in said
    assert "User: What now?\nStrategies:\n(1) Question" in said
    assert said.endswith("Answer:\n")
    with pytest.raises(
        DataError, match=rf"f:7: .* alone take {len(bare)} tokens, more than the budget of {len(bare) - 1}"
    ):
        transitions_to_choices([row], renderer, ESCONV, len(bare) - 1)
    ready = read({"current_prompt": "word " * 300, "strategy": "A", "reward": 1})
    with pytest.raises(DataError, match=r"f:7: the ready prompt takes .* more than the budget of 50"):
        transitions_to_choices([ready], renderer, ESCONV, 50)


def test_a_ready_prompt_is_read_as_it_is() -> None:
    renderer = Renderer(tokenizer("ours"))
    row = read({"current_prompt": "Choose.", "strategy": "A", "reward": 1})
    ((choice,),) = transitions_to_choices([row], renderer, ESCONV)
    assert choice.options == Options(
        renderer.render([Message(role="user", content="Choose.")]), option_ids(renderer, ESCONV)
    )


def words_tokenizer(*words: str, template: str = PLAIN_CHAT_TEMPLATE) -> Any:
    """A tokenizer that knows these words, written as they are, and nothing else."""
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(["<unk>", "<eos>", *words]))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<eos>")
    wrapped.chat_template = template
    return wrapped


def test_options_that_are_the_same_tokens_are_refused() -> None:
    with pytest.raises(DataError, match=r"'\(1\)' and '\(2\)' are the same tokens"):
        option_ids(Renderer(words_tokenizer("Answer:", "x")), Inventory(("Ask", "Tell")))


def test_an_option_that_melts_into_the_cue_is_refused() -> None:
    template = PLAIN_CHAT_TEMPLATE.replace("\n\nAnswer:\n' }}{% endif", "\n\nAnswer:' }}{% endif")
    melting = words_tokenizer("Answer:", "(1)", "(2)", "Answer:(1)", "Answer:(2)", template=template)
    with pytest.raises(DataError, match=r"options: '\(1\)' alone is .*the model would be read at tokens that it never"):
        option_ids(Renderer(melting), Inventory(("Ask", "Tell")))
