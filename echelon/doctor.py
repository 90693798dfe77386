"""What this machine has, what a run would need of it, and how to mend what cannot work.

Nothing is trained, downloaded or asked over a network. Knows recipes by their settings alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

from echelon import __version__
from echelon.errors import ConfigError, EchelonError

CORE = ("torch", "transformers", "tokenizers", "safetensors", "peft", "numpy")
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
"""The versions that are tested, where echelon runs from its repository."""
DATA_FILES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
MODULES = {
    "control": "gymnasium",
    "data": "datasets",
    "endpoint": "httpx2",
    "math": "math_verify",
    "quantization": "bitsandbytes",
    "ray": "ray",
    "vllm": "vllm",
}
"""Extra that settings may ask for → what is imported of it."""
FEW_GIB = 2.0
"""Free disk below which a run soon has nowhere to save."""
Split: TypeAlias = Callable[[Any, list[str]], tuple[list[str], list[str]]]
"""What tells apart files and flags among the words for a recipe, which is a module."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    standing: Literal["ok", "note", "fails"]
    """`fails` is what was asked for and cannot work; `note`, what matters only where somebody needs it."""
    says: str
    fix: str = ""
    """What to do about it."""

    @property
    def line(self) -> str:
        """All of it, in words."""
        said = f"{self.says} {self.fix}".strip()
        return f"cannot work: {said}" if self.standing == "fails" else said


def doctor(
    words: Sequence[str], *, extras: Mapping[str, str], recipes: Sequence[str], package: str, split: Split
) -> int:
    """Look at this machine, and at what the settings of a recipe need of it, and print what there is.

    The words are a recipe, its files, folders and flags, which `split` tells apart, and `--json` for one JSON object in
    place of lines. A file in a folder named for its recipe needs no other word. Returns 1 where something asked for
    cannot work, else 0. Raises ConfigError for words that name no recipe.
    """
    rest = [word for word in words if word != "--json"]
    asked = _asked(rest, recipes)
    found = [*_machine(), *_extras(extras)]
    if asked is not None:
        found += _settings(*asked, package, split)
    _print(found, as_json="--json" in words)
    return int(any(finding.standing == "fails" for finding in found))


def _asked(words: list[str], recipes: Sequence[str]) -> tuple[str, list[str]] | None:
    """The recipe that the words name, and the words for it; None where there are none."""
    if not words:
        return None
    files = words[: next((at for at, word in enumerate(words) if word.startswith("-")), len(words))]
    named = [word.replace("_", "-") for word in (*files[:1], *(Path(file).parent.name for file in files))]
    known = [name for name in named if name in recipes]
    if not known:
        raise ConfigError(
            f"doctor: nothing says which recipe {' '.join(words)} is for. Give it first: echelon doctor grpo a.yaml."
        )
    return known[0], words[1:] if named[0] == known[0] else words


def _machine() -> Iterator[Finding]:
    """What is here, whatever will run."""
    yield Finding("echelon", "ok", __version__)
    recent = sys.version_info >= (3, 11)
    fix = "" if recent else "Install Python 3.11 or newer."
    yield Finding("python", "ok" if recent else "fails", platform.python_version(), fix)
    tested = tested_versions()
    for name in CORE:
        yield _installed(name, name, tested, missing="fails", install=f"Run: pip install {name}")
    import torch

    from echelon.rollout.setup import usable_cores

    for place, room in _devices():
        yield Finding(place, "ok", room)
    total, free = host_memory()
    yield Finding("memory", "ok", f"{_gib(total)}, {_gib(free)} free")
    yield Finding("threads", "ok", f"{torch.get_num_threads()} of {usable_cores()} cores")
    yield _disk(Path())
    yield _port()
    yield _sandbox()


def _extras(extras: Mapping[str, str]) -> Iterator[Finding]:
    tested = tested_versions()
    for extra, name in extras.items():
        yield _installed(f"extra {extra}", name, tested, install=f"pip install 'echelon[{extra}]'")


