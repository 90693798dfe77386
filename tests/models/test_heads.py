"""Values read from hidden states: where they are read, who trains the body, what a target network is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from echelon.config import LoraConfig
from echelon.data.packing import Sampled, pack, pack_branches
from echelon.errors import CheckpointError
from echelon.models import lora
from echelon.models.encoder import TextEncoder
from echelon.models.heads import (
    Places,
    Spans,
    TokenValue,
    UtteranceCritic,
    critic_like,
    hidden_size,
    token_values,
    values_before,
)
from echelon.models.lm import attention_inputs, backbone, tiny
from echelon.ops import bellman
from echelon.ops.scales import Scale
from echelon.train.learner import load_module, save_module
from tests.models.test_encoder import small_bert

TURNS = [
    Sampled([5, 6, 7], [8, 9], [0.0] * 2),
    Sampled([5, 6, 7, 8, 9, 10], [11], [0.0]),
    Sampled([12], [13, 14, 15], [0.0] * 3),
]


def language_model(seed: int = 0) -> Any:
    return tiny(["a b c"], vocab_size=270, hidden=32, layers=2, heads=2, seed=seed)[0]


def judged(critic: UtteranceCritic, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    spans = Spans(batch.row_N, batch.state_N, batch.first_N, batch.last_N)
    q, v = critic(batch.tokens, spans, Places(batch.row_N, batch.state_N), **attention_inputs(critic, batch))
    return q, v


@pytest.mark.parametrize("layout", [pack, pack_branches])
def test_values_of_packed_turns_are_those_of_each_turn_alone(layout: Any) -> None:
    critic = UtteranceCritic.from_lm(language_model())
    together = judged(critic, layout(TURNS))
    alone = [judged(critic, pack([turn])) for turn in TURNS]
    for index, packed in enumerate(together):
        assert packed.shape == (2, 3)
        torch.testing.assert_close(packed, torch.cat([pair[index] for pair in alone], 1), atol=1e-6, rtol=0)


def test_q_reads_the_state_and_the_mean_of_the_action_and_v_the_state() -> None:
    critic = UtteranceCritic.from_lm(language_model())
    q, v = judged(critic, pack(TURNS[:1]))
    hidden = critic.body(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).last_hidden_state[0]
    for twin in range(2):
        torch.testing.assert_close(v[twin], critic.v[twin](hidden[2]))
        torch.testing.assert_close(q[twin], critic.q[twin](torch.cat([hidden[2], (hidden[3] + hidden[4]) / 2])))


def test_v_does_not_know_the_action_and_q_does() -> None:
    critic = UtteranceCritic.from_lm(language_model())
    other = [Sampled([5, 6, 7], [20, 9], [0.0] * 2)]
    (q_one, v_one), (q_two, v_two) = judged(critic, pack(TURNS[:1])), judged(critic, pack(other))
    assert v_one.equal(v_two)
    assert not torch.isclose(q_one, q_two, atol=1e-7).any()


def test_the_twins_differ_from_the_start() -> None:
    q, v = judged(UtteranceCritic.from_lm(language_model()), pack(TURNS))
    assert not torch.isclose(q[0], q[1], atol=1e-7).any()
    assert not torch.isclose(v[0], v[1], atol=1e-7).any()


def test_a_critic_with_its_own_body_trains_a_copy() -> None:
    module = language_model()
    critic = UtteranceCritic.from_lm(module)
    q, v = judged(critic, pack(TURNS))
    (q.sum() + v.sum()).backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in critic.parameters())
    mine = {id(parameter) for parameter in module.parameters()}
    assert not any(id(parameter) in mine for parameter in critic.parameters())


def test_a_critic_on_a_shared_body_sends_it_no_gradient_and_does_not_own_it() -> None:
    module = language_model()
    critic = UtteranceCritic.from_lm(module, shared_body=True)
    assert not any(name.startswith("body") for name in critic.state_dict())
    q, v = judged(critic, pack(TURNS))
    (q.sum() + v.sum()).backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in critic.parameters())
    with torch.no_grad():
        backbone(module).get_input_embeddings().weight.mul_(2)  # type: ignore[operator, union-attr]
    assert not judged(critic, pack(TURNS))[0].isclose(q).any(), "the actor moved, and with it what the critic reads"


def test_nothing_is_dropped_where_a_critic_reads_with_the_actors_body() -> None:
    module = lora.attach(language_model(), LoraConfig(rank=4, dropout=0.5)).train()
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    critic = UtteranceCritic.from_lm(module, shared_body=True)
    assert all(map(torch.equal, judged(critic, pack(TURNS)), judged(critic, pack(TURNS))))
    assert module.training, "the actor goes on as it was"


@pytest.mark.parametrize("shared_body", [False, True])
def test_the_target_is_another_critic_that_lags(shared_body: bool) -> None:
    module = language_model()
    critic = UtteranceCritic.from_lm(module, shared_body=shared_body)
    target = critic.target()
    batch = pack(TURNS)
    before = judged(critic, batch)[0].detach()
    assert judged(target, batch)[0].equal(before)
    ours = {id(parameter) for parameter in critic.parameters()}
    assert not any(id(parameter) in ours or parameter.requires_grad for parameter in target.parameters())
    assert len(list(target.parameters())) == len(list(critic.parameters()))

    with torch.no_grad():
        for head in critic.q:
            head[-1].bias.add_(1.0)  # type: ignore[index, operator, union-attr]
    torch.testing.assert_close(judged(critic, batch)[0], before + 1.0)
    assert judged(target, batch)[0].equal(before)
    bellman.polyak_(target, critic, 0.25)
    torch.testing.assert_close(judged(target, batch)[0], before + 0.25)
    bellman.hard_copy_(target, critic)
    torch.testing.assert_close(judged(target, batch)[0], before + 1.0)


def test_a_critic_can_start_around_a_value() -> None:
    critic = UtteranceCritic.from_lm(language_model())
    before = judged(critic, pack(TURNS))
    critic.start_at(-7.5)
    for shifted, value in zip(judged(critic, pack(TURNS)), before, strict=True):
        torch.testing.assert_close(shifted, value - 7.5)


def test_an_untrained_token_value_is_zero_or_where_it_was_told_to_start() -> None:
    value = TokenValue.from_lm(language_model())
    tokens = pack(TURNS).tokens
    assert value(tokens).eq(0).all()
    value.start_at(3.0)
    assert value(tokens).eq(3.0).all()


def test_values_before_and_after_tokens() -> None:
    """V before token t has seen the tokens before t only; V after a row has seen all of it and no padding."""
    value = TokenValue.from_lm(language_model())
    torch.nn.init.normal_(value.head.weight)
    batch = pack(TURNS)
    before_BT, after_B = token_values(value, batch)
    everything = value(batch.tokens)
    assert before_BT[:, 0].eq(0).all()
    assert before_BT[:, 1:].equal(everything[:, :-1])
    assert after_B.equal(torch.stack([everything[0, 6], everything[1, 3]]))

    other = pack([Sampled([5, 6, 7], [8, 20], [0.0] * 2)])
    changed_BT, changed_B = token_values(value, other)
    torch.testing.assert_close(
        changed_BT[0, :5], before_BT[0, :5], atol=1e-6, rtol=0
    )  # has not seen the token it judges
    assert not changed_B.isclose(everything[0, 4]).any()


def test_a_token_value_trains_a_copy_of_the_body() -> None:
    module = language_model()
    value = TokenValue.from_lm(module)
    torch.nn.init.normal_(value.head.weight)
    token_values(value, pack(TURNS))[0].sum().backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in value.parameters())


def test_heads_of_a_half_precision_body_are_float32() -> None:
    module = language_model().to(torch.bfloat16)
    for shared_body in (False, True):
        q, v = judged(UtteranceCritic.from_lm(module, shared_body=shared_body), pack(TURNS))
        assert (q.dtype, v.dtype) == (torch.float32, torch.float32)
    assert TokenValue.from_lm(module)(pack(TURNS).tokens).dtype == torch.float32


def test_the_width_is_that_of_the_hidden_states() -> None:
    assert hidden_size(language_model()) == 32


def test_values_before_tokens_are_those_of_each_turn_alone_in_rows_with_branches_too() -> None:
    value = TokenValue.from_lm(language_model())
    torch.nn.init.normal_(value.head.weight)
    turns = [*TURNS, Sampled([5, 6, 7], [20, 21], [0.0] * 2)]
    alone = []
    for turn in turns:
        after = value(torch.tensor([[*turn.prompt, *turn.action]]))[0]
        alone.append(after[len(turn.prompt) - 1 : -1])  # what the token before each one saw
    for layout in (pack, pack_branches):
        batch = layout(turns)
        found = values_before(value, batch)
        assert found[~batch.mask].eq(0).all()
        for index, expected in enumerate(alone):
            torch.testing.assert_close(found[batch.turn == index], expected, atol=1e-6, rtol=0)


READS = tiny(["a b c"], vocab_size=270, hidden=32, layers=2, heads=2)[1]


def critic_of(kind: str, folder: Path, seed: int) -> tuple[Any, UtteranceCritic]:
    """A language model, and a critic of each kind whose values differ a lot from place to place."""
    module = language_model()
    if "encoder" in kind:
        encoder = TextEncoder.load(str(small_bert(folder / f"bert{seed}", seed=seed)), READS)
        critic = UtteranceCritic.from_encoder(encoder)
    elif kind == "another model":
        wide = tiny(["a b c"], vocab_size=270, hidden=48, layers=1, heads=2, seed=seed)[0]
        critic = UtteranceCritic.from_lm(wide)
    elif kind == "adapter":
        module = lora.attach(module, LoraConfig(rank=2))
        critic = UtteranceCritic.from_lm(module)
    else:
        scale = {"symlog": Scale("symlog"), "range": Scale("range", -20.0, 0.0)}.get(kind, Scale())
        critic = UtteranceCritic.from_lm(language_model(seed), shared_body=False, scale=scale)
        if kind == "actor":
            critic = UtteranceCritic.from_lm(module, shared_body=True)
    for head in (*critic.q, *critic.v):
        torch.nn.init.normal_(head[-1].weight)  # type: ignore[index, arg-type]
    return module, critic


KINDS = ["own", "actor", "encoder", "another model", "adapter", "symlog", "range"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_critic_that_was_saved_says_the_same_in_a_process_that_knows_the_actor_only(
    kind: str, tmp_path: Path
) -> None:
    module, critic = critic_of(kind, tmp_path, seed=3)
    save_module(critic, tmp_path / "saved")
    other = critic_like(tmp_path / "saved", module, READS)
    batch = pack(TURNS)
    assert not judged(other, batch)[0].isclose(judged(critic, batch)[0]).any(), "it has weights of its own until then"
    load_module(other, tmp_path / "saved")
    for one, same in zip(judged(critic, batch), judged(other, batch), strict=True):
        assert one.equal(same)
    assert {file.suffix for file in (tmp_path / "saved").rglob("*") if file.is_file()} <= {
        ".json",
        ".jinja",
        ".safetensors",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_of_every_kind_is_another_one_that_lags(kind: str, tmp_path: Path) -> None:
    _, critic = critic_of(kind, tmp_path, seed=3)
    target, batch = critic.target(), pack(TURNS)
    before = judged(target, batch)[0]
    assert before.equal(judged(critic, batch)[0])
    learned = {parameter.data_ptr() for parameter in critic.parameters() if parameter.requires_grad}
    assert learned.isdisjoint(parameter.data_ptr() for parameter in target.parameters())
    optimizer = torch.optim.SGD([parameter for parameter in critic.parameters() if parameter.requires_grad], lr=0.1)
    judged(critic, batch)[0].sum().backward()
    optimizer.step()
    assert judged(target, batch)[0].equal(before)
    bellman.polyak_(target, critic, 0.5)
    moved = judged(target, batch)[0]
    assert not moved.equal(before)
    assert not moved.equal(judged(critic, batch)[0])
    bellman.hard_copy_(target, critic)
    torch.testing.assert_close(judged(target, batch)[0], judged(critic, batch)[0])


def test_a_saved_critic_of_one_kind_is_no_other(tmp_path: Path) -> None:
    _, critic = critic_of("own", tmp_path, seed=0)
    save_module(critic, tmp_path / "saved")
    _, encoder = critic_of("encoder", tmp_path, seed=0)
    with pytest.raises(CheckpointError, match="another model was saved there"):
        load_module(encoder, tmp_path / "saved")


@pytest.mark.parametrize("kind", ["symlog", "range"])
def test_a_critic_on_a_scale_starts_at_a_value(kind: str, tmp_path: Path) -> None:
    _, critic = critic_of(kind, tmp_path, seed=0)
    for head in (*critic.q, *critic.v):
        torch.nn.init.zeros_(head[-1].weight)  # type: ignore[index, arg-type]
    critic.start_at(-7.5)
    for values in judged(critic, pack(TURNS)):
        torch.testing.assert_close(values, torch.full_like(values, -7.5))
