"""Reward models: a causal language model with one number read at the last token of a conversation.

Kept in the sequence-classification format of the Hugging Face library with one label, so that what is saved loads
without echelon. Knows nothing of pairs or of learning; what scores are for is decided above.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from echelon.config import LoraConfig, ModelConfig
from echelon.errors import DataError
from echelon.models import lora
from echelon.models.lm import (
    attention_inputs,
    check_folder,
    check_vocabulary,
    enable_checkpointing,
    first_line,
    hidden_states,
    load_lm,
    load_tokenizer,
    pick_device,
    quantized,
    shares_prompts,
    without_dropout,
)
from echelon.text.answers import prompt_for
from echelon.text.chat import Renderer, set_up_template
from echelon.types import Message

if TYPE_CHECKING:
    from echelon.data.packing import Batch

SCALE = "reward.json"
"""The file beside the weights that says how scores are spread."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How scores are spread: what to subtract and to divide by, so that they have mean 0 and standard deviation 1."""

    mean: float
    std: float
    held_out: bool
    """Whether it was measured on rows that were not trained on."""

    def normalise(self, scores: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """Scores with mean 0 and standard deviation 1; no wider than they were where all were the same."""
        return (scores - self.mean) / (self.std or 1.0)


class RewardModel:
    """A reward model that scores, and does not learn."""

    def __init__(self, module: nn.Module, tokenizer: Any, *, max_tokens: int = 0, scale: Scale | None = None) -> None:
        self.module = module.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer)
        self.max_tokens = max_tokens or most_positions(module)
        self.scale = scale

    @torch.no_grad()
    def score(
        self, conversations: Sequence[list[Message]], *, tokens_per_pass: int = 4096, normalised: bool = False
    ) -> Float[Tensor, "N"]:
        """What the last message of each conversation, the assistant's, is worth: float32, on the CPU.

        A conversation of more than `max_tokens` loses its oldest exchanges, then the beginning of its prompt, never any
        of the answer. `normalised` subtracts the mean and divides by the deviation of `scale`. Raises DataError for a
        conversation that ends with somebody else, an answer that alone is too long, and a scale that is not there.
        """
        if normalised and self.scale is None:
            raise DataError(
                f"the reward model has no {SCALE}, so its scores cannot be normalised. Train it with echelon reward on "
                "rows of which some are held out, or use the scores as they are."
            )
        rows = [self._ids(messages) for messages in conversations]
        scores = torch.zeros(len(rows))
        device = next(self.module.parameters()).device
        for group in _passes([len(row) for row in rows], tokens_per_pass):
            tokens = nn.utils.rnn.pad_sequence([torch.tensor(rows[index]) for index in group], batch_first=True)
            lengths = torch.tensor([len(rows[index]) for index in group])
            scores[group] = last_scores(self.module, tokens.to(device), lengths.to(device)).cpu()
        return self.scale.normalise(scores) if normalised and self.scale else scores

    def _ids(self, messages: list[Message]) -> list[int]:
        ids, (answer,) = prompt_for(self.renderer, messages[:-1], [messages[-1:]], max_tokens=self.max_tokens)
        return ids + answer.ids


def load_reward_model(path: str, *, device: str = "auto", dtype: str = "float32", max_tokens: int = 0) -> RewardModel:
    """The reward model of a folder or hub id, or of an adapter's folder, ready to score.

    Raises DataError for a model without such a head: what a new head says means nothing. `max_tokens` bounds a
    conversation; 0 takes what the model can read.
    """
    settings = ModelConfig(path=path, device=device, dtype=dtype)  # type: ignore[arg-type]
    module, tokenizer, fresh = open_reward_module(settings)
    if fresh:
        raise DataError(f"'{path}' is a language model, not a reward model. Train one from it with echelon reward.")
    return RewardModel(module, tokenizer, max_tokens=max_tokens, scale=read_scale(Path(path)))


