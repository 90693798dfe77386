"""Losses against numbers worked out by hand, and masks out of which nothing leaks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echelon.errors import DataError, EchelonError
from echelon.ops import losses

numbers = st.floats(-5, 5, width=32)


def tensor(*values: float, **options) -> torch.Tensor:
    return torch.tensor(values, **options)


def surrogate_of_ratio(ratio: float, advantage: float, **options):
    loss, stats = losses.clipped_surrogate(tensor(math.log(ratio)), tensor(0.0), tensor(advantage), **options)
    return loss.item(), stats["clipped"].item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "loss", "clipped"),
    [
        (1.5, 2.0, None, -2.4, 1),
        (0.5, -1.0, None, 0.8, 1),
        (0.7, 1.0, None, -0.7, 0),
        (4.0, -1.0, None, 4.0, 0),
        (4.0, -1.0, 3.0, 3.0, 1),
        (2.0, -1.0, 3.0, 2.0, 0),
        (4.0, 1.0, 3.0, -1.2, 1),
    ],
)
def test_the_clipped_surrogate_by_hand(ratio, advantage, dual, loss, clipped):
    assert surrogate_of_ratio(ratio, advantage, dual=dual) == (pytest.approx(loss), clipped)


def test_the_statistics_by_hand():
    _, stats = losses.clipped_surrogate(tensor(math.log(1.5)), tensor(0.0), tensor(2.0))
    assert stats["ratio"].item() == pytest.approx(1.5)
    assert stats["kl"].item() == pytest.approx(0.5 - math.log(1.5), abs=1e-6)
    _, stats = losses.clipped_surrogate(tensor(math.log(1.5), 0.0), tensor(0.0, 0.0), tensor(2.0, 2.0))
    assert stats["ratio/max"].tolist() == pytest.approx([1.5, 1.0]), "of each token: `reduce_stats` takes the largest"


def test_the_two_sides_clip_separately():
    assert surrogate_of_ratio(1.5, 1.0, low=0.2, high=0.3)[0] == pytest.approx(-1.3)
    assert surrogate_of_ratio(0.5, -1.0, low=0.4, high=0.2)[0] == pytest.approx(0.6)


def test_an_unchanged_policy_has_ratio_one_no_clipping_and_loss_minus_the_advantage():
    logprobs, advantages = torch.randn(2, 3), torch.randn(2, 3)
    loss, stats = losses.clipped_surrogate(logprobs, logprobs, advantages)
    assert loss.equal(-advantages)
    assert stats["ratio"].equal(torch.ones(2, 3))
    assert stats["ratio/max"].equal(torch.ones(2, 3))
    assert not stats["clipped"].any()
    assert not stats["kl"].any()


def test_an_unchanged_policy_has_the_policy_gradient():
    logprobs, advantages = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    loss, _ = losses.clipped_surrogate(logprobs, logprobs.detach(), advantages)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    (expected,) = torch.autograd.grad(losses.reinforce(logprobs, advantages).sum(), logprobs)
    assert gradient.equal(expected)


def test_a_clipped_token_has_no_gradient():
    logprobs = tensor(math.log(1.5), math.log(0.5), math.log(4.0), requires_grad=True)
    loss, stats = losses.clipped_surrogate(logprobs, torch.zeros(3), tensor(2.0, -1.0, -1.0), dual=3.0)
    loss.sum().backward()
    assert stats["clipped"].tolist() == [1, 1, 1]
    assert logprobs.grad.tolist() == [0, 0, 0]


def cispo_of_ratio(ratio: float, advantage: float, **options):
    old = torch.tensor(-2.0)
    loss, stats = losses.cispo(old + math.log(ratio), old, torch.tensor(advantage), **options)
    return loss.item(), stats["clipped"].item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "bounds", "weight", "clipped"),
    [
        (2.0, 1.0, {}, 2.0, 0),
        (8.0, 1.0, {}, 5.0, 1),
        (8.0, -1.0, {}, 5.0, 1),
        (0.1, -3.0, {}, 0.1, 0),
        (0.5, 2.0, {"low": 0.2, "high": 0.3}, 0.8, 1),
        (1.5, 2.0, {"low": 0.2, "high": 0.3}, 1.3, 1),
    ],
)
def test_cispo_by_hand(ratio, advantage, bounds, weight, clipped):
    logprob = -2.0 + math.log(ratio)
    assert cispo_of_ratio(ratio, advantage, **bounds) == (pytest.approx(-weight * advantage * logprob), clipped)


def test_a_weight_at_its_bound_still_teaches():
    """Where the clipped surrogate has no gradient left, cispo has the policy gradient times the bound."""
    logprobs = tensor(math.log(8.0), requires_grad=True)
    losses.cispo(logprobs, tensor(0.0), tensor(2.0))[0].sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([-10.0])


def test_the_weight_of_cispo_is_a_constant():
    """−2·w·log π with w = 3 has the slope −6; if w moved with π there were a second term."""
    logprobs = tensor(math.log(3.0), requires_grad=True)
    losses.cispo(logprobs, tensor(0.0), tensor(2.0))[0].sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([-6.0])


ROWS = torch.tensor([[True, True, False, True], [False, True, True, True]])
SEQUENCE = torch.tensor([[0, 0, -1, 2], [-1, 1, 1, 1]])
"""Four positions in two rows; the first row has two sequences."""


def test_sequence_means_by_hand():
    x = tensor([1.0, 3.0, math.nan, 5.0], [math.inf, 2.0, 3.0, 7.0])
    assert losses.sequence_means(x, ROWS, SEQUENCE).tolist() == [[2, 2, 0, 5], [0, 4, 4, 4]]


def test_gspo_by_hand():
    """Of the first sequence s = √(2·½) = 1, far as its tokens are from a ratio of 1; of the last s = √(2·8) = 4."""
    logprobs = tensor([math.log(2), math.log(0.5), 9.0, 0.0], [9.0, 0.0, math.log(2), math.log(8)])
    sequence = torch.tensor([[0, 0, -1, 2], [-1, 3, 1, 1]])
    loss, stats = losses.gspo(logprobs, torch.zeros(2, 4), torch.full((2, 4), 3.0), ROWS, sequence, low=0.2, high=0.5)
    torch.testing.assert_close(loss, tensor([-3.0, -3.0, 0.0, -3.0], [0.0, -3.0, -4.5, -4.5]))
    assert stats["clipped"].tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert stats["ratio"][ROWS].tolist() == pytest.approx([1, 1, 1, 1, 4, 4])
    assert stats["kl"][0, 0].item() == pytest.approx(1 - math.log(2))


@st.composite
def sequences(draw):
    """Per sequence: its advantage, and (log-prob now, then) of each token; and which row holds it."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    pair = st.tuples(numbers, numbers)
    return [(draw(numbers), draw(st.lists(pair, min_size=n, max_size=n)), draw(st.integers(0, 2))) for n in lengths]


