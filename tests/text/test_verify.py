"""Right, wrong, or no answer at all: each check on the ways people and models write."""

from __future__ import annotations

import subprocess
import sys

import pytest

from echelon.text.verify import (
    Unread,
    check_choice,
    check_exact,
    check_math,
    check_number,
    is_plain,
    read_number,
    repeats,
    stated_answer,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"First \boxed{3}, no: \boxed{4}", "4"),
        (r"\boxed{3} and then \boxed{4", "3"),
        ("2 + 2\n#### 4\n", "4"),
        ("The answer is $x+1$. I hope it is correct.", "x+1"),
        ("**Answer:** 42", "42"),
        ("The answer is 3.5. Or so.", "3.5"),
        ("the final answer to the question is: Paris", "Paris"),
        ("Thinking.\nBlue.\n", "Blue"),
        ("The answers are $1$ and $-2$.", "$1$ and $-2$"),
    ],
)
def test_the_last_answer_that_is_stated_counts(text: str, answer: str) -> None:
    assert stated_answer(text) == answer


def test_nothing_states_nothing() -> None:
    assert stated_answer(" \n ") is None
    assert stated_answer("") is None


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Paris", True),
        ("I think so.\n  paris. ", True),
        ("The answer is **Paris**.", True),
        (r"\boxed{\text{Paris}}", True),
        ("Paris is lovely", False),
        ("London", False),
        ("", None),
    ],
)
def test_exact_words(text: str, right: bool | None) -> None:
    assert check_exact(text, "Paris").right is right


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "(B)",
        "B.",
        "b",
        "The answer is B.",
        "The answer is (B) because it is blue.",
        "Answer: **B**",
        r"\boxed{B}",
        r"\boxed{\text{(B) blue}}",
        "Not A, not C.\nSo the correct option is B",
        "I choose B, not A",
        "B) blue",
        "**B. blue**",
        "It must be blue.\nblue",
        "The answer is blue.",
        "At first the answer is A. No: the answer is B.",
        "The answer is A or C? No. The answer is $\\textbf{(B)}$",
    ],
)
def test_letters_in_the_usual_phrases(text: str) -> None:
    assert check_choice(text, "B", ["red", "blue", "green"]).right is True
    assert check_choice(text, "C", ["red", "blue", "green"]).right is False


@pytest.mark.parametrize(
    "text", ["", "A dog is a mammal", "The answer is a colour", "The answer is A or B", "I do not know", r"\boxed{7}"]
)
def test_no_letter_is_no_answer(text: str) -> None:
    found = check_choice(text, "A", ["red", "blue"])
    assert found.right is None
    assert found.why


def test_a_letter_beyond_the_choices_is_wrong() -> None:
    assert check_choice("The answer is J", "A", ["red", "blue"]).right is False


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("#### 1234", "1,234"),
        ("The answer is $1,234.", "1234"),
        ("It is 1,234.00 dollars.", "1234"),
        ("The answer is 5 apples, of 12.", "5"),
        ("3 + 4 = 7", "7"),
        ("The answer is 3 + 4 = 7.", "7"),
        (r"\boxed{x = -3}", "-3"),
        ("so −3", "-3"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        ("1 1/2 cups", "1.5"),
        ("20%", "20"),
        (r"\boxed{20\%}", "20"),
        ("£5.50", "5.5"),
        ("5.", "5"),
        (r"\boxed{11,\! 111}", "11111"),
        (r"\boxed{18 \text{ eggs}}", "18"),
        ("0.50", "1/2"),
    ],
)
def test_numbers_are_exact_whatever_is_written_around_them(text: str, gold: str) -> None:
    assert check_number(text, gold).right is True
    assert check_number(text, f"{read_number(gold) + 1}").right is False  # type: ignore[operator]


def test_numbers_are_fractions_and_never_floats() -> None:
    assert check_number("0.333333333333333", "1/3").right is False
    assert check_number("0.1", "1/10").right is True
    assert check_number("100000000000000000001", "100000000000000000000").right is False


@pytest.mark.parametrize("text", ["I do not know.", r"\boxed{3 \text{ or } 4}", r"\boxed{x^2}", "", r"\boxed{\pi}"])
def test_no_number_is_no_answer(text: str) -> None:
    assert check_number(text, "3").right is None


def test_a_right_answer_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="is no number"):
        check_number("3", "three")


