"""Whole checkpoints: they have the logits of the float model with dequantised weights, and compile."""

import dataclasses
import json

import checkpoints
import numpy as np
import onnx_ir as ir
import planish
import pytest
import torch
import transformers
from planish.ir import ops
from planish.ir.errors import ModelError
from planish.ir.views.linears import linears
from planish.runtime.calibration.data import completed
from planish.runtime.reference import run_model
from safetensors.torch import load_file, save_file
from small_decoders import small_decoder

IDS = np.random.default_rng(0).integers(0, 64, (2, 9))
TARGET = planish.get_target("onnxruntime-cpu", threads=1, max_error=1e-4)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "checkpoint_format": "gptq"}
TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}


def compressed(bits, format_, *, group_size=None, activations=None) -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "group_size": group_size}
    weights["strategy"] = "group" if group_size else "channel"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def quantised(module, pack, **options) -> dict:
    shapes = checkpoints.quantised_layers(module, options.pop("ignored", ("lm_head",)))
    layers = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        layer = checkpoints.random_layer(shape, seed=seed, **options)
        layers[name] = (layer, pack(layer))
    return layers


def expected(module) -> np.ndarray:
    with torch.no_grad():
        return module(input_ids=torch.from_numpy(IDS)).logits.numpy()


def logits(model: ir.Model) -> np.ndarray:
    """Without graph optimisation: the bodies of the ops, node by node."""
    return run_model(model, completed({"input_ids": IDS}, model))["logits"]


def assert_close(found, reference, tolerance=1e-5) -> None:
    assert np.abs(found - reference).max() <= tolerance * np.abs(reference).max()


@pytest.fixture(scope="module")
def act_order(tmp_path_factory):
    """GPTQ with act order, biases and two files; and the float model that it stands for."""
    module = small_decoder(num_hidden_layers=1, attention_bias=True)
    layers = quantised(
        module, lambda layer: checkpoints.gptq(layer, 4), bits=4, group_size=16, act_order=True
    )
    # Linears of the same input have the same order, as they have when they are quantised on data.
    first, *others = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    for name in others:
        layer = dataclasses.replace(layers[name][0], groups=layers[first][0].groups)
        layers[name] = (layer, checkpoints.gptq(layer, 4))
    folder = tmp_path_factory.mktemp("act_order") / "llama"
    return folder, checkpoints.write(folder, module, layers, GPTQ, shards=2), layers


@pytest.fixture(scope="module")
def loaded(act_order):
    return planish.load_checkpoint(act_order[0])


def test_gptq_logits_are_those_of_the_dequantised_model(act_order, loaded) -> None:
    assert_close(logits(loaded), expected(act_order[1]))
    assert loaded.meta["planish.remarks"] == ()


def test_gptq_integers_and_biases_are_in_the_graph(act_order, loaded) -> None:
    found = {linear.name: linear for linear in linears(loaded)}
    layers = act_order[2]
    assert {name for name, linear in found.items() if linear.is_quantized} == layers.keys()
    for name, (layer, _) in layers.items():
        linear = found[name]
        order = linear.node.inputs[0].producer().inputs[1].const_value.numpy()
        integers = ops.integer_values(linear.weight.const_value)
        np.testing.assert_array_equal(integers, layer.integers.T[order])
        assert linear.weight.dtype == ir.DataType.UINT4
        assert (linear.bias is not None) == ("self_attn" in name)


def test_linears_of_one_input_and_order_share_its_permutation(loaded) -> None:
    gathers = [node for node in loaded.graph if node.op_type == "Gather" and "order" in node.inputs[1].name]
    shared = [gather for gather in gathers if len(gather.outputs[0].uses()) == 3]
    assert len(shared) == 1
    assert len(gathers) == 7 - 2


def test_what_is_read_compiles_binds_kernels_and_generates(act_order, loaded) -> None:
    compiled = planish.compile(loaded, "canonicalize,fuse", target=TARGET)
    kernels = {row.kernel for row in compiled.bound.bindings if row.op == "planish::QuantizedLinear"}
    assert kernels
    found = compiled.run(completed({"input_ids": IDS}, compiled.bound.model))["logits"]
    assert_close(found, expected(act_order[1]))
    prompt = torch.from_numpy(IDS[:1])
    theirs = act_order[1].generate(prompt, max_new_tokens=8, do_sample=False).numpy()
    np.testing.assert_array_equal(compiled.generate(IDS[:1], 8), theirs)


