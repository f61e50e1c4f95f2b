"""The config repo as the loop asks for it: fetched and loaded in a thread, one at a time.

Not here: Git (sources.git_source) or YAML (sources.loader).
"""

from __future__ import annotations

import asyncio

from reconciler.core.config import ConfigObject, Loaded, ObjectKey
from reconciler.core.last_good import Objects
from reconciler.loop.ports import Head, Reading
from reconciler.sources.git_source import GitSource
from reconciler.sources.loader import Loader


class GitConfig:
    """Reads a Git source; `head` and `rewritten_from` are of the last successful read."""

    def __init__(self, source: GitSource, loader: Loader | None = None) -> None:
        self._source = source
        self._loader = loader or Loader()
        self.head: Head | None = None
        self.rewritten_from: str | None = None

    async def read(self, last_good: Objects | None) -> Reading:
        return await asyncio.to_thread(self._read, last_good)

    def _read(self, last_good: Objects | None) -> Reading:
        snapshot = self._source.fetch()
        loaded = self._loader.load(snapshot, self._source)
        earlier = self._earlier(loaded) if last_good is None else {}
        self.head = self._head(snapshot.revision)
        self.rewritten_from = snapshot.rewritten_from
        return Reading(loaded, earlier)

    def _earlier(self, loaded: Loaded) -> dict[ObjectKey, ConfigObject]:
        """A reconciler that remembers nothing finds in history what a broken file last held."""
        return {
            obj.key: obj
            for path in sorted(loaded.failed_paths)
            for obj in self._loader.last_good(self._source, path)
        }

    def _head(self, revision: str) -> Head:
        if self.head is not None and self.head.revision == revision:
            return self.head
        message = self._source.commit_message(revision)
        return Head(revision, message, self._source.parents(revision))
