"""The whole loop, sample · pack · credit · learn · publish: what must hold whatever the algorithm."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from echelon.config import OptimConfig
from echelon.data.packing import Batch, pack
from echelon.envs import load_env
from echelon.models.lm import tiny, token_logprobs
from echelon.ops import losses
from echelon.ops.credit import group_baseline
from echelon.rollout.plays import env_loop
from echelon.rollout.roles import Role, collect
from echelon.rollout.setup import task_batch
from echelon.sampling.local import LocalSampler
from echelon.sampling.scripted import ScriptedSampler
from echelon.seeds import derive_seed
from echelon.text.chat import Renderer
from echelon.train.learner import Learner
from echelon.types import Episode, Message, SamplingParams, Step, Task
from tests.text.templates import KINDS, tokenizer

TEMPERATURE = 0.8
ENV = load_env("text_lock", {"doors": 5, "keys": 3})
CORPUS = ["Say the key of each door. Keys: sun moon star. Hint: red ok. no. blue green"] * 3


class Run:
    """A policy that learns to open doors by comparing siblings: GRPO in a few lines."""

    def __init__(self, *, budget: int | None = None, concurrency: int = 64) -> None:
        module, tokens = tiny(CORPUS, vocab_size=300, hidden=32, layers=2, heads=2)
        with torch.no_grad():
            for weight in module.parameters():
                weight.mul_(3 if weight.ndim > 1 else 1)  # far enough from uniform for a mistake to show
        self.learner = Learner(module, OptimConfig(lr=1e-2, schedule="linear"), total_steps=8)
        self.sampler = LocalSampler(module, tokens, concurrency=concurrency)
        params = SamplingParams(max_tokens=6, temperature=TEMPERATURE)
        self.role = Role("actor", self.sampler, Renderer(tokens, max_tokens=budget), params)

    def play(self, step: int) -> list[Episode]:
        tasks = task_batch(ENV.tasks("train"), step, 3, seed=0)
        play = env_loop(ENV.make, self.role, max_turns=4)
        return asyncio.run(collect(tasks, play, seed=derive_seed(0, step), siblings=3))

    def step(self, step: int, tokens_per_pass: int = 300) -> tuple[Batch, dict[str, float]]:
        episodes = self.play(step)
        # Untrained, it opens no door: any number that depends on what was said will do.
        rewards = torch.tensor([float(sum(len(turn.text) for turn in episode.turns) % 7) for episode in episodes])
        advantages = group_baseline(rewards, [episode.task for episode in episodes])
        batch = pack([turn for episode in episodes for turn in episode.turns])
        owners = torch.tensor([number for number, episode in enumerate(episodes) for _ in episode.turns])
        batch.advantages = batch.spread(advantages[owners])
        metrics = self.learner.update(batch.split(tokens_per_pass), policy_gradient)
        self.sampler.load(self.learner.weights(), self.learner.version)
        return batch, metrics


def policy_gradient(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    logprobs = token_logprobs(module, batch, temperature=TEMPERATURE)
    assert batch.logprobs is not None
    assert batch.advantages is not None
    loss, _ = losses.clipped_surrogate(logprobs, batch.logprobs, batch.advantages, batch.mask, low=0.2, high=0.2)
    stats = losses.reduce_stats({"mismatch/max": (logprobs - batch.logprobs).abs()}, batch.mask, batch.denom)
    return losses.token_sum(loss, batch.mask, batch.denom), stats


@pytest.mark.parametrize("settings", [{}, {"budget": 60}, {"concurrency": 2}], ids=["roomy", "over budget", "few"])
def test_the_ratio_of_the_first_update_is_one_at_every_step(settings: dict[str, Any]) -> None:
    """Alignment, temperature, ids, weights and caches all agree, before training and while it goes on."""
    run = Run(**settings)
    for step in range(4):
        batch, metrics = run.step(step)
        assert metrics["mismatch/max"] < 1e-4
        assert metrics["grad_norm"] > 1e-3
        shared = len(batch.tokens) < batch.turns
        assert shared, "turns of one conversation are trained in one row"


def test_over_budget_prompts_are_shortened_in_these_episodes() -> None:
    """Otherwise the test above would not say what it claims."""
    assert any(len(turn.prompt) < 60 for turn in Run(budget=60).play(0)[0].turns)
    cut = [turn for episode in Run(budget=60).play(0) for turn in episode.turns if len(turn.starts) < turn.index]
    assert cut
    assert not [turn for episode in Run().play(0) for turn in episode.turns if len(turn.starts) < turn.index]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = Run()
    expected = [whole.step(step)[1] for step in range(4)]

    first = Run()
    found = [first.step(step)[1] for step in range(2)]
    first.learner.save(tmp_path)
    second = Run()
    second.learner.load(tmp_path)
    second.sampler.load(second.learner.weights(), second.learner.version)
    found += [second.step(step)[1] for step in range(2, 4)]
    assert found == expected
    for one, other in zip(whole.learner.module.parameters(), second.learner.module.parameters(), strict=True):
        assert one.equal(other)


def test_nothing_is_drawn_from_global_generators() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        run = Run()
        state = torch.get_rng_state()
        found.append([run.step(step)[1] for step in range(2)])
        assert torch.get_rng_state().equal(state)
    assert found[0] == found[1]


def test_how_rows_are_split_into_passes_changes_nothing_but_rounding() -> None:
    runs = [Run() for _ in range(3)]
    numbers = [run.step(0, tokens)[1] for run, tokens in zip(runs, (100_000, 300, 1), strict=True)]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-3, abs=1e-4)
    assert numbers[2] == pytest.approx(numbers[0], rel=1e-3, abs=1e-4)


class Quiz:
    """Asks a few things and heeds no answer."""

    QUESTIONS = ("2 + 2?", "Sure?", "Why?")

    def __init__(self, task: Task) -> None:
        self.asked = 0

    def start(self) -> list[Message]:
        return [{"role": "user", "content": self.QUESTIONS[0]}]

    def step(self, action: str) -> Step:
        self.asked += 1
        over = self.asked == len(self.QUESTIONS)
        return Step([] if over else [{"role": "user", "content": self.QUESTIONS[self.asked]}], terminated=over)


@pytest.mark.parametrize("kind", KINDS)
def test_supervised_rows_are_what_a_play_of_the_same_words_produces(kind: str) -> None:
    """One renderer: what is learned from data is what is seen and said when acting, token for token."""
    answers = ["It is 4.", "<think>hm</think>Yes, quite: naïve?", "Because."]
    renderer = Renderer(tokenizer(kind))
    role = Role("actor", ScriptedSampler(answers, tokenizer(kind)), renderer, SamplingParams(max_tokens=99))
    make: Any = Quiz
    (episode,) = asyncio.run(collect([Task("quiz")], env_loop(make, role), seed=0))
    messages: list[Message] = []
    for question, answer in zip(Quiz.QUESTIONS, answers, strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    examples = renderer.examples(messages)
    assert [(turn.prompt, turn.action) for turn in episode.turns] == [(e.prompt, e.action) for e in examples]
    assert [turn.text for turn in episode.turns] == answers
    assert pack(examples).tokens.equal(pack(episode.turns).tokens)
    assert len(pack(examples).tokens) == 1


def test_a_loss_that_is_summed_over_passes_is_the_mean_over_all_tokens() -> None:
    run = Run()
    turns = [turn for episode in run.play(0) for turn in episode.turns]
    batch = pack(turns)
    summed = sum(float(nll(run.learner.module, part).detach()) for part in batch.split(200))
    logprobs = torch.cat([token_logprobs(run.learner.module, pack([turn])).detach().flatten() for turn in turns])
    assert summed == pytest.approx(-float(logprobs.sum()) / sum(len(turn.action) for turn in turns), rel=1e-5)


def nll(module: nn.Module, batch: Batch) -> Tensor:
    return losses.token_sum(losses.nll(token_logprobs(module, batch)), batch.mask, batch.denom)
