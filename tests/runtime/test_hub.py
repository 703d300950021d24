"""File names of the hub's convention, and folders in its layout."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import planish
import pytest
import transformers
from planish.ir.errors import InputError, ModelError
from planish.runtime.hub import hub_file_names
from small_decoders import small_decoder, traced_llama

PORTABLE = planish.get_target("portable")
ONNXRUNTIME = planish.get_target("onnxruntime-cpu", threads=1)
IDS = np.random.default_rng(0).integers(0, 64, (1, 9))


def compiled(passes="canonicalize,fuse", target=PORTABLE):
    return planish.compile(traced_llama(), passes, target=target)


def quantised(scheme, **options):
    options = {"algorithm": "rtn", **options}
    text = ",".join(f"{name}={value}" for name, value in {"scheme": scheme, **options}.items())
    return f"canonicalize,fuse,quantize{{{text}}}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("passes", "names"),
    [
        ("canonicalize,fuse", ("model.onnx",)),
        (quantised("W4A16", group_size=16), ("model_q4.onnx",)),
        (quantised("W3A16", group_size=16), ("model_q4.onnx",)),
        (quantised("W2A16", group_size=16), ("model_q2.onnx",)),
        (quantised("W8A16"), ("model_quantized.onnx", "model_int8.onnx")),
        (quantised("W8A16_ASYM"), ("model_quantized.onnx", "model_uint8.onnx")),
        (quantised("W8A8"), ("model_quantized.onnx", "model_int8.onnx")),
        (quantised("W4A8", group_size=16), ("model_q4.onnx",)),
        (quantised("NF4", group_size=32), ("model_bnb4.onnx",)),
    ],
)
def test_names_follow_the_weights_of_most_linears(passes, names):
    assert compiled(passes).hub_file_names == names


@pytest.mark.parametrize("scheme", ["FP8A16", "MXFP4A16"])
def test_weights_that_the_hub_has_no_name_for(scheme, tmp_path):
    model = compiled(quantised(scheme))
    with pytest.raises(InputError, match="the hub has no name for"):
        model.save_hub(tmp_path / "llama")
    assert model.save_hub(tmp_path / "llama", name="model_other.onnx").is_file()


def test_models_without_products_need_a_name():
    text = '<ir_version: 11, opset_import: ["" : 23]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    with pytest.raises(InputError, match="and the model has none"):
        hub_file_names(ir.from_proto(onnx.parser.parse_model(text)))


@pytest.mark.parametrize("target", [PORTABLE, ONNXRUNTIME], ids=["portable", "onnxruntime"])
@pytest.mark.parametrize(
    ("scheme", "name"), [("W4A16", "model_q4.onnx"), ("W8A8", "model_quantized.onnx"), (None, "model.onnx")]
)
def test_files_that_were_saved_are_called_the_same(tmp_path, scheme, name, target):
    """Their ops are bound, and say otherwise how weights are stored."""
    model = compiled("canonicalize,fuse" if scheme is None else quantised(scheme, group_size=-1), target)
    path = model.save_hub(tmp_path / "llama")
    assert path == tmp_path / "llama" / "onnx" / name
    assert planish.CompiledModel.open(path).hub_file_names[0] == name


@pytest.mark.slow
def test_sixteen_bit_models_have_names_of_their_own():
    halves = planish.trace_causal_lm(small_decoder(num_hidden_layers=1).half())
    float_model = planish.compile(halves, "canonicalize", target=PORTABLE)
    assert float_model.hub_file_names == ("model_fp16.onnx",)
    quantised_model = planish.compile(halves, quantised("W4A16", group_size=16), target=PORTABLE)
    assert quantised_model.hub_file_names == ("model_q4f16.onnx",)
    assert hub_file_names(quantised_model.bound.model) == ("model_q4f16.onnx",)


def test_a_folder_has_the_configuration_that_the_model_was_traced_with(tmp_path):
    folder = tmp_path / "llama"
    model = compiled()
    path = model.save_hub(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.num_key_value_heads) == ("llama", 2)
    assert config.architectures == ["LlamaForCausalLM"]
    feeds = {"input_ids": IDS}
    opened = planish.CompiledModel.open(path)
    np.testing.assert_array_equal(opened.generate(IDS, 5), model.generate(IDS, 5))
    assert feeds.keys() <= set(opened.input_names)


def test_files_share_a_folder_and_say_which_have_data_beside_them(tmp_path):
    folder = tmp_path / "llama"
    compiled().save_hub(folder, external_data=True)
    compiled(quantised("W8A16")).save_hub(folder, name="model_int8.onnx", external_data=True)
    compiled(quantised("W4A16", group_size=16)).save_hub(folder)
    found = sorted(path.name for path in (folder / "onnx").iterdir())
    assert found == [
        "model.onnx",
        "model.onnx_data",
        "model_int8.onnx",
        "model_int8.onnx_data",
        "model_q4.onnx",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["transformers.js_config"] == {
        "use_external_data_format": {"model.onnx": 1, "model_int8.onnx": 1}
    }
    planish.load(folder / "onnx" / "model.onnx")
    compiled().save_hub(folder, external_data=False)
    assert not (folder / "onnx" / "model.onnx_data").exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {"model_int8.onnx": 1}


def test_a_source_folder_gives_its_configuration_and_its_tokenizer(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    stated = small_decoder().config.to_dict() | {"quantization_config": {"quant_method": "gptq"}}
    (source / "config.json").write_text(json.dumps(stated))
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    (source / "tokenizer.json").write_text("{}")
    folder = tmp_path / "llama"
    compiled().save_hub(folder, config=source, tokenizer=source)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "quantization_config" not in config
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 7}
    assert (folder / "tokenizer.json").is_file()
    compiled().save_hub(folder, config=transformers.LlamaConfig(vocab_size=5))
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 5
    with pytest.raises(InputError, match=r"expected a folder with config\.json"):
        compiled().save_hub(folder, config=tmp_path)


def test_models_that_came_from_onnx_have_no_configuration(tmp_path):
    text = """<ir_version: 11, opset_import: ["" : 23]>
    g (float[2, 4] x) => (float[2, 4] y) <float[4, 4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}>
    { y = MatMul(x, w) }"""
    model = planish.compile(onnx.parser.parse_model(text), "canonicalize", target=PORTABLE)
    model.save_hub(tmp_path / "product")
    assert [path.name for path in (tmp_path / "product").iterdir()] == ["onnx"]


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written"):
        compiled().save_hub(tmp_path / "file")
