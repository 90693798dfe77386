"""What every turn of solving, feedback and solving again is worth, and compared with what.

Episodes in, one number per turn out. MLMT-RL (OpenReview u1RjV99DPu) and its successor Bi-NAC (arXiv 2605.24547) are
settings of `CreditConfig`, and so is two-turn self-correction (SCoRe, arXiv 2409.12917).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from echelon.config import demand
from echelon.errors import DataError
from echelon.ops.trees import attempt_before, child_mean, tree_values
from echelon.rollout.feedback import SOLVER
from echelon.types import Episode, Turn


@dataclass(frozen=True)
class CreditConfig:
    """What a turn is credited with. Every number may change from stage to stage."""

    to: Literal["turn_local", "return_to_go"] = "turn_local"
    """Turn-local: an attempt has its own score, feedback the scores of the attempts right after it. Return to go: also
    what follows them, discounted."""
    first: float = 1.0
    """What the score of a first attempt counts for that attempt; 0 only holds it near the start (stage I)."""
    progress: float = 0.0
    """α: how much better an attempt is than the one before counts besides its score. Turn-local it changes nothing but
    the scale, since the earlier score is known in that state. To go, more than 1 rewards failing first."""
    improvement: bool = True
    """Credit feedback with how much better the attempt after it is than the one before; else with its score."""
    gamma: float = 1.0
    """Discount per turn (return_to_go)."""
    gap: float = 0.0
    """λ: feedback is also credited with how much more the solver earns by it than a best response of the solver would,
    and attempts after feedback count 1 + λ: the relaxed two-level objective. 0 needs no best response."""
    utilisation: float = 0.0
    """What the gain in log-probability per token that the feedback gives an attempt counts. It rewards being different
    whatever it is good for: keep it at 0.01 or below."""
    utilisation_clip: float = 10.0
    """Largest size of that gain, in nats per token."""
    kl_first: float = 0.0
    """Weight of the KL of a first attempt to the solver's start, summed over its tokens, taken off its credit."""
    kl_refine: float = 0.0
    """The same of later attempts."""
    kl_feedback: float = 0.0
    """The same of feedback, to the coach's start."""

    def __post_init__(self) -> None:
        for name in ("first", "progress", "gap", "utilisation", "kl_first", "kl_refine", "kl_feedback"):
            least = 0 <= getattr(self, name) < math.inf
            demand(self, name, least, "a negative weight rewards the opposite. Give 0 or more.")
        demand(self, "gamma", 0 <= self.gamma <= 1, "a discount lies between 0 and 1.")
        demand(self, "gamma", self.gamma == 1 or self.to == "return_to_go", "nothing turn-local is discounted.")
        demand(self, "utilisation_clip", self.utilisation_clip > 0, "every gain would be nothing. Give 10.")


@dataclass(slots=True)
class Tree:
    """All turns of some episodes, one after the other, and how they hang together."""

    episodes: list[Episode]
    turns: list[Turn]
    episode_N: Int[Tensor, "N"]
    """Which episode each turn belongs to."""
    parent_N: Int[Tensor, "N"]
    """Place of the turn that a turn answers, -1 for none."""
    before_N: Int[Tensor, "N"]
    """Place of the attempt before, -1 for none."""
    depth_N: Int[Tensor, "N"]
    """Turns above it."""
    solver_N: Bool[Tensor, "N"]
    score_N: Float[Tensor, "N"]
    """What an attempt was judged to be worth; 0 for feedback."""

    def of(self, mine_N: Bool[Tensor, "N"]) -> list[Turn]:
        """Some of the turns, in order."""
        return [self.turns[place] for place in mine_N.nonzero()[:, 0].tolist()]

    @property
    def first_N(self) -> Bool[Tensor, "N"]:
        """Attempts that answer the problem alone."""
        return self.solver_N & (self.parent_N < 0)

    @property
    def later_N(self) -> Bool[Tensor, "N"]:
        """Attempts that follow something."""
        return self.solver_N & (self.parent_N >= 0)

    @property
    def gained_N(self) -> Float[Tensor, "N"]:
        """How much better an attempt is than the one before; its score where there is none; 0 for feedback."""
        return torch.where(self.solver_N, self.score_N - self.score_before_N, 0.0)

    @property
    def score_before_N(self) -> Float[Tensor, "N"]:
        """The score of the attempt before each turn, 0 where there is none."""
        return torch.where(self.before_N >= 0, self.score_N[self.before_N.clamp(min=0)], 0.0)


