"""Messages by datagrams between the router processes of one machine.

Each binds a socket in a folder that they share and sends to every other socket there: no Redis, and no
wait for one. A new process finds those that are there by the folder, and they find it by its first
message, which is empty. What a busy reader has no room for is lost. The folder belongs to whoever starts the
processes, and only its user can enter it.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

from router.fleet.channels import Receive

_SUFFIX: Final = ".sock"
_RECEIVED_MAX_BYTES: Final = 2**18
_AT_ONCE: Final = 64
"""Messages read before the loop gets to do something else."""


class SocketChannel:
    """A `Channel` from its creation on; `close` it when `run` has ended.

    Raises:
        OSError: no socket can be bound in the folder, or its path is too long for one (107 bytes).
    """

    name = "socket"

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / f"{os.getpid()}-{os.urandom(4).hex()}{_SUFFIX}")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.bind(self._path)
        except BaseException:
            self._socket.close()
            raise
        self._others = {
            str(found) for found in folder.glob(f"*{_SUFFIX}") if str(found) != self._path
        }
        self.lost = 0

    def send(self, data: bytes) -> None:
        for path in list(self._others):
            try:
                self._socket.sendto(data, path)
            except (FileNotFoundError, ConnectionRefusedError):
                self._gone(path)
            except OSError:
                self.lost += 1

    def _gone(self, path: str) -> None:
        self._others.discard(path)
        with suppress(OSError):  # one that was killed left it there
            Path(path).unlink()

    async def run(self, receive: Receive) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket, self._read, receive)
        self.send(b"")
        try:
            await loop.create_future()
        finally:
            loop.remove_reader(self._socket)

    def _read(self, receive: Receive) -> None:
        for _ in range(_AT_ONCE):
            try:
                data, sender = self._socket.recvfrom(_RECEIVED_MAX_BYTES)
            except OSError:
                return
            if isinstance(sender, str):
                self._others.add(sender)
            if data:
                receive(data)

    def close(self) -> None:
        self._socket.close()
        with suppress(OSError):
            Path(self._path).unlink()
