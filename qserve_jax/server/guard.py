"""Before any route: the API key, and what is counted."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qserve_jax.server.errors import ApiError, error_response
from qserve_jax.server.metrics import Metrics

ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
OPEN_ROUTE = "/health"


class Guard:
    """An ASGI app around another: 401 without the key on every route but /health; counts answers.

    api_key: None for none.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, api_key: str | None):
        self._app, self._requests = app, metrics.requests
        self._expected = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        route = scope["path"] if scope["path"] in ROUTES else "other"
        status = "none"

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        app = self._app
        if self._expected is not None and scope["path"] != OPEN_ROUTE and not self._known(scope):
            app = error_response(unauthorized())
        try:
            await app(scope, receive, counted)
        finally:
            self._requests.labels(route, status).inc()

    def _known(self, scope: Scope) -> bool:
        """Whether the request has the key; in a time that does not depend on what it has."""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        kind, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        same = hmac.compare_digest(key.strip(), self._expected or b"")
        return same and kind.lower() == b"bearer"


def unauthorized() -> ApiError:
    """Says nothing of the key, neither ours nor theirs."""
    return ApiError(
        401,
        "the API key is missing or wrong: send it as Authorization: Bearer KEY",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