def _installed(
    label: str,
    distribution: str,
    tested: Mapping[str, str],
    *,
    install: str,
    missing: Literal["note", "fails"] = "note",
) -> Finding:
    """Whether a distribution is there, and in the version that is tested."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return Finding(label, missing, "not installed:", install)
    shown = version if label == distribution else f"installed, {distribution} {version}"
    wanted = tested.get(distribution)
    if wanted is None or version.partition("+")[0] == wanted:
        return Finding(label, "ok", shown)
    return Finding(label, "note", f"{shown}; tested with {wanted}")


def tested_versions() -> dict[str, str]:
    """Distribution → version, of constraints.txt; nothing where that file is not there."""
    lines = _read(str(CONSTRAINTS)).splitlines()
    pairs = (line.partition("#")[0].strip().partition("==") for line in lines)
    return {name: version for name, equals, version in pairs if equals}


def _devices() -> Iterator[tuple[str, str]]:
    """Every device that models can live on but the host, and the room there."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        yield "device", "cpu"
    elif accelerator.type != "cuda":
        yield "device", f"{accelerator.type} x {torch.accelerator.device_count()}"
    else:
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            yield f"device cuda:{number}", f"{name}, {_gib(total)}, {_gib(free)} free"


def host_memory() -> tuple[int, int]:
    """Bytes of memory of this machine, or of the share that its container has, and how many of them are free."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    told = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    free = int(told[1]) * 1024 if told else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        total, free = int(limit), min(free, max(0, int(limit) - int(used)))
    return total, free


def _disk(folder: Path) -> Finding:
    """Room where a run would save: in the folder, or the nearest one above that is there."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    says = f"{_gib(free)} free in {there}"
    if not os.access(there, os.W_OK):
        return Finding("disk", "fails", f"{there} cannot be written.", "Choose another --out.")
    if free < FEW_GIB * 2**30:
        return Finding("disk", "note", f"{says}: large checkpoints have no room.", "Delete some, or move out.")
    return Finding("disk", "ok", says)


def _port() -> Finding:
    """Whether ranks of this machine could meet."""
    try:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            free.listen()
    except OSError as error:
        says = f"no port can be opened on localhost ({error.strerror}): ranks of echelon launch could not meet."
        return Finding("port", "note", says, "Look at /etc/hosts, and at what this container forbids.")
    return Finding("port", "ok", "free ones on localhost")


def _sandbox() -> Finding:
    """Which of its walls the sandbox has here: namespaces, Landlock, seccomp."""
    from echelon.sandbox import ProgramError, walls

    try:
        missing = walls()
    except (ProgramError, OSError) as error:
        says = f"it does not start ({error}): programs and tasks with code fail."
        return Finding("sandbox", "note", says, "Look at docs/sandbox.md.")
    if missing:
        says = f"without {', '.join(missing)}: programs are limited and not walled in."
        return Finding("sandbox", "note", says, "There, run only programs you have read.")
    return Finding("sandbox", "ok", "all walls stand")


def _settings(recipe: str, words: list[str], package: str, split: Split) -> Iterator[Finding]:
    """What the settings of a recipe need, and whether it is here."""
    from echelon.config import loading

    module = importlib.import_module(f"{package}.{recipe.replace('-', '_')}")
    try:
        files, flags = split(module, words)
        cfg = loading.load(module.Config, files, [*_somewhere(module.Config, files, flags), *flags])
    except EchelonError as error:
        yield Finding("settings", "fails", " ".join(str(error).split()))
        return
    yield Finding("settings", "ok", f"of {recipe}")
    blocks = dict(_blocks(cfg))
    for check in (_check_models, _check_engines, _check_optimizers, _check_data, _check_endpoints):
        yield from check(blocks)
    yield from _check_env(cfg)
    yield from _check_memory(cfg, blocks)
    if out := getattr(cfg, "out", ""):
        yield dataclasses.replace(_disk(Path(out)), name="out")


def _somewhere(kind: Any, files: Sequence[str], flags: Sequence[str]) -> list[str]:
    """A run directory where none is given and one is needed: nothing will be written there."""
    needed = any(entry.name == "out" and entry.default is dataclasses.MISSING for entry in dataclasses.fields(kind))
    named = any(word.partition("=")[0] == "--out" for word in flags)
    named = named or any(re.search(r"^out:", _read(file), re.MULTILINE) for file in files)
    return ["--out", "runs"] if needed and not named else []


