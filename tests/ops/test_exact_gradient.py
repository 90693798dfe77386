"""Which credit schemes follow the true policy gradient, decided by enumerating everything that can happen.

The game is small enough to list all of its plays, and the policy is a table of logits, so the gradient of the expected
return is an exact sum in float64, and so is the expectation of an estimator over all plays or all groups of G plays.
No sampling and no tolerance for noise: unbiased means equal to 1e-8.

Equal to the exact gradient: returns-to-go, with or without a baseline from the true values; `turn_gae` and `token_gae`
with true values, for any λ; the whole return minus the leave-one-out mean of its siblings; return-to-go minus the
leave-one-out mean of what all siblings had to go at the same turn, 0 for those whose episode was over; return-to-go
minus the leave-one-out mean of other answers to the *same* state, when each state is answered G times.

Scaled: the plain group mean contains the sample itself, which costs the factor (G−1)/G everywhere.

Biased, when the policy decides when an episode ends:

* *Rewards centred per turn index, then summed to go.* How many baselines are subtracted from an episode then depends on
  how long the policy made it: each further turn is charged the mean reward of getting there. With ρ_t the probability
  that turn t happens and m_t its mean reward if it does, the true gradient is Σ ∇(ρ_t·m_t), but the expectation is
  Σ q_t·ρ_t·∇m_t: blind to ∇ρ_t (q_t is the chance of company, below). In the stop-or-go game, where going on pays 1 for
  certain, the expectation is exactly 0 where the truth is p(1−p).
* *Returns-to-go centred per turn index* (or per state, if siblings meet there by coincidence). Leaving the sample out
  makes the baseline independent of its action, so no term is added, but a sample without company gets 0. The part of
  turn t is weighted by q_t = 1 − (1−ρ_t)^(G−1), the chance that some sibling got there too; with the plain mean, by
  E[M/(M+1)] = 1 − (1 − (1−ρ_t)^G)/(G·ρ_t), M the number of siblings that did. Late turns learn more slowly, by a
  factor that the policy itself moves. GiGPO adds such a comparison per state to that of episodes: a state then counts
  1 + ω·q_s.

How noisy they are is exact here too. docs/credit.md shows direction and noise of every scheme, and the last test
computes that table.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from echelon.ops import losses
from echelon.ops.credit import (
    group_baseline,
    same_state_baseline,
    same_turn_baseline,
    token_gae,
    turn_gae,
    turn_returns,
)
from tests.test_docs import columns, prose

Game = dict[str, list[tuple[float, str | None]]]
"""For each state, what each action pays and where it leads; None ends the episode."""

THREE_TURNS: Game = {
    "start": [(0.3, None), (1.0, "left"), (-0.5, "right")],
    "left": [(0.2, None), (0.0, "end")],
    "right": [(2.0, None), (0.7, "end")],
    "end": [(1.5, None), (-1.0, None)],
}
TURN_OF = {"start": 0, "left": 1, "right": 1, "end": 2}

STOP_OR_GO: Game = {"start": [(0.0, None), (0.0, "end")], "end": [(1.0, None)]}

THREE_DOORS: Game = {
    "start": [(0.0, "left"), (1.0, "left")],
    "left": [(0.0, "end"), (1.0, "end")],
    "end": [(0.0, None), (1.0, None)],
}
"""One key of two fits each door, and the next door follows whether it opens or not."""


@dataclass(frozen=True)
class Play:
    """One way the game can go."""

    states: tuple[str, ...]
    actions: tuple[int, ...]
    rewards: tuple[float, ...]


Policy = dict[str, Tensor]
"""Logits of each state's actions."""

Credit = Callable[[Sequence[Play]], Tensor]
"""From a group of plays to one advantage per turn, play after play."""


def plays(game: Game, state: str | None = "start") -> list[Play]:
    """Every play from a state on."""
    if state is None:
        return [Play((), (), ())]
    return [
        Play((state, *rest.states), (action, *rest.actions), (reward, *rest.rewards))
        for action, (reward, following) in enumerate(game[state])
        for rest in plays(game, following)
    ]


