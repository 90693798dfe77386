"""Where a run begins that begins with nothing: the shape of a model, and weights that nobody has trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from echelon.config import ModelConfig
from echelon.errors import DataError
from echelon.models.lm import first_line, learned_tokenizer, load_tokenizer
from echelon.seeds import derive_seed


@contextmanager
def untrained(model: ModelConfig, *, seed: int, texts: Sequence[str] = ()) -> Iterator[ModelConfig]:
    """The same model with random weights, in a folder that is there inside the block: to be loaded from it.

    Of `model.path` only the tokenizer and config.json are read, so that no weights need be there. A folder without a
    tokenizer is given one that is learned from `texts`, if there are any: byte-level BPE of at most as many tokens as
    config.json says, and the vocabulary is then as large as that. Raises DataError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder_given = Path(model.path)
    learn = bool(texts) and folder_given.is_dir() and not list(folder_given.glob("tokenizer*"))
    tokenizer = None if learn else load_tokenizer(model.path)
    try:
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
        if tokenizer is None:
            tokenizer = learned_tokenizer(texts, config.vocab_size)
            config.vocab_size = len(tokenizer)
            config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "untrained"))
            module: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    except Exception as error:
        raise DataError(
            f"no causal language model could be made as '{model.path}' says: {first_line(error)} "
            "untrained needs a folder, or a hub id, with config.json and a tokenizer; sft learns one if there is none."
        ) from error
    with TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        tokenizer.save_pretrained(Path(folder))
        yield replace(model, path=folder)
