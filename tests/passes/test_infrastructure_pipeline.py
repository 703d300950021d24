"""Pipelines: what they are made from, which orders are legal, and which passes there are."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx_ir.passes import common
from planish.ir.errors import PipelineError
from planish.passes.infrastructure import foreign, registry
from planish.passes.infrastructure.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.infrastructure.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class _Base(Pass):
    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        return PassResult(modified=False)


@dataclass(frozen=True, kw_only=True)
class Establish(_Base):
    """Makes the model canonical."""

    name: ClassVar[str] = "establish"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})


@dataclass(frozen=True, kw_only=True)
class Need(_Base):
    """Needs a canonical model that is not quantised."""

    name: ClassVar[str] = "need"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})

    bits: int = 4
    """Bits of each weight."""


@dataclass(frozen=True, kw_only=True)
class Round(_Base):
    """Quantises.

    Attributes:
        scheme: what to store,
            over two lines.
        ignore: layers to leave alone.
    """

    name: ClassVar[str] = "round"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})

    scheme: str
    ignore: tuple[str, ...] = ("lm_head",)


@dataclass(frozen=True, kw_only=True)
class Destroy(_Base):
    """Takes the canonical form away."""

    name: ClassVar[str] = "destroy"
    destroys: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})


@pytest.fixture
def installed(monkeypatch):
    """Only the passes above are installed, found through entry points into this module."""
    entries = {
        kind.name: importlib.metadata.EntryPoint(kind.name, f"{__name__}:{kind.__name__}", registry.GROUP)
        for kind in (Establish, Need, Round, Destroy)
    }
    monkeypatch.setattr(registry, "_entry_points", lambda: entries)
    return entries


pytestmark = pytest.mark.usefixtures("installed")


def test_a_list_may_mix_objects_names_texts_classes_and_onnx_ir_passes():
    pipeline = Pipeline.of(
        [
            Establish(),
            "need{bits=3}",
            Need,
            "round{scheme=W8A8},destroy",
            common.IdentityEliminationPass(),
            (),
        ]
    )
    assert str(pipeline) == "establish,need{bits=3},need,round{scheme=W8A8},destroy,IdentityEliminationPass"
    assert Pipeline.of(pipeline) == pipeline
    assert Pipeline.of(str(pipeline)) == pipeline


def test_an_empty_pipeline_is_one():
    assert Pipeline.of("") == Pipeline.of(()) == Pipeline.from_yaml("") == Pipeline(())
    assert str(Pipeline(())) == ""
    assert Pipeline.from_yaml(Pipeline(()).to_yaml()) == Pipeline(())


def test_a_path_is_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- establish\n- need: {bits: 3}\n")
    assert Pipeline.of(recipe) == Pipeline((Establish(), Need(bits=3)))
    with pytest.raises(PipelineError, match=r"missing\.yaml' cannot be read"):
        Pipeline.of(tmp_path / "missing.yaml")


@pytest.mark.parametrize("item", [3, None, object(), [Establish(), 3.5]])
def test_what_is_no_pass_is_refused(item):
    with pytest.raises(PipelineError, match="expected a pass, its name or pipeline text, found"):
        Pipeline.of(item)


def test_an_item_may_be_a_name_with_its_options():
    assert Pipeline.of([{"need": {"bits": 3}}, {"establish": None}]) == Pipeline((Need(bits=3), Establish()))
    with pytest.raises(PipelineError, match="expected the name of a pass"):
        Pipeline.of([{"need": {}, "establish": {}}])


def test_unknown_names_come_with_the_closest_known_one():
    with pytest.raises(PipelineError, match=r"unknown pass 'establsh' — did you mean 'establish'\?"):
        Pipeline.of("establsh")
    with pytest.raises(PipelineError, match=r"did you mean 'IdentityEliminationPass'\?"):
        Pipeline.of("IdentityElimination")


def test_legal_orders_pass():
    Pipeline.of("establish,need,round{scheme=W8A8}").check_legal()
    Pipeline.of("need").check_legal(frozenset({Fact.CANONICAL}))
    Pipeline.of("establish,destroy,establish,need").check_legal()


def _complaint(text: str, *facts: Fact) -> str:
    with pytest.raises(PipelineError) as caught:
        Pipeline.of(text).check_legal(frozenset(facts))
    return str(caught.value)


def test_a_missing_fact_names_pass_fact_provider_and_a_pipeline_that_works():
    assert _complaint("need{bits=2}") == (
        "pass 'need' (number 1 of 1) requires the fact 'canonical', which nothing before it establishes; "
        "'establish' establishes it — use \"establish,need{bits=2}\""
    )


def test_a_provider_that_comes_too_late_is_moved_up():
    assert _complaint("need,round{scheme=W4A16},establish").endswith(
        'use "establish,need,round{scheme=W4A16}"'
    )


def test_a_destroyed_fact_says_who_destroyed_it():
    assert _complaint("establish,destroy,need") == (
        "pass 'need' (number 3 of 3) requires the fact 'canonical', which 'destroy' destroyed before it; "
        "'establish' establishes it — use \"establish,destroy,establish,need\""
    )


def test_a_forbidden_fact_says_who_established_it_and_the_pass_is_moved_up():
    assert _complaint("establish,round{scheme=W8A8},need") == (
        "pass 'need' (number 3 of 3) cannot run on a model that is 'quantized', which 'round' established "
        'before it — use "establish,need,round{scheme=W8A8}"'
    )


def test_a_fact_of_the_model_itself_that_is_forbidden_has_no_repair():
    assert _complaint("need", Fact.CANONICAL, Fact.QUANTIZED) == (
        "pass 'need' (number 1 of 1) cannot run on a model that is 'quantized', "
        "which already holds of the model"
    )


def test_a_fact_that_nobody_establishes_says_so(installed):
    del installed["establish"]
    assert _complaint("need") == (
        "pass 'need' (number 1 of 1) requires the fact 'canonical', which nothing before it establishes; "
        "no installed pass establishes it"
    )


@pytest.mark.parametrize(
    "pipeline", ["need", "need,round{scheme=a},establish", "establish,round{scheme=a},need"]
)
def test_the_pipeline_that_an_error_suggests_is_legal(pipeline):
    suggestion = _complaint(pipeline).rpartition("use ")[2].strip('"')
    Pipeline.of(suggestion).check_legal()


def test_describe_reads_options_from_fields_docstring_and_field_strings():
    need = registry.describe(Need)
    assert need.summary == "Needs a canonical model that is not quantised."
    assert need.forbids == {Fact.QUANTIZED}
    (bits,) = need.options
    assert (bits.name, bits.accepts, bits.default, bits.doc) == (
        "bits",
        "an integer",
        "4",
        "Bits of each weight.",
    )
    scheme, ignore = registry.describe(Round).options
    assert (scheme.default, scheme.doc) == (None, "what to store, over two lines.")
    assert (ignore.default, ignore.accepts, ignore.doc) == (
        "[lm_head]",
        "a list, each item text",
        "layers to leave alone.",
    )


def test_planishs_own_passes_are_installed_and_described(monkeypatch):
    monkeypatch.undo()
    assert {"canonicalize", "fuse", "quantize"} <= set(registry.available())
    for name in registry.available():
        for option in registry.describe(registry.find(name)).options:
            assert option.doc, f"{name}: option {option.name} has no description"


def test_an_entry_point_that_is_no_pass_or_has_another_name_is_refused(installed):
    installed["text"] = importlib.metadata.EntryPoint("text", "string:ascii_letters", registry.GROUP)
    with pytest.raises(PipelineError, match="is not a planish Pass dataclass"):
        registry.find("text")
    installed["other"] = importlib.metadata.EntryPoint("other", f"{__name__}:Need", registry.GROUP)
    with pytest.raises(PipelineError, match="calls itself 'need'"):
        registry.find("other")
    installed["gone"] = importlib.metadata.EntryPoint("gone", "no_such_module:Need", registry.GROUP)
    with pytest.raises(PipelineError, match="pass 'gone' cannot be loaded from 'no_such_module:Need'"):
        registry.find("gone")
    assert registry.establishing(Fact.CANONICAL) == "establish"  # the broken ones do not get in the way


PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar
from planish.passes.infrastructure.base import Pass, PassResult

@dataclass(frozen=True, kw_only=True)
class Polish(Pass):
    """A pass from elsewhere."""
    name: ClassVar[str] = "polish"
    times: int = 1
    def run(self, model, ctx):
        return PassResult(modified=False)
'''


def test_a_plug_in_is_found_by_its_entry_point(tmp_path):
    (tmp_path / "polish_plugin.py").write_text(PLUGIN)
    metadata = tmp_path / "polish_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: polish-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[planish.passes]\npolish = polish_plugin:Polish\n")
    script = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from planish.passes.infrastructure.pipeline import Pipeline
        print(Pipeline.of("polish{{times=3}}"))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "polish{times=3}"


def _model() -> ir.Model:
    return ir.from_proto(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["": 21]>
            net (float[2] x) => (float[2] y) { a = Identity(x) b = Identity(x) y = Add(a, b) }"""
        )
    )


