"""What the coach could earn from a solver that has already learned to use what it says.

The solver's best response to the coach as it is now, which the two-level objective compares with, is stood in for by
the solver after some more updates, or by the average of its past: weights are put in place, sampled from, taken out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.errors import EchelonError
from echelon.ops.trees import child_mean
from echelon.rollout.feedback import judge
from echelon.rollout.feedback_credit import Tree
from echelon.rollout.rewards import Rewards, answer_in
from echelon.rollout.roles import Role
from echelon.train.learner import Learner
from echelon.types import Env, Task, Turn


@contextmanager
def looking_ahead(solver: Learner, learn: Callable[[Learner], object]) -> Iterator[None]:
    """Within, the solver's weights are those after `learn`, which gets them with an optimizer of their own, at the
    learning rate of the solver's next step. After it they are what they were, bit for bit."""
    kept = [parameter.detach().clone() for parameter in solver.trained]
    now = replace(solver.optim, lr=solver.learning_rate(), schedule="constant", warmup_steps=0, warmup_fraction=0.0)
    ahead = Learner(solver.module, now, name="look-ahead", adapter=solver.adapter)
    try:
        learn(ahead)
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(solver.trained, kept, strict=True):
                parameter.copy_(before)
                parameter.grad = None


@dataclass(frozen=True, slots=True)
class Responses:
    """What a best response earned."""

    score_N: Float[Tensor, "N"]
    """For each turn of feedback the mean score of the attempts after it; 0 for other turns."""
    failed: int
    """Attempts that could not be judged. A turn all of whose attempts failed has the score that was earned after it."""


def response_scores(
    tree: Tree, tasks: Sequence[Task], make: Callable[[Task], Env], solver: Role, rewards: Rewards
) -> Responses:
    """What as many attempts after each turn of feedback as were made earn, drawn from `solver` now.

    `tasks` are those of the episodes, by their place. Each is drawn with the random numbers of the attempt it stands
    beside: where weights hardly differ, neither do attempts, and the difference of two scores is less noisy than each.
    The attempts are no turns of the episodes, and nobody learns from them. Raises DataError as the judges do.
    """
    told_N = tree.later_N & ~tree.solver_N[tree.parent_N.clamp(min=0)]
    places = told_N.nonzero()[:, 0].tolist()

    async def one(place: int) -> Turn:
        turn = tree.turns[place]
        said = await solver.sampler.sample(turn.prompt, replace(solver.params, seed=turn.seed))
        attempt = Turn(0, turn.role, turn.prompt, said.tokens, said.logprobs, said.text)
        await judge(make, tasks[int(tree.episode_N[place])], [attempt])
        return attempt

    async def all_of_them() -> dict[int, Turn]:
        drawn = await asyncio.gather(*map(one, places), return_exceptions=True)
        for raised in drawn:
            if isinstance(raised, EchelonError) or not isinstance(raised, Turn | Exception):
                raise raised
        return {place: turn for place, turn in zip(places, drawn, strict=True) if isinstance(turn, Turn)}

    found = asyncio.run(all_of_them())
    beside = {place: answer_in(tree.episodes[int(tree.episode_N[place])], tree.turns[place]) for place in found}
    verdicts = rewards.score([replace(beside[place], completion=found[place].text) for place in found])
    for turn, verdict in zip(found.values(), verdicts, strict=True):
        turn.reward += verdict.reward
    score_N, parent_N, there = torch.zeros(len(tree.turns)), torch.full_like(tree.parent_N, -1), [*found]
    score_N[there], parent_N[there] = torch.tensor([found[place].reward for place in there]), tree.parent_N[there]
    best_N, known_N = child_mean(score_N, parent_N)
    earned_N = child_mean(tree.score_N, tree.parent_N)[0]
    best_N = torch.where(~tree.solver_N & ~known_N, earned_N, best_N)
    return Responses(torch.where(tree.solver_N, 0.0, best_N), len(places) - len(found))
