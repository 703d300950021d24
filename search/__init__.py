"""Choosing a pipeline by what its results are measured to be, under a budget."""

from .budget import Budget
from .search import search

__all__ = ["Budget", "search"]
