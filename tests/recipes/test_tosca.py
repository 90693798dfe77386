"""ToSCA: who learns when and from which rewards, that both learn from the same dialogues, every recipe's promises."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from echelon.config import ModelConfig, OptimConfig
from echelon.config.loading import load
from echelon.envs import EnvSpec
from echelon.errors import ConfigError
from echelon.models.lm import tiny
from echelon.models.lora import AdapterView
from echelon.recipes import tosca
from echelon.recipes.tosca import Config, Levels, learn, learns, open_both
from echelon.rollout.dialogue import RESPONDER, STRATEGIST, Dialogists, advantages
from echelon.rollout.levels import open_dialogists
from echelon.rollout.rewards import open_tasks
from echelon.rollout.roles import collect
from echelon.sampling.candidates import Offer
from echelon.seeds import derive_seed
from echelon.text.dialogue import responder_prompt, strategist_prompt
from echelon.train.policy import PolicyConfig
from echelon.train.responder import Lower, ResponderConfig
from echelon.train.strategy import Upper
from echelon.types import Episode, SamplingParams, Task, Turn
from tests.invariants.test_kill_and_resume import assert_same, command, finished, kill, rows, waiting
from tests.recipes.conftest import Run, Train
from tests.recipes.talk import Talk
from tests.recipes.test_metric_names import unknown
from tests.test_docs import CODE, columns

PAGE = Path(__file__).parents[2] / "docs" / "algorithms" / "tosca.md"
ENV = "tests.recipes.talk:Talk"
FEW = ["--env", ENV, "--steps", "4", "--episodes-per-step", "6", "--max-turns", "4", "--high-updates", "2"]
FEW += ["--high-batch", "8", "--high.target-every", "3", "--sampling.max-tokens", "6", "--sampling.max-prompt-tokens"]
FEW += ["256", "--low.policy.optim.lr", "1e-3", "--low.value-optim.lr", "1e-3", "--low.policy.minibatches", "2"]
SHARED = ["--shared", "--lora.rank", "4", "--lora.alpha", "8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a one-layer model with random weights whose tokenizer knows the words of both prompts."""
    folder, state = tmp_path_factory.mktemp("model"), Talk(Task("0")).state
    inventory = Talk.inventory()
    texts = [strategist_prompt(state, inventory), responder_prompt(state, inventory.label(0))]
    words = [message["content"] for messages in texts for message in messages]
    module, tokenizer = tiny(words * 3, vocab_size=360, hidden=32, layers=1, heads=2)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def few(model: Path) -> list[str]:
    return ["--responder.path", str(model), *FEW]


def config(model: Path, **settings: Any) -> Config:
    lower = ResponderConfig(
        policy=PolicyConfig(optim=OptimConfig(lr=1e-3), minibatches=2), value_optim=OptimConfig(lr=1e-3)
    )
    known = {"out": "x", "env": ENV, "responder": ModelConfig(str(model), device="cpu"), "low": lower, "steps": 4}
    known |= {"episodes_per_step": 6, "high_updates": 2, "high_batch": 8, "max_turns": 4}
    return Config(**{**known, **settings})


def opened(cfg: Config) -> tuple[Levels, list[Episode], dict[int, Offer]]:
    """Levels as `main` opens them, and the dialogues of a step."""
    env = open_tasks(cfg)
    levels = open_both(cfg, env)
    tosca.explore(cfg, 0, levels.players)
    play = levels.players.play(env.make, max_turns=cfg.max_turns)
    episodes = tosca.asyncio.run(collect(env.tasks("train"), play, seed=1, error_budget=cfg.error_budget))
    return levels, episodes, levels.players.take()


def weights(run: Run, step: int, part: str) -> dict[str, torch.Tensor]:
    (file,) = (run.out / f"checkpoints/step_{step:06d}/{part}").glob("*model.safetensors")
    return load_file(file)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


def changed(run: Run, before: int, part: str) -> bool:
    """Whether a part is another one after the step that follows this one."""
    return not same(weights(run, before, part), weights(run, before + 1, part))


