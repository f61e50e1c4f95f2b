"""Durations (`1h30m`) and sizes (`16Gi`) as YAML writes them; seconds and bytes inside.

Not here: Kubernetes' full quantity grammar (milli-units, exponents): nothing here needs it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

_DURATION: Final = re.compile(
    r"(?=\d)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?"
)
DURATION_PATTERN: Final = (
    r"^(?=\d)([0-9]+d)?([0-9]+h)?([0-9]+m(?!s))?([0-9]+(\.[0-9]+)?s)?([0-9]+ms)?$"
)
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(Ki|Mi|Gi|Ti|K|M|G|T|KB|MB|GB|TB|k)?B?")
SIZE_PATTERN: Final = r"^[0-9]+(\.[0-9]+)? ?(Ki|Mi|Gi|Ti|k|K|M|G|T)?B?$"
_UNIT: Final = {
    None: 1,
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
    """`1d`, `2h`, `1h30m`, `15s`, `1.5s`, `250ms` -> seconds.

    Raises:
        ValueError: with what would be right.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no duration; write it like 15s, 250ms, 5m or 1h30m")
    days, hours, minutes, seconds, millis = (float(g) if g else 0.0 for g in match.groups())
    return days * 86400 + hours * 3600 + minutes * 60 + seconds + millis / 1000


def format_duration(seconds: float) -> str:
    """The shortest writing of a duration that parses back to it (to the millisecond)."""
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
    """`512Mi`, `16Gi`, `80GB`, `1024` -> bytes.

    Raises:
        ValueError: with what would be right.
    """
    match = _SIZE.fullmatch(text)
    unit = match.group(2) if match else None
    if match is None or (unit or None) not in _UNIT:
        raise ValueError(f"{text!r} is no size; write it like 512Mi, 16Gi or 80GB")
    return round(float(match.group(1)) * _UNIT[unit])


def format_size(size_bytes: int) -> str:
    """The shortest exact writing of a size."""
    for unit in ("Ti", "Gi", "Mi", "Ki"):
        if size_bytes and size_bytes % _UNIT[unit] == 0:
            return f"{size_bytes // _UNIT[unit]}{unit}"
    return str(size_bytes)


def _duration(value: Any) -> Any:
    if isinstance(value, str):
        return parse_duration_s(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"{value} has no unit; write it like {value}s")  # noqa: TRY004 - for people
    return value


def _size(value: Any) -> Any:
    if isinstance(value, str):
        return parse_size_bytes(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"{value} has no unit; write it like {value}Gi")  # noqa: TRY004 - for people
    return value


Duration = Annotated[
    float,
    BeforeValidator(_duration),
    Field(ge=0, le=366 * 86400),
    PlainSerializer(format_duration, return_type=str),
    WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN, "examples": ["15s", "1h30m"]}),
]
"""Seconds inside, `15s` outside."""

Size = Annotated[
    int,
    BeforeValidator(_size),
    Field(ge=0),
    PlainSerializer(format_size, return_type=str),
    WithJsonSchema({"type": "string", "pattern": SIZE_PATTERN, "examples": ["16Gi", "80GB"]}),
]
"""Bytes inside, `16Gi` outside."""
