"""Sparse training: exactly the share asked for is zero, the rest recovers, and what is skipped is said."""

from __future__ import annotations

import math

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from planish.codegen import get_target
from planish.codegen.torch_fx import lower, run
from planish.ir import clone, diff_models
from planish.ir.errors import NothingCoveredError, PipelineError
from planish.ir.shapes import infer_shapes
from planish.passes.infrastructure.base import Fact, PassContext
from planish.passes.infrastructure.driver import run_pipeline
from planish.passes.infrastructure.facts import set_facts
from planish.passes.infrastructure.pipeline import Pipeline
from planish.passes.sparsify import Sparsify
from planish.runtime.work_cache import Work

SHAPES = {"a.weight": (8, 24), "a.bias": (24,), "b.weight": (24, 10), "lm_head.weight": (10, 5)}
COVERED = ("a.weight", "b.weight")


def mlp(seed=0) -> ir.Model:
    proto = onnx.parser.parse_model(
        '<ir_version: 11, opset_import: ["": 23]> net (float[n, 8] x) => (float[n, 5] logits)'
        '{ a = MatMul (x, "a.weight") c = Add (a, "a.bias") h = Relu (c)'
        ' b = MatMul (h, "b.weight") t = Tanh (b) logits = MatMul (t, "lm_head.weight") }'
    )
    rng = np.random.default_rng(seed)
    for name, shape in SHAPES.items():
        array = (rng.standard_normal(shape) / math.sqrt(shape[0])).astype(np.float32)
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    model = ir.from_proto(proto)
    infer_shapes(model)
    return model


def feeds(count=12, seed=1):
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((8, 8)).astype(np.float32)} for _ in range(count)]


def arrays(model):
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


def sparsify(model, tmp_path, batches=12, **options):
    folder = tmp_path / "state"
    folder.mkdir(parents=True, exist_ok=True)
    ctx = PassContext(
        target=get_target("portable"),
        training=feeds(batches),
        original=clone(model),
        open_work=lambda _model: Work(folder, keeps=True),
        seed=0,
    )
    result = Sparsify(**{"steps": 20, "learning_rate": 1e-2} | options).run(model, ctx)
    return result, ctx


def divergence(model, original):
    data = feeds(1, seed=7)[0]
    p, q = (run(lower(each), data)["logits"].log_softmax(-1) for each in (original, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


METHODS = ("gradual-magnitude", "ac-dc")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.3, 0.85])
def test_exactly_the_share_is_zero(tmp_path, method, scope, sparsity):
    model = mlp()
    before = clone(model)
    result, ctx = sparsify(model, tmp_path, method=method, scope=scope, sparsity=sparsity)
    counts = {name: int((array == 0).sum()) for name, array in arrays(model).items()}
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    expected = round(sparsity * sum(sizes[name] for name in COVERED))
    if scope == "layer":
        assert {name: counts[name] for name in COVERED} == {
            name: round(sparsity * sizes[name]) for name in COVERED
        }
        expected = sum(counts[name] for name in COVERED)
    assert sum(counts.values()) == expected
    assert counts["lm_head.weight"] == counts["a.bias"] == 0
    changes = diff_models(before, model)
    assert {change.name.removeprefix("weight ") for change in changes.changed_weights} == set(SHAPES)
    assert not changes.interface
    assert not changes.changed_nodes
    assert changes.ops == {}
    assert str(result.coverage) == "2 of 3 weights sparsified; 1 skipped: ignored"
    texts = {remark.subject: remark.text for remark in ctx.remarks}
    total = sum(sizes[name] for name in COVERED)
    assert (
        texts["sparsity"] == f"{expected} of {total} weights are zero: {expected / total:.4f}, unstructured"
    )
    assert texts["lm_head.weight"] == "not pruned: ignored"


@pytest.mark.parametrize("method", METHODS)
def test_two_of_four_holds_along_the_inputs(tmp_path, method):
    model = mlp()
    result, _ = sparsify(model, tmp_path, method=method, pattern="2:4", ignore=())
    for name in COVERED:
        weight = arrays(model)[name]
        np.testing.assert_array_equal((weight.T.reshape(-1, 4) == 0).sum(1), 2)
    assert str(result.coverage) == (
        "2 of 3 weights sparsified; 1 skipped: 10 summed inputs are no multiple of 4"
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_training_recovers_what_pruning_at_once_loses(tmp_path, method):
    original = mlp()
    trained, pruned = clone(original), clone(original)
    sparsify(trained, tmp_path, batches=60, method=method, sparsity=0.8, steps=200)
    both = np.concatenate([np.abs(arrays(original)[name]).ravel() for name in COVERED])
    for name in COVERED:
        array = arrays(original)[name]
        least = np.abs(array) <= np.quantile(both, 0.8)
        pruned.graph.initializers[name].const_value = ir.tensor(np.where(least, 0, array), name=name)
    # A fifth of the weights cannot do all that a random net does, but much more than they do untrained.
    assert divergence(trained, original) < 0.3 * divergence(pruned, original)


def test_targets(tmp_path):
    model = mlp()
    result, _ = sparsify(model, tmp_path, targets=("b",))
    assert not (arrays(model)["a.weight"] == 0).any()
    assert (arrays(model)["b.weight"] == 0).mean() == 0.5
    assert str(result.coverage) == "1 of 3 weights sparsified; 2 skipped: not a target (1), ignored (1)"


def test_an_interrupted_run_goes_on(tmp_path):
    results = []
    for folder in (tmp_path / "one", tmp_path / "two", tmp_path / "two"):
        model = mlp()
        _, ctx = sparsify(model, folder)
        results.append((arrays(model), ctx.remarks[-1].text))
    assert "went on from step 20" in results[2][1]
    for name, array in results[0][0].items():
        np.testing.assert_array_equal(array, results[2][0][name])


def test_nothing_to_prune():
    model = mlp()
    set_facts(model, frozenset({Fact.CANONICAL}))
    pipeline = Pipeline.of([Sparsify(steps=1, ignore=("a", "b", "lm_head"))])
    with pytest.raises(NothingCoveredError, match="covered nothing: 0 of 3 weights sparsified"):
        run_pipeline(model, pipeline, target=get_target("portable"), training=feeds())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity: expected more than 0 and less than 1, found 1.0"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "sparsity: pattern 2:4 is 0.5 by itself, found 0.6"),
        ({"initial_sparsity": 0.6}, "initial_sparsity: expected 0 to the final 0.5, found 0.6"),
        ({"rise": 0.0}, "rise: expected more than 0, and 1 at most, found 0.0"),
        ({"dense": 0.9}, "dense: expected 0 to 0.85: the rest is the final phase, found 0.9"),
        ({"frequency": 0}, "frequency: expected 1 or more, found 0"),
        ({"steps": 0}, "steps: expected 1 or more, found 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(PipelineError, match=f"^sparsify: {message}"):
        Sparsify(**{"steps": 1} | options)
