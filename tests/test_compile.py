"""`planish.compile` end to end: modules and ONNX in, a model that is called like its source out."""

import json

import numpy as np
import onnx
import onnxruntime
import planish
import pytest
import torch


class TwoLayers(torch.nn.Module):
    """A small MLP with a named result, as transformers' models have."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(64, 128)
        self.down = torch.nn.Linear(128, 64)

    def forward(self, x: torch.Tensor, scale: float = 2.0) -> dict[str, torch.Tensor]:
        hidden = torch.nn.functional.gelu(self.up(x))
        return {"hidden": hidden, "output": self.down(hidden) * scale}


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return TwoLayers().eval()


@pytest.fixture(scope="module")
def compiled(module):
    return planish.compile(
        module, "canonicalize,fuse", example_inputs=torch.randn(4, 64), target="portable", check="contract"
    )


def test_called_like_the_module(module, compiled):
    x = torch.randn(7, 64)  # another batch size than the traced one
    expected, found = module(x), compiled(x)
    assert list(found) == ["hidden", "output"]
    for name in expected:
        # The same float32 products in another order: a few units in the last place of the largest sum.
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


def test_the_module_is_not_changed(module):
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    planish.compile(
        module,
        "canonicalize,fuse,quantize{scheme=W8A16}",
        example_inputs=torch.randn(2, 64),
        target="portable",
    )
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not module.training


def test_saved_file_runs_in_plain_onnxruntime_and_explains_itself(compiled, module, tmp_path):
    path = compiled.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 64)
    output = session.run(["output"], {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(output, module(x)["output"].detach().numpy(), rtol=1e-5, atol=1e-5)
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert "canonicalize" in metadata["planish.recipe"]
    assert metadata["planish.source"].startswith("sha256:")
    assert [row["name"] for row in json.loads(metadata["planish.report"])["passes"]] == [
        "canonicalize",
        "fuse",
    ]


def test_quantised_model_from_an_onnx_file(compiled, module, tmp_path):
    path = compiled.save(tmp_path / "float.onnx")
    quantised = planish.compile(path, "canonicalize,quantize{scheme=W8A16}", target="portable")
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    result = quantised.compare(compiled, {quantised.input_names[0]: x})["output"]
    # 8-bit weights: half a step of 1/127 of each channel's largest weight, averaged over 64 to 128 terms.
    assert result.cosine_min > 0.999
    assert result.max_absolute > 0
    quantised.save(tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").stat().st_size < 0.5 * path.stat().st_size


def test_onnx_models_take_tensors_by_position_and_by_name(compiled, tmp_path):
    loaded = planish.compile(compiled.save(tmp_path / "m.onnx"), "canonicalize", target="portable")
    x = torch.randn(2, 64)
    by_position, by_name = loaded(x), loaded(**{loaded.input_names[0]: x})
    assert torch.equal(by_position["output"], by_name["output"])
    with pytest.raises(planish.InputError, match="expected at most 1 inputs"):
        loaded(x, x)


def test_compile_changes_neither_path_nor_model_in_memory(compiled, tmp_path):
    proto = onnx.load(compiled.save(tmp_path / "m.onnx"))
    before = proto.SerializeToString(deterministic=True)
    planish.compile(proto, "canonicalize,fuse,quantize{scheme=W8A16}", target="portable")
    assert proto.SerializeToString(deterministic=True) == before


def test_the_report_reads_as_a_table(compiled):
    lines = str(compiled.report).splitlines()
    assert [line.split()[0] for line in lines if line.split()[0:1] in (["canonicalize"], ["fuse"])] == [
        "canonicalize",
        "fuse",
    ]
    assert any("cosine" in line for line in lines)


def test_the_same_compilation_writes_the_same_bytes(compiled, tmp_path):
    source = compiled.save(tmp_path / "m.onnx")
    for name in ("first.onnx", "second.onnx"):
        again = planish.compile(source, "canonicalize,fuse,quantize{scheme=W4A16}", target="portable", seed=3)
        again.save(tmp_path / name)
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()


def test_contract_check_needs_inputs(compiled, tmp_path):
    path = compiled.save(tmp_path / "m.onnx")
    with pytest.raises(planish.InputError, match="example_inputs"):
        planish.compile(path, "canonicalize", check="contract", target="portable")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"passes": "canonicalise"}, planish.PipelineError, "canonicalize"),
        ({"passes": "fuse"}, planish.PipelineError, "canonical"),
        ({"target": "tpu"}, planish.TargetError, "tpu"),
        ({"check": "everything"}, planish.PipelineError, "contract"),
        ({"example_inputs": [1]}, planish.InputError, "dict of arrays"),
        ({"calibration": []}, planish.InputError, "calibration data is empty"),
        ({"calibration": iter(())}, planish.InputError, "calibration data is empty"),
        ({"calibration": [{"wrong": np.zeros(1)}]}, planish.InputError, r"found \['wrong'\]"),
    ],
)
def test_impossible_requests_are_one_clear_error(compiled, tmp_path, options, error, message):
    path = compiled.save(tmp_path / "m.onnx")
    arguments = {"passes": "canonicalize", "target": "portable", **options}
    with pytest.raises(error, match=message) as caught:
        planish.compile(path, **arguments)
    assert "\n" not in str(caught.value)


def test_nothing_to_quantise_is_an_error():
    model = onnx.parser.parse_model(
        '<ir_version: 11, opset_import: ["" : 23]> g (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }'
    )
    with pytest.raises(planish.NothingCoveredError, match="quantize"):
        planish.compile(model, "canonicalize,quantize{scheme=W8A16}", target="portable")


def test_benchmark_reports_both_models(compiled):
    feeds = {compiled.input_names[0]: np.zeros((2, 64), np.float32)}
    latency = compiled.benchmark(feeds, against=compiled, repeats=4)
    assert set(latency) == {"model", "against"}
    assert latency["model"].samples == 4


def test_the_face_lists_what_it_has():
    assert all(hasattr(planish, name) for name in planish.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = planish.nothing


class Heads(torch.nn.Module):
    """Self-attention with two heads of 8, as torch spells it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        mask = keep[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).flatten(2)