def open_reward_module(
    model: ModelConfig,
    adapter: LoraConfig = LoraConfig(),
    *,
    seed: int = 0,
    plain_template: bool = False,
    may_grow: bool = True,
) -> tuple[nn.Module, Any, bool]:
    """A reward model that can learn, its tokenizer, and whether its head is new.

    Takes a reward model, or a language model, which gets a head that starts at zero: no answer is better than another.
    With `adapter.rank` only a new adapter learns, and the head; on the folder of an adapter, that one is folded into
    the weights first. Without, the adapter of a reward model goes on learning, and that of a language model is folded.
    `plain_template` gives a tokenizer that has no chat template the plain one (`set_up_template`). A model that
    `may_grow` gets a padding token of its own where there is none to take (`choose_padding`).
    """
    check_folder(model.path)
    tokenizer = load_tokenizer(model.path)
    if plain_template:
        set_up_template(tokenizer)
    module, fresh = _load(model.path, model)
    check_vocabulary(model.path, module, tokenizer)
    if adapter.rank:
        module = lora.fold(module, model.path)
        choose_padding(module, tokenizer, may_grow=False)
        module = lora.attach(module, adapter, task="SEQ_CLS", base=model.path, seed=seed)
    else:
        choose_padding(module, tokenizer, may_grow=may_grow and not lora.has_adapters(module))
    if model.gradient_checkpointing:
        enable_checkpointing(module)
    return module.train(), tokenizer, fresh


def last_scores(module: nn.Module, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """The score of each row, read at its last token: rows say how long they are, padding is never looked at."""
    body, head = _parts(module)
    hidden = hidden_states(body, tokens, lengths)
    return _read(head, hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1])


def turn_scores(module: nn.Module, batch: Batch) -> Float[Tensor, "N"]:
    """The score of each turn of a batch, read at the last token of its action, in the order of `batch.index_N`."""
    body, head = _parts(module)
    hidden = hidden_states(body, batch.tokens, batch.lengths, **attention_inputs(module, batch))
    return _read(head, hidden[batch.row_N, batch.last_N])


class _Reader(nn.Module):
    """A body with its hidden states where a language model has its logits."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body, self.config = body, body.config

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.body(**inputs).last_hidden_state)


def answers_share(module: nn.Module) -> bool:
    """Whether several answers can branch off one prompt in a row (`shares_prompts`)."""
    return shares_prompts(_Reader(_parts(module)[0]))


def most_positions(module: nn.Module) -> int:
    """The most tokens a model can read in one row."""
    config: Any = module.config
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def read_scale(folder: Path) -> Scale | None:
    """How a saved reward model's scores are spread, if it says so."""
    file = folder / SCALE
    if not file.is_file():
        return None
    try:
        return Scale(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{file}: not the spread of a reward model's scores ({error}). Delete it to do without."
        ) from error


def write_scale(scale: Scale, folder: Path) -> None:
    """Put it beside the weights."""
    (folder / SCALE).write_text(json.dumps(asdict(scale)), encoding="utf-8")


def _parts(module: Any) -> tuple[nn.Module, nn.Module]:
    """The body that reads a conversation, and the head that scores it."""
    inner = module.get_base_model() if lora.has_adapters(module) else module
    return inner.base_model, inner.score


def _read(head: nn.Module, hidden_NH: Tensor) -> Float[Tensor, "N"]:
    scores: Tensor = head(hidden_NH)[:, 0].float()
    return scores


def _load(path: str, model: ModelConfig) -> tuple[nn.Module, bool]:
    """What a folder or hub id holds, as a reward model; whether its head is new."""
    if not lora.is_adapter(path):
        return _from_folder(path, model)
    if lora.task_of(path) == "SEQ_CLS":
        below = lora.base_path(path)
        try:
            module, _ = _load(below, model)
        except DataError as error:
            raise DataError(f"'{path}' is an adapter of the model '{below}': {error}") from error
        return lora.load(lora.fold(module, below), path), False
    lm = load_lm(
        path,
        dtype=model.dtype,
        attention=model.attention,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
        quantization=model.quantization,
    )
    return _with_new_head(lora.fold(lm, path)), True


