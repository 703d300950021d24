"""Raising and quantising the cache of a small decoder: the graph, its numbers, and what is refused."""

import numpy as np
import onnx_ir as ir
import planish
import pytest
import torch
from planish.ir import clone, verify
from planish.ir.errors import PassError
from planish.ir.views.caches import cached_layers
from planish.ir.views.masks import causal_mask
from planish.passes import Pipeline
from planish.passes.fuse import Fuse
from planish.passes.infrastructure.driver import run_pipeline
from planish.passes.kv_cache import KVCache, RaiseCache
from planish.passes.kv_cache.scales import magnitudes, scales
from planish.passes.rotate import Rotate
from planish.runtime.session import Session
from small_decoders import KV_HEADS, LAYERS, SIZE

TARGET = planish.get_target("onnxruntime-cpu", threads=1)
PORTABLE = planish.get_target("portable")


def apply(model, calibration, *passes):
    return run_pipeline(model, Pipeline(list(passes)), target=TARGET, calibration=calibration)


def steps(bound, lengths, batch):
    """Logits of several runs, each on top of the cache of the runs before; the first tokens are padding."""
    session = Session(bound, target=TARGET)
    ids = np.random.default_rng(1).integers(0, 64, (batch, sum(lengths)))
    mask = np.ones_like(ids)
    mask[1:, :1] = 0
    caches = {
        argument.name: np.zeros(
            (batch, argument.shape[1], 0, argument.shape[3]),
            {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}[argument.type],
        )
        for argument in session.inputs
        if argument.name.startswith("past_key_values")
    }
    found, start = [], 0
    for length in lengths:
        end = start + length
        outputs = session.run(
            {
                "input_ids": ids[:, start:end],
                "attention_mask": mask[:, :end],
                "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, start:end],
                **caches,
            }
        )
        caches = {name: outputs[name.replace("past_key_values", "present")] for name in caches}
        found.append(outputs["logits"])
        start = end
    logits = np.concatenate(found, axis=1)
    logits[1:, :1] = 0  # of padding
    return logits


def test_raising_replaces_attention_and_nothing_else(model, calibration):
    before = [node.op_type for node in model.graph]
    report = apply(model, calibration, RaiseCache())
    assert [node.op_type for node in model.graph] == [
        "CachedAttention" if op == "Attention" else op for op in before
    ]
    assert str(report.passes[0].coverage) == "2 of 2 layers of the cache"
    verify(model)


@pytest.mark.parametrize("lengths", [(6, 1, 1), (4, 3, 1)])
@pytest.mark.parametrize("target", [TARGET, PORTABLE], ids=["in place", "portable"])
def test_raised_models_compute_the_same(fused, model, calibration, target, lengths):
    apply(model, calibration, RaiseCache())
    batch = 2 if lengths[1] == 1 else 1  # the kernel's limit
    expected = steps(PORTABLE.bind(fused), lengths, batch)
    # Sums of 32 float32 products in another order, through two layers.
    np.testing.assert_allclose(steps(target.bind(model), lengths, batch), expected, atol=2e-5)


def test_rotated_keys_and_values_are_raised(canonical, fused, calibration):
    rotated = clone(canonical)
    passes = (Rotate(rotations=("R2", "R3"), when="always"), Fuse(), RaiseCache())
    report = apply(rotated, calibration, *passes)
    assert str(report.passes[-1].coverage) == "2 of 2 layers of the cache"
    assert [node.op_type for node in rotated.graph].count("HadamardTransform") == 2 * LAYERS
    lengths = (6, 1, 1)
    expected = steps(PORTABLE.bind(fused), lengths, 2)
    # Sums of 32 float32 products in another order, through two layers.
    np.testing.assert_allclose(steps(TARGET.bind(rotated), lengths, 2), expected, atol=2e-5)


