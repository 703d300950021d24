"""Types and shapes of every value, with symbolic dimensions kept symbolic.

Built on the onnx-shape-inference package, which knows the contrib ops and model-local functions. It stops at
the first node that it cannot handle; here that node's outputs stay as they are and the rest is inferred.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx_ir as ir
import onnx_shape_inference
from onnx_shape_inference import OpUsageError, ShapeInferenceError

from .walk import all_nodes, all_values, subgraphs_of

_PASSED_OVER = "planish.passed_over"
"""The domain that nodes are moved to while they are passed over: no op is registered for it."""
_LONGEST_FORMULA = 200
"""Characters of a symbol that is read as a formula. Longer ones, and powers, may take forever to compute."""
_MOST_FAILURES = 16
"""Nodes to pass over one by one; after them, all nodes of an op that fails."""


def infer_shapes(model: ir.Model, *, for_rewriting: bool = False) -> None:
    """Infer the types and shapes of all values of ``model``, in place.

    What is known already stays: an inferred dimension only replaces an unknown one or a symbol, and an
    inference that contradicts what the model declares is dropped. Nodes of unknown ops, and malformed nodes,
    leave their outputs as they are. Symbols must be names or formulas: ``batch:size`` becomes ``batch_size``.

    For rewriting, equal symbols must mean equal dimensions: symbols that the model declares for its outputs
    are not spread to values whose equality the engine only assumed. And what is known about the contents of
    shape tensors stays noted, under ``onnx_shape_inference.SYM_DATA_KEY``, for the caller to read and remove.
    """
    _rename_unreadable_symbols(model)
    domains: dict[ir.Node, str] = {}  # of the nodes that are passed over
    _pass_over([node for node in all_nodes(model) if _is_misjudged(node)], domains)
    conditionals = [node for node in all_nodes(model) if node.op_type == "If" and node.domain == ""]
    known = {value: (value.type, value.shape) for value in all_values(model)} if conditionals else {}
    try:
        while True:
            while not _try_to_infer(model, domains, adopt_declared_symbols=not for_rewriting):
                pass
            guessed = [node for node in conditionals if node not in domains and _is_guessed(node)]
            if not guessed:
                break
            _pass_over(guessed, domains)
            for value, (value_type, shape) in known.items():
                value.type, value.shape = value_type, shape
    finally:
        for node, domain in domains.items():
            node.domain = domain
    _write_numbers_as_numbers(model)
    if not for_rewriting:
        forget_shape_contents(model)


def _rename_unreadable_symbols(model: ir.Model) -> None:
    """Rename the symbols that cannot be read as formulas; each keeps a name of its own."""
    values = [value for value in all_values(model) if value.shape is not None and not value.shape.is_static()]
    symbols = {dim.value for value in values for dim in value.shape or () if isinstance(dim, ir.SymbolicDim)}
    names: dict[str | None, str] = {}
    for symbol in sorted(symbol for symbol in symbols if symbol is not None):
        if not _is_formula(symbol):
            name = re.sub(r"\W", "_", f"_{symbol}" if symbol[:1].isdecimal() else symbol, flags=re.ASCII)
            while name in symbols or name in names.values():
                name += "_"
            names[symbol] = name
    if not names:
        return
    for value in values:
        dims = [names.get(d.value, d) if isinstance(d, ir.SymbolicDim) else d for d in value.shape or ()]
        value.shape = ir.Shape(dims)


def _is_formula(symbol: str) -> bool:
    if len(symbol) > _LONGEST_FORMULA or "**" in symbol:
        return False
    try:
        ir.SymbolicDim(symbol).free_symbols()
    except ValueError:
        return False
    return True


def forget_shape_contents(model: ir.Model) -> None:
    """Remove what inference noted about the contents of shape tensors: it would end up in the saved file."""
    for value in all_values(model):
        value.metadata_props.pop(onnx_shape_inference.SYM_DATA_KEY, None)


def _write_numbers_as_numbers(model: ir.Model) -> None:
    """A dimension that symbolic arithmetic reduced to a number comes out as the symbol "4"; make it 4."""
    for value in all_values(model):
        if value.shape is None:
            continue
        names = [dim.value for dim in value.shape if isinstance(dim, ir.SymbolicDim)]
        if any(name is not None and name.isdecimal() for name in names):
            value.shape = ir.Shape([_number_or_symbol(dim) for dim in value.shape])


def _number_or_symbol(dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    if isinstance(dim, int) or dim.value is None or not dim.value.isdecimal():
        return dim
    return int(dim.value)


def _try_to_infer(model: ir.Model, domains: dict[ir.Node, str], *, adopt_declared_symbols: bool) -> bool:
    """Infer; True when it is done. When a node stops the inference, add that node to those passed over."""
    try:
        onnx_shape_inference.infer_symbolic_shapes(
            model, warn_on_missing=False, adopt_declared_symbols=adopt_declared_symbols
        )
    except (OpUsageError, ShapeInferenceError) as error:
        failed = _failed_nodes(model, error, every_alike=len(domains) >= _MOST_FAILURES)
        _pass_over(failed, domains)
        return not failed
    return True


def _pass_over(nodes: Sequence[ir.Node], domains: dict[ir.Node, str]) -> None:
    for node in nodes:
        domains[node] = node.domain
        node.domain = _PASSED_OVER


def _is_misjudged(node: ir.Node) -> bool:
    """Whether the package (0.4.0) infers a wrong shape for ``node``; found by the node tests of onnx."""
    if node.domain != "":
        return False
    if node.op_type in ("Split", "Squeeze"):
        # An operand that is computed is taken for an omitted one: equal parts, all axes of size 1.
        operand = node.inputs[1] if len(node.inputs) > 1 else None
        return operand is not None and ir.convenience.get_const_tensor(operand) is None
    if node.op_type == "Resize":
        policy = node.attributes.get("keep_aspect_ratio_policy")
        return policy is not None and policy.value != "stretch"
    return False


def _is_guessed(node: ir.Node) -> bool:
    """Whether only one branch of an If knows its shape: the package (0.4.0) takes it for both."""
    branches = list(subgraphs_of(node))
    outputs = zip(*(branch.outputs for branch in branches), strict=False)
    return any(len({value.shape is None for value in values}) > 1 for values in outputs)


def _failed_nodes(
    model: ir.Model, error: OpUsageError | ShapeInferenceError, *, every_alike: bool
) -> list[ir.Node]:
    if isinstance(error, OpUsageError):
        name, op = error.node.name, (error.node.domain, error.node.op_type)
    else:
        name, op = error.node_name, (error.domain, error.op_type)
    alike = [node for node in all_nodes(model) if (node.domain, node.op_type) == op]
    failed = [node for node in alike if every_alike or node.name == name]
    if failed or not alike:
        # A node that is not in the model was made from the body of a standard op that has no rule of its own.
        return failed or [node for node in all_nodes(model) if _is_inferred_through_body(node)]
    return alike


def _is_inferred_through_body(node: ir.Node) -> bool:
    return node.domain != _PASSED_OVER and not onnx_shape_inference.registry.has(node.domain, node.op_type)
