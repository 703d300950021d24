"""Sparsification: weights that become zero while a model is trained."""

from .sparsify import Sparsify

__all__ = ["Sparsify"]
