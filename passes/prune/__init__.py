"""Structured pruning to a measured speed-up: ZipLM and its baselines, block dropping, 2SSP."""

from .prune import Prune

__all__ = ["Prune"]
