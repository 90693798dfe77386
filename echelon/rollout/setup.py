"""What a run opens before its loop: an environment that passes its check, a model ready to act, tasks in order."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from echelon.config import DistConfig, LoraConfig, ModelConfig, SamplingConfig
from echelon.envs import EnvSpec, check_env, load_env
from echelon.errors import CheckpointError
from echelon.models import lora as adapters
from echelon.models.lm import check_vocabulary, count_parameters, load_lm, load_tokenizer, pick_device
from echelon.rollout.memory import Plan, table
from echelon.rollout.roles import Role
from echelon.sampling.local import LocalSampler
from echelon.sampling.ray import RaySampler
from echelon.sampling.served import ServedSampler
from echelon.sampling.vllm import VllmSampler
from echelon.seeds import derive_seed
from echelon.text.chat import Renderer, set_up_template
from echelon.train import dist
from echelon.train.checkpoint import Label, find_checkpoint
from echelon.types import Sampler, SamplingParams

Item = TypeVar("Item")


@dataclass(slots=True)
class Actor:
    """A language model that acts: the module that learns, the engine that samples from it, the role it plays."""

    module: nn.Module
    tokenizer: Any
    sampler: Sampler
    role: Role


@dataclass(slots=True)
class Pupil:
    """A language model that learns from rows, and of which nothing is sampled."""

    module: nn.Module
    tokenizer: Any
    renderer: Renderer
    place: torch.device
    """Where it computes; where ranks hold parts, the module itself waits on the host."""


def open_env(name: str, settings: Mapping[str, Any], *, trust_code: bool = False) -> EnvSpec:
    """The environment, checked by playing a few episodes, so that its defects show before any training.

    `trust_code` lets Python in a file of tasks run.
    """
    spec = load_env(name, settings, trust_code=trust_code)
    check_env(spec, episodes=2)
    return spec


def open_actor(
    model: ModelConfig,
    sampling: SamplingConfig,
    *,
    lora: LoraConfig = LoraConfig(),
    name: str = "actor",
    params: SamplingParams | None = None,
    plain_template: bool = False,
    beside: Sampler | None = None,
) -> Actor:
    """Load a model and give it a role. The path may be a model folder, a hub id, a run directory or a checkpoint.

    With `lora.rank` only an adapter learns, a new one; on the folder of an adapter, that one is folded into the
    weights first. Without, the adapter of such a folder goes on learning. `plain_template` gives a tokenizer that has
    no chat template the plain one (`set_up_template`). `beside` is the engine of another level (`open_sampler`).
    """
    path = model_path(model.path)
    tokenizer = _open_tokenizer(path, plain_template=plain_template)
    renderer = Renderer(tokenizer, max_tokens=sampling.max_prompt_tokens)
    module = _open_module(model, path, tokenizer, lora)
    params = params or SamplingParams(
        max_tokens=sampling.max_tokens, temperature=sampling.temperature, stop=sampling.stop
    )
    sampler = open_sampler(module, tokenizer, sampling, max_tokens=params.max_tokens, beside=beside)
    return Actor(module, tokenizer, sampler, Role(name, sampler, renderer, params))


def open_pupil(model: ModelConfig, *, lora: LoraConfig, max_tokens: int, settings: DistConfig) -> Pupil:
    """Load a model that nobody reads but its learner (`learners.learner_of`); its tokenizer may lack a template.
    Whether it keeps rows that are laid end to end apart has not been checked.

    Where ranks will hold parts of it, rank 0 alone reads the weights, to its host; the others have shapes until they
    are given their parts. Of an adapter's folder all ranks read everything.
    """
    path, ranks = model_path(model.path), dist.ranks()
    tokenizer = _open_tokenizer(path, plain_template=True)
    place = pick_device(model.device)
    cut = ranks is not None and settings.strategy == "fsdp"
    empty = cut and not dist.writes() and not adapters.is_adapter(path)
    start = replace(model, device="cpu") if cut else model
    module = _open_module(start, path, tokenizer, lora, shapes_only=empty, check=False)
    return Pupil(module, tokenizer, Renderer(tokenizer, max_tokens=max_tokens), place)


def _open_tokenizer(path: str, *, plain_template: bool) -> Any:
    tokenizer = load_tokenizer(path)
    if plain_template and set_up_template(tokenizer):
        print(f"{path} has no chat template: it is given one with Question: and Answer:", file=sys.stderr)
    return tokenizer


def _open_module(model: ModelConfig, path: str, tokenizer: Any, lora: LoraConfig, **how: bool) -> nn.Module:
    """The model of a folder, with a new adapter where one is wanted."""
    module = load_lm(
        path,
        dtype=model.dtype,
        attention=model.attention,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
        gradient_checkpointing=model.gradient_checkpointing,
        quantization=model.quantization,
        **how,
    )
    check_vocabulary(path, module, tokenizer)
    return adapters.attach(adapters.fold(module, path), lora) if lora.rank else module


def open_sampler(
    module: nn.Module,
    tokenizer: Any,
    sampling: SamplingConfig,
    *,
    max_tokens: int = 0,
    beside: Sampler | None = None,
) -> Sampler:
    """The engine that the settings name. Answers have up to `sampling.max_tokens` tokens, or `max_tokens` if more.

    `beside` is the engine of another level: where both hand vLLM their adapters apart, and these are on the same base,
    they ask the same vLLM.
    """
    kept = sampling.cache_tokens or None
    if sampling.sampler == "local":
        return LocalSampler(module, tokenizer, cache_tokens=kept)
    longest = sampling.max_prompt_tokens + max(sampling.max_tokens, max_tokens)
    apart = sampling.adapters == "apart"
    if sampling.sampler == "ray":
        return RaySampler(module, tokenizer, sampling.ray, longest=longest, cache_tokens=kept)
    if sampling.sampler == "server":
        return ServedSampler(module, tokenizer, sampling.server, longest=longest, apart=apart)
    shared = beside if apart and isinstance(beside, VllmSampler) and beside.shares(module) else None
    return VllmSampler(
        module, tokenizer, longest=longest, cache_tokens=kept, sleep=sampling.sleep, apart=apart, beside=shared
    )


def open_copy(actor: Actor, sampling: SamplingConfig) -> Role:
    """The same role around an engine with weights of its own, which are what it was last given by `load`.

    Adapters are folded into them on the way (`lora.merged_weights`).
    """
    role, tokenizer = actor.role, actor.tokenizer
    sampler: Sampler
    if sampling.sampler == "local":
        twin = adapters.without_adapters(actor.module)
        sampler = LocalSampler(twin, tokenizer, cache_tokens=sampling.cache_tokens or None, copies=True)
    else:
        sampler = open_sampler(actor.module, tokenizer, sampling, max_tokens=role.params.max_tokens)
    return Role(role.name, sampler, role.renderer, role.params)


def model_path(path: str, role: str = "actor", label: Label = "auto") -> str:
    """The Hugging Face folder or hub id that is meant by a model folder, a checkpoint, a run directory or a hub id.

    Of a run it is the model that `label` says: by default the best where it kept one, else what the newest whole
    checkpoint holds as `role`. Raises CheckpointError.
    """
    free = label in ("auto", "latest")
    if free and not Path(path).is_dir():
        return path
    try:
        return str(find_checkpoint(Path(path), role, label))
    except CheckpointError:
        if not free or any((Path(path) / part).exists() for part in ("checkpoints", "manifest.json")):
            raise
        return path  # neither a run nor a checkpoint: the loader says what is missing


def task_batch(tasks: Sequence[Item], step: int, count: int, *, seed: int) -> list[Item]:
    """The tasks, or rows, of one step: each epoch is a new order of all. Without state, resuming needs none either."""
    picked: list[Item] = []
    for position in range(step * count, (step + 1) * count):
        epoch, place = divmod(position, len(tasks))
        order = np.random.default_rng(derive_seed(seed, "tasks", epoch)).permutation(len(tasks))
        picked.append(tasks[int(order[place])])
    return picked


def set_threads(threads: int, module: nn.Module | None = None) -> None:
    """CPU threads for tensor work, and memory that is used again.

    0 takes one thread for each half million parameters of the module that learns, at most the processor's cores that
    are this process's to use, or its share of them beside other ranks; without a module, one. A small model loses more
    in waiting for other threads than they compute.
    """
    wanted = threads or min(
        max(1, usable_cores() // dist.neighbours()), max(1, count_parameters(module) // 500_000 if module else 1)
    )
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)
    keep_freed_memory()


def usable_cores() -> int:
    """Physical cores this process may run on, a container's share included (two threads of one core count once)."""
    logical = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = Path("/sys/devices/system/cpu")
    cores = {_read(siblings / f"cpu{number}/topology/thread_siblings_list") or str(number) for number in logical}
    share, _, period = _read(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    return max(1, min(len(cores), int(share) // int(period)) if share.isdigit() else len(cores))


def keep_freed_memory() -> None:
    """Have glibc keep large blocks that are freed and hand them out again; elsewhere nothing.

    Otherwise every large tensor is new memory from the system, which clears it page by page: slower than the arithmetic
    on it. What the process holds stays what it held at most.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # from malloc.h
    if not mallopt(mmap_threshold, 1 << 28):
        mallopt(mmap_threshold, 1 << 25)  # the most that older versions take
    mallopt(trim_threshold, (1 << 31) - 1)
    mallopt(top_pad, 1 << 26)


def _read(file: Path) -> str:
    """The text of a file of the system, nothing if it cannot be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def describe(modules: Mapping[str, nn.Module], *, tokens_per_step: int, plan: Plan | None = None) -> None:
    """What `--dry-run` prints: parameters, the memory to train them, the most tokens a step can have, and with a plan
    what each rank will hold."""
    for name, module in modules.items():
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        weights = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
        training = sum(parameter.numel() * _bytes_to_train(parameter) for parameter in trained)
        print(
            f"{name}: {type(module).__name__}, {count_parameters(module):,} parameters, "
            f"{sum(parameter.numel() for parameter in trained):,} trained; {weights / 2**20:.1f} MiB of weights, "
            f"{training / 2**20:.1f} MiB more for gradients and optimizer state"
        )
    print(f"tokens per step: at most {tokens_per_step:,}")
    if plan is not None:
        print(*table(plan, tokens_per_step=tokens_per_step), sep="\n")


def _bytes_to_train(parameter: Tensor) -> int:
    """What AdamW needs per weight besides it: gradient and two means, and of 16-bit weights a float32 master."""
    return 12 if parameter.dtype == torch.float32 else 16
