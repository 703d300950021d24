"""Decomposed norms become one node.

    w · x / √(mean(x²) + ε) → RMSNormalization(x, w)                       (Zhang & Sennrich 2019)
    w · (x − mean(x)) / √(mean((x − mean(x))²) + ε) → LayerNormalization(x, w)          (Ba et al. 2016)
    LayerNormalization(x, w) + b → LayerNormalization(x, w, b)

Spellings understood: x² as Pow or Mul; 1/√ as Div, Reciprocal(Sqrt) or Pow −½; factors in any order; and
the half-precision form Cast(x → float) … Cast(back) · w, which is what ``stash_type`` 1 means. Gemma's
(1 + w) has been folded to one constant before, so its scale is stored as 1 + w.

Preconditions: the mean is over the last axes of ``x`` and keeps its dimensions; ε is a constant; the scale
has exactly the normalised dimensions. RMSNormalization needs opset 23, LayerNormalization opset 17.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ..infrastructure.rewriter import Replacement, Rule, missed
from .graph_edits import constant_tensor, dims, integer, integers, only_use, producer, rank, scalar


@dataclass(frozen=True)
class Normalized:
    """x / √(mean(x²) + ε) over the last ``axes`` axes; ``centered``: x is ``source`` minus its mean."""

    source: ir.Value
    epsilon: float
    axes: int
    centered: bool


def match_normalized(value: ir.Value | None) -> Normalized | None:
    """Recognise the division by the root mean square that computes ``value``."""
    quotient = _quotient(value)
    if quotient is None:
        return None
    numerator, under_root = quotient
    add = producer(under_root, "Add")
    if add is None:
        return None
    for mean, epsilon in (add.inputs, reversed(add.inputs)):
        eps = scalar(epsilon)
        square = _mean(mean)
        if eps is not None and square is not None and _is_square_of(square[0], numerator):
            return _centered(numerator, eps, square[1])
    return None


def _quotient(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """(x, a) if ``value`` is x / √a."""
    division = producer(value, "Div")
    if division is not None:
        root = producer(division.inputs[1], "Sqrt")
        numerator, under_root = division.inputs[0], None if root is None else root.inputs[0]
        return None if numerator is None or under_root is None else (numerator, under_root)
    product = producer(value, "Mul")
    if product is None:
        return None
    for numerator, factor in (product.inputs, reversed(product.inputs)):
        under_root = _reciprocal_root(factor)
        if numerator is not None and under_root is not None:
            return numerator, under_root
    return None


def _reciprocal_root(value: ir.Value | None) -> ir.Value | None:
    """``a`` if ``value`` is 1/√a."""
    power = producer(value, "Pow")
    if power is not None:
        return power.inputs[0] if scalar(power.inputs[1]) == -0.5 else None
    reciprocal = producer(value, "Reciprocal")
    division = producer(value, "Div")
    root = None
    if reciprocal is not None:
        root = producer(reciprocal.inputs[0], "Sqrt")
    elif division is not None and scalar(division.inputs[0]) == 1:
        root = producer(division.inputs[1], "Sqrt")
    return None if root is None else root.inputs[0]


def _mean(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """(x, n) if ``value`` is the mean of ``x`` over its last n axes, dimensions kept."""
    node = producer(value, "ReduceMean")
    if node is None or not integer(node, "keepdims", 1) or node.inputs[0] is None:
        return None
    if "axes" in node.attributes:
        axes = list(node.attributes["axes"].as_ints())
    else:
        axes = (integers(node.inputs[1]) if len(node.inputs) > 1 else None) or []
    axis_count = rank(node.inputs[0])
    if axis_count is not None:
        axes = [axis if axis < 0 else axis - axis_count for axis in axes]
    if not axes or sorted(axes) != list(range(-len(axes), 0)):
        return None
    return node.inputs[0], len(axes)


def _is_square_of(value: ir.Value, base: ir.Value) -> bool:
    power = producer(value, "Pow")
    if power is not None:
        return power.inputs[0] is base and scalar(power.inputs[1]) == 2
    product = producer(value, "Mul")
    return product is not None and product.inputs[0] is base and product.inputs[1] is base


def _centered(numerator: ir.Value, epsilon: float, axes: int) -> Normalized:
    difference = producer(numerator, "Sub")
    if difference is not None and difference.inputs[0] is not None:
        source = difference.inputs[0]
        mean = _mean(difference.inputs[1])
        if mean is not None and mean[0] is source and mean[1] == axes:
            return Normalized(source, epsilon, axes, centered=True)
    return Normalized(numerator, epsilon, axes, centered=False)


class _Normalization(Rule):
    """A Mul by the scale, after a division by the root mean square."""

    roots = ("Mul",)
    centered: bool

    def apply(self, node: ir.Node) -> bool:
        """Rewrite ``node``, the multiplication by the scale."""
        for normalized, scale in (node.inputs, reversed(node.inputs)):
            if scale is None or normalized is None:
                continue
            cast = producer(normalized, "Cast")
            match = match_normalized(normalized if cast is None else cast.inputs[0])
            if match is None or match.centered is not self.centered:
                continue
            source = match.source if cast is None else _uncast(match.source, normalized.dtype)
            if source is None:
                return missed(node, "it is cast back to another type than it came from")
            if not _fits(scale, source, match.axes):
                return missed(node, "the scale does not have the normalised dimensions")
            return self._replace(node, source, scale, match)
        return False

    def _replace(self, node: ir.Node, source: ir.Value, scale: ir.Value, match: Normalized) -> bool:
        replacement = Replacement(node)
        op_type = "LayerNormalization" if self.centered else "RMSNormalization"
        # Stage one of a float64 norm must not be computed in float32, the default.
        stash = ir.DataType.DOUBLE if source.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
        output = replacement.op(
            op_type,
            source,
            scale,
            like=node.outputs[0],
            axis=-match.axes,
            epsilon=match.epsilon,
            stash_type=int(stash),
        )
        return replacement.finish(output)


class RMSNorm(_Normalization):
    """w · x / √(mean(x²) + ε) → RMSNormalization(x, w)."""

    name = "rms-normalization"
    centered = False


class LayerNorm(_Normalization):
    """The same of x − mean(x) → LayerNormalization(x, w)."""

    name = "layer-normalization"
    centered = True


def _uncast(value: ir.Value, dtype: ir.DataType | None) -> ir.Value | None:
    """``x`` if ``value`` is Cast(x) to float and ``x`` has the type ``dtype``."""
    cast = producer(value, "Cast")
    source = None if cast is None else cast.inputs[0]
    if source is None or source.dtype is None or source.dtype != dtype or value.dtype != ir.DataType.FLOAT:
        return None
    return source


def _fits(scale: ir.Value, source: ir.Value, axes: int) -> bool:
    """Whether the scale has the last ``axes`` dimensions of the source, and its type."""
    wanted, given = dims(source), dims(scale)
    if wanted is None or given is None or scale.dtype is None or scale.dtype != source.dtype:
        return False
    return given == wanted[-axes:] and all(isinstance(dim, int) for dim in given)


class LayerNormBias(Rule):
    """LayerNormalization(x, w) + b → LayerNormalization(x, w, b)."""

    name = "layer-normalization-bias"
    roots = ("Add",)

    def apply(self, node: ir.Node) -> bool:
        """Rewrite ``node``, the addition of the bias."""
        for value, bias in (node.inputs, reversed(node.inputs)):
            norm = producer(value, "LayerNormalization")
            if norm is None or bias is None or constant_tensor(bias) is None:
                continue
            if len(norm.inputs) > 2 and norm.inputs[2] is not None:
                return False
            if dims(bias) is None or dims(bias) != dims(norm.inputs[1]):
                return missed(node, "the bias does not have the shape of the scale")
            if not only_use(norm.outputs[0]) or any(output.uses() for output in norm.outputs[1:]):
                return missed(node, "something else reads the norm before its bias")
            replacement = Replacement(node)
            output = replacement.op(
                "LayerNormalization",
                norm.inputs[0],
                norm.inputs[1],
                bias,
                like=node.outputs[0],
                **{name: attribute.value for name, attribute in norm.attributes.items()},
            )
            return replacement.finish(output)
        return False


def rules(opset: int) -> list[Rule]:
    """The rules whose results exist in this opset."""
    found: list[Rule] = []
    if opset >= 17:
        found += [LayerNorm(), LayerNormBias()]
    if opset >= 23:
        found.append(RMSNorm())
    return found
