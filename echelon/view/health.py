"""What can be said of a run in plain words: did it learn, at which level, and is anything wrong with it.

Numbers in, sentences out; reads no files. Every threshold is a judgement, said in the sentence that uses it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from echelon.view.episodes import Scan, Tally
from echelon.view.runs import Metrics

State = Literal["good", "warn", "bad", "none"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check: what was looked at, how it stands, and why, in a sentence or two."""

    title: str
    state: State
    text: str


LEVELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("upper", "critic of utterances", ("critic", "baseline")),
    ("upper", "ranker", ("ranker", "candidates")),
    ("upper", "strategist", ("high", "strategy")),
    ("upper", "coach", ("coach", "context")),
    ("upper", "planner", ("planner",)),
    ("lower", "responder", ("low",)),
    ("lower", "solver", ("solver",)),
    ("lower", "controller", ("controller",)),
    ("lower", "policy", ("policy", "shaped", "objective")),
    ("lower", "value model", ("value",)),
)
"""Which level, who that is, and how the names of its metrics begin."""

OUTCOMES = ("reward/mean", "eval/reward/mean", "eval/return", "accuracy", "eval/accuracy", "eval/loss", "loss")
"""What a run is for: the first of these that it has often enough. The loss of a policy is none: it is no score."""


FEWEST = 4
"""Values from which on anything is said of learning."""


def level_of(name: str) -> tuple[str, str] | None:
    """The level that a metric is about, and who that is; None for what is about the run."""
    head = name.removeprefix("eval/").partition("/")[0]
    if name.startswith("eval/") and head not in ("strategy", "low", "high"):
        return None
    return next(((level, who) for level, who, heads in LEVELS if head in heads and "/" in name), None)


def group_of(name: str, names: Iterable[str]) -> tuple[str, str]:
    """(heading, note) under which a curve stands."""
    if name.startswith("seconds/"):
        return "Time of a step", "time"
    if name.startswith("low/term/") or (
        name.startswith(("reward/", "rewards/")) and name not in (*OUTCOMES, "reward/std")
    ):
        return "Reward by term", "reward"
    if found := level_of(name):
        levels = {level for one in names if (level := (level_of(one) or ("",))[0])}
        return f"{found[0].capitalize()} level: {found[1]}" if "upper" in levels else found[1].capitalize(), found[0]
    if name.startswith("eval/"):
        return "Held out", "eval"
    if name.startswith(("accuracy", "score", "flips", "dialogue")) or name in OUTCOMES or name == "reward/std":
        return "Outcome", "outcome"
    return "Episodes and groups", "episodes"


