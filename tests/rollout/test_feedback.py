"""The tree of attempts and remarks: who is shown what, who is judged by whom, and what each turn is worth."""

from __future__ import annotations

import asyncio
import re
from functools import cache
from typing import Any

import pytest
import torch

from echelon.errors import ConfigError, DataError
from echelon.models.lm import tiny
from echelon.rollout.feedback import COACH, SOLVER, Context, Shape, TemplateConfig, feedback_tree
from echelon.rollout.feedback_credit import (
    CreditConfig,
    credits,
    described,
    group_metrics,
    lay_tree,
    rounds,
    state_keys,
)
from echelon.rollout.roles import Role, collect
from echelon.sampling.scripted import ScriptedSampler
from echelon.text.chat import Renderer
from echelon.types import Episode, Message, SamplingParams, Step, Task, Turn


class Double:
    """Say twice the number."""

    def __init__(self, task: Task) -> None:
        self.number = int(task.data["number"])

    @classmethod
    def tasks(cls, split: str) -> list[Task]:
        return [Task(f"double/{number}", {"number": number}) for number in (2, 3, 7)]

    def start(self) -> list[Message]:
        return [Message(role="system", content="Be brief."), Message(role="user", content=f"twice {self.number}?")]

    def step(self, action: str) -> Step:
        found = re.findall(r"\d+", action)
        right = found[-1:] == [str(2 * self.number)]
        return Step(reward=float(right), terminated=True, info={"parsed": float(bool(found))})


TEMPLATES = TemplateConfig(
    solve="S {question}",
    feedback="F {question} A {attempt}",
    refine="R {question} A {attempt} G {feedback}",
    retry="T {question} A {attempt}",
    example="E {question}",
    solve_with_example="X {example} S {question}",
)


@cache
def tokenizer() -> Any:
    return tiny(["twice 2 3 7? 4 6 14 add S F R T E X A G more"], vocab_size=320, hidden=16, layers=1, heads=1)[1]


def said(prompt: list[int], params: SamplingParams) -> str:
    """A solver that is right at once about 2, and about others once it has heard `more`; a coach that says it."""
    text = tokenizer().decode(prompt)
    question = int(re.findall(r"twice (\d+)", text)[-1])
    if "F twice" in text or "E twice" in text:
        return f"more {params.seed % 97}"
    return str(2 * question if question == 2 or "more" in text else question + params.seed % 2)


def roles(max_tokens: int | None = None) -> tuple[Role, Role]:
    sampler, renderer = ScriptedSampler(said, tokenizer()), Renderer(tokenizer(), max_tokens=max_tokens)
    params = SamplingParams(max_tokens=20)
    return Role(SOLVER, sampler, renderer, params), Role(COACH, sampler, renderer, params)


TWOS = Shape(2, 2, 2)


def played(context: Context = "coach", shape: Shape = TWOS, budget: int | None = None, **more: Any) -> list[Episode]:
    solver, coach = roles(budget)
    who = None if context in ("none", "fixed") else coach
    play = feedback_tree(Double, solver, who, shape=shape, templates=TEMPLATES, context=context, **more)
    return asyncio.run(collect(Double.tasks("train"), play, seed=5, error_budget=0.0))


def asked(turn: Turn) -> str:
    assert turn.afresh
    return str(turn.heard[-1]["content"])


def test_the_tree_is_solve_feedback_refine_and_every_group_shares_its_state() -> None:
    for episode in played(shape=Shape(2, 3, 2)):
        assert [turn.role for turn in episode.turns] == [SOLVER] * 2 + [COACH] * 6 + [SOLVER] * 12
        for parent in [None, *episode.turns]:
            children = episode.children(parent)
            assert len({tuple(child.prompt) for child in children}) <= 1
            assert len({child.seed for child in children}) == len(children)
        assert episode.ending == "terminated"


def test_the_words_of_the_coach_stand_in_the_prompt_of_the_next_attempt_and_the_attempt_in_the_coachs() -> None:
    for episode in played():
        for turn in episode.turns:
            path = episode.path(turn)
            if turn.role == COACH:
                assert asked(turn) == f"F twice {episode.data['number']}? A {path[0].text}"
            elif len(path) == 3:
                assert asked(turn) == f"R twice {episode.data['number']}? A {path[0].text} G {path[1].text}"
            else:
                assert asked(turn) == f"S twice {episode.data['number']}?"
            assert turn.heard[0] == {"role": "system", "content": "Be brief."}


