"""What people get wrong in the classic stages: one line says what, why and what to do, and nothing is half-written."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from echelon.config import LoraConfig, ModelConfig
from echelon.envs import load_env
from echelon.models import lora
from echelon.models.lm import load_lm, tiny
from echelon.models.reward import open_reward_module
from echelon.train.checkpoint import find_checkpoint
from tests.cli.conftest import Place, edit, says, without
from tests.recipes.conftest import GAME, made

REWARDS = """\
def short(prompts, completions):
    return [-float(len(text)) for text in completions]


def raises(prompts, completions):
    raise ZeroDivisionError("a defect")


def few(prompts, completions):
    return [1.0]


def text(prompts, completions):
    return "good"


def words(prompts, completions):
    return ["good" for _ in completions]


def nothing(prompts, completions):
    return None


def nan(prompts, completions):
    return [float("nan") for _ in completions]


def judged(prompts, completions, answer):
    return [1.0 for _ in answer]
"""

HELLO = [{"role": "user", "content": "Guess."}]


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the command lines below name."""
    folder = tmp_path_factory.mktemp("materials")
    prepare(folder)
    return folder


def prepare(folder: Path) -> None:
    good = made(load_env("guess_number", GAME), folder / "good", layers=1)
    other, tokenizer = tiny(["quite other words than those of a game"], vocab_size=300, hidden=16, layers=1, heads=1)
    other.save_pretrained(folder / "other")  # type: ignore[operator]
    tokenizer.save_pretrained(folder / "other")
    shutil.copytree(good, folder / "mute")
    (folder / "mute/chat_template.jinja").unlink()
    shutil.copytree(good, folder / "no_eos")
    edit("tokenizer_config.json", eos_token=None)(folder / "no_eos")
    shutil.copytree(folder / "mute", folder / "endless")
    edit("tokenizer_config.json", eos_token=None)(folder / "endless")
    shutil.copytree(good, folder / "small")
    other.save_pretrained(folder / "small")  # type: ignore[operator]
    reward_models(folder, good)
    adapters(folder, good)
    data(folder)
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "broken.py").write_text("def reward(:\n")


def reward_models(folder: Path, good: Path) -> None:
    """A reward model, one that knows fewer tokens than its tokenizer, and one whose weights are not numbers."""
    for name, model in (("judge", good), ("small_judge", folder / "other"), ("nan_judge", good)):
        module, tokenizer, _ = open_reward_module(ModelConfig(path=str(model), device="cpu"))
        if name == "nan_judge":
            module.score.weight.data.fill_(float("nan"))  # type: ignore[union-attr, operator]
        module.save_pretrained(folder / name)  # type: ignore[operator]
        tokenizer.save_pretrained(folder / name)
    for file in good.glob("tokenizer*"):
        shutil.copy(file, folder / "small_judge")


def adapters(folder: Path, good: Path) -> None:
    """An adapter, and the ways in which one may be incomplete."""
    module = lora.attach(load_lm(str(good), device="cpu"), LoraConfig(rank=2))
    (folder / "adapter").mkdir()
    lora.save(module, folder / "adapter")
    changes: dict[str, Callable[[Path], object]] = {
        "lost": edit("adapter_config.json", base_model_name_or_path="./gone"),
        "unnamed": edit("adapter_config.json", base_model_name_or_path=""),
        "empty_adapter": without("adapter_model.safetensors"),
        "ia3": edit("adapter_config.json", peft_type="IA3"),
        "misfit": edit("adapter_config.json", base_model_name_or_path=str(folder / "other")),
        "scores": edit("adapter_config.json", task_type="SEQ_CLS"),
    }
    for name, change in changes.items():
        shutil.copytree(folder / "adapter", folder / name)
        change(folder / name)