def _from_folder(path: str, model: ModelConfig) -> tuple[nn.Module, bool]:
    """A reward model, or a language model with a new head; which of the two."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    place = pick_device(model.device)
    packed = quantized(model.quantization, model.dtype, place)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
        scores = any("ForSequenceClassification" in name for name in config.architectures or ())
        if not scores:
            config.num_labels = 1
        without_dropout(config)
        with _quietly():
            module, report = AutoModelForSequenceClassification.from_pretrained(
                path,
                config=config,
                dtype=getattr(torch, model.dtype),
                attn_implementation=model.attention,
                trust_remote_code=model.trust_remote_code,
                output_loading_info=True,
                **packed,
            )
    except Exception as error:
        raise DataError(
            f"no reward model could be loaded from '{path}': {first_line(error)} It must be a Hugging Face folder of "
            "a causal language model, or of one with a sequence-classification head."
        ) from error
    _check_head(module, path)
    missing = set(report["missing_keys"]) - (set() if scores else {"score.weight", "score.bias"})
    if missing:
        raise DataError(f"'{path}' lacks the weights of {', '.join(sorted(missing))}. Save the model again.")
    if not scores:
        nn.init.zeros_(module.score.weight)
    return module if packed else module.to(place), not scores


def _check_head(module: Any, path: str) -> None:
    if module.config.num_labels != 1:
        raise DataError(
            f"'{path}' tells {module.config.num_labels} classes apart, and a reward is one number. Give a model with "
            "num_labels = 1, or a language model, which gets a new head."
        )
    if not isinstance(getattr(module, "score", None), nn.Linear) or module.config.is_encoder_decoder:
        raise DataError(f"{type(module).__name__} does not score from its last token. Use a causal language model.")


def _with_new_head(lm: Any) -> nn.Module:
    """A reward model on the body of a language model, in place of its LM head."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(lm.config)
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        module: Any = AutoModelForSequenceClassification.from_config(
            config, dtype=lm.dtype, attn_implementation=config._attn_implementation
        )
    _check_head(module, "the model")
    module.base_model.load_state_dict(lm.base_model.state_dict())
    nn.init.zeros_(module.score.weight)
    module.name_or_path = lm.name_or_path
    return module.to(lm.device)  # type: ignore[no-any-return]


def choose_padding(module: nn.Module, tokenizer: Any, *, may_grow: bool = True) -> None:
    """Make the padding token one that no conversation ends with, for those who pad.

    The Hugging Face library scores the last token that is not padding. Where padding is the end-of-turn token, as it
    often is, that is the token before the end. A special token that is there for nothing else is taken, or one is added
    if the model `may_grow`: that of an adapter may not, since its base would not have the token.
    """
    inner: Any = module
    ends = set(Renderer(tokenizer).stop_ids)
    tokenizer.padding_side = "right"  # not every architecture reads positions off the attention mask
    room = inner.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        spare = _spare_token(tokenizer, ends)
        if spare is None and not may_grow:
            return
        tokenizer.add_special_tokens({"pad_token": spare or "<|pad|>"})
    if tokenizer.pad_token_id >= room:
        inner.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
        with torch.no_grad():
            inner.get_input_embeddings().weight[room:] = 0
    inner.config.pad_token_id = inner.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def _spare_token(tokenizer: Any, ends: set[int]) -> str | None:
    """A special token that stands for nothing in a conversation, by its name."""
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = {**added, **dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))}
    names = [special[index] for index in sorted(special) if index not in ends]
    found = [name for part in ("pad", "unk", "reserved") for name in names if part in name.lower()]
    return found[0] if found else None


def _passes(lengths: Sequence[int], tokens_per_pass: int) -> Iterator[list[int]]:
    """Numbers of rows of similar length whose padded size stays within the budget; at least one row each."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if group and (len(group) + 1) * lengths[index] > tokens_per_pass:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the library's report on a head that is new: it is meant to be."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
