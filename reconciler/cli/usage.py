"""`detoserve usage`: who used how much, from the ledger in Git. Reads Git and nothing else.

Not here: the forms (usage_view), or how usage gets into the ledger (loop.ledger_task).
"""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from reconciler.cli.repository import Repository
from reconciler.cli.terminal import (
    ANSWER_IS_NO,
    answer,
    answer_json,
    command_app,
    fail,
    painter,
)
from reconciler.cli.usage_view import (
    UsageView,
    csv_text,
    of_tenant,
    periods,
    table_lines,
    usage_json,
)
from reconciler.core.ledger import LedgerInvalid, day_in, parse_day
from reconciler.errors import SourceInvalid
from reconciler.publish.ledger_file import open_document
from schemas.wire.envelope import public_key_from_hex

app = command_app()

_PERIOD: Final = re.compile(r"\d{4}-\d{2}(-\d{2})?")


class Output(StrEnum):
    """How usage is written on stdout."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


class By(StrEnum):
    """What sums are of."""

    TENANT = "tenant"
    KEY = "key"
    FUNCTION = "function"
    DAY = "day"


@app.command()
def usage(
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="Config repo, a folder or a URL.")
    ] = ".",
    month: Annotated[
        str | None,
        typer.Option(metavar="YYYY-MM", help="[default: this month, UTC]", show_default=False),
    ] = None,
    day: Annotated[
        str | None, typer.Option(metavar="YYYY-MM-DD", help="One day.", show_default=False)
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this tenant's.", show_default=False)
    ] = None,
    by: Annotated[By, typer.Option(help="What sums are of.")] = By.TENANT,
    output: Annotated[
        Output,
        typer.Option(
            "--output", "-o", help="table for eyes; csv: every row of the ledger; json: the sums."
        ),
    ] = Output.TABLE,
    branch: Annotated[
        str, typer.Option(metavar="BRANCH", help="Where the reconciler commits usage.")
    ] = "detoserve/status",
    public_key: Annotated[
        str | None,
        typer.Option(
            metavar="HEX|FILE",
            help="Checks the ledger's signatures by the public key of routing tables.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show who used how much, from the ledger on the status branch.

    Tokens are what engines counted; input includes cached. A request counts on the day it ended, UTC.
    Exit codes: 0 fine, 1 a day is not signed by --public-key, 2 the ledger cannot be read.
    """
    if month and day:
        fail("--month and --day exclude each other")
    wanted = day or month or datetime.now(UTC).strftime("%Y-%m")
    if not _PERIOD.fullmatch(wanted) or (month and len(wanted) != 7):
        fail(f"{wanted!r} is no {'day' if day else 'month'}; write it like 2026-11 or 2026-11-23")
    key = _public_key(public_key) if public_key else None
    with Repository.open(repo, [branch]) as repository:
        view = _read(repository, branch, wanted, key)
    if tenant is not None:
        view = of_tenant(view, tenant)
    match output:
        case Output.CSV:
            answer(csv_text(view))
        case Output.JSON:
            answer_json(usage_json(view, by.value))
        case Output.TABLE:
            answer("\n".join(table_lines(view, by.value, painter(sys.stdout))))
    if view.unsigned:
        if output is not Output.TABLE:
            fail(f"not signed by this key: {', '.join(view.unsigned)}", ANSWER_IS_NO)
        raise typer.Exit(ANSWER_IS_NO)


def _public_key(text: str) -> Ed25519PublicKey:
    path = Path(text)
    try:
        return public_key_from_hex(path.read_text(encoding="ascii") if path.is_file() else text)
    except (ValueError, OSError) as error:
        fail(f"--public-key: {error}")


def _read(
    repository: Repository, branch: str, wanted: str, key: Ed25519PublicKey | None
) -> UsageView:
    """The newest ledger.

    Raises:
        SourceInvalid: there is no such branch, or a document of the ledger is broken.
    """
    commit = repository.find(branch)
    if commit is None:
        raise SourceInvalid(
            f"{repository.label} has no branch {branch}: no reconciler has written there yet, or to "
            "another branch (Platform spec.status.branch; then give --branch), or it is not fetched"
        )
    entries = {
        found: entry
        for entry in repository.tree(commit, "").entries
        if (found := day_in(entry.path))
    }
    days, signed = {}, set()
    for entry, data in repository.read_blobs(entries[found] for found in periods(entries, wanted)):
        opened = open_document(data, key)
        try:
            name, rows = parse_day(opened.document)
        except LedgerInvalid as error:
            raise SourceInvalid(f"{entry.path} at {commit[:7]}: {error}") from None
        days[name] = rows
        if opened.signed:
            signed.add(name)
    return UsageView(wanted, commit, days, frozenset(signed), checked=key is not None)
