"""The matmuls that ours is compared with: XLA's bf16, int8 and fp8, and torch's fp8.

All give bf16. int8 has the same float32 epilogue as ours; fp8 has no scales in XLA, and in torch
one for everything ("tensor") or one per token and channel ("row").
"""

from __future__ import annotations

import functools
import importlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qserve_jax.benchmarks.clock import Clock
from qserve_jax.benchmarks.operands import PlainWeights, copies_of
from qserve_jax.pallas_kernels import quantized_matmul
from qserve_jax.quantization.qtensor import Array, Int8Activation

COLUMNS = {
    "bf16_us": 2,
    "int8_us": 1,
    "fp8_xla_us": 1,
    "fp8_torch_tensor_us": 1,
    "fp8_torch_row_us": 1,
}
FP8 = tuple(name for name in COLUMNS if name.startswith("fp8"))


def bf16(x: Array, w: Array) -> Array:
    """x [M, K] times w [N, K] transposed, in bf16."""
    return _dot(x, w)


def int8(x: Int8Activation, w: Any) -> Array:
    """int32 sums, scaled in float32, rounded to bf16."""
    return quantized_matmul(x, w, out_dtype=jnp.bfloat16, backend="reference")


def fp8(x: Array, w: Array) -> Array:
    """float8_e4m3fn in, bf16 out."""
    return _dot(x, w)


def _dot(x: Array, w: Array) -> Array:
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.bfloat16)


XLA: dict[str, Callable[[Any, Any], Array]] = {"bf16_us": bf16, "int8_us": int8, "fp8_xla_us": fp8}


@jax.jit
def xla_activations(x: Int8Activation) -> dict[str, Any]:
    """What each function of XLA takes as its first argument."""
    values = x.codes.astype(jnp.bfloat16)
    return {"bf16_us": values, "int8_us": x, "fp8_xla_us": (values / 16).astype(jnp.float8_e4m3fn)}


def xla_weights(weights: list[PlainWeights]) -> dict[str, list[Any]]:
    """What each function of XLA takes as its second argument, to go round."""
    return {
        "bf16_us": [w.bf16 for w in weights],
        "int8_us": [w.int8 for w in weights],
        "fp8_xla_us": [w.fp8 for w in weights],
    }


def best_fp8(columns: dict[str, Any]) -> float | None:
    """The fastest of XLA's and torch's, None where there is none."""
    return min((columns[name] for name in FP8 if columns.get(name)), default=None)


def why_no_torch() -> str | None:
    """Why torch's fp8 cannot be measured; None where it can."""
    try:
        torch = _import_torch()
    except ImportError:
        return "torch is not installed"
    return None if torch.cuda.is_available() else "torch has no CUDA"


def _import_torch() -> Any:
    """No dependency, so no type checker finds it."""
    return importlib.import_module("torch")


class TorchFp8:
    """torch._scaled_mm for one [N, K]: weights on the GPU beside JAX's own memory."""

    def __init__(self, n: int, k: int):
        self._torch = _import_torch()
        self._n, self._k = n, k
        self._weights = [self._random(n, k) for _ in range(copies_of(n * k))]

    def _random(self, *shape: int) -> Any:
        torch = self._torch
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)

    def median_us(self, m: int, scales: str, clock: Clock) -> float:
        """Of m tokens; scales: "tensor" or "row"."""
        torch = self._torch
        x = self._random(m, self._k)
        shapes = {"tensor": ((), ()), "row": ((m, 1), (1, self._n))}[scales]
        x_scale, w_scale = (torch.ones(shape, device="cuda") for shape in shapes)
        multiply = functools.partial(
            torch._scaled_mm,
            scale_a=x_scale,
            scale_b=w_scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return statistics.median(
            clock(
                lambda i: multiply(x, self._weights[i % len(self._weights)].t()),
                wait=lambda _: torch.cuda.synchronize(),
            )
        )

    def free(self) -> None:
        """Give the memory back to the GPU."""
        self._weights = []
        self._torch.cuda.empty_cache()
