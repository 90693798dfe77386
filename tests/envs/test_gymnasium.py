"""Environments of Gymnasium: what is told and applied, what bad texts do, and which environments are refused."""

import json
import sys
from typing import Any

import numpy as np
import pytest

from echelon.envs import check_env, load_env
from echelon.envs.players import make_player, play
from echelon.errors import ConfigError, DataError, MissingExtra
from echelon.text.codec import Codec
from echelon.types import Step

gymnasium = pytest.importorskip("gymnasium")

BAD = "jump</action>"


class Odd(gymnasium.Env):
    """An environment with the spaces it is told to have, which remembers what it was given."""

    def __init__(self, seen: Any = None, done: Any = None) -> None:
        self.observation_space = gymnasium.spaces.Box(-1, 1, (2, 2)) if seen is None else seen
        self.action_space = gymnasium.spaces.Discrete(2, start=3) if done is None else done
        self.given: list[Any] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.observation_space.sample() * 0, {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        self.given.append(action)
        over = len(self.given) == 3
        return self.observation_space.sample() * 0, 0.5, over, over, {}


@pytest.fixture(autouse=True)
def _odd_is_registered() -> Any:
    gymnasium.register("Odd-v0", Odd)
    yield
    del gymnasium.registry["Odd-v0"]


def started(name: str = "CartPole-v1", number: int = 0, **settings: Any) -> Any:
    spec = load_env(f"gymnasium:{name}", settings)
    env: Any = spec.make(spec.tasks("train")[number])
    env.start()
    return env


def odd(seen: Any = None, done: Any = None, **settings: Any) -> Any:
    return started("Odd-v0", env_kwargs={"seen": seen, "done": done}, **settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("CartPole-v1", {}),
        ("CartPole-v1", {"style": "name", "invalid": "resample", "resample": 2}),
        ("Pendulum-v1", {"style": "bins", "horizon": 20, "invalid": "hold"}),
        ("MountainCarContinuous-v0", {"horizon": 20, "invalid": "random"}),
        ("FrozenLake-v1", {"invalid": "default"}),
    ],
)
def test_environments_keep_their_promises(name: str, settings: dict[str, Any]) -> None:
    check_env(f"gymnasium:{name}", episodes=3, settings=settings)


@pytest.mark.parametrize(
    ("library", "name", "settings"),
    [
        ("Box2D", "LunarLander-v3", {}),
        ("Box2D", "LunarLander-v3", {"env_kwargs": {"continuous": True}}),
        ("mujoco", "HalfCheetah-v5", {}),
        ("dm_control", "dm_control/cheetah-run-v0", {"flatten": True}),
    ],
)
def test_simulated_bodies_keep_them_too(
    library: str, name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "disable")  # nothing is drawn
    pytest.importorskip(library)
    check_env(f"gymnasium:{name}", episodes=3, settings={**settings, "horizon": 20})


def test_an_episode_is_gymnasiums_own() -> None:
    """The same seed and actions give the same observations and rewards, and every prompt is whole and new."""
    env = started("CartPole-v1", number=5)
    twin = gymnasium.make("CartPole-v1")
    observation, _ = twin.reset(seed=5)
    assert env.start() == env.codec.prompt(observation)
    for turn in range(1, 200):
        step: Step = env.step(f"{turn % 2}</action>")
        observation, reward, terminated, truncated, _ = twin.step(turn % 2)
        assert (step.reward, step.terminated, step.truncated) == (reward, terminated, truncated)
        assert np.array_equal(env.observation, observation)
        assert step.messages == env.prompt() == env.codec.prompt(observation)
        assert step.info == {"return": turn, "length": turn, "invalid": 0, "clipped": 0, "action/0": turn % 2}
        if terminated:
            return
    raise AssertionError("the pole did not fall")


def test_siblings_are_identical_and_splits_share_no_seed() -> None:
    spec = load_env("gymnasium:CartPole-v1", {"tasks": 3})
    train, test = spec.tasks("train"), spec.tasks("test")
    assert [task.id for task in train] == [f"gymnasium:CartPole-v1/{seed}" for seed in range(3)]
    assert not {task.seed for task in train} & {task.seed for task in test}
    assert spec.make(train[1]).start() == spec.make(train[1]).start()
    assert spec.make(train[1]).start() != spec.make(train[2]).start()