def test_onnx_ir_passes_keep_their_options_in_text_and_yaml():
    pipeline = Pipeline.of([common.CommonSubexpressionEliminationPass(size_limit=7)])
    assert str(pipeline) == "CommonSubexpressionEliminationPass{size_limit=7}"
    assert Pipeline.of(str(pipeline)) == pipeline
    assert Pipeline.from_yaml(pipeline.to_yaml()) == pipeline
    assert pipeline != Pipeline.of("CommonSubexpressionEliminationPass")
    assert pipeline.passes[0].contract is Contract.EXACT
    with pytest.raises(PipelineError, match=r"has no option 'limit' — options: size_limit"):
        Pipeline.of("CommonSubexpressionEliminationPass{limit=7}")
    with pytest.raises(PipelineError, match=r"option 'size_limit': expected an integer, found big"):
        Pipeline.of("CommonSubexpressionEliminationPass{size_limit=big}")


def test_an_in_place_onnx_ir_pass_runs_as_it_is(context):
    model = _model()
    result = foreign.adapt(common.IdentityEliminationPass()).run(model, context)
    assert result.modified
    assert [node.op_type for node in model.graph] == ["Add"]


class _Copying(ir.passes.FunctionalPass):
    """Returns a new model, as functional passes do."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        copy = model.clone()
        copy.graph.name = "copied"
        copy.metadata_props["seen"] = "yes"
        return ir.passes.PassResult(copy, modified=True)


def test_a_functional_onnx_ir_pass_ends_up_in_the_same_model(context):
    model = _model()
    result = foreign.adapt(_Copying()).run(model, context)
    assert result.modified
    assert (model.graph.name, model.metadata_props) == ("copied", {"seen": "yes"})
    assert str(Pipeline.of([_Copying()])) == "_Copying"


@pytest.fixture
def context():
    from planish.codegen import get_target

    return PassContext(target=get_target("portable"))
