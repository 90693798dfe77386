"""Chat templates of the kinds models come with, each with a small tokenizer that has the special tokens it needs."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from echelon.models.lm import TINY_CHAT_TEMPLATE
from echelon.text.chat import PLAIN_CHAT_TEMPLATE

_CUE = "{% if add_generation_prompt %}"
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    + _CUE
    + "<|im_start|>assistant\n{% endif %}"
)
_LLAMA = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    + _CUE
    + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n{{ message.content | trim }}"
    "<end_of_turn>\n{% endfor %}" + _CUE + "<start_of_turn>model\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
_SPACED = (  # the end-of-turn token behind a space, and a BOS before every exchange
    "{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }} {{ eos_token }}"
    "{% else %}{{ bos_token }}[INST] {{ message.content }} [/INST]{% endif %}{% endfor %}"
)
_FORGETS_THOUGHTS = (
    "{% for message in messages %}{% set said = message.content %}"
    "{% if message.role == 'assistant' and not loop.last %}{% set said = said.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ said }}<|im_end|>\n{% endfor %}" + _CUE + "<|im_start|>assistant\n{% endif %}"
)
_PLAIN = (
    "{% for message in messages %}{{ message.role | title }}: {{ message.content }}\n{% endfor %}"
    + _CUE
    + "Assistant: {% endif %}"
)

KINDS: dict[str, dict[str, Any]] = {
    "tiny": {
        "template": TINY_CHAT_TEMPLATE,
        "special": ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
    },
    "chatml": {
        "template": _CHATML,
        "special": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        "eos_token": "<|endoftext|>",  # of a base model: not what ends a message
        "pad_token": "<|endoftext|>",
    },
    "llama": {
        "template": _LLAMA,
        "special": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "bos_token": "<|begin|>",
        "eos_token": "<|eot_id|>",
    },
    "gemma": {
        "template": _GEMMA,
        "special": ["<start_of_turn>", "<end_of_turn>"],
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
    },
    "mistral": {
        "template": _MISTRAL,
        "special": ["[INST]", "[/INST]"],
        "bos_token": "<s>",
        "eos_token": "</s>",
    },
    "spaced": {"template": _SPACED, "special": ["[INST]", "[/INST]"], "bos_token": "<s>", "eos_token": "</s>"},
    "forgets thoughts": {
        "template": _FORGETS_THOUGHTS,
        "special": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    },
    "plain": {"template": _PLAIN, "special": [], "eos_token": "<|endoftext|>"},
    "ours": {"template": PLAIN_CHAT_TEMPLATE, "special": [], "eos_token": "<|endoftext|>"},
}
"""What `tokenizer` takes, by kind."""

TAKES_NO_SYSTEM = {"gemma", "mistral", "spaced"}


@cache
def tokenizer(kind: str) -> Any:
    """The tokenizer of one of the `KINDS`."""
    return make_tokenizer(**KINDS[kind])


def make_tokenizer(*, template: str | None, special: list[str], **named: str) -> Any:
    """A byte-level tokenizer with a few hundred tokens, so that any text survives encoding and decoding."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=list(dict.fromkeys([*special, *named.values()])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["user assistant system model User: Assistant: hello the answer is"] * 2, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, additional_special_tokens=special, clean_up_tokenization_spaces=False, **named
    )
    if template is not None:
        made.chat_template = template
    return made
