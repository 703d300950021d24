"""The learning rate: it rises linearly, then falls to zero."""

from __future__ import annotations

import math
from typing import Literal

Decay = Literal["cosine", "linear", "none"]


def learning_rate(step: int, *, peak: float, steps: int, warmup: float, decay: Decay) -> float:
    """The rate of update ``step`` of ``steps``, counted from 0.

    Over the first w = ``warmup`` · ``steps`` updates it is peak · (step + 1) / w. Then, with p the share of
    the other updates that are done, it is peak · (1 + cos πp) / 2, or peak · (1 − p), or peak.
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / (steps - rising)
    match decay:
        case "cosine":
            return peak * (1 + math.cos(math.pi * done)) / 2
        case "linear":
            return peak * (1 - done)
        case "none":
            return peak
