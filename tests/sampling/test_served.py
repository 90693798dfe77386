"""A server that speaks as `vllm serve` does, and has its faults: what is asked of it, what is said of it.

The last tests ask vLLM's own server.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from echelon import cli
from echelon.config import LoraConfig, OptimConfig, SamplingConfig, ServerConfig
from echelon.data.packing import Sampled, pack
from echelon.errors import ConfigError, DataError, RolloutError
from echelon.models import lora
from echelon.models.lm import token_logprobs
from echelon.models.lora import AdapterView
from echelon.rollout.setup import open_sampler
from echelon.sampling import served
from echelon.sampling.served import ServedSampler
from echelon.train.learner import Learner
from echelon.train.on_ray import held_port
from echelon.types import SamplingParams
from tests.sampling.conformance import check_sampler
from tests.sampling.test_vllm import ask, check_feedback_trains, ids, mismatch, small
from tests.sampling.test_vllm_server import _answers

GENERATE = "/inference/v1/generate"


class Stand(ThreadingHTTPServer):
    """Answers as vLLM's server: it has a model, reads weights from a folder, and knows what they are called."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.module = small(seed=9)[0].eval()
        self.label, self.room = "default", 160
        self.paths: list[str] = []
        self.read: list[Path] = []
        self.faults: dict[str, list[Any]] = {}
        """Path → what becomes of the next requests there: a status, with or without a text, or a function."""
        self.raw = False
        self.forgets = True
        self.adapters: dict[str, Path] = {}
        self.room_for = 1
        """Adapters that it holds at once; others it reads again when they are asked."""
        self.resident: dict[str, Any] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path: str, body: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "base", "max_model_len": self.room}]}
        if path == "/weight_info":
            return {"weight_version": self.label}
        if path == "/collective_rpc":
            return self.reload(Path(body["kwargs"]["weights_path"]), body["method"])
        if path == "/reset_prefix_cache":
            return {"success": self.forgets}
        if path == "/update_weight_version":
            self.label = body["new_version"]
            return {"success": True}
        if path == "/v1/load_lora_adapter":
            assert body["lora_name"] not in self.adapters
            self.adapters[body["lora_name"]] = Path(body["lora_path"])
            self.adapted(body["lora_name"])
            return "Success"
        if path == "/v1/unload_lora_adapter":
            return str(self.adapters.pop(body["lora_name"]))
        return self.draw(body)

    def adapted(self, name: str) -> Any:
        """The model with this adapter, whose files it reads where it does not hold it."""
        if name not in self.resident:
            while len(self.resident) >= self.room_for:
                del self.resident[next(iter(self.resident))]
            self.resident[name] = lora.load(copy.deepcopy(self.module), str(self.adapters[name])).eval()
        return self.resident[name]

    def reload(self, folder: Path, method: str) -> Any:
        assert method == "reload_weights"
        found: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            found |= load_file(file)
        self.module.load_state_dict(found)
        self.resident.clear()
        self.read.append(folder)
        return {"results": [None]}

    @torch.no_grad()
    def draw(self, body: Any) -> Any:
        asked, content = body["sampling_params"], []
        module = self.module if body["model"] == "base" else self.adapted(body["model"])
        ids_T, heat = list(body["token_ids"]), asked["temperature"]
        generator = torch.Generator().manual_seed(asked["seed"] % 2**63)
        for _ in range(asked["max_tokens"]):
            logits = module(input_ids=torch.tensor([ids_T])).logits[0, -1]
            probabilities = torch.softmax(logits / (heat or 1.0), -1)
            token = int(logits.argmax() if heat == 0 else torch.multinomial(probabilities, 1, generator=generator))
            said = torch.softmax(logits, -1) if self.raw else probabilities
            content.append({"token_id": token, "logprob": float(said[token].log()), "rank": 1, "top_logprobs": []})
            ids_T.append(token)
            if token in asked["stop_token_ids"]:
                break
        tokens = ids_T[len(body["token_ids"]) :]
        spans = [{"version": self.label, "start": 0, "end": len(tokens)}]
        choice = {"index": 0, "token_ids": tokens, "logprobs": {"content": content}, "weight_versions": spans}
        return {"request_id": "1", "model": body["model"], "choices": [choice]}


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.reply(None)

    def do_POST(self) -> None:
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}"))

    def reply(self, body: Any) -> None:
        stand: Stand = self.server  # type: ignore[assignment]
        stand.paths.append(self.path)
        fault = stand.faults.get(self.path, [])
        fault = fault.pop(0) if fault else None
        if fault == "drop":
            self.connection.close()
            return
        if fault == "hang":
            time.sleep(3)
            return
        status, said = (fault if isinstance(fault, tuple) else (200, None)) if not callable(fault) else (200, None)
        found = said if status != 200 else stand.answer(self.path, body)
        if callable(fault):
            found = fault(found)
        data = (found if isinstance(found, str) else json.dumps(found)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the console."""


@pytest.fixture
def stand() -> Iterator[Stand]:
    server = Stand()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "BACKOFF", 0.01)


def opened(stand: Any, folder: Path, module: Any = None, *, apart: bool = False, **settings: Any) -> ServedSampler:
    model, tokenizer = small()
    server = ServerConfig(url=stand.url, folder=str(folder), timeout=60.0)
    return ServedSampler(module or model, tokenizer, replace(server, **settings), longest=160, apart=apart)


ONE = (ids(7, 1), SamplingParams(max_tokens=6, temperature=0.7, seed=3))


def test_it_keeps_the_promises_of_a_sampler(stand: Stand, tmp_path: Path) -> None:
    sampler = opened(stand, tmp_path)
    texts = ["what is in the box?", "a", "a cat, a hat, a bat. what is in", "the box"]
    prompts = [sampler.tokenizer.encode(text) for text in texts]
    asyncio.run(check_sampler(sampler, sampler.tokenizer, prompts, stop_id=sampler.tokenizer.eos_token_id, length=8))
    assert sampler.idle


def test_each_load_is_read_named_and_forgotten_with_and_leaves_no_file(stand: Stand, tmp_path: Path) -> None:
    module, _ = small(seed=4)
    sampler = opened(stand, tmp_path / "new", module)
    first = ask(sampler, [ONE])
    assert stand.paths == [
        *("/v1/models", "/weight_info"),
        *("/collective_rpc", "/reset_prefix_cache", "/update_weight_version"),
        *(GENERATE, GENERATE),  # it reads as the module, and draws from what it says
        GENERATE,
    ]
    assert mismatch(module, [ONE], first, 0.7) <= 1e-4
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    stand.paths.clear()
    before = stand.label
    sampler.load(module.state_dict().items(), 5)
    assert stand.paths == ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version"]
    assert stand.label != before
    (said,) = ask(sampler, [ONE])
    assert said.version == 5
    assert mismatch(module, [ONE], [said], 0.7) <= 1e-4
    assert len(set(stand.read)) == 2
    assert list((tmp_path / "new").iterdir()) == []


def test_an_adapter_is_folded_into_what_the_server_reads(stand: Stand, tmp_path: Path) -> None:
    adapted = lora.attach(small(seed=1)[0], LoraConfig(rank=4))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            weight.add_(0.3 * torch.randn_like(weight) if "lora_B" in name else 0.0)
    said = ask(opened(stand, tmp_path, adapted), [ONE])
    assert mismatch(adapted, [ONE], said, 0.7) <= 1e-4
    with lora.off(adapted):
        assert mismatch(adapted, [ONE], said, 0.7) > 0.05


def moved(view: Any) -> Any:
    """What says something else than before."""
    with torch.no_grad():
        for name, weight in view.named_parameters():
            weight.add_(0.3 * torch.randn_like(weight) if "lora_" in name else 0.0)
    return view


def two_levels(seed: int = 0) -> dict[str, AdapterView]:
    model = lora.attach(small(seed=seed)[0], LoraConfig(rank=4, alpha=8), name="high")
    model = lora.attach(model, LoraConfig(rank=12), name="low")
    return {name: AdapterView(model, name) for name in ("high", "low")}


LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def test_with_adapters_apart_the_base_is_read_once_and_then_the_adapter_alone(stand: Stand, tmp_path: Path) -> None:
    module = moved(lora.attach(small(seed=4)[0], LoraConfig(rank=4)))
    sampler = opened(stand, tmp_path, module, apart=True)
    first = ask(sampler, [ONE])
    assert stand.paths == [
        *("/v1/models", "/weight_info"),
        *("/collective_rpc", "/reset_prefix_cache", "/update_weight_version"),
        *(LOAD, GENERATE, GENERATE),  # it reads as the module
        GENERATE,
    ]
    assert mismatch(module, [ONE], first, 0.7) <= 1e-4
    (name,), label = stand.adapters, stand.label
    stand.paths.clear()
    sampler.load(moved(module).state_dict().items(), 5)
    assert stand.paths == [LOAD, UNLOAD]
    assert (stand.label, name in stand.adapters, len(stand.adapters)) == (label, False, 1)
    (said,) = ask(sampler, [ONE])
    assert said.version == 5
    assert mismatch(module, [ONE], [said], 0.7) <= 1e-4
    assert mismatch(module, [ONE], first, 0.7) > 0.05
    assert [*tmp_path.iterdir()] == [*stand.adapters.values()], "it may read them again"
    del sampler
    assert [*tmp_path.iterdir()] == [*stand.adapters] == []


@pytest.mark.parametrize("room", [1, 2])
def test_levels_on_one_base_ask_one_server_each_with_its_own_adapter(stand: Stand, tmp_path: Path, room: int) -> None:
    stand.room_for = room
    views = {name: moved(view) for name, view in two_levels().items()}
    samplers = {name: opened(stand, tmp_path, view, apart=True) for name, view in views.items()}
    for version in range(2):
        said = {name: ask(sampler, [ONE]) for name, sampler in samplers.items()}
        assert {found[0].version for found in said.values()} == {version}
        for name, view in views.items():
            assert mismatch(view, [ONE], said[name], 0.7) <= 1e-4
            assert mismatch(views["low" if name == "high" else "high"], [ONE], said[name], 0.7) > 0.05
        moved(views["high"])
        assert mismatch(views["high"], [ONE], said["high"], 0.7) > 0.05
        samplers["high"].load(views["high"].state_dict().items(), version + 1)
        samplers["low"].load(iter(()), version + 1)
    assert len(stand.read) == 1, "the base, once for both"


def test_an_adapter_is_compared_with_the_modules_when_it_first_says_anything(stand: Stand, tmp_path: Path) -> None:
    module = lora.attach(small(seed=4)[0], LoraConfig(rank=4))
    sampler = opened(stand, tmp_path, module, apart=True)
    ask(sampler, [ONE])
    checks = []
    for version in range(3):
        stand.paths.clear()
        sampler.load(moved(module).state_dict().items() if version else module.state_dict().items(), version)
        checks.append(stand.paths.count(GENERATE))
    assert checks == [2, 2, 0]


def test_rollouts_ahead_may_have_an_adapter_of_their_own(stand: Stand, tmp_path: Path) -> None:
    module = moved(lora.attach(small(seed=4)[0], LoraConfig(rank=4)))
    then, now = (opened(stand, tmp_path, module, apart=True) for _ in range(2))
    before = ask(then, [ONE])
    moved(module)
    after = ask(now, [ONE])
    assert mismatch(module, [ONE], after, 0.7) <= 1e-4
    assert mismatch(module, [ONE], before, 0.7) > 0.05
    assert ask(then, [ONE]) == before


@pytest.mark.parametrize("other", ["a base of its own", "whole weights"])
def test_adapters_of_another_base_do_not_go_into_one_server(stand: Stand, tmp_path: Path, other: str) -> None:
    ask(opened_first := opened(stand, tmp_path, two_levels()["high"], apart=True), [ONE])
    module: Any = two_levels(seed=3)["high"] if other == "a base of its own" else opened_first.module
    with pytest.raises(ConfigError, match=r"would load them into one server\. Give each a server"):
        ask(opened(stand, tmp_path, module, apart=other == "a base of its own"), [ONE])
    assert len(ask(opened_first, [ONE])) == 1


NO_ROUTE = (404, '{"detail": "Not Found"}')
NO_FLAG = (500, '{"error": {"message": "Call to add_lora method failed: LoRA is not enabled. Use --enable-lora to"}}')
NARROW = (500, '{"error": {"message": "Call failed: LoRA rank 12 is greater than max_lora_rank 8."}}')
NO_FILE = (404, '{"error": {"message": "Loading lora x failed: No adapter found for /weights/x"}}')


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (NO_ROUTE, ConfigError, "takes no adapters. Start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its"),
        (NO_FLAG, ConfigError, "takes no adapters. Start it with --enable-lora --max-lora-rank 12, or the next it"),
        (NARROW, ConfigError, "takes no adapter of rank 12. Start it with --max-lora-rank 12, or the next it knows"),
        (NO_FILE, RolloutError, r"does not take the adapter in /.* \(status 404: .* No adapter found .*the same name"),
    ],
    ids=["not switched on", "not enabled", "narrow", "no folder"],
)
def test_a_server_that_takes_no_adapter_is_refused_in_one_line(
    stand: Stand, tmp_path: Path, fault: Any, kind: type[Exception], message: str
) -> None:
    stand.faults[LOAD] = [fault]
    sampler = opened(stand, tmp_path, two_levels()["low"], apart=True)
    with pytest.raises(kind, match=message) as found:
        ask(sampler, [ONE])
    assert "\n" not in str(found.value)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    assert ask(sampler, [ONE]), "it is given anew to one that does"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((404, '{"error": {"message": "The model `x` does not exist."}}'), "has no adapter .* any more, which it was"),
        (lambda found: {**found, "model": "base"}, r"weights .*base in place of \w+-2.*, and the server was given"),
        (lambda found: found | {"choices": [found["choices"][0] | {"weight_versions": MIXED}]}, "new and old, and the"),
    ],
    ids=["restarted", "the base", "another base"],
)
def test_an_adapter_that_is_gone_is_one_line(stand: Stand, tmp_path: Path, fault: Any, message: str) -> None:
    sampler = opened(stand, tmp_path, two_levels()["low"], apart=True)
    ask(sampler, [ONE])
    stand.faults[GENERATE] = [fault]
    with pytest.raises(RolloutError, match=message) as found:
        ask(sampler, [ONE])
    assert "\n" not in str(found.value)


def test_what_is_no_adapter_is_refused(stand: Stand, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampling\.adapters = apart: LlamaForCausalLM has no adapter"):
        opened(stand, tmp_path, apart=True)
    full = lora.attach(small()[0], LoraConfig(rank=2, modules_to_save=("norm",)))
    with pytest.raises(ConfigError, match=r"lora\.modules_to_save = norm trains layers in full"):
        opened(stand, tmp_path, full, apart=True)
    adapted, folder = moved(lora.attach(small()[0], LoraConfig(rank=2))), tmp_path / "w"
    sampler = opened(stand, folder, adapted, apart=True)
    ask(sampler, [ONE])
    folder.rename(tmp_path / "gone")
    folder.touch()
    with pytest.raises(ConfigError, match=r"sampling\.server\.folder = .*/w: weights cannot be written there"):
        sampler.load(adapted.state_dict().items(), 1)
    assert ask(sampler, [ONE])[0].version == 0, "what was not handed over does not speak"


def test_weights_are_written_in_parts(stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "PART", 1 << 14)
    parts: list[int] = []
    reload = stand.reload
    count = lambda folder, method: (parts.append(len([*folder.glob("*.safetensors")])), reload(folder, method))[1]  # noqa: E731
    monkeypatch.setattr(stand, "reload", count)
    sampler = opened(stand, tmp_path)
    assert mismatch(sampler.module, [ONE], ask(sampler, [ONE]), 0.7) <= 1e-4
    assert parts[0] > 3


def test_a_connection_that_breaks_and_a_busy_server_are_asked_again(stand: Stand, tmp_path: Path) -> None:
    sampler = opened(stand, tmp_path)
    usual = ask(sampler, [ONE])
    stand.faults[GENERATE] = ["drop", (503, "busy"), (429, "busy"), "drop"]
    stand.paths.clear()
    assert ask(sampler, [ONE]) == usual
    assert stand.paths == [GENERATE] * 5


def test_a_server_may_first_drop_what_was_given_up(stand: Stand, tmp_path: Path) -> None:
    stand.faults["/reset_prefix_cache"] = [lambda found: {"success": False}] * 2
    ask(opened(stand, tmp_path), [ONE])
    assert stand.paths.count("/reset_prefix_cache") == 3


def test_no_more_is_asked_at_once_than_may_be(stand: Stand, tmp_path: Path) -> None:
    sampler = opened(stand, tmp_path, in_flight=2)
    ask(sampler, [ONE])
    under_way, most, lock, draw = [0], [0], threading.Lock(), stand.draw

    def counted(body: Any) -> Any:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        time.sleep(0.02)
        with lock:
            under_way[0] -= 1
        return draw(body)

    stand.draw = counted  # type: ignore[method-assign]
    ask(sampler, [ONE] * 6)
    assert most == [2]


def spoilt(**change: Any) -> Callable[[Any], Any]:
    """An answer with another choice."""
    return lambda found: {**found, "choices": [{**found["choices"][0], **change}]}


MIXED = [{"version": "old", "start": 0, "end": 2}, {"version": "new", "start": 2, "end": 6}]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda stand: setattr(stand, "label", "default"), r"drawn with the weights default, and the server was given"),
        (
            lambda stand: stand.faults.update({GENERATE: [spoilt(weight_versions=MIXED)]}),
            "weights new and old, and the",
        ),
        (
            lambda stand: stand.faults.update({GENERATE: [spoilt(weight_versions=None)]}),
            "without tokens, log-probs and",
        ),
        (lambda stand: stand.faults.update({GENERATE: ["drop"] * 5}), "no vLLM server answers there"),
        (
            lambda stand: stand.faults.update({GENERATE: ["hang"]}),
            "no answer within 0.5 s. Raise sampling.server.timeout",
        ),
        (
            lambda stand: stand.faults.update({GENERATE: [(500, "the engine died")]}),
            r"status 500: the engine died\. See",
        ),
    ],
    ids=["restarted", "mixed", "nameless", "gone", "slow", "broken"],
)
def test_a_server_that_is_stale_or_gone_is_one_line(
    stand: Stand, tmp_path: Path, fault: Callable[[Stand], None], message: str
) -> None:
    sampler = opened(stand, tmp_path)
    ask(sampler, [ONE])
    sampler.server = replace(sampler.server, timeout=0.5 if "0.5" in message else 60.0)
    fault(stand)
    with pytest.raises(RolloutError, match=message) as found:
        ask(sampler, [ONE])
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ({"/v1/models": [(404, "")]}, RolloutError, "what answers there is no vLLM server"),
        ({"/v1/models": [lambda found: "<html>"]}, RolloutError, "what answers at /v1/models is no vLLM server"),
        ({"/weight_info": [(404, "")]}, ConfigError, "takes no weights. Start it with VLLM_SERVER_DEV_MODE=1"),
        (
            {GENERATE: [(403, "Scale-out is off")]},
            ConfigError,
            "answers no token ids. Start it with --enable-scale-out",
        ),
        ({"/collective_rpc": [(500, "no\nsuch file")]}, RolloutError, r"cannot read the weights in .*: no such file\)"),
        ({"room": 50}, ConfigError, "room for 50 tokens, .* up to 160. Start it with --max-model-len 160"),
        ({"forgets": False}, RolloutError, "does not forget what it has read with older weights"),
        ({"raw": True}, ConfigError, "Start it with --logprobs-mode processed_logprobs"),
        ({"reload": lambda folder, method: {}}, DataError, "computes other log-probabilities than the model itself"),
    ],
    ids=["a 404", "a page", "no dev mode", "no ids", "no folder", "short", "busy", "raw", "another model"],
)
def test_a_server_that_cannot_serve_is_refused_in_one_line(
    stand: Stand, tmp_path: Path, fault: dict[str, Any], kind: type[Exception], message: str
) -> None:
    for name, value in fault.items():
        stand.faults.update({name: value}) if name.startswith("/") else setattr(stand, name, value)
    with pytest.raises(kind, match=message) as found:
        ask(opened(stand, tmp_path), [ONE])
    assert "\n" not in str(found.value)
    assert list(tmp_path.iterdir()) == [], "no weights are left behind"


def test_what_vllm_refuses_and_what_does_not_fit_is_one_line(stand: Stand, tmp_path: Path) -> None:
    sampler = opened(stand, tmp_path)
    ask(sampler, [ONE])
    stand.faults[GENERATE] = [(400, '{"error": {"message": "top_p must be\\n in (0, 1]"}}')]
    with pytest.raises(ConfigError, match=r"refuses the request: .*top_p must be"):
        ask(sampler, [(ONE[0], replace(ONE[1], top_p=0.0))])
    with pytest.raises(ConfigError, match=r"temperature = 0\.001: vLLM draws at 0\.01 or more"):
        ask(sampler, [(ONE[0], replace(ONE[1], temperature=0.001))])
    with pytest.raises(RolloutError, match="do not fit the 160 tokens"):
        ask(sampler, [(ids(150, 1), replace(ONE[1], max_tokens=11))])


def test_two_sets_of_weights_do_not_go_into_one_server(stand: Stand, tmp_path: Path) -> None:
    one, other = opened(stand, tmp_path), opened(stand, tmp_path)
    ask(one, [ONE])
    with pytest.raises(ConfigError, match=r"would load them into one server\. Give each a server"):
        ask(other, [ONE])
    del one
    assert ask(other, [ONE])


def test_weights_do_not_change_under_a_completion(stand: Stand, tmp_path: Path) -> None:
    sampler = opened(stand, tmp_path)

    async def load_in_between() -> None:
        asked = asyncio.ensure_future(sampler.sample(*ONE))
        await asyncio.sleep(0)
        with pytest.raises(AssertionError, match="weights change between rollouts"):
            sampler.load(sampler.module.state_dict().items(), 2)
        await asked

    asyncio.run(load_in_between())


def test_what_no_server_can_be_given_is_refused(stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"sampling\.server\.folder = /proc/no: weights cannot be written there"):
        ask(opened(stand, Path("/proc/no")), [ONE])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"sampling\.sampler = server: .* this run has 2 ranks"):
        opened(stand, tmp_path)


def flags(folder: Path, url: str) -> list[str]:
    module, tokenizer = small()
    module.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = f"grpo --model.path {folder}/model --out {folder}/run --env guess_number --env-settings low=1 high=4"
    words += " max_turns=1 --steps 2 --tasks-per-step 2 --group-size 2 --sampling.max-tokens 4 --threads 1"
    words += f" --sampling.max-prompt-tokens 100 --sampler server --sampling.server.url {url}"
    return [*words.split(), "--sampling.server.folder", str(folder / "weights")]


def test_grpo_learns_on_what_a_server_says_and_ends_in_a_line_where_none_is(
    stand: Stand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trains(tmp_path, stand.url)
    assert len({*stand.read}) == 3, "at the start, and after each of two steps"
    capsys.readouterr()
    assert cli.main([*flags(tmp_path / "more", "http://127.0.0.1:9"), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("http://127.0.0.1:9: no vLLM server answers there (")


def trains(folder: Path, url: str) -> None:
    """Two steps of `grpo`, in which the server's log-probs are the trainer's."""
    assert cli.main(flags(folder, url)) == 0
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["policy/first_mismatch"] <= 1e-4 for row in rows), rows


def test_the_settings_open_it(stand: Stand, tmp_path: Path) -> None:
    module, tokenizer = small()
    server = ServerConfig(url=f"{stand.url}/", folder=str(tmp_path))
    settings = SamplingConfig(sampler="server", server=server, max_prompt_tokens=60)
    sampler = open_sampler(module, tokenizer, settings)
    assert isinstance(sampler, ServedSampler)
    assert (sampler.url, sampler.longest) == (stand.url, 92)
    sampler = open_sampler(two_levels()["high"], tokenizer, replace(settings, adapters="apart"))
    ask(sampler, [ONE])  # type: ignore[arg-type]
    assert len(stand.adapters) == 1


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's own server, as the page about scaling starts it."""
    yield from serving(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def lora_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same for adapters, of which it holds two at once."""
    words = "--enable-lora --max-loras 2 --max-lora-rank 16"
    yield from serving(tmp_path_factory.mktemp("lora"), *words.split(), VLLM_ALLOW_RUNTIME_LORA_UPDATING="1")


def serving(folder: Path, *flags: str, **environment: str) -> Iterator[str]:
    module, tokenizer = small(seed=8)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    held = held_port()
    port = held.getsockname()[1]
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    words += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "160", "--max-num-seqs", "8"]
    words += ["--enable-scale-out", "--logprobs-mode", "processed_logprobs", "--enforce-eager", *flags]
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(words, env=os.environ | variables | environment, stdout=log, stderr=subprocess.STDOUT)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 560
    try:
        while not _answers(f"{url}/health"):
            assert server.poll() is None, (folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < until, "it did not begin to answer"
            time.sleep(0.5)
        yield url
    finally:
        held.close()
        server.terminate()
        server.wait(60)


@pytest.mark.vllm
@needs_vllm
def test_log_probs_of_vllms_server_are_the_trainers_after_each_update(vllm_server: str, tmp_path: Path) -> None:
    module, tokenizer = small()
    sampler = ServedSampler(module, tokenizer, ServerConfig(url=vllm_server, folder=str(tmp_path)), longest=160)
    learner = Learner(module, OptimConfig(lr=3e-2))
    requests = [(ids(70 + n, n), SamplingParams(max_tokens=8, temperature=0.7, seed=2**62 + n)) for n in range(3)]
    told = []
    for update in range(5):
        said = ask(sampler, requests)
        assert mismatch(module, requests, said, 0.7) <= 1e-4, f"after {update} updates, by what was read before"
        assert {each.version for each in said} == {update}
        told.append([each.tokens for each in said])
        batch = pack([Sampled(p, each.tokens, each.logprobs) for (p, _), each in zip(requests, said, strict=True)])
        learner.update([batch], lambda module, part: (-token_logprobs(module, part).sum() / 40, {}))
        sampler.load(learner.weights(), learner.version)
    assert told[0] != told[-1], "the updates changed what is said"
    prompts = [tokenizer.encode(text) for text in ("what is in the box?", "a cat, a hat", "the box", "a")]
    asyncio.run(check_sampler(sampler, tokenizer, prompts, stop_id=tokenizer.eos_token_id, length=12))
    sampler._call("POST", "/update_weight_version", {"new_version": "another"})
    with pytest.raises(RolloutError, match="drawn with the weights another, and the server was given"):
        ask(sampler, requests)
    with pytest.raises(ConfigError, match=r"refuses the request: .*top_p"):
        ask(sampler, [(ids(5, 1), SamplingParams(top_p=0.0))])


@pytest.mark.vllm
@needs_vllm
def test_grpo_trains_on_what_vllms_server_says(vllm_server: str, tmp_path: Path) -> None:
    trains(tmp_path, vllm_server)


@pytest.mark.vllm
@needs_vllm
def test_log_probs_of_vllms_server_are_the_trainers_for_each_adapter_after_each_update(
    lora_server: str, tmp_path: Path
) -> None:
    """Three adapters, one more than the server holds: it reads them again, and answers all at once nevertheless."""
    views, tokenizer = two_levels(), small()[1]
    server = ServerConfig(url=lora_server, folder=str(tmp_path))
    views["ahead"] = copy.deepcopy(moved(views["high"]))
    samplers = {name: ServedSampler(view, tokenizer, server, longest=160, apart=True) for name, view in views.items()}
    learner = Learner(views["high"], OptimConfig(lr=1e-2))
    requests = [(ids(70 + n, n), SamplingParams(max_tokens=8, temperature=0.7, seed=2**62 + n)) for n in range(3)]
    told = []

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(place.sample(*each) for place in samplers.values() for each in requests))

    for update in range(4):
        answers = asyncio.run(all_at_once())
        said = {name: answers[3 * at : 3 * at + 3] for at, name in enumerate(samplers)}
        for name, view in views.items():
            assert mismatch(view, requests, said[name], 0.7) <= 1e-4, f"{name}, after {update} updates"
        assert {each.version for each in said["high"]} == {update}
        told.append({name: [each.tokens for each in found] for name, found in said.items()})
        batch = pack([Sampled(p, c.tokens, c.logprobs) for (p, _), c in zip(requests, said["high"], strict=True)])
        learner.update([batch], lambda module, part: (-token_logprobs(module, part).sum() / 40, {}))
        samplers["high"].load(learner.weights(), learner.version)
    assert told[0]["high"] != told[-1]["high"], "the updates changed what is said"
    assert [told[0][name] for name in ("low", "ahead")] == [told[-1][name] for name in ("low", "ahead")]
    served_there = [card["id"] for card in samplers["low"]._call("GET", "/v1/models")["data"]]
    assert sorted(served_there[1:]) == sorted(sampler._called for sampler in samplers.values())
    prompts = [tokenizer.encode(text) for text in ("what is in the box?", "a cat, a hat", "the box", "a")]
    asyncio.run(check_sampler(samplers["low"], tokenizer, prompts, stop_id=tokenizer.eos_token_id, length=12))
    wide = AdapterView(lora.attach(views["low"].model, LoraConfig(rank=20), name="wide"), "wide")
    with pytest.raises(ConfigError, match=r"takes no adapter of rank 20\. Start it with --max-lora-rank 20, or"):
        ask(ServedSampler(wide, tokenizer, server, longest=160, apart=True), requests)
    served._take_back(lora_server, samplers["low"]._called, tmp_path / "nowhere")
    with pytest.raises(RolloutError, match=r"has no adapter .* any more, which it was given"):
        ask(samplers["low"], requests)
    assert mismatch(views["high"], requests, ask(samplers["high"], requests), 0.7) <= 1e-4


@pytest.mark.vllm
@needs_vllm
def test_both_levels_of_feedback_train_through_one_server(lora_server: str, tmp_path: Path) -> None:
    check_feedback_trains(tmp_path, "server", **{"server.url": lora_server, "server.folder": tmp_path / "weights"})
    assert list((tmp_path / "weights").iterdir()) == []


@pytest.mark.vllm
@needs_vllm
def test_vllms_server_as_it_is_otherwise_takes_no_adapter(vllm_server: str, tmp_path: Path) -> None:
    server, view = ServerConfig(url=vllm_server, folder=str(tmp_path)), two_levels()["low"]
    with pytest.raises(ConfigError, match=r"takes no adapters\. Start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        ask(ServedSampler(view, small()[1], server, longest=160, apart=True), [ONE])
    assert list(tmp_path.iterdir()) == []
