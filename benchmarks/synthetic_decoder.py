"""A Llama-like decoder as torch's exporter writes it, with tiny weights and as many layers as wanted.

Norms are Pow, ReduceMean, Add, Sqrt, Reciprocal, Mul, Mul; linear weights are stored [out, in] behind a
Transpose; rotary embeddings are rotate_half in Slice, Neg, Concat; keys and values are concatenated with the
cache, repeated for the query heads by Unsqueeze, Expand, Reshape, and attended by MatMul, Softmax, MatMul.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from planish.ir import infer_shapes

VOCABULARY, HIDDEN, HEADS, KV_HEADS, SIZE, INNER = 32, 32, 4, 2, 8, 64
NODES_PER_LAYER, OTHER_NODES = 69, 40


@dataclasses.dataclass
class _Builder:
    """Collects nodes and weights."""

    rng: np.random.Generator = dataclasses.field(default_factory=lambda: np.random.default_rng(0))
    nodes: list[onnx.NodeProto] = dataclasses.field(default_factory=list)
    weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def op(self, op_type: str, *inputs: str, name: str = "", **attributes: object) -> str:
        output = name or f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], f"n_{output}", **attributes))
        return output

    def constant(self, name: str, values: object, dtype: type = np.int64) -> str:
        self.weights.setdefault(name, np.array(values, dtype))
        return name

    def weight(self, name: str, *shape: int, around: float = 0.0) -> str:
        array = around + self.rng.standard_normal(shape) / np.sqrt(shape[-1])
        self.weights[name] = array.astype(np.float32)
        return name

    def ints(self, *values: int) -> str:
        return self.constant("i_" + "_".join(str(value).replace("-", "m") for value in values), values)

    def number(self, name: str, value: float) -> str:
        return self.constant(name, value, np.float32)


def decoder(layers: int) -> onnx.ModelProto:
    """input_ids, attention_mask, position_ids and past keys and values in; logits and present ones out."""
    b = _Builder()
    angles, mask, shapes = _prologue(b)
    cosine, sine = (b.op("Unsqueeze", b.op(op, angles), b.ints(1)) for op in ("Cos", "Sin"))
    x = b.op("Gather", b.weight("model.embed_tokens.weight", VOCABULARY, HIDDEN), "input_ids", axis=0)
    caches: list[str] = []
    for layer in range(layers):
        path = f"model.layers.{layer}"
        attended, present = _attention(
            b, path, layer, _norm(b, x, f"{path}.input_layernorm"), cosine, sine, mask, shapes
        )
        caches += present
        x = b.op("Add", x, attended)
        x = b.op("Add", x, _mlp(b, path, _norm(b, x, f"{path}.post_attention_layernorm")))
    _linear(b, _norm(b, x, "model.norm"), "lm_head", HIDDEN, VOCABULARY, name="logits")
    return _model(b, layers, caches)


def layers_for(count: int) -> int:
    """How many layers give about ``count`` nodes."""
    return max(1, round((count - OTHER_NODES) / NODES_PER_LAYER))


def _prologue(b: _Builder) -> tuple[str, str, dict[str, str]]:
    """Rotary angles [batch, sequence, size], the additive mask [batch, 1, sequence, total], and shapes."""
    batch = b.op("Shape", "input_ids", start=0, end=1)
    length = b.op("Shape", "input_ids", start=1, end=2)
    past = b.op("Shape", "past_key_values.0.key", start=2, end=3)
    total = b.op("Add", past, length)
    minus, heads, size = b.ints(-1), b.ints(HEADS), b.ints(SIZE)
    groups, kv = b.ints(HEADS // KV_HEADS), b.ints(KV_HEADS)
    shapes = {
        "split": b.op("Concat", batch, length, minus, size, axis=0),
        "join": b.op("Concat", batch, length, minus, axis=0),
        "expand": b.op("Concat", batch, kv, groups, total, size, axis=0),
        "repeat": b.op("Concat", batch, heads, total, size, axis=0),
    }
    position = b.op("Cast", b.op("Unsqueeze", "position_ids", b.ints(2)), to=TensorProto.FLOAT)
    frequencies = 10000.0 ** (-np.arange(0, SIZE, 2) / SIZE)
    half = b.op("Mul", position, b.constant("model.rotary_emb.inv_freq", frequencies, np.float32))
    zero_0, one_0 = b.constant("zero", 0), b.constant("one", 1)
    keys = b.op("Range", zero_0, b.op("Squeeze", total), one_0)
    queries = b.op("Add", b.op("Range", zero_0, b.op("Squeeze", length), one_0), b.op("Squeeze", past))
    causal = b.op("LessOrEqual", b.op("Unsqueeze", keys, b.ints(0)), b.op("Unsqueeze", queries, b.ints(1)))
    valid = b.op("Unsqueeze", b.op("Cast", "attention_mask", to=TensorProto.BOOL), b.ints(1, 2))
    kept = b.op("And", b.op("Unsqueeze", causal, b.ints(0, 1)), valid)
    lowest = b.number("lowest", float(np.finfo(np.float32).min))
    mask = b.op("Where", kept, b.number("zero_f", 0.0), lowest)
    return b.op("Concat", half, half, axis=-1), mask, shapes


def _norm(b: _Builder, x: str, path: str) -> str:
    square = b.op("Pow", x, b.number("two_f", 2.0))
    mean = b.op("ReduceMean", square, b.ints(-1), keepdims=1, noop_with_empty_axes=0)
    root = b.op("Sqrt", b.op("Add", mean, b.number("epsilon", 1e-6)))
    normalised = b.op("Mul", x, b.op("Reciprocal", root))
    return b.op("Mul", b.weight(f"{path}.weight", HIDDEN, around=1.0), normalised)


def _linear(b: _Builder, x: str, path: str, inputs: int, outputs: int, name: str = "") -> str:
    transposed = b.op("Transpose", b.weight(f"{path}.weight", outputs, inputs), perm=[1, 0])
    return b.op("MatMul", x, transposed, name=name)


def _heads(b: _Builder, x: str, path: str, heads: int, shapes: dict[str, str]) -> str:
    projected = _linear(b, x, path, HIDDEN, heads * SIZE)
    return b.op("Transpose", b.op("Reshape", projected, shapes["split"]), perm=[0, 2, 1, 3])


def _rotate(b: _Builder, x: str, cosine: str, sine: str) -> str:
    start, middle, end, last = b.ints(0), b.ints(SIZE // 2), b.ints(2**63 - 1), b.ints(3)
    step = b.ints(1)
    first = b.op("Slice", x, start, middle, last, step)
    second = b.op("Slice", x, middle, end, last, step)
    rotated = b.op("Concat", b.op("Neg", second), first, axis=-1)
    return b.op("Add", b.op("Mul", x, cosine), b.op("Mul", rotated, sine))


def _repeat(b: _Builder, x: str, shapes: dict[str, str]) -> str:
    return b.op(
        "Reshape", b.op("Expand", b.op("Unsqueeze", x, b.ints(2)), shapes["expand"]), shapes["repeat"]
    )


def _attention(
    b: _Builder, path: str, layer: int, x: str, cosine: str, sine: str, mask: str, shapes: dict[str, str]
) -> tuple[str, list[str]]:
    path = f"{path}.self_attn"
    query = _rotate(b, _heads(b, x, f"{path}.q_proj", HEADS, shapes), cosine, sine)
    key = _rotate(b, _heads(b, x, f"{path}.k_proj", KV_HEADS, shapes), cosine, sine)
    value = _heads(b, x, f"{path}.v_proj", KV_HEADS, shapes)
    past, present = f"past_key_values.{layer}", f"present.{layer}"
    key = b.op("Concat", f"{past}.key", key, axis=2, name=f"{present}.key")
    value = b.op("Concat", f"{past}.value", value, axis=2, name=f"{present}.value")
    transposed = b.op("Transpose", _repeat(b, key, shapes), perm=[0, 1, 3, 2])
    scores = b.op("Mul", b.op("MatMul", query, transposed), b.number("scale", SIZE**-0.5))
    probabilities = b.op("Softmax", b.op("Add", scores, mask), axis=-1)
    context = b.op("MatMul", probabilities, _repeat(b, value, shapes))
    joined = b.op("Reshape", b.op("Transpose", context, perm=[0, 2, 1, 3]), shapes["join"])
    return _linear(b, joined, f"{path}.o_proj", HIDDEN, HIDDEN), [key, value]


def _mlp(b: _Builder, path: str, x: str) -> str:
    gate = _linear(b, x, f"{path}.mlp.gate_proj", HIDDEN, INNER)
    up = _linear(b, x, f"{path}.mlp.up_proj", HIDDEN, INNER)
    activated = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up)
    return _linear(b, activated, f"{path}.mlp.down_proj", INNER, HIDDEN)


def _model(b: _Builder, layers: int, caches: list[str]) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    sequence = ["batch_size", "sequence_length"]
    inputs = [
        value("input_ids", TensorProto.INT64, sequence),
        value("attention_mask", TensorProto.INT64, ["batch_size", "past_sequence_length + sequence_length"]),
        value("position_ids", TensorProto.INT64, sequence),
    ]
    for layer in range(layers):
        for part in ("key", "value"):
            shape = ["batch_size", KV_HEADS, "past_sequence_length", SIZE]
            inputs.append(value(f"past_key_values.{layer}.{part}", TensorProto.FLOAT, shape))
    outputs = [value("logits", TensorProto.FLOAT, [*sequence, VOCABULARY])]
    cache = ["batch_size", KV_HEADS, "past_sequence_length + sequence_length", SIZE]
    outputs += [value(name, TensorProto.FLOAT, cache) for name in caches]
    weights = [numpy_helper.from_array(array, name) for name, array in b.weights.items()]
    graph = helper.make_graph(b.nodes, "decoder", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    # An exporter writes down the types and shapes that it knows from tracing, and peers' patterns need them.
    annotated = ir.from_proto(model)
    infer_shapes(annotated)
    return ir.to_proto(annotated)


def feeds(layers: int, batch: int = 2, length: int = 3, past: int = 4) -> dict[str, np.ndarray]:
    """Inputs with a cache of ``past`` positions and one padded one."""
    rng = np.random.default_rng(1)
    mask = np.ones((batch, past + length), np.int64)
    mask[0, 0] = 0
    arrays: dict[str, np.ndarray] = {
        "input_ids": rng.integers(0, VOCABULARY, (batch, length)),
        "attention_mask": mask,
        "position_ids": np.broadcast_to(np.arange(past, past + length), (batch, length)).copy(),
    }
    for layer in range(layers):
        for part in ("key", "value"):
            cache = rng.standard_normal((batch, KV_HEADS, past, SIZE)).astype(np.float32)
            arrays[f"past_key_values.{layer}.{part}"] = cache
    return arrays
