"""An agent's words to routers over HTTPS, for clusters from which nothing but outbound is allowed.

Each POST is signed with the cluster's key (schemas.wire.agent_signature). The answer names the
cluster's replicas, so that such an agent needs no routing table: it is a finder too. Reports alone
go this way; names of blocks are for readers of Redis.
"""

from __future__ import annotations

import asyncio
import io
import secrets
import time
from collections.abc import Sequence
from typing import Final

import aiohttp
import msgspec

from agent.finding import Address, FindingFailed
from agent.outbox import Parcel
from agent.publishing import SendFailed
from schemas.wire import agent_signature
from schemas.wire.events import AgentAnswer, AgentHeartbeat, AgentPost, KvBatch

_TIMEOUT: Final = aiohttp.ClientTimeout(total=10.0)
_MAX_ANSWER_BYTES: Final = 4 * 2**20


class ToRouters:
    """Sends everything to each of the URLs: routers that share Redis need only one."""

    def __init__(
        self, urls: Sequence[str], key: bytes, cluster: str, session: aiohttp.ClientSession
    ) -> None:
        self._urls = tuple(url.rstrip("/") for url in urls)
        self._key = key
        self._cluster = cluster
        self._session = session
        self._replicas: dict[str, str] | None = None

    async def send(
        self,
        heartbeat: AgentHeartbeat,
        parcel: Parcel,
        snapshots: Sequence[tuple[str, KvBatch]] = (),  # noqa: ARG002 - a Sink's
    ) -> None:
        """Raises: SendFailed: no router took it."""
        post = AgentPost(heartbeat=heartbeat, reports=parcel.reports)
        body = msgspec.msgpack.encode(post)
        results = await asyncio.gather(*(self._post(url, body) for url in self._urls))
        answers = [one for one in results if isinstance(one, AgentAnswer)]
        if not answers:
            raise SendFailed("; ".join(str(one) for one in results))
        self._replicas = {k: v for answer in answers for k, v in answer.replicas.items()}

    async def _post(self, url: str, body: bytes) -> AgentAnswer | str:
        """The answer, or what was wrong."""
        timestamp, nonce = f"{time.time():.3f}", secrets.token_hex(16)
        signature = agent_signature.sign(
            self._key, cluster=self._cluster, timestamp=timestamp, nonce=nonce, body=body
        )
        headers = {
            "Content-Type": "application/msgpack",
            agent_signature.CLUSTER_HEADER: self._cluster,
            agent_signature.TIMESTAMP_HEADER: timestamp,
            agent_signature.NONCE_HEADER: nonce,
            agent_signature.SIGNATURE_HEADER: signature,
        }
        try:
            async with self._session.post(
                url + agent_signature.PATH,
                data=io.BytesIO(body),
                headers=headers,
                timeout=_TIMEOUT,
                allow_redirects=False,
            ) as response:
                data = await response.content.read(_MAX_ANSWER_BYTES)
                if response.status != 200:
                    return f"{url} answers {response.status}: {data[:200].decode(errors='replace')}"
                return msgspec.msgpack.decode(data, type=AgentAnswer)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return f"{url}: {type(error).__name__}"

    async def replicas(self) -> dict[str, str]:
        """Id -> base URL, as the routers named them last.

        Raises:
            FindingFailed: no router has answered yet.
        """
        if self._replicas is None:
            raise FindingFailed("no router has answered yet")
        return self._replicas

    async def engines(self) -> Sequence[Address]:
        """Raises: FindingFailed: see `replicas`."""
        return [Address(url.rstrip("/"), name) for name, url in (await self.replicas()).items()]
