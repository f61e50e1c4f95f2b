"""Who may reach what: every tenant, every model, every path, whatever a client says of itself."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.core.api import PASSED
from schemas import api_keys
from schemas.wire.routing import Arm, Cluster, Function, Key, Policy, Replica, RoutingTable, Tenant
from tests.behaviour.router.harness import (
    CHAT,
    FakeEngine,
    fake_engine,
    function,
    http,
    post,
    raw,
    routing_table,
    running_router,
)

NAMES = ("red", "green", "blue")
KEYS = {name: api_keys.create() for name in NAMES}
CLAIMS = (
    "",
    "X-Detoserve-Tenant: {other}\r\n",
    "X-User-Id: {other}\r\nX-Forwarded-User: {other}\r\n",
    "X-Consumer-Username: {other}\r\nCookie: tenant={other}\r\n",
    "X-Request-Id: {other}\r\nOpenAI-Organization: {other}\r\n",
)


def tenants(grants: dict[str, set[str]]) -> tuple[Tenant, ...]:
    return tuple(
        Tenant(
            name=name,
            models=tuple(sorted(grants[name])),
            keys=(Key(id=KEYS[name].id, sha256=bytes.fromhex(KEYS[name].sha256)),),
        )
        for name in NAMES
    )


def a_request(path: str, model: str, tenant: str, claim: str) -> bytes:
    headers = claim.format(other=next(n for n in NAMES if n != tenant))
    if PASSED[path].multipart:
        body = (
            f'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n--B--\r\n'
        ).encode()
        headers += "Content-Type: multipart/form-data; boundary=B\r\n"
    else:
        body = json.dumps({"model": model}).encode()
    return post(body, path=path, headers=headers, key=KEYS[tenant].text)


@given(
    grants=st.fixed_dictionaries({name: st.sets(st.sampled_from(NAMES)) for name in NAMES}),
    asked=st.lists(
        st.tuples(
            st.sampled_from(NAMES),
            st.sampled_from(NAMES),
            st.sampled_from(["name", "served", "alias"]),
            st.sampled_from(sorted(PASSED)),
            st.sampled_from(CLAIMS),
        ),
        min_size=1,
        max_size=12,
    ),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_key_reaches_its_own_tenants_models_and_no_other(tmp_path, grants, asked):
    asyncio.run(_reaches(tmp_path, grants, asked))


async def _reaches(tmp_path, grants, asked) -> None:
    async with fake_engine() as red, fake_engine() as green, fake_engine() as blue:
        engines: dict[str, FakeEngine] = dict(zip(NAMES, (red, green, blue), strict=True))
        functions = [
            function(engine.url, name=name, served_name=f"org/{name}", aliases=(f"{name}-latest",))
            for name, engine in engines.items()
        ]
        table = routing_table(*functions, tenants=tenants(grants))
        async with running_router(table, tmp_path, probe_interval_s=0) as router:
            for who, whose, called, path, claim in asked:
                model = {"name": whose, "served": f"org/{whose}", "alias": f"{whose}-latest"}
                before = {name: len(engine.received) for name, engine in engines.items()}
                answer = await raw(router.port, a_request(path, model[called], who, claim))
                status = int(answer.split()[1])
                reached = [n for n, e in engines.items() if len(e.received) > before[n]]
                if whose in grants[who]:
                    assert (status, reached) == (200, [whose])
                    head = engines[whose].received[-1].head
                    assert KEYS[who].text.encode() not in head
                else:
                    assert (status, reached) == (404, [])
                    assert b"model_not_found" in answer
            for who in NAMES:
                listing = post(b"", path="/v1/models", key=KEYS[who].text).replace(b"POST", b"GET")
                body = (await raw(router.port, listing)).partition(b"\r\n\r\n")[2]
                assert {model["root"] for model in json.loads(body)["data"]} == grants[who]
            router.assert_idle()


METADATA = (
    "http://169.254.169.254/latest/meta-data",
    "http://[::ffff:169.254.169.254]/",
    "http://[fe80::1]/",
    "http://[fd00:ec2::254]/",
    "http://0.0.0.0",
    "http://2852039166/",
    "http://0xa9fea9fe/",
)


@pytest.mark.parametrize("url", METADATA)
async def test_no_table_leads_to_a_metadata_service(tmp_path, url):
    table = routing_table(function(url, policy=Policy(connect_timeout_s=5)))
    async with running_router(table, tmp_path, probe_interval_s=0) as router:
        loop = asyncio.get_running_loop()
        started = loop.time()
        answer = await raw(router.port, post(CHAT))
        assert b" 502 " in answer or b" 503 " in answer
        assert loop.time() - started < 2  # refused, not tried


async def test_a_name_counts_by_all_its_addresses(tmp_path):
    """localhost is 127.0.0.1 and perhaps ::1; a network that holds neither bars both."""
    async with fake_engine() as engine:
        url = engine.url.replace("127.0.0.1", "localhost")
        for cidrs, status in ((("127.0.0.0/8", "::1/128"), b" 200 "), (("10.0.0.0/8",), b" 502 ")):
            arm = Arm(deployment="d", cluster="c", replicas=(Replica(id="r", url=url),))
            table: RoutingTable = routing_table(
                Function(name="sim", served_name="sim", arms=(arm,)),
                clusters=(Cluster(name="c", endpoint_cidrs=cidrs),),
            )
            async with running_router(table, tmp_path, probe_interval_s=0) as router:
                assert status in await raw(router.port, post(CHAT))
        assert len(engine.received) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_of_an_engine_are_not_followed(tmp_path, status):
    async with fake_engine() as secret:
        redirect = http(b"{}", f"{status} Elsewhere", f"Location: {secret.url}/v1/models\r\n")
        async with (
            fake_engine(redirect) as engine,
            running_router(
                routing_table(function(engine.url)), tmp_path, probe_interval_s=0
            ) as router,
        ):
            assert f" {status} ".encode() in await raw(router.port, post(CHAT))
            assert secret.connections == 0
