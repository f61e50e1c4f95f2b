"""Replicas that fail, and clients who do not notice."""

from __future__ import annotations

import asyncio
import socket
import ssl

import pytest
from openai import AsyncOpenAI

from router.core.health import FIRST_EJECTION_S
from router.fleet.probes import Probes
from schemas.wire.routing import Arm, Cluster, Function, Policy, Replica
from tests.behaviour.router.harness import (
    CHAT,
    KEY,
    ROUND_ROBIN,
    fake_engine,
    function,
    http,
    post,
    raw,
    routing_table,
    running_router,
    simulated,
    tenant,
)
from tests.support import eventually, free_port


async def test_20_clients_do_not_see_that_one_of_three_replicas_is_killed(tmp_path):
    async with (
        simulated("--itl-s", "0.001") as one,
        simulated("--itl-s", "0.001") as two,
        simulated("--itl-s", "0.001") as three,
    ):
        table = routing_table(function(one.url, two.url, three.url))
        async with (
            running_router(table, tmp_path) as router,
            AsyncOpenAI(base_url=f"{router.url}/v1", api_key=KEY.text, max_retries=0) as client,
        ):
            served = 0

            async def ask(times: int) -> None:
                nonlocal served
                for _ in range(times):
                    await client.chat.completions.create(
                        model="sim", messages=[{"role": "user", "content": "hi"}], max_tokens=4
                    )
                    served += 1

            asking = asyncio.gather(*(ask(12) for _ in range(20)))
            await eventually(lambda: served > 60)
            two.process.kill()
            await asking
            assert served == 240
            retries = router.router.metrics.counts.retries.get("sim", 0)
            assert retries <= 240 * 0.2
            router.assert_idle()


async def test_a_dead_replica_is_left_alone_and_comes_back(tmp_path):
    port = free_port()
    async with fake_engine() as good:
        table = routing_table(function(f"http://127.0.0.1:{port}", good.url, policy=ROUND_ROBIN))
        async with running_router(table, tmp_path, probe_interval_s=0) as router:
            breakers = router.router.state.breakers
            for _ in range(10):
                assert b" 200 " in await raw(router.port, post(CHAT))
            assert router.router.metrics.counts.retries["sim"] == 1  # found out once
            assert not breakers["sim-r0"].admits(asyncio.get_running_loop().time())

            server = await asyncio.start_server(good._serve, "127.0.0.1", port)
            probes = Probes(router.router.state, interval_s=1)
            await probes.round()
            assert breakers == {}
            assert b"sim-r0" in b"".join([await raw(router.port, post(CHAT)) for _ in range(2)])
            server.close()


async def test_a_half_open_breaker_is_closed_by_a_request_without_any_probe(tmp_path):
    failing = True

    async def sometimes(received, writer):
        if failing:
            writer.transport.abort()
        else:
            await http()(received, writer)

    async with fake_engine(sometimes) as shaky, fake_engine() as good:
        table = routing_table(
            function(
                shaky.url,
                good.url,
                policy=Policy(name="round-robin", retry_budget_percent=100),
            )
        )
        async with running_router(table, tmp_path, probe_interval_s=0) as router:
            for _ in range(10):
                assert b" 200 " in await raw(router.port, post(CHAT))
            seen = len(shaky.received)
            assert seen == 3
            failing = False

            async def back() -> bool:
                await raw(router.port, post(CHAT))
                return len(shaky.received) > seen

            await eventually(back, timeout_s=FIRST_EJECTION_S * 4)
            assert router.router.state.breakers == {}


async def test_a_probe_that_says_no_keeps_a_replica_out_before_a_request_finds_out(tmp_path):
    async def sick(received, writer):
        status = "503 Service Unavailable" if b"/health" in received.line else "500 Oops"
        await http(b"{}", status)(received, writer)

    async with fake_engine(sick) as bad, fake_engine() as good:
        table = routing_table(function(bad.url, good.url, policy=ROUND_ROBIN))
        async with running_router(table, tmp_path, probe_interval_s=0) as router:
            await Probes(router.router.state, interval_s=1).round()
            for _ in range(4):
                assert b" 200 " in await raw(router.port, post(CHAT))