def logprobs_of(play: Play, policy: Policy) -> Tensor:
    pairs = zip(play.states, play.actions, strict=True)
    return torch.stack([policy[state].log_softmax(0)[action] for state, action in pairs])


def probability(play: Play, policy: Policy) -> Tensor:
    return logprobs_of(play, policy).sum().exp()


def gradient(objective: Tensor, policy: Policy) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(objective, list(policy.values()), allow_unused=True, retain_graph=True)
    return dict(zip(policy, gradients, strict=True))


def exact_gradient(game: Game, policy: Policy) -> dict[str, Tensor]:
    """Of the expected return."""
    return gradient(sum(probability(play, policy) * sum(play.rewards) for play in plays(game)), policy)


def expected_gradient(game: Game, policy: Policy, credit: Credit, siblings: int = 1) -> dict[str, Tensor]:
    """Expectation, over all groups of independent plays, of the gradient that `losses.reinforce` gives per play."""
    known = {play: (logprobs_of(play, policy), probability(play, policy).item()) for play in plays(game)}
    objective = torch.zeros((), dtype=torch.float64)
    for group in itertools.product(known, repeat=siblings):
        weight = torch.tensor([known[play][1] for play in group], dtype=torch.float64).prod()
        logprobs = torch.cat([known[play][0] for play in group])
        objective = objective - weight * losses.reinforce(logprobs, credit(group)).sum() / siblings
    return gradient(objective, policy)


def assert_gradients(
    got: dict[str, Tensor], expected: dict[str, Tensor], factor: float | dict[str, float] = 1.0
) -> None:
    for state in expected:
        scale = factor[state] if isinstance(factor, dict) else factor
        torch.testing.assert_close(got[state], scale * expected[state], atol=1e-8, rtol=0)


def values(game: Game, policy: Policy) -> dict[str, float]:
    """What each state is worth under the policy: the mean return of the plays that start there."""

    def value(state: str) -> float:
        return sum(probability(play, policy).item() * sum(play.rewards) for play in plays(game, state))

    return {state: value(state) for state in game}


def flat(group: Sequence[Play], field: str) -> list:
    return [item for play in group for item in getattr(play, field)]


def rewards_N(group: Sequence[Play]) -> Tensor:
    return torch.tensor(flat(group, "rewards"), dtype=torch.float64)


def episode_N(group: Sequence[Play]) -> Tensor:
    return torch.tensor([i for i, play in enumerate(group) for _ in play.states])


def to_go(group: Sequence[Play]) -> Tensor:
    return turn_returns(rewards_N(group), episode_N(group), gamma=1.0)


def turn_index(group: Sequence[Play]) -> list[int]:
    return [t for play in group for t in range(len(play.states))]


@pytest.fixture
def policy() -> Policy:
    return {
        state: torch.randn(len(actions), dtype=torch.float64, requires_grad=True)
        for state, actions in THREE_TURNS.items()
    }


@pytest.fixture
def exact(policy: Policy) -> dict[str, Tensor]:
    return exact_gradient(THREE_TURNS, policy)


def test_the_plays_are_all_of_them(policy):
    assert len(plays(THREE_TURNS)) == 7
    assert {len(play.states) for play in plays(THREE_TURNS)} == {1, 2, 3}
    total = sum(probability(play, policy).item() for play in plays(THREE_TURNS))
    assert total == pytest.approx(1, abs=1e-12)


def test_returns_to_go_are_unbiased(policy, exact):
    assert_gradients(expected_gradient(THREE_TURNS, policy, to_go), exact)


def test_whole_returns_are_unbiased(policy, exact):
    def credit(group):
        totals = torch.tensor([sum(play.rewards) for play in group], dtype=torch.float64)
        return totals[episode_N(group)]

    assert_gradients(expected_gradient(THREE_TURNS, policy, credit), exact)


