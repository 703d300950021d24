"""The canonical form of a design: what every other pass may rely on."""

from .canonicalize import Canonicalize

__all__ = ["Canonicalize"]
