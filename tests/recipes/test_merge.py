"""Merging: what is written needs neither peft nor echelon, says what the adapter said, and is whole or not there.

The models under test are read with transformers and peft alone.
"""

from __future__ import annotations

import errno
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from echelon import cli
from echelon.errors import DataError
from echelon.models import lora
from echelon.models.lm import tiny
from echelon.models.reward import SCALE, load_reward_model
from echelon.recipes.merge import compare
from echelon.text.chat import Renderer
from echelon.types import Message
from tests.recipes.preferences import reader, write_pairs
from tests.text.templates import KINDS, make_tokenizer

IDS = torch.arange(5, 37).reshape(2, 16)
Merge = Callable[..., Path]
Kept = dict[str, bytes]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    """Merge an adapter into `merged` in the folder of this test, where nothing else may be left behind."""

    def merge(adapter: object, *flags: object, out: str = "merged", status: int = 0) -> Path:
        words = ["merge", "--adapter", adapter, "--out", tmp_path / out, "--threads", 1, *flags]
        assert cli.main([str(word) for word in words]) == status
        assert not list(tmp_path.glob(".tmp*"))
        return tmp_path / out

    return merge


def made(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    module, tokenizer = tiny(["a b c"], vocab_size=270, hidden=32, layers=2, heads=2, seed=seed)
    module.to(dtype).save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


def taught(module: Any, seed: int = 1) -> Any:
    """What learns of a model, moved far from where it was."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    return module


def adapter(below: Path, folder: Path, *, reward: bool = False, seed: int = 1, **settings: Any) -> Path:
    """One that plain peft made and saved, as TRL does too: weights and settings, no tokenizer."""
    common = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.1, "target_modules": "all-linear"}
    task = "SEQ_CLS" if reward else "CAUSAL_LM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice
        module = peft.get_peft_model(whole(below, reward), peft.LoraConfig(**{**common, "task_type": task, **settings}))
        taught(module, seed).save_pretrained(folder)
    return folder


def whole(folder: Path, reward: bool = False) -> Any:
    """A model as transformers loads it, in float32; a reward model whose head is new has one of zeros."""
    if not reward:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    module = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    ).eval()
    architectures = json.loads((folder / "config.json").read_text())["architectures"]
    if not any("ForSequenceClassification" in name for name in architectures):
        nn.init.zeros_(module.score.weight)
    return module


def adapted(below: Path | Any, folder: Path, reward: bool = False) -> Any:
    """An adapter on its base as peft loads it."""
    module = whole(below, reward) if isinstance(below, Path) else below
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(module, str(folder)).eval()


@torch.no_grad()
def said(module: Any, ids: Tensor = IDS) -> Tensor:
    found: Tensor = module(input_ids=ids).logits
    return found.float()


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def contents(folder: Path) -> Kept:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_adapter_that_sft_trained_becomes_a_plain_model(
    train, merge: Merge, untrained: Path, conversations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model.path", untrained, "--data.path", conversations, "--lora.rank", 4, "--optim.lr", 1e-2)
    run = train("sft", *words, "--max-steps", 4, "--rows-per-step", 8)
    checkpoint = sorted((run.out / "checkpoints").iterdir())[-1] / "actor"
    before = contents(run.out)
    for given, out in ((run.out, "of a run"), (checkpoint.parent, "of a checkpoint"), (checkpoint, "of a folder")):
        capsys.readouterr()
        folder = merge(given, out=out)
        first, last = capsys.readouterr().out.splitlines()[-2:]
        assert f"{checkpoint} merged into {untrained}, float32. Its logits are within" in first
        assert last.startswith("Talk to it: ")
        expected = said(adapted(untrained, checkpoint))
        assert distance(said(whole(folder)), expected) < 1e-4
        assert distance(said(whole(untrained)), expected) > 1e-2, "the adapter matters"
    assert contents(run.out) == before
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert contents(folder).keys() == names | {"chat_template.jinja"}
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, untrained))
    assert ours.chat_template == theirs.chat_template
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.eos_token_id == theirs.eos_token_id is not None


KINDS_OF_ADAPTER: dict[str, dict[str, Any]] = {
    "every layer": {},
    "some layers": {"target_modules": ["q_proj", "down_proj"]},
    "scaled by the root of the rank": {"use_rslora": True},
    "directions and lengths": {"use_dora": True},
    "head learned apart": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings learned whole": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("kind", KINDS_OF_ADAPTER)
def test_an_adapter_that_peft_saved_is_merged(kind: str, base: Path, merge: Merge, tmp_path: Path) -> None:
    saved = adapter(base, tmp_path / "adapter", **KINDS_OF_ADAPTER[kind])
    folder = merge(saved)
    expected = said(adapted(base, saved))
    assert distance(said(whole(folder)), expected) < 1e-4
    assert distance(said(whole(base)), expected) > 1e-1
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template, "of the base"


def test_the_tokenizer_is_that_of_the_adapter_if_it_has_one(base: Path, merge: Merge, tmp_path: Path) -> None:
    saved, tokenizer = adapter(base, tmp_path / "adapter"), transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages[0].content }}<|end|>"
    tokenizer.save_pretrained(saved)
    assert transformers.AutoTokenizer.from_pretrained(merge(saved)).chat_template == tokenizer.chat_template


def test_a_merged_weight_is_the_weight_plus_the_scaled_product(base: Path, merge: Merge, tmp_path: Path) -> None:
    saved = adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merge(saved)))
    matrices = load_file(saved / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if "q_proj" not in name:
            assert after[name].equal(weight)
            continue
        product = matrices[f"{layer}.lora_B.weight"] @ matrices[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(after[name], weight + 7 / 3 * product)


def test_the_base_is_the_one_the_adapter_names_or_the_one_given(merge: Merge, tmp_path: Path) -> None:
    first, second = made(tmp_path / "first"), made(tmp_path / "second", seed=1)
    saved = adapter(first, tmp_path / "adapter")
    assert distance(said(whole(merge(saved, out="named"))), said(adapted(first, saved))) < 1e-4
    assert distance(said(whole(merge(saved, "--base", second, out="given"))), said(adapted(second, saved))) < 1e-4
    shutil.move(first, tmp_path / "moved")
    merge(saved, out="lost", status=2)
    folder = merge(saved, "--base", tmp_path / "moved", out="found")
    assert contents(folder) == contents(tmp_path / "named")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_added_in_float32_and_rounded_once(dtype: str, merge: Merge, tmp_path: Path) -> None:
    below = made(tmp_path / "base", dtype=getattr(torch, dtype))
    saved = adapter(below, tmp_path / "adapter")
    exact, rounded = merge(saved, "--dtype", "float32", out="exact"), merge(saved)
    weights = [load_file(folder / "model.safetensors") for folder in (exact, rounded)]
    assert {str(tensor.dtype) for tensor in weights[1].values()} == {f"torch.{dtype}"}
    assert all(weights[1][name].equal(tensor.to(getattr(torch, dtype))) for name, tensor in weights[0].items())
    expected = said(adapted(below, saved))
    assert distance(said(whole(exact)), expected) < 1e-4
    off = (said(whole(rounded)) - expected).abs().mean() / expected.abs().mean()
    assert 0 < off < {"bfloat16": 5e-2, "float16": 1e-2}[dtype]
    stored = transformers.AutoModelForCausalLM.from_pretrained(rounded, dtype="auto")
    assert stored.dtype == getattr(torch, dtype)
    again = merge(saved, "--base", exact, "--dtype", dtype, out="as wanted")
    assert {tensor.dtype for tensor in load_file(again / "model.safetensors").values()} == {stored.dtype}


def test_an_adapter_that_learned_on_top_of_another_is_merged_with_it(
    train, merge: Merge, untrained: Path, conversations: Path
) -> None:
    """What the second run saved says both, so plain peft puts it on the model below."""
    words = ("--data.path", conversations, "--max-steps", 4, "--rows-per-step", 8, "--optim.lr", 1e-2, "--lora.rank")
    lower = train("sft", "--model.path", untrained, *words, 4, name="lower")
    upper = train("sft", "--model.path", lower.out, *words, 2, name="upper")
    saved = sorted((upper.out / "checkpoints").iterdir())[-1] / "actor"
    expected = said(adapted(untrained, saved))
    assert distance(said(whole(merge(upper.out))), expected) < 1e-4
    assert distance(said(whole(merge(lower.out, out="lower merged"))), expected) > 1e-2


def test_an_adapter_whose_base_is_an_adapter_is_merged_into_the_model_below_both(
    base: Path, merge: Merge, tmp_path: Path
) -> None:
    lower = adapter(base, tmp_path / "lower")
    upper = adapter(base, tmp_path / "upper", seed=2)
    settings = json.loads((upper / lora.CONFIG).read_text())
    (upper / lora.CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": str(lower)}))
    expected = said(adapted(adapted(base, lower).merge_and_unload(), upper))
    assert distance(said(whole(merge(upper))), expected) < 1e-4
    assert distance(said(adapted(base, upper)), expected) > 1e-1


def conversation(*words: str) -> list[Message]:
    return [Message(role="user", content="Say something."), Message(role="assistant", content=" ".join(words))]


CONVERSATIONS = [conversation("river"), conversation("red", "stone", "bird"), conversation("lamp", "door")]


def rendered(tokenizer: Any) -> list[list[int]]:
    """The conversations as tokens, up to the end of the answer."""
    renderer = Renderer(tokenizer)
    return [renderer.render(one[:1]) + renderer.action_ids(one[1]["content"]) for one in CONVERSATIONS]


def batch_scores(module: Any, folder: Path) -> Tensor:
    """What plain transformers makes of the conversations, padded as the tokenizer of a folder pads."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.pad({"input_ids": rendered(tokenizer)}, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any(), "nothing was padded"
    with torch.no_grad():
        scores: Tensor = module(**batch).logits[:, 0]
    return scores


def test_the_adapter_of_a_reward_model_becomes_a_reward_model(train, merge: Merge, tmp_path: Path) -> None:
    below, pairs = reader(tmp_path / "base"), write_pairs(tmp_path / "pairs.jsonl", "letter", 48)
    words = ("--model.path", below, "--data.path", pairs, "--data.eval-fraction", 0.3, "--lora.rank", 4)
    run = train("reward", *words, "--optim.lr", 3e-2, "--rows-per-step", 8, "--max-steps", 8, "--eval-every", 4)
    folder = merge(run.out)
    assert (folder / SCALE).read_bytes() == (run.out / "best" / SCALE).read_bytes()
    expected = load_reward_model(str(run.out / "best"), device="cpu")
    ours = load_reward_model(str(folder), device="cpu")
    for normalised in (False, True):
        scores = [model.score(CONVERSATIONS, normalised=normalised) for model in (expected, ours)]
        torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=1e-4)
    raw = expected.score(CONVERSATIONS)
    assert float(raw.std()) > 1e-2, "the scores differ"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert theirs.config.num_labels == 1
    torch.testing.assert_close(batch_scores(theirs, folder), raw, atol=1e-4, rtol=1e-4)


