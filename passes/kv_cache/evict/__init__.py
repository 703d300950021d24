"""Eviction of tokens from the key-value cache."""

from .evict import Evict

__all__ = ["Evict"]
