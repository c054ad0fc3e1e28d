"""The routes, as an ASGI app over a `Service`."""

from __future__ import annotations

import asyncio
import sys
import time

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from qserve_jax.server.body import read_json, while_connected
from qserve_jax.server.errors import ApiError, error_response, json_response
from qserve_jax.server.events import EventStream
from qserve_jax.server.guard import Guard
from qserve_jax.server.job import Job, chat_job, completion_job
from qserve_jax.server.service import Service, models, shutting_down


def make_app(service: Service, api_key: str | None = None) -> ASGIApp:
    """The app. api_key: asked of every request but /health; None for none."""
    created = int(time.time())

    async def completions(request: Request) -> Response:
        return await answer(request, completion_job(await body(request)))

    async def chat_completions(request: Request) -> Response:
        return await answer(request, chat_job(await body(request)))

    async def body(request: Request) -> dict:
        if service.draining:
            raise shutting_down()
        return await read_json(request, service.limits.max_body_bytes)

    async def answer(request: Request, job: Job) -> Response:
        if job.stream:
            return EventStream(request, service.chunks(job))
        work = asyncio.create_task(service.whole(job))
        return json_response(await while_connected(request, work))

    async def list_models(request: Request) -> Response:
        return json_response({"object": "list", "data": models(service, created)})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        for model in models(service, created):
            if model["id"] == name:
                return json_response(model)
        message = f"there is no model {name!r:.80}: use {service.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")

    async def health(request: Request) -> Response:
        await service.health()
        return json_response({"status": "ok"})

    async def metrics(request: Request) -> Response:
        text = generate_latest(service.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    app = Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/models", list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", one_model, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
        ],
        exception_handlers={
            ApiError: told,
            HTTPException: not_routed,
            ClientDisconnect: gone,
            Exception: unexpected,
        },
    )
    return Guard(app, metrics=service.metrics, api_key=api_key)


async def told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def not_routed(request: Request, error: Exception) -> Response:
    """No such route, or another method."""
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"
    message = f"{path!r:.120} is not served ({error.detail}): see README.md for what is"
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def gone(request: Request, error: Exception) -> Response:
    """Nobody reads this, but it is counted: nginx's number for a client that went first."""
    return Response(status_code=499)


async def unexpected(request: Request, error: Exception) -> Response:
    """A mistake of ours."""
    name = type(error).__name__
    print(f"error: {request.url.path!r}: {name}: {error}", file=sys.stderr, flush=True)
    return error_response(ApiError(500, f"an unexpected {name}: please report it"))
