"""A server that speaks as `vllm serve` does, and has its faults: what is asked of it, what is said of it.

The last tests ask vLLM's own server.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import socket
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
from echelon.rollout.setup import open_sampler
from echelon.sampling import served
from echelon.sampling.served import ServedSampler
from echelon.train.learner import Learner
from echelon.types import SamplingParams
from tests.sampling.conformance import check_sampler
from tests.sampling.test_vllm import ask, ids, mismatch, small
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
        return self.draw(body)

    def reload(self, folder: Path, method: str) -> Any:
        assert method == "reload_weights"
        found: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            found |= load_file(file)
        self.module.load_state_dict(found)
        self.read.append(folder)
        return {"results": [None]}

    @torch.no_grad()
    def draw(self, body: Any) -> Any:
        asked, content = body["sampling_params"], []
        ids_T, heat = list(body["token_ids"]), asked["temperature"]
        generator = torch.Generator().manual_seed(asked["seed"] % 2**63)
        for _ in range(asked["max_tokens"]):
            logits = self.module(input_ids=torch.tensor([ids_T])).logits[0, -1]
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
        return {"request_id": "1", "choices": [choice]}


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


def opened(stand: Any, folder: Path, module: Any = None, **settings: Any) -> ServedSampler:
    model, tokenizer = small()
    server = ServerConfig(url=stand.url, folder=str(folder), timeout=60.0)
    return ServedSampler(module or model, tokenizer, replace(server, **settings), longest=160)


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
    learns(tmp_path, stand.url)
    assert len({*stand.read}) == 3, "at the start, and after each of two steps"
    capsys.readouterr()
    assert cli.main([*flags(tmp_path / "more", "http://127.0.0.1:9"), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("http://127.0.0.1:9: no vLLM server answers there (")


def learns(folder: Path, url: str) -> None:
    """Two steps of `grpo`, in which the server's log-probs are the trainer's."""
    assert cli.main(flags(folder, url)) == 0
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["policy/first_mismatch"] <= 1e-4 for row in rows), rows


def test_the_settings_open_it(stand: Stand, tmp_path: Path) -> None:
    module, tokenizer = small()
    server = ServerConfig(url=f"{stand.url}/", folder=str(tmp_path))
    sampler = open_sampler(module, tokenizer, SamplingConfig(sampler="server", server=server, max_prompt_tokens=60))
    assert isinstance(sampler, ServedSampler)
    assert (sampler.url, sampler.longest) == (stand.url, 92)


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's own server, as the page about scaling starts it."""
    folder = tmp_path_factory.mktemp("served")
    module, tokenizer = small(seed=8)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    words += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "160", "--max-num-seqs", "8"]
    words += ["--enable-scale-out", "--logprobs-mode", "processed_logprobs", "--enforce-eager"]
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(words, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 560
    try:
        while not _answers(f"{url}/health"):
            assert server.poll() is None, (folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < until, "it did not begin to answer"
            time.sleep(0.5)
        yield url
    finally:
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
def test_grpo_learns_on_what_vllms_server_says(vllm_server: str, tmp_path: Path) -> None:
    learns(tmp_path, vllm_server)
