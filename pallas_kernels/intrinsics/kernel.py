"""A kernel body as a JAX function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from qserve_jax.pallas_kernels.intrinsics.target import for_gpus, lowered_for


def launch(
    body: Callable[..., None],
    inputs: Sequence[jax.Array],
    out: Any,
    *,
    name: str,
    blocks: int,
    warpgroups: int,
    shared_bytes: int,
    barriers: int = 0,
    cluster: int = 1,
    with_context: bool = False,
    arch: tuple[int, int] | None = None,
) -> Any:
    """Run body(*inputs, *out, shared, barriers), given as MLIR memrefs, in every thread.

    out: a ShapeDtypeStruct, or a list of them; the outputs are returned likewise.
    blocks: of `warpgroups` x 128 threads. Nothing is synchronised or initialised but by the body.
    shared_bytes: of scratch, the argument `shared`.
    barriers: room for that many mbarriers; where there are none, body has no such argument.
    cluster: of so many consecutive blocks, which divides their number.
    with_context: body(context, *inputs, ...), for `tensor_map`.
    arch: the compute capability to lower for, see `architecture`; None for the GPU's. With one
      output only.

    Raises TypeError under jax.grad; ValueError where it is compiled for no NVIDIA GPU.
    """
    ref = plgpu.RefType()

    def kernel(*refs: Any) -> None:
        def inline(context: Any, *memrefs: Any) -> tuple[()]:
            body(*((context,) if with_context else ()), *memrefs)
            return ()

        plgpu.inline_mgpu(arg_types=(ref,) * len(refs), return_type=())(inline)(*refs)

    kernel.__name__ = name
    shape: dict[str, Any] = {}
    if warpgroups > 1:
        shape |= {"num_threads": warpgroups, "thread_name": "warpgroup"}
    if cluster > 1:
        shape |= {"cluster": (cluster,), "cluster_names": ("rank",)}
    scratch = [plgpu.SMEM((words,), jnp.int32) for words in (shared_bytes // 4, 2 * barriers)]
    call = plgpu.kernel(
        kernel,
        out_type=out,
        grid=(blocks // cluster,),
        grid_names=("block",),
        scratch_types=scratch if barriers else scratch[:1],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
        ),
        **shape,
    )
    if arch is not None:
        call = lowered_for(arch, call, out)
    if arch is not None or with_context:  # a tensor map has the operand's own rank
        call = jax.custom_batching.sequential_vmap(call)
    first, *others = inputs
    return _without_derivative(call, name)(for_gpus(first, name), *others)


def _without_derivative(call: Callable, name: str) -> Callable:
    """The call, which says under jax.grad that it has none."""
    wrapped = jax.custom_jvp(call)

    def refuse(*_: Any) -> Any:
        raise TypeError(  # not what dispatch takes for "try the next one"
            f"{name} has no derivative: differentiate the float model, or use backend='reference'"
        )

    wrapped.defjvp(refuse)
    return wrapped
