"""`detoserve reconcile`: the reconciler alone, for a server. Not here: how (reconciler.loop)."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from reconciler.backends.skypilot import api_settings
from reconciler.cli.terminal import answer, command_app
from reconciler.core.status import World
from reconciler.errors import Stalled
from reconciler.loop.wiring import Assembly, ReconcilerSettings
from reconciler.up.progress import all_live
from reconciler.up.run import install_signals

app = command_app()


@app.command()
def run(
    repo: Annotated[str, typer.Argument(help="Config repo: a path or a URL.")],
    redis_url: Annotated[
        str,
        typer.Option(metavar="URL", envvar="DETOSERVE_REDIS_URL", help="Redis or Valkey."),
    ],
    branch: Annotated[str, typer.Option(help="Branch that holds the desired state.")] = "main",
    path: Annotated[
        str, typer.Option(metavar="SUBDIR", help="Where in the repo the config stands.")
    ] = "",
    state_dir: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            envvar="DETOSERVE_STATE_DIR",
            help="Where the mirror, the signing key and local engines are kept.",
        ),
    ] = Path(".detoserve"),
    owner: Annotated[
        str,
        typer.Option(
            help="Ownership mark of everything this reconciler makes; keep it for the repo's life.",
        ),
    ] = "detoserve",
    lease_ttl_s: Annotated[
        float,
        typer.Option(min=1, help="How long another waits after this reconciler was last heard of."),
    ] = 15.0,
    signing_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Key that signs routing tables, made where missing; reconcilers that take over from one "
            "another need the same. [default: one in the state directory]",
        ),
    ] = None,
    webhook_host: Annotated[str, typer.Option(help="Address of the webhook.")] = "127.0.0.1",
    webhook_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Listen for a forge's webhook. [default: do not]"),
    ] = None,
    webhook_secret_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The webhook's shared secret; needed with a port."),
    ] = None,
    skypilot_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="SKYPILOT_API_SERVER_ENDPOINT",
            help="SkyPilot's API server, for clusters of kubernetes, slurm and clouds; its token is read from "
            "SKYPILOT_SERVICE_ACCOUNT_TOKEN. [default: none is used]",
            show_default=False,
        ),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Stop as soon as everything is live; exit 0 then.")
    ] = False,
    timeout_s: Annotated[
        float, typer.Option(min=1, help="With --once: exit 1 after so many seconds.")
    ] = 600.0,
    print_public_key: Annotated[
        bool,
        typer.Option("--print-public-key", help="Print what routers need as a key, and exit."),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Make what runs match a config repo, until SIGTERM. Engines go on running after it ends."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    secret = ""
    if webhook_port is not None:
        if webhook_secret_file is None:
            raise Stalled("--webhook-port needs --webhook-secret-file: unsigned calls are refused")
        try:
            secret = webhook_secret_file.read_text().strip()
        except OSError as error:
            raise Stalled(f"webhook secret {webhook_secret_file}: {error.strerror}") from None
    settings = ReconcilerSettings(
        repo=repo,
        branch=branch,
        path=path,
        state_dir=state_dir.resolve(),
        redis_url=redis_url,
        owner=owner,
        lease_ttl_s=lease_ttl_s,
        signing_key_file=signing_key_file,
        webhook_host=webhook_host,
        webhook_port=webhook_port,
        webhook_secret=secret,
        skypilot=api_settings(skypilot_url, os.environ) if skypilot_url else None,
    )

    async def main() -> bool:
        stop, live = asyncio.Event(), asyncio.Event()

        def on_world(world: World) -> None:
            if all_live(world) and not world.source_problem:
                live.set()

        assembly = Assembly(settings, on_world=on_world)
        if print_public_key:
            answer(assembly.public_key)
            return True
        install_signals(stop)
        answer(json.dumps({"event": "ready", "routes_public_key": assembly.public_key}))
        running = asyncio.create_task(assembly.run(stop))
        if once:
            waiting = asyncio.create_task(live.wait())
            await asyncio.wait(
                {waiting, running}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            waiting.cancel()
            stop.set()
        await running
        return not once or live.is_set()

    if not uvloop.run(main()):
        raise typer.Exit(1)
