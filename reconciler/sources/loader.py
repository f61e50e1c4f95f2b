"""A snapshot of the repo -> `Loaded`: every object, every problem, and what they stand for.

A file is parsed again only when its content or its path changed. Files that fail do not stop the
others. Not here: Git (git_source), one file (config_file), references between objects
(core.references).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from reconciler.core.config import ConfigObject, Loaded, Location, ObjectKey, Problem
from reconciler.errors import SourceInvalid
from reconciler.sources.base import FileEntry, Snapshot, Source
from reconciler.sources.config_file import ConfigFile, key_problems, parse_config_file
from reconciler.sources.desired_paths import IGNORE_FILE, DesiredPaths, IgnoreFileError, under
from reconciler.sources.directory_source import DirectorySource
from reconciler.sources.yaml_document import Limits

_SEARCHED_BYTES = 8 * 1024 * 1024
_NOTHING = ConfigFile()


class Loader:
    """Loads snapshots one after another; what it remembers is bounded by the newest one's tree."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._files: dict[FileEntry, ConfigFile] = {}
        self._last: tuple[Snapshot, Loaded] | None = None

    def load(self, snapshot: Snapshot, source: Source) -> Loaded:
        """Every object and problem of a snapshot; `source` is where it was fetched from.

        Raises:
            SourceInvalid: there is no YAML file at all, or the ignore file cannot be read; either
                way nothing can be said of what is desired.
            Transient: from `source.read`.
        """
        if self._last and _same_content(self._last[0], snapshot):
            return replace(self._last[1], revision=snapshot.revision)
        rule = _rule(snapshot, source)
        files = self._parse_files(snapshot, source, rule)
        desired = [entry for entry in files if rule.desired(entry.path)]
        refused = tuple(p for p in snapshot.problems if not rule.ignored(p.location.path))
        if not desired and not refused:
            at = f" at {snapshot.revision[:12]}" if snapshot.revision else ""
            raise SourceInvalid(
                f"there is no .yaml or .yml file under {snapshot.root or 'the root'}{at}; "
                "an empty repo never deletes what runs"
            )
        self._files = files
        loaded = _combine(snapshot.revision, files, frozenset(desired), refused)
        self._last = (snapshot, loaded)
        return loaded

    def last_good(self, source: Source, path: str) -> tuple[ConfigObject, ...]:
        """The objects of the newest earlier version of a file that loads without an error.

        For a reconciler that starts while a file is broken; () where no version ever loaded.

        Raises:
            SourceUnreachable: the history could not be read.
        """
        for entry in source.earlier_versions(path):
            if entry.size_bytes > self._limits.size_bytes:
                continue
            for _, raw in source.read([entry]):
                earlier = parse_config_file(path, raw, self._limits)
                if earlier.objects and not earlier.failed:
                    return earlier.objects
        return ()

    def _parse_files(
        self, snapshot: Snapshot, source: Source, rule: DesiredPaths
    ) -> dict[FileEntry, ConfigFile]:
        files: dict[FileEntry, ConfigFile] = {}
        unread: list[FileEntry] = []
        for entry in snapshot.entries:
            if rule.ignored(entry.path):
                continue
            desired = rule.desired(entry.path)
            if known := self._files.get(entry):
                files[entry] = known
            elif entry.size_bytes > (self._limits.size_bytes if desired else _SEARCHED_BYTES):
                files[entry] = _too_large(entry, self._limits) if desired else _not_searched(entry)
            else:
                unread.append(entry)
        for entry, raw in source.read(unread):
            if rule.desired(entry.path):
                files[entry] = parse_config_file(entry.path, raw, self._limits)
            else:
                problems = key_problems(entry.path, raw)
                files[entry] = ConfigFile(problems=problems) if problems else _NOTHING
        return files


def load_directory(path: Path, limits: Limits | None = None) -> Loaded:
    """A folder without its Git history, by the same rules: for checking before a commit.

    Raises:
        SourceInvalid: it is no folder, or holds no YAML file.
    """
    source = DirectorySource(path)
    return Loader(limits).load(source.fetch(), source)


def _same_content(one: Snapshot, other: Snapshot) -> bool:
    return (one.root, one.entries, one.problems) == (other.root, other.entries, other.problems)


def _rule(snapshot: Snapshot, source: Source) -> DesiredPaths:
    path = under(snapshot.root, IGNORE_FILE)
    entry = next((entry for entry in snapshot.entries if entry.path == path), None)
    if entry is None:
        return DesiredPaths(snapshot.root)
    raw = b"".join(content for _, content in source.read([entry]))
    try:
        return DesiredPaths.parse(snapshot.root, raw)
    except IgnoreFileError as error:
        raise SourceInvalid(f"{path}:{error.line}:1: {error}") from None


def _too_large(entry: FileEntry, limits: Limits) -> ConfigFile:
    message = (
        f"the file has {entry.size_bytes} bytes; at most {limits.size_bytes} are read, "
        "split it in several"
    )
    return ConfigFile(problems=(Problem(Location(entry.path, 1, 1), message),))


def _not_searched(entry: FileEntry) -> ConfigFile:
    message = (
        f"not searched for keys, as it has {entry.size_bytes} bytes; "
        f"keep large files out of the config repo, or list it in {IGNORE_FILE}"
    )
    return ConfigFile(problems=(Problem(Location(entry.path), message, "warning"),))


def _digest(desired: Iterable[FileEntry]) -> str:
    """What is desired, by paths and contents; nothing else in the repo can change it."""
    digest = hashlib.sha256()
    for entry in sorted(desired):
        digest.update(f"{entry.path}\0{entry.blob}\n".encode())
    return digest.hexdigest()


def _combine(
    revision: str,
    files: Mapping[FileEntry, ConfigFile],
    desired: frozenset[FileEntry],
    refused: tuple[Problem, ...],
) -> Loaded:
    by_key: defaultdict[ObjectKey, list[ConfigObject]] = defaultdict(list)
    problems = list(refused)
    failed = {problem.location.path for problem in refused}
    for entry, file in sorted(files.items(), key=_by_path):
        problems += file.problems
        if file.failed and entry in desired:
            failed.add(entry.path)
        for one in file.objects:
            by_key[one.key].append(one)
    objects: dict[ObjectKey, ConfigObject] = {}
    for key, found in sorted(by_key.items()):
        if len(found) == 1:
            objects[key] = found[0]
            continue
        for one in found:
            other = next(o for o in found if o is not one)
            message = f"{key} stands twice, also at {other.location}; rename or delete one of them"
            problems.append(Problem(one.at("metadata", "name"), message, key=key))
            failed.add(one.location.path)
    return Loaded(
        revision=revision,
        digest=_digest(desired),
        objects=objects,
        problems=tuple(sorted(problems, key=_order)),
        failed_paths=frozenset(failed),
    )


def _by_path(item: tuple[FileEntry, ConfigFile]) -> FileEntry:
    return item[0]


def _order(problem: Problem) -> tuple[Location, str]:
    return problem.location, problem.message
