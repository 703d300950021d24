"""The command line: what each command prints and writes, and how errors end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from planish import cli, cli_explain, cli_pruning
from planish.ir.errors import ModelError
from planish.passes.infrastructure.facts import facts_of
from typer.testing import CliRunner

COMMANDS = (
    "compile",
    "inspect",
    "structure",
    "latency",
    "report",
    "presets",
    "passes",
    "generate",
    "benchmark",
    "compare",
    "diff",
    "bisect",
)


def write_model(path: Path, *, scale: float = 1.0, name: str = "logits") -> Path:
    """logits = Relu(x·W0 + b0)·W1 with linears of 32 to 64 to 8, deterministic weights, as a file."""
    rng = np.random.default_rng(0)
    text = f"""<ir_version: 10, opset_import: ["": 21], producer_name: "hand">
        net (float[batch_size, 32] x) => (float[batch_size, 8] {name})
        {{ p = MatMul(x, "up.weight")  h = Add(p, "up.bias")  a = Relu(h)  z = Identity(a)
           {name} = MatMul(z, "down.weight") }}"""
    model = onnx.parser.parse_model(text)
    shapes = {"up.weight": (32, 64), "up.bias": (64,), "down.weight": (64, 8)}
    for key, shape in shapes.items():
        array = (rng.standard_normal(shape) * (scale if key == "up.weight" else 1)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, key))
    onnx.save(model, path)
    return path


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.onnx")


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setattr(cli.out, "_width", 160)
    monkeypatch.setattr(cli.err, "_width", 160)


@pytest.fixture(autouse=True)
def _own_work(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("planish.runtime.work_cache.cache_directory", lambda: folder)
    monkeypatch.setattr(cli_explain.out, "_width", 160)
    monkeypatch.setattr(cli_pruning.out, "_width", 160)


def run(*words: object):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def ok(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.output


def fails(*words: object) -> str:
    """The one line that an error prints."""
    result = run(*words)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    return result.stderr


def test_help_teaches_by_examples():
    assert "planish compile model.onnx -o small.onnx" in ok("--help")
    for command in COMMANDS:
        assert f"planish {command}" in ok(command, "--help").split("Usage", 1)[1].split("\n", 1)[1]


def test_compile_writes_a_file_that_plain_onnxruntime_runs(model, tmp_path):
    output, report = tmp_path / "out.onnx", tmp_path / "report.json"
    text = ok("compile", model, "-o", output, "-p", "canonicalize,fuse", "-t", "portable", "--report", report)
    assert "canonicalize" in text
    assert f"wrote {output}" in text
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)}
    before, after = (onnxruntime.InferenceSession(str(path)).run(None, feeds)[0] for path in (model, output))
    # The tolerance of exact passes.
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-4 * np.abs(before).max())
    assert [row["name"] for row in json.loads(report.read_text())["passes"]] == ["canonicalize", "fuse"]


def test_compile_quantises_checks_contracts_and_shows_all_it_can(model, tmp_path):
    dump = tmp_path / "steps"
    text = ok(
        *("compile", model, "-o", tmp_path / "out.onnx", "-t", "portable", "--check", "contract"),
        *("-p", "canonicalize,fuse,quantize{scheme=W8A16}", "--dump", dump, "--print-diff", "--stats"),
        *("--seed", "3", "--size", "batch_size=4"),
    )
    assert "2 of 2 linears" in text
    assert "cosine" in text
    assert "--- 003_quantize" in text
    assert "Rewrites" in text
    assert sorted(path.name for path in dump.glob("*.onnx")) == [
        "000_input.onnx",
        "001_canonicalize.onnx",
        "002_fuse.onnx",
        "003_quantize.onnx",
    ]
    inspected = ok("inspect", tmp_path / "out.onnx")
    assert "scheme: W8A16" in inspected
    assert "2 of 2 linears" in inspected


def test_compile_takes_a_recipe_and_a_limit(model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- canonicalize\n- fuse: {merge_linears: false}\n")
    output = tmp_path / "out.onnx"
    result = run("compile", model, "-o", output, "-p", recipe, "-t", "portable", "--bisect-limit", "1")
    assert result.exit_code == 0
    assert "BISECT: running pass (1) canonicalize" in result.stderr
    assert "BISECT: NOT running pass (2) fuse" in result.stderr


def test_a_pipeline_goes_on_from_a_dump(model, tmp_path):
    dump = tmp_path / "steps"
    ok("compile", model, "-o", tmp_path / "out.onnx", "-t", "portable", "--dump", dump)
    assert facts_of(ir.load(dump / "001_canonicalize.onnx"))
    canonical = dump / "001_canonicalize.onnx"
    ok("compile", canonical, "-o", tmp_path / "out2.onnx", "-t", "portable", "-p", "fuse")


def test_inspect_shows_the_interface_the_linears_and_the_ops(model):
    text = ok("inspect", model)
    assert "FLOAT[batch_size,32]" in text
    assert "2,624" in text  # parameters: 32·64 + 64 + 64·8
    assert "2 linears" in text
    assert "up" in text
    assert "MatMul" in text
    assert "made by planish" not in text


def test_inspect_survives_metadata_that_others_wrote(model):
    proto = onnx.load(model)
    onnx.helper.set_model_props(proto, {"planish.report": "not json", "planish.recipe": "- fuse"})
    onnx.save(proto, model)
    assert "- fuse" in ok("inspect", model)


def test_structure_shows_what_can_be_pruned(model):
    text = ok("structure", model)
    assert "up.weight" in text
    assert "producer" in text
    assert "consumer" in text


def test_latency_measures_saves_and_shows_a_table(model, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path / "cache"))
    table = tmp_path / "table.json"
    measured = ok("latency", model, "-o", table, "--batch", 4, "-t", "portable", "--multiple", 16)
    shown = ok("latency", "--show", table)
    assert shown.strip() == measured.strip()
    assert set(json.loads(table.read_text())["seconds"].popitem()[1]) >= {"64", "48", "16"}
    assert "expected a model or --show" in fails("latency", model, "--show", table)
    assert "is not a folder" in fails("latency", model, "-o", tmp_path / "none" / "table.json")


def test_compile_writes_a_file_for_every_target_of_pruning(model, tmp_path):
    inputs = tmp_path / "inputs.npz"
    np.savez(inputs, x=np.random.default_rng(1).standard_normal((64, 32)).astype(np.float32))
    output = tmp_path / "out.onnx"
    passes = "canonicalize,prune{sparsity=[0.25,0.5],evaluations=2},distill{steps=2,squarehead=0}"
    text = ok(
        "compile", model, "-o", output, "-p", passes, "-t", "portable", "--calibration", inputs, "--training",
        inputs,
    )  # fmt: skip
    sizes = {path.stem: path.stat().st_size for path in tmp_path.glob("out*.onnx")}
    assert sizes.keys() == {"out", "out-0.25"}
    assert sizes["out"] < sizes["out-0.25"]
    assert "out-0.25.onnx" in text


def test_a_recipe_gives_the_same_bytes_again(model, tmp_path):
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    ok("compile", model, "-o", first, "--preset", "cpu-int8", "-t", "portable", "--seed", 5)
    recipe = tmp_path / "first.recipe.yaml"
    assert "target: portable\nseed: 5\n" in recipe.read_text()
    ok("compile", model, "-o", second, "--recipe", recipe)
    assert second.read_bytes() == first.read_bytes()
    assert (tmp_path / "second.recipe.yaml").read_text() == recipe.read_text()
    both = fails("compile", model, "-o", second, "--recipe", recipe, "--preset", "lossless")
    assert "expected one of --passes, --recipe, --preset, found --recipe and --preset" in both
    assert "there are cpu-4bit, cpu-int8" in fails("compile", model, "-o", second, "--preset", "cpu")


def test_presets_are_listed():
    text = ok("presets")
    assert "cpu-int8  For encoders and classifiers on a CPU" in text
    assert "canonicalize,fuse → onnxruntime-cpu" in text


def test_what_is_kept_is_listed_and_cleared(model, tmp_path):
    inputs = tmp_path / "inputs.npz"
    np.savez(inputs, x=np.random.default_rng(1).standard_normal((64, 32)).astype(np.float32))
    passes = "canonicalize,quantize{scheme=W4A16,algorithm=gptq,group_size=16}"
    given = (
        "compile",
        model,
        "-o",
        tmp_path / "out.onnx",
        "-p",
        passes,
        "-t",
        "portable",
        "--calibration",
        inputs,
    )
    ok(*given, "--no-cache")
    first = (tmp_path / "out.onnx").read_bytes()
    assert "0 B" in ok("cache", "list")
    ok(*given, "--workers", "3")
    assert (tmp_path / "out.onnx").read_bytes() == first
    text = ok("cache", "list")
    assert "quantize" in text
    assert "quantize{group_size=16" in text
    assert "deleted" in ok("cache", "clear")
    assert "quantize" not in ok("cache", "list")


def test_passes_lists_and_describes():
    text = ok("passes")
    assert all(name in text for name in ("canonicalize", "fuse", "quantize"))
    text = ok("passes", "quantize")
    assert "scheme" in text
    assert 'for example: --passes "quantize{scheme=W4A16}"' in text
    assert "did you mean 'quantize'?" in fails("passes", "quantise")


def test_compare_measures_and_judges(model, tmp_path):
    other = write_model(tmp_path / "other.onnx", scale=1.5)
    text = ok("compare", other, model, "--locate", "--size", "batch_size=3")
    assert "x [3, 32]" in text
    assert "first difference: tensor 'p' (layer 'up', MatMul node" in text
    assert "weight 'up.weight' has changed" in text
    assert "1.000000" in ok("compare", model, model, "--tolerance", "0")
    result = run("compare", other, model, "--tolerance", "0.01")
    assert result.exit_code == 1
    assert "is above 0.01" in result.stderr
    renamed = write_model(tmp_path / "renamed.onnx", name="scores")
    assert "no output in common" in fails("compare", renamed, model)


def test_compare_takes_inputs_from_a_file(model, tmp_path):
    np.savez(tmp_path / "inputs.npz", x=np.ones((7, 32), np.float32))
    assert "x [7, 32]" in ok("compare", model, model, "--inputs", tmp_path / "inputs.npz")
    np.savez(tmp_path / "wrong.npz", y=np.ones((7, 32), np.float32))
    assert "inputs do not match" in fails("compare", model, model, "--inputs", tmp_path / "wrong.npz")
    complaint = fails("compare", model, model, "-i", tmp_path / "inputs.npz", "--size", "batch_size=1")
    assert "--size is for made-up inputs" in complaint


def test_benchmark_gives_ratios_to_the_first_file(model, tmp_path):
    other = write_model(tmp_path / "other.onnx", scale=1.5)
    text = ok("benchmark", model, other, model, "--repeats", "2", "--threads", "1")
    assert "1.000" in text
    assert text.count(str(model)) == 2
    assert str(other) in text


def test_diff_shows_what_changed(model, tmp_path):
    other = write_model(tmp_path / "other.onnx", scale=1.5)
    assert "up.weight" in ok("diff", model, other)
    assert ok("diff", model, model).strip() == "no difference"


def test_bisect_finds_the_pass_by_tolerance_and_by_a_program(model, tmp_path):
    passes = "canonicalize,fuse,quantize{scheme=W8A16}"
    text = ok("bisect", model, "-p", passes, "-t", "portable", "--tolerance", "1e-5")
    assert "culprit: quantize{scheme=W8A16}, pass 3 of 3" in text
    assert "no pass breaks the model" in ok("bisect", model, "-p", passes, "-t", "portable")
    script = tmp_path / "is_good.py"
    script.write_text(
        "import sys, onnx\n"
        "sys.exit(any(node.op_type == 'Identity' for node in onnx.load(sys.argv[1]).graph.node) is False)\n"
    )
    command = f"{sys.executable} {script}"
    text = ok("bisect", model, "-p", passes, "-t", "portable", "--check-command", command)
    assert "culprit: canonicalize, pass 1 of 3" in text
    assert "reason:  the check fails" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-p", "fuse"), "pass 'fuse' (number 1 of 1) requires the fact 'canonical'"),
        (("-p", "canonicalise"), "did you mean 'canonicalize'?"),
        (("-p", "canonicalize{limit=3}"), "has no option 'limit'"),
        (("-p", "canonicalize{"), "expected a name, found the end"),
        (("-p", "missing.yaml"), "recipe 'missing.yaml' cannot be read"),
        (("-t", "gpu"), "gpu"),
        (("--inputs", "missing.npz"), "missing.npz: cannot be read as inputs"),
        (("--check", "contract", "--size", "batch=1"), "the model has no dimension 'batch'"),
        (("--check", "contract", "--size", "batch_size"), "expected name=length"),
        (("--calibration", "missing.npz"), "missing.npz: cannot be read as inputs"),
        (("--workers", "many"), "workers: expected a number of threads, 'processes', 'processes:4', 'ray', "),
        (("--workers", "0"), "workers: expected a positive number, found 0"),
    ],
)
def test_bad_input_is_one_line_and_code_1(model, tmp_path, words, message):
    output = tmp_path / "out.onnx"
    assert message in fails("compile", model, "-o", output, *words)
    assert not output.exists()


def test_files_that_are_missing_or_damaged_are_one_line_and_code_1(model, tmp_path):
    missing, damaged = tmp_path / "missing.onnx", tmp_path / "damaged.onnx"
    damaged.write_bytes(b"\x00\x01 not a model")
    for path in (missing, damaged):
        assert str(path) in fails("inspect", path)
        assert str(path) in fails("compile", path, "-o", tmp_path / "out.onnx")
        assert str(path) in fails("benchmark", path)
    assert "is not a folder" in fails("compile", model, "-o", tmp_path / "no" / "such" / "folder.onnx")


def test_kernels_for_prompts_need_a_folder_and_a_decoder(model, tmp_path):
    output = tmp_path / "out.onnx"
    assert "go into a folder" in fails("compile", model, "-o", output, "--fast-prefill")
    assert "no key-value cache" in fails("compile", model, "-o", tmp_path / "out", "--fast-prefill")
    assert not output.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("compile",),
        ("compile", "model.onnx"),
        ("compile", "model.onnx", "-o", "x", "--check", "maybe"),
        ("unknown",),
        ("inspect", "a", "b"),
    ],
)
def test_wrong_usage_is_code_2(words):
    assert run(*words).exit_code == 2


def test_ctrl_c_is_code_130(monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_explain, "read_pipeline", interrupt)
    assert run("bisect", "model.onnx").exit_code == 130


def test_traceback_shows_where_an_error_comes_from(tmp_path):
    result = run("--traceback", "inspect", tmp_path / "missing.onnx")
    assert isinstance(result.exception, ModelError)


def test_an_unexpected_exception_is_one_line_too(capsys):
    cli._show_one_line(ZeroDivisionError, ZeroDivisionError("division\nby zero"), None)
    assert capsys.readouterr().err == (
        "internal error: ZeroDivisionError: division by zero — this is a bug in planish; "
        "`planish --traceback ...` shows where\n"
    )


def test_the_reproducers_command_fails_in_the_same_way(model, tmp_path):
    """A failing pass leaves a folder whose one command runs it again."""
    folder = tmp_path / "crash"
    passes = "canonicalize,quantize{scheme=W8A16,targets=[nothing],embeddings=false}"
    arguments = ("compile", model, "-o", tmp_path / "out.onnx", "-t", "portable", "-p", passes)
    result = run(*arguments, "--reproducer", folder)
    assert result.exit_code == 1
    assert "reproduce with: planish compile" in result.stderr
    command = (folder / "reproduce.sh").read_text().splitlines()[1]
    program = f"{sys.executable} -c 'from planish.cli import main; main()'"
    done = subprocess.run(
        command.replace("planish", program, 1), shell=True, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == result.stderr.splitlines()[0]


def test_the_installed_program_knows_its_version():
    command = [sys.executable, "-c", "from planish.cli import main; main()", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("planish ")
