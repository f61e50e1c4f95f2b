"""From a request's body to the function that is meant, and to the request that its engines get.

Not here: whether it may enter (admitted).
"""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import Final

import msgspec

from router.conversation import Conversation
from router.core import errors
from router.core.errors import Refused
from router.core.inflate import EncodingInvalid, inflate
from router.core.isolation import SALTED_ENGINES, SALTED_OPERATIONS, cache_salt
from router.core.request import BodyInvalid, read_form, read_json
from router.core.sessions import session_name
from router.core.snapshot import Candidate, Target
from router.core.splice import preceded, spans, spliced
from router.exchange.stage import Stage
from router.proxy import answers, targets
from schemas.wire.routing import Function

_PLAIN: Final = frozenset({b"", b"identity"})
_ENCODINGS: Final = _PLAIN | {b"gzip", b"deflate"}
_json: Final = msgspec.json.Encoder().encode


@lru_cache(maxsize=4096)
def _members(salt: str, stream_options: bytes | None) -> bytes:
    members = b'"cache_salt":"%b",' % salt.encode() if salt else b""
    if stream_options is not None:
        members += b'"stream_options":%b,' % stream_options
    return members


class Asked(Stage):
    """Who asks for what."""

    def _read(self) -> None:
        proxy = self._proxy
        self._snapshot, self._headers, self._principal = proxy.authenticate(
            self._request, self.record
        )
        most = proxy.settings.max_in_flight
        if most and self._state.in_flight.total > most:
            raise Refused(errors.ROUTER_FULL)
        self._body = self._request.body
        encoding = self._headers.encoding
        if encoding in _PLAIN:
            self._resolve()
        elif encoding in _ENCODINGS:
            self._later(self._inflate)
        else:
            raise Refused(errors.UNSUPPORTED_ENCODING)

    async def _inflate(self) -> None:
        """A bomb costs no more than the largest body, and holds up nobody."""
        limit = self._proxy.settings.max_body_bytes
        encoding = self._headers.encoding
        parts: list[bytes] = []
        size = 0
        try:
            for part in inflate(encoding, self._body):
                size += len(part)
                if size > limit:
                    raise Refused(errors.too_large(limit))
                parts.append(part)
                await asyncio.sleep(0)
        except EncodingInvalid as error:
            raise Refused(errors.bad_json(f"as {encoding.decode()}, {error}")) from None
        self._body = b"".join(parts)
        self._resolve()

    def _resolve(self) -> None:
        """Which function is meant, and which may answer in its place."""
        endpoint, snapshot, body = self._endpoint, self._snapshot, self._body
        tenant = self._principal.tenant
        self.record.request_bytes = len(body)
        if endpoint.stored:
            self._ask_keeper()
            return
        try:
            if endpoint.multipart:
                self._model, self._span = read_form(
                    body, self._headers.content_type.decode("latin-1")
                )
            else:
                self._model, self._parsed = read_json(body)
            found = targets(snapshot, tenant, endpoint, self._model)
        except BodyInvalid as error:
            raise Refused(errors.bad_json(str(error), param=error.param)) from None
        self._ask_function(found)

    def _ask_keeper(self) -> None:
        """Passes on a request about something that an engine keeps for this tenant alone."""
        snapshot, tenant = self._snapshot, self._principal.tenant
        keepers = [
            (function, candidate)
            for function in snapshot.models(tenant)
            if answers(function, self._endpoint)
            for candidate in snapshot.candidates(function, tenant)
            if candidate.dedicated
        ]
        if len(keepers) != 1:
            raise Refused(errors.nothing_stored(self._request.path[:300]))
        self._function, keeper = keepers[0]
        self._candidates = (keeper,)
        self._sent_body = self._body
        self._enter()

    def _ask_function(self, targets: tuple[Target, ...]) -> None:
        """The first of those that may answer; the others are its fallbacks."""
        function, candidates = targets[0]
        self._function, self._fallbacks = function, targets[1:]
        proxy, parsed = self._proxy, self._parsed
        wish = parsed.get("cache_salt")
        salt = self._salt = cache_salt(
            proxy.salt_key, self._principal.tenant.name, wish if type(wish) is str else ""
        )
        self._prompt = proxy.brain.prompt(function, self._endpoint, parsed, len(self._body), salt)
        self._sent_body = self._request_body(function, salt)
        tenant, headers, snapshot = self._principal.tenant, self._headers, self._snapshot
        session = session_name(headers.session, parsed)
        if session is None and function.name not in snapshot.by_conversation:
            self._conversation = None
        else:
            self._conversation = Conversation(
                proxy.sessions, function, tenant, session, headers, parsed
            )
        if headers.replica is None:
            self._candidates = candidates
        else:
            self._candidates = [self._debugged(function, headers.replica)]
        self._enter()

    def _debugged(self, function: Function, replica: bytes) -> Candidate:
        """The one replica that somebody who may debug wants to be asked."""
        if "debug" not in self._principal.key.scopes:
            raise Refused(errors.NOT_FOR_DEBUGGING)
        name = replica.decode("latin-1")
        found = self._snapshot.named(function, self._principal.tenant, name)
        if found is None:
            raise Refused(errors.replica_not_found(name[:200], function.name))
        return found

    def _request_body(self, function: Function, salt: str) -> bytes:
        """As this function's engines are to get it."""
        body, model, span, parsed = self._body, self._model, self._span, self._parsed
        if span is not None:
            if model == function.served_name:
                return body
            return body[: span[0]] + function.served_name.encode() + body[span[1] :]
        endpoint = self._endpoint
        renamed = model is not None and model != function.served_name
        self._metering = self._proxy.meter.plan(endpoint.task, function.engine, parsed)
        options = self._metering.stream_options
        salted = function.engine in SALTED_ENGINES and endpoint.operation in SALTED_OPERATIONS
        if (
            not renamed
            and parsed
            and "cache_salt" not in parsed
            and (options is None or "stream_options" not in parsed)
        ):
            # As nearly every body comes: nothing in it has to change.
            members = _members(salt if salted else "", options)
            whole = preceded(body, members) if members else body
            if whole is not None:
                return whole
        values: dict[str, bytes] = {}
        if renamed:
            values["model"] = _json(function.served_name)
        if options is not None:
            values["stream_options"] = options
        if salted or "cache_salt" in parsed or not parsed:
            values["cache_salt"] = b'"%b"' % salt.encode()
        if not values:
            return body
        # A body that could not be built is looked through.
        present = parsed or {key for _, _, key in spans(body, values)}
        if not salted and "cache_salt" not in present:
            values.pop("cache_salt", None)
        return spliced(body, values, present)

    def _head(self, candidate: Candidate, lines: bytes, request_id: str) -> bytes:
        path = self._request.target
        if candidate.api_path != "/v1" and path.startswith("/v1/"):
            path = candidate.api_path + path[3:]
        own = (
            f"{self._request.method} {candidate.base_path}{path} HTTP/1.1\r\n"
            f"Host: {candidate.host_header}\r\nContent-Length: {len(self._sent_body)}\r\n"
            f"X-Request-Id: {request_id}\r\n"
        )
        return b"%b%b\r\n" % (own.encode("latin-1"), lines)
