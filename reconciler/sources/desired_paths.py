"""Which files of the repo are desired state. Pure rules over paths.

Desired are `*.yaml` and `*.yml` under the root, save in dot-folders (which holds the generated
`.schemas/`), dot-files, and what `.detoserveignore` at the root lists, in gitignore's syntax.
Not here: what stands in them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

from pathspec import GitIgnoreSpec

IGNORE_FILE: Final = ".detoserveignore"
_MAX_IGNORE_BYTES: Final = 64 * 1024


class IgnoreFileError(ValueError):
    """`.detoserveignore` cannot be read; `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def under(root: str, name: str) -> str:
    """The repo path of a name under the root."""
    return f"{root}/{name}" if root else name


@dataclass(frozen=True)
class DesiredPaths:
    """The rule of one snapshot: its root and what its ignore file lists."""

    root: str
    _ignored: GitIgnoreSpec | None = None

    @classmethod
    def parse(cls, root: str, ignore_file: bytes) -> Self:
        """The rule that an ignore file's text makes.

        Raises:
            IgnoreFileError: a line is no gitignore pattern.
        """
        if len(ignore_file) > _MAX_IGNORE_BYTES:
            raise IgnoreFileError(1, f"the file is larger than {_MAX_IGNORE_BYTES} bytes")
        try:
            lines = ignore_file.decode("utf-8").splitlines()
        except UnicodeDecodeError:
            raise IgnoreFileError(1, "the file is not UTF-8; save it as UTF-8") from None
        for number, line in enumerate(lines, 1):
            try:
                GitIgnoreSpec.from_lines([line])
            except (ValueError, re.error):
                raise IgnoreFileError(
                    number, "this is no gitignore pattern; write it like charts/** or *.tmp.yaml"
                ) from None
        return cls(root, GitIgnoreSpec.from_lines(lines))

    def ignored(self, path: str) -> bool:
        """Listed in the ignore file: neither loaded nor searched for keys."""
        return self._ignored is not None and self._ignored.match_file(self._relative(path))

    def hidden(self, path: str) -> bool:
        """A dot-file or in a dot-folder: not loaded, but searched for keys."""
        return any(part.startswith(".") for part in self._relative(path).split("/"))

    def desired(self, path: str) -> bool:
        return path.endswith((".yaml", ".yml")) and not self.hidden(path) and not self.ignored(path)

    def _relative(self, path: str) -> str:
        return path[len(self.root) + 1 :] if self.root else path
