"""A kernel body as a JAX function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
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
    peers: bool = False,
    updated: Sequence[jax.Array] = (),
    arch: tuple[int, int] | None = None,
) -> Any:
    """Run body(*inputs, *out, shared, barriers), given as MLIR memrefs, in every thread.

    out: a ShapeDtypeStruct, or a list of them; the outputs are returned likewise.
    updated: arrays that the body gets between inputs and outputs and writes to in place (where they
      are donated, or carried by a loop); they are returned after the outputs, of which there must
      then be a list.
    blocks: of `warpgroups` x 128 threads. Nothing is synchronised or initialised but by the body.
    shared_bytes: of scratch, the argument `shared`.
    barriers: room for that many mbarriers; where there are none, body has no such argument.
    cluster: of so many consecutive blocks, which divides their number.
    with_context: body(context, *inputs, ...), for `tensor_map` and other devices (peers.py).
    peers: whether body reaches other devices, and waits for them by flags of its own: JAX's barrier
      before such kernels is left out.
    arch: the compute capability to lower for, see `architecture`; None for the GPU's. With one
      output only.

    Raises TypeError under jax.grad; ValueError where it is compiled for no NVIDIA GPU;
    NotImplementedError with `updated` under a shard_map that checks which axes values vary over.
    """
    ref = plgpu.RefType()

    def kernel(*refs: Any) -> None:
        def inline(context: Any, *memrefs: Any) -> tuple[()]:
            body(*((context,) if with_context else ()), *memrefs)
            return ()

        plgpu.inline_mgpu(arg_types=(ref,) * len(refs), return_type=())(inline)(*refs)

    kernel.__name__ = name
    shape = _shape(blocks, warpgroups, cluster)
    scratch = [plgpu.SMEM((words,), jnp.int32) for words in (shared_bytes // 4, 2 * barriers)]
    scratch = scratch if barriers else scratch[:1]
    params = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        unsafe_no_auto_barriers=True,
        reduction_scratch_bytes=0,
        skip_device_barrier=peers,
    )
    if updated:
        _check_unchecked(updated, name)
        operands = _for_gpus_without_derivative(lambda *x: x, name)(*inputs, *updated)
        fixed, changed = operands[: len(inputs)], operands[len(inputs) :]
        return _update(kernel, fixed, changed, out, scratch, shape, params)
    call = plgpu.kernel(
        kernel, out_type=out, scratch_types=scratch, compiler_params=params, **shape
    )
    if arch is not None:
        call = lowered_for(arch, call, out)
    if arch is not None or with_context:  # a tensor map has the operand's own rank
        call = jax.custom_batching.sequential_vmap(call)
    return _for_gpus_without_derivative(call, name)(*inputs)


def _shape(blocks: int, warpgroups: int, cluster: int) -> dict[str, Any]:
    """Of a `plgpu.Mesh`, which has warpgroups and clusters only where there are several."""
    shape: dict[str, Any] = {}
    if warpgroups > 1:
        shape |= {"num_threads": warpgroups, "thread_name": "warpgroup"}
    if cluster > 1:
        shape |= {"cluster": (cluster,), "cluster_names": ("rank",)}
    return shape | {"grid": (blocks // cluster,), "grid_names": ("block",)}


def _update(
    kernel: Callable, fixed: Any, changed: Any, out: Any, scratch: Any, shape: dict, params: Any
) -> list[jax.Array]:
    """`plgpu.kernel`, and `changed` after what it wrote there.

    To the kernel they are references, which JAX makes operands that alias outputs.
    """

    def body(*refs: Any) -> None:
        axes = shape.get("thread_name", ())
        pl.run_scoped(lambda *more: kernel(*refs, *more), *scratch, collective_axes=axes)

    mesh, name = plgpu.Mesh(**shape), kernel.__name__
    call: Any = pl.kernel(body, out_type=out, mesh=mesh, compiler_params=params, name=name)
    refs = [jax.new_ref(x) for x in changed]
    return [*call(*fixed, *refs), *map(jax.freeze, refs)]


def _check_unchecked(updated: Sequence[jax.Array], name: str) -> None:
    """JAX passes no reference to a kernel that is known to vary over axes of a mesh."""
    axes = {axis for x in updated for axis in jax.typeof(x).manual_axis_type.varying}
    if axes:
        raise NotImplementedError(
            f"{name} writes in place to what varies over {sorted(axes)}, which JAX cannot check: "
            "use shard_map(..., check_vma=False)"
        )


def _for_gpus_without_derivative(call: Callable, name: str) -> Callable:
    """The call, which says under jax.grad that it has none, and elsewhere that it is for GPUs."""
    wrapped = jax.custom_jvp(lambda first, *others: call(for_gpus(first, name), *others))

    def refuse(*_: Any) -> Any:
        raise TypeError(  # not what dispatch takes for "try the next one"
            f"{name} has no derivative: differentiate the float model, or use backend='reference'"
        )

    wrapped.defjvp(refuse)
    return wrapped
