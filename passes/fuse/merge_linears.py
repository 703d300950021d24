"""Merge linears that read the same input into one, and split its output.

    y₁ = x W₁ + b₁,  y₂ = x W₂ + b₂, …   →   [y₁ | y₂ | …] = x [W₁ | W₂ | …] + [b₁ | b₂ | …]

One product of a wide matrix keeps the cores busier than several of narrow ones, and a quantised input is
quantised once. The query, key and value projections of attention and the gate and up projections of a gated
MLP are the usual finds; widths may differ (grouped-query attention), a missing bias counts as zero.

Preconditions: 2-D weights of equal dtype and input width that belong to one linear each; linears of the same
parent module (``layers.0.self_attn.q_proj`` and ``….k_proj``), so that a weight stays with its layer and the
key and value projections that every decoder layer makes of one encoder output stay apart.

The merged weight is called after its sources, ``….qkv_proj.weight`` or ``….gate_up_proj.weight``; their names
and widths stay in the metadata of the weight and of its MatMul under `MERGED_FROM` and `MERGED_WIDTHS`. It is
concatenated when it is read, so no second copy of the model is held.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.rearranged import JoinedTensor
from ..canonicalize.graph_edits import is_op
from ..infrastructure.rewriter import Replacement, Rule, missed

MERGED_FROM = "planish.merged_from"
"""Metadata key: the linears that were merged, by name, joined with commas."""
MERGED_WIDTHS = "planish.merged_widths"
"""Metadata key: the number of outputs of each, joined with commas."""


@dataclasses.dataclass(frozen=True)
class Branch:
    """One of the linears that read the same input."""

    name: str
    product: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    output: ir.Value

    @property
    def parent(self) -> str:
        """The module that the linear is a part of."""
        return self.name.rpartition(".")[0]

    @property
    def width(self) -> int:
        """The number of outputs."""
        return int(_tensor(self.weight).shape.numpy()[1])


class MergeLinears(Rule):
    """x W₁, x W₂, … → Split(x [W₁ | W₂ | …])."""

    name = "merge-linears"
    roots = ("MatMul",)

    def __init__(self, ignored: Callable[[str], bool]) -> None:
        """``ignored`` says of a linear's name whether to leave it alone."""
        self._ignored = ignored

    def apply(self, node: ir.Node) -> bool:
        """Merge ``node`` with its siblings, if it has any."""
        x = node.inputs[0]
        if x is None or len(x.uses()) < 2:
            return False
        first = find_branch(node)
        if first is None:
            return missed(node, "its weight is not a matrix that it alone reads")
        if self._ignored(first.name):
            return missed(node, "ignored")
        branches = [
            branch
            for user in dict.fromkeys(use.node for use in x.uses())
            if (branch := find_branch(user)) is not None
            and branch.product.inputs[0] is x
            and branch.product.graph is node.graph
            and _fits(branch, first)
            and not self._ignored(branch.name)
        ]
        return len(branches) > 1 and _merge(x, branches)


def find_branch(node: ir.Node) -> Branch | None:
    """The linear that ``node`` is the product of, or None if its weight is not a 2-D one of its own."""
    if not is_op(node, "MatMul") or node.graph is None:
        return None
    weight = node.inputs[1]
    if weight is None or not _is_own_constant(weight) or len(_tensor(weight).shape) != 2:
        return None
    name = str(weight.name).removesuffix(".weight")
    output = node.outputs[0]
    users = [use.node for use in output.uses()]
    if len(users) == 1 and is_op(users[0], "Add") and not output.is_graph_output():
        bias = next((value for value in users[0].inputs if value is not output), None)
        if bias is not None and _is_own_constant(bias) and _is_row(bias, weight):
            return Branch(name, node, weight, bias, users[0].outputs[0])
    return Branch(name, node, weight, None, output)


def _is_own_constant(value: ir.Value) -> bool:
    """Whether the value is an initializer that one node reads and no caller or graph sees."""
    return (
        value.is_initializer()
        and value.const_value is not None
        and len(value.uses()) == 1
        and not value.is_graph_input()
        and not value.is_graph_output()
    )


def _is_row(bias: ir.Value, weight: ir.Value) -> bool:
    return list(_tensor(bias).shape.numpy()) == [_tensor(weight).shape.numpy()[1]]


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = value.const_value
    if tensor is None:
        raise TypeError(f"{value.name} is not a constant")
    return tensor


def _fits(branch: Branch, first: Branch) -> bool:
    ours, theirs = _tensor(branch.weight), _tensor(first.weight)
    return (
        branch.parent == first.parent
        and ours.dtype == theirs.dtype
        and ours.shape.numpy()[0] == theirs.shape.numpy()[0]
    )


def _merge(x: ir.Value, branches: Sequence[Branch]) -> bool:
    first = branches[0]
    name = merged_name([branch.name for branch in branches])
    widths = [branch.width for branch in branches]
    # Behind the producer of x: there the product is before all that read any of the branches.
    replacement = Replacement(first.product, after=x)
    weight = replacement.initializer(
        f"{name}.weight", JoinedTensor([_tensor(branch.weight) for branch in branches], axis=1)
    )
    product = replacement.node("MatMul", [x, weight])
    for metadata in (weight.metadata_props, product.metadata_props):
        metadata[MERGED_FROM] = ",".join(branch.name for branch in branches)
        metadata[MERGED_WIDTHS] = ",".join(str(width) for width in widths)
    merged = _typed(product.outputs[0], first.output, sum(widths))
    if any(branch.bias is not None for branch in branches):
        bias = replacement.initializer(f"{name}.bias", _merged_bias(branches))
        merged = _typed(replacement.op("Add", merged, bias), first.output, sum(widths))
    split = replacement.node(
        "Split", [merged, replacement.shape(*widths)], {"axis": -1}, outputs=len(branches)
    )
    for branch, part in zip(branches, split.outputs, strict=True):
        replacement.replace(branch.output, part)
    for branch in branches:
        replacement.retire(branch.product)
    return replacement.finish()


def _typed(value: ir.Value, like: ir.Value, width: int) -> ir.Value:
    value.type = like.type
    if like.shape is not None:
        value.shape = ir.Shape([*like.shape[:-1], width])
    return value


def _merged_bias(branches: Sequence[Branch]) -> ir.TensorProtocol:
    dtype = _tensor(branches[0].weight).dtype
    parts = [
        _tensor(branch.bias) if branch.bias is not None else ir.tensor(np.zeros(branch.width, dtype.numpy()))
        for branch in branches
    ]
    return JoinedTensor(parts, axis=0)


def merged_name(names: Iterable[str]) -> str:
    """One name for merged siblings: what they share once, what differs joined.

    >>> merged_name(["h.0.attn.q_proj", "h.0.attn.k_proj", "h.0.attn.v_proj"])
    'h.0.attn.qkv_proj'
    >>> merged_name(["mlp.gate_proj", "mlp.up_proj"])
    'mlp.gate_up_proj'
    >>> merged_name(["self.query", "self.key", "self.value"])
    'self.query_key_value'
    """
    split = [name.rpartition(".") for name in names]
    parent, dot = split[0][0], split[0][1]
    stems = [stem for _, _, stem in split]
    endings = {match.group() for stem in stems if (match := re.search(r"_[a-z]+$", stem))}
    ending = endings.pop() if len(endings) == 1 and all("_" in stem for stem in stems) else ""
    stems = [stem.removesuffix(ending) for stem in stems]
    joined = ("" if all(len(stem) == 1 for stem in stems) else "_").join(stems)
    return f"{parent}{dot}{joined}{ending}"
