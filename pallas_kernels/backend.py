"""Which implementation of an operation runs: by argument, by environment, or the first that can.

And the checks of dtypes, of caches and of `layer` that the operations share.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from qserve_jax.quantization.qtensor import KVCache, kv_bytes_per_token

BACKENDS = ("mosaic_sm90", "mosaic_mma", "reference")
"""All backend names, fastest first. An operation need not have all of them."""

ENVIRONMENT_VARIABLE = "QSERVE_JAX_BACKEND"


def resolve(backend: str | None) -> tuple[str, ...]:
    """Backends to try, in order. None reads QSERVE_JAX_BACKEND; unset or "auto" means all of them.

    Read when an operation is traced: a compiled function keeps what it was traced with.
    Raises ValueError on a name that is not in BACKENDS.
    """
    name = backend or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if name == "auto":
        return BACKENDS
    if name not in BACKENDS:
        source = "backend" if backend else ENVIRONMENT_VARIABLE
        raise ValueError(f"{source}={name!r} is unknown: use auto or one of {', '.join(BACKENDS)}")
    return (name,)


NEEDS: dict[str, tuple[str, str, Callable[[str], bool]]] = {
    "mosaic_sm90": ("Hopper", "9.0", lambda capability: capability == "9.0"),
    "mosaic_mma": ("Ampere", "8.0 or more", lambda capability: _major(capability) >= 8),
}
"""Backend -> the GPU it needs, its compute capability in words and as a check."""


def _major(capability: str) -> int:
    """Of "8.6", 8; 0 of what is no compute capability, as AMD's names."""
    major = capability.partition(".")[0]
    return int(major) if major.isdecimal() else 0


def default_device() -> Any:
    """Where JAX computes unless told otherwise: jax_default_device, a device or a platform's first,
    or the first of all."""
    device = jax.config.jax_default_device or jax.default_backend()
    return jax.devices(device)[0] if isinstance(device, str) else device


def unavailable(name: str) -> str | None:
    """Why no kernel of this backend can run where JAX computes by default; None where it can."""
    if name not in NEEDS:
        return None
    gpu, said, can = NEEDS[name]
    device = default_device()
    if device.platform != "gpu":
        return f"{name} needs an NVIDIA {gpu} GPU, but JAX computes on {device.platform}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if not can(capability):
        return f"{name} needs compute capability {said} ({gpu}), this GPU has {capability}"
    return None


def usable(backend: str | None) -> tuple[str, ...]:
    """`resolve(backend)`, without those that cannot run here where nobody named one.

    A backend that is named, by argument or environment, is not checked against the device, so that
    it can be lowered for another machine.
    """
    names = resolve(backend)
    if len(names) == 1:
        return names
    return tuple(name for name in names if unavailable(name) is None)


def dispatch(
    op: str, implementations: Mapping[str, Callable], backend: str | None, *args: Any, **kwargs: Any
) -> Any:
    """Call the first implementation that can do this case.

    An implementation says that it cannot by raising NotImplementedError; the next one is tried.
    When none is left (an explicit backend is alone on its list) the last refusal propagates.
    """
    refusal = None
    for name in resolve(backend):
        if name not in implementations:
            refusal = refusal or NotImplementedError(f"{op} has no {name!r} backend")
            continue
        try:
            return implementations[name](*args, **kwargs)
        except NotImplementedError as error:
            refusal = error
    raise refusal or NotImplementedError(f"{op}: no backend")


def check_integers(**arrays: Any) -> None:
    """ValueError unless every array that is given is of integers."""
    for name, x in arrays.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} is {x.dtype}, which is no integer: cast it to int32")


def check_floats(**arrays: Any) -> None:
    """ValueError unless every array that is given is of floats."""
    for name, x in arrays.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} is {x.dtype}, which is no float: cast it to bfloat16")


def check_cache(cache: KVCache, layer: Any) -> None:
    """ValueError unless the pages are of the cache's bits and head_dim, and have the layer."""
    pages, bits, h = cache.pages, cache.bits, cache.head_dim
    if bits not in (4, 8, 16):
        raise ValueError(f"a cache of {bits=} is none: use 4, 8 or 16")
    if bits == 16:
        fits = pages.ndim in (5, 6) and (pages.shape[-3], pages.shape[-1]) == (2, h)
        fits &= jnp.issubdtype(pages.dtype, jnp.floating)
    else:
        words = 4 * pages.shape[-1] % kv_bytes_per_token(h, bits) == 0
        fits = pages.ndim in (3, 4) and words and pages.dtype == jnp.int32
    if not fits:
        found = f"{pages.dtype.name}{list(pages.shape)}"
        raise ValueError(
            f"pages {found} hold no {bits}-bit cache of head_dim {h}: make them as init_cache does"
        )
    check_layer(layer, "cache pages", pages.shape, cache.stacked)


def check_layer(layer: Any, name: str, shape: tuple[int, ...], stacked: bool) -> None:
    """ValueError unless `layer` is one of the layers of an array of `shape` that is called `name`.

    stacked: whether the array has a leading axis of layers; without one, layer must be None. A
    traced integer is trusted to lie within: XLA clamps it on a read and drops a write.
    """
    if stacked != (layer is not None):
        cure = "name one layer" if stacked else "leave layer out"
        raise ValueError(f"{name} of shape {shape} do not go with {layer=}: {cure}")
    if layer is None:
        return
    if isinstance(layer, Tracer):
        if layer.shape or not jnp.issubdtype(layer.dtype, jnp.integer):
            found = f"{layer.dtype}{list(layer.shape)}"
            raise ValueError(f"a traced layer is {found}, which is no integer: use an int32[]")
        return
    try:
        index = operator.index(layer)
    except TypeError:
        raise ValueError(f"{layer=} is no integer: use 0..{shape[0] - 1}") from None
    if not 0 <= index < shape[0]:
        raise ValueError(f"layer={index} but the {name} have layers 0..{shape[0] - 1}: use one")