SCHEDULES = {
    ("joint", "1:1"): ["both"] * 6,
    ("upper", "1:1"): ["upper"] * 6,
    ("lower", "1:1"): ["lower"] * 6,
    ("alternate", "1:1"): ["upper", "lower"] * 3,
    ("alternate", "3:1"): ["upper", "upper", "upper", "lower", "upper", "upper"],
    ("sequential", "1:1"): ["lower"] * 3 + ["upper"] * 3,
    ("sequential", "1:2"): ["lower"] * 4 + ["upper"] * 2,
}
WHO = {(True, True): "both", (True, False): "upper", (False, True): "lower"}


@pytest.mark.parametrize(("mode", "cycle"), SCHEDULES)
def test_the_mode_says_who_learns_in_which_step(mode: Any, cycle: str, model: Path) -> None:
    cfg = config(model, mode=mode, cycle=cycle, steps=6)
    assert [WHO[learns(cfg, step)] for step in range(6)] == SCHEDULES[mode, cycle]


LEARNING = {
    "joint": ["HL"] * 4,
    "alternate": ["H", "L", "H", "L"],
    "upper": ["H"] * 4,
    "lower": ["L"] * 4,
    "sequential": ["L", "L", "H", "H"],
}
"""Who learns in each of four steps."""


@pytest.mark.parametrize("mode", LEARNING)
@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_who_does_not_learn_stays_as_it_was_bit_for_bit(mode: Any, kind: str, train: Train, few: list[str]) -> None:
    adapters = SHARED if kind == "shared" else []
    run = train("tosca", *few, *adapters, "--mode", mode, "--save-every", "1", "--keep-last", "9")
    for step, row in enumerate(run.rows()):
        above, below = (letter in LEARNING[mode][step] for letter in "HL")
        assert changed(run, step, STRATEGIST) is above
        assert changed(run, step, RESPONDER) is below
        assert ("high/grad_norm" in row) is above
        assert ("low/policy/grad_norm" in row) is below
        assert row.get("high/grad_norm", 1.0) > 0
        assert row.get("low/policy/grad_norm", 1.0) > 0


