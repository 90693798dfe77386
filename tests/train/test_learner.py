"""One optimizer step, its schedule, and a state that survives a kill to the last bit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from echelon.config import OptimConfig
from echelon.data.packing import Batch, Sampled, pack, pack_branches
from echelon.errors import CheckpointError
from echelon.models.heads import Places, Spans, TokenValue, UtteranceCritic, token_values
from echelon.models.lm import load_lm, load_tokenizer, tiny, token_logprobs
from echelon.ops import losses
from echelon.train.learner import Learner, LossFn, NonFiniteLoss, Weights, average, load_module, save_module

WORDS = {"vocab_size": 270, "hidden": 32, "layers": 2, "heads": 2}
UNTIED = {
    "vocab_size": 270,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tied() -> nn.Module:
    return tiny(["a b c"], **WORDS)[0]


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make()


def untied() -> nn.Module:
    return seeded(lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**UNTIED, tie_word_embeddings=False)))


def renamed_when_published() -> nn.Module:
    """A mixture of experts: its published names are not those of its modules."""
    config = transformers.MixtralConfig(**UNTIED, num_local_experts=4)
    return seeded(lambda: transformers.MixtralForCausalLM(config))


def critic() -> nn.Module:
    return seeded(lambda: UtteranceCritic.from_lm(tied()))


def heads_on_a_shared_body() -> nn.Module:
    return seeded(lambda: UtteranceCritic.from_lm(tied(), shared_body=True))


def token_value() -> nn.Module:
    return seeded(lambda: TokenValue.from_lm(tied()))


class Twice(nn.Module):
    """A plain module in which two names are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.one(x)))


