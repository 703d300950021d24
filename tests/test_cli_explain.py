"""The commands that explain: what `report` writes, and what `diff` says about structure and numbers."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from planish import cli, cli_explain
from typer.testing import CliRunner

PASSES = "canonicalize,fuse,quantize{scheme=W8A16}"


def write_model(path, *, scale=1.0, hidden=64, output="logits", input_name="x"):
    """logits = Relu(x·W0)·W1 with deterministic weights, as a file."""
    rng = np.random.default_rng(0)
    shapes = {"up.weight": (32, hidden), "down.weight": (hidden, 8)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    weights["down.weight"] *= scale
    nodes = [
        onnx.helper.make_node("MatMul", [input_name, "up.weight"], ["h"], name="up"),
        onnx.helper.make_node("Relu", ["h"], ["a"], name="act"),
        onnx.helper.make_node("MatMul", ["a", "down.weight"], [output], name="down"),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "net",
        [onnx.helper.make_tensor_value_info(input_name, onnx.TensorProto.FLOAT, ["batch_size", 32])],
        [onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, ["batch_size", 8])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opset = onnx.helper.make_opsetid("", 21)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.onnx")


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    for console in (cli.out, cli.err, cli_explain.out):
        monkeypatch.setattr(console, "_width", 200)


def run(*words: object):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def ok(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 1, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    return result.stderr


def compile_to(path, model, *words: object) -> str:
    return ok("compile", model, "-o", path, "-p", PASSES, "-t", "portable", *words)


def test_report_needs_nothing_but_the_file(model, tmp_path):
    compile_to(tmp_path / "small.onnx", model)
    assert f"wrote {tmp_path / 'small.html'}" in ok("report", tmp_path / "small.onnx")
    page = (tmp_path / "small.html").read_text()
    assert "2 of 2 linears" in page
    assert "not compared" in page
    assert "give <code>--costs report.json</code>" in page


def test_report_measures_and_takes_the_costs_of_the_compilation(model, tmp_path):
    table = compile_to(
        tmp_path / "small.onnx",
        model,
        "--check",
        "contract",
        "--latency",
        "--report",
        tmp_path / "report.json",
    )
    for heading in ("latency", "error", "cosine", "memory"):
        assert heading in table
    words = ("--before", model, "--latency", "--costs", tmp_path / "report.json", "--size", "batch_size=3")
    ok("report", tmp_path / "small.onnx", "--out", tmp_path / "page.html", *words)
    page = (tmp_path / "page.html").read_text()
    for text in ("Latency by layer", "times as fast", "x [3, 32]", "passes took", "peak memory"):
        assert text in page
    assert "not kept in the file" not in page


def test_report_says_what_it_cannot_do(model, tmp_path):
    assert "planish did not compile it" in fails("report", model)
    assert "does not exist" in fails("report", tmp_path / "missing.onnx")
    small = tmp_path / "small.onnx"
    compile_to(small, model)
    assert "is not a folder" in fails("report", small, "-o", tmp_path / "none" / "page.html")
    (tmp_path / "other.json").write_text(json.dumps({"passes": [{"name": "fuse"}]}))
    assert "of other passes than the file's: fuse" in fails(
        "report", small, "--costs", tmp_path / "other.json"
    )
    (tmp_path / "other.json").write_text("[]")
    assert "expected what `planish compile --report` writes" in fails(
        "report", small, "--costs", tmp_path / "other.json"
    )
    proto = onnx.load(small)
    onnx.helper.set_model_props(
        proto, {"planish.recipe": "", "planish.report": '{"passes": []}', "planish.outline": '{"after": {}}'}
    )
    onnx.save(proto, small)
    assert "metadata is damaged" in fails("report", small)


def test_inspect_shows_the_layers_of_a_compiled_file(model, tmp_path):
    compile_to(tmp_path / "small.onnx", model)
    text = ok("inspect", tmp_path / "small.onnx")
    assert "2 layers" in text
    assert "int8" in text
    assert "outline" not in text


def test_diff_names_the_weight_and_the_tensor_with_their_distances(model, tmp_path):
    other = write_model(tmp_path / "other.onnx", scale=1.5)
    text = ok("diff", model, other)
    assert "~ weight down.weight" in text
    assert "512 of 512 elements by at most" in text
    assert "(0.5 of the largest)" in text
    assert "outputs: 'logits' differs most, by 0.5 relative to its largest value" in text
    assert "first difference: tensor 'logits' (layer 'down', MatMul node" in text
    assert ok("diff", model, model).strip() == "no difference"


def test_diff_goes_by_what_is_computed_where_only_the_graph_differs(model, tmp_path):
    ok("compile", model, "-o", tmp_path / "fused.onnx", "-p", "canonicalize,fuse", "-t", "onnxruntime-cpu")
    proto = onnx.load(model)
    proto.graph.node[1].name = "renamed"
    onnx.save(proto, tmp_path / "renamed.onnx")
    text = ok("diff", model, tmp_path / "renamed.onnx", "--tolerance", "0")
    assert "nodes: 1 added, 1 removed" in text
    assert "outputs: equal within 0; the largest error is 0" in text
    assert "first difference" not in text


def test_diff_exits_with_1_only_above_a_tolerance_that_was_given(model, tmp_path):
    other = write_model(tmp_path / "other.onnx", scale=1.01)
    ok("diff", model, other)
    ok("diff", model, other, "--tolerance", "0.1")
    np.savez(tmp_path / "inputs.npz", x=np.ones((2, 32), np.float32))
    result = run("diff", model, other, "--tolerance", "1e-3", "--inputs", tmp_path / "inputs.npz")
    assert result.exit_code == 1
    assert "first difference" in result.stdout


def test_diff_of_models_that_cannot_be_run_alike_is_of_their_graphs(model, tmp_path):
    other = write_model(tmp_path / "other.onnx", output="scores")
    text = ok("diff", model, other)
    assert "~ output logits" in text
    assert "outputs: not compared: the models have no output in common" in text
    assert "no output in common" in fails("diff", model, other, "--tolerance", "1")
    renamed = write_model(tmp_path / "renamed.onnx", input_name="y")
    assert "outputs: not compared: inputs do not match the model" in ok("diff", model, renamed)
