"""A pass of one's own: multiply by reciprocals instead of dividing by constants.

    x / c   →   x · (1 / c)

A multiplication is faster than a division on most hardware, and targets merge it more readily.

Preconditions: c is a constant that no caller can override, a float, and every 1 / c is finite.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import planish
import rich
import torch
from planish.passes import Contract, Coverage, Pass, PassContext, PassResult, Skipped
from planish.passes.infrastructure.rewriter import Replacement, Rule, apply_rules, match_statistics, missed

# --8<-- [start:rule]
FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)


class DivideByConstant(Rule):
    """x / c → x · (1 / c): the rewrite of one node."""

    name = "divide-by-constant"
    roots = ("Div",)

    def __init__(self, *, exact: bool) -> None:
        self.exact = exact

    def apply(self, node: ir.Node) -> bool:
        """Check everything first, and only then change something."""
        x, divisor = node.inputs
        if x is None or divisor is None or divisor.const_value is None or divisor.is_graph_input():
            return missed(node, "the divisor is computed")
        if divisor.dtype not in FLOATS:
            return missed(node, f"the divisor is {divisor.dtype}")
        values = divisor.const_value.numpy()
        with np.errstate(divide="ignore", over="ignore"):
            reciprocals = (1 / values).astype(values.dtype)
        if not np.isfinite(reciprocals).all():
            return missed(node, "a reciprocal is infinite")
        if self.exact and not np.all(np.frexp(values)[0] == np.copysign(0.5, values)):
            return missed(node, "the divisor is no power of two")

        replacement = Replacement(node)
        factor = replacement.initializer(f"{divisor.name}_reciprocal", ir.tensor(reciprocals))
        return replacement.finish(replacement.op("Mul", x, factor, like=node.outputs[0]))


# --8<-- [end:rule]


# --8<-- [start:pass]
@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiplyByReciprocals(Pass):
    """Multiply by reciprocals instead of dividing by constants.

    Attributes:
        exact: only where not even the last bit changes, which is where the divisor is a power of two.
    """

    name: ClassVar[str] = "multiply-by-reciprocals"
    contract: ClassVar[Contract] = Contract.EXACT

    exact: bool = False

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Rewrite ``model`` in place, and say of every division that stays why it does."""
        with match_statistics() as statistics:
            hits = apply_rules(model, [DivideByConstant(exact=self.exact)])
        misses = statistics[DivideByConstant.name].misses
        for name, why in misses.items():
            ctx.remark(name, why)
        covered = hits[DivideByConstant.name]
        coverage = Coverage(
            unit="divisions",
            covered=covered,
            skipped=tuple(Skipped(name, why) for name, why in misses.items()),
            required=False,  # a model without divisions is no mistake
        )
        return PassResult(modified=covered > 0, coverage=coverage, statistics=hits)


# --8<-- [end:pass]


def main() -> None:
    """Run it between two passes that ship with planish."""

    class Standardise(torch.nn.Module):
        """Two divisions: the second one's divisor is computed."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """[batch, 3] in and out."""
            return (x - 0.45) / torch.tensor([0.229, 0.224, 0.225]) / x.mean()

    module, x = Standardise().eval(), torch.rand(4, 3)
    compiled = planish.compile(
        module, ["canonicalize", MultiplyByReciprocals(), "fuse"], example_inputs=x, check="contract"
    )
    rich.print(compiled.report)
    for remark in compiled.report.passes[1].remarks:
        print(f"{remark.subject}: {remark.text}")
    print(f"largest difference to the module: {(compiled(x) - module(x)).abs().max():.1e}")


if __name__ == "__main__":
    main()
