"""The plan of tensor parallelism, and the model under it on meshes of CPU devices."""

import collections
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from qserve_jax.benchmarks.model_shapes import MODEL_CONFIGS
from qserve_jax.models import CausalLM, param_shapes
from qserve_jax.models.collectives import _new_flags, prepare_model, why_all_reduce
from qserve_jax.models.layers import linear
from qserve_jax.models.llama import decode_step, prefill
from qserve_jax.models.sharding import (
    P,
    Part,
    check_ranks,
    checked_mesh,
    checkpoint_part,
    divides,
    even_config,
    param_specs,
    rank_config,
    shardings,
    tensor_mesh,
)
from qserve_jax.pallas_kernels.prepare import FUSED
from qserve_jax.pallas_kernels.quantize_activation import quantize_activation
from qserve_jax.pallas_kernels.w4a8_matmul import from_kernel_layout
from qserve_jax.quantization import QuantConfig, quantize_params
from qserve_jax.quantization.qtensor import nbytes
from qserve_jax.runtime import init_cache

G128 = QuantConfig()
STABLEHLO = ("all_reduce", "all_gather", "all_to_all", "collective_permute")
COLLECTIVES = ("all-reduce(", "all-gather(", "all-to-all(", "collective-permute(")


def onto(mesh, params):
    return jax.device_put(params, shardings(param_specs(params, mesh.axis_names[0]), mesh))


def on_mesh(config, params, ranks, act_bits=8):
    """A model of sizes that divide as they are, and its params over a mesh."""
    mesh = tensor_mesh(ranks)
    return CausalLM(config, act_bits=act_bits, mesh=mesh), onto(mesh, params)


@pytest.fixture(scope="module")
def wide(tiny):
    """Two groups of 128 inputs for o and four for down."""
    return tiny(
        hidden_size=128,
        intermediate_size=512,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=True,
    )


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(0, 64, (3, 12)))


@pytest.mark.parametrize("precision", ["float", "w4a8"])
def test_sums_that_are_owed_until_the_next_norm(wide, random_params, tokens, precision):
    """With the flags of the kernel, here its reference: the logits of all-reduces, without one;
    but for more tokens than the kernel takes."""
    config = dataclasses.replace(wide, o_bias=False, mlp_bias=False)
    params = random_params(config)
    params = quantize_params(params, G128) if precision == "w4a8" else params
    model, sharded = on_mesh(config, params, 2)
    flags = _new_flags(model.mesh)
    owing = {**sharded, "layers": {**sharded["layers"], "exchange": flags}}
    run = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))
    expected: Any = run(sharded, tokens)
    compiled = run.lower(owing, tokens).compile()
    assert "all-reduce(" not in (compiled.as_text() or "")
    # Codes flip where sums that are rounded less often are another number.
    tolerance = 4e-6 if precision == "float" else 2e-2
    atol = tolerance * float(abs(expected).max())
    np.testing.assert_allclose(compiled(owing, tokens), expected, rtol=0, atol=atol)
    many = jnp.tile(tokens, (50, 1))  # 600 tokens
    assert run.lower(owing, many).as_text().count('"stablehlo.all_reduce"') == 3
    np.testing.assert_array_equal(flags["flags"], 0)


def test_why_sums_are_all_reduces(wide, monkeypatch):
    plain = dataclasses.replace(wide, o_bias=False, mlp_bias=False)
    mesh = tensor_mesh(2)
    on_gpus = CausalLM(plain, backend="mosaic_sm90", mesh=mesh)
    assert why_all_reduce(on_gpus) is None
    backwards = Mesh(np.array(jax.devices()[1::-1]), ("tensor",))
    narrow = dataclasses.replace(plain, hidden_size=64)
    for model, words in [
        (on_gpus.clone(backend="reference"), "the backend is the reference"),
        (on_gpus.clone(mesh=None), "the kernel is for 2 to 8 GPUs"),
        (on_gpus.clone(mesh=backwards), "needs the devices 0 to 1, in order"),
        (on_gpus.clone(config=wide), "o or down has a bias"),
        (on_gpus.clone(config=narrow), "64 features are no multiple of 128"),
    ]:
        assert words in str(why_all_reduce(model))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "2 processes" in str(why_all_reduce(on_gpus))
    monkeypatch.setenv("QSERVE_JAX_SUMS", "nccl")
    assert why_all_reduce(on_gpus) == "QSERVE_JAX_SUMS=nccl"
    monkeypatch.setenv("QSERVE_JAX_SUMS", "ring")
    with pytest.raises(ValueError, match="QSERVE_JAX_SUMS='ring' is unknown: use auto or nccl"):
        why_all_reduce(on_gpus)


