"""What the coach could earn from a solver that has already learned to use what it says.

The solver's best response to the coach as it is now, which the two-level objective compares with, is stood in for by
the solver after some more updates, or by the average of its past: weights are put in place, sampled from, taken out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.rollout.feedback import judge
from echelon.rollout.feedback_credit import Tree
from echelon.rollout.roles import Role
from echelon.seeds import derive_seed
from echelon.train.learner import Learner
from echelon.types import Env, Task, Turn


@contextmanager
def looking_ahead(solver: Learner, learn: Callable[[Learner], object]) -> Iterator[None]:
    """Within, the solver's weights are those after `learn`, which gets them with an optimizer of their own."""
    kept = [parameter.detach().clone() for parameter in solver.trained]
    ahead = Learner(solver.module, solver.optim, total_steps=0, name="look-ahead", adapter=solver.adapter)
    try:
        learn(ahead)
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(solver.trained, kept, strict=True):
                parameter.copy_(before)


def response_scores(
    tree: Tree, tasks: Sequence[Task], make: Callable[[Task], Env], solver: Role, *, seed: int
) -> Float[Tensor, "N"]:
    """For each turn of feedback, the mean score of as many attempts after it as were made, drawn from `solver` now.

    `tasks` are those of the episodes, by their place. 0 where nothing was tried after a turn. The attempts are no turns
    of the episodes, and nobody learns from them.
    """
    after: dict[int, list[Turn]] = {}
    for place, parent in enumerate(tree.parent_N.tolist()):
        if parent >= 0 and bool(tree.solver_N[place]) and not bool(tree.solver_N[parent]):
            after.setdefault(parent, []).append(tree.turns[place])

    async def one(place: int, turn: Turn, number: int) -> float:
        params = replace(solver.params, seed=derive_seed(seed, "response", turn.seed, number))
        said = await solver.sampler.sample(turn.prompt, params)
        attempt = Turn(0, turn.role, turn.prompt, said.tokens, said.logprobs, said.text)
        await judge(make, tasks[int(tree.episode_N[place])], [attempt])
        return attempt.reward

    async def all_of_them() -> list[list[float]]:
        return await asyncio.gather(
            *(
                asyncio.gather(*(one(place, turn, number) for number, turn in enumerate(turns)))
                for place, turns in after.items()
            )
        )

    scores_N = torch.zeros(len(tree.turns))
    for place, scores in zip(after, asyncio.run(all_of_them()), strict=True):
        scores_N[place] = sum(scores) / len(scores)
    return scores_N
