"""Recorded control: what is read from Minari and collected into it, and which rows and arrays come of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from echelon.data import control
from echelon.data.control import Recorded, collect_minari, control_arrays, control_rows, read_minari
from echelon.errors import DataError, MissingExtra
from echelon.text.codec import Codec, Space
from echelon.types import Message

gymnasium = pytest.importorskip("gymnasium")
minari = pytest.importorskip("minari")

CODEC = Codec(
    Space("box", (-1.0, -1.0), (1.0, 1.0)), Space("discrete", n=2), action_style="index", decimals=2, instruction=""
)


def episode(*rewards: float, start: float = 0.0, terminated: bool = True) -> Recorded:
    """Sees (start, 0), (start + 0.1, 0), …, and does 0, 1, 0, …"""
    steps = len(rewards)
    seen = np.zeros((steps + 1, 2), np.float32)
    seen[:, 0] = start + np.arange(steps + 1) / 10
    return Recorded(seen, np.arange(steps) % 2, np.array(rewards), terminated)


def collected(folder: Path, policy: Any, *, episodes: int = 3, env_id: str = "CartPole-v1", seed: int = 0) -> Path:
    env = gymnasium.make(env_id, max_episode_steps=20)
    place = collect_minari(env, policy, folder, dataset_id="tried-v0", episodes=episodes, seed=seed)
    env.close()
    return place


def leftwards(observation: np.ndarray, rng: np.random.Generator) -> int:
    return 0


def randomly(observation: np.ndarray, rng: np.random.Generator) -> int:
    return int(rng.integers(2))


def test_returns_to_go_discount_what_follows() -> None:
    assert control.returns_to_go(np.array([1.0, 2.0, 4.0]), 0.5).tolist() == [3.0, 4.0, 4.0]


def test_a_row_is_the_prompt_of_its_observation_the_completion_of_its_action_and_their_numbers() -> None:
    one, two = control_rows(episode(1.0, 2.0, start=0.1), CODEC, gamma=0.5)
    assert one == {
        "messages": [
            Message(role="user", content="<observation>0.10, 0.00</observation>"),
            Message(role="assistant", content="<action>"),
        ],
        "completion": "0</action>",
        "observation": [0.1, 0.0],
        "action": 0,
        "reward": 1.0,
        "return_to_go": 2.0,
        "episode": episode(1.0, 2.0, start=0.1).name,
        "step": 0,
    }
    assert (two["completion"], two["return_to_go"], two["step"]) == ("1</action>", 2.0, 1)


def test_an_observation_is_read_back_from_a_row_as_the_same_number() -> None:
    seen = np.random.default_rng(0).normal(size=(1001, 2)).astype(np.float32)
    recorded = Recorded(seen, np.zeros(1000, np.int64), np.zeros(1000), True)
    rows = [json.loads(json.dumps(row)) for row in control_rows(recorded, CODEC)]
    assert np.array_equal(np.array([row["observation"] for row in rows], np.float32), seen[:-1])


def test_arrays_say_where_an_episode_ends_how_and_on_which_side_it_is() -> None:
    one, two = episode(1.0, 2.0), episode(4.0, terminated=False, start=0.5)
    arrays = control_arrays([one, two], {two.name}, gamma=0.5)
    assert arrays["observations"][:, 0].tolist() == pytest.approx([0.0, 0.1, 0.5])
    assert arrays["next_observations"][:, 0].tolist() == pytest.approx([0.1, 0.2, 0.6])
    assert arrays["actions"].tolist() == [0, 1, 0]
    assert arrays["return_to_go"].tolist() == [2.0, 2.0, 4.0]
    assert arrays["terminated"].tolist() == [False, True, False]
    assert arrays["truncated"].tolist() == [False, False, True]
    assert arrays["held_out"].tolist() == [False, False, True]
    assert arrays["episode"].tolist() == [0, 0, 1]
    assert arrays["step"].tolist() == [0, 1, 0]


def test_whole_episodes_are_held_out_and_which_ones_depends_on_seed_and_name_alone() -> None:
    episodes = [episode(1.0, 1.0, start=number / 10) for number in range(10)]
    aside = control.held_out(episodes, 0.3, seed=1)
    assert len(aside) == 3
    assert control.held_out(episodes[::-1], 0.3, seed=1) == aside
    assert control.held_out(episodes, 0.3, seed=2) != aside
    assert len(control.held_out(episodes, 0.01, seed=1)) == 1
    assert control.held_out(episodes, 0.0, seed=1) == set()
    with pytest.raises(DataError, match=r"there is one episode, so none can be held out\."):
        control.held_out(episodes[:1], 0.3, seed=1)


def test_an_episode_that_was_recorded_twice_counts_once() -> None:
    assert len(control.distinct([episode(1.0), episode(2.0), episode(1.0)])) == 2


def test_what_is_collected_is_a_minari_dataset_and_is_read_as_it_was_played(tmp_path: Path) -> None:
    place = collected(tmp_path, leftwards)
    dataset = minari.MinariDataset(place / "data")
    assert (dataset.total_episodes, dataset.env_spec.id) == (3, "CartPole-v1")
    recording = read_minari(str(place))
    assert recording.env_id == "CartPole-v1"
    assert [len(one) for one in recording.episodes] == [len(one) for one in dataset.iterate_episodes()]
    env = gymnasium.make("CartPole-v1")
    for one, raw in zip(recording.episodes, dataset.iterate_episodes(), strict=True):
        assert one.terminated
        assert one.observations.shape == (len(one) + 1, 4)
        (about,) = dataset.storage.get_episode_metadata([raw.id])
        observation, _ = env.reset(seed=int(about["seed"]))
        assert np.array_equal(one.observations[0], observation)
        for step in range(len(one)):
            observation, reward, *_ = env.step(int(one.actions[step]))
            assert np.array_equal(one.observations[step + 1], observation)
            assert one.rewards[step] == reward
    env.close()


def test_collecting_again_plays_the_same_episodes_in_place_of_those_before(tmp_path: Path) -> None:
    names = [[one.name for one in read_minari(str(collected(tmp_path, randomly))).episodes] for _ in range(2)]
    assert names[0] == names[1]
    assert len(set(names[0])) == 3
    other = [one.name for one in read_minari(str(collected(tmp_path, randomly, seed=1))).episodes]
    assert not set(other) & set(names[0])


def test_continuous_actions_are_vectors_and_episodes_cut_off_are_not_terminated(tmp_path: Path) -> None:
    def pushed(observation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.array([0.5], np.float32)

    (one, *_) = read_minari(str(collected(tmp_path, pushed, env_id="Pendulum-v1"))).episodes
    assert one.actions.shape == (20, 1)
    assert one.actions.dtype == np.float32
    assert not one.terminated


@pytest.mark.parametrize("part", ["", "tried-v0", "tried-v0/data"])
def test_a_folder_is_that_of_a_dataset_its_data_or_the_one_above(part: str, tmp_path: Path) -> None:
    collected(tmp_path, leftwards)
    assert len(read_minari(str(tmp_path / part), episodes=2).episodes) == 2


def test_a_dataset_of_another_environment_is_refused(tmp_path: Path) -> None:
    place = collected(tmp_path, leftwards)
    with pytest.raises(DataError, match=r"it was recorded in CartPole-v1, and env_id is Pendulum-v1\. Give --env-id"):
        read_minari(str(place), env_id="Pendulum-v1")


def test_a_dataset_that_is_not_there_is_refused_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected(tmp_path, leftwards)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"no such dataset on this machine\. Did you mean 'tried-v0'\?"):
        read_minari("tryed-v0")
    (tmp_path / "tried-v0/data/metadata.json").write_text("{}")
    with pytest.raises(DataError, match=r"dataset tried-v0: it cannot be opened \("):
        read_minari("tried-v0")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="one Minari dataset was expected in it, and there are: none"):
        read_minari(str(tmp_path / "empty"))


def test_without_the_library_the_message_is_the_line_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "minari", None)
    with pytest.raises(MissingExtra, match=r"minari is not installed\. Run: pip install 'echelon\[control\]'"):
        read_minari("anything-v0")


def test_an_observation_that_is_not_one_array_is_refused() -> None:
    odd = SimpleNamespace(id=0, observations={"a": np.zeros(2)}, actions=np.zeros(1), rewards=np.ones(1))
    with pytest.raises(DataError, match="an observation is dict, and a codec takes one array"):
        control._recorded(odd, "odd")


def test_files_that_are_not_arrays_of_ours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        control.read_arrays(tmp_path / "arrays.npz")
    (tmp_path / "arrays.npz").write_text("no")
    with pytest.raises(DataError, match="not the arrays of echelon control-data"):
        control.read_arrays(tmp_path)
    np.savez(tmp_path / "arrays.npz", observations=np.zeros(1))
    with pytest.raises(DataError, match="it has no actions, held_out, return_to_go, rewards"):
        control.read_arrays(tmp_path)
