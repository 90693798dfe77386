"""The sampled distribution is the one that was asked for, and a draw depends on its seed and position alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echelon.errors import ConfigError
from echelon.ops.sampling import counter_uniform, draw, penalise_repetition, restrict_logits

LOGITS = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in logits]


def test_without_restrictions_nothing_changes():
    logits = torch.randn(3, 5)
    assert restrict_logits(logits).equal(logits)
    assert restrict_logits(logits, top_k=5, top_p=1.0).equal(logits)
    assert restrict_logits(logits.bfloat16()).dtype == torch.float32


def test_temperature_divides():
    logits = torch.randn(2, 5)
    torch.testing.assert_close(restrict_logits(logits, temperature=0.5), logits * 2)
    rows = restrict_logits(logits, temperature=torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(rows, logits * torch.tensor([[2.0], [0.5]]))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, torch.tensor([1.0, 0.0])])
def test_greedy_is_not_a_distribution(temperature):
    with pytest.raises(ConfigError, match="argmax"):
        restrict_logits(torch.zeros(2, 3), temperature=temperature)


def test_what_was_said_is_less_likely_however_often_it_was_said():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0], [2.0, -2.0, 1.0, 0.0]])
    penalised = penalise_repetition(logits, torch.tensor([2.0, 1.0]), [[0, 1, 0, 3], [0, 1, 2]])
    assert penalised.tolist() == [[1.0, -4.0, 1.0, 0.0], [2.0, -2.0, 1.0, 0.0]]
    assert logits[0].tolist() == [2.0, -2.0, 1.0, 0.0], "the model's own logits stay"


def test_top_k_and_top_p_by_hand():
    assert kept(restrict_logits(LOGITS, top_k=1)) == [[0]]
    assert kept(restrict_logits(LOGITS, top_k=2)) == [[0, 1]]
    assert kept(restrict_logits(LOGITS, top_p=0.5)) == [[0]]
    assert kept(restrict_logits(LOGITS, top_p=0.51)) == [[0, 1]]
    assert kept(restrict_logits(LOGITS, top_p=0.76)) == [[0, 1, 2]]
    assert kept(restrict_logits(LOGITS, top_p=0.0)) == [[0]]


def test_top_p_counts_the_mass_that_top_k_left():
    """Of the two best, the first holds two thirds."""
    assert kept(restrict_logits(LOGITS, top_k=2, top_p=0.6)) == [[0]]
    assert kept(restrict_logits(LOGITS, top_k=2, top_p=0.7)) == [[0, 1]]


def test_ties_go_to_the_lower_id():
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    assert kept(restrict_logits(logits, top_k=2)) == [[1, 2]]
    assert kept(restrict_logits(torch.zeros(1, 4), top_p=0.5)) == [[0, 1]]


def test_rows_have_their_own_settings():
    logits = LOGITS.expand(4, -1)
    top_k, top_p = torch.tensor([0, 2, 0, 3]), torch.tensor([1.0, 1.0, 0.5, 0.8])
    assert kept(restrict_logits(logits, top_k=top_k, top_p=top_p)) == [[0, 1, 2, 3], [0, 1], [0], [0, 1]]


def test_forbidden_tokens_stay_forbidden():
    logits = torch.tensor([[0.0, -math.inf, 1.0, -math.inf], [0.0, 1.0, 2.0, 3.0]])
    assert kept(restrict_logits(logits, top_k=3, top_p=0.999)) == [[0, 2], [1, 2, 3]]


def test_tokens_too_unlikely_for_a_sum_are_kept_when_nothing_is_cut():
    logits = torch.tensor([[0.0, -90.0], [0.0, 0.0]])
    assert kept(restrict_logits(logits, top_p=torch.tensor([1.0, 0.4]))) == [[0, 1], [0]]


@given(
    st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12),
    st.floats(0.25, 4, width=32),
    st.integers(0, 14),
    st.floats(0, 1, width=32),
)
def test_the_kept_set_is_the_smallest_that_was_asked_for(row, temperature, top_k, top_p):
    logits = torch.tensor([row])
    restricted = restrict_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)[0]
    (ids,) = kept(restricted[None])
    scaled = (logits / torch.tensor(temperature))[0]
    assert restricted[ids].equal(scaled[ids])

    ranked = sorted(range(len(row)), key=lambda i: (-scaled[i].item(), i))[: top_k or None]
    assert sorted(ids) == sorted(ranked[: len(ids)])
    mass = torch.softmax(scaled[ranked].double(), -1).cumsum(-1)
    assert mass[len(ids) - 1] >= top_p - 1e-9
    assert len(ids) == 1 or top_p == 1 or mass[len(ids) - 2] < top_p + 1e-9


def test_a_row_does_not_depend_on_its_neighbours():
    logits = torch.randn(4, 50)
    top_k, top_p = torch.tensor([0, 5, 20, 1]), torch.tensor([0.9, 0.9, 1.0, 0.5])
    together = restrict_logits(logits, top_k=top_k, top_p=top_p)
    for i in range(4):
        rows = slice(i, i + 1)
        assert restrict_logits(logits[rows], top_k=top_k[rows], top_p=top_p[rows]).equal(together[rows])


SEEDS, POSITIONS = 64, 512


def uniform_table(first_seed: int = 0, first_position: int = 0) -> torch.Tensor:
    """Draws of consecutive seeds (rows) at consecutive positions (columns): the least random inputs there are."""
    seeds = (first_seed + torch.arange(SEEDS)).repeat_interleave(POSITIONS)
    positions = (first_position + torch.arange(POSITIONS)).repeat(SEEDS)
    return counter_uniform(seeds, positions).view(SEEDS, POSITIONS)


TABLES = [(0, 0), (2**62, 0), (-(2**63), 7), (123456789, 2**40)]


@pytest.mark.parametrize(("seed", "position"), TABLES)
def test_draws_are_uniform(seed, position):
    draws = uniform_table(seed, position).flatten()
    assert ((draws > 0) & (draws < 1)).all()

    counts = torch.histc(draws, bins=64, min=0, max=1)
    expected = len(draws) / 64
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert 63 - 5 * math.sqrt(126) < chi_square < 63 + 5 * math.sqrt(126)  # mean and deviation of χ² with 63 degrees

    gaps = draws.sort().values - (torch.arange(len(draws)) + 0.5) / len(draws)
    assert gaps.abs().max() < 2.2 / math.sqrt(len(draws))  # Kolmogorov–Smirnov at a chance of 1e-4


@pytest.mark.parametrize(("seed", "position"), TABLES)
def test_neighbouring_seeds_and_positions_are_unrelated(seed, position):
    table = uniform_table(seed, position)
    centred = (table - 0.5) * math.sqrt(12)
    bound = 5 / math.sqrt(table.numel() / 2)
    for lag in (1, 2, 3, 7, 16):
        assert (centred[:, lag:] * centred[:, :-lag]).mean().abs() < bound
        assert (centred[lag:] * centred[:-lag]).mean().abs() < bound
        assert (centred[lag:, lag:] * centred[:-lag, :-lag]).mean().abs() < bound
        assert (centred[lag:, :-lag] * centred[:-lag, lag:]).mean().abs() < bound

    by_seed = torch.corrcoef(table)[~torch.eye(SEEDS, dtype=torch.bool)]
    assert by_seed.abs().max() < 5.5 / math.sqrt(POSITIONS)
    assert len(table.flatten().unique()) == table.numel()


def test_pairs_of_successive_draws_fill_the_square():
    table = uniform_table()
    first, second = (table[:, 0::2] * 8).long(), (table[:, 1::2] * 8).long()
    counts = torch.bincount((first * 8 + second).flatten(), minlength=64).double()
    expected = counts.sum() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * math.sqrt(126)


def test_a_draw_depends_on_its_own_seed_and_position_only():
    seeds, positions = torch.arange(100), torch.arange(100).flip(0)
    together = counter_uniform(seeds, positions)
    order = torch.randperm(100)
    assert counter_uniform(seeds[order], positions[order]).equal(together[order])
    assert counter_uniform(seeds[3:4], positions[3:4]).equal(together[3:4])


PINNED = [0.631233124915386, 0.20972791481148, 0.145718712927816, 0.282575030560602]


def test_draws_never_change():
    """Pinned, because saved runs resume into the same stream: an edit of the hash must be a decision."""
    draws = counter_uniform(torch.tensor([0, 0, 1, -1]), torch.tensor([0, 1, 0, 2**40]))
    torch.testing.assert_close(draws, torch.tensor(PINNED, dtype=torch.float64), rtol=0, atol=1e-15)


def test_inverse_of_the_cumulative_distribution_by_hand():
    logits = LOGITS.expand(6, -1)
    uniforms = torch.tensor([0.1, 0.49, 0.51, 0.74, 0.76, 0.9])
    assert draw(logits, uniforms)[0].tolist() == [0, 0, 1, 1, 2, 3]


SMALLEST, LARGEST = 5e-324, 1 - 2**-53


@pytest.mark.parametrize("uniform", [0.0, SMALLEST, 0.5, LARGEST, 1.0])
def test_impossible_tokens_are_never_drawn(uniform):
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf], [-math.inf, -math.inf, -1e4, -math.inf, 5.0]])
    drawn, _ = draw(logits, torch.full((2,), uniform, dtype=torch.float64))
    assert logits.gather(1, drawn[:, None]).isfinite().all()
    assert drawn[1] == 4  # e^−10000 is 0 in float64 too


@given(st.lists(st.floats(-30, 30, width=32) | st.just(-math.inf), min_size=1, max_size=30), st.floats(0, 1))
def test_a_possible_token_is_always_found(row, uniform):
    logits = torch.tensor([[*row, 0.0]])
    (drawn,) = draw(logits, torch.tensor([uniform], dtype=torch.float64))[0].tolist()
    assert logits[0, drawn].isfinite()


def test_frequencies_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.0, 0.15, 0.05])
    count = 20_000
    uniforms = counter_uniform(torch.full((count,), 11), torch.arange(count))
    drawn, _ = draw(probabilities.log().expand(count, -1), uniforms)
    frequencies = torch.bincount(drawn, minlength=5) / count
    assert (frequencies - probabilities).abs().max() < 5 * math.sqrt(0.25 / count)
    assert frequencies[2] == 0


@pytest.mark.parametrize("logits", [torch.full((1, 3), -math.inf), torch.tensor([[0.0, math.nan, 0.0]])])
def test_what_is_no_distribution_is_refused(logits):
    with pytest.raises(AssertionError, match="not a distribution"):
        draw(logits, torch.tensor([0.5]))
