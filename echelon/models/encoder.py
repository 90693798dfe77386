"""An encoder that reads utterances as text: any Hugging Face encoder, states and actions apart, one vector each.

It decodes the actor's tokens and reads them with a tokenizer of its own. What is read from the vectors is for `heads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from echelon.errors import DataError
from echelon.models.lm import first_line, without_dropout

if TYPE_CHECKING:
    from echelon.models.heads import Places, Spans

LONGEST = 512
"""Most tokens of a text; of a longer one the end is read."""


class TextEncoder(nn.Module):
    """The mean of an encoder's last hidden states over the tokens of a text.

    `reads` is the tokenizer of the actor, whose tokens it is given. Dropout is off, as in every model here.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Any, reads: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        config: Any = encoder.config
        self.tokenizer, self.reads = tokenizer, reads
        self.tokenizer.truncation_side = "left"
        self.width = int(config.hidden_size)
        places = getattr(config, "max_position_embeddings", None) or LONGEST
        if "roberta" in config.model_type:
            places -= config.pad_token_id + 1  # its positions begin behind that of the padding
        self.longest = min(LONGEST, places, self.tokenizer.model_max_length)

    @classmethod
    def load(cls, path: str, reads: Any, *, dtype: str = "float32", trust_remote_code: bool = False) -> TextEncoder:
        """The encoder in a model folder or of a hub id. Raises DataError where there is none, or it cannot pad."""
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            without_dropout(config)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            whole = AutoModel.from_pretrained(
                path, config=config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )
        except Exception as error:
            raise DataError(
                f"no encoder could be loaded from '{path}': {first_line(error)} It must be a Hugging Face folder or "
                "hub id with weights and a tokenizer."
            ) from error
        return cls._of(whole, tokenizer, reads, path)

    @classmethod
    def like(cls, folder: Path, reads: Any) -> TextEncoder:
        """One made as that which `describe` wrote of, with random weights."""
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        config = AutoConfig.from_pretrained(folder)
        without_dropout(config)
        return cls._of(AutoModel.from_config(config), AutoTokenizer.from_pretrained(folder), reads, str(folder))

    @classmethod
    def _of(cls, whole: Any, tokenizer: Any, reads: Any, path: str) -> TextEncoder:
        if tokenizer.pad_token is None:
            raise DataError(
                f"the tokenizer of '{path}' has no padding token, so texts of different lengths cannot be read "
                "together. Set tokenizer.pad_token and save it again."
            )
        if hasattr(whole, "encoder") and hasattr(whole, "decoder"):
            whole = whole.get_encoder()
        if isinstance(getattr(whole, "pooler", None), nn.Module):
            whole.pooler = None  # not read, so it would never learn
        return cls(whole, tokenizer, reads)

    def describe(self, folder: Path) -> None:
        """Everything but the weights: the encoder's configuration and its tokenizer."""
        config: Any = self.config
        config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def forward(self, texts: Sequence[str]) -> Float[Tensor, "N H"]:
        """A vector per text, float32."""
        device = next(self.encoder.parameters()).device
        rows = self.tokenizer(
            [text or " " for text in texts], padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        ).to(device)
        inputs = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
        hidden = self.encoder(**inputs).last_hidden_state.float()
        inside = rows["attention_mask"][..., None].to(hidden.dtype)
        vectors: Tensor = (hidden * inside).sum(1) / inside.sum(1).clamp(min=1)
        return vectors

    def read(self, tokens: Tensor, q_at: Spans, v_at: Places) -> tuple[Float[Tensor, "Q SA"], Float[Tensor, "V S"]]:
        """State and action of every utterance side by side, and every state. Texts that come twice are read once."""
        rows = tokens.tolist()
        answered = self._states(rows, q_at)
        seen = self._states(rows, v_at)
        spans = zip(q_at.row.tolist(), q_at.first.tolist(), q_at.last.tolist(), strict=True)
        said = [
            str(self.reads.decode(rows[row][first : last + 1], skip_special_tokens=True)) for row, first, last in spans
        ]
        states, actions = self._once([*answered, *seen]), self._once(said)
        return torch.cat([states[: len(answered)], actions], dim=-1), states[len(answered) :]

    def _once(self, texts: Sequence[str]) -> Float[Tensor, "N H"]:
        """A vector per text; each different text is computed once."""
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        vectors: Tensor = self(list(places))
        return vectors[torch.tensor([places[text] for text in texts], device=vectors.device)]

    def _states(self, rows: list[list[int]], at: Places) -> list[str]:
        """The texts of states: what stands in the row up to their last token, who spoke included."""
        ends = zip(at.row.tolist(), at.state.tolist(), strict=True)
        return [str(self.reads.decode(rows[row][: state + 1])) for row, state in ends]
