"""Every method of the family is a settings file: on a batch of six answers its loss and gradient are the paper's."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from echelon.config import ModelConfig
from echelon.config.loading import load, scalar
from echelon.data.packing import Batch, pack, pack_siblings
from echelon.recipes.grpo import Config, compare
from echelon.train import policy
from echelon.types import Episode, Turn

ROOT = Path(__file__).parents[2]
TASKS = ("control", "control_zero3", "twenty_questions")
"""Files that are about a task, not about a method."""
FILES = {file.stem: file for file in (ROOT / "configs" / "grpo").glob("*.yaml") if file.stem not in TASKS}

PAGE = ROOT / "docs" / "algorithms" / "grpo.md"

LENGTHS = (1, 3, 2, 12, 10, 4)
"""Of the six answers; with at most 12 tokens, of which the last 4 cost, two of them are overlong."""
REWARDS = (1.0, 0.0, 0.0, 0.0, 1.0, 2.0)
GROUPS = ((0, 1, 2), (3, 4, 5))


def config(method: str) -> Config:
    return load(Config, [FILES[method]], ["--out", "x"])


def drawn(seed: int, spread: float) -> list[Tensor]:
    """A log-probability for every token of every answer."""
    generator = torch.Generator().manual_seed(seed)
    return [-1.5 + spread * torch.randn(length, generator=generator, dtype=torch.float64) for length in LENGTHS]


@dataclass
class Answers:
    """What a paper's formula speaks of: per answer a reward, and the log-probs of its tokens under three policies."""

    new: list[Tensor]
    old: list[Tensor]
    ref: list[Tensor]

    def __iter__(self):
        return iter(zip(self.new, self.old, self.ref, strict=True))


@pytest.fixture
def answers() -> Answers:
    new = [logprobs.requires_grad_() for logprobs in drawn(1, 0.5)]
    return Answers(new, drawn(2, 0.5), drawn(3, 0.5))


def mean(numbers: Sequence[Tensor]) -> Tensor:
    return sum(numbers) / len(numbers)


