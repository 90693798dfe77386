"""A language model read at option tokens: every option as if it were alone, in rows that hold nothing twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from echelon.config import LoraConfig, OptimConfig
from echelon.data.candidates import Options
from echelon.data.options import lay_options, spell
from echelon.errors import DataError
from echelon.models import lora
from echelon.models.lm import load_lm, tiny
from echelon.models.options import OptionScorer, Reading, read_description, token_scores
from echelon.ops import bellman
from echelon.ops.options import Layout
from echelon.text.chat import Renderer
from echelon.text.dialogue import Inventory
from echelon.train.learner import Learner

NUMBERED = [[40, 11, 41], [40, 12, 41], [40, 13, 14, 41], [40, 12, 15, 41]]
"""(1), (2), (34) and (25): what they begin and end with is shared, and two of them share more."""
SINGLE = [[11], [12], [13]]
STATES = [
    Options([5, 6, 7], NUMBERED),
    Options([8, 9, 10, 5, 5], [[40, 11, 41], [], [40, 13, 14, 41], []]),
    Options([8, 9, 10, 5, 5, 9, 30], NUMBERED),
]


@pytest.fixture(scope="module")
def lm() -> Any:
    return small()


def small(seed: int = 0) -> Any:
    return tiny(["a cat sat"], vocab_size=300, hidden=16, layers=2, heads=2, seed=seed)[0]


@torch.no_grad()
def alone(lm: Any, reading: Reading, state: list[int], option: list[int]) -> float:
    """Q of one option from a plain forward pass of its own, written as the definition says."""
    logits = lm(input_ids=torch.tensor([[*state, *option]])).logits[0, len(state) - 1 : -1]
    said = {"logit": logits, "logprob": logits.log_softmax(-1), "prob": logits.softmax(-1)}[reading.score]
    scores = [said[place, token].item() for place, token in enumerate(option)]
    read = scores[reading.front : len(scores) - reading.back]
    return reading.scale * sum(read) / (1 if reading.normalize == "sum" else len(read)) + reading.shift


def values(scorer: OptionScorer, states: list[Options], tokens_per_pass: int = 1000) -> list[float]:
    found: list[float] = scorer.values(lay_options(states, scorer.layout), tokens_per_pass).tolist()
    return found


@pytest.mark.parametrize("score", ["logit", "logprob", "prob"])
@pytest.mark.parametrize("normalize", ["mean", "sum", "informative"])
@pytest.mark.parametrize(("shares", "tokens_per_pass"), [(True, 1000), (True, 8), (False, 1000), (False, 8)])
def test_q_of_all_options_equals_separate_forward_passes(
    lm: Any, score: Any, normalize: Any, shares: bool, tokens_per_pass: int
) -> None:
    reading = Reading(score, normalize, scale=2.0, shift=0.5).of(NUMBERED)
    assert (reading.front, reading.back) == ((1, 1) if normalize == "informative" else (0, 0))
    scorer = OptionScorer(lm, reading, shares=shares)
    expected = [alone(lm, reading, s.state, option) for s in STATES for option in s.candidates if option]
    assert values(scorer, STATES, tokens_per_pass) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 8 + 2


def test_options_of_one_token_cost_the_state_and_no_token_more(lm: Any) -> None:
    scorer = OptionScorer(lm, Reading("logit", "mean").of(SINGLE))
    batch = lay_options([Options([5, 6, 7], SINGLE), Options([8, 9], SINGLE)], scorer.layout)
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.sees() is None, "no mask: plain rows"
    assert len(batch.row_P) == 2, "one hidden state tells all options of a state"
    assert counted(scorer, batch) == 6


def test_options_share_what_they_begin_with_and_what_is_followed_by_nothing_is_not_read(lm: Any) -> None:
    state = [5, 6, 7, 8]
    plain = [[40, 11, 41], [40, 12, 41], [40, 13, 41]]
    informative = OptionScorer(lm, Reading().of(plain))
    batch = lay_options([Options(state, plain)], informative.layout)
    assert batch.tokens.tolist() == [[*state, 40]], "the bracket once; the digits are read, not given"
    assert batch.sees() is None
    mean = OptionScorer(lm, Reading(normalize="mean").of(plain))
    assert lay_options([Options(state, plain)], mean.layout).tokens.tolist() == [[*state, 40, 11, 12, 13]]
    apart = lay_options([Options(state, plain)], Layout(branches=False))
    assert apart.tokens.tolist() == [[*state, 40, digit] for digit in (11, 12, 13)]


def test_what_is_learned_from_is_the_chosen_option_alone(lm: Any) -> None:
    scorer = OptionScorer(lm, Reading(normalize="mean"))
    batch = lay_options(STATES, scorer.layout, chosen=[3, 0, 2])
    assert batch.tokens.tolist() == [
        [5, 6, 7, 40, 12, 15, 0, 0, 0, 0],
        [8, 9, 10, 5, 5, 40, 11, 0, 0, 0],
        [8, 9, 10, 5, 5, 9, 30, 40, 13, 14],
    ]
    assert batch.sees() is None
    every = values(scorer, STATES)
    assert scorer.values(batch, 1000).tolist() == pytest.approx([every[3], every[4], every[8]], abs=1e-5)


def counted(scorer: OptionScorer, batch: Any) -> int:
    """Tokens, padding included, that the model is given."""
    seen: list[int] = []
    hook = scorer.lm.get_decoder().register_forward_pre_hook(  # type: ignore[operator]
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    scorer.values(batch, 1000)
    hook.remove()
    return sum(seen)


def test_logits_of_other_tokens_are_never_computed(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = OptionScorer(lm, Reading().of(NUMBERED))
    before = values(scorer, STATES)
    monkeypatch.setattr(lm.lm_head, "forward", lambda hidden: pytest.fail("the head was applied"))
    assert values(scorer, STATES) == before


def test_a_head_with_an_adapter_or_anything_else_on_it_is_asked_itself() -> None:
    base = small()
    hidden, place, token = torch.randn(3, 16), torch.tensor([0, 2, 2]), torch.tensor([7, 8, 9])
    plain = token_scores(base, hidden, place, token, "logit")
    torch.testing.assert_close(plain, base.lm_head(hidden)[place, token])
    handle = base.lm_head.register_forward_hook(lambda module, args, out: out * 3)
    torch.testing.assert_close(token_scores(base, hidden, place, token, "logit"), plain * 3)
    handle.remove()


def test_what_happens_to_logits_behind_the_head_happens_here_too() -> None:
    base = small()
    base.config.final_logit_softcapping = 0.5
    scores = token_scores(base, torch.ones(1, 16), torch.tensor([0, 0]), torch.tensor([7, 8]), "logit")
    raw = base.lm_head(torch.ones(1, 16))[0, [7, 8]]
    torch.testing.assert_close(scores, 0.5 * torch.tanh(raw / 0.5))
    base.config.logit_scale = 3.0
    scores = token_scores(base, torch.ones(1, 16), torch.tensor([0, 0]), torch.tensor([7, 8]), "logit")
    torch.testing.assert_close(scores, 0.5 * torch.tanh(3 * raw / 0.5))
    base.config.final_logit_softcapping = None
    scores = token_scores(base, torch.ones(1, 16), torch.tensor([0, 0]), torch.tensor([7, 8]), "logit")
    torch.testing.assert_close(scores, 3 * raw)


def test_padding_and_what_lies_in_it_do_not_matter(lm: Any) -> None:
    scorer = OptionScorer(lm, Reading(normalize="mean"))
    batch = lay_options(STATES, scorer.layout)
    before = scorer.q(batch)
    batch.tokens[torch.arange(batch.tokens.shape[1]) >= batch.lengths[:, None]] = 77
    assert scorer.q(batch).tolist() == before.tolist()


def squares(scorer: OptionScorer) -> Any:
    return lambda module, batch: ((scorer.q(batch) - 1).square().sum(), {})


@pytest.mark.parametrize("score", ["logit", "logprob"])
def test_micro_batches_do_not_change_the_gradient(lm: Any, score: Any) -> None:
    scorer = OptionScorer(lm, Reading(score, "mean"))
    found = []
    for tokens_per_pass in (1000, 8):
        lm.zero_grad()
        for part in lay_options(STATES, scorer.layout).split(tokens_per_pass):
            squares(scorer)(lm, part)[0].backward()
        found.append([parameter.grad.clone() for parameter in lm.parameters()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert all(gradient.abs().sum() > 0 for gradient in found[0])
    lm.zero_grad()


@pytest.mark.parametrize("adapter", [False, True])
def test_the_target_is_another_object_that_lags(adapter: bool) -> None:
    base = small()
    if adapter:
        base = lora.attach(base, LoraConfig(rank=2, dropout=0.5))
    scorer = OptionScorer(base, Reading().of(NUMBERED))
    target = scorer.target()
    before = values(scorer, STATES)
    assert values(target, STATES) == before
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert not target.training, "nothing is dropped"
    learner = Learner(base, OptimConfig(lr=1e-2))
    for _ in range(2):  # one half of an adapter begins at zero: the other one's gradient comes a step later
        learner.update([lay_options(STATES, scorer.layout)], squares(scorer))
    assert values(target, STATES) == before
    after = values(scorer, STATES)
    assert all(one != other for one, other in zip(after, before, strict=True))
    own = {parameter.data_ptr() for parameter in scorer.parameters() if parameter.requires_grad}
    assert not own & {parameter.data_ptr() for parameter in target.parameters()}
    bellman.hard_copy_(target, scorer)
    assert values(target, STATES) == after


def test_a_target_of_an_adapter_shares_the_frozen_weights() -> None:
    base = lora.attach(small(), LoraConfig(rank=2))
    scorer = OptionScorer(base)
    frozen = {parameter.data_ptr() for parameter in scorer.parameters() if not parameter.requires_grad}
    held = {parameter.data_ptr() for parameter in scorer.target().parameters()}
    assert frozen <= held
    assert len(held - frozen) == sum(parameter.requires_grad for parameter in scorer.parameters())


@pytest.mark.parametrize("adapter", [False, True])
def test_a_strategist_that_was_saved_is_an_ordinary_model_and_says_the_same(tmp_path: Path, adapter: bool) -> None:
    small().save_pretrained(tmp_path / "base")
    base: Any = load_lm(str(tmp_path / "base"), device="cpu")
    if adapter:
        base = lora.attach(base, LoraConfig(rank=2))
    reading = Reading("logprob", "informative", scale=3.0, shift=0.25).of(NUMBERED)
    inventory = Inventory(("ask", "tell", "wait", "go"))
    scorer = OptionScorer(base, reading)
    learner = Learner(base, OptimConfig(lr=1e-2))
    learner.update([lay_options(STATES, scorer.layout)], squares(scorer))
    learner.save(tmp_path / "saved")
    scorer.describe(tmp_path / "saved", inventory)
    assert read_description(tmp_path / "saved") == (reading, inventory)
    loaded = OptionScorer(load_lm(str(tmp_path / "saved"), device="cpu"), read_description(tmp_path / "saved")[0])
    assert values(loaded, STATES) == values(scorer, STATES)


def test_a_folder_without_a_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no strategist.json that can be read, so nothing says how"):
        read_description(tmp_path)


CORPUS = ["Choose (1) or (2) or (3).", "(10) (11) (12)"]
ASKED = [{"role": "user", "content": "Choose."}]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny(CORPUS, vocab_size=300, hidden=16, layers=1, heads=2)[1])


def test_options_are_spelled_as_they_follow_the_cue(renderer: Renderer) -> None:
    spelled = spell(renderer, Inventory(("ask", "tell")), ASKED)  # type: ignore[arg-type]
    assert [renderer.decode(option) for option in spelled] == ["(1)", "(2)"]
    prompt = renderer.render(ASKED)  # type: ignore[arg-type]
    text = renderer.tokenizer.decode([*prompt, *spelled[0]])
    assert renderer.tokenizer.encode(text, add_special_tokens=False) == [*prompt, *spelled[0]]


def test_options_that_are_the_same_tokens_are_refused(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = renderer.tokenizer.encode
    monkeypatch.setattr(renderer.tokenizer, "encode", lambda text, **k: encode(text.replace("B", "A"), **k))
    with pytest.raises(DataError, match=r"options: 'A' and 'B' are the same tokens \['A'\], so nothing tells them"):
        spell(renderer, Inventory(("ask", "tell"), ("A", "B")), ASKED)  # type: ignore[arg-type]


def test_an_option_that_is_split_differently_after_the_cue_is_refused() -> None:
    tokenizer = tiny(["answer:(1) answer:(1) answer:(2)"] * 9, vocab_size=320, hidden=16, layers=1, heads=2)[1]
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}answer:{% endif %}" + (
        "{% if messages | length > 1 %}answer:{{ messages[1]['content'] }}<|end|>{% endif %}"
    )
    cue = tokenizer.encode("answer:", add_special_tokens=False)
    assert tokenizer.encode("answer:(1)", add_special_tokens=False)[: len(cue)] != cue
    with pytest.raises(DataError, match=r"options: '\(1\)' alone is .* and where it is the answer the text ends with"):
        spell(Renderer(tokenizer), Inventory(("ask", "tell")), ASKED)  # type: ignore[arg-type]
