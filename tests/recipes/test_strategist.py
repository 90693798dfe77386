"""Strategies learned from files: the optimal one where the greedy one is wrong, what is measured, every promise."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from echelon.config import DataConfig, ModelConfig
from echelon.config.loading import load
from echelon.data.candidates import Options
from echelon.data.strategies import asked, option_ids
from echelon.errors import ConfigError
from echelon.models.lm import load_lm, load_tokenizer
from echelon.models.options import OptionScorer, read_description
from echelon.recipes import strategist
from echelon.recipes.strategist import Config
from echelon.rollout.setup import model_path
from echelon.text.chat import Renderer
from echelon.text.dialogue import INVENTORIES
from echelon.text.endpoint import Unanswered
from echelon.train.strategy import Upper, option_table
from echelon.types import Message
from tests.recipes.conftest import Run
from tests.recipes.strategies import ASKED, FOLLOWS, best, lines, prompt, reader, write_decisions, write_esconv
from tests.test_docs import CODE, columns, config_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "algorithms" / "strategist.md"
FEW = ("--rows-per-step", 8, "--max-steps", 4, "--optim.lr", 3e-3, "--eval-every", 2, "--target-every", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model called `model`, a small one called `small`, and files of decisions and conversations."""
    folder = tmp_path_factory.mktemp("strategies")
    reader(folder / "model")
    reader(folder / "small", layers=1, hidden=16)
    write_decisions(folder / "decisions.jsonl", 400)
    write_decisions(folder / "few.jsonl", 30)
    write_esconv(folder / "esconv.json", 80)
    return folder


@pytest.fixture
def told(folder: Path) -> list[str]:
    data = ["--data.path", str(folder / "few.jsonl"), "--strategies", "daily_dialog"]
    return ["--model.path", str(folder / "small"), *data]


@pytest.fixture
def conversations(folder: Path) -> list[str]:
    data = ["--data.path", str(folder / "esconv.json"), "--data.eval-fraction", "0.3", "--reward", "imitation"]
    return ["--model.path", str(folder / "small"), *data]


def right(run: Run) -> list[float]:
    """The part of the states of each stage in which the strategist of a run chooses what is best in the long run."""
    path = model_path(str(run.out), "strategist")
    reading, menu = read_description(Path(path))
    renderer = Renderer(load_tokenizer(path))
    spelled = option_ids(renderer, menu)
    states = [Options(renderer.render(asked(prompt(*state), menu)), spelled) for state in ASKED]
    values, _ = option_table(OptionScorer(load_lm(path, device="cpu"), reading), states, 4096)
    wanted = torch.tensor([best(*state) for state in ASKED])
    found: list[float] = (values.argmax(1) == wanted).float().view(2, -1).mean(1).tolist()
    return found


LEARN = ("--strategies", "daily_dialog", "--rows-per-step", 32, "--optim.lr", 3e-3, "--optim.schedule", "linear")
LEARN += ("--epochs", 8, "--save-every", 0)


@pytest.mark.learning
@pytest.mark.seeds(0, 1, 2)
def test_the_optimal_strategy_is_recovered_where_the_greedy_one_is_wrong(train, folder: Path, seed: int) -> None:
    """200 steps on 800 decisions taken at random: right in all 64 states, with each of these seeds."""
    data = ("--model.path", folder / "model", "--data.path", folder / "decisions.jsonl")
    first, then = right(train("strategist", *data, *LEARN, "--seed", seed))
    assert min(first, then) > 0.95


@pytest.mark.learning
def test_without_a_discount_for_what_follows_the_greedy_strategy_is_learned(train, folder: Path) -> None:
    data = ("--model.path", folder / "model", "--data.path", folder / "decisions.jsonl")
    first, then = right(train("strategist", *data, *LEARN, "--gamma", 0))
    assert first < 0.05
    assert then > 0.95, "where nothing follows it is right all the same"


