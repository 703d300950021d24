"""Distillation: training a compressed model to do as the original does."""

from .distill import Distill

__all__ = ["Distill"]
