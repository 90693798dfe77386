"""Guess My City: the table, what is understood, that no answer names the city, and what chance and the best earn."""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.envs import check_env, load_env
from echelon.envs.guess_my_city import (
    HIDDEN,
    NO,
    NOT_UNDERSTOOD,
    SUBSET,
    YES,
    City,
    Fact,
    GuessMyCity,
    Plan,
    answer,
    at_best,
    bound,
    cities,
    city,
    facts,
    names_city,
    plan,
    understand,
)
from echelon.envs.players import corpus, make_player, measure, play
from echelon.errors import ConfigError, DataError
from echelon.types import Task

PARIS = Task("guess_my_city/Paris", {"city": "Paris"})


def heard(step) -> str:
    (message,) = step.messages
    assert message["role"] == "user"
    return message["content"]


def means(text: str) -> str | None:
    """Key of the fact or name of the city that a text is about."""
    meaning = understand(text)
    return meaning.key if isinstance(meaning, Fact) else meaning.name if isinstance(meaning, City) else None


def test_a_game_of_guess_my_city():
    env = GuessMyCity(PARIS)
    (opening,) = env.start()
    assert opening["content"] == (
        "Guess my city in 20 turns. Ask, like: Which country is it in? Or guess: Is it Atlantis?"
    )
    for said, told in [
        ("Which continent is it on?", "Europe."),
        ("What language is spoken there?", "French."),
        ("Is it on the coast?", "Not on the sea."),
        ("Which river is it on?", "On the Seine."),
        ("Is it a capital?", "The capital."),
        ("Is it Brussels?", "No."),
        ("Blorp?", "I did not understand."),
    ]:
        step = env.step(said)
        assert (heard(step), step.reward, step.terminated, step.info) == (told, -1.0, False, {})
    step = env.step("Is it Paris?")
    assert (heard(step), step.reward, step.terminated, step.truncated) == ("Yes.", 0.0, True, False)
    assert step.info == {"win": 1.0, "turns": 8.0}


def test_the_twentieth_turn_without_the_answer_is_the_end_by_the_rules():
    env = GuessMyCity(PARIS)
    steps = [env.step("Is it Rome?") for _ in range(20)]
    assert [step.terminated for step in steps] == [False] * 19 + [True]
    assert not any(step.truncated for step in steps)
    assert sum(step.reward for step in steps) == -20
    assert steps[-1].info == {"win": 0.0, "turns": 20.0}


@pytest.mark.parametrize("settings", [{}, {"subset": True}, {"max_turns": 1}])
def test_the_game_keeps_every_rule(settings):
    check_env(load_env("guess_my_city", settings))


def test_there_are_a_hundred_cities_in_six_continents():
    assert len(cities()) == len({city.name for city in cities()}) == 100
    continents = Counter(city.facts["continent"] for city in cities())
    assert set(continents) - {"Europe and Asia"} == {
        *("Africa", "Asia", "Europe", "North America", "Oceania", "South America")
    }
    assert all(city.facts[fact.key] for city in cities() for fact in facts())


def test_both_splits_list_every_city_once():
    assert GuessMyCity.tasks("train") == GuessMyCity.tasks("test")
    assert [task.data["city"] for task in GuessMyCity.tasks("train")] == [city.name for city in cities()]
    assert [task.data["city"] for task in GuessMyCity.tasks("train", subset=True)] == list(SUBSET)
    assert len(SUBSET) == 10


def test_any_two_cities_differ_in_an_answer():
    for one, other in itertools.combinations(cities(), 2):
        assert any(answer(fact, one) != answer(fact, other) for fact in facts()), f"{one.name} and {other.name}"


def test_what_is_on_the_same_side_of_the_equator_is_so_by_country():
    """No country of the table is told to be on two continents or, but for those it crosses, in two hemispheres."""
    where: dict[str, set[str]] = {}
    for each in cities():
        where.setdefault(each.facts["country"], set()).add(each.facts["continent"])
    assert {country for country, continents in where.items() if len(continents) > 1} == {"Turkey"}
    south = {each.facts["country"] for each in cities() if each.facts["hemisphere"].startswith("south")}
    north = {each.facts["country"] for each in cities() if each.facts["hemisphere"].startswith("north")}
    assert not south & north


def everything_said() -> list[str]:
    """Every wording of every question, questions that name a value of any city, and every guess."""
    said = [wording for fact in facts() for wording in fact.wordings]
    said += [f"Is it {other.facts[fact.key]}?" for fact in facts() for other in cities()]
    said += [f"Is it {name}?" for other in cities() for name in other.names]
    return list(dict.fromkeys(said))


