"""Which names in a tree are accepted: those that mean the same to Git, a shell, a person, a path.

Pure. Not here: which of the accepted files are desired state (desired_paths).
"""

from __future__ import annotations


def name_problem(path: str) -> str | None:
    """What is wrong with a repo path, or None. Bytes that are not UTF-8 come as surrogates."""
    if any("\udc80" <= character <= "\udcff" for character in path):
        return "the name is not UTF-8; rename the file"
    if any(not character.isprintable() for character in path):
        return "the name holds a control or invisible character; rename the file"
    if "\\" in path:
        return "the name holds a backslash; rename the file"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "the path holds an empty part, . or ..; rename the folder"
    return None


def printable(path: str) -> str:
    """A path for people: unchanged, but for what cannot be shown."""
    shown = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
