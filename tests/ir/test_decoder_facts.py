"""What a decoder's configuration says survives tracing, saving and loading."""

import onnx_ir as ir
import planish
import pytest
import transformers
from planish.ir.decoder_facts import DecoderFacts
from planish.ir.errors import ModelError


def config(**options):
    return transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=128,
        **options,
    )


def test_a_traced_decoder_keeps_them(tmp_path):
    module = transformers.LlamaForCausalLM(config(eos_token_id=[2, 3], pad_token_id=0)).eval()
    model = planish.trace_causal_lm(module)
    expected = DecoderFacts(
        architecture="llama",
        vocabulary=64,
        hidden_size=32,
        heads=4,
        head_size=8,
        positions=128,
        begin_token=1,
        end_tokens=(2, 3),
        pad_token=0,
    )
    assert DecoderFacts.read(model) == expected
    planish.save(model, tmp_path / "model.onnx")
    assert DecoderFacts.read(planish.load(tmp_path / "model.onnx")) == expected


@pytest.mark.parametrize(("token", "expected"), [(2, (2,)), (None, ()), ([2, 5], (2, 5))])
def test_end_tokens(token, expected):
    assert DecoderFacts.of_config(config(eos_token_id=token)).end_tokens == expected


def test_names_of_other_architectures():
    facts = DecoderFacts.of_config(transformers.GPT2Config(n_embd=48, n_head=4, n_positions=77))
    assert (facts.architecture, facts.hidden_size, facts.head_size, facts.positions) == ("gpt2", 48, 12, 77)
    assert DecoderFacts.of_config(transformers.Qwen3Config(head_dim=16)).head_size == 16


def empty_model():
    return ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)


def test_models_without():
    assert DecoderFacts.read(empty_model()) is None


@pytest.mark.parametrize("text", ["{", "{}", '{"end_tokens": []}', '{"end_tokens": [], "colour": 1}'])
def test_damaged(text):
    model = empty_model()
    model.metadata_props["planish.decoder"] = text
    with pytest.raises(ModelError, match="expected the facts of a decoder"):
        DecoderFacts.read(model)
