"""Requests through the router to engines: what passes, what is changed, what is refused."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
from openai import (
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
)

from schemas.wire.routing import Arm, Replica
from tests.behaviour.router.harness import (
    ALMOST_KEY,
    CHAT,
    FOREIGN_KEY,
    KEY,
    ROUND_ROBIN,
    SSE_HEAD,
    chunk,
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
from tests.support import eventually


async def test_the_openai_client_works_through_the_router(tmp_path):
    async with simulated("--itl-s", "0.001") as engine:
        table = routing_table(function(engine.url, aliases=("gpt-4o",)))
        async with (
            running_router(table, tmp_path) as router,
            AsyncOpenAI(base_url=f"{router.url}/v1", api_key=KEY.text, max_retries=0) as client,
        ):
            messages = [{"role": "user", "content": "Tell me of the sea."}]
            whole = await client.chat.completions.create(
                model="sim", messages=messages, max_tokens=8, seed=1
            )
            assert whole.usage.completion_tokens == 8
            text, usage = "", None
            stream = await client.chat.completions.create(
                model="gpt-4o",
                messages=messages,
                max_tokens=8,
                seed=1,
                stream=True,
                stream_options={"include_usage": True},
            )
            async for event in stream:
                text += "".join(c.delta.content or "" for c in event.choices)
                usage = event.usage or usage
            assert text == whole.choices[0].message.content
            assert usage.completion_tokens == 8
            completion = await client.completions.create(model="sim", prompt="Once", max_tokens=4)
            assert completion.choices[0].text
            embedding = await client.embeddings.create(model="simulated", input=["a", "b"])
            assert len(embedding.data) == 2
            assert [m.id async for m in await client.models.list()] == [
                "sim",
                "simulated",
                "gpt-4o",
            ]
            with pytest.raises(NotFoundError) as unknown:
                await client.chat.completions.create(model="nope", messages=messages)
            assert unknown.value.code == "model_not_found"
            with pytest.raises(BadRequestError):  # the engine's own refusal
                await client.chat.completions.create(
                    model="sim", messages=messages, max_tokens=10_000_000
                )
            bad = client.with_options(api_key="wrong")
            with pytest.raises(AuthenticationError) as wrong:
                await bad.models.list()
            assert wrong.value.code == "invalid_api_key"
            imported = client.with_options(api_key=FOREIGN_KEY)
            assert (await imported.models.retrieve("sim")).id == "sim"
            router.assert_idle()


async def test_body_and_answer_pass_byte_true(tmp_path):
    body = b'{ "messages":[ {"role":"user", "content":"\xc3\xa4 \\u00e4"} ], "zz":1e400, "model" :\n"simulated" }'
    answer = b'{"x": 1.0,\n "y":"\xc3\xa4"}'
    async with (
        fake_engine(http(answer, headers="X-Engine: 7\r\n")) as engine,
        running_router(routing_table(function(engine.url + "/base")), tmp_path) as router,
    ):
        response = await raw(router.port, post(body, path="/v1/chat/completions?a=b%20c"))
        head, _, got = response.partition(b"\r\n\r\n")
        assert got == answer
        assert b"X-Engine: 7" in head
        assert engine.received[0].body == body
        assert engine.received[0].line == b"POST /base/v1/chat/completions?a=b%20c HTTP/1.1"


async def test_only_the_model_is_spliced(tmp_path):
    body = b'{"tools":[{"model":"alias"}],"model" : "alias","note":"\\"model\\": \\"alias\\""}'
    async with (
        fake_engine() as engine,
        running_router(routing_table(function(engine.url, aliases=("alias",))), tmp_path) as router,
    ):
        await raw(router.port, post(body))
        expected = (
            b'{"tools":[{"model":"alias"}],"model" : "simulated","note":"\\"model\\": \\"alias\\""}'
        )
        assert engine.received[0].body == expected


async def test_headers_that_reach_the_engine_and_the_client(tmp_path):
    engine_headers = "X-Request-Id: engines\r\nX-Detoserve-Route: forged\r\nKeep-Alive: 5\r\n"
    sent = (
        "traceparent: 00-aa-bb-01\r\nX-Custom: yes\r\nX-Request-Id: mine\r\nX-Detoserve-Tenant: a\r\n"
        "X-Forwarded-For: 1.2.3.4\r\nX-User-Id: root\r\nCookie: a=b\r\nTE: trailers\r\n"
        "Proxy-Authorization: x\r\nX-Hop: 1\r\nAccept-Encoding: gzip\r\nOpenAI-Organization: o\r\n"
    )
    async with (
        fake_engine(http(headers=engine_headers)) as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
    ):
        request = post(CHAT, headers=sent).replace(
            b"Connection: close", b"Connection: close, X-Hop"
        )
        head = (await raw(router.port, request)).partition(b"\r\n\r\n")[0]
        headers = engine.received[0].headers
        assert headers[b"traceparent"] == b"00-aa-bb-01"
        assert headers[b"x-custom"] == b"yes"
        assert headers[b"x-request-id"] == b"mine"
        assert set(headers) == {
            b"host",
            b"content-length",
            b"x-request-id",
            b"traceparent",
            b"x-custom",
        }
        lines = head.lower().split(b"\r\n")
        assert b"x-request-id: mine" in lines
        routes = [line for line in lines if line.startswith(b"x-detoserve-route")]
        assert len(routes) == 1
        assert routes[0].startswith(b"x-detoserve-route: sim-r0;g=1;d=")
        assert not any(line.startswith((b"keep-alive", b"content-encoding")) for line in lines)


async def test_a_foreign_model_looks_unknown_byte_for_byte(tmp_path):
    mine, theirs = function("http://127.0.0.1:1"), function("http://127.0.0.1:1", name="other")
    table = routing_table(mine, theirs, tenants=(tenant(models=("sim",)),))
    missing = routing_table(mine, tenants=(tenant(models=("sim",)),), generation=2)
    body = b'{"model":"other","messages":[]}'
    async with running_router(table, tmp_path) as router:
        strip = lambda r: [  # noqa: E731
            line
            for line in r.split(b"\r\n")
            if not line.lower().startswith((b"x-request-id", b"date"))
        ]
        foreign = await raw(router.port, post(body))
        one = await raw(
            router.port,
            post(b"", path="/v1/models/other").replace(b"POST", b"GET", 1),
        )
        router.install(missing)
        assert strip(foreign) == strip(await raw(router.port, post(body)))
        assert strip(one) == strip(
            await raw(router.port, post(b"", path="/v1/models/other").replace(b"POST", b"GET", 1))
        )
        assert b" 404 " in foreign
        assert b"model_not_found" in foreign


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (post(b"{"), 400, "invalid_json"),
        (post(b'{"model":"sim"} x'), 400, "invalid_json"),
        (post(b"[]"), 400, "invalid_json"),
        (post(b'{"messages":[]}'), 400, "invalid_json"),
        (post(b'{"model":7}'), 400, "invalid_json"),
        (post(b'{"model":"sim","n":1000}'), 400, "invalid_json"),
        (post(CHAT, headers="Content-Encoding: br2\r\n"), 415, "unsupported_content_encoding"),
        (post(CHAT, headers="Authorization: Bearer other\r\n"), 400, "ambiguous_credentials"),
        (post(CHAT, headers="X-Api-Key: other\r\n"), 400, "ambiguous_credentials"),
        (post(CHAT, key="wrong"), 401, "invalid_api_key"),
        (post(CHAT, key=ALMOST_KEY), 401, "invalid_api_key"),
        (post(CHAT, path="/v1/pause"), 404, "unknown_url"),
        (post(CHAT, path="/v1/chat/completions/"), 404, "unknown_url"),
        (post(CHAT, path="/v1/../v1/chat/completions"), 404, "unknown_url"),
        (post(CHAT, path="/invocations"), 404, "unknown_url"),
        (post(CHAT, path="/health"), 405, "method_not_allowed"),
        (post(CHAT).replace(b"POST", b"PUT", 1), 405, "method_not_allowed"),
        (post(b"").replace(b"POST", b"GET", 1), 404, "not_found"),
        (post(b"", path="/v1/responses/resp_1").replace(b"POST", b"GET", 1), 404, "not_found"),
        (post(b"", path="/v1/responses/..").replace(b"POST", b"GET", 1), 404, "unknown_url"),
        (post(CHAT, path="/v1/embeddings"), 400, "unsupported_endpoint"),
    ],
)
async def test_refusals_are_openai_shaped(tmp_path, request_bytes, status, code):
    table = routing_table(function("http://127.0.0.1:1", tasks=("chat",)))
    async with running_router(table, tmp_path) as router:
        head, _, body = (await raw(router.port, request_bytes)).partition(b"\r\n\r\n")
        assert int(head.split()[1]) == status
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == code
        assert b"x-should-retry" in head
        assert KEY.text.encode() not in head + body


@pytest.mark.parametrize(
    "head",
    [
        "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
        "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n X: folded\r\n\r\n",
        "NONSENSE\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nX: " + "a" * 70_000 + "\r\n\r\n",
    ],
)
async def test_unsound_http_is_refused_without_an_echo(tmp_path, head):
    async with running_router(routing_table(function("http://127.0.0.1:1")), tmp_path) as router:
        answer = await raw(router.port, head.encode())
        assert b" 400 " in answer.partition(b"\r\n")[0]
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


async def test_bodies_over_the_limit_are_413_also_when_they_are_bombs(tmp_path):
    import gzip

    bomb = gzip.compress(b" " * 5_000_000 + CHAT)
    async with (
        fake_engine() as engine,
        running_router(
            routing_table(function(engine.url)), tmp_path, max_body_bytes=1_000_000
        ) as router,
    ):
        for request in (
            post(b" " * 1_000_001),
            post(bomb, headers="Content-Encoding: gzip\r\n"),
            post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            + (b"80000\r\n" + b" " * 0x80000 + b"\r\n") * 3
            + b"0\r\n\r\n",
        ):
            assert b" 413 " in (await raw(router.port, request)).partition(b"\r\n")[0]
        small = gzip.compress(CHAT)
        answer = await raw(router.port, post(small, headers="Content-Encoding: gzip\r\n"))
        assert answer.startswith(b"HTTP/1.1 200")
        assert json.loads(engine.received[0].body)["model"] == "simulated"
        assert b"content-encoding" not in engine.received[0].headers
        router.assert_idle()


async def test_expect_continue_is_answered(tmp_path):
    async with (
        fake_engine() as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        head, _, body = post(CHAT, headers="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_connections_are_kept_alive_on_both_sides(tmp_path):
    async with (
        fake_engine() as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
        aiohttp.ClientSession() as session,
    ):
        for _ in range(5):
            async with session.post(
                f"{router.url}/v1/chat/completions",
                data=CHAT,
                headers={"Authorization": f"Bearer {KEY.text}"},
            ) as response:
                assert await response.json() == {"ok": True}
        assert len(engine.received) == 5
        assert engine.connections == 1


async def test_an_http_1_0_client_gets_a_stream_without_chunks(tmp_path):
    async def stream(_, writer):
        writer.write(SSE_HEAD + chunk(b"data: 1\n\n") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    async with (
        fake_engine(stream) as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
    ):
        request = post(CHAT).replace(b"HTTP/1.1", b"HTTP/1.0")
        head, _, body = (await raw(router.port, request)).partition(b"\r\n\r\n")
        assert body == b"data: 1\n\ndata: [DONE]\n\n"
        assert b"chunked" not in head.lower()


async def test_multipart_goes_by_its_model_field(tmp_path):
    async with (
        fake_engine() as engine,
        running_router(
            routing_table(function(engine.url, aliases=("whisper-1",))), tmp_path
        ) as router,
        AsyncOpenAI(base_url=f"{router.url}/v1", api_key=KEY.text, max_retries=0) as client,
    ):
        audio = bytes(range(256)) * 100
        await client.audio.transcriptions.create(model="whisper-1", file=("a.wav", audio))
        got = engine.received[0]
        assert got.line == b"POST /v1/audio/transcriptions HTTP/1.1"
        assert audio in got.body
        assert b"\r\n\r\nsimulated\r\n" in got.body
        assert b"whisper-1" not in got.body


async def test_requests_spread_by_policy_and_ready_state(tmp_path):
    async with fake_engine() as first, fake_engine() as second:
        table = routing_table(function(first.url, second.url, policy=ROUND_ROBIN))
        async with running_router(table, tmp_path) as router:
            for _ in range(6):
                await raw(router.port, post(CHAT))
            assert (len(first.received), len(second.received)) == (3, 3)
            router.install(routing_table(function(second.url, policy=ROUND_ROBIN), generation=2))
            for _ in range(3):
                await raw(router.port, post(CHAT))
            assert (len(first.received), len(second.received)) == (3, 6)


async def test_a_full_fleet_and_no_fleet_say_so(tmp_path):
    async with running_router(routing_table(function()), tmp_path) as router:
        answer = await raw(router.port, post(CHAT))
        assert b" 503 " in answer
        assert b"Retry-After: " in answer
        assert b"no_replica" in answer


async def test_pipelined_requests_are_answered_in_order(tmp_path):
    async def echo(received, writer):
        await http(received.body)(received, writer)

    bodies = [b'{"model":"sim","i":%d}' % i for i in range(5)]
    async with (
        fake_engine(echo) as engine,
        running_router(routing_table(function(engine.url, served_name="sim")), tmp_path) as router,
    ):
        kept = [post(body).replace(b"Connection: close\r\n", b"") for body in bodies[:-1]]
        answer = await raw(router.port, b"".join(kept) + post(bodies[-1]))
        assert [part[: len(bodies[0])] for part in answer.split(b"\r\n\r\n")[1:]] == bodies


async def test_an_offer_to_upgrade_is_not_taken_up(tmp_path):
    async with (
        fake_engine() as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
    ):
        offer = "Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
        request = post(CHAT, headers=offer).replace(
            b"Connection: close", b"Connection: Upgrade, HTTP2-Settings, close"
        )
        assert (await raw(router.port, request)).startswith(b"HTTP/1.1 200 ")
        assert b"upgrade" not in engine.received[0].headers
        assert b"http2-settings" not in engine.received[0].headers


@pytest.mark.parametrize(
    ("partial", "answer"),
    [
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX-Slow", b""),
        (b"", b""),
        (post(CHAT)[:-5], b"HTTP/1.1 408 "),
    ],
    ids=["head", "nothing", "body"],
)
async def test_clients_that_send_too_slowly_are_let_go(tmp_path, partial, answer):
    async with (
        fake_engine() as engine,
        running_router(
            routing_table(function(engine.url)),
            tmp_path,
            keepalive_timeout_s=0.3,
            body_timeout_s=0.3,
        ) as router,
    ):
        assert (await raw(router.port, partial)).startswith(answer)
        assert engine.received == []
        router.assert_idle()


async def test_a_replica_takes_no_more_than_it_says_it_can(tmp_path):
    release = asyncio.Event()

    async def held(received, writer):
        await release.wait()
        await http()(received, writer)

    async with fake_engine(held) as engine:
        arm = Arm(
            deployment="d",
            cluster="here",
            replicas=(Replica(id="r", url=engine.url, max_concurrent=2),),
        )
        table = routing_table(function(arms=(arm,)))
        async with running_router(table, tmp_path, probe_interval_s=0) as router:
            running = [asyncio.create_task(raw(router.port, post(CHAT))) for _ in range(2)]
            await eventually(lambda: len(engine.received) == 2)
            third = await raw(router.port, post(CHAT))
            assert b" 503 " in third
            assert b"at_capacity" in third
            assert b"Retry-After" in third
            release.set()
            assert all(b" 200 " in answer for answer in await asyncio.gather(*running))
            router.assert_idle()


async def test_what_an_engine_stores_is_reached_where_it_serves_one_tenant_alone(tmp_path):
    async with fake_engine() as own, fake_engine() as shared:
        arms = tuple(
            Arm(
                deployment=name,
                cluster="here",
                tenants=tenants,
                replicas=(Replica(id=name, url=engine.url),),
            )
            for name, engine, tenants in (("own", own, ("team",)), ("shared", shared, ()))
        )
        table = routing_table(function(arms=arms))
        async with running_router(table, tmp_path, probe_interval_s=0) as router:
            for method, path in (
                ("GET", "/v1/responses/resp_1?include=a"),
                ("DELETE", "/v1/responses/resp_1"),
                ("POST", "/v1/responses/resp_1/cancel"),
                ("GET", "/v1/chat/completions/c-1/messages"),
            ):
                request = post(b"", path=path).replace(b"POST", method.encode(), 1)
                assert b" 200 " in await raw(router.port, request)
                assert own.received[-1].line == f"{method} {path} HTTP/1.1".encode()
            update = b'{"metadata":{"a":"b"}}'
            assert b" 200 " in await raw(router.port, post(update, path="/v1/chat/completions/c-1"))
            assert own.received[-1].body == update
            assert shared.received == []
            # Two tenants on one engine: neither may look.
            both = Arm(
                deployment="own",
                cluster="here",
                tenants=("other", "team"),
                replicas=(Replica(id="own", url=own.url),),
            )
            router.install(routing_table(function(arms=(both,)), generation=2))
            answer = await raw(
                router.port, post(b"", path="/v1/responses/resp_1").replace(b"POST", b"GET", 1)
            )
            assert b" 404 " in answer


async def test_an_engine_may_have_another_path_where_the_api_has_v1(tmp_path):
    async with fake_engine() as engine:
        for api_path, model, seen in (
            ("", b"none", b"/base/chat/completions"),
            ("/v1beta/openai/", b"other", b"/base/v1beta/openai/chat/completions"),
        ):
            replica = Replica(id="r", url=f"{engine.url}/base", api_path=api_path)
            arm = Arm(deployment="d", cluster="here", replicas=(replica,))
            table = routing_table(function(name=model.decode(), arms=(arm,)))
            async with running_router(table, tmp_path, probe_interval_s=0) as router:
                body = CHAT.replace(b"sim", model)
                for query in (b"", b"?a=/v1/"):
                    path = "/v1/chat/completions" + query.decode()
                    assert b" 200 " in await raw(router.port, post(body, path=path))
                    assert engine.received[-1].line == b"POST %b%b HTTP/1.1" % (seen, query)


async def test_a_response_without_a_model_goes_to_the_only_function_that_answers(tmp_path):
    body = b'{"prompt":{"id":"pmpt_1"},"input":"hi"}'
    async with fake_engine() as engine:
        answering = function(engine.url, tasks=("responses",))
        other = function("http://127.0.0.1:1", name="other", tasks=("embeddings",))
        async with running_router(routing_table(answering, other), tmp_path) as router:
            assert b" 200 " in await raw(router.port, post(body, path="/v1/responses"))
            assert engine.received[0].body == body
            assert b" 400 " in await raw(router.port, post(body, path="/v1/embeddings"))
            second = function("http://127.0.0.1:1", name="second", tasks=("responses",))
            router.install(routing_table(answering, second, generation=2))
            answer = await raw(router.port, post(body, path="/v1/responses"))
            assert b" 400 " in answer
            assert b"must name a `model`" in answer