def data(folder: Path) -> None:
    def write(name: str, *rows: object) -> None:
        (folder / name).write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))

    answered = [*HELLO, {"role": "assistant", "content": "2"}]
    pair = {"prompt": "Guess.", "chosen": "2", "rejected": "3"}
    write("talk.jsonl", *({"messages": answered} for _ in range(4)))
    write("pairs.jsonl", *({**pair, "prompt": f"Guess {number}."} for number in range(4)))
    write("ask.jsonl", *({"prompt": f"Guess {number}.", "level": 1} for number in range(4)))
    write("nothing.jsonl", "\n")
    write("torn.jsonl", {"messages": answered}, '{"messages": [\n')
    write("array.json", "[1, 2]")
    write("keys.jsonl", {"text": "Hello", "label": 1})
    write("typo.jsonl", {"promt": "Guess.", "response": "2"})
    write("silent.jsonl", {"messages": HELLO})
    write("turns.jsonl", {"messages": [*answered, answered[1]]})
    write("roles.jsonl", {"messages": [{"role": "robot", "content": "Guess."}, answered[1]]})
    write("blank.jsonl", {"prompt": "Guess.", "response": " "})
    write("null.jsonl", {"prompt": "Guess.", "response": None})
    write("holes.jsonl", {"prompt": "Guess.", "response": "2"}, {"prompt": "Guess."})
    write("same.jsonl", pair, {**pair, "rejected": "2"})
    write("margin.jsonl", {**pair, "margin": "wide"})
    write("one.jsonl", {"messages": answered})
    write("long.jsonl", {"messages": [HELLO[0], {"role": "assistant", "content": "1 2 3 4 " * 99}]})
    write("long_pair.jsonl", {**pair, "chosen": "1 2 3 4 " * 99})
    write("long_ask.jsonl", {"prompt": "1 2 3 4 " * 99})
    write("words.txt", "Guess.\n")
    (folder / "empty").mkdir()
    (folder / "bytes.jsonl").write_bytes(b'{"prompt": "\xff"}\n')


SFT = "sft --model.path good --out r --data.path talk.jsonl"
PAIRS = "reward --model.path good --out r --data.path pairs.jsonl"
DPO = "dpo --model.path good --out r --data.path pairs.jsonl"
PPO = "ppo --model.path good --out r --data.path ask.jsonl"
GRPO = "grpo --model.path good --out r --data.path ask.jsonl"
MERGE = "merge --adapter adapter --out r"
SHORT = "--reward rewards.py:short"
FILES = "Give a file (jsonl, json, csv, parquet, arrow), a folder of them, or a hub id."
AS_SFT = (
    "do not make rows of the schema sft, which needs messages, or prompt or question with response, response_j, "
    "completion or chosen, or question with answer."
)
AS_PAIRS = (
    "do not make rows of the schema preference, which needs prompt or question with chosen and rejected, or with "
    "response_j and response_k."
)
NOT_THERE = "there is no model folder 'nowhere'. Give a folder, a run directory or a hub id (name/model)."
HELD_OUT = "no rows are held out to judge by. Give data.eval_path, data.eval_split or data.eval_fraction."
LONELY = (
    "'lost' is an adapter of the model './gone', which is not there. Put it back, or write where it is into "
    "base_model_name_or_path of adapter_config.json there."
)
HALF = (
    "'empty_adapter' has adapter_config.json and no adapter_model.safetensors: half an adapter. Copy that file there "
    "too."
)
ENDLESS = (
    "the tokenizer of 'endless' has neither a chat template nor an EOS token, so a model could never finish a message. "
    "Set tokenizer.eos_token and save it again."
)
FEW_EMBEDDINGS = (
    "the tokenizer has 299 tokens and the model embeddings for 287, so it cannot read all of them. Save the tokenizer "
    "that belongs to the model, or resize its embeddings."
)
LONG_ANSWER = (
    "the answer that begins '1 2 3 4 1 2 3 4 1 2 3 4 1 2 3 4 1 2 3 4' has 596 tokens, and max_tokens = 64 leaves no "
    "room for a prompt. An answer is never cut: raise max_tokens, or leave the row out."
)

