"""Inputs of a deployment's size, and whole models timed against each other."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import planish
import pytest
from planish.codegen.onnxruntime_cpu.target import OnnxruntimeCpu
from planish.codegen.portable import Portable
from planish.ir.errors import InputError
from planish.runtime.end_to_end import end_to_end_latency, fitted_feeds, open_bound, threads_of
from planish.runtime.latency_feeds import deployment_feeds


def model(inputs: str, body: str = "y = Shape ({first})", output: str = "int64[r] y") -> ir.Model:
    """A graph with these inputs; by default it only asks for the shape of the first one."""
    first = inputs.split("]")[1].split(",")[0].strip() if "]" in inputs else inputs.split()[-1]
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
        g ({inputs}) => ({output}) {{ {body.format(first=first)} }}"""
    graph = ir.from_proto(onnx.parser.parse_model(text))
    for value in graph.graph.inputs:
        value.name = value.name.replace("__", ".")
    return graph


ENCODER = "int64[batch_size, sequence_length] input_ids, int64[batch_size, sequence_length] attention_mask"
DECODER = (
    "int64[b, s] input_ids, int64[b, t] attention_mask, int64[b, s] position_ids, "
    "float[b, 2, p, 4] past_key_values__0__key, float[b, 2, p, 4] past_key_values__0__value"
)


def shapes(feeds):
    return {name: array.shape for name, array in feeds.items()}


# Feeds


def test_encoder():
    feeds = deployment_feeds(model(ENCODER), batch=3, sequence=9)
    assert shapes(feeds) == {"input_ids": (3, 9), "attention_mask": (3, 9)}
    assert feeds["attention_mask"].all()
    assert all(array.dtype == np.int64 for array in feeds.values())


def test_a_decoder_reads_its_prompt_with_an_empty_cache():
    feeds = deployment_feeds(model(DECODER), batch=2, sequence=6)
    assert shapes(feeds) == {
        "input_ids": (2, 6),
        "attention_mask": (2, 6),
        "position_ids": (2, 6),
        "past_key_values.0.key": (2, 2, 0, 4),
        "past_key_values.0.value": (2, 2, 0, 4),
    }
    np.testing.assert_array_equal(feeds["position_ids"], [range(6)] * 2)


def test_ids_stay_below_the_size_of_the_table():
    graph = model(
        "int64[b, s] input_ids, float[9, 4] table", "y = Gather (table, input_ids)", "float[b,s,4] y"
    )
    feeds = deployment_feeds(graph, batch=9, sequence=200)
    assert feeds["input_ids"].max() < 9
    assert feeds["table"].shape == (9, 4)


def test_features_take_the_sequence_and_keep_their_width():
    assert shapes(deployment_feeds(model("float[b, s, 7] features"), batch=2, sequence=5)) == {
        "features": (2, 5, 7)
    }


def test_images_keep_their_size():
    feeds = deployment_feeds(model("float[n, 3, 20, 24] pixel_values"), batch=5, sequence=128)
    assert shapes(feeds) == {"pixel_values": (5, 3, 20, 24)}


def test_examples_are_repeated_and_cut():
    example = {
        "input_ids": np.array([[1, 2, 3], [4, 5, 6]]),
        "attention_mask": np.array([[1, 1, 0], [1, 1, 1]]),
    }
    feeds = deployment_feeds(model(ENCODER), batch=3, sequence=5, examples=[example])
    np.testing.assert_array_equal(feeds["input_ids"], [[1, 2, 3, 1, 2], [4, 5, 6, 4, 5], [1, 2, 3, 1, 2]])
    assert feeds["attention_mask"].all()
    short = deployment_feeds(model(ENCODER), batch=1, sequence=2, examples=[example])
    np.testing.assert_array_equal(short["input_ids"], [[1, 2]])


def test_the_caches_of_examples_are_emptied():
    example = {
        "input_ids": np.ones((1, 3), np.int64),
        "attention_mask": np.ones((1, 5), np.int64),
        "position_ids": np.array([[2, 3, 4]]),
        **{f"past_key_values.0.{part}": np.ones((1, 2, 2, 4), np.float32) for part in ("key", "value")},
    }
    feeds = deployment_feeds(model(DECODER), batch=2, sequence=4, examples=[example])
    assert feeds["past_key_values.0.key"].shape == (2, 2, 0, 4)
    assert feeds["attention_mask"].shape == (2, 4)
    np.testing.assert_array_equal(feeds["position_ids"], [range(4)] * 2)


def test_the_size_of_free_images_is_that_of_examples():
    graph = model("float[n, 3, h, w] x")
    with pytest.raises(InputError, match=r"input 'x' .* does not say how large an image is \(axis 2\)"):
        deployment_feeds(graph, batch=1, sequence=1)
    example = {"x": np.ones((2, 3, 10, 12), np.float32)}
    assert shapes(deployment_feeds(graph, batch=4, sequence=1, examples=[example])) == {"x": (4, 3, 10, 12)}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("float[1, 4] x", r"input 'x' .*: axis 0 is fixed to 1, the deployment's batch is 2 — set batch=1"),
        ("int64[b, 16] input_ids", "axis 1 is fixed to 16, the deployment's sequence is 5 — set sequence=16"),
        ("int64[b, 16] attention_mask", "axis 1 is fixed to 16, the deployment's sequence is 5"),
    ],
)
def test_dimensions_that_the_graph_fixes_are_named(inputs, message):
    with pytest.raises(InputError, match=message):
        deployment_feeds(model(inputs), batch=2, sequence=5)


