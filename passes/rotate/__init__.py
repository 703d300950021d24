"""Exact changes of basis: folding norms, and rotations R1 to R4."""

from .fold_norms import FoldNorms
from .rotate import Rotate

__all__ = ["FoldNorms", "Rotate"]
