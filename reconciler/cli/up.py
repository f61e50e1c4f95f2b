"""`detoserve up`: everything on this machine. Not here: how (reconciler.up)."""

from __future__ import annotations

import asyncio
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer
import uvloop
from rich.console import Console

from reconciler.cli.terminal import command_app
from reconciler.up.progress import JsonScreen, Screen, TextScreen
from reconciler.up.run import UpSettings, install_signals, up

app = command_app()

DEFAULT_CONFIG: Final = Path("detoserve-config")


class Output(StrEnum):
    """How progress is written on stdout."""

    TEXT = "text"
    JSON = "json"


@app.command()
def run(
    config: Annotated[
        Path,
        typer.Option(
            "--config",
            "-c",
            metavar="REPO",
            help="Local Git repo to run from; made from the example where there is nothing.",
        ),
    ] = DEFAULT_CONFIG,
    path: Annotated[
        str | None,
        typer.Option(
            metavar="SUBDIR",
            help="Where in the repo the config stands. [default: local where the repo has such a "
            "folder, else its root]",
            show_default=False,
        ),
    ] = None,
    state_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Where state, logs and the API key are kept.")
    ] = Path(".detoserve"),
    host: Annotated[str, typer.Option(help="Address the router listens on.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port of the router; 0: a free one. [default: 8080, or a free one where it is taken]",
            show_default=False,
        ),
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="DETOSERVE_REDIS_URL",
            help="Redis or Valkey to use. [default: an embedded one]",
            show_default=False,
        ),
    ] = None,
    skypilot: Annotated[
        bool,
        typer.Option(
            "--skypilot",
            help="Start SkyPilot's API server here, for clusters of kubernetes, slurm and clouds. "
            "[default: the one at $SKYPILOT_API_SERVER_ENDPOINT, if any]",
        ),
    ] = False,
    output: Annotated[
        Output, typer.Option("--output", "-o", help="text for people, json: an event a line.")
    ] = Output.TEXT,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done.")] = False,
) -> None:
    """Run everything on this machine: a reconciler, a router, and the engines a Git repo names.

    Prints an endpoint, an API key and a line to try. Edit a file of the repo and commit: what runs
    follows. Ctrl-C ends all of it and leaves nothing behind.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    screen: Screen = (
        JsonScreen(Console()) if output is Output.JSON else TextScreen(Console(highlight=False))
    )
    settings = UpSettings(
        config=config,
        path=path,
        state_dir=state_dir,
        host=host,
        port=port,
        redis_url=redis_url,
        skypilot=skypilot,
    )

    async def main() -> None:
        stop = asyncio.Event()
        install_signals(stop)
        await up(settings, screen, stop)

    uvloop.run(main())
