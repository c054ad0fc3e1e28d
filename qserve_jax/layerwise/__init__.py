"""Quantising a checkpoint layer by layer: float weights are never all in memory."""

from qserve_jax.layerwise.run import quantize_checkpoint
from qserve_jax.layerwise.samples import sample_windows
from qserve_jax.layerwise.source import CheckpointSource, open_source

__all__ = ["CheckpointSource", "open_source", "quantize_checkpoint", "sample_windows"]
