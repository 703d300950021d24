"""Pieces cut out of models: what they compute, what they read at each level, and which of them are alike."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import planish
import pytest
from planish.codegen.portable import Portable
from planish.ir import clone
from planish.ir.errors import InputError
from planish.ir.structure import Choice, discover, shrink
from planish.ir.walk import all_values
from planish.passes.fuse import Fuse
from planish.passes.infrastructure.base import PassContext
from planish.runtime.latency_pieces import extract, group_nodes, own_module, signature
from planish.runtime.latency_table import deployment_feeds, measure_latency_table
from planish.runtime.measure import Latency
from planish.runtime.reference import run_model
from planish.runtime.session import Session

HIDDEN, HEADS, KV_HEADS, SIZE, WIDTH = 16, 4, 2, 4, 24
RNG = np.random.default_rng(0)
TARGET = Portable()

LAYER = """
  n{i} = RMSNormalization (x{i}, l{i}__norm)
  q{i} = MatMul (n{i}, l{i}__q)
  qr{i} = Reshape (q{i}, query_shape)
  qt{i} = Transpose <perm = [0, 2, 1, 3]> (qr{i})
  k{i} = MatMul (n{i}, l{i}__k)
  kr{i} = Reshape (k{i}, key_shape)
  kt{i} = Transpose <perm = [0, 2, 1, 3]> (kr{i})
  v{i} = MatMul (n{i}, l{i}__v)
  vr{i} = Reshape (v{i}, key_shape)
  vt{i} = Transpose <perm = [0, 2, 1, 3]> (vr{i})
  a{i}, present__{i}__key, present__{i}__value =
      Attention (qt{i}, kt{i}, vt{i}, mask, past_key_values__{i}__key, past_key_values__{i}__value)
  at{i} = Transpose <perm = [0, 2, 1, 3]> (a{i})
  ar{i} = Reshape (at{i}, joined)
  o{i} = MatMul (ar{i}, l{i}__o)
  y{i} = Add (x{i}, o{i})
  m{i} = RMSNormalization (y{i}, l{i}__norm2)
  u{i} = MatMul (m{i}, l{i}__up)
  g{i} = Relu (u{i})
  d{i} = MatMul (g{i}, l{i}__down)
  x{next} = Add (y{i}, d{i})
"""
SHAPES = {
    "norm": (HIDDEN,),
    "q": (HIDDEN, HEADS * SIZE),
    "k": (HIDDEN, KV_HEADS * SIZE),
    "v": (HIDDEN, KV_HEADS * SIZE),
    "o": (HEADS * SIZE, HIDDEN),
    "norm2": (HIDDEN,),
    "up": (HIDDEN, WIDTH),
    "down": (WIDTH, HIDDEN),
}


def parsed(text: str, weights: dict[str, np.ndarray]) -> ir.Model:
    """The text's model with the weights as initializers; ``__`` in names stands for a dot."""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    model = planish.ir.load(proto)
    for value in list(all_values(model)):
        value.name = value.name.replace("__", ".")
    planish.ir.infer_shapes(model)
    return model


