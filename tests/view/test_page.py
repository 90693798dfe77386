"""The page as a file: whole, by itself, no larger than asked for."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest

from echelon.view.compare import groups, headings, settings
from echelon.view.episodes import scan
from echelon.view.page import build, folder_of, phases, thin
from echelon.view.runs import Metrics, Run, read_run
from echelon.view.tables import listed
from tests.view.conftest import Write, episode, turn

NASTY = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)> \u202eright to left \x00\x1b[31m"


class Parts(html.parser.HTMLParser):
    """What is in a page: scripts with their attributes, and everything that names another place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.links: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append((dict(attrs), ""))
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, text: str) -> None:
        if self.inside:
            attributes, before = self.scripts.pop()
            self.scripts.append((attributes, before + text))


def page(*folders: Path, room: int = 5_000_000) -> str:
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        run.name = run.path.name
    return build(runs, [scan(run) for run in runs], room=room)


def told(text: str) -> dict[str, Any]:
    return next(json.loads(body) for attributes, body in Parts(text).scripts if attributes.get("id") == "data")


def test_a_page_needs_nothing_else_and_runs_only_its_own_scripts(write: Write) -> None:
    text = page(write(episodes=[episode(0, NASTY, [turn(NASTY, role=NASTY)], error=NASTY)]))
    parts = Parts(text)
    assert all(link.startswith(("#", "data:")) for link in parts.links)
    scripts = [body for attributes, body in parts.scripts if not attributes]
    assert len(scripts) == len(parts.scripts) - 1
    allowed = re.search(r"script-src ([^;]*);", text)
    assert allowed
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in scripts}
    assert set(allowed[1].split()) == hashes


def test_what_was_said_comes_back_as_it_was(write: Write) -> None:
    said = told(page(write(episodes=[episode(0, "a", [turn(NASTY)])])))["episodes"][0]["t"][0]
    assert said["x"] == NASTY


def test_the_licence_of_the_library_is_in_the_page(write: Write) -> None:
    assert "Copyright (c) 2022 Leon Sorokin" in page(write())


def test_a_page_is_no_larger_than_asked_for_and_says_how_much_it_shows(write: Write) -> None:
    folder = write(episodes=[episode(step % 20, f"t/{step % 7}", [turn("mot é " * 50)] * 10) for step in range(1000)])
    text = page(folder, room=1_000_000)
    assert len(text.encode()) <= 1_000_000
    about = told(text)["runs"][0]
    assert about["episodes"] == 1000
    assert 50 < about["shown"] == len(told(text)["episodes"]) < 1000


def test_small_runs_leave_their_room_to_large_ones(write: Write) -> None:
    many = [episode(0, "a", [turn("word " * 50)] * 10)] * 500
    text = page(write("large", episodes=many), write("small", episodes=many[:2]), room=1_000_000)
    shown = [run["shown"] for run in told(text)["runs"]]
    assert shown[1] == 2
    assert shown[0] > 100


def test_long_curves_become_means_of_as_many_steps_as_it_takes() -> None:
    metrics = Metrics(list(range(10)), {"loss": [float(at) for at in range(10)], "never": [None] * 10})
    columns = {"loss": [0.5, 2.5, 4.5, 6.5, 8.5]}
    assert thin(metrics, 5) == {"every": 2, "steps": [1, 3, 5, 7, 9], "columns": columns, "sparse": {}}
    assert thin(Metrics(), 5) == {"every": 1, "steps": [], "columns": {}, "sparse": {}}


def test_a_point_is_one_of_a_curve_where_a_row_has_its_metric(write: Write) -> None:
    rows = [{"step": at, "loss": 1.0} | ({"eval/loss": at or None} if at % 4 == 0 else {}) for at in range(10)]
    metrics = read_run(write(metrics=rows)).metrics
    whole, halved, fifth = (thin(metrics, points) for points in (10, 5, 2))
    assert whole["columns"]["eval/loss"] == [None] * 4 + [4] + [None] * 3 + [8, None]
    assert whole["sparse"] == {"eval/loss": [0, 4, 8]}, "what is not finite is a gap of the curve"
    assert (halved["columns"]["eval/loss"], halved["sparse"]) == ([None, None, 4, None, 8], {"eval/loss": [0, 2, 4]})
    assert (fifth["columns"]["eval/loss"], fifth["sparse"]) == ([4, 8], {})


