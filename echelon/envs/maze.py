"""A maze in which one sees only the walls around: where one is has to be inferred from where one has been.

After the maze of LMRL-Gym (Abdulhai et al., arXiv 2311.18232): a move costs 1, a move into a wall 4, and moves are the
only thing to say. Knows its layouts and how to walk them, and no model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

from echelon.envs._shared import Player, at_random, exchanges, need_at_least, need_kind, need_split, user
from echelon.errors import DataError
from echelon.types import Message, Step, Task

Cell = tuple[int, int]

MOVES: dict[str, Cell] = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
ILLEGAL = -4.0
"""Reward of running into a wall, and of saying nothing that moves."""

DOUBLE_T = """\
###########
#....#....#
####.#.####
####.#.####
####...####
#####.#####
#####.#####
####...####
####.#.####
#....#...G#
###########"""
"""Two Ts, foot to foot: four arms that look alike from inside, and the goal at the end of one of them."""


class Maze:
    """Walk to the goal: -1 a move, -4 for one into a wall or a text that is no move, 0 for the one that arrives.

    `observed` tells row, column and goal besides the walls around. `size` makes a random maze of size x size cells
    without cycles, `layout` says which; 0 is the double T. An episode that does not arrive ends after `max_turns`, and
    that end is `terminated`: the limit is a rule of the game.
    """

    def __init__(
        self, task: Task, *, size: int = 0, layout: int = 0, observed: bool = False, max_turns: int = 100
    ) -> None:
        self._free, self._goal = grid(size, layout)
        row, column = task.data["start"]
        self._cell: Cell = (row, column)
        if self._cell not in self._free - {self._goal}:
            raise DataError(f"maze: nobody can start at {_place(self._cell)}. Use the task's own settings.")
        self._observed, self._max_turns, self._turns = observed, max_turns, 0

    @classmethod
    def tasks(
        cls, split: str, *, size: int = 0, layout: int = 0, observed: bool = False, max_turns: int = 100
    ) -> list[Task]:
        """One task for each cell to start from. Both splits list the same cells: the skill is finding the way."""
        need_split("maze", split)
        need_at_least("maze", "max_turns", max_turns, 1, "a game needs a turn")
        free, goal = grid(size, layout)
        starts = sorted(free - {goal})
        return [Task(f"maze/{row},{column}", {"start": [row, column]}) for row, column in starts]

    def start(self) -> list[Message]:
        """The instruction and the first look around, in one short message."""
        return user(f"Find the goal. Say: move up, move down, move left or move right. {self._look()}")

    def step(self, action: str) -> Step:
        """Move. The text must name exactly one direction; other text costs as much as running into a wall."""
        self._turns += 1
        reward, direction = ILLEGAL, direction_in(action)
        cell = self._cell if direction is None else moved(self._cell, direction)
        if direction is not None and cell in self._free:
            self._cell, reward = cell, -1.0
        won = self._cell == self._goal
        ended = won or self._turns >= self._max_turns
        return Step(
            messages=user("You are there." if won else self._look()),
            reward=0.0 if won else reward,
            terminated=ended,
            info={"win": float(won), "turns": float(self._turns)} if ended else {},
        )

    def _look(self) -> str:
        around = walls(self._free, self._cell)
        seen = f"Walls: {', '.join(around)}." if around else "No walls."
        if not self._observed:
            return seen
        return f"You are at {_place(self._cell)}, the goal is at {_place(self._goal)}. {seen}"

    @classmethod
    def utterances(cls, *, size: int = 0, layout: int = 0, observed: bool = False, max_turns: int = 100) -> list[str]:
        """Everything a scripted player may say."""
        return [f"move {direction}" for direction in MOVES]

    @classmethod
    def player(
        cls,
        kind: str,
        seed: int = 0,
        *,
        size: int = 0,
        layout: int = 0,
        observed: bool = False,
        max_turns: int = 100,
    ) -> Player:
        """A scripted player of one episode: `random` says any move, `optimal` knows the layout.

        The optimal one keeps all cells that fit what it has seen and takes the move with the least expected way. No
        player does better: `bound` is what it earns.
        """
        need_kind("maze", kind)

        def walk(messages: Sequence[Message]) -> str:
            return f"move {plan(size, layout)[possible(size, layout, messages)][1]}"

        return walk if kind == "optimal" else at_random(seed, lambda draw: f"move {draw.choice(list(MOVES))}")


def direction_in(text: str) -> str | None:
    """The one direction a text names, or None."""
    named = [word for word in re.findall(r"[a-z]+", text[:200].lower()) if word in MOVES]
    return named[0] if len(named) == 1 else None


def moved(cell: Cell, direction: str) -> Cell:
    """The cell next to this one."""
    down, right = MOVES[direction]
    return cell[0] + down, cell[1] + right


def walls(free: frozenset[Cell], cell: Cell) -> tuple[str, ...]:
    """The directions in which there is no way."""
    return tuple(direction for direction in MOVES if moved(cell, direction) not in free)


