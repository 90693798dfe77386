"""What attempts over rounds of feedback amount to: accuracy of every turn first, then what else is called accuracy.

Rows of `rounds` in, estimates with intervals out. An attempt is right if its score is 1 or more. The number of rounds
is fixed, so an answer that was right can be lost again, and is counted so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import comb
from typing import Any

import numpy as np

from echelon.rollout.evaluate import Estimate, bootstrap
from echelon.rollout.feedback import SOLVER
from echelon.seeds import derive_seed

Attempt = Mapping[str, Any]
Chain = list[Attempt]
"""The attempts of one branch, first to last."""

BINS = 10
"""Of the probabilities that are compared with how often answers were right."""


def chains_of(row: Mapping[str, Any]) -> list[Chain]:
    """The branches of a problem: for every last attempt, the attempts that led to it and itself."""
    turns = {turn["index"]: turn for turn in row["turns"]}
    parents = {turn["parent"] for turn in row["turns"]}
    chains: list[Chain] = []
    for turn in row["turns"]:
        if turn["role"] != SOLVER or turn["index"] in parents:
            continue
        chain: Chain = []
        at: Any = turn["index"]
        while at is not None:
            if turns[at]["role"] == SOLVER:
                chain.append(turns[at])
            at = turns[at]["parent"]
        chains.append(chain[::-1])
    return chains


def right(attempt: Attempt) -> bool:
    """Whether an attempt is right altogether: its score is 1 or more."""
    return float(attempt["score"]) >= 1 - 1e-9


def summarise_rounds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    """Every number about rows that did not fail, with its 95 % bootstrap interval over problems.

    "accuracy/turn<n>" after exactly so many attempts is what to compare; "accuracy" is that of the last. Each other one
    is named for what it is: "oracle/any_turn" stops when somebody who knows the answer says so; "self_stopped/accuracy"
    stops when the solver repeats its answer. The other names are explained in docs/rewards.md.
    """
    problems = [chains_of(row) for row in rows if row["error"] is None]
    assert problems, "every episode failed"
    length = max(len(chain) for chains in problems for chain in chains)

    def over(value: Callable[[Chain], float]) -> Estimate:
        return bootstrap([float(np.mean([value(chain) for chain in chains])) for chains in problems])

    found = {"accuracy": over(lambda chain: right(chain[-1]))}
    for turn in range(length):
        found[f"accuracy/turn{turn + 1}"] = over(lambda chain, at=turn: right(chain[at]))  # type: ignore[misc]
    found |= by_score(problems, over, length)
    found["oracle/any_turn"] = over(lambda chain: any(map(right, chain)))
    found["self_stopped/accuracy"] = over(lambda chain: right(chain[stopped(chain)]))
    found["self_stopped/turns"] = over(lambda chain: stopped(chain) + 1.0)
    for turn in range(1, length):
        name = f"turn{turn + 1}"
        found[f"progress/{name}"] = over(lambda chain, at=turn: right(chain[at]) - right(chain[at - 1]))  # type: ignore[misc]
        found[f"flips/wrong_to_right/{name}"] = over(lambda chain, at=turn: flipped(chain, at, to=True))  # type: ignore[misc]
        found[f"flips/right_to_wrong/{name}"] = over(lambda chain, at=turn: flipped(chain, at, to=False))  # type: ignore[misc]
    return found | about_attempts(problems, length) | pass_at(problems, length)


def by_score(
    problems: Sequence[Sequence[Chain]], over: Callable[[Callable[[Chain], float]], Estimate], length: int
) -> dict[str, Estimate]:
    """The mean score at each turn, where attempts can be partly right, as programs are."""
    scores = {float(attempt["score"]) for chains in problems for chain in chains for attempt in chain}
    if scores <= {0.0, 1.0}:
        return {}
    return {f"score/turn{at + 1}": over(lambda chain, at=at: chain[at]["score"]) for at in range(length)}  # type: ignore[misc]


def stopped(chain: Chain) -> int:
    """The place of the attempt at which the solver would have stopped by itself: the first that repeats the answer
    before it; the last if none does."""
    return next((place for place, attempt in enumerate(chain) if attempt.get("repeats")), len(chain) - 1)


def flipped(chain: Chain, at: int, *, to: bool) -> bool:
    """Whether an attempt is right and the one before it was wrong, or the other way round."""
    return right(chain[at]) == to and right(chain[at - 1]) != to


def about_attempts(problems: Sequence[Sequence[Chain]], length: int) -> dict[str, Estimate]:
    """Per turn: answers that nobody could read, tokens, what feedback changed in the words, and calibration."""
    found: dict[str, Estimate] = {}
    for at in range(length):
        here = [[chain[at] for chain in chains] for chains in problems]
        name = f"turn{at + 1}"
        if any("parsed" in attempt for attempts in here for attempt in attempts):
            found[f"unparsed/{name}"] = mean_over(here, lambda attempt: not attempt.get("parsed", True))
        found[f"tokens/{name}"] = mean_over(here, lambda attempt: attempt["tokens"])
        if all("gain" in attempt for attempts in here for attempt in attempts):
            found[f"utilisation/gain/{name}"] = mean_over(here, lambda attempt: attempt["gain"])
            found[f"utilisation/used/{name}"] = mean_over(here, lambda attempt: attempt["gain"] > 0)
        found[f"calibration/{name}"] = calibration(here)
    return found


def mean_over(problems: Sequence[Sequence[Attempt]], value: Callable[[Attempt], float]) -> Estimate:
    """A mean over attempts, the interval over problems."""
    return bootstrap([float(np.mean([value(attempt) for attempt in attempts])) for attempts in problems])


def calibration(problems: Sequence[Sequence[Attempt]], *, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Expected calibration error: by how much the mean token probability of an attempt is off how often such attempts
    are right, averaged over ten bins by their share of attempts. The interval is over problems."""
    sure = np.array([[attempt["probability"] for attempt in attempts] for attempts in problems], dtype=np.float64)
    correct = np.array([[right(attempt) for attempt in attempts] for attempts in problems], dtype=np.float64)
    count = len(problems)
    drawn = np.random.default_rng(derive_seed(seed, "calibration")).integers(0, count, (resamples, count))
    errors = [calibration_error(sure[places].ravel(), correct[places].ravel()) for places in drawn]
    low, high = np.quantile(errors, [0.025, 0.975])
    return Estimate(calibration_error(sure.ravel(), correct.ravel()), float(low), float(high), count)