def test_first_and_last_in_the_page_are_those_of_the_list_of_runs(write: Write) -> None:
    folder = write(metrics=[{"step": at, "reward/mean": float(at * at)} for at in range(7)])
    run, about = read_run(folder), told(page(folder))["runs"][0]
    assert (about["outcome"], about["first"], about["last"]) == ("reward/mean", 1.6667, 25.667)
    row = listed(run)
    assert (about["first"], about["last"]) == (pytest.approx(row["first"], 1e-4), pytest.approx(row["last"], 1e-4))


def run_of(name: str, **chosen: Any) -> Run:
    return Run(Path(name), name=name, recipe="grpo", settings=chosen)


def test_runs_that_differ_in_their_seed_alone_are_a_group() -> None:
    runs = [
        run_of("a/seed_0", seed=0, out="x", lr=1),
        run_of("a/seed_1", seed=1, out="y", lr=1),
        run_of("b", seed=0, out="z", lr=2),
    ]
    assert groups(runs) == [{"name": "a", "runs": [0, 1]}, {"name": "b", "runs": [2]}]


def test_seeds_that_lie_beside_one_another_are_called_seeds() -> None:
    runs = [run_of(f"seed_{seed}", seed=seed, lr=1) for seed in range(3)]
    assert groups(runs) == [{"name": "seeds", "runs": [0, 1, 2]}]
    assert groups(runs[:1]) == [{"name": "seed_0", "runs": [0]}]


def test_a_setting_that_one_version_does_not_have_keeps_no_runs_apart() -> None:
    runs = [run_of("a/seed_0", seed=0, lr=1), run_of("a/seed_1", seed=1, lr=1, new=False)]
    assert groups(runs) == [{"name": "a", "runs": [0, 1]}]
    for run in runs:  # of recipes that nobody knows nothing is known to be a version of the other
        run.recipe = ""
    assert len(groups(runs)) == 2


def test_settings_are_shared_or_differ() -> None:
    found = settings([run_of("a", lr=1, env="maze", only=3), run_of("b", lr=2, env="maze")])
    assert found["common"] == {"env": "maze"}
    assert found["differing"] == [
        {"name": "lr", "values": ["1", "2"], "partial": False},
        {"name": "only", "values": ["3", None], "partial": True},
    ]


def test_several_runs_are_called_by_the_folder_they_lie_in() -> None:
    assert folder_of([Path("/x/quickstart/archer"), Path("/x/quickstart/grpo")]) == "quickstart"
    assert folder_of([Path("/x/sweep/a/seed_0"), Path("/x/sweep/b/seed_0")]) == "sweep"
    assert folder_of([Path("/a/run"), Path("/b/run")]) == ""


def test_curves_stand_under_what_they_are_about() -> None:
    found = headings(["turn/tokens", "policy/lr", "policy/entropy", "critic/loss", "reward/mean", "low/term/kl"])
    assert [(heading, names) for heading, _, names in found] == [
        ("Outcome", ["reward/mean"]),
        ("Reward by term", ["low/term/kl"]),
        ("Upper level: critic of utterances", ["critic/loss"]),
        ("Lower level: policy", ["policy/entropy", "policy/lr"]),
        ("Episodes and groups", ["turn/tokens"]),
    ]


def test_time_and_tokens_are_summed_by_what_was_learning() -> None:
    columns: dict[str, list[float | None]] = {
        "seconds": [1.0, 3.0, 6.0],
        "critic/loss": [1.0, 1.0, 1.0],
        "policy/loss": [None, None, 1.0],
        "episode/turns": [2.0, 2.0, 3.0],
        "turn/tokens": [5.0, 5.0, 4.0],
    }
    run = Run(Path("a"), settings={"episodes_per_step": 10}, metrics=Metrics([0, 1, 2], columns))
    assert phases(run) == [
        {"who": "critic", "steps": 2, "seconds": 3, "episodes": 20, "turns": 40, "tokens": 200},
        {"who": "critic, policy", "steps": 1, "seconds": 3, "episodes": 10, "turns": 30, "tokens": 120},
    ]


@pytest.mark.parametrize("rows", [[], ['{"step": 0, "loss": NaN}'], [{"step": 0}], [{"step": 0, "a/b/loss": 1}]])
def test_runs_with_hardly_anything_in_them_have_a_page(write: Write, rows: list[object]) -> None:
    assert told(page(write(metrics=rows)))["runs"][0]["name"] == "run"
