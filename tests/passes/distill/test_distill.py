"""Distillation: a damaged decoder recovers, only what was asked for changes, and harm is never silent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from planish.codegen import get_target
from planish.codegen.torch_fx import lower, run
from planish.ir import clone, diff_models
from planish.ir.errors import InputError, NothingCoveredError, PipelineError
from planish.ir.shapes import infer_shapes
from planish.passes.distill import Distill
from planish.passes.infrastructure.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.infrastructure.driver import run_pipeline
from planish.passes.infrastructure.facts import set_facts
from planish.passes.infrastructure.pipeline import Pipeline
from planish.runtime.work_cache import Work

VOCABULARY, WIDTH, HIDDEN, LAYERS = 12, 8, 16, 2

LAYER = """
    n{i} = RMSNormalization <axis = -1> (x{i}, "{i}.norm.weight")
    q{i} = MatMul (n{i}, "{i}.q.weight") k{i} = MatMul (n{i}, "{i}.k.weight")
    v{i} = MatMul (n{i}, "{i}.v.weight")
    a{i}, "present.{i}.key", "present.{i}.value" =
      Attention <is_causal = 1, q_num_heads = 2, kv_num_heads = 2>
      (q{i}, k{i}, v{i}, , "past_key_values.{i}.key", "past_key_values.{i}.value")
    o{i} = MatMul (a{i}, "{i}.o.weight") y{i} = Add (x{i}, o{i})
    u{i} = MatMul (y{i}, "{i}.up.weight") r{i} = Relu (u{i}) d{i} = MatMul (r{i}, "{i}.down.weight")
    x{next} = Add (y{i}, d{i})"""


def decoder(layers: int = LAYERS, seed: int = 0) -> ir.Model:
    caches = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    inputs = ", ".join(f'float[b, 2, p, 4] "past_key_values.{cache}"' for cache in caches)
    outputs = ", ".join(f'float[b, 2, t, 4] "present.{cache}"' for cache in caches)
    body = "".join(LAYER.format(i=i, next=i + 1) for i in range(layers))
    proto = onnx.parser.parse_model(
        f"""<ir_version: 11, opset_import: ["": 23]>
        net (int64[b, s] input_ids, int64[b, s] attention_mask, {inputs})
          => (float[b, s, {VOCABULARY}] logits, {outputs})
        {{ x0 = Gather ("embed.weight", input_ids) {body} logits = MatMul (x{layers}, "lm_head.weight") }}"""
    )
    shapes = {"embed.weight": (VOCABULARY, WIDTH), "lm_head.weight": (WIDTH, VOCABULARY)}
    for i in range(layers):
        shapes |= {f"{i}.{name}.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{i}.norm.weight": (WIDTH,), f"{i}.up.weight": (WIDTH, HIDDEN)}
        shapes |= {f"{i}.down.weight": (HIDDEN, WIDTH)}
    for number, (name, shape) in enumerate(shapes.items()):
        rng = np.random.default_rng([seed, number])
        array = np.ones(shape) if "norm" in name else rng.standard_normal(shape) / math.sqrt(shape[0])
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array.astype(np.float32), name=name)))
    model = ir.from_proto(proto)
    infer_shapes(model)
    return model


def feeds(batches: int = 4, layers: int = LAYERS, padding: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    """Random tokens; the last ones are padding."""
    rng = np.random.default_rng(seed)
    caches = [f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    found = []
    for _ in range(batches):
        mask = np.ones((4, 8), np.int64)
        mask[:, 8 - padding :] = 0
        ids = rng.integers(0, VOCABULARY, (4, 8))
        empty = {name: np.zeros((4, 2, 0, 4), np.float32) for name in caches}
        found.append({"input_ids": ids, "attention_mask": mask, **empty})
    return found


def arrays(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


def replace(model: ir.Model, name: str, array: np.ndarray) -> None:
    model.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)


def damaged(model: ir.Model) -> ir.Model:
    """Half of each MLP's hidden channels are zero."""
    student = clone(model)
    for i in range(LAYERS):
        name = f"{i}.down.weight"
        if name in student.graph.initializers:
            replace(student, name, np.where(np.arange(HIDDEN)[:, None] % 2, arrays(model)[name], 0))
    return student


