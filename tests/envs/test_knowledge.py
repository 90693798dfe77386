"""The tables of Twenty Questions and the grammar over them."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.envs import knowledge
from echelon.envs.knowledge import Property, Thing, holds, properties, things, understand
from echelon.errors import DataError

KEYS = {prop.key for prop in properties()}


def means(text: str) -> str | None:
    """Key of the property or name of the thing that a text is about."""
    meaning = understand(text)
    return meaning.key if isinstance(meaning, Property) else meaning.name if isinstance(meaning, Thing) else None


def test_there_are_157_things_in_17_categories():
    assert len(things()) == len({thing.name for thing in things()}) == 157
    assert len(Counter(thing.category for thing in things())) == 17
    assert {thing.category for thing in things()} <= KEYS


def test_the_subset_is_the_published_one():
    assert [thing.name for thing in things(subset=True)] == [
        *("football", "dog", "banana", "truck", "pants", "computer", "piano", "chair", "pen", "scissors")
    ]


def test_every_listed_property_has_a_question():
    assert all(thing.properties <= KEYS for thing in things())


@pytest.mark.parametrize("subset", [False, True])
def test_any_two_things_differ_in_a_property(subset):
    for one, other in itertools.combinations(things(subset), 2):
        assert one.properties != other.properties, f"{one.name} and {other.name} cannot be told apart"


def test_no_property_is_true_of_all_or_none_or_the_same_things_as_another():
    true_of = [frozenset(thing.name for thing in things() if holds(prop, thing)) for prop in properties()]
    assert all(0 < len(names) < 157 for names in true_of)
    assert len(set(true_of)) == len(true_of)


@pytest.mark.parametrize("prop", properties(), ids=lambda prop: prop.key)
def test_every_wording_is_understood_as_its_property(prop):
    for wording in prop.wordings:
        assert understand(wording) is prop
        assert understand(wording.upper().rstrip("?") + " ?!") is prop


@pytest.mark.parametrize("thing", things(), ids=lambda thing: thing.name)
def test_every_name_of_a_thing_guesses_it(thing):
    for text in (thing.guess, *thing.names):
        assert understand(text) is thing
    for name in thing.names:
        for text in (
            f"Is it the {name}?",
            f"is it {name}s",
            f"I think it's a {name}!",
            f"Question 3: could it be {name}",
        ):
            assert understand(text) is thing, text


def test_canonical_utterances_are_short_regular_ascii():
    for text in [prop.question for prop in properties()] + [thing.guess for thing in things()]:
        assert text.isascii()
        assert text.endswith("?")
        assert 3 <= len(text.split()) <= 8


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("Is it an animal?", "animal"),
        ("animals", "animal"),
        ("Are they animals?", "animal"),
        ("is it a kind of fruit", "fruit"),
        ("Is it a dog?", "dog"),
        ("Is it dogs?", "dog"),
        ("dog", "dog"),
        ("My final guess is a dog", "dog"),
        ("Guess: the dog!", "dog"),
        ("Are you thinking of a dog?", "dog"),
        ("Is it a pair of scissors?", "scissors"),
        ("is it cherries", "cherry"),
        ("knives?", "knife"),
        ("Is it orange?", "orange"),
        ("does the object have wheels", "wheels"),
        ("Has it got wheels?", "wheels"),
        ("Is it something that has wheels?", "wheels"),
        ("Is it something with a screen?", "screen"),
        ("Can people eat it?", "food"),
        ("Do you eat it?", "food"),
        ("Is it something you can eat?", "food"),
        ("Could it be eaten?", "food"),
        ("Is it something you sit on?", "sit"),
        ("3. Is your secret thing alive?", "alive"),
        ("Is it red?", "red"),
        ("It is usually red.", "red"),
    ],
)
def test_free_wording(text, meaning):
    assert means(text) == meaning


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "?", "a", "is it", "does it", "Is it not a dog?", "Is it a dog? Is it a cat?", "Is it a unicorn?"),
        *("dog" * 100, "Is it a " + "very " * 100 + "big dog?", "犬ですか", "\u202e\x00"),
    ],
)
def test_what_is_outside_the_grammar_is_not_understood(text):
    assert understand(text) is None


@given(st.text(max_size=300))
def test_any_text_gets_a_meaning_or_none(text):
    assert understand(text) is None or understand(text) in (*properties(), *things())


@given(st.sampled_from([p.question for p in properties()]), st.sampled_from(things()))
def test_answers_are_the_table(question, thing):
    prop = understand(question)
    assert holds(prop, thing) == (prop.key in thing.properties)


def test_an_unknown_thing_is_a_data_error_with_a_suggestion():
    with pytest.raises(DataError, match=r"Nothing is known about 'footbal'.* Did you mean 'football'\?"):
        knowledge.thing("footbal")
