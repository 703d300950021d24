"""The loss of a stitched candidate is that of the model that was really shrunk and run on its own."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import planish
import pytest
import scipy.special
import torch
import transformers
from planish.codegen import get_target
from planish.ir import clone
from planish.ir.errors import InputError
from planish.ir.structure import Choice, discover, drop, shrink
from planish.runtime import stitched_model
from planish.runtime.calibration import CalibrationData
from planish.runtime.calibration.data import fitted
from planish.runtime.free_shapes import FreeShapes
from planish.runtime.stitched_model import StitchedModel

pytestmark = pytest.mark.slow

# Two runs of the same arithmetic in float32, in another order: losses near one differ by a few of its ulps
# for each of some hundred sums.
CLOSE = {"rel": 1e-4, "abs": 1e-7}


def decoder():
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, head_dim=8,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), {}


def encoder():
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=16,
    )  # fmt: skip
    example = {"input_ids": torch.ones(2, 7, dtype=torch.int64), "attention_mask": torch.ones(2, 7).long()}
    return transformers.BertModel(config, add_pooling_layer=False), {"example_inputs": example}


def vision():
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=24, intermediate_size=40,
        num_hidden_layers=2, num_attention_heads=3,
    )  # fmt: skip
    return transformers.ViTModel(config, add_pooling_layer=False), {
        "example_inputs": {"pixel_values": torch.ones(2, 1, 8, 8)}
    }


def convolutional():
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 6, 3), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(6 * 4 * 4, 9), torch.nn.ReLU(), torch.nn.Linear(9, 5),
    )  # fmt: skip
    return layers, {"example_inputs": (torch.ones(2, 1, 8, 8),)}


class Sliced(torch.nn.Module):
    """Gate and up in one product, cut by bounds that are counted from the end or lie beyond it."""

    def __init__(self):
        super().__init__()
        self.gate_up, self.down = torch.nn.Linear(64, 24), torch.nn.Linear(12, 5)

    def forward(self, x):
        both = self.gate_up(x.flatten(1))
        return self.down(both[:, :-12] * both[:, -12:].tanh())


def sliced():
    return Sliced(), {"example_inputs": (torch.ones(2, 1, 8, 8),)}


MODELS = {
    "decoder": decoder,
    "encoder": encoder,
    "vision": vision,
    "convolutional": convolutional,
    "sliced": sliced,
}


def samples_for(model: ir.Model) -> CalibrationData:
    """Two batches, of different sizes; the tokens of the encoder partly padding."""
    rng = np.random.default_rng(1)
    names = [str(value.name) for value in model.graph.inputs]
    batches = []
    for batch, length in ((3, 7), (2, 5)):
        if "input_ids" in names:
            mask = (np.arange(length) < rng.integers(2, length, (batch, 1))).astype(np.int64)
            feeds = {"input_ids": rng.integers(0, 40, (batch, length))}
            batches.append(feeds if "position_ids" in names else {**feeds, "attention_mask": mask})
        else:
            batches.append({names[0]: rng.standard_normal((batch, 1, 8, 8)).astype(np.float32)})
    return CalibrationData.read(batches, model)


class Case:
    """A model with its structure and samples, and losses that share no code with what is tested."""

    def __init__(self, model: ir.Model, samples=None):
        self.model, self.structure = model, discover(model)
        self.samples = samples if samples is not None else samples_for(model)
        self.groups = [group for group in self.structure.groups if group.kind != "hidden"]
        self.stitched = StitchedModel(model, self.structure, self.groups, self.samples)

    def choices(self, seed: int) -> list[Choice]:
        """Some structures of every group, another share of each, with new weights."""
        rng = np.random.default_rng(seed)
        return [self.choice(group, int(rng.integers(1, group.structures)), rng) for group in self.groups]

    def choice(self, group, kept: int, rng) -> Choice:
        keep = np.sort(rng.permutation(group.structures)[:kept])
        gone = np.delete(np.arange(group.structures), keep)
        weights = {}
        for member in group.consumers:
            dense = self.model.graph.initializers[member.tensor].const_value.numpy()
            refitted = dense + 0.1 * rng.standard_normal(dense.shape).astype(np.float32) * dense.std()
            np.moveaxis(refitted, member.axis, 0)[member.indices[gone]] = np.nan
            weights[member.tensor] = refitted
        return Choice(group, keep, weights)

    def dropped(self, *kinds: str):
        """The first module of each kind."""
        return [next(module for module in self.structure.modules if module.kind == kind) for kind in kinds]

    def reference(self, choices=(), dropped=()) -> float:
        """Of the model that was really shrunk, in a session of its own."""
        changed = clone(self.model)
        shrink(changed, choices)
        drop(changed, dropped)
        dense, found = (
            [outputs(model, fitted(feeds, model)) for feeds in self.samples]
            for model in (self.model, changed)
        )
        rows = [np.concatenate([self.rows(*pair) for pair in zip(arrays, self.samples, strict=True)])
                for arrays in (dense, found)]  # fmt: skip
        if self.model.graph.outputs[0].name != "logits":
            return float(np.square(rows[1] - rows[0]).sum() / np.square(rows[0]).sum())
        p, q = (scipy.special.log_softmax(array, axis=-1) for array in rows)
        return float((np.exp(p) * (p - q)).sum(axis=-1).mean())

    @staticmethod
    def rows(array, feeds) -> np.ndarray:
        flat = array.reshape(-1, array.shape[-1]).astype(np.float64)
        mask = feeds.get("attention_mask")
        return flat if mask is None else flat[mask[:, -array.shape[1] :].reshape(-1) == 1]


def outputs(model: ir.Model, feeds) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run([session.get_outputs()[0].name], dict(feeds))[0]


def traced(name: str) -> ir.Model:
    torch.manual_seed(0)
    module, options = MODELS[name]()
    for parameter in module.parameters():  # transformers' initial weights are so small that layers do little
        torch.nn.init.normal_(parameter, std=0.3)
    return planish.compile(module.eval(), "canonicalize", target=get_target("portable"), **options).model


@pytest.fixture(scope="module", params=MODELS)
def case(request) -> Case:
    return Case(traced(request.param))


@pytest.fixture
def one_session(monkeypatch):
    """Fails where a candidate gets a session of its own."""
    monkeypatch.setattr(stitched_model, "Session", lambda model: pytest.fail("a session of its own"))


def test_the_dense_model_loses_nothing(case: Case, one_session):
    assert case.stitched.fixed == {}
    assert case.stitched.loss([], []) == pytest.approx(0, abs=1e-12)


def test_what_no_group_changes_keeps_its_shape():
    """onnxruntime refuses an Attention whose values' size it cannot infer."""
    case = Case(traced("sliced"))
    free = FreeShapes(case.model, case.groups, case.structure.modules).model
    shapes = {node.op_type: node.outputs[0].shape for node in free.graph}
    assert shapes["Flatten" if "Flatten" in shapes else "Reshape"][1] == 64
    assert shapes["Slice"].is_dynamic(1)


