"""The names that others gave to what PPO logs, so that their dashboards go on working."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from echelon.types import Episode

TRL = {
    "lr": "policy/lr",
    "objective/kl": "shaped/kl",
    "objective/non_score_reward": "shaped/kl_reward",
    "objective/scores": "shaped/score",
    "objective/rlhf_reward": "shaped/return",
    "policy/approxkl_avg": "policy/kl",
    "policy/clipfrac_avg": "policy/clipped",
    "policy/entropy_avg": "policy/entropy",
    "loss/policy_avg": "policy/loss",
    "loss/value_avg": "value/loss",
    "val/clipfrac_avg": "value/clipped",
    "val/ratio": "policy/ratio",
    "val/ratio_var": "policy/ratio_var",
}
"""TRL's name → ours. Where both estimate the same differently, it is our estimate."""


def trl_names(metrics: Mapping[str, float], played: Sequence[Episode], episodes: int) -> dict[str, float]:
    """What is in the metrics under TRL's names too, and what only TRL counts, after so many episodes."""
    turns = [turn for episode in played for turn in episode.turns]
    surprisal = -sum(sum(turn.logprobs) for turn in turns) / len(played)
    counted = {
        "episode": float(episodes),
        "objective/entropy": surprisal,
        "val/num_eos_tokens": float(sum(turn.stop == "stop" for turn in turns)),
    }
    return {alias: metrics[name] for alias, name in TRL.items() if name in metrics} | counted
