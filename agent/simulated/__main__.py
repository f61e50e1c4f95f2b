"""`python -m agent.simulated`: one simulated engine."""

from __future__ import annotations

import typer

from agent.simulated.command import CONTEXT, simulate

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(context_settings=CONTEXT)(simulate)
    app(prog_name="python -m agent.simulated")
