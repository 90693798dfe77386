"""A model behind a chat endpoint as a player: whole prompts as messages out, the words it goes on with in.

A chat endpoint shows no tokens, so what it says has text and no log-probabilities: it can be evaluated and never
trained. Knows what servers do with a message that was begun; knows no environment.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from echelon.errors import ConfigError, did_you_mean
from echelon.seeds import derive_seed
from echelon.text.endpoint import Endpoint, endpoint_settings, shared_endpoint
from echelon.types import Message, SamplingParams

URL = "OPENAI_BASE_URL"
"""Environment variable that says where the API begins, where no setting does."""

Opening = Literal["leave", "send", "continue"]
"""What becomes of an assistant message that was begun, such as `<action>`: it is left out, and the model writes it
itself; it is sent as it is; or it is sent with the two fields that make vLLM and SGLang go on with it."""

OWN: Mapping[str, tuple[type, str]] = {"opening": (str, "a text"), "seeded": (bool, "true or false")}
"""Settings of a player that its endpoint does not have."""


class EndpointSampler:
    """Says what the model behind an endpoint says next.

    Requests under way at the same time are bounded by the endpoint, those that fail for a while are sent again, and
    `Unanswered` fails the one episode whose request never got an answer.
    """

    def __init__(self, endpoint: Endpoint, *, opening: Opening = "leave", seeded: bool = True) -> None:
        self.endpoint, self.opening, self.seeded = endpoint, opening, seeded

    async def say(self, messages: Sequence[Message], *, seed: int) -> str:
        """What follows the last message, which may be the assistant's own, begun: an answer may begin it again.

        `seed` goes with the request, so that the same prompt may get another answer the next time; `seeded` False
        leaves it out, for servers that will not have one.
        """
        begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        sent = messages[:-1] if begun and self.opening == "leave" else messages
        more: dict[str, Any] = {"seed": seed % 2**31} if self.seeded else {}
        if begun and self.opening == "continue":
            more |= {"continue_final_message": True, "add_generation_prompt": False}
        return await self.endpoint(sent, **more)

    def player(self, *, seed: int = 0) -> Callable[[Sequence[Message]], Awaitable[str]]:
        """Plays one episode: every turn has a seed of its own."""
        turn = 0

        async def say(messages: Sequence[Message]) -> str:
            nonlocal turn
            turn += 1
            return await self.say(messages, seed=derive_seed(seed, "endpoint", turn))

        return say


def open_endpoint(settings: Mapping[str, Any], params: SamplingParams) -> EndpointSampler:
    """The player with these settings: those of an endpoint (url, model, key_env, timeout, retries, …), `opening` and
    `seeded`. The url may stand in OPENAI_BASE_URL; temperature and longest answer are those of `params` where no
    setting says them, and the key is read from the environment only.

    Raises ConfigError for settings that do not exist, are missing or cannot work.
    """
    check_endpoint(settings)
    given = {key: value for key, value in settings.items() if key not in OWN}
    defaults: dict[str, Any] = {"temperature": params.temperature, "max_tokens": params.max_tokens}
    if url := os.environ.get(URL, ""):
        defaults["url"] = url
    endpoint = shared_endpoint({**defaults, **given})
    return EndpointSampler(endpoint, opening=settings.get("opening", "leave"), seeded=settings.get("seeded", True))


def check_endpoint(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings of a player that cannot work. Nothing is asked."""
    known = {**endpoint_settings(), **OWN}
    for name in settings:
        if name not in known:
            raise ConfigError(
                f"api: there is no setting '{name}'.{did_you_mean(name, known)} It has {', '.join(known)}."
            )
    if "model" not in settings:
        raise ConfigError("api: model is missing. Give --api model=… with the model's name at the endpoint.")
    if "url" not in settings and not os.environ.get(URL):
        raise ConfigError(f"api: url is missing. Give --api url=http://localhost:8000/v1, or set {URL}.")
    if (opening := settings.get("opening", "leave")) not in get_args(Opening):
        raise ConfigError(f"api: opening = {opening!r}: it is one of {', '.join(get_args(Opening))}.")
    if not isinstance(settings.get("seeded", True), bool):
        raise ConfigError(f"api: seeded = {settings['seeded']!r}: it is true or false.")
