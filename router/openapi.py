"""The router's own OpenAPI description, served at /openapi.json.

It says what the router itself checks; everything else in a body is the engine's to judge, so bodies
are open objects. Made from the same list of endpoints that requests are dispatched by.
"""

from __future__ import annotations

from typing import Any

from router.core.api import PASSED, STORED, Endpoint

_ERROR_RESPONSES = {
    "400": "The request is not what the endpoint takes.",
    "401": "No valid API key.",
    "403": "The account is suspended, or the key may not run models.",
    "404": "The model does not exist, or is not yours.",
    "405": "The engine stores nothing of this kind.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body's Content-Encoding is not known here.",
    "429": "Too many requests; Retry-After says when to come again.",
    "500": "The engine failed.",
    "502": "The engine failed before it answered.",
    "503": "No replica can take the request now; Retry-After says when to come again.",
    "504": "The engine did not begin its answer in time.",
}


_PLAIN = str.maketrans({"/": "_", "{": "", "}": ""})

_REFUSED = ("400", "401", "403", "404", "408")
_FAILED = ("500", "502", "503", "504")


def _errors(*statuses: str) -> dict[str, Any]:
    return {
        status: {
            "description": _ERROR_RESPONSES[status],
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status in statuses
    }


def _passed(endpoint: Endpoint) -> dict[str, Any]:
    properties: dict[str, Any] = {
        "model": {"type": "string", "description": "A function's name, served name or alias."}
    }
    if not endpoint.multipart:
        properties["n"] = {"type": ["integer", "null"], "maximum": 128}
        properties["best_of"] = {"type": ["integer", "null"], "maximum": 128}
    content_type = "multipart/form-data" if endpoint.multipart else "application/json"
    return {
        "post": {
            "operationId": endpoint.path.strip("/").replace("/", "_"),
            "summary": f"Passed to a replica of the model ({endpoint.task}).",
            "requestBody": {
                "required": True,
                "content": {
                    content_type: {
                        "schema": {
                            "type": "object",
                            "required": [] if endpoint.model_optional else ["model"],
                            "properties": properties,
                            "additionalProperties": True,
                        }
                    }
                },
            },
            "responses": {
                "200": {"description": "The engine's answer, unchanged: JSON or an event stream."},
                **_errors(*_REFUSED, "413", "415", "429", *_FAILED),
            },
        }
    }


def _stored(method: str, endpoint: Endpoint) -> dict[str, Any]:
    names = [part[1:-1] for part in endpoint.path.split("/") if part.startswith("{")]
    return {
        "operationId": f"{method.lower()}_{endpoint.path.strip('/').translate(_PLAIN)}",
        "summary": "Passed to the one replica that serves this account alone, if there is one.",
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ],
        "responses": {
            "200": {"description": "The engine's answer, unchanged."},
            **_errors(*_REFUSED, "405", "413", "415", "429", *_FAILED),
        },
    }


def _own(operation: str, summary: str, *, key: bool, **extra: Any) -> dict[str, Any]:
    return {
        "get": {
            "operationId": operation,
            "summary": summary,
            **({} if key else {"security": []}),
            "responses": {
                "200": {
                    "description": summary,
                    "content": {"application/json": {"schema": {"type": "object"}}},
                },
                **extra.pop("responses", {}),
            },
            **extra,
        }
    }


def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    paths: dict[str, Any] = {path: _passed(endpoint) for path, endpoint in PASSED.items()}
    paths["/v1/models"] = _own(
        "list_models",
        "The models this key may use.",
        key=True,
        responses=_errors("400", "401", "403", "429", "503"),
    )
    paths["/v1/models/{model}"] = _own(
        "retrieve_model",
        "One of them.",
        key=True,
        parameters=[
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        ],
        responses=_errors("400", "401", "403", "404", "429", "503"),
    )
    paths["/v1/usage"] = _own(
        "usage_of_the_month",
        "What the key's tenant has used this month, by the ledger. For keys with the scope `usage`.",
        key=True,
        responses=_errors("400", "401", "403", "429", "503"),
    )
    for methods, endpoint in STORED:
        for method in sorted(methods):
            paths.setdefault(endpoint.path, {})[method.lower()] = _stored(method, endpoint)
    paths["/v1/sessions/{session}"] = {
        "delete": {
            "operationId": "end_session",
            "summary": "Forgets which replicas served a conversation, as X-Session-ID named it.",
            "parameters": [
                {
                    "name": "session",
                    "in": "path",
                    "required": True,
                    "schema": {"type": "string", "minLength": 1},
                }
            ],
            "responses": {
                "200": {
                    "description": "It is forgotten, or was never known.",
                    "content": {"application/json": {"schema": {"type": "object"}}},
                },
                **_errors("400", "401", "403", "404", "429", "503"),
            },
        }
    }
    paths["/health"] = _own("health", "The process lives.", key=False)
    paths["/ready"] = _own(
        "ready",
        "Clients may be sent here.",
        key=False,
        responses={"503": {"description": "Not now."}},
    )
    paths["/openapi.json"] = _own("openapi", "This document.", key=False)
    return {
        "openapi": "3.1.0",
        "info": {"title": "DetoServe", "version": "v1", "license": {"name": "Apache-2.0"}},
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "required": ["message", "type", "param", "code"],
                            "properties": {
                                "message": {"type": "string"},
                                "type": {"type": "string"},
                                "param": {"type": ["string", "null"]},
                                "code": {
                                    "type": ["string", "integer", "null"],
                                    "description": "Engines also give numbers.",
                                },
                            },
                        }
                    },
                }
            },
        },
    }
