"""A request's body, as far as its size, its time and JSON go."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from qserve_jax.server.errors import ApiError

READ_SECONDS = 60
"""A body that takes longer to arrive is given up."""
DISCARDED = 16 * 2**20
"""Bytes of a body too large that are read and dropped: a client that is still sending would see a
broken connection in place of our answer."""


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body, a JSON object. Raises ApiError where it is none, or larger than max_bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which no web page can send us without asking first
        raise ApiError(415, f"Content-Type {kind!r:.60} is not supported: send application/json")
    try:
        async with asyncio.timeout(READ_SECONDS):
            data = await read_bytes(request, max_bytes)
    except TimeoutError:
        message = f"the body did not arrive in {READ_SECONDS} s: send it faster, or less"
        raise ApiError(408, message, headers={"Connection": "close"}) from None
    return parse_object(data)


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """Raises ApiError 413 where there are more than max_bytes, ClientDisconnect as Starlette."""
    announced = int(request.headers.get("content-length", 0))  # checked by the HTTP parser
    most = max(DISCARDED, max_bytes)
    data, size = bytearray(), 0
    if announced <= most:
        async for chunk in request.stream():
            size += len(chunk)
            if size > most:
                break
            if size <= max_bytes:
                data += chunk
    size = max(announced, size)
    if size > max_bytes:
        raise ApiError(
            413,
            f"the body has at least {size} bytes, the limit is {max_bytes}: send less at once",
            code="request_too_large",
            headers={"Connection": "close"},
        )
    return bytes(data)


def parse_object(data: bytes) -> dict[str, Any]:
    """Raises ApiError 400."""
    try:
        value = DECODER.decode(data.decode())
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 ({error.reason}): encode it so") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits; too many brackets
        reason = getattr(error, "msg", str(error))
        raise ApiError(400, f"the body is not JSON ({reason:.100}): send an object") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {value!r:.60}: send a JSON object")
    return value


def refuse_constant(name: str) -> float:
    """Python reads NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{name} is no number of JSON")


DECODER = json.JSONDecoder(parse_constant=refuse_constant)


async def disconnected(request: Request) -> None:
    """Wait until the client has gone. For use when the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def while_connected[T](request: Request, work: asyncio.Task[T]) -> T:
    """The task's result. Cancels the task if the client goes first, and raises ClientDisconnect."""
    gone = asyncio.create_task(disconnected(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
