"""Asks a language model behind any OpenAI-compatible chat endpoint, and reads answers that must have a form.

Knows HTTP, patience, a cache and what was used. It holds no key: the key is read from the environment when a request is
sent, and stands in no message, file or error.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from echelon.errors import ConfigError, ParseError, did_you_mean, need
from echelon.seeds import derive_seed
from echelon.types import Message

T = TypeVar("T")

Ask = Callable[[Sequence[Message]], Awaitable[str]]
"""A language model as others see it: a conversation in, the answer's text out."""

LONGEST_WAIT = 60.0
"""Seconds a server can make us wait before the next try, whatever it asks for."""

REMEMBERED = 4096
"""Answers kept in memory where no folder is given."""

_used: Counter[str] = Counter()
"""What all endpoints of this process have counted."""


class Unanswered(RuntimeError):
    """A language model did not answer, or nothing that can be read.

    Not an EchelonError, which would end the run: it fails the one episode that needed the answer.
    """


@dataclass(frozen=True, eq=False)
class Endpoint:
    """A model behind a chat endpoint: call it with a conversation, await the text of the answer.

    It may be shared by any number of episodes and event loops. Requests that fail for a while (no connection,
    time-outs, status 408, 425, 429 and 5xx, bodies that are not what they should be) are sent again, later and later;
    `Unanswered` in the end. A request that will never work (a wrong key, an unknown model) is a ConfigError.
    """

    url: str
    """Where the API begins, such as http://localhost:8000/v1."""
    model: str
    """Its name there."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. Unset: no key is sent, as local servers like it."""
    temperature: float = 0.0
    """Below 0 it is not sent: some servers will not have it."""
    max_tokens: int = 256
    """Of an answer; 0 is not sent either."""
    body: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the request."""
    timeout: float = 60.0
    """Seconds one try may take, from the connection to the last byte of the answer."""
    connect: float = 10.0
    """Seconds of those in which the server must accept the connection: one that is down is given up sooner."""
    retries: int = 4
    """Tries after the first."""
    backoff: float = 1.0
    """Seconds before the second try; twice as long before each further one, unless the server names a time."""
    parallel: int = 16
    """Requests under way at the same time."""
    cache: str = ""
    """Folder that remembers answers by a hash of the request. Empty: only memory does, until the process ends."""
    counts: Counter[str] = field(default_factory=Counter, init=False, repr=False)
    """How many answers were `asked` for, `cached`, and how many tries were `retried`; the `prompt_tokens` and
    `completion_tokens` that the server counted, those of answers that were remembered not once more."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("endpoint: url must begin an API over HTTP, such as http://localhost:8000/v1.")
        if parts.username or parts.password or parts.query:
            raise ConfigError(
                "endpoint: url holds more than an address. Put the key into the variable that key_env names."
            )
        if not self.model:
            raise ConfigError("endpoint: model is empty. Give the model's name at the endpoint.")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"endpoint: {name} = {getattr(self, name)}: it must be at least {least}.")
        need("httpx2", "endpoint")

    async def __call__(self, messages: Sequence[Message], **more: Any) -> str:
        """The answer to a conversation; `more` are fields of this request alone."""
        name, body = self._request(messages, more)
        self._count("asked")
        if (known := self._answers.get(name)) is not None:
            self._count("cached")
            return known
        async with self._slot():
            answer = await self._insist(body, name)
        self._answers.put(name, answer)
        return answer

    def forget(self, messages: Sequence[Message]) -> None:
        """Ask for this answer anew the next time."""
        self._answers.drop(self._request(messages, {})[0])

    def _request(self, messages: Sequence[Message], more: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The name of a request in the cache, and its body."""
        body = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            **({"temperature": self.temperature} if self.temperature >= 0 else {}),
            **({"max_tokens": self.max_tokens} if self.max_tokens else {}),
            **self.body,
            **more,
        }
        text = json.dumps([self.url, body], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest(), body

    def _count(self, name: str, number: int = 1) -> None:
        self.counts[name] += number
        _used[name] += number

    @cached_property
    def _answers(self) -> _Answers:
        return _Answers(Path(self.cache) if self.cache else None)

    @cached_property
    def _slots(self) -> WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore]:
        return WeakKeyDictionary()

    def _slot(self) -> asyncio.Semaphore:
        return self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self.parallel))

    async def _insist(self, body: Mapping[str, Any], name: str) -> str:
        """Try until there is an answer."""
        last = _Again("it was never tried")
        for attempt in range(self.retries + 1):
            if attempt:
                self._count("retried")
                await asyncio.sleep(_patience(last.wait, self.backoff * 2 ** (attempt - 1), name, attempt))
            try:
                return await self._try(body)
            except _Again as again:
                last = again
        raise Unanswered(f"{self.model} at {self.url} did not answer in {self.retries + 1} tries: {last}")

    async def _try(self, body: Mapping[str, Any]) -> str:
        """Send one request. Raises _Again where another try may help."""
        http = need("httpx2", "endpoint")
        key = _key(self.key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = http.Timeout(self.timeout, connect=min(self.connect, self.timeout))
        try:
            async with asyncio.timeout(self.timeout), http.AsyncClient(verify=trust(), timeout=limits) as client:
                response = await client.post(f"{self.url.rstrip('/')}/chat/completions", json=body, headers=headers)
        except http.ConnectTimeout:
            raise _Again(f"no connection within {limits.connect:g} seconds") from None
        except (TimeoutError, http.TimeoutException):
            raise _Again(f"no answer within {self.timeout:g} seconds") from None
        except (http.TransportError, http.DecodingError) as error:
            raise _Again(_without(key, f"{type(error).__name__}: {error}")) from None
        if response.status_code != 200:
            self._refused(response.status_code, _without(key, response.text), response.headers.get("retry-after", ""))
        try:
            said = response.json()
            content = said["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _Again("the body of its response is not that of a chat completion") from None
        for name, tokens in _usage(said).items():
            self._count(name, tokens)
        return content if isinstance(content, str) else ""

    def _refused(self, status: int, said: str, later: str) -> None:
        """Raise for a status that is not 200."""
        if status in (408, 425, 429) or status >= 500:
            raise _Again(f"status {status}", _seconds(later))
        if status in (401, 403):
            known = "is not accepted" if os.environ.get(self.key_env) else "is not set"
            raise ConfigError(f"{self.url} wants a key (status {status}): the variable {self.key_env} {known}.")
        raise ConfigError(
            f"{self.url} refuses the request (status {status}): {' '.join(said.split())[:200]} "
            "Check its url, model and body."
        )


def used(before: Mapping[str, int] | None = None) -> dict[str, int]:
    """What all endpoints of this process together were asked, and the tokens that their servers counted, by the names
    of `Endpoint.counts`; with `before`, an earlier answer, only what came since. Nothing where nobody was asked."""
    return {name: more for name, number in _used.items() if (more := number - (before or {}).get(name, 0))}


class _Again(Exception):
    """What failed this time, and in how many seconds the server wants the next try."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


def _seconds(later: str) -> float | None:
    """A Retry-After header, in seconds or as a date."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(later))
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(later).timestamp() - time.time())
    return None


def _patience(asked: float | None, backoff: float, name: str, attempt: int) -> float:
    """Seconds before the next try: what the server asks for, or else the back-off; a little apart for each request, so
    that those which were refused together do not all come back together."""
    apart = derive_seed(name, attempt) % 1000 / 2000
    return min(backoff * (0.75 + apart) if asked is None else asked + apart * backoff, LONGEST_WAIT)


def _key(variable: str) -> str:
    """The key, nothing where there is none. Raises ConfigError for one that no request can carry."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the variable {variable} holds characters that no key has. Set it to the key alone.")
    return key


