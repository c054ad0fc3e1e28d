"""Checkpoints in: a Hugging Face directory -> a model and its canonical parameters."""

from qserve_jax.checkpoint.errors import CheckpointError
from qserve_jax.checkpoint.load import LoadedModel, load_model

__all__ = ["CheckpointError", "LoadedModel", "load_model"]
