"""Layer by layer gives what the library gives on the whole tree, and true errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qserve_jax.checkpoint import load_model
from qserve_jax.layerwise import open_source, quantize_checkpoint, run, sample_windows
from qserve_jax.layerwise.layer import quantize_layer
from qserve_jax.models import CausalLM
from qserve_jax.models.calibration import Calibrator
from qserve_jax.models.layer_calibration import LayerCalibrator
from qserve_jax.quantization import dequantize_kernel
from qserve_jax.quantization.recipes import Recipe, find_recipe, quantize_with_recipe


def test_is_the_recipe_on_the_whole_tree(tiny, quantized):
    folder, report = quantized
    loaded = load_model(folder, dtype="float32")
    assert (loaded.format, loaded.quant_config.precision) == ("native", "w4a8kv4")
    assert not loaded.config.tie_embeddings  # a rotated head is its own
    calibrator = Calibrator(CausalLM(tiny.config), [jnp.asarray(tiny.tokens)])
    want = quantize_with_recipe(tiny.config, tiny.params, calibrator, "qoq-g128")
    leaves = jax.tree_util.tree_flatten_with_path(loaded.params)[0]
    assert jax.tree.structure(loaded.params) == jax.tree.structure(want)
    for (path, got), expected in zip(leaves, jax.tree.leaves(want), strict=True):
        got, expected = np.asarray(got), np.asarray(expected)
        if np.issubdtype(got.dtype, np.floating):
            largest = np.abs(expected).max()
            np.testing.assert_allclose(got, expected, atol=1e-5 * largest, err_msg=str(path))
        else:  # rounding of the Hessians moves a code here and there
            assert (got != expected).mean() < 0.005, path
    assert [part.get("layer") for part in report["parts"]] == [None, 0, 1, 2]


def test_round_to_nearest_is_that_of_load_model(tiny, tmp_path):
    recipe = find_recipe("rtn")
    report = quantize_checkpoint(tmp_path / "out", open_source(tiny.folder), recipe, None)
    got, want = (load_model(m, dtype="float32") for m in (tmp_path / "out", tiny.folder))
    for a, b in zip(*map(jax.tree.leaves, (got.params, want.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert got.config == want.config and "output_error" not in report["parts"][1]
    kernel = got.params["layers"]["up_proj"]["kernel"]
    exact = np.asarray(tiny.params["layers"]["up_proj"]["kernel"][2], np.float64)
    delta = np.asarray(dequantize_kernel(kernel))[2] - exact
    told = report["parts"][3]["projections"]["up_proj"]["weight_error"]
    assert told == pytest.approx((delta**2).sum() / (exact**2).sum(), rel=1e-4)


def test_output_errors_are_true(tiny, tmp_path):
    """Of the first layer's q_proj, whose input is known; and of the layer, by the model itself."""
    recipe, source = Recipe(gptq=True), open_source(tiny.folder)
    report = quantize_checkpoint(tmp_path / "out", source, recipe, tiny.tokens)
    params = load_model(tmp_path / "out", dtype="float32").params
    x = np.asarray(tiny.params["embed"]["embedding"], np.float64)[tiny.tokens].reshape(-1, 128)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + tiny.config.rms_norm_eps)
    x = x * np.asarray(tiny.params["layers"]["attn_norm"]["scale"][0])
    exact = np.asarray(tiny.params["layers"]["q_proj"]["kernel"][0])
    delta = np.asarray(dequantize_kernel(params["layers"]["q_proj"]["kernel"]))[0] - exact
    want = ((x @ delta) ** 2).sum() / ((x @ exact) ** 2).sum()
    errors = report["parts"][1]
    assert errors["projections"]["q_proj"]["output_error"] == pytest.approx(want, rel=1e-3)
    assert want < errors["projections"]["q_proj"]["weight_error"]  # what GPTQ is for
    assert 1e-4 < errors["output_error"] < 0.1


def test_a_layer_that_adds_nothing_has_no_error(tiny):
    layer = {"layers": jax.tree.map(lambda w: jnp.zeros_like(w[:1]), tiny.params["layers"])}
    hidden = [jnp.ones((2, 8, 128), jnp.float32)]
    calibrator = LayerCalibrator(tiny.config, hidden)
    _, report = quantize_layer(tiny.config, layer, calibrator, Recipe(gptq=True))
    assert report["output_error"] == 0


