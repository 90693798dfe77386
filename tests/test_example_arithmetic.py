"""The script that prepares the feedback level writes what `echelon sft` reads, in the words of the settings file."""

import importlib.util
import json
import random
import re
from pathlib import Path

import pytest
import yaml

from echelon.config import loading
from echelon.envs.arithmetic import PLACES, carried, column_sum, last_number
from echelon.recipes import feedback, sft

ROOT = Path(__file__).parents[1]
SCRIPT, SETTINGS = ROOT / "examples" / "arithmetic.py", ROOT / "configs" / "feedback" / "arithmetic.yaml"
SUMS = yaml.safe_load(SETTINGS.read_text())["env_settings"]
DIGITS, BASE = SUMS["digits"], SUMS["base"]
FEW = ["--hidden", "32", "--layers", "1", "--copying-steps", "2", "--sums", "400", "--remarks", "400"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example_arithmetic", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("arithmetic")
    example.main(["--out", str(out), *FEW])
    return out


def said(path: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert all([message["role"] for message in row] == ["user", "assistant"] for row in rows)
    return [(row[0]["content"], row[1]["content"]) for row in rows]


def numbers(prompt: str) -> tuple[int, int]:
    """Of the sum that a prompt asks for, whatever stands around it."""
    one, other = re.findall(r"\d(?: \d)*(?= [+=])", prompt)
    return int(one.replace(" ", ""), BASE), int(other.replace(" ", ""), BASE)


def value(answer: str) -> int | None:
    return last_number(answer, spaced=True, base=BASE)


def test_the_student_carries_exactly_where_told_nine_times_in_ten(made):
    told = [(prompt, answer) for prompt, answer in said(made / "solver.jsonl") if "carry" in prompt]
    assert len(told) > 120
    as_told = []
    for prompt, answer in told:
        places = [PLACES.index(word) for word in prompt.split() if word in PLACES]
        as_told.append(value(answer) == column_sum(*numbers(prompt), DIGITS, places, BASE))
    assert 0.84 < sum(as_told) / len(as_told) < 0.98  # a disobedient answer is the same by chance at times


def test_untold_the_student_is_rarely_right_and_adds_every_place(made):
    alone = [(p, a) for p, a in said(made / "solver.jsonl") if "carry" not in p]
    hard = [(p, a) for p, a in alone if carried(*numbers(p), DIGITS, BASE)]
    right = [value(a) == sum(numbers(p)) for p, a in hard]
    assert 0 < sum(right) / len(right) < 0.2
    for prompt, answer in alone:
        assert (value(answer) or 0) % BASE == sum(numbers(prompt)) % BASE  # the ones never get a carry


def test_the_coach_names_the_right_places_about_every_other_time_and_sees_an_attempt(made):
    remarks = said(made / "coach.jsonl")
    right = []
    for prompt, remark in remarks:
        belongs = [PLACES[place] for place in carried(*numbers(prompt), DIGITS, BASE)]
        right.append(remark.split() == ["carry", *(belongs or ["nothing"])])
        assert value(prompt.split("?")[0]) is not None
    assert 0.56 < sum(right) / len(right) < 0.75  # 0.9 ** 4


def test_texts_are_in_the_words_of_the_settings_file(example, made):
    templates = yaml.safe_load(SETTINGS.read_text())["templates"]
    heads = {name: template.split("{")[0] for name, template in templates.items()}
    assert any(prompt.endswith("=") and "\n" not in prompt for prompt, _ in said(made / "solver.jsonl"))
    assert any(" again " in prompt for prompt, _ in said(made / "solver.jsonl"))
    assert "again" in templates["retry"]
    assert heads["solve"] == "", "GRPO of the solver alone is shown the bare question, as a first attempt is"
    cfg = loading.load(feedback.Config, [SETTINGS])
    draw, args = random.Random(0), example.arguments().parse_args(["--obeys", "1", "--guess", "0"])
    rows = [next(example.student_says(cfg, draw, args)) for _ in range(50)]
    prompts = {row["messages"][0]["content"] for row in rows}
    assert any(" carry nothing " in prompt for prompt in prompts)


def test_the_settings_beside_the_texts_are_those_of_sft(made):
    for level in ("solver", "coach"):
        cfg = loading.load(sft.Config, [made / f"{level}.yaml"])
        assert cfg.out == str(made / level)
        assert cfg.data.path == (str(made / f"{level}.jsonl"),)


def test_the_settings_file_begins_with_what_the_commands_leave(example):
    cfg = loading.load(feedback.Config, [SETTINGS])
    out = example.arguments().parse_args([]).out
    assert (cfg.solver.model.path, cfg.coach.model.path) == (f"{out}/solver", f"{out}/coach")
    assert (cfg.env, cfg.env_settings["spaced"]) == ("arithmetic", True)
