"""Evaluation: the numbers, what they depend on and what not, and which files are replaced."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest

from echelon import cli
from echelon.config import ModelConfig
from echelon.envs import load_env
from echelon.errors import ConfigError
from echelon.recipes.evaluate import Config
from echelon.rollout.evaluate import bootstrap

NUMBERS = ("--env", "guess_number")


def summary(out: Path) -> dict[str, dict[str, float]]:
    return json.loads((out / "summary.json").read_text())["estimates"]


def texts(run) -> list[list[str]]:
    return [[turn["text"] for turn in row["turns"]] for row in run.rows("episodes")]


@pytest.fixture
def playing(game: list[str]) -> list[str]:
    """Flags of an evaluation of the model, from those of training."""
    return [word.replace("--sampling.", "--") for word in [*game, "--episodes", "8"]]


def test_the_optimal_player_bisects(train, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("evaluate", *NUMBERS, "--player", "optimal", "--episodes", 10)
    found = summary(run.out)
    # Of ten numbers one is found at once, two at the second guess, four at the third, three at the fourth.
    assert found["return"]["mean"] == pytest.approx(-(0 * 1 + 1 * 2 + 2 * 4 + 3 * 3) / 10)
    assert found["turns"]["mean"] == pytest.approx(2.9)
    assert found["win"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 10}
    assert "length" not in found
    out = capsys.readouterr().out
    assert "optimal player in guess_number, test split" in out
    assert "-1.900" in out


def test_intervals_are_those_of_the_returns_in_the_file(train) -> None:
    run = train("evaluate", *NUMBERS, "--player", "random", "--episodes", 50)
    returns = [row["reward"] for row in run.rows("episodes")]
    found = summary(run.out)["return"]
    assert found["mean"] == pytest.approx(sum(returns) / 50)
    assert (found["low"], found["high"]) == (bootstrap(returns).low, bootstrap(returns).high)
    spread = math.sqrt(sum((value - found["mean"]) ** 2 for value in returns) / 50)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * spread / math.sqrt(50), rel=0.15)


def test_tasks_come_in_order_and_again_from_the_first(train) -> None:
    run = train("evaluate", *NUMBERS, "--player", "random", "--env-settings", "high=3", "--episodes", 7)
    assert [row["task"][-1] for row in run.rows("episodes")] == list("1231231")
    assert len({row["seed"] for row in run.rows("episodes")}) == 7
    assert len({tuple(said) for said in texts(run)[::3]}) > 1  # the same task, played differently


def test_the_same_command_gives_the_same_episodes_and_another_seed_gives_others(train, playing: list[str]) -> None:
    first, second = train("evaluate", *playing, name="a"), train("evaluate", *playing, name="b")
    assert first.rows("episodes") == second.rows("episodes")
    assert summary(first.out) == summary(second.out)
    assert texts(train("evaluate", *playing, "--seed", 1, name="c")) != texts(first)


def test_greedy_temperature_0_and_the_one_most_likely_token_are_the_same(train, playing: list[str]) -> None:
    greedy = train("evaluate", *playing, "--greedy", name="greedy")
    assert texts(train("evaluate", *playing, "--temperature", 0, "--seed", 5, name="cold")) == texts(greedy)
    assert texts(train("evaluate", *playing, "--top-k", 1, name="one")) == texts(greedy)
    assert texts(train("evaluate", *playing, "--top-p", 1e-6, name="mass")) == texts(greedy)
    assert texts(train("evaluate", *playing, name="drawn")) != texts(greedy)


def test_a_model_says_tokens_and_a_limit_truncates(train, playing: list[str]) -> None:
    run = train("evaluate", *playing, "--max-turns", 1)
    assert run.rows("episodes")[0]["turns"][0]["seen"] == "Guess my number from 1 to 4."
    found = summary(run.out)
    assert found["turns"]["mean"] == 1
    assert 1 <= found["length"]["mean"] <= 3
    assert (
        found["truncated"]["mean"] == -found["return"]["mean"]
    )  # whoever was not right at once paid 1 and was cut off


def test_an_evaluation_is_replaced_only_on_demand_and_a_training_run_never(
    train, game: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*NUMBERS, "--player", "optimal", "--episodes", 2)
    run = train("evaluate", *flags)
    train("evaluate", *flags, status=2)
    assert "there is an evaluation already. Replace it with --overwrite, or change --out." in capsys.readouterr().err
    train("evaluate", *flags, "--episodes", 3, "--overwrite")
    assert len(run.rows("episodes")) == 3
    train("grpo", *game, "--steps", 1, "--tasks-per-step", 1, "--group-size", 2, name="trained")
    train("evaluate", *flags, "--overwrite", name="trained", status=2)
    assert "a training run is kept there, and its files stay. Choose another --out." in capsys.readouterr().err


PLAYED = (*NUMBERS, "--player", "optimal", "--episodes", 2)


@pytest.fixture
def unplayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody plays in this test: what is refused must be refused before."""
    monkeypatch.setattr("echelon.recipes.evaluate.collect", None)


