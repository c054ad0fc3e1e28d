"""The server as a process: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from qserve_jax.server.service import CUT_SECONDS, Service


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that holds the address, and does not listen yet. Raises ValueError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise not_listened_on(host, port, error) from None
    bound = socket.socket(family, kind, protocol)
    try:
        try:
            bound.bind(address)  # for us alone, while the model loads
        except OSError:  # as it may be because connections of a server before us linger
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
    except OSError as error:
        bound.close()
        raise not_listened_on(host, port, error) from None
    return bound


def not_listened_on(host: str, port: int, error: OSError) -> ValueError:
    """What is said of an address that cannot be had."""
    reason = error.strerror or error
    return ValueError(
        f"--host {host} --port {port} cannot be listened on ({reason}): use another one"
    )


class Server(uvicorn.Server):
    """uvicorn, which on the first SIGTERM or SIGINT drains, and on the second is gone at once.

    By itself it would close its socket first, and new clients would find nobody to tell them why.
    """

    def __init__(self, config: uvicorn.Config, service: Service, grace: float):
        super().__init__(config)
        self._service, self._grace = service, grace
        self._draining: asyncio.Task[None] | None = None
        self.signal: int | None = None
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + sig)
        self.signal = sig
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await self._service.drain(self._grace)
        finally:
            self.should_exit = True


async def serve_app(
    app: ASGIApp,
    service: Service,
    bound: socket.socket,
    *,
    grace: float,
    ready: Callable[[], None],
    debug: bool = False,
) -> int:
    """Serve until a signal comes and what runs has ended, or `grace` seconds are over.

    ready: called when clients can connect. Returns the signal. Raises ValueError where the address
    was taken meanwhile.
    """
    # From now on, for the connections inherit it: the next server may bind while they linger.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.listen()
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise not_listened_on(host, port, error) from None
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="info" if debug else "critical",  # we say ourselves what goes wrong
        access_log=False,  # nor is any header ever logged
        server_header=False,
        timeout_graceful_shutdown=CUT_SECONDS,
    )
    server = Server(config, service, grace)

    async def tell() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        ready()

    telling = asyncio.create_task(tell())
    try:
        await server.serve(sockets=[bound])
    finally:
        telling.cancel()
        await service.close()
    return server.signal or signal.SIGTERM