def decoder(layers: int = 2) -> ir.Model:
    """A decoder with grouped queries and a cache, for five new tokens."""
    weights = {
        "query_shape": np.array([0, 0, HEADS, SIZE]),
        "key_shape": np.array([0, 0, KV_HEADS, SIZE]),
        "joined": np.array([0, 0, HEADS * SIZE]),
        "axes": np.array([1, 2]),
        "tokens": np.array([1, 1, 5, 1]),
        "table": RNG.standard_normal((32, HIDDEN)).astype(np.float32),
        "head": RNG.standard_normal((HIDDEN, 32)).astype(np.float32),
    }
    for i in range(layers):
        for name, shape in SHAPES.items():
            weights[f"l{i}__{name}"] = RNG.standard_normal(shape).astype(np.float32)
    caches = [f"{i}__{part}" for i in range(layers) for part in ("key", "value")]
    past = [f"float[b, {KV_HEADS}, p, {SIZE}] past_key_values__{name}" for name in caches]
    present = [f"float[b, {KV_HEADS}, t, {SIZE}] present__{name}" for name in caches]
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
        net (int64[b, s] input_ids, int64[b, t] attention_mask, {", ".join(past)})
            => (float[b, s, 32] logits, {", ".join(present)})
        {{
          x0 = Gather (table, input_ids)
          flat = Cast <to = 9> (attention_mask)
          row = Unsqueeze (flat, axes)
          mask = Expand (row, tokens)
          {"".join(LAYER.format(i=i, next=i + 1) for i in range(layers))}
          logits = MatMul (x{layers}, head)
        }}"""
    return parsed(text, weights)


def convolutions() -> ir.Model:
    """Two convolutions and a norm between them: a group without a residual module."""
    text = """<ir_version: 10, opset_import: ["" : 23]>
        net (float[n, 3, 8, 8] x) => (float[n, 4, 8, 8] y)
        {
          a = Conv <pads = [1, 1, 1, 1]> (x, first)
          b = BatchNormalization (a, scale, bias, mean, variance)
          c = Relu (b)
          y = Conv <pads = [1, 1, 1, 1]> (c, second)
        }"""
    shapes = {"first": (6, 3, 3, 3), "second": (4, 6, 3, 3), "scale": (6,), "bias": (6,), "mean": (6,)}
    weights = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return parsed(text, {**weights, "variance": np.ones(6, np.float32)})


def decoder_feeds(past: int = 3) -> dict[str, np.ndarray]:
    feeds = {
        "input_ids": RNG.integers(0, 32, (2, 5)),
        "attention_mask": np.ones((2, past + 5), np.int64),
    }
    for index in range(2):
        for part in ("key", "value"):
            cache = RNG.standard_normal((2, KV_HEADS, past, SIZE)).astype(np.float32)
            feeds[f"past_key_values.{index}.{part}"] = cache
    return feeds


MODELS = {
    "decoder": (decoder, decoder_feeds),
    "convolutions": (
        convolutions,
        lambda: {"x": RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_pieces_compute_what_the_whole_model_does(name):
    model, feeds = (make() for make in MODELS[name])
    structure = discover(model)
    parts = {group.name: group_nodes(structure, group) for group in structure.groups}
    pieces = extract(model, parts, feeds)
    assert set(pieces) == {group.name for group in structure.groups}
    for piece in pieces.values():
        outputs = Session(piece.model).run(piece.feeds)
        assert outputs
        for output, array in outputs.items():
            expected = run_model(model, feeds, [output])[output]
            # The same float32 kernels, in graphs that are optimised differently: sums of up to 54 terms of
            # size 1, in another order.
            np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize(("group", "kept"), [("l0", 1), ("l0.up", 5)])
def test_levels_compute_what_the_shrunk_model_does(group, kept, past):
    """Of groups that nothing shrunk comes before."""
    model, feeds = decoder(), decoder_feeds(past)
    structure = discover(model)
    chosen = structure.group(group)
    whole = clone(model)
    shrink(whole, [Choice(chosen, np.arange(kept))])
    whole_feeds = dict(feeds)
    if group == "l0":
        for part in ("key", "value"):
            cache = f"past_key_values.0.{part}"
            whole_feeds[cache] = np.ascontiguousarray(feeds[cache][:, :1])
    piece = extract(model, {group: group_nodes(structure, chosen)}, feeds)[group].at_level(chosen, kept)
    for output, array in Session(piece.model).run(piece.feeds).items():
        expected = run_model(whole, whole_feeds, [output])[output]
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-4)  # as above


def test_a_level_of_the_whole_width():
    model, feeds = decoder(), decoder_feeds()
    structure = discover(model)
    group = structure.group("hidden")
    piece = extract(model, {"hidden": group_nodes(structure, group)}, feeds)["hidden"].at_level(group, 7)
    widths = {array.shape[-1] for array in Session(piece.model).run(piece.feeds).values()}
    # The projections of attentions and feed-forward modules and the logits, but nothing of the full width.
    assert widths == {HEADS * SIZE, KV_HEADS * SIZE, WIDTH, 32}
    assert piece.model.graph.initializers["head"].const_value.shape == (7, 32)


def test_a_group_with_a_module_to_itself_is_timed_with_its_norm_and_its_sum():
    structure = discover(decoder())
    group = structure.group("l0.up")
    assert set(group_nodes(structure, group)) == {"m0", "u0", "g0", "d0", "x1"}
    assert own_module(structure, structure.group("hidden")) is None
    assert group_nodes(structure, structure.group("hidden")) == structure.group("hidden").nodes


def test_what_is_read_is_real():
    model, feeds = decoder(), decoder_feeds()
    piece = extract(model, {"l1": group_nodes(discover(model), discover(model).group("l1"))}, feeds)["l1"]
    assert set(piece.feeds) == {"x1", "mask", "past_key_values.1.key", "past_key_values.1.value"}
    assert piece.feeds["mask"].dtype == bool
    assert piece.feeds["mask"].all()
    np.testing.assert_array_equal(piece.feeds["past_key_values.1.key"], feeds["past_key_values.1.key"])
    np.testing.assert_allclose(piece.feeds["x1"], run_model(model, feeds, ["x1"])["x1"], rtol=1e-4, atol=1e-4)


def test_caches_of_a_level_have_its_heads():
    model = decoder()
    group = discover(model).group("l0")
    piece = extract(model, {"l0": group_nodes(discover(model), group)}, decoder_feeds())["l0"]
    reduced = piece.at_level(group, 1)
    assert reduced.feeds["past_key_values.0.key"].shape == (2, 1, 3, SIZE)
    assert piece.feeds["past_key_values.0.key"].shape == (2, KV_HEADS, 3, SIZE)


def test_without_work_there_are_the_same_inputs_and_as_many_outputs():
    model = decoder()
    piece = extract(model, {"l0": group_nodes(discover(model), discover(model).group("l0"))}, decoder_feeds())
    idle = piece["l0"].without_work()
    outputs = Session(idle.model).run(idle.feeds)
    assert len(outputs) == len(piece["l0"].model.graph.outputs) == 3
    assert {node.op_type for node in idle.model.graph} == {"Shape"}
    assert [value.name for value in idle.model.graph.inputs] == list(idle.feeds)


def test_weights_are_shared():
    model = decoder()
    structure = discover(model)
    piece = extract(model, {"up": group_nodes(structure, structure.group("l0.up"))}, decoder_feeds())["up"]
    for name, value in piece.model.graph.initializers.items():
        assert value.const_value is model.graph.initializers[name].const_value


def test_what_only_a_subgraph_reads_is_an_input():
    text = """<ir_version: 10, opset_import: ["" : 23]>
        g (float[n] x, bool flag) => (float[n] y)
        {
          a = Neg (x)
          b = If (flag) <
            then_branch = t () => (float[n] p) { p = Exp (a) },
            else_branch = e () => (float[n] q) { q = Sqrt (x) }
          >
          y = Abs (b)
        }"""
    model = parsed(text, {})
    feeds = {"x": np.array([1.0, 4.0], np.float32), "flag": np.array(True)}
    piece = extract(model, {"if": ["b"]}, feeds)["if"]
    assert set(piece.feeds) == {"x", "flag", "a"}
    np.testing.assert_array_equal(piece.feeds["a"], [-1.0, -4.0])
    # One exponential in float32.
    np.testing.assert_allclose(Session(piece.model).run(piece.feeds)["b"], np.exp([-1.0, -4.0]), rtol=1e-6)
    inner = extract(model, {"a": ["a"]}, feeds)["a"]
    assert [value.name for value in inner.model.graph.outputs] == ["a"]


def test_unknown_nodes_are_refused():
    with pytest.raises(InputError, match="latency of 'mlp': the graph has no node with the output 'gone'"):
        extract(decoder(), {"mlp": ["u0", "gone"]}, decoder_feeds())


# Signatures

BASE = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[n, 4] x) => (float[n, 6] y)
    { a = MatMul (x, w) b = Reshape (a, to) y = Softmax <axis = 1> (b) }"""
