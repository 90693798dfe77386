"""The responder alone: it learns to do what the strategy in its prompt says, and every way to tell it one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from echelon import cli
from echelon.config import ModelConfig, SamplingConfig
from echelon.config.loading import load
from echelon.models.lm import tiny
from echelon.models.options import OptionScorer
from echelon.recipes.responder import Config, open_world, replied
from echelon.rollout.setup import open_actor
from echelon.text.dialogue import DIMENSIONS, DialogueState, Inventory, responder_prompt
from echelon.train.checkpoint import find_checkpoint
from echelon.types import Episode, Message
from tests.recipes.conftest import Train
from tests.recipes.test_metric_names import unknown
from tests.test_docs import CODE, columns

INVENTORY = Inventory(("Sun", "Rain"))
WORDS = ("bright", "wet")
"""What each strategy wants to be said; the prompt has none of these words."""

LABELS = tuple(INVENTORY.label(place) for place in range(2))

REWARDS = f"""
WANTED = {dict(zip(LABELS, WORDS, strict=True))!r}


def follows(prompts, completions, strategy):
    return [float(WANTED.get(told) in said.split()) for told, said in zip(strategy, completions)]


def bright(prompts, completions):
    return [float("bright" in said) for said in completions]
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve states with every strategy in each, the rewards, and a model that says any of the words at random."""
    folder = tmp_path_factory.mktemp("weather")
    states = [DialogueState(f"How is it on day {day}?") for day in range(1, 13)]
    with (folder / "decisions.jsonl").open("w") as file:
        for state in states:
            for name in INVENTORY.strategies:
                file.write(json.dumps({"query": state.query, "strategy": name, "reward": 1, "done": True}) + "\n")
    (folder / "rewards.py").write_text(REWARDS)
    drawn = random.Random(0)
    asked = [
        (responder_prompt(state, LABELS[place]), drawn.choice([*WORDS, WORDS[place]]))
        for state in states
        for place in (0, 1) * 4
    ]
    with (folder / "talk.jsonl").open("w") as file:
        for messages, word in asked:
            file.write(json.dumps({"messages": [*messages, {"role": "assistant", "content": word}]}) + "\n")
    words = [f"{messages[0]['content']}\n{' '.join(WORDS)}" for messages, _ in asked]
    module, tokenizer = tiny(words, vocab_size=400, hidden=32, layers=2, heads=2)
    for part in (module, tokenizer):
        part.save_pretrained(folder / "model")
    words = f"sft --model.path {folder}/model --data.path {folder}/talk.jsonl --out {folder}/sft --threads 1"
    assert cli.main(f"{words} --epochs 30 --rows-per-step 24 --optim.lr 5e-3".split()) == 0
    return folder


@pytest.fixture
def weather(folder: Path) -> list[str]:
    """Flags that a run needs."""
    words = ["--model.path", str(folder / "sft"), "--data.path", str(folder / "decisions.jsonl")]
    words += ["--strategies", *INVENTORY.strategies, "--reward", f"{folder}/rewards.py:follows"]
    return [*words, "--sampling.max-tokens", "4"]


LEARN = ("--episodes-per-step", 24, "--low.policy.epochs", 4, "--low.policy.minibatches", 1)
LEARN += ("--low.value-epochs", 4, "--low.value-minibatches", 1)
LEARN += ("--low.policy.optim.lr", "1e-3", "--low.value-optim.lr", "3e-3")


def chances(path: Path) -> torch.Tensor:
    """(strategy, word) → probability that the reply on day 3 begins with the word, given the strategy."""
    actor = open_actor(ModelConfig(path=str(path)), SamplingConfig(), name="responder")
    renderer, rows = actor.role.renderer, []
    first = [actor.tokenizer.encode(word)[0] for word in WORDS]
    for label in LABELS:
        asked = responder_prompt(DialogueState("How is it on day 3?"), label)
        ids = [token for part in renderer.segments(asked) for token in part]
        with torch.no_grad():
            rows.append(actor.module(torch.tensor([ids])).logits[0, -1].softmax(-1)[first])
    return torch.stack(rows)


@pytest.mark.seeds(0, 1, 2)
def test_it_learns_to_follow_the_strategy_in_its_prompt(
    train: Train, weather: list[str], folder: Path, seed: int
) -> None:
    run = train("responder", *weather, *LEARN, "--steps", 40, "--seed", seed)
    earned = [row["reward/mean"] for row in run.rows()]
    assert sum(earned[:3]) / 3 < 0.65  # it begins by saying either
    assert sum(earned[-5:]) / 5 > 0.85
    before, after = chances(folder / "sft"), chances(find_checkpoint(run.out, "responder"))
    assert (before[0] - before[1]).abs().max() < 0.05  # which strategy it is told makes no difference
    assert after.diag().min() > 0.7  # and now it does
    assert after.diag().min() > 2 * after.fliplr().diag().max()


def test_told_nothing_it_cannot_follow(train: Train, weather: list[str]) -> None:
    flags = ("--steps", 12, "--strategist", "none", "--reward", weather[weather.index("--reward") + 1])
    earned = [row["reward/mean"] for row in train("responder", *weather, *LEARN, *flags).rows()]
    assert sum(earned) == 0  # the reward is of the strategy that was told, and there is none


SMALL = ("--episodes-per-step", 4, "--steps", 2, "--low.policy.minibatches", 1, "--low.value-minibatches", 1)


def test_a_run_leaves_metrics_episodes_and_two_models(train: Train, weather: list[str]) -> None:
    run = train("responder", *weather, *SMALL, "--replies-per-state", 2, "--low.surprisal-coef", 0.01)
    row = run.rows()[-1]
    assert row["low/policy/first_mismatch"] < 1e-4
    assert row["low/policy/ratio"] == pytest.approx(1, abs=1e-4)
    assert row["low/return"] == pytest.approx(
        row["low/term/satisfaction"] + row["low/term/kl"] + row["low/term/surprisal"], abs=1e-5
    )
    assert row["low/satisfaction"] == pytest.approx(row["reward/mean"])
    assert row["reward/follows"] == pytest.approx(row["reward/mean"])
    said = run.rows("episodes")[0]["turns"][0]
    assert said["role"] == "responder"
    assert {"value", "advantage", "return"} <= said.keys()
    assert set(run.weights("responder")) == set(run.weights("reference"))
    assert run.weights("value")


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    train: Train, weather: list[str], folder: Path, killed_at: Callable[[int], None]
) -> None:
    flags = [*weather, *SMALL, "--steps", 4, "--save-every", 2, "--low.surprisal-coef", 0.1, "--low.ema-decay", 0.9]
    flags += ["--low.shaping.kl-target", 1, "--low.shaping.normalize", "scale", "--low.warmup-steps", 1]
    flags += ["--ptx.path", f"{folder}/talk.jsonl", "--low.policy.ptx-coef", 0.05, "--ptx-rows", 2]
    flags += ["--low.self-likelihood-coef", 0.1, "--low.policy.minibatches", 2]
    whole = train("responder", *flags, name="whole")
    killed_at(3)
    train("responder", *flags, name="killed", status=130)
    killed_at(-1)
    resumed = train("responder", *flags, "--resume", name="killed")
    assert len(whole.rows()) == 4
    assert resumed.rows() == whole.rows()
    assert resumed.rows("episodes") == whole.rows("episodes")
    for part in ("responder", "value", "reference", "ema"):
        torch.testing.assert_close(resumed.weights(part), whole.weights(part), rtol=0, atol=0)


def test_a_run_can_go_on_from_the_responder_of_another(train: Train, weather: list[str]) -> None:
    first = train("responder", *weather, *SMALL, name="first")
    again = train("responder", *weather, *SMALL, "--model.path", first.out, "--low.warmup-steps", 9, name="again")
    torch.testing.assert_close(again.weights("responder"), first.weights("responder"), rtol=0, atol=0)


def test_held_out_states_are_replied_to_and_not_learned_from(train: Train, weather: list[str]) -> None:
    run = train("responder", *weather, *SMALL, "--data.eval-fraction", 0.3, "--eval-every", 2, "--eval-episodes", 6)
    first, last = run.rows()
    assert not any(name.startswith("eval/") for name in first)
    assert {"eval/reward/mean", "eval/reward/follows", "eval/turn/tokens"} <= last.keys()


def test_a_dry_run_prints_sizes_and_writes_nothing(
    train: Train, weather: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("responder", *weather, *SMALL, "--dry-run")
    out = capsys.readouterr().out
    assert "responder: LlamaForCausalLM" in out
    assert "tokens per step: at most 16" in out
    assert not run.out.exists()


class Recorded:
    """A judge that notes the prompts it is given and says what it is told to."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), list[str]()

    async def __call__(self, messages: Sequence[Message]) -> str:
        self.asked.append(messages[0]["content"])
        return self.answers[len(self.asked) % len(self.answers)]


