"""The script that prepares the strategy level writes what the recipes read."""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import pytest

from echelon.data.transitions import TransitionConfig, read_transition
from echelon.envs.dialogue import Dialogue
from echelon.models.lm import load_lm, load_tokenizer

SCRIPT = Path(__file__).parents[1] / "examples" / "dialogue.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("example_dialogue", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path_factory.mktemp("dialogue")
    module.main(["--out", str(out), "--dialogues", "24", "--hidden", "32", "--layers", "1", "--copying-steps", "2"])
    return out


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_decisions_are_transitions_in_the_canonical_columns(made):
    inventory = Dialogue.inventory()
    read = [read_transition(row, inventory, TransitionConfig(), "here") for row in rows(made / "transitions.jsonl")]
    assert sum(each.terminated for each in read) == 24
    assert len({each.dialogue for each in read}) == 24
    for here, ahead in pairwise(read):
        assert here.terminated or here.after == ahead.state
    assert all(each.reply and each.reward is not None and 0 <= each.reward <= 5 for each in read)


def test_replies_are_told_their_strategy_and_one_in_four_also_comes_without(made):
    prompts = [row["messages"][0]["content"] for row in rows(made / "replies.jsonl")]
    told = [prompt for prompt in prompts if "\nStrategy: (" in prompt]
    decisions = len(rows(made / "transitions.jsonl"))
    assert (len(told), len(prompts)) == (decisions, decisions + decisions // 4)


def test_the_model_is_small_and_its_vocabulary_covers_the_prompts(made):
    tokenizer, module = load_tokenizer(str(made / "tiny")), load_lm(str(made / "tiny"))
    assert sum(parameter.numel() for parameter in module.parameters()) < 50_000
    prompt = rows(made / "replies.jsonl")[0]["messages"][0]["content"]
    assert len(tokenizer(prompt)["input_ids"]) < 2 * len(prompt.split())
