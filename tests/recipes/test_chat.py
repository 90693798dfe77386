"""Chat with every kind of run, at a terminal (a pseudo-terminal with a keyboard that the test types on) and by pipe."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from echelon import cli
from echelon.config import ModelConfig, RunConfig
from echelon.config.loading import load
from echelon.envs import load_env
from echelon.errors import ConfigError
from echelon.recipes import chat
from echelon.recipes.chat import Config, Levels, Policy, Rounds, open_partner
from echelon.rollout.players import open_policy
from echelon.sampling.local import LocalSampler
from echelon.train.checkpoint import Checkpoints
from echelon.types import Completion, SamplingParams
from tests.recipes import doors
from tests.recipes.conftest import GAME, made
from tests.test_docs import CODE, columns, prose, wrong_settings

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")

COLOURS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def command(words: Sequence[object], max_tokens: int) -> list[str]:
    """A command line: who answers, short answers, and the flags of a test."""
    return ["chat", *map(str, words[:1]), "--threads", "1", "--max-tokens", str(max_tokens), *map(str, words[1:])]


class Terminal:
    """A chat in a process of its own, and its terminal. The process is a fork of this one: everything is imported."""

    def __init__(self, *words: object) -> None:
        self.seen, self._at = "", 0
        self.process, self._keyboard = pty.fork()
        if self.process == 0:
            status, os.environ["COLUMNS"] = 99, "500"
            signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background begin with it ignored
            try:
                sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
                status = cli.main(command(words, 12))
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._keyboard, text.encode())

    def until(self, text: str, seconds: float = 60) -> str:
        """What appears up to a text, that one included, since the last time."""
        end = time.monotonic() + seconds
        while text not in self.seen[self._at :]:
            assert time.monotonic() < end, f"{text!r} did not appear in {self.seen!r}"
            assert self._read(), f"it has ended: {self.seen!r}"
        place = self.seen.index(text, self._at) + len(text)
        found, self._at = self.seen[self._at : place], place
        return found

    def say(self, line: str) -> str:
        """Type a line; what appears until the next prompt, without the line itself."""
        self.type(line + "\n")
        self.until(f"{line}\r\n")
        return self.until("you> ").removesuffix("you> ")

    def status(self, key: str = "") -> int:
        """How the process ended, all its output read. `key` is pressed each second until then.

        Readline shows its prompt before it waits for keys, and a Ctrl-C in between is not heard before the next key.
        """
        end, pressed = time.monotonic() + 60, 0.0
        while True:
            assert time.monotonic() < end, f"it goes on: {self.seen!r}"
            pid, status = os.waitpid(self.process, os.WNOHANG)
            if key and not pid and time.monotonic() > pressed + 1:
                self.type(key)
                pressed = time.monotonic()
            if not self._read():
                time.sleep(0.05)
            if pid:
                os.close(self._keyboard)
                return os.waitstatus_to_exitcode(status)

    def _read(self) -> bool:
        """Take what has appeared by now; whether there may be more."""
        if select.select([self._keyboard], [], [], 0.1)[0]:
            try:
                self.seen += COLOURS.sub("", os.read(self._keyboard, 1 << 16).decode(errors="replace"))
            except OSError:  # the other end is closed
                return False
        return True


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer model with random weights that knows the words of a game."""
    return made(load_env("guess_number", GAME), tmp_path_factory.mktemp("model") / "game", layers=1)


def trained(out: Path, recipe: str, *words: object) -> Path:
    common = ["--out", str(out), "--threads", "1", "--steps", "1"]
    assert cli.main([recipe, *map(str, words), *common]) == 0
    return out


@pytest.fixture(scope="module")
def playing(model: Path) -> list[object]:
    settings = [f"{key}={value}" for key, value in GAME.items()]
    flags = ["--model.path", model, "--env", "guess_number", "--env-settings", *settings]
    return [*flags, "--sampling.max-tokens", 3, "--sampling.max-prompt-tokens", 128, "--episodes-per-step", 4]


