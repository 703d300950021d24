"""Every message on the page is one that planish says, and all that are provoked here are on the page."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx.parser
import onnx_ir as ir
import planish
import pytest
import torch
from docs_helpers import DOCS
from planish import cli_options
from planish.cli import app
from planish.ir.errors import PlanishError
from planish.passes import Fact, Pass, PassResult
from planish.runtime.generate.limits import Limits
from planish.runtime.generate.sampling import Sampling
from planish.runtime.model_file import read_inputs
from small_decoders import small_decoder
from typer.testing import CliRunner

PAGE = DOCS / "troubleshooting.md"
PROVOKED: dict[str, Callable[[], object]] = {}
"""By the heading of the entry on the page; run in a folder with ``model.onnx``."""


def entry(heading: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    def note(provoke: Callable[[], object]) -> Callable[[], object]:
        PROVOKED[heading] = provoke
        return provoke

    return note


def entries() -> dict[str, str]:
    """The messages of the page by their headings."""
    entry = r"^### (.+)\n\n```text\n((?:.|\n)+?)\n```$"
    return dict(re.findall(entry, PAGE.read_text("utf-8"), re.MULTILINE))


def mlp() -> ir.Model:
    """logits = Relu(x·W0)·W1 with names as exporters give them."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        """<ir_version: 11, opset_import: ["": 23]> net (float[batch_size, 32] x) => (float[batch_size, 8] y)
        { p = MatMul(x, "up.weight")  a = Relu(p)  y = MatMul(a, "down.weight") }"""
    )
    for name, shape in {"up.weight": (32, 64), "down.weight": (64, 8)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return planish.load(model)


X = np.random.default_rng(1).standard_normal((2, 32)).astype(np.float32)


LIMITS = Limits(vocabulary=64, positions=128)
"""What `generate` checks prompts against, without a decoder, whose tracing takes seconds."""


def check_prompt(tokens: list[int], max_new_tokens: int) -> None:
    LIMITS.check(np.array([tokens]), np.ones((1, len(tokens)), np.int64), max_new_tokens)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planish.save(mlp(), "model.onnx")
    return tmp_path


def compile_mlp(passes: object = None, **options: object) -> planish.CompiledModel:
    return planish.compile("model.onnx", passes, **{"target": "portable", **options})


# Inputs and data.


@entry("Contract checks without inputs")
def _():
    compile_mlp(check="contract")


@entry("Example inputs of a file that are no dict")
def _():
    compile_mlp(example_inputs=torch.zeros(2, 32))


@entry("A pass needs calibration data")
def _():
    compile_mlp("canonicalize,quantize{algorithm=gptq,group_size=32}")


@entry("A pass needs training data")
def _():
    compile_mlp("canonicalize,distill{steps=10}")


@entry("Calibration data that is empty")
def _():
    compile_mlp(calibration=[])


@entry("Inputs with other names")
def _():
    compile_mlp().run({"input": X})


@entry("Inputs of another type")
def _():
    compile_mlp().run({"x": X.astype(np.float64)})


@entry("Inputs of another shape")
def _():
    compile_mlp().run({"x": X[:, :16]})


@entry("A dimension that does not exist")
def _():
    cli_options.read_feeds(Path("model.onnx"), None, ["batch=1"])


@entry("Made-up inputs and real ones at once")
def _():
    cli_options.read_feeds(Path("model.onnx"), Path("inputs.npz"), ["batch_size=1"])


@entry("Inputs that cannot be read")
def _():
    Path("inputs.npz").write_text("x: [1, 2]")
    read_inputs(Path("inputs.npz"))


@entry("Activations that are not finite")
def _():
    compile_mlp(
        "canonicalize,quantize{algorithm=gptq,group_size=32}",
        calibration=[{"x": np.full((2, 32), 1e30, "f")}],
    )


# Reading models.


@entry("A file that does not exist")
def _():
    planish.load("modle.onnx")


@entry("A file that is no ONNX model")
def _():
    torch.save({"weight": torch.zeros(3)}, "model.pt")
    planish.load("model.pt")


@entry("An opset that is too old")
def _():
    old = onnx.parser.parse_model(
        '<ir_version: 7, opset_import: ["": 9]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    planish.load(old)


@entry("Weights that are not finite")
def _():
    model = ir.to_proto(mlp())
    model.graph.initializer[0].raw_data = np.full((32, 64), np.nan, np.float32).tobytes()
    planish.load(model)


@entry("Weights that lie beside the file and are not there")
def _():
    onnx.save(
        ir.to_proto(mlp()), "big.onnx", save_as_external_data=True, location="big.onnx.data", size_threshold=0
    )
    Path("big.onnx.data").unlink()
    planish.load("big.onnx")


@entry("A file that planish did not compile")
def _():
    raise CliRunner().invoke(app, ["--traceback", "report", "model.onnx"]).exception


@entry("A checkpoint in a format that is not read")
def _():
    module = small_decoder(num_hidden_layers=1)
    module.save_pretrained("checkpoint")
    text = Path("checkpoint/config.json").read_text().rstrip().removesuffix("}")
    Path("checkpoint/config.json").write_text(
        text + ', "quantization_config": {"quant_method": "bitsandbytes"}}'
    )
    planish.load_checkpoint("checkpoint")


@entry("An output folder that does not exist")
def _():
    arguments = ["--traceback", "compile", "model.onnx", "-o", "out/small.onnx"]
    raise CliRunner().invoke(app, arguments).exception


# Tracing.


class Branching(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@entry("A branch that depends on data")
def _():
    planish.compile(Branching().eval(), example_inputs=torch.ones(2, 4))


class Largest(torch.nn.Module):
    def forward(self, x):
        return x / x.amax()


@entry("An operation that ONNX does not have")
def _():
    planish.compile(Largest().eval(), example_inputs=torch.ones(2, 4))


@entry("A module without example inputs")
def _():
    planish.compile(torch.nn.Linear(4, 4))


# Pipelines.


@entry("A pass that does not exist")
def _():
    compile_mlp("canonicalise,fuse")


@entry("An option that does not exist")
def _():
    compile_mlp("canonicalize,quantize{shceme=W8A8}")


@entry("An option of the wrong type")
def _():
    compile_mlp("canonicalize,quantize{group_size=large}")


@entry("A scheme that does not exist")
def _():
    compile_mlp("canonicalize,quantize{scheme=int8}")


@entry("A pipeline with a mistake in its text")
def _():
    compile_mlp("canonicalize,quantize{scheme=W8A8")


@entry("A pass before what it needs")
def _():
    compile_mlp("quantize,canonicalize")


@entry("A pass after what it must not follow")
def _():
    compile_mlp("canonicalize,quantize{scheme=W8A16},rotate")


@entry("A preset that does not exist")
def _():
    compile_mlp(preset="int8")


@entry("Passes and a preset at once")
def _():
    compile_mlp("canonicalize", preset="cpu-int8")


@entry("A budget that nothing meets")
def _():
    weights = ("quantize{scheme=W8A8,activations=token,ignore=[]}",)
    compile_mlp(budget=planish.Budget(size="1%", weights=weights))


@entry("A recipe with an unknown key")
def _():
    Path("recipe.yaml").write_text("pases: [canonicalize]\n")
    compile_mlp(Path("recipe.yaml"))


# Passes.


@entry("A pass that covered nothing")
def _():
    compile_mlp("canonicalize,quantize{scheme=W4A16,group_size=128}")


@dataclass(frozen=True, kw_only=True)
class Halve(Pass):
    """Claims to be exact, and is not."""

    name: ClassVar[str] = "halve"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def run(self, model, ctx):
        weight = model.graph.initializers["down.weight"]
        weight.const_value = ir.tensor(weight.const_value.numpy() / 2, name="down.weight")
        return PassResult(modified=True)


@entry("A pass that broke its contract")
def _():
    compile_mlp(["canonicalize", Halve()], example_inputs={"x": X}, check="contract")


@dataclass(frozen=True, kw_only=True)
class Forgetful(Pass):
    """Leaves a graph that reads what nothing computes."""

    name: ClassVar[str] = "forgetful"

    def run(self, model, ctx):
        relu = next(node for node in model.graph if node.op_type == "Relu")
        model.graph.remove(relu)
        return PassResult(modified=True)


@entry("A pass that left a broken graph")
def _():
    compile_mlp(["canonicalize", Forgetful()])


@dataclass(frozen=True, kw_only=True)
class Crashing(Pass):
    """Ends in an exception that nobody expected."""

    name: ClassVar[str] = "crashing"

    def run(self, model, ctx):
        raise KeyError("down.bias")


@entry("A pass that crashed")
def _():
    compile_mlp(["canonicalize", Crashing()])


# Targets.


@entry("A target that does not exist")
def _():
    compile_mlp(target="openvino")


@entry("An op that is not standard, for the target portable")
def _():
    model = mlp()
    relu = next(node for node in model.graph if node.op_type == "Relu")
    relu.domain, relu.op_type = "com.microsoft", "QuickGelu"
    model.opset_imports["com.microsoft"] = 1
    planish.compile(model, "canonicalize", target="portable")


@entry("A GPU that torch does not find")
def _():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    compile_mlp(target="cuda")


@entry("A float type that the target does not run")
def _():
    module = torch.nn.Linear(64, 64).to(torch.bfloat16).eval()
    graph = planish.trace(module, torch.zeros(2, 64, dtype=torch.bfloat16))
    planish.compile(graph, "canonicalize,quantize{group_size=32}")


# Generating.


@entry("A model without a cache")
def _():
    compile_mlp().generate([[1, 2]])


@entry("A prompt that is too long")
def _():
    check_prompt([1] * 120, 20)


@entry("Tokens of another model")
def _():
    check_prompt([1, 32000], 20)


@entry("A temperature of zero")
def _():
    Sampling(temperature=0)


@pytest.mark.parametrize("heading", PROVOKED)
def test_the_page_has_the_message(heading, folder):
    with pytest.raises(PlanishError) as caught:
        PROVOKED[heading]()
    kind, _, message = entries()[heading].partition(": ")
    assert kind in [base.__name__ for base in type(caught.value).__mro__]
    pattern = ".*".join(map(re.escape, " ".join(message.split()).split("[…]")))
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)


def test_every_entry_is_provoked():
    assert list(entries()) == list(PROVOKED)


def test_every_heading_has_a_message():
    headings = re.findall(r"^### (.+)$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert headings == list(entries())