def test_true_values_are_an_unbiased_baseline(policy, exact):
    value = values(THREE_TURNS, policy)

    def credit(group):
        return to_go(group) - torch.tensor([value[state] for state in flat(group, "states")], dtype=torch.float64)

    assert_gradients(expected_gradient(THREE_TURNS, policy, credit), exact)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_turn_gae_with_true_values_is_unbiased(policy, exact, lam):
    value = values(THREE_TURNS, policy)

    def credit(group):
        values_N = torch.tensor([value[state] for state in flat(group, "states")], dtype=torch.float64)
        ended = torch.zeros_like(values_N)
        return turn_gae(rewards_N(group), values_N, episode_N(group), ended, gamma=1.0, lam=lam)[0]

    assert_gradients(expected_gradient(THREE_TURNS, policy, credit), exact)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_token_gae_over_gaps_with_true_values_is_unbiased(policy, exact, lam):
    """Each action is one token, with an observation of two tokens before it whose values are junk."""
    value = values(THREE_TURNS, policy)

    def credit(group):
        (play,) = group
        mask = torch.tensor([[False, False, True] * len(play.states)])
        rewards, guesses = torch.full(mask.shape, 99.0).double(), torch.full(mask.shape, -99.0).double()
        rewards[mask] = torch.tensor(play.rewards, dtype=torch.float64)
        guesses[mask] = torch.tensor([value[state] for state in play.states], dtype=torch.float64)
        bootstrap = torch.zeros(1, dtype=torch.float64)
        return token_gae(rewards, guesses, mask, gamma=1.0, lam=lam, bootstrap_B=bootstrap)[0][mask]

    assert_gradients(expected_gradient(THREE_TURNS, policy, credit), exact)


def test_wrong_values_are_unbiased_at_lambda_one_only(policy, exact):
    def credit_at(lam):
        def credit(group):
            guesses = torch.tensor([len(state) for state in flat(group, "states")], dtype=torch.float64)
            ended = torch.zeros_like(guesses)
            return turn_gae(rewards_N(group), guesses, episode_N(group), ended, gamma=1.0, lam=lam)[0]

        return credit

    assert_gradients(expected_gradient(THREE_TURNS, policy, credit_at(1.0)), exact)
    biased = expected_gradient(THREE_TURNS, policy, credit_at(0.0))
    assert (biased["start"] - exact["start"]).abs().max() > 0.1


def by_task(leave_one_out: bool) -> Credit:
    """The whole return of a play against those of its siblings, the same for each of its turns."""

    def credit(group):
        totals = torch.tensor([sum(play.rewards) for play in group], dtype=torch.float64)
        return group_baseline(totals, ["task"] * len(group), leave_one_out=leave_one_out)[episode_N(group)]

    return credit


@pytest.mark.parametrize("siblings", [2, 3])
def test_leaving_oneself_out_of_the_group_is_unbiased(policy, exact, siblings):
    assert_gradients(expected_gradient(THREE_TURNS, policy, by_task(leave_one_out=True), siblings), exact)


@pytest.mark.parametrize("siblings", [2, 3])
def test_the_plain_group_mean_shrinks_the_gradient(policy, exact, siblings):
    got = expected_gradient(THREE_TURNS, policy, by_task(leave_one_out=False), siblings)
    assert_gradients(got, exact, factor=(siblings - 1) / siblings)


def test_an_unchanged_policy_makes_the_clipped_surrogate_unbiased(policy, exact):
    objective = torch.zeros((), dtype=torch.float64)
    for play in plays(THREE_TURNS):
        logprobs = logprobs_of(play, policy)
        loss, _ = losses.clipped_surrogate(logprobs, logprobs.detach(), to_go([play]))
        objective = objective - probability(play, policy).detach() * loss.sum()
    assert_gradients(gradient(objective, policy), exact)


