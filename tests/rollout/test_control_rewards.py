"""Rewards of single actions beside recorded ones: what each earns, and what a text earns that says none."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from echelon.config import DataConfig, TaskConfig
from echelon.data.control import Recorded, control_rows
from echelon.envs.prompts import prompts_env
from echelon.errors import ConfigError, DataError
from echelon.models.reward_mlp import RewardMLP, load_reward_mlp
from echelon.rollout.control_rewards import ActionJudge, Control, RewardMLPJudge
from echelon.rollout.rewards import answer_in, open_judge, open_rewards, open_tasks
from echelon.rollout.verifiers import Answer
from echelon.text.codec import Codec, Space
from echelon.types import Episode, Message, Turn

SEEN = Space("box", (-1.0,), (1.0,))
TORQUE = Codec(SEEN, Space("box", (-2.0,), (2.0,)), decimals=2)
ENGINES = Codec(SEEN, Space("discrete", n=3), action_style="index")
BINS = Codec(SEEN, Space("box", (-1.0,), (1.0,)), action_style="bins")


def worth(judge: Any, *texts: str, **columns: Any) -> list[float | None]:
    return asyncio.run(judge([Answer("t", [], text, columns) for text in texts]))


@pytest.mark.parametrize(
    ("text", "earned"),
    [
        ("1</action>", 1.0),
        (" 1 </action>", 1.0),
        ("1</action>, I", -0.3),
        ("<action>1</action>", 1.0),
        ("Well <action>1</action>", -0.5),
        ("1</action>" + "x" * 500, -9.0),
        ("1", -10.0),
        ("</action>", -10.0),
        ("7</action>", -10.0),
        ("left</action>", -10.0),
        ("1, 1</action>", -10.0),
        ("nonsense</action>", -10.0),
    ],
)
def test_format_pays_for_an_action_and_its_tag_alone_and_never_for_garbage_that_ends_well(
    text: str, earned: float
) -> None:
    assert worth(ActionJudge("format", ENGINES), text) == [pytest.approx(earned)]


def test_imitation_is_minus_the_squared_distance_in_half_ranges() -> None:
    judge = ActionJudge("imitation", TORQUE)
    texts = ("1.00</action>", "2</action>", "-1</action>", "5</action>", "nan</action>")
    assert worth(judge, *texts, action=[1.0]) == pytest.approx([0.0, -0.25, -1.0, -0.25, -10.0])
    assert judge.counts == {"unparsed": 0.2}


def test_a_text_without_an_action_earns_less_than_the_worst_action() -> None:
    wide = Codec(SEEN, Space("box", (-100.0,), (100.0,)), decimals=1)
    lowest, none = worth(ActionJudge("imitation", wide), "-100</action>", "no", action=[100.0])
    assert none < lowest == pytest.approx(-4.0)


@pytest.mark.parametrize(
    ("codec", "right", "same", "other"),
    [(ENGINES, 2, "2", "1"), (BINS, [0.2993], "649", "648"), (TORQUE, [1], "1.001", "1.01")],
)
def test_imitation_discrete_asks_whether_it_is_written_the_same(
    codec: Codec, right: Any, same: str, other: str
) -> None:
    texts = (f"{same}</action>", f"{other}</action>", "?")
    assert worth(ActionJudge("imitation_discrete", codec), *texts, action=right) == [0.0, -1.0, -10.0]


def test_a_distance_between_choices_means_nothing() -> None:
    with pytest.raises(ConfigError, match=r"the actions of this data are choices\. Give imitation_discrete"):
        ActionJudge("imitation", ENGINES)


def written(folder: Path, codec: Codec = ENGINES, action: Any = 1) -> Path:
    """Two rows of data with their codec."""
    actions = np.array([action, action])
    recorded = Recorded(np.zeros((3, 1), np.float32), actions, np.ones(2), True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "codec.json").write_text(json.dumps(codec.to_json()))
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in control_rows(recorded, codec)))
    return file


def config(*paths: Path, reward: tuple[str, ...] = ("format", "imitation_discrete"), **given: Any) -> TaskConfig:
    return TaskConfig(out="run", data=DataConfig(path=tuple(map(str, paths))), reward=reward, **given)


def test_the_states_of_data_are_prompts_that_an_answer_goes_on_with(tmp_path: Path) -> None:
    cfg = config(written(tmp_path), reward_weights=(1.0, 0.5))
    env, rewards = open_tasks(cfg), open_rewards(cfg)
    task, _ = env.tasks("train")
    messages = env.make(task).start()
    assert messages[-1] == {"role": "assistant", "content": "<action>"}
    turns = [Turn(0, "actor", [1], [2], [0.0], text, heard=messages) for text in ("1</action>", "2</action>", "hello")]
    episodes = [Episode(task.id, turns=[turn], ending="terminated", data=task.data) for turn in turns]
    metrics = rewards.add(episodes)
    assert [episode.reward for episode in episodes] == [1.0, 0.5, -15.0]
    assert metrics["reward/format/unparsed"] == pytest.approx(1 / 3)
    assert metrics["reward/imitation_discrete"] == pytest.approx(-11 / 3)
    answer = answer_in(episodes[0], turns[0])
    assert (answer.completion, answer.prompt[-1]["content"]) == ("1</action>", "<action>")


def test_without_a_codec_beside_the_data_nothing_says_how_actions_are_written(tmp_path: Path) -> None:
    file = written(tmp_path)
    (tmp_path / "codec.json").unlink()
    with pytest.raises(ConfigError, match=r"there is no codec\.json beside data\.path\. Give the train\.jsonl"):
        open_rewards(config(file))


def test_data_of_two_codecs_are_not_mixed(tmp_path: Path) -> None:
    one, other = written(tmp_path / "a"), written(tmp_path / "b", TORQUE, [1.0])
    with pytest.raises(DataError, match="are written with different codecs"):
        open_rewards(config(one, other))


@pytest.mark.parametrize("action", [None, 7, [1, 2], "left", [float("nan")]])
def test_a_row_without_an_action_of_the_codec_ends_the_run_before_anything_is_played(
    action: Any, tmp_path: Path
) -> None:
    file = written(tmp_path)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["action"] = action
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        DataError, match=r"train\.jsonl:2: reward imitation_discrete: the column 'action' is .*, not an"
    ):
        open_tasks(config(file))


def network(folder: Path, codec: Codec = TORQUE) -> RewardMLP:
    """A saved network whose reward is the action, over data with the rewards −2, 0 and 2."""
    module = RewardMLP(1, 1, choices=codec.action.n, width=4, codec=codec.to_json())
    rewards = torch.tensor([-2.0, 0.0, 2.0])
    module.measure(
        torch.zeros(3, 1), torch.tensor([[-1.0], [0.0], [1.0]]) if not codec.action.n else torch.arange(3), rewards
    )
    module.save_pretrained(folder)
    return module


def test_a_trained_network_is_a_reward_and_scores_as_it_did_when_it_was_saved(tmp_path: Path) -> None:
    module = network(tmp_path / "net")
    judge = open_judge(str(tmp_path / "net"))
    assert isinstance(judge, RewardMLPJudge)
    with torch.no_grad():
        expected = module.score(torch.tensor([[0.5]]), torch.tensor([[1.5]])).item()
    deviation = float(np.std([-2.0, 0.0, 2.0]))
    assert worth(judge, "1.5</action>", "what?", observation=[0.5]) == pytest.approx([expected, -2 - deviation])
    assert judge.counts == {"unparsed": 0.5}


def test_a_network_of_another_environment_is_refused(tmp_path: Path) -> None:
    network(tmp_path / "net")
    with pytest.raises(DataError, match="it was trained on 0 choices, and the data has 3"):
        open_judge(str(tmp_path / "net"), codec=ENGINES)


def test_a_state_that_is_not_there_is_named(tmp_path: Path) -> None:
    network(tmp_path / "net")
    with pytest.raises(DataError, match="the column 'observation' of task 't' is not 1 numbers"):
        worth(open_judge(str(tmp_path / "net")), "1</action>", observation=[1.0, 2.0])


def test_a_broken_network_is_refused(tmp_path: Path) -> None:
    network(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="no reward model could be loaded"):
        load_reward_mlp(tmp_path)


@pytest.mark.parametrize("kind", ["format", "imitation_discrete"])
def test_other_prompts_that_end_with_an_answer_do_not_keep_it(kind: Control) -> None:
    row = type("Row", (), {"messages": [Message(role="assistant", content="x")], "columns": {}})()
    with pytest.raises(DataError, match="leaves nothing to answer"):
        prompts_env([row])
