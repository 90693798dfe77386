"""Small random models of the architectures people use, sharp enough that a wrong mask or position shows."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 300

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOW = {"sliding_window": 8}
_MIXED = {
    **_WINDOW,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
_CAPPED = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_GPT2_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", _COMMON),
    "Llama, eager": ("LlamaConfig", {**_COMMON, "attn_implementation": "eager"}),
    "GPT-2": ("GPT2Config", {**_GPT2, **_GPT2_ENDS}),
    "Qwen2": ("Qwen2Config", _COMMON),
    "Qwen3": ("Qwen3Config", {**_COMMON, "head_dim": 8}),
    "Mistral, sliding": ("MistralConfig", {**_COMMON, **_WINDOW}),
    "Mistral, sliding, eager": ("MistralConfig", {**_COMMON, **_WINDOW, "attn_implementation": "eager"}),
    "Gemma 2, mixed, soft-capped": ("Gemma2Config", {**_COMMON, **_MIXED, **_CAPPED, "head_dim": 8}),
    "Gemma 3, mixed": ("Gemma3TextConfig", {**_COMMON, **_MIXED, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "Granite, scaled logits": ("GraniteConfig", {**_COMMON, "logits_scaling": 3.0}),
    "Mixtral": ("MixtralConfig", {**_COMMON, **_MOE}),
}


@cache
def model(name: str) -> Any:
    """One of the `ARCHITECTURES`, the same one every time: do not train it."""
    kind, settings = ARCHITECTURES[name]
    attention = settings.get("attn_implementation", "sdpa")
    config = getattr(transformers, kind)(
        **{key: value for key, value in settings.items() if key != "attn_implementation"}
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
        for weight in made.parameters():
            if weight.ndim > 1:
                weight.mul_(4)  # as initialised, attention is close to uniform and hides mistakes
    return made


def plain_logprobs(module: nn.Module, prompt: list[int], action: list[int], temperature: float = 1.0) -> Tensor:
    """log π of each action token by the model's own forward pass over one whole sequence, nothing shared or cached."""
    logits = module(input_ids=torch.tensor([prompt + action]), use_cache=False).logits[0].float() / temperature
    predicted = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return predicted.gather(-1, torch.tensor(action)[:, None])[:, 0]
