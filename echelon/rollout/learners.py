"""What learns: a model that nobody plays with; and beside a policy that writes tokens, a value model that reads them,
texts the policy goes on imitating.

Opens and reads; how they learn is in `echelon.train`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from echelon.config import DataConfig, LoraConfig, ModelConfig, OptimConfig
from echelon.data.conversations import imitated
from echelon.data.datasets import load_rows
from echelon.data.packing import Batch, pack
from echelon.errors import DataError
from echelon.models.heads import TokenValue
from echelon.models.reward import open_reward_module
from echelon.rollout.setup import Actor, Pupil, model_path, task_batch
from echelon.seeds import derive_seed
from echelon.train.learner import Learner


def open_value(actor: Actor, path: str, *, model: ModelConfig, lora: LoraConfig, seed: int) -> TokenValue:
    """The value model as it starts: a reward model, head included, or the body of a language model, else the policy's.

    Raises DataError for one that reads other tokens than the policy writes.
    """
    if not path:
        return TokenValue.from_lm(actor.module)
    scorer, tokenizer, _ = open_reward_module(replace(model, path=model_path(path, "reward")), lora, seed=seed)
    if not actor.tokenizer.get_vocab().items() <= tokenizer.get_vocab().items():
        raise DataError(
            f"value_path = {path}: its tokenizer is not that of the policy, and a value model reads the very "
            "tokens the policy writes. Give a model with the same tokenizer, or leave value_path out."
        )
    return TokenValue.from_scorer(scorer)


def learner_of(pupil: Pupil, optim: OptimConfig, steps: int) -> Learner:
    """What trains a pupil for so many optimizer steps, the only reader of its weights."""
    return Learner(
        pupil.module,
        optim,
        total_steps=steps,
        resident=False,
        place=pupil.place,
        name="actor",
        tokenizer=pupil.tokenizer,
    )


def ptx_batches(ptx: DataConfig, actor: Actor, *, rows: int, seed: int) -> Callable[[int], Batch] | None:
    """For the number of an optimizer step, the conversations that join it: each epoch is a new order of all rows.

    None where there is nothing to imitate.
    """
    if not ptx.path:
        return None
    listed = load_rows(ptx, "sft", seed=seed, name="ptx").train

    def batch(number: int) -> Batch:
        chosen = task_batch(listed, number, rows, seed=derive_seed(seed, "ptx"))
        return pack([example for row in chosen for example in imitated(actor.role.renderer, row)])

    return batch