WEIGHTS = {"w": np.ones((4, 6), np.float32), "to": np.array([0, 6])}
FEEDS = {"x": np.ones((3, 4), np.float32)}


def base_signature(text: str = BASE, feeds=None, **weights: np.ndarray) -> str:
    return signature(parsed(text, {**WEIGHTS, **weights}), feeds or FEEDS)


@pytest.mark.parametrize(
    "same",
    [
        base_signature(w=np.zeros((4, 6), np.float32)),
        base_signature(BASE.replace("a = ", "other = ").replace("(a,", "(other,")),
        base_signature(feeds={"x": np.zeros((3, 4), np.float32)}),
    ],
)
def test_names_weights_and_activations_do_not_count(same):
    assert same == base_signature()


@pytest.mark.parametrize(
    "other",
    [
        base_signature(BASE.replace("Softmax", "LogSoftmax")),
        base_signature(BASE.replace("axis = 1", "axis = 0")),
        base_signature(BASE.replace("MatMul (x, w)", "MatMul (x, w) c = Neg (x)")),
        base_signature(BASE.replace("Softmax <axis = 1> (b)", "Softmax <axis = 1> (a)")),
        base_signature(
            BASE.replace("float[", "double["), {"x": np.ones((3, 4))}, w=np.ones((4, 6), np.float64)
        ),
        base_signature(w=np.ones((4, 7), np.float32)),
        base_signature(to=np.array([-1, 6])),
        base_signature(feeds={"x": np.ones((5, 4), np.float32)}),
    ],
)
def test_ops_attributes_shapes_and_integers_count(other):
    assert other != base_signature()


