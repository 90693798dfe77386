"""Verdicts on curves that were made to deserve them."""

from __future__ import annotations

import pytest

from echelon.view.episodes import Scan, Tally
from echelon.view.health import Verdict, checks, group_of, learned, level_of, levels, outcome_of
from echelon.view.runs import Metrics


def curves(**columns: list[float]) -> Metrics:
    """Columns whose names are written with two underscores for a slash."""
    named = {name.replace("__", "/"): list(values) for name, values in columns.items()}
    return Metrics(list(range(len(next(iter(named.values()))))), dict(named))


def verdict(metrics: Metrics, title: str, scan: Scan | None = None) -> Verdict:
    return next(one for one in checks(metrics, scan or Scan()) if one.title == title)


WAVE = [0.1, -0.1] * 10


def test_a_return_that_rises_beyond_its_noise_was_learned() -> None:
    found = learned(curves(reward__mean=[at + wave for at, wave in enumerate(WAVE)]))
    assert found.state == "good"
    assert found.text == "Yes: reward/mean rose from 1.5 in the first fifth of the steps to 17.5 in the last."


def test_a_return_that_only_wavers_was_not() -> None:
    assert learned(curves(reward__mean=WAVE)).state == "warn"
    assert learned(curves(reward__mean=[1.0] * 20)).state == "warn"


def test_a_return_that_falls_is_bad_and_a_loss_that_falls_is_good() -> None:
    falling = [20.0 - at + wave for at, wave in enumerate(WAVE)]
    assert learned(curves(reward__mean=falling)).state == "bad"
    assert learned(curves(loss=falling)).state == "good"


def test_three_steps_are_too_few_to_tell() -> None:
    found = learned(curves(reward__mean=[1.0, 2.0, 3.0]))
    text = "Too few steps are recorded to tell: reward/mean is there 3 times, and 4 are needed."
    assert (found.state, found.text) == ("none", text)
    assert levels(curves(policy__entropy=[1.0, 2.0, 3.0])) == []


def test_an_outcome_that_is_seldom_recorded_gives_way_to_one_that_tells() -> None:
    falling = [20.0 - at + wave for at, wave in enumerate(WAVE)]
    rare = Metrics(list(range(20)), {"loss": list(falling), "eval/loss": [9.0, *[None] * 18, 8.0]})
    assert outcome_of(rare) == "loss"
    assert learned(rare).state == "good"
    often = Metrics(list(range(20)), {"loss": list(falling), "eval/loss": list(falling)})
    assert outcome_of(often) == "eval/loss"
    few = Metrics([0, 1], {"loss": [2.0, 1.0], "eval/loss": [None, 1.0]})
    assert outcome_of(few) == "eval/loss"
    assert "eval/loss is there once" in learned(few).text


def test_what_only_parts_of_a_run_have_is_no_outcome() -> None:
    parts = curves(policy__loss=WAVE, critic__loss=WAVE)
    assert outcome_of(parts) == ""
    assert learned(parts).state == "none"
    assert learned(parts).text.startswith("Nothing that is recorded says what the run is for: no return, no accuracy,")
    tested = Metrics(list(range(20)), {"policy/loss": list(WAVE), "eval/return": [*[None] * 19, 1.0]})
    assert outcome_of(tested) == "eval/return"


