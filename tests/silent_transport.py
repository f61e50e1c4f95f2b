"""A transport for protocols that are tested without a socket."""

from __future__ import annotations


class SilentTransport:
    """Takes answers, and does nothing with them."""

    def write(self, data: bytes) -> None: ...

    def write_eof(self) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...
