"""Small launches of every kernel design under compute-sanitizer: memcheck and racecheck.

python scripts/sanitize_kernels.py [--seconds 55] [--cases prefill]

Both tools run beside each other, each over a process of its own that launches every case once and
compares the output with the reference's, computed on the CPU. Prints what the tools sum up. Exit
status 0: both clean. 1: something found, a wrong output, or out of time. 2: no compute-sanitizer.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qserve_jax.benchmarks.provenance import ROOT
from qserve_jax.pallas_kernels import (
    append_kv,
    paged_attention,
    quantize_activation,
    rms_norm_quantize,
    rope_append_kv,
    silu_mul_quantize,
)
from qserve_jax.pallas_kernels.paged_attention import mosaic_mma as attention_mma
from qserve_jax.pallas_kernels.paged_attention import mosaic_prefill
from qserve_jax.pallas_kernels.paged_attention import mosaic_sm90 as attention_sm90
from qserve_jax.pallas_kernels.paged_attention.decode_config import DecodeConfig
from qserve_jax.pallas_kernels.w4a8_matmul import mosaic_mma, mosaic_sm90, reference
from qserve_jax.pallas_kernels.w4a8_matmul.layout import to_kernel_layout
from qserve_jax.pallas_kernels.w4a8_matmul.mma_config import MmaConfig
from qserve_jax.pallas_kernels.w4a8_matmul.sm90_config import Sm90Config
from qserve_jax.quantization.numerics import quantize_activation as quantize
from qserve_jax.quantization.qtensor import KVCache, Source, W4PerChannel, W4PerGroup

TOOLS = ("memcheck", "racecheck")
ONLY_OURS = ("--kernel-name", "kernel_substring=mosaic_gpu_kernel")
"""What is checked: XLA's own kernels, which would take most of the time, are not."""
SOURCE = Source(("stack", "in", "out"), (0,), (0,), "float32")
CONFIGS: dict[str, tuple[Callable, int, int, Any]] = {
    "mma, 3 tokens": (mosaic_mma.matmul, 3, 192, MmaConfig(1, 2, 4, 8, 4)),
    "mma, 130 tokens": (mosaic_mma.matmul, 130, 192, MmaConfig(4, 2, 1, 128, 3)),
    "wgmma, 1 k_warpgroup": (mosaic_sm90.matmul, 40, 192, Sm90Config(64, 2, 1, 4, 1)),
    "wgmma, 4 k_warpgroups": (mosaic_sm90.matmul, 40, 192, Sm90Config(32, 1, 4, 2, 1)),
    "wgmma, cluster": (mosaic_sm90.matmul, 40, 192, Sm90Config(32, 1, 1, 4, 2)),
    "wgmma, several tiles": (mosaic_sm90.matmul, 130, 64 * 17, Sm90Config(16, 1, 1, 4, 1)),
    "wgmma, last round": (mosaic_sm90.matmul, 40, 320, Sm90Config(64, 2, 1, 4, 1, last=3, lead=2)),
    "wgmma, blocks along K": (mosaic_sm90.matmul, 40, 192, Sm90Config(64, 2, 2, 2, 1, k_blocks=3)),
    "wgmma, all of it": (mosaic_sm90.matmul, 130, 64 * 33, Sm90Config(32, 1, 4, 2, 2)),
}
"""name: (matmul, tokens, channels, config)"""
ATTENTION: dict[str, tuple[Callable, int, DecodeConfig]] = {
    "sm90, one worker": (attention_sm90.decode, 4, DecodeConfig(2)),
    "sm90, two warpgroups": (attention_sm90.decode, 4, DecodeConfig(2, 2)),
    "sm90, warpgroups and a cluster": (attention_sm90.decode, 8, DecodeConfig(2, 2, 2)),
    "sm90, splits": (attention_sm90.decode, 16, DecodeConfig(2, 1, 1, 2)),
    "mma, one worker": (attention_mma.decode, 4, DecodeConfig(3)),
    "mma, splits": (attention_mma.decode, 16, DecodeConfig(2, 2, 1, 2)),
}
"""name: (decode, bits of the cache, config)"""
K = 640  # five chunks: k_warpgroups that do not divide them


