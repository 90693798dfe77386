"""The two-level objective on a game small enough to list: credit, comparison and best response against the exact
gradient; and a solver that looks ahead and comes back as it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from echelon.config import OptimConfig
from echelon.errors import DataError
from echelon.rollout.best_response import looking_ahead, response_scores
from echelon.rollout.feedback import COACH, SOLVER, Shape, TemplateConfig, feedback_tree
from echelon.rollout.feedback_credit import CreditConfig, Tree, credits, lay_tree
from echelon.rollout.feedback_levels import LevelConfig, compared
from echelon.rollout.rewards import Rewards
from echelon.rollout.roles import Role, collect
from echelon.sampling.scripted import ScriptedSampler
from echelon.text.chat import Renderer
from echelon.train.learner import Learner
from echelon.types import Episode, SamplingParams, Turn
from tests.recipes.doors import DOORS, KEYS, TEMPLATES, Doors

FIRST = torch.tensor([1.0, 0.0])
"""What each first attempt is worth."""
LATER = torch.tensor([[[1.0, 0.8], [0.9, 0.5]], [[0.0, 0.6], [0.3, 0.1]]])
"""What each later attempt is worth: by first attempt, words, attempt."""


class Game:
    """A problem with two answers, two things to say about each, and two answers again: everything is a table."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.solve = torch.randn(2, dtype=torch.float64, requires_grad=True)
        self.words = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
        self.again = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
        self.best = torch.randn(2, 2, 2, dtype=torch.float64)
        """How a best response answers; nothing learns through it."""

    def gradient(self, objective: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(objective, [self.solve, self.words, self.again], allow_unused=True)
        pairs = zip(found, [self.solve, self.words, self.again], strict=True)
        return [torch.zeros_like(table) if grad is None else grad for grad, table in pairs]

    def earned(self, again: Tensor) -> Tensor:
        """The expected score of the last attempt, exactly."""
        told = self.solve.softmax(0)[:, None] * self.words.softmax(1)
        return (told[:, :, None] * again.softmax(2) * LATER).sum()

    def first_earned(self) -> Tensor:
        return (self.solve.softmax(0) * FIRST).sum()


def trees(remarks: int, refinements: int) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Every way an episode with one first attempt can go."""
    return [
        (z, words, again)
        for z in range(2)
        for words in product(range(2), repeat=remarks)
        for again in product(range(2), repeat=remarks * refinements)
    ]


def laid(z: int, words: tuple[int, ...], again: tuple[int, ...]) -> Tree:
    """One of them as the turns the recipe sees."""
    each = len(again) // len(words)
    turns = [Turn(0, SOLVER, [0], [1], [0.0], "", None, reward=float(FIRST[z]))]
    turns += [Turn(1 + n, COACH, [0], [1], [0.0], "", 0) for n in range(len(words))]
    for number, y in enumerate(again):
        remark = number // each
        score = float(LATER[z, words[remark], y])
        turns.append(Turn(len(turns), SOLVER, [0], [1], [0.0], "", 1 + remark, reward=score))
    return lay_tree([Episode("t", turns=turns, ending="terminated")])


def expected(
    game: Game,
    advantages: Callable[[Tree, Tensor | None], Tensor],
    remarks: int,
    refinements: int,
    *,
    best: bool = False,
) -> list[Tensor]:
    """The expectation of the estimator: over all trees, Σ advantage · ∇ log-probability, a mean over the turns of each
    kind; with `best` also over all that a best response can answer."""
    total: Any = 0.0
    for z, words, again in trees(remarks, refinements):
        log_solve = game.solve.log_softmax(0)[z]
        log_words = [game.words.log_softmax(1)[z, g] for g in words]
        log_again = [game.again.log_softmax(2)[z, words[n // refinements], y] for n, y in enumerate(again)]
        chance = (log_solve + sum(log_words) + sum(log_again)).exp().detach()
        tree = laid(z, words, again)
        for answers in product(range(2), repeat=remarks if best else 0):
            chance_of = chance
            response_N = None
            if best:
                response_N = torch.zeros(len(tree.turns))
                for n, y in enumerate(answers):
                    chance_of = chance_of * game.best.softmax(2)[z, words[n], y]
                    response_N[1 + n] = LATER[z, words[n], y]
            found = advantages(tree, response_N).double().tolist()
            coach, later = found[1 : 1 + remarks], found[1 + remarks :]
            said = found[0] * log_solve
            said = said + sum(a * lp for a, lp in zip(coach, log_words, strict=True)) / remarks
            said = said + sum(a * lp for a, lp in zip(later, log_again, strict=True)) / len(later)
            total = total + chance_of * said
    return game.gradient(total)


def estimator(
    cfg: CreditConfig, *, coach: str = "none", solver: str = "none"
) -> Callable[[Tree, Tensor | None], Tensor]:
    """Credit and comparison as the recipe computes them."""

    def advantages(tree: Tree, response_N: Tensor | None) -> Tensor:
        value_N = credits(cfg, tree, response_N=response_N)
        nothing_N = torch.zeros(len(tree.turns))
        return compared(LevelConfig(baseline=solver), tree, value_N, tree.solver_N, nothing_N) + compared(  # type: ignore[arg-type]
            LevelConfig(baseline=coach),
            tree,
            value_N,
            ~tree.solver_N,
            nothing_N,  # type: ignore[arg-type]
        )

    return advantages


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("improvement", [True, False])
@pytest.mark.parametrize(("coach", "remarks"), [("none", 1), ("leave_one_out", 2)])
def test_credit_for_words_follows_the_exact_gradient_of_what_they_lead_to(
    improvement: bool, coach: str, remarks: int
) -> None:
    game = Game()
    found = expected(game, estimator(CreditConfig(improvement=improvement), coach=coach), remarks, 1)
    close(found[1:2], game.gradient(game.earned(game.again))[1:2])


def test_improvement_is_less_noisy_than_the_score_and_neither_is_biased() -> None:
    noise = {}
    for improvement in (True, False):
        cfg = CreditConfig(improvement=improvement)
        squares = 0.0
        game = Game()
        for z, words, again in trees(1, 1):
            chance = game.solve.softmax(0)[z] * game.words.softmax(1)[z, words[0]]
            chance = chance * game.again.softmax(2)[z, words[0], again[0]]
            score = torch.autograd.grad(game.words.log_softmax(1)[z, words[0]], game.words)[0]
            credit = credits(cfg, laid(z, words, again))[1].item()
            squares += chance.item() * (credit * score).square().sum().item()
        noise[improvement] = squares
    assert noise[True] < 0.9 * noise[False]


def test_leave_one_out_among_attempts_follows_the_exact_gradient_and_the_group_mean_half_of_it() -> None:
    game = Game()
    wanted = game.gradient(game.earned(game.again))[2]
    for baseline, part in (("leave_one_out", 1.0), ("group", 0.5)):
        found = expected(game, estimator(CreditConfig(), solver=baseline), 1, 2)[2]
        torch.testing.assert_close(found, part * wanted, rtol=1e-6, atol=1e-8)


def test_turn_local_first_attempts_answer_for_themselves_and_to_go_for_all_that_follows() -> None:
    game = Game()
    local = expected(game, estimator(CreditConfig()), 1, 1)
    close(local[:1], game.gradient(game.first_earned())[:1])
    to_go = CreditConfig(to="return_to_go", improvement=False)
    both = game.first_earned() + game.earned(game.again)
    close(expected(game, estimator(to_go), 2, 1), game.gradient(both))


@pytest.mark.parametrize("weight", [0.5, 3.0])
@pytest.mark.parametrize(("coach", "remarks"), [("none", 1), ("leave_one_out", 2)])
def test_the_gap_follows_the_exact_gradient_of_the_relaxed_two_level_objective(
    weight: float, coach: str, remarks: int
) -> None:
    game = Game()
    objective = game.earned(game.again) - weight * (game.earned(game.best) - game.earned(game.again))
    wanted = game.gradient(objective + game.first_earned())
    found = expected(game, estimator(CreditConfig(gap=weight), coach=coach), remarks, 1, best=True)
    close(found[1:], wanted[1:])


def test_without_the_best_response_the_gradient_would_be_another() -> None:
    game = Game()
    plain = game.gradient(game.earned(game.again))[1]
    gap = game.gradient(2 * game.earned(game.again) - game.earned(game.best))[1]
    assert (plain - gap).abs().max() > 0.1 * plain.abs().max()


# the solver comes back as it was


def test_looking_ahead_learns_at_the_solvers_rate_and_leaves_everything_as_it_was() -> None:
    module = nn.Linear(3, 2)
    solver = Learner(module, OptimConfig(lr=0.1, warmup_steps=10, schedule="linear"), total_steps=20, name="solver")

    def step(learner: Learner) -> dict[str, float]:
        return learner.update([Row()], lambda m, row: (m(torch.ones(1, 3)).sum(), {}))

    for _ in range(4):
        step(solver)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    state = {
        k: {n: torch.as_tensor(x).clone() for n, x in v.items()}
        for k, v in solver.optimizer.state_dict()["state"].items()
    }
    rates = []
    with looking_ahead(solver, lambda learner: rates.append(step(learner)["lr"])):
        assert any(not p.equal(b) for p, b in zip(module.parameters(), before, strict=True))
    assert rates == [pytest.approx(solver.learning_rate())]
    assert all(p.equal(b) for p, b in zip(module.parameters(), before, strict=True))
    assert solver.version == 4
    after = solver.optimizer.state_dict()["state"]
    assert all(torch.as_tensor(after[k][n]).equal(x) for k, v in state.items() for n, x in v.items())
    with pytest.raises(ZeroDivisionError), looking_ahead(solver, lambda learner: [step(learner), 1 / 0]):
        pass
    assert all(p.equal(b) for p, b in zip(module.parameters(), before, strict=True))


class Row:
    """A micro-batch that needs no device."""

    def to(self, device: object) -> Row:
        return self


def scripted(say: Callable[[str, SamplingParams], str]) -> tuple[Role, Role]:
    from echelon.models.lm import tiny

    tokenizer = tiny(["A1!2?3.B C".replace(" ", "")], vocab_size=300, hidden=16, layers=1, heads=2)[1]

    def answer(prompt: list[int], params: SamplingParams) -> str:
        return say(tokenizer.decode(prompt), params)

    sampler, renderer = ScriptedSampler(answer, tokenizer), Renderer(tokenizer)
    return Role(SOLVER, sampler, renderer, SamplingParams()), Role(COACH, sampler, renderer, SamplingParams())


def played(solver: Role, coach: Role) -> Tree:
    play = feedback_tree(Doors, solver, coach, shape=Shape(1, 2, 2), templates=TemplateConfig(**TEMPLATES))
    return lay_tree(asyncio.run(collect(Doors.tasks("train")[:3], play, seed=0)))


def any_key(prompt: str, params: SamplingParams) -> str:
    return KEYS[(params.seed or 0) % 3]


def test_a_best_response_is_drawn_with_the_numbers_of_the_attempt_it_stands_beside() -> None:
    solver, coach = scripted(any_key)
    tree, tasks = played(solver, coach), Doors.tasks("train")[:3]
    found = response_scores(tree, tasks, Doors, solver, Rewards())
    assert found.failed == 0
    for place, parent in enumerate(tree.parent_N.tolist()):
        if not tree.solver_N[place]:
            scores = [t.reward for t, p in zip(tree.turns, tree.parent_N.tolist(), strict=True) if p == place]
            assert found.score_N[place].item() == sum(scores) / 2, "the same weights say the same"
        elif parent < 0:
            assert found.score_N[place] == 0
    assert len(tree.turns) == 3 * 7, "what it said is no turn of the episodes"


def test_a_better_response_earns_more() -> None:
    solver, coach = scripted(any_key)
    tree, tasks = played(solver, coach), Doors.tasks("train")[:3]
    knows, _ = scripted(lambda prompt, params: KEYS[next(DOORS.index(c) for c in prompt if c in DOORS)])
    found = response_scores(tree, tasks, Doors, knows, Rewards())
    assert found.score_N.tolist() == (~tree.solver_N).float().tolist()


def test_an_attempt_that_cannot_be_judged_says_nothing_about_the_best_response() -> None:
    class Breaks(Doors):
        def step(self, action: str) -> Any:
            if action == "3":
                raise ZeroDivisionError
            return super().step(action)

    class Infinite(Doors):
        def step(self, action: str) -> Any:
            return replace(super().step(action), reward=float("inf"))

    solver, coach = scripted(any_key)
    tree, tasks = played(solver, coach), Doors.tasks("train")[:3]
    found = response_scores(tree, tasks, Breaks, solver, Rewards())
    threes = [t.text for t, later in zip(tree.turns, tree.later_N.tolist(), strict=True) if later].count("3")
    assert found.failed == threes > 0
    assert found.score_N.isfinite().all()
    always, _ = scripted(lambda prompt, params: "3")
    beside = response_scores(tree, tasks, Breaks, always, Rewards())
    assert beside.failed == 3 * 4
    for place in (~tree.solver_N).nonzero()[:, 0].tolist():
        scores = [t.reward for t, p in zip(tree.turns, tree.parent_N.tolist(), strict=True) if p == place]
        assert beside.score_N[place].item() == sum(scores) / 2, "no gap where nothing is known"
    with pytest.raises(DataError, match="finite number"):
        response_scores(tree, tasks, Infinite, solver, Rewards())
