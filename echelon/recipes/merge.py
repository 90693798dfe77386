"""Merging: fold an adapter into the model it was made for, and write one that needs neither peft nor the adapter.

The model below is found in the adapter's own settings. Weights are added in float32 whatever they are stored as, and
the folder gets its name only when what was written, read back, gives the adapter's own logits. Adapters of policies and
of reward models; several on top of each other are folded one after the other.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor, nn

from echelon.config import CommandConfig, ModelConfig, demand, require
from echelon.errors import CheckpointError, DataError
from echelon.models import lora
from echelon.models.lm import load_lm, load_tokenizer
from echelon.models.reward import SCALE, choose_padding, last_scores, open_reward_module
from echelon.models.stacked import CONFIG
from echelon.rollout.setup import describe, model_path
from echelon.text.chat import set_up_template
from echelon.train.log import typed

EXAMPLES = """\
echelon merge --adapter runs/grpo --out models/final
echelon merge --adapter DIR --base BASE --out models/final --dtype bfloat16
echelon merge --adapter runs/grpo --out models/final --push name/model"""

TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""How far merged logits may be from the adapter's, as a part of their size: what rounding weights does."""

SAMPLE = (4, 64)
"""Rows and tokens on which they are compared."""
SCORED = 8
"""Tokens of each row of a reward model, which says one number about a row."""


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Settings of merging."""

    out: str
    """Folder of the merged model."""
    adapter: str
    """What is merged: an adapter's folder, a checkpoint, a run directory or a hub id."""
    base: str = ""
    """The model it was made for, where that is no longer where the adapter says."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights that are written; auto is that of the base."""
    device: str = "auto"
    """Where it is computed."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base. Only for models whose code you have read."""
    push: str = ""
    """Repository on the hub, such as name/model, to which the merged model is uploaded too."""
    public: bool = False
    """Whether a repository that is made for it can be read by everyone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "out", "adapter")
        demand(self, "push", self.push.count("/") in (0, 1), "a repository is called name/model, or model.")
        demand(self, "public", not self.public or bool(self.push), "nothing is uploaded. Give push too.")


def main(cfg: Config) -> None:
    """Merge, compare, write, and upload if asked to."""
    out, path = Path(cfg.out), adapter_path(cfg.adapter)
    check(cfg, out, path)
    hub = log_in(cfg.push) if cfg.push else None
    below = model_path(cfg.base) if cfg.base else base_of(path)
    dtype = stored_type(below, trust_remote_code=cfg.trust_remote_code) if cfg.dtype == "auto" else cfg.dtype
    adapted, tokenizer = open_adapted(cfg, path, below)
    if cfg.dry_run:
        return describe({"adapter": adapted}, tokens_per_step=SAMPLE[0] * SAMPLE[1])

    tokens = sample_tokens(adapted)
    expected = logits_of(adapted, tokens)
    with lora.off(adapted):
        moved = float((logits_of(adapted, tokens) - expected).abs().max())
    module: Any = lora.merge(adapted)
    if lora.task_of(path) == "SEQ_CLS":
        choose_padding(module, tokenizer)
    compare(logits_of(module, tokens), expected, "float32", "in memory")
    with appearing(out) as folder:
        module.to(getattr(torch, dtype)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if (Path(path) / SCALE).is_file():
            shutil.copy(Path(path) / SCALE, folder / SCALE)
        del module, adapted
        written, _ = open_whole(cfg, str(folder), lora.task_of(path))
        difference = compare(logits_of(written, tokens), expected, dtype, f"written as {dtype}")
    print(
        f"{out}: {path} merged into {below}, {dtype}. Its logits are within {difference:.2g} of the adapter's on "
        f"{SAMPLE[0] * SAMPLE[1]} tokens; the adapter moves them by up to {moved:.2g}."
    )
    if lora.task_of(path) != "SEQ_CLS":
        print(f"Talk to it: {typed('chat', str(out))}")
    if hub is not None:
        upload(hub, cfg, out)


def check(cfg: Config, out: Path, path: str) -> None:
    """Raise before any work what can be known before any work."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: there is something already, and it is never overwritten. Choose another --out.")
    if lora.is_adapter(path):
        return
    if (Path(path) / "config.json").is_file():
        raise DataError(
            f"adapter = {cfg.adapter}: it is a whole model, not an adapter, so there is nothing to merge. Use it as it "
            f"is, or give the folder that has {CONFIG}."
        )
    raise DataError(f"adapter = {cfg.adapter}: there is no {CONFIG}. Give the folder or hub id of an adapter.")


def adapter_path(path: str) -> str:
    """The folder meant by `path`: of a run, that of its policy or of its reward model."""
    try:
        return model_path(path)
    except CheckpointError:
        return model_path(path, "reward")


def base_of(path: str) -> str:
    """Where the adapter says its base is. Raises DataError if it is not there."""
    try:
        return lora.base_path(path)
    except DataError as error:
        raise DataError(f"{error} Or say where it is with --base.") from error