def test_what_subgraphs_hold_counts():
    text = """<ir_version: 10, opset_import: ["" : 23]>
        g (float[n] x, bool flag) => (float[n] y)
        {
          y = If (flag) <
            then_branch = t () => (float[n] p) { p = Exp (x) },
            else_branch = e () => (float[n] q) { q = Sqrt (x) }
          >
        }"""
    feeds = {"x": np.ones(2, np.float32), "flag": np.array(True)}
    found = [signature(parsed(version, {}), feeds) for version in (text, text.replace("Sqrt", "Neg"))]
    assert found[0] != found[1]
    assert found[0] == signature(parsed(text.replace("q = ", "r = ").replace(" q)", " r)"), {}), feeds)


def test_short_integer_inputs_count_by_content():
    text = """<ir_version: 10, opset_import: ["" : 23]>
        g (int64[1] length, int64[n] ids) => (int64[m] y) { y = Expand (length, length) z = Neg (ids) }"""
    model = parsed(text, {})
    ids = np.arange(100)
    first, second = ({"length": np.array([size]), "ids": ids} for size in (3, 4))
    assert signature(model, first) != signature(model, second)
    assert signature(model, first) == signature(model, {**first, "ids": ids[::-1]})


# The whole way


def fuse(model: ir.Model) -> None:
    Fuse().run(model, PassContext(target=TARGET))


@pytest.mark.parametrize(("past", "levels"), [(0, {"l0": 2, "l1": 2, "l0.up": 24, "l1.up": 24})])
def test_table_of_a_decoder(past, levels, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path))
    model = decoder()
    counts = {name: [dense, dense // 2, 1, 0] for name, dense in levels.items()}
    asked = []

    def timer(runs):
        """A level takes as many seconds as it keeps structures, and each is really run."""
        asked.append(list(runs))
        for run in runs.values():
            run()
        medians = {name: 1e3 * float(name) if name.isdigit() else 0.0 for name in runs}
        return {
            name: Latency(median_ms=m, fastest_ms=m, steady_ms=m, samples=1, rounds_ms=(m,))
            for name, m in medians.items()
        }

    table = measure_latency_table(
        model,
        discover(model),
        counts,
        target=TARGET,
        feeds=deployment_feeds(model, batch=2, sequence=5),
        batch=2,
        sequence=5,
        deployed_with="fuse",
        prepare=fuse,
        timer=timer,
    )
    # Both attentions are alike, and both feed-forward modules.
    assert asked == [["2", "1", "overhead"], ["24", "12", "1", "overhead"], ["dense"]]
    assert table.seconds == {name: {count: float(count) for count in row} for name, row in counts.items()}
    table.check(target=TARGET, batch=2, sequence=5, deployed_with="fuse", levels=counts)
