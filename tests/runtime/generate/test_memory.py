"""Memory as computed: each part against what it is the size of."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from planish.ir.graph_builder import CONTRIB
from planish.runtime.generate.memory import memory

HEADS, KV_HEADS, SIZE, VOCABULARY = 4, 2, 64, 512
HIDDEN = HEADS * SIZE
KV = KV_HEADS * SIZE
BATCH, LENGTH, CHUNK = 2, 40, 16


def decoder(*, bits: int = 32, window: int = 0) -> ir.Model:
    """Embedding, one attention in place, and a head: of float, of four bits, or of four widened to eight."""
    generator = np.random.default_rng(0)

    def constant(name, array):
        return ir.val(
            name, const_value=ir.tensor(array, name=name), dtype=ir.DataType.from_numpy(array.dtype)
        )

    def value(name, shape, dtype=ir.DataType.FLOAT):
        return ir.val(name, shape=ir.Shape(shape), dtype=dtype)

    ids = value("input_ids", ["batch_size", "sequence_length"], ir.DataType.INT64)
    last = value("last", ["batch_size"], ir.DataType.INT32)
    total = value("total", [], ir.DataType.INT32)
    pasts = [
        value(f"past_key_values.0.{part}", ["batch_size", KV_HEADS, "past_sequence_length", SIZE])
        for part in ("key", "value")
    ]
    table = constant("table", generator.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32))
    nodes = [ir.node("Gather", [table, ids])]
    hidden = nodes[0].outputs[0]
    narrow = constant("narrow", generator.standard_normal((HIDDEN, KV)).astype(np.float32))
    nodes.append(ir.node("MatMul", [hidden, narrow]))
    attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS}
    if window:
        attributes |= {"local_window_size": window, "sliding_window_cache": 1}
    operands = [hidden, nodes[1].outputs[0], nodes[1].outputs[0], *pasts, last, total]
    nodes.append(ir.node("GroupQueryAttention", operands, attributes, domain=CONTRIB, num_outputs=3))
    constants = [table, narrow]
    if bits == 32:
        weights = [constant("head", generator.standard_normal((HIDDEN, VOCABULARY)).astype(np.float32))]
        nodes.append(ir.node("MatMul", [nodes[2].outputs[0], *weights]))
    elif bits == 8:
        stored = ir.Tensor(
            np.zeros((HIDDEN, VOCABULARY), ml_dtypes.int4), dtype=ir.DataType.INT4, name="head"
        )
        weights = [ir.val("head", const_value=stored, dtype=ir.DataType.INT4)]
        nodes.append(ir.node("Cast", weights, {"to": ir.DataType.INT8}))
        nodes.append(
            ir.node("DynamicQuantizeMatMul", [nodes[2].outputs[0], nodes[-1].outputs[0]], domain=CONTRIB)
        )
    else:
        weights = [
            constant("head", np.zeros((VOCABULARY, 8, 16), np.uint8)),
            constant("scales", np.ones((VOCABULARY, 8), np.float32)),
        ]
        options = {"K": HIDDEN, "N": VOCABULARY, "bits": 4, "block_size": 32}
        nodes.append(ir.node("MatMulNBits", [nodes[2].outputs[0], *weights], options, domain=CONTRIB))
    outputs = [nodes[-1].outputs[0], *nodes[2].outputs[1:]]
    for output, name in zip(outputs, ("logits", "present.0.key", "present.0.value"), strict=True):
        output.name = name
    graph = ir.Graph(
        [ids, last, total, *pasts],
        outputs,
        nodes=nodes,
        initializers=[*constants, *weights],
        opset_imports={"": 23, CONTRIB: 1},
        name="decoder",
    )
    return ir.Model(graph, ir_version=11)


TABLE, NARROW, HEAD = (4 * size for size in (VOCABULARY * HIDDEN, HIDDEN * KV, HIDDEN * VOCABULARY))
PACKED_HEAD, SCALES = HIDDEN * VOCABULARY // 2, 4 * VOCABULARY * 8


def test_float_weights_are_copied_and_products_packed():
    found = memory(decoder(), batch=BATCH, length=LENGTH, chunk=CHUNK)
    assert found.weights == TABLE + NARROW + HEAD
    assert found.copies == TABLE + NARROW + HEAD
    assert found.loading == 2 * found.weights + HEAD
    assert found.prefill == 0


def test_weights_of_contrib_kernels_are_read_in_place_and_packed_with_their_scales():
    found = memory(decoder(bits=4), batch=BATCH, length=LENGTH, chunk=CHUNK)
    assert found.weights == TABLE + NARROW + PACKED_HEAD + SCALES
    assert found.copies == TABLE + NARROW + PACKED_HEAD + 2 * SCALES
    assert found.loading == found.weights + TABLE + NARROW + max(NARROW, PACKED_HEAD + 2 * SCALES)


def test_weights_that_are_widened_are_held_widened_and_packed():
    found = memory(decoder(bits=8), batch=BATCH, length=LENGTH, chunk=CHUNK)
    wide = HIDDEN * VOCABULARY
    assert found.weights == TABLE + NARROW + wide // 2
    assert found.copies == TABLE + NARROW + 2 * wide
    assert found.loading == found.weights + TABLE + NARROW + wide // 2 + wide + wide


@pytest.mark.parametrize(("window", "kept"), [(0, 500), (128, 192)])
def test_the_cache_is_as_long_as_its_buffers(window, kept):
    found = memory(decoder(window=window), batch=BATCH, length=500, chunk=CHUNK)
    assert found.bytes_per_token == 2 * 4 * KV
    assert found.cache == BATCH * kept * found.bytes_per_token


def test_activations_are_those_of_a_chunk_and_presents_lie_in_the_cache():
    found = memory(decoder(), batch=BATCH, length=LENGTH, chunk=CHUNK)
    # Hidden states are read by the attention; when it runs they, keys and its output are alive.
    states = 4 * BATCH * CHUNK * HIDDEN
    logits = 4 * BATCH * CHUNK * VOCABULARY
    assert found.activations >= states + logits
    assert found.activations == memory(decoder(), batch=BATCH, length=10 * LENGTH, chunk=CHUNK).activations


def test_other_kernels_for_prompts_add_the_weights_that_are_their_own():
    model, other = decoder(bits=4), decoder()
    for name in ("table", "narrow"):
        other.graph.initializers[name].const_value = model.graph.initializers[name].const_value
    alone = memory(model, batch=BATCH, length=LENGTH, chunk=CHUNK)
    both = memory(model, batch=BATCH, length=LENGTH, chunk=CHUNK, prefill=other)
    assert both.prefill == HEAD + TABLE + NARROW + HEAD + 20_000_000  # and what a session takes
    assert both.total >= alone.total + both.prefill
