"""`evaluate` in Gymnasium's environments: files, scores, a model behind a server and what goes wrong at one."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gymnasium")

from echelon import cli
from echelon.config import OptimConfig
from echelon.data.packing import pack
from echelon.envs import load_env
from echelon.envs.experts import expert
from echelon.models.lm import tiny
from echelon.models.mlp import make_policy
from echelon.recipes.sft import loss_fn
from echelon.rollout.candidates import run_settings
from echelon.text.chat import Example, Renderer
from echelon.train.learner import Learner
from echelon.train.on_ray import held_port
from tests.recipes.conftest import Train
from tests.text.test_endpoint import KEY, Server, serve

__all__ = ["serve"]

CART_POLE = ("--env-id", "CartPole-v1", "--horizon", 6, "--episodes", 3)
Evaluate = Callable[..., dict[str, dict[str, float]]]


@pytest.fixture
def evaluate(train: Train) -> Evaluate:
    """Run `evaluate` and read its estimates; nothing where it fails."""

    def evaluate(*flags: object, name: str = "run", status: int = 0) -> dict[str, dict[str, float]]:
        run = train("evaluate", *flags, name=name, status=status)
        return {} if status else json.loads((run.out / "summary.json").read_text())["estimates"]

    return evaluate


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_every_player_plays_and_the_expert_lasts(evaluate: Evaluate, tmp_path: Path) -> None:
    for policy in ("expert", "random", "constant"):
        found = evaluate("--env-id", "CartPole-v1", "--horizon", 30, "--episodes", 4, "--policy", policy, name=policy)
        assert (found["return"]["mean"] == 30) == (policy == "expert")
        assert found["length"]["mean"] == found["return"]["mean"], "every step earns one"
        assert found["truncated"]["mean"] == float(policy == "expert")
        actions = rows(tmp_path / policy, "actions")
        assert len(actions) == found["length"]["mean"] * 4
        assert {row["action/0"] for row in actions} == ({0} if policy == "constant" else {0, 1})
    assert {row["episode"] for row in actions} == {0, 1, 2, 3}


def test_a_perceptron_plays_from_its_folder(evaluate: Evaluate, tmp_path: Path) -> None:
    policy = make_policy(4, load_env("gymnasium:CartPole-v1").cls.codec.action, hidden=(8,), seed=2)
    policy.save_pretrained(tmp_path / "mlp")
    evaluate(*CART_POLE, "--policy", "mlp", "--model.path", tmp_path / "mlp", "--greedy")
    for row in rows(tmp_path / "run", "actions"):
        seen = np.round(np.array([row["observation"]]), 5)
        assert row["action"] == policy.act(seen)[0]


def test_the_normalised_score_is_0_for_the_random_player_and_1_for_the_expert(evaluate: Evaluate) -> None:
    long = ("--env-id", "CartPole-v1", "--horizon", 40, "--episodes", 4, "--normalise")
    assert evaluate(*long, "--policy", "expert", name="expert")["score"]["mean"] == pytest.approx(1)
    assert evaluate(*long, "--policy", "random", name="random")["score"]["mean"] == pytest.approx(0)
    told = evaluate(*CART_POLE, "--policy", "expert", "--random-expert", 4, 8, name="told")
    assert told["score"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 3}


def test_without_a_scripted_expert_a_score_needs_returns(
    evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate("--env-id", "MountainCarContinuous-v0", "--policy", "random", "--normalise", status=2)
    said = capsys.readouterr().err
    assert said.startswith("normalise: there is no scripted expert for 'MountainCarContinuous-v0'.")
    assert said.endswith("Or give --random-expert with two returns.\n")


def test_films_a_plot_and_tensorboard_are_written_on_demand(evaluate: Evaluate, tmp_path: Path) -> None:
    for library in ("moviepy", "pygame", "matplotlib", "tensorboard"):
        pytest.importorskip(library)
    evaluate(*CART_POLE, "--policy", "expert", "--video", 1, "--plot", "--tensorboard", name="all")
    out = tmp_path / "all"
    assert (out / "videos" / "episode_000.mp4").stat().st_size > 1000
    assert (out / "return.png").read_bytes().startswith(b"\x89PNG")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("episode/return")] == [6.0, 6.0, 6.0]
    done = [row["action"] for row in rows(out, "actions") if row["episode"] == 1]
    assert [event.value for event in events.Scalars("action_0/episode_001")] == done
    assert events.Scalars("evaluation/length")[0].value == 6.0


@pytest.mark.parametrize("place", ["file/videos", "file"])
def test_a_folder_that_no_film_can_be_written_to_is_found_before_anything_is_played(
    place: str, evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("moviepy")
    (tmp_path / "file").write_text("")
    evaluate(*CART_POLE, "--policy", "expert", "--video", 1, "--video-dir", tmp_path / place, status=2)
    assert "no video can be written there" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_library_that_is_missing_is_found_before_anything_is_played(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for flag, module, extra in (("--plot", "matplotlib", "plot"), ("--video=1", "moviepy", "video")):
        monkeypatch.setitem(sys.modules, module, None)
        evaluate(*CART_POLE, "--policy", "expert", flag, status=2)
        assert f"pip install 'echelon[{extra}]'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()


class Pilot(Server):
    """A model that reads the observation in the last message and answers as the expert does."""

    def __init__(self, *faults: object, **settings: object) -> None:
        super().__init__(*faults, **settings)
        self.codec, self.acts = load_env("gymnasium:CartPole-v1").cls.codec, expert("CartPole-v1")

    @property
    def answer(self) -> str:
        seen = self.codec.decode_observation(self.bodies[-1]["messages"][-1]["content"])
        return f"I push.\n<action>{self.codec.completion(self.acts(seen))}"

    @answer.setter
    def answer(self, text: str) -> None:
        """What a server of fixed words would answer."""


def asking(server: Server, **settings: object) -> list[object]:
    """Flags of an evaluation of the model behind a server."""
    how = {"url": server.url, "model": "pilot", "backoff": 0.01, "parallel": 1, **settings}
    return [*CART_POLE, "--policy", "api", "--api", *(f"{name}={value}" for name, value in how.items())]


def test_a_model_behind_a_server_plays_and_is_sent_the_prompts_of_the_environment(
    serve: Callable[..., Server], evaluate: Evaluate, tmp_path: Path
) -> None:
    server = serve(kind=Pilot)
    more = ("--system-prompt", "You are a pilot.", "--n-examples", 2, "--temperature", 0.3, "--max-tokens", 9)
    found = evaluate(*asking(server), *more)
    assert found["return"]["mean"] == 6
    assert found["invalid"]["mean"] == 0
    assert len(server.bodies) == 18
    first = server.bodies[0]
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("pilot", 0.3, 9)
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    settings = json.loads((tmp_path / "run" / "summary.json").read_text())["config"]["env_settings"]
    codec = load_env("gymnasium:CartPole-v1").cls.codec
    sent = {body["messages"][-1]["content"] for body in server.bodies}
    for row in rows(tmp_path / "run", "actions"):
        seen = np.array(row["observation"], dtype=np.float32)
        prompt = codec.prompt(seen, system="You are a pilot.", examples=settings["examples"])
        assert prompt[1]["content"] in sent


def test_faults_of_a_server_are_waited_out(serve: Callable[..., Server], evaluate: Evaluate, tmp_path: Path) -> None:
    faults = (503, {"Retry-After": "0"}, "{", '{"choices": []}', "drop", 1.0)
    server = serve(*faults, kind=Pilot)
    assert evaluate(*asking(server, timeout=0.5, retries=6))["return"]["mean"] == 6
    assert len(server.bodies) == 18 + len(faults)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (1.0, "no answer within 0.2 seconds"),
        ({"Retry-After": "0"}, "status 429"),
        ("not json", "the body of its response is not that of a chat completion"),
        ('{"choices": []}', "the body of its response is not that of a chat completion"),
    ],
)
def test_a_server_that_never_answers_ends_it_in_one_line(
    fault: object, why: str, serve: Callable[..., Server], evaluate: Evaluate, tmp_path: Path, capsys
) -> None:
    server = serve(*[fault] * 6)
    evaluate(*asking(server, timeout=0.2, retries=1, parallel=4), status=2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "3 of 3 episodes failed, more than the error budget of 0%." in said
    assert f"Unanswered: pilot at {server.url} did not answer in 2 tries: {why}" in said
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_server_that_is_down_or_wants_a_key_is_named(
    serve: Callable[..., Server],
    evaluate: Evaluate,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = serve(*[401] * 3)
    monkeypatch.delenv("PILOT_KEY", raising=False)
    evaluate(*asking(server, key_env="PILOT_KEY"), status=2)
    assert "wants a key (status 401): the variable PILOT_KEY is not set." in capsys.readouterr().err
    server.shutdown()
    server.server_close()
    evaluate(*asking(server, retries=1), status=2)
    assert f"pilot at {server.url} did not answer in 2 tries: ConnectError" in capsys.readouterr().err


def test_words_that_are_no_action_are_penalised_or_asked_for_again(
    serve: Callable[..., Server], evaluate: Evaluate, tmp_path: Path
) -> None:
    server = serve(answer="left, I think")
    assert evaluate(*asking(server), name="once")["invalid"]["mean"] == 1
    assert json.loads((tmp_path / "once" / "evaluation.json").read_text())["average_score"] == 0
    found = evaluate(*asking(serve(answer="left, I think")), "--resample", 2, name="thrice")
    assert (found["length"]["mean"], found["turns"]["mean"]) == (6, 18)


def test_a_model_is_evaluated_and_an_exact_repetition_gives_the_same_numbers(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    env = load_env("gymnasium:CartPole-v1", {"horizon": 6})
    words = [message["content"] for message in env.make(env.tasks("train")[0]).start()]
    module, tokenizer = tiny([*words, "0</action>", "1</action>"], vocab_size=300, hidden=16, layers=1, heads=2)
    module.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = (*CART_POLE, "--policy", "llm", "--model.path", tmp_path / "model", "--max-tokens", 4)
    first, again = evaluate(*flags, name="first"), evaluate(*flags, name="again")
    assert first == again
    assert first["tokens"]["mean"] > 0
    assert (tmp_path / "first" / "actions.jsonl").read_text() == (tmp_path / "again" / "actions.jsonl").read_text()
    assert math.isfinite(first["return"]["mean"])


def test_what_control_data_wrote_and_sft_learned_is_what_evaluation_asks(
    evaluate: Evaluate, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("minari")
    data, model = tmp_path / "data", tmp_path / "model"
    settings = ["horizon=6", "decimals=3", "system=You are a pilot."]
    words = [
        "control-data",
        "--env-id",
        "CartPole-v1",
        "--episodes",
        "3",
        "--examples",
        "1",
        "--env-settings",
        *settings,
    ]
    assert cli.main([*words, "--out", str(data)]) == 0
    written = rows(data, "train")
    texts = [message["content"] for row in written for message in row["messages"]]
    texts += [row["completion"] for row in written]
    module, tokenizer = tiny(texts, vocab_size=300, hidden=16, layers=1, heads=2)
    module.save_pretrained(model)
    tokenizer.save_pretrained(model)
    learn = ("--model.path", model, "--data.path", data / "train.jsonl", "--max-steps", 1, "--rows-per-step", 2)
    train("sft", *learn, name="sft")

    capsys.readouterr()
    evaluate(*CART_POLE, "--model.path", tmp_path / "sft", "--max-tokens", 4, name="played")
    assert f"learned to read them, in {data}" in capsys.readouterr().err
    config = json.loads((tmp_path / "played" / "summary.json").read_text())["config"]
    made = load_env(config["env"], config["env_settings"]).cls
    assert (made.settings.system, len(made.settings.examples)) == ("You are a pilot.", 1)
    for row in written:
        seen = np.array(row["observation"], dtype=np.float32)
        shown = [tuple(pair) for pair in made.settings.examples]
        assert made.codec.prompt(seen, system=made.settings.system, examples=shown) == row["messages"]
    actions = iter(rows(tmp_path / "played", "actions"))
    for turn in (turn for episode in rows(tmp_path / "played", "episodes") for turn in episode["turns"]):
        seen = np.array(next(actions)["observation"], dtype=np.float32)
        prompt = made.codec.prompt(seen, system=made.settings.system, examples=made.settings.examples)
        assert turn["seen"].endswith("".join(message["content"] for message in prompt[1:]))

    fly = ("--env", "gymnasium:CartPole-v1", "--env-settings", "horizon=3", "--steps", 1, "--tasks-per-step", 2)
    run = train("control", *fly, "--model.path", tmp_path / "sft", "--method", "grpo", "--group-size", 2, name="flown")
    trained = run_settings(run.out / "checkpoints" / "step_000001")
    flown = load_env(trained["env"], trained["env_settings"]).cls
    assert flown.codec.to_json() == made.codec.to_json()
    assert (flown.settings.system, flown.settings.examples) == (made.settings.system, made.settings.examples)


def test_a_planner_that_was_trained_above_a_controller_sets_its_goals(evaluate: Evaluate, tmp_path: Path) -> None:
    checkpoint = tmp_path / "trained" / "checkpoints" / "step_000001"
    module, tokenizer = tiny(["<goal>stay</goal>", "0</action>"] * 4, vocab_size=300, hidden=16, layers=1, heads=2)
    module.save_pretrained(checkpoint / "actor")
    tokenizer.save_pretrained(checkpoint / "actor")
    (checkpoint / "manifest.json").write_text("{}")
    settings = {"env": "gymnasium:CartPole-v1", "plan_every": 3, "plan_tokens": 2, "plan_question": "Aim, for {steps}?"}
    (checkpoint / "config.yaml").write_text(json.dumps(settings))
    found = evaluate(*CART_POLE, "--model.path", checkpoint / "actor", "--max-tokens", 2)
    assert (found["length"]["mean"], found["turns"]["mean"]) == (6, 8)
    turns = rows(tmp_path / "run", "episodes")[0]["turns"]
    assert [turn["role"] for turn in turns] == (["planner"] + ["controller"] * 3) * 2
    assert "Aim, for 3?" in turns[0]["seen"]
    assert len(rows(tmp_path / "run", "actions")) == 18


def test_another_environment_than_the_codec_is_for_and_an_unknown_one_are_named(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate("--env-id", "CartPole-v7", "--policy", "random", status=2)
    assert "Did you mean" in capsys.readouterr().err
    codec = load_env("gymnasium:Pendulum-v1").cls.codec
    (tmp_path / "codec.json").write_text(json.dumps(codec.to_json()))
    evaluate(*CART_POLE, "--policy", "random", "--control-data", tmp_path, status=2)
    assert "is of another environment" in capsys.readouterr().err
    evaluate(*CART_POLE, "--policy", "mlp", "--model.path", tmp_path / "lost", status=2)
    assert "lost: no MLP policy can be read there" in capsys.readouterr().err


def test_an_endpoint_plays_any_environment(serve: Callable[..., Server], evaluate: Evaluate) -> None:
    server = serve(answer="2")
    flags = ["--env", "guess_number", "--env-settings", "high=4", "--episodes", 4, "--policy", "api"]
    found = evaluate(*flags, "--api", f"url={server.url}", "model=m", "--max-turns", 2)
    assert (found["win"]["n"], found["truncated"]["mean"]) == (1, 0.75), "2 is the number of one task in four"
    assert [message["role"] for message in server.bodies[-1]["messages"]] == ["user", "assistant", "user"]


@pytest.fixture(scope="module")
def transformers_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """`transformers serve` with a small model that has learned to push right: its address and the model's folder."""
    from transformers.utils.import_utils import is_serve_available

    command = Path(sys.executable).with_name("transformers")
    if not is_serve_available() or not command.is_file():
        pytest.skip("transformers serve needs transformers[serving]")
    folder = tmp_path_factory.mktemp("served")
    pushes_right(folder)
    held = held_port()
    port = held.getsockname()[1]
    words = [str(command), "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(words, env={**os.environ, "HF_HUB_OFFLINE": "1"}, **quiet)
    try:
        until = time.monotonic() + 90
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, "it ended"
            assert time.monotonic() < until, "it did not begin to answer"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        held.close()
        server.terminate()
        server.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def pushes_right(folder: Path) -> None:
    """A model that answers every prompt with the same action, tags and all."""
    env = load_env("gymnasium:CartPole-v1", {"horizon": 6})
    prompts = [env.make(task).start()[:-1] for task in env.tasks("train")[:8]]
    words = [message["content"] for prompt in prompts for message in prompt]
    module, tokenizer = tiny([*words, *["<action>1</action>"] * 8], vocab_size=300, hidden=16, layers=1, heads=2)
    renderer = Renderer(tokenizer)
    rows = [Example(renderer.render(prompt), renderer.action_ids("<action>1</action>")) for prompt in prompts]
    learner = Learner(module, OptimConfig(lr=2e-2))
    for _ in range(40):
        learner.update([pack(rows)], loss_fn)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


class Front(Server):
    """What the world sees of another server: its answers, and faults of its own."""

    def __init__(self, *faults: object, behind: str = "", **settings: object) -> None:
        self.behind = behind
        super().__init__(*faults, **settings)

    @property
    def answer(self) -> str:
        body = json.dumps(self.bodies[-1]).encode()
        request = urllib.request.Request(f"{self.behind}/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())["choices"][0]["message"]["content"]

    @answer.setter
    def answer(self, text: str) -> None:
        """What a server of fixed words would answer."""


def test_a_model_served_by_transformers_plays_through_faults(
    transformers_server: tuple[str, Path], serve: Callable[..., Server], evaluate: Evaluate, tmp_path: Path
) -> None:
    url, folder = transformers_server
    flags = [*CART_POLE, "--policy", "api", "--max-tokens", 16, "--greedy", "--api", f"model={folder}", "backoff=0.01"]
    found = evaluate(*flags, f"url={url}", name="plain")
    assert (found["return"]["n"], found["length"]["mean"]) == (3, 6)
    assert found["invalid"]["mean"] < 0.5, "it says <action>1</action>, tags and all"
    faults = (503, {"Retry-After": "0"}, "{", '{"choices": []}', "drop")
    server = serve(*faults, kind=Front, behind=url)
    assert evaluate(*flags, f"url={server.url}", "parallel=1", "retries=6", name="faulty") == found
    assert len(server.bodies) == 18 + len(faults)


def test_the_key_is_in_nothing_that_is_written_or_printed_and_the_tokens_are_in_the_summary(
    serve: Callable[..., Server], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = {"choices": [{"message": {"content": "<action>1</action>"}}]}
    said["usage"] = {"prompt_tokens": 50, "completion_tokens": 3}  # type: ignore[assignment]
    for name, faults in (("plays", (500, "cut")), ("refused", (401,)), ("denied", (400,)), ("fails", [500] * 99)):
        server = serve(*faults, *[json.dumps(said)] * 99)
        flags = [*asking(server, key_env="MY_KEY", retries=2), "--out", tmp_path / name, "--seed", 7]
        assert cli.main(["evaluate", *map(str, flags), "--traceback"]) == (0 if name == "plays" else 2)
    out, err = capfd.readouterr()
    assert server.headers[0]["Authorization"].endswith(KEY)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(written) >= 4
    assert not [path for path, text in written.items() if KEY.encode() in text]
    assert KEY not in out + err
    assert err.count("Traceback") >= 3
    counted = json.loads((tmp_path / "plays" / "summary.json").read_text())["endpoint"]
    assert counted == {"asked": 18, "retried": 2, "prompt_tokens": 900, "completion_tokens": 54}


def test_a_dry_run_asks_nobody(serve: Callable[..., Server], train: Train, tmp_path: Path) -> None:
    server = serve()
    assert cli.main(["evaluate", *map(str, asking(server)), "--out", str(tmp_path / "dry"), "--dry-run"]) == 0
    assert server.bodies == []
    assert not (tmp_path / "dry").exists()
