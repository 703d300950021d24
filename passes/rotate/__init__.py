"""Exact changes of basis: folding norms, and rotations R1 to R4."""

from .fold_norms import FoldNorms

__all__ = ["FoldNorms"]
