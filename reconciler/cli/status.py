"""`detoserve status`: what runs, as the reconciler last committed it. Reads Git and nothing else.

Not here: writing status (core.status, publish.status_branch), or its form (status_view).
"""

from __future__ import annotations

import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import StrEnum
from types import FrameType
from typing import Annotated, Any, Final, get_args

import typer

from reconciler.cli.repository import Repository
from reconciler.cli.status_view import (
    ObjectStatus,
    StatusView,
    object_json,
    object_lines,
    status_json,
    status_view,
    table_lines,
)
from reconciler.cli.terminal import (
    ANSWER_IS_NO,
    answer,
    answer_json,
    command_app,
    fail,
    note,
    painter,
)
from reconciler.cli.yaml_text import yaml_text
from reconciler.core.suggest import suggestion
from reconciler.errors import SourceInvalid
from reconciler.publish.status_yaml import parse_document
from schemas.base import API_VERSION
from schemas.kinds import Kind
from schemas.quantities import parse_duration_s

app = command_app()

_OBJECT: Final = re.compile(rf"({'|'.join(get_args(Kind))})/([a-z0-9][a-z0-9-]*)", re.IGNORECASE)
_REMOTE_POLL_S: Final = 2.0
_LOCAL_LOOK_S: Final = 1.0


class Output(StrEnum):
    """How status is written on stdout."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


@app.command()
def status(
    what: Annotated[
        str,
        typer.Argument(
            metavar="REPO|KIND/NAME",
            help="Config repo, a folder or a URL; or an object to show in full, of the repo here.",
        ),
    ] = ".",
    one: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND/NAME", help="An object of REPO to show in full.", show_default=False
        ),
    ] = None,
    branch: Annotated[
        str, typer.Option(metavar="BRANCH", help="Where the reconciler commits status.")
    ] = "detoserve/status",
    output: Annotated[
        Output,
        typer.Option(
            "--output", "-o", help="table for eyes; json; yaml: the documents as they are in Git."
        ),
    ] = Output.TABLE,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show every new status until Ctrl-C.")
    ] = False,
    wait_ready: Annotated[
        bool,
        typer.Option(
            "--wait-ready",
            help="Wait until everything is ready at the newest commit of --config-branch.",
        ),
    ] = False,
    timeout: Annotated[
        str, typer.Option(metavar="DURATION", help="How long --wait-ready waits: 90s, 10m.")
    ] = "10m",
    config_branch: Annotated[
        str | None,
        typer.Option(
            metavar="BRANCH",
            help="What --wait-ready holds status against. [default: the branch checked out, or main]",
        ),
    ] = None,
) -> None:
    """Show what runs and how well, from the status branch of the config repo.

    Exit codes: 0 everything is ready, 1 something is not, 2 status cannot be read.
    A function that no deployment runs, or that is meant to have no replica, counts as ready.
    """
    where, wanted = _arguments(what, one)
    if watch and wait_ready:
        fail("--watch never ends and --wait-ready does; give one of them")
    try:
        timeout_s = parse_duration_s(timeout)
    except ValueError as error:
        fail(f"--timeout: {error}")
    branches = [branch, config_branch or "main"] if wait_ready else [branch]
    with Repository.open(where, branches) as repository:
        if watch:
            _watch(repository, branch, wanted, output)
            return
        if wait_ready:
            view = _wait_ready(
                repository, branch, config_branch or repository.branch(), wanted, timeout_s
            )
        else:
            view = _read(repository, branch)
        _show(view, wanted, output)
    if not _fine(view, wanted):
        raise typer.Exit(ANSWER_IS_NO)


def _arguments(what: str, one: str | None) -> tuple[str, tuple[str, str] | None]:
    """The repo, and kind and name of the object where one is named."""
    if one is None and (match := _OBJECT.fullmatch(what)):
        return ".", (match[1], match[2])
    if one is None:
        return what, None
    if match := _OBJECT.fullmatch(one):
        return what, (match[1], match[2])
    return fail(f"{one!r} is no object; write KIND/NAME, such as Deployment/chat")


def _read(repository: Repository, branch: str) -> StatusView:
    """The newest status commit.

    Raises:
        SourceInvalid: there is no such branch yet.
    """
    commit = repository.find(branch)
    if commit is None:
        raise SourceInvalid(
            f"{repository.label} has no branch {branch}: no reconciler has written status yet, or to "
            "another branch (Platform spec.status.branch; then give --branch), or it is not fetched"
        )
    documents = [
        document
        for _, raw in repository.files(commit, "status")
        if isinstance(document := parse_document(raw), dict)
    ]
    return status_view(commit, documents)


def _selected(view: StatusView, wanted: tuple[str, str]) -> ObjectStatus:
    found = view.find(*wanted)
    if found is None:
        name = "/".join(wanted)
        hint = suggestion(name, [one.key for one in view.objects])
        raise SourceInvalid(f"there is no status of {name}; {hint}")
    return found


def _fine(view: StatusView, wanted: tuple[str, str] | None) -> bool:
    return _selected(view, wanted).fine if wanted else view.fine


def _show(view: StatusView, wanted: tuple[str, str] | None, output: Output) -> None:
    now = datetime.now(UTC)
    paint = painter(sys.stdout)
    one = _selected(view, wanted) if wanted else None
    match output:
        case Output.JSON:
            answer_json(object_json(one) if one else status_json(view))
        case Output.YAML:
            answer(yaml_text([_document(o) for o in ([one] if one else view.objects)]))
        case Output.TABLE if one:
            answer("\n".join(object_lines(one, now, paint)))
        case Output.TABLE:
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            answer("\n".join(table_lines(view, now, paint, width)))


def _document(one: ObjectStatus) -> dict[str, Any]:
    return {
        "apiVersion": API_VERSION,
        "kind": one.kind,
        "metadata": {"name": one.name},
        "status": dict(one.status),
    }


def _watch(
    repository: Repository, branch: str, wanted: tuple[str, str] | None, output: Output
) -> None:
    shown = ""
    for _ in _moments(repository, [branch], None):
        commit = repository.find(branch) or ""
        if not commit or commit == shown:
            continue
        if shown and sys.stdout.isatty() and output is Output.TABLE:
            answer("\033[H\033[2J\033[3J")
        _show(_read(repository, branch), wanted, output)
        shown = commit


def _wait_ready(
    repository: Repository,
    branch: str,
    config_branch: str,
    wanted: tuple[str, str] | None,
    timeout_s: float,
) -> StatusView:
    """The first status that is as wanted at the config's newest commit, before the deadline."""
    view: StatusView | None = None
    told = ""
    for _ in _moments(repository, [branch, config_branch], time.monotonic() + timeout_s):
        head = repository.resolve(config_branch)
        with suppress(SourceInvalid):
            view = _read(repository, branch)
            if view.revision == head and _fine(view, wanted):
                return view
        said = _waiting_for(view, head, config_branch)
        if said != told:
            note(said)
            told = said
    view = view or _read(repository, branch)
    return fail(f"not ready within {timeout_s:g} s; {told}", ANSWER_IS_NO)


