"""The engine's log: bounded, and no trouble for the engine when the disk makes some."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.backends.local import log_writer
from reconciler.backends.local.log_writer import BoundedLog
from tests.support import eventually_sync


@given(chunks=st.lists(st.binary(min_size=1, max_size=300), max_size=40))
def test_two_files_of_bounded_size_end_with_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("logs")
    path = folder / "engine.log"
    log = BoundedLog(str(path), 1000)
    for chunk in chunks:
        log.write(chunk)
    log.close()
    older = folder / "engine.log.1"
    kept = (older.read_bytes() if older.exists() else b"") + (
        path.read_bytes() if path.exists() else b""
    )
    whole = b"".join(chunks)
    assert whole.endswith(kept)
    assert len(kept) >= min(len(whole), 700)
    assert all(f.stat().st_size <= 1000 for f in folder.iterdir())


def test_a_full_disk_loses_output_and_says_so_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    path.symlink_to("/dev/full")
    log = BoundedLog(str(path), 1000)
    log.write(b"lost")
    log.write(b"lost too")
    path.unlink()
    log.write(b"kept")
    log.close()
    text = path.read_text()
    assert text.endswith("]\nkept")
    assert "No space left on device" in text
    assert "12 bytes" in text


def test_a_folder_that_is_gone_loses_output_only(tmp_path: Path) -> None:
    log = BoundedLog(str(tmp_path / "gone" / "engine.log"), 1000)
    log.write(b"lost")
    (tmp_path / "gone").mkdir()
    log.write(b"kept")
    log.close()
    assert (tmp_path / "gone" / "engine.log").read_text().endswith("kept")


def test_it_appends_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    for word in (b"one ", b"two "):
        log = BoundedLog(str(path), 1000)
        log.write(word)
        log.close()
    assert path.read_text() == "one two "


def test_as_a_process_it_ends_with_its_last_writer(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    read_end, write_end = os.pipe()
    second = os.dup(write_end)
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", log_writer.__file__, str(path), "1000"], stdin=read_end
    )
    os.close(read_end)
    os.write(write_end, b"one ")
    os.close(write_end)
    eventually_sync(lambda: path.read_text() == "one ")
    process.terminate()
    os.write(second, b"two ")
    eventually_sync(lambda: path.read_text() == "one two ")
    assert process.poll() is None
    os.close(second)
    assert process.wait(timeout=10) == 0