def _without(key: str, text: str) -> str:
    """What a server or a library says, without the key should they repeat it."""
    return text.replace(key, "[key]") if key else text


def _usage(said: Mapping[str, Any]) -> dict[str, int]:
    """The tokens that a server says it has read and written; not all say it."""
    counted = said.get("usage")
    found = {name: counted.get(name) for name in _TOKENS} if isinstance(counted, dict) else {}
    return {name: number for name, number in found.items() if type(number) is int and number > 0}


@cache
def trust() -> Any:
    """The certificates we trust: read once, since reading them takes longer than most requests."""
    return need("httpx2", "endpoint").create_ssl_context()


class _Answers:
    """Answers by the hash of their request: in a folder, one file each, or in memory, the latest ones."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, str] = {}

    def get(self, name: str) -> str | None:
        if self._folder is None:
            return self._memory.get(name)
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # a torn file is no answer
            return str(json.loads(self._path(name).read_text(encoding="utf-8"))["answer"])
        return None

    def put(self, name: str, answer: str) -> None:
        if self._folder is None:
            self._memory[name] = answer
            if len(self._memory) > REMEMBERED:
                del self._memory[next(iter(self._memory))]
            return
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}.{id(answer)}")
        scratch.write_text(json.dumps({"answer": answer}), encoding="utf-8")
        scratch.replace(path)

    def drop(self, name: str) -> None:
        self._memory.pop(name, None)
        if self._folder is not None:
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / name[:2] / f"{name}.json"


def endpoint_settings() -> dict[str, tuple[Any, str]]:
    """The settings of an endpoint: what kind of value each is, for Python and in words."""
    return {each.name: _KINDS[str(each.type)] for each in fields(Endpoint) if each.init}


def shared_endpoint(settings: Mapping[str, Any]) -> Endpoint:
    """The endpoint with these settings, the same object for the same settings: its limit and its cache are shared.

    Raises ConfigError for settings that an endpoint does not have, or that cannot work.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"endpoint = {settings!r:.60}: it is a url and a model. Write endpoint: {{url: …, model: …}}."
        )
    known = {each.name: _KINDS[str(each.type)] for each in fields(Endpoint) if each.init}
    for name, value in settings.items():
        if name in known and (not isinstance(value, known[name][0]) or isinstance(value, bool)):
            raise ConfigError(f"endpoint: {name} is not {known[name][1]}.")
        if name not in known:
            raise ConfigError(
                f"endpoint: there is no setting '{name}'.{did_you_mean(name, known)} It has {', '.join(known)}."
            )
    for name in ("url", "model"):
        if name not in settings:
            raise ConfigError(f"endpoint: {name} is missing. It needs a url and a model.")
    return _endpoint(json.dumps(dict(settings), sort_keys=True))