def distill(student, original, tmp_path, data=None, **options):
    folder = tmp_path / "state"
    folder.mkdir(parents=True, exist_ok=True)
    ctx = PassContext(
        target=get_target("portable"),
        training=feeds() if data is None else data,
        original=original,
        open_work=lambda _model: Work(folder, keeps=True),
        seed=0,
    )
    result = Distill(**{"steps": 5, "learning_rate": 3e-3} | options).run(student, ctx)
    return result, ctx


def remarks(ctx, subject):
    return [remark.text for remark in ctx.remarks if remark.subject == subject]


def test_only_trained_weights_change(tmp_path):
    original = decoder()
    before = damaged(original)
    after = clone(before)
    result, ctx = distill(after, original, tmp_path, ignore=("lm_head", "0.q"))
    assert result.modified
    changed = {change.name.removeprefix("weight ") for change in diff_models(before, after).changed_weights}
    kept = {"embed.weight", "lm_head.weight", "0.q.weight"}
    assert changed == set(before.graph.initializers) - kept
    assert diff_models(original, damaged(original)).changed_weights  # the original is as it was
    for name, array in arrays(original).items():
        np.testing.assert_array_equal(array, arrays(decoder())[name])
    assert str(result.coverage) == (
        f"{len(changed)} of {len(changed) + 3} weights trained; 3 skipped: embedding (1), ignored (2)"
    )
    assert remarks(ctx, "embed.weight") == ["not trained: embedding"]
    (text,) = remarks(ctx, "training")
    assert text.startswith("held-out loss ")
    assert text.endswith(" after; 4 hidden states compared")


def test_targets_and_embeddings(tmp_path):
    original = decoder()
    before = damaged(original)
    after = clone(before)
    distill(after, original, tmp_path, targets=("re:0", "embed"), embeddings=True)
    changed = {change.name.removeprefix("weight ") for change in diff_models(before, after).changed_weights}
    assert changed == {name for name in before.graph.initializers if name.startswith("0.")} | {"embed.weight"}


@pytest.mark.parametrize(
    "losses",
    [
        {"squarehead": 0.0},
        {"logits": 0.0, "squarehead": 0.0, "hidden": 1.0},
        {"logits": 0.0},
        {"logits": 1.0, "temperature": 2.0, "hidden": 0.1},
    ],
    ids=["logits", "hidden", "squarehead", "mixed"],
)
def test_a_damaged_decoder_recovers(tmp_path, losses):
    original = decoder()
    student = damaged(original)
    unseen = feeds(1, seed=9)[0]
    expected = run(lower(original), unseen)["logits"].softmax(-1)

    def divergence():
        return float(
            (expected * (expected.log() - run(lower(student), unseen)["logits"].log_softmax(-1))).sum()
        )

    before = divergence()
    distill(student, original, tmp_path, data=feeds(12), steps=120, learning_rate=1e-2, **losses)
    # Some loss stays: half of the hidden channels do nothing in the beginning, and the steps are few.
    assert divergence() < 0.3 * before


def test_padding_tokens_do_not_count(tmp_path):
    original = decoder()
    results = []
    for number, fill in enumerate((0, 7)):
        data = feeds(padding=3)
        for item in data:
            item["input_ids"] = np.where(item["attention_mask"], item["input_ids"], fill)
        student = damaged(original)
        distill(student, original, tmp_path / str(number), data=data, hidden=0.1, task=0.5)
        results.append(arrays(student))
    for name, array in results[0].items():
        # Tokens look back only, so padding at the end reaches no other token: sums differ by rounding.
        np.testing.assert_allclose(array, results[1][name], atol=1e-6)
    student = damaged(original)
    unmasked = [item | {"attention_mask": np.ones((4, 8), np.int64)} for item in data]
    distill(student, original, tmp_path, data=unmasked, hidden=0.1, task=0.5)
    assert max(abs(arrays(student)[name] - array).max() for name, array in results[0].items()) > 1e-4


