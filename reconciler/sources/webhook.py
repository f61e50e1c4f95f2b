"""A forge's webhook: says "fetch now", and is believed in nothing else.

GitHub, Gitea and Forgejo sign the body (HMAC-SHA256); GitLab sends the secret itself. The body is
bounded, checked, and thrown away. Not here: which commit is new (git_source finds out by itself).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

PATH: Final = "/webhook"
MAX_BODY_BYTES: Final = 5 * 1024 * 1024
BODY_TIMEOUT_S: Final = 20.0


def is_signed(headers: Mapping[str, str], body: bytes, secret: str) -> bool:
    """Whether the sender knows the secret. Compared in constant time; no secret, no sender."""
    if not secret:
        return False
    expected = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    for name, prefix in (
        ("X-Hub-Signature-256", "sha256="),
        ("X-Gitea-Signature", ""),
        ("X-Forgejo-Signature", ""),
    ):
        if (sent := headers.get(name)) is not None:
            return _same(sent, prefix + expected)
    token = headers.get("X-Gitlab-Token")
    return token is not None and _same(token, secret)


def _same(sent: str, expected: str) -> bool:
    # Header bytes that are not UTF-8 come as surrogates.
    return hmac.compare_digest(sent.encode("utf-8", "surrogateescape"), expected.encode())


def webhook_app(
    secret: str, notify: Callable[[], None], *, body_timeout_s: float
) -> web.Application:
    """`POST /webhook`: 202 when signed, 401 when not, 408 when too slow, 413 when too large."""

    async def receive(request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(body_timeout_s):
                body = await request.read()
        except TimeoutError:
            return web.json_response({"error": "the body did not arrive in time"}, status=408)
        if not is_signed(request.headers, body, secret):
            return web.json_response({"error": "the signature is missing or wrong"}, status=401)
        notify()
        return web.json_response({"status": "fetching"}, status=202)

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_post(PATH, receive)
    return app


@asynccontextmanager
async def serve_webhook(
    host: str,
    port: int,
    secret: str,
    notify: Callable[[], None],
    *,
    body_timeout_s: float = BODY_TIMEOUT_S,
) -> AsyncIterator[str]:
    """Listens while the context lasts; gives the URL.

    Raises:
        OSError: the port is taken.
    """
    app = webhook_app(secret, notify, body_timeout_s=body_timeout_s)
    # Who sends too slowly is not waited for, neither to the end of the body nor when we stop.
    runner = web.AppRunner(app, access_log=None, lingering_time=0.5, shutdown_timeout=0.5)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        bound = runner.addresses[0][1]
        yield f"http://{host}:{bound}{PATH}"
    finally:
        await runner.cleanup()