def clipped(ratio: Tensor, advantage: float | Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def group_advantages(rewards: Sequence[float], divisor: Callable[[list[float]], float]) -> list[float]:
    found = [0.0] * len(rewards)
    for group in GROUPS:
        own = [rewards[i] for i in group]
        for i in group:
            found[i] = (rewards[i] - statistics.fmean(own)) / divisor(own)
    return found


def deviation(rewards: list[float]) -> float:
    return statistics.stdev(rewards) + 1e-6


def grpo(answers: Answers) -> Tensor:
    """1/G Σ 1/|o| Σ (min(ρA, clip(ρ)A) − β(π_ref/π − log π_ref/π − 1)), A = (r − mean)/std."""
    advantages = group_advantages(REWARDS, deviation)
    terms = []
    for (new, old, ref), advantage in zip(answers, advantages, strict=True):
        kl = (ref - new).exp() - (ref - new) - 1
        terms.append((clipped((new - old).exp(), advantage) - 0.04 * kl).mean())
    return -mean(terms)


def dr_grpo(answers: Answers) -> Tensor:
    """1/G Σ Σ_t min(ρA, clip(ρ)A) / L, A = r − mean."""
    advantages = group_advantages(REWARDS, lambda own: 1.0)
    return -mean([clipped((n - o).exp(), a).sum() / 12 for (n, o, _), a in zip(answers, advantages, strict=True)])


def rloo(answers: Answers) -> Tensor:
    """1/k Σ (R − mean of the others' R) log π(y|x), R = r − β log π/π_ref of the whole answer, as it was sampled."""
    returns = [r - 0.03 * float((o - f).sum()) for r, (_, o, f) in zip(REWARDS, answers, strict=True)]
    terms = []
    for group in GROUPS:
        for i in group:
            others = statistics.fmean(returns[j] for j in group if j != i)
            terms.append((returns[i] - others) * answers.new[i].sum())
    return -mean(terms)


def punished() -> list[float]:
    """Less (|y| − 8)/4 where |y| > 8, at most 1."""
    return [r - min(1.0, max(0, length - 8) / 4) for r, length in zip(REWARDS, LENGTHS, strict=True)]


def dapo(answers: Answers) -> Tensor:
    """1/Σ|o| Σ Σ_t min(ρA, clip(ρ, 0.8, 1.28)A)."""
    advantages = group_advantages(punished(), deviation)
    terms = [clipped((n - o).exp(), a, 0.2, 0.28) for (n, o, _), a in zip(answers, advantages, strict=True)]
    return -torch.cat(terms).mean()


def gspo(answers: Answers) -> Tensor:
    """1/G Σ min(sA, clip(s)A), s = (π(y)/π_old(y))^(1/|y|)."""
    advantages = group_advantages(REWARDS, deviation)
    pairs = zip(answers, advantages, strict=True)
    return -mean([clipped((n - o).mean().exp(), a, 3e-4, 4e-4) for (n, o, _), a in pairs])


def cispo(answers: Answers) -> Tensor:
    """1/Σ|o| Σ Σ_t sg(min(ρ, 5)) A log π."""
    advantages = group_advantages(punished(), deviation)
    pairs = zip(answers, advantages, strict=True)
    return -torch.cat([(n - o).exp().clamp(max=5).detach() * a * n for (n, o, _), a in pairs]).mean()


def whitened(advantages: list[Tensor]) -> list[Tensor]:
    together = torch.cat(advantages)
    return [(a - together.mean()) / together.std() for a in advantages]


def reinforce_pp(answers: Answers) -> Tensor:
    """1/N Σ 1/|o| Σ min(ρA, clip(ρ)A), A_t = r − β Σ_{i≥t} log π_old/π_ref, whitened over the batch."""
    kl = [(o - f).flip(0).cumsum(0).flip(0) for _, o, f in answers]
    advantages = whitened([r - 0.01 * k for r, k in zip(REWARDS, kl, strict=True)])
    return -mean([clipped((n - o).exp(), a).mean() for (n, o, _), a in zip(answers, advantages, strict=True)])


def reinforce_pp_baseline(answers: Answers) -> Tensor:
    """The same with A = r − mean of the group, whitened over the batch, and β ½(log π/π_ref)² in the loss."""
    centred = group_advantages(REWARDS, lambda own: 1.0)
    advantages = whitened([torch.full_like(n, a) for (n, _, _), a in zip(answers, centred, strict=True)])
    terms = []
    for (new, old, ref), advantage in zip(answers, advantages, strict=True):
        terms.append((clipped((new - old).exp(), advantage) - 0.01 * 0.5 * (new - ref).square()).mean())
    return -mean(terms)


def lite_ppo(answers: Answers) -> Tensor:
    """1/Σ|o| Σ Σ_t min(ρA, clip(ρ)A), A = (r − mean of the group)/(std of the batch)."""
    advantages = group_advantages(REWARDS, lambda own: statistics.stdev(REWARDS) + 1e-6)
    pairs = zip(answers, advantages, strict=True)
    return -torch.cat([clipped((n - o).exp(), a) for (n, o, _), a in pairs]).mean()


def gigpo(answers: Answers) -> Tensor:
    """1/NT Σ Σ 1/|a| Σ (min(ρA, clip(ρ)A) − β KL), A = A_episode + ω A_state; of one turn, whose state is the prompt,
    both are GRPO's."""
    twice = [2 * advantage for advantage in group_advantages(REWARDS, deviation)]
    terms = []
    for (new, old, ref), advantage in zip(answers, twice, strict=True):
        kl = (ref - new).exp() - (ref - new) - 1
        terms.append((clipped((new - old).exp(), advantage) - 0.01 * kl).mean())
    return -mean(terms)


FAMILY = (grpo, dr_grpo, rloo, dapo, gspo, cispo, reinforce_pp, reinforce_pp_baseline, lite_ppo, gigpo)
PAPERS = {function.__name__: function for function in FAMILY}


def packed(answers: Answers, siblings: bool) -> tuple[Batch, list[list[Episode]]]:
    """The answers as a batch, siblings in one row or not."""
    groups = []
    for task, group in enumerate(GROUPS):
        groups.append([])
        for i in group:
            stop = "length" if LENGTHS[i] == 12 else "stop"
            action, logprobs = list(range(10, 10 + LENGTHS[i])), answers.old[i].tolist()
            turn = Turn(0, "actor", [1, 2, task], action, logprobs, "", stop=stop, reward=REWARDS[i])
            groups[-1].append(Episode(task=str(task), turns=[turn], ending="terminated"))
    turns = [turn for group in groups for episode in group for turn in episode.turns]
    batch = pack_siblings(turns) if siblings else pack(turns)
    batch.ref_logprobs = placed(batch, answers.ref).float()
    return batch, groups


def placed(batch: Batch, x: list[Tensor]) -> Tensor:
    """One number per token of the answers, where the batch has these tokens."""
    out = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    for turn, numbers in enumerate(x):
        out = out.masked_scatter(batch.turn == turn, numbers)
    return out


def ours(method: str, answers: Answers, monkeypatch: pytest.MonkeyPatch, siblings: bool) -> Tensor:
    """The loss of the settings file, of a policy whose log-probs are the new ones."""
    cfg = config(method)
    batch, groups = packed(answers, siblings)
    compare(cfg, batch, groups)
    settings = cfg.policy if cfg.kl_in == "loss" else replace(cfg.policy, kl_coef=0.0)
    new = placed(batch, answers.new)
    monkeypatch.setattr(policy, "token_logprobs_and_entropy", lambda *_, **__: (new, torch.zeros_like(new)))
    return policy.policy_loss(torch.nn.Identity(), batch, settings=settings, temperature=1.0)[0]


def test_every_settings_file_has_a_formula() -> None:
    assert PAPERS.keys() == FILES.keys()


@pytest.mark.parametrize("siblings", [False, True])
@pytest.mark.parametrize("method", PAPERS)
def test_loss_and_gradient_are_those_of_the_paper(
    method: str, siblings: bool, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, found = PAPERS[method](answers), ours(method, answers, monkeypatch, siblings)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    gradients = [torch.autograd.grad(loss, answers.new, retain_graph=True) for loss in (expected, found)]
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


ROWS = dict(
    re.findall(
        r"^\| \[[^\]]+\]\(\.\./\.\./configs/grpo/(\w+)\.yaml\) \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.M
    )
)
"""Method → the settings in its row of the table in docs/algorithms/grpo.md."""


def test_the_table_has_a_row_for_every_settings_file() -> None:
    assert ROWS.keys() == FILES.keys()


@pytest.mark.parametrize("method", FILES)
def test_the_row_of_a_method_says_what_its_file_sets(method: str) -> None:
    said = {name: scalar(value) for name, value in re.findall(r"`([\w.]+): ([^`]+)`", ROWS[method])}
    cfg, default = config(method), Config(out="x", env="x", model=ModelConfig("x"))
    assert {name: attrgetter(name)(cfg) for name in said} == said
    names = [f"policy.{entry.name}" for entry in fields(cfg.policy)] + [entry.name for entry in fields(cfg)]
    given = ("out", "env", "env_settings", "model", "sampling", "tasks_per_step", "policy", "policy.optim")
    differs = {name for name in names if attrgetter(name)(cfg) != attrgetter(name)(default)} - set(given)
    assert differs <= said.keys() | {"group_size"}