@pytest.mark.parametrize("siblings", [2, 3])
def test_other_answers_to_the_same_state_are_an_unbiased_baseline(policy, siblings):
    """Tree sampling: each state on the way is answered `siblings` times, so nobody is ever without company.

    The plays from each state form the groups; weighted by how often the state is visited, their first turns add up to
    the policy gradient.
    """
    expected = exact_gradient(THREE_TURNS, policy)
    visits = visit_probabilities(policy)
    got = {}
    for state in THREE_TURNS:
        objective = torch.zeros((), dtype=torch.float64)
        for group in itertools.product(plays(THREE_TURNS, state), repeat=siblings):
            weight = torch.stack([probability(play, policy) for play in group]).prod().detach()
            returns = torch.tensor([sum(play.rewards) for play in group], dtype=torch.float64)
            advantages = group_baseline(returns, [state] * siblings, leave_one_out=True)
            firsts = torch.stack([logprobs_of(play, policy)[0] for play in group])
            objective = objective - weight * losses.reinforce(firsts, advantages).sum() / siblings
        got[state] = visits[state].detach() * gradient(objective, policy)[state]
    assert_gradients(got, expected)


def visit_probabilities(policy: Policy) -> dict[str, Tensor]:
    """How likely a play passes through each state, differentiable."""
    return {
        state: sum(probability(play, policy) for play in plays(THREE_TURNS) if state in play.states)
        for state in THREE_TURNS
    }


def turn_probabilities(policy: Policy) -> list[Tensor]:
    """ρ_t: how likely turn t happens, differentiable."""
    return [sum(probability(play, policy) for play in plays(THREE_TURNS) if len(play.states) > t) for t in range(3)]


def company(rho: Tensor, siblings: int, leave_one_out: bool) -> float:
    """By how much a coincidental group weakens the gradient of a turn that happens with probability ρ."""
    rho = rho.detach().item()
    if leave_one_out:
        return 1 - (1 - rho) ** (siblings - 1)
    return 1 - (1 - (1 - rho) ** siblings) / (siblings * rho)


def rewards_centred_per_turn_index(leave_one_out: bool) -> Credit:
    """Each turn's reward minus the mean reward of that turn index over the siblings that got there, summed to go."""

    def credit(group):
        centred = group_baseline(rewards_N(group), turn_index(group), leave_one_out=leave_one_out)
        return turn_returns(centred, episode_N(group), gamma=1.0)

    return credit


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("siblings", [2, 3])
def test_rewards_centred_per_turn_index_never_learn_to_go_on(siblings, leave_one_out):
    """Going on pays 1 for certain: p(1−p) on the logit of going is true, 0 is expected, so the bias is −p(1−p)."""
    p = 0.25
    policy = {
        "start": torch.tensor([0.75, p], dtype=torch.float64).log().requires_grad_(),
        "end": torch.zeros(1, dtype=torch.float64, requires_grad=True),
    }
    truth = exact_gradient(STOP_OR_GO, policy)["start"]
    torch.testing.assert_close(truth, torch.tensor([-p * (1 - p), p * (1 - p)], dtype=torch.float64))

    credit = rewards_centred_per_turn_index(leave_one_out)
    got = expected_gradient(STOP_OR_GO, policy, credit, siblings)["start"]
    torch.testing.assert_close(got - truth, torch.tensor([p * (1 - p), -p * (1 - p)], dtype=torch.float64))

    fair = expected_gradient(STOP_OR_GO, policy, by_task(leave_one_out=True), siblings)["start"]
    torch.testing.assert_close(fair, truth)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_rewards_centred_per_turn_index_are_blind_to_how_likely_a_turn_is(policy, exact, leave_one_out):
    """The expectation is Σ q_t·ρ_t·∇m_t, where the truth is Σ ∇(ρ_t·m_t)."""
    siblings, every = 3, plays(THREE_TURNS)
    objective = truth = torch.zeros((), dtype=torch.float64)
    for t, rho in enumerate(turn_probabilities(policy)):
        mean = sum(probability(play, policy) * play.rewards[t] for play in every if len(play.states) > t) / rho
        truth = truth + rho * mean
        objective = objective + company(rho, siblings, leave_one_out) * rho.detach() * mean
    assert_gradients(gradient(truth, policy), exact)

    got = expected_gradient(THREE_TURNS, policy, rewards_centred_per_turn_index(leave_one_out), siblings)
    assert_gradients(got, gradient(objective, policy))
    ratio = got["start"] / exact["start"]
    assert ratio.max() - ratio.min() > 0.05  # not even the direction is right


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("key", ["turn index", "state"])
def test_coincidental_groups_weigh_each_turn_by_its_chance_of_company(policy, exact, key, leave_one_out):
    siblings = 3

    def credit(group):
        keys = turn_index(group) if key == "turn index" else flat(group, "states")
        return group_baseline(to_go(group), keys, leave_one_out=leave_one_out)

    by_turn, by_state = turn_probabilities(policy), visit_probabilities(policy)
    chance = {state: by_turn[TURN_OF[state]] if key == "turn index" else by_state[state] for state in THREE_TURNS}
    factor = {state: company(rho, siblings, leave_one_out) for state, rho in chance.items()}
    assert factor["end"] < factor["start"] - 0.05
    assert_gradients(expected_gradient(THREE_TURNS, policy, credit, siblings), exact, factor)


