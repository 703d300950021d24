"""First-order scores against finite differences of a gate, in float64."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from planish.codegen import get_target
from planish.codegen.torch_fx import lower, run
from planish.ir.errors import PassError
from planish.ir.structure import ChannelGroup, Member
from planish.passes.infrastructure.base import PassContext
from planish.passes.prune.taylor import loss, taylor

HIDDEN, INNER, CLASSES = 4, 6, 5
STEP = 1e-5
"""Central differences of this step are exact to its square, 1e-10, and to rounding over it, 1e-11."""


def model(output: str, *, ids: bool = False) -> ir.Model:
    """Embedding or float input, one hidden layer, one output."""
    rng = np.random.default_rng(0)
    weights = [
        ir.val(name, const_value=ir.tensor(rng.standard_normal(shape), name=name))
        for name, shape in {
            "embed.weight": (CLASSES, HIDDEN),
            "up.weight": (HIDDEN, INNER),
            "down.weight": (INNER, CLASSES),
        }.items()
    ]
    embed, up, down = weights
    shape = ["batch", "sequence", HIDDEN] if ids else ["batch", HIDDEN]
    if ids:
        x = ir.val("input_ids", ir.DataType.INT64, shape[:2])
        nodes = [ir.node("Gather", [embed, x])]
        hidden = nodes[0].outputs[0]
    else:
        x = hidden = ir.val("x", ir.DataType.DOUBLE, shape)
        nodes = []
    nodes.append(ir.node("MatMul", [hidden, up]))
    nodes.append(ir.node("Tanh", nodes[-1].outputs))
    nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], down]))
    nodes[-1].outputs[0].name = output
    nodes[-1].outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)
    graph = ir.Graph(
        [x], nodes[-1].outputs, nodes=nodes, initializers=weights[0 if ids else 1 :], opset_imports={"": 23}
    )
    return ir.Model(graph, ir_version=11)


PAIRS = np.arange(INNER).reshape(3, 2)
GROUP = ChannelGroup(
    "mlp",
    "ffn",
    3,
    (Member("up.weight", 1, PAIRS, "producer"), Member("down.weight", 0, PAIRS, "consumer")),
    (),
)


def gate_gradients(graph, feeds, seed):
    """∂L/∂g of a gate on the columns of each structure, by central differences."""
    weight = np.array(graph.graph.initializers["down.weight"].const_value.numpy())
    gradients = []
    for structure in PAIRS:
        values = []
        for step in (STEP, -STEP):
            gated = weight.copy()
            gated[structure] *= 1 + step
            module = lower(graph, dtype=torch.float64, trainable=["down.weight"])
            with torch.no_grad():
                module.get_parameter("down.weight").copy_(torch.from_numpy(gated))
                value = loss(run(module, feeds), feeds, torch.Generator().manual_seed(seed))
            values.append(float(value))
        gradients.append((values[0] - values[1]) / (2 * STEP))
    return np.array(gradients)


def scores(graph, data, seed=0):
    ctx = PassContext(target=get_target("portable"))
    return taylor(graph, [GROUP], data, ctx, seed)["mlp"]


@pytest.mark.parametrize("output", ["logits", "embedding"])
def test_scores_are_squared_gate_gradients(output):
    graph = model(output)
    feeds = {"x": np.random.default_rng(1).standard_normal((7, HIDDEN))}
    np.testing.assert_allclose(scores(graph, [feeds]), gate_gradients(graph, feeds, 0) ** 2, rtol=1e-7)


def test_next_tokens_count_where_there_are_ids():
    graph = model("logits", ids=True)
    ids = np.random.default_rng(2).integers(0, CLASSES, (3, 6))
    np.testing.assert_allclose(
        scores(graph, [{"input_ids": ids}]),
        gate_gradients(graph, {"input_ids": ids}, 0) ** 2,
        rtol=1e-7,
    )
    logits = torch.randn(3, 6, CLASSES, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, CLASSES), torch.from_numpy(ids[:, 1:]).reshape(-1)
    )
    found = loss({"logits": logits}, {"input_ids": ids}, torch.Generator())
    assert found == pytest.approx(float(expected))


def test_classes_are_the_models_own():
    logits = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    found = loss({"logits": logits}, {"x": np.zeros(2)}, torch.Generator())
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
    assert found == pytest.approx(float(expected))


def test_other_outputs_count_with_random_signs_without_caches_and_padding():
    outputs = {
        "embedding": torch.tensor([[[1.0], [10.0], [100.0]]]),
        "present.0.key": torch.full((4,), 1000.0),
        "lengths": torch.tensor([3]),
    }
    feeds = {"input_ids": np.zeros((1, 3), np.int64), "attention_mask": np.array([[1, 1, 0]])}
    found = {float(loss(outputs, feeds, torch.Generator().manual_seed(seed))) for seed in range(40)}
    assert found == {11.0, 9.0, -9.0, -11.0}


def test_batches_are_averaged_after_squaring():
    graph = model("embedding")
    rng = np.random.default_rng(3)
    batches = [{"x": rng.standard_normal((7, HIDDEN))} for _ in range(2)]
    opposite = [batches[0], {"x": -batches[0]["x"]}]
    # Tanh is odd and signs are drawn anew: gradients of opposite batches would cancel if they were added.
    assert (scores(graph, opposite) > 0).all()
    generator = torch.Generator().manual_seed(0)
    total = np.zeros(3)
    module = lower(graph, trainable=["down.weight"])
    weight = module.get_parameter("down.weight")
    for feeds in batches:
        module.zero_grad()
        loss(run(module, feeds), feeds, generator).backward()
        products = (weight * weight.grad).detach().numpy().sum(axis=1)
        total += products[PAIRS].sum(axis=1) ** 2 / 2
    np.testing.assert_allclose(scores(graph, batches), total, rtol=1e-12)


def test_gradients_that_are_not_finite_name_the_group():
    graph = model("embedding")
    with pytest.raises(PassError, match="'mlp'"):
        scores(graph, [{"x": np.full((2, HIDDEN), np.nan)}])