@pytest.mark.parametrize("seed", range(3))
def test_every_group_of_another_size(case: Case, one_session, seed: int):
    choices = case.choices(seed)
    expected = case.reference(choices)
    assert expected > 1e-3  # the comparison means something
    assert case.stitched.loss(choices, []) == pytest.approx(expected, **CLOSE)
    assert case.stitched.loss([], []) == pytest.approx(0, abs=1e-12)  # nothing stays changed


def test_one_group_at_a_time(case: Case, one_session):
    rng = np.random.default_rng(0)
    for group in case.groups:
        choices = [case.choice(group, 1, rng)]
        assert case.stitched.loss(choices, []) == pytest.approx(case.reference(choices), **CLOSE)


@pytest.mark.parametrize("case", ["decoder", "encoder", "vision"], indirect=True)
@pytest.mark.parametrize("kinds", [("attention",), ("ffn",), ("attention", "ffn")], ids="+".join)
def test_dropped_modules(case: Case, one_session, kinds: tuple[str, ...]):
    dropped = case.dropped(*kinds)
    assert case.stitched.loss([], dropped) == pytest.approx(case.reference([], dropped), **CLOSE)
    inside = {name for module in dropped for name in module.groups}
    others = [choice for choice in case.choices(5) if choice.group.name not in inside]
    expected = case.reference(others, dropped)
    assert expected > 1e-3
    assert case.stitched.loss(others, dropped) == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("case", ["encoder", "convolutional"], indirect=True)
