"""Causal language models from the Hugging Face library: load one, build a tiny one, ask it for log-probabilities.

Knows nothing of rewards or episodes. The shift between a token and the position that predicts it happens here, in
`token_logprobs`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from echelon.errors import DataError, need
from echelon.models import lora, stacked
from echelon.ops.vocabulary import linear_scores

if TYPE_CHECKING:
    from echelon.data.packing import Batch

LOGITS_PER_CHUNK = 1 << 25
"""Where the head is no plain linear layer, at most this many float32 logits exist at once (128 MiB)."""

TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""One token for who speaks, one for the end of the message, nothing else."""


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model folder or hub id. It must have a chat template; a padding token is not needed.

    An adapter that was saved without one has that of the model it was made for.
    """
    from transformers import AutoTokenizer

    check_folder(path)
    if Path(path).is_dir() and lora.is_adapter(path) and not list(Path(path).glob("tokenizer*")):
        return load_tokenizer(lora.base_path(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise DataError(
            f"no tokenizer could be loaded from '{path}': {first_line(error)} Save one there "
            "(tokenizer.save_pretrained), next to the weights."
        ) from error
    return tokenizer


def load_lm(
    path: str,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    device: str = "auto",
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    quantization: str = "none",
    shapes_only: bool = False,
    check: bool = True,
) -> nn.Module:
    """A causal language model ready to sample and train: dropout off, so that both see the same distribution.

    Of an adapter's folder it is the model that the adapter was made for, frozen, with the adapter, which goes on
    learning. With `gradient_checkpointing` each layer keeps its input only and is computed again for the gradient, in
    training mode (`module.train()`). With `shapes_only` no weights are read: they are on the meta device, while buffers
    are there; of an adapter's folder everything is read. Without `check` it may be on a device that cannot compute it,
    and the caller asks `check_end_to_end`.
    """
    check_folder(path)
    if lora.is_adapter(path):
        return _load_adapted(
            path,
            dtype=dtype,
            attention=attention,
            device=device,
            trust_remote_code=trust_remote_code,
            gradient_checkpointing=gradient_checkpointing,
            quantization=quantization,
            check=check,
        )
    if shapes_only:
        module = _shapes(path, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code)
    else:
        module = _load_whole(
            path,
            dtype=dtype,
            attention=attention,
            device=device,
            trust_remote_code=trust_remote_code,
            bits=quantization,
        )
        if check and lays_end_to_end(module):
            check_end_to_end(module)
    if gradient_checkpointing:
        enable_checkpointing(module)
    return module


def _load_adapted(path: str, **settings: Any) -> nn.Module:
    """An adapter on the model it was made for. An adapter below it is folded into that model."""
    if lora.task_of(path) == "SEQ_CLS":
        raise DataError(f"'{path}' is the adapter of a reward model, which writes nothing. Give one of a policy.")
    below = lora.base_path(path)
    try:
        module = load_lm(below, **settings)
    except DataError as error:
        raise DataError(f"'{path}' is an adapter of the model '{below}': {error}") from error
    module = lora.fold(module, below)
    adapted: nn.Module = lora.load(module, path)
    return adapted


def _load_whole(path: str, *, dtype: str, attention: str, device: str, trust_remote_code: bool, bits: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    place = pick_device(device)
    packed = quantized(bits, dtype, place)
    logging.disable_progress_bar()  # one bar is enough: the run's own
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        without_dropout(config)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            **packed,
        )
    except Exception as error:
        raise DataError(
            f"no causal language model could be loaded from '{path}': {first_line(error)} "
            "It must be a Hugging Face folder with config.json and weights."
        ) from error
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        raise DataError(f"'{path}' is a reward model, which writes nothing. Give a language model.")
    module: nn.Module = model
    if not packed:
        module.to(place)
    return module.train()


def _shapes(path: str, *, dtype: str, attention: str, trust_remote_code: bool) -> nn.Module:
    """The same model without weights; its buffers are on the host."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        without_dropout(config)
        with weights_without_numbers():
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:
        raise DataError(f"no causal language model could be made as '{path}' says: {first_line(error)}") from error
    module: nn.Module = model
    return module.train()