def open_adapted(cfg: Config, path: str, below: str) -> tuple[nn.Module, Any]:
    """The base in float32 with the adapter on it, and the tokenizer."""
    module, tokenizer = open_whole(cfg, below, lora.task_of(path))
    module = lora.fold(module, below)
    if list(Path(path).glob("tokenizer*")):
        tokenizer = load_tokenizer(path)
    if lora.task_of(path) == "SEQ_CLS" and set_up_template(tokenizer):
        print(f"{path} has no chat template: it is given one with Question: and Answer:", file=sys.stderr)
    return lora.load(module, path).eval(), tokenizer


def open_whole(cfg: Config, path: str, task: str) -> tuple[nn.Module, Any]:
    """A policy or a reward model in float32, and its tokenizer."""
    model = ModelConfig(path=path, device=cfg.device, trust_remote_code=cfg.trust_remote_code)
    if task == "SEQ_CLS":
        module, tokenizer, _ = open_reward_module(model, plain_template=True, may_grow=False)
    else:
        module = load_lm(path, device=cfg.device, trust_remote_code=cfg.trust_remote_code)
        tokenizer = load_tokenizer(path)
    return module.eval(), tokenizer


def stored_type(path: str, *, trust_remote_code: bool) -> str:
    """The type of a model's weights. Raises DataError for one that is stored in fewer bits than 16."""
    from transformers import AutoConfig

    if lora.is_adapter(path):
        return stored_type(lora.base_path(path), trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise DataError(f"base = {path}: it has no config.json that can be read. Give a model's folder.") from error
    if getattr(config, "quantization_config", None):
        raise DataError(
            f"base = {path}: its weights are stored in few bits, and an adapter cannot be added to them without loss. "
            "Give the model it was made from, in 16 or 32 bits: --base …"
        )
    found = str(config.dtype or torch.float32).removeprefix("torch.")
    return found if found in TOLERANCE else "float32"


def sample_tokens(module: nn.Module) -> Int[Tensor, "B T"]:
    """The same tokens every time, drawn from all that the model has embeddings for."""
    inputs: Any = module.get_input_embeddings()  # type: ignore[operator]
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, inputs.weight.shape[0], SAMPLE, generator=draw).to(inputs.weight.device)


@torch.no_grad()
def logits_of(module: nn.Module, tokens: Int[Tensor, "B T"]) -> Tensor:
    """What the model says of tokens: logits, or the scores of short rows."""
    module.eval()
    if module.get_output_embeddings() is None:  # type: ignore[operator]
        rows = tokens.reshape(-1, SCORED)
        return last_scores(module, rows, torch.full((len(rows),), SCORED, device=rows.device)).float().cpu()
    logits: Tensor = module(input_ids=tokens, use_cache=False).logits
    return logits.float().cpu()


def compare(found: Tensor, expected: Tensor, dtype: str, where: str) -> float:
    """The largest difference. Raises DataError if they differ by more than weights of this type explain.

    In float32 no logit may differ. In 16 bits the mean counts: where two tokens draw almost the same attention, a
    weight that is rounded may move single logits far.
    """
    size = torch.max if dtype == "float32" else torch.mean
    difference, allowed = float(size((found - expected).abs())), TOLERANCE[dtype] * float(size(expected.abs()))
    if not difference <= allowed:
        raise DataError(
            f"the merged model, {where}, is not the adapter on its base: logits differ by {difference:.2g}, and "
            f"rounding explains {allowed:.2g}. Nothing is left of it. Try --dtype float32, or see that --base is right."
        )
    return float((found - expected).abs().max())


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` in the end, all at once, or is gone if anything goes wrong."""
    unfinished = out.with_name(f".tmp-{out.name}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(out)  # takes the place of an empty folder
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or _line(error)
        raise CheckpointError(
            f"{out}: the merged model could not be written ({reason}). Make room, or choose another --out."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def log_in(repository: str) -> Any:
    """The hub, once it is known who asks. Raises DataError for nobody, before any work."""
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.whoami()
    except Exception as error:  # no token, a wrong one, no network: the library raises a kind for each
        raise DataError(
            f"push = {repository}: the hub does not know who you are ({_line(error)}). Log in with: hf auth login"
        ) from error
    return hub


def upload(hub: Any, cfg: Config, out: Path) -> None:
    """Put the folder into the repository, which is made if it is not there."""
    try:
        repository = hub.create_repo(cfg.push, private=not cfg.public, exist_ok=True).repo_id
        hub.upload_folder(repo_id=repository, folder_path=str(out), commit_message="Merged model")
    except Exception as error:  # one kind for each thing that can go wrong over there
        raise DataError(
            f"push = {cfg.push}: the upload failed ({_line(error)}). The merged model is in {out}; try again with: "
            f"hf upload {cfg.push} {out}"
        ) from error
    print(f"uploaded to {repository}")


def _line(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 150, placeholder=" …").rstrip(".")
