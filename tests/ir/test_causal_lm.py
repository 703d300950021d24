"""Models of transformers: an encoder, and a causal language model with its key-value cache."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from planish.ir.causal_lm import CausalLMSignature, is_causal_lm, trace_causal_lm
from planish.ir.errors import InputError
from planish.ir.signature import META_KEY, REMARKS_KEY, flatten_inputs, unflatten_outputs
from planish.ir.trace import trace

transformers = pytest.importorskip("transformers")

RTOL = 1e-4
"""Relative to the largest output: two layers of float32 sums of at most 64 terms stay far below it."""
PAST = ["past_key_values.0.key", "past_key_values.0.value"]


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def traced(llama) -> ir.Model:
    return trace(llama)


@pytest.fixture(scope="module")
def compiled(traced: ir.Model):
    signature = traced.meta[META_KEY]
    session = onnxruntime.InferenceSession(
        ir.to_proto(traced).SerializeToString(), providers=["CPUExecutionProvider"]
    )

    def call(**inputs):
        feeds = {name: tensor.numpy() for name, tensor in flatten_inputs(signature, (), inputs).items()}
        outputs = session.run(list(signature.output_names), feeds)
        return unflatten_outputs(signature, [torch.from_numpy(output) for output in outputs])

    return call


def assert_close(found: torch.Tensor, expected: torch.Tensor, attended: torch.Tensor) -> None:
    difference = ((found - expected.detach()) * attended).abs().max()
    assert difference <= RTOL * expected.abs().max()


def test_inputs_and_outputs_have_the_names_and_dimensions_of_the_ecosystem(traced: ir.Model) -> None:
    shapes = {
        value.name: [str(dim) for dim in value.shape or ()]
        for value in (*traced.graph.inputs, *traced.graph.outputs)
    }
    past = ["batch_size", "2", "past_sequence_length", "4"]
    present = ["batch_size", "2", "total_sequence_length", "4"]
    assert shapes == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        "past_key_values.0.key": past,
        "past_key_values.0.value": past,
        "logits": ["batch_size", "sequence_length", "50"],
        "present.0.key": present,
        "present.0.value": present,
    }


def test_parameters_keep_their_names(llama, traced: ir.Model) -> None:
    assert set(dict(llama.named_parameters())) <= set(traced.graph.initializers)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_left_padded_conversation_agrees_with_torch(llama, compiled, batch) -> None:
    generator = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, 0, dtype=torch.int64)
    ours = theirs = None
    for length, padding in ((6, 2), (1, 0), (4, 0)):
        ids = torch.randint(0, 50, (batch, length), generator=generator)
        new = torch.ones(batch, length, dtype=torch.int64)
        new[0, :padding] = 0
        mask = torch.cat([mask, new], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        ours = compiled(
            input_ids=ids, attention_mask=mask, past_key_values=ours.past_key_values if ours else None
        )
        theirs = llama(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=theirs.past_key_values if theirs else None,
            use_cache=True,
        )
        assert type(ours) is type(theirs)
        assert not ours.logits.isnan().any()
        assert_close(ours.logits, theirs.logits, new[:, :, None])
        keys = theirs.past_key_values.layers[0].keys
        assert_close(ours.past_key_values.layers[0].keys, keys, mask[:, None, :, None])


def test_padding_changes_nothing_for_the_tokens_that_are_there(compiled) -> None:
    """The mask is in the graph: without it the padding would be attended to."""
    ids = torch.tensor([[7, 8, 9]])
    padded = torch.tensor([[1, 2, 7, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    alone, beside = compiled(input_ids=ids).logits, compiled(input_ids=padded, attention_mask=mask).logits
    unmasked = compiled(input_ids=padded).logits
    torch.testing.assert_close(beside[:, 2:], alone, rtol=RTOL, atol=RTOL * alone.abs().max().item())
    assert (unmasked[:, 2:] - alone).abs().max() > 10 * RTOL * alone.abs().max()


@pytest.fixture(scope="module")
def signature(traced: ir.Model) -> CausalLMSignature:
    return traced.meta[META_KEY]


def test_what_is_left_out_is_filled_in(signature) -> None:
    feeds = flatten_inputs(signature, (torch.zeros(2, 3, dtype=torch.int64),))
    assert list(feeds) == ["input_ids", "attention_mask", "position_ids", *PAST]
    assert feeds["attention_mask"].tolist() == [[1, 1, 1]] * 2
    assert feeds["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert feeds[PAST[0]].shape == (2, 2, 0, 4)


def test_positions_count_attended_tokens(signature) -> None:
    past = [(torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4))]
    mask = torch.tensor([[0, 1, 1, 1]])
    feeds = flatten_inputs(
        signature,
        (),
        {"input_ids": torch.zeros(1, 2, dtype=torch.int64), "attention_mask": mask, "past_key_values": past},
    )
    assert feeds["position_ids"].tolist() == [[1, 2]]


def test_the_past_may_be_a_cache_pairs_or_named_tensors(signature) -> None:
    key, value = torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4)
    cache = transformers.DynamicCache()
    cache.update(key, value, 0)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    for past in (
        {"past_key_values": cache},
        {"past_key_values": ((key, value),)},
        {PAST[0]: key, PAST[1]: value},
    ):
        feeds = flatten_inputs(signature, (), {"input_ids": ids, **past})
        assert torch.equal(feeds[PAST[0]], key)
        assert torch.equal(feeds[PAST[1]], value)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "'input_ids' is missing"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "'input_ids' is missing or is no"),
        ({"attention_mask": torch.ones(1, 5)}, r"'attention_mask' is \(1, 5\)"),
        ({"past_key_values": [(X := torch.zeros(1, 2, 1, 4), X)] * 2}, "has 2 layers, the model has 1"),
        ({PAST[0]: torch.zeros(1, 2, 1, 4)}, r"'past_key_values\.0\.value' is missing"),
        ({"labels": torch.zeros(1, 2)}, "'labels' is no input"),
        ({"use_cache": False}, "'use_cache' is no input"),
    ],
)
def test_a_call_that_does_not_fit_is_one_clear_error(signature, inputs, message) -> None:
    if "input_ids" not in inputs and inputs:
        inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.int64), **inputs}
    with pytest.raises(InputError, match=message):
        flatten_inputs(signature, (), inputs)


@pytest.mark.slow
def test_example_inputs_trace_a_language_model_as_it_is_called(llama) -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    model = trace(llama, {"input_ids": ids})
    assert [value.name for value in model.graph.inputs] == ["input_ids"]
    assert [value.name for value in model.graph.outputs] == ["logits"]
    assert any("without a key-value cache" in remark for remark in model.meta[REMARKS_KEY])


@pytest.mark.slow
def test_an_encoder_keeps_the_names_of_its_arguments_and_outputs() -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    torch.manual_seed(0)
    bert = transformers.BertModel(config).eval()
    assert not is_causal_lm(bert)
    with pytest.raises(InputError, match="BertModel is no causal language model"):
        trace_causal_lm(bert)
    example = {
        "input_ids": torch.ones(2, 5, dtype=torch.int64),
        "attention_mask": torch.ones(2, 5, dtype=torch.int64),
    }
    model = trace(bert, example)
    signature = model.meta[META_KEY]
    assert signature.input_names == ("input_ids", "attention_mask")
    assert signature.output_names == ("last_hidden_state", "pooler_output")
    assert [str(dim) for dim in model.graph.inputs[1].shape] == ["batch_size", "sequence_length"]
    call = {
        "input_ids": torch.arange(21).reshape(3, 7),
        "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 7]),
    }
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    feeds = {name: tensor.numpy() for name, tensor in flatten_inputs(signature, (), call).items()}
    found, expected = unflatten_outputs(signature, session.run(None, feeds)), bert(**call)
    assert type(found) is type(expected)
    for name in ("last_hidden_state", "pooler_output"):
        reference = expected[name].detach().numpy()
        assert np.abs(found[name] - reference).max() <= RTOL * np.abs(reference).max()


@pytest.mark.slow
def test_example_inputs_that_use_the_cache_trace_it(llama, traced: ir.Model) -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    example = {"input_ids": ids, "use_cache": True}
    model = trace(llama, example)
    assert [value.name for value in model.graph.inputs] == [value.name for value in traced.graph.inputs]
    assert list(flatten_inputs(model.meta[META_KEY], (), example)) == [v.name for v in traced.graph.inputs]
    with pytest.raises(InputError, match="dynamic_shapes cannot be chosen"):
        trace(llama, example, dynamic_shapes={"input_ids": {0: "batch"}})