def same_turn(*, ended: bool = True, leave_one_out: bool = True, scale: str = "none", gamma: float = 1.0) -> Credit:
    def credit(group):
        returns = turn_returns(rewards_N(group), episode_N(group), gamma=gamma)
        how = {"ended": ended, "scale": scale, "leave_one_out": leave_one_out}
        return same_turn_baseline(returns, episode_N(group), ["task"] * len(group), **how)

    return credit


def gigpo(*, weight: float = 1.0, leave_one_out: bool = True, scale: str = "none") -> Credit:
    def credit(group):
        how = {"scale": scale, "leave_one_out": leave_one_out}
        siblings, states = ["task"] * len(group), flat(group, "states")
        totals = torch.tensor([sum(play.rewards) for play in group], dtype=torch.float64)
        episodes = group_baseline(totals, siblings, **how)[episode_N(group)]
        return episodes + weight * same_state_baseline(to_go(group), episode_N(group), siblings, states, **how)

    return credit


@pytest.mark.parametrize("siblings", [2, 3])
def test_the_same_turn_of_all_siblings_is_an_unbiased_baseline(policy, exact, siblings):
    """Who has finished has nothing to go, and says so: what is subtracted does not depend on one's own length."""
    assert_gradients(expected_gradient(THREE_TURNS, policy, same_turn(), siblings), exact)
    got = expected_gradient(THREE_TURNS, policy, same_turn(leave_one_out=False), siblings)
    assert_gradients(got, exact, factor=(siblings - 1) / siblings)


@pytest.mark.parametrize("siblings", [2, 3])
def test_the_same_turn_of_all_siblings_learns_to_go_on(siblings):
    """Where rewards centred per turn index expect 0 (above)."""
    p = 0.25
    policy = {
        "start": torch.tensor([0.75, p], dtype=torch.float64).log().requires_grad_(),
        "end": torch.zeros(1, dtype=torch.float64, requires_grad=True),
    }
    got = expected_gradient(STOP_OR_GO, policy, same_turn(), siblings)["start"]
    torch.testing.assert_close(got, torch.tensor([-0.1875, 0.1875], dtype=torch.float64))


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_only_siblings_that_got_that_far_weigh_late_turns_less(policy, exact, leave_one_out):
    got = expected_gradient(THREE_TURNS, policy, same_turn(ended=False, leave_one_out=leave_one_out), 3)
    by_turn = turn_probabilities(policy)
    factor = {state: company(by_turn[TURN_OF[state]], 3, leave_one_out) for state in THREE_TURNS}
    assert_gradients(got, exact, factor)


def test_with_a_discount_the_baseline_still_adds_nothing(policy):
    """What is expected is what discounted returns-to-go without a baseline give; that is another objective."""
    alone = expected_gradient(
        THREE_TURNS, policy, lambda group: turn_returns(rewards_N(group), episode_N(group), gamma=0.5)
    )
    assert_gradients(expected_gradient(THREE_TURNS, policy, same_turn(gamma=0.5), 3), alone)
    assert (alone["start"] - exact_gradient(THREE_TURNS, policy)["start"]).abs().max() > 0.02


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_gigpo_weighs_a_state_by_its_chance_of_company(policy, exact, weight):
    """Never in another direction within a state: one plus ω times the chance that a sibling came there too."""
    got = expected_gradient(THREE_TURNS, policy, gigpo(weight=weight), 3)
    factor = {s: 1 + weight * company(rho, 3, True) for s, rho in visit_probabilities(policy).items()}
    assert_gradients(got, exact, factor)
    assert factor["start"] == 1 + weight > factor["end"] + 0.05


