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
import numpy as np
from jax.core import Tracer

from qserve_jax.quantization.qtensor import Array, KVCache, kv_bytes_per_token

BACKENDS = ("mosaic_sm90", "mosaic_mma", "reference")
"""All backend names, fastest first. An operation need not have all of them."""

ENVIRONMENT_VARIABLE = "QSERVE_JAX_BACKEND"


def resolve(backend: str | None) -> tuple[str, ...]:
    """Backends to try, in order. None reads QSERVE_JAX_BACKEND; unset or "auto" means all of them.

    Read when an operation is traced: a compiled function keeps what it was traced with.
    Raises ValueError on a name that is not in BACKENDS.
    """
    name = (os.environ.get(ENVIRONMENT_VARIABLE) or "auto") if backend is None else backend
    if name == "auto":
        return BACKENDS
    if name not in BACKENDS:
        source = ENVIRONMENT_VARIABLE if backend is None else "backend"
        raise ValueError(f"{source}={name!r} is unknown: use auto or one of {', '.join(BACKENDS)}")
    return (name,)


CACHE_DTYPES = ("bfloat16", "float16", "float32")
"""Of a 16-bit cache."""

NEEDS: dict[str, tuple[str, str, Callable[[str], bool]]] = {
    "mosaic_sm90": ("Hopper", "9.0", lambda capability: capability == "9.0"),
    "mosaic_mma": ("Ampere or newer", "8.0 or more", lambda capability: _major(capability) >= 8),
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


def is_whole(x: Any, low: int = 1) -> bool:
    """Whether x is a concrete integer, of Python or numpy, from `low` on; a bool is none."""
    return isinstance(x, int | np.integer) and not isinstance(x, bool) and bool(x >= low)


def _check_arrays(kind: Any, said: str, cure: str, arrays: dict[str, Any]) -> None:
    for name, x in arrays.items():
        if x is not None and not isinstance(x, Array | np.ndarray):
            raise ValueError(f"{name} is a {type(x).__name__}: give an array")
        if x is not None and not jnp.issubdtype(x.dtype, kind):
            raise ValueError(f"{name} is {x.dtype}, which is no {said}: cast it to {cure}")


def check_given(**arrays: Any) -> None:
    """ValueError where one is None."""
    for name, x in arrays.items():
        if x is None:
            raise ValueError(f"{name} is None: give an array")


def check_integers(**arrays: Any) -> None:
    """ValueError unless all that are given are arrays of integers."""
    _check_arrays(jnp.integer, "integer", "int32", arrays)


def check_floats(**arrays: Any) -> None:
    """ValueError unless all that are given are arrays of floats."""
    _check_arrays(jnp.floating, "float", "bfloat16 or float32", arrays)


def as_int32(**arrays: Any) -> list[Any]:
    """All arrays that are given, as int32, and None for the others. Raises as `check_integers`.

    In a narrower type what is computed with page ids and lengths would wrap; what int32 does not
    hold becomes the nearest that it does, which is out of range as well.
    """
    check_integers(**arrays)
    return [None if x is None else _int32(x) for x in arrays.values()]


def _int32(x: Any) -> Array:
    found, most = jnp.iinfo(x.dtype), jnp.iinfo(jnp.int32)
    if found.max > most.max:
        x = x.clip(max(found.min, most.min), most.max)
    return jnp.asarray(x, jnp.int32)


def check_cache(cache: KVCache, layer: Any) -> None:
    """ValueError unless it is a cache (`check_pages`) that has the layer."""
    check_pages(cache)
    check_layer(layer, "cache pages", cache.pages.shape, cache.stacked)


def check_pages(cache: Any) -> None:
    """ValueError unless the pages are of the cache's bits and head_dim, and none of its sizes 0."""
    pages = getattr(cache, "pages", None)
    if not isinstance(cache, KVCache) or not isinstance(pages, Array):
        found = type(pages if isinstance(cache, KVCache) else cache).__name__
        raise ValueError(f"the cache is a {found}: make a KVCache of a JAX array with init_cache")
    bits, h = cache.bits, cache.head_dim
    if not is_whole(bits) or bits not in (4, 8, 16):
        raise ValueError(f"a cache of {bits=} is none: use 4, 8 or 16")
    if not is_whole(h) or h % 8:
        raise ValueError(f"a cache of head_dim={h!r} is none: use a multiple of 8")
    if bits == 16:
        fits = pages.ndim in (5, 6) and (pages.shape[-3], pages.shape[-1]) == (2, h)
        fits &= pages.dtype.name in CACHE_DTYPES
    else:
        fits = pages.ndim in (3, 4) and pages.dtype == jnp.int32
        fits = fits and 4 * pages.shape[-1] % kv_bytes_per_token(h, bits) == 0
    if not fits or not pages.size:
        found = f"{pages.dtype.name}{list(pages.shape)}"
        raise ValueError(
            f"pages {found} hold no {bits}-bit cache of head_dim {h}: make them as init_cache does"
        )


def check_layer(layer: Any, name: str, shape: tuple[int, ...], stacked: bool) -> None:
    """ValueError unless `layer` is one of the layers of an array of `shape` that is called `name`.

    stacked: whether the array has a leading axis of layers; without one, layer must be None. A
    traced integer is trusted to lie within: else it is an index of XLA, which from -L to -1 counts
    from the end; beyond these, a read clamps it and a write is dropped.
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
        index = None
    if index is None or isinstance(layer, bool):
        raise ValueError(f"{layer=} is no integer: use 0..{shape[0] - 1}")
    if not 0 <= index < shape[0]:
        raise ValueError(f"layer={index} but the {name} have layers 0..{shape[0] - 1}: use one")