def refuses(said: str, gold: str) -> bool:
    raise AssertionError(f"{said} and {gold} need no library")


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        ("0.5", r"\frac{1}{2}", True),
        (r"\dfrac12", "0.50", True),
        (r"-\frac{1}{2}", r"\frac{-1}{2}", True),
        ("1000", "1{,}000", True),
        ("11111111100", r"11,\! 111,\! 111,\! 100", True),
        ("10", "1000", False),
        ("052", "52", True),
        ("90", r"90^\circ", True),
        (r"90^{\circ}", "90", True),
        (r"18.90\text{ dollars}", r"\$18.90", True),
        ("5 cm", "5", True),
        (r"5\text{ cm}^2", "5", True),
        (r"50\%", "50", True),
        (r"\text{(C)}", "C", True),
        ("C", r"\text{(C)}", True),
        ("D", r"\text{(C)}", False),
        ("East", r"\text{east}", True),
        ("seat", r"\text{east}", False),
        (r"\text{Evelyn}", "Evelyn", True),
        ("nylevE", "Evelyn", False),
        ("52_8", "52_{8}", True),
        ("52", "52_8", True),
        ("52_9", "52_8", False),
        ("53_8", "52_8", False),
        ("6:30", r"\text{6:30}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True),
        (r"\dfrac{\pi}{3}", r"\frac{\pi}{3}", True),
    ],
)
def test_mathematics_that_needs_no_library(said: str, gold: str, right: bool) -> None:
    assert check_math(rf"Thus \boxed{{{said}}}.", gold, refuses).right is right


def test_sentences_are_not_formulas() -> None:
    assert check_math("We get x = 5, so there are 5 apples.", "5", refuses).right is True
    assert check_math("The answer is 12 dollars because 3*4", "12", refuses).right is None
    assert check_math("I do not know.", "5", refuses).why == "it states words, or words and formulas mixed"
    assert check_math("", "5", refuses).why == "it says nothing"
    assert check_math(r"\boxed{" + "1+" * 300 + "1}", "5", refuses).why == "it states no answer, only a long line"


def finding(call: str) -> str:
    """What a check finds, in a process that is ended after a minute."""
    program = f"from echelon.text.verify import check_choice, check_exact, check_math\nprint({call}.right)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return found.stdout.strip()


def test_a_number_before_a_long_sentence_takes_no_longer_than_its_words() -> None:
    words = " ".join(["because the children bought several more oranges yesterday together with"] * 3)
    assert finding(f"check_math('The answer is 12 apples {words} (see above)', '12')") == "None"
    assert finding(f"check_math('The answer is 12 apples {words}', '12')") == "True"


@pytest.mark.parametrize("check", ["check_exact", "check_choice"])
def test_a_long_gap_takes_no_longer_than_its_blanks(check: str) -> None:
    assert finding(f"{check}('The answer' + ' ' * 40_000 + 'x', 'B')") in ("False", "None")
    assert finding(f"{check}('The answer' + ' ' * 40_000 + 'is **B**', 'B')") == "True"


def test_a_word_said_without_end_takes_no_longer_than_its_words() -> None:
    assert finding("check_choice('option ' * 20_000 + 'x', 'B')") == "None"


def test_digits_without_end_are_no_number() -> None:
    for answer in ("3" * 4400, "1/" + "3" * 4400, "1 2/" + "3" * 4400):
        assert check_number(f"So the answer is {answer}", "7").right is not True
        assert check_number(rf"\boxed{{{answer}}}", "7").right is None
        assert not is_plain(answer)
    assert check_number("So the answer is " + "3" * 900, "3" * 900).right is True


def test_without_a_library_formulas_cannot_be_read_and_numbers_can() -> None:
    assert check_math(r"\boxed{\sqrt{4}}", "2").why == "it is no number, and math-verify is not installed"
    assert check_math(r"\boxed{2}", "2").right is True
    assert check_math(r"\boxed{3}", "2").right is False
    assert is_plain("2")
    assert is_plain(r"\text{east}")
    assert not is_plain(r"2\sqrt{3}")


def test_what_a_library_cannot_read_is_no_answer_and_says_why() -> None:
    def compare(said: str, gold: str) -> bool:
        raise Unread("it took too long")

    found = check_math(r"\boxed{9^{9^{9}}}", "x", compare)
    assert (found.right, found.why) == (None, "it took too long")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("The answer is 5.", r"\boxed{5}", True),
        ("The answer is 5.0", "5", True),
        ("The answer is 5.", "The answer is 6.", False),
        ("```python\nx = 1\n```", "Again:\n```python\nx = 1\n\n```", True),
        ("```python\nx = 1\n```", "```python\nx = 2\n```", False),
        ("Paris", "paris.", True),
        ("", "", True),
        ("", "5", False),
    ],
)
def test_an_answer_is_repeated_whatever_is_said_around_it(one: str, other: str, same: bool) -> None:
    assert repeats(one, other) is same