DATA = [
    (
        "sft --model.path good --out r",
        "data.path is missing: nothing sets it. Put it in a settings file, or give --data.path.",
    ),
    (
        f"{SFT} --data.path talks.jsonl",
        f"data.path = talks.jsonl: there is no such file. Did you mean 'talk.jsonl'? {FILES}",
    ),
    (
        f"{SFT} --data.path nothing.jsonl",
        "nothing.jsonl holds no row. Put one JSON object on each line, or rows under a header.",
    ),
    (
        f"{SFT} --data.path torn.jsonl",
        "torn.jsonl:2: not JSON: Expecting value at column 15. Write one object per line, or an array of objects.",
    ),
    (f"{SFT} --data.path array.json", 'array.json:1: a row is an object with columns, not 1. Write {"prompt": …, …}.'),
    (f"{SFT} --data.path keys.jsonl", f"keys.jsonl:1: the columns text, label {AS_SFT}"),
    (f"{SFT} --data.path typo.jsonl", f"typo.jsonl:1: the columns promt, response {AS_SFT} Did you mean 'prompt'?"),
    (f"{SFT} --data.path ask.jsonl", f"ask.jsonl:1: the columns prompt, level {AS_SFT} They fit the schema prompt."),
    (
        f"{SFT} --data.path turns.jsonl",
        "turns.jsonl:1: the roles of 'messages' do not alternate: message 3 is the assistant's and follows the "
        "assistant's. Begin with the user's, after a system message if there is one, and let user and assistant take "
        "turns.",
    ),
    (
        f"{SFT} --data.path roles.jsonl",
        "roles.jsonl:1: message 1 of 'messages' has the role 'robot'. Roles are system, user, assistant, tool.",
    ),
    (
        f"{SFT} --data.path silent.jsonl",
        "silent.jsonl:1: no message is the assistant's, so there is nothing to learn from. Remove the line.",
    ),
    (f"{SFT} --data.path blank.jsonl", "blank.jsonl:1: 'response' is empty. Fill it in, or remove the row."),
    (f"{SFT} --data.path null.jsonl", "null.jsonl:1: 'response' is null. Fill it in, or remove the row."),
    (
        f"{SFT} --data.path holes.jsonl",
        "holes.jsonl:2: 'response' is missing, and the first row has it. Add it, or remove the row.",
    ),
    (f"{SFT} --data.path bytes.jsonl", "bytes.jsonl:1: not UTF-8 (byte 13 of the line). Save the file as UTF-8."),
    (
        f"{SFT} --data.path words.txt",
        "words.txt: files ending in '.txt' are not read. Give one of jsonl, json, csv, parquet, arrow.",
    ),
    (
        f"{SFT} --data.path empty",
        "empty: there is no data file in this folder (jsonl, json, csv, parquet, arrow). Put one there.",
    ),
    (
        f"{SFT} --data.split tests",
        "data.split = tests: talk.jsonl is one file, without splits. Leave it out, or give a folder or a hub id.",
    ),
    (
        f"{SFT} --data.eval-split test",
        "data.eval_split = test: talk.jsonl is one file, without splits. Give eval_path or eval_fraction instead.",
    ),
    (
        f"{SFT} --data.subset finetune",
        "data.subset = finetune: a file has no subsets. Give a folder or a hub id, or no subset.",
    ),
    (f"{SFT} --data.limit -1", "data.limit = -1: it counts rows. Give 0 to take all."),
    (f"{SFT} --data.weights 1 2", "data.weights = [1.0, 2.0]: sources: 1. Give one weight for each, or none."),
    (
        f"{SFT} --data.path one.jsonl --data.eval-fraction 0.5",
        "data.path = one.jsonl: every row is held out, so none is left to learn from. Give other rows to hold out, or "
        "fewer.",
    ),
    (
        f"{PAIRS} --data.eval-fraction 0.01",
        "data.eval_fraction = 0.01: none of 4 rows is held out, since few differ in what they answer. Raise it, or "
        "give eval_path.",
    ),
    (f"{PAIRS} --data.streaming", "data.streaming = true: a stream may not end. Give a limit."),
    (
        f"{PAIRS} --data.path talk.jsonl",
        f"talk.jsonl:1: the columns messages {AS_PAIRS} They fit the schema sft, prompt.",
    ),
    (
        f"{PAIRS} --data.path same.jsonl",
        "same.jsonl:2: 'chosen' and 'rejected' are the same, so nothing is preferred. Remove the row.",
    ),
    (
        f"{DPO} --data.path margin.jsonl",
        "margin.jsonl:1: 'margin' is 'wide', not a finite number. Write by how much the chosen answer is better, or 0.",
    ),
    (
        f"{PPO} {SHORT} --data.path keys.jsonl",
        "keys.jsonl:1: the columns text, label do not make rows of the schema prompt, which needs prompt, question, "
        "problem or messages, or question with choices or options, text or prompt with test_list, or prompt with test "
        "and entry_point.",
    ),
    (
        f"{PPO} {SHORT} --ptx.path gone.jsonl --policy.ptx-coef 0.1",
        f"ptx.path = gone.jsonl: there is no such file. Did you mean 'one.jsonl'? {FILES}",
    ),
    (
        f"{PPO} {SHORT} --ptx.path ask.jsonl --policy.ptx-coef 0.1",
        f"ask.jsonl:1: the columns prompt, level {AS_SFT} They fit the schema prompt.",
    ),
]
"""Rows that cannot be read, or not as what they are wanted for."""

