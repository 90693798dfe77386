"""How a controller's prompts are written: as in its data or the run it learned in, with examples of what experts do.

What was trained on is what is asked: a model of a run is asked as there unless something else is said. Knows folders
and settings; how numbers become words is the codec's.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from echelon.data.control import CODEC, SUMMARY, read_arrays
from echelon.envs import EnvSpec
from echelon.envs.players import make_player
from echelon.errors import DataError
from echelon.rollout.candidates import run_settings
from echelon.rollout.control_report import Flights
from echelon.rollout.evaluate import scripted_loop
from echelon.rollout.roles import collect

LONGEST_EPISODE = 10_000
"""Turns after which an expert's episode is given up."""

WRITING = frozenset(
    ("style", "observation_style", "action_style", "decimals", "bins", "observation_ranges", "action_ranges")
) | {"codec", "instruction"}
"""Settings of an environment that say how its prompts are written."""


def prompt_settings(env: str, given: Mapping[str, Any], *, data: str = "", folder: str = "") -> dict[str, Any]:
    """The settings of an environment, and with them how its prompts are written.

    `data` is a folder of control-data: prompts are those of its rows. Without, and where the settings say nothing of
    it, a model in a `folder` of a run is asked as in training: with what the run said of this environment, or as in the
    rows it learned from, and a line on stderr says so. Raises DataError for data that are not control-data.
    """
    settings = dict(given)
    if folder and not data and not WRITING & settings.keys():
        written, data = _as_trained(Path(folder), env)
        settings = {**written, **settings}
        if written or data:
            print(f"prompts are written as {folder} learned to read them{data and f', in {data}'}", file=sys.stderr)
    return {**_as_in(Path(data)), **settings} if data else settings


def _as_trained(folder: Path, env: str) -> tuple[dict[str, Any], str]:
    """How the run that a model is of wrote its prompts: settings of its environment, or else the folder of its data."""
    places = [folder.parent, *sorted((folder.parent / "checkpoints").glob("step_*"))]
    saved = [place for place in places if (place / "config.yaml").is_file()]
    run = run_settings(saved[-1]) if saved else {}
    if run.get("env") == env:
        given = run.get("env_settings") or {}
        return {name: given[name] for name in given if name in WRITING | {"system", "examples"}}, ""
    sources = [Path(path) for path in (run.get("data") or {}).get("path") or ()]
    folders = {path if path.is_dir() else path.parent for path in sources}
    found = [str(place) for place in folders if (place / CODEC).is_file()]
    return {}, found[0] if len(found) == 1 else ""


def _as_in(data: Path) -> dict[str, Any]:
    """Settings that write prompts as in the rows of control-data: its codec, its examples, its system message."""
    found: dict[str, Any] = {"codec": str(data / CODEC)}
    try:
        if (data / "examples.json").is_file():
            found["examples"] = json.loads((data / "examples.json").read_text(encoding="utf-8"))
        if (data / "train.jsonl").is_file():
            with (data / "train.jsonl").open(encoding="utf-8") as file:
                first = json.loads(file.readline())["messages"][0]
            if first["role"] == "system":
                found["system"] = first["content"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{data}: not a folder of control-data ({error}). Make it with echelon control-data."
        ) from error
    return found


def expert_examples(spec: EnvSpec, count: int, *, data: str = "", seed: int = 0) -> list[list[Any]]:
    """`count` pairs of an observation and what the expert did, drawn with a seed and in the order they happened.

    From the folder of control-data, without what it holds out, or from an episode of the scripted expert in the
    training split. Raises DataError for fewer steps than that.
    """
    if data:
        _check_expert(Path(data), count)
        arrays = read_arrays(Path(data))
        learned = ~arrays["held_out"]
        seen, done = arrays["observations"][learned], arrays["actions"][learned]
    else:
        seen, done = _flown(spec, seed)
    if len(done) < count:
        raise DataError(
            f"n_examples = {count}: the expert took {len(done)} steps in {data or spec.name}. Give fewer, or more data."
        )
    drawn = np.sort(np.random.default_rng([seed, count]).choice(len(done), size=count, replace=False))
    return [[np.asarray(seen[place]).tolist(), np.asarray(done[place]).tolist()] for place in drawn]


def _check_expert(data: Path, count: int) -> None:
    """Raise DataError for recorded actions that are known not to be an expert's."""
    try:
        source = str(json.loads((data / SUMMARY).read_text(encoding="utf-8"))["source"])
    except (OSError, ValueError, LookupError, TypeError):
        return  # nothing is known
    if source.startswith("policy ") and not source.startswith("policy expert"):
        raise DataError(
            f"n_examples = {count}: {data} was played by {source}, and examples show what an expert does. Give the "
            "data of an expert as control_data, or none for the scripted one."
        )


def _flown(spec: EnvSpec, seed: int) -> tuple[list[Any], list[Any]]:
    """Observations and actions of one episode of the scripted expert."""
    task = spec.tasks("train")[seed % len(spec.tasks("train"))]
    flights, player = Flights(spec.make), partial(make_player, spec, "optimal")
    play = scripted_loop(flights.make, player, name="expert", max_turns=LONGEST_EPISODE)
    asyncio.run(collect([task], play, seed=seed, error_budget=0.0))
    rows = [row for row in flights.of([task])[0].rows if row["action"] is not None]
    return [row["observation"] for row in rows], [row["action"] for row in rows]
