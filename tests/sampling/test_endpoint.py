"""A model behind an endpoint as a player: what is sent of a message that was begun, and what its answers are worth."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from echelon.errors import ConfigError
from echelon.sampling.endpoint import EndpointSampler, open_endpoint
from echelon.text.endpoint import Endpoint, Unanswered
from echelon.types import Message, SamplingParams
from tests.text.test_endpoint import Server, serve

__all__ = ["serve"]

ASKED = [Message(role="user", content="<observation>0.5</observation>"), Message(role="assistant", content="<action>")]
Serve = Callable[..., Server]


def said(server: Server, times: int = 1, **settings: object) -> list[str]:
    sampler = EndpointSampler(Endpoint(server.url, "m", backoff=0.01, timeout=5.0), **settings)
    player = sampler.player(seed=3)

    async def ask() -> list[str]:
        return [await player(ASKED) for _ in range(times)]

    return asyncio.run(ask())


def test_a_message_that_was_begun_is_left_out_sent_or_continued(serve: Serve) -> None:
    for opening, messages in (("leave", ASKED[:1]), ("send", ASKED), ("continue", ASKED)):
        server = serve(answer="<action>1</action>")
        assert said(server, opening=opening) == ["<action>1</action>"]
        (body,) = server.bodies
        assert body["messages"] == messages
        assert body.get("continue_final_message", False) is (opening == "continue")
        assert body.get("add_generation_prompt", True) is (opening != "continue")


def test_every_turn_has_a_seed_of_its_own_so_the_same_prompt_is_asked_again(serve: Serve) -> None:
    first, again, unseeded = serve(), serve(), serve()
    said(first, 3)
    said(again, 3)
    said(unseeded, 3, seeded=False)
    seeds = [body["seed"] for body in first.bodies]
    assert len(set(seeds)) == 3
    assert seeds == [body["seed"] for body in again.bodies]
    assert [body.get("seed") for body in unseeded.bodies] == [None], "one request is remembered as such"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (503, "status 503"),
        ({"Retry-After": "0"}, "status 429"),
        ("{", "the body of its response is not that of a chat completion"),
        ('{"choices": []}', "the body of its response is not that of a chat completion"),
        ("drop", "RemoteProtocolError"),
        (0.5, "no answer within 0.2 seconds"),
    ],
)
def test_a_fault_is_tried_again_and_one_that_stays_is_named(serve: Serve, fault: object, why: str) -> None:
    settings = {"backoff": 0.01, "timeout": 0.2, "retries": 1}
    well = serve(fault, answer="1</action>")
    sampler = EndpointSampler(Endpoint(well.url, "m", **settings))
    assert asyncio.run(sampler.say(ASKED, seed=0)) == "1</action>"
    ill = serve(fault, fault)
    with pytest.raises(Unanswered, match=f"did not answer in 2 tries: {why}"):
        asyncio.run(EndpointSampler(Endpoint(ill.url, "m", **settings)).say(ASKED, seed=0))


def test_an_answer_without_words_is_an_answer(serve: Serve) -> None:
    server = serve('{"choices": [{"message": {"role": "assistant", "content": null}}]}')
    assert said(server) == [""]


def test_the_address_may_stand_in_the_environment_and_the_key_stands_nowhere_else(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    sampler = open_endpoint({"model": "m", "key_env": "MY_KEY"}, SamplingParams(max_tokens=7, temperature=0.3))
    assert asyncio.run(sampler.say(ASKED, seed=0)) == "Good day."
    assert (server.bodies[0]["temperature"], server.bodies[0]["max_tokens"]) == (0.3, 7)
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "sk-very-secret" not in repr(sampler.endpoint)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"^api: model is missing"),
        ({"model": "m"}, r"^api: url is missing\. Give --api url=.*, or set OPENAI_BASE_URL"),
        (
            {"model": "m", "url": "http://x/v1", "retry": 3},
            r"^api: there is no setting 'retry'\. Did you mean 'retries'",
        ),
        ({"model": "m", "url": "http://x/v1", "opening": "keep"}, r"^api: opening = 'keep': it is one of leave, send"),
        ({"model": "m", "url": "http://x/v1", "seeded": 1}, r"^api: seeded = 1: it is true or false"),
        ({"model": "m", "url": "x"}, r"^endpoint: url must begin an API over HTTP"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ConfigError, match=message):
        open_endpoint(settings, SamplingParams())