YES = "\n".join(f"{name}: yes" for name in DIMENSIONS)
NO = "\n".join(f"{name}: {'yes' if name == 'fluency' else 'no'}" for name in DIMENSIONS)


def judged_by(judge: Recorded, weather: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("echelon.recipes.responder.shared_endpoint", lambda settings: judge)
    place = weather.index("--reward")
    kept = [*weather[:place], *weather[place + 2 :]]
    return [*kept, "--reward", "judge", "--judge", "url=http://localhost:1/v1", "model=m", "--reward-weights", "2"]


def test_a_judge_pays_its_points(train: Train, weather: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Recorded(YES, NO)
    run = train("responder", *judged_by(judge, weather, monkeypatch), *SMALL)
    assert {turn["reward"] for row in run.rows("episodes") for turn in row["turns"]} == {10.0, 2.0}
    assert "User: How is it on day" in judge.asked[0]
    assert run.rows()[0]["episode/fluency"] == 1


def test_a_judge_that_talks_nonsense_costs_the_reply_and_is_never_a_zero(
    train: Train, weather: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Recorded(*[YES] * 5, *["Nice!"] * 5)
    run = train("responder", *judged_by(judge, weather, monkeypatch), *SMALL, "--error-budget", 0.9)
    failed = sum(row["episode/failed"] for row in run.rows())
    assert failed > 0
    earned = {turn["reward"] for row in run.rows("episodes") if row["ending"] != "failed" for turn in row["turns"]}
    assert earned == {10.0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--strategist Snow",
            "strategist = Snow: it is neither a strategist's folder nor one of data, random, none, Sun",
        ),
        ("--strategies esconv", "'Sun' is none of the strategies Question, "),
        ("--strategies", "nothing says what the rows choose from. Give esconv, or list their names."),
        ("--judge url=http://x model=m", "nobody is asked to judge. Add judge to reward."),
        ("--low.policy.ptx-coef 0.1", "there is nothing to weigh. Give ptx.path the conversations."),
        ("--sampling.max-prompt-tokens 20", "the query, what is known and the instruction alone take"),
        ("--low.surprisal-coef -1", "low.surprisal_coef = -1.0: a negative weight does the opposite"),
        ("--low.surprisal middling", "low.surprisal"),
        ("--eval-every 1", "no conversations are held out."),
    ],
)
def test_what_cannot_work_is_one_line(
    train: Train, weather: list[str], capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    train("responder", *weather, *SMALL, *flags.split(), status=2)
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_rows_without_a_conversation_are_refused(
    train: Train, weather: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ready.jsonl").write_text('{"current_prompt": "Choose.", "strategy": "Sun"}\n')
    train("responder", *weather, *SMALL, "--data.path", tmp_path / "ready.jsonl", status=2)
    assert (
        "it has a ready prompt of the upper level, and the responder reads the conversation" in capsys.readouterr().err
    )


@pytest.fixture
def told(folder: Path) -> Callable[..., list[Episode]]:
    """Plays both rows of two states with a strategy from this source; the model says anything."""

    def told(source: str) -> list[Episode]:
        words = ["--model.path", f"{folder}/sft", "--data.path", f"{folder}/decisions.jsonl", "--out", "r"]
        words += ["--reward", f"{folder}/rewards.py:bright", "--strategist", source]
        cfg = load(Config, [], [*words, "--strategies", *INVENTORY.strategies, "--sampling.max-tokens", "4"])
        actor = open_actor(cfg.model, cfg.sampling, name="responder")
        world = open_world(cfg, actor.role)
        return replied(cfg, world, actor.role, world.env.tasks("train")[:4], seed=0, siblings=2).episodes

    return told


def prompts(episodes: list[Episode]) -> list[str]:
    return [turn.heard[0]["content"] for episode in episodes for turn in episode.of("responder")]


def test_the_strategy_of_the_row_stands_in_the_prompt(told: Callable[..., list[Episode]]) -> None:
    episodes = told("data")
    labels = [LABELS[0], LABELS[0], LABELS[1], LABELS[1]] * 2
    assert [episode.data["strategy"] for episode in episodes] == labels
    assert all(f"Strategy: {label}\n" in asked for label, asked in zip(labels, prompts(episodes), strict=True))
    assert [episode.reward for episode in episodes] == [float("bright" in e.turns[0].text) for e in episodes]


def test_chance_one_name_or_nobody_may_tell_it(told: Callable[..., list[Episode]]) -> None:
    assert {episode.data["strategy"] for episode in told("random")} == set(LABELS)
    assert {episode.data["strategy"] for episode in told("rain")} == {LABELS[1]}
    assert all("Strategy" not in asked for asked in prompts(told("none")))


def test_a_folder_that_is_called_data_is_no_strategist(
    told: Callable[..., list[Episode]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [episode.data["strategy"] for episode in told("data")][:4] == [LABELS[0], LABELS[0], LABELS[1], LABELS[1]]


def test_a_strategist_may_tell_it(told: Callable[..., list[Episode]], folder: Path, tmp_path: Path) -> None:
    actor = open_actor(ModelConfig(path=str(folder / "sft")), SamplingConfig())
    actor.module.save_pretrained(tmp_path)
    actor.tokenizer.save_pretrained(tmp_path)
    OptionScorer(actor.module).describe(tmp_path, INVENTORY)
    for episode in told(str(tmp_path)):
        chosen, said = episode.turns
        label = LABELS[INVENTORY.options.index(chosen.text)]
        assert said.parent == chosen.index
        assert f"Strategy: {label}\n" in said.heard[0]["content"]
        assert episode.data["strategy"] == label


def test_it_learns_from_every_reply_of_a_dialogue(train: Train, folder: Path) -> None:
    flags = ("--model.path", folder / "sft", "--env", "dialogue", "--env-settings", "strategies=small")
    flags += ("--sampling.max-tokens", 4, "--sampling.max-prompt-tokens", 1024, *SMALL)
    for horizon in ("turn", "episode"):
        rows = train("responder", *flags, "--max-turns", 2, "--low.horizon", horizon, name=horizon).rows()
        assert rows[0]["low/policy/first_mismatch"] < 1e-4
        assert rows[0]["episode/turns"] > 1


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "algorithms" / "responder.md"
TRAIN_PPO = """pretrain reward_pretrain critic_pretrain save_path ckpt_path save_steps max_ckpt_num max_ckpt_mem
    logging_steps eval_steps num_episodes rollout_batch_size micro_rollout_batch_size micro_train_batch_size max_epochs
    train_batch_size prompt_max_len generate_max_len max_len max_samples max_norm l2 ptx_coef pretrain_data
    pretrain_data_probs ppl_coef intrinsic_reward_coef disable_dense_satisfaction_reward eps_clip value_clip lambd gamma
    normalize_reward top_p top_k temperature freezing_actor_steps n_samples_per_prompt save_value_network
    actor_learning_rate critic_learning_rate kl_target init_kl_coef enable_ema load_in_4bit lora_rank lora_alpha
    lora_dropout target_modules value_head_prefix prompt_data prompt_data_probs input_key input_template
    apply_chat_template bf16 flash_attn gradient_checkpointing seed zero_stage local_rank use_wandb wandb_org
    wandb_project wandb_run_name"""
"""Every flag of the script."""


def rows_of_train_ppo() -> list[dict[str, str]]:
    return [row for row, _ in columns(PAGE.read_text(encoding="utf-8"), "flag")]


def mappings() -> list[str]:
    cells = (row["here"] for row in rows_of_train_ppo() if not row["here"].startswith("gone"))
    return [code for cell in cells for code in CODE.findall(cell) if code.startswith("--")]


@pytest.mark.parametrize("flags", mappings())
def test_every_mapping_from_train_ppo_parses(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echelon.config.need", lambda module, extra: None)
    needed = "--out r --model.path m --data.path d --strategies esconv --reward r.py:f"
    needed += "" if "ptx" not in flags else " --ptx.path p --low.policy.ptx-coef 0.1"
    needed += "" if "kl-target" not in flags else " --low.shaping.kl-coef 0.1"
    load(Config, [], [*needed.split(), *flags.split()])


def test_every_flag_of_train_ppo_has_a_row_with_an_answer() -> None:
    listed = {code for row in rows_of_train_ppo() for code in CODE.findall(row["flag"])}
    assert {f"--{flag}" for flag in TRAIN_PPO.split()} - listed == set()
    for row in rows_of_train_ppo():
        assert row["here"].startswith(("`--", "gone", "always", "not here")), row


def test_the_settings_of_the_paper_are_what_the_pages_say() -> None:
    cfg = load(Config, [ROOT / "configs/responder/paper.yaml"], ["--out", "r"])
    assert (cfg.low.dense, cfg.low.surprisal, cfg.low.surprisal_coef) == ("literal", "raw", 0.01)
    assert (cfg.low.shaping.kl_coef, cfg.low.gamma, cfg.low.lam) == (0.01, 1.0, 0.95)
    assert (cfg.low.policy.optim.lr, cfg.low.value_optim.lr) == (9e-7, 9e-4)


def test_the_page_about_logging_names_all_that_is_logged(train: Train, weather: list[str], folder: Path) -> None:
    flags = [*weather, *SMALL, "--data.eval-fraction", 0.3, "--eval-every", 1, "--low.surprisal-coef", 0.1]
    flags += ["--ptx.path", f"{folder}/talk.jsonl", "--low.policy.ptx-coef", 0.05, "--low.policy.kl-coef", 0.1]
    assert unknown("responder", train("responder", *flags, "--low.self-likelihood-coef", 0.1)) == set()
