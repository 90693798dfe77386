"""Which episodes of a run are shown, and how they are written down: small, and shortened rather than broken.

Knows the rows of episodes.jsonl; knows nothing of pages. A row may hold anything: what has the wrong type is left out.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from echelon.view.runs import Row, Run, number, parse, rows

LONGEST_TEXT, SHORTER_TEXT, KEPT_END = 6_000, 300, 1_000
"""Characters of a text that are shown, in an episode that would take too much room, and from its end at most."""
MOST_MISSES = 20
"""Episodes in a row of preference that may be too long for what room is left before the rest is not tried."""
MOST_TURNS = 1_000
MOST_CANDIDATES = 24
MOST_TOKENS = 2_000
KNOWN = {"index", "role", "parent", "text", "reward", "seen", "strategy", "candidates", "chosen", "explored"}
"""What a turn says that has a place of its own; everything else is shown by its name."""
FEW_WORDS = ("controller", "planner", "strategist")
"""Roles that pick among few things to say, and rightly say them again."""
COACHED = "coach"
"""Whose words an attempt follows that can ignore them."""


class Place(NamedTuple):
    """Where an episode stands in its file, and what it is chosen by."""

    number: int
    offset: int
    step: int
    task: str


@dataclass(slots=True)
class Tally:
    """What the utterances of one step amount to."""

    again: int = 0
    """Utterances of a role that had spoken before in the same conversation."""
    repeated: int = 0
    """Those that say what that role said last."""
    told: int = 0
    """Attempts after a remark on an attempt that had earned nothing."""
    unmoved: int = 0
    """Those that are the same attempt again."""


@dataclass(slots=True)
class Scan:
    """What one reading of episodes.jsonl has found."""

    places: list[Place] = field(default_factory=list)
    tallies: dict[int, Tally] = field(default_factory=dict)
    texts: set[str] = field(default_factory=set)
    """Different utterances, up to a few dozen: fewer means that the role picks among few words."""


def scan(run: Run) -> Scan:
    """Read all episodes of a run once, keeping where they stand and what they amount to."""
    found = Scan()
    for place, (offset, row) in enumerate(rows(run.episodes_file, run.notes)):
        step = row.get("step", 0)
        step = step if isinstance(step, int) else 0
        found.places.append(Place(place, offset, step, str(row.get("task", ""))[:200]))
        _count(_turns(row), found.tallies.setdefault(step, Tally()), found.texts)
    return found


def _turns(row: Row) -> list[Row]:
    turns = row.get("turns")
    return [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []


def _count(turns: Sequence[Row], tally: Tally, texts: set[str]) -> None:
    """Add one episode to what its step amounts to."""
    by_index = {turn.get("index", place): turn for place, turn in enumerate(turns) if _key(turn.get("index", place))}
    for turn in turns:
        role, text = turn.get("role"), turn.get("text")
        if isinstance(text, str) and len(texts) < 64:
            texts.add(text[:200])
        earlier, between = _before(turn, by_index)
        if earlier is None or not isinstance(text, str):
            continue
        same = text == earlier.get("text")
        if role not in FEW_WORDS:
            tally.again += 1
            tally.repeated += same
        if role != COACHED and between.get("role") == COACHED and not _worth(earlier):
            tally.told += 1
            tally.unmoved += same


def _before(turn: Row, by_index: Mapping[Any, Row]) -> tuple[Row | None, Row]:
    """The last turn of the same role on this branch, and what was said right before this one."""
    seen: set[int] = set()
    parent = by_index.get(turn.get("parent")) if _key(turn.get("parent")) else None
    at, between = parent, parent or {}
    while at is not None and id(at) not in seen and at.get("role") != turn.get("role"):
        seen.add(id(at))
        at = by_index.get(at.get("parent")) if _key(at.get("parent")) else None
    return (None if at is None or id(at) in seen else at), between


def _key(value: object) -> bool:
    return isinstance(value, int)


def _worth(turn: Row) -> float:
    return number(turn.get("score")) or number(turn.get("reward")) or 0.0


def chosen_order(places: Sequence[Place]) -> Iterator[Place]:
    """All episodes, those that say most about the run first: the first and the last step, then the same tasks early
    and late, then one of each step, steps as far apart as possible, until every episode has come."""
    by_step: dict[int, list[Place]] = {}
    by_task: dict[str, list[Place]] = {}
    for place in places:
        by_step.setdefault(place.step, []).append(place)
        by_task.setdefault(place.task, []).append(place)
    steps = sorted(by_step)
    ends = [place for step in dict.fromkeys([*steps[:1], *steps[-1:]]) for place in by_step[step][:32]]
    pairs = sorted(
        (one for one in by_task.values() if one[-1].step > one[0].step), key=lambda one: one[0].step - one[-1].step
    )
    paired = [place for one in pairs[:32] for place in (one[0], one[-1])]
    spread = [by_step[step] for step in halving(steps)]
    rounds = (place for several in itertools.zip_longest(*spread) for place in several if place is not None)
    done: set[int] = set()
    for place in itertools.chain(ends, paired, rounds):
        if place.number not in done:
            done.add(place.number)
            yield place


def halving(items: Sequence[int]) -> list[int]:
    """The first, the last, the middle, the middles of what is between, and so on: every beginning is spread evenly."""
    order: dict[int, None] = dict.fromkeys([*items[:1], *items[-1:]])
    parts = 2
    while len(order) < len(items):
        order |= dict.fromkeys(items[len(items) * part // parts] for part in range(1, parts, 2))
        parts *= 2
        if parts > 4 * len(items):
            order |= dict.fromkeys(items)
    return list(order)


def written(run: Run, number_of_run: int, found: Scan, room: int) -> list[str]:
    """Episodes as JSON, in the order of their file, as many as there is room for, in bytes."""
    kept: list[tuple[int, str]] = []
    misses = 0
    if not found.places:
        return []
    with run.episodes_file.open("rb") as file:
        for place in chosen_order(found.places):
            file.seek(place.offset)
            row = parse(file.readline())[0] or {}
            text = dumps({"r": number_of_run, **compact(row, place)})
            if size(text) > room // 4:  # one that would crowd out the others
                text = dumps({"r": number_of_run, **compact(row, place, SHORTER_TEXT)})
            if size(text) <= room:
                room -= size(text) + 2
                kept.append((place.number, text))
            elif (misses := misses + 1) > MOST_MISSES:
                break
    return [text for _, text in sorted(kept)]


def size(text: str) -> int:
    """Bytes that a text takes."""
    return len(text.encode("utf-8", errors="replace"))


def dumps(value: object) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def compact(row: Row, place: Place, longest: int = LONGEST_TEXT) -> Row:
    """An episode for the page. Numbers have four digits, long texts a hole, and what is usual is not said."""
    turns = list(enumerate(_turns(row)))
    half, gap = MOST_TURNS // 2, len(turns) - MOST_TURNS
    kept = turns[:half] + turns[-half:] if gap > 0 else turns
    shown = [_turn(turn, index, at, longest) for at, (index, turn) in enumerate(kept)]
    said: Row = {"n": place.number, "s": place.step, "k": place.task, "w": short(number(row.get("reward"))), "t": shown}
    for name, key in (("ending", "e"), ("error", "x")):
        if isinstance(row.get(name), str):
            said[key] = row[name][:2_000]
    metrics = row.get("metrics")
    if isinstance(metrics, dict) and metrics:
        said["m"] = {str(name): short(number(value)) for name, value in metrics.items()}
    return said | ({"gap": [half, gap]} if gap > 0 else {})


def _turn(turn: Row, index: int, at: int, longest: int) -> Row:
    """A turn, the one with this index unless it says otherwise, at this place among those that are shown."""
    said: Row = {"r": str(turn.get("role", "?"))[:60], "x": cut(str(turn.get("text") or ""), longest)}
    own, parent = turn.get("index"), turn.get("parent")
    index = own if isinstance(own, int) else index
    if index != at:
        said["i"] = index
    if parent != (index - 1 if index else None) and (parent is None or isinstance(parent, int)):
        said["p"] = parent
    if (reward := number(turn.get("reward"))) is not None:
        said["w"] = short(reward)
    if isinstance(turn.get("seen"), str) and turn["seen"]:
        said["s"] = cut(turn["seen"], longest)
    if isinstance(turn.get("strategy"), str):
        said["g"] = turn["strategy"][:200]
    said |= _choice(turn) | _tokens(turn)
    for name, value in turn.items():
        if name in KNOWN or name in said.get("z", {}):
            continue
        if (worth := number(value)) is not None:
            said.setdefault("n", {})[name] = short(worth)
        elif isinstance(value, str | bool):
            said.setdefault("o", {})[name] = cut(value, 300) if isinstance(value, str) else value
    return said


def _choice(turn: Row) -> Row:
    """What an utterance was chosen from: different candidates, their Q, how often each was drawn; best first."""
    listed = turn.get("candidates")
    if not isinstance(listed, list):
        return {}
    chosen = turn.get("chosen")
    counted: dict[tuple[Any, ...], list[int]] = {}
    for place, one in enumerate(listed):
        if isinstance(one, dict):
            key = (short(number(one.get("q"))), str(one.get("text", ""))[:300], str(one.get("strategy", ""))[:200])
            counted.setdefault(key, []).append(place)
    table = sorted(counted.items(), key=lambda item: -(item[0][0] if item[0][0] is not None else float("-inf")))
    taken = next((at for at, (_, places) in enumerate(table) if chosen in places), None)
    kept = [at for at in range(len(table)) if at < MOST_CANDIDATES or at == taken]
    said: Row = {"c": [[*table[at][0], len(table[at][1])] for at in kept]}
    if taken is not None:
        said["k"] = kept.index(taken)
    if turn.get("explored") is True:
        said["e"] = 1
    return said | ({"cm": len(table) - len(kept)} if len(table) > len(kept) else {})


def _tokens(turn: Row) -> Row:
    """An utterance token by token, where the row has it: `tokens` as text, and columns of numbers of that length."""
    tokens = turn.get("tokens")
    if not isinstance(tokens, list) or not tokens or len(tokens) > MOST_TOKENS:
        return {}
    columns: Row = {"tokens": [str(token)[:200] for token in tokens]}
    for name, value in turn.items():
        if name != "tokens" and isinstance(value, list) and len(value) == len(tokens) and name not in KNOWN:
            columns[name] = [short(number(one), 7 if name == "ids" else 4) for one in value]
    return {"z": columns}


def cut(text: str, longest: int = LONGEST_TEXT) -> str | list[Any]:
    """A text, or of a longer one its beginning, how many characters are left out, and its end."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if len(text) <= longest:
        return text
    end = min(KEPT_END, longest // 4)
    return [text[: longest - end], len(text) - longest, text[-end:]]


def short(value: float | None, digits: int = 4) -> float | int | None:
    """A number with so many digits, as short as JSON can write it."""
    if value is None:
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