def _blocks(cfg: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name → every block of settings, from the outermost in."""
    yield name, cfg
    for entry in dataclasses.fields(cfg):
        value = getattr(cfg, entry.name)
        if dataclasses.is_dataclass(value):
            yield from _blocks(value, f"{name}.{entry.name}".lstrip("."))


def _check_models(blocks: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether models are there, and what they are to be held in."""
    import torch

    from echelon.config import ModelConfig

    for name, block in blocks.items():
        if not isinstance(block, ModelConfig) or not block.path:
            continue
        yield _found(f"{name}.path", block.path, getattr(blocks[""], "label", None))
        gpu = torch.cuda.is_available()
        if block.device.startswith("cuda") and not gpu:
            yield Finding(f"{name}.device", "fails", f"{block.device}: there is no GPU here.", "Set it to auto or cpu.")
        if block.quantization != "none":
            yield _extra(f"{name}.quantization", "quantization")
            if not gpu:
                says = f"{block.quantization}: it needs a GPU, and there is none."
                yield Finding(f"{name}.quantization", "fails", says, "Leave it out.")
        if block.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            says = "flash_attention_2: flash-attn is not installed."
            yield Finding(f"{name}.attention", "fails", says, "Use sdpa, or install it.")


def _found(name: str, path: str, label: Any = None) -> Finding:
    """Whether a model is on this machine, or may be on the hub; of a run that is read by a label, who writes in it."""
    from echelon.models.lm import check_folder
    from echelon.rollout.round_players import solver_path
    from echelon.rollout.setup import model_path

    try:
        folder = model_path(path) if label is None else solver_path(path, label)
        if not (Path(folder) / "adapter_config.json").is_file():
            check_folder(folder)
    except EchelonError as error:
        return Finding(name, "fails", " ".join(str(error).split()))
    if Path(folder).is_dir():
        return Finding(name, "ok", folder)
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(path, "config.json"), str):
        return Finding(name, "ok", f"{path}, in the cache of the hub")
    if constants.HF_HUB_OFFLINE:
        says = f"{path} is not on this machine, and HF_HUB_OFFLINE forbids to fetch it."
        return Finding(name, "fails", says, "Unset it, or give a folder.")
    return Finding(name, "note", f"{path} is not on this machine: it will be fetched from the hub")


def _check_engines(blocks: Mapping[str, Any]) -> Iterator[Finding]:
    from echelon.config import SamplingConfig

    for name, block in blocks.items():
        drawn_by = getattr(block, "sampler", "local") if isinstance(block, SamplingConfig) or not name else "local"
        if drawn_by != "local":
            extra = "endpoint" if drawn_by == "server" else drawn_by
            yield _extra(f"{name}.sampler".lstrip("."), extra)
        if drawn_by == "ray" and block.ray.engine == "vllm":
            yield _extra(f"{name}.ray.engine", "vllm")


def _check_optimizers(blocks: Mapping[str, Any]) -> Iterator[Finding]:
    import torch

    from echelon.config import OptimConfig
    from echelon.train.optimizers import BITSANDBYTES

    for name, block in blocks.items():
        if isinstance(block, OptimConfig) and block.name in BITSANDBYTES:
            yield _extra(f"{name}.name", "quantization")
            if not torch.cuda.is_available():
                says = f"{block.name}: it needs a GPU, and there is none."
                yield Finding(f"{name}.name", "fails", says, "Use adamw, or adafactor.")