@pytest.mark.learning
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [("--normalize", "mean", "--no-double"), ("--target", "polyak", "--loss", "huber")]
)
def test_other_settings_learn_it_too(train, folder: Path, settings: Sequence[object]) -> None:
    data = ("--model.path", folder / "model", "--data.path", folder / "decisions.jsonl")
    assert min(right(train("strategist", *data, *LEARN, *settings, "--epochs", 12))) > 0.95


@pytest.mark.learning
@pytest.mark.seeds(0, 1)
def test_imitation_learns_what_supporters_do_from_conversations(train, folder: Path, seed: int) -> None:
    """80 conversations of two turns, 21 of them held out: all 42 decisions there, with these seeds."""
    data = ("--model.path", folder / "model", "--data.path", folder / "esconv.json", "--data.eval-fraction", 0.3)
    flags = ("--rows-per-step", 16, "--epochs", 12, "--optim.lr", 3e-3, "--optim.schedule", "linear", "--seed", seed)
    run = train("strategist", *data, *flags, "--reward", "imitation", "--select", "accuracy", "--eval-every", 0)
    evaluation = json.loads((run.out / "evaluation.json").read_text())
    assert evaluation["accuracy"] > 0.9, "chance is 1/8, and the most frequent one 0.3"
    assert evaluation["macro_f1"] > 0.9
    assert evaluation["bias"] < 1


