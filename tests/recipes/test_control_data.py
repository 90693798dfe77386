"""From a policy or a dataset to rows, and from rows to a model: written once, asked the same everywhere, learned."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echelon import cli
from echelon.config import DataConfig
from echelon.data.control import read_arrays, read_codec, read_minari
from echelon.data.conversations import imitated
from echelon.data.datasets import load_rows
from echelon.envs import load_env
from echelon.envs.experts import expert
from echelon.models.lm import load_tokenizer, tiny
from echelon.rollout.plays import env_loop
from echelon.rollout.roles import Role, collect
from echelon.sampling.scripted import ScriptedSampler
from echelon.text.chat import Renderer
from echelon.types import SamplingParams, Task

pytest.importorskip("gymnasium")
minari = pytest.importorskip("minari")

SHORT = ("--env-settings", "horizon=8", "decimals=2")


def made(out: Path, *flags: object, status: int = 0) -> Path:
    assert cli.main(["control-data", "--out", str(out), *map(str, flags)]) == status
    return out


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten episodes of the expert on CartPole, eight steps each; two are held out."""
    flags = ("--env-id", "CartPole-v1", "--episodes", 10, "--eval-fraction", 0.2, *SHORT)
    return made(tmp_path_factory.mktemp("control") / "data", *flags)


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights whose tokenizer has read the rows."""
    folder = tmp_path_factory.mktemp("model")
    texts = [message["content"] for row in rows(data / "train.jsonl") for message in row["messages"]]
    texts += [row["completion"] for row in rows(data / "train.jsonl")]
    module, tokenizer = tiny(texts, vocab_size=300, hidden=32, layers=1, heads=2)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_all_steps_are_rows_on_one_side_of_a_split_by_episode(data: Path) -> None:
    train, test = rows(data / "train.jsonl"), rows(data / "test.jsonl")
    assert (len(train), len(test)) == (64, 16)
    assert not {row["episode"] for row in train} & {row["episode"] for row in test}
    assert len({(row["episode"], row["step"]) for row in (*train, *test)}) == 80
    summary = json.loads((data / "summary.json").read_text())
    assert (summary["rows_train"], summary["return_mean"], summary["terminated"]) == (64, 8.0, 0.0)
    arrays = read_arrays(data)
    assert arrays["observations"].shape == (80, 4)
    assert arrays["held_out"].sum() == 16
    first = next(row for row in train if row["step"] == 0)
    assert np.float32(first["observation"]).tolist() in arrays["observations"].tolist()


def test_run_again_it_writes_the_same_bytes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--env-id", "CartPole-v1", "--episodes", 10, "--eval-fraction", 0.2, *SHORT)
    again = made(tmp_path / "data", *flags)
    made(tmp_path / "data", *flags)
    assert written(again) == written(data)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{tmp_path / 'data'}: rows of text, arrays and summary.json. Learn from them: ")
    other = made(tmp_path / "data", *flags, "--seed", 1)
    assert written(other)["train.jsonl"] != written(data)["train.jsonl"]


def test_what_is_no_longer_held_out_is_no_longer_there(tmp_path: Path) -> None:
    flags = ("--env-id", "CartPole-v1", "--episodes", 2, *SHORT)
    made(tmp_path / "data", *flags, "--examples", 1)
    assert {"test.jsonl", "examples.json"} <= written(tmp_path / "data").keys()
    made(tmp_path / "data", *flags, "--eval-fraction", 0)
    assert not {"test.jsonl", "examples.json"} & written(tmp_path / "data").keys()


def test_a_dataset_becomes_the_rows_of_the_policy_that_recorded_it(data: Path, tmp_path: Path) -> None:
    read = made(tmp_path / "read", "--dataset", data / "minari", "--eval-fraction", 0.2, *SHORT)
    names = ("train.jsonl", "test.jsonl", "codec.json", "arrays.npz")
    assert [written(read)[name] for name in names] == [written(data)[name] for name in names]
    few = made(tmp_path / "few", "--dataset", data / "minari", "--episodes", 3, "--env-id", "CartPole-v1")
    assert json.loads((few / "summary.json").read_text())["episodes"] == 3


def test_an_episode_that_is_in_a_dataset_twice_is_written_once(tmp_path: Path) -> None:
    flags = ("--env-id", "CartPole-v1", "--policy", "medium", "--expert-share", 0.0, "--episodes", 3, *SHORT)
    place = made(tmp_path / "data", *flags) / "minari"
    (folder,) = place.iterdir()
    shutil.copytree(folder, tmp_path / "copy")
    copy = minari.MinariDataset(tmp_path / "copy/data")
    minari.MinariDataset(folder / "data").storage.update_from_storage(copy.storage)
    assert len(read_minari(str(place)).episodes) == 6
    summary = json.loads((made(tmp_path / "read", "--dataset", place) / "summary.json").read_text())
    assert (summary["episodes"], summary["duplicates_left_out"]) == (3, 3)


def test_training_and_evaluation_see_the_same_words_and_the_same_ids(data: Path, model: Path) -> None:
    """The recorded actions, played by name through the environment that evaluation plays, in the codec of the data."""
    settings = {"codec": str(data / "codec.json"), "horizon": 8}
    env, renderer = load_env("gymnasium:CartPole-v1", settings), Renderer(load_tokenizer(str(model)))
    listed = load_rows(DataConfig(path=(str(data / "train.jsonl"),)), "sft", seed=0).train
    learned = [imitated(renderer, row) for row in listed]
    name = rows(data / "train.jsonl")[0]["episode"]
    mine = [place for place, row in enumerate(rows(data / "train.jsonl")) if row["episode"] == name]
    said = [listed[place].completion for place in mine]

    dataset = minari.MinariDataset(next((data / "minari").iterdir()) / "data")
    recorded = [one.name for one in read_minari(str(data / "minari")).episodes]
    (about,) = dataset.storage.get_episode_metadata([recorded.index(name)])
    role = Role("actor", ScriptedSampler(said, renderer.tokenizer), renderer, SamplingParams())
    task = Task("again", {"seed": int(about["seed"])}, seed=int(about["seed"]))
    (episode,) = asyncio.run(collect([task], env_loop(env.make, role), seed=0))

    assert [list(turn.heard) for turn in episode.turns] == [listed[place].messages for place in mine]
    assert [turn.prompt for turn in episode.turns] == [learned[place][0].prompt for place in mine]
    ends = [renderer.action_ids(text) for text in said]
    assert [learned[place][0].action for place in mine] == ends


def test_sft_learns_the_completions_alone_and_judges_by_the_episodes_held_out(train, data: Path, model: Path) -> None:
    flags = ("--model.path", model, "--data.path", data / "train.jsonl", "--data.eval-path", data / "test.jsonl")
    few = ("--epochs", 4, "--rows-per-step", 16, "--eval-every", 4, "--patience", 2, "--optim.lr", 1e-2)
    run = train("sft", *flags, *few)
    measured = run.rows()
    assert measured[-1]["loss"] < 0.5 * measured[0]["loss"]
    assert measured[-1]["eval/loss"] < measured[0]["loss"]
    assert (run.out / "best/model.safetensors").is_file()
    (first,) = imitated(
        Renderer(load_tokenizer(str(model))),
        load_rows(DataConfig(path=(str(data / "train.jsonl"),)), "sft", seed=0).train[0],
    )
    assert measured[0]["tokens"] == 16 * len(first.action)


def test_grpo_learns_from_the_states_of_data_by_rewards_of_actions(train, data: Path, model: Path) -> None:
    flags = ("--model.path", model, "--data.path", data / "train.jsonl", "--reward", "format", "imitation_discrete")
    few = ("--steps", 2, "--tasks-per-step", 2, "--group-size", 4, "--sampling.max-tokens", 4)
    metrics = train("grpo", *flags, *few, "--sampling.stop", "</action>").rows()
    assert metrics[-1]["reward/format"] >= -10
    assert 0 <= metrics[-1]["reward/imitation_discrete/unparsed"] <= 1


def test_bins_have_the_ranges_of_the_data_and_the_codec_keeps_them(tmp_path: Path) -> None:
    flags = (
        "--env-id",
        "Pendulum-v1",
        "--policy",
        "random",
        "--episodes",
        4,
        "--env-settings",
        "horizon=20",
        "style=bins",
    )
    out = made(tmp_path / "data", *flags, "--ranges", "data", "--outside", 0.0)
    codec, arrays = read_codec(out), read_arrays(out)
    assert codec is not None
    kept = arrays["actions"][~arrays["held_out"]]
    assert codec.action_ranges == (pytest.approx((float(kept.min()), float(kept.max()))),)
    tokens = [row["completion"] for row in rows(out / "train.jsonl")]
    assert {"0</action>", "999</action>"} <= set(tokens)


def test_a_medium_policy_acts_as_the_expert_at_a_part_of_the_steps(tmp_path: Path) -> None:
    flags = ("--env-id", "CartPole-v1", "--episodes", 20)
    means = []
    for policy, share in (("random", 0.5), ("medium", 0.5), ("medium", 1.0)):
        out = made(tmp_path / f"{policy}{share}", *flags, "--policy", policy, "--expert-share", share)
        means.append(json.loads((out / "summary.json").read_text())["return_mean"])
    random, medium, best = means
    assert random < 40 < medium < 400 < best == 500


def test_where_the_environment_is_disturbed_what_was_chosen_is_kept(tmp_path: Path) -> None:
    flags = ("--env-id", "MountainCar-v0", "--episodes", 10, "--disturbed", 0.5)
    arrays = read_arrays(made(tmp_path / "data", *flags))
    (place, velocity), after = arrays["observations"].T, arrays["next_observations"][:, 1]
    chosen = np.array([expert("MountainCar-v0")(seen) for seen in arrays["observations"]])
    assert (arrays["actions"] == chosen).all()
    expected = np.clip(velocity + 0.001 * (chosen - 1) - 0.0025 * np.cos(3 * place), -0.07, 0.07)
    at_the_wall = (after == 0) & (arrays["next_observations"][:, 0] <= -1.2)
    other = (abs(after - expected) > 1e-5) & ~at_the_wall
    assert other.mean() == pytest.approx(0.5 * 2 / 3, abs=0.03)  # a third of what is random is what was chosen
    assert written(made(tmp_path / "again", *flags))["arrays.npz"] == written(tmp_path / "data")["arrays.npz"]


WRONG = [
    (
        ["--env-id", "CartPole-v1", "--dataset", "{data}/minari", "--env-id", "Pendulum-v1"],
        "recorded in CartPole-v1, and",
    ),
    (["--dataset", "no/such-v0"], "dataset no/such-v0: there is no such folder, and no such dataset on this machine."),
    (["--env-id", "CartPol-v1"], "Gymnasium has no environment 'CartPol-v1'. Did you mean 'CartPole-v1'?"),
    (["--env-id", "Blackjack-v1"], "its observation is a Tuple space, and a codec writes boxes"),
    (["--env-id", "MountainCarContinuous-v0"], "there is no scripted expert for 'MountainCarContinuous-v0'."),
    (["--env-id", "CartPole-v1", "--ranges", "data"], "ranges = data: only bins have ranges."),
    (["--env-id", "CartPole-v1", "--env-settings", "style=bins", "--episodes", "2"], "has no bounds"),
    (["--env-id", "CartPole-v1", "--env-settings", "stile=bins"], "has no setting 'stile'. Did you mean 'style'?"),
    (["--env-id", "CartPole-v1", "--examples", "50", "--episodes", "2", *SHORT], "examples = 50: there are 8 steps"),
    (["--env-id", "CartPole-v1", "--episodes", "1", *SHORT], "there is one episode, so none can be held out."),
    (["--env-id", "CartPole-v1", "--expert", "pqo"], "expert = pqo: there is no such expert."),
    (["--dataset", "{data}/minari", "--policy", "random"], "policy = random: dataset says what is read."),
    (["--env-id", "CartPole-v1", "--disturbed", "1"], "disturbed = 1.0: it is a part of the steps."),
    (["--dataset", "{data}/minari", "--disturbed", "0.2"], "disturbed = 0.2: what is in a dataset has happened."),
    ([], "env_id is missing"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_what_cannot_work_is_said_in_one_line(
    words: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "out", *(word.format(data=data) for word in words), status=2)
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_folder_with_other_things_in_it_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    made(tmp_path, "--env-id", "CartPole-v1", status=2)
    assert "it holds 'thesis.tex', which is not of a data set of control" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "flags", "line"),
    [
        ("minari", [], "pip install 'echelon[control]'"),
        ("gymnasium", [], "pip install 'echelon[control]'"),
        ("stable_baselines3", ["--expert", "ppo"], "pip install 'echelon[experts]'"),
    ],
)
def test_without_an_extra_the_line_to_install_it_is_said(
    module: str,
    flags: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    made(tmp_path / "out", "--env-id", "CartPole-v1", *flags, *SHORT, status=2)
    assert line in capsys.readouterr().err


def test_a_dry_run_writes_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "out", "--env-id", "CartPole-v1", "--dry-run")
    assert "100 episodes of the policy expert would be played" in capsys.readouterr().out
    made(tmp_path / "out", "--dataset", data / "minari", "--dry-run")
    assert "rows_train" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_an_expert_that_was_learned_is_kept_and_plays_the_same_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("stable_baselines3")
    flags = ("--env-id", "MountainCarContinuous-v0", "--expert", "sac", "--expert-steps", 150, "--episodes", 2, *SHORT)
    first = written(made(tmp_path / "data", *flags))
    (expert,) = (tmp_path / "data").glob("expert-*.zip")
    again = written(made(tmp_path / "data", *flags))
    assert again["train.jsonl"] == first["train.jsonl"]
    assert again[expert.name] == first[expert.name]
    expert.write_bytes(b"no")
    made(tmp_path / "data", *flags, status=2)
    made(tmp_path / "other", *flags, "--expert", "dqn", status=2)
    said = capsys.readouterr().err
    assert "it holds no policy of sac" in said
    assert "algorithm = dqn" in said