def calibration_error(sure: np.ndarray, correct: np.ndarray) -> float:
    """Σ over ten equal bins of the probability: share of attempts · |mean probability − share that is right|."""
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, sure - correct, BINS)
    return float(np.abs(gaps).sum() / len(sure))


def pass_at(problems: Sequence[Sequence[Chain]], length: int) -> dict[str, Estimate]:
    """pass@k at the first and at the last turn, for k = 1, 2, 4, … up to the attempts there are."""
    attempts = min(len(chains) for chains in problems)
    if attempts < 2:
        return {}
    sizes = sorted({*(2**power for power in range(attempts.bit_length())), attempts})
    found: dict[str, Estimate] = {}
    for at in sorted({0, length - 1}):
        counts = [(len(chains), sum(right(chain[at]) for chain in chains)) for chains in problems]
        for size in sizes:
            found[f"pass@{size}/turn{at + 1}"] = bootstrap([any_of(size, count, good) for count, good in counts])
    return found


def any_of(size: int, count: int, good: int) -> float:
    """The probability that `size` attempts drawn from `count`, of which `good` are right, have a right one among them:
    the unbiased estimate of pass@k (arXiv 2107.03374)."""
    return 1.0 - comb(count - good, size) / comb(count, size)


def headline(found: Mapping[str, Estimate]) -> Iterable[tuple[str, Estimate, str]]:
    """What a table shows, in order, each with a word on what it is."""
    for name, estimate in found.items():
        if name == "accuracy":
            continue
        note = {"oracle": "stops at the first right answer, which nobody knows", "self_stopped": "stops when repeated"}
        yield name, estimate, note.get(name.partition("/")[0], "")
