r"""Whether a text gives the right answer: the same words, the same letter, the same number, the same mathematics.

Each check takes a text and the right answer and says right, wrong, or that no answer can be read, and why. It knows no
library of mathematics: one that does is handed in, for what is neither a number nor words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from echelon.text.parse import LONGEST_NUMBER, as_number, marked_answer, program_in

Compare = Callable[[str, str], bool]
"""Whether two formulas in LaTeX, the right one last, mean the same. Raises Unread where it cannot tell."""

LETTERS = "ABCDEFGHIJ"
"""What choices are called, at most ten."""


class Unread(ValueError):
    """No answer could be read; the message says why. It counts as no answer, not as a wrong one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found."""

    right: bool | None
    """None: no answer could be read."""
    why: str = ""
    """Why none could be read."""


# `*+` takes all and never gives back: it saves the time of trying every division of a long text that does not match.
_STATED = re.compile(
    r"(?:\banswers?|\bresult|\bsolutions?)\b(?:\s++(?:to|for)\b[^.\n:]{0,80}?)?\s*+(?:\*\*)?+\s*+"
    r"(?:(?:is|are|equals|would be|must be)\b\s*:?|[:=])\s*(?:\*\*)?\s*",
    re.IGNORECASE,
)
_DOLLARS = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)|(?<=\S)\s+I hope\b")


def stated_answer(text: str) -> str | None:
    r"""The answer that a text ends with: the last \boxed{…}, what follows ####, what follows the last "answer is", or
    the last line. As it was written, but without dollar signs around it. None if the text says nothing.
    """
    marked = marked_answer(text)
    if marked is not None:
        return bare(marked)
    if found := stated_after(text):
        return bare(found)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return bare(lines[-1]) if lines else None


def stated_after(text: str) -> str | None:
    """What follows the last "answer is" or "answer:" that something follows, up to the end of the sentence."""
    for found in reversed(list(_STATED.finditer(text))):
        rest = text[found.end() :].lstrip()
        formula = _DOLLARS.match(rest)
        if formula and not re.match(r"\s*(?:,|and\b|or\b)\s*[\\$\d]", rest[formula.end() :]):
            return formula[0]
        end = _SENTENCE_END.search(rest)
        said = rest[: end.start()] if end else rest
        if said.strip():
            return said.strip()
    return None


def bare(text: str) -> str:
    """Without emphasis, the dollar signs of a formula, and a full stop at the end."""
    text = text.strip().strip("*_`").strip()
    text = text[:-1].rstrip() if text.endswith((".", ",", ";")) and not text.endswith("\\,") else text
    whole = _DOLLARS.fullmatch(text)
    inside = next((group for group in whole.groups() if group is not None), "$") if whole else "$"
    text = text if "$" in inside.replace(r"\$", "") else inside
    return text.strip().strip("*").strip()


def check_exact(text: str, gold: str) -> Finding:
    """Whether the answer is the right words: case, spaces, and marks around it do not count.

    The answer is what the text states, or all of it.
    """
    if not text.strip():
        return Finding(None, "it says nothing")
    stated = stated_answer(text)
    said = {_words(text)} | ({_words(stated)} if stated is not None else set())
    return Finding(_words(gold) in said)


def _words(text: str) -> str:
    inner = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    return " ".join(inner.split()).strip(" \"'`*_.,;:!?()[]{}$").casefold()


_ONE_LETTER = r"\(?\[?\{?(?P<letter>[A-J])\}?\]?\)?"
_LETTER_STATED = re.compile(
    r"(?:(?i:answer|option|choice|choose|select|pick|answered|it'?s|must\s+be))"
    r"(?:\s+(?i:is|should\s+be|would\s+be|must\s+be|option|choice|letter|to\s+go\s+with|with)|\s*[:=\-–]){0,20}"
    rf"[\s*_\"'$]*+(?:\\(?:text|textbf|mathbf|mathrm|boxed)\{{)*+[\s*_\"'$]*+{_ONE_LETTER}(?![A-Za-z'])"
    r"(?=(?P<rest>[^\n]{0,40}))"
)
_LETTER_LINE = re.compile(rf"^[\s*_\"'$#>-]*{_ONE_LETTER}(?:[\s*_\"'$]*$|[\s*_]*[).:\]][\s*_]*(?P<rest>.*)$)")
_TWO = re.compile(r"^[\s*_)\]]*(?:or|and|,|/|&)[\s*_(]*[A-J]\b")
_GOES_ON = re.compile(r"^\s+(?!because\b|since\b|as\b|for\b|is\b|with\b|which\b|due\b|and\b|or\b)[a-z]")


def check_choice(text: str, gold: str, choices: Sequence[str] = ()) -> Finding:
    """Whether the letter that a text settles on is the right one; the words of a choice stand for its letter.

    `gold` is a letter. A letter beyond the choices is a wrong answer; two letters, or none, are no answer.
    """
    try:
        return Finding(chosen_letter(text, choices) == gold)
    except Unread as unread:
        return Finding(None, str(unread))


def chosen_letter(text: str, choices: Sequence[str] = ()) -> str:
    r"""The letter that a text settles on: in \boxed{…}, after "answer is", alone on a line, or by a choice's words.

    The last place counts. Raises Unread.
    """
    marked = marked_answer(text)
    if marked is not None:
        return _letter_of(marked, choices, f"'{marked[:40]}' is no choice")
    for found in reversed(list(_LETTER_STATED.finditer(text))):
        if _TWO.match(found["rest"]):
            raise Unread("it names two choices")
        if found["letter"] in "AI" and _GOES_ON.match(found["rest"]):
            continue  # a word, not a letter
        return found["letter"]
    stated = stated_after(text)
    if stated is not None:
        return _letter_of(stated, choices, "it states no choice")
    lines = [line for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if alone := _LETTER_LINE.match(line):
            return alone["letter"]
    return _letter_of(lines[-1] if lines else "", choices, "it names no choice")


def _letter_of(answer: str, choices: Sequence[str], otherwise: str) -> str:
    """The letter that an answer is or begins with, or whose choice it says in words."""
    plain = re.sub(r"\\(?:text|textbf|mathbf|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", answer).strip(" $*_`\"'.")
    if re.fullmatch(r"[\[({]*[A-Ja-j][\])}]*", plain):
        return plain.strip("[](){}").upper()
    if found := _LETTER_LINE.match(plain):
        return found["letter"]
    same = [LETTERS[place] for place, choice in enumerate(choices) if _words(str(choice)) == _words(plain)]
    if len(same) == 1:
        return same[0]
    raise Unread(otherwise)


_UNICODE = str.maketrans({"−": "-", "–": "-", "—": "-", "×": "*", "⁄": "/", "\u00a0": " ", "\u202f": " "})
_MIXED = re.compile(r"(?P<sign>[-+]?)\s*(?P<whole>\d+)\s+(?P<above>\d+)/(?P<below>\d+)")
_AMOUNT = re.compile(
    r"(?<![\w.])[-+]?\s?(?:\\?\$|€|£|¥|USD\s?)?\s?(?:\d+\s+\d+/\d+|\d[\d,]*(?:\.\d+)?(?:\s?/\s?\d+)?|\.\d+)(?:\s*\\?%)?"
    r"|[-+]?\\[dt]?frac\{[-+]?\d+\}\{\d+\}|[-+]?\\[dt]?frac\s?\d\s?\d"
)


def check_number(text: str, gold: str) -> Finding:
    """Whether the number that a text settles on is exactly the right one, as fractions: 0.5 is 1/2, 0.333 is not 1/3.

    Currency signs, per cent and units are left out. Raises ValueError where `gold` is no number.
    """
    wanted = read_number(gold)
    if wanted is None:
        raise ValueError(f"the right answer '{gold[:60]}' is no number")
    try:
        return Finding(final_number(text) == wanted)
    except Unread as unread:
        return Finding(None, str(unread))


def final_number(text: str) -> Fraction:
    """The number that a text settles on: in a box, after ####, after "answer is", or the last one. Raises Unread.

    Of what is boxed or stated as an equation it is the last side; two numbers in a box are no answer.
    """
    marked = marked_answer(text)
    if marked is not None:
        found = read_number(marked)
        if found is None:
            raise Unread(f"'{marked[:40]}' is no number")
        return found
    if (stated := stated_after(text)) is not None:
        amounts = _amounts(stated.rpartition("=")[2])
        if amounts:
            return amounts[0]
    amounts = _amounts(text)
    if not amounts:
        raise Unread("there is no number in it")
    return amounts[-1]


def read_number(text: str) -> Fraction | None:
    r"""The one number that a text is about: `1,234 dollars`, `x = -3/4`, `\frac{1}{2}`, `20\%`, `1 1/2`; else None."""
    side = bare(text.rpartition("=")[2])
    whole = _amount(side)
    if whole is not None:
        return whole
    if re.search(r"\d\s*(?:\^(?!\{?\\circ)|\*|\\times|\\cdot|\+|[-–]\s*\d|_)|\\sqrt|\\pi|[a-z]\s*\^|\de\d", side):
        return None
    amounts = _amounts(side)
    return amounts[0] if len(amounts) == 1 else None


def _amounts(text: str) -> list[Fraction]:
    plain = _grouped(text.translate(_UNICODE))
    found = (_amount(match[0]) for match in _AMOUNT.finditer(plain))
    return [amount for amount in found if amount is not None]


def _amount(text: str) -> Fraction | None:
    """A text that is a number and nothing else."""
    plain = _grouped(text.translate(_UNICODE)).strip()
    if len(plain) > LONGEST_NUMBER:
        return None
    plain = re.sub(r"\\[dt]?frac\s?(\d)\s?(\d)", r"\\frac{\1}{\2}", plain)
    plain = re.sub(r"^([-+]?)\s?(?:\\?\$|€|£|¥|USD\s?)\s?", r"\1", plain)
    if mixed := _MIXED.fullmatch(plain):
        below = int(mixed["below"])
        value = int(mixed["whole"]) + Fraction(int(mixed["above"]), below) if below else None
        return -value if value is not None and mixed["sign"] == "-" else value
    if re.search(r"\d\s+[\d,.]|,\s", plain):
        return None  # two numbers
    return as_number(re.sub(r"\s*/\s*", "/", plain.rstrip(",")))


def _grouped(text: str) -> str:
    r"""A text in which the thousands of a number stand together: `11,\! 111` becomes `11,111`, and `11 111` 11111."""
    plain = re.sub(r",\\!\s*(?=\d{3})", ",", text).replace(r"\!", "").replace("{,}", ",")
    plain = re.sub(r"(?<=\d)(?:\\[,;: ])(?=\d{3}(?!\d))", "", plain)
    return re.sub(r"(?<![\d.,/])\d{1,3}(?: \d{3})+(?![\d/])", lambda found: found[0].replace(" ", ""), plain)


_UNIT = re.compile(
    r"(?:\\,|\\ |~|\s)*(?:\\(?:text|mbox|mathrm|textrm)\s*\{\s*[^{}]*\}(?:\^\{?\d\}?)?|\^\s*\{?\s*\\circ\s*\}?|\\?%"
    r"|\\degree|°)\s*$"
)
_IN_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf)\s*\{([^{}]*)\}")
_WORD = re.compile(r"[A-Za-z]{4,}(?:[ '-][A-Za-z]+)*")
_PLAIN_WORD = re.compile(r"(?<![\\A-Za-z])(?!and\b|or\b|sqrt|sin|cos|tan|log|ln)[A-Za-z]{3,}")
_BASED = re.compile(r"([0-9A-Za-z]+)\s*_\s*\{?\s*(\d+)\s*\}?")
_QUANTITY = re.compile(
    r"[^\d\\^=+*/_{}<>|()]*?-?\d[\d,]*(?:\.\d+)?(?:/\d+)?"
    r"(?:[ -]*+(?:[A-Za-z]{3,}+|[cmk]m|[km]g|ml|in|ft|yd|mi|lb|oz|hr|of|by|to|[mgshL](?![A-Za-z])|%|[.,;]))*+"
)


def check_math(text: str, gold: str, compare: Compare | None = None) -> Finding:
    r"""Whether the answer that a text states means what `gold`, in LaTeX or plain, means.

    Numbers are compared exactly, words as words, and numerals of a base by their digits and it; `compare` is asked
    about the rest. Without it the rest cannot be read. `gold` is the answer itself.
    """
    try:
        said, wanted = plain_math(stated_formula(text)), plain_math(bare(gold))
        return Finding(_means(said, wanted, compare))
    except Unread as unread:
        return Finding(None, str(unread))


def stated_formula(text: str) -> str:
    """`stated_answer`; of a sentence as the last line its formula, or the number at its end. Raises Unread."""
    said = stated_answer(text)
    if not said:
        raise Unread("it says nothing")
    if marked_answer(text) is None and not stated_after(text):
        if formulas := list(_DOLLARS.finditer(said)):
            said = next(group for group in formulas[-1].groups() if group is not None)
        elif _PLAIN_WORD.search(_IN_TEXT.sub("", said)) and (amounts := list(_AMOUNT.finditer(said))):
            last = amounts[-1]
            said = last[0].strip() if len(said[last.end() :].split()) <= 2 else said  # "… 5 apples.", no "3: I give up"
    if len(said) > 300:
        raise Unread("it states no answer, only a long line")
    return said


def _means(said: str, wanted: str, compare: Compare | None) -> bool:
    """Whether one formula means what the other means. Raises Unread."""
    if not said:
        raise Unread("it says nothing")
    if said == wanted or (re.fullmatch(r"[A-Za-z:\d ]+", wanted) and _words(said) == _words(wanted)):
        return True
    if is_words(wanted):
        return _words(said) == _words(wanted)
    bases = _BASED.fullmatch(said), _BASED.fullmatch(wanted)
    if bases[0] or bases[1]:
        return _same_numeral(said, wanted)
    said, wanted = without_unit(said), without_unit(wanted)
    numbers = _amount(said), _amount(wanted)
    if numbers[1] is not None:
        if numbers[0] is not None:
            return numbers[0] == numbers[1]
        if _QUANTITY.fullmatch(said):
            return [numbers[1]] == _amounts(said)
    if _PLAIN_WORD.search(_IN_TEXT.sub("", re.sub(r"\\(?:begin|end)\s*\{\w+\}", "", said))):
        raise Unread("it states words, or words and formulas mixed")
    if compare is None:
        raise Unread("it is no number, and math-verify is not installed")
    return compare(_solved(said), _solved(wanted))


def plain_math(text: str) -> str:
    r"""A formula without what does not change it: sizes of brackets and fractions, spaces, dollar signs, `\text` around
    all of it."""
    plain = _grouped(text.translate(_UNICODE)).replace(r"\$", "").replace("$", " ")
    plain = re.sub(r"\\(?:left|right|displaystyle|[bB]ig[lr]?)(?![A-Za-z])", "", plain)
    plain = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", plain)
    plain = re.sub(r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " ", plain)
    plain = re.sub(r"\s*([-+=<>()\[\]{}^|])\s*", r"\1", " ".join(plain.split()).rstrip("."))
    return re.sub(r",\s+(?!\d)", ",", plain)


def without_unit(text: str) -> str:
    """A quantity without its unit, of which degrees and per cent are two; a text that is words alone stays."""
    shorter = _UNIT.sub("", text).strip()
    return shorter if re.search(r"[\d\\]", shorter) else text


def is_words(text: str) -> bool:
    r"""Whether an answer is words, or anything in `\text{…}`: in a formula letters may change places, in words not."""
    return bool(_IN_TEXT.fullmatch(text) or _WORD.fullmatch(text))


def _same_numeral(said: str, wanted: str) -> bool:
    """Numerals such as 52_8: digits and base are the same. A base that only one of them names is taken for granted."""
    one, other = (_BASED.fullmatch(without_unit(text)) for text in (said, wanted))
    digits = [match[1] if match else text.replace(",", "") for match, text in ((one, said), (other, wanted))]
    bases = {match[2] for match in (one, other) if match}
    return len(bases) == 1 and digits[0] == digits[1]


def _solved(text: str) -> str:
    """`3 = x` as `x = 3`."""
    left, mark, right = text.partition("=")
    return f"{right.strip()} = {left.strip()}" if mark and re.fullmatch(r"\s*[A-Za-z]\s*", right) else text


def is_plain(gold: str) -> bool:
    """Whether an answer is a number or words, which are compared without a library of mathematics."""
    plain = plain_math(bare(gold))
    return _amount(without_unit(plain)) is not None or is_words(plain) or bool(_BASED.fullmatch(plain))


def repeats(text: str, other: str) -> bool:
    """Whether two texts end with the same answer, as far as can be told without mathematics: words, number, program."""
    if "```" in text or "```" in other:
        return "".join(program_in(text).split()) == "".join(program_in(other).split())
    one, two = stated_answer(text), stated_answer(other)
    if one is None or two is None:
        return one is two
    if plain_math(one) == plain_math(two) or _words(one) == _words(two):
        return True
    numbers = _amount(without_unit(plain_math(one))), _amount(without_unit(plain_math(two)))
    return None not in numbers and numbers[0] == numbers[1]