def _check_data(blocks: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether files of rows are there; other names are data sets of the hub, which need the extra."""
    from echelon.config import DataConfig

    for name, block in blocks.items():
        if not isinstance(block, DataConfig):
            continue
        for field, paths in (("path", block.path), ("eval_path", block.eval_path)):
            for path in paths:
                label = f"{name}.{field}"
                if Path(path).exists():
                    yield Finding(label, "ok", path)
                elif path.endswith(DATA_FILES) or path.startswith((".", "/", "~")):
                    yield Finding(label, "fails", f"there is no file '{path}'.", "Look at its path.")
                else:
                    yield _extra(label, "data", f"{path}, a data set of the hub: ")


def _check_endpoints(blocks: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether endpoints can be asked: the extra, and the variables that hold their keys."""
    cfg = blocks[""]
    for name in ("judge", "api"):
        if settings := getattr(cfg, name, None):
            yield _extra(name, "endpoint")
            variable = str(settings.get("key_env", "OPENAI_API_KEY"))
            if variable and not os.environ.get(variable):
                says = f"the variable {variable} is not set: no key is sent."
                yield Finding(f"{name}.key_env", "note", says, "Local servers need none.")
    if "math" in getattr(cfg, "reward", ()):
        yield _extra("reward", "math")


def _check_env(cfg: Any) -> Iterator[Finding]:
    """Whether the environment opens and keeps its promises; one that asks an endpoint is loaded and not played."""
    from echelon.envs import load_env
    from echelon.rollout.setup import open_env

    env = getattr(cfg, "env", "")
    if getattr(cfg, "env_id", "") or (env and not hasattr(cfg, "env_settings")):
        yield _extra("env", "control")
    if not env or not hasattr(cfg, "env_settings"):
        return
    settings, trust = cfg.env_settings, getattr(cfg, "trust_task_code", False)
    asks = any("endpoint" in (name, value) or name.startswith("endpoint_") for name, value in settings.items())
    opened: Callable[..., Any] = load_env if asks else open_env
    try:
        opened(env, settings, trust_code=trust)
    except EchelonError as error:
        yield Finding("env", "fails", " ".join(str(error).split()))
    else:
        yield Finding("env", "ok", f"{env} opens")


def _check_memory(cfg: Any, blocks: Mapping[str, Any]) -> Iterator[Finding]:
    """The weights of all models, and what AdamW adds where all of them learn, beside the room there is."""
    from echelon.config import ModelConfig, TrainConfig
    from echelon.models.lm import pick_device

    held = [block for block in blocks.values() if isinstance(block, ModelConfig) and block.path]
    sizes = [weights_of(block) for block in held]
    if not sizes or None in sizes:
        return
    counts = [count for count in sizes if count is not None]
    with contextlib.suppress(RuntimeError, AssertionError):  # a device that is not here, which has been said
        place = pick_device(held[0].device)
        room = _room(place)
        widths = [4 if block.dtype == "float32" else 2 for block in held]
        least = sum(count * width for count, width in zip(counts, widths, strict=True))
        adapter = any(getattr(block, "rank", 0) for block in blocks.values())
        learning = isinstance(cfg, TrainConfig) and not adapter
        most = 16 * sum(counts) if learning else least
        says = f"{_gib(least)} of weights, {_gib(most)} with gradients and AdamW; {_gib(room)} free on {place.type}"
        if least > room:
            fix = "Take a smaller model, model.dtype bfloat16, or a larger device."
            yield Finding("room", "fails", f"{says}.", fix)
        elif most > room:
            fix = "Train an adapter (lora.rank), or on several ranks with dist.strategy fsdp; --dry-run counts all."
            yield Finding("room", "note", f"{says}.", fix)
        else:
            yield Finding("room", "ok", says)


def weights_of(block: Any) -> int | None:
    """How many numbers a model on this machine consists of, counted without loading it; None where nobody knows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from echelon.rollout.setup import model_path

    try:
        folder = model_path(block.path)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config)
    except (EchelonError, OSError, ValueError, KeyError, RuntimeError):
        return None
    count: int = sum(parameter.numel() for parameter in module.parameters())
    return count


def _room(place: Any) -> int:
    import torch

    return torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else host_memory()[1]


def _extra(name: str, extra: str, before: str = "") -> Finding:
    """Whether an extra that the settings ask for is there."""
    module = MODULES[extra]
    if importlib.util.find_spec(module) is None:
        says = f"{before}{module} is not installed."
        return Finding(name, "fails", says, f"Run: pip install 'echelon[{extra}]'")
    return Finding(name, "ok", f"{before}extra {extra} is installed")


def _print(found: Sequence[Finding], *, as_json: bool) -> None:
    """A table on a terminal, plain lines elsewhere, or one JSON object."""
    failures = sum(finding.standing == "fails" for finding in found)
    if as_json:
        print(json.dumps({"works": not failures, "findings": [asdict(finding) for finding in found]}, indent=1))
        return
    end = "" if not failures else f"{failures} of these cannot work." if failures > 1 else "One of these cannot work."
    if sys.stdout.isatty():
        _draw(found)
    else:
        width = max(len(finding.name) for finding in found)
        print("\n".join(f"  {finding.name:<{width}}  {finding.line}".rstrip() for finding in found))
    if end:
        print(end)


def _draw(found: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "", "note": "yellow", "fails": "bold red"}
    drawn = Table(show_header=False, box=None)
    for finding in found:
        drawn.add_row(finding.name, Text(finding.line, style=colours[finding.standing]))
    Console().print(drawn)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _read(file: str) -> str:
    """The text of a file, nothing if it cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
