"""Errors as OpenAI's API spells them: a status, and an object that says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


class ApiError(Exception):
    """What a client is told instead of an answer.

    status: of HTTP. param: the field of the request that is wrong. code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, KINDS[400])
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


KINDS = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}


def json_bytes(value: Any) -> bytes:
    """JSON in UTF-8; lone surrogates, which a client may send us, stay escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")  # \udXXX, as JSON writes it


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A response whose body is JSON."""
    return Response(json_bytes(value), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """The error as a whole response."""
    return json_response(error.body, error.status, error.headers)