def test_refitted_biases(case: Case, one_session):
    choices = case.choices(2)
    biases = [name for name in case.stitched._free.replaceable if name.endswith("bias")]
    consumers = {member.tensor.removesuffix("weight") + "bias" for member in choices[-1].group.consumers}
    (name,) = consumers.intersection(biases)
    bias = case.model.graph.initializers[name].const_value.numpy()
    moved = np.random.default_rng(3).standard_normal(bias.shape).astype(np.float32) * 3
    last = choices[-1]
    choices[-1] = Choice(last.group, last.keep, {**last.weights, name: bias + moved})
    expected = case.reference(choices)
    assert expected != pytest.approx(case.reference(case.choices(2)), rel=1e-2)
    assert case.stitched.loss(choices, []) == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("case", ["decoder"], indirect=True)
def test_caches_that_are_not_empty(case: Case, one_session):
    """They are lost where heads go, as `compile` refits the data, and stay where whole modules go."""
    rng = np.random.default_rng(4)
    past = {
        str(value.name): rng.standard_normal((2, 3, 4, 8)).astype(np.float32)
        for value in case.model.graph.inputs
        if str(value.name).startswith("past")
    }
    samples = CalibrationData.read([{"input_ids": rng.integers(0, 40, (2, 3)), **past}], case.model)
    other = Case(case.model, samples)
    heads, attention = other.choices(0), other.dropped("attention")
    for choices, dropped in (([], []), (heads, []), ([], attention), (heads[2:], attention)):
        expected = other.reference(choices, dropped)
        assert other.stitched.loss(choices, dropped) == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("case", ["encoder"], indirect=True)
def test_weights_that_overflow_lose_infinitely_much(case: Case):
    (choice, *_) = case.choices(0)
    infinite = {name: np.full_like(array, np.inf) for name, array in choice.weights.items()}
    assert case.stitched.loss([Choice(choice.group, choice.keep, infinite)], []) == np.inf
    assert case.stitched.loss([], []) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("case", ["encoder"], indirect=True)
def test_only_what_a_choice_touches_is_given_anew(case: Case):
    (choice, *_) = case.choices(0)
    free = FreeShapes(case.model, case.groups, case.structure.modules)
    touched = {member.tensor for member in choice.group.members}
    arrays = free.arrays([choice], [])
    assert {name for name in arrays if not name.startswith("planish.size")} == touched
    assert set(arrays) < set(free.replaceable)


@pytest.mark.parametrize("case", ["vision"], indirect=True)
def test_new_weights_that_nobody_foresaw_get_a_session_of_their_own(case: Case):
    norm = "layernorm.weight"
    scale = case.model.graph.initializers[norm].const_value.numpy()
    group = next(group for group in case.groups if group.kind == "ffn")
    choices, dropped = [Choice(group, np.arange(7), {norm: scale * 2})], case.dropped("attention")
    expected = case.reference(choices, dropped)
    assert expected > 1
    assert case.stitched.loss(choices, dropped) == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("case", ["convolutional"], indirect=True)
def test_there_must_be_samples(case: Case):
    with pytest.raises(InputError, match="there are none"):
        StitchedModel(case.model, case.structure, case.groups, [])


