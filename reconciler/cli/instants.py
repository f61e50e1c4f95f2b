"""Points in time as people give them to commands: `90d` from now, a date, or an RFC 3339 instant."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from schemas.quantities import parse_duration_s


def parse_instant(text: str, now: datetime) -> datetime:
    """In UTC, to the second. A duration counts from `now`; a date means 00:00 UTC of that day.

    Raises:
        ValueError: with what would be right.
    """
    try:
        return (
            (now + timedelta(seconds=parse_duration_s(text))).astimezone(UTC).replace(microsecond=0)
        )
    except ValueError:
        pass
    try:
        value = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is no time; write a duration from now (90d, 12h), a date (2027-01-31) "
            "or an instant (2027-01-31T12:00:00Z)"
        ) from None
    if value.tzinfo is None:
        if len(text) > len("2027-01-31"):
            raise ValueError(f"{text!r} has no time zone; write it like {text}Z")
        value = value.replace(tzinfo=UTC)
    return value.astimezone(UTC).replace(microsecond=0)


def format_instant(value: datetime) -> str:
    """RFC 3339 in UTC with `Z`, as the config repo writes it."""
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def format_age(seconds: float) -> str:
    """How long ago, as kubectl says it: `45s`, `12m`, `3h`, `6d`."""
    seconds = max(0, int(seconds))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size or (unit == "d" and seconds >= size):
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