def test_an_esconv_file_is_read_and_accuracy_macro_f1_and_bias_are_reported(
    train, conversations: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("strategist", *conversations, *FEW)
    out = capsys.readouterr().out
    found = json.loads((run.out / "evaluation.json").read_text())
    for name in ("accuracy", "macro_f1", "bias", "state_value"):
        assert name in out
        assert found[name] == pytest.approx(lowest(run)[f"eval/{name}"], abs=1e-5)
    assert found["strategies"] == list(INVENTORIES["esconv"].strategies)
    decisions = found["decisions"]
    assert sum(map(sum, found["confusion"])) == len(decisions) > 20
    same = sum(row["strategy"] == row["chosen"] for row in decisions) / len(decisions)
    assert found["accuracy"] == pytest.approx(same)
    assert all(row["chosen"] == max(row["q"], key=row["q"].__getitem__) for row in decisions)
    assert {row["strategy"] for row in decisions} <= {"Question", "Reflection of Feelings", *FOLLOWS}
    top = sum(max(row["q"].values()) for row in decisions) / len(decisions)
    assert found["state_value"] == pytest.approx(top, abs=1e-5)
    taken = sum(row["q"][row["strategy"]] for row in decisions) / len(decisions)
    assert found["state_value/taken"] == pytest.approx(taken, abs=1e-5)


def lowest(run: Run) -> dict[str, Any]:
    return min((row for row in run.rows() if "eval/loss" in row), key=lambda row: row["eval/loss"])


def test_what_is_reported_is_what_the_best_weights_do_and_not_the_last_ones(train, conversations: list[str]) -> None:
    run = train("strategist", *conversations, *FEW, "--eval-first", "--optim.lr", 0.3)
    assert lowest(run)["step"] == 0
    assert lowest(run)["eval/loss"] < 0.5 * run.rows()[-1]["eval/loss"]
    found = json.loads((run.out / "evaluation.json").read_text())
    assert found["state_value"] == pytest.approx(lowest(run)["eval/state_value"], abs=1e-5)


def test_the_best_weights_are_an_ordinary_model_with_a_note_on_how_it_is_read(train, conversations: list[str]) -> None:
    run = train("strategist", *conversations, *FEW, "--select", "accuracy", "--score", "logit", "--normalize", "mean")
    assert lowest(run)["eval/loss"] == pytest.approx(1 - lowest(run)["eval/accuracy"])
    for place in ("best", "checkpoints/step_000004/strategist", "checkpoints/step_000004/target"):
        reading, menu = read_description(run.out / place)
        assert (reading.score, reading.normalize, reading.front) == ("logit", "mean", 0)
        assert menu == INVENTORIES["esconv"]
        load_lm(str(run.out / place), device="cpu")
    assert load_tokenizer(str(run.out / "best")).chat_template


def test_what_is_logged_of_a_step(train, told: list[str]) -> None:
    run = train("strategist", *told, *FEW)
    for row in run.rows():
        assert {"loss", "grad_norm", "lr", "epoch"} < row.keys()
        assert {"high/q_mean", "high/q_target", "high/td_error", "high/reward", "high/target_age"} < row.keys()
    assert [row["high/target_age"] for row in run.rows()] == [1, 2, 0, 1]
    assert not (run.out / "evaluation.json").exists(), "nothing is held out"


def test_the_target_lags_and_is_saved(train, told: list[str]) -> None:
    run = train("strategist", *told, *FEW)
    begun = load_file(run.out / "checkpoints/step_000000/strategist/model.safetensors")
    own, lagging = run.weights("strategist"), run.weights("target")
    assert all(not lagging[name].equal(own[name]) and not lagging[name].equal(begun[name]) for name in own)
    still = train("strategist", *told, *FEW, "--target-every", 10, name="still")
    assert all(tensor.equal(begun[name]) for name, tensor in still.weights("target").items())


def test_the_size_of_a_pass_does_not_change_the_updates(train, told: list[str]) -> None:
    flags = (*told, *FEW, "--optim.eps", 1e-3)  # otherwise Adam makes steps of rounding
    whole, parts = train("strategist", *flags, name="whole"), train("strategist", *flags, "--tokens-per-pass", 40)
    for one, other in zip(whole.rows(), parts.rows(), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(whole.weights("strategist"), parts.weights("strategist"), rtol=0, atol=2e-6)
    torch.testing.assert_close(whole.weights("target"), parts.weights("target"), rtol=0, atol=2e-6)


VARIANTS = {
    "hard": ("--target-every", 3),
    "polyak": ("--target", "polyak", "--tau", 0.2, "--loss", "huber", "--data.eval-fraction", 0.3),
    "an adapter": ("--lora.rank", 2, "--lora.dropout", 0.2, "--data.eval-fraction", 0.3),
    "imitation": ("--reward", "imitation", "--data.eval-fraction", 0.3, "--patience", 4),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(train, told: list[str], killed_at, variant: str) -> None:
    flags = (*told, *FEW, "--max-steps", 6, "--save-every", 2, *VARIANTS[variant])
    whole = train("strategist", *flags, name="whole")
    killed_at(4)
    train("strategist", *flags, name="killed", status=130)
    killed_at(-1)
    resumed = train("strategist", *flags, "--resume", name="killed")
    assert resumed.rows() == whole.rows()
    assert len(whole.rows()) == 6
    one, other = (run.out / "checkpoints/step_000006" for run in (whole, resumed))
    files = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert files == {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
    told_apart = {Path("config.yaml"), Path("manifest.json"), Path("rng.safetensors")}
    assert [name for name in files - told_apart if (one / name).read_bytes() != (other / name).read_bytes()] == []
    if "--data.eval-fraction" in VARIANTS[variant]:
        assert (whole.out / "evaluation.json").read_text() == (resumed.out / "evaluation.json").read_text()


def test_a_run_can_start_from_what_another_one_learned(train, told: list[str]) -> None:
    first = train("strategist", *told, *FEW, name="first")
    words = [first.out if word == told[1] else word for word in told]
    second = train("strategist", *words, *FEW, "--optim.lr", 0, name="second")
    torch.testing.assert_close(second.weights("strategist"), first.weights("strategist"), rtol=0, atol=0)


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An endpoint that likes questions, and does not answer about sleep; what it was asked."""
    heard: list[str] = []

    async def answer(messages: Sequence[Message]) -> str:
        text = messages[0]["content"]
        heard.append(text)
        if "sleep" in text:
            raise Unanswered("status 500")
        yes = "yes" if "?" in text.split("(the reply): ")[1].splitlines()[0] else "no"
        names = ("acceptance", "effectiveness", "sensitivity", "fluency", "emotion improvement")
        return "\n".join(f"{name}: {yes}" for name in names)

    monkeypatch.setattr(strategist, "shared_endpoint", lambda settings: answer)
    return heard


def test_rewards_of_a_judge_and_of_nobody(train, told: list[str], judge: list[str], tmp_path: Path) -> None:
    said = [(topic, asks) for topic in ("rain", "work", "sleep", "dogs") for asks in (True, False)]
    rows = [
        {
            "query": f"It is about {topic}.",
            "strategy": "Question" if asks else "Inform",
            "reply": f"What of {topic}?" if asks else f"Well, {topic}.",
        }
        for topic, asks in said
    ]
    words = [str(lines(tmp_path / "said.jsonl", rows)) if word.endswith("few.jsonl") else word for word in told]
    run = train("strategist", *words, *FEW, "--reward", "judge", "--judge", "url=http://localhost:1/v1", "model=m")
    assert len(judge) == 8
    assert [row["high/reward"] for row in run.rows()] == [2.5] * 4, "six rows: three of five yes, three of none"


def test_an_error_says_which_reward_is_missing(train, told: list[str], folder: Path, capsys) -> None:
    words = [str(folder / "esconv.json") if word.endswith("few.jsonl") else word for word in told]
    words = ["esconv" if word == "daily_dialog" else word for word in words]
    train("strategist", *words, *FEW, status=2)
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "there is no reward. Add one, name its column with columns.reward_key, or take rewards from" in message


def test_a_dry_run_prints_sizes_and_writes_nothing(train, told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = train("strategist", *told, *FEW, "--dry-run", "--max-tokens", 50)
    out = capsys.readouterr().out
    assert "strategist: LlamaForCausalLM" in out
    assert "tokens per step: at most 1,200" in out  # 8 decisions, and twice what follows, of 50 tokens
    assert not run.out.exists()


def config(**settings: Any) -> Config:
    known = {"out": "x", "model": ModelConfig("x"), "data": DataConfig(path=("d",))}
    return Config(**{**known, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"score": "prob"},
            "score = prob: Q would lie between 0 and 1, and with rewards from 0 to 5 and gamma 0.85 returns lie "
            "between 0 and 33.3333. Use score = logit, or set scale and shift so that they fit.",
        ),
        (
            {"score": "prob", "reward": "imitation", "gamma": 0.0},
            "score = prob: Q would lie between 0 and 1, and with rewards from -1 to 1 and gamma 0 returns lie between "
            "-1 and 1. Use score = logit, or set scale and shift so that they fit.",
        ),
        (
            {"strategies": ("esconf",)},
            "strategies = esconf: there is no such inventory. Give esconv or daily_dialog, or list two or more "
            "strategies. Did you mean 'esconv'?",
        ),
        ({"reward": "judge"}, "judge = {}: an endpoint has a url and a model. Give url=… model=…"),
        ({"judge": {"url": "u"}}, "judge = {url: u}: reward = file asks nobody. Leave it out."),
        ({"gamma": -0.1}, "gamma = -0.1: a discount lies between 0 and 1. Give 0.85."),
        ({"epochs": 0}, "epochs = 0: it counts something there must be one of. Give 1 or more."),
        (
            {"strategies": ("ask", "tell"), "options": ("A",)},
            "options: 1 of them for 2 strategies. Give one for each, or none for (1) to (2).",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(**settings)
    assert str(refused.value) == message


def test_a_probability_may_be_stretched_to_the_returns_there_can_be(train, told: list[str]) -> None:
    stretched = ("--score", "prob", "--gamma", 0, "--columns.reward-range", 0, 5, "--scale", 5)
    run = train("strategist", *told, *FEW, *stretched)
    assert all(0 <= row["high/q_mean"] <= 5 for row in run.rows())
    assert read_description(run.out / "checkpoints/step_000004/strategist")[0].shift == 0


BAD = {
    "an integer column": ({"query": "Hm.", "strategy": 1, "reward": 1}, "index_base to 0 or to 1."),
    "an unknown strategy": ({"query": "Hm.", "strategy": "Questoin", "reward": 1}, "Did you mean 'Question'?"),
    "a reward out of range": ({"query": "Hm.", "strategy": "Inform", "reward": 7}, "numbers from 0 to 5. Correct it"),
    "no next state": ({"query": "Hm.", "strategy": "Inform", "reward": 1, "done": False}, "there is no next state"),
    "a long query": ({"query": "rain " * 400, "strategy": "Inform", "reward": 1}, "more than the budget of 200"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_broken_row_is_one_line_that_says_where(train, told: list[str], tmp_path: Path, capsys, what: str) -> None:
    row, expected = BAD[what]
    good = {"query": "Hm.", "strategy": "Inform", "reward": 1}
    words = [str(lines(tmp_path / "bad.jsonl", [good, row])) if word.endswith("few.jsonl") else word for word in told]
    run = train("strategist", *words, *FEW, "--max-tokens", 200, status=2)
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "bad.jsonl:2" in message
    assert expected in message
    assert not (run.out / "checkpoints").exists()


def test_options_that_share_all_their_tokens_are_refused(train, told: list[str], capsys, folder: Path) -> None:
    flags = ("--strategies", "ask", "tell", "--options", "1", "1 ")
    train("strategist", *told, *FEW, *flags, status=2)
    assert "options: '1 ' is there twice, so a choice could mean either. Rename one." in capsys.readouterr().err


def test_over_long_histories_are_cut_and_query_menu_and_cue_stay(train, told: list[str], tmp_path: Path) -> None:
    history = [{"role": "user", "content": f"{word} again"} for word in ("rain", "work") * 40]
    row = {"query": "It is money.", "history": history, "strategy": "Inform", "reward": 1}
    words = [str(lines(tmp_path / "long.jsonl", [row] * 3)) if word.endswith("few.jsonl") else word for word in told]
    seen: list[list[int]] = []
    real = Upper.prepare

    def prepare(upper: Upper, drawn: Any) -> Any:
        seen.extend(choice.options.state for choice in drawn)
        return real(upper, drawn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Upper, "prepare", prepare)
        train("strategist", *words, *FEW, "--max-tokens", 120)
    text = Renderer(load_tokenizer(told[1])).tokenizer.decode(seen[0])
    assert len(seen[0]) <= 120
    assert "It is money." in text
    assert "(4) Commissive" in text
    assert text.endswith("<|assistant|>")


FLAGS = """pretrain dataset save_path max_epochs learning_rate micro_train_batch_size train_batch_size max_len
    learn_from_org is_dailydialogue strategies strategy_tokens strategy_key reward_key done_key current_input_key
    next_input_key next_state_prefix q_value_mode gamma target_update apply_tosca_prompt seed zero_stage bf16 flash_attn
    local_rank lora_rank lora_alpha use_wandb wandb_org wandb_project wandb_run_name"""


def mappings() -> list[str]:
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    cells = [row["here"] for row, _ in columns(text, "there")]
    return sorted({code for cell in cells for code in CODE.findall(cell) if code.startswith("--")})


@pytest.mark.parametrize("flags", mappings())
def test_every_flag_of_train_straq_maps_to_flags_that_parse(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echelon.config.need", lambda module, extra: None)
    words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", flags)]
    load(config_of("strategist"), [], ["--out", "r", "--model.path", "m", "--data.path", "d", *words])


def test_every_flag_of_train_straq_has_a_row() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("## Coming from train_straQ")[2]
    listed = {code.removeprefix("--") for row, _ in columns(text, "flag") for code in CODE.findall(row["flag"])}
    assert set(FLAGS.split()) - listed == set()
