"""Calibration samples from a long text."""

from __future__ import annotations

import numpy as np


def sample_windows(ids: np.ndarray, num_samples: int, seq_len: int, seed: int) -> np.ndarray:
    """i32[num_samples, seq_len]: windows of the token ids i64[n] that lie side by side, drawn
    without replacement by numpy's default generator.

    Raises ValueError where the text has fewer.
    """
    count = len(ids) // seq_len
    if count < num_samples:
        cure = f"num_samples={count}" if count else f"num_samples=1 of seq_len={len(ids)}"
        raise ValueError(
            f"the calibration text holds {len(ids)} tokens, fewer than num_samples={num_samples} "
            f"windows of seq_len={seq_len} need: give a longer text, or {cure}"
        )
    windows = ids[: count * seq_len].reshape(count, seq_len)
    chosen = np.random.default_rng(seed).choice(count, num_samples, replace=False)
    return windows[chosen].astype(np.int32)