@given(sequences(), st.sampled_from([None, 3.0]))
def test_gspo_is_a_loop_over_sequences(drawn, dual):
    """Value and gradient of the mean over tokens in each sequence: those of −min(sA, clip(s)A)."""
    width = sum(len(pairs) + 1 for _, pairs, _ in drawn)
    new, old, advantages = (torch.zeros(3, width, dtype=torch.float64) for _ in range(3))
    mask, sequence = torch.zeros(3, width, dtype=torch.bool), torch.full((3, width), -1)
    free, expected, at = [0, 0, 0], [], []
    for number, (advantage, pairs, row) in enumerate(drawn):
        place = slice(free[row], free[row] + len(pairs))
        free[row] = place.stop + 1
        new[row, place], old[row, place] = torch.tensor(pairs, dtype=torch.float64).T
        advantages[row, place], sequence[row, place], mask[row, place] = advantage, number, True
        at.append((row, place))
    new.requires_grad_()
    for (advantage, _, _), place in zip(drawn, at, strict=True):
        s = (new[place] - old[place]).mean().exp()
        loss = -torch.minimum(s * advantage, s.clamp(0.8, 1.3) * advantage)
        expected.append(torch.minimum(loss, s * 0 - dual * advantage) if dual and advantage < 0 else loss)
    found, _ = losses.gspo(new, old, advantages, mask, sequence, low=0.2, high=0.3, dual=dual)
    means = torch.stack([found[place].mean() for place in at])
    torch.testing.assert_close(means, torch.stack(expected))
    for one, other in zip(means, expected, strict=True):
        gradients = [torch.autograd.grad(loss, new, retain_graph=True)[0] for loss in (one, other)]
        torch.testing.assert_close(*gradients)