@contextmanager
def weights_without_numbers() -> Iterator[None]:
    """Within, weights of new modules are put on the meta device one by one; buffers are computed as ever."""
    register = nn.Module.register_parameter

    def without(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = without  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def quantized(bits: str, dtype: str, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` takes to hold the weights in 8 or 4 bits, nothing for none.

    Raises MissingExtra without bitsandbytes, and DataError without a GPU.
    """
    if bits == "none":
        return {}
    need("bitsandbytes", "quantization")
    if device.type != "cuda":
        raise DataError(
            f"model.quantization = {bits}: it needs an NVIDIA or AMD GPU, and the model is on {device}. Leave it out."
        )
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    return {"quantization_config": how, "device_map": {"": device}}


def tiny(
    corpus: Sequence[str],
    *,
    vocab_size: int = 1024,
    hidden: int = 128,
    layers: int = 3,
    heads: int = 4,
    max_positions: int = 2048,
    seed: int = 0,
) -> tuple[nn.Module, Any]:
    """A small Llama-style model with random weights, and a byte-level BPE tokenizer learned from a corpus.

    About `12·layers·hidden²` parameters besides the embeddings: 0.6 M by default, enough to learn a game in minutes on
    a CPU. Both are ordinary Hugging Face objects.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = learned_tokenizer(corpus, vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config)
    return model.train(), tokenizer


def learned_tokenizer(corpus: Sequence[str], vocab_size: int) -> Any:
    """Byte-level BPE of at most so many tokens, or of the 256 bytes alone, learned from texts; with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[2:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TINY_CHAT_TEMPLATE
    return tokenizer


def token_logprobs(module: nn.Module, batch: Batch, *, temperature: float = 1.0) -> Float[Tensor, "B T"]:
    """log π of each sampled token given the tokens before it, float32; zero on all other positions.

    The LM head runs on sampled positions only and in blocks: no tensor of rows by positions by vocabulary ever exists.
    """
    hidden_MH, targets_M = _before_sampled(module, batch)
    logprobs_M, _ = _scores(module, hidden_MH, targets_M, temperature, with_entropy=False)
    return _on_sampled(batch, logprobs_M)


def token_logprobs_and_entropy(
    module: nn.Module, batch: Batch, *, temperature: float = 1.0
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """log π of each sampled token, and the entropy in nats of the distribution it was drawn from."""
    hidden_MH, targets_M = _before_sampled(module, batch)
    logprobs_M, entropy_M = _scores(module, hidden_MH, targets_M, temperature, with_entropy=True)
    assert entropy_M is not None
    return _on_sampled(batch, logprobs_M), _on_sampled(batch, entropy_M)


@contextmanager
def head_reads(module: nn.Module, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, the LM head sees `choose(hidden)` instead of all hidden states: any architecture, no wasted logits."""
    head = output_head(module)
    hook = head.register_forward_pre_hook(lambda _, args: (choose(args[0]), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


class AttentionForm:
    """Who may attend to whom, in the form a model takes it: one mask, or one per kind of layer.

    Raises DataError for a model with layers that are neither full nor sliding-window attention.
    """

    def __init__(self, module: nn.Module) -> None:
        config: Any = module.config
        config = config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ())
        if other := kinds - {"full_attention", "sliding_attention", "global"}:
            raise DataError(
                f"{type(module).__name__} has layers of kind {', '.join(sorted(other))}: no mask says what their "
                "tokens may see. Use a model with full or sliding-window layers."
            )
        self.mixed = {"full_attention", "sliding_attention"} <= kinds
        self.window: int | None = getattr(config, "sliding_window", None) if kinds != {"full_attention"} else None
        self.additive = config._attn_implementation == "eager"

    def __call__(self, visible: Tensor, distance: Tensor, dtype: torch.dtype) -> Any:
        """From what each token may see and how far back that lies, both (rows, 1, queries, keys)."""
        if self.window is None:
            return self._form(visible, dtype)
        near = self._form(visible & (distance < self.window), dtype)
        return {"full_attention": self._form(visible, dtype), "sliding_attention": near} if self.mixed else near

    def _form(self, visible: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.additive:
            return visible
        bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return bias.masked_fill(~visible, torch.finfo(dtype).min)


def attention_inputs(module: nn.Module, batch: Batch) -> dict[str, Any]:
    """Positions and mask of rows with branches or many documents, as the model takes them; nothing for plain rows."""
    visible = batch.sees()
    if visible is None or batch.positions is None:
        return {}
    distance = batch.positions[:, None, :, None] - batch.positions[:, None, None, :]
    mask = AttentionForm(module)(visible[:, None], distance, next(module.parameters()).dtype)
    return {"position_ids": batch.positions, "attention_mask": mask}


def hidden_states(
    body: nn.Module, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, "B"] | None = None, **attention: Any
) -> Float[Tensor, "B T H"]:
    """The last hidden states of a decoder (`backbone`); behind the end of a row they may be anything.

    `attention`: what `attention_inputs` gives. With `lengths`, no padding is computed where attention allows it.
    """
    rows = _Rows(body, tokens, lengths, attention)
    return rows.restore(body(**rows.inputs, use_cache=False).last_hidden_state)


def lays_end_to_end(module: nn.Module) -> bool:
    """Whether rows can be given as one, positions restarting at each: flash attention then computes no padding.

    Other implementations would build a mask of all tokens by all tokens; for them rows of similar length share a pass.
    """
    implementation = module.config.get_text_config()._attn_implementation  # type: ignore[operator, union-attr]
    return "flash" in str(implementation)


class _Rows:
    """How rows are given to a model, and where their hidden states are found again."""

    def __init__(self, module: nn.Module, tokens: Tensor, lengths: Tensor | None, attention: dict[str, Any]) -> None:
        self.shape, self.inside = tokens.shape, None
        self.inputs = {"input_ids": tokens, **attention}
        if lengths is not None and not attention and lays_end_to_end(module):
            columns = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
            self.inside = columns < lengths[:, None]
            self.inputs = {"input_ids": tokens[self.inside][None], "position_ids": columns[self.inside][None]}

    def restore(self, hidden: Tensor) -> Tensor:
        """(B, T, H) from what the model returned; zero where there is no token."""
        if self.inside is None:
            return hidden
        return hidden.new_zeros(*self.shape, hidden.shape[-1]).index_put(self.inside.nonzero(as_tuple=True), hidden[0])


@torch.no_grad()
def check_end_to_end(module: nn.Module) -> None:
    """Raise DataError unless rows laid end to end stay apart: their positions must reach the model's attention."""
    with next(module.parameters()).device:
        tokens, lengths = torch.arange(8).repeat(2, 1), torch.tensor([8, 5])
    rows = _Rows(module, tokens, lengths, {})
    body = backbone(module)
    together = rows.restore(body(**rows.inputs, use_cache=False).last_hidden_state)[1, :5].float()
    alone = body(input_ids=tokens[1:, :5], use_cache=False).last_hidden_state[0].float()
    if not (together - alone).abs().mean() / alone.std() < 0.03:
        raise DataError(
            f"{type(module).__name__} does not tell flash attention where rows begin, so rows laid end to end would "
            "read each other. Use attention = sdpa."
        )


@torch.no_grad()
def check_masks(module: nn.Module) -> None:
    """Raise DataError unless masks and positions reach the model's attention, as rows of `pack_branches` need it.

    Two continuations of one prompt must score the same side by side in one row as each in a row of its own.
    """
    with evaluating(module):
        _check_masks(module)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within, nothing is dropped (adapters may drop some of their inputs while learning) and nothing checkpointed."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def shares_prompts(module: nn.Module) -> bool:
    """Whether several answers can branch off one prompt in a row: masks reach the model, and are no detour for it."""
    try:
        check_masks(module)
    except DataError:
        return False
    return not lays_end_to_end(module)


def output_head(module: nn.Module) -> nn.Module:
    """The layer that turns hidden states into logits."""
    head = module.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(head, nn.Module), f"{type(module).__name__} has no LM head"
    return head


def logits_of(module: nn.Module, hidden: Float[Tensor, "M H"]) -> Float[Tensor, "M V"]:
    """Float32 logits of hidden states, with what some architectures do after the head (scaling, soft-capping)."""
    scale, cap = after_head(module)
    logits: Tensor = output_head(module)(hidden).float() * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def backbone(module: nn.Module) -> nn.Module:
    """The decoder without its LM head: ids in, `last_hidden_state` out."""
    body = module.get_decoder()  # type: ignore[operator]
    assert isinstance(body, nn.Module)
    return body


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU when there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def count_parameters(module: nn.Module) -> int:
    """How many numbers the module holds, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _check_masks(module: nn.Module) -> None:
    weight = next(module.parameters())
    with weight.device:
        tokens, position = torch.arange(8), torch.tensor([0, 1, 2, 3, 4, 5, 4, 5])
        branch = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
        visible = ((branch == 0) | (branch == branch[:, None])) & torch.ones(8, 8, dtype=torch.bool).tril()
    mask = AttentionForm(module)(visible[None, None], (position[:, None] - position)[None, None], weight.dtype)
    alone = [module(input_ids=tokens[None, branch != other], use_cache=False).logits[0, 4:] for other in (2, 1)]
    expected = torch.cat(alone).float()
    try:
        both = module(input_ids=tokens[None], position_ids=position[None], attention_mask=mask, use_cache=False)
        error, reason = (both.logits[0, 4:].float() - expected).abs().mean() / expected.std(), "it ignores them"
    except (TypeError, ValueError, RuntimeError) as refusal:
        error, reason = torch.tensor(torch.inf), first_line(refusal).rstrip(".")
    if not error < (1e-3 if weight.dtype == torch.float32 else 0.03):
        raise DataError(
            f"{type(module).__name__} cannot be told by masks and positions which tokens see which ({reason}), so "
            "actions cannot branch off one row. Use another architecture, or attention = sdpa or eager."
        )


def _before_sampled(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states that predict the sampled tokens, and those tokens: the only shift by one there is."""
    found: list[Tensor] = []
    row, column = batch.mask.nonzero(as_tuple=True)
    rows = _Rows(module, batch.tokens, batch.lengths, attention_inputs(module, batch))

    def take(hidden: Tensor) -> Tensor:
        found.append(rows.restore(hidden)[row, batch.before[row, column]])
        return hidden[:1, -1:]

    with head_reads(module, take):
        module(**rows.inputs, use_cache=False)
    return found[0], batch.tokens[row, column]


def _on_sampled(batch: Batch, values_M: Tensor) -> Float[Tensor, "B T"]:
    place = torch.zeros(batch.tokens.shape, dtype=torch.float32, device=batch.tokens.device)
    return place.masked_scatter(batch.mask, values_M)


def after_head(module: nn.Module) -> tuple[float, float | None]:
    """What the logits are multiplied by after the head, and where they are then soft-capped."""
    config = module.config.get_text_config()  # type: ignore[operator, union-attr]
    multiplier, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    scale = (1.0 if multiplier is None else multiplier) / (1.0 if divisor is None else divisor)  # Cohere, Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return scale, None if cap is None else float(cap)


def _scores(
    module: nn.Module, hidden_MH: Tensor, targets_M: Tensor, temperature: float, *, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """log π of the targets, and the entropy if it is wanted."""
    outer = output_head(module)
    head = lora.spoken_through(outer)
    if type(head) is not nn.Linear or any(part._forward_hooks or part._forward_pre_hooks for part in (outer, head)):
        return _scores_of_any_head(module, hidden_MH, targets_M, temperature)
    scale, cap = after_head(module)
    return linear_scores(
        hidden_MH,
        head.weight,
        head.bias,
        targets_M,
        scale=scale,
        cap=cap,
        temperature=float(temperature),
        with_entropy=with_entropy,
    )


def _scores_of_any_head(
    module: nn.Module, hidden_MH: Tensor, targets_M: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The same when an adapter sits on the head, or whatever it is: positions in chunks, remade for the gradient."""

    def score(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(logits_of(module, hidden) / temperature, dim=-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)

    weight = output_head(module).weight
    assert isinstance(weight, Tensor)
    size = max(1, LOGITS_PER_CHUNK // weight.shape[0])
    if len(targets_M) <= size:
        return score(hidden_MH, targets_M)
    parts = [
        checkpoint(score, hidden, targets, use_reentrant=False)
        for hidden, targets in zip(torch.split(hidden_MH, size), torch.split(targets_M, size), strict=True)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def enable_checkpointing(module: Any) -> None:
    """Have each layer keep only its input. Raises DataError for a model that cannot."""
    try:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise DataError(
            f"model.gradient_checkpointing = True: {type(module).__name__} cannot do that. Leave it out."
        ) from error


def without_dropout(config: Any) -> None:
    """Set every dropout of a model's settings to 0: the trainer's distribution would differ from the sampler's."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(part, name, 0.0)


def check_vocabulary(path: str, module: Any, tokenizer: Any) -> None:
    """Raise DataError for a tokenizer that knows ids the model has no embedding for."""
    rows = module.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise DataError(
            f"'{path}': the tokenizer has {len(tokenizer)} tokens and the model embeddings for {rows}, so it cannot "
            "read all of them. Save the tokenizer that belongs to the model, or resize its embeddings."
        )


def check_folder(path: str) -> None:
    """Raise DataError for a path that is no model folder and cannot be a hub id either."""
    if not path:
        raise DataError("model.path is empty: give a Hugging Face model folder or hub id, e.g. --model.path runs/tiny.")
    folder = Path(path)
    if folder.is_dir() and not ((folder / "config.json").is_file() or (folder / stacked.CONFIG).is_file()):
        raise DataError(f"'{path}' is a folder without config.json, so it is not a Hugging Face model folder.")
    local = path.startswith((".", "/", "~")) or path.count("/") != 1 or folder.parent.is_dir()
    if not folder.exists() and local:
        raise DataError(f"there is no model folder '{path}'. Give a folder, a run directory or a hub id (name/model).")


def first_line(error: Exception) -> str:
    """What an error says first, as a sentence."""
    lines = str(error).strip().splitlines()
    line = lines[0].strip() if lines else type(error).__name__
    return line if line.endswith(".") else f"{line}."
