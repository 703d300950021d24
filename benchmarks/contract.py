"""Are deliberately wrong passes caught, named with layer and first differing tensor, and found by bisect?

A pipeline of ten passes: canonicalize, fuse, seven clean-ups and quantize. One wrong pass of several kinds
takes the place of one of the clean-ups in turn. For every case the table says what the contract check and the
bisection answered; the script fails if either named the wrong thing.

    python benchmarks/contract.py            # writes benchmarks/results/contract.md
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from planish.codegen import get_target
from planish.ir import clone
from planish.ir.printer import SCOPES_KEY
from planish.passes.infrastructure.base import Pass, PassContext, PassResult
from planish.passes.infrastructure.bisect import BisectResult, bisect
from planish.passes.infrastructure.driver import run_pipeline
from planish.passes.infrastructure.instruments import ContractBrokenError, ContractCheck, VerifyAfterEachPass
from planish.passes.infrastructure.pipeline import Pipeline
from planish.passes.infrastructure.rewriter import Replacement, Rule, apply_rules

LAYERS, HIDDEN, INNER, VOCABULARY = 6, 64, 256, 97

# Clean-ups that each run on a graph that the ones before left clean: exact, and any wrong pass stands out.
CLEAN_UPS = (
    "CommonSubexpressionEliminationPass",
    "IdentityEliminationPass",
    "RemoveUnusedNodesPass",
    "TopologicalSortPass",
    "RemoveUnusedFunctionsPass",
    "LiftConstantsToInitializersPass",
    "RemoveUnusedOpsetsPass",
)
PIPELINE = ("canonicalize", "fuse", *CLEAN_UPS, "quantize{scheme=W8A16,embeddings=false}")


def build_model(seed: int = 0) -> ir.Model:
    """An embedding and pre-norm residual blocks ``x + down(gelu(up(norm(x))))``.

    Token ids [batch, sequence] in, logits [batch, sequence, vocabulary] out.
    """
    rng = np.random.default_rng(seed)
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []

    def weight(name: str, *shape: int, around: float = 0.0) -> ir.Value:
        array = (around + rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        initializers.append(ir.val(name, const_value=ir.tensor(array, name=name)))
        return initializers[-1]

    def op(kind: str, *inputs: ir.Value, name: str, **attributes: object) -> ir.Value:
        node = ir.node(kind, inputs, attributes, name=f"{name}.node", version=23)  # type: ignore[arg-type]
        node.outputs[0].name = name
        node.metadata_props[SCOPES_KEY] = str(["", name.removesuffix(".matmul"), kind.lower()])
        nodes.append(node)
        return node.outputs[0]

    def linear(x: ir.Value, name: str, rows: int, columns: int) -> ir.Value:
        product = op("MatMul", x, weight(f"{name}.weight", rows, columns), name=f"{name}.matmul")
        return op("Add", product, weight(f"{name}.bias", columns), name=name)

    ids = ir.val("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    x = op("Gather", weight("model.embed_tokens.weight", VOCABULARY, HIDDEN), ids, name="model.embed_tokens")
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        scale = weight(f"{layer}.norm.weight", HIDDEN, around=1.0)
        bias = weight(f"{layer}.norm.bias", HIDDEN)
        normed = op("LayerNormalization", x, scale, bias, name=f"{layer}.norm", axis=-1, epsilon=1e-5)
        wide = op("Gelu", linear(normed, f"{layer}.up_proj", HIDDEN, INNER), name=f"{layer}.act")
        x = op("Add", x, linear(wide, f"{layer}.down_proj", INNER, HIDDEN), name=f"{layer}.residual")
    logits = op("MatMul", x, weight("lm_head.weight", HIDDEN, VOCABULARY), name="logits")
    logits.type = ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["batch_size", "sequence_length", VOCABULARY])
    graph = ir.Graph(
        [ids], [logits], nodes=nodes, initializers=initializers, opset_imports={"": 23}, name="net"
    )
    return ir.Model(graph, ir_version=11)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrongPass(Pass):
    """Claims to be exact and is not."""

    name: ClassVar[str] = "wrong"
    layer: str

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Break one layer."""
        del ctx
        self.break_layer(model)
        return PassResult(modified=True)

    def break_layer(self, model: ir.Model) -> None:
        """What each kind of wrong pass does."""
        raise AssertionError(f"{type(self).__name__} breaks nothing")


class WrongScale(WrongPass):
    """Multiplies one weight by 1.01."""

    name = "wrong_scale"

    def break_layer(self, model: ir.Model) -> None:
        """W → 1.01 · W."""
        weight = model.graph.initializers[f"{self.layer}.weight"]
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.01), name=weight.name)


class DroppedBias(WrongPass):
    """Loses the bias of one linear."""

    name = "dropped_bias"

    def break_layer(self, model: ir.Model) -> None:
        """y = x·W + b → y = x·W, whether the bias is an Add or was fused into the linear."""
        bias = model.graph.initializers[f"{self.layer}.bias"]
        for user in tuple(bias.uses()):
            if user.node.op_type == "Add":
                user.node.outputs[0].replace_all_uses_with(user.node.inputs[1 - user.idx])
                model.graph.remove(user.node, safe=True)
            else:
                user.node.replace_input_with(user.idx, None)


class ChangedEpsilon(WrongPass):
    """Normalises with another ε."""

    name = "changed_epsilon"

    def break_layer(self, model: ir.Model) -> None:
        """ε = 1e-5 → 1e-2."""
        (user,) = model.graph.initializers[f"{self.layer}.weight"].uses()
        user.node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-2)


