"""What a token costs as conversations grow (5 to 80 turns) and as more of them go on at once (1 to 256).

    python benchmarks/scaling.py
    python benchmarks/scaling.py --peers --sizes tiny

Every turn observes 24 tokens and samples 16, so conversations reach 200 tokens with 5 turns and 3,200 with 80. The cost
is that of a new token, observed or sampled, averaged over the whole conversation. Growing conversations go on 16 at a
time; growing crowds have 5 turns each. The `generate` loop, which computes everything again at every turn, is shown at
a few points for contrast (`--peers` alone leaves it out).

The target: a new token of an 80-turn conversation costs at most twice one of a 5-turn conversation. The ratio of that
row, whose peer is the engine itself, is the cost at 5 turns over the cost at 80, and its target one half. The last line
is JSON: the smallest ratio over target, a row per point that is compared, and the costs at all points.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import tyro
from _harness import Args, Row, choose_peers, finish, measure, model_folder
from _rollouts import Job, Plan, side

TARGETS = {"generate": None}
LONGEST_TARGET = 0.5
"""Of the row that compares the longest conversations with the shortest."""

OBSERVED, REPLY = 24, 16
"""Tokens of every observation and of every reply."""

Point = tuple[int, int]
"""Turns of each conversation, and how many conversations go on at once."""


@dataclass(kw_only=True)
class Scaling(Args):
    """What to measure."""

    keep_memory: bool = True
    turns: tuple[int, ...] = (5, 10, 20, 40, 80)
    """Lengths of conversations, shortest first."""
    together: int = 16
    """How many conversations go on at once while their length grows."""
    crowds: tuple[int, ...] = (1, 4, 16, 64, 256)
    """How many conversations go on at once while their length stays the shortest."""
    generate: tuple[int, ...] = (5, 20)
    """Lengths at which the `generate` loop is shown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quick:
            self.turns, self.together, self.crowds, self.generate = (1, 3), 2, (1, 3), (3,)

    def points(self) -> list[Point]:
        """Everything that is measured, each point once."""
        growing = [(turns, self.together) for turns in self.turns]
        return list(dict.fromkeys([*growing, *((self.turns[0], crowd) for crowd in self.crowds)]))


def plan(point: Point) -> Plan:
    """The conversations of a point."""
    turns, crowd = point
    return (((OBSERVED, REPLY),) * turns,) * crowd


def costs(
    names: list[str], points: list[Point], folder: str, size: str, args: Scaling
) -> dict[str, dict[Point, float]]:
    """Side → point → microseconds per new token, the median over rounds. The sides take turns at every point."""
    job = Job(folder, size, tuple(map(plan, points)), args.threads)
    results = measure([side(name, job) for name in names], args, repeats=args.repeats * len(points))
    found: dict[str, dict[Point, float]] = {name: {} for name in names}
    for name, result in results.items():
        for place, point in enumerate(points):
            turns, crowd = point
            new = turns * crowd * (OBSERVED + REPLY)
            found[name][point] = 1e6 * median(result.seconds[place :: len(points)]) / new
    return found


def compare(size: str, ours: dict[Point, float], args: Scaling) -> list[Row]:
    """Every length over the shortest, the last with the target, and every crowd over the smallest."""
    few, together, alone = args.turns[0], args.together, args.crowds[0]
    rows = [
        row(f"{turns} turns over {few}", size, ours[turns, together], ours[few, together]) for turns in args.turns[1:]
    ]
    rows[-1].target = LONGEST_TARGET
    return rows + [row(f"{n} at once over {alone}", size, ours[few, n], ours[few, alone]) for n in args.crowds[1:]]


def row(peer: str, size: str, ours: float, theirs: float) -> Row:
    """Two costs, and how many times as cheap ours is."""
    return Row(peer, size, ours, theirs, theirs / ours)


def main(args: Scaling) -> None:
    """Measure every size, print the table and the JSON line."""
    peers = choose_peers(args, list(TARGETS))
    rows: list[Row] = []
    listed = []
    for size in args.sizes:
        contrast = [(turns, args.together) for turns in args.generate] if peers else []
        with model_folder(size, max_positions=max(args.turns) * (OBSERVED + REPLY)) as folder:
            ours = costs(["ours"], args.points(), folder, size, args)["ours"]
            rows += compare(size, ours, args)
            if contrast:
                both = costs(["ours", *peers], contrast, folder, size, args)
                rows += [
                    row(f"generate, {at[0]} turns", size, both["ours"][at], both["generate"][at]) for at in contrast
                ]
        listed += [{"size": size, "turns": at[0], "at once": at[1], "cost": round(ours[at], 2)} for at in args.points()]
    finish(rows, args, title="Cost of a new token", unit="µs per new token", costs=listed)


if __name__ == "__main__":
    main(tyro.cli(Scaling))
