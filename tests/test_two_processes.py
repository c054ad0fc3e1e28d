"""`jax.distributed`: two processes of one machine run one model, as two hosts would."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qserve_jax
from qserve_jax import LLM, SamplingParams
from qserve_jax.benchmarks.dummy import dummy_model
from qserve_jax.checkpoint import save_native_orbax
from qserve_jax.models import ModelConfig
from qserve_jax.quantization import QuantConfig

DEMO = Path(qserve_jax.__file__).parent / "assets" / "demo"
ROOT = Path(__file__).resolve().parents[1]
GENERATE = """-m qserve_jax.generate --prompt Once --prompt Lily --max-tokens 12 --dtype float32
--precision w16a16kv16 --output json --max-num-batched-tokens 16""".split()


def run(*commands, env=None) -> list[str]:
    """The stdout of processes that run together, each on one CPU device."""
    ended = run_to_end(*commands, env=env)
    for code, _, error in ended:
        assert code == 0, error
    return [out for _, out, _ in ended]


def run_to_end(*commands, env=None, seconds=200) -> list[tuple[int, str, str]]:
    """Their exit codes, stdout and stderr. Raises TimeoutExpired where it takes longer."""
    shared = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    shared |= {"PYTHONPATH": str(ROOT)} | (env or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, *c], env=shared, **pipes) for c in commands]
    try:
        results = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(started, results, strict=True)]


def free_address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def outputs(text) -> list[list[int]]:
    """Gloo, which carries what CPUs tell each other, writes to stdout too."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return [json.loads(line)["token_ids"] for line in lines]


def test_two_processes_generate_the_tokens_of_one():
    """The first by flags, the second by environment."""
    llm = LLM(DEMO, precision="w16a16kv16", dtype="float32", max_num_batched_tokens=16)
    alone = llm.generate(["Once", "Lily"], SamplingParams(max_tokens=12))
    address = free_address()
    spread = [*GENERATE, "--tensor-parallel-size", "2", "--coordinator-address", address]
    first, second = run(
        [*spread, "--process-id", "0"],
        ["-c", AS_SECOND, *spread[2:]],
        env={"JAX_NUM_PROCESSES": "2"},
    )
    assert outputs(first) == [output.token_ids for output in alone]
    assert outputs(second) == []


AS_SECOND = """
import os, sys
os.environ["JAX_PROCESS_ID"] = "1"
from qserve_jax.generate import main
sys.exit(main())
"""

RESTORE = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import tensorstore as ts
from qserve_jax import load_model
from qserve_jax.models.sharding import tensor_mesh

def read_bytes():
    found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(v["value"] for m in found for v in m["values"])

before = read_bytes()
params = load_model(sys.argv[3], dtype="float32", mesh=tensor_mesh(2)).params
own = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
whole = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps({"read": read_bytes() - before, "own": own, "whole": whole}))
"""


@pytest.mark.slow  # two more processes, for what test_onto_mesh.py counts of safetensors
def test_each_process_reads_its_part_of_an_orbax_checkpoint(tmp_path):
    heads: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 64}
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 8192, "num_layers": 2}
    sizes |= {"vocab_size": 4096, "max_position_embeddings": 64}
    made = dummy_model(ModelConfig("llama", **sizes, **heads), QuantConfig(), dtype="float32")
    save_native_orbax(tmp_path / "out", made.params, made.config, made.quant_config)
    address = free_address()
    texts = run(*(["-c", RESTORE, address, str(i), str(tmp_path / "out")] for i in range(2)))
    for text in texts:
        found = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
        assert found["own"] < 0.51 * found["whole"]
        # Orbax compresses, which takes about a tenth off random floats, and reads its metadata.
        assert 0.8 * found["own"] < found["read"] < 1.1 * found["own"], found


FAILS = """
import argparse, os, signal, sys
from qserve_jax import _cli

def body(argv):
    import jax
    from jax.experimental.multihost_utils import sync_global_devices
    address, index, how = argv[:3]
    size = {"tensor_parallel_size": 2, "num_processes": 2, "process_id": index, "quiet": True}
    _cli.start_devices(argparse.Namespace(coordinator_address=address, **size))
    sync_global_devices("all are here")
    if how == "alike":
        raise ValueError("the disk is full")
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    sync_global_devices("one has gone")

sys.exit(_cli.run("two", body))
"""


@pytest.mark.parametrize("how", ["alike", "alone", pytest.param("--debug", marks=pytest.mark.slow)])
def test_an_error_ends_all_processes_soon(how):
    """The first does not wait for one that was killed, nor says more than its error; where all
    have an error, all have the time to say it."""
    argv = ["-c", FAILS, free_address()]
    first, second = run_to_end(*([*argv, str(i), how] for i in range(2)), seconds=30)
    code, _, error = first
    if how == "alike":
        assert (code, error) == (1, "two: error: the disk is full\n")
        assert (second[0], second[2]) == (code, error)
        return
    *before, line = error.splitlines()
    assert code == 1 and line.startswith("two: error: ") and "by peer" in line
    assert bool(before) == ("Traceback" in error) == (how == "--debug")
    assert (second[0], second[2]) == (-9, "")


@pytest.mark.parametrize(("flags", "words"), [
    ("--process-id 0", ["--coordinator-address is missing", "--num-processes, --process-id"]),
    ("--coordinator-address a:1 --num-processes 2 --process-id 2", ["--process-id 2", "from 0"]),
])  # fmt: skip
def test_flags_of_processes_that_do_not_fit(flags, words, capsys):
    from qserve_jax.generate import main

    assert main(["--prompt", "a", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and [word for word in words if word not in error] == []