def test_attention_in_a_file_of_torchs_own_exporter_is_one_node(tmp_path):
    module, x = Heads().eval(), torch.randn(2, 5, 16)
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        module, (x, keep), dynamic_shapes=(dynamic, dynamic), dynamo=True, verbose=False
    )
    program.save(str(tmp_path / "attention.onnx"))
    assert "Softmax" in {node.op_type for node in onnx.load(tmp_path / "attention.onnx").graph.node}
    compiled = planish.compile(tmp_path / "attention.onnx", target="portable")
    assert [node.op_type for node in compiled.model.graph].count("Attention") == 1
    (found,) = compiled(x[:1, :4], keep[:1, :4]).values()
    torch.testing.assert_close(found, module(x[:1, :4], keep[:1, :4]), rtol=1e-5, atol=1e-5)


TEXT = '<ir_version: 11, opset_import: ["" : 23, "my" : 1]> g (float[n, 4] x) => (float[n, 4] y) {{ {body} }}'


@pytest.mark.parametrize(
    ("body", "feeds", "error", "message"),
    [
        ("y = my.Magic(x)", {"x": np.zeros((2, 4), np.float32)}, planish.TargetError, "Magic"),
        ("y = Relu(x)", {"x": np.zeros((2, 5), np.float32)}, planish.InputError, "expected 4 on axis 1"),
        ("y = Relu(x)", {"z": np.zeros((2, 4), np.float32)}, planish.InputError, "missing"),
    ],
)
def test_models_and_inputs_that_cannot_run_are_one_clear_error(body, feeds, error, message):
    model = onnx.parser.parse_model(TEXT.format(body=body))
    with pytest.raises(error, match=message) as caught:
        planish.compile(model, "canonicalize", example_inputs=feeds, check="contract", target="portable")
    assert "\n" not in str(caught.value)


def test_example_inputs_in_bfloat16():
    module = torch.nn.Linear(8, 4).to(torch.bfloat16)
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    compiled = planish.compile(module, example_inputs=x, target="torch")
    # Eight bits of significand: rounding once more or once less is half a unit in the last place.
    torch.testing.assert_close(compiled(x), module(x), rtol=2**-8, atol=2**-8)
