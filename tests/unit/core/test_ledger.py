"""The ledger adds up exactly, counts once, and says the same when it is written and read."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.ledger import (
    Ledger,
    LedgerInvalid,
    Row,
    Sums,
    changed_days,
    counted,
    cursor_document,
    day_document,
    day_in,
    day_of,
    day_path,
    months_to_date,
    parse_cursor,
    parse_day,
    total,
    without_old_journals,
)
from reconciler.publish.status_yaml import parse_document, render_document
from schemas.wire.events import UsageRecord

NOON = 1_795_435_200.0  # 2026-11-23T12:00:00Z
DAY_S = 86400.0


def a_record(journal: str, seq: int, **more) -> UsageRecord:
    return UsageRecord(
        **{
            "journal": journal,
            "seq": seq,
            "id": "req_1",
            "tenant": "team",
            "key": "k",
            "function": "chat",
            "revision": "0" * 40,
            "started_at": NOON,
            **more,
        }
    )


names = st.sampled_from(["red", "blue", "on", "1.5", "ä: {}"])
usage = st.fixed_dictionaries(
    {
        "tenant": names,
        "key": names,
        "function": names,
        "input_tokens": st.integers(0, 10**9),
        "output_tokens": st.integers(0, 10**9),
        "cost_nano_usd": st.integers(0, 10**15),
        "estimated": st.booleans(),
        "started_at": st.integers(-3, 3).map(lambda days: NOON + days * DAY_S),
    }
)


@st.composite
def journals(draw) -> list[list[UsageRecord]]:
    return [
        [
            a_record(name, seq, **used)
            for seq, used in enumerate(draw(st.lists(usage, max_size=6)), 1)
        ]
        for name in ("a", "b", "c")
    ]


@st.composite
def readings(draw) -> tuple[list[UsageRecord], list[UsageRecord]]:
    """(records, as they are read): in each journal's order, and now and then some of them again."""
    all_ = draw(journals())
    heads = [0] * len(all_)
    read = []
    while any(head < len(records) for head, records in zip(heads, all_, strict=True)):
        which = draw(st.sampled_from([i for i, h in enumerate(heads) if h < len(all_[i])]))
        back = draw(st.integers(0, heads[which]))
        end = heads[which] + 1
        read += all_[which][end - 1 - back : end]
        heads[which] = end
    return [record for records in all_ for record in records], read


@given(readings(), st.lists(st.integers(0, 40), max_size=4))
def test_every_record_counts_once_however_it_is_read(reading, cuts):
    records, read = reading
    ledger = Ledger()
    at = [0, *sorted(min(cut, len(read)) for cut in cuts), len(read)]
    for begin, end in pairwise(at):
        # As after a restart: from documents alone.
        days = {
            day: parse_day(parse_document(render_document(day_document(day, rows))))[1]
            for day, rows in ledger.days.items()
        }
        cursor = parse_cursor(parse_document(render_document(cursor_document(ledger.journals))))
        assert days == ledger.days
        assert cursor == ledger.journals
        ledger = counted(Ledger(days, cursor), read[begin:end])
    ledger = counted(ledger, read)
    expected: dict[str, dict[Row, Sums]] = {}
    for r in records:
        rows = expected.setdefault(day_of(r), {})
        row = Row(r.tenant, r.key, r.function)
        rows[row] = rows.get(row, Sums()) + Sums(
            1, int(r.estimated), r.input_tokens, 0, r.output_tokens, r.cost_nano_usd
        )
    assert ledger.days == expected
    assert {name: at.seq for name, at in ledger.journals.items()} == {
        r.journal: sum(1 for each in records if each.journal == r.journal) for r in records
    }
    months = months_to_date(ledger, {day[:7] for day in ledger.days})
    assert sum(t.cost_nano_usd for m in months.values() for t in m.values()) == sum(
        r.cost_nano_usd for r in records
    )


def test_a_request_belongs_to_the_day_on_which_it_ended():
    midnight = NOON + DAY_S / 2
    assert day_of(a_record("a", 1, started_at=midnight - 2, duration_s=1.0)) == "2026-11-23"
    assert day_of(a_record("a", 1, started_at=midnight - 2, duration_s=2.0)) == "2026-11-24"
    for started_at in (float("nan"), float("inf"), -1.0):
        record = a_record("a", 1, started_at=started_at)
        assert day_of(record) is None
        ledger = counted(Ledger(), [record])
        assert (ledger.days, ledger.journals["a"].seq) == ({}, 1)


def test_only_days_that_changed_are_written():
    first = counted(Ledger(), [a_record("a", 1), a_record("a", 2, started_at=NOON - DAY_S)])
    then = counted(first, [a_record("a", 3), a_record("a", 1)])
    assert changed_days(first, then) == ["2026-11-23"]
    assert changed_days(then, counted(then, [a_record("a", 3)])) == []


def test_paths_are_days_and_nothing_else():
    assert day_path("2026-11-23") == "usage/2026-11/2026-11-23.yaml"
    assert day_in("usage/2026-11/2026-11-23.yaml") == "2026-11-23"
    for path in ("usage/cursor.yaml", "usage/2026-10/2026-11-23.yaml", "status/summary.yaml"):
        assert day_in(path) is None


def test_journals_are_forgotten_when_nothing_can_come_from_them():
    ledger = counted(
        Ledger(), [a_record("old", 9, started_at=NOON - 50 * DAY_S), a_record("new", 1)]
    )
    assert set(without_old_journals(ledger, "2026-11-23").journals) == {"new"}


@pytest.mark.parametrize(
    "document",
    [
        None,
        {"kind": "UsageDay", "date": "2026-11-23", "totals": {"requests": 1}, "rows": []},
        {"kind": "UsageDay", "totals": {"requests": True}, "rows": []},
        {"kind": "UsageDay", "totals": {"costUSD": "NaN"}, "rows": []},
        {"kind": "UsageDay", "totals": {}, "rows": ["x"]},
        {"kind": "UsageDay", "rows": []},
    ],
)
def test_a_day_that_does_not_add_up_is_refused(document):
    with pytest.raises(LedgerInvalid):
        parse_day(document)


@pytest.mark.parametrize("document", [None, [], {"kind": "UsageCursor", "journals": {"a": 1}}])
def test_what_is_no_cursor_is_refused(document):
    with pytest.raises(LedgerInvalid):
        parse_cursor(document)


def test_costs_are_written_to_the_billionth():
    rows = {Row("t", "k", "f"): Sums(requests=1, cost_nano_usd=1)}
    document = day_document("2026-11-23", rows)
    assert document["totals"]["costUSD"] == "0.000000001"
    assert parse_day(document) == ("2026-11-23", rows)
    assert total(rows.values()).cost_nano_usd == 1
    assert msgspec.json.encode(document)
