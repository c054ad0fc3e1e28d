"""One server of the demo model for all tests of this folder, in a thread, on a free port.

The tests, which need the extras, skip without them; this file has to be importable.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import qserve_jax
from qserve_jax import LLM, AsyncLLM, load_model

if TYPE_CHECKING:
    import openai

    from qserve_jax.server.service import Service

DEMO = Path(qserve_jax.__file__).parent / "assets" / "demo"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'refused' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ m.content }}{% if not loop.last %} {% endif %}{% endfor %}"
)
KEY = "sk-a-key-of-the-tests"


@dataclasses.dataclass
class Served:
    """A server: its port, its service, and the loop and task it runs in."""

    port: int
    service: Service
    loop: asyncio.AbstractEventLoop
    task: asyncio.Task

    def client(self, **options) -> openai.OpenAI:
        import openai

        options = {"api_key": KEY, "max_retries": 0, "timeout": 120} | options
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **options)

    def request(self, method, path, body=None, **headers):
        """(status, parsed JSON or text, headers) of a raw request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            text, kind = response.read(), response.headers["content-type"]
        parsed = json.loads(text) if kind == "application/json" else text.decode()
        return response.status, parsed, response.headers

    def complete(self, **body):
        """The status and the JSON of /v1/completions."""
        return self.request("POST", "/v1/completions", json.dumps(body))[:2]


@contextlib.contextmanager
def serving(llm, *, limits=None, api_key=None, grace=0.0):
    """A server of the LLM, until the end of the block."""
    from qserve_jax.server.app import make_app
    from qserve_jax.server.process import bound_socket, serve_app
    from qserve_jax.server.service import Limits, Service

    up, served = threading.Event(), []

    async def main():
        service = Service(AsyncLLM(llm), "demo", limits or Limits())
        bound = bound_socket("127.0.0.1", 0)
        port, loop = bound.getsockname()[1], asyncio.get_running_loop()
        app = make_app(service, api_key)
        task = asyncio.create_task(serve_app(app, service, bound, grace=grace, ready=up.set))
        served.append(Served(port, service, loop, task))
        with contextlib.suppress(asyncio.CancelledError):
            await task

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert up.wait(60)
        yield served[0]
    finally:
        served[0].loop.call_soon_threadsafe(served[0].task.cancel)
        thread.join(60)
        assert not thread.is_alive()
    assert llm.pool.free_pages == llm.pool.num_pages and llm.engine.idle


@pytest.fixture(scope="package")
def llm():
    """Two sequences at once, of at most 128 tokens, in fewer pages than they might need.

    In float, because little is asked of the arithmetic here and that compiles fastest.
    """
    loaded = load_model(DEMO, precision="w16a16kv16", dtype="float32")
    loaded.tokenizer.chat_template = TEMPLATE
    return LLM(loaded, max_model_len=128, page_size=32, num_pages=7, max_num_seqs=2, seed=0)


@pytest.fixture(scope="package")
def served(llm):
    with serving(llm) as server:
        yield server


@pytest.fixture(scope="package")
def serve():
    """The context manager above, for servers with settings of their own."""
    return serving


@pytest.fixture(scope="package")
def client(served):
    with served.client() as client:
        yield client


@pytest.fixture
def pages_return(llm):
    """After the test every page is free again, soon."""
    yield
    done = threading.Event()
    for _ in range(1000):
        if llm.engine.idle and llm.pool.free_pages == llm.pool.num_pages:
            return
        done.wait(0.01)
    pytest.fail(f"pages are not given back: {llm.status()}")
