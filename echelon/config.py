"""Settings: the blocks recipes share, and the strict road from files and flags to one frozen object.

A recipe's `Config` is a frozen dataclass of numbers, text, tuples, free mappings and blocks like those below. `load`
resolves it: class defaults < YAML files, left to right < flags. Files and flags go through the same checks, every
complaint is one line, and `__post_init__` runs once, on the merged values. Knows no model and no environment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import itertools
import math
import operator
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro
import yaml

from echelon.errors import ConfigError, did_you_mean, need

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
Scalar = bool | int | float | str
Settings = Annotated[dict[str, Scalar], tyro.conf.arg(metavar="[KEY=VALUE ...]")]
"""Free keyword settings for something chosen by name: `env_settings: Settings = field(default_factory=dict)`.

A mapping in YAML; `--env-settings things=10 chain=true` on the command line. Later sources add keys and replace values.
"""


def demand(config: object, name: str, holds: bool, because: str) -> None:
    """Raise ConfigError `name = value: because` unless the rule holds. `because` says why it fails and what to do."""
    if not holds:
        raise ConfigError(f"{name} = {_show(operator.attrgetter(name)(config))}: {because}")


def require(config: object, *names: str) -> None:
    """Raise ConfigError for the first of these settings that is still empty, e.g. `require(self, "model.path")`."""
    for name in names:
        if operator.attrgetter(name)(config) in ("", ()):
            raise _missing(name)


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is held in memory."""

    path: str = ""
    """Model folder or hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. Log-probabilities and losses are float32 whatever this is."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation."""
    device: str = "auto"
    """Where it lives: cpu, cuda, cuda:1, …; auto takes an accelerator if there is one."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of layers while learning and compute the rest again: less memory, a third more time."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Hold the weights in fewer bits, frozen, for an adapter to learn on (QLoRA, arXiv 2305.14314). Needs a GPU."""

    def __post_init__(self) -> None:
        demand(self, "device", self.device != "", "a model has to live somewhere. Give cpu, cuda or auto.")


