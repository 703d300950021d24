"""Which layers count as a group's consumers, and the moments of what they read."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from planish.ir.errors import PassError
from planish.ir.shapes import infer_shapes
from planish.ir.structure import ChannelGroup, Member
from planish.passes.prune import consumers as consumers_module
from planish.passes.prune.consumers import Moments, find_consumers, observed
from planish.runtime.calibration import ActivationStream, Tap

RNG = np.random.default_rng(0)


def weight(name, *shape):
    return ir.val(name, const_value=ir.tensor(RNG.standard_normal(shape).astype(np.float32), name=name))


def model(nodes, weights, x, y):
    graph = ir.Graph([x], [y], nodes=nodes, initializers=weights, opset_imports={"": 23})
    made = ir.Model(graph, ir_version=11)
    infer_shapes(made)
    return made


def group(*members):
    return ChannelGroup("group", "ffn", len(members[0].indices), members, ())


def consumer(tensor, axis, structures, width=1):
    return Member(tensor, axis, np.arange(structures * width).reshape(structures, width), "consumer")


def matmul(*, bias_readers=1, readers=1):
    """x [rows, 4] through one weight [4, 3], which may have several readers, and their bias."""
    x = ir.val("x", ir.DataType.FLOAT, ["rows", 4])
    w, b = weight("down.weight", 4, 3), weight("down.bias", 3)
    nodes, outputs = [], []
    for index in range(readers):
        nodes.append(ir.node("Tanh", [x]))
        nodes[-1].outputs[0].name = f"in_{index}"
        nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], w]))
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], b]))
        outputs.append(nodes[-1].outputs[0])
    for _ in range(bias_readers - readers):
        nodes.append(ir.node("Add", [outputs[-1], b]))
        outputs.append(nodes[-1].outputs[0])
    nodes.append(ir.node("Sum", outputs))
    return model(nodes, [w, b], x, nodes[-1].outputs[0])


def convolution(groups=1, **attributes):
    x = ir.val("x", ir.DataType.FLOAT, ["batch", 4, 7, 7])
    w = weight("conv.weight", 4, 4 // groups, 3, 2)
    node = ir.node("Conv", [x, w], {"group": groups, **attributes})
    return model([node], [w], x, node.outputs[0])


def test_a_linear_is_found_with_its_own_bias():
    (found,), remarks = find_consumers(matmul(), group(consumer("down.weight", 0, 4)))
    assert (found.name, found.bias, found.inputs) == ("down.weight", "down.bias", ("in_0",))
    assert not remarks
    stored = RNG.standard_normal((4, 3))
    matrix = found.matrix(stored)
    assert matrix.shape == (3, 4)
    np.testing.assert_array_equal(found.columns, np.arange(4)[:, None])


def test_a_bias_that_others_add_too_is_not_refitted():
    (found,), _ = find_consumers(matmul(bias_readers=2), group(consumer("down.weight", 0, 4)))
    assert found.bias is None


def test_a_bias_is_not_refitted_where_other_groups_are_read_too():
    (found,), _ = find_consumers(matmul(), group(consumer("down.weight", 0, 3)))
    assert found.bias is None


def test_a_shared_weight_sees_the_inputs_of_all_its_readers():
    shared = matmul(readers=2, bias_readers=2)
    (found,), _ = find_consumers(shared, group(consumer("down.weight", 0, 4)))
    assert found.inputs == ("in_0", "in_1")
    assert found.bias is None
    batches = [{"x": RNG.standard_normal((5, 4)).astype(np.float32)} for _ in range(2)]
    stream = ActivationStream(shared, batches)
    moments = Moments(found, len(stream), 0)
    for value in found.inputs:
        for tap in stream.advance([value]):
            moments.update(tap, value)
    mean, _ = moments.finished()
    expected = np.tanh(np.concatenate([feeds["x"] for feeds in batches])).mean(axis=0)
    np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_channels_of_a_convolution_have_a_column_for_each_position_of_the_kernel():
    (found,), _ = find_consumers(convolution(), group(consumer("conv.weight", 1, 2, 2)))
    np.testing.assert_array_equal(found.columns, np.arange(24).reshape(2, 12))


@pytest.mark.parametrize(
    ("made", "member", "reason"),
    [
        (convolution(groups=2), consumer("conv.weight", 1, 2), "grouped"),
        (convolution(auto_pad="SAME_UPPER"), consumer("conv.weight", 1, 4), "padding"),
        (matmul(), consumer("down.weight", 1, 3), "different ways"),
        (matmul(), consumer("down.bias", 0, 3), "something else"),
    ],
    ids=["grouped", "unknown padding", "other axis", "no linear"],
)
def test_what_cannot_be_observed_is_said(made, member, reason):
    found, (remark,) = find_consumers(made, group(member))
    assert not found
    assert remark.startswith(f"{member.tensor} is not looked at: ")
    assert reason in remark


def moments_of(rows, *, mask=None, samples=2):
    made = matmul()
    (found,), _ = find_consumers(made, group(consumer("down.weight", 0, 4)))
    moments = Moments(found, samples, 0)
    for part in np.array_split(rows, samples):
        feeds = {} if mask is None else {"attention_mask": mask}
        moments.update(Tap(feeds, {"in_0": part}), "in_0")
    return moments


def test_moments_are_those_of_the_rows_also_far_from_zero():
    offset = np.array([0.0, 1e4, -300.0, 5.0])
    rows = (RNG.standard_normal((400, 4)) + offset).astype(np.float32)
    mean, covariance = moments_of(rows).finished()
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-6, atol=1e-6)
    # In float32 the second moment of 1e4 is known to 10: only shifted rows keep a variance of 1.
    np.testing.assert_allclose(covariance, np.cov(exact.T, bias=True), rtol=1e-4, atol=1e-4)


def test_padding_does_not_count():
    rows = RNG.standard_normal((2, 3, 4)).astype(np.float32)
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    mean, _ = moments_of(rows, mask=mask, samples=1).finished()
    np.testing.assert_allclose(mean, rows[mask.astype(bool)].mean(axis=0), rtol=1e-5, atol=1e-6)


def test_only_padding_is_an_error():
    moments = moments_of(np.zeros((1, 3, 4), np.float32), mask=np.zeros((1, 3)), samples=1)
    with pytest.raises(PassError, match="no row of 'in_0'"):
        moments.finished()


def test_of_many_patches_some_are_drawn_the_same_ones_for_the_same_seed(monkeypatch):
    monkeypatch.setattr(consumers_module, "_MOST_PATCHES", 20)
    (found,), _ = find_consumers(convolution(), group(consumer("conv.weight", 1, 4)))
    images = RNG.standard_normal((2, 4, 7, 7)).astype(np.float32)

    def covariance(seed):
        moments = Moments(found, 2, seed)
        moments.update(Tap({}, {"x": images}), "x")
        return moments.finished()[1]

    # 10 of the 60 patches: their covariance about the mean has one rank less.
    assert np.linalg.matrix_rank(covariance(0), tol=1e-4) == 9
    np.testing.assert_array_equal(covariance(0), covariance(0))
    assert not np.array_equal(covariance(0), covariance(1))


def test_energy_is_that_of_the_output_with_its_bias():
    made = matmul()
    (found,), _ = find_consumers(made, group(consumer("down.weight", 0, 4)))
    rows = (RNG.standard_normal((50, 4)) + 2).astype(np.float32)
    layer = observed(made, found, moments_of(rows).finished())
    w, b = (made.graph.initializers[name].const_value.numpy() for name in ("down.weight", "down.bias"))
    y = rows.astype(np.float64) @ w + b
    assert layer.energy == pytest.approx(np.square(y).sum(axis=1).mean(), rel=1e-5)
