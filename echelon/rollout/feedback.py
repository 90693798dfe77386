"""Solving, being told something about it, and solving again: a tree of turns of a solver and a coach.

It says who speaks when and what each is shown. What a turn is credited with is for `echelon.ops.trees`, and who learns
from it for the recipe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from echelon.config import demand
from echelon.envs._shared import settle
from echelon.errors import DataError
from echelon.rollout.plays import paid_step
from echelon.rollout.roles import Role
from echelon.seeds import derive_seed
from echelon.text.feedback import Prompt, fill, slots
from echelon.types import Env, Episode, Message, Play, Task, Turn

SOLVER, COACH = "solver", "coach"
Context = Literal["coach", "none", "fixed", "stranger", "example"]

SLOTS = {
    "solve": {"question"},
    "feedback": {"question", "attempt"},
    "refine": {"question", "attempt", "feedback"},
    "retry": {"question", "attempt"},
    "example": {"question"},
    "solve_with_example": {"question", "example"},
}
"""What each template must show."""


@dataclass(frozen=True)
class TemplateConfig:
    """What the roles are told: {question}, {attempt}, {feedback} and {example} are put in where they stand."""

    solve: str = (
        "{question}\n\nThink in steps: name what is given and what is asked, make a plan, carry it out, and state the "
        "final answer in \\boxed{{}}."
    )
    """The first attempt."""
    feedback: str = (
        "You are a tutor. Read the problem and a student's attempt at it. Say in a few short imperative sentences what "
        "to do differently and what to keep. Do not solve the problem and do not state its answer.\n\n"
        "Problem:\n{question}\n\nAttempt:\n{attempt}\n\nAdvice:"
    )
    """What is said about an attempt."""
    refine: str = (
        "{question}\n\nYour attempt so far:\n{attempt}\n\nAdvice on it:\n{feedback}\n\nSolve the problem again, taking "
        "the advice where it is right. State the final answer in \\boxed{{}}."
    )
    """The next attempt."""
    retry: str = (
        "{question}\n\nYour attempt so far:\n{attempt}\n\nThere may be a mistake in it. Go through it once more and "
        "solve the problem again. State the final answer in \\boxed{{}}."
    )
    """The next attempt where nobody has said anything about the last (context = none)."""
    example: str = (
        "You are a tutor. Write a short problem like the one below, not the same, and its solution worked out step by "
        "step.\n\nProblem:\n{question}\n\nWorked example:"
    )
    """A worked example, written before the first attempt (context = example)."""
    solve_with_example: str = (
        "Worked example:\n{example}\n\n{question}\n\nThink in steps as in the example, and state the final answer in "
        "\\boxed{{}}."
    )
    """The first attempt after a worked example."""

    def __post_init__(self) -> None:
        for name, wanted in SLOTS.items():
            try:
                found = slots(getattr(self, name))
            except ValueError as error:
                demand(self, name, False, f"{error}. Braces that mean themselves are doubled.")
            missing, unknown = sorted(wanted - found), sorted(found - wanted)
            because = f"{{{(missing or [''])[0]}}} is missing, so it would not be seen. Put it where it belongs."
            demand(self, name, not missing, because)
            because = f"there is no {{{(unknown or [''])[0]}}} here. Braces that mean themselves are doubled."
            demand(self, name, not unknown, because)


@dataclass(frozen=True, slots=True)
class Shape:
    """How an episode branches: attempts at a problem, remarks about each, new attempts after each, and how often."""

    solve: int = 1
    feedback: int = 1
    refine: int = 1
    rounds: int = 1
    """Every round branches again: there are solve · (feedback · refine) ** rounds last attempts."""

    def leaves(self, context: Context = "coach") -> int:
        """Last attempts of an episode."""
        if context == "example":
            return self.feedback * self.refine
        told = self.feedback if context in ("coach", "stranger") else 1
        return self.solve * int((told * self.refine) ** self.rounds)


def feedback_tree(
    make: Callable[[Task], Env],
    solver: Role,
    coach: Role | None,
    *,
    shape: Shape,
    templates: TemplateConfig,
    context: Context = "coach",
    fixed: str = "",
    others: Sequence[Task] = (),
) -> Play:
    """The solver answers a problem, hears something about its answer, and answers again, `rounds` times, branching.

    `make` is an environment of one turn: what it starts with is the problem, and what it gives for an answer is that
    attempt's reward; `info` of its step is the turn's. Every attempt is judged by a copy of its own, and nobody is told
    the verdict. Each turn is a conversation of its own. `context` is what comes between two attempts: what the coach
    says about the last one (coach), about another problem, drawn from `others` (stranger), always the same words
    (fixed), or nothing (none); or what comes before the first and only one: a worked example of the coach's (example).
    """
    assert (coach is None) == (context in ("none", "fixed")), "a coach speaks, or there is none"

    async def play(task: Task, episode: Episode) -> None:
        problem = list(await settle(make(task).start()))
        if context == "example":
            assert coach is not None
            told = await ask(coach, episode, [(shown(coach, templates.example, problem), None)], shape.feedback)
            with_example = [(shown(solver, templates.solve_with_example, problem, example=e.text), e) for e in told]
            await judge(make, task, await ask(solver, episode, with_example, shape.refine))
        else:
            attempts = await ask(solver, episode, [(shown(solver, templates.solve, problem), None)], shape.solve)
            await judge(make, task, attempts)
            for _ in range(shape.rounds):
                attempts = await ask(solver, episode, await again(task, episode, problem, attempts), shape.refine)
                await judge(make, task, attempts)
        episode.ending = "terminated"

    async def again(
        task: Task, episode: Episode, problem: Sequence[Message], attempts: Sequence[Turn]
    ) -> list[tuple[Prompt, Turn]]:
        """What the solver is shown next: for every attempt, and everything said about it, a prompt and its parent."""
        if context == "none":
            return [(shown(solver, templates.retry, problem, attempt=a.text), a) for a in attempts]
        told = [(a, a, fixed) for a in attempts]
        if coach is not None:
            about = problem if context == "coach" else await stranger(make, task, others, seed=episode.seed)
            remarks = [(shown(coach, templates.feedback, about, attempt=a.text), a) for a in attempts]
            said = await ask(coach, episode, remarks, shape.feedback)
            told = [(episode.turns[remark.parent or 0], remark, remark.text) for remark in said]
        return [
            (shown(solver, templates.refine, problem, attempt=attempt.text, feedback=words), parent)
            for attempt, parent, words in told
        ]

    return play


async def ask(role: Role, episode: Episode, prompts: Sequence[tuple[Prompt, Turn | None]], count: int) -> list[Turn]:
    """`count` answers to each prompt, in order, as children of the turns it comes from."""
    asked = [(prompt, parent) for prompt, parent in prompts for _ in range(count)]
    turns = await asyncio.gather(*(role.act(episode, prompt.messages, parent, afresh=True) for prompt, parent in asked))
    for turn, (prompt, _) in zip(turns, asked, strict=True):
        turn.info["cut"] = float(prompt.cut)
    return list(turns)


async def stranger(make: Callable[[Task], Env], task: Task, others: Sequence[Task], *, seed: int) -> list[Message]:
    """Another problem than this one."""
    drawn = np.random.default_rng(derive_seed(seed, "stranger")).permutation(len(others))
    other = next((others[place] for place in drawn.tolist() if others[place].id != task.id), None)
    if other is None:
        raise DataError("context = stranger: there is no other problem to speak about. Give more than one.")
    return list(await settle(make(other).start()))


def shown(role: Role, template: str, problem: Sequence[Message], **parts: str) -> Prompt:
    """A template filled for a role, within its budget."""

    def count(messages: Sequence[Message]) -> int:
        return sum(map(len, role.renderer.segments(messages)))

    return fill(template, problem, parts, count=count, budget=role.renderer.max_tokens)


async def problem_alone(
    make: Callable[[Task], Env], tasks: Sequence[Task], solver: Role, templates: TemplateConfig
) -> list[list[int]]:
    """The tokens of a first attempt's prompt, for each task."""
    problems = [list(await settle(make(task).start())) for task in tasks]
    return [solver.renderer.render(shown(solver, templates.solve, problem).messages) for problem in problems]


async def judge(make: Callable[[Task], Env], task: Task, attempts: Sequence[Turn]) -> None:
    """Give each attempt the reward of a copy of the environment that hears nothing but it."""

    async def one(turn: Turn) -> None:
        env = make(task)
        await settle(env.start())
        step = await paid_step(env, task, turn)
        if not (step.terminated or step.truncated):
            raise DataError(
                f"{type(env).__name__}: task '{task.id}' goes on after an answer. Feedback is about problems that are "
                "answered in one turn: use a recipe for several turns, such as archer."
            )
        turn.info.update(step.info)

    await asyncio.gather(*(one(turn) for turn in attempts))


def previous(episode: Episode, turn: Turn) -> Turn | None:
    """The attempt that a turn follows: what is remarked on, or tried again; None for a first attempt."""
    path = episode.path(turn)[:-1]
    return next((other for other in reversed(path) if other.role == SOLVER), None)