def test_transitions_are_replaced_only_on_demand_and_whole(
    train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "deep/t.jsonl"
    train("evaluate", *PLAYED, "--transitions", file, name="a")
    first = file.read_text()
    assert [json.loads(line)["terminated"] for line in first.splitlines()].count(True) == 2
    with monkeypatch.context() as patched:
        patched.setattr("echelon.recipes.evaluate.collect", None)
        train("evaluate", *PLAYED, "--transitions", file, name="b", status=2)
    message = f"{file}: there is such a file already. Replace it with --overwrite, or choose another --transitions.\n"
    assert capsys.readouterr().err == message
    link = tmp_path / "link.jsonl"
    link.symlink_to(file)
    train("evaluate", *PLAYED, "--episodes", 3, "--transitions", link, "--overwrite", name="b")
    assert link.is_symlink()
    assert file.read_text().startswith(first)
    assert file.read_text() != first

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = file.read_text()
    monkeypatch.setattr("echelon.recipes.evaluate.transition_rows", lambda episodes: map(full, episodes))
    capsys.readouterr()
    train("evaluate", *PLAYED, "--transitions", file, "--overwrite", name="c", status=2)
    assert "t.jsonl: cannot be written (No space left on device). Choose another" in capsys.readouterr().err
    assert file.read_text() == before


@pytest.mark.usefixtures("unplayed")
@pytest.mark.parametrize(
    ("flag", "place", "why"),
    [
        ("--transitions", "file/t.jsonl", "Not a directory"),
        ("--transitions", "file/deep/t.jsonl", "Not a directory"),
        ("--transitions", "closed/t.jsonl", "Permission denied"),
        ("--transitions", "closed/deep/t.jsonl", "Permission denied"),
        ("--transitions", ".", "Is a directory"),
        ("--transitions", f"{'n' * 300}/t.jsonl", "File name too long"),
        ("--transitions", "n" * 300, "File name too long"),
        ("--transitions", "/dev/null", "Not a file"),
        ("--out", "file", "Not a directory"),
        ("--out", "closed/deep", "Permission denied"),
    ],
)
def test_a_place_where_nothing_can_be_written_is_found_before_anything_is_played(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    place: str,
    why: str,
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, how: Path(path).name != "closed" and access(path, how))  # also root
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", *map(str, PLAYED), "--out", "out", flag, place, "--overwrite"]
    assert cli.main(words) == 2
    assert capsys.readouterr().err == f"{place}: cannot be written ({why}). Choose another {flag}.\n"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "closed"}


