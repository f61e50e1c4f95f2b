"""`detoserve keys`: API keys are made here, shown once, and kept in Git as hashes only.

The key itself goes to stdout and nowhere else; everything about it goes to stderr, so that
`KEY=$(detoserve keys create ...)` holds the key and a person still sees what to do.
Not here: the form of keys (schemas.api_keys), or editing YAML (tenant_file).
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic import ValidationError

from reconciler.cli.instants import format_instant, parse_instant
from reconciler.cli.terminal import answer, answer_json, command_app, fail, note
from reconciler.edit.tenant_file import (
    EditRefused,
    KeyEntry,
    add_key,
    expire_key,
    key_entries,
    remove_key,
    render_entry,
)
from reconciler.errors import SourceInvalid
from schemas.api_keys import ApiKey, create, digest, find_keys
from schemas.api_keys import key_id as id_inside
from schemas.tenant import Key

app = command_app(no_args_is_help=True, help="Create, import, rotate and revoke API keys.")

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class Output(StrEnum):
    """How the answer is written on stdout."""

    TEXT = "text"
    JSON = "json"


Tenant = Annotated[
    str, typer.Option("--tenant", "-t", metavar="NAME", help="Tenant that the key belongs to.")
]
RepoDir = Annotated[
    Path | None,
    typer.Option(
        "--repo",
        metavar="DIR",
        help="Clone of the config repo: the tenant's file in it is edited. Unset: nothing is written.",
    ),
]
HereRepo = Annotated[
    Path,
    typer.Option(
        "--repo", metavar="DIR", help="Clone of the config repo. [default: .]", show_default=False
    ),
]
SubPath = Annotated[
    str,
    typer.Option(
        "--path",
        metavar="SUBDIR",
        help="Where in the repo the config stands. [default: its root]",
        show_default=False,
    ),
]
Commit = Annotated[
    bool,
    typer.Option(
        "--commit", help="Commit the edited file (needs --repo). [default: leave it to you]"
    ),
]
Expires = Annotated[
    str | None,
    typer.Option(
        metavar="WHEN",
        help="Refused from then on: 90d or 12h from now, 2027-01-31 (00:00 UTC) or an RFC 3339 instant. "
        "[default: never]",
    ),
]
NotBefore = Annotated[
    str | None,
    typer.Option(
        metavar="WHEN", help="Refused until then; written as for --expires. [default: now]"
    ),
]
Scopes = Annotated[
    str,
    typer.Option(metavar="LIST", help="What it may do, comma-separated: inference, debug, usage."),
]
OutputOption = Annotated[
    Output,
    typer.Option(
        "--output", "-o", help="text: the key alone on stdout; json: one object on stdout."
    ),
]
KeyId = Annotated[str, typer.Option("--id", metavar="ID", help="Public id of the key.")]


@app.command("create")
def create_key(
    tenant: Tenant,
    key_id: Annotated[
        str | None,
        typer.Option(
            "--id",
            metavar="ID",
            help="Public id for logs and bills. [default: the one inside the key]",
        ),
    ] = None,
    expires: Expires = None,
    not_before: NotBefore = None,
    scopes: Scopes = "inference",
    repo: RepoDir = None,
    path: SubPath = "",
    commit: Commit = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Make a new key and show it once.

    The key goes to stdout; its hash, for the tenant's file, to stderr or with --repo into the file.
    """
    _refuse_stdout_in_repo(repo)
    key = create()
    entry = _entry(key_id or key.id, key.sha256, expires, not_before, scopes)
    written = _write(
        repo,
        path,
        tenant,
        lambda text: add_key(text, tenant, entry),
        message=f"Add key {entry['id']} for tenant {tenant}" if commit else None,
    )
    _show_key(key, tenant, entry, written, output)


