"""A pass of one's own: replace every HardSwish by its definition, for a runtime that lacks the op."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir
import planish
import rich
import torch
from planish.passes import Coverage, Pass, PassContext, PassResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecomposeHardSwish(Pass):
    """``HardSwish(x) → x · HardSigmoid(x; α = 1/6, β = 1/2)`` (the ONNX specification of HardSwish)."""

    name: ClassVar[str] = "decompose-hard-swish"

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Rewrite all of them; having none is an error, since this pass was asked for."""
        nodes = [node for node in model.graph.all_nodes() if node.op_type == "HardSwish"]
        for node in nodes:
            x, y = node.inputs[0], node.outputs[0]
            gate = ir.node("HardSigmoid", [x], {"alpha": 1 / 6, "beta": 0.5}, name=f"{node.name}.gate")
            gate.outputs[0].name = f"{y.name}.gate"
            product = ir.node("Mul", [x, gate.outputs[0]], name=f"{node.name}.product")
            ir.convenience.replace_nodes_and_values(
                node.graph, node, [node], [gate, product], [y], product.outputs
            )
        return PassResult(
            modified=bool(nodes), coverage=Coverage(unit="HardSwish activations", covered=len(nodes))
        )


def main() -> None:
    """Run it between two passes that ship with planish."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Hardswish(), torch.nn.Linear(64, 8)).eval()
    x = torch.randn(4, 64)
    compiled = planish.compile(
        module, ["canonicalize", DecomposeHardSwish(), "fuse"], example_inputs=x, check="contract"
    )
    rich.print(compiled.report)
    print(f"largest difference to the module: {(compiled(x) - module(x)).abs().max():.1e}")


if __name__ == "__main__":
    main()