LENGTHS = [
    (
        f"{SFT} --data.path long.jsonl --max-tokens 64",
        "long.jsonl: 1 of 1 conversations are longer than max_tokens = 64; the longest has 601 tokens. Raise "
        "max_tokens, or give too_long = drop or cut.",
    ),
    (
        f"{SFT} --data.path long.jsonl --max-tokens 64 --too-long drop",
        "long.jsonl: 1 of 1 conversations are longer than max_tokens = 64, so no row is left. Raise max_tokens.",
    ),
    (f"{PAIRS} --data.path long_pair.jsonl --max-tokens 64", LONG_ANSWER),
    (f"{DPO} --data.path long_pair.jsonl --max-tokens 64", LONG_ANSWER),
    *(
        (
            f"{line} {SHORT} --data.path long_ask.jsonl --sampling.max-prompt-tokens 32",
            "long_ask.jsonl: 1 of 1 prompts take more than sampling.max_prompt_tokens = 32 tokens; the longest, "
            "train/0, takes 598. Raise it, or leave those rows out.",
        )
        for line in (PPO, GRPO)
    ),
]
"""What does not fit into the budget of tokens."""

MODELS = [
    (f"{SFT} --model.path nowhere", NOT_THERE),
    (f"{SFT} --model.path small", f"'small': {FEW_EMBEDDINGS}"),
    (f"{PAIRS} --model.path small", f"'small': {FEW_EMBEDDINGS}"),
    (f"{PPO} --reward small_judge", f"reward small_judge: 'small_judge': {FEW_EMBEDDINGS}"),
    (f"{SFT} --model.path endless", ENDLESS),
    (f"{DPO} --model.path endless", ENDLESS),
    (
        f"{PPO} {SHORT} --model.path mute",
        "the tokenizer of 'mute' has no chat template, so messages cannot become tokens. Use an instruction-tuned "
        "model, or set tokenizer.chat_template and save the tokenizer again.",
    ),
    (f"{SFT} --model.path judge", "'judge' is a reward model, which writes nothing. Give a language model."),
    (
        f"{PPO} --reward good",
        "reward good: 'good' is a language model, not a reward model. Train one from it with echelon reward.",
    ),
    (
        f"{PPO} --reward empty",
        "reward empty: 'empty' is a folder without config.json, so it is not a Hugging Face model folder.",
    ),
    (f"{PPO} --reward nowhere", f"reward nowhere: {NOT_THERE}"),
    (f"{PPO} --reward good/nowhere", f"reward good/nowhere: {NOT_THERE.replace('nowhere', 'good/nowhere')}"),
    (f"{PPO} {SHORT} --value-path nowhere", NOT_THERE),
    (
        f"{PPO} {SHORT} --value-path other",
        "value_path = other: its tokenizer is not that of the policy, and a value model reads the very tokens the "
        "policy writes. Give a model with the same tokenizer, or leave value_path out.",
    ),
    (
        f"{DPO} --reference other",
        "reference = other: its tokenizer is not that of good, so their log-probabilities are of different tokens. "
        "Give a model with the same one.",
    ),
    (f"{DPO} --reference nowhere", NOT_THERE),
    (f"{SFT} --model.quantization 4bit", "bitsandbytes is not installed. Run: pip install 'echelon[quantization]'"),
]
"""Models that are not there, not whole, or not of the kind that is wanted."""

