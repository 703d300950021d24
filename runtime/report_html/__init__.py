"""A compiled file explained on one self-contained HTML page."""

from .content import Content
from .measurements import Measurements, measure
from .page import render

__all__ = ["Content", "Measurements", "measure", "render"]
