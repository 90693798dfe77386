"""Questions and answers between two processes, over one connection: any number at once, answered in any order.

Each is one pickled message, which costs a tenth of a call through Ray. Whoever connects has to show the secret before
anything it sends is read. Knows neither what is asked nor how the processes were started.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import pickle
import secrets
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from echelon.errors import RolloutError
from echelon.models.lm import first_line

SECRET = 32
"""Bytes."""
HEAD = 4
"""Bytes that say how long a message is."""


Address = tuple[str, int, bytes]
"""Host, port, and the secret."""


class LineLost(Exception):
    """The connection is gone, or was never there."""


class _Messages(asyncio.Protocol, ABC):
    """One end of a connection: whole messages in, whole messages out."""

    transport: Any

    def __init__(self) -> None:
        self._come = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # uvloop's, in a worker of Ray

    def data_received(self, data: bytes) -> None:
        """Unpickle, so call it only with what comes from somebody who is trusted."""
        self._come += data
        for message in self._whole():
            self.heard(pickle.loads(message))

    @abstractmethod
    def heard(self, message: Any) -> None:
        """What to do with a message that came."""

    def say(self, message: Any) -> None:
        """Send it, unless nobody is there any more."""
        if not self.transport.is_closing():
            packed = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
            self.transport.write(len(packed).to_bytes(HEAD, "big") + packed)

    def _whole(self) -> Iterator[bytes]:
        start = 0
        while len(self._come) >= start + HEAD:
            end = start + HEAD + int.from_bytes(self._come[start : start + HEAD], "big")
            if len(self._come) < end:
                break
            yield bytes(self._come[start + HEAD : end])
            start = end
        del self._come[:start]


class Listener(_Messages):
    """The end that answers, of one connection."""

    def __init__(self, answer: Callable[..., Awaitable[Any]], secret: bytes) -> None:
        super().__init__()
        self._answer, self._secret = answer, secret
        self._known = False
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def data_received(self, data: bytes) -> None:
        """The secret first; who shows another one is cut off, and nothing of theirs is unpickled."""
        if self._known:
            return super().data_received(data)
        self._come += data
        if len(self._come) >= SECRET:
            shown = bytes(self._come[:SECRET])
            del self._come[:SECRET]
            self._known = hmac.compare_digest(shown, self._secret)
            if self._known:
                super().data_received(b"")
            else:
                self.transport.abort()

    def heard(self, message: Any) -> None:
        """A number and what is asked, or a number alone: nobody waits for that answer any more."""
        number, question = message
        if question is not None:
            self._tasks[number] = asyncio.create_task(self._work(number, question))
        elif number in self._tasks:
            asyncio.get_running_loop().call_soon(self._tasks[number].cancel)  # it has begun by then

    def connection_lost(self, exc: Exception | None) -> None:
        for task in self._tasks.values():
            task.cancel()

    async def _work(self, number: int, question: tuple[Any, ...]) -> None:
        try:
            self.say((number, True, await self._answer(*question)))
        except Exception as error:
            self.say((number, False, _fit_to_travel(error)))
        finally:
            del self._tasks[number]


class Line(_Messages):
    """The end that asks. Open it with `connected`."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count()
        self._open: dict[int, asyncio.Future[Any]] = {}
        self._lost = ""

    async def ask(self, *question: Any) -> Any:
        """What is answered. Raises what the other side raised, and LineLost where it is gone."""
        if self._lost:
            raise LineLost(self._lost)
        number = next(self._numbers)
        waiting = self._open[number] = asyncio.get_running_loop().create_future()
        self.say((number, question))
        try:
            return await waiting
        except asyncio.CancelledError:
            self.say((number, None))
            raise
        finally:
            del self._open[number]

    def close(self) -> None:
        """Hang up."""
        self.transport.abort()

    def heard(self, message: Any) -> None:
        """A number, whether there is an answer, and that answer or what was raised."""
        number, fine, said = message
        waiting = self._open.get(number)
        if waiting is None or waiting.done():
            return
        if fine:
            waiting.set_result(said)
        else:
            waiting.set_exception(said)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = f"its connection broke ({first_line(exc)})" if exc else "its connection was closed"
        for waiting in self._open.values():
            if not waiting.done():
                waiting.set_exception(LineLost(self._lost))


async def listening(answer: Callable[..., Awaitable[Any]], host: str) -> tuple[asyncio.AbstractServer, Address]:
    """Answer whoever connects to this host at some free port and shows the secret, until what listens is closed."""
    secret = secrets.token_bytes(SECRET)
    server = await asyncio.get_running_loop().create_server(lambda: Listener(answer, secret), host, 0)
    return server, (host, server.sockets[0].getsockname()[1], secret)


async def connected(host: str, port: int, secret: bytes) -> Line:
    """A line to whoever listens there. Raises LineLost where nobody can be reached."""
    try:
        _, line = await asyncio.get_running_loop().create_connection(Line, host, port)
    except OSError as error:
        raise LineLost(f"no connection to {host}:{port} ({first_line(error)})") from error
    line.transport.write(secret)
    return line


def _fit_to_travel(error: Exception) -> Exception:
    """The error itself, where it comes out at the other side as what it was."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RolloutError(f"{type(error).__name__}: {first_line(error)}")
    return error
