"""The driver around passes that prune and train: the original, training data, state, several results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from planish.codegen import get_target
from planish.compiler import compile as compile_model
from planish.ir import clone
from planish.ir.errors import PassError
from planish.passes.infrastructure.base import Contract, Pass, PassContext, PassResult
from planish.passes.infrastructure.driver import run_pipeline
from planish.passes.infrastructure.instruments import ContractCheck
from planish.passes.infrastructure.pipeline import Pipeline
from planish.runtime.calibration import CalibrationData
from planish.runtime.work_cache import WorkCache

X = np.array([[1.0, -2.0, 3.0, 0.5]], np.float32)


def make_model() -> ir.Model:
    """y = x·W, and a cache that is handed on."""
    return ir.from_proto(
        onnx.parser.parse_model(
            """<ir_version: 11, opset_import: ["": 23]>
            net (float[batch, 4] x, float[batch, 2, past, 3] past_key_values)
              => (float[batch, 2] y, float[batch, 2, past, 3] present)
            <float[4, 2] W = {1,2,3,4,5,6,7,8}>
            { y = MatMul(x, W)  present = Identity(past_key_values) }"""
        )
    )


def weight(model: ir.Model) -> np.ndarray:
    return model.graph.initializers["W"].const_value.numpy()


def scale(model: ir.Model, factor: float) -> None:
    value = model.graph.initializers["W"]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name="W")


@dataclass(frozen=True, kw_only=True)
class Scaled(Pass):
    """Scales the weight; several factors are several results."""

    name: ClassVar[str] = "scaled"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    factors: tuple[float, ...] = (2.0,)

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        *others, last = self.factors
        alternatives = {}
        for factor in others:
            alternatives[f"{factor:g}"] = clone(model)
            scale(alternatives[f"{factor:g}"], factor)
        scale(model, last)
        return PassResult(modified=True, alternatives=alternatives)


@dataclass(frozen=True, kw_only=True)
class Seen(Pass):
    """Keeps what the context offers."""

    name: ClassVar[str] = "seen"
    uses_original: ClassVar[bool] = True
    contexts: list[Any]

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        self.contexts.append((ctx, weight(ctx.original), ctx.work(model).folder))
        return PassResult(modified=False)


@dataclass(frozen=True, kw_only=True)
class DropCache(Pass):
    """Takes the cache away, as dropping an attention layer does."""

    name: ClassVar[str] = "drop-cache"
    contract: ClassVar[Contract] = Contract.APPROXIMATE

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        graph = model.graph
        node = next(node for node in graph if node.op_type == "Identity")
        graph.outputs[:] = [value for value in graph.outputs if value.name != "present"]
        graph.remove(node, safe=True)
        graph.inputs[:] = [value for value in graph.inputs if value.name == "x"]
        return PassResult(modified=True, redefined_outputs=frozenset({"present"}))


def run(model: ir.Model, *passes: Pass, **arguments: Any):
    return run_pipeline(model, Pipeline(passes), target=get_target("portable"), **arguments)


def test_every_alternative_goes_through_the_rest_of_the_pipeline():
    model = make_model()
    report = run(model, Scaled(factors=(3.0, 5.0, 7.0)), Scaled(factors=(10.0,)))
    np.testing.assert_array_equal(weight(model), weight(make_model()) * 70)
    assert list(report.alternatives) == ["3", "5"]
    for label, expected in (("3", 30), ("5", 50)):
        other = report.alternatives[label]
        np.testing.assert_array_equal(weight(other.model), weight(make_model()) * expected)
        assert [entry.name for entry in other.report.passes] == ["scaled", "scaled"]


def test_alternatives_of_alternatives_branch_again():
    report = run(make_model(), Scaled(factors=(2.0, 3.0)), Scaled(factors=(5.0, 7.0)))
    assert list(report.alternatives) == ["2", "5"]
    inner = report.alternatives["2"]
    np.testing.assert_array_equal(weight(inner.model), weight(make_model()) * 14)
    np.testing.assert_array_equal(weight(inner.report.alternatives["5"].model), weight(make_model()) * 10)


def test_compile_binds_the_alternatives():
    compiled = compile_model(make_model(), [Scaled(factors=(2.0, 3.0))], target="portable")
    feeds = {"x": X, "past_key_values": np.zeros((1, 2, 0, 3), np.float32)}
    dense = X @ weight(make_model())
    np.testing.assert_allclose(compiled.run(feeds)["y"], dense * 3, rtol=1e-6)
    np.testing.assert_allclose(compiled.alternatives["2"].run(feeds)["y"], dense * 2, rtol=1e-6)


def test_the_original_is_from_before_the_first_pass_that_changes_the_function():
    contexts: list[Any] = []
    run(make_model(), Scaled(), Seen(contexts=contexts), Scaled(), Seen(contexts=contexts))
    for _, original, _ in contexts:
        np.testing.assert_array_equal(original, weight(make_model()))


def test_no_original_is_kept_that_no_pass_uses():
    @dataclass(frozen=True, kw_only=True)
    class Asking(Pass):
        name: ClassVar[str] = "asking"

        def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
            assert ctx.original
            return PassResult(modified=False)

    with pytest.raises(PassError, match="'asking': no original was kept"):
        run(make_model(), Asking())


def test_work_is_kept_where_the_user_says_and_else_is_gone(tmp_path):
    contexts: list[Any] = []
    run(make_model(), Seen(contexts=contexts), Seen(contexts=contexts), cache=WorkCache(tmp_path))
    folders = [folder for *_, folder in contexts]
    assert all(folder.parent == tmp_path and folder.name.startswith("seen-") for folder in folders)
    assert len(set(folders)) == 2
    assert all(folder.is_dir() for *_, folder in contexts)
    contexts.clear()
    run(make_model(), Seen(contexts=contexts))
    assert not contexts[0][2].exists()


def test_training_data_falls_back_to_calibration_data():
    model = make_model()
    calibration = CalibrationData([{"x": X, "past_key_values": np.zeros((1, 2, 0, 3), np.float32)}])
    training = CalibrationData([{"x": 2 * X, "past_key_values": np.zeros((1, 2, 0, 3), np.float32)}])
    contexts: list[Any] = []
    run(model, Seen(contexts=contexts), calibration=calibration)
    run(model, Seen(contexts=contexts), calibration=calibration, training=training)
    assert contexts[0][0].training is contexts[0][0].calibration
    np.testing.assert_array_equal(contexts[1][0].training[0]["x"], 2 * X)


def test_later_passes_get_inputs_without_the_cache_that_is_gone():
    contexts: list[Any] = []
    feeds = {"x": X, "past_key_values": np.ones((1, 2, 3, 3), np.float32)}
    data = CalibrationData([feeds])
    run(
        make_model(),
        DropCache(),
        Seen(contexts=contexts),
        examples=(feeds,),
        calibration=data,
        training=data,
        instruments=(ContractCheck((feeds,)),),
    )
    context = contexts[0][0]
    for found in (context.examples[0], context.calibration[0], context.training[0]):
        assert list(found) == ["x"]