ADAPTERS = [
    (f"{SFT} --model.path lost", LONELY),
    (f"{PAIRS} --model.path lost", LONELY),
    (
        f"{SFT} --model.path unnamed",
        "'unnamed' is an adapter that does not say of which model: base_model_name_or_path in its adapter_config.json "
        "is empty. Write the model's folder or hub id there.",
    ),
    (f"{GRPO} {SHORT} --model.path empty_adapter", HALF),
    (f"{SFT} --model.path ia3", "'ia3' is an adapter of kind IA3: only LoRA adapters are read. Give one of those."),
    (f"{SFT} --model.path misfit", "'misfit': the adapter does not fit LlamaForCausalLM (Error(s) in loading …"),
    (
        f"{SFT} --model.path scores",
        "'scores' is the adapter of a reward model, which writes nothing. Give one of a policy.",
    ),
    (
        f"{PPO} --reward adapter",
        "reward adapter: 'adapter' is a language model, not a reward model. Train one from it with echelon reward.",
    ),
    (
        f"{SFT} --lora.rank 2 --lora.target q_prj",
        "lora.target = q_prj: LlamaForCausalLM has no such layer. Did you mean 'q_proj'? Its layers are called "
        "embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, input_layernorm, "
        "post_attention_layernorm, norm, lm_head.",
    ),
    (
        f"{SFT} --lora.rank 2 --lora.target embed_tokens",
        "lora.target = embed_tokens: embeddings and head of LlamaForCausalLM are one matrix, which cannot have an "
        "adapter. Leave it out, or train the matrix in full: lora.modules_to_save = embed_tokens.",
    ),
    (
        f"{SFT} --lora.rank 2 --lora.target all-linear q_proj",
        "lora.target = [all-linear, q_proj]: the name all-linear stands alone. Leave out the other names.",
    ),
    (f"{SFT} --lora.rank -1", "lora.rank = -1: it is a width. Give 8 or 16, or 0 to train all weights."),
    (
        f"{MERGE} --adapter good",
        "adapter = good: it is a whole model, not an adapter, so there is nothing to merge. Use it as it is, or give "
        "the folder that has adapter_config.json.",
    ),
    (
        f"{MERGE} --adapter nowhere",
        "adapter = nowhere: there is no adapter_config.json. Give the folder or hub id of an adapter.",
    ),
    (f"{MERGE} --adapter lost", f"{LONELY} Or say where it is with --base."),
    (f"{MERGE} --adapter empty_adapter", HALF),
    (f"{MERGE} --adapter scores", "'scores': the adapter does not fit LlamaForSequenceClassification (…"),
    (f"{MERGE} --base other", "'adapter': the adapter does not fit LlamaForCausalLM (Error(s) in loading …"),
    (f"{MERGE} --base nowhere", "base = nowhere: it has no config.json that can be read. Give a model's folder."),
    (f"{MERGE} --push me/mine", "push = me/mine: the hub does not know who you are (…"),
    (f"{MERGE} --public", "public = true: nothing is uploaded. Give push too."),
    (f"{MERGE} --resume", "unknown flag '--resume'."),
]
"""Adapters that cannot be used, and merges that cannot be made."""

