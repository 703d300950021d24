"""Saving decoders as folders, and opening them again."""

import json

import numpy as np
import planish
import pytest
import torch
from planish.ir.decoder_facts import DecoderFacts
from planish.ir.errors import InputError, ModelError
from planish.runtime.generate.genai import genai_config
from planish.runtime.generate.runner import Runner
from small_decoders import small_decoder

TARGET = planish.get_target("onnxruntime-cpu", threads=1)
IDS = np.random.default_rng(0).integers(0, 64, (2, 24))


@pytest.fixture(scope="module")
def module():
    return small_decoder()


@pytest.fixture(scope="module")
def compiled(module):
    return planish.compile(module, "canonicalize,fuse,raise-cache", target=TARGET)


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "README.md"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture(scope="module")
def quantised(module):
    """Four bits by channel: other kernels for one token and for many."""
    calibration = [{"input_ids": IDS}]
    passes = "canonicalize,fuse,quantize{scheme=W4A8,group_size=-1,algorithm=rtn},raise-cache"
    return planish.compile(module, passes, target=TARGET, calibration=calibration)


def test_kernels_for_prompts_compute_the_same(quantised, tmp_path, monkeypatch):
    runners, run = [], Runner.run

    def noted(runner, given):
        runners.append(runner)
        return run(runner, given)

    monkeypatch.setattr(Runner, "run", noted)
    path = quantised.save(tmp_path / "llama", fast_prefill=True).parent
    opened = planish.CompiledModel.open(path)
    assert opened.has_fast_prefill
    found = []
    for compiled, fast in ((quantised, False), (quantised, True), (opened, False), (opened, True)):
        decoder = compiled.decoder(capacity=25, fast_prefill=fast)
        found.append(np.concatenate([decoder.forward(IDS[:1]), decoder.forward(IDS[1:, :1])], axis=1))
        assert (runners[-2] is not runners[-1]) == fast
    plain, fast, opened_plain, opened_fast = found
    np.testing.assert_array_equal(opened_fast, fast)
    for other in (fast, opened_plain):
        # A kernel for one token may round activations in blocks, one for many by token: each to 8 bits.
        assert np.abs(other - plain).max() < 0.05 * np.abs(plain).max()


def test_memory_tells_of_kernels_for_prompts(quantised):
    alone, both = quantised.memory(1, 64), quantised.memory(1, 64, fast_prefill=True)
    assert alone.prefill == 0 < both.prefill
    assert both.total >= alone.total


def test_kernels_for_prompts_of_an_earlier_model_go(compiled, quantised, tmp_path):
    quantised.save(tmp_path / "llama", fast_prefill=True)
    compiled.save(tmp_path / "llama")
    opened = planish.CompiledModel.open(tmp_path / "llama")
    assert not opened.has_fast_prefill
    with pytest.raises(InputError, match="saved without kernels for prompts"):
        opened.decoder(fast_prefill=True)
    with pytest.raises(InputError, match="go into a folder"):
        compiled.save(tmp_path / "llama.onnx", fast_prefill=True)


def test_a_decoder_s_folder(compiled, tokenizer, tmp_path):
    path = compiled.save(tmp_path / "llama", tokenizer=tokenizer)
    assert path == tmp_path / "llama" / "model.onnx"
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == [
        "genai_config.json",
        "model.onnx",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    # Nothing else was left behind.
    assert sorted(file.name for file in tmp_path.iterdir()) == ["llama", "tokenizer"]
    config = json.loads((path.parent / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    assert config["model"]["type"] == "llama"
    assert (config["model"]["context_length"], config["model"]["vocab_size"]) == (128, 64)
    assert (config["model"]["eos_token_id"], config["model"]["pad_token_id"]) == ([2], 2)
    assert (decoder["head_size"], decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (8, 4, 2)
    assert (decoder["hidden_size"], decoder["num_hidden_layers"], decoder["filename"]) == (
        32,
        2,
        "model.onnx",
    )
    assert config["search"]["past_present_share_buffer"]
    graph = planish.load(path).graph
    inputs = {value.name for value in graph.inputs}
    outputs = {value.name for value in graph.outputs}
    for name, pattern in (decoder["inputs"] | decoder["outputs"]).items():
        for layer in range(2):
            assert (pattern % layer if "%d" in pattern else pattern) in inputs | outputs, name


@pytest.mark.slow
def test_caches_that_grow_are_not_shared(module, tmp_path):
    planish.compile(module, target=TARGET).save(tmp_path / "growing")
    config = json.loads((tmp_path / "growing" / "genai_config.json").read_text())
    assert not config["search"]["past_present_share_buffer"]


def test_tokens_that_there_are_none_of_are_left_out(compiled):
    """onnxruntime-genai refuses −1."""
    facts = DecoderFacts(
        architecture="llama", vocabulary=64, hidden_size=32, heads=4, head_size=8, positions=128
    )
    model = genai_config(compiled.bound.model, facts, "model.onnx", {})["model"]
    assert model["pad_token_id"] == 0
    assert not {"eos_token_id", "bos_token_id"} & set(model)


def test_opened_again(compiled, tmp_path):
    compiled.save(tmp_path / "folder")
    compiled.save(tmp_path / "file.onnx")
    expected = compiled.generate([[1, 2, 3]], 8)
    for name in ("folder", "file.onnx"):
        opened = planish.CompiledModel.open(tmp_path / name, target=TARGET)
        np.testing.assert_array_equal(opened.generate([[1, 2, 3]], 8), expected)
        assert "raise-cache" in str(opened.report.__rich__())
        assert opened.report.as_dict() == compiled.report.as_dict(costs=False)


def test_other_files_of_a_folder_stay_and_ours_are_replaced(compiled, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "model.onnx").write_text("old")
    compiled.save(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert planish.CompiledModel.open(folder, target=TARGET).generate([[1]], 2).shape == (1, 3)


def test_an_encoder_s_folder_has_no_configuration(tmp_path):
    compiled = planish.compile(torch.nn.Linear(4, 4), example_inputs=torch.zeros(2, 4), target=TARGET)
    compiled.save(tmp_path / "linear")
    assert [file.name for file in (tmp_path / "linear").iterdir()] == ["model.onnx"]


def test_a_failure_leaves_the_folder_as_it_was(compiled, tmp_path):
    folder = tmp_path / "folder"
    compiled.save(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match="expected a folder with tokenizer"):
        compiled.save(folder, tokenizer=tmp_path / "nothing")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_where_nothing_can_be_written(compiled, tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        compiled.save(tmp_path / "none" / "folder")
    with pytest.raises(InputError, match="a tokenizer goes into a folder"):
        compiled.save(tmp_path / "model.onnx", tokenizer=tmp_path)


def test_damaged_metadata(compiled, tmp_path):
    path = compiled.save(tmp_path / "model.onnx")
    model = planish.load(path)
    model.metadata_props["planish.session_options"] = "{"
    planish.save(model, path)
    with pytest.raises(ModelError, match="its metadata is damaged"):
        planish.CompiledModel.open(path, target=TARGET)
