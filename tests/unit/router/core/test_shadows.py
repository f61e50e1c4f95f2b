from __future__ import annotations

from router.core.snapshot import kept_from, snapshot
from schemas.wire.routing import Arm, Function, Replica, RoutingTable, Tenant


def arm(name: str, percent: float | None = None, state: str = "ready", **more) -> Arm:
    replica = Replica(id=f"{name}-0", url="http://h:1", state=state)
    return Arm(deployment=name, cluster="c", shadow_percent=percent, replicas=(replica,), **more)


def test_a_shadow_is_no_candidate_and_serves_only_tenants_it_may():
    arms = (
        arm("stable"),
        arm("next", 10.0),
        arm("theirs", 20.0, tenants=("other",)),
        arm("going", 30.0, state="draining"),
    )
    function = Function(name="f", served_name="f", arms=arms)
    made = snapshot(
        RoutingTable(generation=1, revision="", published_at=0.0, functions=(function,))
    )
    team, other = (Tenant(name=name, models=("*",)) for name in ("team", "other"))
    assert [c.deployment for c in made.candidates(function, team)] == ["stable"]
    assert [(s.deployment, s.percent) for s in made.shadows(function, team)] == [("next", 10.0)]
    assert [s.deployment for s in made.shadows(function, other)] == ["next", "theirs"]
    assert made.replicas.keys() == {"stable-0", "next-0", "theirs-0", "going-0"}
    assert kept_from(arms[2], team, ()) == "of other tenants"
    elsewhere = Tenant(name="team", clusters=("eu-*",))
    assert kept_from(arms[0], elsewhere, ()) == "cluster c is not the tenant's"