@pytest.mark.parametrize("secret", cities(), ids=lambda secret: secret.name)
def test_no_answer_names_the_city(secret):
    """Looked for as plainly as one can: no name, former name or name without its "City" is anywhere in the answer."""
    names = [name.lower() for name in secret.names]
    names += [name.removesuffix(" city") for name in names]
    for said in everything_said():
        env = GuessMyCity(Task(secret.name, {"city": secret.name}))
        told = heard(env.step(said)).lower()
        assert not [name for name in names if name in told], (said, told)
    assert not [name for name in names if name in GuessMyCity(Task("", {"city": secret.name})).start()[0]["content"]]


def test_what_is_hidden_is_exactly_what_would_name_the_city():
    hidden = {(each.name, fact.key) for each in cities() for fact in facts() if answer(fact, each) == HIDDEN}
    assert hidden == {
        *((name, "country") for name in ("Luxembourg", "Singapore", "Tunis")),
        *((f"{name} City", "country") for name in ("Guatemala", "Kuwait", "Mexico", "Panama")),
        ("Luxembourg", "language"),
        ("Singapore", "sea"),
        *((name, "river") for name in ("Brisbane", "Detroit", "Ho Chi Minh City", "Medellin", "Moscow", "Ottawa")),
    }


@pytest.mark.parametrize(
    ("text", "name", "named"),
    [
        ("Mexico", "Mexico City", True),
        ("the New Mexico desert", "Mexico City", True),
        ("Tunisia", "Tunis", True),
        ("on the MOSKVA", "Moscow", True),
        ("São Paulo", "Sao Paulo", True),
        ("Algeria", "Tunis", False),
        ("the capital", "Mexico City", False),
    ],
)
def test_a_name_is_found_inside_words_and_without_accents_or_city(text, name, named):
    assert names_city(text, city(name)) is named


@pytest.mark.parametrize("fact", facts(), ids=lambda fact: fact.key)
def test_every_wording_is_understood_as_its_fact(fact):
    assert len(fact.wordings) >= 5
    for wording in fact.wordings:
        assert understand(wording) is fact, wording
        assert understand(wording.upper().rstrip("?") + " ?!") is fact


@pytest.mark.parametrize("secret", cities(), ids=lambda secret: secret.name)
def test_every_name_of_a_city_guesses_it(secret):
    for name in secret.names:
        for text in (name, f"Is it {name}?", f"is it {name.upper()}", f"I think it's {name}!", f"Guess: {name}."):
            assert understand(text) is secret, text
        assert heard(GuessMyCity(Task("", {"city": secret.name})).step(f"Is the city {name}?")) == YES


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("Which continent?", "continent"),
        ("Is it in Europe?", "continent"),
        ("Is your city in France?", "country"),
        ("Is it in the USA?", "country"),
        ("Is it in Mexico?", "country"),
        ("Do they speak French there?", "language"),
        ("Is French spoken in the city?", "language"),
        ("Is it by the Mediterranean?", "sea"),
        ("Is it on the Danube?", "river"),
        ("What's the weather like?", "climate"),
        ("What is the city's population?", "size"),
        ("Can you tell me what continent it is on?", "continent"),
        ("Question 3: Is it a capital?", "capital"),
        ("Is there an opera house?", "landmark"),
        ("Is it known for wine?", "fame"),
        ("My final guess is São Paulo", "Sao Paulo"),
        ("Is it in Singapore?", "Singapore"),
        ("Are you from Tokyo?", "Tokyo"),
        ("Is Mexico City it?", "Mexico City"),
        ("Peking", "Beijing"),
    ],
)
def test_free_wording(text, meaning):
    assert means(text) == meaning


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "?", "is it", "which", "Is it not Paris?", "Is it Paris? Is it Rome?", "Is it Atlantis?"),
        *(
            "Is it in Europe or Asia?",
            "Paris" * 100,
            "Is it " + "the " * 100 + "Paris?",
            "東京",
            "\u202e\x00",
            "<|end|>",
        ),
    ],
)
def test_what_is_outside_the_grammar_is_not_understood(text):
    assert understand(text) is None
    assert heard(GuessMyCity(PARIS).step(text)) == NOT_UNDERSTOOD


@given(st.text(max_size=300))
def test_any_text_gets_a_meaning_or_none(text):
    assert understand(text) is None or understand(text) in (*facts(), *cities())


def test_a_question_that_names_a_value_is_answered_with_the_true_one():
    env = GuessMyCity(PARIS)
    assert heard(env.step("Is it in Asia?")) == heard(env.step("Which continent is it on?")) == "Europe."


def test_every_utterance_of_the_players_is_understood():
    assert [means(text) for text in GuessMyCity.utterances(subset=True)] == [fact.key for fact in facts()] + list(
        SUBSET
    )
    assert len(GuessMyCity.utterances()) == 11 + 100