def _waiting_for(view: StatusView | None, head: str, config_branch: str) -> str:
    if view is None:
        return "waiting for a first status"
    if view.revision != head:
        return f"waiting for {config_branch}@{head[:10]}; status speaks of {view.revision[:10]}"
    late = [one for one in view.objects if not one.fine]
    shown = ", ".join(one.key for one in late[:4]) + (
        f" and {len(late) - 4} more" if len(late) > 4 else ""
    )
    return f"waiting for {shown or 'the object'} at {head[:10]}"


def _moments(repository: Repository, branches: list[str], deadline: float | None) -> Iterator[None]:
    """Now, and whenever the branches may have moved, until the deadline (monotonic, seconds).

    A local repository's refs are watched; a remote is asked every two seconds.
    """
    from watchfiles import watch  # noqa: PLC0415 - only here, and slow to import

    def left_s() -> float:
        return float("inf") if deadline is None else deadline - time.monotonic()

    with _interrupts() as interrupted:
        yield
        if repository.is_remote:
            while left_s() > 0:
                if interrupted.wait(min(_REMOTE_POLL_S, max(0.0, left_s()))):
                    raise KeyboardInterrupt
                repository.fetch(branches)
                yield
            return
        # Looked at each second besides, as a ref may move before the watch stands, or by packing.
        for _ in watch(
            repository.git_dir / "refs",
            rust_timeout=int(_LOCAL_LOOK_S * 1000),
            yield_on_timeout=True,
            debounce=50,
            step=20,
            stop_event=interrupted,
        ):
            yield
            if left_s() <= 0:
                return
        raise KeyboardInterrupt  # nothing else stops the watch


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set by Ctrl-C. What that raises is lost where it meets a finalizer, such as those of git's objects."""
    asked = threading.Event()

    def interrupt(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - Python calls it so
        asked.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
