"""Where the kernels look for K, V and scales, against where XLA scatters them."""

import numpy as np
import pytest

from qserve_jax.pallas_kernels.page_layout import PageLayout
from qserve_jax.quantization.packing import code_words, token_word_indices


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [8, 64])
def test_a_quantised_page_is_where_xla_scatters_it(size, bits, head_dim):
    page, tokens, w = PageLayout(size, head_dim, bits), np.arange(size), code_words(head_dim, bits)
    found = 4 * np.asarray(token_word_indices(tokens, size, head_dim, bits))
    np.testing.assert_array_equal(found[:, 0], tokens * page.side_bytes)
    np.testing.assert_array_equal(found[:, w], page.values_at + tokens * page.side_bytes)
    np.testing.assert_array_equal(found[:, 2 * w], page.scales_at + tokens * 8)
    assert found.max() + 4 == page.block_bytes


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_16_bit_page_is_k_then_v(dtype):
    block = np.zeros((2, 64, 128), dtype)  # of the pages [P, K, 2, S_p, H]
    page = PageLayout(64, 128, 16, block.itemsize)
    assert (page.values_at, page.side_bytes) == block.strides[:2]
    assert page.block_bytes == page.scales_at == block.nbytes
