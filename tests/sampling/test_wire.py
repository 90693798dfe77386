"""Questions and answers over one connection: each answer finds who asked, and whoever has no secret is not heard."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from echelon.errors import ConfigError, RolloutError
from echelon.sampling import wire


def between(
    answer: Callable[..., Awaitable[Any]], play: Callable[[wire.Line], Awaitable[Any]], *, loops: Any = None
) -> Any:
    """What happens on a line to somebody who answers so."""

    async def both() -> Any:
        server, address = await wire.listening(answer, "127.0.0.1")
        line = await wire.connected(*address)
        try:
            async with asyncio.timeout(30):
                return await play(line)
        finally:
            line.close()
            server.close()
            await asyncio.sleep(0.01)

    with asyncio.Runner(loop_factory=loops) as runner:
        return runner.run(both())


def uvloop() -> Any:
    """The loop of Ray's workers."""
    return pytest.importorskip("uvloop").new_event_loop()


@pytest.mark.parametrize("loops", [None, uvloop])
def test_every_answer_finds_who_asked_in_whatever_order_and_size(loops: Any) -> None:
    async def later(number: int, text: str) -> tuple[int, str]:
        await asyncio.sleep(0.001 * (7 * number % 5))
        return number, text

    async def play(line: wire.Line) -> list[Any]:
        asked = (line.ask(number, str(number) * 4 ** (number % 10)) for number in range(60))
        return await asyncio.gather(*asked)

    assert between(later, play, loops=loops) == [(number, str(number) * 4 ** (number % 10)) for number in range(60)]


class Opened:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("sent", [b"", b"s", bytes(wire.SECRET)])
def test_nothing_is_read_before_the_secret(tmp_path: Path, sent: bytes) -> None:
    message = pickle.dumps((0, (Opened(tmp_path / "read"),)))
    message = len(message).to_bytes(wire.HEAD, "big") + message

    async def play() -> bytes:
        async def nothing(*_: Any) -> None: ...

        server, (host, port, secret) = await wire.listening(nothing, "127.0.0.1")
        for shown in (secret, sent):  # the first shows that the message would be read
            (tmp_path / "read").unlink(missing_ok=True)
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(shown + message)
            writer.write(bytes(wire.SECRET))
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                answer = await asyncio.wait_for(reader.read(1), 5)
            writer.transport.abort()
            assert (tmp_path / "read").exists() == (shown == secret)
        server.close()
        return answer

    assert asyncio.run(play()) == b""


def test_what_is_raised_there_is_raised_here() -> None:
    class Strange(Exception):
        """Of a class that nobody else can find."""

    async def wrong(kind: str) -> None:
        raise {"setting": ConfigError("too long"), "strange": Strange("odd\nmore")}[kind]

    async def play(line: wire.Line) -> None:
        with pytest.raises(ConfigError, match=r"^too long$"):
            await line.ask("setting")
        with pytest.raises(RolloutError, match=r"^Strange: odd\.$"):
            await line.ask("strange")

    between(wrong, play)


def test_whoever_gives_up_is_given_up_there_after_it_has_begun() -> None:
    seen: list[str] = []

    async def long(name: str) -> None:
        seen.append(f"began {name}")
        try:
            await asyncio.sleep(60)
        finally:
            seen.append(f"ended {name}")

    async def play(line: wire.Line) -> None:
        tasks = [asyncio.create_task(line.ask(name)) for name in "ab"]
        await asyncio.sleep(0)
        tasks[0].cancel()  # both messages travel together
        while "ended a" not in seen:
            await asyncio.sleep(0.001)
        assert seen == ["began a", "began b", "ended a"]
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    between(long, play)


def test_all_who_wait_hear_that_the_other_side_is_gone() -> None:
    async def play() -> list[Any]:
        async def never() -> None:
            await asyncio.sleep(60)

        listeners: list[wire.Listener] = []

        def listener() -> wire.Listener:
            listeners.append(wire.Listener(never, b"s" * wire.SECRET))
            return listeners[-1]

        server = await asyncio.get_running_loop().create_server(listener, "127.0.0.1", 0)
        line = await wire.connected(*server.sockets[0].getsockname(), b"s" * wire.SECRET)
        waiting = [asyncio.create_task(line.ask()) for _ in range(2)]
        while not listeners or len(listeners[0]._tasks) < 2:
            await asyncio.sleep(0.001)
        listeners[0].transport.abort()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        while listeners[0]._tasks:  # nobody waits for these any more
            await asyncio.sleep(0.001)
        with pytest.raises(wire.LineLost):
            await line.ask()
        server.close()
        return found

    assert [type(error) for error in asyncio.run(play())] == [wire.LineLost] * 2


def test_where_nobody_listens_is_named() -> None:
    async def play() -> None:
        with pytest.raises(wire.LineLost, match=r"^no connection to 127\.0\.0\.1:1 \("):
            await wire.connected("127.0.0.1", 1, b"")

    asyncio.run(play())