def test_a_dropped_layer_is_left_out_and_its_cache_begins_empty(tmp_path):
    original = decoder()
    student = decoder(layers=1)
    result, ctx = distill(student, original, tmp_path, data=feeds(layers=1), steps=30)
    assert result.modified
    assert "; 2 hidden states compared" in remarks(ctx, "training")[0]


@pytest.mark.parametrize("keep_zeros", [False, True])
def test_zeros_of_products_are_kept_or_it_is_said_that_they_are_not(tmp_path, keep_zeros):
    original = decoder()
    student = damaged(original)
    replace(student, "0.norm.weight", np.arange(WIDTH))  # a zero here is no pruned weight
    before = arrays(student)
    _, ctx = distill(student, original, tmp_path, keep_zeros=keep_zeros)
    for i in range(LAYERS):
        name = f"{i}.down.weight"
        assert ((arrays(student)[name] == 0) == (before[name] == 0)).all() == keep_zeros
        assert (arrays(student)[name] != before[name]).any()
    assert arrays(student)["0.norm.weight"][0] != 0
    # The weights of products: 8 of 8 x 8, 4 of 8 x 16, 8 x 12; half of two of 16 x 8 are zero.
    share = 128 / (8 * 64 + 4 * 128 + 96)
    said = f"{share:.1%} of the weights were zero and are not now; keep_zeros keeps them"
    assert remarks(ctx, "zeros") == ([] if keep_zeros else [said])


def test_harm_is_undone_and_said(tmp_path):
    original = decoder()
    student = clone(original)
    before = arrays(student)
    result, ctx = distill(student, original, tmp_path, learning_rate=1.0, weight_decay=0.5)
    assert not result.modified
    assert result.coverage.covered > 0
    for name, array in arrays(student).items():
        np.testing.assert_array_equal(array, before[name])
    assert "the weights before training were kept" in remarks(ctx, "training")[1]


def test_an_interrupted_run_goes_on(tmp_path):
    original = decoder()
    first, second, whole = (damaged(original) for _ in range(3))
    distill(whole, original, tmp_path / "other", steps=6)
    distill(first, original, tmp_path, steps=6)
    _, ctx = distill(second, original, tmp_path, steps=6)
    assert "went on from step 6" in remarks(ctx, "training")[0]
    for name, array in arrays(whole).items():
        np.testing.assert_array_equal(array, arrays(second)[name])


def test_missing_hidden_states_are_said(tmp_path):
    proto = onnx.parser.parse_model(
        '<ir_version: 11, opset_import: ["": 23]> net (float[b, 4] x) => (float[b, 4] y)'
        '{ h = MatMul (x, "a.weight") r = Relu (h) y = MatMul (r, "b.weight") }'
    )
    rng = np.random.default_rng(0)
    for name in ("a.weight", "b.weight"):
        array = rng.standard_normal((4, 4)).astype(np.float32)
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    original = ir.from_proto(proto)
    student = clone(original)
    replace(student, "b.weight", 0 * arrays(original)["b.weight"])
    data = [{"x": rng.standard_normal((16, 4)).astype(np.float32)}]
    result, ctx = distill(student, original, tmp_path, data=data)
    assert result.modified
    (text,) = remarks(ctx, "hidden states")
    assert text == "not compared: the model and the original have none in common"


