from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import aiohttp
import pytest

from reconciler.sources.webhook import (
    MAX_BODY_BYTES,
    PATH,
    is_signed,
    serve_webhook,
)

SECRET = "s3cret"
BODY = b'{"ref": "refs/heads/main"}'
MAC = hmac.new(SECRET.encode(), BODY, hashlib.sha256).hexdigest()
GOOD = [
    {"X-Hub-Signature-256": f"sha256={MAC}"},
    {"X-Gitea-Signature": MAC},
    {"X-Forgejo-Signature": MAC},
    {"X-Gitlab-Token": SECRET},
]
BAD = [
    {},
    {"X-Hub-Signature-256": MAC},
    {"X-Hub-Signature-256": f"sha256={MAC[:-1]}0" if MAC[-1] != "0" else f"sha256={MAC[:-1]}1"},
    {"X-Hub-Signature-256": "sha256=" + hmac.new(b"other", BODY, hashlib.sha256).hexdigest()},
    {"X-Hub-Signature": "sha1=" + hmac.new(SECRET.encode(), BODY, hashlib.sha1).hexdigest()},
    {"X-Gitea-Signature": ""},
    {"X-Gitlab-Token": "other"},
    {"X-Gitlab-Token": "s3cr\u00e9t"},
    # A signature that is there and wrong is not made good by another.
    {"X-Hub-Signature-256": "sha256=0", "X-Gitlab-Token": SECRET},
]


@pytest.mark.parametrize("headers", GOOD)
def test_every_forge_can_prove_that_it_knows_the_secret(headers):
    assert is_signed(headers, BODY, SECRET)
    assert not is_signed(headers, BODY, "other")
    assert not is_signed(headers, BODY + b" ", SECRET) or "X-Gitlab-Token" in headers


@pytest.mark.parametrize("headers", BAD)
def test_nobody_else_can(headers):
    assert not is_signed(headers, BODY, SECRET)


def test_without_a_secret_nobody_is_believed():
    empty = hmac.new(b"", BODY, hashlib.sha256).hexdigest()
    assert not is_signed({"X-Gitea-Signature": empty}, BODY, "")
    assert not is_signed({"X-Gitlab-Token": ""}, BODY, "")


class Hook:
    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.session = session
        self.notices = 0

    async def post(self, headers: dict[str, str], body: object = BODY) -> tuple[int, str]:
        async with self.session.post(self.url, data=body, headers=headers) as answer:
            return answer.status, await answer.text()


@pytest.fixture
async def hook() -> AsyncIterator[Hook]:
    def notify() -> None:
        made.notices += 1

    async with (
        aiohttp.ClientSession() as session,
        serve_webhook("127.0.0.1", 0, SECRET, notify) as url,
    ):
        made = Hook(url, session)
        yield made


async def test_a_signed_push_asks_for_a_fetch(hook):
    for headers in GOOD:
        status, _ = await hook.post(headers)
        assert status == 202
    assert hook.notices == len(GOOD)


async def test_an_unsigned_one_does_nothing_and_learns_nothing(hook):
    for headers in BAD:
        status, text = await hook.post(headers)
        assert status == 401
        assert SECRET not in text
        assert MAC not in text
    assert hook.notices == 0


async def test_content_is_not_believed(hook):
    body = b"\xff not even JSON"
    mac = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    assert (await hook.post({"X-Gitea-Signature": mac}, body))[0] == 202
    assert hook.notices == 1


async def test_a_large_body_is_refused(hook):
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 65536 + 2):
            yield bytes(65536)

    headers = {"X-Gitlab-Token": SECRET}
    with contextlib.suppress(aiohttp.ClientConnectionError):  # refused while it was still sending
        assert (await hook.post(headers, endless()))[0] == 413
    assert hook.notices == 0
    assert (await hook.post(headers))[0] == 202


async def test_other_paths_and_methods_are_refused(hook):
    async with hook.session.get(hook.url) as answer:
        assert answer.status == 405
    async with hook.session.post(hook.url.replace(PATH, "/")) as answer:
        assert answer.status == 404
    assert hook.notices == 0


async def test_a_body_that_does_not_arrive_is_given_up():
    async with serve_webhook("127.0.0.1", 0, SECRET, lambda: None, body_timeout_s=0.05) as url:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(b"POST /webhook HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nfew")
        assert b"408" in await asyncio.wait_for(reader.readline(), 5)
        writer.close()