def make_weight(rng: np.random.Generator, n: int, per_group: bool) -> Any:
    """One canonical layer."""
    codes = jnp.asarray(rng.integers(0, 256, (n, K // 2)), jnp.uint8)
    scale = jnp.asarray(2.0 ** rng.integers(-10, -8, n), jnp.float32)
    if not per_group:
        return W4PerChannel(codes, scale, 7.5 * scale, SOURCE)
    group_scale = rng.integers(1, 18, (n, K // 128))
    offset = jnp.asarray(rng.integers(-128, 127 - 15 * group_scale + 1), jnp.int8)
    return W4PerGroup(codes, scale, jnp.asarray(group_scale, jnp.uint8), offset, 128, SOURCE)


def matmul_cases(rng: np.random.Generator) -> dict[str, tuple[Callable, tuple, Any]]:
    """name -> (what to run, its arguments, what it must give); made on the CPU."""
    cases = {}
    for name, (matmul, m, n, config) in CONFIGS.items():
        for per_group in (True, False):
            x = quantize(jnp.asarray(rng.standard_normal((m, K)), jnp.float32))
            w = make_weight(rng, n, per_group)
            bias = jnp.asarray(rng.standard_normal(n), jnp.float32)

            def run(x: Any, w: Any, bias: Any, matmul=matmul, config=config) -> Any:
                return matmul(x, w, bias=bias, out_dtype=jnp.bfloat16, config=config)

            kind = "per group" if per_group else "per channel"
            cases[f"{name}, {kind}"] = (
                run,
                (x, to_kernel_layout(w), bias),
                reference.matmul(
                    x, w, bias=bias, residual=None, layer=None, out_dtype=jnp.bfloat16
                ),
            )
    return cases


def elementwise_cases(rng: np.random.Generator) -> dict[str, tuple[Callable, tuple, Any]]:
    x = jnp.asarray(rng.standard_normal((5, 1024)), jnp.bfloat16)
    scale = jnp.ones(1024, jnp.bfloat16)
    runs: dict[str, tuple[Callable, tuple]] = {
        "quantize_activation": (quantize_activation, (x,)),
        "rms_norm_quantize": (functools.partial(rms_norm_quantize, eps=1e-5), (x, scale)),
        "silu_mul_quantize": (silu_mul_quantize, (x,)),
    }

    def codes(run: Callable, backend: str) -> Callable:
        return lambda *args: run(*args, backend=backend).codes

    return {
        name: (codes(run, "mosaic_mma"), args, codes(run, "reference")(*args))
        for name, (run, args) in runs.items()
    }


def attention_cases(rng: np.random.Generator) -> dict[str, tuple[Callable, tuple, Any]]:
    """Rings that go round several times, and rows that end in them; again with the new tokens as
    they are, a window and the second of two layers."""
    lens, h, pages = np.array([330, 0, 65]), 64, 9
    k, v = jnp.asarray(rng.standard_normal((2, pages * 64, 2, h)), jnp.bfloat16)
    q = jnp.asarray(rng.standard_normal((3, 1, 8, h)), jnp.float32)
    table = jnp.asarray(rng.permutation(pages)[[[0, 1, 2, 3, 4, 5], [8] * 6, [6, 7] + [8] * 4]])
    table, lengths = table.astype(jnp.int32), jnp.asarray(lens, jnp.int32)
    sides = jnp.asarray(rng.standard_normal((2, 3, 1, 2, h)), jnp.bfloat16)
    static: dict[str, Any] = {"sm_scale": None, "softcap": None, "order": None}
    quantized = {"attends": "quantized", "layer": None, "window": None}
    full = {"attends": "full", "layer": 1, "window": 100}
    cases = {}
    for name, (decode, bits, config) in ATTENTION.items():
        words = 64 * (2 * h * bits // 8 + 8) // 4
        empty = jnp.zeros((pages, 2, 2, 64, h), jnp.bfloat16)
        empty = empty if bits == 16 else jnp.zeros((pages, 2, words), jnp.int32)
        cache = append_kv(KVCache(empty, bits, h), k, v, jnp.arange(pages * 64))
        two = KVCache(jnp.stack([jnp.zeros_like(cache.pages), cache.pages]), bits, h)
        for kind, pool, new, how in (
            ("", cache, (None, None), quantized),
            (", full", two, tuple(sides), full),
        ):

            def run(q: Any, pool: Any, new: Any, decode=decode, config=config, how=how) -> Any:
                more = {"new_k": new[0], "new_v": new[1], "query_lens": jnp.minimum(lengths, 1)}
                return decode(q, pool, table, lengths, **more, **how, **static, config=config)

            more = {"new_k": new[0], "new_v": new[1], **how}
            expected = paged_attention(q, pool, table, lengths, **more, backend="reference")
            cases[f"attention, {name}{kind}"] = (run, (q, pool, new), expected)
    return cases


def prefill_cases(rng: np.random.Generator) -> dict[str, tuple[Callable, tuple, Any]]:
    """A chunk over pages and itself, and the append of its tokens; both on every cache."""
    lens, new, h, pages = np.array([200, 0, 70]), np.array([70, 0, 3]), 64, 8
    q = jnp.asarray(rng.standard_normal((3, 70, 4, h)), jnp.bfloat16)
    k, v = jnp.asarray(rng.standard_normal((2, 3, 70, 2, h)), jnp.bfloat16)
    old_k, old_v = jnp.asarray(rng.standard_normal((2, pages * 64, 2, h)), jnp.bfloat16)
    table = jnp.asarray([[3, 0, 5, 1], [-1] * 4, [7, 2, -1, -1]], jnp.int32)
    lengths = [jnp.asarray(x, jnp.int32) for x in (lens, new)]
    slots = jnp.asarray(rng.permutation(pages * 64)[:210], jnp.int32)
    real = jnp.arange(70) < lengths[1][:, None]  # what comes for padding means nothing
    turn = jnp.ones((210, h // 2)), jnp.zeros((210, h // 2))  # XLA rounds no other way there
    cases = {}
    for bits in (4, 8, 16):
        words = 64 * (2 * h * bits // 8 + 8) // 4
        empty = jnp.zeros((pages, 2, 2, 64, h), jnp.bfloat16)
        empty = empty if bits == 16 else jnp.zeros((pages, 2, words), jnp.int32)
        cache = append_kv(KVCache(empty, bits, h), old_k, old_v, jnp.arange(pages * 64))

        def attend(q: Any, cache: Any, k: Any, v: Any, backend: str = "mosaic_mma") -> Any:
            more = {"new_k": k, "new_v": v, "query_lens": lengths[1], "backend": backend}
            out = paged_attention(q, cache, table, lengths[0], **more)
            return jnp.where(real[:, :, None, None], out, 0)

        def attend_wgmma(q: Any, cache: Any, k: Any, v: Any) -> Any:
            more = {"new_k": k, "new_v": v, "query_lens": lengths[1], "attends": "full"}
            more |= dict.fromkeys(("layer", "sm_scale", "window", "softcap"))
            out = mosaic_prefill.attention("mosaic_sm90", q, cache, table, lengths[0], **more)
            return jnp.where(real[:, :, None, None], out, 0)

        def append(cache: Any, q: Any, k: Any, v: Any, backend: str = "mosaic_mma") -> Any:
            qkv = [x.reshape(210, -1, h) for x in (q, k, v)]
            *_, cache = rope_append_kv(qkv, *turn, cache, slots, backend=backend)
            return cache.pages

        for name, run, args in (
            ("prefill", attend, (q, cache, k, v)),
            ("append", append, (cache, q, k, v)),
        ):
            cases[f"{name}, {bits} bits"] = (run, args, run(*args, backend="reference"))
        expected = cases[f"prefill, {bits} bits"][2]
        cases[f"prefill, wgmma, {bits} bits"] = (attend_wgmma, (q, cache, k, v), expected)
    return cases


def launch_all(part: str) -> int:
    """Every case once whose name has this part, on the GPU -> the number of wrong outputs."""
    rng, gpu = np.random.default_rng(0), jax.devices("gpu")[0]
    with jax.default_device(jax.devices("cpu")[0]):
        cases = matmul_cases(rng) | elementwise_cases(rng) | attention_cases(rng)
        cases |= prefill_cases(rng)
    cases = {name: case for name, case in cases.items() if part in name}
    arguments = {name: jax.device_put(args, gpu) for name, (_, args, _) in cases.items()}
    failed = 0
    for name, (run, _, expected) in cases.items():  # one thread: the tools crashed with several
        print(f"{name}:", end=" ", flush=True)
        found = jax.jit(run)(*arguments[name])
        worst = _difference(found, expected)
        # Sums of squares in another order, and exp: a code may be rounded the other way.
        # Attention multiplies weights in f16, of outputs of about one; prefill's are in bf16.
        allowed = {"rms_norm": 1, "silu_mul": 1, "attentio": 1e-3, "prefill,": 2**-6}
        right = worst <= allowed.get(name[:8], 0)
        failed += not right
        print("right" if right else f"WRONG by up to {worst}", flush=True)
    return failed


def _difference(found: Any, expected: Any) -> float:
    found, expected = (np.asarray(a).astype(np.float32) for a in (found, expected))
    return float(np.max(np.abs(found - expected), initial=0.0))


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )


def start(command: list[str], log: Path) -> subprocess.Popen:
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the two processes share the GPU
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    with log.open("w") as out:  # in a session of its own, to be ended with what it has started
        return subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, cwd=ROOT, start_new_session=True
        )


def summary(log: str) -> list[str]:
    """What a tool found, in its words, and what the launches gave."""
    told = re.compile(r"SUMMARY|={9} (Error|Warning|Invalid|Race|Potential)|: right|WRONG|Error:")
    return [line for line in log.splitlines() if told.search(line)]


def clean(code: int | None, log: str) -> bool:
    """Whether the launches ended well and the tool summed up nothing found."""
    return code == 0 and re.search(r"SUMMARY: 0 (errors|hazards)", log) is not None


def finish(process: subprocess.Popen, deadline: float) -> int | None:
    """The exit status; None where it took too long and was ended."""
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=55, help="for both tools together")
    parser.add_argument("--launch", action="store_true", help="the launches alone, without a tool")
    parser.add_argument("--cases", default="", help="only those whose name has this part")
    args = parser.parse_args()
    if args.launch:
        return min(launch_all(args.cases), 1)
    found = sanitizer()
    if found is None:
        print("no compute-sanitizer on PATH or in /usr/local/cuda/bin: install the CUDA toolkit")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        logs = {tool: Path(folder) / f"{tool}.txt" for tool in TOOLS}
        options = ["--error-exitcode", "3", "--print-limit", "5", *ONLY_OURS]
        target = [sys.executable, str(Path(__file__).resolve()), "--launch", "--cases", args.cases]
        running = {
            tool: start([found, "--tool", tool, *options, *target], log)
            for tool, log in logs.items()
        }
        deadline = time.monotonic() + args.seconds
        return max([_report(tool, running[tool], logs[tool], deadline) for tool in TOOLS])


def _report(tool: str, process: subprocess.Popen, log: Path, deadline: float) -> int:
    """Prints what a tool found; 0 where nothing."""
    code = finish(process, deadline)
    text = log.read_text(errors="replace")
    is_clean = clean(code, text)
    ended = "out of time" if code is None else f"exit status {code}"
    print(f"== {tool}: {'clean' if is_clean else 'NOT clean'}, {ended}")
    print(*summary(text), *([] if is_clean else text.splitlines()[-10:]), sep="\n", flush=True)
    return int(not is_clean)


if __name__ == "__main__":
    sys.exit(main())
