"""TRL's half of a comparison: its trainers on given rows in the given order, and what they logged step by step.

Every setting that could differ is spelled out in `_common`. It knows nothing of this package.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Rows = Sequence[dict[str, Any]]
Answers = Callable[[list[list[int]], int], list[list[int]]]
"""(ids of the prompts, one for each answer; optimizer steps taken so far) → ids of the answers."""
Worth = Callable[..., list[float]]


@dataclass(frozen=True)
class Trajectory:
    """What an optimizer did: numbers per step, and where the weights ended."""

    losses: list[float]
    grad_norms: list[float]
    rates: list[float]
    weights: dict[str, Tensor]

    def every(self, count: int) -> Trajectory:
        """The same with the mean of every `count` steps in place of their numbers."""

        def means(numbers: list[float]) -> list[float]:
            return [sum(numbers[at : at + count]) / count for at in range(0, len(numbers), count)]

        return replace(self, losses=means(self.losses), grad_norms=means(self.grad_norms), rates=means(self.rates))


def sft(
    folder: Path, out: Path, rows: Rows, *, rows_per_pass: int, passes: int, template: str = "", **settings: Any
) -> Trajectory:
    """`SFTTrainer` on conversations (`messages`) or on `prompt` and `completion`, in this order."""
    with _quietly():
        from trl import SFTConfig, SFTTrainer

        args = SFTConfig(**_common(out, rows_per_pass, passes), **{"max_length": None, **settings})
        tokenizer = _tokenizer(folder)
        tokenizer.chat_template = template or tokenizer.chat_template
        trainer = SFTTrainer(model=_causal(folder), args=args, train_dataset=_dataset(rows), processing_class=tokenizer)
        return _trained(trainer)


def reward(folder: Path, out: Path, rows: Rows, *, rows_per_pass: int, passes: int, **settings: Any) -> Trajectory:
    """`RewardTrainer` on `prompt`, `chosen`, `rejected` and perhaps `margin`; the folder holds a head of one number."""
    with _quietly():
        from transformers import AutoModelForSequenceClassification
        from trl import RewardConfig, RewardTrainer

        args = RewardConfig(**_common(out, rows_per_pass, passes), max_length=None, **settings)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        data, tokenizer = _dataset(rows), _tokenizer(folder)
        return _trained(RewardTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer))


def dpo(folder: Path, out: Path, rows: Rows, *, rows_per_pass: int, passes: int, **settings: Any) -> Trajectory:
    """`DPOTrainer` on `prompt`, `chosen`, `rejected`; the reference is a second copy of the folder."""
    with _quietly():
        from trl import DPOConfig, DPOTrainer

        args = DPOConfig(**_common(out, rows_per_pass, passes), max_length=None, **settings)
        models = {"model": _causal(folder), "ref_model": _causal(folder)}
        data, tokenizer = _dataset(rows), _tokenizer(folder)
        return _trained(DPOTrainer(**models, args=args, train_dataset=data, processing_class=tokenizer))


def grpo(
    folder: Path,
    out: Path,
    rows: Rows,
    *,
    answers: Answers,
    worth: Worth,
    siblings: int,
    rows_per_pass: int,
    passes: int,
    iterations: int = 1,
    trainer: str = "GRPO",
    **settings: Any,
) -> Trajectory:
    """`GRPOTrainer`, or `RLOOTrainer`, on `prompt`s that get `siblings` answers each, `iterations` steps per rollout.

    The answers are given instead of generated, without log-probs: TRL computes those of the policy itself.
    `rows_per_pass` counts answers.
    """
    with _quietly():
        import trl

        kind = getattr(trl, f"{trainer}Trainer")

        class Told(kind):  # type: ignore[misc, valid-type]
            """The trainer, told what the policy has said."""

            def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any) -> Any:
                said = answers(prompt_ids, self.state.global_step)
                return (said, None) if trainer == "GRPO" else said

        steps = len(rows) * siblings // (rows_per_pass * passes) * iterations
        args = getattr(trl, f"{trainer}Config")(
            **{**_common(out, rows_per_pass, passes), "max_steps": steps},
            num_generations=siblings,
            num_iterations=iterations,
            shuffle_dataset=False,
            **settings,
        )
        data, tokenizer = _dataset(rows), _tokenizer(folder)
        told = Told(
            model=_causal(folder), reward_funcs=worth, args=args, train_dataset=data, processing_class=tokenizer
        )
        return _trained(told)


def _common(out: Path, rows_per_pass: int, passes: int) -> dict[str, Any]:
    """One pass over the rows in their own order, in float32, on the CPU, with a line of the log per optimizer step."""
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": rows_per_pass,
        "gradient_accumulation_steps": passes,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "logging_strategy": "steps",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _causal(folder: Path) -> nn.Module:
    """The model of a folder, or an adapter on its base, which then goes on learning."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    if (folder / "adapter_config.json").is_file():
        adapted: nn.Module = AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True)
        return adapted
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _dataset(rows: Rows) -> Any:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    return Dataset.from_list(list(rows))


def _trained(trainer: Any) -> Trajectory:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return Trajectory(
        losses=[row["loss"] for row in logged],
        grad_norms=[row["grad_norm"] for row in logged],
        rates=[row["learning_rate"] for row in logged],
        weights={
            name.replace(".default.", "."): weight.detach().clone()
            for name, weight in trainer.model.named_parameters()
            if weight.requires_grad
        },
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """TRL warns of features that are experimental and of its own future; this package's warnings stay errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
