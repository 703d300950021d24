"""The database: which weights and errors its levels have, and how it is kept."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import onnx_ir as ir
import pytest
from planish.codegen import get_target
from planish.ir import clone
from planish.ir.errors import InputError, PassError
from planish.ir.shapes import infer_shapes
from planish.ir.structure import ChannelGroup, Member, Structure, discover, shrink
from planish.passes.infrastructure.base import PassContext
from planish.passes.prune import database as database_module
from planish.passes.prune.criteria import CRITERIA
from planish.passes.prune.database import build_database
from planish.runtime.reference import run_model

HIDDEN, INNER = 6, 8
FLOAT = 2e-5
"""Relative: refits are stored, and moments collected from inputs, in float32 (2⁻²⁴ times sums of tens)."""


class Builder:
    """Nodes and random weights, by name."""

    def __init__(self, dtype=np.float32) -> None:
        self.dtype = dtype
        self.rng = np.random.default_rng(0)
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []

    def weight(self, name, *shape):
        array = (self.rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(self.dtype)
        self.weights.append(ir.val(name, const_value=ir.tensor(array, name=name)))
        return self.weights[-1]

    def op(self, kind, *inputs, name="", **attributes):
        node = ir.node(kind, inputs, attributes, version=23)
        node.outputs[0].name = name or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def model(self, x, y):
        graph = ir.Graph([x], [y], nodes=self.nodes, initializers=self.weights, opset_imports={"": 23})
        made = ir.Model(graph, ir_version=11)
        infer_shapes(made)
        return made


def mlp(b, x, path, *, bias=True, gemm=False):
    up = b.op("MatMul", x, b.weight(f"{path}.up.weight", HIDDEN, INNER))
    inner = b.op("Tanh", b.op("Add", up, b.weight(f"{path}.up.bias", INNER)), name=f"{path}.inner")
    if gemm:
        weight, own = b.weight(f"{path}.down.weight", HIDDEN, INNER), b.weight(f"{path}.down.bias", HIDDEN)
        down = b.op("Gemm", inner, weight, own, transB=1)
    else:
        down = b.op("MatMul", inner, b.weight(f"{path}.down.weight", INNER, HIDDEN), name=f"{path}.product")
        if bias:
            down = b.op("Add", down, b.weight(f"{path}.down.bias", HIDDEN))
    return b.op("Add", x, down, name=f"{path}.out")


def two_mlps(dtype=np.float32, **options):
    b = Builder(dtype)
    x = ir.val("x", ir.DataType.from_numpy(np.dtype(dtype)), ["rows", HIDDEN])
    y = mlp(b, mlp(b, x, "layers.0.mlp", **options), "layers.1.mlp")
    return b.model(x, y)


def convolutional():
    b = Builder()
    x = ir.val("x", ir.DataType.FLOAT, ["batch", 2, 6, 6])
    y = b.op("Conv", x, b.weight("first.weight", 5, 2, 3, 3), name="first", pads=[1, 1, 1, 1])
    y = b.op("Relu", y, name="inner")
    y = b.op(
        "Conv", y, b.weight("second.weight", 3, 5, 3, 3), b.weight("second.bias", 3), name="y", strides=[2, 2]
    )
    return b.model(x, y)


def data(shape=(40, HIDDEN), batches=3):
    rng = np.random.default_rng(7)
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(batches)]


def build(model, folder, *, levels=None, criterion="obs", damp=0.0, calibration=None, seed=0):
    structure = discover(model)
    groups = {group.name: [*range(group.structures, -1, -1)] for group in structure.groups}
    ctx = PassContext(
        target=get_target("portable"), calibration=data() if calibration is None else calibration, seed=seed
    )
    made = build_database(
        model, structure, levels or groups, criterion=criterion, damp=damp, ctx=ctx, folder=folder
    )
    return made, structure, ctx


def values(model, name, calibration):
    """A value of the model on all the data, one row per token."""
    cut = clone(model)
    node = next(node for node in cut.graph if node.outputs[0].name == name)
    cut.graph.outputs[:] = [node.outputs[0]]
    return np.concatenate([run_model(cut, feeds)[name] for feeds in calibration]).astype(np.float64)


def array(model, name):
    return model.graph.initializers[name].const_value.numpy().astype(np.float64)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"gemm": True}], ids=["bias", "no bias", "gemm"])
def test_a_level_is_the_least_squares_refit_of_the_dense_output(options, tmp_path):
    model = two_mlps(**options)
    made, structure, _ = build(model, tmp_path)
    group = structure.group("layers.0.mlp")
    inner = values(model, "layers.0.mlp.inner", data())
    weight = array(model, "layers.0.mlp.down.weight")
    weight = weight.T if "gemm" in options else weight
    bias = None if options == {"bias": False} else array(model, "layers.0.mlp.down.bias")
    y = inner @ weight + (0 if bias is None else bias)
    for level in made.levels(group.name)[1:-1]:
        rows = inner[:, level.keep]
        rows = rows if bias is None else np.column_stack([rows, np.ones(len(rows))])
        solution = np.linalg.lstsq(rows, y)[0]
        choice = made.choice(group, level.kept)
        np.testing.assert_array_equal(choice.keep, level.keep)
        refit = choice.weights["layers.0.mlp.down.weight"]
        assert refit.dtype == np.float32
        refit = refit.T if "gemm" in options else refit
        np.testing.assert_allclose(refit[level.keep], solution[: level.kept], rtol=0, atol=20 * FLOAT)
        if bias is not None:
            found = choice.weights["layers.0.mlp.down.bias"]
            np.testing.assert_allclose(found, solution[-1], rtol=0, atol=20 * FLOAT)
        error = np.square(rows @ solution - y).sum() / np.square(y).sum()
        assert level.error == pytest.approx(error, rel=1e-3, abs=FLOAT)


def test_a_channel_of_a_convolution_is_refitted_with_its_kernel(tmp_path):
    model, calibration = convolutional(), data((4, 2, 6, 6))
    made, structure, _ = build(model, tmp_path, calibration=calibration)
    (group,) = structure.groups
    y = values(model, "y", calibration)
    inner = values(model, "inner", calibration)
    windows = np.lib.stride_tricks.sliding_window_view(inner, (3, 3), axis=(2, 3))[:, :, ::2, ::2]
    outputs = np.moveaxis(y, 1, -1).reshape(-1, 3)
    for level in made.levels(group.name)[1:-1]:
        shrunk = clone(model)
        shrink(shrunk, [made.choice(group, level.kept)])
        assert tuple(shrunk.graph.initializers["second.weight"].shape) == (3, level.kept, 3, 3)
        found = np.concatenate([run_model(shrunk, feeds)["y"] for feeds in calibration])
        error = np.square(found - y).sum() / np.square(y).sum()
        assert level.error == pytest.approx(error, rel=1e-3, abs=FLOAT)
        patches = np.moveaxis(windows[:, level.keep], 1, 3).reshape(len(outputs), -1)
        rows = np.column_stack([patches, np.ones(len(patches))])
        least = np.square(rows @ np.linalg.lstsq(rows, outputs)[0] - outputs).sum() / np.square(y).sum()
        assert level.error == pytest.approx(least, rel=1e-3, abs=FLOAT)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_errors_are_those_of_the_shrunk_layer(criterion, tmp_path):
    model = two_mlps()
    made, structure, _ = build(model, tmp_path, criterion=criterion)
    group = structure.group("layers.0.mlp")
    x = np.concatenate([feeds["x"] for feeds in data()])
    y = values(model, "layers.0.mlp.out", data()) - x
    for level in made.levels(group.name)[:-1]:
        shrunk = clone(model)
        shrink(shrunk, [made.choice(group, level.kept)])
        found = values(shrunk, "layers.0.mlp.out", data()) - x
        error = np.square(found - y).sum() / np.square(y).sum()
        assert level.error == pytest.approx(error, rel=1e-3, abs=FLOAT)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_dense_level_changes_no_bit_and_nothing_left_scores_one(criterion, tmp_path):
    model = two_mlps()
    made, structure, _ = build(model, tmp_path, criterion=criterion)
    for group in structure.groups:
        dense, *_, nothing = made.levels(group.name)
        assert (dense.kept, dense.error) == (INNER, 0.0)
        assert (nothing.kept, nothing.error, len(nothing.keep)) == (0, 1.0, 0)
    choices = [made.choice(group, INNER) for group in structure.groups]
    shrunk = clone(model)
    shrink(shrunk, choices)
    for name, value in model.graph.initializers.items():
        np.testing.assert_array_equal(
            shrunk.graph.initializers[name].const_value.numpy(), value.const_value.numpy()
        )


def test_obs_errs_least(tmp_path):
    model = two_mlps()
    errors = {
        criterion: [
            level.error
            for level in build(model, tmp_path / criterion, criterion=criterion)[0].levels("layers.1.mlp")
        ]
        for criterion in CRITERIA
    }
    for criterion in CRITERIA:
        assert all(
            ours <= theirs + FLOAT for ours, theirs in zip(errors["obs"], errors[criterion], strict=True)
        )
    assert all(a <= b for a, b in itertools.pairwise(errors["obs"]))


def test_baselines_follow_their_scores(tmp_path):
    model = two_mlps()
    inner = values(model, "layers.0.mlp.inner", data())
    weights = [array(model, f"layers.0.mlp.{name}.weight") for name in ("up", "down")]
    norms = [np.square(weights[0]).sum(axis=0), np.square(weights[1]).sum(axis=1)]
    expected = {
        "magnitude": sum(norm / norm.mean() for norm in norms),
        "wanda": norms[1] * np.square(inner).mean(axis=0),
    }
    for criterion, scores in expected.items():
        made, _, _ = build(model, tmp_path / criterion, criterion=criterion)
        for level in made.levels("layers.0.mlp"):
            stays = np.argsort(scores)[INNER - level.kept :]
            np.testing.assert_array_equal(level.keep, np.sort(stays))


def test_random_depends_on_the_seed_and_on_the_group(tmp_path):
    model = two_mlps()

    def order(seed, group):
        made, _, _ = build(model, tmp_path, criterion="random", seed=seed)
        return [level.keep.tolist() for level in made.levels(group)]

    assert order(0, "layers.0.mlp") == order(0, "layers.0.mlp")
    assert order(0, "layers.0.mlp") != order(1, "layers.0.mlp")
    assert order(0, "layers.0.mlp") != order(0, "layers.1.mlp")


def test_an_interrupted_build_goes_on_where_it_was(tmp_path, monkeypatch):
    model, built = two_mlps(), []
    real = database_module.prune_group

    def prune_group(damp, work):
        if work.name == "layers.1.mlp" and "stop" in flags:
            raise KeyboardInterrupt
        built.append(work.name)
        return real(damp, work)

    monkeypatch.setattr(database_module, "prune_group", prune_group)
    flags = {"stop"}
    with pytest.raises(KeyboardInterrupt):
        build(model, tmp_path)
    assert built == ["layers.0.mlp"]
    flags.clear()
    resumed, structure, _ = build(model, tmp_path)
    assert built == ["layers.0.mlp", "layers.1.mlp"]
    whole, _, _ = build(model, tmp_path / "other")
    for group in structure.groups:
        for ours, theirs in zip(resumed.levels(group.name), whole.levels(group.name), strict=True):
            assert ours.error == theirs.error
            np.testing.assert_array_equal(ours.keep, theirs.keep)
        for name, expected in whole.choice(group, 3).weights.items():
            np.testing.assert_array_equal(resumed.choice(group, 3).weights[name], expected)
    assert resumed.key == whole.key
    assert sorted(file.suffix for file in tmp_path.iterdir() if file.is_file()) == [".safetensors"] * 2


@pytest.mark.parametrize("change", ["weights", "data", "damp", "criterion", "levels", "nothing"])
def test_what_was_computed_from_something_else_is_computed_again(change, tmp_path, monkeypatch):
    model = two_mlps()
    first, structure, _ = build(model, tmp_path)
    built = []
    real = database_module.prune_group

    def prune_group(damp, work):
        built.append(work.name)
        return real(damp, work)

    monkeypatch.setattr(database_module, "prune_group", prune_group)
    options = {}
    if change == "weights":
        value = model.graph.initializers["layers.1.mlp.up.bias"]
        value.const_value = ir.tensor(value.const_value.numpy() + 1, name=value.name)
    elif change == "data":
        options = {"calibration": data()[:2]}
    elif change == "damp":
        options = {"damp": 1e-3}
    elif change == "criterion":
        options = {"criterion": "wanda"}
    elif change == "levels":
        options = {"levels": {group.name: [INNER, 4] for group in structure.groups}}
    second, _, _ = build(model, tmp_path, **options)
    assert sorted(built) == ([] if change == "nothing" else ["layers.0.mlp", "layers.1.mlp"])
    assert (first.key == second.key) == (change == "nothing")


def test_a_weight_that_is_no_number_is_named(tmp_path):
    model = two_mlps()
    value = model.graph.initializers["layers.1.mlp.down.weight"]
    broken = value.const_value.numpy().copy()
    broken[2, 3] = np.nan
    value.const_value = ir.tensor(broken, name=value.name)
    with pytest.raises(PassError, match=r"'layers.1.mlp.down.weight' holds nan at index \[2, 3\]"):
        build(model, tmp_path)
    assert (tmp_path / "layers.0.mlp.safetensors").exists()


def test_inputs_that_are_not_finite_are_named(tmp_path):
    model = two_mlps()
    value = model.graph.initializers["layers.1.mlp.up.weight"]
    value.const_value = ir.tensor(np.full((HIDDEN, INNER), np.nan, np.float32), name=value.name)
    with pytest.raises(PassError, match=r"'layers\.1\.mlp\.inner'"):
        build(model, tmp_path)


def test_without_calibration_data_there_is_no_database(tmp_path):
    with pytest.raises(InputError, match="calibration"):
        build(two_mlps(), tmp_path, calibration=())


def test_more_damping_than_asked_for_is_remarked_also_when_it_is_read_again(tmp_path):
    model = two_mlps()
    value = model.graph.initializers["layers.0.mlp.up.weight"]
    equal = np.repeat(value.const_value.numpy()[:, :1], INNER, axis=1)
    value.const_value = ir.tensor(equal, name=value.name)
    bias = model.graph.initializers["layers.0.mlp.up.bias"]
    bias.const_value = ir.tensor(np.zeros(INNER, np.float32), name=bias.name)
    for _ in range(2):
        _, _, ctx = build(model, tmp_path)
        (remark,) = ctx.remarks
        assert remark.subject == "layers.0.mlp"
        assert "cannot be inverted with damp=0" in remark.text


def concatenated():
    """Two groups of channels beside each other in what one linear reads."""
    b = Builder()
    x = ir.val("x", ir.DataType.FLOAT, ["rows", HIDDEN])
    left = b.op("Tanh", b.op("MatMul", x, b.weight("left.weight", HIDDEN, 4)), name="left_out")
    right = b.op("Tanh", b.op("MatMul", x, b.weight("right.weight", HIDDEN, 3)), name="right_out")
    both = b.op("Concat", left, right, axis=-1, name="both")
    product = b.op("MatMul", both, b.weight("down.weight", 7, 5))
    return b.model(x, b.op("Add", product, b.weight("down.bias", 5), name="y"))


def test_of_a_consumer_that_reads_other_groups_too_only_the_own_columns_change(tmp_path):
    model = concatenated()
    dense = array(model, "down.weight")
    own = {"left": np.arange(4), "right": np.arange(4, 7)}
    groups = tuple(
        ChannelGroup(
            name,
            "ffn",
            len(columns),
            (
                Member(f"{name}.weight", 1, np.arange(len(columns))[:, None], "producer"),
                Member("down.weight", 0, columns[:, None], "consumer"),
            ),
            (),
        )
        for name, columns in own.items()
    )
    structure = Structure(groups, (), (), discover(model).graph)
    ctx = PassContext(target=get_target("portable"), calibration=data())
    levels = {group.name: [group.structures, 2] for group in groups}
    made = build_database(model, structure, levels, criterion="obs", damp=0.0, ctx=ctx, folder=tmp_path)
    rows = values(model, "both", data())
    for group in groups:
        columns = own[group.name]
        choice = made.choice(group, 2)
        assert set(choice.weights) == {"down.weight"}
        others = np.setdiff1d(np.arange(7), columns)
        np.testing.assert_array_equal(choice.weights["down.weight"][others], dense[others].astype(np.float32))
        kept = columns[choice.keep]
        solution = np.linalg.lstsq(rows[:, kept], rows[:, columns] @ dense[columns])[0]
        np.testing.assert_allclose(choice.weights["down.weight"][kept], solution, rtol=0, atol=20 * FLOAT)
    shrunk = clone(model)
    choices = [made.choice(group, 2) for group in groups]
    shrink(shrunk, choices)
    parts = [
        rows[:, own[choice.group.name][choice.keep]]
        @ choice.weights["down.weight"][own[choice.group.name][choice.keep]]
        for choice in choices
    ]
    found = np.concatenate([run_model(shrunk, feeds)["y"] for feeds in data()])
    np.testing.assert_allclose(found, sum(parts) + array(model, "down.bias"), atol=20 * FLOAT)


def test_a_group_whose_readers_cannot_be_observed_goes_by_magnitude_with_a_remark(tmp_path):
    model = two_mlps()
    (group, *_) = discover(model).groups
    alone = dataclasses.replace(group, members=group.producers)
    structure = Structure((alone,), (), (), discover(model).graph)
    ctx = PassContext(target=get_target("portable"), calibration=data())
    made = build_database(
        model,
        structure,
        {alone.name: [INNER, 4, 0]},
        criterion="obs",
        damp=0.0,
        ctx=ctx,
        folder=tmp_path,
    )
    norms = np.square(array(model, "layers.0.mlp.up.weight")).sum(axis=0)
    dense, half, _ = made.levels(alone.name)
    np.testing.assert_array_equal(half.keep, np.sort(np.argsort(norms)[4:]))
    assert dense.error == 0
    assert half.error == pytest.approx(np.sort(norms)[:4].sum() / norms.sum())
    assert "magnitude decides" in ctx.remarks[0].text
    assert not made.choice(alone, 4).weights


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_weights_keep_their_type(dtype, tmp_path):
    model = two_mlps(dtype)
    calibration = [{"x": feeds["x"].astype(dtype)} for feeds in data()]
    made, structure, _ = build(model, tmp_path, calibration=calibration)
    for group in structure.groups:
        for array in made.choice(group, 3).weights.values():
            assert array.dtype == dtype


def test_several_consumers_also_with_another_groups_between_them(tmp_path):
    """The channels of the residual stream are read before and after the inner channels of the first MLP."""
    model = two_mlps()
    (inner, _) = discover(model).groups
    consumers = ["layers.0.mlp.up.weight", "layers.1.mlp.up.weight"]
    each = np.arange(HIDDEN)[:, None]
    stream = ChannelGroup(
        "stream", "hidden", HIDDEN, tuple(Member(name, 0, each, "consumer") for name in consumers), ()
    )
    structure = Structure((stream, inner), (), (), discover(model).graph)
    ctx = PassContext(target=get_target("portable"), calibration=data())
    levels = {stream.name: [*range(HIDDEN, 0, -1)], inner.name: [INNER, 4]}
    made = build_database(model, structure, levels, criterion="obs", damp=0.0, ctx=ctx, folder=tmp_path)
    x = [np.concatenate([feeds["x"] for feeds in data()]).astype(np.float64)]
    x.append(values(model, "layers.0.mlp.out", data()))
    for level in made.levels(stream.name)[1:]:
        errors = []
        choice = made.choice(stream, level.kept)
        for index, (name, rows) in enumerate(zip(consumers, x, strict=True)):
            bias = array(model, f"layers.{index}.mlp.up.bias")
            y = rows @ array(model, name) + bias
            found = rows[:, level.keep] @ choice.weights[name][level.keep]
            found += choice.weights[f"layers.{index}.mlp.up.bias"]
            errors.append(np.square(found - y).sum() / np.square(y).sum())
        assert level.error == pytest.approx(np.mean(errors), rel=1e-3, abs=FLOAT)
    alone, _, _ = build(model, tmp_path / "alone", levels={inner.name: [INNER, 4]})
    np.testing.assert_array_equal(made.levels(inner.name)[1].keep, alone.levels(inner.name)[1].keep)


def test_consumers_of_one_value_share_its_moments(tmp_path, monkeypatch):
    b = Builder()
    x = ir.val("x", ir.DataType.FLOAT, ["rows", HIDDEN])
    inner = b.op("Tanh", b.op("MatMul", x, b.weight("up.weight", HIDDEN, INNER)), name="inner")
    parts = [b.op("MatMul", inner, b.weight(f"{name}.weight", INNER, 3)) for name in "qk"]
    model = b.model(x, b.op("Mul", *parts, name="y"))
    made_for = []

    class Moments(database_module.Moments):
        def __init__(self, consumer, *arguments):
            made_for.append(consumer.name)
            super().__init__(consumer, *arguments)

    monkeypatch.setattr(database_module, "Moments", Moments)
    made, structure, _ = build(model, tmp_path)
    assert len(made_for) == 1
    (group,) = structure.groups
    rows = values(model, "inner", data())
    for level in made.levels(group.name)[1:-1]:
        for name, weight in made.choice(group, level.kept).weights.items():
            solution = np.linalg.lstsq(rows[:, level.keep], rows @ array(model, name))[0]
            np.testing.assert_allclose(weight[level.keep], solution, rtol=0, atol=20 * FLOAT)


def test_levels_that_there_are_not(tmp_path):
    model = two_mlps()
    made, structure, _ = build(model, tmp_path, levels={"layers.0.mlp": [INNER, 4]})
    with pytest.raises(KeyError):
        made.choice(structure.group("layers.0.mlp"), 5)
