"""`detoserve schemas`: the kinds as JSON Schema, for editors and other checkers.

Not here: making them (schemas.json_schema).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reconciler.cli.terminal import answer, command_app, fail

app = command_app()


@app.command()
def schemas(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Where to write function.json ... all.json; made if missing."
        ),
    ],
) -> None:
    """Write the JSON Schemas of the kinds (draft-07), one file a kind and all.json for any of them."""
    from schemas.json_schema import write  # noqa: PLC0415 - generates all models' schemas

    try:
        for path in write(directory):
            answer(str(path))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}; name a folder that can be written")
