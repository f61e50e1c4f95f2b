"""Idle connections of one replica, and the opening of new ones.

The last one used is taken first, so that the rest can age out. Where a replica is busy there are always
some to spare: a stream more need not wait for the round trips, and the handshake, of a new connection.
Not here: how many requests a replica may have (core.pick).
"""

from __future__ import annotations

import asyncio
import ssl
from functools import cache
from ipaddress import ip_address
from socket import (
    IPPROTO_TCP,
    SO_KEEPALIVE,
    SOCK_STREAM,
    SOL_SOCKET,
    TCP_KEEPCNT,
    TCP_KEEPIDLE,
    TCP_KEEPINTVL,
    TCP_USER_TIMEOUT,
)
from typing import Final

from router.core.endpoint_check import all_allowed
from router.core.snapshot import Candidate
from router.upstream.connection import Connection
from router.upstream.failures import (
    ConnectFailed,
    EndpointForbidden,
    UpstreamFailed,
    UpstreamTimeout,
)


@cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _noticing_silence(silence_s: float) -> tuple[tuple[int, int, int], ...]:
    """Socket options by which the kernel tells of a machine that is gone without a word.

    Else an idle connection to it would be taken for a good one, and a request on it wait until its deadline.
    """
    probe_s = max(1, round(silence_s / 6))
    return (
        (SOL_SOCKET, SO_KEEPALIVE, 1),
        (IPPROTO_TCP, TCP_KEEPIDLE, 3 * probe_s),
        (IPPROTO_TCP, TCP_KEEPINTVL, probe_s),
        (IPPROTO_TCP, TCP_KEEPCNT, 3),
        (IPPROTO_TCP, TCP_USER_TIMEOUT, round(silence_s * 1000)),
    )


_SPARES: Final = 2
_BUSY: Final = 4
"""Connections from which on there are to be spares."""
_SPARE_TIMEOUT_S: Final = 5.0


class Pool:
    """Connections to one replica."""

    def __init__(self, candidate: Candidate, *, keepalive_s: float, silence_s: float) -> None:
        self.address = candidate.address
        self._cidrs = candidate.cidrs
        self._literal = _is_ip(candidate.host)
        self._allowed = self._literal and all_allowed([candidate.host], candidate.cidrs)
        """Once and for all; where there is a name, its addresses are looked at each time."""
        self._keepalive_s = keepalive_s
        self._options = _noticing_silence(silence_s)
        self._idle: list[Connection] = []
        self._alive = 0
        """Connections, idle or not."""
        self._spares: set[asyncio.Task[None]] = set()
        """That are being opened."""
        self._closed = False
        self._loop = asyncio.get_running_loop()

    def take(self) -> Connection | None:
        """An idle connection that is still open, if there is one."""
        oldest = self._loop.time() - self._keepalive_s
        found = None
        while self._idle:
            connection = self._idle.pop()
            if connection.closed:
                continue
            if connection.idle_since >= oldest:
                found = connection
                break
            connection.close()
        spares = 0 if self._closed or self._alive < _BUSY else _SPARES
        while len(self._idle) + len(self._spares) < spares:
            task = self._loop.create_task(self._open_spare())
            self._spares.add(task)
            task.add_done_callback(self._spares.discard)
        return found

    def give_back(self, connection: Connection) -> None:
        """After an exchange: kept if it can carry another, else closed."""
        if self._closed or not connection.reusable or connection.closed:
            connection.close()
            return
        connection.idle_since = self._loop.time()
        connection.kept = True
        self._idle.append(connection)

    async def _open_spare(self) -> None:
        try:
            connection = await self.connect(_SPARE_TIMEOUT_S)
        except UpstreamFailed:
            return  # the next request that needs one will find out, and say so
        if self._closed:
            connection.close()
            return
        connection.idle_since = self._loop.time()
        connection.kept = True
        self._idle.insert(0, connection)  # to be taken when there is no other

    def _lost(self) -> None:
        self._alive -= 1

    async def connect(self, timeout_s: float) -> Connection:
        """A new connection.

        Raises:
            UpstreamTimeout: after `timeout_s`.
            EndpointForbidden: when the name resolves to a forbidden address.
            ConnectFailed: when nothing can be reached there.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._open()
        except TimeoutError:
            raise UpstreamTimeout("connect", timeout_s) from None
        except OSError as error:
            if isinstance(error, ConnectFailed):
                raise
            raise ConnectFailed(f"cannot connect: {type(error).__name__}") from None

    async def _open(self) -> Connection:
        tls, host, port = self.address
        if self._literal:
            addresses = [host]
        else:
            found = await self._loop.getaddrinfo(host, port, type=SOCK_STREAM)
            addresses = [str(entry[4][0]) for entry in found]
        if not self._allowed and not all_allowed(addresses, self._cidrs):
            raise EndpointForbidden(f"{host} is at an address that is not allowed")
        for number, address in enumerate(addresses, 1):
            try:
                # The address that was checked, not the name: a second look-up might differ.
                transport, connection = await self._loop.create_connection(
                    Connection,
                    address,
                    port,
                    ssl=_tls() if tls else None,
                    server_hostname=host if tls else None,
                )
            except OSError:
                if number == len(addresses):
                    raise
            else:
                if connection.closed:
                    raise ConnectFailed("the connection was lost at once")
                opened = transport.get_extra_info("socket")
                for level, option, value in self._options:
                    opened.setsockopt(level, option, value)
                self._alive += 1
                connection.on_lost = self._lost
                return connection
        raise ConnectFailed(f"{host} has no address")

    def sweep(self) -> None:
        """Closes what has been idle too long."""
        oldest = self._loop.time() - self._keepalive_s
        keep = []
        for connection in self._idle:
            if not connection.closed and connection.idle_since >= oldest:
                keep.append(connection)
            else:
                connection.close()
        self._idle = keep

    def close(self) -> None:
        """Closes idle connections; those in use are closed when they come back."""
        self._closed = True
        for task in self._spares:
            task.cancel()
        for connection in self._idle:
            connection.close()
        self._idle.clear()