def test_activations_that_are_not_finite_are_named_by_layer(tiny, tmp_path):
    from qserve_jax.checkpoint.export import export_hf

    params = jax.tree.map(lambda w: w, tiny.params)
    kernel = params["layers"]["up_proj"]["kernel"]
    params["layers"]["up_proj"]["kernel"] = kernel.at[1].set(3e38)
    export_hf(tmp_path / "broken", params, tiny.config, dtype="float32")
    source = open_source(tmp_path / "broken")
    with pytest.raises(ValueError, match="input 'layers/down_proj' of layer 1 is not finite"):
        quantize_checkpoint(tmp_path / "out", source, Recipe(reorder=True), tiny.tokens)
    with pytest.raises(ValueError, match="was not written to its end"):
        load_model(tmp_path / "out")


def test_tokens_of_another_model(tiny, tmp_path):
    source, recipe = open_source(tiny.folder), find_recipe("qoq-g128")
    for tokens, message in (
        (tiny.tokens - 1, "calibration token -1 is not in the model's vocabulary of 64"),
        (tiny.tokens[0], r"calibration tokens are int32\[64\], not i32\[samples, T\]"),
        (tiny.tokens / 2, r"calibration tokens are float64\[8, 64\], not i32\[samples, T\]"),
        (tiny.tokens + 1, "calibration token 64 is not in the model's vocabulary of 64"),
        (None, "the recipe needs calibration tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_checkpoint(tmp_path / "out", source, recipe, tokens)
    assert not list(tmp_path.iterdir())


def test_quantised_checkpoints_are_refused(quantized):
    with pytest.raises(ValueError, match="is quantised already \\(native\\): name the float"):
        open_source(quantized[0])


def test_kernels_that_fall_to_another_scheme_are_named_once(tiny, tmp_path, monkeypatch):
    import dataclasses

    from qserve_jax.checkpoint.export import export_hf
    from qserve_jax.models import init_params

    config = dataclasses.replace(tiny.config, intermediate_size=168)
    export_hf(tmp_path / "m", init_params(jax.random.key(0), config), config, dtype="float32")
    with pytest.warns(UserWarning, match="K=168 is not a multiple of group_size=128") as caught:
        quantize_checkpoint(tmp_path / "out", open_source(tmp_path / "m"), find_recipe("rtn"), None)
    assert len(caught) == 1
    kernels = load_model(tmp_path / "out").params["layers"]
    assert kernels["down_proj"]["kernel"].codes.shape == (3, 128, 84)
    assert not hasattr(kernels["down_proj"]["kernel"], "group_scale")


def test_windows_of_a_text():
    ids = np.arange(1000)
    windows = sample_windows(ids, 5, 100, seed=3)
    assert windows.dtype == np.int32 and (np.diff(windows) == 1).all()
    assert len(set(windows[:, 0])) == 5 and (windows[:, 0] % 100 == 0).all()
    assert not np.array_equal(windows, sample_windows(ids, 5, 100, seed=4))
    with pytest.raises(ValueError, match="1000 tokens, fewer than num_samples=11 .*num_samples=10"):
        sample_windows(ids, 11, 100, seed=3)
    with pytest.raises(ValueError, match="or num_samples=1 of seq_len=1000"):
        sample_windows(ids, 1, 2000, seed=3)


def test_calibration_goes_through_in_batches(tiny, monkeypatch):
    """Whatever the batch, the same statistics."""
    recipe = Recipe(reorder=True)
    reports = []
    for size in (1, 10**6):
        monkeypatch.setattr(run, "BATCH_TOKENS", size)
        hidden = run._first_hidden(open_source(tiny.folder), tiny.tokens, None, "float32")
        assert len(hidden) == (8 if size == 1 else 1)
        calibrator = run.LayerCalibrator(tiny.config, hidden)
        calibrator.advance(open_source(tiny.folder).layer(0))
        stats = calibrator.statistics(open_source(tiny.folder).layer(1))
        reports.append(stats.absmax["layers/down_proj"])
    np.testing.assert_allclose(*reports, rtol=1e-5)
    assert recipe.needs_calibration


def test_centred_keys_reach_the_checkpoint(tiny, tmp_path):
    recipe = Recipe(center_keys=True)
    quantize_checkpoint(tmp_path / "out", open_source(tiny.folder), recipe, tiny.tokens)
    loaded = load_model(tmp_path / "out", dtype="float32")
    assert loaded.config.centered_keys
    calibrator = Calibrator(CausalLM(tiny.config), [jnp.asarray(tiny.tokens)])
    want = quantize_with_recipe(tiny.config, tiny.params, calibrator, recipe)
    got, center = (p["layers"]["key_center"]["center"] for p in (loaded.params, want))
    np.testing.assert_allclose(got, center, atol=1e-5 * np.abs(np.asarray(center)).max())
