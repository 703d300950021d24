"""The pass as a whole: its options, its facts, subgraphs, and that a second run finds nothing left to do."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from planish.codegen import get_target
from planish.ir import infer_shapes, verify
from planish.passes.fuse import Fuse
from planish.passes.infrastructure.base import Contract, Fact, PassContext, PassResult

HIDDEN, HEADS = 16, 2


def layer(*, inside_if: bool = False) -> ir.Model:
    """Scaled query, key and value projections, attention, output projection, and a gated MLP."""
    split = f"heads = Constant<value_ints = [0, 0, {HEADS}, {HIDDEN // HEADS}]>()"
    join = f"joined = Constant<value_ints = [0, 0, {HIDDEN}]>()"
    lines = [split, join]
    for role in "qkv":
        projected = f"{role}p = MatMul(x, h__attn__{role}_proj__weight)"
        if role == "q":
            projected += " qs = Mul(qp, scale)"
        source = "qs" if role == "q" else f"{role}p"
        lines.append(f"{projected} {role}r = Reshape({source}, heads)")
        lines.append(f"{role}t = Transpose<perm = [0, 2, 1, 3]>({role}r)")
    lines += [
        "a = Attention<scale = 1.0>(qt, kt, vt) at = Transpose<perm = [0, 2, 1, 3]>(a)",
        "ar = Reshape(at, joined) o = MatMul(ar, h__attn__o_proj__weight) r = Add(x, o)",
        "g = MatMul(r, h__mlp__gate_proj__weight) u = MatMul(r, h__mlp__up_proj__weight)",
        "s = Sigmoid(g) gs = Mul(g, s) d = Mul(gs, u) y = MatMul(d, h__mlp__down_proj__weight)",
    ]
    body, shape = " ".join(lines), f"float[b,s,{HIDDEN}]"
    if inside_if:
        then = f"then_branch = t () => ({shape} y) {{ {body} }}"
        otherwise = f"else_branch = e () => ({shape} n) {{ n = Neg(x) }}"
        text = f"g (bool c, {shape} x) => ({shape} z) {{ z = If (c) <{then}, {otherwise}> }}"
    else:
        text = f"g ({shape} x) => ({shape} y) {{ {body} }}"
    proto = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 23]> {text}')
    rng = np.random.default_rng(0)
    for path, inputs, outputs in (
        *((f"h.attn.{role}_proj", HIDDEN, HIDDEN) for role in "qkvo"),
        *((f"h.mlp.{role}_proj", HIDDEN, 32) for role in ("gate", "up")),
        ("h.mlp.down_proj", 32, HIDDEN),
    ):
        array = (rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)).astype(np.float32)
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(array, f"{path}.weight".replace(".", "__"))
        )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.35, np.float32), "scale"))
    model = ir.from_proto(proto)
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for value in list(model.graph.initializers.values()):
        value.name = value.name.replace("__", ".")
    infer_shapes(model)
    return model


def fuse(model: ir.Model, **options: object) -> PassResult:
    return Fuse(**options).run(model, PassContext(target=get_target("portable")))


def run(model: ir.Model, **extra: np.ndarray) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((2, 5, HIDDEN)).astype(np.float32)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x, **extra})[0]


def ops(graph: ir.Graph) -> list[str]:
    return [node.op_type for node in graph]


FUSED = [
    "MatMul",
    "Split",
    "Attention",
    "MatMul",
    "Add",
    "MatMul",
    "Split",
    "Sigmoid",
    "Mul",
    "Mul",
    "MatMul",
]


def test_a_layer():
    model = layer()
    before = run(model)
    result = fuse(model)
    assert result.modified
    assert result.statistics == {
        "fold-linear-scale": 1,
        "merge-linears": 2,
        "flatten-attention-heads": 1,
        "collapse-reshapes": result.statistics["collapse-reshapes"],
    }
    assert ops(model.graph) == FUSED
    assert {"h.attn.qkv_proj.weight", "h.mlp.gate_up_proj.weight"} <= set(model.graph.initializers)
    verify(model)
    # float32, the query's weight rounded once more by the folded scale.
    np.testing.assert_allclose(run(model), before, rtol=1e-4, atol=1e-5)


def test_a_second_run_finds_nothing():
    model = layer()
    fuse(model)
    again = fuse(model)
    assert not again.modified
    assert again.statistics == {}
    assert ops(model.graph) == FUSED


def test_a_layer_inside_a_subgraph():
    model = layer(inside_if=True)
    before = run(model, c=np.array(True))
    fuse(model)
    assert ops(model.graph[0].attributes["then_branch"].as_graph()) == FUSED
    verify(model)
    np.testing.assert_allclose(run(model, c=np.array(True)), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"merge_linears": False}, {"merge-linears"}),
        ({"attention_layout": False}, {"flatten-attention-heads", "collapse-reshapes"}),
    ],
    ids=("merge_linears", "attention_layout"),
)
def test_options_switch_rewrites_off(options, missing):
    model = layer()
    done = set(fuse(model, **options).statistics)
    assert not done & missing
    assert done | missing == {
        "fold-linear-scale",
        "merge-linears",
        "flatten-attention-heads",
        "collapse-reshapes",
    }


@pytest.mark.parametrize(
    ("ignore", "merged"),
    [
        (("h.mlp",), {"h.attn.qkv_proj.weight"}),
        (("re:.*attn.*",), {"h.mlp.gate_up_proj.weight"}),
        (("h.attn.k_proj",), {"h.attn.qv_proj.weight", "h.mlp.gate_up_proj.weight"}),
        (("h.m",), {"h.attn.qkv_proj.weight", "h.mlp.gate_up_proj.weight"}),
    ],
)
def test_ignored_linears(ignore, merged):
    model = layer()
    before = set(model.graph.initializers)
    fuse(model, ignore=ignore)
    new = {name for name in set(model.graph.initializers) - before if name.endswith(".weight")}
    assert new == merged


def test_facts_and_contract():
    assert Fuse.requires == {Fact.CANONICAL}
    assert Fuse.establishes == {Fact.FUSED}
    assert Fuse.contract is Contract.EXACT
