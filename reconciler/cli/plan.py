"""`detoserve plan`: what a change of the config repo would do, before it is merged. Changes nothing.

Not here: the planning itself (core.plan), or its meaning and form (plan_view, plan_text, plan_markdown).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer

from reconciler.cli.live_state import nothing, predicted, read_live
from reconciler.cli.plan_markdown import plan_markdown
from reconciler.cli.plan_text import plan_lines
from reconciler.cli.plan_view import PlanView, plan_view, view_json
from reconciler.cli.reading import Reading, is_url, read_directory, read_revision
from reconciler.cli.repository import Repository
from reconciler.cli.terminal import ANSWER_IS_NO, answer, answer_json, command_app, fail, painter
from reconciler.core.compile import compile_workloads, places_of, platform_of
from reconciler.core.last_good import Objects
from reconciler.core.observed import Observation, Unknown
from reconciler.core.plan import Confirmation, PlanPolicy, parse_confirmation, plan
from reconciler.errors import ReconcileError, SourceInvalid

app = command_app()

CHANGES: Final = 2
"""Exit code with --exit-code: valid, and something would change."""
_DEFAULT_BRANCHES: Final = ("origin/HEAD", "origin/main", "main", "origin/master", "master")


class Format(StrEnum):
    """How the plan is written on stdout."""

    TEXT = "text"
    MARKDOWN = "markdown"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Base:
    """What a plan starts from. `known`: deployments that the repo has named so far."""

    label: str
    observed: Sequence[Observation | Unknown]
    objects: Objects
    known: frozenset[str] | None
    notes: tuple[str, ...] = ()
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """What a plan leads to, and what its commit says about deletions."""

    label: str
    reading: Reading
    sub_path: str = ""
    """Of the folder in its repository."""
    confirmation: Confirmation | None = None
    parents: tuple[str, ...] = ()


@app.command("plan")
def plan_command(
    where: Annotated[
        str,
        typer.Argument(
            metavar="PATH|REPO", help="Folder as it stands; with --ref, a repository or its URL."
        ),
    ] = ".",
    ref: Annotated[
        str | None,
        typer.Option(
            metavar="BRANCH",
            help="What is wanted: this branch, tag or commit. [default: the files as they are]",
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
    against: Annotated[
        str | None,
        typer.Option(
            metavar="REF|live",
            help="What to compare with: a revision of the repo, or live for what runs on this machine. "
            "[default: where the branch left the default branch]",
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            "--state-dir",
            metavar="DIR",
            help="With --against live: the reconciler's state directory.",
        ),
    ] = None,
    output: Annotated[
        Format,
        typer.Option(
            "--format", "--output", "-o", help="text; markdown for a pull request's comment; json."
        ),
    ] = Format.TEXT,
    exit_code: Annotated[
        bool,
        typer.Option(
            "--exit-code",
            help="Exit with 2 when something would change, 0 when nothing, 1 for the rest.",
        ),
    ] = False,
) -> None:
    """Show what a change would do: what starts, restarts, moves and stops, and what it costs.

    Exit codes: 0 valid, 1 invalid, 2 it cannot be read; see --exit-code.
    """
    if (against == "live") != (state_dir is not None):
        fail(
            "--against live and --state-dir DIR belong together: DIR is where the reconciler keeps its state"
        )
    try:
        with _compared(where, ref, path, against, state_dir) as (base, target):
            view = _view(base, target)
    except ReconcileError as error:
        fail(str(error), ANSWER_IS_NO if exit_code else 2)
    match output:
        case Format.JSON:
            answer_json(view_json(view))
        case Format.MARKDOWN:
            answer(plan_markdown(view))
        case Format.TEXT:
            answer("\n".join(plan_lines(view, painter(sys.stdout))))
    if view.errors:
        raise typer.Exit(ANSWER_IS_NO)
    if exit_code and view.changes_anything:
        raise typer.Exit(CHANGES)


def _view(base: Base, target: Target) -> PlanView:
    before = base.objects
    if not target.reading.revision:
        before = _relative(before, target.sub_path)
    wanted = target.reading.effective(before)
    desired = compile_workloads(wanted, places=places_of(wanted, base.observed))
    policy = PlanPolicy(
        prune=platform_of(wanted.objects).prune,
        known=base.known,
        confirmation=target.confirmation,
        # A confirmation names the commit before the deletions: once merged, that is the base.
        parents=(*target.parents, base.revision) if base.revision else target.parents,
        revision=base.revision or target.reading.revision,
    )
    return plan_view(
        plan(desired, base.observed, policy, now=0.0),
        base.observed,
        desired,
        wanted.objects,
        objects_before=before,
        labels=(base.label, target.label),
        problems=[replace(p, location=target.reading.place(p.location)) for p in wanted.problems],
        notes=list(base.notes),
    )


def _relative(objects: Objects, sub_path: str) -> Objects:
    """Objects with their paths as a folder has them, so that a file that fails keeps what it held."""
    if not sub_path:
        return objects
    return {
        key: replace(
            obj,
            location=replace(obj.location, path=obj.location.path.removeprefix(f"{sub_path}/")),
        )
        for key, obj in objects.items()
    }


@contextmanager
def _compared(
    where: str, ref: str | None, path: str, against: str | None, state_dir: Path | None
) -> Iterator[tuple[Base, Target]]:
    """Both sides, with the repository open as long as they are in use."""
    folder = None if ref is not None or is_url(where) else Path(where, path)
    reading = read_directory(folder) if folder is not None else None
    if folder is not None and reading is not None and not _in_git(folder):
        if against not in (None, "live"):
            raise SourceInvalid(
                f"{folder} is in no Git repository, so there is no {against} to compare with"
            )
        base = _live(state_dir) if state_dir else _empty_base("nothing")
        yield base, Target(f"the files in {folder}", reading)
        return

    ref = ref or ("main" if is_url(where) else None)
    branches = [b for b in (ref, against) if b and b != "live"]
    with Repository.open(where, branches) as repository:
        sub_path = repository.inside(where, path)
        if reading is None:
            assert ref is not None
            reading = read_revision(repository, ref, sub_path)
            label, head = reading.label, reading.revision
        else:
            label, head = f"the files in {folder}", repository.head() or ""
        if state_dir is not None:
            base = _live(state_dir)
        else:
            base = _base(repository, *_base_revision(repository, head, against), sub_path)
        target = Target(label, reading, sub_path)
        if head and head != base.revision:
            target = replace(
                target,
                confirmation=parse_confirmation(repository.message(head)),
                parents=repository.parents(head),
            )
        yield base, target


def _in_git(folder: Path) -> bool:
    folder = folder.resolve()
    return any((parent / ".git").exists() for parent in (folder, *folder.parents))


def _base_revision(repository: Repository, head: str, against: str | None) -> tuple[str, str]:
    """The commit to compare with and its name for people; "" where there is none yet."""
    if against is not None:
        commit = repository.resolve(against)
        return commit, commit[:10] if commit.startswith(against) else f"{against}@{commit[:10]}"
    if not head:
        return "", "nothing, as there is no commit yet"
    for name in (*_target_branches(), *_DEFAULT_BRANCHES):
        tip = repository.find(name)
        if tip is None:
            continue
        common = repository.merge_base(head, tip)
        if common is None:
            raise SourceInvalid(
                f"HEAD and {name} have no common commit here; fetch the whole history "
                "(actions/checkout: fetch-depth: 0; GitLab: GIT_DEPTH: 0), or say --against REVISION"
            )
        if common == head:
            return head, f"HEAD ({head[:10]})"
        return common, f"{name} ({common[:10]}, where this branch left it)"
    return head, f"HEAD ({head[:10]})"


def _target_branches() -> Iterator[str]:
    """The pull request's own target, as the forges' CI names it."""
    for variable in ("GITHUB_BASE_REF", "CI_MERGE_REQUEST_TARGET_BRANCH_NAME"):
        if branch := os.environ.get(variable):
            yield f"origin/{branch}"


def _base(repository: Repository, revision: str, label: str, sub_path: str) -> Base:
    if not revision:
        return _empty_base(label)
    try:
        reading = read_revision(repository, revision, sub_path)
    except SourceInvalid as error:
        return _empty_base(label, f"everything counts as new: {error}")
    before = reading.effective()
    errors = sum(p.severity == "error" for p in before.problems)
    notes = (
        (f"{label} has {errors} errors itself; what is invalid in it is left out",)
        if errors
        else ()
    )
    named = frozenset(key.name for key in before.objects if key.kind == "Deployment")
    return Base(label, predicted(before), before.objects, named, notes, revision)


def _empty_base(label: str, *notes: str) -> Base:
    return Base(label, nothing(), {}, frozenset(), notes)


def _live(state_dir: Path) -> Base:
    live = read_live(state_dir)
    return Base(f"what runs by {state_dir}", live.observed, live.objects, known=live.known)
