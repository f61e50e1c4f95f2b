"""When to look at the config repo again. A notice says "fetch now" and nothing else.

A poll is what is sure; a watch on a local repo's refs and the webhook make it fast. Losing either
costs time, never a change. Not here: fetching (git_source).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from watchfiles import Change, awatch

log = logging.getLogger("detoserve.sources")

_DEBOUNCE_MS: Final = 20
_STEP_MS: Final = 10
_CHECK_MS: Final = 2_000
_LOST_PAUSE_S: Final = 1.0
_INTERVAL_CHECK_S: Final = 1.0
"""The interval is an object of the config repo: it is not known at the start, and may be edited."""


def local_git_dir(remote: str) -> Path | None:
    """The Git directory of a remote on this machine; None for any other."""
    path = Path(unquote(urlsplit(remote).path)) if remote.startswith("file://") else Path(remote)
    for candidate in (path / ".git", path):
        if (candidate / "HEAD").is_file() and (candidate / "objects").is_dir():
            return candidate
    marker = path / ".git"
    if marker.is_file():
        # A linked work tree: its refs are in the repository that it names.
        named = marker.read_text(errors="replace").removeprefix("gitdir:").strip()
        common = (path / named / "commondir").resolve()
        if common.is_file():
            return (common.parent / common.read_text().strip()).resolve()
    return None


def moves_a_branch(branch: str, git_dir: Path) -> Callable[[Change, str], bool]:
    """Which file events can mean that the branch moved. Lock files and other branches do not.

    A new folder on the way to the branch does: what came into it before it was watched is not told.
    """
    heads = git_dir / "refs" / "heads"
    ref = heads / branch
    exact = {str(ref), str(git_dir / "packed-refs")}
    exact.update(str(folder) for folder in ref.parents if heads in folder.parents)
    tables = str(git_dir / "reftable")

    def matters(_: Change, path: str) -> bool:
        return path in exact or path.startswith(tables)

    return matters


async def poll(notify: Callable[[], None], interval_s: Callable[[], float]) -> None:
    """Notifies every so often, until cancelled. A shorter interval takes effect within a second."""
    loop = asyncio.get_running_loop()
    last = loop.time()
    while True:
        left_s = last + max(0.1, interval_s()) - loop.time()
        if left_s > 0:
            await asyncio.sleep(min(left_s, _INTERVAL_CHECK_S))
            continue
        last = loop.time()
        notify()


async def watch_refs(remote: str, branch: str, notify: Callable[[], None]) -> None:
    """Notifies within tens of milliseconds of a move of a local repo's branch, until cancelled.

    Returns at once for a remote elsewhere. Where watching fails, the poll goes on alone.
    """
    git_dir = local_git_dir(remote)
    if git_dir is None:
        return
    git_dir = git_dir.resolve()
    matters = moves_a_branch(branch, git_dir)
    tables = git_dir / "reftable"
    await asyncio.gather(
        _follow(git_dir, matters, notify, recursive=False),
        _follow(git_dir / "refs" / "heads", matters, notify, recursive=True),
        *([_follow(tables, matters, notify, recursive=False)] if tables.is_dir() else []),
    )


async def _follow(
    path: Path,
    matters: Callable[[Change, str], bool],
    notify: Callable[[], None],
    *,
    recursive: bool,
) -> None:
    """Watches one folder; takes it up again after it was replaced or could not be watched."""
    said = ""
    gone = (Change.deleted, str(path))
    while True:
        certain = False
        try:
            folder = _identity(path)
            async for changes in awatch(
                path,
                watch_filter=lambda *event: event == gone or matters(*event),
                debounce=_DEBOUNCE_MS,
                step=_STEP_MS,
                rust_timeout=_CHECK_MS,
                yield_on_timeout=True,
                recursive=recursive,
            ):
                if gone in changes or _identity(path) != folder:
                    break
                if changes or not certain:
                    # Before it is certain also without a change: one may have come before the watch.
                    notify()
                certain = not _has_folder(where for _, where in changes)
        except (OSError, RuntimeError) as error:
            if said != str(error):
                log.warning("cannot watch %s, polling alone: %s", path, error)
            said = str(error)
        await asyncio.sleep(_LOST_PAUSE_S)


def _has_folder(paths: Iterable[str]) -> bool:
    return any(Path(path).is_dir() for path in paths)


def _identity(path: Path) -> tuple[int, int]:
    """Another folder moved here under the same name is one of which the watch sees nothing."""
    status = path.stat()
    return status.st_dev, status.st_ino
