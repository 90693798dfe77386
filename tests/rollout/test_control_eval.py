"""Controllers as they are evaluated: who plays, what they are asked, what is kept of it, and which settings refuse."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gymnasium")

from echelon.config.loading import load
from echelon.data.control import ARRAYS, CODEC, SUMMARY, Recorded, control_arrays, control_rows, write_rows
from echelon.data.conversations import imitated
from echelon.data.schemas import Sft
from echelon.envs import EnvSpec, load_env
from echelon.envs.players import make_player
from echelon.errors import CheckpointError, ConfigError, DataError
from echelon.models.lm import tiny
from echelon.models.mlp import make_policy
from echelon.recipes.evaluate import Config
from echelon.rollout.control_eval import constant_player, mlp_player, open_mlp
from echelon.rollout.control_prompts import expert_examples, prompt_settings
from echelon.rollout.control_report import Flight, Flights, action_rows, film
from echelon.rollout.evaluate import scripted_loop
from echelon.rollout.plays import env_loop
from echelon.rollout.roles import Role, collect
from echelon.sampling.scripted import ScriptedSampler
from echelon.text.chat import Renderer
from echelon.text.codec import Codec, Space
from echelon.types import Episode, SamplingParams, Task

CART_POLE = "gymnasium:CartPole-v1"
SHORT = {"horizon": 6}


def flown(spec: EnvSpec, kind: str, episodes: int = 1) -> tuple[list[Episode], list[Flight]]:
    """Episodes of a scripted player, and what was noted of them."""
    tasks, flights = spec.tasks("test")[:episodes], Flights(spec.make)
    play = scripted_loop(flights.make, partial(make_player, spec, kind), name=kind)
    return asyncio.run(collect(tasks, play, seed=0)), flights.of(tasks)


def test_a_flight_has_every_step_as_the_plant_was_given_it() -> None:
    (episode,), (flight,) = flown(load_env("gymnasium:Pendulum-v1", SHORT), "optimal")
    assert [row["text"] for row in flight.rows] == [turn.text for turn in episode.turns]
    assert [row["step"] for row in flight.rows] == list(range(6))
    assert sum(flight.rewards) == pytest.approx(episode.metrics["return"])
    assert [round(action[0], 5) for action in flight.actions] == [
        pytest.approx(float(row["text"].removesuffix("</action>"))) for row in flight.rows
    ]
    rows = list(action_rows([flight]))
    assert [row["action/0"] for row in rows] == [action[0] for action in flight.actions]


def test_an_attempt_that_is_asked_for_again_is_a_row_and_no_action() -> None:
    spec = load_env(CART_POLE, {**SHORT, "invalid": "resample", "resample": 2})
    env = (flights := Flights(spec.make)).make(task := spec.tasks("test")[0])
    env.start()
    for text in ("left", "1</action>", "7</action>", "x", "y", "0</action>"):
        env.step(text)
    (flight,) = flights.of([task])
    assert [row["step"] for row in flight.rows] == [0, 0, 1, 1, 1, 2]
    # The third bad one in a row is answered with the default action, which is a step and is penalised.
    assert flight.actions == [1, 0, 0]
    assert flight.rewards == [0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    assert [bool(row["invalid"]) for row in flight.rows] == [True, False, True, True, True, False]
    assert flight.rows[0]["invalid"] == "it does not end with </action>"


def test_episodes_are_told_apart_by_their_task_object_and_not_by_the_task() -> None:
    spec = load_env(CART_POLE, SHORT)
    tasks = [Task("same", seed=3), Task("same", seed=3)]
    flights = Flights(spec.make)
    for task, text in zip(tasks, ("0</action>", "1</action>"), strict=True):
        env = flights.make(task)
        env.start()
        env.step(text)
    assert [flight.actions for flight in flights.of(tasks)] == [[0], [1]]


def test_the_prompt_is_that_of_the_row_to_the_byte(tmp_path: Path) -> None:
    spec = load_env(CART_POLE, {**SHORT, "decimals": 3, "system": "Be brief."})
    _, (flight,) = flown(spec, "optimal")
    seen = np.array([row["observation"] for row in flight.rows], dtype=np.float32)
    episode = Recorded(np.concatenate([seen, seen[:1]]), np.array(flight.actions), np.ones(len(seen)), False)
    examples = [(seen[1], 1)]
    rows = list(control_rows(episode, spec.cls.codec, system="Be brief.", examples=examples))
    write_data(tmp_path, spec.cls.codec, [episode], rows, examples=examples)

    asked = load_env(CART_POLE, prompt_settings(CART_POLE, SHORT, data=str(tmp_path)))
    played, _ = flown(asked, "optimal")
    assert [list(turn.heard) for turn in played[0].turns] == [row["messages"] for row in rows]
    assert [turn.text for turn in played[0].turns] == [row["completion"] for row in rows]
    other = load_env(CART_POLE, SHORT)
    assert [turn.heard for turn in flown(other, "optimal")[0][0].turns] != [row["messages"] for row in rows]


def test_a_model_reads_the_ids_it_learned_and_the_ids_it_learned_to_say_are_the_action() -> None:
    spec = load_env(CART_POLE, {**SHORT, "decimals": 3})
    _, (flight,) = flown(spec, "optimal")
    rows = [
        {"messages": spec.cls.codec.prompt(np.array(row["observation"], np.float32)), "completion": row["text"]}
        for row in flight.rows
    ]
    texts = [message["content"] for row in rows for message in row["messages"]]
    _, tokenizer = tiny([*texts, *(row["completion"] for row in rows)], vocab_size=300, hidden=8, layers=1, heads=1)
    renderer = Renderer(tokenizer)
    learned = [imitated(renderer, Sft(row["messages"], completion=row["completion"]))[0] for row in rows]
    sampler = ScriptedSampler([row["completion"] for row in rows], tokenizer)
    actor = Role("actor", sampler, renderer, SamplingParams(max_tokens=32))
    (episode,) = asyncio.run(collect(spec.tasks("test")[:1], env_loop(spec.make, actor), seed=0))
    assert [turn.prompt for turn in episode.turns] == [example.prompt for example in learned]
    for turn, example in zip(episode.turns, learned, strict=True):
        assert turn.action == example.action[: len(turn.action)]
        assert renderer.decode(turn.action) == turn.text == renderer.decode(example.action)


def write_data(
    folder: Path,
    codec: Codec,
    episodes: list[Recorded],
    rows: list,
    *,
    examples: list = (),
    source: str = "policy expert",
) -> None:
    """What control-data leaves in a folder."""
    folder.mkdir(exist_ok=True)
    (folder / CODEC).write_text(json.dumps(codec.to_json()))
    (folder / SUMMARY).write_text(json.dumps({"source": source}))
    if rows:
        write_rows(folder / "train.jsonl", iter(rows))
    np.savez(folder / ARRAYS, **control_arrays(episodes, set()))
    if examples:
        shown = [[np.asarray(part).tolist() for part in pair] for pair in examples]
        (folder / "examples.json").write_text(json.dumps(shown))


def test_examples_are_steps_of_the_expert_and_the_same_every_time() -> None:
    spec = load_env(CART_POLE, SHORT)
    examples = expert_examples(spec, 3, seed=1)
    acts = make_player(spec, "optimal")
    for seen, done in examples:
        assert acts(spec.cls.codec.prompt(np.array(seen, dtype=np.float32))) == f"{done}</action>"
    assert expert_examples(spec, 3, seed=1) == examples
    assert expert_examples(spec, 3, seed=2) != examples
    with pytest.raises(
        DataError, match=r"n_examples = 7: the expert took 6 steps in gymnasium:CartPole-v1\. Give fewer"
    ):
        expert_examples(spec, 7)


def test_examples_of_a_folder_come_from_an_expert_or_not_at_all(tmp_path: Path) -> None:
    spec = load_env(CART_POLE, SHORT)
    seen = np.arange(12, dtype=np.float32).reshape(3, 4)
    episode = Recorded(seen, np.array([1, 0]), np.ones(2), True)
    write_data(tmp_path, spec.cls.codec, [episode], [])
    assert expert_examples(spec, 2, data=str(tmp_path)) == [[[0, 1, 2, 3], 1], [[4, 5, 6, 7], 0]]
    write_data(tmp_path, spec.cls.codec, [episode], [], source="policy medium (scripted)")
    with pytest.raises(DataError, match=r"was played by policy medium .*, and examples show what an expert does"):
        expert_examples(spec, 2, data=str(tmp_path))
    with pytest.raises(DataError, match="Make it with echelon control-data"):
        expert_examples(spec, 2, data=str(tmp_path / "lost"))


def test_a_model_of_a_run_is_asked_as_in_training_unless_something_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    checkpoint = run / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    codec = load_env(CART_POLE, {"decimals": 2}).cls.codec
    write_data(data, codec, [Recorded(np.zeros((2, 4), np.float32), np.array([1]), np.ones(1), True)], [])
    (checkpoint / "config.yaml").write_text(f"data: {{path: [{data}/train.jsonl]}}\n")
    for folder in (checkpoint / "actor", run / "best"):
        found = prompt_settings(CART_POLE, {}, folder=str(folder))
        assert found == {"codec": str(data / CODEC)}
        assert f"prompts are written as {folder} learned to read them, in {data}" in capsys.readouterr().err
    assert prompt_settings(CART_POLE, {"decimals": 4}, folder=str(checkpoint / "actor")) == {"decimals": 4}
    settings = "{decimals: 1, horizon: 3, system: Be brief.}"
    (checkpoint / "config.yaml").write_text(f"env: {CART_POLE}\nenv_settings: {settings}\n")
    found = prompt_settings(CART_POLE, {"horizon": 9}, folder=str(checkpoint / "actor"))
    assert found == {"decimals": 1, "system": "Be brief.", "horizon": 9}
    assert prompt_settings("gymnasium:Acrobot-v1", {}, folder=str(checkpoint / "actor")) == {}
    assert prompt_settings(CART_POLE, {}, folder="some/hub-id") == {}


def test_a_constant_is_an_action_of_the_environment_or_refused() -> None:
    discrete, box = (load_env(f"gymnasium:{name}").cls.codec for name in ("CartPole-v1", "Pendulum-v1"))
    assert constant_player(discrete, ())([]) == "0</action>"
    assert constant_player(discrete, (1.0,))([]) == "1</action>"
    assert constant_player(box, (-1.5,))([]) == "-1.50000</action>"
    for codec, action in ((discrete, (2.0,)), (discrete, (0.0, 1.0)), (box, (0.0, 1.0)), (box, (2.5,))):
        with pytest.raises(ConfigError, match=r"^constant = "):
            constant_player(codec, action)


def test_a_perceptron_plays_as_it_acts_and_draws_by_its_seed(tmp_path: Path) -> None:
    codec = load_env("gymnasium:Pendulum-v1").cls.codec
    make_policy(3, codec.action, hidden=(8,), seed=1).save_pretrained(tmp_path)
    policy = open_mlp(str(tmp_path), codec)
    seen = np.array([0.5, -0.25, 1.0], dtype=np.float32)
    prompt = codec.prompt(seen)
    best = mlp_player(policy, codec, greedy=True)(seed=0)(prompt)
    assert best == codec.completion(policy.act(seen[None])[0])
    drawn = [mlp_player(policy, codec, greedy=False)(seed=seed)(prompt) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_perceptron_that_is_missing_or_of_another_environment_is_named(tmp_path: Path) -> None:
    codec = load_env(CART_POLE).cls.codec
    with pytest.raises(CheckpointError, match="lost: no MLP policy can be read there"):
        open_mlp(str(tmp_path / "lost"), codec)
    make_policy(3, Space("box", (-2.0,), (2.0,)), hidden=(8,)).save_pretrained(tmp_path)
    with pytest.raises(
        DataError, match=r"takes 3 numbers and gives 1 numbers?, and the environment has 4 and takes one of 2"
    ):
        open_mlp(str(tmp_path), codec)


def test_a_film_repeats_the_flight(tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    import gymnasium

    class Plant(gymnasium.Env):
        """Shows a grey that every action makes lighter, and starts as dark as its seed."""

        metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
        observation_space, action_space = gymnasium.spaces.Discrete(2), gymnasium.spaces.Discrete(2)
        render_mode = "rgb_array"

        def __init__(self) -> None:
            self.taken: list[int] = []

        def reset(self, *, seed=None, options=None):
            self.taken.append(seed)
            return 0, {}

        def step(self, action):
            self.taken.append(action)
            return 0, 0.0, False, False, {}

        def render(self):
            return np.full((32, 32, 3), len(self.taken), np.uint8)

    plant = Plant()
    flights = [Flight(Task("a", seed=5), [{"action": 1}, {"action": None}, {"action": 0}]), Flight(Task("b", seed=6))]
    flights[1].rows.append({"action": 1})
    assert film(tmp_path, flights, lambda: plant) == [tmp_path / "episode_000.mp4", tmp_path / "episode_001.mp4"]
    assert plant.taken == [5, 1, 0, 6, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["episode_000.mp4", "episode_001.mp4"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--env-id CartPole-v1 --env maze", "env_id = CartPole-v1: env is maze. Keep one of the two."),
        ("--env-id CartPole-v1 --policy expert --player random", "policy = expert: player is random. Keep one"),
        ("--env maze --player random --horizon 5", "horizon = 5: it is about environments of Gymnasium. Give --env-id"),
        ("--env maze --player random --plot", "plot = true: it is about environments of Gymnasium."),
        ("--env maze --policy mlp --model.path m", "player = mlp: it plays environments of Gymnasium."),
        ("--env-id CartPole-v1 --policy mlp", "model.path is missing"),
        ("--env-id CartPole-v1 --policy llm", "model.path is missing"),
        ("--env-id CartPole-v1 --policy random --constant 1", "constant = [1.0]: it is what --policy constant does."),
        ("--env-id CartPole-v1 --policy random --api model=m", "nobody asks an endpoint. Give --policy api."),
        ("--env-id CartPole-v1 --policy api", "api: model is missing."),
        (
            "--env-id CartPole-v1 --policy api --api model=m url=http://x/v1 --top-k 3",
            "top_k = 3: an endpoint is not sent",
        ),
        ("--env-id CartPole-v1 --policy random --video-dir v", "video_dir = v: nothing is filmed. Give --video 1"),
        ("--env-id CartPole-v1 --policy random --n-examples -1", "n_examples = -1: it is a count."),
        ("--env-id CartPole-v1 --policy random --random-expert 3", "random_expert = [3.0]: a score needs two returns"),
        ("--env-id CartPole-v1 --policy random --random-expert 3 3", "random_expert = [3.0, 3.0]: a score needs two"),
        (
            "--env-id CartPole-v1 --policy random --horizon 5 --env-settings horizon=6",
            "env_settings: horizon = 6: another setting makes it 5. Keep one of them.",
        ),
        ("--env-id CartPole-v1 --policy random --discretized --control-data d", "discretized = true: the codec of"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ConfigError) as refused:
        load(Config, [], ["--out", "r", *flags.split()])
    assert message in str(refused.value)


def test_short_flags_are_settings_of_the_environment_by_another_name() -> None:
    short = "--env-id CartPole-v1 --policy expert --horizon 9 --discretized --system-prompt S --resample 4 --out r"
    cfg = load(Config, [], short.split())
    assert (cfg.env, cfg.player, cfg.count, cfg.longest) == (CART_POLE, "optimal", 10, 10_000)
    written = {"horizon": 9, "style": "bins", "system": "S", "invalid": "resample", "resample": 4}
    assert cfg.env_settings == written
    long = ["--env", CART_POLE, "--player", "optimal", "--env-settings", *(f"{k}={v}" for k, v in written.items())]
    other = load(Config, [], [*long, "--out", "r"])
    assert (other.env, other.player, other.env_settings) == (cfg.env, cfg.player, cfg.env_settings)