def lay_tree(episodes: Sequence[Episode]) -> Tree:
    """The turns of episodes that did not fail, in order."""
    turns: list[Turn] = []
    owner: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    for number, episode in enumerate(episodes):
        offset = len(turns)
        for turn in episode.turns:
            owner.append(number)
            parents.append(-1 if turn.parent is None else offset + turn.parent)
            depths.append(0 if turn.parent is None else depths[offset + turn.parent] + 1)
            turns.append(turn)
    parent_N = torch.tensor(parents, dtype=torch.long)
    solver_N = torch.tensor([turn.role == SOLVER for turn in turns], dtype=torch.bool)
    return Tree(
        episodes=list(episodes),
        turns=turns,
        episode_N=torch.tensor(owner, dtype=torch.long),
        parent_N=parent_N,
        before_N=attempt_before(parent_N, solver_N),
        depth_N=torch.tensor(depths, dtype=torch.long),
        solver_N=solver_N,
        score_N=torch.tensor([turn.reward for turn in turns], dtype=torch.float32),
    )


def credits(
    cfg: CreditConfig,
    tree: Tree,
    *,
    kl_N: Float[Tensor, "N"] | None = None,
    gain_N: Float[Tensor, "N"] | None = None,
    response_N: Float[Tensor, "N"] | None = None,
) -> Float[Tensor, "N"]:
    """What each turn is worth, before anything is subtracted that its state already knows.

    `kl_N` is the summed log-ratio of each turn to its role's start (NaN where nobody knows that), `gain_N` the
    log-probability per token that feedback gave each later attempt, `response_N` the mean score of a best response to
    each turn of feedback. Each is needed where its weight is not 0: a missing one is a DataError, never zero.
    """
    own_N = torch.where(tree.first_N, cfg.first * tree.score_N, 0.0)
    later_N = tree.score_N + cfg.progress * torch.where(tree.before_N >= 0, tree.gained_N, 0.0)
    own_N = own_N + torch.where(tree.later_N, (1 + cfg.gap) * later_N, 0.0)
    if cfg.utilisation:
        gained_N = needed(gain_N, "utilisation", "the gain in log-probability of attempts")
        clipped_N = gained_N.clamp(-cfg.utilisation_clip, cfg.utilisation_clip)
        own_N = own_N + cfg.utilisation * torch.where(tree.later_N, clipped_N, 0.0)

    if cfg.to == "return_to_go":
        value_N = tree_values(own_N, tree.parent_N, gamma=cfg.gamma)
    else:
        value_N = torch.where(tree.solver_N, own_N, followed_by(cfg, tree, own_N))
    if cfg.improvement:
        value_N = value_N - torch.where(tree.solver_N, 0.0, tree.score_before_N)
    if cfg.gap:
        best_N = needed(response_N, "gap", "the scores of a best response")
        value_N = value_N - cfg.gap * torch.where(tree.solver_N, 0.0, best_N)
    return value_N - kl_cost(cfg, tree, kl_N)


def verdicts(cfg: CreditConfig, tree: Tree) -> Float[Tensor, "N"]:
    """What each turn is worth by what attempts were judged to be worth alone: no KL, no gain, no best response."""
    return credits(replace(cfg, gap=0.0, utilisation=0.0, kl_first=0.0, kl_refine=0.0, kl_feedback=0.0), tree)