def test_importance_of_a_token_by_hand():
    """Twice as likely, half as likely, eight times as likely and bounded; nothing for what was not sampled."""
    now = tensor([math.log(2), math.log(0.5), 9.0, math.log(8)], [math.nan, 0.0, 0.0, 0.0])
    weights = losses.truncated_importance(now, torch.zeros(2, 4), ROWS, clip=3.0)
    torch.testing.assert_close(weights, tensor([2.0, 0.5, 0.0, 3.0], [0.0, 1.0, 1.0, 1.0]) * ROWS)


def test_importance_of_a_sequence_is_the_product_bounded_once():
    """2 · ½ = 1 although each is far from 1; 8 · ½ = 4, bounded after the product and not before: not 3 · ½."""
    now = tensor([math.log(2), math.log(0.5), 9.0, 0.0], [9.0, 0.0, math.log(8), math.log(0.5)])
    sequence = torch.tensor([[0, 0, -1, 2], [-1, 3, 1, 1]])
    weights = losses.truncated_importance(now, torch.zeros(2, 4), ROWS, sequence, clip=3.0)
    torch.testing.assert_close(weights, tensor([1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 3.0, 3.0]) * ROWS)


def test_importance_has_no_gradient_and_stays_finite():
    now = tensor([500.0, -500.0], requires_grad=True)
    both = torch.ones(1, 2, dtype=torch.bool)
    weights = losses.truncated_importance(now, torch.zeros(1, 2), both, clip=2.0)
    assert not weights.requires_grad
    assert weights[0, 0].item() == pytest.approx(2)
    assert 0 < weights[0, 1].item() < 1e-8


def test_gspo_gives_a_token_its_own_advantage():
    """GSPO-token: the ratio is the sequence's, the advantage the token's."""
    logprobs = tensor([0.0, 0.0], requires_grad=True)
    pair, both = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    loss, _ = losses.gspo(logprobs, torch.zeros(1, 2), tensor([1.0, -2.0]), both, pair)
    loss.sum().backward()
    assert logprobs.grad.tolist() == [[-1.0, 2.0]]


def test_absurd_ratios_stay_finite():
    logprobs = tensor(500.0, 500.0, -500.0, requires_grad=True)
    loss, stats = losses.clipped_surrogate(logprobs, torch.zeros(3), tensor(1.0, -1.0, 1.0))
    (loss + losses.kl_k3(logprobs, torch.zeros(3)) + losses.kl_k3(-logprobs, torch.zeros(3))).sum().backward()
    assert loss.isfinite().all()
    assert stats["kl"].isfinite().all()
    assert logprobs.grad.isfinite().all()


def test_kl_estimators_by_hand():
    logprobs, reference = tensor(-1.0), tensor(-1.5)
    assert losses.kl_k1(logprobs, reference).item() == pytest.approx(0.5)
    assert losses.kl_k2(logprobs, reference).item() == pytest.approx(0.125)
    assert losses.kl_k3(logprobs, reference).item() == pytest.approx(0.1065307)


def expected_gradient(estimator, logits, reference):
    """Exact expectation over tokens sampled from the policy, the sampling not differentiated, as in training."""
    logprobs = torch.log_softmax(logits, -1)
    loss = (logprobs.exp().detach() * estimator(logprobs, torch.log_softmax(reference, -1))).sum()
    return torch.autograd.grad(loss, logits)[0]


def test_k3_keeps_its_digits_when_the_policies_are_close():
    """e^x − x − 1 computed in that order would be rounding noise of either sign: x²/2 is 5e-9 here."""
    assert losses.kl_k3(tensor(0.0), tensor(1e-4)).item() == pytest.approx(5.0e-9, rel=0.01)
    _, stats = losses.clipped_surrogate(tensor(1e-4), tensor(0.0), tensor(1.0))
    assert stats["kl"].item() == pytest.approx(5.0e-9, rel=0.01)


def test_which_divergence_each_estimator_descends_as_a_loss():
    logits = tensor(0.3, -1.0, 2.0, dtype=torch.float64, requires_grad=True)
    reference = tensor(1.0, 0.5, -0.5, dtype=torch.float64)
    (forward,) = torch.autograd.grad(losses.categorical_kl(logits, reference), logits)
    q, logprobs = reference.softmax(-1), logits.log_softmax(-1)
    (reverse,) = torch.autograd.grad((q * (q.log() - logprobs)).sum(), logits)
    assert expected_gradient(losses.kl_k1, logits, reference).abs().max() < 1e-12
    torch.testing.assert_close(expected_gradient(losses.kl_k2, logits, reference), forward)
    torch.testing.assert_close(expected_gradient(losses.kl_k3, logits, reference), reverse)


