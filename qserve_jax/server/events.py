"""Server-sent events: an answer in chunks, as the client reads it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qserve_jax.server.answers import Json
from qserve_jax.server.body import while_connected
from qserve_jax.server.errors import ApiError, json_bytes

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies shall not collect them
SEND_SECONDS = 60
"""A client that takes nothing for so long has gone: what it asked for holds places and pages."""
DONE = b"data: [DONE]\n\n"


def event(value: Json) -> bytes:
    """One event."""
    return b"data: " + json_bytes(value) + b"\n\n"


class EventStream(Response):
    """Chunks as events, then [DONE]; closes `chunks` when the client goes, or does not read.

    An error before the first chunk is an answer of its own status. After it, the error object is
    the last event, and there is no [DONE].
    """

    def __init__(self, request: Request, chunks: AsyncGenerator[Json]):
        super().__init__(headers=HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self._request, self._chunks = request, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._send(send))
        with contextlib.suppress(ClientDisconnect):
            await while_connected(self._request, work)

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self._chunks) as chunks:
            first = await anext(chunks)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._body(send, event(first))
            try:
                async for chunk in chunks:
                    await self._body(send, event(chunk))
                await self._body(send, DONE)
            except ApiError as error:
                await self._body(send, event(error.body))
            await self._body(send, b"", more=False)

    async def _body(self, send: Send, data: bytes, *, more: bool = True) -> None:
        message = {"type": "http.response.body", "body": data, "more_body": more}
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)
        except TimeoutError:
            raise ClientDisconnect from None
