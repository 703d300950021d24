"""Passes, and what is needed to write one: a pass is a frozen dataclass that rewrites a graph in place."""

from .infrastructure.base import Contract, Coverage, Fact, Pass, PassContext, PassResult, Remark, Skipped
from .infrastructure.pipeline import Pipeline

__all__ = [
    "Contract",
    "Coverage",
    "Fact",
    "Pass",
    "PassContext",
    "PassResult",
    "Pipeline",
    "Remark",
    "Skipped",
]
