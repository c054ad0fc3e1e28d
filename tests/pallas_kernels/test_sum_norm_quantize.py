"""The sum over ranks with its norm: exact on meshes of CPU devices, the kernel's own arithmetic by
its threads' twins, and lowered for GPUs; on two or four of them equal to the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from qserve_jax.models.sharding import tensor_mesh
from qserve_jax.pallas_kernels.quantize_activation import (
    mosaic as rows,
)
from qserve_jax.pallas_kernels.quantize_activation import (
    quantize_activation,
    rms_norm,
    rms_norm_quantize,
)
from qserve_jax.pallas_kernels.sum_norm_quantize import (
    MAX_ROWS,
    flag_words,
    mosaic,
    sum_norm_quantize,
)
from tests.pallas_kernels import lanes

EPS, LAYERS = 1e-5, 3
DTYPES = ("bfloat16", "float16", "float32")


def on_mesh(mesh, **options):
    """Each rank's (x, Int8Activation), side by side, of partials side by side."""

    def body(partial, residual, scale, flags, layer):
        found = sum_norm_quantize(
            partial[0], residual, scale, flags, axis="tensor", eps=EPS, layer=layer, **options
        )
        return jax.tree.map(lambda x: x[None], found)

    specs = (P("tensor"), P(), P(), P("tensor"), P())
    return jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("tensor"), check_vma=False)
    )


def operands(rng, ranks, m, d, dtype):
    return (
        jnp.asarray(rng.standard_normal((ranks, m, d)), dtype),
        jnp.asarray(4 * rng.standard_normal((m, d)), dtype),
        jnp.asarray(rng.uniform(0.5, 1.5, (LAYERS, d)), dtype),
        jnp.zeros(ranks * flag_words(), jnp.int32),
        jnp.int32(1),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_reference_is_the_exact_sum_rounded_once(ranks, dtype, rng):
    values = operands(rng, ranks, 5, 192, dtype)
    x, y = on_mesh(tensor_mesh(ranks), backend="reference")(*values)
    partial, residual, scale = (np.asarray(v, np.float64) for v in values[:3])
    exact = partial.sum(0) + residual
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    sums = ranks * 2.0**-24 * (abs(partial).sum(0) + abs(residual))  # of the float32 additions
    for rank in range(ranks):
        error = abs(np.asarray(x[rank], np.float64) - exact)
        assert (error <= half_ulp * abs(exact) * (1 + 2.0**-20) + sums).all()
        np.testing.assert_array_equal(x[rank], x[0])
    expected = jax.jit(lambda x, w: quantize_activation(rms_norm(x, w, EPS)))(x[0], values[2][1])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[ranks - 1], b), y, expected)


def shapes(ranks, m=64, d=8192, dtype="bfloat16"):
    s = jax.ShapeDtypeStruct
    flags = s((ranks * flag_words(),), jnp.int32)
    layer = s((), jnp.int32)
    return s((ranks, m, d), dtype), s((m, d), dtype), s((LAYERS, d), dtype), flags, layer


def lower(mesh, *arguments):
    traced = on_mesh(mesh, backend="mosaic_sm90").trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("ranks", "m", "d", "dtype"), [
    (2, 64, 8192, "bfloat16"), (2, MAX_ROWS, 4096, "float16"), (4, 1, 3584, "float32"),
    (8, 3, 128, "bfloat16"),
])  # fmt: skip
def test_one_kernel_that_xla_gives_the_peers_addresses(ranks, m, d, dtype):
    mesh = AbstractMesh((ranks,), ("tensor",), axis_types=(AxisType.Auto,))
    text = lower(mesh, *shapes(ranks, m, d, dtype))
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1 and "stablehlo.all_" not in text
    assert "uses_xla_collective_metadata = true" in text and "skip_device_barrier = true" in text


def test_ranks_are_the_devices_of_the_mesh():
    """XLA finds out which buffers belong together by these; without any it refuses the kernel."""
    assert 'xla_replica_ids = "0,1,2,3"' in lower(tensor_mesh(4), *shapes(4))
    assert 'xla_replica_ids = "0,1"' in lower(tensor_mesh(2), *shapes(2))
    backwards = Mesh(np.array(jax.devices()[1::-1]), ("tensor",))
    with pytest.raises(NotImplementedError, match="row-major device ids"):
        lower(backwards, *shapes(2))