async def test_when_every_replica_is_out_they_are_tried_all_the_same(tmp_path):
    table = routing_table(function("http://127.0.0.1:1", "http://127.0.0.1:2"))
    async with running_router(table, tmp_path, probe_interval_s=0) as router:
        for _ in range(5):
            answer = await raw(router.port, post(CHAT))
            assert b" 502 " in answer
            assert b"x-should-retry: true" in answer
        router.assert_idle()


async def test_a_replica_that_takes_no_connection_is_given_up_in_time(tmp_path):
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for waiting in (first, second):  # what has no place in the queue gets no answer at all
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        policy = Policy(name="round-robin", connect_timeout_s=0.3, retry_budget_percent=100)
        async with fake_engine() as good:
            url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
            table = routing_table(function(url, good.url, policy=policy))
            async with running_router(table, tmp_path, probe_interval_s=0) as router:
                for _ in range(3):
                    assert b" 200 " in await raw(router.port, post(CHAT), timeout_s=3)
                assert router.router.metrics.counts.retries["sim"] >= 1
                router.assert_idle()


async def test_a_full_replica_is_spared_for_as_long_as_it_asks(tmp_path):
    busy = http(b"{}", "429 Too Many Requests", "Retry-After: 20\r\n")
    async with fake_engine(busy) as full, fake_engine() as good:
        table = routing_table(function(full.url, good.url, policy=ROUND_ROBIN))
        async with running_router(table, tmp_path, probe_interval_s=0) as router:
            for _ in range(10):
                assert b" 200 " in await raw(router.port, post(CHAT))
            assert len(full.received) == 1


async def test_a_fallback_answers_when_the_function_cannot(tmp_path):
    async with fake_engine() as engine, fake_engine(http(b"{}", "503 Busy")) as busy:
        big = function(busy.url, name="big", served_name="big", fallbacks=("secret", "small"))
        small = function(engine.url, name="small", served_name="org/small")
        secret = function("http://127.0.0.1:1", name="secret", served_name="secret")
        mine = tenant(models=("big", "small"))
        async with running_router(
            routing_table(big, small, secret, tenants=(mine,)), tmp_path, probe_interval_s=0
        ) as router:
            body = b'{"model":"big", "messages":[]}'
            answer = await raw(router.port, post(body))
            assert b" 200 " in answer
            assert b"x-detoserve-route: small-r0;" in answer
            assert engine.received[0].body == b'{"model":"org/small", "messages":[]}'
            # The last one's own refusal reaches the client.
            router.install(routing_table(big, generation=2, tenants=(mine,)))
            assert b" 503 " in await raw(router.port, post(body))


async def test_an_endpoint_outside_its_clusters_networks_is_never_called(tmp_path):
    async with fake_engine() as engine:
        arm = Arm(deployment="d", cluster="fenced", replicas=(Replica(id="r", url=engine.url),))
        metadata = Arm(
            deployment="m",
            cluster="open",
            replicas=(Replica(id="m", url="http://169.254.169.254/latest"),),
        )
        clusters = (Cluster(name="fenced", endpoint_cidrs=("10.0.0.0/8",)), Cluster(name="open"))
        table = routing_table(
            Function(name="a", served_name="a", arms=(arm,)),
            Function(name="b", served_name="b", arms=(metadata,)),
            clusters=clusters,
        )
        async with running_router(table, tmp_path) as router:
            for model in ("a", "b"):
                answer = await raw(router.port, post(b'{"model":"%b"}' % model.encode()))
                assert b" 502 " in answer
            assert engine.connections == 0


@pytest.fixture
def certificate(tmp_path, monkeypatch):
    """A certificate for localhost that this process trusts."""
    import datetime as dt

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "cert.pem"
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return pem


@pytest.mark.parametrize("trusted", [True, False])
async def test_tls_engines_are_verified(tmp_path, certificate, monkeypatch, trusted):
    from router.upstream import pool

    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    pool._tls.cache_clear()
    async with fake_engine() as engine:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        server = await asyncio.start_server(engine._serve, "127.0.0.1", 0, ssl=context)
        url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        async with running_router(
            routing_table(function(url)), tmp_path, probe_interval_s=0
        ) as router:
            answer = await raw(router.port, post(CHAT))
            assert (b" 200 " if trusted else b" 502 ") in answer
            assert len(engine.received) == trusted
        server.close()
    pool._tls.cache_clear()
