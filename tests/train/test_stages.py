"""Which settings hold when."""

from __future__ import annotations

from pathlib import Path

import pytest

from echelon.errors import ConfigError
from echelon.train.stages import Stages, parse_stages, settings_so_far

TABLE = ("from 0: credit.first=0 a=1", "from 3: credit.first=1", "plateau 2: a=2")


def test_later_stages_add_to_what_earlier_ones_said() -> None:
    stages = Stages(TABLE)
    assert [stages.reached(step) for step in range(5)] == [0, 0, 0, 1, 1]
    assert settings_so_far(stages.table) == [
        ["credit.first=0", "a=1"],
        ["credit.first=0", "a=1", "credit.first=1"],
        ["credit.first=0", "a=1", "credit.first=1", "a=2"],
    ]


def test_a_plateau_is_so_many_steps_without_a_better_one_since_the_stage_began() -> None:
    stages, seen = Stages(TABLE), []
    for step, number in enumerate([0.1, 0.9, 0.9, 0.2, 0.3, 0.3, 0.3, 0.1]):
        seen.append(stages.reached(step) == 2)
        stages.saw(number)
    assert seen == [False] * 7 + [True], "0.9 came before step 3 and does not count; 0.3 at step 4 is the best after"


def test_the_stage_of_a_step_to_come_is_known_where_no_plateau_is_waited_for() -> None:
    """Asking changes nothing, and once the step is there the answer is that of `reached`."""
    stages = Stages(("from 0: a=1", "from 3: a=2", "from 5: a=3", "plateau 1: a=4"))
    assert [stages.at(step) for step in (0, 2, 3, 4, 5, 9)] == [0, 0, 1, 1, 2, 2]
    assert stages.current == 0
    for step in range(8):
        stages.saw(0.0)
        assert stages.reached(step) == stages.at(step)
    assert stages.current == 3, "the plateau has been reached"
    assert stages.at(99) == 3


def test_a_resumed_run_stands_where_it_stood(tmp_path: Path) -> None:
    stages = Stages(TABLE)
    for step in range(6):
        stages.reached(step)
        stages.saw(0.5)
    stages.save(tmp_path)
    again = Stages(TABLE)
    again.load(tmp_path)
    assert again.reached(6) == stages.reached(6)
    assert again.current == stages.current
    fresh = Stages(TABLE)
    fresh.save(tmp_path / "new")
    again.load(tmp_path / "new")
    assert again.current == 0


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (("from 5: a=1",), "nothing says what holds before. Begin with 'from 0:'"),
        (("plateau 5: a=1",), "nothing says what holds before"),
        (("from 0: a=1", "from 9: a=2", "from 9: a=3"), "comes after one that begins at 9"),
        (("from 0: a=1", "plateau 3: a=2", "from 9: a=3"), "comes after a plateau"),
        (("0: a=1",), "cannot be read"),
        (("from 0:",), "changes nothing"),
        (("from 0: a=1", "plateau 0: a=2"), "is over at once"),
        (("from 0: a 1",), "cannot be read"),
    ],
)
def test_a_table_with_gaps_is_refused(table: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint.replace("(", r"\(")):
        parse_stages(table)
