"""Fuse: neighbouring ops become fewer and wider ones."""

from .fuse import Fuse

__all__ = ["Fuse"]