def chance(count: int, guess: float = 0.5, turns: int = 20) -> float:
    """Exact mean return of a player who names a random city with probability `guess` each turn."""
    return -sum((1 - guess / count) ** turn for turn in range(1, turns + 1))


@pytest.mark.parametrize(("subset", "count", "expected"), [(True, 10, -12.1887), (False, 100, -18.9825)])
def test_chance_in_guess_my_city(subset, count, expected):
    assert chance(count) == pytest.approx(expected, abs=1e-4)
    got = measure(load_env("guess_my_city", {"subset": subset}), "random", rounds=2000 // count)
    assert got.reward == pytest.approx(expected, abs=4 * got.error)


@pytest.mark.parametrize(("subset", "expected"), [(True, -1.1), (False, -1.57)])
def test_the_best_play_earns_the_bound(subset, expected):
    got = measure(load_env("guess_my_city", {"subset": subset}), "optimal")
    assert got.reward == pytest.approx(bound(subset)) == pytest.approx(expected)
    assert got.wins == 1.0
    assert bound(subset) <= at_best(len(cities(subset)))


def brute_force(left: tuple[City, ...]) -> float:
    """The best expected return, by trying every question and every guess, with nothing cut off."""
    if len(left) == 1:
        return 0.0
    options = []
    for secret in left:
        others = tuple(other for other in left if other is not secret)
        options.append(len(others) / len(left) * (brute_force(others) - 1))
    for fact in facts():
        parts: dict[str, list[City]] = {}
        for each in left:
            parts.setdefault(answer(fact, each), []).append(each)
        if len(parts) > 1:
            options.append(sum(len(part) * (brute_force(tuple(part)) - 1) for part in parts.values()) / len(left))
    return max(options)


LOOKALIKES = ("Guatemala City", "Mexico City", "Panama City", "Kuwait City", "Quito", "Bogota")


@pytest.mark.parametrize(
    "names", [SUBSET[:5], SUBSET[5:], LOOKALIKES, ("Paris",), ("Paris", "Rome"), ("Agra", "Delhi", "Rome")]
)
def test_the_plan_is_as_good_as_trying_everything(names):
    chosen = tuple(city(name) for name in names)
    assert Plan(chosen).move((1 << len(chosen)) - 1)[0] == pytest.approx(brute_force(chosen))


def test_the_plan_is_as_good_as_trying_everything_where_one_question_is_not_enough():
    draw = random.Random(0)
    english = [each for each in cities() if each.facts["country"] == "the United States"]
    for _ in range(5):
        chosen = tuple(draw.sample(english, k=6))
        assert Plan(chosen).move(63)[0] == pytest.approx(brute_force(chosen))


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, -0.5), (3, -1), (100, -1)])
def test_what_nobody_can_beat_by_hand(count, most):
    assert at_best(count) == most


@pytest.mark.parametrize("kind", ["random", "optimal"])
def test_players_are_functions_of_seed_and_dialogue(kind):
    spec = load_env("guess_my_city")
    first = play(spec, PARIS, make_player(spec, kind, seed=5))
    assert play(spec, PARIS, make_player(spec, kind, seed=5)) == first


def test_the_optimal_player_copes_with_what_it_did_not_say():
    """Guesses that were wrong and texts that were not understood leave it the cities they should."""
    env = GuessMyCity(Task("", {"city": "Venice"}), subset=True)
    messages = list(env.start())
    for said in ("Blorp?", "Is it Rome?", "Which country is it in?"):
        messages += [{"role": "assistant", "content": said}, *env.step(said).messages]
    assert plan(subset=True).say(messages) == "Is it Venice?"


def test_the_corpus_holds_all_that_is_said():
    texts = corpus(load_env("guess_my_city", {"subset": True}))
    assert set(GuessMyCity.utterances(subset=True)) | {NOT_UNDERSTOOD, YES, NO} <= set(texts)
    assert all(text.isascii() for text in texts)


def test_openings_are_short():
    assert len(GuessMyCity(PARIS).start()[0]["content"].split()) < 25
    assert "Atlantis" not in [name for each in cities() for name in each.names]


def test_what_cannot_be_played_says_so():
    with pytest.raises(ConfigError, match=r"guess_my_city: max_turns = 0: a game needs a turn. Use 1 or more."):
        GuessMyCity.tasks("train", max_turns=0)
    with pytest.raises(ConfigError, match=r"guess_my_city has no split 'tests'."):
        GuessMyCity.tasks("tests")
    with pytest.raises(ConfigError, match=r"guess_my_city has no 'best' player."):
        GuessMyCity.player("best")
    with pytest.raises(DataError, match=r"Nothing is known about 'Pariss'.* Did you mean 'Paris'\?"):
        GuessMyCity(Task("", {"city": "Pariss"}))
