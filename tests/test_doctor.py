"""What the doctor finds, and says, of a machine that lacks one thing after another."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from echelon import cli, doctor
from echelon.config import RunConfig
from echelon.models.lm import count_parameters, tiny
from echelon.sandbox import ProgramError
from echelon.train.checkpoint import Checkpoints

Find = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    module, tokenizer = tiny(["yes no"], vocab_size=270, hidden=32, layers=1, heads=2)
    module.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def find(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Find:
    """Ask about settings of a recipe; what is found of them, by name. The sandbox is not tried each time."""
    monkeypatch.setattr("echelon.sandbox.walls", lambda: ())

    def find(*words: object, status: int = 0) -> dict[str, Any]:
        assert cli.main(["doctor", *map(str, words), "--json"]) == status
        told = json.loads(capsys.readouterr().out)
        assert told["works"] == (status == 0)
        return {one.pop("name"): one for one in told["findings"]}

    return find


def grpo(model: Path, *more: object) -> list[object]:
    return ["grpo", "--model.path", model, "--env", "guess_number", *more]


def test_settings_that_can_work_are_said_to(find: Find, model: Path, tmp_path: Path) -> None:
    found = find(*grpo(model, "--out", tmp_path / "run"))
    assert {found[name]["standing"] for name in ("settings", "model.path", "env", "room", "out")} == {"ok"}
    assert found["model.path"]["says"] == str(model)
    assert found["env"]["says"] == "guess_number opens"
    assert not (tmp_path / "run").exists()


def test_a_file_is_of_the_recipe_that_its_folder_is_named_for(find: Find, model: Path, tmp_path: Path) -> None:
    (tmp_path / "control_mlp").mkdir()
    file = tmp_path / "control_mlp" / "a.yaml"
    file.write_text("env: CartPole-v1\nout: runs/a\n")
    assert find(file)["settings"]["says"] == "of control-mlp"
    file.write_text(f"env: guess_number\nmodel: {{path: {model}}}\n")
    assert find("grpo", file)["settings"]["says"] == "of grpo"


def test_a_folder_before_the_flags_is_what_it_is_to_the_recipe(find: Find, model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("env: guess_number\n")
    found = find("evaluate", tmp_path / "a.yaml", model, "--out", tmp_path / "out")
    assert (found["settings"]["says"], found["model.path"]["says"]) == ("of evaluate", str(model))
    assert find("report", tmp_path / "every", tmp_path / "other")["settings"]["says"] == "of report"
    found = find("evaluate", model, tmp_path, "--env", "guess_number", "--out", tmp_path / "out", status=1)
    assert found["settings"]["says"] == f"unexpected '{tmp_path}' after '{model}': one model at a time."


@pytest.mark.parametrize("part", ["actor", "responder", "solver"])
def test_of_a_run_whoever_writes_is_found_where_the_recipe_finds_them(
    find: Find, model: Path, tmp_path: Path, part: str
) -> None:
    class Part:
        def save(self, folder: Path) -> None:
            shutil.copytree(model, folder, dirs_exist_ok=True)

    with Checkpoints(tmp_path / "run", config=RunConfig(out="x")) as run:
        saved = run.save(3, {part: Part()})
    words = ("--env", "guess_number", "--out", tmp_path / "out")
    assert find("evaluate", tmp_path / "run", *words)["model.path"]["says"] == str(saved / part)
    assert find("evaluate", tmp_path / "run", "--label", 4, *words, status=1)["model.path"]["standing"] == "fails"
    assert find(*grpo(tmp_path / "run"), status=int(part != "actor"))["settings"]["standing"] == "ok"


def test_words_that_name_no_recipe_are_no_finding(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["doctor", str(tmp_path / "a.yaml")]) == 2
    assert capsys.readouterr().err.startswith("doctor: nothing says which recipe ")


@pytest.mark.parametrize(
    ("flags", "name", "says", "fix"),
    [
        ("--model.path nowhere/at/all", "model.path", "there is no model folder 'nowhere/at/all'.", ""),
        ("--env guess_numbr", "env", "Did you mean 'guess_number'?", ""),
        ("--group-size 0", "settings", "group_size = 0", ""),
        ("--model.device cuda", "model.device", "cuda: there is no GPU here.", "Set it to auto or cpu."),
        ("--sampler vllm", "sampling.sampler", "vllm is not installed.", "Run: pip install 'echelon[vllm]'"),
        ("--sampler ray", "sampling.sampler", "ray is not installed.", "Run: pip install 'echelon[ray]'"),
        (
            "--sampler server --sampling.server.url http://node:8000 --sampling.server.folder weights",
            "sampling.sampler",
            "httpx2 is not installed.",
            "Run: pip install 'echelon[endpoint]'",
        ),
        ("--policy.optim.name adamw_8bit", "policy.optim.name", "adamw_8bit: it needs a GPU", "Use adamw"),
        ("--model.attention flash_attention_2", "model.attention", "flash-attn is not installed.", "Use sdpa"),
        ("--reward math", "reward", "math_verify is not installed.", "Run: pip install 'echelon[math]'"),
    ],
)
def test_what_cannot_work_says_why_and_what_to_do(
    find: Find, model: Path, monkeypatch: pytest.MonkeyPatch, flags: str, name: str, says: str, fix: str
) -> None:
    missing = ("vllm", "ray", "httpx2", "flash_attn", "math_verify")
    there = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in missing else there(name))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = find(*grpo(model, *flags.split()), status=1)[name]
    assert found["standing"] == "fails"
    assert says in found["says"]
    assert fix in found["fix"]


def test_rows_are_looked_for(find: Find, model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    paths = [tmp_path / "rows.jsonl", tmp_path / "none.jsonl"]
    assert find("sft", "--model.path", model, "--data.path", paths[0])["data.path"]["standing"] == "ok"
    found = find("sft", "--model.path", model, "--data.path", paths[1], status=1)["data.path"]
    assert found["says"] == f"there is no file '{paths[1]}'."


def test_a_model_of_the_hub_is_fetched_unless_that_is_forbidden(
    find: Find, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = find(*grpo(Path("nobody/nothing")), status=1)["model.path"]
    assert found["says"].endswith("and HF_HUB_OFFLINE forbids to fetch it.")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    found = find(*grpo(Path("nobody/nothing")))["model.path"]
    assert (found["standing"], found["says"]) == (
        "note",
        "nobody/nothing is not on this machine: it will be fetched from the hub",
    )


def test_a_key_that_is_not_set_is_noted_by_the_name_of_its_variable(
    find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    asks = ["evaluate", "--env", "guess_number", "--policy", "api", "--api", "url=http://localhost:1/v1", "model=m"]
    found = find(*asks, "key_env=MY_KEY", "--out", "runs")
    assert found["api.key_env"]["says"] == "the variable MY_KEY is not set: no key is sent."
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    found = find(*asks, "key_env=MY_KEY", "--out", "runs")
    assert "api.key_env" not in found
    assert "sk-very-secret" not in json.dumps(found)


def test_weights_are_counted_without_loading_them_and_compared_with_the_room(
    find: Find, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = tiny(["yes no"], vocab_size=270, hidden=32, layers=1, heads=2)
    count = count_parameters(module)
    (model / "model.safetensors").rename(model / "away")
    assert doctor.weights_of(SimpleNamespace(path=str(model))) == count
    (model / "away").rename(model / "model.safetensors")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for free, standing in ((3 * count, "fails"), (5 * count, "note"), (17 * count, "ok")):
        monkeypatch.setattr(doctor, "host_memory", lambda free=free: (2**40, free))
        assert find(*grpo(model), status=int(standing == "fails"))["room"]["standing"] == standing
    monkeypatch.setattr(doctor, "host_memory", lambda: (2**40, 5 * count))
    assert find(*grpo(model, "--lora.rank", 4))["room"]["standing"] == "ok", "an adapter adds little"


def test_versions_other_than_those_that_are_tested_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, find: Find
) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text("# tested\nnumpy==0.1 # old\ntorch>=2\n\n")
    monkeypatch.setattr(doctor, "CONSTRAINTS", file)
    assert doctor.tested_versions() == {"numpy": "0.1"}
    found = find()
    assert found["numpy"]["standing"] == "note"
    assert found["numpy"]["says"].endswith("; tested with 0.1")
    assert found["torch"]["standing"] == "ok"


def test_what_is_missing_matters_to_whoever_asks_for_it_but_the_core_to_all(
    monkeypatch: pytest.MonkeyPatch, find: Find
) -> None:
    def none(name: str) -> str:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", none)
    found = find(status=1)
    assert found["extra vllm"] == {
        "standing": "note",
        "says": "not installed:",
        "fix": "pip install 'echelon[vllm]'",
    }
    assert found["torch"]["standing"] == "fails"


def test_walls_that_are_missing_and_ports_that_cannot_be_opened_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echelon.sandbox.walls", lambda: ("Landlock", "a network namespace"))
    assert doctor._sandbox().line == (
        "without Landlock, a network namespace: programs are limited and not walled in. There, run only programs you "
        "have read."
    )

    def fails() -> tuple[str, ...]:
        raise ProgramError("it crashed")

    monkeypatch.setattr("echelon.sandbox.walls", fails)
    assert doctor._sandbox().says.startswith("it does not start (it crashed)")

    def refused(*_: object) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(doctor.socket, "socket", refused)
    assert doctor._port().standing == "note"


def test_a_folder_that_cannot_be_written_fails_and_little_room_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda place, how: False)
    assert doctor._disk(tmp_path / "a" / "b").says == f"{tmp_path} cannot be written."
    monkeypatch.undo()
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**30))
    assert doctor._disk(tmp_path).line.startswith(f"1.0 GiB free in {tmp_path}: large checkpoints have no room.")


def test_the_memory_of_a_container_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   2048 kB"}
    monkeypatch.setattr(doctor, "_read", lambda file: files.get(file, ""))
    assert doctor.host_memory()[1] == 2048 * 1024
    files |= {"/sys/fs/cgroup/memory.max": "4000", "/sys/fs/cgroup/memory.current": "1000"}
    assert doctor.host_memory() == (4000, 3000)
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert doctor.host_memory()[1] == 2048 * 1024


def test_a_terminal_gets_a_table_and_a_pipe_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [doctor.Finding("a", "ok", "fine"), doctor.Finding("bc", "fails", "gone.", "Get it.")]
    doctor._print(found, as_json=False)
    assert capsys.readouterr().out == "  a   fine\n  bc  cannot work: gone. Get it.\nOne of these cannot work.\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    doctor._print(found, as_json=False)
    out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert [line.split() for line in out.splitlines()[:2]] == [
        ["a", "fine"],
        ["bc", "cannot", "work:", "gone.", "Get", "it."],
    ]
