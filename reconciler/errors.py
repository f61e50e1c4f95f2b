"""Every error the reconciler raises, by what it means for whoever waits.

    ReconcileError
    ├── Stalled              a human must act: bad input, foreign ownership, refused credentials
    │   ├── SourceInvalid        the repo is there, but cannot be used (empty, branch gone, rewritten)
    │   ├── NotOurs              something of that name exists and carries another owner's mark
    │   └── Fenced               a newer reconciler holds the lease; this one must stop writing
    ├── Waiting              not yet, and nothing is wrong: ask again after `retry_after_s`
    └── Transient            the world did not answer; try again with backoff
        ├── SourceUnreachable    the Git remote
        └── BackendUnreachable   where work runs: what it owns is *unknown*, never absent

Vendor exceptions (git, redis, sky, kubernetes) are translated into these at the edge that met them.
Not here: what is wrong inside one config file; that is a `Problem` (core.config), which is data.
"""

from __future__ import annotations


class ReconcileError(Exception):
    """The root. The message is for people and never holds a credential."""


class Stalled(ReconcileError):
    """A human must act; retrying alone changes nothing."""


class SourceInvalid(Stalled):
    """The config repo answers but cannot be used; the last good state stays."""


class NotOurs(Stalled):
    """A thing of our name exists without our ownership mark; it is never touched."""


class Fenced(Stalled):
    """A writer with a newer lease generation exists; nothing was written."""


class Waiting(ReconcileError):
    """Not yet; ask again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Transient(ReconcileError):
    """The world did not answer; the caller backs off and tries again."""


class SourceUnreachable(Transient):
    """The Git remote could not be asked; the last good revision stays."""


class BackendUnreachable(Transient):
    """A backend could not be asked; what it owns is unknown, never absent."""