def test_refusals():
    def run(m, d, ranks, **changes):
        arguments = list(shapes(ranks, m, d))
        for index, shape in changes.items():
            arguments[int(index[1:])] = jax.ShapeDtypeStruct(shape, arguments[2].dtype)
        mesh = AbstractMesh((ranks,), ("tensor",), axis_types=(AxisType.Auto,))
        return lower(mesh, *arguments)

    for m, d, ranks, words in [(513, 128, 2, "rows=513 but the flags are for 512"),
                               (4, 192, 2, "4 rows of 192, but .* multiple of 128"),
                               (4, 128, 9, "9 ranks of 1 process")]:  # fmt: skip
        with pytest.raises(NotImplementedError, match=words):
            run(m, d, ranks)
    with pytest.raises(ValueError, match=r"residual bfloat16\[4, 256\]: make them alike"):
        run(4, 128, 2, _1=(4, 256))
    with pytest.raises(ValueError, match=r"scale has shape \(3, 64\) but x has d=128"):
        run(4, 128, 2, _2=(3, 64))
    with pytest.raises(ValueError, match=r"flags are bfloat16\[16\]: make them int32\[16384\]"):
        run(4, 128, 2, _3=(32,))


class Machine(lanes.Machine):
    """With what ends in int8 needs, and the other ranks' memory: a tuple, one for each."""

    def __init__(self, rank, *args):
        super().__init__(*args)
        self._rank = rank

    def _over_warps(self, value, combine):
        self._whole_warps()
        return combine(value.reshape(-1, 32), axis=1).astype(value.dtype).repeat(32)

    def warp_sum(self, value):
        return lanes.I32(self._over_warps(value.values, np.sum))

    def warp_max(self, value):
        return lanes.I32(self._over_warps(value.values, np.max))

    def warp_sum_float(self, value):
        for step in (16, 8, 4, 2, 1):
            value = value + self.exchange(value, step)
        return value

    def rsqrt(self, x):
        return lanes.F32(np.float32(1) / np.sqrt(x.values))

    def max_magnitudes(self, a, b, dtype):
        return lanes.I32(
            np.maximum(*(x.values.view(np.uint16) & 0x7FFF for x in (a, b))).view(np.uint32)
        )

    def add_bytes(self, word, total):
        return lanes.I32(
            total.values
            + word.values.view(np.int8).reshape(-1, 4).sum(1, dtype=np.int32).view("u4")
        )

    def global_address(self, memory):
        return super().global_address(memory[self._rank] if isinstance(memory, tuple) else memory)

    def own_rank(self, context):
        return self.constant(self._rank)

    def address_on(self, context, memory, rank):
        if len(set(rank.values)) > 1:  # flags, a rank for each thread: nobody is there to see them
            return super().global_address(memory[self._rank])
        return super().global_address(memory[rank.values[0]])

    def load_shared_by_devices(self, address, *, count):
        return self.load_global(address, count=count)

    def load_flag(self, address):
        return self.constant(0)

    def raise_flag(self, address, value):
        pass

    wait_for_flag = raise_flag


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ranks", "d", "vectors"), [(2, 384, 2), (4, 2176, 4), (3, 2048, 8)])
def test_arithmetic_of_the_kernel(ranks, d, vectors, dtype, rng, monkeypatch):
    """x is the reference's bit for bit; codes are those of numbers that are its norm's but for the
    order in which squares are added."""
    m, layer = 3, 1
    values = operands(rng, ranks, m, d, dtype)[:3]
    partial, residual, scale = (np.asarray(v) for v in values)
    p = rows._Problem(d, dtype, vectors)
    for rank in range(ranks):
        monkeypatch.setattr(mosaic, "F32", lanes.F32)
        for name in ("F32", "I32"):
            monkeypatch.setattr(rows, name, getattr(lanes, name))
        monkeypatch.setattr(mosaic, "I32", lanes.I32)
        flags = tuple(lanes.Memory(np.zeros(flag_words(), np.int32)) for _ in range(ranks))
        inputs = [tuple(map(lanes.Memory, partial)), lanes.Memory(residual), flags,
                  lanes.Memory(scale), lanes.Memory(np.array([layer], np.int32))]  # fmt: skip
        outputs = [lanes.Memory(np.zeros(shape, kind), filled=False)
                   for shape, kind in (((m, d), partial.dtype), ((m, d), np.int8),
                                       (m, np.float32), (m, np.int32))]  # fmt: skip
        for row in range(m):
            ptx = Machine(rank, [row], p.threads, 3 * 4 * 32).namespace()
            for module in (mosaic, rows):
                monkeypatch.setattr(module, "ptx", ptx)
            norm = rows._Norm(EPS, dtype, LAYERS)
            mosaic._body(p, norm, ranks, None, *inputs, *outputs, None, None)
        x, codes, step, total = (memory.array() for memory in outputs)
        expected = partial[0].astype(np.float32)
        for part in partial[1:]:
            expected = expected + part.astype(np.float32)
        expected = (expected + residual.astype(np.float32)).astype(partial.dtype)
        np.testing.assert_array_equal(x.view(np.uint8), expected.view(np.uint8))
        assert flags[rank].array().reshape(-1, 32)[:m, 0].tolist() == [1] * m
        y = rms_norm_quantize(jnp.asarray(expected), values[2], eps=EPS, layer=layer)
        np.testing.assert_allclose(step, y.scale, rtol=2 * float(jnp.finfo(dtype).eps))
        assert abs(codes - np.asarray(y.codes, int)).max() <= 1
        assert (codes != y.codes).mean() < 0.02
        np.testing.assert_array_equal(total, codes.sum(1, dtype=np.int32))


