"""The ledger as a table with bars, as CSV and as JSON."""

from __future__ import annotations

import csv
import io

import pytest

from reconciler.cli.terminal import plain
from reconciler.cli.usage_view import (
    UsageView,
    bar,
    csv_text,
    grouped,
    of_tenant,
    periods,
    table_lines,
    usage_json,
)
from reconciler.core.ledger import Row, Sums

VIEW = UsageView(
    "2026-11",
    "0123456789",
    {
        "2026-11-22": {
            Row("red", "k1", "chat"): Sums(1000, 0, 50_000, 1_000, 7_000, 2_000_000_000)
        },
        "2026-11-23": {
            Row("red", "k2", "chat"): Sums(10, 4, 500, 0, 70, 1_000_000_000),
            Row("blue", "k3", "embed"): Sums(1, 0, 7, 0, 0, 1_000_000_000),
        },
    },
)


def test_a_table_has_a_bar_for_each_tenants_share_of_the_cost():
    assert list(table_lines(VIEW, "tenant", plain)) == [
        "usage of 2026-11, as committed at 0123456",
        "",
        "tenant  requests   input  cached  output  cost USD",
        "blue           1       7       0       0    1.0000  █████                 25%",
        "red        1,010  50,500   1,000   7,070    3.0000  ███████████████       75%",
        "all        1,011  50,507   1,000   7,070    4.0000",
        "",
        "4 of 1,011 requests are counted by routers, because their engine did not say",
    ]


def test_where_nothing_costs_anything_bars_are_of_tokens():
    free = UsageView(
        "d", "c", {"d": {Row("a", "", ""): Sums(1, 0, 3), Row("b", "", ""): Sums(1, 0, 1)}}
    )
    shares = [line[-4:] for line in table_lines(free, "tenant", plain)][3:5]
    assert shares == [" 75%", " 25%"]
    assert list(table_lines(UsageView("d", "c"), "key", plain))[-1] == "none"


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.0, ""), (0.0001, "▏"), (0.5, "█" * 10), (0.51, "█" * 10 + "▎"), (1.0, "█" * 20)],
)
def test_bars_are_exact_to_an_eighth(share, shown):
    assert bar(share) == shown.ljust(20)


def test_sums_are_of_what_is_asked():
    assert list(grouped(VIEW, "day")) == [("2026-11-22",), ("2026-11-23",)]
    assert list(grouped(VIEW, "key")) == [("blue", "k3"), ("red", "k1"), ("red", "k2")]
    assert grouped(VIEW, "function")["red", "chat"].requests == 1010
    assert list(grouped(of_tenant(VIEW, "blue"), "tenant")) == [("blue",)]
    assert periods(["2026-11-02", "2026-12-02"], "2026-11") == ["2026-11-02"]
    assert periods(["2026-11-02", "2026-11-20"], "2026-11-02") == ["2026-11-02"]


def test_csv_has_every_row_of_the_ledger():
    rows = list(csv.DictReader(io.StringIO(csv_text(VIEW))))
    assert [(row["date"], row["tenant"]) for row in rows] == [
        ("2026-11-22", "red"),
        ("2026-11-23", "blue"),
        ("2026-11-23", "red"),
    ]
    assert rows[0]["costUSD"] == "2.000000000"


def test_json_says_whether_signatures_are_good():
    assert usage_json(VIEW, "tenant")["signed"] is None
    checked = UsageView("p", "c", VIEW.days, frozenset({"2026-11-22"}), checked=True)
    assert usage_json(checked, "tenant")["signed"] is False
    assert checked.unsigned == ["2026-11-23"]
    assert "2026-11-23" in list(table_lines(checked, "tenant", plain))[1]
    assert usage_json(VIEW, "key")["totals"]["costUSD"] == "4.000000000"