@pytest.mark.slow
def test_a_folder_is_compiled_and_called_as_a_module(act_order) -> None:
    compiled = planish.compile(act_order[0], "canonicalize,fuse", target=TARGET)
    assert_close(compiled(torch.from_numpy(IDS)).logits.numpy(), expected(act_order[1]))


@pytest.mark.slow
def test_the_model_is_called_as_a_traced_one(act_order, loaded) -> None:
    traced = planish.trace_causal_lm(act_order[1])
    assert [value.name for value in loaded.graph.inputs] == [value.name for value in traced.graph.inputs]
    assert loaded.meta["planish.signature"].layers == traced.meta["planish.signature"].layers
    assert loaded.metadata_props["planish.decoder"] == traced.metadata_props["planish.decoder"]


@pytest.mark.slow
def test_a_module_with_such_tensors_is_read_like_its_folder(act_order, loaded) -> None:
    class Quantised(torch.nn.Module):
        def __init__(self, config, tensors) -> None:
            super().__init__()
            self.config = config
            for name, tensor in tensors.items():
                *parents, last = name.split(".")
                owner = self
                for parent in parents:
                    if parent not in dict(owner.named_children()):
                        owner.add_module(parent, torch.nn.Module())
                    owner = owner.get_submodule(parent)
                owner.register_buffer(last, tensor)

    tensors = {}
    for file in act_order[0].glob("*.safetensors"):
        tensors |= load_file(file)
    config = transformers.AutoConfig.from_pretrained(act_order[0])
    model = planish.load_checkpoint(Quantised(config, tensors))
    np.testing.assert_array_equal(logits(model), logits(loaded))


@pytest.mark.slow
def test_awq_with_a_tied_head(tmp_path) -> None:
    module = small_decoder(num_hidden_layers=1, tie_word_embeddings=True)
    layers = quantised(module, checkpoints.awq, bits=4, group_size=16, lowest_zero=0)
    config = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
    module = checkpoints.write(tmp_path / "llama", module, layers, config)
    model = planish.load_checkpoint(tmp_path / "llama")
    assert_close(logits(model), expected(module))
    assert "lm_head.weight" not in model.graph.initializers


@pytest.mark.slow
def test_a_quantised_head_is_not_tied_to_the_embedding(tmp_path) -> None:
    """And scales of bfloat16 keep their values."""
    module = small_decoder(num_hidden_layers=1)
    layers = quantised(
        module, lambda layer: checkpoints.pack_quantized(layer, 3, symmetric=True),
        bits=3, group_size=16, symmetric=True, signed=True, ignored=(),
    )  # fmt: skip
    folder = tmp_path / "llama"
    module = checkpoints.write(
        folder, module, layers, compressed(3, "pack-quantized", group_size=16), dtype=torch.bfloat16
    )
    model = planish.load_checkpoint(folder)
    assert_close(logits(model), expected(module))
    head = next(linear for linear in linears(model) if linear.name == "lm_head")
    assert (head.bits, head.weight.dtype) == (3, ir.DataType.INT4)


@pytest.mark.parametrize("activations", [None, TOKEN, STATIC], ids=["float", "token", "static"])
def test_whole_integers_with_and_without_quantised_activations(tmp_path, activations) -> None:
    module = small_decoder(num_hidden_layers=1)
    grid = {"input_scale": np.array([0.02], np.float32)} if activations is STATIC else {}
    layers = quantised(
        module, lambda layer: checkpoints.int_quantized(layer) | grid, bits=8, symmetric=True, signed=True
    )
    format_ = "naive-quantized" if activations is None else "int-quantized"
    folder = tmp_path / "llama"
    module = checkpoints.write(folder, module, layers, compressed(8, format_, activations=activations))
    model = planish.load_checkpoint(folder)
    ops_found = {linear.node.op_type for linear in linears(model) if linear.is_quantized}
    if activations is None:
        assert ops_found == {"QuantizedLinear"}
        assert_close(logits(model), expected(module))
        return
    assert ops_found == {"DynamicQuantizedLinear" if activations is TOKEN else "StaticQuantizedLinear"}

    def on_grid(linear, args):
        (x,) = args
        scale = 0.02 if activations is STATIC else x.abs().amax(-1, keepdim=True) / 127
        return (torch.clamp(torch.round(x / scale), -128, 127) * scale,)

    for name in layers:
        module.get_submodule(name).register_forward_pre_hook(on_grid)
    assert_close(logits(model), expected(module))