SETTINGS = [
    (f"{SFT} --log.to wandbb", "--log.to wandbb: expected a list, each one of tensorboard, wandb, mlflow, trackio."),
    (f"{SFT} --patience 2", f"patience = 2: {HELD_OUT}"),
    (f"{PAIRS} --eval-first", f"eval_first = true: {HELD_OUT}"),
    (
        f"{SFT} --optim.warmup-steps 4 --optim.warmup-fraction 0.1",
        "optim.warmup_fraction = 0.1: warmup_steps says how long it takes too. Keep one of the two.",
    ),
    (f"{PAIRS} --center -1", "center = -1.0: it is a weight. Give 0 or a little more."),
    (f"{DPO} --beta 0", "beta = 0.0: without it nothing is learned. Give 0.1, or near it."),
    (f"{DPO} --label-smoothing 0.5", "label_smoothing = 0.5: more would mean the opposite. Give 0 to 0.4."),
    (
        f"{DPO} --loss ipo --label-smoothing 0.1",
        "label_smoothing = 0.1: loss = ipo knows no probabilities. Give 0, or use sigmoid.",
    ),
    (
        "ppo --model.path good --out r",
        "env is missing: nothing says what to do. Give --env, or --data.path with prompts and --reward.",
    ),
    (f"{PPO} {SHORT} --env guess_number", "env = guess_number: data.path gives tasks too. Keep one of the two."),
    (
        PPO,
        "reward = []: nothing says what an answer is worth. Give math, code, path.py:function, or a reward model's "
        "folder.",
    ),
    (
        f"{PPO} {SHORT} --reward-weights 1 2",
        "reward_weights = [1.0, 2.0]: rewards: 1. Give one weight for each, or none.",
    ),
    (
        f"{PPO} {SHORT} --policy.ptx-coef 0.1",
        "policy.ptx_coef = 0.1: there is nothing to weigh. Give ptx.path the conversations.",
    ),
    (
        f"{PPO} {SHORT} --ptx.path talk.jsonl",
        "ptx.path = [talk.jsonl]: these rows would count nothing. Give policy.ptx_coef a weight, such as 0.05.",
    ),
    (
        f"{PPO} {SHORT} --shaping.kl-target 1",
        "shaping.kl_target = 1.0: a weight of 0 stays 0. Give kl_coef what it starts from, such as 0.05.",
    ),
    (f"{PPO} {SHORT} --ema-decay 1", "ema_decay = 1.0: an average moves. Give 0.99, or 0 to keep none."),
    *(
        (
            f"{PPO} {SHORT} --episodes-per-step 4 --{name.replace('_', '-')} 5",
            f"{name} = 5: some would have none of a step's 4 episodes. Give that many, or fewer.",
        )
        for name in ("policy.minibatches", "value_minibatches")
    ),
    (
        f"{GRPO} {SHORT} --tasks-per-step 2 --group-size 2 --policy.minibatches 5",
        "policy.minibatches = 5: some would have none of a step's 4 episodes. Give that many, or fewer.",
    ),
    (
        f"{GRPO} {SHORT} --group-size 1",
        "group_size = 1: siblings are compared, so there must be at least 2. Raise it, or use ppo, which has a critic.",
    ),
    (
        f"{GRPO} {SHORT} --kl-in tokens",
        "kl_in = tokens: there is no KL to count. Give policy.kl_coef a weight, such as 0.05.",
    ),
    (
        f"{GRPO} {SHORT} --baseline none",
        "scale = std: there is no comparison to take it from. Use scale = none, with whiten if it is to be scaled.",
    ),
    (
        f"{GRPO} {SHORT} --policy.ptx-coef 0.1",
        "policy.ptx_coef = 0.1: there are no texts here to imitate. Leave it out, or use ppo.",
    ),
    (
        f"{GRPO} {SHORT} --overlong-cache 99",
        "overlong_cache = 99: it lies within sampling.max_tokens = 32. Give a part of that, or 0 for no penalty.",
    ),
    (f"{PPO} --reward rewards.py", "reward rewards.py: which function of the file? Give rewards.py:function."),
    (
        f"{PPO} --reward rewards.py:shrt",
        "reward rewards.py:shrt: rewards.py has no function 'shrt'. Did you mean 'short'?",
    ),
    (f"{PPO} --reward reward.py:short", "reward reward.py:short: there is no file reward.py."),
    (
        f"{PPO} --reward broken.py:reward",
        "reward broken.py:reward: broken.py does not import: SyntaxError: invalid syntax (broken.py, line 1)",
    ),
]
"""Settings that contradict each other, or that name what is not there."""

TABLE = [*DATA, *LENGTHS, *MODELS, *ADAPTERS, *SETTINGS]


def without_doubles(line: str) -> str:
    """The command as somebody would type it: of a flag that comes twice, the last."""
    command, *flags = re.split(r" (?=--)", line)
    return " ".join([command, *{flag.partition(" ")[0]: flag for flag in flags}.values()])


LINES = [(without_doubles(line), message) for line, message in TABLE]


@pytest.mark.parametrize(("line", "message"), LINES, ids=[line.replace("/", "|") for line, _ in LINES])
def test_one_line_says_what_is_wrong_and_nothing_is_written(place: Place, line: str, message: str) -> None:
    before = sorted(path.name for path in place.folder.iterdir())
    status, said = place.run(line)
    assert status == 2
    assert says(said, message), said
    assert sorted(path.name for path in place.folder.iterdir() if path.name != "__pycache__") == before


def test_the_table_is_long_enough_and_says_nothing_twice() -> None:
    assert len(LINES) >= 45
    assert len(set(LINES)) == len(LINES)