@app.command("import")
def import_key(
    tenant: Tenant,
    sha256: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="SHA-256 of the whole key, 64 hexadecimal digits."),
    ] = None,
    stdin: Annotated[
        bool, typer.Option("--stdin", help="Read the key itself from stdin and hash it.")
    ] = False,
    key_id: Annotated[
        str | None,
        typer.Option(
            "--id",
            metavar="ID",
            help="Public id for logs and bills. [default: imported- and 8 digits of the hash]",
        ),
    ] = None,
    expires: Expires = None,
    not_before: NotBefore = None,
    scopes: Scopes = "inference",
    repo: RepoDir = None,
    path: SubPath = "",
    commit: Commit = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Take over a key of another gateway.

    Its clients need not change. Only the hash is kept, and the key itself is never shown.
    """
    if stdin == (sha256 is not None):
        fail("give either --sha256 HEX, or --stdin with the key itself on stdin")
    if stdin:
        text = sys.stdin.read().strip()
        if len(text) < 16 or any(c.isspace() for c in text):
            fail(
                "stdin must hold one key of at least 16 characters without spaces, and nothing else"
            )
        hashed, key_id = digest(text).hex(), key_id or id_inside(text)
    else:
        hashed = (sha256 or "").lower()
        if find_keys(hashed) or find_keys(sha256 or "") or not _SHA256.fullmatch(hashed):
            fail(
                "--sha256 takes 64 hexadecimal digits; a key itself belongs on stdin, with --stdin"
            )
    entry = _entry(key_id or f"imported-{hashed[:8]}", hashed, expires, not_before, scopes)
    written = _write(
        repo,
        path,
        tenant,
        lambda text: add_key(text, tenant, entry),
        message=f"Add imported key {entry['id']} for tenant {tenant}" if commit else None,
    )
    if output is Output.JSON:
        answer_json({"id": entry["id"], "tenant": tenant, "entry": entry, **written})
    elif written:
        note(_where(written, tenant))
    else:
        answer(render_entry(entry))


@app.command("revoke")
def revoke_key(
    tenant: Tenant,
    key_id: KeyId,
    repo: HereRepo = Path(),
    path: SubPath = "",
    commit: Commit = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Remove a key from its tenant's file.

    Routers refuse it once the commit is in effect.
    """
    written = _write(
        repo,
        path,
        tenant,
        lambda text: remove_key(text, tenant, key_id),
        message=f"Revoke key {key_id} of tenant {tenant}" if commit else None,
    )
    if output is Output.JSON:
        answer_json({"id": key_id, "tenant": tenant, **written})
    else:
        note(f"Removed key {key_id} of Tenant/{tenant}. {_where(written, tenant)}")


@app.command("rotate")
def rotate_key(
    tenant: Tenant,
    key_id: KeyId,
    new_id: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Public id of the new key. [default: the one inside the key]"
        ),
    ] = None,
    overlap: Annotated[
        str, typer.Option(metavar="DURATION", help="How long the old key still works: 0s, 24h, 7d.")
    ] = "24h",
    expires: Expires = None,
    repo: HereRepo = Path(),
    path: SubPath = "",
    commit: Commit = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Replace a key, with an overlap.

    The new key has the old one's scopes and limits; the old one expires after --overlap.
    """
    _refuse_stdout_in_repo(repo)
    key = create()
    now = datetime.now(UTC)
    until = _instant("--overlap", overlap, now)
    entry: KeyEntry = {}

    def rotate(text: str) -> str:
        old = next((k for k in key_entries(text, tenant) if k.get("id") == key_id), {})
        kept = {name: old[name] for name in ("scopes", "limits") if name in old}
        entry.update(_entry(new_id or key.id, key.sha256, expires, None, "inference") | kept)
        ends = old.get("expires")
        # An end that stands in the file is not put off by a rotation.
        sooner = ends is not None and datetime.fromisoformat(str(ends)) <= until
        made = text if sooner else expire_key(text, tenant, key_id, format_instant(until))
        return add_key(made, tenant, entry)

    written = _write(
        repo,
        path,
        tenant,
        rotate,
        message=f"Rotate key {key_id} of tenant {tenant} to {new_id or key.id}" if commit else None,
    )
    _show_key(key, tenant, entry, written, output)


def _entry(
    key_id: str, sha256: str, expires: str | None, not_before: str | None, scopes: str
) -> KeyEntry:
    """One item of `spec.keys`, checked by the kind's own model."""
    now = datetime.now(UTC)
    entry: KeyEntry = {"id": key_id, "sha256": sha256}
    if not_before:
        entry["notBefore"] = format_instant(_instant("--not-before", not_before, now))
    if expires:
        end = _instant("--expires", expires, now)
        if end <= now:
            fail(f"--expires {expires} is in the past; the key would never work")
        entry["expires"] = format_instant(end)
    wanted = [scope.strip() for scope in scopes.split(",") if scope.strip()]
    if wanted != ["inference"]:
        entry["scopes"] = wanted
    try:
        Key.model_validate(entry)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        option = {"id": "--id", "scopes": "--scopes", "expires": "--expires"}.get(
            field, field or "the key"
        )
        fail(f"{option}: {first['msg'].removeprefix('Value error, ')}")
    return entry


