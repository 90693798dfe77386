"""An encoder that reads utterances: what it is given to read, what is read from it, and what may not change it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, T5Config, T5Model

from echelon.data.packing import Sampled, pack, pack_branches
from echelon.errors import DataError
from echelon.models.encoder import TextEncoder
from echelon.models.heads import Places, Spans, UtteranceCritic
from echelon.models.lm import attention_inputs, tiny

WORDS = "door red blue key sun moon yes no"
READS = tiny([WORDS], vocab_size=300, hidden=16, layers=1, heads=1)[1]
"""The tokenizer of the actor."""


def ids(text: str) -> list[int]:
    return list(READS(text)["input_ids"])


TURNS = [
    Sampled(ids("red"), ids("sun"), [0.0] * 9),
    Sampled(ids("red sun no"), ids(" moon"), [0.0] * 9),
    Sampled(ids("blue key"), ids("sun"), [0.0] * 9),
]
for _turn in TURNS:
    _turn.logprobs = [0.0] * len(_turn.action)


def small_bert(folder: Path, *, tokenizer: Any = None, width: int = 16, seed: int = 0) -> Path:
    """The folder of an encoder with random weights and a tokenizer of its own."""
    tokenizer = tokenizer or tiny([WORDS], vocab_size=290, hidden=16, layers=1, heads=1)[1]
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 2 * width}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder.load(str(small_bert(tmp_path_factory.mktemp("bert"))), READS)


def judged(critic: UtteranceCritic, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    spans = Spans(batch.row_N, batch.state_N, batch.first_N, batch.last_N)
    q, v = critic(batch.tokens, spans, Places(batch.row_N, batch.state_N), **attention_inputs(critic, batch))
    return q, v


def test_q_reads_state_and_action_apart_and_v_the_state(bert: TextEncoder) -> None:
    critic = UtteranceCritic.from_encoder(bert)
    q, v = judged(critic, pack(TURNS[1:2]))
    state, action = bert(["red sun no"])[0], bert([" moon"])[0]
    for twin in range(2):
        torch.testing.assert_close(v[twin], critic.v[twin](state))
        torch.testing.assert_close(q[twin], critic.q[twin](torch.cat([state, action])))


def test_a_vector_is_the_mean_over_the_tokens_of_the_text_whatever_else_is_read(bert: TextEncoder) -> None:
    hidden = bert.encoder(input_ids=torch.tensor([bert.tokenizer("red sun")["input_ids"]])).last_hidden_state[0]
    torch.testing.assert_close(bert(["red sun"])[0], hidden.mean(0))
    torch.testing.assert_close(bert(["blue key sun moon yes no", "red sun", ""])[1], hidden.mean(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", [pack, pack_branches])
def test_values_of_packed_turns_are_those_of_each_turn_alone(bert: TextEncoder, layout: Any) -> None:
    critic = UtteranceCritic.from_encoder(bert)
    together = judged(critic, layout(TURNS))
    alone = [judged(critic, pack([turn])) for turn in TURNS]
    for index, packed in enumerate(together):
        torch.testing.assert_close(packed, torch.cat([pair[index] for pair in alone], 1), atol=1e-6, rtol=0)


def test_of_a_long_text_the_end_is_read(bert: TextEncoder) -> None:
    assert bert.longest == 64
    long = "red blue " * 60
    torch.testing.assert_close(bert([long + " key"]), bert(["moon " + long + " key"]))
    assert not bert([long + " key"]).isclose(bert([long + " sun"])).any()


def test_v_does_not_know_the_action_and_q_does(bert: TextEncoder) -> None:
    critic = UtteranceCritic.from_encoder(bert)
    other = Sampled(TURNS[0].prompt, ids("moon"), [0.0] * len(ids("moon")))
    (q_one, v_one), (q_two, v_two) = judged(critic, pack(TURNS[:1])), judged(critic, pack([other]))
    torch.testing.assert_close(v_one, v_two, atol=1e-6, rtol=0)
    assert not torch.isclose(q_one, q_two, atol=1e-7).any()


def test_texts_that_come_twice_are_read_once(bert: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    whole = TextEncoder.forward

    def forward(self: TextEncoder, texts: list[str]) -> torch.Tensor:
        read.extend(texts)
        return whole(self, texts)

    monkeypatch.setattr(TextEncoder, "forward", forward)
    judged(UtteranceCritic.from_encoder(bert), pack([*TURNS, *TURNS]))
    assert sorted(read) == sorted(["red", "red sun no", "blue key", "sun", " moon"])


def test_a_gradient_reaches_all_that_is_trained_and_nothing_is_dropped(bert: TextEncoder) -> None:
    critic = UtteranceCritic.from_encoder(copy.deepcopy(bert)).train()
    (q, v), again = judged(critic, pack(TURNS)), judged(critic, pack(TURNS))
    assert q.equal(again[0])
    (q.sum() + v.sum()).backward()
    unread = {"body.encoder.embeddings.token_type_embeddings.weight"}
    still = {name for name, p in critic.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert still - unread == set()


def test_the_encoder_of_an_encoder_decoder_is_taken(tmp_path: Path) -> None:
    tokenizer = tiny([WORDS], vocab_size=290, hidden=16, layers=1, heads=1)[1]
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = TextEncoder.load(str(tmp_path), READS)
    assert encoder(["red", "blue key"]).shape == (2, 16)
    assert not any("decoder" in name for name, _ in encoder.named_parameters())


def test_a_folder_without_an_encoder_and_a_tokenizer_that_cannot_pad_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^no encoder could be loaded from '.*nowhere': .*"):
        TextEncoder.load(str(tmp_path / "nowhere"), READS)
    folder = small_bert(tmp_path / "bert")
    tokenizer = tiny([WORDS], vocab_size=290, hidden=16, layers=1, heads=1)[1]
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(DataError, match="has no padding token"):
        TextEncoder.load(str(folder), READS)
