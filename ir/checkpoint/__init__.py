"""Quantised checkpoints of transformers: GPTQ, AWQ and compressed-tensors, read as they are."""

from .load import load_checkpoint

__all__ = ["load_checkpoint"]