def test_a_tracker_that_is_not_installed_is_found_before_anything_is_written(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert place.run(f"{SFT} --log.to wandb") == (2, "wandb is not installed. Run: pip install 'echelon[wandb]'\n")
    assert not (place / "r").exists()


def test_vllm_that_is_not_installed_is_found_before_anything_is_written(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    line = "grpo --model.path good --env guess_number --out r --threads 1 --sampler vllm"
    assert place.run(line) == (2, "vllm is not installed. Run: pip install 'echelon[vllm]'\n")
    assert not (place / "r").exists()


def test_what_is_there_already_is_never_overwritten_by_a_merge(place: Place) -> None:
    (place / "full").mkdir()
    (place / "full/config.json").write_text("{}")
    wanted = "there is something already, and it is never overwritten. Choose another --out.\n"
    assert place.run(without_doubles(f"{MERGE} --out full")) == (2, f"full: {wanted}")
    assert place.run(without_doubles(f"{MERGE} --out ask.jsonl")) == (2, f"ask.jsonl: {wanted}")
    assert [path.name for path in (place / "full").iterdir()] == ["config.json"]


PLAYED = "--sampling.max-tokens 2 --threads 1"
WRONG_REWARDS = [
    ("rewards.py:raises", "raised ZeroDivisionError: a defect on task 'train/…"),
    ("rewards.py:few", "returned 1 numbers for 4 completions. It must return one for each, in their order."),
    ("rewards.py:text", "returned 'good'. It must return a list of numbers."),
    ("rewards.py:words", "gave 'good' on task 'train/…"),
    ("rewards.py:nothing", "returned None. It must return a list of numbers."),
    ("rewards.py:nan", "gave nan on task 'train/…"),
    ("rewards.py:judged", "it needs the column 'answer', and the columns are: level."),
    ("nan_judge", "the model scored nan on task 'train/…"),
]
RECIPES = {"grpo": f"{GRPO} --tasks-per-step 2 --group-size 2 {PLAYED}", "ppo": f"{PPO} --episodes-per-step 4 {PLAYED}"}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("reward", "message"), WRONG_REWARDS, ids=[reward for reward, _ in WRONG_REWARDS])
def test_a_reward_that_is_wrong_ends_the_run_before_its_step_counts(
    place: Place, recipe: str, reward: str, message: str
) -> None:
    line = RECIPES[recipe]
    status, said = place.run(f"{line} --steps 2 --reward {reward}")
    assert status == 2
    assert says(said, f"reward {reward}: {message}"), said
    assert (place / "r/metrics.jsonl").read_text() == ""
    assert [path.name for path in (place / "r/checkpoints").iterdir()] == ["step_000000"]
    find_checkpoint(place / "r")  # whole


def test_a_reward_function_that_is_repaired_lets_the_run_continue(place: Place) -> None:
    line = f"{RECIPES['grpo']} --steps 2 --reward rewards.py:raises"
    assert place.run(line)[0] == 2
    repaired = REWARDS.replace(
        'raise ZeroDivisionError("a defect")', "return [float(len(text)) for text in completions]"
    )
    (place / "rewards.py").write_text(repaired)
    assert place.run(f"{line} --resume") == (0, "")
    assert len((place / "r/metrics.jsonl").read_text().splitlines()) == 2


FEW = "--rows-per-step 4 --threads 1 --save-every 1"
RUNS = [
    ("", "there is a run already, and it is never overwritten. Continue it with --resume, or choose another --out."),
    (
        "--resume --seed 1",
        "seed (0 → 1). A run keeps its settings. Set them back, or start a new run with another --out.",
    ),
    ("--resume --optim.lr 0.5", "optim.lr (0.001 → 0.5). A run keeps …"),
    ("--resume --data.limit 2", "data.limit (0 → 2). A run keeps …"),
    ("--resume --lora.rank 4", "lora.rank (0 → 4). A run keeps …"),
]


def test_trackers_may_change_within_a_run_and_a_new_one_gets_all_rows(place: Place) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    line = f"{RECIPES['grpo']} {SHORT} --steps"
    assert place.run(f"{line} 1") == (0, "")
    assert place.run(f"{line} 2 --resume --log.to tensorboard --log.name second") == (0, "")
    events = EventAccumulator(str(place / "r/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [0, 1]


@pytest.mark.parametrize("stage", [SFT, PAIRS, DPO], ids=["sft", "reward", "dpo"])
def test_a_run_keeps_its_directory_and_its_settings(place: Place, stage: str) -> None:
    assert place.run(f"{stage} {FEW}") == (0, "")
    before = place.files()
    for flags, message in RUNS:
        status, said = place.run(f"{stage} {FEW} {flags}")
        prefix = "r/checkpoints/step_000001: it was written with other settings: " if flags else "r: "
        assert (status, says(said, prefix + message)) == (2, True), said
        assert place.files() == before