def test_with_two_rounds_the_latest_attempt_is_what_is_remarked_on() -> None:
    (episode, *_) = played(shape=Shape(1, 1, 1, 2))
    solve, remark, again, other, last = episode.turns
    assert [turn.parent for turn in episode.turns] == [None, 0, 1, 2, 3]
    assert asked(other).endswith(f"A {again.text}")
    assert asked(last).endswith(f"A {again.text} G {other.text}")
    assert solve.reward == again.reward == last.reward == 1
    assert remark.reward == 0


def test_contexts_differ_in_who_speaks_between_two_attempts() -> None:
    (episode, *_) = played("none", Shape(1, 2, 2))
    assert [turn.role for turn in episode.turns] == [SOLVER] * 3
    assert asked(episode.turns[1]).startswith("T ")
    (episode, *_) = played("fixed", Shape(1, 2, 2), fixed="look again")
    assert len(episode.turns) == 3
    assert asked(episode.turns[1]).endswith("G look again")
    (episode, *_) = played("example", Shape(1, 2, 2))
    assert [turn.role for turn in episode.turns] == [COACH] * 2 + [SOLVER] * 4
    assert asked(episode.turns[2]).startswith(f"X {episode.turns[0].text} S ")
    for episode in played("stranger", others=Double.tasks("train")):
        strange = [re.findall(r"twice (\d+)", asked(turn))[0] for turn in episode.of(COACH)]
        assert strange
        assert str(episode.data["number"]) not in strange
    assert Shape(3, 2, 2, 2).leaves() == 48
    assert Shape(3, 2, 2, 2).leaves("none") == 12
    assert Shape(3, 2, 5).leaves("example") == 10


def test_a_stranger_needs_another_problem() -> None:
    with pytest.raises(DataError, match="no other problem"):
        played("stranger", others=Double.tasks("train")[:0])


def test_over_budget_the_attempt_gives_way_first_and_the_remark_and_the_problem_stay() -> None:
    free = max(len(turn.prompt) for episode in played() for turn in episode.turns)
    full = next(turn for episode in played() for turn in episode.turns if len(turn.prompt) == free)
    short = [turn for episode in played(budget=free - 1) for turn in episode.turns]
    assert any(turn.info["cut"] > 0 for turn in short)
    assert max(len(turn.prompt) for turn in short) < free
    assert "G more" in asked(full)
    assert all("? A" in asked(turn) and "G more" in asked(turn) for turn in short if asked(turn).startswith("R "))
    with pytest.raises(DataError, match="without the attempt, more than the budget of 12"):
        played(budget=12)


def test_an_environment_of_several_turns_is_refused() -> None:
    class Goes(Double):
        def step(self, action: str) -> Step:
            return Step([Message(role="user", content="on")])

    solver, coach = roles()
    play = feedback_tree(Goes, solver, coach, shape=Shape(), templates=TEMPLATES)
    with pytest.raises(DataError, match="answered in one turn"):
        asyncio.run(collect(Goes.tasks("train"), play, seed=0))


