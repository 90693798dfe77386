"""Class defaults < YAML files < flags, one set of checks for all, one line for every mistake."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.config import ModelConfig, OptimConfig, RunConfig, SamplingConfig, Settings, demand, require
from echelon.config.loading import load, to_yaml
from echelon.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """A recipe's settings, with one field of every kind."""

    env: str
    """Environment."""
    env_settings: Settings = field(default_factory=dict)
    """Its settings."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model."""
    optim: OptimConfig = OptimConfig(lr=3e-4)
    """Optimizer."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling."""
    group_size: int = 4
    """Siblings."""
    scale: Literal["none", "std", 1] = "std"
    """Scale."""
    limit: float | None = None
    """Limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        demand(self, "group_size", self.group_size >= 2, "GRPO compares siblings, so it needs at least 2.")


NEEDED = ("--out", "runs/x", "--env", "maze")


def resolve(tmp_path: Path, *texts: str, flags: tuple[str, ...] = ()) -> Config:
    """Load files a.yaml, b.yaml, … with these texts, then flags."""
    files = [tmp_path / f"{name}.yaml" for name in "abc"[: len(texts)]]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    return load(Config, files, (*NEEDED, *flags))


def complaint(tmp_path: Path, *texts: str, flags: tuple[str, ...] = ()) -> str:
    """The message of the ConfigError, without the folder the files are in."""
    with pytest.raises(ConfigError) as caught:
        resolve(tmp_path, *texts, flags=flags)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_with_no_file_and_no_flag_more_than_needed_the_defaults_stand() -> None:
    assert load(Config, flags=NEEDED) == Config(out="runs/x", env="maze")


def test_later_files_win_and_flags_win_over_files_key_by_key(tmp_path: Path) -> None:
    first = "optim: {lr: 0.1, eps: 1e-5}\nseed: 1\ngroup_size: 8"
    second = "optim: {lr: 0.2}\nseed: 2"
    config = resolve(tmp_path, first, second, flags=("--optim.lr", "0.3"))
    assert (config.optim.lr, config.optim.eps, config.seed, config.group_size) == (0.3, 1e-5, 2, 8)


def test_a_setting_with_a_dot_in_one_file_and_in_its_block_in_the_next_is_no_repetition(tmp_path: Path) -> None:
    first, second = "model.path: a\noptim.lr: 0.1\noptim: {eps: 1e-5}", "model: {path: b}\noptim: {lr: 0.2}"
    config = resolve(tmp_path, first, second)
    assert (config.model.path, config.optim.lr, config.optim.eps) == ("b", 0.2, 1e-5)
    config = resolve(tmp_path, second, first, flags=("--model.path", "c"))
    assert (config.model.path, config.optim.lr) == ("c", 0.1)


def test_a_block_keeps_the_defaults_the_recipe_gave_it(tmp_path: Path) -> None:
    config = resolve(tmp_path, "optim: {weight_decay: 0.1}")
    assert config.optim == OptimConfig(lr=3e-4, weight_decay=0.1)


def test_free_settings_merge_key_by_key_and_have_their_yaml_meaning(tmp_path: Path) -> None:
    text = "env_settings: {things: 10, split: hard, rate: 1e-3}"
    flags = ("--env-settings", "things=20", "chain=true", "name=7 dwarfs", "empty=", "day=2026-01-02")
    assert resolve(tmp_path, text, flags=flags).env_settings == {
        "things": 20,
        "split": "hard",
        "rate": 0.001,
        "chain": True,
        "name": "7 dwarfs",
        "empty": "",
        "day": "2026-01-02",
    }


def test_free_settings_add_to_what_the_recipe_has() -> None:
    @dataclass(frozen=True)
    class Small:
        free: Settings = field(default_factory=lambda: {"a": 1, "b": 2})

    assert load(Small, flags=("--free", "b=3")).free == {"a": 1, "b": 3}


def test_an_empty_file_and_an_empty_block_change_nothing(tmp_path: Path) -> None:
    assert resolve(tmp_path, "", "# nothing yet\n", "optim:\nenv_settings:\n") == Config(out="runs/x", env="maze")


@pytest.mark.parametrize(("text", "lr"), [("1", 1.0), ("1e-3", 0.001), ("1.5E2", 150.0), (".5", 0.5), ("2.", 2.0)])
def test_every_way_to_write_a_number_is_a_float(tmp_path: Path, text: str, lr: float) -> None:
    in_file, by_flag = resolve(tmp_path, f"optim: {{lr: {text}}}"), resolve(tmp_path, flags=("--optim.lr", text))
    assert in_file == by_flag
    assert in_file.optim.lr == lr
    assert type(in_file.optim.lr) is float


@pytest.mark.parametrize("text", ["no", "on", "1:30", "010", "2026-01-02", "=", "<<", "1_000_", "0x10"])
def test_only_numbers_true_false_and_null_are_not_text(tmp_path: Path, text: str) -> None:
    assert resolve(tmp_path, f"env_settings: {{a: {text}}}").env_settings == {"a": text}


@pytest.mark.parametrize(
    ("flags", "resume"),
    [((), False), (("--resume",), True), (("--resume", "true"), True), (("--resume", "--no-resume"), False)],
)
def test_flags_of_yes_or_no_need_no_value(flags: tuple[str, ...], resume: bool) -> None:
    assert load(Config, flags=(*NEEDED, *flags)).resume is resume


def test_flags_may_be_written_with_equals_and_underscores_and_repeated() -> None:
    config = load(Config, flags=(*NEEDED, "--group_size=6", "--seed", "1", "--seed=2", "--sampling.max-tokens=9"))
    assert (config.group_size, config.seed, config.sampling.max_tokens) == (6, 2, 9)


def test_text_takes_words_as_they_are() -> None:
    config = load(
        Config, flags=("--out=--odd", "--env", "12", "--model.path", "null", "--sampling.stop", "a b", "3", "\n")
    )
    assert (config.out, config.env, config.model.path) == ("--odd", "12", "null")
    assert config.sampling.stop == ("a b", "3", "\n")


def test_lists_choices_and_optional_values() -> None:
    flags = ("--optim.betas", "0.8", "1e-1", "--scale", "1", "--limit", "3", "--sampling.stop")
    config = load(Config, flags=(*NEEDED, *flags))
    assert (config.optim.betas, config.scale, config.limit, config.sampling.stop) == ((0.8, 0.1), 1, 3.0, ())
    assert load(Config, flags=(*NEEDED, *flags, "--limit", "null")).limit is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group_sise: 3", "a.yaml: unknown key 'group_sise'. Did you mean 'group_size'?"),
        ("optim: {lrr: 1}", "a.yaml: unknown key 'optim.lrr'. Did you mean 'optim.lr'?"),
        ("lr: 1", "a.yaml: unknown key 'lr'. Did you mean 'optim.lr'?"),
        ("optimm: {lr: 1}", "a.yaml: unknown key 'optimm'. Did you mean 'optim'?"),
        ("zebra: 1", "a.yaml: unknown key 'zebra'."),
        ("1: 1", "a.yaml: unknown key '1'."),
        ("optim: {lr: fast}", "a.yaml: optim.lr = fast: expected a number."),
        ("optim: {lr: true}", "a.yaml: optim.lr = true: expected a number."),
        ("optim: {lr: [1]}", "a.yaml: optim.lr = [1]: expected a number."),
        ("optim: {lr: }", "a.yaml: optim.lr = null: expected a number."),
        ("optim: 3", "a.yaml: optim = 3: expected keys and values under it."),
        ("seed: true", "a.yaml: seed = true: expected a whole number."),
        ("seed: 1.0", "a.yaml: seed = 1.0: expected a whole number."),
        ("resume: 1", "a.yaml: resume = 1: expected true or false."),
        ("model: {path: 12}", "a.yaml: model.path = 12: expected text. Put it in quotes."),
        ("sampling: {stop: end}", "a.yaml: sampling.stop = end: expected a list, each text."),
        ("sampling: {stop: [1]}", "a.yaml: sampling.stop = [1]: expected a list, each text."),
        ("optim: {betas: [1]}", "a.yaml: optim.betas = [1]: expected a list of 2: a number, a number."),
        ("limit: none", "a.yaml: limit = none: expected a number or null."),
        ("scale: true", "a.yaml: scale = true: expected one of none, std, 1."),
        (
            "optim: {schedule: cosin}",
            "a.yaml: optim.schedule = cosin: expected one of constant, linear, cosine. Did you mean 'cosine'?",
        ),
        (
            "env_settings: {a: [1]}",
            "a.yaml: env_settings.a = [1]: expected true or false, a whole number, a number or text.",
        ),
        ("- seed", "a.yaml: [seed]: expected keys and values."),
        ("seed: 1\nseed: 2", "a.yaml: line 2: 'seed' is set twice."),
        (
            "model.path: a\nmodel: {path: b}",
            "a.yaml: 'model.path' is set twice, in a block and with a dot. Keep one of the two.",
        ),
        (
            "env_settings: {a: 1}\noptim: {lr: 1}\noptim.lr: 1",
            "a.yaml: 'optim.lr' is set twice, in a block and with a dot. Keep one of the two.",
        ),
        ("seed: [1", "a.yaml: line 1: expected ',' or ']', but got '<stream end>'."),
        ("seed: 1\n  env: 2", "a.yaml: line 2: mapping values are not allowed here."),
        ("seed: *one", "a.yaml: line 1: found undefined alias 'one'."),
        ("? [1]\n: 2", "a.yaml: line 1: found unhashable key."),
        ("seed: !!python/name:os.system", "a.yaml: line 1: could not determine a constructor for the tag "),
        ("seed: \x01", "a.yaml: not YAML: unacceptable character #x0001: special characters are not allowed in "),
    ],
)
def test_what_a_file_can_get_wrong(tmp_path: Path, text: str, message: str) -> None:
    found = complaint(tmp_path, text)
    assert found.startswith(message) if message.endswith(" ") else found == message


def test_the_file_named_is_the_one_that_is_wrong(tmp_path: Path) -> None:
    assert complaint(tmp_path, "seed: 1", "seed: x", "seed: 2") == "b.yaml: seed = x: expected a whole number."


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("grop.yaml", "grop.yaml: no such file. Did you mean 'grpo.yaml'?"),
        ("nowhere/a.yaml", "nowhere/a.yaml: no such file."),
        ("grpo.yaml", "grpo.yaml: not a text file (byte 3 is not UTF-8)."),
        (".", ".: cannot be read: Is a directory."),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, message: str) -> None:
    (tmp_path / "grpo.yaml").write_bytes(b"a: \xff")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(Config, [file])
    assert str(caught.value) == message


@dataclass(frozen=True, kw_only=True)
class Levels(RunConfig):
    """Settings of two levels, each of which samples."""

    low: Config
    """One level."""
    sampling: SamplingConfig = SamplingConfig()
    """How the other one samples."""


def test_the_sampler_is_said_once_for_all_levels_and_again_for_one() -> None:
    needed = ("--out", "x", "--low.out", "y", "--low.env", "maze", "--sampler", "vllm")
    levels = load(Levels, (), needed)
    assert (levels.sampling.sampler, levels.low.sampling.sampler) == ("vllm", "vllm")
    levels = load(Levels, (), (*needed, "--low.sampling.sampler", "local"))
    assert (levels.sampling.sampler, levels.low.sampling.sampler) == ("vllm", "local")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--sampler", "vlm"),
            "--sampling.sampler vlm: expected one of local, vllm, ray, server. Did you mean 'vllm'?",
        ),
        (
            ("--sampler", "vllm", "--sampling.temperature", "2.5"),
            "sampling.temperature = 2.5: vLLM draws at 0.01 to 2. Give one of those, or use sampler = local.",
        ),
        (
            ("--sampling.sleep",),
            "sampling.sleep = true: the local engine holds no memory of its own to give back. Use sampler = vllm, or "
            "leave it out.",
        ),
        (
            ("--sampling.adapters", "apart"),
            "sampling.adapters = apart: only vLLM here or as a server takes an adapter by itself. Use sampler = vllm "
            "or server, or leave it out.",
        ),
        (
            ("--sampler", "server"),
            "sampling.server.url is missing: nobody could be asked. Give one such as http://localhost:8000.",
        ),
        (
            ("--sampler", "server", "--sampling.server.url", "http://node:8000"),
            "sampling.server.folder is missing: no weights could reach it. Give one that both machines see.",
        ),
        (
            ("--sampling.server.url", "node:8000"),
            "sampling.server.url = node:8000: a server is asked over HTTP. Give one such as http://localhost:8000.",
        ),
        (
            ("--sampling.server.url", "http://node:8000/v1"),
            "sampling.server.url = http://node:8000/v1: what is asked there is not below /v1. Leave that out.",
        ),
        (("--rollout-workers", "0"), "sampling.ray.workers = 0: nobody would draw. Give 1 or more."),
        (
            ("--sampling.ray.gpus", "1.5"),
            "sampling.ray.gpus = 1.5: one device can be shared, several cannot. Give a whole number, or less than 1.",
        ),
        (
            ("--sampler", "ray", "--sampling.ray.engine", "vllm", "--sampling.temperature", "2.5"),
            "sampling.temperature = 2.5: vLLM draws at 0.01 to 2. Give one of those, or use sampler = local.",
        ),
        (("--group-sise", "1"), "unknown flag '--group-sise'. Did you mean '--group-size'?"),
        (("--optim.lrr", "1"), "unknown flag '--optim.lrr'. Did you mean '--optim.lr'?"),
        (("--lr", "1"), "unknown flag '--lr'. Did you mean '--optim.lr'?"),
        (("--optim", "1"), "unknown flag '--optim'. Did you mean '--optim.name'?"),
        (("--zebra",), "unknown flag '--zebra'."),
        (("--no-seed",), "unknown flag '--no-seed'. Did you mean '--seed'?"),
        (("--optim.lr", "fast"), "--optim.lr fast: expected a number."),
        (("--optim.lr=",), "--optim.lr: expected a number."),
        (("--seed",), "--seed: expected a whole number after it."),
        (("--seed", "1.5"), "--seed 1.5: expected a whole number."),
        (("--seed", "a\nb"), "--seed a b: expected a whole number."),
        (("--seed", "1", "b.yaml"), "unexpected 'b.yaml' after --seed 1. Settings files come before the flags."),
        (("--resume", "b.yaml"), "--resume b.yaml: expected true or false."),
        (("--scale", "sdt"), "--scale sdt: expected one of none, std, 1. Did you mean 'std'?"),
        (("--optim.betas", "1"), "--optim.betas 1: expected a list of 2: a number, a number."),
        (("--env-settings", "things"), "--env-settings things: expected key=value."),
        (("--env-settings",), "--env-settings: expected key=value."),
    ],
)
def test_what_a_flag_can_get_wrong(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    assert complaint(tmp_path, flags=flags) == message


def test_flags_begin_with_two_dashes() -> None:
    with pytest.raises(ConfigError, match=r"^unexpected '-s'. Flags look like --key value.$"):
        load(Config, flags=("-s", "3"))


def test_a_setting_that_nothing_sets_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"^env is missing: nothing sets it. Put it in a settings file, or give --env.$"
    ):
        load(Config, flags=("--out", "x"))
    with pytest.raises(ConfigError, match=r"^model.path is missing: .* or give --model.path.$"):
        require(Config(out="x", env="maze"), "env", "model.path")
    with pytest.raises(ConfigError, match=r"^out is missing: "):
        load(Config, flags=("--out=", "--env", "maze"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--group-size", "1"), "group_size = 1: GRPO compares siblings, so it needs at least 2."),
        (("--optim.lr", "-1"), "optim.lr = -1.0: a step length is finite and not negative. Try 1e-3 or less."),
        (("--optim.lr", ".nan"), "optim.lr = .nan: a step length is finite and not negative. Try 1e-3 or less."),
        (
            ("--optim.betas", "0.9", "1"),
            "optim.betas = [0.9, 1.0]: running means need decays from 0 up to, not including, 1. Try 0.9 and 0.999.",
        ),
        (("--sampling.stop", ""), "sampling.stop = ['']: every text contains the empty text. Leave it out."),
        (("--keep-last", "0"), "keep_last = 0: a run with no checkpoint cannot be resumed. Keep at least 1."),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_the_reason(
    tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    assert complaint(tmp_path, flags=flags) == message


@pytest.mark.parametrize(
    ("block", "values"),
    [
        (OptimConfig, {"lr": -1.0, "weight_decay": -0.1, "betas": (0.9, -0.1), "eps": 0.0, "max_grad_norm": -1.0}),
        (OptimConfig, {"warmup_steps": -1, "final_lr_fraction": 1.1}),
        (SamplingConfig, {"temperature": 0.0, "max_tokens": 0, "max_prompt_tokens": 0, "stop": ("",)}),
        (ModelConfig, {"device": ""}),
    ],
)
def test_every_rule_of_every_block_names_its_field(block: type, values: dict[str, object]) -> None:
    for name, value in values.items():
        with pytest.raises(ConfigError, match=rf"^{name} = "):
            block(**{name: value})


def test_rules_are_checked_once_and_on_the_merged_values(tmp_path: Path) -> None:
    seen = []

    @dataclass(frozen=True)
    class Two:
        low: int = 0
        high: int = 1

        def __post_init__(self) -> None:
            seen.append((self.low, self.high))
            demand(self, "low", self.low < self.high, "the low end lies below the high end.")

    (tmp_path / "a.yaml").write_text("low: 5")
    assert load(Two, [tmp_path / "a.yaml"], ["--high", "6"]) == Two(5, 6)
    assert seen[0] == (5, 6)
    assert len(seen) == 2  # the second is the one written out in the assertion


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    config = Config(
        out="no",
        env="1e-3",
        env_settings={"a": "true", "b": True, "c": "2026-01-02", "d": -0.0, "e": "", "f": "x: y # z", "g": 1e-9},
        sampling=SamplingConfig(stop=("\n", "null", "- a", "'", "é")),
        optim=OptimConfig(betas=(0.0, 0.95), eps=1e-8, max_grad_norm=1e300),
        limit=float("inf"),
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(Config, [tmp_path / "config.yaml"]) == config
    assert yaml.safe_load(to_yaml(config))["optim"]["betas"] == [0.0, 0.95]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.dictionaries(st.text(min_size=1), st.text() | st.booleans() | st.integers() | st.floats(allow_nan=False)),
    st.lists(st.text(min_size=1)),
)
def test_any_text_and_any_number_survive_a_file(
    tmp_path_factory: pytest.TempPathFactory, free: dict[str, str | bool | int | float], stop: list[str]
) -> None:
    config = Config(out="x", env="y", env_settings=free, sampling=SamplingConfig(stop=tuple(stop)))
    file = tmp_path_factory.mktemp("round") / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8", newline="")
    again = load(Config, [file])
    assert again == config
    assert {key: type(value) for key, value in again.env_settings.items()} == {k: type(v) for k, v in free.items()}