@pytest.mark.parametrize(("changes", "ranks"), [
    ({}, 2), ({"num_kv_heads": 4}, 4), ({"tie_embeddings": True}, 2), ({"centered_keys": True}, 2),
])  # fmt: skip
def test_float_logits_are_those_of_one_device(wide, random_params, tokens, changes, ranks):
    config = dataclasses.replace(wide, **changes)
    params = random_params(config)
    expected: Any = CausalLM(config).apply({"params": params}, tokens)
    model, sharded = on_mesh(config, params, ranks)
    logits: Any = model.apply({"params": sharded}, tokens)
    assert logits.shape == expected.shape and logits.is_fully_replicated
    # Only sums over o's and down's inputs and the order of what is added to them differ.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=4e-6 * float(abs(expected).max()))


def test_prefill_and_decode_over_pages_cut_by_kv_heads(wide, random_params, tokens):
    params = random_params(wide)
    table = jnp.arange(12).reshape(3, 4)
    found = []
    for model, tree in ((CausalLM(wide), params), on_mesh(wide, params, 2)):
        mesh = model.mesh
        cache = init_cache(wide, num_pages=12, page_size=4, kv_bits=4, mesh=mesh)
        cache, first = jax.jit(functools.partial(prefill, model))(
            tree, cache, tokens, table, jnp.array([12, 7, 0])
        )
        cache, second = jax.jit(functools.partial(decode_step, model))(
            tree, cache, tokens[:, 0], table, jnp.array([13, 8, 0])
        )
        found.append((first[:2], second[:2], cache.pages))
    assert {s.data.shape[2] for s in found[1][2].addressable_shards} == {1}
    for one, two in zip(*(x[:2] for x in found), strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-5 * float(abs(one).max()))
    np.testing.assert_array_equal(found[0][2][0], found[1][2][0])  # codes of the first layer


