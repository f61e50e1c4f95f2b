"""`detoserve validate`: whether a config repo would be taken in as it stands.

The reconciler's own loader and checks, nothing else, so that what passes here is accepted there.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from enum import StrEnum
from typing import Annotated

import typer

from reconciler.cli.problem_lines import (
    excerpt,
    github_line,
    problem_json,
    problem_line,
    summary_line,
)
from reconciler.cli.reading import open_reading
from reconciler.cli.terminal import ANSWER_IS_NO, answer, answer_json, command_app, note, painter

app = command_app()


class Output(StrEnum):
    """How problems are written on stdout."""

    TEXT = "text"
    JSON = "json"
    GITHUB = "github"


@app.command()
def validate(
    where: Annotated[
        str,
        typer.Argument(
            metavar="PATH|REPO", help="Folder to check; with --ref, a repository or its URL."
        ),
    ] = ".",
    ref: Annotated[
        str | None,
        typer.Option(
            metavar="BRANCH",
            help="Check this branch, tag or commit. [default: the files as they are]",
        ),
    ] = None,
    path: Annotated[
        str,
        typer.Option(
            metavar="SUBDIR",
            help="Where in it the config stands. [default: all of it]",
            show_default=False,
        ),
    ] = "",
    output: Annotated[
        Output,
        typer.Option(
            "--output",
            "-o",
            help="text: path:line:column: error: ...; json: one object; github: workflow commands.",
        ),
    ] = Output.TEXT,
    strict: Annotated[
        bool, typer.Option("--strict", help="Warnings count as problems, too.")
    ] = False,
) -> None:
    """Check a config repo: each file, each field, and what they say of each other.

    Exit codes: 0 valid, 1 there are problems, 2 it cannot be read.
    """
    with open_reading(where, ref, path) as reading:
        found = reading.effective().problems
        problems = [replace(p, location=reading.place(p.location)) for p in found]
        objects = len(reading.loaded.objects)
        holding = {obj.location.path for obj in reading.loaded.objects.values()}
        files = len(holding | reading.loaded.failed_paths)
        errors = sum(p.severity == "error" for p in problems)
        if output is Output.JSON:
            answer_json(
                {
                    "revision": reading.revision or None,
                    "objects": objects,
                    "files": files,
                    "errors": errors,
                    "warnings": len(problems) - errors,
                    "problems": [problem_json(p) for p in problems],
                }
            )
        else:
            paint = painter(sys.stdout)
            for original, problem in zip(found, problems, strict=True):
                if output is Output.GITHUB:
                    answer(github_line(problem))
                    continue
                answer(problem_line(problem, paint))
                if sys.stdout.isatty():
                    for line in excerpt(problem, reading.line(original.location), paint):
                        answer(line)
            note(summary_line(objects, files, problems, painter(sys.stderr)))
    if errors or (strict and problems):
        raise typer.Exit(ANSWER_IS_NO)