def parsed(text: str, **shapes: tuple[int, ...]) -> ir.Model:
    """A graph from its text, and random weights of these shapes."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {text}')
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = planish.ir.load(proto)
    planish.ir.infer_shapes(model)
    return model


def depthwise() -> ir.Model:
    return parsed(
        """g (float[n, 2, 6, 6] x) => (float[n, 3, 4, 4] y) {
            a = Conv(x, up) r = Relu(a) d = Conv <group: int = 5> (r, apart) s = Relu(d)
            m = Conv(s, middle) t = Relu(m) y = Conv(t, down) }""",
        up=(5, 2, 1, 1),
        apart=(5, 1, 3, 3),
        middle=(7, 5, 1, 1),
        down=(3, 7, 1, 1),
    )


def test_groups_that_cannot_be_freed_get_a_session_of_their_own(monkeypatch):
    images = np.random.default_rng(2).standard_normal((3, 2, 6, 6)).astype(np.float32)
    case = Case(depthwise(), [{"x": images}])
    fixed, free = case.groups
    assert case.stitched.fixed == {fixed.name: "Conv 'd' says a size in an attribute"}
    rng = np.random.default_rng(0)
    both = [case.choice(fixed, 2, rng), case.choice(free, 3, rng)]
    for choices in (both, both[:1]):
        expected = case.reference(choices)
        assert expected > 1e-3
        assert case.stitched.loss(choices, []) == pytest.approx(expected, **CLOSE)
    monkeypatch.setattr(stitched_model, "Session", lambda model: pytest.fail("a session of its own"))
    assert case.stitched.loss(both[1:], []) == pytest.approx(case.reference(both[1:]), **CLOSE)


SPLITS = {
    "Split": "<int64[2] sizes = {6, 6}> { h = MatMul(x, up) a, b = Split <axis: int = -1> (h, sizes)",
    "Slice": """<int64[1] o = {0}, int64[1] six = {6}, int64[1] end = {12}, int64[1] last = {-1}>
        { h = MatMul(x, up) a = Slice(h, o, six, last) b = Slice(h, six, end, last)""",
    "SplitToSequence": """<int64 six = {6}, int64 i = {0}, int64 j = {1}>
        { h = MatMul(x, up) p = SplitToSequence <axis: int = -1> (h, six)
          a = SequenceAt(p, i) b = SequenceAt(p, j)""",
}


@pytest.mark.parametrize("op_type", SPLITS)
def test_sizes_of_a_split(op_type: str):
    model = parsed(
        f"g (float[n, 4] x) => (float[n, 3] y) {SPLITS[op_type]}"
        " s = Sigmoid(a) t = Mul(s, b) y = MatMul(t, down) }",
        up=(4, 12),
        down=(6, 3),
    )
    for value in (value for node in model.graph for value in node.outputs):
        if value.shape is None and isinstance(value.type, ir.TensorType):
            value.shape = ir.Shape(["n", 6])  # as torch notes it behind sequences, which inference does not
    case = Case(model, [{"x": np.random.default_rng(2).standard_normal((5, 4)).astype(np.float32)}])
    # One number for all parts becomes a list of numbers: a session cannot take both.
    assert list(case.stitched.fixed.values()) == (
        ["SplitToSequence 'p' is given sizes in another form"] if op_type == "SplitToSequence" else []
    )
    (group,) = case.groups
    assert group.structures == 6
    for kept in range(1, 6):
        choices = [case.choice(group, kept, np.random.default_rng(kept))]
        assert case.stitched.loss(choices, []) == pytest.approx(case.reference(choices), **CLOSE)


@pytest.mark.parametrize("case", ["decoder"], indirect=True)
def test_the_residual_width_under_a_norm_gets_a_session_of_its_own(case: Case):
    """Its shrinking changes the norm's ε, an attribute."""
    (hidden,) = (group for group in case.structure.groups if group.kind == "hidden")
    stitched = StitchedModel(case.model, case.structure, [hidden], case.samples)
    assert "says a size in an attribute" in stitched.fixed[hidden.name]
    choices = [Choice(hidden, np.arange(20))]
    assert stitched.loss(choices, []) == pytest.approx(case.reference(choices), **CLOSE)
