"""Which compute capability a kernel is lowered for."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.core import ShapedArray
from jax.experimental.mosaic import gpu as mgpu
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

# Mosaic lowers for the GPU that JAX finds, or Hopper where there is none, by this function. Here it
# asks `architecture` first.
_forced: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar(
    "forced", default=None
)
_detected_architecture = mgpu.utils._infer_arch
mgpu.utils._infer_arch = lambda: _forced.get() or _detected_architecture()


@contextlib.contextmanager
def architecture(major: int, minor: int) -> Iterator[None]:
    """Mosaic kernels that are lowered inside are lowered for this compute capability.

    That decides which instructions Mosaic itself adds to a body. The GPU's own compute capability
    is what LLVM and ptxas then compile for, and nothing here can change that.
    """
    token = _forced.set((major, minor))
    try:
        yield
    finally:
        _forced.reset(token)


def lowered_for(arch: tuple[int, int], call: Callable, out: Any) -> Callable[..., Any]:
    """A call with one output whose Mosaic kernels are lowered for `arch`.

    A primitive of its own, because lowering comes long after `call` was traced.
    """
    return functools.partial(_lowered_for.bind, call=call, arch=arch, out=out)


_lowered_for = Primitive("lowered_for")


@_lowered_for.def_impl
def _(*args: jax.Array, **params: Any) -> jax.Array:
    return jax.jit(lambda *args: _lowered_for.bind(*args, **params))(*args)


@_lowered_for.def_abstract_eval
def _(*args: Any, out: jax.ShapeDtypeStruct, **_: Any) -> Any:
    return ShapedArray(out.shape, out.dtype)


def _lower(ctx: Any, *args: Any, call: Callable, arch: tuple[int, int], **_: Any) -> Any:
    with architecture(*arch):
        return mlir.lower_fun(call, multiple_results=False)(ctx, *args)


mlir.register_lowering(_lowered_for, _lower)


def for_gpus[A: jax.Array](x: A, name: str) -> A:
    """x, an operand of the kernel of this name: ValueError where it is compiled for no NVIDIA GPU,
    which Mosaic would not say as clearly."""
    return _for_gpus.bind(x, name=name)


_for_gpus = Primitive("for_gpus")
_for_gpus.def_impl(jax.jit(for_gpus, static_argnames="name"))
_for_gpus.def_abstract_eval(lambda x, **_: x)
batching.primitive_batchers[_for_gpus] = lambda args, axes, **params: (
    _for_gpus.bind(*args, **params),
    axes[0],
)


def _lower_elsewhere(ctx: Any, x: Any, *, name: str) -> Any:
    raise ValueError(
        f"{name} is a kernel for NVIDIA GPUs, but is compiled for "
        f"{' and '.join(ctx.module_context.platforms)}: use backend='reference', or name no backend"
    )


mlir.register_lowering(_for_gpus, _lower_elsewhere)
mlir.register_lowering(_for_gpus, lambda ctx, x, **_: [x], platform="cuda")
