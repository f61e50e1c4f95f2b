"""A function's routing over Platform's, field by field."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from schemas.routing_policy import Routing, RoutingDefaults, resolve
from tests.unit.schemas import objects

platforms = objects.record(
    policy=objects.policies,
    weights=objects.weights(),
    sessionAffinity=objects.affinity,
    timeouts=objects.timeouts,
    retries=objects.retries,
    queue=objects.queue,
).map(RoutingDefaults.model_validate)
functions = objects.record(
    policy=st.none() | objects.policies,
    weights=st.none() | objects.weights(),
    sessionAffinity=st.none() | objects.affinity,
    timeouts=st.none() | objects.timeouts,
    retries=st.none() | objects.retries,
    queue=st.none() | objects.queue,
).map(Routing.model_validate)


@given(functions, platforms)
def test_every_field_is_the_functions_where_it_says_and_platforms_otherwise(
    mine: Routing, defaults: RoutingDefaults
) -> None:
    effective = resolve(mine, defaults)
    assert effective.policy == (mine.policy or defaults.policy)
    for group in ("weights", "session_affinity", "timeouts", "retries", "queue"):
        written = getattr(mine, group)
        for field in type(getattr(defaults, group)).model_fields:
            said = written is not None and field in written.model_fields_set
            source = written if said else getattr(defaults, group)
            assert getattr(getattr(effective, group), field) == getattr(source, field)


def test_one_timeout_leaves_the_others_to_platform() -> None:
    mine = Routing.model_validate({"timeouts": {"firstByte": "5m"}})
    defaults = RoutingDefaults.model_validate({"timeouts": {"connect": "1s", "firstByte": "30s"}})
    effective = resolve(mine, defaults).timeouts
    assert (effective.connect, effective.first_byte, effective.between_chunks) == (1, 300, 60)


@given(platforms)
def test_a_function_that_says_nothing_has_platforms(defaults: RoutingDefaults) -> None:
    assert resolve(Routing(), defaults) == defaults