class Numbers:
    """A micro-batch that is one tensor."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device | str) -> Numbers:
        return Numbers(self.x.to(device))


def conversations() -> list[Sampled]:
    """Eight conversations of one to three turns, of different lengths."""
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 260, (count,), generator=draw).tolist()

    found: list[Sampled] = []
    for number in range(8):
        prompt = ids(2 + number)
        for turn in range(1 + number % 3):
            action = ids(1 + (number + turn) % 4)
            found.append(Sampled(prompt, action, [-1.0] * len(action)))
            prompt = [*prompt, *action, *ids(2)]
    return found


def batch_with_advantages(layout: Callable[..., Batch] = pack) -> Batch:
    batch = layout(conversations())
    batch.advantages = batch.spread(torch.linspace(-1.0, 2.0, batch.turns))
    return batch


def policy_gradient(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    logprobs = token_logprobs(module, batch)
    assert batch.advantages is not None
    loss = losses.reinforce(logprobs, batch.advantages, batch.mask)
    numbers = {"tokens": logprobs.new_tensor(1.0).expand_as(logprobs), "worst/max": -logprobs.detach()}
    return losses.token_sum(loss, batch.mask, batch.denom), losses.reduce_stats(numbers, batch.mask, batch.denom)


def critic_loss(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    spans = Spans(batch.row_N, batch.state_N, batch.first_N, batch.last_N)
    q, v = module(batch.tokens, spans, Places(batch.row_N, batch.state_N))
    return ((q - 1.0) ** 2).sum() / batch.denom + ((v + 1.0) ** 2).sum() / batch.denom, {}


def value_loss(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    before, _ = token_values(module, batch)
    return losses.token_sum((before - 1.0) ** 2, batch.mask, batch.denom), {}


def number_loss(module: nn.Module, batch: Numbers) -> tuple[Tensor, dict[str, float]]:
    return (module(batch.x) ** 2).mean(), {}


MODULES: dict[str, tuple[Callable[[], nn.Module], LossFn, Callable[[], Any]]] = {
    "tied embeddings": (tied, policy_gradient, batch_with_advantages),
    "untied embeddings": (untied, policy_gradient, batch_with_advantages),
    "mixture of experts": (renamed_when_published, policy_gradient, batch_with_advantages),
    "utterance critic": (critic, critic_loss, batch_with_advantages),
    "critic on a shared body": (heads_on_a_shared_body, critic_loss, batch_with_advantages),
    "token value": (token_value, value_loss, batch_with_advantages),
    "one tensor with two names": (lambda: seeded(Twice), number_loss, lambda: Numbers(torch.ones(3, 4))),
}
each_module = pytest.mark.parametrize("kind", MODULES)


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


def values(module: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in module.state_dict().values()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(a.equal(b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("layout", [pack, pack_branches])
def test_micro_batches_do_not_change_the_gradient_or_the_numbers(layout: Callable[..., Batch]) -> None:
    batch = batch_with_advantages(layout)
    found = []
    for budget in (100_000, 54, 1):
        learner = Learner(tied(), OptimConfig(lr=1e-3))
        parts = batch.split(budget)
        found.append((len(parts), learner.update(parts, policy_gradient), gradients(learner.module)))
    one, several, each = (count for count, _, _ in found)
    assert one == 1 < several < each == 8
    whole = found[0]
    for _, metrics, gradient in found[1:]:
        assert metrics == pytest.approx(whole[1], rel=1e-4)
        for one, other in zip(gradient, whole[2], strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1e-3)
    assert whole[1]["tokens"] == pytest.approx(1.0)
    logprobs = token_logprobs(tied(), batch).detach()
    assert whole[1]["worst/max"] == pytest.approx(-float(logprobs.min()), rel=1e-4)


@each_module
def test_a_gradient_reaches_everything_that_is_trained(kind: str) -> None:
    make, loss_fn, batch = MODULES[kind]
    learner = Learner(make(), OptimConfig(lr=1e-3))
    before = values(learner.module)
    metrics = learner.update([batch()], loss_fn)
    if kind == "token value":  # its scalar starts at zero, so at first only the scalar learns
        metrics = learner.update([batch()], loss_fn)
    reached = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in learner.trained]
    assert all(reached)
    assert metrics["grad_norm"] > 0
    assert not any(one.equal(other) for one, other in zip(values(learner.module), before, strict=True))


def test_an_update_is_made_in_training_mode() -> None:
    """The engine puts the module in evaluation mode; checkpointing needs the other one."""
    module: Any = tied().eval()
    module.gradient_checkpointing_enable({"use_reentrant": False})
    plain, checkpointed = Learner(tied().eval(), OptimConfig(lr=1e-3)), Learner(module, OptimConfig(lr=1e-3))
    computed: list[nn.Module] = []
    module.model.layers[0].mlp.register_forward_pre_hook(lambda layer, *_: computed.append(layer))
    expected = plain.update([batch_with_advantages()], policy_gradient)
    assert checkpointed.update([batch_with_advantages()], policy_gradient) == pytest.approx(expected, rel=1e-5)
    assert len(computed) == 2
    for one, other in zip(gradients(module), gradients(plain.module), strict=True):
        torch.testing.assert_close(one, other)


def test_an_error_of_the_loss_changes_nothing() -> None:
    def refuse(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        if batch.rows[0] != first:
            raise ValueError("no")
        return policy_gradient(module, batch)

    learner = Learner(tied(), OptimConfig(lr=1e-2))
    before, parts = values(learner.module), batch_with_advantages().split(1)
    first = parts[0].rows[0]
    with pytest.raises(ValueError, match="no"):
        learner.update(parts, refuse)
    assert nothing_changed(learner, before, {})
    assert learner.version == 0


def test_what_is_frozen_neither_trains_nor_has_state(tmp_path: Path) -> None:
    module: Any = untied()
    module.model.layers[0].requires_grad_(False)
    frozen = values(module.model.layers[0])
    learner = Learner(module, OptimConfig(lr=1e-2, weight_decay=0.1))
    learner.update([batch_with_advantages()], policy_gradient)
    assert equal(values(module.model.layers[0]), frozen)
    assert len(learner.trained) < len(list(module.parameters()))
    learner.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"the optimizer state .* belongs to other weights"):
        Learner(untied(), OptimConfig()).load(tmp_path)


def nothing_changed(learner: Learner, before: list[Tensor], state: dict[str, Any]) -> bool:
    return equal(values(learner.module), before) and str(learner.optimizer.state_dict()["state"]) == str(state)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 2])
def test_a_loss_that_is_not_finite_is_an_error_and_changes_nothing(bad: float, where: int) -> None:
    learner = Learner(tied(), OptimConfig(lr=1e-2), name="actor")
    learner.update([batch_with_advantages()], policy_gradient)
    before, state = values(learner.module), learner.optimizer.state_dict()["state"]
    parts = batch_with_advantages().split(40)
    assert parts[where].advantages is not None
    parts[where].advantages[:] = bad  # type: ignore[index]
    with pytest.raises(NonFiniteLoss, match=r"actor: the loss is -?(nan|inf) at update 1, so no step was taken"):
        learner.update(parts, policy_gradient)
    assert nothing_changed(learner, before, state)
    assert learner.version == 1
    assert math.isfinite(learner.update([batch_with_advantages()], policy_gradient)["loss"])


def test_a_gradient_that_is_not_finite_is_an_error_and_changes_nothing() -> None:
    def square_root_of_zero(module: nn.Module, batch: Numbers) -> tuple[Tensor, dict[str, float]]:
        return torch.sqrt((module(batch.x) * 0).sum()), {}

    learner = Learner(Twice(), OptimConfig(lr=1e-2))
    before, state = values(learner.module), learner.optimizer.state_dict()["state"]
    with pytest.raises(NonFiniteLoss, match=r"learner: the gradient is nan at update 0, so no step was taken"):
        learner.update([Numbers(torch.ones(2, 4))], square_root_of_zero)
    assert nothing_changed(learner, before, state)


def test_an_update_needs_something_to_learn_from() -> None:
    with pytest.raises(AssertionError, match="at least one micro-batch"):
        Learner(Twice(), OptimConfig()).update([], number_loss)


def test_long_gradients_are_shortened_and_the_norm_reported_is_the_whole_one() -> None:
    def loss(module: nn.Module, batch: Numbers) -> tuple[Tensor, dict[str, float]]:
        return 100 * module(batch.x).sum(), {}

    norms = []
    for limit in (0.0, 2.0):
        learner = Learner(seeded(Twice), OptimConfig(max_grad_norm=limit))
        reported = learner.update([Numbers(torch.ones(2, 4))], loss)["grad_norm"]
        norms.append((reported, float(torch.cat([g.flatten() for g in gradients(learner.module)]).norm())))
    (whole, untouched), (reported, shortened) = norms
    assert whole == pytest.approx(untouched)
    assert reported == pytest.approx(whole)
    assert shortened == pytest.approx(2.0, rel=1e-4)


def rates(total_steps: int, **settings: Any) -> list[float]:
    learner = Learner(Twice(), OptimConfig(lr=8.0, **settings), total_steps=total_steps)
    found = []
    for step in range(max(total_steps, 6)):
        learner.version = step
        found.append(learner.learning_rate())
    return found


def test_schedules_by_hand() -> None:
    assert rates(0) == [8.0] * 6
    assert rates(0, warmup_steps=4) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]
    assert rates(4, schedule="linear") == [8.0, 6.0, 4.0, 2.0, 0.0, 0.0]
    assert rates(6, schedule="linear", warmup_steps=2, final_lr_fraction=0.5) == [4.0, 8.0, 8.0, 7.0, 6.0, 5.0]
    cosine = [8.0, 4 + 4 * math.sqrt(0.5), 4.0, 4 - 4 * math.sqrt(0.5), 0.0, 0.0]
    assert rates(4, schedule="cosine") == pytest.approx(cosine)


def test_a_schedule_that_would_end_at_once_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="schedule cosine needs total_steps"):
        rates(0, schedule="cosine")


def test_the_rate_of_the_schedule_is_the_rate_of_the_step() -> None:
    moved = []
    for lr in (1e-3, 1e-2):
        learner = Learner(seeded(Twice), OptimConfig(lr=lr, warmup_steps=10), total_steps=10)
        before = learner.module.state_dict()["one.bias"].clone()
        metrics = learner.update([Numbers(torch.ones(2, 4))], number_loss)
        assert metrics["lr"] == pytest.approx(lr / 10)
        moved.append(float((learner.module.state_dict()["one.bias"] - before).abs().max()))
    assert moved == pytest.approx([1e-4, 1e-3], rel=1e-2)  # Adam's first step is as long as the rate


@each_module
def test_saved_and_loaded_it_is_the_same_and_goes_on_the_same(kind: str, tmp_path: Path) -> None:
    """Weights, optimizer and schedule: the update after loading is the one that would have happened, bit by bit."""
    make, loss_fn, batch = MODULES[kind]
    optim = OptimConfig(lr=1e-2, schedule="linear", warmup_steps=2, weight_decay=0.01)
    learner = Learner(make(), optim, total_steps=9)
    for _ in range(3):
        learner.update([batch()], loss_fn)
    learner.save(tmp_path / "saved")

    resumed = Learner(make(), optim, total_steps=9)
    resumed.update([batch()], loss_fn)  # whatever it was before is forgotten
    resumed.load(tmp_path / "saved")
    assert equal(values(resumed.module), values(learner.module))
    assert resumed.version == learner.version == 3
    for _ in range(2):
        assert resumed.update([batch()], loss_fn) == learner.update([batch()], loss_fn)
    assert equal(values(resumed.module), values(learner.module))


def test_a_learner_that_never_stepped_can_be_saved(tmp_path: Path) -> None:
    Learner(seeded(Twice), OptimConfig()).save(tmp_path)
    fresh = Learner(Twice(), OptimConfig())
    fresh.load(tmp_path)
    assert equal(values(fresh.module), values(seeded(Twice)))


@pytest.mark.parametrize("make", [tied, untied, renamed_when_published])
def test_a_saved_policy_is_a_folder_that_loads_without_echelon(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    tokenizer = tiny(["a b c"], **WORDS)[1]
    learner = Learner(make(), OptimConfig(lr=1e-2), tokenizer=tokenizer)
    learner.update([batch_with_advantages()], policy_gradient)
    learner.save(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert loaded(input_ids=tokens).logits.equal(learner.module(input_ids=tokens).logits)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    assert load_tokenizer(str(tmp_path)).encode("a b c") == tokenizer.encode("a b c")
    assert equal(values(load_lm(str(tmp_path), device="cpu")), values(learner.module))


def test_weights_in_several_files_load_as_one(tmp_path: Path) -> None:
    module: Any = untied()
    module.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model*.safetensors"))) > 1
    other = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**UNTIED, tie_word_embeddings=False))
    load_module(other, tmp_path)
    assert equal(values(other), values(module))


def wider() -> nn.Module:
    return tiny(["a b c"], **{**WORDS, "hidden": 64})[0]


def deeper() -> nn.Module:
    return tiny(["a b c"], **{**WORDS, "layers": 3})[0]


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        (tied, wider),
        (wider, tied),
        (tied, deeper),
        (deeper, tied),
        (tied, untied),
        (untied, tied),
        (tied, critic),
        (critic, tied),
        (critic, token_value),
        (critic, heads_on_a_shared_body),
        (heads_on_a_shared_body, critic),
        (renamed_when_published, tied),
        (tied, renamed_when_published),
        (Twice, tied),
    ],
)
def test_weights_of_another_model_are_refused_and_nothing_is_loaded(
    saved: Callable[[], nn.Module], loading: Callable[[], nn.Module], tmp_path: Path
) -> None:
    save_module(saved(), tmp_path)
    module = loading()
    before = values(module)
    with pytest.raises(CheckpointError, match=r"the weights in .* do not fit .*another model was saved there"):
        load_module(module, tmp_path)
    assert equal(values(module), before)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="do not fit"):
        load_module(tied(), tmp_path)


def test_a_folder_without_optimizer_state_is_refused(tmp_path: Path) -> None:
    save_module(tied(), tmp_path)
    learner = Learner(untied(), OptimConfig())
    before = values(learner.module)
    with pytest.raises(CheckpointError, match=r"holds no optimizer state.*model\.path"):
        learner.load(tmp_path)
    assert equal(values(learner.module), before)


def test_nothing_saved_is_code(tmp_path: Path) -> None:
    for index, (make, loss_fn, batch) in enumerate(MODULES.values()):
        learner = Learner(make(), OptimConfig(), tokenizer=tiny(["a"], **WORDS)[1])
        learner.update([batch()], loss_fn)
        learner.save(tmp_path / str(index))
    kinds = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert kinds <= {".safetensors", ".json", ".jinja"}
    assert json.loads((tmp_path / "0" / "optimizer.json").read_text())["version"] == 1


def test_a_shared_body_is_saved_once_with_its_owner(tmp_path: Path) -> None:
    module = tied()
    save_module(module, tmp_path / "actor")
    save_module(UtteranceCritic.from_lm(module, shared_body=True), tmp_path / "critic")
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).iterdir()) for name in ("actor", "critic")]
    heads = sum(4 * p.numel() for p in UtteranceCritic.from_lm(module, shared_body=True).parameters())
    assert sizes[1] < heads + 4096
    assert sizes[0] > 2 * sizes[1]


def test_a_target_network_is_saved_and_loaded_like_any_other(tmp_path: Path) -> None:
    target = critic()
    Weights(target).save(tmp_path)
    other = UtteranceCritic.from_lm(wider())
    with pytest.raises(CheckpointError):
        Weights(other).load(tmp_path)
    twin: Any = critic()
    twin.start_at(9.0)
    Weights(twin).load(tmp_path)
    assert equal(values(twin), values(target))


def test_saving_again_leaves_nothing_of_before(tmp_path: Path) -> None:
    learner = Learner(tied(), OptimConfig(lr=1e-2))
    learner.save(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "first")
    learner.update([batch_with_advantages()], policy_gradient)
    learner.save(tmp_path)
    fresh = Learner(tied(), OptimConfig())
    fresh.load(tmp_path)
    assert (fresh.version, equal(values(fresh.module), values(learner.module))) == (1, True)
    fresh.load(tmp_path / "first")
    assert (fresh.version, equal(values(fresh.module), values(tied()))) == (0, True)


def test_evaluate_puts_micro_batches_back_in_their_rows() -> None:
    batch = batch_with_advantages()
    learner = Learner(tied(), OptimConfig())
    whole = learner.evaluate(batch, token_logprobs, 100_000)
    for budget in (60, 1):
        torch.testing.assert_close(learner.evaluate(batch, token_logprobs, budget), whole, atol=1e-5, rtol=0)
    assert not whole.requires_grad
    assert whole[batch.mask].lt(0).all()
    assert whole[~batch.mask].eq(0).all()


def test_the_weights_for_a_sampler_are_all_there() -> None:
    learner = Learner(untied(), OptimConfig())
    assert dict(learner.weights()).keys() == learner.module.state_dict().keys()


def test_several_updates_average_except_for_extremes() -> None:
    assert average([{"loss": 1.0, "a/max": 5.0}, {"loss": 3.0, "a/max": 2.0}]) == {"loss": 2.0, "a/max": 5.0}


def test_each_learner_clips_for_itself() -> None:
    """A huge gradient of one learner does not shorten the steps of another."""
    loud: LossFn = partial(scaled, factor=1e4)
    quiet: LossFn = partial(scaled, factor=1e-2)
    alone, beside = (Learner(seeded(Twice), OptimConfig(max_grad_norm=1.0)) for _ in range(2))
    batch = [Numbers(torch.ones(2, 4))]
    Learner(seeded(Twice), OptimConfig(max_grad_norm=1.0)).update(batch, loud)
    assert alone.update(batch, quiet) == beside.update(batch, quiet)


def scaled(module: nn.Module, batch: Numbers, *, factor: float) -> tuple[Tensor, dict[str, float]]:
    return factor * module(batch.x).sum(), {}
