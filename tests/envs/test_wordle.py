"""Wordle: how letters are marked, the rules, and what chance and the best play earn."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.envs import check_env, load_env
from echelon.envs.players import corpus, make_player, measure, play
from echelon.envs.wordle import NOT_UNDERSTOOD, Plan, Wordle, at_best, bound, marks, plan, told, word_in, word_list
from echelon.errors import ConfigError, DataError
from echelon.types import Task

APPLE = Task("wordle/apple", {"word": "apple"})


def heard(step) -> str:
    (message,) = step.messages
    assert message["role"] == "user"
    return message["content"]


@pytest.mark.parametrize(
    ("guess", "word", "marked"),
    [
        ("apple", "apple", "+++++"),
        ("world", "apple", "---+-"),
        ("paper", "apple", "??+?-"),  # both p of the word are spent: one elsewhere, one in its place
        ("happy", "apple", "-?+?-"),
        ("puppy", "apple", "?-+--"),  # three p guessed, two in the word: the third one is marked as not in it
        ("salad", "apple", "-??--"),  # one a in the word: only the first of the two is marked
        ("grass", "glass", "+-+++"),
        ("sleep", "sheep", "+-+++"),
        ("eerie", "sheep", "??---"),  # two e in the word, three in the guess, none in its place
        ("geese", "sheep", "-?+?-"),  # the e in its place is spent before the one to its left
        ("sheep", "geese", "?-+?-"),
        ("aabbb", "bbaaa", "????-"),  # two b in the word, three in the guess
        ("llama", "small", "??+?-"),
    ],
)
def test_each_letter_is_marked_by_hand(guess, word, marked):
    assert marks(guess, word) == marked


def plainly(guess: str, word: str) -> str:
    """The published rule, letter by letter with a list to strike from."""
    left, marked = list(word), ["-"] * 5
    for i in range(5):
        if guess[i] == word[i]:
            marked[i] = "+"
            left.remove(guess[i])
    for i in range(5):
        if marked[i] == "-" and guess[i] in left:
            marked[i] = "?"
            left.remove(guess[i])
    return "".join(marked)


@given(st.text("abc", min_size=5, max_size=5), st.text("abc", min_size=5, max_size=5))
def test_marks_follow_the_rule_for_any_repeated_letters(guess, word):
    assert marks(guess, word) == plainly(guess, word)


def test_a_game_of_wordle():
    env = Wordle(APPLE)
    (opening,) = env.start()
    assert opening["content"] == (
        "Guess my five-letter word in 6 turns. + is a letter in its place, ? elsewhere, - not in it."
    )
    for said, answered in [
        ("paper", "p? a? p+ e? r-"),
        ("I say HAPPY!", "h- a? p+ p? y-"),
        ("crwth", NOT_UNDERSTOOD),
        ("house or mouse", NOT_UNDERSTOOD),
        ("", NOT_UNDERSTOOD),
    ]:
        step = env.step(said)
        assert (heard(step), step.reward, step.terminated, step.info) == (answered, -1.0, False, {})
    step = env.step("Is it apple?")
    assert (heard(step), step.reward, step.terminated, step.truncated) == ("a+ p+ p+ l+ e+", 0.0, True, False)
    assert step.info == {"win": 1.0, "turns": 6.0}


def test_the_sixth_turn_without_the_word_is_the_end_by_the_rules():
    env = Wordle(APPLE)
    steps = [env.step(said) for said in ("paper", "paper", "nonsense", "", "happy", "house")]
    assert [step.terminated for step in steps] == [False] * 5 + [True]
    assert not any(step.truncated for step in steps)
    assert sum(step.reward for step in steps) == -6
    assert steps[-1].info == {"win": 0.0, "turns": 6.0}


@pytest.mark.parametrize("settings", [{}, {"words": 200}, {"words": 1, "max_turns": 1}])
def test_wordle_keeps_every_rule(settings):
    check_env(load_env("wordle", settings))


def test_the_list_has_two_hundred_words_of_five_letters():
    words = word_list(200)
    assert len(set(words)) == 200
    assert all(len(word) == 5 and word.isascii() and word.isalpha() and word.islower() for word in words)
    assert word_list(50) == words[:50]
    assert not {"guess", "words", "maybe", "think"} & set(words)  # what one says around a guess


@pytest.mark.parametrize("words", [50, 200])
def test_both_splits_list_every_word_once(words):
    assert Wordle.tasks("train", words=words) == Wordle.tasks("test", words=words)
    assert tuple(task.data["word"] for task in Wordle.tasks("train", words=words)) == word_list(words)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        *(("apple", "apple"), ("APPLE!", "apple"), ("my guess is apple", "apple"), ("apple, apple", "apple")),
        *(
            ("apple house", None),
            ("", None),
            ("apples", None),
            ("a p p l e", None),
            ("appl\u0435", None),
            ("x" * 9999, None),
        ),
        *(("never", None), ("東京", None), ("apple" * 2, None)),
    ],
)
def test_a_text_is_a_guess_when_it_names_one_word_of_the_list(text, word):
    assert word_in(text, word_list(50)) == word


@given(st.text(max_size=300))
def test_any_text_is_answered(text):
    assert heard(Wordle(APPLE).step(text))


def test_a_word_beyond_the_setting_is_outside_the_list():
    beyond = word_list(51)[-1]
    assert heard(Wordle(APPLE).step(beyond)) == NOT_UNDERSTOOD
    assert heard(Wordle(APPLE, words=51).step(beyond)) == told(beyond, marks(beyond, "apple"))


def chance(words: int, turns: int = 6) -> float:
    """Exact mean return of a player who says any word of the list each turn."""
    return -sum((1 - 1 / words) ** turn for turn in range(1, turns + 1))


@pytest.mark.parametrize(("words", "expected"), [(50, -5.5937), (5, -2.9514)])
def test_chance_in_wordle(words, expected):
    assert chance(words) == pytest.approx(expected, abs=1e-4)
    got = measure(load_env("wordle", {"words": words}), "random", rounds=3000 // words)
    assert got.reward == pytest.approx(expected, abs=4 * got.error)


@pytest.mark.parametrize(("words", "expected"), [(1, 0), (2, -0.5), (10, -1.0), (50, -1.26), (100, -1.54)])
def test_the_best_play_earns_the_bound(words, expected):
    got = measure(load_env("wordle", {"words": words}), "optimal")
    assert got.reward == pytest.approx(bound(words)) == pytest.approx(expected)
    assert got.wins == 1.0
    assert bound(words) <= at_best(words)


def test_the_best_play_wins_with_all_words_in_few_turns():
    got = measure(load_env("wordle", {"words": 200}), "optimal")
    assert got.wins == 1.0
    assert got.reward == pytest.approx(bound(200))


def brute_force(words: tuple[str, ...], left: frozenset[str]) -> float:
    """The best expected return, by trying every word that tells anything, with nothing cut off."""
    if len(left) == 1:
        return 0.0
    options = []
    for guess in words:
        parts: dict[str, set[str]] = {}
        for word in left - {guess}:
            parts.setdefault(marks(guess, word), set()).add(word)
        rest = [frozenset(part) for part in parts.values()]
        if rest != [left]:
            options.append(sum(len(part) * (brute_force(words, part) - 1) for part in rest) / len(left))
    return max(options)


LOOKALIKES = [("light", "night", "right", "sight", "fight", "tight"), ("aabbb", "ababb", "bbaba", "bbbaa", "abbba")]


@pytest.mark.parametrize("words", LOOKALIKES)
def test_the_plan_is_as_good_as_trying_everything_among_lookalikes(words):
    assert Plan(words).move((1 << len(words)) - 1)[0] == pytest.approx(brute_force(words, frozenset(words)))


def test_the_plan_is_as_good_as_trying_everything():
    draw = random.Random(0)
    for _ in range(10):
        words = tuple(draw.sample(word_list(200), k=12))
        left = frozenset(draw.sample(words, k=6))
        members = sum(1 << i for i, word in enumerate(words) if word in left)
        assert Plan(words).move(members)[0] == pytest.approx(brute_force(words, left))


def test_words_that_differ_in_one_letter_are_tried_one_after_the_other():
    """Of six words that end alike each guess strikes out itself only: 0 to 5 turns lost, with equal probability."""
    assert Plan(LOOKALIKES[0]).move(0b111111)[0] == pytest.approx(-sum(range(6)) / 6)


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, -0.5), (4, -0.75)])
def test_what_nobody_can_beat_by_hand(count, most):
    assert at_best(count) == most


@pytest.mark.parametrize("kind", ["random", "optimal"])
def test_players_are_functions_of_seed_and_dialogue(kind):
    spec = load_env("wordle")
    first = play(spec, APPLE, make_player(spec, kind, seed=5))
    assert play(spec, APPLE, make_player(spec, kind, seed=5)) == first


def test_the_optimal_player_keeps_the_words_that_fit_whoever_said_what():
    spec = load_env("wordle")
    for task, first in itertools.product(spec.tasks("test")[:10], ("house", "blorp", "")):
        env = spec.make(task)
        messages = [*env.start(), {"role": "assistant", "content": first}, *env.step(first).messages]
        said = plan(50).say(messages)
        assert word_in(said, word_list(50)) == said
        assert first != "house" or said != first or task.data["word"] == "house"


def test_the_corpus_holds_all_that_is_said():
    texts = corpus(load_env("wordle"))
    assert set(Wordle.utterances()) | {NOT_UNDERSTOOD, "a+ p+ p+ l+ e+"} <= set(texts)


def test_openings_are_short():
    assert len(Wordle(APPLE).start()[0]["content"].split()) < 25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"words": 0}, "wordle: words = 0: the list has 200. Use 1 to 200."),
        ({"words": 201}, "wordle: words = 201: the list has 200. Use 1 to 200."),
        ({"max_turns": 0}, "wordle: max_turns = 0: a game needs a turn. Use 1 or more."),
    ],
)
def test_settings_that_make_no_game(settings, message):
    with pytest.raises(ConfigError) as error:
        load_env("wordle", settings).tasks("train")
    assert str(error.value) == message


def test_a_task_of_other_settings_is_refused():
    beyond = word_list(200)[-1]
    with pytest.raises(
        DataError, match=rf"wordle: '{beyond}' is not one of the first 50 words.*the task's own settings"
    ):
        Wordle(Task("", {"word": beyond}))
