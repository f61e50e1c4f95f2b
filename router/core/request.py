"""What the router reads of a request's body.

Not here: the meaning of any other field, or what is changed in it (splice).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from router.core.shapes import Shared

MAX_CHOICES: Final = 128
"""Answers to one request: OpenAI's own ceiling for `n`."""


class BodyInvalid(ValueError):
    """The body is not JSON, or not of the shape every endpoint shares; says where."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


_UTF8: Final = codecs.getincrementaldecoder("utf-8")
_PIECE_BYTES: Final = 2**16


def _check_utf8(body: bytes) -> None:
    """Strings that msgspec skips are not looked into; an engine would find out.

    Raises:
        UnicodeDecodeError: at the first byte that is not UTF-8.
    """
    if body.isascii():
        return
    decoder = _UTF8()
    for at in range(0, len(body), _PIECE_BYTES):
        pending, _ = decoder.getstate()
        try:
            decoder.decode(body[at : at + _PIECE_BYTES], at + _PIECE_BYTES >= len(body))
        except UnicodeDecodeError as error:
            error.start += at - len(pending)
            raise


_decode: Final = msgspec.json.Decoder().decode
_decode_shared: Final = msgspec.json.Decoder(Shared).decode
_NOTHING: Final[dict[str, Any]] = {}


def read_json(body: bytes) -> tuple[str | None, Mapping[str, Any]]:
    """The model that a JSON body names, if any, and the whole of it as parsed: the one parse.

    What is sound but cannot be built (too deep, a number beyond all) is an engine's to judge: of such a
    body nothing is known here but the model.

    Raises:
        BodyInvalid: with the byte or the field that is wrong.
    """
    try:
        request = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _read_shared(body).model, _NOTHING
    if type(request) is dict:
        model, choices = request.get("model"), request.get("n")
        if type(model) is str and choices is None and "best_of" not in request:
            return model, request
    shared = _read_shared(body)
    return shared.model, request


def _read_shared(body: bytes) -> Shared:
    """What every body shares, checked. Other fields are skipped, not built.

    Raises:
        BodyInvalid: with the byte or the field that is wrong.
    """
    try:
        _check_utf8(body)
        shared = _decode_shared(body)
    except msgspec.ValidationError as error:
        detail = str(error)
        name = re.search(r"\$\.(\w+)", detail)
        raise BodyInvalid(detail, name.group(1) if name else None) from None
    except msgspec.DecodeError as error:
        detail = str(error)
        raise BodyInvalid(detail if "(byte" in detail else f"{detail} (byte {len(body)})") from None
    except UnicodeDecodeError as error:
        raise BodyInvalid(f"not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise BodyInvalid("nested too deeply") from None
    for field, choices in (("n", shared.n), ("best_of", shared.best_of)):
        if choices is not None and choices > MAX_CHOICES:
            raise BodyInvalid(f"`{field}` may be {MAX_CHOICES} at most", field)
    return shared


_DISPOSITION: Final = re.compile(
    rb'^content-disposition:[^\r\n]*;[ \t]*name="?model"?[ \t]*(?:;[^\r\n]*)?$',
    re.IGNORECASE | re.MULTILINE,
)
_BOUNDARY: Final = re.compile(r'boundary=(?:"([^"\r\n]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)


def read_form(body: bytes, content_type: str) -> tuple[str, tuple[int, int]]:
    """The form field `model` of a multipart body, and where its value stands.

    Raises:
        BodyInvalid: when it is not multipart/form-data, or does not name one model in UTF-8.
    """
    boundary = _BOUNDARY.search(content_type)
    if not content_type.lower().startswith("multipart/form-data") or boundary is None:
        raise BodyInvalid("it must be multipart/form-data with a boundary")
    fence = b"--" + (boundary.group(1) or boundary.group(2)).encode("latin-1")
    found: tuple[int, int] | None = None
    at = 0 if body.startswith(fence) else body.find(b"\r\n" + fence) + 2
    while at >= 0 and body.startswith(fence, at) and not body.startswith(fence + b"--", at):
        start = at + len(fence) + 2
        end = body.find(b"\r\n" + fence, start)
        blank = body.find(b"\r\n\r\n", start, end)
        if end < 0 or blank < 0:
            raise BodyInvalid("a part of the form is incomplete")
        if _DISPOSITION.search(body[start:blank].replace(b"\r\n", b"\n")):
            if found is not None:
                raise BodyInvalid("`model` stands twice in the form", "model")
            found = blank + 4, end
        at = end + 2
    if found is None:
        raise BodyInvalid("the form has no field `model`", "model")
    try:
        return body[found[0] : found[1]].decode().strip(), found
    except UnicodeDecodeError:
        raise BodyInvalid("`model` is not UTF-8", "model") from None
