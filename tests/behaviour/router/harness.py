"""A router in this process, engines to put behind it, and tables that join them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from router.app import Router
from router.settings import Settings
from schemas import api_keys
from schemas.wire.routing import Arm, Cluster, Function, Key, Policy, Replica, RoutingTable, Tenant

KEY = api_keys.create()
ALMOST_KEY = KEY.text[:-1] + ("a" if KEY.text[-1] != "a" else "b")
FOREIGN_KEY = "My API Key"
ROUND_ROBIN = Policy(name="round-robin")


def tenant(name: str = "team", **more: Any) -> Tenant:
    keys = (
        Key(id=KEY.id, sha256=bytes.fromhex(KEY.sha256)),
        Key(id="imported", sha256=api_keys.digest(FOREIGN_KEY)),
    )
    return Tenant(**{"name": name, "keys": keys, "models": ("*",), **more})


def function(*urls: str, name: str = "sim", **more: Any) -> Function:
    """A function whose replicas are r0, r1, ... of its name."""
    replicas = tuple(Replica(id=f"{name}-r{i}", url=url) for i, url in enumerate(urls))
    return Function(
        **{
            "name": name,
            "served_name": "simulated",
            "policy": Policy(name="least-load"),
            "arms": (Arm(deployment=name, cluster="here", replicas=replicas),),
            **more,
        }
    )


def routing_table(*functions: Function, generation: int = 1, **more: Any) -> RoutingTable:
    return RoutingTable(
        **{
            "generation": generation,
            "revision": "0123abcd" * 5,
            "published_at": 1.0,
            "functions": functions,
            "tenants": (tenant(),),
            "clusters": (Cluster(name="here"),),
            **more,
        }
    )


@dataclass
class RunningRouter:
    """A router that reads its table from a file."""

    router: Router
    path: Path

    @property
    def url(self) -> str:
        return self.router.url

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def install(self, table: RoutingTable) -> None:
        """Puts another table in force at once."""
        assert self.router.state.install(table, 2e9)

    def assert_idle(self) -> None:
        """Nothing is counted that has ended."""
        assert self.router.state.in_flight.total == 0
        assert self.router.state.in_flight.by_replica == {}


@asynccontextmanager
async def running_router(
    table: RoutingTable, folder: Path, **settings: Any
) -> AsyncIterator[RunningRouter]:
    path = folder / "routes.msgpack"
    path.write_bytes(msgspec.msgpack.encode(table))
    chosen = Settings(**{"routes": path, "port": 0, "admin_port": 0, **settings})
    async with Router(chosen) as router:
        yield RunningRouter(router, path)


@dataclass
class Received:
    """One request as an engine got it."""

    head: bytes
    body: bytes

    @property
    def line(self) -> bytes:
        return self.head.partition(b"\r\n")[0]

    @property
    def headers(self) -> dict[bytes, bytes]:
        lines = self.head.split(b"\r\n")[1:]
        return {
            name.lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in lines if line)
        }


Answer = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


def http(
    body: bytes = b'{"ok":true}', status: str = "200 OK", headers: str = ""
) -> Callable[[Received, asyncio.StreamWriter], Awaitable[None]]:
    """Answers with exactly this."""

    async def answer(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(
            f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{headers}"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )

    return answer


SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass
class FakeEngine:
    """A raw HTTP/1.1 engine that does what its `answer` says, and notes what it was sent."""

    answer: Answer = field(default_factory=http)
    received: list[Received] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a connection ends."""
    url: str = ""
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                received = Received(head[:-4], b"")
                length = int(received.headers.get(b"content-length", b"0"))
                received.body = await reader.readexactly(length)
                self.received.append(received)
                answering = asyncio.create_task(self.answer(received, writer))
                watching = asyncio.create_task(reader.read(1))
                await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
                if not answering.done():
                    answering.cancel()
                    break
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
                answering.result()
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            self.gone.set()
            writer.close()


@asynccontextmanager
async def fake_engine(answer: Answer | None = None) -> AsyncIterator[FakeEngine]:
    engine = FakeEngine(answer or http())
    server = await asyncio.start_server(engine._serve, "127.0.0.1", 0, limit=2**20)
    engine.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield engine
    finally:
        server.close()
        for writer in engine.writers:
            writer.transport.abort()  # what nobody reads would keep it open
        await asyncio.sleep(0)


@dataclass
class Program:
    """A real process that prints a ready line."""

    process: asyncio.subprocess.Process
    ready: dict[str, Any]

    @property
    def url(self) -> str:
        return str(self.ready["url"])

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


@asynccontextmanager
async def program(module: str, *flags: str) -> AsyncIterator[Program]:
    """`python -m module flags`, killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *flags, stdout=asyncio.subprocess.PIPE, limit=2**20
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20):
            line = await process.stdout.readline()
        yield Program(process, json.loads(line))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


def simulated(*flags: str) -> Any:
    """The simulated engine as a process."""
    return program("agent.simulated", "--port", "0", *flags)


async def raw(port: int, data: bytes, *, timeout_s: float = 5.0) -> bytes:
    """Sends bytes, returns all that comes until the router closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        async with asyncio.timeout(timeout_s):
            return await reader.read()
    finally:
        writer.close()


def post(
    body: bytes, *, path: str = "/v1/chat/completions", headers: str = "", key: str = KEY.text
) -> bytes:
    """A request as it goes over the wire, after which the connection is closed."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: router\r\nAuthorization: Bearer {key}\r\n{headers}"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


CHAT = b'{"model":"sim","messages":[{"role":"user","content":"hi"}]}'
STREAM = b'{"model":"sim","messages":[{"role":"user","content":"hi"}],"stream":true}'