def _instant(option: str, text: str, now: datetime) -> datetime:
    try:
        return parse_instant(text, now)
    except ValueError as error:
        fail(f"{option}: {error}")


def _write(
    repo: Path | None, path: str, tenant: str, edit: Callable[[str], str], *, message: str | None
) -> dict[str, str]:
    """Edits the tenant's file where a repo is given; what was written where, for the answer."""
    if repo is None:
        if message is not None:
            fail("--commit needs --repo DIR, a clone of the config repo")
        return {}
    from reconciler.core.config import ObjectKey  # noqa: PLC0415
    from reconciler.edit.work_tree import WorkTree, write_atomically  # noqa: PLC0415 - slow to import

    tree = WorkTree.open(repo, path)
    file = tree.file_of(ObjectKey("Tenant", tenant))
    with file.open(encoding="utf-8", newline="") as opened:
        text = opened.read()
    try:
        edited = edit(text)
    except EditRefused as error:
        fail(f"{file}: {error}")
    write_atomically(file, edited)
    written = {"file": str(file)}
    if message is not None:
        try:
            written["commit"] = tree.commit(file, message)
        except SourceInvalid:
            # The key is shown to nobody then, so its hash must not stay.
            write_atomically(file, text)
            raise
    return written


def _show_key(
    key: ApiKey, tenant: str, entry: KeyEntry, written: dict[str, str], output: Output
) -> None:
    if output is Output.JSON:
        result: dict[str, Any] = {"key": key.text, "id": entry["id"], "tenant": tenant}
        answer_json({**result, "entry": entry, **written})
        return
    note(
        "The key, shown only this once:"
        if sys.stdout.isatty()
        else "The key is on stdout, only this once."
    )
    answer(key.text)
    if written:
        note(_where(written, tenant))
    else:
        note(
            f"Nothing is written. Add its hash to spec.keys of Tenant/{tenant}, or use --repo DIR:"
        )
        note(render_entry(entry).rstrip("\n"))


def _where(written: dict[str, str], tenant: str) -> str:
    if commit := written.get("commit"):
        return f"Committed {commit[:12]}: {written['file']}"
    return f"Edited {written['file']}; it is in effect for Tenant/{tenant} once you commit and push it."


def _refuse_stdout_in_repo(repo: Path | None) -> None:
    """A key redirected into a file of a Git work tree would sooner or later be committed."""
    mode = os.fstat(sys.stdout.fileno())
    if not stat.S_ISREG(mode.st_mode):
        return
    target = Path(f"/dev/fd/{sys.stdout.fileno()}").resolve()
    tops = [parent for parent in target.parents if (parent / ".git").exists()]
    if repo is not None and target.is_relative_to(repo.resolve()):
        tops.append(repo.resolve())
    if tops:
        fail(
            f"stdout is {target}, a file in the Git repository {tops[0]}; keys must not get into Git: "
            "write it elsewhere, or pipe it into your secret store"
        )
