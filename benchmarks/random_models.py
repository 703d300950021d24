"""Random models: parts from `random_blocks` put together, or small traced architectures with random weights.

`random_model(seed)` always gives the same model. A model is made of blocks that are drawn each from a
generator of its own, so that leaving some out leaves the others as they are: that is how a failing case is
made smaller.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import random_blocks as blocks
import random_images as images
import random_layers as layers
from onnx import TensorProto, numpy_helper
from random_attention import attention
from random_blocks import Block
from random_graphs import Dims, GraphMaker, Input, Tensor

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

MADE = ("tokens", "tokens", "decoder", "image", "image", "rows")
"""Families of made graphs, as often as they are to be drawn."""
TRACED = (
    "Llama",
    "Llama",
    "GPT-2",
    "Qwen3",
    "Gemma 3",
    "Mistral",
    "Mistral",
    "Phi-3",
    "BERT",
    "ViT",
    "ResNet",
)
"""Architectures of `architectures` that are traced once and get new weights in each case."""
VOCABULARY = 40
OPSETS = (23, 23, 23, 23, 22, 21, 20, 18, 17)

_ANYWHERE: tuple[Block, ...] = (
    blocks.no_op, blocks.no_op, layers.activation, blocks.dead, blocks.hidden_output, blocks.function,
    blocks.branches, blocks.loop, blocks.in_half,
)  # fmt: skip
_OF_TOKENS: tuple[Block, ...] = (blocks.residual,) * 12 + (blocks.shuffle, layers.norm, *_ANYWHERE)
_OF_IMAGES: tuple[Block, ...] = (
    (images.convolution,) * 4
    + (images.convolutional_residual, images.inverted_residual) * 2
    + (images.pooling, images.enlarging, images.channels_moved, blocks.hidden_output, blocks.dead)
)
_OF_ROWS: tuple[Block, ...] = (
    (blocks.row_block,) * 5 + (blocks.residual,) * 3 + (blocks.row_products, blocks.shuffle, *_ANYWHERE)
)


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """A model, and what is needed to run it.

    Attributes:
        family: ``tokens``, ``decoder``, ``image``, ``rows`` or the name of an architecture.
        proto: the model.
        inputs: what its inputs are.
        blocks: the names of its blocks, in order.
        has_half: whether a part of it is computed in float16.
    """

    family: str
    proto: onnx.ModelProto
    inputs: Sequence[Input]
    blocks: Sequence[str]
    has_half: bool

    def feeds(self, seed: int, *, padded: bool = True) -> Feeds:
        """Random inputs, of random sizes where the model leaves them open."""
        rng = np.random.default_rng(seed)
        sizes = {
            "batch": int(rng.integers(1, 4)),
            "sequence": int(rng.integers(2, 8)),
            "past": int(rng.integers(0, 4)),
        }
        sizes |= {"total": sizes["past"] + sizes["sequence"], "pixels": 64}
        return {given.tensor.name: _array(given, sizes, rng, padded=padded) for given in self.inputs}


def _array(given: Input, sizes: dict[str, int], rng: np.random.Generator, *, padded: bool) -> Array:
    shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in given.tensor.dims)
    match given.kind:
        case "index":
            return rng.integers(0, given.limit, shape)
        case "positions":
            return np.broadcast_to(np.arange(sizes["past"], sizes["total"]), shape).copy()
        case "zeros":
            return np.zeros(shape, np.int64)
        case "mask":
            mask = np.ones(shape, np.int64)
            if padded and shape[-1] > 2 and rng.random() < 0.5:
                mask[0, -1] = 0
            return mask
    return rng.standard_normal(shape).astype(np.float32)


def random_model(seed: int, *, only: Collection[int] | None = None, traced: bool = True) -> RandomModel:
    """The model of a seed.

    Args:
        seed: decides everything.
        only: the numbers of the blocks to build, from 0; all if absent.
        traced: whether architectures may be drawn, which take seconds to trace.
    """
    rng = np.random.default_rng(seed)
    if traced and rng.random() < 0.2:
        return traced_model(TRACED[int(rng.integers(len(TRACED)))], seed)
    family = MADE[int(rng.integers(len(MADE)))]
    maker = GraphMaker(
        rng,
        opset=OPSETS[int(rng.integers(len(OPSETS)))],
        naming=("torch", "torch", "ort", "numbers", "odd")[int(rng.integers(5))],
    )
    count = int(rng.integers(1, 6))
    build = {"tokens": _tokens, "decoder": _decoder, "image": _image, "rows": _rows}[family]
    names = build(maker, _Blocks(seed, count, only))
    return RandomModel(family, maker.finish(), tuple(maker.inputs), names, bool(maker.memory.get("has_half")))


class _Blocks:
    """So many drawn blocks of a kind, one after the other."""

    def __init__(self, seed: int, count: int, only: Collection[int] | None) -> None:
        self._seed = seed
        self._wanted = range(count) if only is None else [index for index in range(count) if index in only]

    def apply(self, m: GraphMaker, x: Tensor, kinds: Sequence[Block]) -> tuple[Tensor, list[str]]:
        """Put them behind ``x``; the result, and what they are."""
        names, own = [], m.rng
        for index in self._wanted:
            m.rng = np.random.default_rng((self._seed, index))
            block = kinds[int(m.rng.integers(len(kinds)))]
            with m.scope(f"layers.{index}"):
                x = block(m, x)
            names.append(block.__name__)
        m.rng = own
        return x, names


def _embedded(m: GraphMaker, dims: Dims, features: int) -> tuple[Tensor, Tensor]:
    """Ids and their embedding, sometimes with learned positions; also the table."""
    ids = m.input("input_ids", dims, "index", limit=VOCABULARY)
    with m.scope("embed_tokens"):
        table = m.weight(VOCABULARY, features, spread=1.0)
    return m.op("Gather", table, ids, dims=(*dims, features), dtype=TensorProto.FLOAT, axis=0), table


def _tokens(m: GraphMaker, drawn: _Blocks) -> list[str]:
    """An encoder, or a decoder without a cache."""
    batch, features = m.pick("batch", "batch", 2), m.pick(16, 24, 32, 20)
    dims = (batch, m.pick("sequence", "sequence", 6))
    m.memory["is_causal"] = m.chance(0.4)
    table = None
    with m.scope("model"):
        if m.chance(0.7):
            x, table = _embedded(m, dims, features)
        else:
            x = m.input("hidden_states", (*dims, features), "normal")
        if dims[1] == "sequence":
            m.memory["has_positions"] = m.chance(0.4)
            if m.memory["has_positions"] and m.chance(0.5):
                m.input("position_ids", dims, "positions")
        if not m.memory["is_causal"] and m.chance(0.5):
            m.input("attention_mask", dims, "mask")
        x, names = drawn.apply(m, x, _OF_TOKENS)
        x = layers.norm(m, x) if m.chance(0.6) else x
    _finish_tokens(m, x, table)
    return names


def _finish_tokens(m: GraphMaker, x: Tensor, table: Tensor | None) -> None:
    """Logits, tied to the embedding or not, or one row for each text, or the states themselves."""
    what = m.pick("logits", "logits", "pooled", "states")
    if what == "states":
        m.outputs.append(m.op("Identity", x))
        return
    if what == "pooled":
        first = m.reduce("Mean", x, 1, keepdims=False)
        m.outputs.append(layers.linear(m, first, 5, name="classifier"))
        return
    if table is not None and table.dims[1] == x.size and m.chance(0.5):
        turned = m.transpose(table, 1, 0)
        logits = m.op("MatMul", x, turned, dims=(*x.dims[:-1], VOCABULARY))
    else:
        logits = layers.linear(m, x, VOCABULARY, name="lm_head", bias=False)
    m.outputs.append(m.renamed(logits, "logits"))


def _decoder(m: GraphMaker, drawn: _Blocks) -> list[str]:
    """A decoder with a key-value cache, which all its attention layers keep."""
    dims, features = ("batch", "sequence"), m.pick(16, 24, 32)
    m.memory |= {"has_cache": True, "has_positions": m.chance(0.6)}
    with m.scope("model"):
        x, table = _embedded(m, dims, features)
        m.input("attention_mask", ("batch", "total"), "mask")
        m.input("position_ids", dims, "positions")
        with m.scope("first"):
            x = m.op("Add", x, attention(m, layers.norm(m, x)))
        x, names = drawn.apply(m, x, _OF_TOKENS)
        x = layers.norm(m, x)
    if m.chance(0.5):
        logits = m.op("MatMul", x, m.transpose(table, 1, 0), dims=(*dims, VOCABULARY))
    else:
        logits = layers.linear(m, x, VOCABULARY, name="lm_head", bias=False)
    m.outputs.append(m.renamed(logits, "logits"))
    for name, present in m.memory["presents"]:
        m.outputs.append(m.renamed(present, name))
    return names


def _image(m: GraphMaker, drawn: _Blocks) -> list[str]:
    """A convolutional network, sometimes with layers for tokens behind."""
    size = m.pick(8, 12, 16, 9)
    x = m.input("pixel_values", (m.pick("batch", "batch", 1), m.pick(1, 3, 4), size, size), "normal")
    with m.scope("stem"):
        x = images.convolution(m, x)
    x, names = drawn.apply(m, x, _OF_IMAGES)
    match m.pick("rows", "rows", "tokens", "image"):
        case "rows":
            m.outputs.append(layers.linear(m, images.image_to_rows(m, x), 5, name="classifier"))
        case "tokens":
            with m.scope("encoder"):
                x = layers.linear(m, images.image_to_tokens(m, x), 16)
                m.outputs.append(blocks.residual(m, x))
        case _:
            m.outputs.append(m.op("Tanh", x))
    return names


def _rows(m: GraphMaker, drawn: _Blocks) -> list[str]:
    """A network of plain layers."""
    x = m.input("features", (m.pick("batch", "batch", 3), m.pick(7, 12, 16, 24)), "normal")
    x, names = drawn.apply(m, x, _OF_ROWS)
    m.outputs.append(layers.linear(m, x, m.pick(1, 3, 8), name="head"))
    return names


def traced_model(name: str, seed: int) -> RandomModel:
    """A small architecture with other weights for each seed."""
    proto = onnx.ModelProto()
    proto.CopyFrom(_traced(name))
    rng = np.random.default_rng(seed)
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.ndim >= 2 and array.std() > 0:
            noise = rng.standard_normal(array.shape) * array.std() * 0.3
            tensor.CopyFrom(numpy_helper.from_array((array + noise).astype(np.float32), tensor.name))
    return RandomModel(name, proto, tuple(_traced_inputs(proto)), (), False)


@functools.cache
def _traced(name: str) -> onnx.ModelProto:
    import architectures  # transformers take seconds to import
    import planish

    architecture = architectures.by_name(name)
    module = architecture.module()
    if architecture.example is None:
        model = planish.trace_causal_lm(module)
    else:
        model = planish.trace(module, architecture.example, dynamic_shapes=architecture.dynamic_shapes)
    return ir.to_proto(model)


def _traced_inputs(proto: onnx.ModelProto) -> list[Input]:
    """What a traced graph's inputs are, by their names."""
    kinds = {
        "input_ids": "index",
        "attention_mask": "mask",
        "position_ids": "positions",
        "token_type_ids": "zeros",
    }
    found = []
    total = "total" if any(_is_past(value.name) for value in proto.graph.input) else "sequence"
    for value in proto.graph.input:
        shape = value.type.tensor_type.shape.dim
        dims = tuple(_symbol(dim, axis, value.name, total) for axis, dim in enumerate(shape))
        kind = kinds.get(value.name, "normal")
        found.append(Input(Tensor(value.name, dims, value.type.tensor_type.elem_type), kind, 96))
    return found


def _is_past(name: str) -> bool:
    return name.startswith("past_key_values")


def _symbol(dim: onnx.TensorShapeProto.Dimension, axis: int, name: str, total: str) -> int | str:
    if not dim.dim_param:
        return int(dim.dim_value)
    if axis == 0:
        return "batch"
    if _is_past(name):
        return "past"
    if name == "attention_mask":
        return total
    return "sequence" if name.endswith("_ids") else "pixels"
