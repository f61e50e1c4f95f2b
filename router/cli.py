"""`detoserve-router`: settings in, a running router out.

Prints one JSON line when it listens: {"event": "ready", "url", "admin_url", "id"}. Exit codes: 0
after a drain, 1 when it could not start, 2 for wrong flags.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

import uvloop

from router.app import Router, serve
from router.collector import calm
from router.settings import SettingsInvalid, load
from router.tables.static_table import TableInvalid
from router.workers import Workers, WorkersFailed, supervise

_PR_SET_PDEATHSIG: Final = 1


def _die_with_the_supervisor() -> None:
    """A worker whose supervisor is killed drains, instead of serving on unseen."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _ready(router: Router | Workers) -> None:
    line = {
        "event": "ready",
        "url": router.url,
        "admin_url": router.admin_url,
        "id": router.settings.router_id,
    }
    print(json.dumps(line), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs until told to stop."""
    try:
        settings = load(arguments, os.environ)
    except SettingsInvalid as error:
        for line in str(error).splitlines():
            print(f"detoserve-router: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        if settings.workers > 1:
            uvloop.run(supervise(settings, _ready))
            return
        calm()
        if settings.listen_fd is not None:
            _die_with_the_supervisor()
        uvloop.run(serve(settings, _ready))
    except (SettingsInvalid, TableInvalid, WorkersFailed, OSError) as error:
        print(f"detoserve-router: {error}", file=sys.stderr)
        raise SystemExit(1) from None