def followed_by(cfg: CreditConfig, tree: Tree, own_N: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """The mean of what the attempts right after each turn are worth, less the bonus for progress, which is theirs."""
    bonus_N = (1 + cfg.gap) * cfg.progress * torch.where(tree.before_N >= 0, tree.gained_N, 0.0)
    return child_mean(own_N - torch.where(tree.later_N, bonus_N, 0.0), tree.parent_N)[0]


def kl_cost(cfg: CreditConfig, tree: Tree, kl_N: Float[Tensor, "N"] | None) -> Float[Tensor, "N"]:
    """What each turn pays for its distance from where its role began. Raises DataError where that is not known."""
    weight_N = torch.where(tree.first_N, cfg.kl_first, torch.where(tree.later_N, cfg.kl_refine, cfg.kl_feedback))
    if not bool(weight_N.any()):
        return torch.zeros_like(weight_N)
    known_N = needed(kl_N, "kl_first, kl_refine or kl_feedback", "the log-probs of the start")
    paying_N = torch.where(weight_N > 0, known_N, 0.0)
    if paying_N.isnan().any():
        needed(None, "kl_first, kl_refine or kl_feedback", "the log-probs of the start of one role")
    return weight_N * paying_N


def state_keys(tree: Tree, compare: Literal["state", "question"]) -> list[Hashable]:
    """What turns are compared within: those that answered the very same state, or the same question at that depth."""
    shared = tree.parent_N if compare == "state" else -1 - tree.depth_N
    return list(zip(tree.episode_N.tolist(), shared.tolist(), tree.solver_N.tolist(), strict=True))


def needed(x_N: Float[Tensor, "N"] | None, setting: str, what: str) -> Float[Tensor, "N"]:
    """`x_N`. Raises DataError where it is missing: it would count, and never counts as zero."""
    if x_N is None:
        raise DataError(f"credit.{setting} counts, and {what} are missing. Compute them, or set it to 0.")
    return x_N


def described(tree: Tree) -> dict[str, float]:
    """How often attempts are right, by round, and what became of right and of wrong ones. Right is more than half of a
    score of 1. `reward/mean` is the mean score of the last attempts: what the run is about."""
    right_N, rounds_N = tree.score_N > 0.5, rounds(tree)
    last = int(rounds_N.max())
    last_N = tree.score_N[tree.solver_N & (rounds_N == last)]
    metrics = {"reward/mean": float(last_N.mean()), "reward/std": float(last_N.std(correction=0))}
    for number in range(1, last + 1):
        here_N = tree.solver_N & (rounds_N == number)
        metrics[f"accuracy/turn{number}"] = float(right_N[here_N].float().mean())
        metrics[f"score/turn{number}"] = float(tree.score_N[here_N].mean())
    again_N = tree.solver_N & (tree.before_N >= 0)
    if again_N.any():
        was_N = right_N[tree.before_N.clamp(min=0)]
        metrics["accuracy/delta"] = float(tree.gained_N[again_N].mean())
        for name, before, after in (("wrong_to_right", False, True), ("right_to_wrong", True, False)):
            metrics[f"flips/{name}"] = float(((was_N == before) & (right_N == after))[again_N].float().mean())
    parsed = [turn.info["parsed"] for turn in tree.turns if "parsed" in turn.info]
    if parsed:
        metrics["attempts/unparsed"] = 1 - sum(parsed) / len(parsed)
    metrics["prompts/cut"] = sum(turn.info.get("cut", 0.0) > 0 for turn in tree.turns) / len(tree.turns)
    return metrics


def rounds(tree: Tree) -> Int[Tensor, "N"]:
    """The number of each attempt on its branch, from 1; for feedback, of the attempt it is about."""
    found: list[int] = []
    before, solver = tree.before_N.tolist(), tree.solver_N.tolist()
    for place, attempt in enumerate(before):
        found.append((found[attempt] if attempt >= 0 else 0) + solver[place])
    return torch.tensor(found, dtype=torch.long)


def group_metrics(tree: Tree, value_N: Float[Tensor, "N"], keys: Sequence[Hashable]) -> dict[str, float]:
    """Of the groups of each level: how many teach nothing since all are worth the same, are all wrong, or all right."""
    metrics: dict[str, float] = {}
    for level, mine_N in (("solver", tree.solver_N), ("coach", ~tree.solver_N)):
        groups: dict[Hashable, list[int]] = {}
        for place in mine_N.nonzero()[:, 0].tolist():
            groups.setdefault(keys[place], []).append(place)
        if not groups:
            continue
        same = [float(value_N[places].max() - value_N[places].min()) < 1e-9 for places in groups.values()]
        metrics[f"group/{level}_zero_variance"] = sum(same) / len(same)
        if level == "solver":
            scores = [tree.score_N[places] for places in groups.values()]
            metrics["group/all_zero"] = sum(bool((s == 0).all()) for s in scores) / len(scores)
            metrics["group/all_one"] = sum(bool((s == 1).all()) for s in scores) / len(scores)
    return metrics