def test_a_place_to_write_in_is_not_made_by_looking_at_it(train, tmp_path: Path) -> None:
    out = train("evaluate", *PLAYED, "--transitions", tmp_path / "deep/er/t.jsonl", "--dry-run").out
    assert not out.exists()
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("name", ["episodes.jsonl", "evaluation.json"])
def test_files_of_somebody_else_stay(train, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    file = tmp_path / "run" / name
    file.write_text('{"mine": 1}\n')
    train("evaluate", *PLAYED, status=2)
    assert capsys.readouterr().err == (
        f"{tmp_path / 'run'}: {name} is there and no summary.json, so it is of no whole evaluation. Replace it with "
        "--overwrite, or choose another --out.\n"
    )
    assert file.read_text() == '{"mine": 1}\n'
    train("evaluate", *PLAYED, "--overwrite")
    assert "mine" not in file.read_text()
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


def test_a_run_directory_is_a_model(train, game: list[str]) -> None:
    trained = train("grpo", *game, "--steps", 1, "--tasks-per-step", 1, "--group-size", 2, name="trained")
    run = train("evaluate", *NUMBERS, "--model.path", trained.out, "--episodes", 2, "--max-tokens", 3)
    assert len(run.rows("episodes")) == 2


@pytest.fixture
def run_of_three(train, game: list[str]):
    """A run with the checkpoints of steps 0, 1 and 2."""
    few = ("--steps", 2, "--tasks-per-step", 2, "--group-size", 2, "--save-every", 1, "--keep-last", 3)
    return train("grpo", *game, *few, "--policy.optim.lr", 0.1, name="trained")


def test_a_run_is_evaluated_by_label_and_keeps_the_results_by_the_name_of_what_was_evaluated(run_of_three) -> None:
    run = run_of_three.out

    def played(*words: str) -> list[str]:
        flags = ["--env", "guess_number", "--env-settings", "high=4", "max_turns=3", "--max-tokens", "3"]
        assert cli.main(["evaluate", *words, *flags, "--episodes", "8", "--threads", "1"]) == 0
        folder = max((run / "evaluation").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        found = json.loads((folder / "evaluation.json").read_text())
        return [folder.name, *(episode["text"] for episode in found["episodes"])]

    newest = played(str(run))
    assert newest[0] == "step_000002_test"
    assert played(str(run), "--label", "latest", "--overwrite") == newest
    first, second = played(str(run), "--label", "0"), played("--model.path", str(run), "--label", "1")
    assert (first[0], second[0]) == ("step_000000_test", "step_000001_test")
    assert first[1:] != newest[1:]
    checkpoint = run / "checkpoints" / "step_000001"
    assert played("--model.path", str(run), "--label", "1", "--overwrite") == second
    apart = ["--out", str(run / "evaluation" / "by_path")]
    assert played("--model.path", str(checkpoint), *apart)[1:] == second[1:], "the folder of a checkpoint is one, too"


def test_labels_that_a_run_does_not_have_are_one_line(
    run_of_three, untrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of_three.out
    for words, message in (
        ((run, "--label", 7), f"label = 7: {run}/checkpoints has no checkpoint of that step. There are: 0, 1, 2."),
        (
            (run, "--label", "best"),
            f"label = best: {run} kept no best model; sft, reward and dpo do, with",
        ),
        ((run, "--label", "newest"), "--label newest: expected a whole number or one of auto, latest, best."),
        ((untrained, "--label", 3, "--out", "x"), f"label = 3: '{untrained}' is no run directory, so there is no"),
        ((run, untrained), f"unexpected '{untrained}' after '{run}': one model at a time."),
        (("lost/run.yaml",), "lost/run.yaml: no such file."),
        ((untrained,), "out is missing: nothing sets it."),
        ((run, "--resume"), "unknown flag '--resume'."),
        ((run, "--save-every", 3), "unknown flag '--save-every'."),
    ):
        capsys.readouterr()
        assert cli.main(["evaluate", *map(str, words), *NUMBERS]) == 2
        said = capsys.readouterr().err
        assert said.startswith(message), said
        assert said.count("\n") == 1
    assert not (run / "evaluation").exists()


def test_the_best_model_of_a_run_that_keeps_one_is_what_auto_means(train, untrained: Path, conversations: Path) -> None:
    data = ("--data.path", conversations, "--data.eval-fraction", 0.2, "--rows-per-step", 16, "--max-steps", 2)
    run = train("sft", "--model.path", untrained, *data, name="tuned")
    for words in ((), ("--label", "latest")):
        assert cli.main(["evaluate", str(run.out), *NUMBERS, "--episodes", "1", "--threads", "1", *words]) == 0
    assert {path.name for path in (run.out / "evaluation").iterdir()} == {"best_test", "step_000002_test"}


@pytest.mark.parametrize("who", ["model", "random"])
def test_every_step_is_in_the_file_whoever_played(train, playing: list[str], who: str) -> None:
    run = train("evaluate", *playing, "--player", who)
    found = json.loads((run.out / "evaluation.json").read_text())
    rows = run.rows("episodes")
    assert found["average_score"] == pytest.approx(sum(row["reward"] for row in rows) / 8)
    for episode, row in zip(found["episodes"], rows, strict=True):
        assert (episode["score"], episode["ending"]) == (row["reward"], row["ending"])
        assert [(step["text"], step["reward"]) for step in episode["steps"]] == [
            (turn["text"], turn["reward"]) for turn in row["turns"]
        ]


def test_both_levels_of_a_run_play_and_every_choice_is_in_the_file(
    tosca: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--env", "dialogue", "--episodes", "3", "--max-turns", "2", "--max-tokens", "4", "--threads", "1"]
    out = tmp_path / "played"
    assert cli.main(["evaluate", str(tosca), *flags, "--out", str(out)]) == 0
    menu = load_env("dialogue").cls.inventory()
    episodes = json.loads((out / "evaluation.json").read_text())["episodes"]
    for episode in episodes:
        assert [step["role"] for step in episode["steps"]] == ["strategist", "responder"] * (len(episode["steps"]) // 2)
        for step in episode["steps"][::2]:
            values = [option["q"] for option in step["candidates"]]
            assert step["strategy"] == menu.strategies[values.index(max(values))]
            assert step["text"] == menu.options[step["chosen"]]
    replies = [len(episode["steps"]) / 2 for episode in episodes]
    assert summary(out)["turns"]["mean"] == pytest.approx(sum(replies) / 3), "a choice is no turn"
    capsys.readouterr()
    record = ["--transitions", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "x")]
    assert cli.main(["evaluate", str(tosca), *flags, *record]) == 2
    assert "two levels play, and its rows are those of one. Leave it out." in capsys.readouterr().err


def test_failed_episodes_are_left_out_within_the_budget(
    train, fragile: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [word.replace("--sampling.", "--") for word in (*fragile, "--episodes", "12")]
    run = train("evaluate", *flags, "--error-budget", 0.9)
    failed = sum(row["ending"] == "failed" for row in run.rows("episodes"))
    assert 0 < failed < 12
    assert json.loads((run.out / "summary.json").read_text())["failed"] == failed
    assert summary(run.out)["return"]["n"] == 12 - failed
    assert f"{failed} of 12 episodes failed" in capsys.readouterr().out
    train("evaluate", *flags, name="strict", status=2)
    assert "ZeroDivisionError: three" in capsys.readouterr().err


def test_an_environment_without_players_says_so(train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mute.py").write_text(
        "from echelon.types import Step, Task\n\n\n"
        "class Mute:\n"
        "    def __init__(self, task): pass\n"
        "    @classmethod\n"
        "    def tasks(cls, split): return [Task(split)]\n"
        "    def start(self): return [{'role': 'user', 'content': 'Hello'}]\n"
        "    def step(self, action): return Step(terminated=True)\n"
    )
    train("evaluate", "--env", f"{tmp_path}/mute.py:Mute", "--player", "random", status=2)
    assert "has no scripted players. Give it a classmethod player" in capsys.readouterr().err


SCRIPTED = """\
from echelon.types import Step, Task

REPLIES = {"same": "the cat sat on the mat", "short": "the cat sat on the mat", "none": ""}


class Scripted:
    def __init__(self, task):
        self.task = task

    @classmethod
    def tasks(cls, split):
        names = {"train": ["same"], "test": ["same", "short", "none"]}[split]
        return [Task(f"{split}/{name}", {"reply": REPLIES[name], "name": name}) for name in names]

    @classmethod
    def player(cls, kind, seed):
        return lambda heard: REPLIES["same"] if heard[0]["content"] == "same" else "the cat on the mat"

    def start(self):
        return [{"role": "user", "content": self.task.data["name"]}]

    def step(self, action):
        return Step(terminated=True)
"""


@pytest.fixture
def scripted(tmp_path: Path) -> list[str]:
    """Flags of a play in which the first reply is that of the person and the second one leaves out a word."""
    (tmp_path / "scripted.py").write_text(SCRIPTED)
    return ["--env", f"{tmp_path}/scripted.py:Scripted", "--player", "optimal", "--reference", "reply"]


def test_a_reply_that_is_that_of_the_person_scores_one_and_what_was_left_out_costs(
    train, scripted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = summary(train("evaluate", *scripted, "--episodes", 1, name="one").out)
    for name in ("bleu2", "rouge_l", "distinct2"):
        assert found[f"text/{name}"] == {"mean": pytest.approx(1.0), "n": 1}
    capsys.readouterr()
    found = summary(train("evaluate", *scripted, "--episodes", 2, name="two").out)
    # 6 + 5 of 11 words, 5 + 3 of 9 pairs, 11 words for 12; 1, and 1 with 5/6; 6 different pairs among 9.
    assert found["text/bleu2"]["mean"] == pytest.approx(math.sqrt(8 / 9) * math.exp(1 - 12 / 11))
    assert found["text/rouge_l"]["mean"] == pytest.approx((1 + 2 * (5 / 6) / (1 + 5 / 6)) / 2)
    assert found["text/distinct2"] == {"mean": pytest.approx(6 / 9), "n": 2}
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "text/distinct2" in line)
    assert [cell.strip() for cell in line.split("│")[2:5]] == ["0.667", "", "2"], "it has no interval"


def test_a_task_without_a_reply_is_named_before_anything_is_played(
    train, scripted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert not train("evaluate", *scripted, "--episodes", 3, status=2).out.exists()
    said = capsys.readouterr().err
    assert "reference = reply: task 'test/none' has no text in 'reply', so nothing can be compared" in said
    train("evaluate", *scripted, "--episodes", 1, "--reference", "answer", status=2)
    said = capsys.readouterr().err
    assert "reference = answer: task 'test/same' has no text in 'answer'" in said
    assert said.endswith("Its columns are: reply, name.\n")


def test_a_library_that_is_missing_is_found_before_anything_is_played(
    train, scripted: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert not train("evaluate", *scripted, "--episodes", 1, status=2).out.exists()
    assert "pip install 'echelon[text]'" in capsys.readouterr().err


def test_replies_in_a_file_need_no_reward(
    train, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    said = ["1", "2", "3"]
    flags = ["--model.path", start, "--data.path", file, "--greedy", "--max-tokens", 3, "--episodes", 3]
    for attempt in ("guessed", "known"):
        rows = [{"prompt": f"Guess my number from 1 to {4 - n}.", "response": one} for n, one in enumerate(said)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = train("evaluate", *flags, "--reference", "response", name=attempt)
        said = [one for (one,) in texts(run)]
    found = summary(run.out)
    assert found["text/rouge_l"] == {"mean": 1.0, "n": 3}
    assert found["return"]["mean"] == 0
    assert "train split" in capsys.readouterr().out, "nothing is held out, so all of them are played"
    train("evaluate", *flags, name="worth", status=2)
    assert capsys.readouterr().err.endswith("or a reward model's folder. Or give --reference.\n")


def test_a_dry_run_plays_nothing(train, playing: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert not train("evaluate", *playing, "--dry-run").out.exists()
    assert "actor: LlamaForCausalLM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"^model.path is missing"),
        ({"player": "random", "label": -1}, r"^label = -1: steps are counted from 0"),
        ({"player": "random", "top_p": 0.0}, r"^top_p = 0.0: it is a probability"),
        ({"model": ModelConfig(path="m"), "rounds": 1, "reference": "a"}, r"^reference = a: a solver and a coach play"),
        ({"player": "random", "temperature": -1.0}, r"^temperature = -1.0: probabilities would be turned around"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(out="x", env="guess_number", **settings)


def test_no_model_is_needed_for_a_player_on_the_command_line(tmp_path: Path) -> None:
    words = ["evaluate", "--env", "text_lock", "--player", "optimal", "--episodes", "1", "--out", str(tmp_path / "x")]
    assert cli.main(words) == 0