@cache
def grid(size: int, layout: int) -> tuple[frozenset[Cell], Cell]:
    """The free cells of a maze, and its goal."""
    need_at_least("maze", "size", size, 0, "0 is the double T, and other mazes have that many cells a side")
    if size == 0:
        rows = DOUBLE_T.splitlines()
        free = {(row, column) for row, line in enumerate(rows) for column, mark in enumerate(line) if mark != "#"}
        return frozenset(free), next((r, line.index("G")) for r, line in enumerate(rows) if "G" in line)
    need_at_least("maze", "size", size, 2, "a maze has cells to walk between")
    draw = random.Random(f"maze {size} {layout}")
    free, trail = {(1, 1)}, [(1, 1)]
    while trail:  # walk at random where nobody has been, two cells at a time; go back where there is no way on
        row, column = trail[-1]
        ways = [(down, right) for down, right in MOVES.values() if _new(row + 2 * down, column + 2 * right, size, free)]
        if not ways:
            trail.pop()
            continue
        down, right = draw.choice(ways)
        free |= {(row + down, column + right), (row + 2 * down, column + 2 * right)}
        trail.append((row + 2 * down, column + 2 * right))
    return frozenset(free), (2 * size - 1, 2 * size - 1)


def _new(row: int, column: int, size: int, free: set[Cell]) -> bool:
    return 0 < row < 2 * size and 0 < column < 2 * size and (row, column) not in free


@cache
def distances(size: int, layout: int) -> dict[Cell, int]:
    """Moves from each cell to the goal."""
    free, goal = grid(size, layout)
    found, edge = {goal: 0}, [goal]
    while edge:
        edge = [cell for near in edge for cell in _reached(free, near, found)]
    return found


def _reached(free: frozenset[Cell], near: Cell, found: dict[Cell, int]) -> Iterator[Cell]:
    for direction in MOVES:
        cell = moved(near, direction)
        if cell in free and cell not in found:
            found[cell] = found[near] + 1
            yield cell


def possible(size: int, layout: int, messages: Sequence[Message]) -> frozenset[Cell]:
    """The cells one may be in after a dialogue: those that fit every wall seen, and every move made."""
    told = re.search(r"at row (\d+), column (\d+)", messages[-1]["content"])
    if told:
        return frozenset([(int(told[1]), int(told[2]))])
    sights, goal = _sights(size, layout), grid(size, layout)[1]
    opening = _seen(next(message["content"] for message in messages if message["role"] == "user"))
    cells = {cell for cell, sight in sights.items() if sight == opening and cell != goal}
    for said, answered in exchanges(messages):
        direction, seen = direction_in(said), _seen(answered)
        there = {moved(cell, direction) for cell in cells} if direction else set()
        now = {cell for cell in there if sights.get(cell) == seen and cell != goal}
        cells = now or cells  # it stayed where it was: all these cells look alike, so there was a wall in each of them
    return frozenset(cells)


def _seen(text: str) -> tuple[str, ...]:
    """The walls an answer tells of."""
    return tuple(re.findall(r"[a-z]+", text.partition("Walls: ")[2]))


@cache
def _sights(size: int, layout: int) -> dict[Cell, tuple[str, ...]]:
    """What one sees in each free cell."""
    free, _ = grid(size, layout)
    return {cell: walls(free, cell) for cell in free}


def bound(size: int = 0, layout: int = 0, *, observed: bool = False) -> float:
    """Mean return of the best play from every start, when `max_turns` is long enough for it."""
    free, goal = grid(size, layout)
    starts = free - {goal}
    if observed:
        ways = sum(distances(size, layout).values())
    else:
        ways = sum(plan(size, layout)[cells][0] for cells in _told_apart(free, starts))
    return 1 - ways / len(starts)


@cache
def plan(size: int, layout: int) -> dict[frozenset[Cell], tuple[int, str]]:
    """The best move for one who may be in any of these cells, and the moves it takes to the goal summed over them.

    Holds every set of cells one can come to, and every single cell. The sums start from below, as if one knew where
    one is, and grow until none changes: then they are exact, and each move makes what is left strictly less.
    """
    free, goal = grid(size, layout)
    away = distances(size, layout)
    best = {frozenset([cell]): (away[cell], _nearer(free, away, cell)) for cell in free - {goal}}
    unsure = _ways(free, goal)
    best |= {cells: (sum(away[cell] for cell in cells), "") for cells in unsure}
    changed = True
    while changed:
        changed = False
        for cells, ways in unsure.items():
            left, direction = min((sum(best[part][0] for part in parts), direction) for direction, parts in ways)
            now = (len(cells) + left, direction)
            changed |= now != best[cells]
            best[cells] = now
    return best


def _nearer(free: frozenset[Cell], away: dict[Cell, int], cell: Cell) -> str:
    legal = [direction for direction in MOVES if moved(cell, direction) in free]
    return min(legal, key=lambda direction: (away[moved(cell, direction)], direction))


def _ways(free: frozenset[Cell], goal: Cell) -> dict[frozenset[Cell], list[tuple[str, list[frozenset[Cell]]]]]:
    """Every set of several cells one may be in, and what each move makes of it."""
    found: dict[frozenset[Cell], list[tuple[str, list[frozenset[Cell]]]]] = {}
    ahead = _told_apart(free, free - {goal})
    while ahead:
        cells = ahead.pop()
        if len(cells) > 1 and cells not in found:
            legal = [direction for direction in MOVES if moved(min(cells), direction) in free]
            there = {direction: {moved(cell, direction) for cell in cells} - {goal} for direction in legal}
            found[cells] = [(direction, _told_apart(free, there[direction])) for direction in legal]
            ahead += [part for _, parts in found[cells] for part in parts]
    return found


def _told_apart(free: frozenset[Cell], cells: Iterable[Cell]) -> list[frozenset[Cell]]:
    """These cells by the walls one sees in them: each part is a set of cells that look alike."""
    alike: dict[tuple[str, ...], set[Cell]] = {}
    for cell in cells:
        alike.setdefault(walls(free, cell), set()).add(cell)
    return [frozenset(part) for part in alike.values()]


def _place(cell: Cell) -> str:
    return f"row {cell[0]}, column {cell[1]}"
