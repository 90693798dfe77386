"""Recipes that play the coming steps while one trains: exact, repeatable, resumable, and still learning."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from echelon.config import ModelConfig, SamplingConfig
from echelon.data.candidates import Options
from echelon.data.packing import Sampled
from echelon.data.replay import Replay
from echelon.models.options import OptionScorer
from echelon.recipes import archer, rank, responder, tosca
from echelon.rollout.ahead import Played
from echelon.rollout.setup import open_actor
from echelon.sampling.candidates import Chooser, Offer, critic_score
from echelon.sampling.choices import Strategist
from echelon.seeds import derive_seed
from echelon.train.strategy import option_table
from echelon.types import Episode
from tests.recipes.conftest import Run
from tests.recipes.talk import Talk
from tests.recipes.test_on_ray import EPISODES, LOW, RANK, RESPONDER, TOSCA
from tests.recipes.test_on_ray import FEEDBACK as PLAIN_FEEDBACK

GRPO = ("grpo", "--tasks-per-step", 2, "--group-size", 4, "--policy.epochs", 2)
PPO = ("ppo", "--episodes-per-step", 8, "--warmup-steps", 1, "--policy.epochs", 2, "--value-epochs", 2)
ARCHER = ("archer", "--episodes-per-step", 8, "--warmup-steps", 1, "--critic-updates", 2, "--critic-episodes", 4)
PICKED = ("--candidates", 3, "--value-actions", "replayed")
CONTROL = ("control", "--method", "grpo", "--tasks-per-step", 2, "--group-size", 4)
PLANNED = (*CONTROL, "--plan-every", 2, "--plan-tokens", 3)
RECIPES = [pytest.param(GRPO, id="grpo"), pytest.param(PPO, id="ppo"), pytest.param(PLANNED, id="control")]
FEEDBACK = (*PLAIN_FEEDBACK, "--attempts", 2)
ONE_FOR_BOTH = (*FEEDBACK, "--coach.model.path", "", "--weights", "shared")
ADAPTERS = (*FEEDBACK, "--coach.model.path", "", "--weights", "adapters", "--lora.rank", 4)
SERVED = ["--sampling.sampler", "server", "--sampling.server.url", "http://localhost:1"]
SERVED += ["--sampling.server.folder", "weights"]
SERVER = [word.replace("--sampling", "--solver.sampling") for word in SERVED]
GAP = ("--credit.gap", 1)
TWO_ADAPTERS = ("--shared", "--lora.rank", 4)
EVERY_TERM = ("--low.surprisal-coef", 0.1, "--low.ema-decay", 0.9, "--low.shaping.kl-target", 1)
EVERY_TERM += ("--low.self-likelihood-coef", 0.1, "--low.shaping.normalize", "scale", "--low.warmup-steps", 1)
TESTED = ("--eval-every", 2, "--eval-episodes", 3)
HELD_OUT = ("--data.eval-fraction", 0.4, "--eval-every", 2, "--eval-episodes", 3)
LEVELS = [
    pytest.param((*FEEDBACK, *GAP), id="feedback"),
    pytest.param((*ADAPTERS, *GAP), id="feedback-adapters"),
    pytest.param(ONE_FOR_BOTH, id="feedback-shared"),
    pytest.param(RESPONDER, id="responder"),
    pytest.param((*TOSCA, "--no-high.centre"), id="tosca"),
    pytest.param((*TOSCA, *TWO_ADAPTERS, "--no-high.centre"), id="tosca-adapters"),
    pytest.param((*TOSCA, "--choose", "random", "--mode", "lower"), id="tosca-random"),
    pytest.param((*RANK, "--ranker-optim.lr", 0), id="rank"),
    pytest.param((*ARCHER, *PICKED, "--critic-optim.lr", 0), id="archer"),
]
AHEAD = "--asynchronous.max-staleness"
OWN = re.compile(r"(policy|solver|coach|low/policy)/(staleness|mismatch/kl|importance)(/.*)?")
"""The names that only such a run logs."""
Words = tuple[object, ...]


@pytest.fixture
def playing(game: list[str], files: dict[str, str]) -> Callable[..., list[str]]:
    """The words of a run: a recipe whose levels have models of their own names them, others play a game."""

    def words(recipe: Words, *more: object, lr: float | None = None) -> list[str]:
        rates = RATES.get(str(recipe[0]), ("--policy.optim.lr",))[: 1 if recipe is ONE_FOR_BOTH else None]
        learns = [] if lr is None else [str(word) for name in rates for word in (name, lr)]
        own = [str(word).format(**files) for word in (*recipe, *more)]
        return [*own, *([] if recipe[0] in RATES else game), *learns]

    return words


RATES = {
    "feedback": ("--solver.policy.optim.lr", "--coach.policy.optim.lr"),
    "rank": ("--policy.optim.lr",),
    "responder": ("--low.policy.optim.lr",),
    "tosca": ("--low.policy.optim.lr", "--high.optim.lr"),
}
"""The learning rates of recipes whose levels name their models: of every level that learns to speak."""


@pytest.mark.parametrize("recipe", [*RECIPES, *LEVELS])
def test_where_nothing_is_learned_ahead_is_what_in_turn_is(train, playing, recipe: Words) -> None:
    """Then all weights are the same, so the same is played, judged and logged."""
    still = playing(recipe, "--steps", 4, lr=0)
    one, other = train(*still, name="in turn"), train(*still, AHEAD, 2, name="ahead")
    assert episodes(other) == episodes(one)
    assert [row["policy/staleness"] for row in other.rows()] == [0, 1, 2, 2]
    for row, expected in zip(other.rows(), one.rows(), strict=True):
        told = {name: number for name, number in row.items() if not OWN.fullmatch(name)}
        assert told == pytest.approx(expected, rel=1e-4, abs=1e-4)


def episodes(run: Run) -> list[dict[str, Any]]:
    """What was said and chosen. What the first step adds to all of Q, so that it starts near what is earned, reaches
    who plays ahead later and changes no choice."""
    rows = run.rows("episodes")
    for said in (said for row in rows for turn in row["turns"] for said in turn.get("candidates", ())):
        del said["q"]
    return rows


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        pytest.param(GRPO, (AHEAD, 1, "--policy.kl-coef", 0.1), id="grpo"),
        pytest.param(GRPO, (AHEAD, 2, "--replacements", 2, "--asynchronous.correction", "sequence"), id="grpo-2"),
        pytest.param(PPO, (AHEAD, 1, "--shaping.kl-coef", 0.1), id="ppo"),
        pytest.param(ARCHER, (AHEAD, 1, "--actor-states", "rollout"), id="archer"),
        pytest.param((*ARCHER, *PICKED), (AHEAD, 2, "--critic-optim.lr", 1e-2), id="archer-candidates"),
        pytest.param(CONTROL, (AHEAD, 1, "--method", "ppo", "--value", "text", "--eval-every", 2), id="control"),
        pytest.param(FEEDBACK, (AHEAD, 2, *GAP, "--schedule", "alternate", "--credit.utilisation", 0.1), id="feedback"),
        pytest.param(ADAPTERS, (AHEAD, 1, "--lora.dropout", 0.1), id="feedback-adapters"),
        pytest.param(ONE_FOR_BOTH, (AHEAD, 1, *GAP, "--best-response", "average"), id="feedback-shared"),
        pytest.param(TOSCA, (AHEAD, 1, "--reward-share-weight", 0.5, "--pick", "softmax"), id="tosca"),
        pytest.param((*TOSCA, *TWO_ADAPTERS), (AHEAD, 2, "--mode", "alternate", *TESTED), id="tosca-adapters"),
        pytest.param(TOSCA, (AHEAD, 1, "--mode", "upper"), id="tosca-upper"),
        pytest.param(RANK, (AHEAD, 1, "--epsilon", 0.2, "--ranker-optim.lr", 1e-2), id="rank"),
        pytest.param(RANK, (AHEAD, 2, "--baseline", "value", "--lora.rank", 2, "--warmup-steps", 2), id="rank-adapter"),
        pytest.param((*RESPONDER, *EVERY_TERM), (AHEAD, 2, *HELD_OUT), id="responder"),
        pytest.param(RESPONDER, (AHEAD, 1, "--lora.rank", 2, "--lora.dropout", 0.1), id="responder-adapter"),
    ],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    train, playing, killed_at, recipe: Words, flags: Words
) -> None:
    """To the bit; and no thread is left when a run is interrupted."""
    words = playing(recipe, *flags, "--steps", 6, "--save-every", 2, lr=1e-2)
    whole = train(*words, name="whole")
    killed_at(3)
    train(*words, name="killed", status=130)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("rollout")] == []
    killed_at(-1)
    resumed = train(*words, "--resume", name="killed")
    assert len(whole.rows()) == 6
    assert resumed.rows() == whole.rows()
    assert resumed.rows("episodes") == whole.rows("episodes")
    one, other = tensors(whole), tensors(resumed)
    assert one.keys() == other.keys()
    assert [name for name in one if not one[name].equal(other[name])] == []


def tensors(run: Run) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint."""
    newest = sorted((run.out / "checkpoints").iterdir())[-1]
    files = {file.relative_to(newest): load_file(file) for file in newest.rglob("*.safetensors")}
    return {f"{file}/{name}": tensor for file, found in files.items() for name, tensor in found.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_that_older_weights_played_are_corrected_and_others_are_not(
    train, game: list[str], recipe: tuple[object, ...]
) -> None:
    rows = train(*recipe, *game, "--steps", 4, AHEAD, 1, "--policy.optim.lr", 1e-2).rows()
    old = [row["policy/staleness"] for row in rows]
    moved = [row.get("policy/mismatch/kl", 0.0) > 1e-6 for row in rows]
    assert old == [0, 1, 1, 1]
    # PPO's first step trains no policy, so the second one is played with the weights it learns with.
    assert moved == ([False, False, True, True] if recipe is PPO else [False, True, True, True])
    for row, stale in zip(rows, moved, strict=True):
        assert ("policy/importance" in row) is stale
        assert row.get("policy/first_mismatch", 0.0) < 1e-4


def test_ahead_replacements_come_from_places_of_their_own(train, game: list[str]) -> None:
    run = train(*GRPO, *game, "--steps", 3, AHEAD, 1, "--replacements", 2)
    assert all(0 <= row["group/replaced"] <= 2 for row in run.rows())


def test_episodes_that_fail_ahead_count_against_the_budget_and_leave_no_thread(
    train, fragile: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train(*GRPO, *fragile, "--steps", 3, AHEAD, 1, "--error-budget", 0, status=2)
    assert "episodes failed, more than the error budget of 0%" in capsys.readouterr().err
    assert [thread for thread in threading.enumerate() if thread.name.startswith("rollout")] == []


def test_more_steps_than_a_run_was_begun_with(train, game: list[str]) -> None:
    """What nobody has played ahead is played with the weights the run ended with."""
    train(*GRPO, *game, "--steps", 2, AHEAD, 2)
    rows = train(*GRPO, *game, "--steps", 5, AHEAD, 2, "--resume").rows()
    assert [row["policy/staleness"] for row in rows] == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        (GRPO, (AHEAD, -1), "max_staleness = -1: it counts steps."),
        (GRPO, (AHEAD, 1, "--model.quantization", "4bit"), "max_staleness = 1: what plays is a copy of the weights"),
        (PPO, (AHEAD, 1, "--sampler", "vllm", "--lora.dropout", 0.1), "max_staleness = 1: vLLM would disturb"),
        (ARCHER, (AHEAD, 1, *PICKED, "--critic-body", "actor"), "max_staleness = 1: the critic that picks"),
        (
            ARCHER,
            (AHEAD, 1, *SERVED),
            "max_staleness = 1: a server holds one set of weights, and value_actions = fresh",
        ),
        (FEEDBACK, (AHEAD, 1, "--coach.model.quantization", "4bit"), "max_staleness = 1: what plays is a copy"),
        (FEEDBACK, (AHEAD, 2, "--stages", "from 0: attempts=2", "plateau 9: attempts=3"), "max_staleness = 2: nobody"),
        (FEEDBACK, (AHEAD, 1, "--credit.gap", 1, *SERVER), "max_staleness = 1: a server holds one set of weights"),
        (RESPONDER, (AHEAD, 1, *HELD_OUT, *SERVED), "max_staleness = 1: a server holds one set of weights, and eval_e"),
        (TOSCA, (AHEAD, 1, "--strategist.quantization", "8bit"), "max_staleness = 1: what plays is a copy"),
    ],
    ids=[
        "negative",
        "quantized",
        "dropout",
        "candidates",
        "fresh",
        "coach",
        "plateau",
        "server",
        "held out",
        "strategist",
    ],
)
def test_what_cannot_run_ahead_is_refused_in_one_line(
    train, playing, capsys: pytest.CaptureFixture[str], recipe: Words, flags: Words, message: str
) -> None:
    train(*playing(recipe, *flags), status=2)
    error = capsys.readouterr().err
    assert error.startswith(f"asynchronous.{message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(("states", "corrected"), [("rollout", True), ("replay", False)])
def test_archer_corrects_what_older_weights_played_and_not_what_it_draws_anew(
    train, game: list[str], states: str, corrected: bool
) -> None:
    rows = train(*ARCHER, *game, "--steps", 4, AHEAD, 1, "--actor-states", states).rows()
    assert [row["policy/staleness"] for row in rows] == [0, 1, 1, 1]
    assert ["policy/importance" in row for row in rows] == [False, False, corrected, corrected]
    assert all(row.get("policy/first_mismatch", 0.0) < 1e-4 for row in rows)


def test_levels_with_weights_of_their_own_are_old_by_themselves(train, game: list[str], start: Path) -> None:
    """Only the planner learns, so what the controller said is never old, and with the planner's own name it is told."""
    rows = train(*PLANNED, *game, "--planner.path", start, "--learns", "planner", "--steps", 3, AHEAD, 1).rows()
    assert [row["policy/staleness"] for row in rows] == [0, 1, 1]
    assert ["planner/importance" in row for row in rows] == [False, True, True]
    assert not any("policy/importance" in row for row in rows)


@pytest.mark.parametrize("recipe", [FEEDBACK, ADAPTERS], ids=["separate", "adapters"])
def test_each_level_of_feedback_is_old_where_it_has_learned_meanwhile(train, playing, recipe: Words) -> None:
    """They take turns, the solver first: what a level said is two steps old, and older than the level where that has
    learned in one of them."""
    flags = ("--steps", 5, "--schedule", "alternate", *GAP)
    rows = train(*playing(recipe, *flags, AHEAD, 1, lr=1e-2)).rows()
    assert [row["policy/staleness"] for row in rows] == [0, 1, 1, 1, 1]
    for step, row in enumerate(rows):
        learns = "coach" if step % 2 else "solver"
        assert f"{learns}/ratio" in row
        assert f"{learns}/importance" not in row, "it rested in the step before"
        assert row[f"{learns}/first_mismatch"] < 1e-4
    rows = train(*playing(recipe, *flags, AHEAD, 2, lr=1e-2), name="two").rows()
    for step, row in enumerate(rows):
        learns = "coach" if step % 2 else "solver"
        assert (f"{learns}/importance" in row) is (step > 1)
        assert row.get(f"{learns}/mismatch/kl", 1.0) > 1e-6


def test_a_level_that_never_learns_is_never_old(train, playing) -> None:
    rows = train(*playing(FEEDBACK, "--steps", 3, AHEAD, 1, "--no-coach.train", lr=1e-2)).rows()
    assert ["solver/importance" in row for row in rows] == [False, True, True]
    assert not any(name.startswith("coach/importance") for row in rows for name in row)


def test_a_step_of_feedback_is_played_as_its_own_stage_says(train, playing) -> None:
    """Also where the stage begins after the step was."""
    stages = ("--stages", "from 0: attempts=2", "from 2: attempts=3 solver.sampling.max_tokens=2")
    run = train(*playing(FEEDBACK, "--steps", 4, AHEAD, 2, *stages))
    assert [row["stage"] for row in run.rows()] == [0, 0, 1, 1]
    for row in run.rows("episodes"):
        first = [turn for turn in row["turns"] if turn["parent"] is None]
        longest = max(len(turn["ids"]) for turn in first)
        assert len(first) == (3 if row["step"] > 1 else 2)
        assert (longest <= 2) is (row["step"] > 1)


def test_replies_that_older_weights_wrote_are_corrected_once_the_responder_has_learned(train, playing) -> None:
    """The first step of two that are played with what the run began with; then one step older than what learns."""
    flags = ("--steps", 4, AHEAD, 1, "--low.warmup-steps", 1)
    rows = train(*playing(RESPONDER, *flags, lr=1e-2)).rows()
    assert [row["policy/staleness"] for row in rows] == [0, 1, 1, 1]
    assert ["low/policy/importance" in row for row in rows] == [False, False, True, True]
    assert all(row["low/policy/mismatch/kl"] > 1e-6 for row in rows[2:])
    assert all(row.get("low/policy/first_mismatch", 0.0) < 1e-4 for row in rows)


def test_held_out_states_are_replied_to_by_the_weights_of_now(train, playing, monkeypatch: pytest.MonkeyPatch) -> None:
    """While what is learned from comes from those of two steps before."""
    seen: list[tuple[int, int]] = []

    def watched(*given: object, **settings: object) -> Played:
        found = replied(*given, **settings)
        seen.append((settings["seed"], max(turn.version for episode in found.episodes for turn in episode.turns)))
        return found

    replied = responder.replied
    monkeypatch.setattr(responder, "replied", watched)
    flags = ("--steps", 4, AHEAD, 2, "--data.eval-fraction", 0.4, "--eval-every", 1, "--eval-episodes", 3)
    rows = train(*playing(RESPONDER, *flags, lr=1e-2)).rows()
    assert all("eval/reward/mean" in row for row in rows)
    held_out = derive_seed(0, "eval")
    assert [version for seed, version in seen if seed == held_out] == [1, 2, 3, 4]
    assert sorted(version for seed, version in seen if seed != held_out) == [0, 0, 0, 1]


def test_a_strategist_that_does_not_learn_tells_beside_others_what_it_tells_alone(
    train, playing, files: dict[str, str], tmp_path: Path
) -> None:
    """Each thread has a chooser of its own around the same weights."""
    actor = open_actor(ModelConfig(path=files["model"]), SamplingConfig())
    actor.module.save_pretrained(tmp_path / "strategist")
    actor.tokenizer.save_pretrained(tmp_path / "strategist")
    OptionScorer(actor.module).describe(tmp_path / "strategist", Talk.inventory())
    dialogues = ("responder", "--model.path", "{model}", "--env", "tests.recipes.talk:Talk", *LOW, *EPISODES)
    flags = ("--strategist", tmp_path / "strategist", "--strategist-epsilon", 0.5, "--steps", 4)
    words = playing(dialogues, *flags, lr=0)
    one, other = train(*words, name="in turn"), train(*words, AHEAD, 3, name="ahead")
    assert other.rows("episodes") == one.rows("episodes")
    assert {turn["role"] for row in one.rows("episodes") for turn in row["turns"]} == {"strategist", "responder"}


@pytest.mark.parametrize("adapters", [(), TWO_ADAPTERS], ids=["separate", "adapters"])
def test_strategies_are_chosen_by_the_values_of_so_many_steps_before(
    train, playing, monkeypatch: pytest.MonkeyPatch, adapters: Words
) -> None:
    """By a copy that stays as it is while the strategist learns, and is read as that was read then."""
    learn, then = tosca.learn, []

    def watched(cfg: tosca.Config, step: int, levels: tosca.Levels, episodes: Any, offers: Any, stale: Any) -> Any:
        then.append(levels.upper.online.target())
        asked = [Options(offer.prompt, [said.tokens for said in offer.candidates]) for offer in offers.values()]
        found = torch.tensor([offer.q for offer in offers.values()])
        expected = [option_table(scorer, asked, 4096)[0] for scorer in then]
        torch.testing.assert_close(found, expected[max(0, step - 2)], rtol=1e-4, atol=1e-5)
        for other in expected[max(0, step - 2) + 1 :]:
            assert (found - other).abs().max() > 1e-3
        return learn(cfg, step, levels, episodes, offers, stale)

    monkeypatch.setattr(tosca, "learn", watched)
    train(*playing((*TOSCA, *adapters), "--steps", 5, AHEAD, 2, lr=1e-2))
    assert len(then) == 5


def test_a_strategy_that_other_values_chose_than_were_handed_over_is_refused(
    train, playing, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Strategist, "load", lambda self, weights, version: None)
    train(*playing(TOSCA, "--steps", 3, AHEAD, 1, lr=1e-2), status=2)
    assert "a turn of 'strategist' in step 2 was sampled with weights of version 0" in capsys.readouterr().err


def test_replies_in_dialogues_are_corrected_and_each_step_explores_as_it_should(train, playing) -> None:
    in_turn = train(*playing(TOSCA, "--steps", 4, lr=1e-2), name="in turn").rows()
    rows = train(*playing(TOSCA, "--steps", 4, AHEAD, 1, lr=1e-2), name="ahead").rows()
    assert [row["policy/staleness"] for row in rows] == [0, 1, 1, 1]
    assert ["low/policy/importance" in row for row in rows] == [False, True, True, True]
    assert [row["strategy/epsilon"] for row in rows] == [row["strategy/epsilon"] for row in in_turn]
    assert rows[0]["low/policy/first_mismatch"] < 1e-4


@pytest.mark.parametrize("adapter", [(), ("--lora.rank", 2)], ids=["whole", "adapter"])
def test_candidates_are_chosen_by_the_ranker_of_so_many_steps_before(
    train, playing, monkeypatch: pytest.MonkeyPatch, adapter: Words
) -> None:
    learn, then = rank.learn, []

    def watched(cfg: rank.Config, step: int, levels: rank.Levels, found: Any, offers: Any, stale: Any) -> Any:
        then.append(levels.online.target())
        asked = [Options(offer.prompt, [said.tokens for said in offer.candidates]) for offer in offers]
        chosen = torch.tensor([offer.q for offer in offers])
        expected = [rank.table(ranker, asked, 4096)[0] for ranker in then]
        torch.testing.assert_close(chosen, expected[max(0, step - 2)], rtol=1e-4, atol=1e-5)
        for other in expected[max(0, step - 2) + 1 :]:
            assert (chosen - other).abs().max() > 1e-3
        return learn(cfg, step, levels, found, offers, stale)

    monkeypatch.setattr(rank, "learn", watched)
    train(*playing((*RANK, *adapter), "--steps", 5, AHEAD, 2, "--ranker-optim.lr", 1e-2, lr=1e-2))
    assert len(then) == 5


@pytest.mark.parametrize(
    "more", [(), ("--lora.rank", 2), ("--value-scale", "symlog")], ids=["whole", "adapter", "symlog"]
)
def test_utterances_are_picked_by_the_critic_of_so_many_steps_before(
    train, playing, monkeypatch: pytest.MonkeyPatch, more: Words
) -> None:
    """And while the warm-up lasts by nobody."""
    opened, remember, take = archer.open_levels, archer.remember, Chooser.take
    levels: list[archer.Levels] = []
    offers: dict[int, Offer] = {}
    then, picked = [], []

    def kept(chooser: Chooser) -> dict[int, Offer]:
        found = take(chooser)
        offers.update(found)
        return found

    def watched(cfg: archer.Config, step: int, episodes: Sequence[Episode], replay: Replay) -> Any:
        then.append(levels[0].online.target())
        asked = [offers[turn.seed] for episode in episodes for turn in episode.turns if turn.seed in offers]
        picked.append(len(asked))
        for offer in asked:
            said = [Sampled(offer.prompt, each.tokens, each.logprobs) for each in offer.candidates]
            expected = [critic_score(critic)(said) for critic in then]
            assert offer.q == pytest.approx(expected[max(0, step - 2)], rel=1e-3, abs=1e-4)
            assert all(offer.q != pytest.approx(each, rel=1e-3, abs=1e-4) for each in expected[max(0, step - 2) + 1 :])
        return remember(cfg, step, episodes, replay)

    monkeypatch.setattr(archer, "open_levels", lambda *given: levels.append(opened(*given)) or levels[0])
    monkeypatch.setattr(archer, "remember", watched)
    monkeypatch.setattr(Chooser, "take", kept)
    train(*playing((*ARCHER, *PICKED, *more), "--steps", 5, AHEAD, 2, "--critic-optim.lr", 1e-2, lr=1e-2))
    assert [count > 0 for count in picked] == [False, True, True, True, True]


def test_candidates_that_older_weights_drew_are_corrected_once_the_generator_has_learned(train, playing) -> None:
    words = playing(RANK, "--steps", 4, "--warmup-steps", 1, lr=1e-2)
    rows, in_turn = train(*words, AHEAD, 1, name="ahead").rows(), train(*words, name="in turn").rows()
    assert [row["policy/staleness"] for row in rows] == [0, 1, 1, 1]
    assert ["policy/importance" in row for row in rows] == [False, False, True, True]
    assert all(row["policy/mismatch/kl"] > 1e-6 for row in rows[2:])
    assert all(row.get("policy/first_mismatch", 0.0) < 1e-4 for row in rows)
    assert [row["candidates/epsilon"] for row in rows] == [row["candidates/epsilon"] for row in in_turn]
