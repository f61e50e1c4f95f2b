"""`detoserve`: the commands for people, scripts and pull-request checks.

Each command is a module with a typer `app`, imported only when it is called, so that `--help` and
`validate` answer at once; those about the router's decisions are the router's own, known here by name. Exit codes everywhere: 0 fine, 1 the answer is no (problems, not ready),
2 the question could not be asked (usage, unreadable), 130 interrupted. Answers go to stdout, all
else to stderr. Not here: any command.
"""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from typing import Annotated, Any, Final, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from reconciler.cli.terminal import UNASKABLE, complain, fail
from reconciler.errors import ReconcileError


class Entry(NamedTuple):
    """A command before it is loaded: the module that holds its `app`, and its line in --help."""

    module: str
    summary: str


COMMANDS: Final[dict[str, Entry]] = {
    "up": Entry("reconciler.cli.up", "Run everything on this machine."),
    "reconcile": Entry("reconciler.cli.reconcile", "Make what runs match a config repo."),
    "validate": Entry("reconciler.cli.validate", "Check a config repo."),
    "plan": Entry("reconciler.cli.plan", "Show what a change would do."),
    "render": Entry("reconciler.cli.render", "Show what backends and routers would be told."),
    "status": Entry("reconciler.cli.status", "Show what runs, from the status branch."),
    "usage": Entry("reconciler.cli.usage", "Show who used how much, from the status branch."),
    "explain": Entry("router.commands.explain", "Show why a request went where it did."),
    "replay": Entry("router.commands.replay", "Show what another policy would change."),
    "keys": Entry("reconciler.cli.keys", "Create, import, rotate and revoke API keys."),
    "schemas": Entry("reconciler.cli.schemas", "Write the JSON Schemas of the kinds."),
}


GARBAGE_EVERY: Final = 20_000
"""Objects made between two looks for cyclic garbage; records of a repo hold no cycles. By Python's
own 700, a repo of 10,000 deployments is searched through again and again while it is read."""


class LazyGroup(TyperGroup):
    """Lists commands from COMMANDS, and imports only the one that is called."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        for name, entry in COMMANDS.items():
            self.add_command(TyperCommand(name, help=entry.summary), name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, listed, rest = super().resolve_command(ctx, args)
        if listed is None or name is None:
            return name, listed, rest
        try:
            module = import_module(COMMANDS[name].module)
        except ModuleNotFoundError as error:
            package = COMMANDS[name].module.partition(".")[0]
            fail(f"`detoserve {name}` needs {error.name}: install detoserve[{package}]")
        return name, typer.main.get_command(module.app), rest


app = typer.Typer(
    cls=LazyGroup,
    help="Serve large language models across many clusters from one Git repository.",
    epilog="Exit codes: 0 fine, 1 the answer is no, 2 it could not be asked, 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - slow to import

    try:
        typer.echo(f"detoserve {version('detoserve')}")
    except PackageNotFoundError:
        complain("detoserve is not installed as a package; install it to give it a version")
        raise typer.Exit(UNASKABLE) from None
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    """What comes before the command's name."""


def main() -> None:
    """The entry point. An error that has a meaning is one line; a defect keeps its traceback."""
    gc.set_threshold(GARBAGE_EVERY)
    try:
        typer.main.get_command(app)(prog_name="detoserve")
    except ReconcileError as error:
        complain(str(error))
        sys.exit(UNASKABLE)
    except BaseExceptionGroup as group:
        known, defects = group.split(ReconcileError)
        if known is None or defects is not None:
            raise
        complain(str(_first(known)))
        sys.exit(UNASKABLE)
    finally:
        _lose_what_stderr_cannot_take()


def _lose_what_stderr_cannot_take() -> None:
    """A full disk behind stderr must not turn the exit code into Python's 120."""
    try:
        sys.stderr.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stderr.fileno())
        os.close(null)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
