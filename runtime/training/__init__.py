"""Training: weights of a graph by gradient descent, to do as another graph does, or to do a task."""

from .batches import Batches
from .checkpoint import fingerprint
from .losses import Losses
from .masks import KeepZeros, Masked
from .objective import Objective
from .schedule import learning_rate
from .trainable import Weight, float_weights
from .trainer import Hook, Parameters, Trained, Training, train, write_back

__all__ = [
    "Batches",
    "Hook",
    "KeepZeros",
    "Losses",
    "Masked",
    "Objective",
    "Parameters",
    "Trained",
    "Training",
    "Weight",
    "fingerprint",
    "float_weights",
    "learning_rate",
    "train",
    "write_back",
]
