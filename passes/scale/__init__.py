"""Scaling of channels between a producer and the linears that read it, so that quantisation costs less."""

from .scale import Scale

__all__ = ["Scale"]
