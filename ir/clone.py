"""Copying a model so that changing the copy never changes the original."""

from __future__ import annotations

import copy

import onnx_ir as ir

from .verify import verify
from .walk import all_values


def clone(model: ir.Model) -> ir.Model:
    """Copy the graphs, functions, nodes, values and types of ``model``; share its tensors.

    Metadata is kept: ``metadata_props`` and (shallowly) ``meta``. `onnx_ir.Model.clone` alone is not enough:
    it shares the type objects, so setting ``value.dtype`` in the copy would change the original, and drops
    the model's ``meta``.

    Raises:
        VerificationError: the graph is not sorted or otherwise broken.
    """
    try:
        result = model.clone()
    except RuntimeError:
        verify(model)  # says what is wrong with the graph in the user's words
        raise
    result.meta.update(model.meta)
    for value in all_values(result):
        value.type = _copy_type(value.type)
    return result


def _copy_type(value_type: ir.TypeProtocol | None) -> ir.TypeProtocol | None:
    if type(value_type) is ir.TensorType:  # nearly all of them: much faster than deepcopy
        return ir.TensorType(value_type.dtype, denotation=value_type.denotation)
    return copy.deepcopy(value_type)
