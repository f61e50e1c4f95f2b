"""`detoserve-agent`: what runs beside inference engines. For now that is the simulated engine.

Not here: the agent itself, which reports an engine's cache and load.
"""

from __future__ import annotations

import typer

from agent.simulated.command import CONTEXT, simulate

app = typer.Typer(
    help="What runs beside inference engines.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.command("simulate", context_settings=CONTEXT)(simulate)


@app.callback()
def _root() -> None:
    # Its presence keeps `simulate` a subcommand while it is the only one.
    pass


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