def with_true_values(lam: float, game: Game) -> Credit:
    value = values(game, uniform(game))

    def credit(group):
        values_N = torch.tensor([value[state] for state in flat(group, "states")], dtype=torch.float64)
        ended = torch.zeros_like(values_N)
        return turn_gae(rewards_N(group), values_N, episode_N(group), ended, gamma=1.0, lam=lam)[0]

    return credit


def uniform(game: Game) -> Policy:
    return {
        state: torch.zeros(len(options), dtype=torch.float64, requires_grad=True) for state, options in game.items()
    }


def direction_and_noise(game: Game, credit: Credit, siblings: int) -> tuple[float, float]:
    """The cosine of the expected gradient with the exact one; the variance of the estimate over its squared length."""
    policy = uniform(game)
    exact = torch.cat(list(exact_gradient(game, policy).values()))

    @cache
    def scores(play: Play) -> Tensor:
        """The gradient of the log-probability of each turn's action."""
        grads = [gradient(logprob, policy) for logprob in logprobs_of(play, policy)]
        return torch.stack(
            [torch.cat([torch.zeros_like(policy[s]) if g is None else g for s, g in by.items()]) for by in grads]
        )

    mean, square = torch.zeros_like(exact), 0.0
    for group in itertools.product(plays(game), repeat=siblings):
        weight = torch.stack([probability(play, policy) for play in group]).prod().item()
        estimate = credit(group) @ torch.cat([scores(play) for play in group]) / siblings
        mean, square = mean + weight * estimate, square + weight * (estimate @ estimate).item()
    length = (mean @ mean).item()
    return (mean @ exact).item() / (length * (exact @ exact).item()) ** 0.5, abs(square / length - 1)


def whole_returns(group: Sequence[Play]) -> Tensor:
    return torch.tensor([sum(play.rewards) for play in group], dtype=torch.float64)[episode_N(group)]


def grpo(group: Sequence[Play]) -> Tensor:
    totals = torch.tensor([sum(play.rewards) for play in group], dtype=torch.float64)
    return group_baseline(totals, ["task"] * len(group), scale="std")[episode_N(group)]


SCHEMES: dict[str, Callable[[Game], Credit]] = {
    "no baseline": lambda game: whole_returns,
    "episode": lambda game: by_task(leave_one_out=True),
    "episode, std": lambda game: grpo,
    "turn": lambda game: same_turn(),
    "turn, γ = 0.5": lambda game: same_turn(gamma=0.5),
    "turn, std": lambda game: same_turn(leave_one_out=False, scale="std"),
    "turn, reached": lambda game: same_turn(ended=False),
    "state": lambda game: gigpo(),
    "state, std": lambda game: gigpo(leave_one_out=False, scale="std"),
    "GAE over turns, λ = 1": partial(with_true_values, 1.0),
    "GAE over turns, λ = 0": partial(with_true_values, 0.0),
    "centred per turn index": lambda game: rewards_centred_per_turn_index(leave_one_out=True),
}
PAGE = Path(__file__).parents[2] / "docs" / "credit.md"
SHOWN = [row for row, _ in columns(prose(PAGE), "scheme, G = 3")]


@pytest.mark.parametrize("row", SHOWN, ids=[row["scheme, G = 3"] for row in SHOWN])
def test_the_page_on_credit_shows_direction_and_noise_of_every_scheme(row):
    scheme = SCHEMES[row["scheme, G = 3"]]
    for name, game in (("three turns", THREE_TURNS), ("three doors", THREE_DOORS)):
        direction, noise = direction_and_noise(game, scheme(game), 3)
        assert f"{direction:.3f}" == row[f"direction, {name}"]
        assert f"{noise:.2f}" == row[f"noise, {name}"]


def test_the_page_on_credit_shows_every_scheme():
    assert [row["scheme, G = 3"] for row in SHOWN] == list(SCHEMES)
