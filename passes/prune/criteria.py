"""Baselines: in which order structures go if not by what their removal does to the layer's output.

Each gives one score per structure, of the dense model; the lowest goes first, and what stays is not refitted.

- ``magnitude``: Σ over the weights of the group, producers and consumers alike, of ‖W_S‖², each weight's
  scores divided by their mean, so that a layer does not count more because its numbers are larger: the group
  norm of DepGraph (Fang et al., 2023), https://arxiv.org/abs/2301.12900.
- ``wanda``: Σ over consumers of Σ_{j∈S} ‖W_:j‖² E[x_j²] / E‖y‖², after Wanda's |W_ij|·‖x_j‖ (Sun et al.,
  2023), https://arxiv.org/abs/2306.11695: the squared error of the removal if inputs were uncorrelated.
- ``taylor``: see `planish.passes.prune.taylor`.
- ``random``: uniform.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from ...ir.structure import ChannelGroup, Member
from .consumers import ObservedConsumer, dense_array
from .obs import Doubles

Criterion = Literal["obs", "magnitude", "wanda", "taylor", "random"]
CRITERIA: tuple[Criterion, ...] = ("obs", "magnitude", "wanda", "taylor", "random")


def magnitude(model: ir.Model, group: ChannelGroup) -> Doubles:
    """[structures]: group norms."""
    scores = np.zeros(group.structures)
    for member in (*group.producers, *group.consumers):
        norms = _squared_norms(model, member)
        scores += norms / (norms.mean() or 1.0)
    return scores


def _squared_norms(model: ir.Model, member: Member) -> Doubles:
    tensor = model.graph.initializers[member.tensor].const_value
    assert tensor is not None
    weight = np.moveaxis(dense_array(tensor, member.tensor), member.axis, 0)
    squares = np.square(weight.reshape(len(weight), -1), dtype=np.float64).sum(axis=1)
    norms: Doubles = squares[member.indices].sum(axis=1)
    return norms


def wanda(consumers: Sequence[ObservedConsumer]) -> Doubles:
    """[structures]: norms of columns, weighted by those of their inputs."""
    scores: Doubles = np.sum([_weighted_norms(consumer) for consumer in consumers], axis=0)
    return scores


def _weighted_norms(consumer: ObservedConsumer) -> Doubles:
    second_moments = np.diag(consumer.covariance) + consumer.mean**2
    columns: Doubles = np.square(consumer.weight).sum(axis=0) * second_moments / consumer.energy
    norms: Doubles = columns[consumer.columns].sum(axis=1)
    return norms
