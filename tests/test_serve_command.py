"""The command `python -m qserve_jax.serve`: flags, signals, a kill and a restart."""

import argparse
import asyncio
import contextlib
import http.client
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import qserve_jax
from qserve_jax import LLM, SamplingParams
from qserve_jax._cli import use_chat_template
from qserve_jax.runtime.compile_time import compile_time
from qserve_jax.serve import API_KEY_VARIABLE, build_parser, load, main, show_status

openai = pytest.importorskip("openai", reason="needs the extra dev")
sockets = pytest.importorskip("qserve_jax.server.process")

DEMO = Path(qserve_jax.__file__).parent / "assets" / "demo"
KEY = "sk-never-to-be-seen"
FLAGS = ("--max-model-len", "256", "--max-num-seqs", "1", "--num-pages", "4")
FLAGS += ("--precision", "w16a16kv16", "--dtype", "float32")  # which compiles fastest


@contextlib.contextmanager
def server(*flags, port=0, devices=1):
    """A process that serves the demo model, its port, and what it had said when it was ready."""
    argv = [sys.executable, "-m", "qserve_jax.serve", "--port", str(port), *FLAGS, *flags]
    env = os.environ | {API_KEY_VARIABLE: KEY, "JAX_PLATFORMS": "cpu"}
    env["JAX_NUM_CPU_DEVICES"] = str(devices)
    process = subprocess.Popen(
        argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stderr is not None
    said = ""
    try:
        while " (Ctrl-C stops)" not in said:
            line = process.stderr.readline()
            assert line, f"it ended: {said}"
            said += line
        found = re.search(r"on http://127\.0\.0\.1:(\d+)/v1", said)
        assert found
        yield process, int(found[1]), said
    finally:
        process.kill()
        process.communicate()


def client_of(port, key=KEY):
    url = f"http://127.0.0.1:{port}/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=120)


def stream(client, **fields):
    fields = {
        "max_tokens": 250,
        "temperature": 1,
        "n": 4,
        "extra_body": {"ignore_eos": True},
    } | fields
    return client.completions.create(model="demo", prompt="Once", stream=True, **fields)


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()


def test_killed_in_a_stream_and_started_again():
    """Who reads gets an error at once; the next server has the same port, finishes what runs when
    told to end, and tells who comes late."""
    with server() as (process, port, _), client_of(port) as client:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            assert connection.getpeername()[0] == "127.0.0.1"
        chunks = stream(client)
        next(chunks)
        process.send_signal(signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises((openai.APIError, OSError, *protocol_errors())):
            list(chunks)
        assert time.monotonic() - started < 10
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    with server(port=port) as (process, port_again, said), client_of(port) as client:
        assert port_again == port
        assert get(port, "/health") == (200, b'{"status":"ok"}')
        with client_of(port, "wrong" + KEY) as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        chunks = stream(client)  # four, one after the other
        texts = {0: next(chunks).choices[0].text, 1: "", 2: "", 3: ""}
        process.send_signal(signal.SIGTERM)
        while get(port, "/health")[0] == 200:
            time.sleep(0.01)
        with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
            client.completions.create(model="demo", prompt="Once")
        assert refused.value.status_code == 503
        reasons = []
        for chunk in chunks:
            (choice,) = chunk.choices
            texts[choice.index] += choice.text
            reasons += [choice.finish_reason] if choice.finish_reason else []
        assert reasons == ["length"] * 4 and min(map(len, texts.values())) > 300
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0
    assert out == "" and KEY not in said + err and "Traceback" not in err


def test_two_devices_share_the_model():
    """What clients get together is what one device makes of each prompt."""
    prompts, limit = ["Once upon", "The dog"], 12
    with (
        server("--tensor-parallel-size", "2", devices=2) as (process, port, said),
        client_of(port) as client,
    ):
        assert said.count(" · 2 devices\n") == 1
        answer = client.completions.create(
            model="demo", prompt=prompts, max_tokens=limit, temperature=0
        )
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in err
    llm = LLM(DEMO, "w16a16kv16", dtype="float32", max_model_len=256, num_pages=4)
    wanted = llm.generate(prompts, SamplingParams(max_tokens=limit))
    assert [choice.text for choice in answer.choices] == [output.text for output in wanted]
    assert len({choice.text for choice in answer.choices}) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_time_that_runs_out(number, code):
    with server("--grace", "0.2", "--debug") as (process, port, said), client_of(port) as client:
        chunks = stream(client, n=20)
        next(chunks)
        process.send_signal(number)
        with pytest.raises(openai.APIError, match=r"cut: the server stops, 0\.2 s are over"):
            list(chunks)
        _, err = process.communicate(timeout=30)
        assert process.returncode == code
    assert KEY not in said + err  # nor with --debug


def test_the_engine_says_what_it_is_doing(capsys, monkeypatch):
    log = logging.getLogger("qserve_jax.engine")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "level", logging.WARNING)
    show_status()
    llm = LLM(DEMO, "w16a16kv16", dtype="float32", max_model_len=256, num_pages=4)
    llm.generate([[5]], SamplingParams(max_tokens=2))
    assert re.match(r"0 queued · 1 running · pages 1/4 · .* tok/s ", capsys.readouterr().err)


def test_what_was_compiled_before_it_listens(capsys):
    """Is all that requests need, whatever their length, temperature and limit."""
    llm = load(build_parser().parse_args([*FLAGS, "--warm-up"]))
    assert re.search(r" at once · compiled in \d+\.\d s\n$", capsys.readouterr().err)
    before = compile_time.seconds
    for tokens, temperature in ((3, 1.0), (20, 0.0), (40, 0.5), (70, 1.0), (140, 1.0)):
        params = SamplingParams(max_tokens=5, temperature=temperature, stop=["."], seed=tokens)
        llm.generate([[5] * tokens], params)
    assert compile_time.seconds == before


@pytest.mark.slow
def test_a_limit_that_the_pool_does_not_reach_is_told():
    with server("--max-prompt-tokens", "5000") as (_, _, said):
        assert "note: --max-prompt-tokens 5000: prompts have at most 255, by the context" in said


def test_a_second_signal_ends_it_at_once():
    with server() as (process, port, _), client_of(port) as client:
        chunks = stream(client, n=20)
        next(chunks)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert process.wait(5) == 130


def protocol_errors():
    """What the client's HTTP library raises where a stream breaks off, whichever it uses."""
    bases = [module for name in ("httpx", "httpx2") if (module := sys.modules.get(name))]
    return tuple(module.HTTPError for module in bases)


def test_ports_and_flags_that_cannot_be_used(capsys, monkeypatch):
    """Before anything is loaded; an API key is in no message."""
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)

    def error_of(*argv):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("qserve_jax.serve: error: ") and err.count("\n") == 1
        return err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port} cannot be listened on" in error_of("--port", port)
    with sockets.bound_socket("127.0.0.1", 0) as loading:  # another server, not listening yet
        port = loading.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port} cannot be listened on"):
            sockets.bound_socket("127.0.0.1", port)
    assert "cannot be listened on" in error_of("--host", "no.such.host.invalid")
    assert "0..65535" in error_of("--port", "65536")
    assert "--grace" in error_of("--grace", "-1")
    assert "--grace" in error_of("--grace", "nan")
    assert "--max-body-bytes" in error_of("--max-body-bytes", "0")
    assert "cannot be read (No such file" in error_of("--chat-template", "/no/such/file")
    message = error_of("--coordinator-address", "a:1", "--num-processes=2", "--process-id=0")
    assert "--coordinator-address is set (a:1) but the server runs in one process" in message
    for flags in (["--apikey", KEY], [f"--apikey={KEY}"], ["--port", "1", KEY, "--apikey"]):
        message = error_of(*flags)
        assert "unrecognized arguments: --apikey (see" in message and KEY not in message
    assert "unrecognized arguments: 1 without a flag" in error_of(KEY)
    for key in ("", "a key", "schlüssel", "sk-\n"):
        message = error_of("--api-key", key)
        assert "--api-key is empty or has spaces" in message and (not key or key not in message)
    monkeypatch.setenv(API_KEY_VARIABLE, f"{KEY} {KEY}")
    assert API_KEY_VARIABLE in (message := error_of()) and KEY not in message


def test_an_address_that_is_taken_while_the_model_loads():
    """As by a server that also came while connections of one before lingered."""
    with socket.socket() as one, socket.socket() as other:
        for bound in (one, other):
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(("127.0.0.1", one.getsockname()[1]))
        other.listen()
        serving = sockets.serve_app(None, None, one, grace=0, ready=None)
        with pytest.raises(ValueError, match=r"--port \d+ cannot be listened on \(Address already"):
            asyncio.run(asyncio.wait_for(serving, 10))


def test_a_template_that_is_none():
    """Found at the start, not by the first client; one that refuses our messages is a template."""
    loaded: Any = types.SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(DEMO))
    broken = "{% for m in messages %}\n{{ m.content }"
    args = argparse.Namespace(chat_template=broken, model="demo")
    with pytest.raises(ValueError, match=r"^--chat-template is no Jinja template \(line 2: "):
        use_chat_template(args, loaded)
    args.chat_template = "{{ raise_exception('begin with a system message') }}"
    use_chat_template(args, loaded)
    assert loaded.tokenizer.chat_template == args.chat_template


def test_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "qserve_jax.server.process", raising=False)
    assert main([]) == 2
    assert "pip install 'qserve_jax[serve]'" in capsys.readouterr().err