def fifths(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """The first and the last fifth of a curve, three points at least where there are that many."""
    size = max(1, min(max(3, len(values) // 5), len(values) // 2 or 1))
    return list(values[:size]), list(values[-size:])


def moved(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the first fifth, of the last, and by how many standard errors they differ."""
    first, last = fifths(values)
    before, after = statistics.fmean(first), statistics.fmean(last)
    error = math.sqrt(sum(statistics.variance(part) / len(part) for part in (first, last) if len(part) > 1))
    if before == after:
        return before, after, 0.0
    return before, after, (after - before) / error if error else math.copysign(math.inf, after - before)


def outcome_of(metrics: Metrics) -> str:
    """The metric that says what a run is for, if possible one that is recorded often enough; empty if it has none."""
    counts = {name: len(metrics.finite(name)) for name in OUTCOMES}
    return next((name for enough in (FEWEST, 1) for name in OUTCOMES if counts[name] >= enough), "")


def learned(metrics: Metrics) -> Verdict:
    """Did it learn: the outcome of the last fifth of the steps against that of the first."""
    name = outcome_of(metrics)
    values = metrics.finite(name)
    if not name:
        text = "Nothing that is recorded says what the run is for: no return, no accuracy, no loss but that of a part."
        return Verdict("Did it learn?", "none", f"{text} Let it play test games: echelon evaluate.")
    if len(values) < FEWEST:
        times = "once" if len(values) == 1 else f"{len(values)} times"
        text = f"Too few steps are recorded to tell: {name} is there {times}, and {FEWEST} are needed."
        return Verdict("Did it learn?", "none", text)
    before, after, errors = moved(values)
    better = after < before if name.endswith("loss") else after > before
    way = "rose" if after > before else "fell"
    numbers = f"from {show(before)} in the first fifth of the steps to {show(after)} in the last"
    if abs(errors) < 2:
        text = f"Not visibly: {name} went {numbers}, which is within its noise from step to step."
        return Verdict("Did it learn?", "warn", text)
    text = f"{name} {way} {numbers}"
    return Verdict("Did it learn?", "good" if better else "bad", f"{'Yes' if better else 'It got worse'}: {text}.")


def levels(metrics: Metrics) -> list[Verdict]:
    """One sentence on each level: whether it learned, as far as what it is judged by says so, and what changed."""
    told: dict[tuple[str, str], list[tuple[Change, str]]] = {}
    for name in metrics.columns:
        if (level := level_of(name)) and not name.startswith("eval/") and (said := _change(name, metrics.finite(name))):
            told.setdefault(level, []).append(said)
    upper = any(level == "upper" for level, _ in told)
    order = {(level, who): place for place, (level, who, _) in enumerate(LEVELS)}
    return [
        Verdict(
            f"{level.capitalize()} level: {who}" if upper else who.capitalize(),
            "none",
            _told(said),
        )
        for (level, who), said in sorted(told.items(), key=lambda item: order[item[0]])
    ]


SAID: Mapping[str, str] = {
    "explained_variance": "variance explained {0} → {1}",
    "td_error": "error of Q {0} → {1}",
    "entropy": "entropy {0} → {1} nats",
    "kl_to_start": "{1} nats per token from its start",
    "advantage_std": "spread of advantages {0} → {1}",
    "used": "attempts changed by what it said {0} → {1}",
    "gain": "what its words add to the log-probability of the next attempt {0} → {1}",
    "spread": "spread of Q over the choices {0} → {1}",
}
"""End of a metric's name → what a change of it means."""


BETTER: Mapping[str, int] = {"explained_variance": 1, "gain": 1, "used": 1, "td_error": -1}
"""Those of them of which it is known which way is better."""
Change = Literal["better", "moved", "still"]


def _change(name: str, values: Sequence[float]) -> tuple[Change, str] | None:
    end = name.rpartition("/")[2]
    if end not in SAID or len(values) < FEWEST:
        return None
    before, after, errors = moved(values)
    change: Change = "still" if abs(errors) < 2 else "better" if BETTER.get(end, 0) * errors > 0 else "moved"
    return change, SAID[end].format(show(before), show(after))


LEADS: Mapping[Change, str] = {"better": "It learned", "moved": "It changed", "still": "It hardly moved"}
"""How the sentence on a level begins, by the best of what is known of it."""


def _told(changes: Sequence[tuple[Change, str]]) -> str:
    ranked = sorted(changes, key=lambda change: list(LEADS).index(change[0]))
    return f"{LEADS[ranked[0][0]]}: {'; '.join(said for _, said in ranked[:4])}."


def checks(metrics: Metrics, scan: Scan) -> list[Verdict]:
    """Every check that the files of a run allow, those that found something first."""
    found = [verdict for check in CHECKS for verdict in check(metrics)]
    found += [*_repeats(scan), *_ignored(scan)]
    rank = {"bad": 0, "warn": 1, "good": 2, "none": 3}
    return sorted(found, key=lambda verdict: rank[verdict.state])


def _ending(metrics: Metrics, *ends: str) -> Iterator[tuple[str, list[float]]]:
    for name in metrics.columns:
        values = metrics.finite(name)
        if values and not name.startswith("eval/") and any(name == end or name.endswith(f"/{end}") for end in ends):
            yield name, values


def _late(values: Sequence[float]) -> float:
    return statistics.fmean(fifths(values)[1])


def _worst(title: str, judged: Iterable[tuple[State, str]], nothing: str) -> Iterator[Verdict]:
    """One verdict of several metrics: the worst of them, with every sentence that is as bad."""
    told = list(judged)
    for state in ("bad", "warn"):
        if said := [text for its, text in told if its == state]:
            yield Verdict(title, "bad" if state == "bad" else "warn", " ".join(said))
            return
    if told:
        yield Verdict(title, "good", nothing.format(told[0][1]))


def _zero_variance(metrics: Metrics) -> Iterator[Verdict]:
    def judge() -> Iterator[tuple[State, str]]:
        for name, values in _ending(metrics, "zero_variance", "solver_zero_variance", "coach_zero_variance"):
            share = _late(values)
            text = f"{percent(share)} of the groups earn all the same late in training ({name}), and teach nothing."
            yield ("bad" if share > 0.9 else "warn" if share > 0.6 else "good"), text

    more = "Groups differ enough to learn from: {0}"
    for verdict in _worst("Groups that teach nothing", judge(), more):
        advice = (
            " Harder or easier tasks, more siblings, or credit by turn help."
            if verdict.state in ("bad", "warn")
            else ""
        )
        yield Verdict(verdict.title, verdict.state, verdict.text + advice)


def _entropy(metrics: Metrics) -> Iterator[Verdict]:
    def judge() -> Iterator[tuple[State, str]]:
        for name, values in _ending(metrics, "entropy"):
            before, after, _ = moved(values)
            text = f"{name} went from {show(before)} to {show(after)} nats."
            gone = before > 0 and after < 0.05 * before
            yield ("bad" if gone else "warn" if before > 0 and after < 0.2 * before else "good"), text

    yield from _worst("Entropy", judge(), "It still explores: {0}")


def _explained(metrics: Metrics) -> Iterator[Verdict]:
    spread = metrics.finite("reward/std")
    alike = len(spread) > 3 and moved(spread)[1] < 0.25 * moved(spread)[0]

    def judge() -> Iterator[tuple[State, str]]:
        for name, values in _ending(metrics, "explained_variance"):
            share = _late(values)
            known = "knows less than the mean return" if share < 0 else f"explains {percent(share)} of the variance"
            excuse = ", of returns that hardly differ any more" if alike and share < 0.1 else ""
            state: State = "bad" if share < -0.1 and not alike else "warn" if share < 0.1 else "good"
            yield state, f"The critic behind {name} {known}{excuse}."

    yield from _worst("Critic", judge(), "{0}")


def _mismatch(metrics: Metrics) -> Iterator[Verdict]:
    def judge() -> Iterator[tuple[State, str]]:
        for name, values in _ending(metrics, "first_mismatch"):
            most = max(values)
            text = f"Their log-probabilities differ by up to {show(most)} before the first update ({name})."
            yield ("bad" if most > 0.01 else "warn" if most > 1e-3 else "good"), text

    yield from _worst("Sampler and trainer", judge(), "They agree. {0}")


def _drift(metrics: Metrics) -> Iterator[Verdict]:
    def judge() -> Iterator[tuple[State, str]]:
        for name, values in _ending(metrics, "kl_to_start"):
            far = _late(values)
            yield ("bad" if far > 3 else "warn" if far > 1 else "good"), f"{name} is {show(far)} nats per token."
        for name, values in _ending(metrics, "kl"):
            if name.partition("/")[0] not in ("low", "shaped", "objective", "group"):
                far = _late(values)
                text = f"A step moves the policy by {show(far)} nats per token ({name})."
                yield ("bad" if far > 0.3 else "warn" if far > 0.1 else "good"), text

    yield from _worst("Drift of the policy", judge(), "Small. {0}")


def _length(metrics: Metrics) -> Iterator[Verdict]:
    def judge() -> Iterator[tuple[State, str]]:
        for name, values in _ending(metrics, "turn/tokens", "solver/length", "coach/length", "low/length"):
            before, after, _ = moved(values)
            factor = after / before if before > 0 else 1.0
            text = f"{name} went from {show(before)} to {show(after)}."
            yield ("warn" if factor > 2 or factor < 0.5 else "good"), text
        for name, values in _ending(metrics, "cut_off"):
            share = _late(values)
            text = f"{percent(share)} of the turns are cut off at the longest length ({name})."
            yield ("bad" if share > 0.5 else "warn" if share > 0.1 else "good"), text

    yield from _worst("Length", judge(), "Steady. {0}")


def _parsing(metrics: Metrics) -> Iterator[Verdict]:
    def judge() -> Iterator[tuple[State, str]]:
        for name, values in _ending(metrics, "unparsed", "episode/invalid"):
            share = _late(values)
            text = f"{percent(share)} of the answers could not be read late in training ({name})."
            yield ("bad" if share > 0.5 else "warn" if share > 0.05 else "good"), text

    yield from _worst("Answers that cannot be read", judge(), "{0}")


def _failures(metrics: Metrics) -> Iterator[Verdict]:
    for _, values in _ending(metrics, "episode/failed"):
        count = round(sum(values))
        text = f"{count} episodes failed: filter the episodes by outcome to see why." if count else "No episode failed."
        yield Verdict("Episodes that failed", "warn" if count else "good", text)


CHECKS: tuple[Callable[[Metrics], Iterator[Verdict]], ...] = (
    _zero_variance,
    _entropy,
    _explained,
    _mismatch,
    _drift,
    _length,
    _parsing,
    _failures,
)


def _summed(tallies: Mapping[int, Tally], share: Callable[[Tally], tuple[int, int]]) -> tuple[float, float, int]:
    """A share in the first fifth of the steps, in the last, and how many cases the last has."""
    parts = []
    for steps in fifths(sorted(tallies)) if tallies else ():
        counts = [share(tallies[int(step)]) for step in steps]
        parts.append((sum(some for some, _ in counts), sum(every for _, every in counts)))
    (some, every), (late, cases) = parts or ((0, 0), (0, 0))
    return some / every if every else 0.0, late / cases if cases else 0.0, cases


def _repeats(scan: Scan) -> Iterator[Verdict]:
    before, after, cases = _summed(scan.tallies, lambda tally: (tally.repeated, tally.again))
    if not cases or len(scan.texts) < 32:  # who picks among few words says them again
        return
    text = f"{percent(after)} of the turns say what the same role said last, {percent(before)} in the first fifth."
    yield Verdict("Repeated utterances", "bad" if after > 0.5 else "warn" if after > 0.2 else "good", text)


def _ignored(scan: Scan) -> Iterator[Verdict]:
    before, after, cases = _summed(scan.tallies, lambda tally: (tally.unmoved, tally.told))
    if cases:
        text = f"Told that it was wrong, {percent(after)} of the attempts stay the same ({percent(before)} at first)."
        yield Verdict("Feedback that is ignored", "bad" if after > 0.8 else "warn" if after > 0.4 else "good", text)


def show(value: float) -> str:
    """A number as people read it."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share in whole percent, and below that what it is."""
    return f"{100 * share:.0f} %" if share == 0 or abs(share) >= 0.01 else f"{100 * share:.2g} %"