_LEAST = {"timeout": 0.001, "connect": 0.001, "retries": 0, "backoff": 0.0, "parallel": 1, "max_tokens": 0}
"""The smallest values that work."""

_TOKENS = ("prompt_tokens", "completion_tokens")

_KINDS: Mapping[str, tuple[Any, str]] = {
    "str": (str, "a text"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "Mapping[str, Any]": (Mapping, "a mapping of fields"),
}


@cache
def _endpoint(settings: str) -> Endpoint:
    return Endpoint(**json.loads(settings))


async def understood(
    ask: Ask,
    messages: Sequence[Message],
    parse: Callable[[str], T],
    *,
    who: str,
    tries: int = 3,
    on_garbage: Callable[[], None] = lambda: None,
) -> T:
    """What an answer means. One that cannot be read is called so, and asked for again.

    `parse` raises ParseError for garbage, of which `on_garbage` is told each time. Raises Unanswered, naming `who`,
    when no try gives an answer that can be read: what is missing is never made up.
    """
    conversation = list(messages)
    for attempt in range(tries):
        try:
            said = await ask(conversation)
        except Unanswered as error:
            raise Unanswered(f"{who} did not answer: {error}") from error
        try:
            return parse(said)
        except ParseError as error:
            on_garbage()
            if isinstance(ask, Endpoint):
                ask.forget(conversation)
            if attempt + 1 == tries:
                raise Unanswered(
                    f"{who} gave no answer that can be read in {tries} tries. The last: {error}"
                ) from error
            conversation = [
                *messages,
                Message(role="assistant", content=said),
                Message(role="user", content=f"That cannot be read: {error} Answer again, in the form asked for."),
            ]
    raise AssertionError("tries is at least 1")
