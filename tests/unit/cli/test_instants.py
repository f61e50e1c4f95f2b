"""Points in time as commands take and give them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.cli.instants import format_age, format_instant, parse_instant

NOW = datetime(2026, 11, 23, 12, 0, 0, 999, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("90d", "2027-02-21T12:00:00Z"),
        ("1h30m", "2026-11-23T13:30:00Z"),
        ("2027-01-31", "2027-01-31T00:00:00Z"),
        ("2027-01-31T12:00:00Z", "2027-01-31T12:00:00Z"),
        ("2027-01-31T12:00:00+02:00", "2027-01-31T10:00:00Z"),
    ],
)
def test_what_a_person_writes(text: str, meant: str) -> None:
    assert format_instant(parse_instant(text, NOW)) == meant


@pytest.mark.parametrize("text", ["soon", "90", "2027-13-01", "", "2027-01-31T12:00:00"])
def test_what_is_no_time_says_what_would_be(text: str) -> None:
    with pytest.raises(ValueError, match="write"):
        parse_instant(text, NOW)


@given(st.integers(0, 4_000_000_000), st.integers(-12, 12))
def test_an_instant_survives_writing(unix_s: int, hours: int) -> None:
    moment = datetime.fromtimestamp(unix_s, timezone(timedelta(hours=hours)))
    assert parse_instant(format_instant(moment), NOW) == moment


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-5, "0s"),
        (45, "45s"),
        (119, "119s"),
        (120, "2m"),
        (7199, "119m"),
        (7200, "2h"),
        (86400, "1d"),
    ],
)
def test_age(seconds: float, shown: str) -> None:
    assert format_age(seconds) == shown