@pytest.mark.parametrize(("config", "act_bits"), [
    (G128, 8), (QuantConfig(group_size=-1), 8), (QuantConfig(weight_bits=8), 8), (G128, 16),
], ids=["g128", "per channel", "w8a8", "w4a16"])  # fmt: skip
def test_quantised_inputs_of_o_and_down_have_a_scale_per_rank(config, act_bits, rng):
    """A rank quantises its own part of a token, by its own largest value: the product is the sum
    of what the parts give on their own, and no further from that of the float token."""
    k, n = 256, 64
    kernel = {"o_proj": {"kernel": rng.standard_normal((1, k, n), np.float32)}}
    params = quantize_params(kernel, dataclasses.replace(config, act_bits=act_bits))
    x = jnp.asarray(rng.standard_normal((5, k), np.float32)).at[:, : k // 2].multiply(8)
    bias, residual = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((n,), (5, n)))
    mesh = tensor_mesh(2)
    assert mesh is not None

    def run(x, params, bias, residual, axis=None, bits=act_bits):
        x = quantize_activation(x) if bits == 8 else x
        p = {"kernel": params["o_proj"]["kernel"], "bias": bias}
        return linear(x, p, layer=0, dtype=jnp.float32, residual=residual, axis=axis)

    sharded = onto(mesh, params)
    found = jax.shard_map(
        functools.partial(run, axis="tensor"),
        mesh=mesh,
        in_specs=(P(None, "tensor"), param_specs(params, "tensor"), P(), P()),
        out_specs=P(),
        check_vma=False,
    )(x, sharded, bias, residual)
    halves = []
    for rank, device in enumerate(jax.devices()[:2]):
        own = jax.tree.map(lambda w, rank=rank: w.addressable_shards[rank].data, sharded)
        part = jax.device_put(x[:, rank * k // 2 : (rank + 1) * k // 2], device)
        halves.append(np.asarray(run(part, own, None, None)))
    expected = halves[0] + halves[1] + np.asarray(bias) + np.asarray(residual)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * abs(expected).max())
    exact = run(x, params, bias, residual, bits=16)
    one = run(x, params, bias, residual)
    errors = [float(jnp.square(y - np.asarray(exact)).mean()) for y in (np.asarray(found), one)]
    assert errors[0] < errors[1] or act_bits == 16


def test_what_does_not_divide_is_padded_and_repeated(tiny):
    config = even_config(tiny(intermediate_size=3 * 128, vocab_size=63), 4)
    assert (config.intermediate_size, config.num_kv_heads, config.vocab_size) == (512, 4, 64)
    own = rank_config(config, 4)
    assert (own.num_heads, own.num_kv_heads, own.intermediate_size) == (1, 1, 128)
    # F without groups stays so, or its kernels would be quantised another way.
    assert even_config(tiny(intermediate_size=124), 4).intermediate_size == 136


@pytest.mark.parametrize(("model", "ranks", "groups"), [
    ("qwen2.5-72b", 2, 116), ("qwen2.5-72b", 4, 58), ("llama2-7b", 4, 22), ("llama2-7b", 2, 43),
    ("llama3-70b", 4, 56),
])  # fmt: skip
def test_ffn_of_published_models_is_whole_groups_per_rank(model, ranks, groups):
    config = MODEL_CONFIGS[model]
    check_ranks(config, ranks, 128)
    assert rank_config(even_config(config, ranks), ranks).intermediate_size == groups * 128


def test_the_parts_of_all_ranks_are_the_whole_tensor(tiny):
    config = tiny(intermediate_size=3 * 128, vocab_size=63)
    owners = {"embed/embedding": (63, 64), "layers/down_proj/kernel": (64, 384),
              "layers/up_proj/kernel": (384, 64), "layers/q_proj/bias": (64,),
              "layers/o_proj/kernel": (64, 64)}  # fmt: skip
    for path, shape in owners.items():
        parts = [checkpoint_part(config, path, shape, rank, 4) for rank in range(4)]
        axis = 1 if path.split("/")[1] in ("o_proj", "down_proj") else 0
        assert {part.axis for part in parts if part} == {axis}
        covered = [i for part in parts if part for i in range(part.start, part.stop)]
        assert covered == [*range(shape[axis])]
    heads = [checkpoint_part(config, "layers/k_proj/kernel", (32, 64), r, 4) for r in range(4)]
    assert heads == [Part(0, 0, 16), Part(0, 0, 16), Part(0, 16, 32), Part(0, 16, 32)]
    assert checkpoint_part(config, "layers/q_norm/scale", (16,), 1, 4) is None
    assert checkpoint_part(config, "layers/o_proj/bias", (64,), 1, 4) is None


@pytest.mark.parametrize(("sizes", "ranks", "group_size", "words"), [
    ({"num_heads": 14, "num_kv_heads": 2, "head_dim": 64}, 4, -1, ["14 query", "use 1 or 2 or 14"]),
    ({"num_heads": 14, "num_kv_heads": 2, "head_dim": 64}, 2, 128, ["groups of 128", "use 1"]),
    ({"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}, 4, 128, ["use 1 or 2, or quantise with"]),
    ({"num_heads": 6, "num_kv_heads": 3, "head_dim": 16}, 2, -1, ["use 1 or 3 or 6"]),
])  # fmt: skip
def test_heads_that_do_not_divide_are_refused(tiny, sizes, ranks, group_size, words):
    with pytest.raises(ValueError) as error:
        check_ranks(tiny(**sizes), ranks, group_size)
    message = str(error.value)
    assert message.startswith(f"tensor_parallel_size={ranks} ") and "\n" not in message
    assert [word for word in words if word not in message] == []
    assert message.endswith("group_size=-1") == divides(tiny(**sizes), ranks)


def test_meshes():
    assert tensor_mesh(1) is None and checked_mesh(None) is None
    with pytest.raises(ValueError, match="=64 but JAX sees 4 cpu .* at most 4"):
        tensor_mesh(64)
    devices = np.array(jax.devices())
    named = checked_mesh(Mesh(devices[:2], ("model",), (AxisType.Explicit,)))
    assert named is not None and named.axis_names == ("model",)
    assert named.axis_types == (AxisType.Auto,)
    with pytest.raises(ValueError, match="single axis"):
        checked_mesh(Mesh(devices.reshape(2, 2), ("a", "b")))


@pytest.mark.parametrize("group_size", [128, pytest.param(-1, marks=pytest.mark.slow)])
def test_each_rank_fuses_and_packs_its_own_parts(wide, random_params, group_size):
    """What a rank holds in the kernels' layout is, unpacked, its q, k, v and gate, up."""
    params = quantize_params(random_params(wide), QuantConfig(group_size=group_size))
    mesh = tensor_mesh(2)
    assert mesh is not None
    model = CausalLM(wide, backend="mosaic_mma", mesh=mesh)
    prepared = prepare_model(model, onto(mesh, params))["layers"]
    assert prepared["down_proj"]["kernel"].layout == "mma_w4"
    n = {"q_proj": 256, "k_proj": 128, "v_proj": 128, "gate_proj": 512, "up_proj": 512}
    for rank in range(2):
        local = jax.tree.map(lambda x, rank=rank: x.addressable_shards[rank].data, prepared)
        for name, parts in FUSED.items():
            got = from_kernel_layout(local[name]["kernel"])
            rows = [slice(rank * n[p] // 2, (rank + 1) * n[p] // 2) for p in parts]
            for field in ("codes", "channel_scale"):
                whole = [getattr(params["layers"][p]["kernel"], field) for p in parts]
                wanted = np.concatenate([w[:, r] for w, r in zip(whole, rows, strict=True)], axis=1)
                np.testing.assert_array_equal(getattr(got, field), wanted)
            bias = [params["layers"][p]["bias"][:, r] for p, r in zip(parts, rows, strict=True)]
            np.testing.assert_array_equal(local[name]["bias"], np.concatenate(bias, axis=1))
        got = from_kernel_layout(local["down_proj"]["kernel"])
        codes = params["layers"]["down_proj"]["kernel"].codes
        np.testing.assert_array_equal(got.codes, codes[..., rank * 128 : (rank + 1) * 128])


def test_a_step_sums_twice_a_layer_and_gathers_the_logits_once(wide, random_params):
    params = quantize_params(random_params(wide), G128)
    model, sharded = on_mesh(wide, params, 2)
    cache = init_cache(wide, num_pages=4, page_size=16, mesh=model.mesh)
    arrays = jnp.zeros(4, int), jnp.arange(4)[:, None], jnp.ones(4, int)
    step = jax.jit(functools.partial(decode_step, model), donate_argnums=1)
    hlo = step.lower(sharded, cache, *arrays).compile().as_text() or ""
    # The layers are one loop: o and down in its body, the embedding before it, the logits behind.
    assert [hlo.count(name) for name in COLLECTIVES] == [3, 1, 0, 0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_quantising_sharded_params_moves_no_weight(wide, ranks):
    """All that devices tell each other are the maxima of o's and down's channels."""
    mesh = tensor_mesh(ranks)
    assert mesh is not None
    config = dataclasses.replace(wide, num_heads=2 * ranks, num_kv_heads=ranks)  # uncut groups
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        param_shapes(config),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    places = shardings(param_specs(shapes, "tensor"), mesh)
    sharded = jax.tree.map(lambda x, s: x.update(sharding=s), shapes, places)
    lowered = jax.jit(quantize_params).lower(sharded)
    hlo = lowered.compile().as_text() or ""
    assert [hlo.count(name) for name in COLLECTIVES[1:]] == [0, 0, 0]
    moved = [line.split(" = ")[1] for line in hlo.splitlines() if " all-reduce(" in line]
    assert moved and all("f32[2,128]" in line for line in moved)
    wanted = param_specs(jax.eval_shape(quantize_params, shapes), "tensor")
    found = lowered.compile().output_shardings
    same = jax.tree.map(
        lambda s, x, place: place.is_equivalent_to(jax.NamedSharding(mesh, s), x.ndim),
        wanted,
        jax.eval_shape(quantize_params, shapes),
        found,
        is_leaf=lambda x: isinstance(x, P),
    )
    assert all(jax.tree.leaves(same))
    assert nbytes(shapes) > 1e6


@pytest.mark.parametrize("sums", ["nccl", "auto"])
def test_a_step_of_kernels_lowered_for_gpus(tiny, sums, monkeypatch):
    """A round of eight layers sums twice in each; nothing but the logits is gathered. Sums are
    all-reduces, or kernels that normalise and quantise too."""
    monkeypatch.setenv("QSERVE_JAX_SUMS", sums)
    config = tiny(num_layers=8, hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=64)
    config = dataclasses.replace(config, intermediate_size=512)
    mesh = tensor_mesh(2)
    assert mesh is not None
    model = CausalLM(config, backend="mosaic_sm90", mesh=mesh)
    floats = jax.tree.map(
        lambda shape: jnp.zeros(shape, jnp.bfloat16),
        param_shapes(config),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    params = prepare_model(model, onto(mesh, quantize_params(floats, G128)))
    cache = init_cache(config, num_pages=4, page_size=64, mesh=mesh)
    arrays = jnp.zeros(4, int), jnp.arange(4)[:, None], jnp.ones(4, int)
    step = jax.jit(functools.partial(decode_step, model), donate_argnums=1)
    text = step.trace(params, cache, *arrays).lower(lowering_platforms=("cuda",)).as_text()
    collectives = [text.count(f'"stablehlo.{name}"') for name in STABLEHLO]
    (entry,) = (line for line in text.splitlines() if "sdy.manual_computation" in line)
    assert "x0x" not in entry  # XLA of jaxlib 0.11.2 crashes on empty arrays that enter in a loop
    assert collectives == [1 + 2 * 8 if sums == "nccl" else 0, 1, 0, 0]
    counts = {"nccl": {"rms_norm_quantize": 16}, "auto": {"sum_norm_quantize": 16 + 1}}
    found = re.findall(r"@mosaic_gpu_v2.*?((?:rms|sum)_norm_quantize)_mosaic_gpu", text)
    assert collections.Counter(found) == counts[sums]
    moved = [line for line in text.splitlines() if '"stablehlo.all_gather"' in line]
    assert "tensor<4x32xf32>) -> tensor<4x64xf32>" in moved[0] and "custom_call @mosaic_gpu" in text
