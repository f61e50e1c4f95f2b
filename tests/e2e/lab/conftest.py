"""The lab as a fixture: the one that is up, else one for this run of the tests."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.e2e.lab.lab import Lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    found = Lab.found()
    began = time.monotonic()
    lab = found or Lab.start()
    print(f"\nlab up after {time.monotonic() - began:.0f} s")
    yield lab
    if found is None:
        lab.stop()
