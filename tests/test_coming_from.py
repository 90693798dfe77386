"""The page for those who come from other tools: every flag on it parses, and no flag of theirs is left out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from echelon import cli
from echelon.config.loading import load
from echelon.errors import ConfigError
from tests.test_docs import CODE, FENCE, LINK, columns, config_of, prose

PAGE = Path(__file__).parents[1] / "docs" / "coming-from.md"
ROWS = "--out r --model.path m --data.path d"
NEEDED = {
    "sft": ROWS,
    "reward": ROWS,
    "dpo": ROWS,
    "ppo": f"{ROWS} --reward r.py:f",
    "grpo": f"{ROWS} --reward r.py:f",
    "merge": "--out r --adapter a",
    "feedback": "--out r --solver.model.path m --data.path d --reward math",
    "control-data": "--out r --env-id CartPole-v1",
    "evaluate": "--out r --model.path m --env-id CartPole-v1",
}
"""Flags without which a recipe does not start."""
IN_ENV = {"control-data": "--out r"}
"""The same where a mapping names the environment; elsewhere a model is needed, too."""

SCRIPTS = {
    "training_sft.py": """model_path dataset_name subset data_dir split size_valid_set streaming shuffle_buffer
        max_train_samples seq_length max_steps batch_size gradient_accumulation_steps eos_token_id learning_rate
        lr_scheduler_type num_warmup_steps weight_decay fp16 bf16 no_gradient_checkpointing seed num_workers output_dir
        log_freq eval_freq save_freq deepspeed num_train_epochs use_lora""",
    "training_reward_model.py": """train_split eval_split train_subset eval_subset per_device_train_batch_size
        learning_rate weight_decay num_train_epochs max_steps max_length lr_scheduler_type eval_steps save_steps
        logging_steps eval_first_step use_lora bf16 gradient_checkpointing""",
    "training_rl.py": """model_path tokenizer_name reward_model_path value_model_path dataset_name subset split
        max_train_samples max_prompt_length output_dir per_device_train_batch_size gradient_accumulation_steps
        learning_rate total_episodes num_ppo_epochs num_mini_batches response_length temperature stop_token bf16 fp16
        gradient_checkpointing seed use_lora num_proc logging_steps save_steps eval_steps num_sample_generations""",
    "merge_with_lora.py": "lora_model_name base_model_name output_name",
    "data/d4rl.py": "dataset_id env_name seed n_episodes",
    "eval_llm_policy.py": """env_id seed episodes capture_video model temperature prediction_horizon logit_bias api_url
        api_key freq_log_action n_examples system_prompt use_vllm tol_repeat_gen device discretized mode
        mlp_policy_path""",
    "deepspeed_zero3.yaml": """zero_stage mixed_precision offload_optimizer_device offload_param_device zero3_init_flag
        zero3_save_16bit_model gradient_accumulation_steps gradient_clipping num_processes num_machines machine_rank
        deepspeed_multinode_launcher rdzv_backend distributed_type compute_environment""",
    "Settings of mlmt_rl": """enable shared_actor env_type lambda_coef stop_value_gradients use_symmetric_rewards
        use_llm_success_eval llm_success_weight low_level.model_path low_level.algorithm low_level.freeze
        low_level.update_frequency high_level.model_path high_level.algorithm high_level.freeze
        high_level.update_frequency high_level.max_tokens value_fn.model value_fn.lr value_fn.weight_decay
        value_fn.max_len judge stage_control.stage_id stage_control.beta1 stage_control.beta2 stage_control.beta_L
        stage_control.beta_H stage_control.alpha stage_control.schedule score_mode.stages score_mode.alpha
        score_mode.beta_turn1_stage1 score_mode.beta_turn1_stage2 score_mode.beta_turn2
        score_mode.reward_turn1_stage2 hierarchical.context_source hierarchical.num_context_samples
        hierarchical.max_prompt_tokens hierarchical.header hierarchical.prefix hierarchical.prompt_template
        hierarchical.ll_trainable hierarchical.hl_model.temperature hierarchical.hl_model.top_p
        hierarchical.kl_max.enabled hierarchical.kl_max.lambda_coef hierarchical.kl_max.clip_tau
        hierarchical.kl_max.reference_prior""",
}
"""Every flag of the scripts."""

DEFECTS = 12
"""What was wrong with them."""


def sections() -> dict[str, str]:
    """Heading → what stands under it."""
    parts = re.split(r"^#+ (.+)$", prose(PAGE), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def mappings() -> Iterator[tuple[str, str]]:
    """(recipe, flags) for every mapping in the tables; a table is for the recipes that its section is headed by."""
    for heading, text in sections().items():
        recipes = re.findall(r"`echelon ([\w-]+)`", heading)
        for row, _ in columns(text, "here") if recipes else ():
            yield from ((recipe, code) for recipe in recipes for code in CODE.findall(row["here"]) if code[:2] == "--")


MAPPINGS = sorted(set(mappings()))


@pytest.fixture(autouse=True)
def _trackers_are_as_good_as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echelon.config.need", lambda module, extra: None)


@pytest.mark.parametrize(("recipe", "flags"), MAPPINGS, ids=[" ".join(mapping) for mapping in MAPPINGS])
def test_every_mapping_parses(recipe: str, flags: str) -> None:
    needed = IN_ENV.get(recipe, "--out r --model.path m") if "--env" in flags else NEEDED[recipe]
    load(config_of(recipe), [], [*needed.split(), *shlex.split(flags)])


def test_the_commands_of_the_pipeline_parse() -> None:
    blocks = FENCE.findall(PAGE.read_text(encoding="utf-8").replace("\\\n", " "))
    lines = [line.split() for block in blocks for line in block.splitlines() if line.startswith("echelon")]
    assert [line[1] for line in lines] == ["sft", "reward", "ppo", "merge"]
    for _, recipe, *flags in lines:
        load(config_of(recipe), [], flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_of_a_script_has_a_row(script: str) -> None:
    (text,) = (text for heading, text in sections().items() if heading.startswith(script))
    listed = {code for row, _ in columns(text, "flag") for code in CODE.findall(row["flag"])}
    assert set(SCRIPTS[script].split()) - listed == set()


def test_every_row_has_an_answer() -> None:
    rows = list(columns(prose(PAGE), "here"))
    assert len(rows) > 150
    for row, line in rows:
        says = row["here"].startswith(("gone", "always", "not here", "as there", "rewards", "value model", "`", "["))
        assert says or "there" in row, line


def test_every_recipe_that_a_heading_names_exists_and_so_does_every_defect() -> None:
    assert {recipe for recipe, _ in MAPPINGS} == NEEDED.keys()
    assert NEEDED.keys() <= cli.recipes().keys()
    for heading in ("Defects that are fixed", "Defects of RLFT4RL that are fixed"):
        assert len(list(columns(sections()[heading], "here"))) == DEFECTS


TOSCA = {"train_straQ": "strategist", "train_ppo": "responder", "train_hrl": "tosca", "interactive_chat": "chat"}
"""Scripts whose flags stand where their recipe is described, and the recipe."""


def test_scripts_of_tosca_are_sent_to_the_table_of_their_flags() -> None:
    rows = {row["script"].strip("`"): row for row, _ in columns(sections()["ToSCA"], "script")}
    assert rows.keys() == TOSCA.keys()
    for script, recipe in TOSCA.items():
        assert f"`echelon {recipe}`" in rows[script]["here"]
        ((_, target),) = LINK.findall(rows[script]["flags"])
        page, _, anchor = target.partition("#")
        text = prose(PAGE.parent / page)
        (heading,) = (line for line in re.findall(r"^#+ .+$", text, re.MULTILINE) if anchor_of(line) == anchor)
        assert script in heading
        table = re.split(r"^#+ ", text.partition(heading)[2], flags=re.MULTILINE)[0]
        assert len([row for row, _ in columns(table, "flag") if row["here"]]) >= 10


def anchor_of(heading: str) -> str:
    """What a link says to come to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()).replace(" ", "-")


def test_a_mapping_to_what_does_not_exist_would_be_found() -> None:
    with pytest.raises(ConfigError, match="unknown flag '--seq-length'"):
        test_every_mapping_parses("sft", "--seq-length 1024")