def test_fixed_dimensions_that_fit_are_fine():
    assert shapes(deployment_feeds(model("int64[2, 5] input_ids"), batch=2, sequence=5)) == {
        "input_ids": (2, 5)
    }


@pytest.mark.parametrize(("batch", "sequence", "name"), [(0, 1, "batch"), (1, 0, "sequence")])
def test_sizes_are_positive(batch, sequence, name):
    with pytest.raises(InputError, match=f"{name} must be positive, found 0"):
        deployment_feeds(model(ENCODER), batch=batch, sequence=sequence)


def test_examples_that_lack_an_input_are_refused():
    with pytest.raises(InputError, match="the examples lack input 'attention_mask'"):
        deployment_feeds(
            model(ENCODER), batch=1, sequence=1, examples=[{"input_ids": np.ones((1, 1), np.int64)}]
        )


def test_inputs_without_a_shape_are_refused():
    graph = model(ENCODER)
    graph.graph.inputs[1].shape = None
    with pytest.raises(InputError, match="input 'attention_mask' declares no tensor type and shape"):
        deployment_feeds(graph, batch=1, sequence=1)


# End to end

WITH_CACHE = model(
    "float[b, s] x, float[b, 4, p, 2] past_key_values__0__key",
    "a = ReduceSum (past_key_values__0__key) y = Add (x, a)",
    "float[b, s] y",
)
FEWER_HEADS = model(
    "float[b, s] x, float[b, 3, p, 2] past_key_values__0__key",
    "a = ReduceSum (past_key_values__0__key) y = Add (x, a)",
    "float[b, s] y",
)
WITHOUT = model("float[b, s] x", "y = Neg (x)", "float[b, s] y")
FEEDS = {
    "x": np.ones((1, 3), np.float32),
    "past_key_values.0.key": np.arange(16, dtype=np.float32).reshape(1, 4, 2, 2),
}


def test_every_model_gets_what_it_reads():
    cache = FEEDS["past_key_values.0.key"]
    assert list(fitted_feeds(WITHOUT, FEEDS)) == ["x"]
    assert fitted_feeds(WITH_CACHE, FEEDS)["past_key_values.0.key"] is cache
    np.testing.assert_array_equal(fitted_feeds(FEWER_HEADS, FEEDS)["past_key_values.0.key"], cache[:, :3])
    more = fitted_feeds(WITH_CACHE, {**FEEDS, "past_key_values.0.key": cache[:, :3]})
    np.testing.assert_array_equal(more["past_key_values.0.key"], cache[:, [0, 1, 2, 0]])


def test_models_are_timed_against_each_other():
    models = {"dense": WITH_CACHE, "fewer": FEWER_HEADS, "none": WITHOUT}
    latency = end_to_end_latency(models, target=Portable(), feeds=FEEDS, repeats=4)
    assert list(latency) == list(models)
    for row in latency.values():
        assert row.samples == 4
        assert 0 < row.fastest_ms <= row.median_ms


def test_feeds_may_be_each_model_s_own():
    models = {"one": WITHOUT, "two": WITH_CACHE}
    feeds = {"one": {"x": FEEDS["x"]}, "two": FEEDS}
    assert list(end_to_end_latency(models, target=Portable(), feeds=feeds, repeats=1)) == ["one", "two"]
    with pytest.raises(InputError, match=r"no inputs were given for the model 'two', only for \['one'\]"):
        end_to_end_latency(models, target=Portable(), feeds={"one": FEEDS}, repeats=1)


def test_a_missing_input_names_the_model():
    with pytest.raises(InputError, match=r"latency of 'dense': input 'past_key_values\.0\.key' is not among"):
        end_to_end_latency({"dense": WITH_CACHE}, target=Portable(), feeds={"x": FEEDS["x"]}, repeats=1)


def test_feeds_that_do_not_fit_name_the_model():
    feeds = {**FEEDS, "x": np.ones((1, 3), np.float64)}
    with pytest.raises(InputError, match="latency of 'dense': input 'x': expected dtype float32"):
        end_to_end_latency({"dense": WITH_CACHE}, target=Portable(), feeds=feeds, repeats=1)


def test_threads_are_the_target_s():
    assert threads_of(Portable()) is None
    assert threads_of(OnnxruntimeCpu(threads=3)) == 3
    session = open_bound(WITHOUT, OnnxruntimeCpu(threads=1))
    assert session._session.get_session_options().intra_op_num_threads == 1


def test_models_are_not_changed():
    before = planish.ir.format_model(WITH_CACHE)
    end_to_end_latency({"dense": WITH_CACHE}, target=Portable(), feeds=FEEDS, repeats=1)
    assert planish.ir.format_model(WITH_CACHE) == before
