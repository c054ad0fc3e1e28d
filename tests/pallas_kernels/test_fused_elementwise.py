"""Kernels that end in int8 activations: lowered on any host, on a GPU equal to the reference."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.models import CausalLM, ModelConfig
from qserve_jax.models.layers import split_in_place
from qserve_jax.models.llama import init_params
from qserve_jax.pallas_kernels import (
    backend,
    prepare_for_backend,
    quantize_activation,
    rms_norm_quantize,
    silu_mul_quantize,
)
from qserve_jax.pallas_kernels.quantize_activation import api, mosaic, reference
from qserve_jax.quantization import numerics, quantize_params
from qserve_jax.quantization.params import quantize_kernel
from qserve_jax.quantization.qtensor import Int8Activation

KERNEL = "mosaic_sm90"
WIDTHS = [2048, 3584, 4096, 8192, 14336, 18944, 28672]
EPS = 1e-5
every_dtype = pytest.mark.parametrize("dtype", mosaic.DTYPES)


def shape(dims, dtype="bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def lower(run, *args) -> str:
    return jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def assert_equal(found: Int8Activation, expected: Int8Activation):
    for name in ("codes", "scale", "code_sum"):
        x, y = np.asarray(getattr(found, name)), np.asarray(getattr(expected, name))
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name)


@every_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_lowers_for_cuda_and_nothing_but_the_kernel_touches_the_rows(width, dtype):
    x, gate_up = shape((2, 3, width), dtype), shape((2, 3, 2 * width), dtype)
    layer, scale = shape((), "int32"), shape((4, width), dtype)
    texts = {
        "quantize_activation": lower(lambda x: quantize_activation(x, backend=KERNEL), x),
        "silu_mul_quantize": lower(lambda x: silu_mul_quantize(x, backend="mosaic_mma"), gate_up),
        "rms_norm_quantize": lower(
            lambda x, w, i: rms_norm_quantize(x, w, eps=EPS, layer=i, backend=KERNEL),
            *(x, scale, layer),
        ),
    }
    for name, text in texts.items():
        ops = {line.split("= ")[1].split()[0] for line in text.splitlines() if " = stable" in line}
        assert ops <= {"stablehlo.custom_call", "stablehlo.reshape"}, ops
        assert text.count("stablehlo.custom_call @mosaic_gpu") == 1 and f"{name}" in text


@pytest.mark.parametrize("width", [*WIDTHS, 128, 2176, mosaic.MAX_WIDTH])
@pytest.mark.parametrize("threads", [mosaic.FEW_THREADS, mosaic.MANY_THREADS])
def test_a_block_covers_its_row(width, threads):
    p = mosaic._Problem(width, "bfloat16", mosaic.vectors_per_thread(width, threads))
    assert p.threads % 128 == 0 and p.threads <= 1024
    assert p.threads * p.vectors >= p.row_vectors > (p.threads - 128) * p.vectors


def test_rounding_by_addition_and_low_bytes():
    """The formula of the kernel, in numpy, for every half and its neighbours."""
    halves = np.arange(-254, 255, dtype=np.float32) / 2
    x = np.concatenate([np.nextafter(halves, np.float32(s * 200)) for s in (-1, 1)] + [halves])
    x = x[np.abs(x) <= 127]
    low = (x + np.float32(mosaic.ROUND_TO_INTEGER)).view(np.uint32) & 0xFF
    np.testing.assert_array_equal(low.astype(np.uint8).view(np.int8), np.rint(x))


@every_dtype
def test_the_reference_is_the_model_s_arithmetic(dtype, rng):
    x = jnp.asarray(rng.standard_normal((5, 384)), dtype)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (3, 384)), dtype)

    def normed(x, scale):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + EPS)
        return numerics.quantize_activation((y * scale[2].astype(jnp.float32)).astype(x.dtype))

    def product(x):
        return numerics.quantize_activation(jax.nn.silu(x[:, :192]) * x[:, 192:])

    assert_equal(jax.jit(quantize_activation)(x), numerics.quantize_activation(x))
    found = jax.jit(lambda x, w: rms_norm_quantize(x, w, eps=EPS, layer=2))(x, scale)
    assert_equal(found, jax.jit(normed)(x, scale))
    assert_equal(jax.jit(silu_mul_quantize)(x), jax.jit(product)(x))


def test_default_dispatch_follows_the_device(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    x = shape((2, 256))
    for found, kernel in [("8.0", True), ("7.5", False), ("gfx90a", False), ("9.0", True)]:
        device = types.SimpleNamespace(compute_capability=found, platform="gpu")
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda platform, device=device: [device])
        assert ("mosaic_gpu" in lower(lambda x: quantize_activation(x), x)) == kernel
        assert "mosaic_gpu" not in lower(lambda x: quantize_activation(x), shape((2, 192)))
    device = types.SimpleNamespace(platform="cpu")
    monkeypatch.setattr(jax, "devices", lambda platform: [device])
    assert "mosaic_gpu" not in lower(lambda x: quantize_activation(x), x)


def test_refusals():
    with pytest.raises(NotImplementedError, match="2 rows of 192, but the kernel takes 1 or more"):
        quantize_activation(jnp.ones((2, 192)), backend=KERNEL)
    with pytest.raises(NotImplementedError, match="0 rows of 256"):
        quantize_activation(jnp.ones((0, 256)), backend=KERNEL)
    with pytest.raises(NotImplementedError, match="input is int32: the kernel reads"):
        quantize_activation(jnp.ones((2, 256), jnp.int32), backend=KERNEL)
    with pytest.raises(ValueError, match=r"scale has shape \(128,\) but x has k=256: need \[256\]"):
        rms_norm_quantize(jnp.ones((2, 256)), jnp.ones(128), eps=EPS)
    with pytest.raises(ValueError, match="layer=3 but the norm scales have layers 0..2"):
        rms_norm_quantize(jnp.ones((2, 256)), jnp.ones((3, 256)), eps=EPS, layer=3)
    with pytest.raises(ValueError, match="its last axis must be gate and up"):
        silu_mul_quantize(jnp.ones((2, 255)))


@pytest.mark.parametrize("dims", [(), (0,), (3, 0)])
def test_tokens_without_features_are_refused(dims):
    for op in (quantize_activation, silu_mul_quantize):
        for name in (None, KERNEL):
            with pytest.raises(ValueError, match=r"x has shape \(.*\), but a token needs at least"):
                jax.eval_shape(lambda x, op=op, name=name: op(x, backend=name), shape(dims))


def test_norms_before_quantised_projections_are_read_in_place():
    float_layers = {"attn_norm": {"scale": jnp.ones((2, 8))}, "o_proj": {"kernel": jnp.ones(2)}}
    scanned, in_place = split_in_place(float_layers)
    assert scanned == float_layers and in_place["attn_norm"]["scale"] is None
    layers = {**float_layers, "o_proj": {"kernel": quantize_kernel(jnp.ones((2, 128, 8)))}}
    scanned, in_place = split_in_place(layers)
    assert scanned["attn_norm"]["scale"] is None and in_place == layers


def test_a_layer_of_the_model_runs_four_of_them(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(api, "usable", lambda _: backend.BACKENDS)
    config = ModelConfig("llama", 64, 128, 256, 2, 4, 2, 32, 64)
    params = prepare_for_backend(quantize_params(init_params(jax.random.key(0), config)))
    model = CausalLM(config)
    text = lower(lambda p, t: model.apply({"params": p}, t), params, shape((2, 3), "int32"))
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 4


# On a GPU


@pytest.fixture
def gpu():
    if reason := backend.unavailable("mosaic_mma"):
        pytest.skip(reason)


def rows(kind: str, width: int, rng, count: int = 37) -> np.ndarray:
    x = rng.standard_normal((count, width)).astype(np.float32)
    if kind == "scales":
        return x * np.exp2(rng.uniform(-30, 12, (count, 1))).astype(np.float32)
    if kind == "constant":
        return np.broadcast_to(x[:, :1], x.shape).copy()
    if kind == "outlier":
        x[np.arange(count), rng.integers(0, width, count)] *= 1000
    if kind == "tiny":
        return x * np.float32(2.0**-101)
    if kind == "zero":
        x[::2] = 0
        x[1::2, ::2] = -0.0
    return x


KINDS = ["normal", "scales", "constant", "outlier", "tiny", "zero"]
run_kernel = jax.jit(lambda x: quantize_activation(x, backend=KERNEL))
run_reference = jax.jit(lambda x: quantize_activation(x, backend="reference"))
run_norm = jax.jit(lambda x, w, i: rms_norm_quantize(x, w, eps=EPS, layer=i, backend=KERNEL))
run_product = jax.jit(lambda x: silu_mul_quantize(x, backend=KERNEL))


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("width", [128, 3584, 4096, 14336, 28672])
def test_codes_equal_the_reference_bit_for_bit(gpu, width, dtype, rng):
    x = jnp.asarray(np.concatenate([rows(kind, width, rng) for kind in KINDS]), dtype)
    assert_equal(run_kernel(x), run_reference(x))
    assert_equal(
        run_kernel(x), numerics.quantize_activation(jax.device_put(x, jax.devices("cpu")[0]))
    )


@pytest.mark.gpu
def test_divisions_equal_the_reference_for_a_million_scales(gpu, rng):
    """Every exponent at which a row is not the floor, random mantissas, and ties to even."""
    bits = rng.integers(0, 2**31, (2**18, 128), np.int32) & 0x7F7FFFFF
    x = bits.view(np.float32)
    x[:, 1:] = x[:, :1] * rng.uniform(-1, 1, (2**18, 127)).astype(np.float32)
    for part in np.split(x, 4):
        assert_equal(run_kernel(jnp.asarray(part)), run_reference(jnp.asarray(part)))


def quantized(y: np.ndarray, step: np.ndarray) -> np.ndarray:
    return np.rint(y * (np.float32(1) / step)[:, None]).astype(np.int8)


def assert_between(found: Int8Activation, exact: np.ndarray, dtype):
    """Pinned codes of numbers that round to `dtype` as float64 `exact` does, but for what lies
    within 2**-20 of a boundary; the scale must be that of one such row."""
    low, high = (
        (exact * (1 + side)).astype(jnp.dtype(dtype)).astype(np.float32)
        for side in (-(2.0**-20), 2.0**-20)
    )
    absmax = [np.abs(y).max(axis=1) for y in (low, high)]
    floor = np.float32(numerics.MIN_ACTIVATION_ABSMAX)
    steps = [np.maximum(m, floor) / np.float32(127) for m in absmax]
    step, codes = np.asarray(found.scale), np.asarray(found.codes)
    assert np.all((step >= steps[0]) & (step <= steps[1]))
    ends = [quantized(y, step) for y in (low, high)]
    assert np.all((codes >= np.minimum(*ends)) & (codes <= np.maximum(*ends)))
    assert np.mean(ends[0] != ends[1]) < (1e-3 if dtype != "float32" else 1e-2)
    np.testing.assert_array_equal(found.code_sum, codes.sum(axis=1, dtype=np.int32))


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("width", [128, 3584, 4096, 16384])
def test_norm(gpu, width, dtype, rng):
    x = jnp.asarray(np.concatenate([rows(kind, width, rng) for kind in KINDS]), dtype)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (3, width)), dtype)
    exact = np.asarray(x, np.float64)
    exact /= np.sqrt((exact * exact).mean(axis=1, keepdims=True) + np.float32(EPS))
    for layer in (0, 2):
        found = run_norm(x, scale, jnp.int32(layer))
        assert_between(found, exact * np.asarray(scale[layer], np.float64), dtype)
    assert_equal(run_norm(x, scale, jnp.int32(7)), found)  # a layer beyond is the last one


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("width", [128, 3584, 14336, 28672])
def test_product(gpu, width, dtype, rng):
    x = np.concatenate([rows(kind, 2 * width, rng) for kind in KINDS if kind != "tiny"])
    x = jnp.asarray(np.clip(x, -60, 60), dtype)
    gate, up = np.split(np.asarray(x, np.float64), 2, axis=1)
    assert_between(run_product(x), gate / (1 + np.exp(-gate)) * up, dtype)


@pytest.mark.gpu
def test_rows_do_not_depend_on_the_batch_or_the_launch(gpu, rng):
    x = jnp.asarray(rng.standard_normal((300, 4096)), jnp.bfloat16)
    scale = jnp.ones((1, 4096), jnp.bfloat16)
    for run in (run_kernel, run_product, lambda x: run_norm(x, scale, jnp.int32(0))):
        whole = run(x)
        for _ in range(30):
            assert_equal(run(x), whole)
        for row in (0, 299):
            assert_equal(run(x[row : row + 1]), jax.tree.map(lambda a, r=row: a[r : r + 1], whole))


@pytest.mark.gpu
def test_vmap_nan_and_leading_axes(gpu, rng):
    x = jnp.asarray(rng.standard_normal((3, 5, 512)), jnp.bfloat16)
    expected = run_reference(x)
    assert_equal(run_kernel(x), expected)
    assert_equal(jax.jit(jax.vmap(run_kernel))(x), expected)
    scale = run_kernel(x.at[1, 2, 77].set(jnp.nan)).scale
    assert np.isnan(scale[1, 2]) and np.isnan(scale).sum() == 1


@pytest.mark.gpu
def test_reference_norm_and_product_on_this_gpu_agree(gpu, rng):
    """XLA rounds between operations as it likes: a code may be another, the values hardly are."""
    x = jnp.asarray(rng.standard_normal((64, 4096)), jnp.bfloat16)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, 4096), jnp.bfloat16)
    pairs = [
        (
            rms_norm_quantize(x, scale, eps=EPS, backend=KERNEL),
            reference.rms_norm_quantize(x, scale, eps=EPS, layer=None),
        ),
        (silu_mul_quantize(x, backend=KERNEL), reference.silu_mul_quantize(x)),
    ]
    for found, expected in pairs:
        difference = np.abs(np.asarray(found.codes, int) - np.asarray(expected.codes, int))
        assert difference.max() <= 2 and difference.mean() < 0.1
