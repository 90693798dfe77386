"""Settings: the blocks that recipes share, each of which says what it cannot be. Knows no model and no environment."""

from __future__ import annotations

import importlib.util
import math
import operator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import tyro

from echelon.config.loading import flag_of, missing, show
from echelon.errors import ConfigError, need

Scalar = bool | int | float | str
Settings = Annotated[dict[str, Scalar], tyro.conf.arg(metavar="[KEY=VALUE ...]")]
"""Free keyword settings for something chosen by name: `env_settings: Settings = field(default_factory=dict)`.

A mapping in YAML; `--env-settings things=10 chain=true` on the command line. Later sources add keys and replace values.
"""


def demand(config: object, name: str, holds: bool, because: str) -> None:
    """Raise ConfigError `name = value: because` unless the rule holds. `because` says why it fails and what to do."""
    if not holds:
        raise ConfigError(f"{name} = {show(operator.attrgetter(name)(config))}: {because}")


def require(config: object, *names: str) -> None:
    """Raise ConfigError for the first of these settings that is still empty, e.g. `require(self, "model.path")`."""
    for name in names:
        if operator.attrgetter(name)(config) in ("", ()):
            raise missing(name)


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


RESERVED = "ECHELON_RESERVED"
"""By this variable a launcher tells ranks which places of a cluster are reserved for whose workers: a JSON object from
settings, as text, to a placement group of Ray."""


@dataclass(frozen=True)
class RayConfig:
    """Engines in processes of their own, on this machine or on others, that draw for `sampler = ray`."""

    workers: int = 2
    """How many there are, for all levels whose settings of them are the same: each holds the models of all. Several
    ranks have as many each. On the command line, `--rollout-workers` says it for all levels."""
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
    machines. Each set is removed once the server has read it, an adapter once there is a newer one."""
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
    one vLLM, or one server."""
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
        because = (
            "only vLLM here or as a server takes an adapter by itself. Use sampler = vllm or server, or leave it out."
        )
        demand(self, "adapters", self.adapters == "folded" or self.sampler in ("vllm", "server"), because)


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
    """Episodes say each token with its id and its log-probability. Off, episodes.jsonl takes about half the room."""
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
        others = "".join(f" Or give {flag_of(name)}." for name in self.worth if name not in ("reward", "env"))
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