def test_a_time_limit_truncates_and_what_is_both_is_over() -> None:
    env = started("Pendulum-v1", horizon=2)
    assert not env.step("0</action>").truncated
    last = env.step("0</action>")
    assert (last.terminated, last.truncated) == (False, True)
    assert last.messages == env.prompt()  # the value of what follows still counts
    env = odd()
    steps = [env.step("3</action>") for _ in range(3)]
    assert [(step.terminated, step.truncated) for step in steps] == [(False, False), (False, False), (True, False)]


def test_actions_arrive_in_the_environments_own_shape_and_type() -> None:
    env = odd(done=gymnasium.spaces.Box(-1, 1, (2, 2), dtype=np.float32))
    step = env.step("0.5, -7, 1, 0</action>")
    assert env.unwrapped.given[0].tolist() == [[0.5, -1.0], [1.0, 0.0]]
    assert env.action.tolist() == [0.5, -1.0, 1.0, 0.0]
    assert (step.info["clipped"], step.info["invalid"], step.info["action/1"]) == (1.0, 0.0, -1.0)
    env = odd(done=gymnasium.spaces.Box(0, 9, (1,), dtype=np.int64))
    env.step("2.6</action>")
    assert env.unwrapped.given[0].tolist() == [3]


@pytest.mark.parametrize(
    ("invalid", "applied", "reward"),
    [("penalise", [4, 3], 0.2), ("default", [4, 3], 0.5), ("hold", [4, 4], 0.5), ("resample", [4, 3], 0.2)],
)
def test_what_is_done_where_a_text_is_no_action(invalid: str, applied: list[int], reward: float) -> None:
    env = odd(invalid=invalid, resample=0, penalty=0.3)
    env.step("4</action>")
    step = env.step(BAD)
    assert env.unwrapped.given == applied
    assert step.reward == pytest.approx(reward)
    assert step.info["return"] == 1.0  # the environment's own, without the penalty
    assert step.info["invalid"] == 0.5


def test_an_action_at_random_is_the_same_again() -> None:
    done = gymnasium.spaces.Box(-1, 1, (3,))
    drawn = []
    for _ in range(2):
        env = odd(done=done, invalid="random")
        env.step(BAD)
        env.step(BAD)
        drawn.append(np.stack(env.unwrapped.given))
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0][0], drawn[0][1])


def test_asking_again_gives_the_same_prompt_and_no_reward_so_many_times_for_each_state() -> None:
    env = odd(invalid="resample", resample=2)
    asked = env.prompt()
    for _ in range(2):
        step = env.step(BAD)
        assert (step.messages, step.reward, step.terminated, step.truncated) == (asked, 0.0, False, False)
    assert env.step(BAD).reward == -0.5
    assert env.unwrapped.given == [3]
    assert env.step(BAD).reward == 0.0  # in a new state it is asked again
    assert env.step("4</action>").info["invalid"] == 4 / 5
    assert env.unwrapped.given == [3, 4]


@pytest.mark.parametrize(
    "said", ["", "1", "</action>", "1, 1</action>", "left</action>", "nan</action>", "inf</action>", "2</action>"]
)
def test_bad_texts_cost_the_penalty_and_nothing_else(said: str) -> None:
    step = started("CartPole-v1", penalty=2).step(said)
    assert (step.reward, step.info["invalid"], step.terminated) == (-1.0, 1.0, False)


def test_settings_say_how_values_are_written() -> None:
    env = started(
        "CartPole-v1", style="name", decimals=2, instruction="", system="Quick.", examples=[[[0, 0, 0, 0], 1]]
    )
    assert [message["content"] for message in env.prompt(goal="stay")] == [
        "Quick.",
        "Examples:\n<observation>0.00, 0.00, 0.00, 0.00</observation>\n<action>right</action>\n\nGoal: stay\n\n"
        "<observation>0.01, -0.02, -0.05, -0.05</observation>",
        "<action>",
    ]
    assert env.step("right</action>").info["action/0"] == 1
    bins = started("Pendulum-v1", style="bins", bins=10).codec
    assert (bins.observation_style, bins.action_style, bins.encode_action([2.0])) == ("bins", "bins", "10")
    one = started("CartPole-v1", observation_style="bins", observation_ranges=[[-1, 1]] * 4, bins=2).codec
    assert one.encode_observation([-1, 0, 1, 2]) == "<observation>0, 1, 2, 2</observation>"


