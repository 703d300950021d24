"""Allocation: which layer gets which quantisation scheme, under a budget."""

from .allocate import Allocate

__all__ = ["Allocate"]
