"""vLLM's own server, asked over HTTP: through faults, with its tokens counted, and as a player of an evaluation."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from echelon import cli
from echelon.models.lm import tiny
from echelon.sampling.endpoint import open_endpoint
from echelon.train.on_ray import held_port
from echelon.types import Message, SamplingParams
from tests.text.test_endpoint import Server, serve

__all__ = ["serve"]

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

ASKED = [Message(role="user", content="a cat")]


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's OpenAI-compatible server with a tiny model named "tiny": where its API begins."""
    folder = tmp_path_factory.mktemp("served")
    module, tokenizer = tiny(["a cat, a hat, a bat."], vocab_size=300, hidden=64, layers=2, heads=2, max_positions=2048)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    held = held_port()
    port = held.getsockname()[1]
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    words += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    words += ["--max-model-len", "2048", "--max-num-seqs", "4", "--enforce-eager"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 560
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, (folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < until, "it did not begin to answer"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        held.close()
        server.terminate()
        server.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


class Front(Server):
    """What the world sees of another server: its bodies word for word, and faults of its own."""

    def __init__(self, *faults: object, behind: str) -> None:
        super().__init__(*faults)
        self.faults += [""] * 99
        self.behind = behind
        self.RequestHandlerClass = type("Handler", (self.RequestHandlerClass,), {"answer": _forward})


def _forward(handler: object, fault: object) -> None:
    server: Front = handler.server  # type: ignore[attr-defined]
    if not fault:
        body = json.dumps(server.bodies[-1]).encode()
        asked = urllib.request.Request(f"{server.behind}/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as response:
            fault = response.read().decode()
    super(type(handler), handler).answer(fault)  # type: ignore[misc]


def test_its_answers_come_through_faults_and_its_tokens_are_counted(
    vllm_server: str, serve: Callable[..., Server]
) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.0)
    plain = open_endpoint({"url": vllm_server, "model": "tiny", "timeout": 60.0}, params)
    said = asyncio.run(plain.say(ASKED, seed=3))
    front = serve(503, "cut", "{", "drop", {"Retry-After": "0"}, kind=Front, behind=vllm_server)
    faulty = open_endpoint({"url": front.url, "model": "tiny", "backoff": 0.01, "retries": 6, "timeout": 60.0}, params)
    assert asyncio.run(faulty.say(ASKED, seed=3)) == said
    counts, usual = faulty.endpoint.counts, plain.endpoint.counts
    assert counts["retried"] == 5
    assert counts["prompt_tokens"] == usual["prompt_tokens"] > 0
    assert 0 < counts["completion_tokens"] == usual["completion_tokens"] <= 8


def test_a_begun_message_is_gone_on_with(vllm_server: str) -> None:
    settings = {"url": vllm_server, "model": "tiny", "opening": "continue", "timeout": 60.0}
    sampler = open_endpoint(settings, SamplingParams(max_tokens=4, temperature=0.0))
    begun = [*ASKED, Message(role="assistant", content="a hat, a b")]
    asyncio.run(sampler.say(begun, seed=0))
    read = sampler.endpoint.counts["prompt_tokens"]
    asyncio.run(sampler.say([*ASKED, Message(role="assistant", content="a hat, a b" * 2)], seed=0))
    assert sampler.endpoint.counts["prompt_tokens"] > 2 * read, "what was begun is part of the prompt"


def test_it_plays_an_evaluation_whose_summary_counts_its_tokens(vllm_server: str, tmp_path: Path) -> None:
    words = ["evaluate", "--env", "guess_number", "--policy", "api", "--episodes", "2", "--max-turns", "2"]
    words += ["--api", f"url={vllm_server}", "model=tiny", "timeout=60", "--max-tokens", "5"]
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 0
    counted = json.loads((tmp_path / "run" / "summary.json").read_text())["endpoint"]
    assert counted["asked"] == 4
    assert 4 <= counted["completion_tokens"] <= 20 < counted["prompt_tokens"]