def test_k1_and_k3_are_unbiased_estimates():
    logits, reference = torch.randn(2, 5, dtype=torch.float64)
    logprobs, ref_logprobs = logits.log_softmax(-1), reference.log_softmax(-1)
    exact = losses.categorical_kl(logits, reference)
    for estimator in (losses.kl_k1, losses.kl_k3):
        torch.testing.assert_close((logprobs.exp() * estimator(logprobs, ref_logprobs)).sum(), exact)


@given(numbers, numbers)
def test_k3_is_never_negative(logprob, reference):
    assert losses.kl_k3(tensor(logprob), tensor(reference)) >= 0


def test_clipped_value_by_hand():
    assert losses.clipped_value(tensor(1.0), tensor(0.5), tensor(2.0), clip=0.2).item() == pytest.approx(0.845)
    assert losses.clipped_value(tensor(0.6), tensor(0.5), tensor(2.0), clip=0.2).item() == pytest.approx(0.98)


def test_squared_error_and_huber_by_hand():
    assert losses.squared_error(tensor(1.0, -1.0), tensor(3.0, -1.0)).tolist() == [4, 0]
    assert losses.huber(tensor(-0.5, 3.0), delta=1.0).tolist() == [0.125, 2.5]
    assert losses.huber(tensor(3.0), delta=2.0).item() == 4.0


def test_expectile_by_hand_and_its_minimiser():
    torch.testing.assert_close(losses.expectile(tensor(1.0, -1.0), tau=0.9), tensor(0.9, 0.1))
    targets = tensor(0.0, 1.0)  # the minimiser weighs the upper one 9 to 1
    loss_at = [losses.expectile(targets - value, tau=0.9).sum().item() for value in (0.89, 0.9, 0.91)]
    assert min(loss_at) == loss_at[1]


def test_preferences_by_hand():
    assert losses.pairwise(tensor(1.2), tensor(0.2)).item() == pytest.approx(0.313262, abs=1e-6)
    assert losses.pairwise(tensor(1.2), tensor(0.2), margin=0.5).item() == pytest.approx(0.474077, abs=1e-6)
    assert losses.pairwise(tensor(1.2), tensor(0.2), tensor(0.5)).item() == pytest.approx(0.474077, abs=1e-6)


def test_advantage_weights_by_hand_and_bounded():
    weights = losses.awr(tensor(-1.0, -1.0, -1.0), tensor(0.7, 0.0, 900.0), beta=1.0, clamp=20.0)
    torch.testing.assert_close(weights, tensor(2.013753, 1.0, 20.0))
    assert losses.awr(tensor(-2.0), tensor(3.0), beta=0.0).equal(losses.nll(tensor(-2.0)))


def test_targets_and_advantages_are_constants():
    constant = torch.ones(2, requires_grad=True)
    moving = torch.zeros(2, requires_grad=True)
    total = (
        losses.reinforce(moving, constant)
        + losses.awr(moving, constant)
        + losses.squared_error(moving, constant)
        + losses.clipped_value(moving, constant, constant)
        + losses.clipped_surrogate(moving, constant, constant)[0]
        + losses.cispo(moving, constant, constant)[0]
        + losses.categorical_kl(moving, constant)
    )
    total.sum().backward()
    assert constant.grad is None
    assert moving.grad is not None


def test_entropy_by_hand():
    assert losses.entropy(torch.zeros(1, 4)).item() == pytest.approx(math.log(4))
    assert losses.entropy(tensor(0.0, -math.inf, 0.0)).item() == pytest.approx(math.log(2))
    assert losses.entropy(tensor(1000.0, 0.0)).item() == 0


def test_exact_divergence_by_hand():
    certain, fair = tensor(0.0, -math.inf), tensor(0.0, 0.0)
    assert losses.categorical_kl(certain, fair).item() == pytest.approx(math.log(2))
    assert losses.categorical_kl(fair, fair).item() == 0
    assert losses.categorical_kl(fair, certain).item() == math.inf


def test_impossible_choices_leave_finite_gradients():
    logits = tensor(0.0, -math.inf, 1.0, requires_grad=True)
    (losses.entropy(logits) + losses.categorical_kl(logits, tensor(0.5, -math.inf, 0.0))).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[1] == 0


MASK = torch.tensor([[True, False, True], [False, False, True], [False, False, False]])


def test_every_token_or_every_row_weighs_the_same():
    x = tensor([1.0, math.nan, 2.0], [math.inf, 0.0, 6.0], [9.0, 9.0, 9.0])
    assert losses.token_sum(x, MASK, 3.0) == 3.0
    assert losses.row_mean(x, MASK, 2.0) == 3.75


