"""What is read of a run directory, and what becomes a note."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from echelon.errors import DataError
from echelon.view.runs import find_runs, read_run, recipe_of, seedless, short_names
from tests.view.conftest import Write, episode, turn


def test_curves_are_columns_and_a_step_taken_twice_counts_as_it_was_taken_last(write: Write) -> None:
    rows = [{"step": 0, "loss": 3}, {"step": 1, "loss": 2, "lr": 0.5}, {"step": 1, "loss": 1}]
    metrics = read_run(write(metrics=rows)).metrics
    assert metrics.steps == [0, 1]
    assert metrics.columns == {"loss": [3.0, 1.0]}
    assert metrics.absent == {}


def test_a_metric_that_few_steps_have_says_which_do_not(write: Write) -> None:
    rows = [{"step": 0, "a": 1}, {"step": 1, "a": 1, "b": 2}, '{"step": 2, "a": NaN, "b": NaN}', {"step": 4, "a": 1}]
    run = read_run(write(metrics=rows))
    assert run.metrics["b"] == [None, 2.0, None, None]
    assert run.metrics.absent == {"b": {0, 3}}
    assert (run.metrics.recorded("a"), run.metrics.recorded("b")) == ([1.0, 1.0, None, 1.0], [2.0, None])
    assert run.metrics.recorded("c") == []
    assert "Not finite, so left out of its curve: a in 1 of 4 steps, b in 1 of 4 steps." in run.notes


def test_numbers_that_are_not_finite_are_gaps_and_are_told(write: Write) -> None:
    rows = [
        '{"step": 0, "loss": NaN}',
        '{"step": 1, "loss": Infinity}',
        '{"step": 2, "loss": null}',
        {"step": 3, "loss": 1},
    ]
    run = read_run(write(metrics=rows))
    assert run.metrics["loss"] == [None, None, None, 1.0]
    assert "Not finite, so left out of its curve: loss in 3 of 4 steps." in run.notes


def test_a_half_written_last_line_is_left_out_and_told(write: Write) -> None:
    folder = write()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "seco')
    run = read_run(folder)
    assert run.metrics.steps[-1] == 19
    assert "The last line of metrics.jsonl is only half written, and left out." in run.notes


def test_lines_that_are_no_rows_are_counted_and_the_rest_is_read(write: Write) -> None:
    run = read_run(write(metrics=[{"step": 0, "loss": 1}, "[1, 2]", "not JSON", "[" * 5000, {"step": 1, "loss": 2}]))
    assert run.metrics["loss"] == [1.0, 2.0]
    assert "metrics.jsonl: 3 lines cannot be read, and are left out." in run.notes


def test_what_is_no_utf_8_is_replaced_and_told(write: Write) -> None:
    folder = write()
    (folder / "metrics.jsonl").write_bytes(b'{"step": 0, "loss": 1, "what": "\xff\xfe"}\n')
    run = read_run(folder)
    assert run.metrics["loss"] == [1.0]
    assert any("not valid UTF-8" in note for note in run.notes)


def test_a_run_that_is_still_being_written_says_how_far_it_is(write: Write) -> None:
    run = read_run(write(settings={"steps": 50}))
    assert run.notes == ["20 of 50 steps are recorded: it was interrupted, or is being trained on another machine."]
    assert read_run(write("done", settings={"steps": 20})).notes == []


def test_a_run_that_has_only_begun_is_a_run(write: Write) -> None:
    run = read_run(write(metrics=[]))
    assert run.metrics.steps == []
    assert any("No step is recorded yet" in note for note in run.notes)


def test_settings_are_those_of_the_newest_checkpoint_under_dotted_names(write: Write) -> None:
    folder = write(settings={"optim": {"lr": 0.1}})
    (folder / "checkpoints" / "step_1000000").mkdir()
    (folder / "checkpoints" / "step_1000000" / "config.yaml").write_text(
        "optim: {lr: 0.2, betas: [1, 2]}\nenv_settings: {}\n"
    )
    assert read_run(folder).settings == {"optim.lr": 0.2, "optim.betas": [1, 2], "env_settings": {}}


def test_a_settings_file_that_cannot_be_read_is_told_and_the_one_before_it_counts(write: Write) -> None:
    folder = write(settings={"seed": 7})
    (folder / "checkpoints" / "step_000030").mkdir()
    (folder / "checkpoints" / "step_000030" / "config.yaml").write_text("{")
    run = read_run(folder)
    assert run.settings == {"seed": 7}
    assert run.notes[0] == "checkpoints/step_000030/config.yaml cannot be read."


def test_evaluations_of_a_run_and_those_that_stand_alone(write: Write) -> None:
    folder = write()
    inner = folder / "evaluation" / "step_000020_test"
    inner.mkdir(parents=True)
    summary = {
        "episodes": 4,
        "estimates": {"return": {"mean": 1.0, "low": 0.5, "high": 1.5, "n": 4}},
        "config": {"a": {"b": 1}},
    }
    (inner / "summary.json").write_text(json.dumps(summary))
    assert read_run(folder).evaluations == {"step_000020_test": summary}
    alone = read_run(inner)
    assert (alone.evaluations, alone.recipe, alone.settings) == ({"": summary}, "evaluate", {"a.b": 1})


def test_a_folder_stands_for_the_runs_below_it_each_once(write: Write, tmp_path: Path) -> None:
    first, second = write("many/a/seed_0"), write("many/b")
    assert find_runs([str(tmp_path / "many")]) == ([first, second], [])
    assert find_runs([str(first), str(tmp_path / "many")]) == ([first, second], [])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere: does not exist, and a run is a folder. Give what was --out of a recipe."),
        ("file", "file: is a file, and a run is a folder. Give what was --out of a recipe."),
        (
            "empty",
            "empty: no run is there or below: no metrics.jsonl, episodes.jsonl, checkpoints or summary.json with ",
        ),
    ],
)
def test_a_place_without_runs_is_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(DataError) as caught:
        find_runs([name])
    assert str(caught.value).startswith(message)


def test_episodes_of_a_step_are_what_the_settings_say(write: Write) -> None:
    assert read_run(write("a", settings={"episodes_per_step": 64})).per_step == 64
    assert read_run(write("b", settings={"tasks_per_step": 8, "group_size": 4})).per_step == 32
    assert read_run(write("c", settings={"tasks_per_step": 8})).per_step == 8
    assert read_run(write("d", settings={"rows_per_step": 8})).per_step is None
    assert read_run(write("e", settings={"episodes_per_step": 64, "offline": []})).per_step == 64
    assert read_run(write("f", settings={"episodes_per_step": 64, "offline": ["a.jsonl"]})).per_step is None


def test_names_are_what_tells_runs_apart() -> None:
    paths = [Path("/w/runs/archer/seed_0/train"), Path("/w/runs/grpo/seed_0/train")]
    assert short_names(paths) == ["archer/seed_0", "grpo/seed_0"] or short_names(paths) == ["archer", "grpo"]
    assert short_names([Path("/w/runs/a")]) == ["a"]
    names = ("archer/seed_3", "grpo-1", "seed_0/long", "seed_0", "a")
    assert [seedless(name) for name in names] == ["archer", "grpo", "long", "seeds", "a"]


def test_unknown_settings_are_of_no_known_recipe(write: Write) -> None:
    assert recipe_of({"nobody_has": 1}) == ""
    run = read_run(write(settings={"nobody_has": 1}, episodes=[episode(0, "a", [turn("b")])]))
    assert run.settings == {"nobody_has": 1}