def test_both_levels_read_the_same_reward(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(model)
    levels, episodes, offers = opened(cfg)
    read: dict[str, list[float]] = {}
    judge, add = Lower.judge, type(levels.replay).add

    def judging(self: Lower, turns: Any, rewards_N: torch.Tensor, **more: Any) -> Any:
        read["low"] = rewards_N.tolist()
        assert more["shared_N"] is None
        return judge(self, turns, rewards_N, **more)

    def adding(self: Any, found: Any) -> None:
        read["high"] = [choice.reward for episode in found for choice in episode]
        add(self, found)

    monkeypatch.setattr(Lower, "judge", judging)
    monkeypatch.setattr(type(levels.replay), "add", adding)
    learned, _ = learn(cfg, 0, levels, episodes, offers)
    assert read["low"] == read["high"] == [turn.reward for e in episodes for turn in e.of(RESPONDER)]
    assert len(set(read["low"])) > 2
    assert learned["low/satisfaction"] == pytest.approx(sum(read["low"]) / len(read["low"]))


def test_what_is_shared_is_w_times_the_advantage_below_and_w_times_the_mean_reward_above(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = 0.5
    cfg = config(model, reward_share_weight=weight)
    levels, episodes, offers = opened(cfg)
    seen: dict[str, Any] = {}
    judge, add = Lower.judge, type(levels.replay).add

    def judging(self: Lower, turns: Any, rewards_N: torch.Tensor, **more: Any) -> Any:
        seen["shared"], seen["judged"] = more["shared_N"], judge(self, turns, rewards_N, **more)
        return seen["judged"]

    def adding(self: Any, found: Any) -> None:
        seen["high"] = torch.tensor([choice.reward for episode in found for choice in episode])
        add(self, found)

    monkeypatch.setattr(Lower, "judge", judging)
    monkeypatch.setattr(type(levels.replay), "add", adding)
    learn(cfg, 0, levels, episodes, offers)
    decided = [turn for episode in episodes for turn in episode.of(STRATEGIST)]
    replies = [turn for episode in episodes for turn in episode.of(RESPONDER)]
    assert seen["shared"].equal(weight * advantages(decided, offers))
    assert seen["shared"].abs().max() > 0.01
    # Before the first update KL is zero: r_L is the satisfaction and what is shared, both at the last token.
    earned = torch.tensor([turn.reward for turn in replies])
    assert torch.allclose(seen["judged"].columns["return"], earned + seen["shared"], atol=1e-4)
    lengths = torch.tensor([float(len(turn.action)) for turn in replies])
    assert torch.allclose(seen["high"], earned + weight * earned / lengths, atol=1e-4)


def test_without_a_weight_nothing_is_shared(model: Path) -> None:
    cfg = config(model)
    levels, episodes, offers = opened(cfg)
    _, columns = learn(cfg, 0, levels, episodes, offers)
    by_turn = {id(turn): number for turn, number in columns["return"]}
    for turn in (turn for episode in episodes for turn in episode.of(RESPONDER)):
        assert by_turn[id(turn)] == pytest.approx(turn.reward, abs=1e-4)


def test_the_strategy_stands_in_the_prompt_of_the_reply_that_the_responder_learns_from(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(model)
    levels, episodes, offers = opened(cfg)
    learned: list[Turn] = []
    judge = Lower.judge

    def judging(self: Lower, turns: Any, *rest: Any, **more: Any) -> Any:
        learned.extend(turns)
        return judge(self, turns, *rest, **more)

    monkeypatch.setattr(Lower, "judge", judging)
    learn(cfg, 0, levels, episodes, offers)
    inventory, decode = Talk.inventory(), levels.responder.role.renderer.decode
    pairs = [(e.turns[reply.parent], reply) for e in episodes for reply in e.of(RESPONDER) if reply.parent is not None]
    assert [reply for _, reply in pairs] == learned
    for chosen, reply in pairs:
        place = offers[chosen.seed].chosen
        assert chosen.text == inventory.options[place]
        assert f"Strategy: {inventory.label(place)}" in decode(reply.prompt)
    assert len({chosen.text for chosen, _ in pairs}) > 1


def test_the_target_is_another_network_that_lags(train: Train, few: list[str]) -> None:
    """Three optimizer steps between copies, two of them in a step: the target is copied in steps 2, 3 and so on."""
    run = train("tosca", *few, "--steps", 3, "--save-every", 1, "--keep-last", 9)
    assert same(weights(run, 1, "target"), weights(run, 0, STRATEGIST))
    assert not same(weights(run, 1, "target"), weights(run, 1, STRATEGIST))
    assert not same(weights(run, 2, "target"), weights(run, 1, "target"))
    assert same(weights(run, 3, "target"), weights(run, 3, STRATEGIST))  # six optimizer steps: copied just now


@pytest.mark.parametrize("kind", ["separate", "shared", "alternate", "softmax", "offline"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    kind: str,
    train: Train,
    few: list[str],
    recorded_decisions: Path,
    killed_at: Callable[[int], None],
) -> None:
    more: dict[str, list[object]] = {
        "separate": ["--reward-share-weight", 0.3, "--eval-every", 2, "--eval-episodes", 4],
        "shared": [*SHARED, "--lora.dropout", 0.1],
        "alternate": ["--mode", "alternate", "--low.surprisal-coef", 0.1, "--low.shaping.kl-target", 1],
        "softmax": ["--pick", "softmax", "--high.target", "polyak", "--low.policy.kl-coef", 0.1],
        "offline": ["--offline.path", recorded_decisions, "--high.optim.schedule", "linear"],
    }
    flags = [*few, *more[kind], "--save-every", "1"]
    killed_at(-1)
    whole = train("tosca", *flags, name="whole")
    killed_at(2)
    train("tosca", *flags, name="killed", status=130)
    killed_at(-1)
    resumed = train("tosca", *flags, "--resume", name="killed")
    assert resumed.rows() == whole.rows()
    assert resumed.rows("episodes") == whole.rows("episodes")
    last = "checkpoints/step_000004"
    for file in (path for path in (whole.out / last).rglob("*.safetensors") if path.name != "rng.safetensors"):
        name = file.relative_to(whole.out)
        assert (resumed.out / name).read_bytes() == file.read_bytes(), name


@pytest.fixture
def recorded_decisions(tmp_path: Path) -> Path:
    states = [Talk(Task(str(number))).state for number in range(4)]
    rows = [
        {
            "id": str(number),
            "state": {"query": state.query, "history": [], "description": state.description},
            "strategy": "Advice",
            "reward": 5.0,
            "next_state": None,
            "terminated": True,
        }
        for number, state in enumerate(states)
    ]
    path = tmp_path / "decisions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_recorded_decisions_are_mixed_into_every_batch(
    model: Path, recorded_decisions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(model, offline=tosca.DataConfig(path=(str(recorded_decisions),)), offline_fraction=0.25)
    levels, episodes, offers = opened(cfg)
    drawn: list[list[Any]] = []
    update = Upper.update

    def updating(self: Upper, choices: Any) -> dict[str, float]:
        drawn.append(list(choices))
        return update(self, choices)

    monkeypatch.setattr(Upper, "update", updating)
    learn(cfg, 0, levels, episodes, offers)
    assert len(levels.recorded) == 4
    assert [sum(choice in levels.recorded for choice in choices) for choices in drawn] == [2, 2]
    assert [len(choices) for choices in drawn] == [8, 8]


def test_while_it_is_sequential_strategies_are_drawn_at_random(train: Train, few: list[str]) -> None:
    rows = train("tosca", *few, "--mode", "sequential", "--episodes-per-step", 24).rows()
    assert all(row["strategy/epsilon"] == 1.0 for row in rows)
    assert all(0.15 < row[f"strategy/{name}"] < 0.55 for row in rows for name in ("question", "advice", "silence"))


def test_exploration_falls_to_its_end(train: Train, few: list[str]) -> None:
    rows = train("tosca", *few, "--epsilon", 0.8, "--epsilon-final", 0.2).rows()
    assert [row["strategy/epsilon"] for row in rows] == pytest.approx([0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("choose", ["random", "none"])
def test_without_one_who_learns_to_choose_the_responder_learns_alone(
    choose: str, train: Train, few: list[str], model: Path
) -> None:
    run = train("tosca", *few, "--choose", choose, "--mode", "lower", "--save-every", 1, "--keep-last", 9)
    parts = {path.name for path in (run.out / "checkpoints/step_000004").iterdir() if path.is_dir()}
    assert parts == {RESPONDER, "value", "reference", "shaping"}
    assert all(changed(run, step, RESPONDER) for step in range(4))
    roles = {turn["role"] for row in run.rows("episodes") for turn in row["turns"]}
    assert roles == ({STRATEGIST, RESPONDER} if choose == "random" else {RESPONDER})
    assert any(name.startswith("strategy/") for name in run.rows()[0]) is (choose == "random")
    who = opened_again(run, EnvSpec("talk", Talk))
    assert who.inventory == Talk.inventory()
    assert (who.chooser is not None and who.chooser.epsilon == 1.0) is (choose == "random")


def opened_again(run: Run, env: EnvSpec | None = None) -> Dialogists:
    params, model = SamplingParams(max_tokens=6), ModelConfig("x", device="cpu")
    return open_dialogists(str(run.out), model=model, sampling=tosca.SamplingConfig(), params=params, env=env)


def test_code_that_a_run_names_is_not_run_to_play_it_again(train: Train, few: list[str]) -> None:
    run = train("tosca", *few, "--choose", "random", "--mode", "lower", "--steps", 1)
    with pytest.raises(ConfigError, match="those of an environment that does not come with echelon"):
        opened_again(run)


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_a_run_is_played_again_as_it_was_learned(kind: str, train: Train, few: list[str], model: Path) -> None:
    adapters = SHARED if kind == "shared" else []
    run = train("tosca", *few, *adapters, "--eval-every", 4, "--eval-episodes", 6)
    who, env = opened_again(run), open_tasks(config(model))
    play, seed = who.play(env.make, max_turns=4), derive_seed(0, "evaluation")
    episodes = tosca.asyncio.run(collect(env.tasks("test"), play, seed=seed))
    rewards = [turn.reward for episode in episodes for turn in episode.of(RESPONDER)]
    assert run.rows()[-1]["eval/dialogue/satisfaction"] == pytest.approx(sum(rewards) / len(rewards))


def test_a_dialogue_whose_judge_failed_teaches_neither_level(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(model, env_settings={"judged": False}, error_budget=0.9)
    monkeypatch.setattr(tosca, "open_tasks", lambda cfg: EnvSpec("talk", Talk, {"judged": False}))
    env = tosca.open_tasks(cfg)
    levels = open_both(cfg, env)
    play = levels.players.play(env.make, max_turns=4)
    episodes = tosca.asyncio.run(collect(env.tasks("train") * 3, play, seed=2, error_budget=0.9))
    failed = sum(episode.ending == "failed" for episode in episodes)
    assert 0 < failed < 18
    learned, columns = learn(cfg, 0, levels, episodes, levels.players.take())
    played = [episode for episode in episodes if episode.ending != "failed"]
    replies = sum(len(episode.of(RESPONDER)) for episode in played)
    assert len(levels.replay) == replies
    assert len(columns["return"]) == replies
    rewards = [turn.reward for episode in played for turn in episode.of(RESPONDER)]
    assert learned["low/satisfaction"] == pytest.approx(sum(rewards) / replies)


def test_two_adapters_share_one_base_and_are_saved_each_as_one(train: Train, few: list[str], model: Path) -> None:
    run = train("tosca", *few, *SHARED)
    last = run.out / "checkpoints/step_000004"
    for part in (STRATEGIST, RESPONDER, "target"):
        assert (last / part / "adapter_model.safetensors").is_file()
        assert not (last / part / "model.safetensors").exists()
    again = train("tosca", *few, "--shared", "--strategist.path", run.out, "--responder.path", run.out, name="again")
    first = again.out / "checkpoints/step_000000"
    for part in (STRATEGIST, RESPONDER):
        assert same(*(load_file(step / part / "adapter_model.safetensors") for step in (last, first)))
    levels = open_both(config(model, shared=True, lora=tosca.LoraConfig(rank=4)), open_tasks(config(model)))
    assert levels.strategist is not None
    views = (levels.strategist.module, levels.responder.module)
    assert all(isinstance(view, AdapterView) for view in views)
    assert views[0].model is views[1].model


def test_levels_start_as_what_other_runs_taught(train: Train, few: list[str], model: Path) -> None:
    first = train("tosca", *few, "--high.shift", "2", name="first")
    second = train(
        "tosca", *few, "--strategist.path", first.out, "--responder.path", first.out, "--steps", 1, name="second"
    )
    for part in (STRATEGIST, RESPONDER):
        assert same(weights(first, 4, part), weights(second, 0, part))
    described = [
        json.loads((run.out / f"checkpoints/step_{step:06d}/strategist/strategist.json").read_text())
        for run, step in ((first, 4), (second, 0), (second, 1))
    ]
    assert described[0] == described[1] == described[2]  # what its values mean is as it was learned
    assert described[0]["shift"] != 2  # and began around what is earned


def test_a_strategist_of_other_strategies_is_refused(
    train: Train, few: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = train("tosca", *few, "--steps", 1, name="first")
    flags = ["--strategist.path", first.out, "--strategies", "A", "B"]
    train("tosca", *few, *flags, name="second", status=2)
    assert "chooses from ['Question', 'Advice', 'Silence'], written (1), (2), (3)" in capsys.readouterr().err


def test_adapters_of_another_base_are_refused(
    train: Train, few: list[str], untrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("tosca", *few, *SHARED, "--strategist.path", untrained, status=2)
    assert "the strategist stands on" in capsys.readouterr().err
    train("tosca", *few, "--shared", status=2)
    assert "is no adapter, and where levels share a model each learns in one" in capsys.readouterr().err


def test_what_is_evaluated_is_greedy_and_changes_nothing(train: Train, few: list[str]) -> None:
    plain = train("tosca", *few, name="plain")
    run = train("tosca", *few, "--eval-every", 2, "--eval-episodes", 5, name="run")
    found = [[name for name in row if name.startswith("eval/")] for row in run.rows()]
    assert [bool(names) for names in found] == [False, True, False, True]
    assert run.rows()[1]["eval/strategy/explored"] == 0.0
    assert "eval/dialogue/satisfaction" in found[1]
    rows = [{name: value for name, value in row.items() if not name.startswith("eval/")} for row in run.rows()]
    assert rows == plain.rows()


def test_what_dialogues_are_paid_besides_counts_in_an_evaluation_too(
    train: Train, few: list[str], tmp_path: Path
) -> None:
    (tmp_path / "paid.py").write_text("def ten(completions, **_):\n    return [10.0] * len(completions)\n")
    evaluated = ("--eval-every", 1, "--eval-episodes", 2, "--steps", 1)
    (row,) = train("tosca", *few, *evaluated, "--reward", f"{tmp_path / 'paid.py'}:ten").rows()
    assert row["eval/reward/ten"] == row["reward/ten"] == 10
    assert row["eval/reward/mean"] > 5 < row["reward/mean"]


def test_episodes_tell_the_q_table_of_every_choice(train: Train, few: list[str]) -> None:
    rows = train("tosca", *few, "--steps", 1).rows("episodes")
    for row in rows:
        for chosen, reply in zip(row["turns"][::2], row["turns"][1::2], strict=True):
            q = [candidate["q"] for candidate in chosen["candidates"]]
            assert chosen["explored"] is (q.index(max(q)) != chosen["chosen"])
            assert chosen["strategy"] == chosen["candidates"][chosen["chosen"]]["strategy"]
            assert {"advantage", "value", "return", "reward"} <= reply.keys()
            assert "advantage" in chosen
            assert reply["parent"] == chosen["index"]


def test_dry_run_tells_sizes_and_writes_nothing(
    train: Train, few: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("tosca", *few, "--dry-run")
    told = capsys.readouterr().out
    assert all(f"{name}: " in told for name in (STRATEGIST, "target", RESPONDER, "value"))
    assert f"tokens per step: at most {6 * 4 * 6}" in told
    assert not (tmp_path / "run").exists()


MISTAKES = [
    ([], "responder.path is missing"),
    (["--cycle", "1"], "cycle = 1: expected steps of the strategist : steps of the responder, such as 3:1"),
    (["--cycle", "0:1"], "cycle = 0:1: expected"),
    (["--choose", "none"], "choose = none, so there is no strategist that could learn. Use --mode lower"),
    (["--choose", "random", "--mode", "lower", "--shared"], "there is one level only"),
    (["--choose", "none", "--mode", "lower", "--reward-share-weight", "1"], "so there is no Q to share"),
    (["--mode", "sequential", "--reward-share-weight", "1"], "mode = sequential exchanges nothing"),
    (["--reward-share-weight", "-1"], "levels would work against each other"),
    (["--reward-share-weight", "1", "--low.shaping.whiten"], "would take out again what is shared"),
    (["--epsilon", "2"], "it is a probability"),
    (["--temperature", "0"], "Q is divided by it"),
    (["--low.policy.minibatches", "40"], "some would have none of a step's 16 dialogues"),
    (["--ptx.path", "x"], "these rows would count nothing"),
    (["--low.policy.ptx-coef", "0.1"], "there is nothing to weigh"),
    (["--shared", "--lora.modules-to-save", "lm_head"], "no level can train it in full"),
    (["--offline-fraction", "1"], "it is a part of a batch"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES, ids=[" ".join(flags) for flags, _ in MISTAKES])
def test_settings_that_cannot_work_are_explained(flags: list[str], message: str) -> None:
    path = ["--responder.path", "x"] if flags else []
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        load(Config, [], ["--out", "x", "--env", "dialogue", *path, *flags])


def test_a_dialogue_needs_an_environment() -> None:
    with pytest.raises(ConfigError, match="env is missing"):
        load(Config, [], ["--out", "x", "--responder.path", "x"])


TRAIN_HRL = """hrl_mode reward_share_weight upper_pretrain lower_pretrain reward_pretrain critic_pretrain prompt_data
    dataset upper_save_path lower_save_path upper_learning_rate upper_max_epochs lower_actor_lr lower_critic_lr ppl_coef
    num_episodes seed zero_stage bf16 flash_attn local_rank lora_rank lora_alpha use_wandb wandb_org wandb_project
    wandb_run_name"""


def rows_of_train_hrl() -> list[str]:
    """Flags for everything in the table for those who come from ToSCA."""
    part = PAGE.read_text(encoding="utf-8").partition("### `train_hrl`")[2]
    cells = [row["here"] for row, _ in columns(part, "here")]
    return [code for cell in cells for code in CODE.findall(cell) if code.startswith("--")]


@pytest.mark.parametrize("flags", rows_of_train_hrl())
def test_every_mapping_from_train_hrl_parses(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echelon.config.need", lambda module, extra: None)
    needed = {"--out": "r", "--responder.path": "m", "--env": "dialogue"}
    words = [word for pair in needed.items() if pair[0] not in flags.split() for word in pair]
    load(Config, [], [*words, *flags.split()])


def test_every_flag_of_train_hrl_has_a_row() -> None:
    part = PAGE.read_text(encoding="utf-8").partition("### `train_hrl`")[2]
    listed = {code.split()[0] for row, _ in columns(part, "flag") for code in CODE.findall(row["flag"])}
    assert {f"--{flag}" for flag in TRAIN_HRL.split()} - listed == set()


def test_every_defect_of_the_originals_has_a_test() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("## What the originals get wrong")[2]
    rows = [row for row, _ in columns(text.partition("## ")[0], "test")]
    assert [row[""] for row in rows] == [str(number) for number in range(1, 17)]
    assert all(CODE.findall(row["test"]) for row in rows)


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_killed_at_some_moment_and_resumed_it_ends_as_if_left_alone(kind: str, few: list[str], tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["echelon.recipes.tosca"])
    words = ["tosca", *few, *(SHARED if kind == "shared" else []), "--threads", "1", "--save-every", "1"]

    def begin(out: Path) -> Any:
        again = ["--resume"] if list(out.glob("checkpoints/step_*")) else []
        process = context.Process(target=command, args=([*words, "--out", str(out), *again], out))
        process.start()
        return process

    whole, out = tmp_path / "whole", tmp_path / "killed"
    finished(begin(whole), whole)
    for done in (1, 2):
        process = begin(out)
        for _ in waiting(lambda done=done: len(rows(out, "metrics.jsonl")) >= done, process):
            time.sleep(0.001)
        assert kill(process), "it was not killed: nothing was tested"
    finished(begin(out), out)
    assert_same(out, whole)


def test_everything_that_is_logged_stands_on_the_page(train: Train, few: list[str], recorded_decisions: Path) -> None:
    more = ["--reward-share-weight", 0.1, "--offline.path", recorded_decisions, "--eval-every", 1, "--steps", 2]
    terms = ["--low.surprisal-coef", 0.1, "--low.self-likelihood-coef", 0.1, "--low.policy.kl-coef", 0.1]
    assert unknown("tosca", train("tosca", *few, *more, *terms)) == set()