@pytest.mark.parametrize("granularity", ["per-channel", "per-tensor"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_kernel_computes_the_body_of_a_quantised_cache(model, calibration, bits, granularity):
    apply(model, calibration, KVCache(bits=bits, granularity=granularity))
    verify(model)
    body, kernel = (steps(target.bind(model), (6, 1, 1), 2) for target in (PORTABLE, TARGET))
    np.testing.assert_allclose(kernel, body, atol=2e-5)


def test_eight_bits_lose_less_than_four(fused, model, calibration):
    expected = steps(PORTABLE.bind(fused), (6, 1, 1), 2)
    errors = {}
    for bits in (8, 4):
        quantised = clone(fused)
        apply(quantised, calibration, KVCache(bits=bits))
        errors[bits] = float(np.abs(steps(PORTABLE.bind(quantised), (6, 1, 1), 2) - expected).mean())
    assert 0 < errors[8] < errors[4] / 4


@pytest.mark.parametrize(("bits", "dtype", "columns"), [(8, "INT8", SIZE), (4, "UINT8", SIZE // 2)])
def test_the_cache_is_stored_as_integers(model, calibration, bits, dtype, columns):
    apply(model, calibration, KVCache(bits=bits))
    for layer in cached_layers(model):
        for value in (layer.past_key, layer.past_value, layer.present_key, layer.present_value):
            assert value.dtype == ir.DataType[dtype]
            assert list(value.shape)[1::2] == [KV_HEADS, columns]
    assert len(cached_layers(model)) == LAYERS


def test_binding_reads_no_length_from_a_cache(model, calibration):
    apply(model, calibration, RaiseCache())
    bound = TARGET.bind(model).model
    pasts = [value for value in bound.graph.inputs if value.name.startswith("past_key_values")]
    assert {node.op_type for value in pasts for node in value.consumers()} == {"GroupQueryAttention"}


def test_binding_lets_a_cache_be_asked_for_its_batch(model, calibration):
    apply(model, calibration, RaiseCache())
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    shape = ir.node("Shape", [past], {"start": 0, "end": 1}, name="batch")
    model.graph.insert_before(model.graph[0], shape)
    assert {binding.kernel for binding in TARGET.bind(model).bindings if "Cached" in binding.op} == {
        "GroupQueryAttention"
    }
    whole = ir.node("Shape", [past], name="all")
    model.graph.insert_before(model.graph[0], whole)
    reasons = [binding.reason for binding in TARGET.bind(model).bindings if binding.kernel == "body"]
    assert reasons == ["something else reads its cache"]


def test_a_mask_that_shows_the_future_is_not_bound(model, calibration):
    apply(model, calibration, RaiseCache())
    node = next(node for node in model.graph if node.op_type == "CachedAttention")
    mask = node.inputs[3]
    assert [value.name for value in causal_mask(mask).others] == ["attention_mask"]
    padding = next(value for value in mask.producer().inputs if causal_mask(value) is None)
    (future,) = (value for value in mask.producer().inputs if causal_mask(value) is not None)
    assert not causal_mask(future).others
    node.replace_input_with(3, padding)
    bindings = {binding.node: binding for binding in TARGET.bind(model).bindings}
    assert bindings[node.name].kernel == "body"
    assert "hide the future" in bindings[node.name].reason


def test_a_cache_is_quantised_once(model, calibration):
    apply(model, calibration, KVCache())
    with pytest.raises(PassError, match="quantised already"):
        KVCache().run(model, None)


def test_a_model_without_a_cache_is_refused(calibration):
    encoder = planish.compile(
        torch.nn.Linear(4, 4), example_inputs=torch.zeros(2, 4), target="portable"
    ).model
    with pytest.raises(PassError, match="no key-value cache"):
        apply(encoder, (), KVCache())
    with pytest.raises(PassError, match="layers of the cache"):
        apply(encoder, (), RaiseCache())


def test_a_pair_that_turns_may_be_as_large_as_its_norm():
    rows = np.array([[3.0, 0.5, 4.0, 0.0]], np.float32)
    np.testing.assert_allclose(magnitudes(rows, np.array([[0, 2]])), [5, 0.5, 5, 0])
    np.testing.assert_allclose(magnitudes(rows, None), [3, 0.5, 4, 0])


def test_four_bit_grids_are_clipped_where_that_helps():
    rows = np.random.default_rng(0).standard_normal((4096, 1)).astype(np.float32)
    largest = magnitudes(rows, None)
    (scale,) = scales(rows, largest, bits=4, granularity="per-channel")
    errors = [np.square(np.clip(np.round(rows / s), -8, 7) * s - rows).sum() for s in (scale, largest[0] / 7)]
    assert errors[0] < errors[1]
    np.testing.assert_allclose(scales(rows, largest, bits=8, granularity="per-channel"), largest / 127)