@dataclass(frozen=True)
class OptimConfig:
    """An optimizer and its schedule."""

    name: Literal["adamw", "adafactor", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """The optimizer. adafactor keeps sums of rows and columns only, and no betas; those with bits or pages come from
    bitsandbytes and need a GPU: their state takes a quarter of the memory, or moves out when there is none left."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    decay: Literal["all", "matrices"] = "all"
    """What decays: all weights, or all but biases and the scales of norms."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean of the gradient, and of its square."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to this norm; 0 leaves them alone."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate moves from its peak to its final value, after warming up."""
    warmup_steps: int = 0
    """Steps during which the learning rate rises linearly from zero."""
    warmup_fraction: float = 0.0
    """The same as a part of all steps, in place of warmup_steps."""
    final_lr_fraction: float = 0.0
    """Where a decaying schedule ends, as a part of the peak."""

    def __post_init__(self) -> None:
        demand(self, "lr", 0 <= self.lr < math.inf, "a step length is finite and not negative. Try 1e-3 or less.")
        demand(
            self, "weight_decay", 0 <= self.weight_decay < math.inf, "weights would explode. Give 0 or a little more."
        )
        averages = all(0 <= beta < 1 for beta in self.betas)
        demand(self, "betas", averages, "running means need decays from 0 up to, not including, 1. Try 0.9 and 0.999.")
        demand(
            self, "eps", 0 < self.eps < math.inf, "it guards against division by zero. Give a small positive number."
        )
        demand(
            self, "max_grad_norm", self.max_grad_norm >= 0, "a norm is not negative. Give 0 to leave gradients alone."
        )
        demand(self, "warmup_steps", self.warmup_steps >= 0, "steps are counted from 0. Give 0 to start at the peak.")
        demand(self, "warmup_fraction", 0 <= self.warmup_fraction <= 1, "it is a part of the steps. Give 0 to 1.")
        once = not (self.warmup_steps and self.warmup_fraction)
        demand(self, "warmup_fraction", once, "warmup_steps says how long it takes too. Keep one of the two.")
        demand(self, "final_lr_fraction", 0 <= self.final_lr_fraction <= 1, "it is a part of lr. Give 0 to 1.")


@dataclass(frozen=True)
class RayConfig:
    """Engines in processes of their own, on this machine or on others, that draw for `sampler = ray`."""

    workers: int = 2
    """How many there are, for all levels whose settings of them are the same: each holds the models of all. On the
    command line, `--rollout-workers` says it for all levels."""
    engine: Literal["local", "vllm"] = "local"
    """What each of them runs."""
    address: str = ""
    """The cluster to join: host:port, or auto for the one that runs on this machine. Without it, that of RAY_ADDRESS;
    else the run starts one of its own, on this machine."""
    cpus: int = 1
    """Threads of each worker, and cores it books on a cluster that is joined."""
    gpus: float = 0.0
    """GPUs of each worker; with less than 1, several share one. Without, it computes on the CPU."""
    in_flight: int = 256
    """Most requests that one worker answers at once; more wait here."""
    timeout: float = 600.0
    """Seconds within which a request is answered. A worker that takes longer is replaced."""

    def __post_init__(self) -> None:
        demand(self, "workers", self.workers >= 1, "nobody would draw. Give 1 or more.")
        demand(self, "cpus", self.cpus >= 1, "a worker computes on a core at least. Give 1 or more.")
        demand(self, "gpus", 0 <= self.gpus < math.inf, "devices are counted. Give 1, or 0 for the CPU.")
        whole = self.gpus <= 1 or self.gpus == int(self.gpus)
        demand(self, "gpus", whole, "one device can be shared, several cannot. Give a whole number, or less than 1.")
        demand(self, "in_flight", self.in_flight >= 1, "nothing could be asked. Give 256.")
        demand(self, "timeout", 0 < self.timeout < math.inf, "an answer takes time. Give 600.")


@dataclass(frozen=True)
class ServerConfig:
    """A running `vllm serve` that draws for `sampler = server`."""

    url: str = ""
    """Where it answers, such as http://node3:8000."""
    folder: str = ""
    """A folder that this process writes new weights to and the server reads them from, under the same name on both
    machines. Each set is removed once the server has read it."""
    timeout: float = 600.0
    """Seconds within which it answers, or has read new weights."""
    in_flight: int = 256
    """Most requests that it is sent at once; more wait here."""

    def __post_init__(self) -> None:
        begins = not self.url or self.url.startswith(("http://", "https://"))
        demand(self, "url", begins, "a server is asked over HTTP. Give one such as http://localhost:8000.")
        because = "what is asked there is not below /v1. Leave that out."
        demand(self, "url", not self.url.rstrip("/").endswith("/v1"), because)
        demand(self, "timeout", 0 < self.timeout < math.inf, "an answer takes time. Give 600.")
        demand(self, "in_flight", self.in_flight >= 1, "nothing could be asked. Give 256.")


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn for training: from the full distribution, so their log-probabilities are the policy's.

    Cutting the tail (top-k, top-p) gives some tokens probability zero and spoils the ratio between new and old policy:
    it belongs to evaluation.
    """

    temperature: float = 1.0
    """Divides the logits, in sampling and in training alike."""
    max_tokens: int = 32
    """Longest completion, in tokens."""
    max_prompt_tokens: int = 1024
    """Longest prompt, in tokens."""
    stop: tuple[str, ...] = ()
    """A completion ends as soon as its text contains one of these."""
    cache_tokens: int = 0
    """Most tokens whose keys and values the engine keeps; 0 takes what fits a quarter of the memory."""
    sampler: Literal["local", "vllm", "ray", "server"] = "local"
    """Who draws: the engine that reads the weights as they learn; vLLM, which is given them after every step; engines
    in other processes, which Ray carries them to; or a vLLM server that runs elsewhere. On the command line,
    `--sampler` says it for all levels."""
    sleep: bool = False
    """vLLM gives its memory on the accelerator back while weights learn."""
    adapters: Literal["folded", "apart"] = "folded"
    """What vLLM is given of a model with an adapter: whole weights, with the adapter folded into them; or, apart, the
    weights below it once and after every step the adapter alone. Levels whose adapters are apart and on one base share
    one vLLM."""
    ray: RayConfig = RayConfig()
    """Those other processes."""
    server: ServerConfig = ServerConfig()
    """That server."""

    def __post_init__(self) -> None:
        demand(self, "temperature", 0 < self.temperature < math.inf, "training draws at random. Give 1, or near it.")
        demand(self, "cache_tokens", self.cache_tokens >= 0, "memory is not negative. Give 0 for what fits.")
        demand(self, "max_tokens", self.max_tokens >= 1, "a completion has at least one token. Give 1 or more.")
        demand(self, "max_prompt_tokens", self.max_prompt_tokens >= 1, "nothing could be asked. Give 1 or more.")
        demand(self, "stop", "" not in self.stop, "every text contains the empty text. Leave it out.")
        by_vllm = self.sampler in ("vllm", "server") or (self.sampler == "ray" and self.ray.engine == "vllm")
        drawn = not by_vllm or 0.01 <= self.temperature <= 2
        demand(self, "temperature", drawn, "vLLM draws at 0.01 to 2. Give one of those, or use sampler = local.")
        because = "the local engine holds no memory of its own to give back. Use sampler = vllm, or leave it out."
        demand(self, "sleep", not self.sleep or self.sampler == "vllm", because)
        if self.sampler == "server" and not self.server.url:
            raise ConfigError("server.url is missing: nobody could be asked. Give one such as http://localhost:8000.")
        if self.sampler == "server" and not self.server.folder:
            raise ConfigError("server.folder is missing: no weights could reach it. Give one that both machines see.")
        because = "only vLLM in this process takes an adapter by itself. Use sampler = vllm, or leave it out."
        demand(self, "adapters", self.adapters == "folded" or self.sampler == "vllm", because)


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter: small matrices that learn beside frozen weights (Hu et al., arXiv 2106.09685)."""

    rank: int = 0
    """Width of the small matrices; 0 trains all weights of the model instead."""
    alpha: float = 16.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Part of an adapter's inputs that is dropped while learning."""
    target: tuple[str, ...] = ("all-linear",)
    """Which layers get one: names of modules, or all-linear for every linear layer but the head."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full and saved with the adapter, such as lm_head or embed_tokens."""

    def __post_init__(self) -> None:
        demand(self, "rank", self.rank >= 0, "it is a width. Give 8 or 16, or 0 to train all weights.")
        demand(self, "alpha", 0 < self.alpha < math.inf, "the adapter would do nothing, or anything. Give 16.")
        demand(self, "dropout", 0 <= self.dropout < 1, "it is a part of the inputs. Give 0 to 0.5.")
        demand(self, "target", bool(self.target), "an adapter sits somewhere. Give all-linear or names of modules.")
        because = "the name all-linear stands alone. Leave out the other names."
        demand(self, "target", "all-linear" not in self.target or len(self.target) == 1, because)


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from: files, folders or hub ids, mixed, cut and split in a way that a rerun repeats exactly."""

    path: tuple[str, ...] = ()
    """Files (jsonl, json, csv, parquet, arrow), folders of them, or hub ids; several are mixed."""
    split: str = "train"
    """Split to read where a source has splits."""
    subset: str = ""
    """Configuration of a hub dataset, or a folder inside it (or inside a local folder), such as data/finetune."""
    weights: tuple[float, ...] = ()
    """Probability of each source; without it every row is as likely as any other."""
    limit: int = 0
    """Most rows taken; 0 takes all."""
    streaming: bool = False
    """Take `limit` rows from the beginning of a source without downloading the rest."""
    shuffle_buffer: int = 5000
    """Rows among which a streamed source is shuffled."""
    eval_path: tuple[str, ...] = ()
    """Sources of the rows held out; without it, eval_split or eval_fraction of path."""
    eval_split: str = ""
    """Split of the rows held out."""
    eval_fraction: float = 0.0
    """Part of path that is held out, chosen by a hash of each row, so that it never changes sides."""
    eval_limit: int = 0
    """Most rows held out; 0 takes all."""

    def __post_init__(self) -> None:
        demand(self, "path", "" not in self.path, "a source has a name. Give a file, a folder or a hub id.")
        demand(self, "split", self.split != "", "something has to be read. Give train.")
        fits = not self.weights or len(self.weights) == len(self.path)
        demand(self, "weights", fits, f"sources: {len(self.path)}. Give one weight for each, or none.")
        positive = all(0 < weight < math.inf for weight in self.weights)
        demand(self, "weights", positive, "a source of weight 0 would never be read. Leave such a source out.")
        for name in ("limit", "eval_limit"):
            demand(self, name, getattr(self, name) >= 0, "it counts rows. Give 0 to take all.")
        demand(self, "streaming", not self.streaming or self.limit > 0, "a stream may not end. Give a limit.")
        demand(self, "shuffle_buffer", self.shuffle_buffer >= 1, "it counts rows. Give 1 to keep their order.")
        demand(self, "eval_fraction", 0 <= self.eval_fraction < 1, "it is a part of the rows. Give 0 to 0.5.")
        held = [name for name in ("eval_path", "eval_split", "eval_fraction") if getattr(self, name)]
        one = "the rows held out come from one place. Keep one of eval_path, eval_split and eval_fraction."
        both = held == ["eval_path", "eval_split"]
        demand(self, held[-1] if held else "eval_path", len(held) <= 1 or both, one)


@dataclass(frozen=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl, which is always written."""

    to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that get every row of metrics; each needs its extra."""
    project: str = "echelon"
    """Project (experiment) under which trackers file the run."""
    name: str = ""
    """What trackers call the run; empty is the name of the run directory."""
    tokens: bool = True
    """Episodes say each token with its id and its log-probability. Off, episodes.jsonl takes a quarter of the room."""
    quiet: bool = False
    """Nothing on the console while it trains; errors are said all the same. `--quiet` does the same."""

    def __post_init__(self) -> None:
        demand(self, "to", len(set(self.to)) == len(self.to), "a tracker gets every row once. Name it once.")
        demand(self, "project", self.project != "", "trackers file runs under a name. Leave it out for echelon.")
        for tracker in self.to:  # here, before anything is written; each library is imported when the log opens
            if importlib.util.find_spec(tracker) is None:
                need(tracker, tracker)


@dataclass(frozen=True)
class DistConfig:
    """How several processes, the ranks that `torchrun` or `echelon launch` starts, train together. One process, started
    without them, reads none of it."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every rank has all of what learns, and gradients are summed. fsdp: every rank has a part of each weight, of
    its gradient and of the optimizer's state (FSDP2)."""
    reshard_after_forward: bool = True
    """Give the gathered weights of a layer back once its forward pass is done, and gather them again to go backward
    (fsdp): ZeRO-3. Off they stay until the backward passes are done: ZeRO-2, more memory and less communication."""
    cpu_offload: bool = False
    """Keep the parts of weights, gradients and optimizer state in the memory of the host (fsdp, on a GPU)."""
    compute_dtype: Literal["same", "bfloat16"] = "same"
    """What layers compute in while learning (fsdp); the parts stay in the type of model.dtype. same computes in it."""
    reduce_dtype: Literal["float32", "same"] = "float32"
    """What gradients are summed in, over micro-batches and over ranks (fsdp)."""
    reduce_every_pass: bool = False
    """Sum gradients over ranks after every micro-batch rather than after the last one (fsdp): more communication, and
    no rank holds whole gradients in between."""
    timeout: float = 1800.0
    """Seconds that a rank waits for the others before it gives up."""

    def __post_init__(self) -> None:
        sharded = self.strategy == "fsdp"
        for name in ("cpu_offload", "reduce_every_pass"):
            demand(self, name, sharded or not getattr(self, name), "only parts can be so. Set dist.strategy to fsdp.")
        because = "ddp computes in the type of the weights. Set model.dtype, or dist.strategy to fsdp."
        demand(self, "compute_dtype", sharded or self.compute_dtype == "same", because)
        demand(self, "timeout", 0 < self.timeout < math.inf, "others need time to arrive. Give 1800.")


@dataclass(frozen=True, kw_only=True)
class CommandConfig:
    """What every command has. A Config inherits it; its `__post_init__` calls `super().__post_init__()` first."""

    seed: int = 0
    """All randomness of the run derives from it."""
    threads: int = 0
    """CPU threads for tensor work; 0 takes one for each half million parameters, at most the cores there are."""
    dry_run: bool = False
    """Resolve the settings, print sizes and memory, and stop before any work."""

    def __post_init__(self) -> None:
        demand(self, "seed", self.seed >= 0, "seeds are not negative. Give 0 or more.")
        demand(self, "threads", self.threads >= 0, "threads are counted. Give 0 to have them chosen.")


@dataclass(frozen=True, kw_only=True)
class RunConfig(CommandConfig):
    """What every command has that learns step by step."""

    out: str
    """Run directory: checkpoints, metrics and episodes are written here."""
    resume: bool = False
    """Continue from the newest whole checkpoint in the run directory."""
    save_every: int = 50
    """Steps between checkpoints; 0 saves at the start and at the end only."""
    keep_last: int = 2
    """Checkpoints kept; older ones are deleted."""
    log: LogConfig = LogConfig()
    """Trackers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "out")
        demand(self, "save_every", self.save_every >= 0, "it counts steps. Give 0 to save at the end only.")
        demand(self, "keep_last", self.keep_last >= 1, "a run with no checkpoint cannot be resumed. Keep at least 1.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """The same for what several processes can learn together."""

    dist: DistConfig = DistConfig()
    """How the ranks of a run work together, where there are several."""


@dataclass(frozen=True, kw_only=True)
class PlayConfig(CommandConfig):
    """Where a policy that plays finds its tasks and its rewards: an environment, or prompts and rewards."""

    env: str = ""
    """The environment: a built-in name, path.py:Class, module:Class or tasks.yaml. Or else give data.path."""
    env_settings: Settings = field(default_factory=dict)
    """Settings of the environment."""
    trust_task_code: bool = False
    """Run Python that stands in a file of tasks (`--env tasks.yaml`), in the sandbox. Read it first."""
    data: DataConfig = DataConfig()
    """Prompts to answer once each, in place of an environment."""
    reward: tuple[str, ...] = ()
    """What completions earn, on top of what the environment gives: path.py:function, module:function, the folder of a
    reward model, or a check: math, number, choice or exact by the row's answer, code by its tests, a judge; or, of
    rows of a controller, format, imitation, imitation_discrete."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward; without it all weigh 1."""
    judge: Settings = field(default_factory=dict)
    """The endpoint that judges answers, where `reward` names judge: url, model, and more."""

    worth: ClassVar[tuple[str, ...]] = ("reward", "env")
    """Settings any of which says what an answer is worth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.env and not self.data.path:
            raise ConfigError(
                "env is missing: nothing says what to do. Give --env, or --data.path with prompts and --reward."
            )
        demand(self, "env", not (self.env and self.data.path), "data.path gives tasks too. Keep one of the two.")
        others = "".join(f" Or give {_flag(name)}." for name in self.worth if name not in ("reward", "env"))
        because = "nothing says what an answer is worth. Give math, code, path.py:function, or a reward model's folder."
        demand(self, "reward", any(getattr(self, name) for name in self.worth), because + others)
        because = "reward names a judge and nothing says where. Give url=… model=…."
        demand(self, "judge", "judge" not in self.reward or bool(self.judge), because)
        because = "nobody is asked to judge. Add judge to reward."
        demand(self, "judge", "judge" in self.reward or not self.judge, because)
        fits = not self.reward_weights or len(self.reward_weights) == len(self.reward)
        demand(self, "reward_weights", fits, f"rewards: {len(self.reward)}. Give one weight for each, or none.")
        finite = all(math.isfinite(weight) for weight in self.reward_weights)
        demand(self, "reward_weights", finite, "a weight is a finite number.")


@dataclass(frozen=True, kw_only=True)
class TaskConfig(PlayConfig, TrainConfig):
    """The same for a policy that learns by trying."""


def load(config: type[Config], files: Sequence[str | Path] = (), flags: Sequence[str] = ()) -> Config:
    """The settings of one run: class defaults, then each file in order, then flags; later ones win, key by key.

    Raises ConfigError, always one line, for an unreadable file, an unknown key or flag, a value of the wrong type, a
    missing setting, and whatever `__post_init__` refuses.
    """
    settings = _settings(config)
    given: dict[str, object] = {}
    for file in files:
        given.update(_from_tree(settings, _read(Path(file)), str(file)))
    given.update(_from_flags(settings, flags))
    return _build(config, given)


def overridden(config: Config, words: Sequence[str]) -> Config:
    """The same settings but for those given as `block.name=value`, checked like flags. Raises ConfigError."""
    flags = [f"--{word}" for word in words]
    return _build(type(config), dict(_from_flags(_settings(type(config)), flags)), config)


def to_yaml(config: DataclassInstance) -> str:
    """Every setting as YAML, in declaration order; `load` reads it back to an equal object."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


@functools.cache
def _kinds(config: type[DataclassInstance]) -> dict[str, Any]:
    """Name → type of the fields of one block."""
    hints = get_type_hints(config)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(config)}


