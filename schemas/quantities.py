"""Durations (`1h30m`) and sizes (`16Gi`) as YAML writes them; seconds and bytes inside.

Not here: Kubernetes' full quantity grammar (milli-units, exponents): nothing here needs it.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

# One pattern for Python and for JSON Schema: ASCII digits, to the millisecond, bounded in length.
DURATION_PATTERN: Final = (
    r"^(?=[0-9])(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m(?!s))?"
    r"(?:([0-9]{1,9}(?:\.[0-9]{1,3})?)s)?(?:([0-9]{1,12})ms)?$"
)
POSITIVE_DURATION_PATTERN: Final = "^(?=.*[1-9])" + DURATION_PATTERN.removeprefix("^")
SIZE_PATTERN: Final = r"^(?=.*[1-9])([0-9]{1,19}(?:\.[0-9]{1,3})?) ?(Ki|Mi|Gi|Ti|k|K|M|G|T)?B?$"
MAX_DURATION_S: Final = 366 * 86400
MAX_SIZE_BYTES: Final = 2**60

_DURATION: Final = re.compile(DURATION_PATTERN)
_SIZE: Final = re.compile(SIZE_PATTERN)
_UNIT: Final = {
    "": 1,
    "k": 10**3,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


def parse_duration_s(text: str) -> float:
    """`1d`, `2h`, `1h30m`, `15s`, `1.5s`, `250ms` -> seconds, to the millisecond.

    Raises:
        ValueError: with what would be right.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no duration; write it like 15s, 250ms, 5m or 1h30m")
    days, hours, minutes, seconds, millis = (Decimal(group or 0) for group in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds + millis / 1000)


def format_duration(seconds: float) -> str:
    """The shortest writing of a duration that parses back to it, to the millisecond."""
    millis = round(seconds * 1000)
    if millis == 0:
        return "0s"
    parts = []
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, millis = divmod(millis, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


def parse_size_bytes(text: str) -> int:
    """`512Mi`, `16Gi`, `80GB`, `1024` -> bytes; a part of a byte is rounded.

    Raises:
        ValueError: with what would be right.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no size above 0; write it like 512Mi, 16Gi or 80GB")
    return round(Decimal(match.group(1)) * _UNIT[match.group(2) or ""])


def format_size(size_bytes: int) -> str:
    """The shortest exact writing of a size; powers of two where both are as short."""
    return min(
        (
            f"{size_bytes // factor}{unit}"
            for unit in ("Ti", "Gi", "Mi", "Ki", "T", "G", "M", "k", "")
            if size_bytes % (factor := _UNIT[unit]) == 0
        ),
        key=len,
    )


def _duration(value: Any) -> Any:
    if isinstance(value, str):
        return parse_duration_s(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"{value} has no unit; write it like {value}s")  # noqa: TRY004 - for people
    return value


def _positive_duration(value: Any) -> Any:
    seconds = _duration(value)
    if seconds == 0:
        raise ValueError(f"{value!r} must be above 0; write it like 15s, 250ms, 5m or 1h30m")
    return seconds


def _size(value: Any) -> Any:
    if isinstance(value, str):
        return parse_size_bytes(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"{value} has no unit; write it like {value}Gi")  # noqa: TRY004 - for people
    return value


def _text(pattern: str, *examples: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, "examples": list(examples)})


Duration = Annotated[
    float,
    BeforeValidator(_duration),
    Field(ge=0, le=MAX_DURATION_S),
    PlainSerializer(format_duration, return_type=str),
    _text(DURATION_PATTERN, "15s", "1h30m"),
]
"""Seconds inside, `15s` outside."""

PositiveDuration = Annotated[
    float,
    BeforeValidator(_positive_duration),
    Field(gt=0, le=MAX_DURATION_S),
    PlainSerializer(format_duration, return_type=str),
    _text(POSITIVE_DURATION_PATTERN, "15s", "1h30m"),
]
"""Where zero would mean never, or without pause."""

Size = Annotated[
    int,
    BeforeValidator(_size),
    Field(gt=0, le=MAX_SIZE_BYTES),
    PlainSerializer(format_size, return_type=str),
    _text(SIZE_PATTERN, "16Gi", "80GB"),
]
"""Bytes inside, `16Gi` outside."""
