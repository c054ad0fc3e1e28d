"""What `mosaic_mma` compiles to is accepted for older GPUs: by ptxas, where it is at hand."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from qserve_jax.benchmarks.provenance import ROOT

pytestmark = pytest.mark.gpu

OLDER = ("sm_80", "sm_86", "sm_89")
LAUNCHES = """
import jax, jax.numpy as jnp, numpy as np
from qserve_jax.pallas_kernels import intrinsics, paged_attention, w4a8_matmul
from qserve_jax.pallas_kernels import quantize_activation, rms_norm_quantize, silu_mul_quantize
from qserve_jax.pallas_kernels import rope_append_kv
from qserve_jax.quantization.qtensor import KVCache
from tests.pallas_kernels.w4a8_cases import make_activation, make_packed

rng = np.random.default_rng(0)
for per_group in (True, False):
    w = make_packed(per_group, rng, 256, 512)
    for m in (1, 64):
        x = make_activation(rng, m, 512)
        w4a8_matmul(x, w, layer=1, out_dtype=jnp.bfloat16, backend={name!r})
lens = jnp.full(2, 100, jnp.int32)
table = jnp.zeros((2, 2), jnp.int32)
for bits in (4, 8):
    pages = jnp.zeros((4, 2, 64 * (2 * 64 * bits // 8 + 8) // 4), jnp.int32)
    q = jnp.ones((2, 8, 64), jnp.bfloat16)
    options = dict(query_lens=jnp.ones_like(lens), attends="quantized", backend={name!r})
    paged_attention(q, KVCache(pages, bits, 64), table, lens, **options).block_until_ready()
with intrinsics.architecture(8, 0):  # these are lowered for the GPU that they run on
    x, angles = jnp.ones((4, 1024), jnp.bfloat16), jnp.ones((2, 32))
    quantize_activation(x, backend={name!r})
    rms_norm_quantize(x, x[0], eps=1e-5, backend={name!r})
    silu_mul_quantize(x, backend={name!r})
    cache = KVCache(pages[None], 8, 64)
    qkv = [jnp.ones((2, 12, 64), jnp.bfloat16)]
    rope_append_kv(qkv, angles, angles, cache, lens, layer=0, backend={name!r})
"""


def ptx_of(name, folder):
    """Of every kernel that a new process launches, as Mosaic writes it down."""
    folder.mkdir()
    more = {"MOSAIC_GPU_DUMP_TO": str(folder), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", LAUNCHES.format(name=name)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | more | {"PYTHONPATH": paths})
    return sorted(folder.rglob("*.ptx"))


def refusal(ptx, gpu, folder):
    """What ptxas says against a kernel for this GPU; None where it takes it."""
    ptxas = shutil.which("ptxas") or shutil.which("ptxas", path="/usr/local/cuda/bin")
    if ptxas is None:
        pytest.skip("needs ptxas: on PATH or in /usr/local/cuda/bin")
    text, count = re.subn(r"^\.target .*$", f".target {gpu}", ptx.read_text(), flags=re.MULTILINE)
    assert count == 1
    older = folder / f"{gpu}.ptx"
    older.write_text(text)
    command = [ptxas, "-arch", gpu, str(older), "-o", str(folder / "cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr


def test_ptx_is_accepted_for_older_gpus(tmp_path):
    kernels = ptx_of("mosaic_mma", tmp_path / "ptx")
    assert len(kernels) >= 10
    for ptx in kernels:
        for gpu in OLDER:
            assert refusal(ptx, gpu, tmp_path) is None, (ptx.name, gpu)


def test_hoppers_own_is_not(tmp_path):
    kernels = ptx_of("mosaic_sm90", tmp_path / "ptx")
    assert any(refusal(ptx, "sm_80", tmp_path) for ptx in kernels)
