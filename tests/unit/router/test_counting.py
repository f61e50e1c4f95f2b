from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.in_flight import InFlight
from router.records import RequestRecord
from router.telemetry.access_log import line
from router.telemetry.merge_metrics import merge


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=30), st.randoms())
def test_what_is_given_back_leaves_nothing_in_whatever_order(replicas, chance):
    in_flight = InFlight()
    emptied: list[str] = []
    in_flight.on_idle = emptied.append
    for replica in replicas:
        in_flight.sent(replica)
    assert in_flight.by_replica == {r: replicas.count(r) for r in set(replicas)}
    ending = list(replicas)
    chance.shuffle(ending)
    for replica in ending:
        in_flight.ended(replica)
    assert in_flight.by_replica == {}
    assert sorted(emptied) == sorted(set(replicas))


ONE = """\
# HELP detoserve_router_requests_total Finished requests.
# TYPE detoserve_router_requests_total counter
detoserve_router_requests_total{function="a"} 3.0
# HELP seconds S.
# TYPE seconds histogram
seconds_bucket{le="1.0"} 1.0
seconds_bucket{le="+Inf"} 2.0
seconds_count 2.0
seconds_sum 5.0
# HELP detoserve_router_table_generation G.
# TYPE detoserve_router_table_generation gauge
detoserve_router_table_generation 7.0
# HELP detoserve_router_table_age_seconds A.
# TYPE detoserve_router_table_age_seconds gauge
detoserve_router_table_age_seconds 7.0
# HELP detoserve_router_in_flight F.
# TYPE detoserve_router_in_flight gauge
detoserve_router_in_flight{replica="r"} 2.0
"""


def test_counts_of_workers_add_up_and_of_the_rest_the_worst_is_shown():
    other = ONE.replace(" 7.0", " 6.0").replace('{function="a"} 3.0', '{function="b"} 4.0')
    lines = merge([ONE, other]).decode().splitlines()
    for expected in (
        'detoserve_router_requests_total{function="a"} 3.0',
        'detoserve_router_requests_total{function="b"} 4.0',
        'seconds_bucket{le="+Inf"} 4.0',
        "seconds_count 4.0",
        "seconds_sum 10.0",
        "detoserve_router_table_generation 6.0",
        "detoserve_router_table_age_seconds 7.0",
        'detoserve_router_in_flight{replica="r"} 4.0',
    ):
        assert expected in lines


def test_one_workers_metrics_come_through_unchanged_and_none_is_no_error():
    assert set(ONE.splitlines()) <= set(merge([ONE]).decode().splitlines())
    assert merge([]) == b""


def test_a_log_line_is_json_with_times_in_milliseconds():
    record = RequestRecord("/v1/chat/completions?x=1", "chat", started=1.0)
    record.first_body = 1.25
    record.ended = 2.0
    shown = json.loads(line(record, 1700000000.0))
    assert shown["path"] == "/v1/chat/completions"
    assert shown["ttft_ms"] == 250
    assert shown["duration_ms"] == pytest.approx(1000)
    assert json.loads(line(RequestRecord("/", "", started=1.0), 0.0))["ttft_ms"] is None