@pytest.mark.parametrize("reduction", [losses.token_sum, losses.row_mean])
def test_micro_batches_add_up_to_the_batch(reduction):
    x = torch.randn(3, 3)
    whole = reduction(x, MASK, 3.0)
    parts = sum(reduction(x[i : i + 1], MASK[i : i + 1], 3.0) for i in range(3))
    torch.testing.assert_close(parts, whole)


def test_statistics_add_up_and_maxima_are_maximised():
    stats = {"kl": tensor([1.0, 50.0, 2.0], [50.0, 50.0, 3.0], [50.0, 50.0, math.nan])}
    stats["kl/max"] = stats["kl"]
    assert losses.reduce_stats(stats, MASK, 3.0) == {"kl": 2.0, "kl/max": 3.0}
    assert losses.reduce_stats(stats, torch.zeros_like(MASK), 3.0) == {"kl": 0.0, "kl/max": -math.inf}
    assert losses.reduce_stats({}, MASK, 3.0) == {}


MASKED_LOSSES = {
    "reinforce": (losses.reinforce, 2),
    "clipped_surrogate": (lambda *x: losses.clipped_surrogate(*x, dual=3.0)[0], 3),
    "cispo": (lambda *x: losses.cispo(*x)[0], 3),
    "gspo": (lambda *x: losses.gspo(*x, torch.tensor([[0, -1, 0], [-1, -1, 1], [-1, -1, -1]]))[0], 3),
    "awr": (losses.awr, 2),
    "squared_error": (losses.squared_error, 2),
    "clipped_value": (losses.clipped_value, 3),
    "kl_k1": (losses.kl_k1, 2),
    "kl_k2": (losses.kl_k2, 2),
    "kl_k3": (losses.kl_k3, 2),
}


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", MASKED_LOSSES)
def test_junk_outside_the_mask_reaches_neither_loss_nor_gradient(name, junk):
    loss_fn, inputs = MASKED_LOSSES[name]
    clean = [torch.randn(3, 3) for _ in range(inputs)]
    results = []
    for fill in (0.0, junk):
        subject, *rest = (torch.where(MASK, x, fill) for x in clean)
        subject.requires_grad_()
        loss = losses.token_sum(loss_fn(subject, *rest, MASK), MASK, 3.0)
        results.append((loss, *torch.autograd.grad(loss, subject)))
    (loss, gradient), (loss_with_junk, gradient_with_junk) = results
    assert loss_with_junk.equal(loss)
    assert gradient_with_junk.equal(gradient)
    assert gradient_with_junk[~MASK].tolist() == [0.0] * 6
    assert gradient_with_junk[MASK].abs().sum() > 0


def test_statistics_ignore_junk_outside_the_mask():
    junk = torch.where(MASK, 0.0, math.nan)
    _, stats = losses.clipped_surrogate(junk, junk, junk, MASK)
    numbers = losses.reduce_stats(stats, MASK, 3.0)
    assert numbers == {"ratio": 1.0, "ratio/max": 1.0, "clipped": 0.0, "kl": 0.0}


def test_losses_are_float32_at_least():
    half = torch.ones(2, dtype=torch.bfloat16)
    single = (
        losses.nll(half),
        losses.reinforce(half, half),
        losses.clipped_surrogate(half, half, half)[0],
        losses.huber(half),
        losses.expectile(half, 0.7),
        losses.entropy(half),
        losses.pairwise(half, half),
        losses.token_sum(half[None], torch.ones(1, 2, dtype=torch.bool), 1.0),
    )
    assert {loss.dtype for loss in single} == {torch.float32}
    assert losses.reinforce(half.double(), half.double()).dtype == torch.float64


def test_a_missing_tensor_is_an_error_that_says_what_to_do():
    present = torch.ones(2)
    assert losses.require(present, "ref_logprobs", "Set kl_coef to 0.") is present
    with pytest.raises(DataError, match=r"ref_logprobs is missing .* not zero\. Set kl_coef to 0\.") as caught:
        losses.require(None, "ref_logprobs", "Set kl_coef to 0.")
    assert isinstance(caught.value, EchelonError)


def test_tensors_of_different_shapes_are_refused():
    """(N,) against (N, 1) would silently compare every value with every target."""
    with pytest.raises(Exception, match=r"shape|Type-check"):
        losses.squared_error(torch.ones(3), torch.ones(3, 1))
