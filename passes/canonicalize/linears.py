"""Linear layers are written in one way: ``MatMul(x, W[K, N])``, and ``Add`` of a bias vector after it.

    Gemm(x, W, b) → Add(MatMul(x, W), b)                         alpha = beta = 1, W and b initializers
    Gemm(x, W[N, K], b; transB = 1) → Add(MatMul(x, W[K, N]), b)
    Add(b, MatMul(x, W)) → Add(MatMul(x, W), b)
    Reshape(Add(MatMul(Reshape(x[…, K], [−1, K]), W), b), […, N]) → Add(MatMul(x, W), b)

The last one is how GPT-2's Conv1D is exported. Preconditions of Gemm: the weight is an initializer that is
used in no other orientation, the bias is absent or of shape [N]; any other Gemm is a general matrix product
and stays. Preconditions of the reshapes: the leading dimensions before and after are provably equal.
"""

from __future__ import annotations

import onnx_ir as ir

from ...ir.rearranged import TransposedTensor
from ..infrastructure.rewriter import Replacement, Rule, missed
from .graph_edits import (
    add_initializer,
    constant_tensor,
    dims,
    integer,
    number,
    only_use,
    producer,
)


class GemmToMatMul(Rule):
    """Gemm of a constant weight → MatMul and Add."""

    name = "gemm-to-matmul"
    roots = ("Gemm",)

    def apply(self, node: ir.Node) -> bool:
        """Rewrite ``node``, a Gemm."""
        value, weight = node.inputs[0], node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        tensor = constant_tensor(weight)
        if value is None or weight is None or tensor is None:
            return False
        if integer(node, "transA", 0) or number(node, "alpha", 1.0) != 1:
            return missed(node, "the input is transposed or scaled")
        flip = bool(integer(node, "transB", 0))
        out_features = int(tensor.shape.numpy()[0 if flip else 1])
        if bias is not None and (number(node, "beta", 1.0) != 1 or dims(bias) != [out_features]):
            return missed(node, "the bias is scaled or no vector of out_features")
        if flip:
            folded = _transposed_weight(weight, tensor)
            if folded is None:
                return missed(node, "the weight is read in another orientation too")
            weight = folded
        replacement = Replacement(node)
        result = replacement.op("MatMul", value, weight, like=node.outputs[0])
        if bias is not None:
            result = replacement.op("Add", result, bias, like=node.outputs[0])
        return replacement.finish(result)


def _transposed_weight(weight: ir.Value, tensor: ir.TensorProtocol) -> ir.Value | None:
    """The initializer [K, N] for a weight [N, K] that only Gemms with transB = 1 read; they all get it."""
    graph = weight.graph
    uses = list(weight.uses())
    if not isinstance(graph, ir.Graph) or weight.is_graph_output() or weight.name is None:
        return None
    if any(use.node.op_type != "Gemm" or use.idx != 1 or not integer(use.node, "transB", 0) for use in uses):
        return None
    metadata = dict(weight.metadata_props)
    del graph.initializers[weight.name]
    folded = add_initializer(graph, TransposedTensor(tensor, (1, 0), weight.name), weight.name)
    folded.metadata_props.update(metadata)
    for use in uses:
        use.node.replace_input_with(1, folded)
        use.node.attributes.pop("transB")
    return folded


class BiasOnTheRight(Rule):
    """Add(b, MatMul(x, W)) → Add(MatMul(x, W), b)."""

    name = "bias-on-the-right"
    roots = ("Add",)

    def apply(self, node: ir.Node) -> bool:
        """Swap the operands of ``node``, an Add."""
        left, right = node.inputs
        matmul = producer(right, "MatMul")
        if left is None or right is None or matmul is None or constant_tensor(matmul.inputs[1]) is None:
            return False
        if constant_tensor(left) is None or len(dims(left) or ()) != 1:
            return False
        node.replace_input_with(0, right)
        node.replace_input_with(1, left)
        return True


class LinearWithoutReshapes(Rule):
    """A linear layer between two reshapes that only flatten and restore the leading dimensions."""

    name = "linear-without-reshapes"
    roots = ("Reshape",)

    def apply(self, node: ir.Node) -> bool:
        """Rewrite ``node``, the Reshape after the linear layer."""
        add = producer(node.inputs[0], "Add")
        matmul = producer(add.inputs[0] if add is not None else node.inputs[0], "MatMul")
        inner = producer(matmul.inputs[0], "Reshape") if matmul is not None else None
        if matmul is None or inner is None or constant_tensor(matmul.inputs[1]) is None:
            return False
        bias = None if add is None else add.inputs[1]
        if not only_use(matmul.outputs[0]) or (add is not None and not only_use(add.outputs[0])):
            return missed(node, "something else reads the flattened result")
        if add is not None and (constant_tensor(bias) is None or len(dims(bias) or ()) != 1):
            return False
        source, weight = inner.inputs[0], matmul.inputs[1]
        before, after, shape = dims(source), dims(node.outputs[0]), dims(weight)
        if source is None or before is None or after is None or shape is None or len(shape) != 2:
            return missed(node, "shapes are not known")
        leading = before[:-1]
        if None in leading or before[-1] != shape[0] or after != [*leading, shape[1]]:
            return missed(node, "the leading dimensions are not restored")
        replacement = Replacement(node)
        result = replacement.node("MatMul", [source, weight], metadata=matmul).outputs[0]
        result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
        if add is not None:
            added = replacement.node("Add", [result, bias], metadata=add).outputs[0]
            added.type, added.shape = result.type, result.shape
            result = added
        return replacement.finish(result)


def rules(opset: int) -> list[Rule]:
    """The rules, the same in every opset."""
    del opset
    return [GemmToMatMul(), BiasOnTheRight(), LinearWithoutReshapes()]
