"""Rounds of feedback as they are evaluated: known answers give exactly the known numbers, also after a kill."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from echelon.data.packing import Sampled
from echelon.data.schemas import Prompt
from echelon.envs import EnvSpec
from echelon.envs.prompts import prompts_env
from echelon.errors import CheckpointError, DataError, RolloutError
from echelon.models.lm import tiny
from echelon.rollout.evaluate import bootstrap
from echelon.rollout.feedback import COACH, SOLVER, TemplateConfig
from echelon.rollout.rewards import Answer, FunctionJudge, Reward, Rewards, check_answers, open_judge
from echelon.rollout.roles import Role
from echelon.rollout.rounds import RoundFiles, RoundPlayers, Row, check_failures, mean_logprobs, play_rounds
from echelon.rollout.rounds_summary import any_of, calibration_error, chains_of, summarise_rounds
from echelon.sampling.local import LocalSampler
from echelon.sampling.scripted import ScriptedSampler
from echelon.sandbox.algebra import algebra_installed
from echelon.text.chat import Renderer
from echelon.types import Completion, Message, SamplingParams, Task

MATH500 = Path(__file__).parents[3] / "shared" / "data" / "math500.jsonl"
TEMPLATES = TemplateConfig(
    solve="S {question}",
    feedback="F {question} A {attempt}",
    refine="R {question} A {attempt} G {feedback}",
    retry="T {question} A {attempt}",
    example="E {question}",
    solve_with_example="X {example} S {question}",
)
needs_math = pytest.mark.skipif(not algebra_installed(), reason="math-verify is not installed")

OWN = [
    "5", "-3", "0", "1,234", "12", r"\frac{1}{2}", r"-\frac{3}{4}", "0.25", r"\$18.90", r"90^\circ",
    r"2\sqrt{3}", "1,-2", r"(3,4]", r"\left( 3, \frac{\pi}{2} \right)", "p - q", r"\text{Evelyn}", r"\text{(C)}",
    "52_8", "y = 2x + 3", r"1 \pm \sqrt{19}",
]  # fmt: skip
"""Right answers of every kind there is among the five hundred."""


def is_number(gold: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?", gold) is not None


def equivalents(gold: str) -> list[str]:
    """Other ways to write an answer that mean the same."""
    found = [gold, f"  {gold} ", gold.replace(r"\frac", r"\dfrac"), gold.replace(r"\left", "").replace(r"\right", "")]
    if is_number(gold):
        number = float(gold)
        found += [rf"{gold} \text{{ units}}", f"x = {gold}", rf"\${gold}"]
        found += [f"{gold}.0", rf"\frac{{{2 * int(gold)}}}{{2}}", f"{int(gold):,}"] if number == int(number) else []
        found += [f"{gold}0", rf"\frac{{{round(1000 * number)}}}{{1000}}"] if "." in gold else []
    if fraction := re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", gold):
        sign, above, below = fraction.groups()
        found += [f"{sign}{above}/{below}", rf"\frac{{{sign}{3 * int(above)}}}{{{3 * int(below)}}}"]
        decimal = int(above) / int(below)
        found += [f"{sign}{decimal}"] if decimal * 1000 == round(decimal * 1000) else []
    if re.fullmatch(r"[^()\[\]{}\\,]+(,[^()\[\]{}\\,]+)+", gold) and not re.fullmatch(r"[\d,]+", gold):
        found += [", ".join(part.strip() for part in reversed(gold.split(",")))]
    if re.search(r"\\sqrt\{\d+\}", gold):
        found += [re.sub(r"\\sqrt\{(\d+)\}", r"{\1}^{\\frac{1}{2}}", gold)]
    if words := re.fullmatch(r"\\text\{(.*)\}", gold):
        found += [words[1], rf"\textbf{{{words[1]}}}", words[1].strip("()").lower()]
    return list(dict.fromkeys(found))


def perturbed(gold: str) -> list[str]:
    """Answers that mean something else."""
    if words := re.fullmatch(r"\\text\{(.*)\}", gold):
        return [rf"\text{{{words[1][::-1]}ly}}", r"\text{(J)}", "7"]
    found = [f"{gold} + 1", rf"{gold} \cdot 7"] if is_number(gold) and gold != "0" else []
    digits = list(re.finditer(r"\d", re.split(r"\\mbox|\\text|\^\\circ", gold)[0]))  # units do not count
    for digit in (digits[0], digits[-1]) if digits else ():
        found.append(f"{gold[: digit.start()]}{(int(digit[0]) + 1) % 10 or 3}{gold[digit.end() :]}")
    if is_number(gold) and float(gold):
        found.append(gold.removeprefix("-") if gold.startswith("-") else f"-{gold}")
    if gold.endswith("]"):
        found.append(f"{gold[:-1]})")
    if gold == "p - q":
        found.append("q - p")
    return [other for other in found if other != gold] or ["17"]


def asked(count: int, answers: Sequence[str]) -> tuple[EnvSpec, list[Task]]:
    """Problems that are numbered, with these right answers."""
    rows = [
        Prompt([Message(role="user", content=f"#{number}#")], {"answer": answer})
        for number, answer in enumerate(answers[:count])
    ]
    env = prompts_env(rows)
    return env, env.tasks("train")


@cache
def tokenizer() -> Any:
    words = ["# S F R A G attempt one two three hint \\boxed 0 1 2 3 4 5 6 7 8 9"]
    return tiny(words, vocab_size=320, hidden=16, heads=1)[1]


def number_in(text: str) -> int:
    return int(re.findall(r"#(\d+)#", text)[-1])


def turn_in(text: str) -> int:
    return int((re.findall(r"attempt (\d)", text) or ["0"])[-1])


def scripted(answer: Callable[[int, int, int], str], sure: float = 0.5) -> RoundPlayers:
    """A solver whose answer to every problem at every turn is fixed in advance, and a coach that says a hint.

    `answer(number, turn, seed)` is what stands in its box; every token has the probability `sure`.
    """
    words = tokenizer()

    def said(prompt: list[int], params: SamplingParams) -> Completion:
        text = words.decode(prompt)
        if "F #" in text:
            spoken = "hint"
        else:
            turn = turn_in(text) + 1
            spoken = f"attempt {turn}: {answer(number_in(text), turn, params.seed)}"
        tokens = [*words.encode(spoken, add_special_tokens=False), words.eos_token_id]
        return Completion(tokens, [float(np.log(sure))] * len(tokens), spoken, "stop")

    sampler, renderer, params = ScriptedSampler(said, words), Renderer(words), SamplingParams(max_tokens=400)
    return RoundPlayers(
        Role(SOLVER, sampler, renderer, params), Role(COACH, sampler, renderer, params), templates=TEMPLATES
    )


def played(
    env: EnvSpec, tasks: Sequence[Task], who: RoundPlayers, rewards: Rewards, rounds: int = 2, **more: Any
) -> list[Row]:
    rows: list[Row] = []
    record = more.pop("record", rows.append)
    asyncio.run(play_rounds(env, tasks, who, rewards, rounds=rounds, record=record, **more))
    return sorted(rows, key=lambda row: row["number"])


def verified(name: str = "math") -> Rewards:
    return Rewards([Reward(name, open_judge(name))])


RIGHT_OF_TEN = ({0, 1, 2}, {0, 1, 3, 4, 5}, {0, 3, 4, 6})
"""Which problems of every ten are right at each turn: of turn 2 number 2 is lost again, of turn 3 numbers 1 and 5."""


def plan(number: int, turn: int) -> bool:
    return number % 10 in RIGHT_OF_TEN[turn - 1]


def check_known_numbers(golds: Sequence[str]) -> None:
    """Play problems with a plan, in equivalent and in perturbed forms, and compare every number with the plan."""
    count = len(golds)

    def answer(number: int, turn: int, seed: int) -> str:
        forms = equivalents(golds[number]) if plan(number, turn) else perturbed(golds[number])
        if number % 10 == 9:
            return "I do not know."
        return rf"\boxed{{{forms[(number + turn) % len(forms)]}}}"

    env, tasks = asked(count, golds)
    rows = played(env, tasks, scripted(answer), verified())
    found = summarise_rounds(rows)
    right = np.array([[plan(number, turn) for turn in (1, 2, 3)] for number in range(count)], dtype=float)
    for row in rows:
        scores = [turn["score"] for turn in row["turns"] if turn["role"] == SOLVER]
        assert scores == right[row["number"]].tolist(), (golds[row["number"]], [t["text"] for t in row["turns"]])
    expected = {
        "accuracy": right[:, 2],
        "accuracy/turn1": right[:, 0],
        "accuracy/turn2": right[:, 1],
        "accuracy/turn3": right[:, 2],
        "oracle/any_turn": right.max(1),
        "progress/turn2": right[:, 1] - right[:, 0],
        "progress/turn3": right[:, 2] - right[:, 1],
        "flips/wrong_to_right/turn2": right[:, 1] * (1 - right[:, 0]),
        "flips/right_to_wrong/turn2": right[:, 0] * (1 - right[:, 1]),
        "flips/wrong_to_right/turn3": right[:, 2] * (1 - right[:, 1]),
        "flips/right_to_wrong/turn3": right[:, 1] * (1 - right[:, 2]),
    }
    assert {name: found[name] for name in expected} == {name: bootstrap(x.tolist()) for name, x in expected.items()}
    assert [found[f"accuracy/turn{turn}"].mean for turn in (1, 2, 3)] == pytest.approx([0.3, 0.5, 0.4])
    assert found["flips/right_to_wrong/turn3"].mean == pytest.approx(0.2)
    assert found["oracle/any_turn"].mean == pytest.approx(0.7)
    assert found["unparsed/turn1"].mean >= 0.1 - 1e-9


@needs_math
def test_answers_fixed_in_advance_give_exactly_the_known_accuracy_flips_and_intervals() -> None:
    check_known_numbers(OWN)


@needs_math
@pytest.mark.skipif(not MATH500.is_file(), reason="math500.jsonl is not on this machine")
def test_answers_fixed_in_advance_to_five_hundred_problems_give_exactly_the_known_numbers() -> None:
    check_known_numbers([json.loads(line)["answer"] for line in MATH500.read_text().splitlines()])


@needs_math
@pytest.mark.skipif(not MATH500.is_file(), reason="math500.jsonl is not on this machine")
def test_every_way_to_write_a_right_answer_counts_and_no_perturbed_one_does() -> None:
    golds = dict.fromkeys(json.loads(line)["answer"] for line in MATH500.read_text().splitlines())
    check_forms(list(golds)[::8])


@needs_math
def test_every_way_to_write_one_of_our_own_answers_counts_and_no_perturbed_one_does() -> None:
    check_forms(OWN)


def check_forms(golds: Sequence[str]) -> None:

    pairs = [(gold, form, True) for gold in golds for form in equivalents(gold)]
    pairs += [(gold, form, False) for gold in golds for form in perturbed(gold)]
    answers = [Answer(gold, [], rf"so \boxed{{{form}}}.", {"answer": gold}) for gold, form, _ in pairs]
    verdicts = verified().score(answers)
    wrong = [
        (gold, form, right, verdict)
        for (gold, form, right), verdict in zip(pairs, verdicts, strict=True)
        if (verdict.reward == 1) != right
    ]
    assert wrong == []


EASY = ["5", "6", "7", "8", "9", "10"]


def rightly(number: int, turn: int, seed: int) -> str:
    """Right from turn 2 on for the first four of `EASY`, at turn 1 for the last two, which lose it at turn 2."""
    right = turn > 1 if number < 4 else turn == 1
    return rf"\boxed{{{EASY[number] if right else 0}}}"


def test_every_turn_is_in_the_row_with_what_it_was_shown_and_judged_to_be_worth() -> None:
    env, tasks = asked(1, EASY)
    (row,) = played(env, tasks, scripted(rightly), verified("number"), rounds=1)
    first, remark, second = row["turns"]
    assert [turn["role"] for turn in row["turns"]] == [SOLVER, COACH, SOLVER]
    assert first["seen"] == "S #0#"
    assert remark["seen"] == r"F #0# A attempt 1: \boxed{0}"
    assert second["seen"] == r"R #0# A attempt 1: \boxed{0} G hint"
    assert (first["score"], first["answer"], first["parsed"]) == (0, "0", True)
    assert (second["score"], second["answer"], second["repeats"]) == (1, "5", False)
    assert "score" not in remark
    assert second["probability"] == pytest.approx(0.5)
    assert json.loads(json.dumps(row)) == row


def test_nobody_stops_because_an_answer_was_right_and_what_stops_so_is_called_an_oracle() -> None:
    env, tasks = asked(6, EASY)
    found = summarise_rounds(played(env, tasks, scripted(rightly), verified("number"), rounds=1))
    assert found["accuracy"].mean == found["accuracy/turn2"].mean == pytest.approx(4 / 6)
    assert found["accuracy/turn1"].mean == pytest.approx(2 / 6)
    assert found["oracle/any_turn"].mean == 1
    assert found["flips/right_to_wrong/turn2"].mean == pytest.approx(2 / 6)
    assert found["progress/turn2"].mean == pytest.approx(2 / 6)


def test_a_solver_stops_by_itself_where_it_repeats_its_answer() -> None:
    said = ["1", "1", "5"], ["1", "5", "1"], ["5", "1", "1"]
    env, tasks = asked(3, ["5", "5", "5"])
    who = scripted(lambda number, turn, seed: rf"\boxed{{{said[number][turn - 1]}}}")
    found = summarise_rounds(played(env, tasks, who, verified("number")))
    # It repeats 1 at turn 2; never, so its last answer counts; it repeats 1 at turn 3.
    assert found["self_stopped/accuracy"].mean == 0
    assert found["self_stopped/turns"].mean == pytest.approx((2 + 3 + 3) / 3)
    assert found["accuracy"].mean == pytest.approx(1 / 3)


def test_pass_at_k_is_the_unbiased_estimate() -> None:
    assert any_of(1, 4, 1) == 0.25
    assert any_of(2, 4, 1) == pytest.approx(0.5)  # of 6 pairs 3 have it
    assert any_of(4, 4, 1) == 1
    assert any_of(2, 4, 0) == 0
    assert any_of(3, 4, 2) == 1
    env, tasks = asked(2, EASY)
    numbers: dict[int, list[int]] = {0: [], 1: []}

    def half(number: int, turn: int, seed: int) -> str:
        """Two of four first attempts at problem 0 are right, and none at problem 1; all are later."""
        numbers[number].append(seed)
        first = number == 0 and len(numbers[number]) <= 2
        return rf"\boxed{{{EASY[number] if turn > 1 or first else 0}}}"

    found = summarise_rounds(played(env, tasks, scripted(half), verified("number"), rounds=1, attempts=4))
    assert found["pass@1/turn1"].mean == pytest.approx((0.5 + 0) / 2)
    assert found["pass@2/turn1"].mean == pytest.approx((1 - 1 / 6) / 2)
    assert found["pass@4/turn1"].mean == pytest.approx(0.5)
    assert found["pass@1/turn2"].mean == 1
    assert len(set(numbers[0])) == 8


def test_calibration_by_hand() -> None:
    # Two attempts at 0.9 of which one is right, two at 0.3 of which none is: |1.8 - 1| / 4 + |0.6 - 0| / 4.
    sure, correct = np.array([0.9, 0.9, 0.3, 0.3]), np.array([1.0, 0.0, 0.0, 0.0])
    assert calibration_error(sure, correct) == pytest.approx(0.2 + 0.15)
    env, tasks = asked(6, EASY)
    found = summarise_rounds(played(env, tasks, scripted(rightly, sure=0.75), verified("number"), rounds=1))
    assert found["calibration/turn1"].mean == pytest.approx(0.75 - 2 / 6)
    assert found["calibration/turn1"].low <= 0.75 - 2 / 6 <= found["calibration/turn1"].high


def test_what_feedback_was_used_for_is_the_gain_in_log_probability_per_token() -> None:
    torch.manual_seed(0)
    module, words = tiny(["# S F R A G hint 1 2 3"], vocab_size=300, hidden=16, layers=1, heads=1)
    renderer, params = Renderer(words), SamplingParams(max_tokens=6, temperature=0.7)
    role = Role(SOLVER, LocalSampler(module, words), renderer, params)
    who = RoundPlayers(role, Role(COACH, role.sampler, renderer, params), templates=TEMPLATES, modules={SOLVER: module})
    env, tasks = asked(2, EASY)
    judge = Reward("none", FunctionJudge("none", lambda prompts, completions: [0.0] * len(completions)))
    rows = played(env, tasks, who, Rewards([judge]), rounds=1)
    for row in rows:
        first, _, second = row["turns"]
        assert "gain" not in first
        user = [Message(role="user", content=f"S #{row['number']}#")]
        told = [Message(role="user", content=second["seen"])]
        action = [*words.encode(second["text"], add_special_tokens=False)]
        if second["stop"] != "length" or len(action) != second["tokens"]:
            continue

        pair = [Sampled(renderer.render(messages), action, [0.0] * len(action)) for messages in (told, user)]
        with_it, without = mean_logprobs(module, pair, 0.7, 4096)
        assert second["gain"] == pytest.approx(with_it - without, abs=1e-5)
    assert "utilisation/gain/turn2" in summarise_rounds(rows)
    assert "utilisation/gain/turn1" not in summarise_rounds(rows)


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., RoundFiles]:
    def files(overwrite: bool = False, **settings: Any) -> RoundFiles:
        return RoundFiles(tmp_path / "out", {"rounds": 1, **settings}, overwrite=overwrite)

    return files


class Killed(Exception):
    """What a signal would do."""


def run(files: RoundFiles, *, stop_after: int = 100) -> list[Row]:
    """Evaluate into a directory; killed after so many problems."""
    env, tasks = asked(6, EASY)
    rows = files.open()
    begun = len(rows)

    def record(row: Row) -> None:
        if len(rows) - begun == stop_after:
            raise Killed
        rows.append(row)
        files.append(row)

    done = [row["number"] for row in rows]
    played(env, tasks, scripted(rightly), verified("number"), rounds=1, done=done, record=record)
    files.finish(rows, {"estimates": summarise_rounds(rows)["accuracy"].mean})
    return rows


def test_a_killed_evaluation_goes_on_with_the_problems_that_are_left(files: Callable[..., RoundFiles]) -> None:
    with pytest.raises(Killed):
        run(files(), stop_after=2)
    out = files().out
    kept = (out / "episodes.jsonl").read_text()
    assert kept.count("\n") == 2
    assert not (out / "summary.json").exists()
    (out / "episodes.jsonl").write_text(kept + '{"number": 3, "ta')
    rows = run(files())
    assert sorted(row["number"] for row in rows) == list(range(6))
    whole = RoundFiles(out.with_name("whole"), {"rounds": 1})
    run(whole)
    for name in ("episodes.jsonl", "summary.json"):
        assert (out / name).read_text() == (whole.out / name).read_text()


def test_other_settings_do_not_go_on_with_it(files: Callable[..., RoundFiles]) -> None:
    with pytest.raises(Killed):
        run(files(), stop_after=2)
    with pytest.raises(CheckpointError, match=r"begun there with other settings \(seed\)"):
        files(seed=3).open()
    assert files(overwrite=True, seed=3).open() == []


def test_problems_that_failed_are_counted_and_played_again_when_it_goes_on(files: Callable[..., RoundFiles]) -> None:
    def raises(number: int, turn: int, seed: int) -> str:
        if number == 1:
            raise ZeroDivisionError("one")
        return rightly(number, turn, seed)

    env, tasks = asked(6, EASY)
    rows = played(env, tasks, scripted(raises), verified("number"), rounds=1)
    assert [row["error"] for row in rows].count("ZeroDivisionError: one") == 1
    assert summarise_rounds(rows)["accuracy"].n == 5
    with pytest.raises(RolloutError, match=r"1 of 6 episodes failed.*ZeroDivisionError"):
        check_failures(rows, 0.1)
    check_failures(rows, 0.2)
    kept = files()
    kept.open()
    for row in rows:
        kept.append(row)
    assert len(files().open()) == 5


def test_the_same_seed_gives_the_same_rows_in_whatever_order_problems_finish() -> None:
    env, tasks = asked(6, EASY)

    def seeded(number: int, turn: int, seed: int) -> str:
        return rf"\boxed{{{seed % 1000}}}"

    whole = played(env, tasks, scripted(seeded), verified("number"), seed=4)
    half = played(env, tasks, scripted(seeded), verified("number"), seed=4, done=[0, 2, 5])
    assert half == [whole[1], whole[3], whole[4]]
    assert played(env, tasks, scripted(seeded), verified("number"), seed=5) != whole


def test_a_row_without_an_answer_is_named_before_anything_is_played() -> None:
    with pytest.raises(DataError, match=r"f:2: reward number: there is no right answer"):
        check_answers(["number"], [("f:1", {"answer": "3"}), ("f:2", {"answer": None})])


def test_chains_are_the_branches() -> None:
    turns = [{"index": 0, "role": SOLVER, "parent": None}, {"index": 1, "role": SOLVER, "parent": None}]
    turns += [{"index": 2, "role": COACH, "parent": 0}, {"index": 3, "role": COACH, "parent": 1}]
    turns += [{"index": 4, "role": SOLVER, "parent": 2}, {"index": 5, "role": SOLVER, "parent": 3}]
    assert [[t["index"] for t in chain] for chain in chains_of({"turns": turns})] == [[0, 4], [1, 5]]
