"""Data of control tasks: a Minari dataset, or episodes that a policy plays into one, as rows of text and as arrays.

What a dataset holds, or a scripted or learned expert does, becomes prompts and completions by the codec that training,
rewards and evaluation use; the codec is stored beside them. Run again with the same settings, it writes the same files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from echelon.config import CommandConfig, Settings, demand, require
from echelon.data import control
from echelon.data.control import Recorded, Recording
from echelon.data.learned_expert import ALGORITHMS, learned_expert
from echelon.envs import gymnasium as environments
from echelon.envs.experts import expert
from echelon.errors import ConfigError, DataError
from echelon.seeds import derive_seed
from echelon.text.codec import Codec, measured_ranges
from echelon.train.log import typed

EXAMPLES = """\
echelon control-data --env-id CartPole-v1 --episodes 100 --out data/cartpole_expert
echelon control-data --env-id CartPole-v1 --policy medium --expert-share 0.45 --out data/cartpole_medium
echelon control-data --dataset mujoco/halfcheetah/expert-v0 --download --out data/cheetah"""
TRAIN, TEST, SHOWN, MINARI = "train.jsonl", "test.jsonl", "examples.json", "minari"


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Settings of a data set of control."""

    out: str
    """Folder for train.jsonl, test.jsonl, arrays.npz, codec.json and summary.json."""
    dataset: str = ""
    """A Minari dataset: its folder or its id. Without one, a policy plays."""
    download: bool = False
    """Fetch the dataset if it is not on this machine."""
    env_id: str = ""
    """Gymnasium's environment: where the policy plays, or what the dataset must be of."""
    env_settings: Settings = field(default_factory=dict)
    """Settings of the environment as a language model plays it: style, decimals, bins, horizon, system, …"""
    episodes: int = 0
    """Episodes to play, or at most to read; 0 plays 100, or reads all."""
    policy: Literal["expert", "medium", "random"] = "expert"
    """Who plays: an expert, one that acts at random at some steps (medium), or nobody who knows anything."""
    expert: str = "scripted"
    """Which expert: scripted, or learned by a2c, ddpg, dqn, ppo, sac or td3 of stable-baselines3."""
    expert_steps: int = 100_000
    """Steps that a learned expert learns for. It is kept in the folder and learned once."""
    expert_share: float = 0.5
    """At which part of the steps the expert acts, where the policy is medium."""
    disturbed: float = 0.0
    """At which part of the steps the environment does something at random in place of what the policy chose. The data
    keep what was chosen, and so say how to come back from where the policy alone would not get (DART, 1703.09327)."""
    ranges: Literal["space", "data"] = "space"
    """Where the axes of bins end: at the bounds of the space, or where the data do."""
    outside: float = 0.005
    """Part of the data that lies beyond each end of such an axis."""
    examples: int = 0
    """Steps of these episodes that every prompt shows as examples."""
    eval_fraction: float = 0.1
    """Part of the episodes that is held out, in test.jsonl."""
    gamma: float = 1.0
    """Discount of return_to_go."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "out")
        if not self.dataset:
            require(self, "env_id")
        demand(self, "episodes", self.episodes >= 0, "it counts episodes. Give 0 for all of a dataset.")
        known = ("scripted", *ALGORITHMS)
        demand(self, "expert", self.expert in known, f"there is no such expert. Give one of {', '.join(known)}.")
        demand(self, "expert_steps", self.expert_steps >= 1, "nothing is learned in none. Give 100000, or more.")
        demand(self, "expert_share", 0 <= self.expert_share <= 1, "it is a part of the steps. Give 0 to 1.")
        demand(self, "disturbed", 0 <= self.disturbed < 1, "it is a part of the steps. Give 0 to 0.5.")
        because = "what is in a dataset has happened. Leave it out, or let a policy play."
        demand(self, "disturbed", not (self.disturbed and self.dataset), because)
        demand(self, "outside", 0 <= self.outside < 0.5, "it is a part of the data. Give 0.01, or less.")
        demand(self, "examples", self.examples >= 0, "it counts steps. Give 0 for none.")
        demand(self, "eval_fraction", 0 <= self.eval_fraction < 1, "it is a part of the episodes. Give 0 to 0.5.")
        demand(self, "gamma", 0 <= self.gamma <= 1, "a discount lies between 0 and 1.")
        there = not self.dataset or (self.policy, self.expert) == ("expert", "scripted")
        demand(self, "policy" if self.policy != "expert" else "expert", there, "dataset says what is read. Keep one.")
        demand(self, "download", not self.download or bool(self.dataset), "nothing is fetched. Name a dataset.")
        for name in ("observation_ranges", "action_ranges"):
            demand(self, "ranges", self.ranges == "space" or name not in self.env_settings, f"{name} says it too.")


def main(cfg: Config) -> None:
    """Read or play, write, and print what was written."""
    out = Path(cfg.out)
    _check_folder(out)
    settings = environments.read_settings(environments.PREFIX + cfg.env_id, cfg.env_settings)
    if cfg.dry_run and not cfg.dataset:
        print(f"{cfg.env_id}: {cfg.episodes or 100} episodes of the policy {cfg.policy} would be played into {out}")
        return
    recording = recorded(cfg, out, settings)
    episodes = control.distinct(recording.episodes)
    aside = control.held_out(episodes, cfg.eval_fraction, seed=cfg.seed)
    train = [episode for episode in episodes if episode.name not in aside]
    codec = codec_of(cfg, recording, train, settings)
    shown = shown_steps(train, cfg.examples, seed=cfg.seed)
    summary = described(recording, episodes, aside, cfg)
    if not cfg.dry_run:
        write(out, cfg, episodes, aside, codec, shown, settings.system, summary)
    print("\n".join(f"{name:<24} {value}" for name, value in summary.items() if not isinstance(value, dict)))
    if not cfg.dry_run:
        learn = typed("sft", "--data.path", str(out / TRAIN), "--model.path", "MODEL", "--out", "runs/sft")
        print(f"{out}: rows of text, arrays and summary.json. Learn from them: {learn}")


def recorded(cfg: Config, out: Path, settings: environments.Settings) -> Recording:
    """The episodes of the dataset, or of the policy, which are played into a Minari dataset of their own."""
    if cfg.dataset:
        return control.read_minari(cfg.dataset, env_id=cfg.env_id, episodes=cfg.episodes, download=cfg.download)
    simulator = environments.make_simulator(
        cfg.env_id, horizon=settings.horizon, flatten=settings.flatten, env_kwargs=settings.env_kwargs
    )
    environments.codec_for(simulator, cfg.env_id, replace(settings, style="float", observation_style="", codec=""))
    place = control.collect_minari(
        environments.disturbed(simulator, cfg.disturbed) if cfg.disturbed else simulator,
        policy_of(cfg, simulator, out / f"expert-{plain(cfg.env_id)}-{cfg.expert}-{cfg.expert_steps}-{cfg.seed}.zip"),
        out / MINARI,
        dataset_id=f"{plain(cfg.env_id)}-{cfg.policy}-v0",
        episodes=cfg.episodes or 100,
        seed=cfg.seed,
    )
    simulator.close()
    return control.read_minari(str(place), env_id=cfg.env_id)


def policy_of(cfg: Config, simulator: Any, kept: Path) -> control.Policy:
    """Who plays, from a flat observation to an action of the environment."""
    space = environments.space_of(simulator.action_space, "action", cfg.env_id)
    skilled: Callable[[Any], Any] | None = None
    if cfg.policy != "random" and cfg.expert == "scripted":
        skilled = expert(cfg.env_id)
    elif cfg.policy != "random":
        seed = derive_seed(cfg.seed, "expert")
        skilled = learned_expert(cfg.expert, simulator, kept, steps=cfg.expert_steps, seed=seed)
    share = {"expert": 1.0, "medium": cfg.expert_share, "random": 0.0}[cfg.policy]

    def act(observation: Any, rng: np.random.Generator) -> Any:
        knows = rng.random() < share
        action = skilled(observation) if knows and skilled else environments.draw_action(space, rng)
        return environments.as_gymnasium(simulator.action_space, action)

    return act


def codec_of(cfg: Config, recording: Recording, train: Sequence[Recorded], settings: environments.Settings) -> Codec:
    """How the data are written: by the spaces of the dataset, with ranges measured on what is learned from."""
    if cfg.ranges == "data":
        seen = np.concatenate([episode.observations for episode in train])
        done = np.concatenate([episode.actions for episode in train])
        binned = {
            side: "bins" in (settings.style, getattr(settings, f"{side}_style")) for side in ("observation", "action")
        }
        if not any(binned.values()):
            raise ConfigError("ranges = data: only bins have ranges. Add style=bins to env_settings, or leave it out.")
        if binned["observation"]:
            settings = replace(settings, observation_ranges=measured_ranges(seen, outside=cfg.outside))
        if binned["action"] and done.ndim == 2:
            settings = replace(settings, action_ranges=measured_ranges(done, outside=cfg.outside))
    spaces = SimpleNamespace(observation_space=recording.observation_space, action_space=recording.action_space)
    codec = environments.codec_for(spaces, recording.env_id or cfg.dataset, settings)
    width = recording.episodes[0].observations.shape[1]
    if width != codec.observation.size:
        raise DataError(
            f"{cfg.dataset or cfg.env_id}: its observations have {width} numbers, and its space says "
            f"{codec.observation.size}. The dataset is broken: record it again."
        )
    return codec


def shown_steps(train: Sequence[Recorded], count: int, *, seed: int) -> list[tuple[Any, Any]]:
    """Observations and actions to show as examples, drawn from all steps that are learned from."""
    steps = [(episode, step) for episode in train for step in range(len(episode))]
    if count > len(steps):
        raise ConfigError(f"examples = {count}: there are {len(steps)} steps to choose from. Give fewer.")
    drawn = np.random.default_rng(derive_seed(seed, "examples")).choice(len(steps), count, replace=False)
    return [
        (steps[place][0].observations[steps[place][1]], steps[place][0].actions[steps[place][1]]) for place in drawn
    ]


def described(recording: Recording, episodes: Sequence[Recorded], aside: set[str], cfg: Config) -> dict[str, Any]:
    """What was read or played, in numbers."""
    returns = np.array([episode.rewards.sum() for episode in episodes])
    lengths = np.array([len(episode) for episode in episodes])
    held = sum(len(episode) for episode in episodes if episode.name in aside)
    return {
        "env_id": recording.env_id,
        "source": cfg.dataset or f"policy {cfg.policy}" + ("" if cfg.policy == "random" else f" ({cfg.expert})"),
        "episodes": len(episodes),
        "episodes_held_out": len(aside),
        "duplicates_left_out": len(recording.episodes) - len(episodes),
        "rows_train": int(lengths.sum()) - held,
        "rows_test": held,
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "return_lowest": float(returns.min()),
        "return_highest": float(returns.max()),
        "length_mean": float(lengths.mean()),
        "terminated": float(np.mean([episode.terminated for episode in episodes])),
    }


def write(
    out: Path,
    cfg: Config,
    episodes: Sequence[Recorded],
    aside: set[str],
    codec: Codec,
    shown: Sequence[Any],
    system: str,
    summary: dict[str, Any],
) -> None:
    """Put everything in place of what was written before; the summary last, so that it is there when all else is."""
    out.mkdir(parents=True, exist_ok=True)
    (out / control.SUMMARY).unlink(missing_ok=True)
    write_json(out / control.CODEC, codec.to_json())
    for name, held in ((TRAIN, False), (TEST, True)):
        chosen = [episode for episode in episodes if (episode.name in aside) == held]
        rows = (control.control_rows(e, codec, gamma=cfg.gamma, system=system, examples=shown) for e in chosen)
        if chosen:
            control.write_rows(out / name, chain.from_iterable(rows))
        else:
            (out / name).unlink(missing_ok=True)
    if shown:
        write_json(out / SHOWN, [[np.asarray(part).tolist() for part in pair] for pair in shown])
    else:
        (out / SHOWN).unlink(missing_ok=True)
    unfinished = out / f".new-{control.ARRAYS}"
    np.savez_compressed(unfinished, **control.control_arrays(episodes, aside, gamma=cfg.gamma))  # type: ignore[arg-type]
    unfinished.replace(out / control.ARRAYS)
    write_json(out / control.SUMMARY, summary)


def plain(env_id: str) -> str:
    """An environment's id as part of a file's name."""
    return env_id.replace("/", "-").replace(":", "-")


def write_json(path: Path, value: Any) -> None:
    """Put a JSON file in place of another."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _check_folder(out: Path) -> None:
    """Raise ConfigError for a folder with something else in it: what is written replaces what has the same name."""
    ours = {TRAIN, TEST, SHOWN, MINARI, control.CODEC, control.ARRAYS, control.SUMMARY}
    if out.is_file():
        raise ConfigError(f"out = {out}: it is a file. Give a folder.")
    others = [path.name for path in out.iterdir() if path.name not in ours] if out.is_dir() else []
    if strange := sorted(name for name in others if not name.startswith((".", "expert-"))):
        raise ConfigError(f"out = {out}: it holds '{strange[0]}', which is not of a data set of control. Give another.")