# On two GPUs, and on four


@pytest.fixture(params=[2, 4])
def gpus(request):
    if len(jax.devices()) < request.param:
        pytest.skip(f"needs {request.param} GPUs of one process")
    return tensor_mesh(request.param)


def placed(mesh, values):
    specs = (P("tensor"), P(), P(), P("tensor"), P())
    return [
        jax.device_put(v, jax.NamedSharding(mesh, s)) for v, s in zip(values, specs, strict=True)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "d"), [(1, 128), (64, 8192), (37, 3584), (MAX_ROWS, 4096)])
def test_the_kernel_equals_the_reference(gpus, m, d, dtype, rng):
    values = jax.block_until_ready(placed(gpus, operands(rng, gpus.size, m, d, dtype)))
    kernel = on_mesh(gpus, backend="mosaic_sm90")
    first, y = kernel(*values)
    expected = on_mesh(gpus, backend="reference")(*values)[0]
    np.testing.assert_array_equal(np.asarray(first), np.asarray(expected))
    x = jnp.asarray(np.asarray(first)[0])
    norm = jax.jit(functools.partial(rms_norm_quantize, eps=EPS, layer=1, backend="mosaic_sm90"))
    alone = norm(x, np.asarray(values[2]))
    for rank in range(gpus.size):
        jax.tree.map(lambda a, b, r=rank: np.testing.assert_array_equal(a[r], b), y, alone)
    for _ in range(50):
        np.testing.assert_array_equal(np.asarray(kernel(*values)[0]), np.asarray(first))


@pytest.mark.gpu
def test_partials_that_change_in_a_loop(gpus, rng):
    """What is summed lies where the last one lay: nothing is read too early or overwritten."""
    values = jax.block_until_ready(placed(gpus, operands(rng, gpus.size, 64, 4096, "bfloat16")))

    def body(backend, partial, residual, scale, flags, layer):
        def step(x, i):
            mine = partial[0] * jnp.sin(i.astype(jnp.float32) + jax.lax.axis_index("tensor"))
            options = {"axis": "tensor", "eps": EPS, "layer": layer, "backend": backend}
            x, y = sum_norm_quantize(mine.astype(x.dtype), x, scale, flags, **options)
            return x, y.code_sum

        x, sums = jax.lax.scan(step, residual, jnp.arange(300))
        return x[None], sums[None]

    def run(backend):
        specs = (P("tensor"), P(), P(), P("tensor"), P())
        f = jax.shard_map(functools.partial(body, backend), mesh=gpus, in_specs=specs,
                          out_specs=P("tensor"), check_vma=False)  # fmt: skip
        return jax.device_get(jax.jit(f)(*values))

    (x, sums), (expected, _) = run("mosaic_sm90"), run("reference")
    np.testing.assert_array_equal(x, expected)
    for other in sums[1:]:
        np.testing.assert_array_equal(sums[0], other)
    np.testing.assert_array_equal(run("mosaic_sm90")[1], sums)