def test_the_codec_of_data_can_be_given(tmp_path: Any) -> None:
    file = tmp_path / "codec.json"
    codec = started("CartPole-v1", style="name", decimals=1).codec
    file.write_text(json.dumps(codec.to_json()))
    assert started("CartPole-v1", codec=str(file)).codec == codec
    with pytest.raises(
        ConfigError, match=r"of another environment: its observation has 4 numbers, that of Pendulum-v1 3"
    ):
        load_env("gymnasium:Pendulum-v1", {"codec": str(file)})
    with pytest.raises(DataError, match="No such file"):
        load_env("gymnasium:CartPole-v1", {"codec": str(tmp_path / "none.json")})
    file.write_text("{}")
    with pytest.raises(DataError, match=r"codec.json: not a codec"):
        load_env("gymnasium:CartPole-v1", {"codec": str(file)})


def test_the_scripted_players_read_what_a_model_reads() -> None:
    spec = load_env("gymnasium:CartPole-v1", {"horizon": 60})
    task = spec.tasks("test")[0]
    assert play(spec, task, make_player(spec, "optimal")).info["return"] == 60
    assert play(spec, task, make_player(spec, "random", seed=1)).info["return"] < 60
    constant = play(spec, task, make_player(spec, "constant"))
    assert {message["content"] for message in constant.messages if message["content"].endswith("</action>")} == {
        "0</action>"
    }
    assert spec.cls.utterances() == ["0</action>", "1</action>"]
    random = make_player(spec, "random", seed=1)  # told the last state only, it still draws anew in each
    assert {random(spec.cls.codec.prompt([x, 0, 0, 0])) for x in range(20)} == {"0</action>", "1</action>"}
    with pytest.raises(ConfigError, match="player = 'best': it is one of random, constant, optimal"):
        make_player(spec, "best")