def test_a_classifier_learns_its_labels_and_keeps_its_statistics(tmp_path):
    proto = onnx.parser.parse_model(
        '<ir_version: 11, opset_import: ["": 23]> net (float[b, 2, 4, 4] x) => (float[b, 3] scores)'
        '{ c = Conv (x, "c.weight", "c.bias")'
        ' n = BatchNormalization (c, "bn.weight", "bn.bias", "bn.mean", "bn.variance")'
        ' r = Relu (n) p = GlobalAveragePool (r) f = Flatten (p) scores = Gemm (f, "fc.weight", "fc.bias") }'
    )
    shapes = {"c.weight": (6, 2, 3, 3), "fc.weight": (6, 3), "fc.bias": (3,)}
    shapes |= dict.fromkeys(("c.bias", "bn.weight", "bn.bias", "bn.mean", "bn.variance"), (6,))
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        array = rng.uniform(0.5, 1.5, shape) if "bn" in name else rng.standard_normal(shape)
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array.astype(np.float32), name=name)))
    original = ir.from_proto(proto)
    infer_shapes(original)
    data = []
    for _ in range(8):
        labels = rng.integers(0, 3, 16)
        x = rng.standard_normal((16, 2, 4, 4)) + labels[:, None, None, None]
        data.append({"x": x.astype(np.float32), "labels": labels})
    student = clone(original)
    result, _ = distill(
        student, original, tmp_path, data=data, steps=100, learning_rate=0.03, task=1.0, logits=0.0
    )
    assert str(result.coverage) == "6 of 6 weights trained"

    def accuracy(model):
        scores = [run(lower(model), {"x": item["x"]})["scores"].argmax(-1).numpy() for item in data]
        return np.mean([(found == item["labels"]).mean() for found, item in zip(scores, data, strict=True)])

    # The classes lie one standard deviation of a pixel apart, of which there are 32: few errors are left.
    assert accuracy(student) > 0.9
    assert accuracy(original) < 0.7
    for name, array in arrays(original).items():
        assert np.array_equal(array, arrays(student)[name]) == (name in ("bn.mean", "bn.variance"))


@dataclass(frozen=True, kw_only=True)
class Damage(Pass):
    """Half of each MLP's hidden channels become zero."""

    name: ClassVar[str] = "damage"
    contract: ClassVar[Contract] = Contract.APPROXIMATE

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        for name, array in arrays(damaged(model)).items():
            replace(model, name, array)
        return PassResult(modified=True)


def run_passes(model, *passes, **arguments):
    set_facts(model, frozenset({Fact.CANONICAL}))
    return run_pipeline(model, Pipeline.of(list(passes)), target=get_target("portable"), **arguments)


def test_in_a_pipeline_the_teacher_is_the_model_before_the_damage():
    model = decoder()
    report = run_passes(
        model, Damage(), Distill(steps=60, learning_rate=1e-2, squarehead=0.0), training=feeds(12)
    )
    (remark,) = [remark.text for remark in report.passes[1].remarks if remark.subject == "training"]
    before, after = (float(part.split()[0]) for part in remark.split("; ")[0].split("loss ")[1].split(", "))
    assert after < 0.5 * before


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="distill: training needs data, and there is none"):
        distill(decoder(), decoder(), tmp_path, data=[])
    with pytest.raises(NothingCoveredError, match=r"covered nothing: 0 of \d+ weights trained"):
        run_passes(decoder(), Distill(steps=1, ignore=("re:.*",)), training=feeds())
    with pytest.raises(PipelineError, match="cannot run on a model that is 'quantized'"):
        Pipeline.of([Distill(steps=1)]).check_legal(frozenset({Fact.CANONICAL, Fact.QUANTIZED}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected 1 or more, found 0"),
        ({"steps": 1, "learning_rate": 0.0}, "learning_rate: expected a positive number, found 0.0"),
        ({"steps": 1, "temperature": math.inf}, "temperature: expected a positive number, found inf"),
        ({"steps": 1, "hidden": -1.0}, "hidden: expected 0 or more, found -1.0"),
        ({"steps": 1, "held_out": 1.0}, "held_out: expected 0 or more, and less than 1, found 1.0"),
        ({"steps": 1, "logits": 0.0, "squarehead": 0.0}, "every loss has weight 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(PipelineError, match=f"^distill: {message}"):
        Distill(**options)
