"""Calibration: real inputs, run through a model block by block, and the statistics taken on the way."""

from .convolution_patches import can_unfold, patches
from .data import CalibrationData
from .ranges import RangeCollector
from .statistics import Covariance
from .stream import ActivationStream, Tap

__all__ = [
    "ActivationStream",
    "CalibrationData",
    "Covariance",
    "RangeCollector",
    "Tap",
    "can_unfold",
    "patches",
]