def test_an_episode_can_be_wrapped() -> None:
    def wrap(simulator: Any, task: Any) -> Any:
        return gymnasium.wrappers.TransformReward(simulator, lambda reward: 10 * reward)

    assert started("CartPole-v1", wrap=wrap).step("1</action>").reward == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "CartPole-v7",
            r"Gymnasium has no environment 'CartPole-v7'. Did you mean 'CartPole-v1'\? It has \d+, such as",
        ),
        ("cartpole", "Gymnasium has no environment 'cartpole'"),
        ("", "Gymnasium has no environment ''"),
        ("json:Odd-v1", r"Gymnasium has no environment 'Odd-v1'. Did you mean 'Odd-v0'\?"),
    ],
)
def test_an_unknown_environment_is_refused_with_a_suggestion(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_env(f"gymnasium:{name}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decimal": 2}, r"has no setting 'decimal'. Did you mean 'decimals'\? It takes tasks, horizon, .*env_kwargs"),
        ({"invalid": "penalize"}, r"invalid = 'penalize': it is one of .*Did you mean 'penalise'\?"),
        ({"style": "bin"}, r"style = 'bin': it is one of float, bins, index, name. Did you mean 'bins'\?"),
        ({"action_style": "float"}, "action_style = 'float': choices are written by 'index' or 'name'"),
        ({"style": "bins"}, "value 1 of the observation has no bounds. Give observation_ranges"),
        ({"horizon": -1}, "horizon = -1: it is a count. Give a whole number of 0 or more"),
        ({"tasks": True}, "tasks = True: it is a count"),
        ({"penalty": -1}, "penalty = -1: it is taken from the reward"),
        ({"penalty": "1"}, "penalty = '1'"),
        ({"wrap": "recorder"}, "wrap = 'recorder': it is a function"),
        ({"env_kwargs": [1]}, r"env_kwargs = \[1\]: give settings"),
        ({"env_kwargs": {"gravity": 1}}, r"CartPole-v1: .*'gravity'.*in env_kwargs"),
        ({"observation_ranges": [1, 2]}, r"observation_ranges = \[1, 2\]: give pairs"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_env("gymnasium:CartPole-v1", settings)


def _spaces() -> list[tuple[Any, Any, str]]:
    spaces = gymnasium.spaces
    image = spaces.Box(0, 255, (8, 8, 3), dtype=np.uint8)
    both = spaces.Dict({"a": spaces.Box(-1, 1), "b": spaces.Discrete(2)})
    return [
        (both, None, "its observation is a Dict space, .* Set flatten to lay its parts in a row"),
        (image, None, r"its observation is an image of the shape \(8, 8, 3\)"),
        (spaces.Box(-1, 1, (5000,)), None, "its observation has 5000 numbers; a codec writes 1 to 1000"),
        (None, both, "its action is a Dict space, and a codec writes boxes of numbers and choices. Choose another"),
        (None, spaces.MultiDiscrete([2, 2]), "its action is a MultiDiscrete space"),
        (spaces.Text(5), None, "its observation is a Text space"),
    ]


@pytest.mark.parametrize("number", range(6))
def test_spaces_that_no_codec_covers_are_refused(number: int) -> None:
    seen, done, message = _spaces()[number]
    with pytest.raises(DataError, match=f"Odd-v0: {message}"):
        odd(seen, done)


def test_the_parts_of_a_dict_can_be_laid_in_a_row() -> None:
    class Parts(Odd):
        def reset(self, **settings: Any) -> Any:
            return {"a": np.array([0.25], dtype=np.float32), "b": 1}, {}

    gymnasium.register("Parts-v0", Parts)
    both = gymnasium.spaces.Dict({"a": gymnasium.spaces.Box(-1, 1), "b": gymnasium.spaces.Discrete(2)})
    env = started("Parts-v0", env_kwargs={"seen": both}, flatten=True)
    assert env.observation.tolist() == [0.25, 0.0, 1.0]
    del gymnasium.registry["Parts-v0"]


def test_an_environment_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**settings: Any) -> Any:
        raise RuntimeError("no such\nfile")

    def lacking(**settings: Any) -> Any:
        raise gymnasium.error.DependencyNotInstalled("MuJoCo is not installed, run `pip install mujoco`.")

    gymnasium.register("Broken-v0", broken)
    with pytest.raises(DataError, match=r"^Broken-v0: Gymnasium cannot make it: RuntimeError: no such$"):
        load_env("gymnasium:Broken-v0")
    gymnasium.register("Lacking-v0", lacking)
    with pytest.raises(
        MissingExtra, match=r"^Lacking-v0 needs more than Gymnasium: MuJoCo is not .*`pip install mujoco`"
    ):
        load_env("gymnasium:Lacking-v0")
    del gymnasium.registry["Broken-v0"], gymnasium.registry["Lacking-v0"]


def test_without_gymnasium_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(MissingExtra, match=r"gymnasium is not installed. Run: pip install 'echelon\[control\]'"):
        load_env("gymnasium:CartPole-v1")


def test_the_module_before_an_id_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shimmy", None)
    with pytest.raises(
        MissingExtra, match=r"^no_such:A-v0 is of the module 'no_such': No module named 'no_such'. Inst"
    ):
        load_env("gymnasium:no_such:A-v0")
    with pytest.raises(MissingExtra, match=r"shimmy is not installed. Run: pip install 'echelon\[physics\]'"):
        load_env("gymnasium:dm_control/cheetah-run-v0")
    assert len(started("json:CartPole-v1").codec.observation.names) == 4


def test_a_codec_made_for_the_environment_is_whole() -> None:
    codec = started("CartPole-v1").codec
    assert isinstance(codec, Codec)
    assert codec.observation.names == ("cart position", "cart velocity", "pole angle", "pole angular velocity")
    assert Codec.from_json(codec.to_json()) == codec