@pytest.mark.parametrize(
    ("title", "name", "values", "state"),
    [
        ("Groups that teach nothing", "group__zero_variance", [0.95] * 20, "bad"),
        ("Groups that teach nothing", "group__zero_variance", [0.1] * 20, "good"),
        ("Groups that teach nothing", "group__coach_zero_variance", [0.7] * 20, "warn"),
        ("Entropy", "policy__entropy", [1.0] * 10 + [0.01] * 10, "bad"),
        ("Entropy", "policy__entropy", [1.0] * 10 + [0.1] * 10, "warn"),
        ("Entropy", "policy__entropy", [1.0] * 20, "good"),
        ("Critic", "critic__explained_variance", [-0.5] * 20, "bad"),
        ("Critic", "low__value__explained_variance", [0.05] * 20, "warn"),
        ("Critic", "critic__explained_variance", [0.8] * 20, "good"),
        ("Sampler and trainer", "policy__first_mismatch", [1e-5] * 19 + [0.5], "bad"),
        ("Sampler and trainer", "policy__first_mismatch", [1e-5] * 20, "good"),
        ("Drift of the policy", "policy__kl_to_start", [5.0] * 20, "bad"),
        ("Drift of the policy", "policy__kl", [0.2] * 20, "warn"),
        ("Drift of the policy", "policy__kl", [0.001] * 20, "good"),
        ("Length", "turn__tokens", [10.0] * 10 + [30.0] * 10, "warn"),
        ("Length", "turn__cut_off", [0.9] * 20, "bad"),
        ("Length", "turn__tokens", [10.0] * 20, "good"),
        ("Answers that cannot be read", "reward__math__unparsed", [0.6] * 20, "bad"),
        ("Answers that cannot be read", "attempts__unparsed", [0.0] * 20, "good"),
        ("Episodes that failed", "episode__failed", [0.0] * 19 + [2.0], "warn"),
        ("Episodes that failed", "episode__failed", [0.0] * 20, "good"),
    ],
)
def test_a_check_tells_what_is_wrong(title: str, name: str, values: list[float], state: str) -> None:
    assert verdict(curves(**{name: values}), title).state == state


def test_a_critic_is_not_blamed_where_returns_do_not_differ() -> None:
    both = curves(critic__explained_variance=[-0.5] * 20, reward__std=[1.0] * 10 + [0.01] * 10)
    assert verdict(both, "Critic").state == "warn"
    assert verdict(both, "Critic").text.endswith("of returns that hardly differ any more.")


def test_what_is_wrong_comes_first_and_what_is_not_measured_is_not_told() -> None:
    found = checks(curves(policy__entropy=[1.0] * 20, turn__cut_off=[0.9] * 20), Scan())
    assert [one.title for one in found] == ["Length", "Entropy"]


def test_repeats_count_where_there_are_many_things_to_say() -> None:
    scan = Scan(tallies={step: Tally(again=10, repeated=step) for step in range(10)}, texts={str(n) for n in range(40)})
    found = verdict(Metrics(), "Repeated utterances", scan)
    assert (found.state, found.text) == (
        "bad",
        "80 % of the turns say what the same role said last, 10 % in the first fifth.",
    )
    scan.texts = {"left", "right"}
    assert checks(Metrics(), scan) == []


def test_attempts_that_stay_wrong_ignore_their_feedback() -> None:
    scan = Scan(tallies={0: Tally(told=10, unmoved=9)})
    found = verdict(Metrics(), "Feedback that is ignored", scan)
    assert found.state == "bad"
    assert "90 % of the attempts stay the same" in found.text


def test_a_metric_is_of_a_level() -> None:
    assert level_of("critic/loss") == ("upper", "critic of utterances")
    assert level_of("low/value/loss") == ("lower", "responder")
    assert level_of("reward/mean") is None
    assert group_of("policy/loss", ["policy/loss"])[0] == "Policy"
    assert group_of("policy/loss", ["policy/loss", "critic/loss"])[0] == "Lower level: policy"
    assert group_of("reward/length", ["reward/length"])[0] == "Reward by term"
    assert group_of("eval/loss", ["eval/loss"])[0] == "Held out"


def test_each_level_says_whether_it_learned_and_what_changed() -> None:
    both = curves(
        critic__explained_variance=[0.1] * 10 + [0.5] * 10,
        policy__entropy=[1.0] * 10 + [0.5] * 10,
        planner__entropy=[1.0] * 20,
    )
    assert [(one.title, one.text) for one in levels(both)] == [
        ("Upper level: critic of utterances", "It learned: variance explained 0.1 → 0.5."),
        ("Upper level: planner", "It hardly moved: entropy 1 → 1 nats."),
        ("Lower level: policy", "It changed: entropy 1 → 0.5 nats."),
    ]


def test_a_level_whose_judge_says_that_it_got_worse_changed() -> None:
    worse = curves(high__td_error=[1.0] * 10 + [2.0] * 10, high__entropy=[1.0] * 20)
    assert [one.text for one in levels(worse)] == ["It changed: error of Q 1 → 2; entropy 1 → 1 nats."]
