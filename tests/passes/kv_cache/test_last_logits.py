"""Logits of the last token alone: the graph, its numbers, and what is refused."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import planish
import pytest
from planish.codegen.target import BoundModel
from planish.ir import clone, verify
from planish.ir.errors import InputError, PassError
from planish.passes.kv_cache import LastLogits
from planish.runtime.generate import PromptLookup
from planish.runtime.session import Session
from small_decoders import traced_llama

X = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
WEIGHT = "float[4,6] w = {" + ", ".join(str(index / 7) for index in range(24)) + "}"
NUMBERS = "float c = {2.0}, float[6] b = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}"


def model_of(body: str, shape: str = "b,s,6", name: str = "logits") -> ir.Model:
    return ir.from_proto(
        onnx.parser.parse_model(
            f'<ir_version: 11, opset_import: ["" : 23]> g (float[b,s,4] x) => (float[{shape}] {name})'
            f" <{WEIGHT}, {NUMBERS}> {{ {body} }}"
        )
    )


def logits(model):
    return Session(BoundModel(model=model)).run({"x": X})["logits"]


@pytest.mark.parametrize(
    "body",
    [
        "logits = MatMul(x, w)",
        "p = MatMul(x, w) logits = Add(p, b)",
        "p = MatMul(x, w) q = Div(p, c) t = Tanh(q) logits = Mul(t, c)",
        "h = Relu(x) logits = MatMul(h, w)",
    ],
    ids=["linear", "bias", "soft cap", "behind others"],
)
def test_the_last_token_s_are_as_before(body):
    model = model_of(body)
    expected = logits(model)[:, -1:]
    LastLogits().run(model, None)
    verify(model)
    assert list(model.graph.outputs[0].shape)[1:] == [1, 6]
    # A product of one row may be summed in another order: float32 rounding of 4 products below 10.
    np.testing.assert_allclose(logits(model), expected, atol=1e-5)
    slices = [node for node in model.graph if node.op_type == "Slice"]
    assert len(slices) == 1


def test_a_second_time_there_is_nothing_to_do():
    model = model_of("logits = MatMul(x, w)")
    LastLogits().run(model, None)
    result = LastLogits().run(model, None)
    assert not result.modified
    assert str(result.coverage) == "0 of 1 outputs; 1 skipped: they are of one token already"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (model_of("logits = Relu(x)", "b,s,4"), "was expected to come from a linear, found Relu"),
        (model_of("p = MatMul(x, w) q = Relu(p) logits = Mul(p, q)"), "found Mul"),
        (model_of("p = MatMul(x, w) z = Relu(p)", name="z"), "found None"),
    ],
    ids=["no linear", "two paths", "no logits"],
)
def test_others_are_refused(model, message):
    with pytest.raises(PassError, match=message):
        LastLogits().run(model, None)


def test_generation_takes_it():
    passes = "canonicalize,fuse,raise-cache"
    whole = planish.compile(clone(traced_llama()), passes)
    last = planish.compile(clone(traced_llama()), f"{passes},last-logits")
    prompts = [[1, 2, 3, 4], [5, 6]]
    np.testing.assert_array_equal(last.generate(prompts, 8), whole.generate(prompts, 8))
    with pytest.raises(InputError, match="compile it without last-logits"):
        last.generate([[1, 2]], 4, draft=PromptLookup())
