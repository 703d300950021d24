"""GroupQueryAttention in torch: the results and caches of onnxruntime's kernel, on random texts."""

import itertools

import onnx
import onnxruntime
import pytest
import torch
from planish.codegen.cuda.cached_attention import group_query_attention
from planish.codegen.cuda.decode_attention import pack_four_bits

HEADS, KV_HEADS, SIZE = 4, 2, 32
TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.int32: onnx.TensorProto.INT32,
    torch.int8: onnx.TensorProto.INT8,
    torch.uint8: onnx.TensorProto.UINT8,
}


def operands(batch, new, past, bits, generator, *, bias):
    """By name, in the order of the op."""

    def random(*shape):
        return torch.randn(shape, generator=generator)

    shape = (batch, KV_HEADS, past, SIZE)
    found = {
        "query": random(batch, new, HEADS * SIZE),
        "key": random(batch, new, KV_HEADS * SIZE),
        "value": random(batch, new, KV_HEADS * SIZE),
    }
    for name in ("past_key", "past_value"):
        half = 1 << (bits - 1)
        integers = (
            torch.randint(-half, half, shape, generator=generator, dtype=torch.int8) if bits < 32 else None
        )
        found[name] = random(*shape) if bits == 32 else pack_four_bits(integers) if bits == 4 else integers
    found["last"] = torch.full((batch,), past + new - 1, dtype=torch.int32)
    found["total"] = torch.tensor(past + new, dtype=torch.int32)
    found |= {"cosines": None, "sines": None, "positions": None}
    found["bias"] = random(batch, 1, new, past + new) if bias else None
    found["sink"] = None
    for name in ("key_scale", "value_scale"):
        # Of a new number of 3 or so the clamped part, too.
        scale = (torch.rand(1, KV_HEADS, 1, SIZE, generator=generator) + 0.5) * 2 / (1 << (bits - 1))
        found[name] = scale if bits < 32 else None
    return found


def by_onnxruntime(given, attributes):
    """y, and the present keys and values."""
    given = dict(given)
    while list(given.values())[-1] is None:
        given.popitem()
    cached = given["past_key"].dtype
    outputs = {"y": torch.float32, "present_key": cached, "present_value": cached}
    node = onnx.helper.make_node(
        "GroupQueryAttention",
        [name if tensor is not None else "" for name, tensor in given.items()],
        list(outputs),
        domain="com.microsoft",
        **attributes,
    )
    feeds = {name: tensor for name, tensor in given.items() if tensor is not None}
    graph = onnx.helper.make_graph(
        [node],
        "attention",
        [onnx.helper.make_tensor_value_info(name, TYPES[x.dtype], x.shape) for name, x in feeds.items()],
        [onnx.helper.make_tensor_value_info(name, TYPES[dtype], None) for name, dtype in outputs.items()],
    )
    versions = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=versions, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it expects a present as long as the past
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return [*map(torch.from_numpy, session.run(None, {name: x.numpy() for name, x in feeds.items()}))]


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("spare", [0, 7])
def test_results_and_caches_are_onnxruntimes(bits, spare):
    generator = torch.Generator().manual_seed(bits + spare)
    # Several new tokens on top of a past are for one text at a time, there.
    sizes = [(2, 1, 9), (1, 3, 9), (2, 5, 0), (1, 1, 0)]
    for (batch, new, past), bias, window in itertools.product(sizes, (False, True), (-1, 4)):
        given = operands(batch, new, past, bits, generator, bias=bias)
        attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": 0.2, "local_window_size": window}
        if bits < 32:
            grids = dict.fromkeys(("k_quant_type", "v_quant_type"), "PER_CHANNEL")
            attributes |= grids | {"kv_cache_bit_width": bits}
        expected = by_onnxruntime(given, attributes)
        buffers = {}
        for name in ("past_key", "past_value"):
            stored = given[name]
            room = (batch, KV_HEADS, new + spare if spare else 0, stored.shape[3])
            buffers[name] = torch.cat([stored, torch.full(room, 77, dtype=stored.dtype)], dim=2)
        y, *present = group_query_attention(**{**given, **buffers}, **attributes)
        # Sums of 32 and of up to 12 float32 products in another order.
        torch.testing.assert_close(y, expected[0], rtol=1e-4, atol=1e-5)
        for found, wanted, name in zip(present, expected[1:], buffers, strict=True):
            torch.testing.assert_close(found[:, :, : past + new], wanted, rtol=0, atol=0)
            if spare:
                assert found is buffers[name]
                assert (found[:, :, past + new :] == 77).all()