class SwappedWeights(WrongPass):
    """Exchanges the weights of one linear and of its like in the next block."""

    name = "swapped_weights"

    def break_layer(self, model: ir.Model) -> None:
        """W_i ↔ W_{i+1}."""
        block, projection = self.layer.rsplit(".", 1)
        stem, index = block.rsplit(".", 1)
        first = model.graph.initializers[f"{self.layer}.weight"]
        second = model.graph.initializers[f"{stem}.{int(index) + 1}.{projection}.weight"]
        first.const_value, second.const_value = second.const_value, first.const_value


class _LoseGelu(Rule):
    """Takes every GELU for its cheaper approximation by a ReLU, from the first one on."""

    name = "gelu_to_relu"
    roots = ("Gelu",)

    def apply(self, node: ir.Node) -> bool:
        """Gelu(x) → Relu(x)."""
        replacement = Replacement(node)
        return replacement.finish(replacement.op("Relu", node.inputs[0], like=node.outputs[0]))


class WrongRule(WrongPass):
    """Rewrites by a wrong rule, at one layer after the other."""

    name = "wrong_rule"

    def break_layer(self, model: ir.Model) -> None:
        """Gelu(x) → Relu(x)."""
        apply_rules(model, [_LoseGelu()])


WRONG_PASSES: tuple[tuple[type[WrongPass], str], ...] = (
    (WrongScale, "model.layers.3.up_proj"),
    (SwappedWeights, "model.layers.1.down_proj"),
    (DroppedBias, "model.layers.4.down_proj"),
    (ChangedEpsilon, "model.layers.2.norm"),
    (WrongRule, "model.layers.0.act"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One wrong pass at one place, and what was said about it."""

    wrong: WrongPass
    position: int
    pipeline: Pipeline
    caught: ContractBrokenError | None
    found: BisectResult

    @property
    def is_right(self) -> bool:
        """Both named the pass, its place and the layer that it broke."""
        return (
            self.caught is not None
            and self.caught.pass_name == self.wrong.name
            and self.caught.first is not None
            and self.caught.first.layer == self.wrong.layer
            and self.found.position == self.position
            and self.found.violation is not None
            and self.found.violation.first == self.caught.first
        )


def run_case(
    wrong: WrongPass, position: int, model: ir.Model, examples: Sequence[dict[str, np.ndarray]]
) -> Case:
    """Put the wrong pass at ``position`` (from 0) of the pipeline; run contract check and bisection."""
    steps: list[object] = list(PIPELINE)
    steps[position] = wrong
    pipeline = Pipeline.of(steps)
    target = get_target("portable")
    caught = None
    try:
        instruments = [VerifyAfterEachPass(), ContractCheck(examples)]
        run_pipeline(clone(model), pipeline, target=target, examples=examples, instruments=instruments)
    except ContractBrokenError as error:
        caught = error
    found = bisect(model, pipeline, target=target, examples=examples)
    return Case(wrong=wrong, position=position, pipeline=pipeline, caught=caught, found=found)


def is_silent_when_all_is_well(model: ir.Model, examples: Sequence[dict[str, np.ndarray]]) -> bool:
    """The pipeline without a wrong pass raises nothing, and bisect finds nothing."""
    pipeline, target = Pipeline.of(PIPELINE), get_target("portable")
    run_pipeline(
        clone(model), pipeline, target=target, examples=examples, instruments=[ContractCheck(examples)]
    )
    return bisect(model, pipeline, target=target, examples=examples).culprit is None


def make_examples(seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Two batches of token ids."""
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(0, VOCABULARY, shape)} for shape in ((2, 7), (1, 16))]


def table(cases: Sequence[Case], is_silent: bool) -> str:
    """The results as Markdown."""
    lines = [
        "# Contract: are wrong passes caught and found?",
        "",
        f"Model: {LAYERS} residual blocks, {HIDDEN} × {INNER}. Pipeline of {len(PIPELINE)}, one pass of it",
        f"replaced by a wrong one: `{','.join(PIPELINE)}`.",
        "",
        "| wrong pass | at | broken layer | named layer | first difference | bisect found | runs | right |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        first = case.caught.first if case.caught else None
        lines.append(
            f"| {case.wrong.name} | {case.position + 1} | `{case.wrong.layer}` "
            f"| `{first.layer if first else ''}` | `{first.tensor if first else 'not caught'}` "
            f"| {_found_text(case.found)} | {case.found.runs} "
            f"| {'yes' if case.is_right else '**no**'} |"
        )
    right = sum(case.is_right for case in cases)
    lines += [
        "",
        f"{right} of {len(cases)} right. "
        f"Without a wrong pass: {'silent' if is_silent else '**false alarm**'}.",
        "",
        "The error in full, for example:",
        "",
        f"> {cases[0].caught}",
        "",
    ]
    return "\n".join(lines)


def _found_text(found: BisectResult) -> str:
    if found.culprit is None:
        return "nothing"
    text = f"{found.culprit.name}, number {found.position + 1}"
    return f"{text}, rewrite `{found.rewrite.rule}` at `{found.rewrite.node}`" if found.rewrite else text


def main() -> int:
    """Run all cases and write the table; 1 if any was not right."""
    model, examples = build_model(), make_examples()
    positions = (2, 4, 6, 8)
    cases = [
        run_case(kind(layer=layer), position, model, examples)
        for kind, layer in WRONG_PASSES
        for position in positions
    ]
    is_silent = is_silent_when_all_is_well(model, examples)
    text = table(cases, is_silent)
    results = Path(__file__).parent / "results" / "contract.md"
    results.parent.mkdir(exist_ok=True)
    results.write_text(text, encoding="utf-8")
    print(text)
    return 0 if is_silent and all(case.is_right for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