def _settings(config: type[DataclassInstance], prefix: str = "") -> dict[str, Any]:
    """Dotted name → type of every setting, the blocks themselves included."""
    settings: dict[str, Any] = {}
    for name, kind in _kinds(config).items():
        settings[prefix + name] = kind
        if dataclasses.is_dataclass(kind):
            settings |= _settings(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
    return settings


def _build(config: type[Config], given: Mapping[str, object], default: object = MISSING, prefix: str = "") -> Config:
    """Construct the inner blocks, then the outer one; what is not given comes from `default` or from the class."""
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        name, kind = prefix + entry.name, _kinds(config)[entry.name]
        base = _class_default(entry) if default is MISSING else getattr(default, entry.name)
        if dataclasses.is_dataclass(kind):
            values[entry.name] = _build(kind, given, base, f"{name}.")  # type: ignore[arg-type]
        elif get_origin(kind) is dict:
            items = {key.removeprefix(f"{name}."): given[key] for key in given if key.startswith(f"{name}.")}
            values[entry.name] = {**({} if base is MISSING else base), **items}
        elif name in given or base is not MISSING:
            values[entry.name] = given.get(name, base)
        else:
            raise _missing(name)
    try:
        return config(**values)
    except ConfigError as error:  # it begins with the name of a field; say where the block sits
        raise ConfigError(f"{prefix}{error}") from error


def _class_default(entry: dataclasses.Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def _missing(name: str) -> ConfigError:
    return ConfigError(f"{name} is missing: nothing sets it. Put it in a settings file, or give {_flag(name)}.")


def _from_tree(
    settings: Mapping[str, Any], tree: Mapping[object, object], file: str, prefix: str = ""
) -> Iterator[tuple[str, object]]:
    """(dotted name, value of its type) for all that a YAML mapping sets."""
    around = settings.get(prefix.removesuffix("."))
    for key, value in tree.items():
        name = f"{prefix}{key}"
        kind = get_args(around)[1] if get_origin(around) is dict else settings.get(name)
        if kind is None:
            raise ConfigError(f"{file}: unknown key '{name}'.{_suggestion(name, settings)}")
        if dataclasses.is_dataclass(kind) or get_origin(kind) is dict:
            if not isinstance(value, Mapping | None):
                raise ConfigError(f"{file}: {name} = {_show(value)}: expected keys and values under it.")
            yield from _from_tree(settings, value or {}, file, f"{name}.")
        else:
            yield name, _checked(value, kind, f"{file}: {name} = {_show(value)}")


EVERYWHERE = {"--sampler": "sampling.sampler", "--rollout-workers": "sampling.ray.workers", "--quiet": "log.quiet"}
"""Flags that say one thing for every level: the setting that each block of that name gets."""


class _Word(str):
    """One word of the command line. It has the meaning YAML gives it where that fits, and else stands for itself."""


def _from_flags(settings: Mapping[str, Any], flags: Sequence[str]) -> Iterator[tuple[str, object]]:
    """(dotted name, value of its type) for all that flags set."""
    for flag, words in _spread(settings, _grouped(flags)):
        name = flag.removeprefix("--").replace("-", "_")
        positive = re.sub(r"(^|\.)no_", r"\1", name)
        kind, typed = settings.get(name), _show(" ".join([flag, *words]))
        if kind is None and settings.get(positive) is bool and not words:
            yield positive, False
        elif kind is None or dataclasses.is_dataclass(kind):
            raise ConfigError(f"unknown flag '{flag}'.{_suggestion(name, settings, shown=_flag)}")
        elif get_origin(kind) is dict:
            yield from _entries(name, flag, words, get_args(kind)[1])
        elif get_origin(kind) is tuple:
            yield name, _checked(words, kind, typed)
        elif len(words) > 1:
            raise ConfigError(f"unexpected '{words[1]}' after {flag} {words[0]}. Settings files come before the flags.")
        elif words:
            yield name, _checked(words[0], kind, typed)
        elif kind is bool:
            yield name, True
        else:
            raise ConfigError(f"{flag}: expected {_expected(kind)} after it.")


def _spread(settings: Mapping[str, Any], flags: Iterable[tuple[str, list[_Word]]]) -> Iterator[tuple[str, list[_Word]]]:
    """The flags, those of `EVERYWHERE` once for each block that has the setting."""
    for flag, words in flags:
        ending = EVERYWHERE.get(flag, "")
        places = [name for name in settings if ending and f".{name}".endswith(f".{ending}")]
        yield from ((_flag(place), words) for place in places) if places else [(flag, words)]


def _entries(name: str, flag: str, words: Sequence[str], kind: Any) -> Iterator[tuple[str, object]]:
    """The `key=value` words after the flag of a free mapping."""
    for word in words or [""]:
        key, equals, value = word.partition("=")
        typed = _show(f"{flag} {word}")
        if not (key and equals):
            raise ConfigError(f"{typed}: expected key=value.")
        yield f"{name}.{key}", _checked(_Word(value), kind, typed)


def _grouped(flags: Sequence[str]) -> Iterator[tuple[str, list[_Word]]]:
    """Each flag with the words that follow it; `--key=value` is `--key value`, and lets a value begin with `--`."""
    starts = [at for at, word in enumerate(flags) if word.startswith("--")]
    if flags and starts[:1] != [0]:
        raise ConfigError(f"unexpected '{flags[0]}'. Flags look like --key value.")
    for start, end in itertools.pairwise([*starts, len(flags)]):
        flag, equals, value = flags[start].partition("=")
        yield flag, [_Word(word) for word in ([value] if equals else []) + list(flags[start + 1 : end])]


def _checked(value: object, kind: Any, where: str) -> object:
    """`value` as a `kind`, or a ConfigError that says where it was given and what was expected there."""
    try:
        return _fit(value, kind)
    except _Misfit:
        hint = did_you_mean(str(value), map(str, get_args(kind))) if get_origin(kind) is Literal else ""
        hint = " Put it in quotes." if kind is str and isinstance(value, bool | int | float) else hint
        raise ConfigError(f"{where}: expected {_expected(kind)}.{hint}") from None


class _Misfit(Exception):
    """A value is not of the type it has to be."""


def _fit(value: object, kind: Any) -> object:
    """`value` as a `kind`: whole numbers also make floats and lists make tuples; nothing else is converted."""
    if isinstance(value, _Word):
        with contextlib.suppress(_Misfit):
            return _fit(_scalar(str(value)), kind)
        return _fit(str(value), kind)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal and any(value == choice and type(value) is type(choice) for choice in inner):
        return value
    if origin is tuple and isinstance(value, list):
        inner = inner[:1] * len(value) if inner[1:] == (...,) else inner
        if len(inner) == len(value):
            return tuple(_fit(item, kind) for item, kind in zip(value, inner, strict=True))
    if origin in (Union, UnionType):
        for member in inner:
            with contextlib.suppress(_Misfit):
                return _fit(value, member)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    raise _Misfit


def _expected(kind: Any) -> str:
    """A type in words, to follow "expected"."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is tuple and inner[1:] == (...,):
        return f"a list, each {_expected(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}: " + ", ".join(map(_expected, inner))
    if inner:
        *others, last = map(_expected, inner)
        return f"{', '.join(others)} or {last}"
    return words[kind]


def _suggestion(name: str, settings: Mapping[str, Any], shown: Callable[[str], str] = str) -> str:
    """The setting that was meant: this name in another block, nearly this name in its own, or a part of the block."""
    block, _, leaf = name.rpartition(".")
    siblings = [other for other in settings if other != name and other.rpartition(".")[0] == block]
    places = {sibling.rpartition(".")[2]: sibling for sibling in siblings}
    same = [other for other in settings if other.endswith(f".{leaf}")]
    parts = [other for other in settings if other.startswith(f"{name}.")]
    meant = same or [places[close] for close in difflib.get_close_matches(leaf, places, n=1)] or parts
    return did_you_mean(shown(meant[0]), [shown(meant[0])]) if meant else ""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _show(value: object) -> str:
    """A value as one short line, the way it would be written in YAML."""
    if not isinstance(value, str):
        value = yaml.dump(value, Dumper=_Dumper, default_flow_style=True).removesuffix("\n...\n")
    return textwrap.shorten(value, 60, placeholder=" …")


def _read(file: Path) -> Mapping[object, object]:
    """The mapping in a YAML file, nothing for an empty one; one line whatever is wrong with it."""
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        nearby = [path.name for path in file.parent.glob("*.y*ml")]
        raise ConfigError(f"{file}: no such file.{did_you_mean(file.name, nearby)}") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not a text file (byte {error.start} is not UTF-8).") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{file}: {line}{error.problem}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, Mapping | None):
        raise ConfigError(f"{file}: {_show(tree)}: expected keys and values.")
    return tree or {}


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: `1e-3` is a number and `no`, `1:30`, `010` are text. No key comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is set twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads."""


_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
for _yaml in (_Loader, _Dumper):
    _yaml.yaml_implicit_resolvers = {}
    for _name, _pattern in _SCALARS.items():
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"({_pattern})\Z"), None)
_Dumper.add_representer(
    tuple, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def _scalar(text: str) -> object:
    """What a plain scalar means in YAML: a number, true or false, null, or the text itself."""
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    return loader.construct_object(yaml.ScalarNode(tag, text))