STYLES: dict[str, tuple[str, Any]] = {
    "two special tokens to spare": ("tiny", transformers.LlamaConfig),
    "one special token": ("plain", transformers.GPT2Config),
    "no chat template": ("plain", transformers.GPT2Config),
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}


def of_style(style: str, folder: Path) -> Path:
    """A language model whose tokenizer is what the style says."""
    kind, config = STYLES[style]
    tokenizer = make_tokenizer(**KINDS[kind])
    if style == "no chat template":
        tokenizer.chat_template = None
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    settings = config(vocab_size=len(tokenizer), **(SIZES if "tiny" in kind else GPT2), **ends)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("in_full", [(), ("embed",)])
@pytest.mark.parametrize("style", STYLES)
def test_a_reward_model_that_pads_scores_as_its_adapter_did_one_by_one(
    style: str, in_full: tuple[str, ...], merge: Merge, tmp_path: Path
) -> None:
    """Whether the tokenizer had a token to pad with or gets one, and whatever the adapter trained in full."""
    below = of_style(style, tmp_path / "base")
    names = {"target_modules": "all-linear"}
    if in_full:
        names["modules_to_save"] = ["score", "embed_tokens" if "two" in style else "wte"]  # type: ignore[assignment]
    saved = adapter(below, tmp_path / "adapter", reward=True, **names)
    if style == "no chat template":
        transformers.AutoTokenizer.from_pretrained(below).save_pretrained(saved)
    scale = json.dumps({"mean": 0.5, "std": 2.0, "held_out": True})
    (saved / SCALE).write_text(scale)
    folder = merge(saved)
    assert (folder / SCALE).read_text() == scale
    expected, found = adapted(below, saved, reward=True), whole(folder, reward=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == found.config.pad_token_id
    assert tokenizer.pad_token_id not in Renderer(tokenizer).stop_ids
    assert len(tokenizer) <= found.get_input_embeddings().weight.shape[0]
    assert tokenizer.chat_template
    alone = torch.cat([said(expected, torch.tensor([row]))[:, 0] for row in rendered(tokenizer)])
    assert float(alone.std()) > 1e-3, "the scores differ"
    torch.testing.assert_close(batch_scores(found, folder), alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(load_reward_model(str(folder), device="cpu").score(CONVERSATIONS), alone)


def test_a_correct_merge_is_not_refused_for_what_rounding_does(merge: Merge, tmp_path: Path) -> None:
    """These adapters are so large that a rounded weight moves single logits by half of the largest one."""
    for seed in range(3):
        below = made(tmp_path / f"base {seed}", seed=seed, dtype=torch.bfloat16)
        saved = adapter(below, tmp_path / f"adapter {seed}", seed=seed, lora_alpha=18)
        merge(saved, out=f"merged {seed}")


def test_one_logit_counts_in_float32_and_the_mean_in_16_bits() -> None:
    """One of a thousand is off by a hundredth, a mean of 1e-5; then all of them are."""
    expected, one = torch.ones(1000), torch.ones(1000)
    one[3] = 1.01
    with pytest.raises(DataError, match=r"in memory, .* logits differ by 0.01, and rounding explains 0.001\."):
        compare(one, expected, "float32", "in memory")
    assert compare(one, expected, "float16", "written") == pytest.approx(0.01)
    with pytest.raises(DataError, match=r"logits differ by 0.02, and rounding explains 0.01\."):
        compare(1.02 * expected, expected, "float16", "written")
    with pytest.raises(DataError):
        compare(torch.full_like(expected, torch.nan), expected, "bfloat16", "written")
    assert compare(0 * expected, 0 * expected, "float32", "in memory") == 0, "a reward model that has not learned yet"


def spoil(module: Any) -> Any:
    with torch.no_grad():
        next(iter(module.model.layers[0].mlp.parameters()))[0] += 0.5
    return module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_merge_is_refused_and_nothing_is_written(
    dtype: str, base: Path, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    saved = adapter(base, tmp_path / "adapter")
    right = lora.merge
    monkeypatch.setattr(lora, "merge", lambda module: spoil(right(module)))
    out = merge(saved, "--dtype", dtype, status=2)
    told = capsys.readouterr().err
    assert told.startswith("the merged model, in memory, is not the adapter on its base: logits differ by ")
    assert told.count("\n") == 1
    assert not out.exists()


def test_what_is_written_wrong_is_refused_and_taken_away(
    base: Path, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    saved, write = adapter(base, tmp_path / "adapter"), transformers.LlamaForCausalLM.save_pretrained

    def wrong(module: Any, folder: Path) -> None:
        write(spoil(module), folder)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", wrong)
    out = merge(saved, "--dtype", "float32", status=2)
    told = capsys.readouterr().err
    assert told.startswith("the merged model, written as float32, is not the adapter on its base: logits differ by ")
    assert told.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, ""),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "could not be written (No space left on device)."),
        (SafetensorError("I/O error: no space"), 2, "could not be written (I/O error: no space)."),
    ],
)
def test_interrupted_writing_leaves_nothing_and_can_be_repeated(
    error: BaseException,
    status: int,
    message: str,
    base: Path,
    merge: Merge,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """When the weights are there already and the tokenizer is not."""
    saved = adapter(base, tmp_path / "adapter")

    def interrupted(self: Any, folder: Path, **_: Any) -> None:
        assert (folder / "model.safetensors").is_file()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", interrupted)
        out = merge(saved, status=status)
    assert message in capsys.readouterr().err
    assert not out.exists()
    assert (merge(saved) / "tokenizer.json").is_file()


def test_what_a_killed_merge_left_is_no_part_of_the_next(base: Path, merge: Merge, tmp_path: Path) -> None:
    (tmp_path / ".tmp-merged").mkdir()
    (tmp_path / ".tmp-merged" / "added_tokens.json").write_text("{")
    assert "added_tokens.json" not in contents(merge(adapter(base, tmp_path / "adapter")))


def test_what_is_there_is_never_overwritten_and_an_empty_folder_is_nothing(
    base: Path, merge: Merge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = adapter(base, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    folder = merge(saved)
    before = contents(folder)
    merge(saved, status=2)
    assert "there is something already, and it is never overwritten." in capsys.readouterr().err
    assert contents(folder) == before


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    base: Path, merge: Merge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = merge(adapter(base, tmp_path / "adapter"), "--dry-run")
    assert "adapter: PeftModelForCausalLM, " in capsys.readouterr().out
    assert not out.exists()


def test_weights_of_few_bits_take_in_no_adapter(
    base: Path, merge: Merge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, below = adapter(base, tmp_path / "adapter"), shutil.copytree(base, tmp_path / "few bits")
    settings = json.loads((below / "config.json").read_text())
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (below / "config.json").write_text(json.dumps(settings | {"quantization_config": packed}))
    out = merge(saved, "--base", below, status=2)
    assert "its weights are stored in few bits, and an adapter cannot be added to them" in capsys.readouterr().err
    assert not out.exists()


class Hub:
    """A hub that remembers what it was asked, and may refuse."""

    asked: list[tuple[str, Any]]
    known, reachable = True, True

    def whoami(self) -> dict[str, str]:
        self.asked.append(("who", None))
        if not self.known:
            raise OSError("401 Client Error.\nInvalid token.")
        return {"name": "me"}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        assert exist_ok
        self.asked.append(("make", (repo_id, private)))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id.rpartition('/')[2]}")

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        if not self.reachable:
            raise OSError("the line is dead")
        self.asked.append(("put", (repo_id, contents(Path(folder_path)))))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(Hub, "asked", [], raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


@pytest.mark.parametrize(("name", "flags", "private"), [("mine", (), True), ("me/mine", ("--public",), False)])
def test_what_is_written_is_uploaded(
    name: str, flags: tuple[str, ...], private: bool, base: Path, merge: Merge, tmp_path: Path, hub: type[Hub]
) -> None:
    folder = merge(adapter(base, tmp_path / "adapter"), "--push", name, *flags)
    assert hub.asked == [("who", None), ("make", (name, private)), ("put", ("me/mine", contents(folder)))]


def test_without_push_the_hub_is_not_asked(base: Path, merge: Merge, tmp_path: Path, hub: type[Hub]) -> None:
    merge(adapter(base, tmp_path / "adapter"))
    merge(tmp_path / "adapter", "--push", "mine", "--dry-run", out="tried")
    assert [what for what, _ in hub.asked if what != "who"] == []


def test_who_is_not_known_to_the_hub_learns_it_before_any_work(
    base: Path, merge: Merge, tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(hub, "known", False)
    out = merge(adapter(base, tmp_path / "adapter"), "--push", "mine", status=2)
    assert capsys.readouterr().err == (
        "push = mine: the hub does not know who you are (401 Client Error. Invalid token). Log in with: hf auth login\n"
    )
    assert not out.exists()


def test_an_upload_that_fails_leaves_the_merged_model(
    base: Path, merge: Merge, tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(hub, "reachable", False)
    out = merge(adapter(base, tmp_path / "adapter"), "--push", "me/mine", status=2)
    told = capsys.readouterr().err
    assert told == (
        f"push = me/mine: the upload failed (the line is dead). The merged model is in {out}; try again with: "
        f"hf upload me/mine {out}\n"
    )
    assert distance(said(whole(out)), said(adapted(base, tmp_path / "adapter"))) < 1e-4
