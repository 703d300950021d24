"""Quantisation: weights as integers, activations quantised at run time where the scheme says so."""

from .quantize import Quantize

__all__ = ["Quantize"]
