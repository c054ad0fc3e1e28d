"""GPTQ and AWQ: what our containers hold exactly comes in, the rest is refused with the cure."""

import numpy as np
import pytest

from qserve_jax.checkpoint import CheckpointError, load_model
from qserve_jax.checkpoint.int4_format import common_divisor
from qserve_jax.quantization import dequantize_params

INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)


def words(values, order=(0, 1, 2, 3, 4, 5, 6, 7)):
    """int32[..., W / 8] of values 0..15 [..., W], one nibble at a time."""
    packed = np.zeros((*values.shape[:-1], values.shape[-1] // 8), np.int64)
    for i, channel in enumerate(order):
        packed |= values[..., channel::8].astype(np.int64) << (4 * i)
    return packed.astype(np.uint32).view(np.int32)


def gptq(codes, zeros, scales, group_size, v2=False):
    """The tensors of one linear: codes [N, K], zeros and scales [N, G]."""
    k = codes.shape[1]
    size = k if group_size == -1 else group_size
    return {
        "qweight": np.ascontiguousarray(words(codes).T),
        "qzeros": words(zeros.T - (0 if v2 else 1)),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": (np.arange(k) // size).astype(np.int32),
    }


def awq(codes, zeros, scales, group_size):
    return {
        "qweight": words(np.ascontiguousarray(codes.T), INTERLEAVED),
        "qzeros": words(np.ascontiguousarray(zeros.T), INTERLEAVED),
        "scales": np.ascontiguousarray(scales.T),
    }


class Model:
    """A checkpoint with random codes; `weights` are what it means, float32 [N, K] by module."""

    def __init__(self, checkpoint, rng, pack, config, multiples=None, zeros=(1, 16)):
        self.checkpoint, self.weights = checkpoint, {}
        checkpoint.config["quantization_config"] = config
        group_size = config["group_size"]
        for name in [n for n in checkpoint.tensors if n.endswith("_proj.weight")]:
            module = name.removesuffix(".weight")
            n, k = checkpoint.tensors.pop(name).shape
            groups = 1 if group_size == -1 else k // group_size
            codes = rng.integers(0, 16, (n, k), np.uint8)
            z = rng.integers(*zeros, (n, groups))
            scales = rng.uniform(1e-3, 2e-3, (n, groups if multiples is None else 1))
            if multiples is not None:
                # 7 bits of a float16, so that its multiples are float16 too
                scales = np.round(scales * 2**16) / 2**16 * rng.choice(multiples, (n, groups))
            scales = scales.astype(np.float16)
            for field, tensor in pack(codes, z, scales, group_size).items():
                checkpoint.tensors[f"{module}.{field}"] = tensor
            grouped = codes.reshape(n, groups, -1) - z[..., None].astype(np.float32)
            self.weights[module] = (grouped * scales[..., None].astype(np.float32)).reshape(n, k)

    def check(self):
        loaded = load_model(self.checkpoint.write(), dtype="float32")
        floats = dequantize_params(loaded.params)["layers"]
        for module, expected in self.weights.items():
            _, _, layer, _, name = module.split(".")
            np.testing.assert_array_equal(floats[name]["kernel"][int(layer)].T, expected)
        return loaded


def gptq_config(group_size, **more):
    return {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False, **more}


def awq_config(group_size):
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm"}


def test_one_group_per_channel_is_exact(checkpoint, rng):
    loaded = Model(checkpoint, rng, gptq, gptq_config(-1)).check()
    assert loaded.format == "gptq" and loaded.quant_config.group_size == -1


def test_gptq_v2_stores_the_zero_itself(checkpoint, rng):
    def pack(*args):
        return gptq(*args, v2=True)

    config = gptq_config(-1, checkpoint_format="gptq_v2")
    Model(checkpoint, rng, pack, config, zeros=(0, 16)).check()


def test_awq_with_one_group_per_channel_is_exact(checkpoint, rng):
    assert Model(checkpoint, rng, awq, awq_config(-1), zeros=(0, 16)).check().format == "awq"


@pytest.mark.parametrize(("pack", "config"), [(gptq, gptq_config(128)), (awq, awq_config(128))])
def test_groups_whose_scales_are_small_multiples_are_exact(checkpoint, rng, pack, config):
    """Symmetric, so that 15 * (code - 8) is an int8 too."""
    model = Model(checkpoint, rng, pack, config, multiples=(3, 5, 7, 15), zeros=(8, 9))
    assert model.check().quant_config.group_size == 128


@pytest.mark.parametrize(("pack", "config"), [(gptq, gptq_config(128)), (awq, awq_config(128))])
def test_groups_as_they_are_published_are_refused(checkpoint, rng, pack, config):
    """Their float16 scales are of any ratio. Where K is one group, there is nothing to divide."""
    model = Model(checkpoint, rng, pack, config)
    with pytest.raises(CheckpointError, match="down_proj.* no small integer multiples.*quantise"):
        load_model(model.checkpoint.write())


def test_act_order_is_refused_by_name(checkpoint, rng):
    model = Model(checkpoint, rng, gptq, gptq_config(128), multiples=(3, 5))
    name = "model.layers.1.mlp.down_proj.g_idx"
    model.checkpoint.tensors[name] = np.roll(model.checkpoint.tensors[name], 1)
    with pytest.raises(CheckpointError, match=f"{name} orders the inputs by activation"):
        load_model(model.checkpoint.write())


def test_a_doubtful_zero_point_is_refused_by_name(checkpoint, rng):
    model = Model(checkpoint, rng, gptq, gptq_config(-1))
    model.checkpoint.tensors["model.layers.1.mlp.up_proj.qzeros"][0, 2] = -1
    with pytest.raises(CheckpointError, match="layers.1.mlp.up_proj .* stored zero point is 15"):
        load_model(model.checkpoint.write())


@pytest.mark.parametrize(
    "change",
    [{"bits": 8}, {"group_size": 64}, {"quant_method": "awq", "version": "gemv"}]
    + [{"checkpoint_format": "marlin"}, {"bits": None}],
)
def test_other_variants_are_refused(checkpoint, change):
    checkpoint.config["quantization_config"] = gptq_config(128) | change
    with pytest.raises(CheckpointError, match="quantise the float checkpoint") as error:
        load_model(checkpoint.write())
    assert "\n" not in str(error.value)


def test_common_divisor():
    scales = np.array([[0.75, 1.5, 2**-14], [1.25, 1.5, 2**-24], [0.5, 3.0, 2**-20]], np.float32)
    np.testing.assert_array_equal(common_divisor(scales), np.array([0.25, 1.5, 2**-24], np.float32))
    assert np.isnan(common_divisor(np.array([[0.1], [0.2]], np.float32))).all()
    assert np.isnan(common_divisor(np.array([[0.0], [0.5]], np.float32))).all()