def test_a_float16_model_multiplies_integers_in_float32(tmp_path) -> None:
    module = small_decoder(num_hidden_layers=1, attention_bias=True)
    layers = quantised(
        module, lambda layer: checkpoints.int_quantized(layer), bits=8, symmetric=True, signed=True
    )
    folder = tmp_path / "llama"
    module = checkpoints.write(folder, module, layers, compressed(8, "int-quantized", activations=TOKEN))
    model = planish.load_checkpoint(folder, dtype=torch.float16)
    assert {value.dtype for value in model.graph.outputs} == {ir.DataType.FLOAT16}
    assert_close(logits(model).astype(np.float32), expected(module), 2e-2)


def test_gpt2_keeps_its_transposed_linears(tmp_path) -> None:
    """Its Conv1D stores [K, N], and a checkpoint of it is packed like any other."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    module = transformers.GPT2LMHeadModel(config).eval()
    name = "transformer.h.0.mlp.c_fc"
    layer = checkpoints.random_layer((128, 32), bits=4, group_size=16)
    folder = tmp_path / "gpt2"
    folder.mkdir()
    with torch.no_grad():
        module.get_parameter(f"{name}.weight").copy_(layer.weight().T)
    tensors = {key: value.clone() for key, value in module.state_dict().items() if key != "lm_head.weight"}
    del tensors[f"{name}.weight"]
    for key, array in checkpoints.gptq(layer, 4).items():
        tensors[f"{name}.{key}"] = torch.from_numpy(np.ascontiguousarray(array))
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 16}))
    model = planish.load_checkpoint(folder)
    assert_close(logits(model), expected(module))
    assert [linear.name for linear in linears(model) if linear.is_quantized] == [name]


@pytest.mark.slow
def test_a_checkpoint_that_is_not_quantised_is_read_as_it_is(tmp_path) -> None:
    module = checkpoints.write(tmp_path / "llama", small_decoder(num_hidden_layers=1), {}, None)
    assert_close(logits(planish.load_checkpoint(tmp_path / "llama")), expected(module))


@pytest.fixture
def small(tmp_path):
    module = small_decoder(num_hidden_layers=1)
    layers = quantised(module, lambda layer: checkpoints.gptq(layer, 4), bits=4, group_size=16)
    checkpoints.write(tmp_path / "llama", module, layers, GPTQ)
    return tmp_path / "llama"


def change(folder, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.slow
def test_tensors_that_nothing_takes_are_said(small) -> None:
    change(small, lambda tensors: tensors.update({"model.layers.0.self_attn.k_scale": torch.ones(1)}))
    assert planish.load_checkpoint(small).meta["planish.remarks"] == (
        "1 tensors of the checkpoint are not used (the first: model.layers.0.self_attn.k_scale)",
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "has no 'model.norm.weight'"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
            r"'model.norm.weight': expected floats \[32\], found torch.float32 \[3\]",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.experts.0.qweight": torch.ones(1)}),
            "model.layers.0.mlp.experts.0 is quantised in the checkpoint: .* found no such module",
        ),
        (
            lambda tensors: tensors.update({"model.embed_tokens.qweight": torch.ones(1)}),
            "found a Embedding",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("qweight")],
            "says that it is quantised, but no layer is",
        ),
    ],
)
def test_layers_that_are_not_those_of_the_model(small, edit, message) -> None:
    change(small, edit)
    with pytest.raises(ModelError, match=message):
        planish.load_checkpoint(small)


def test_folders_that_are_no_checkpoint(small, tmp_path) -> None:
    config = json.loads((small / "config.json").read_text())

    def state(**changes) -> None:
        (small / "config.json").write_text(json.dumps(config | changes))

    with pytest.raises(ModelError, match=r"config.json does not exist"):
        planish.load_checkpoint(tmp_path / "nothing")
    state(quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ModelError, match="quantised by awq, compressed-tensors, gptq, found 'bitsandbytes'"):
        planish.load_checkpoint(small)
    state(model_type="made_up")
    with pytest.raises(ModelError, match="transformers does not know it"):
        planish.load_checkpoint(small)
    state(model_type="vit")
    with pytest.raises(ModelError, match="no causal language model for ViTConfig"):
        planish.load_checkpoint(small)
    state()
    data = (small / "model.safetensors").read_bytes()
    (small / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(ModelError, match="is damaged"):
        planish.load_checkpoint(small)
    (small / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"expected model\.safetensors or another"):
        planish.load_checkpoint(small)
    (small / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    with pytest.raises(ModelError, match=r"b.safetensors does not exist"):
        planish.load_checkpoint(small)
    (small / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is no JSON"):
        planish.load_checkpoint(small)
