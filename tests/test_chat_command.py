"""The command `python -m qserve_jax.chat`, on lines from a pipe."""

import io
import signal
from pathlib import Path

import pytest

import qserve_jax
from qserve_jax import LLM, SamplingParams, _cli, load_model
from qserve_jax.chat import as_prompt, main

DEMO = Path(qserve_jax.__file__).parent / "assets" / "demo"
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def loaded():
    return load_model(DEMO, precision="w16a16kv16", dtype="float32")


@pytest.fixture(scope="module")
def llm(loaded):
    return LLM(loaded, max_model_len=64, num_pages=4, max_num_seqs=1)


@pytest.fixture
def say(llm, loaded, monkeypatch, capsys):
    """Runs the command on these lines; returns stdout and stderr."""

    def say(lines, *argv, code=0):
        monkeypatch.setattr(loaded.tokenizer, "chat_template", None)
        monkeypatch.setattr(_cli, "load", lambda args: (loaded, 0.0))
        monkeypatch.setattr(_cli, "make_llm", lambda *args: llm)
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        handler = signal.getsignal(signal.SIGINT)
        try:
            assert main(["--max-tokens", "8", *argv]) == code
        finally:
            signal.signal(signal.SIGINT, handler)
        return capsys.readouterr()

    return say


def text_after(llm, prompt):
    return llm.generate(prompt, SamplingParams(max_tokens=8))[0].text


def test_a_conversation(say, llm):
    """Each answer sees the lines and answers before it, until /reset; /exit ends it."""
    out, err = say(["Once upon a time", "", "The dog", "/reset", "The dog", "/exit", "The cat"])
    first = text_after(llm, "Once upon a time")
    second = text_after(llm, f"Once upon a time{first} The dog")
    alone = text_after(llm, "The dog")
    assert second != alone
    assert out == f"{first}\n{second}\n{alone}\n"
    assert "has no chat template: it goes on from your text" in err


def test_what_is_no_command(say, llm):
    out, err = say(["/rest", "Once upon a time"])
    assert out == text_after(llm, "Once upon a time") + "\n"
    assert "error: /rest is no command: /reset and /exit are" in err


def test_a_template(say, llm, tmp_path):
    """The system prompt comes first, again after /reset; the end of stdin ends the conversation."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    flags = ("--chat-template", str(tmp_path / "chat.jinja"), "--system-prompt", "Once upon ")
    out, err = say(["a time", "/reset", "a time"], *flags, "--quiet")
    answer = text_after(llm, [0, *llm.tokenizer.encode("Once upon a time")[1:]])
    assert out == f"{answer}\n{answer}\n" and err == ""


def test_ctrl_c_stops_the_answer_alone(say, llm, monkeypatch):
    """What was shown stays in the conversation."""
    whole, step, calls = text_after(llm, "Once upon a time"), llm.engine.step, []

    def interrupted():
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    out, err = say(["Once upon a time", "The dog"])
    stopped, answer, _ = out.split("\n")
    assert whole.startswith(stopped) and 0 < len(stopped) < len(whole)
    monkeypatch.undo()
    assert answer == text_after(llm, f"Once upon a time{stopped} The dog")
    assert " [stopped]" in err
    assert llm.pool.free_pages == llm.pool.num_pages


def test_a_context_that_is_full(say, llm):
    out, err = say(["word " * 70, "The cat"])
    assert out == text_after(llm, "The cat") + "\n"
    assert "the context holds 64" in err and "/reset forgets" in err


def test_bad_flags(say, monkeypatch):
    assert "--temperature -1.0 must be" in say([], "--temperature", "-1", code=2).err
    assert (
        "--system-prompt 'a' needs a chat template" in say([], "--system-prompt", "a", code=1).err
    )
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "auto")  # each process would read its own stdin
    assert "is set (auto) but the conversation runs in one process" in say([], code=2).err


def test_prompts():
    messages = [{"role": "user", "content": c} for c in "abc"]
    assert as_prompt(messages, True) is messages
    assert as_prompt(messages, False) == "ab c"
