"""Durations and sizes: what is read is what is written, and mistakes are told in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from schemas.quantities import (
    MAX_DURATION_S,
    Duration,
    PositiveDuration,
    Size,
    format_duration,
    format_size,
    parse_duration_s,
    parse_size_bytes,
)


@given(st.integers(0, MAX_DURATION_S * 1000).map(lambda ms: ms / 1000))
def test_durations_survive_being_written(seconds: float) -> None:
    text = format_duration(seconds)
    assert parse_duration_s(text) == seconds
    assert format_duration(parse_duration_s(text)) == text


@given(st.integers(1, 2**60))
def test_sizes_survive_being_written(size_bytes: int) -> None:
    text = format_size(size_bytes)
    assert parse_size_bytes(text) == size_bytes
    assert len(text) <= len(str(size_bytes))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("15s", 15),
        ("0s", 0),
        ("250ms", 0.25),
        ("1.5s", 1.5),
        ("90m", 5400),
        ("1h30m", 5400),
        ("1d2h3m4s5ms", 93784.005),
    ],
)
def test_durations_people_write(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize(
    ("seconds", "text"), [(15, "15s"), (1200, "20m"), (5400, "1h30m"), (0.25, "250ms"), (0, "0s")]
)
def test_durations_are_written_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "15",
        "s",
        "15 s",
        "-1s",
        "1m1h",
        "1.5h",
        "1e3s",
        "0.0001s",
        "15s\n",
        "\u0661\u0665s",
        "inf",
        "1h 5m",
    ],
)
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="write it like 15s"):
        parse_duration_s(text)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1024", 1024),
        ("512Mi", 512 * 2**20),
        ("16 Gi", 16 * 2**30),
        ("80GB", 80 * 10**9),
        ("16GiB", 16 * 2**30),
        ("1.5Ti", 3 * 2**39),
        ("999999999999.999k", 999_999_999_999_999),
    ],
)
def test_sizes_people_write(text: str, size_bytes: int) -> None:
    assert parse_size_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(16 * 2**30, "16Gi"), (80 * 10**9, "80G"), (1, "1"), (1500, "1500")]
)
def test_sizes_are_written_short(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize("text", ["", "Gi", "16 gi", "-1Gi", "1e3", "0", "0Gi", "16Gb", "9" * 5000])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="write it like 512Mi"):
        parse_size_bytes(text)


@given(st.text(alphabet="0123456789.dhmsKMGTiB -", max_size=12))
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    for adapter in (TypeAdapter(Duration), TypeAdapter(PositiveDuration), TypeAdapter(Size)):
        try:
            value = adapter.validate_python(text)
        except ValidationError:
            continue
        written = adapter.dump_python(value)
        assert adapter.validate_python(written) == value


@pytest.mark.parametrize("value", [15, 1.5])
def test_a_number_lacks_its_unit(value: float) -> None:
    with pytest.raises(ValidationError, match=f"write it like {value}s"):
        TypeAdapter(Duration).validate_python(value)
    with pytest.raises(ValidationError, match=f"write it like {value}Gi"):
        TypeAdapter(Size).validate_python(value)


def test_zero_where_it_would_mean_never() -> None:
    assert TypeAdapter(Duration).validate_python("0s") == 0
    with pytest.raises(ValidationError, match="above 0"):
        TypeAdapter(PositiveDuration).validate_python("0s")
