"""Numbers as words and back: to one quantum for every space, and any text is an action or says why it is not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.errors import ConfigError, DataError
from echelon.text.codec import Codec, Space, measured_ranges

many = settings(max_examples=200, deadline=None, derandomize=True)

STATE = Space("box", (-4.8, -math.inf), (4.8, math.inf), names=("position", "velocity"), units=("m", "m/s"))
TORQUE = Space("box", (-2.0, 0.0), (2.0, 1.0))
SIDES = Space("discrete", n=3, start=-1, names=("left", "none", "Right side"))
CART = Codec(STATE, Space("discrete", n=2, names=("left", "right")), action_style="index", plant="You push a cart.")
ARM = Codec(STATE, TORQUE)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[Space, list[float]]:
    """A box and a point in it."""
    ends = draw(st.lists(st.tuples(st.floats(-1e4, 1e4, width=32), st.floats(0.125, 1e4, width=32)), min_size=1))
    shares = [draw(st.floats(0, 1)) for _ in ends]
    low, high = tuple(lo for lo, _ in ends), tuple(lo + width for lo, width in ends)
    point = [min(lo + share * (hi - lo), hi) for lo, hi, share in zip(low, high, shares, strict=True)]
    return Space("box", low, high), point


def near(x: float) -> float:
    """How far the next float32 may be."""
    return 2e-7 * abs(x)


@many
@given(boxes(), st.integers(0, 8))
def test_decimals_come_back_to_half_a_digit(drawn: tuple[Space, list[float]], decimals: int) -> None:
    space, point = drawn
    codec = Codec(space, space, decimals=decimals)
    parsed = codec.decode_action(codec.completion(point))
    assert (parsed.problem, parsed.extra) == ("", 0)
    seen = codec.decode_observation("before " + codec.encode_observation(point))
    for value in (parsed.value, seen):
        for got, x in zip(np.asarray(value).tolist(), point, strict=True):
            assert abs(got - x) <= 0.5001 * 10**-decimals + near(x)


@many
@given(boxes(), st.integers(1, 5000))
def test_bins_come_back_to_half_a_bin(drawn: tuple[Space, list[float]], bins: int) -> None:
    space, point = drawn
    codec = Codec(space, space, observation_style="bins", action_style="bins", bins=bins)
    parsed = codec.decode_action(codec.completion(point))
    assert parsed.problem == ""
    seen = codec.decode_observation(codec.encode_observation(point))
    for value in (parsed.value, seen):
        for got, x, lo, hi in zip(np.asarray(value).tolist(), point, space.low, space.high, strict=True):
            assert abs(got - x) <= 0.5001 * (hi - lo) / bins + near(max(abs(lo), abs(hi)))


@many
@given(st.integers(1, 300), st.integers(-50, 50), st.data())
def test_choices_come_back_exactly(n: int, start: int, data: st.DataObject) -> None:
    chosen = start + data.draw(st.integers(0, n - 1))
    space = Space("discrete", n=n, start=start, names=tuple(f"go {index}" for index in range(n)))
    for style in ("index", "name"):
        codec = Codec(space, space, observation_style=style, action_style=style)  # type: ignore[arg-type]
        assert codec.decode_action(codec.completion(chosen)).value == chosen
        assert codec.decode_observation(codec.encode_observation([chosen])).tolist() == [chosen]


@many
@given(st.text(max_size=30))
def test_any_text_is_an_action_in_the_space_or_says_why_not(text: str) -> None:
    for codec in (CART, ARM, replace(ARM, action_style="bins"), Codec(STATE, SIDES, action_style="name")):
        for completion in (text, text + "</action>"):
            parsed = codec.decode_action(completion)
            assert (parsed.value is None) == bool(parsed.problem)
            if isinstance(parsed.value, np.ndarray):
                assert (np.array(codec.action.low) <= parsed.value).all()
                assert (parsed.value <= np.array(codec.action.high)).all()


def test_values_are_written_the_same_way_everywhere() -> None:
    assert CART.encode_observation([0.5, -1e-9]) == "<observation>0.50000, 0.00000</observation>"
    assert ARM.encode_action([1, 0.123456]) == "1.00000, 0.12346"
    assert replace(ARM, action_style="bins").encode_action([-1.0, 1.0]) == "250, 999"  # 999·1/4 = 249.75
    assert replace(ARM, action_style="bins", bins=4).encode_action([7.0, -7.0]) == "4, 0"
    assert Codec(STATE, SIDES, action_style="name").encode_action(1) == "Right side"


def test_a_range_from_data_replaces_the_bounds_of_the_space() -> None:
    ranges = measured_ranges([[0.0, 5.0], [4.0, 5.0], [2.0, 5.0]])
    assert ranges == ((0.0, 4.0), (4.5, 5.5))  # what never changes is in the middle of its range
    assert measured_ranges([[x] for x in range(101)], outside=0.1) == ((10.0, 90.0),)
    codec = replace(ARM, observation_style="bins", observation_ranges=ranges, bins=8)
    assert codec.encode_observation([1.0, 5.0]) == "<observation>2, 4</observation>"
    assert codec.encode_observation([-9.0, 99.0]) == "<observation>0, 8</observation>"
    assert codec.decode_observation("<observation>2, 4</observation>").tolist() == [1.0, 5.0]


@pytest.mark.parametrize("said", ["1", "+1", "1.", "01", " 1 ", "1.0", "1e0", "0.1e1"])
def test_a_number_needs_no_decimal_point(said: str) -> None:
    parsed = ARM.decode_action(f"{said},0</action>")
    assert parsed.value is not None
    assert np.asarray(parsed.value).tolist() == [1.0, 0.0]
    assert ARM.decode_action("-1, .5</action>").problem == ""


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("1, 0", "it does not end with </action>"),
        ("1, 0</act", "it does not end with </action>"),
        ("</action>", "1 value where 2 belong"),
        ("1</action>", "1 value where 2 belong"),
        ("1, 0, 0</action>", "3 values where 2 belong"),
        ("1, left</action>", "'left' is not a number"),
        ("1, </action>", "'' is not a number"),
        ("1_0, 0</action>", "'1_0' is not a number"),
        ("١, 0</action>", "'١' is not a number"),
        ("0x1, 0</action>", "'0x1' is not a number"),
        ("nan, 0</action>", "'nan' is not finite"),
        ("0, -Inf</action>", "'-Inf' is not finite"),
        ("1e999, 0</action>", "'1e999' is not finite"),
        ("9" * 5000 + ", 0</action>", "'" + "9" * 37 + "...' is not finite"),
    ],
)
def test_what_is_no_action_is_said_in_words(said: str, problem: str) -> None:
    parsed = ARM.decode_action(said)
    assert (parsed.value, parsed.problem) == (None, problem)


@pytest.mark.parametrize(
    ("codec", "said", "problem"),
    [
        (CART, "2</action>", "'2' is none of 0 to 1"),
        (CART, "-1</action>", "'-1' is none of 0 to 1"),
        (CART, "1.0</action>", "'1.0' is not a whole number"),
        (CART, "1, 0</action>", "2 values where 1 belong"),
        (CART, "9" * 300 + "</action>", "'" + "9" * 37 + "...' is none of 0 to 1"),
        (replace(ARM, action_style="bins"), "0.5, 3</action>", "'0.5' is not a whole number"),
        (Codec(STATE, SIDES, action_style="name"), "up</action>", "'up' is none of left, none, Right side"),
    ],
)
def test_what_is_no_choice_is_said_in_words(codec: Codec, said: str, problem: str) -> None:
    parsed = codec.decode_action(said)
    assert (parsed.value, parsed.problem) == (None, problem)


@pytest.mark.parametrize(
    ("codec", "said", "value"),
    [
        (ARM, "-7, 0.5</action>", [-2.0, 0.5]),
        (ARM, "1e300, 0</action>", [2.0, 0.0]),
        (Codec(STATE, STATE), "0, 1e300</action>", [0.0, float(np.finfo(np.float32).max)]),
        (replace(ARM, action_style="bins"), "1000, -3</action>", [2.0, 0.0]),
    ],
)
def test_numbers_out_of_range_are_clipped_and_noticed(codec: Codec, said: str, value: list[float]) -> None:
    parsed = codec.decode_action(said)
    assert parsed.clipped
    assert np.asarray(parsed.value).tolist() == value
    assert not ARM.decode_action("-2, 1</action>").clipped


def test_a_name_is_read_in_any_case() -> None:
    codec = Codec(STATE, SIDES, action_style="name")
    assert codec.decode_action(" RIGHT side</action>").value == 1
    assert codec.decode_action("left</action>").value == -1


def test_what_stands_around_the_action_is_counted() -> None:
    assert CART.decode_action("1</action>").extra == 0
    assert CART.decode_action("1</action> and").extra == 4
    again = CART.decode_action("Sure:<action>1</action>\n<action>0</action>")  # said by a model that was not prefilled
    assert (again.value, again.extra) == (1, 5 + 1 + 18)


def test_the_prompt_says_what_the_numbers_mean_and_opens_the_answer() -> None:
    messages = CART.prompt([0.1, 2], system="Be quick.", examples=[([0, 0], 1)], goal="go left")
    assert messages == [
        {"role": "system", "content": "Be quick."},
        {
            "role": "user",
            "content": "You push a cart.\n"
            "The observation is 2 numbers, in this order: position (-4.8 to 4.8 m), velocity (m/s), between "
            "<observation> and </observation>.\n"
            "The action is one of 0 (left), 1 (right).\n"
            "Answer with the action between <action> and </action> and nothing else.\n\n"
            "Examples:\n<observation>0.00000, 0.00000</observation>\n<action>1</action>\n\n"
            "Goal: go left\n\n"
            "<observation>0.10000, 2.00000</observation>",
        },
        {"role": "assistant", "content": "<action>"},
    ]
    bare = replace(CART, instruction="").prompt([0, 0])
    assert bare[0]["content"] == "<observation>0.00000, 0.00000</observation>"


@pytest.mark.parametrize(
    ("action", "style", "words"),
    [
        (TORQUE, "float", "2 numbers, in this order: from -2 to 2, from 0 to 1"),
        (Space("box", (-1.0,) * 3, (1.0,) * 3), "float", "3 numbers, each from -1 to 1"),
        (Space("box", (-math.inf,), (math.inf,)), "float", "a number"),
        (Space("box", (-1.0,), (1.0,), names=("torque",)), "bins", "a whole number from 0 to 999: torque (-1 to 1)"),
        (SIDES, "index", "one of -1 (left), 0 (none), 1 (Right side)"),
        (SIDES, "name", "one of left, none, Right side"),
        (Space("discrete", n=11), "index", "a whole number from 0 to 10"),
    ],
)
def test_every_space_has_its_words(action: Space, style: Any, words: str) -> None:
    assert f"\nThe action is {words}.\n" in Codec(STATE, action, action_style=style).instructions()


@pytest.mark.parametrize(
    "codec",
    [
        CART,
        ARM,
        Codec(STATE, SIDES, "bins", "name", decimals=2, bins=9, observation_ranges=((-1, 1), (0, 2)), instruction=""),
    ],
)
def test_a_codec_is_json_and_back(codec: Codec) -> None:
    text = json.dumps(codec.to_json(), allow_nan=False)
    assert Codec.from_json(json.loads(text)) == codec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decimal": 3}, r"a codec has no 'decimal'. Did you mean 'decimals'\?"),
        ({"action": {"kind": "box"}}, "not a codec: KeyError: 'low'"),
        ({"observation_ranges": [1]}, "not a codec: TypeError"),
    ],
)
def test_what_is_no_codec_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Codec.from_json({**CART.to_json(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decimals": -1}, "decimals = -1, bins = 999"),
        ({"bins": 0}, "one bin makes two"),
        ({"action_style": "index"}, "action_style = 'index': numbers are written as 'float' or 'bins'."),
        ({"action_style": "bin"}, r"'bins'\. Did you mean 'bins'\?"),
        ({"observation_style": "bins"}, "value 1 of the observation has no bounds. Give observation_ranges"),
        (
            {"observation_style": "bins", "observation_ranges": ((0, 1),)},
            "for each of the 2 values. Give that many pairs",
        ),
        ({"observation_style": "bins", "observation_ranges": ((0, 1), (1, 1))}, "a finite lowest and a higher highest"),
        ({"action": Space("discrete", n=2), "action_style": "name"}, "no names of its own for its 2 choices"),
        ({"action": Space("discrete", n=2)}, "choices are written by 'index' or 'name'"),
    ],
)
def test_a_style_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(ARM, **change)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ARM.encode_observation([1.0]), r"1 numbers for an observation of 2: \[1.0\]"),
        (lambda: ARM.encode_observation([1.0, math.nan]), "is not a finite number"),
        (lambda: ARM.encode_action([1.0, math.inf]), "the action .* is not a finite number"),
        (lambda: CART.encode_action(2), "2 is no choice of the action: 0 to 1"),
        (lambda: CART.encode_action(0.5), "0.5 is no choice"),
        (lambda: CART.decode_observation("no tags"), "no <observation>"),
        (lambda: CART.decode_observation("<observation>1</observation>"), "'1' is not an observation: 1 value where"),
        (lambda: Space("box"), "is empty"),
        (lambda: Space("box", (0.0,), (1.0,), names=("a", "b")), "2 names for 1 values"),
        (lambda: measured_ranges([]), "rows of finite numbers"),
    ],
)
def test_numbers_that_cannot_be_written_or_read_are_refused(call: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


def test_the_default_action_is_in_the_space() -> None:
    assert CART.default_action() == 0
    assert Codec(STATE, SIDES, action_style="index").default_action() == -1
    assert np.asarray(Codec(STATE, Space("box", (0.5, -1.0), (1.0, 1.0))).default_action()).tolist() == [0.5, 0.0]
