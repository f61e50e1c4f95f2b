"""`detoserve-agent`: what runs beside inference engines, and an engine that is simulated."""

from __future__ import annotations

import typer

from agent import command
from agent.simulated.command import CONTEXT, simulate

app = typer.Typer(
    help="What runs beside inference engines.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.command("run", context_settings=command.CONTEXT)(command.run)
app.command("simulate", context_settings=CONTEXT)(simulate)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