@pytest.mark.parametrize(
    ("name", "template", "complaint"),
    [
        ("refine", "{question} {attempt}", r"\{feedback\} is missing"),
        ("solve", "{question} {answer}", r"there is no \{answer\} here"),
        ("solve", "{question} {", "Braces that mean themselves are doubled"),
    ],
)
def test_templates_show_what_they_must_and_nothing_else(name: str, template: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        TemplateConfig(**{name: template})


def by_hand(scores: dict[int, float], parents: list[int | None], coach: set[int]) -> Episode:
    episode = Episode("t", ending="terminated")
    for index, parent in enumerate(parents):
        role = COACH if index in coach else SOLVER
        turn = Turn(index, role, [index], [1], [0.0], "", parent, reward=scores.get(index, 0.0))
        episode.turns.append(turn)
    return episode


TREE = by_hand({0: 1.0, 3: 1.0, 4: 0.0, 5: 0.0, 6: 0.0}, [None, 0, 0, 1, 1, 2, 2], {1, 2})
"""One attempt that is right; two remarks on it; after the first one of two attempts is right, after the other none."""


def worth(cfg: CreditConfig, episode: Episode = TREE, **given: Any) -> list[float]:
    return [round(x, 6) for x in credits(cfg, lay_tree([episode]), **given).tolist()]


def test_credit_by_hand() -> None:
    assert worth(CreditConfig(improvement=False)) == [1, 0.5, 0, 1, 0, 0, 0]
    assert worth(CreditConfig()) == [1, -0.5, -1, 1, 0, 0, 0], "a remark after which a right answer goes wrong harms"
    assert worth(CreditConfig(first=0)) == [0, -0.5, -1, 1, 0, 0, 0], "stage I holds the first attempt"
    assert worth(CreditConfig(progress=2)) == [1, -0.5, -1, 1, -2, -2, -2]
    to_go = worth(CreditConfig(to="return_to_go", improvement=False))
    assert to_go == [1 + 0.25, 0.5, 0, 1, 0, 0, 0], "the first attempt also answers for what follows it"


def test_with_more_than_one_of_progress_to_go_failing_first_pays() -> None:
    right = by_hand({0: 1.0, 2: 1.0}, [None, 0, 1], {1})
    wrong = by_hand({0: 0.0, 2: 1.0}, [None, 0, 1], {1})
    paid = CreditConfig(to="return_to_go", progress=2, improvement=False)
    assert worth(paid, wrong)[0] > worth(paid, right)[0]
    local = CreditConfig(progress=2)
    assert worth(local, right)[0] > worth(local, wrong)[0]


def test_a_best_response_is_subtracted_from_what_the_coach_is_credited_with() -> None:
    response_N = torch.tensor([0.0, 0.5, 1.0, 0, 0, 0, 0])
    cfg = CreditConfig(gap=2.0, improvement=False)
    # (1 + λ) · mean score − λ · score of the best response; attempts after feedback count 1 + λ
    assert worth(cfg, response_N=response_N) == [1, 3 * 0.5 - 2 * 0.5, 0 - 2 * 1.0, 3, 0, 0, 0]
    with pytest.raises(DataError, match=r"credit.gap counts, and the scores of a best response are missing"):
        worth(cfg)


def test_the_gain_of_being_told_counts_only_if_asked_for_and_is_bounded() -> None:
    gain_N = torch.tensor([9.0, 9, 9, 1, -20, 3, 0])
    assert worth(CreditConfig(), gain_N=gain_N) == worth(CreditConfig())
    cfg = CreditConfig(utilisation=0.1, improvement=False)
    assert worth(cfg, gain_N=gain_N) == [1, 0.05, 0.15, 1.1, -1, 0.3, 0]
    with pytest.raises(DataError, match="utilisation"):
        worth(cfg)


def test_each_kind_of_turn_pays_its_own_price_for_distance_and_a_missing_reference_is_an_error() -> None:
    cfg = CreditConfig(kl_first=1.0, kl_refine=0.1, kl_feedback=0.01, improvement=False)
    assert worth(cfg, kl_N=torch.ones(7)) == [0, 0.49, -0.01, 0.9, -0.1, -0.1, -0.1]
    unknown = torch.tensor([1.0, float("nan"), float("nan"), 1, 1, 1, 1])
    assert worth(CreditConfig(kl_first=1.0, improvement=False), kl_N=unknown)[:3] == [0, 0.5, 0]
    for kl_N in (None, unknown):
        with pytest.raises(DataError, match="log-probs of the start"):
            worth(cfg, kl_N=kl_N)


def test_siblings_answered_the_same_state_or_the_same_question_at_that_depth() -> None:
    tree = lay_tree([TREE, TREE])
    by_state, by_question = state_keys(tree, "state"), state_keys(tree, "question")
    assert by_state[3] == by_state[4] != by_state[5]
    assert by_question[3] == by_question[5]
    assert by_state[0] != by_state[7]
    assert by_question[3] != by_question[10]
    assert by_question[1] != by_question[0]


def test_what_is_told_about_a_step() -> None:
    wrong = by_hand({0: 0.0, 3: 1.0, 4: 1.0, 5: 0.0, 6: 0.0}, [None, 0, 0, 1, 1, 2, 2], {1, 2})
    tree = lay_tree([TREE, wrong])
    found = described(tree)
    assert found["accuracy/turn1"] == 0.5
    assert found["accuracy/turn2"] == 3 / 8
    assert found["accuracy/delta"] == pytest.approx(3 / 8 - 0.5)
    assert found["flips/right_to_wrong"] == 3 / 8
    assert found["flips/wrong_to_right"] == 2 / 8
    assert rounds(tree).tolist()[:7] == [1, 1, 1, 2, 2, 2, 2]
    values = credits(CreditConfig(), tree)
    groups = group_metrics(tree, values, state_keys(tree, "state"))
    assert groups["group/solver_zero_variance"] == pytest.approx(5 / 6)
    assert groups["group/coach_zero_variance"] == 0
    assert groups["group/all_zero"] == pytest.approx(3 / 6)
    assert groups["group/all_one"] == pytest.approx(2 / 6)
