"""Episodes in which one of several candidates is said at every turn: played, read back, and told.

What was not chosen is no part of an episode: its turns are what was said, and the offers lie beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from echelon.config import LoraConfig, ModelConfig, SamplingConfig
from echelon.data.candidates import Choice, Options
from echelon.errors import CheckpointError, DataError
from echelon.models.heads import UtteranceCritic
from echelon.models.lm import load_tokenizer
from echelon.models.ranker import Ranker
from echelon.ops import bellman
from echelon.rollout.ahead import Level, Played
from echelon.rollout.plays import env_loop
from echelon.rollout.roles import Role
from echelon.rollout.setup import Actor, model_path, open_actor, open_copy
from echelon.sampling.candidates import Chooser, Offer, Score
from echelon.seeds import derive_seed
from echelon.train.learner import Learner, load_module
from echelon.types import Env, Episode, Play, Task, Turn

Critic = TypeVar("Critic", Ranker, UtteranceCritic)


@dataclass(slots=True)
class Offered(Played):
    """What a step has played, and what was offered in its episodes, by the seed of the turn."""

    offers: dict[int, Offer] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON types."""
        return {**Played.to_json(self), "offers": {seed: asdict(offer) for seed, offer in self.offers.items()}}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Offered:
        """What `to_json` made this of."""
        played = Played.from_json(saved)
        offers = {int(seed): Offer.from_json(each) for seed, each in saved["offers"].items()}
        return cls(played.episodes, played.metrics, offers)


def choosing(
    actor: Actor,
    learner: Learner,
    sampling: SamplingConfig,
    critic: Critic,
    score: Callable[[Critic], Score],
    candidates: int,
) -> Level:
    """Who plays: the actor, through a chooser by what the critic says of its candidates.

    A copy that plays ahead has a critic of its own, which is handed over with the actor's weights.
    """

    def chosen(role: Role, critic: Critic, follow: Callable[[], None] = lambda: None) -> Role:
        chooser = Chooser(role.sampler, score(critic), candidates, follow=follow)
        return Role(role.name, chooser, role.renderer, role.params)

    def copied() -> Role:
        twin: Critic = critic.target()
        return chosen(open_copy(actor, sampling), twin, partial(bellman.hard_copy_, twin, critic))

    role = chosen(actor.role, critic)
    return Level(replace(actor, sampler=role.sampler, role=role), learner, sampling, copied)


def candidate_loop(make: Callable[[Task], Env], actor: Role, chooser: Chooser, *, max_turns: int = 1000) -> Play:
    """`env_loop` of a role that speaks through a chooser. Where an episode is cut off, there is one more offer.

    It answers the state in which the episode was cut off, and is not said: its best is what would have followed.
    """

    async def play(task: Task, episode: Episode) -> None:
        made: list[Env] = []

        def make_and_keep(task: Task) -> Env:
            made.append(make(task))
            return made[0]

        await env_loop(make_and_keep, actor, max_turns=max_turns)(task, episode)
        if episode.ending == "truncated":
            assert episode.final, "a truncated episode says in which state it was cut off"
            stop_when = getattr(made[0], "stop_when", None) or actor.params.stop_when
            params = replace(actor.params, seed=after(episode.turns[-1]), stop_when=stop_when)
            await chooser.sample(episode.final, params)

    return play


def after(turn: Turn) -> int:
    """The seed of the offer in the state in which an episode was cut off after this turn."""
    return derive_seed(turn.seed, "cut off")


def choices(episode: Episode, offers: Mapping[int, Offer]) -> list[Choice]:
    """The decisions of an episode that one role played, in order. Only where it terminated nothing follows."""
    assert episode.ending != "failed", "what a failed episode earned means nothing"
    points = [offers[turn.seed] for turn in episode.turns]
    if episode.ending == "truncated":
        points.append(offers[after(episode.turns[-1])])
    options = [Options(point.prompt, [candidate.tokens for candidate in point.candidates]) for point in points]
    following = [*options[1:], *([None] if episode.ending == "terminated" else [])]
    taken = zip(episode.turns, points[: len(episode.turns)], options[: len(episode.turns)], following, strict=True)
    return [Choice(here, point.chosen, turn.reward, ahead) for turn, point, here, ahead in taken]


def offer_rows(
    rows: Iterator[dict[str, Any]], episodes: Sequence[Episode], offers: Mapping[int, Offer]
) -> Iterator[dict[str, Any]]:
    """Rows of `episode_rows` whose turns also say `candidates` (text and q of each) and which was `chosen`."""
    for row, episode in zip(rows, episodes, strict=True):
        for said, turn in zip(row["turns"], episode.turns, strict=True):
            if turn.seed in offers:
                said |= step_record(offers[turn.seed])
        yield row


def step_record(offer: Offer) -> dict[str, Any]:
    """One step for a person to read: every candidate, and which was taken."""
    listed = [{"q": q, "text": said.text} for said, q in zip(offer.candidates, offer.q, strict=True)]
    return {"candidates": listed, "chosen": offer.chosen, "explored": offer.explored}


def new_ranker(actor: Actor, *, path: str, model: ModelConfig, lora: LoraConfig, bounded: bool, seed: int) -> Ranker:
    """A ranker that starts as a copy of the actor's body, or of the model `path`, its head drawn from the seed.

    Raises DataError for a model that reads other tokens than the actor writes.
    """
    base = actor.module
    if path:
        if load_tokenizer(model_path(path)).get_vocab() != actor.tokenizer.get_vocab():
            raise DataError(
                f"ranker_path = {path}: its tokenizer is not the actor's, so it would misread the candidates. "
                "Use a model with the same tokenizer, or leave ranker_path empty."
            )
        base = open_actor(replace(model, path=path), SamplingConfig(), lora=lora).module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Ranker.from_lm(base, bounded=bounded)


def has_ranker(checkpoint: Path) -> bool:
    """Whether a folder is a checkpoint of a run that learned to rank."""
    return all((checkpoint / name).is_file() for name in ("manifest.json", "ranker/model.safetensors"))


def saved_ranker(checkpoint: Path, actor: Actor, model: ModelConfig) -> Ranker:
    """The ranker of a checkpoint, beside the actor that was learned there."""
    settings = run_settings(checkpoint)
    path, lora = str(settings.get("ranker_path", "")), LoraConfig(**_tuples(settings.get("lora", {})))
    ranker = new_ranker(actor, path=path, model=model, lora=lora, bounded=False, seed=0)
    load_module(ranker, checkpoint / "ranker")  # whether it is bounded comes with its weights
    return ranker


def run_settings(checkpoint: Path) -> Mapping[str, Any]:
    """The settings of the run that wrote a checkpoint."""
    try:
        return dict(yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{checkpoint}: its config.yaml cannot be read, so its ranker cannot be built. Name a whole checkpoint."
        ) from error


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