@pytest.fixture(scope="module")
def ranker(playing: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    few = ("--candidates", 3, "--warmup-steps", 1, "--ranker-updates", 1, "--ranker-batch", 4)
    return trained(tmp_path_factory.mktemp("runs") / "rank", "rank", *playing, *few)


@pytest.fixture(scope="module")
def archer(playing: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    few = ("--critic-updates", 1, "--critic-episodes", 2, "--warmup-steps", 1)
    return trained(tmp_path_factory.mktemp("runs") / "archer", "archer", *playing, *few)


@pytest.fixture(scope="module")
def pupil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that plays solver and coach: it opens doors with any key, and with the one it is told."""
    return doors.pupil(tmp_path_factory.mktemp("pupil"))


def solving(pupil: Path, out: Path, *words: object) -> Path:
    """A run of feedback after one step, with utterances of one token."""
    texts = [word for name, text in doors.TEMPLATES.items() for word in (f"--templates.{name.replace('_', '-')}", text)]
    lengths = ("max-tokens=1", "max-prompt-tokens=32")
    short = [f"--{level}.sampling.{length}" for level in ("solver", "coach") for length in lengths]
    few = ["--env", doors.GAME, "--attempts", 2, "--tasks-per-step", 3, *short]
    return trained(out, "feedback", "--solver.model.path", pupil, *few, *texts, *words)


@pytest.fixture(scope="module")
def feedback(pupil: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return solving(pupil, tmp_path_factory.mktemp("runs") / "feedback")


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Opens terminals; whatever still runs in them afterwards is ended."""
    opened: list[Terminal] = []

    def open_terminal(*words: object) -> Terminal:
        opened.append(Terminal(*words))
        return opened[-1]

    yield open_terminal
    for each in opened:
        try:
            os.kill(each.process, signal.SIGKILL)
            os.waitpid(each.process, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def test_a_model_at_the_terminal(terminal: Callable[..., Terminal], model: Path, tmp_path: Path) -> None:
    at = terminal(model, "--system", "Be brief.")
    assert f"{model}: clear begins anew, save FILE keeps the conversation, exit leaves." in at.until("you> ")
    first = at.say("Guess my number.")
    second = at.say("Higher.")
    assert first.endswith("\r\n")
    assert f"Saved to {tmp_path / 'talk.jsonl'}." in at.say(f"save {tmp_path / 'talk.jsonl'}")
    assert "is there already, and it is never overwritten" in at.say(f"save {tmp_path / 'talk.jsonl'}")
    messages = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [messages[0]["content"], messages[1]["content"]] == ["Be brief.", "Guess my number."]
    written = [first.strip(), second.strip()]
    assert [message["content"].strip().replace("\n", "\r\n") for message in messages[2::2]] == written
    assert "The conversation begins anew." in at.say("clear")
    at.type("exit\n")
    assert at.status() == 0


def test_control_d_and_control_c_leave_without_a_word(terminal: Callable[..., Terminal], model: Path) -> None:
    for key in ("\x04", "\x03"):
        at = terminal(model)
        at.until("you> ")
        assert at.status(key) == 0
        assert "Traceback" not in at.seen


def test_control_c_stops_an_answer_and_the_conversation_goes_on(
    terminal: Callable[..., Terminal], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(*given: Any, **settings: Any) -> Any:
        actor = open_policy(*given, **settings)
        actor.role.params = replace(actor.role.params, stop_ids=(-1,))
        return actor

    monkeypatch.setattr(chat, "open_policy", endless)
    at = terminal(model, "--max-tokens", 2000, "--temperature", 1)
    at.until("you> ")
    at.type("Guess.\n")
    at.until("Guess.\r\n")
    time.sleep(1)
    at._read()
    at.type("\x03")
    at.until("(stopped)")
    at.until("you> ")
    at.type("exit\n")
    assert at.status() == 0


def test_a_ranker_shows_its_candidates_with_their_values_and_the_choice(
    terminal: Callable[..., Terminal], ranker: Path
) -> None:
    at = terminal(ranker, "--temperature", 1, "--max-tokens", 3)
    at.until("you> ")
    shown = at.say("Guess my number from 1 to 4.").splitlines()
    assert shown[0].split() == ["Q", "candidate"]
    values = [float(re.search(r"-?\d+\.\d\d", line)[0]) for line in shown[1:4]]  # type: ignore[index]
    (chosen,) = (place for place, line in enumerate(shown[1:4]) if line.startswith(">"))
    assert values[chosen] == max(values)
    said = " ".join(" ".join(shown[4:]).split())
    assert shown[1 + chosen].strip().split(maxsplit=2)[2:] == ([said] if said else [])
    at.type("exit\n")
    assert at.status() == 0


def test_the_critic_of_an_archer_run_picks_where_it_is_asked_to(
    terminal: Callable[..., Terminal], archer: Path
) -> None:
    at = terminal(archer, "--candidates", 2, "--temperature", 1, "--max-tokens", 3)
    at.until("you> ")
    assert at.say("Guess my number.").splitlines()[0].split() == ["Q", "candidate"]
    at.type("exit\n")
    assert at.status() == 0
    alone = terminal(archer, "--max-tokens", 3)
    alone.until("you> ")
    assert "candidate" not in alone.say("Guess my number.")


def test_levels_show_the_strategy_among_all_and_ask_what_they_must_know(
    terminal: Callable[..., Terminal], tosca: Path, tmp_path: Path
) -> None:
    at = terminal(tosca, "--max-prompt-tokens", 1500)
    at.until("What do you feel (may be empty)? ")
    at.type("sad\n")
    at.until("What is it about (may be empty)? ")
    at.type("work\n")
    at.until("you> ")
    menu = load_env("dialogue").cls.inventory()
    for said in ("I lost my job.", "What now?"):
        shown = at.say(said).splitlines()
        assert shown[0].split() == ["Q", "strategy"]
        lines = shown[1 : 1 + len(menu)]
        assert [line.split(maxsplit=2 if line.startswith(">") else 1)[-1].strip() for line in lines] == [
            menu.label(place) for place in range(len(menu))
        ]
        values = [float(line.removeprefix(">").split()[0]) for line in lines]
        (chosen,) = (place for place, line in enumerate(lines) if line.startswith(">"))
        assert values[chosen] == max(values)
    at.say(f"save {tmp_path / 'talk.jsonl'}")
    saved = json.loads((tmp_path / "talk.jsonl").read_text())
    assert (saved["emotion"], saved["description"], len(saved["messages"])) == ("sad", "work", 4)
    at.type("exit\n")
    assert at.status() == 0


DRAWN = ("--max-tokens", 0, "--temperature", 1, "--repetition-penalty", 1)
"""Flags of a chat with a run of feedback: as long as in training, and not more alike."""


def test_a_coach_speaks_between_two_attempts_and_the_last_one_is_the_answer(
    terminal: Callable[..., Terminal], feedback: Path, tmp_path: Path
) -> None:
    at = terminal(feedback, *DRAWN)
    at.until("you> ")
    told = []
    for door in doors.DOORS:
        attempt, remark, answer = at.say(door).splitlines()
        assert (attempt[:-1], remark[:-1]) == ("solver> ", "coach> ")
        assert {attempt[-1], remark[-1], answer} <= set(doors.KEYS)
        assert answer == remark[-1], "it says what it was told"
        told.append([attempt[-1], remark[-1], answer])
    assert any(attempt != answer for attempt, _, answer in told)
    at.say(f"save {tmp_path / 'talk.jsonl'}")
    saved = json.loads((tmp_path / "talk.jsonl").read_text())
    assert [message["content"] for message in saved["messages"][::2]] == list(doors.DOORS)
    written = [[*(turn["text"] for turn in turns)] for turns in saved["turns"]]
    assert [[*t, m["content"]] for t, m in zip(written, saved["messages"][1::2], strict=True)] == told
    at.say("clear")
    at.say(f"save {tmp_path / 'none.jsonl'}")
    assert json.loads((tmp_path / "none.jsonl").read_text()) == {"messages": [], "turns": []}
    assert "a prompt takes" in at.say("A B " * 20 + "C"), "as many tokens as in training"
    at.type("exit\n")
    assert at.status() == 0


def piped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str, *words: object
) -> tuple[int, str, str]:
    """Exit status, output and errors of a chat whose input is a text."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **how: None, raising=False)
    capsys.readouterr()
    status = cli.main(command(words, 6))
    return status, *capsys.readouterr()


Pipe = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Pipe:
    return lambda text, *words: piped(capsys, monkeypatch, text, *words)


def test_the_command_by_pipe_says_answers_and_nothing_else(model: Path, pipe: Pipe) -> None:
    words = ["chat", str(model), "--threads", "1", "--max-tokens", "6"]
    done = subprocess.run(
        [sys.executable, "-m", "echelon", *words],
        input="Guess.\n\nHigher.\nclear\nGuess.\nexit\nnever\n",
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "The conversation begins anew.\n")
    assert pipe("Guess.\nHigher.\nclear\nGuess.\n", model)[:2] == (0, done.stdout), "the same words, the same answers"
    assert "\x1b" not in done.stdout


def test_json_has_every_message_with_what_its_answer_was_chosen_from(
    pipe: Pipe, model: Path, ranker: Path, tosca: Path
) -> None:
    asked = "Guess.\nHigher.\n"
    status, out, _ = pipe(asked, model, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (status, [row["user"] for row in rows]) == (0, ["Guess.", "Higher."])
    assert "".join(row["assistant"] + "\n" for row in rows) == pipe(asked, model)[1]
    (row,) = map(json.loads, pipe("Guess.\n", ranker, "--json")[1].splitlines())
    assert len(row["candidates"]) == 3
    assert row["candidates"][row["chosen"]]["text"] == row["assistant"]
    flags = ("--emotion", "sad", "--description", "work", "--json", "--max-prompt-tokens", 1500)
    rows = [json.loads(line) for line in pipe("I lost my job.\nAnd now?\n", tosca, *flags)[1].splitlines()]
    menu = load_env("dialogue").cls.inventory()
    for row in rows:
        values = [option["q"] for option in row["candidates"]]
        assert row["strategy"] == menu.strategies[values.index(max(values))]


@pytest.mark.parametrize(
    ("words", "before"),
    [
        ((), ["solver", "coach"]),
        (("--rounds", 2), ["solver", "coach", "solver", "coach"]),
        (("--weights", "shared"), ["solver", "coach"]),
        (("--context", "none"), ["solver"]),
        (("--context", "fixed", "--fixed", 1), ["solver"]),
        (("--context", "example"), ["coach"]),
    ],
)
def test_json_has_the_turns_before_the_answer_of_a_run_of_feedback(
    pipe: Pipe, pupil: Path, tmp_path: Path, words: tuple[object, ...], before: list[str]
) -> None:
    run = solving(pupil, tmp_path / "run", *words)
    status, out, _ = pipe("A\nB\nC\n", run, *DRAWN, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (status, [row["user"] for row in rows]) == (0, list(doors.DOORS))
    for row in rows:
        assert [turn["role"] for turn in row["turns"]] == before
        assert {turn["text"] for turn in row["turns"]} | {row["assistant"]} <= set(doors.KEYS)
        if "coach" in before:
            assert row["turns"][-1]["text"] == row["assistant"]
    assert "".join(row["assistant"] + "\n" for row in rows) == pipe("A\nB\nC\n", run, *DRAWN)[1]


def test_each_problem_is_read_alone_in_the_words_of_the_run(feedback: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    who = open_partner(Config(model=ModelConfig(str(feedback), device="cpu"), max_tokens=3, seed=1))
    assert isinstance(who, Rounds)
    read, sample = list[str](), LocalSampler.sample

    async def noted(sampler: LocalSampler, prompt: list[int], params: SamplingParams) -> Completion:
        read.append(who.roles[0].renderer.decode(prompt))
        return await sample(sampler, prompt, params)

    monkeypatch.setattr(LocalSampler, "sample", noted)
    for door in "AB":
        told, shown = list[Any](), list[str]()
        read.clear()
        answered = chat.asyncio.run(who.answer(door, told.append, lambda text, to=shown: to.append(text) or False))
        attempt, remark = (turn["text"] for turn in told[-1]["turns"])
        wanted = [door, f"{door}{attempt}?", f"{door}{attempt}!{remark}"]
        assert [text in prompt for text, prompt in zip(wanted, read, strict=True)] == [True] * 3
        assert not any({"A": "B", "B": "A"}[door] in prompt for prompt in read)
        grown = [[turn["text"] for turn in notes["turns"]] for notes in told]
        assert len({tuple(texts) for texts in grown}) > 2, "they appear as they are written"
        assert answered.startswith(shown[-1])


def test_what_a_run_of_feedback_cannot_do_is_one_line(pipe: Pipe, feedback: Path, pupil: Path, tmp_path: Path) -> None:
    strange = solving(pupil, tmp_path / "strange", "--context", "stranger")
    for words, message in (
        ((strange,), f"{strange}: its coach speaks about another problem than the one that is solved"),
        ((feedback, "--candidates", 2), "candidates = 2: in a run of feedback nobody picks among answers."),
        ((feedback, "--strategist", pupil), f"strategist = {pupil}: in a run of feedback problems are solved"),
        ((feedback, "--max-tokens", 5000), "max_tokens = 5000: the model reads 2048 tokens in all"),
    ):
        status, out, err = pipe("A\n", *words)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith(message), err


def test_a_word_for_the_console_can_be_said_with_a_space_in_front(pipe: Pipe, model: Path) -> None:
    status, out, _ = pipe(" exit\nsave the whales\n clear\n", model, "--json")
    assert (status, [json.loads(line)["user"] for line in out.splitlines()]) == (
        0,
        ["exit", "save the whales", "clear"],
    )


def partner(model: Path, **settings: Any) -> Policy:
    opened = open_partner(Config(model=ModelConfig(str(model), device="cpu"), max_tokens=6, **settings))
    assert isinstance(opened, Policy)
    return opened


def answer(who: Policy | Levels, said: str) -> str:
    return chat.asyncio.run(who.answer(said, lambda notes: None, lambda text: False))


def test_an_answer_grows_as_it_is_written(model: Path) -> None:
    who, shown = partner(model, temperature=1.0), list[str]()
    text = chat.asyncio.run(who.answer("Guess.", lambda notes: None, lambda text: shown.append(text) or False))
    assert len(shown) > 1
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
    assert text.startswith(shown[-1])


def test_a_file_begins_the_conversation_and_the_system_message_stands_before_it(model: Path, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Be brief.\n")
    (tmp_path / "start.txt").write_text("We play a game.\n")
    who = partner(model, system_file=str(tmp_path / "system.txt"), start_file=str(tmp_path / "start.txt"))
    for _ in range(2):
        answer(who, "Guess.")
        answer(who, "Higher.")
        said = [(message["role"], message["content"]) for message in who.transcript()["messages"]]
        assert said[:2] == [("system", "Be brief."), ("user", "We play a game.\nGuess.")]
        assert said[3] == ("user", "Higher.")
        who.clear()
        assert who.transcript() == {"messages": []}


def test_what_does_not_fit_is_forgotten_from_the_oldest_on(model: Path) -> None:
    who = partner(model, max_prompt_tokens=120)
    for number in range(12):
        answer(who, f"Number {number}.")
    last = who._last
    assert last is not None
    assert len(last.prompt) <= 120
    read = who.role.renderer.decode(last.prompt)
    assert "Number 11." in read
    assert "Number 1." not in read
    assert len(who.transcript()["messages"]) == 24, "the transcript keeps everything"


def test_a_message_that_is_too_long_is_refused_and_the_conversation_goes_on(
    terminal: Callable[..., Terminal], model: Path, pipe: Pipe
) -> None:
    at = terminal(model, "--max-prompt-tokens", 40)
    at.until("you> ")
    refused = " ".join(at.say("1 2 3 4 " * 30).split())
    assert "the instruction and the latest observation alone take" in refused
    at.say("Guess.")
    at.type("exit\n")
    assert at.status() == 0
    status, _, err = pipe("1 2 3 4 " * 30 + "\n", model, "--max-prompt-tokens", 40)
    assert (status, err.count("\n")) == (2, 1)


def test_a_penalty_makes_repetition_rarer(model: Path) -> None:
    cfg = Config(model=ModelConfig(str(model), device="cpu"), max_tokens=40, greedy=True, repetition_penalty=1.0)
    distinct = []
    for penalty in (1.0, 2.0):
        who = open_partner(replace(cfg, repetition_penalty=penalty))
        assert isinstance(who, Policy)
        answer(who, "Guess.")
        assert who._last is not None
        distinct.append(len(set(who._last.action)) / len(who._last.action))
    assert distinct[1] > distinct[0]


def test_a_step_of_a_run_can_be_named_and_settings_are_shown_without_talking(
    pipe: Pipe, ranker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipe("", ranker, "--label", 1)[0] == 0
    assert f"{ranker}/checkpoints has no checkpoint of that step. There are: 0, 1." in pipe("", ranker, "--label", 9)[2]
    status, out, _ = pipe("Guess.\n", ranker, "--dry-run")
    assert status == 0
    assert out.startswith("actor: LlamaForCausalLM")


class OnlyStrategist:
    """A part that is a language model's folder."""

    def __init__(self, model: Path) -> None:
        self.model = model

    def save(self, folder: Path) -> None:
        for file in self.model.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())

    def load(self, folder: Path) -> None:
        raise NotImplementedError


def test_who_cannot_answer_is_one_line(pipe: Pipe, model: Path, tosca: Path, archer: Path, tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "chooser", config=RunConfig(out="r")) as checkpoints:
        checkpoints.save(1, {"strategist": OnlyStrategist(model)})
    (tmp_path / "mute").mkdir()
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / "mute" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "nothing").mkdir()
    wordless = tmp_path / "wordless"
    wordless.mkdir()
    for name in ("config.json", "model.safetensors"):
        (wordless / name).write_bytes((model / name).read_bytes())
    for words, message in (
        ((), "model.path is missing: nothing sets it."),
        ((tmp_path / "nowhere",), f"there is no model folder '{tmp_path}/nowhere'."),
        ((tmp_path / "nothing",), f"'{tmp_path}/nothing' is a folder without config.json"),
        ((wordless,), f"no tokenizer could be loaded from '{wordless}'"),
        ((tmp_path / "mute",), f"the tokenizer of '{tmp_path}/mute' has no chat template"),
        ((tmp_path / "chooser",), f"{tmp_path}/chooser: a strategist chooses how to reply and writes nothing."),
        ((tosca, "--system", "Be brief."), "system and start_file: a responder's prompt has no place for them."),
        ((model, "--strategist", model), f"{model} has no strategist.json that can be read"),
        ((model, "--candidates", 2), f"{model.parent}/critic: there is no critic"),
        ((model, "--system-file", tmp_path / "x"), f"system_file = {tmp_path}/x: it cannot be read (No such file"),
        ((model, "--system", "a", "--system-file", "b"), "system_file = b: system says it already."),
        ((model, "--max-tokens", 5000), "max_tokens = 5000: the model reads 2048 tokens in all"),
        ((model, "--label", "best"), f"label = best: '{model}' is no run directory"),
        ((archer, "--label", "best"), f"label = best: {archer} kept no best model"),
        ((model, "--top-p", 0), "top_p = 0.0: it is a probability"),
    ):
        status, out, err = pipe("Hello.\n", *words)
        assert (status, out) == (2, ""), err
        assert err.startswith(message), err
        assert err.count("\n") == 1


def test_a_run_that_is_damaged_is_one_line(pipe: Pipe, ranker: Path, tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "run", config=RunConfig(out="r")) as checkpoints:
        folder = checkpoints.save(1, {"actor": OnlyStrategist(Path(next(ranker.glob("checkpoints/*/actor"))))})
    (folder / "extra.json").write_text("{}  ")
    status, _, err = pipe("Hello.\n", tmp_path / "run")
    assert status == 2
    assert err.endswith("none of its checkpoints is whole. Start a new run.\n")


PAGE = Path(__file__).parents[2] / "docs" / "chat.md"


def test_the_page_has_the_settings_with_their_defaults_and_every_flag_of_the_source() -> None:
    assert list(wrong_settings("chat", prose(PAGE))) == []
    rows = [row for row, _ in columns(prose(PAGE), "here")]
    flags = {code for row in rows for code in CODE.findall(row["flag"])}
    assert flags >= {"pretrain", "max_len", "greedy_sampling", "top_p", "temperature", "repetition_penalty"}
    assert flags >= {"input_template", "apply_chat_template", "ta_prompt", "enable_csft", "csft_prompt"}
    mapped = [code.split() for row in rows for code in CODE.findall(row["here"]) if code.startswith("--")]
    assert len(mapped) >= 8
    for words in mapped:
        load(Config, [], ["--model.path", "x", *words])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, r"^temperature = -1.0: probabilities would be turned around"),
        ({"repetition_penalty": 0.0}, r"^repetition_penalty = 0.0: it divides"),
        ({"stop": ("",)}, r"^stop = \[''\]: every text contains"),
        ({"candidates": -1}, r"^candidates = -1: they are counted"),
        ({"label": -1}, r"^label = -1: steps are counted from 0"),
        ({"max_tokens": -1}, r"^max_tokens = -1: tokens are counted"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(model=ModelConfig("x"), **settings)
