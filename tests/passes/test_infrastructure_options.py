"""Options as text and YAML: what is written reads back equal, and what does not fit says so."""

from __future__ import annotations

import enum
import math
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.errors import PipelineError
from planish.passes.infrastructure import registry
from planish.passes.infrastructure.base import Pass, PassContext, PassResult
from planish.passes.infrastructure.options import build_pass, check_options, format_pass
from planish.passes.infrastructure.pipeline import Pipeline


class Strategy(enum.Enum):
    CHANNEL = "channel"
    GROUP = "group"


@dataclass(frozen=True, kw_only=True)
class Sample(Pass):
    """One option of each type."""

    name: ClassVar[str] = "sample"

    bits: int = 4
    damp: float = 0.01
    symmetric: bool = True
    scheme: str = "W4A16"
    group_size: int | None = None
    order: Literal["activation", "weight", 8] = "weight"
    ignore: tuple[str, ...] = ("lm_head",)
    block: int | str = "auto"
    pair: tuple[int, float] = (1, 0.5)
    bits_of: Mapping[str, int] = field(default_factory=dict)
    strategy: Strategy = Strategy.GROUP
    cache: pathlib.Path | None = None
    axes: frozenset[int] = frozenset()

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        return PassResult(modified=False)


@dataclass(frozen=True, kw_only=True)
class Plain(Pass):
    """No options."""

    name: ClassVar[str] = "plain"

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        return PassResult(modified=False)


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    _install(monkeypatch)


def _install(monkeypatch):
    passes = {"sample": Sample, "plain": Plain}
    monkeypatch.setattr(registry, "find", passes.__getitem__)


# Any text at all: quotes, commas, braces, backslashes and words that look like numbers included. YAML 1.1
# has no way to write lone surrogates and a few control characters; those cannot be in a recipe.
texts = st.text(
    st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from("\n\t"), max_size=8
) | st.sampled_from(
    [
        "",
        "8",
        "1e-3",
        "true",
        "none",
        "inf",
        "a,b",
        "{x=1}",
        "[y]",
        'say "no"',
        "it's",
        r"re:\d+\.q",
        "\\",
        '\\"',
    ]
)
finite = st.floats(allow_nan=False)
samples = st.builds(
    Sample,
    bits=st.integers(),
    damp=finite,
    symmetric=st.booleans(),
    scheme=texts,
    group_size=st.none() | st.integers(),
    order=st.sampled_from(["activation", "weight", 8]),
    ignore=st.lists(texts, max_size=3).map(tuple),
    block=st.integers() | texts,
    pair=st.tuples(st.integers(), finite),
    bits_of=st.dictionaries(texts, st.integers(), max_size=3),
    strategy=st.sampled_from(Strategy),
    cache=st.none() | st.just(pathlib.Path("some folder/file,1")),
    axes=st.frozensets(st.integers(), max_size=3),
)
pipelines = st.lists(samples | st.just(Plain()), max_size=3).map(lambda passes: Pipeline(tuple(passes)))


def _types(pipeline: Pipeline) -> list[object]:
    """Equality takes 1, 1.0 and True for the same; their types tell them apart."""
    return [{name: type(value) for name, value in vars(pass_).items()} for pass_ in pipeline]


@settings(deadline=None)  # a busy machine is no bug
@given(pipelines)
def test_text_reads_back_equal(pipeline):
    with pytest.MonkeyPatch.context() as monkeypatch:
        _install(monkeypatch)
        again = Pipeline.parse(str(pipeline))
    assert again == pipeline
    assert _types(again) == _types(pipeline)


@settings(deadline=None)  # a busy machine is no bug
@given(pipelines)
def test_yaml_reads_back_equal(pipeline):
    with pytest.MonkeyPatch.context() as monkeypatch:
        _install(monkeypatch)
        again = Pipeline.from_yaml(pipeline.to_yaml())
    assert again == pipeline
    assert _types(again) == _types(pipeline)


def test_text_of_the_manual_is_read_as_it_looks():
    (sample,) = Pipeline.parse(
        "sample{bits=8, damp=1e-3, symmetric=false, group_size=none, ignore=[lm_head,re:.*down_proj], "
        "order=8, block=64, pair=[2,3], bits_of={lm_head=8}, strategy=channel}"
    )
    assert sample == Sample(
        bits=8,
        damp=0.001,
        symmetric=False,
        group_size=None,
        ignore=("lm_head", "re:.*down_proj"),
        order=8,
        block=64,
        pair=(2, 3.0),
        bits_of={"lm_head": 8},
        strategy=Strategy.CHANNEL,
    )
    assert isinstance(sample.pair[1], float)


def test_defaults_are_left_out_of_the_text():
    assert format_pass(Sample(bits=4)) == "sample"
    assert format_pass(Sample(bits=3, ignore=())) == "sample{bits=3,ignore=[]}"


def test_quoted_text_stays_text_and_a_word_becomes_a_number():
    (quoted, word) = Pipeline.parse("""sample{block="64"},sample{block=64}""")
    assert (quoted.block, word.block) == ("64", 64)


def test_backslashes_in_quotes_are_plain():
    (sample,) = Pipeline.parse(r"""sample{ignore=["re:layers\.\d{1,2}"]}""")
    assert sample.ignore == (r"re:layers\.\d{1,2}",)


def test_one_word_is_a_list_of_one():
    (sample,) = Pipeline.parse("sample{ignore=lm_head}")
    assert sample.ignore == ("lm_head",)


def test_yaml_takes_names_and_typed_values():
    recipe = "- plain\n- sample: {damp: 1e-4, group_size: 32, ignore: [a, b]}\n"
    assert Pipeline.from_yaml(recipe) == Pipeline(
        (Plain(), Sample(damp=1e-4, group_size=32, ignore=("a", "b")))
    )


def test_infinity_and_nan_have_a_text_form():
    (sample,) = Pipeline.parse(str(Pipeline((Sample(damp=math.inf, pair=(1, math.nan)),))))
    assert sample.damp == math.inf
    assert math.isnan(sample.pair[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample{bit=8}", "pass 'sample' has no option 'bit' — did you mean 'bits'?"),
        ("plain{bits=8}", "pass 'plain' has no option 'bits' — it takes no options"),
        ("sample{bits=four}", "pass 'sample', option 'bits': expected an integer, found four"),
        ("sample{bits=4.5}", "option 'bits': expected an integer, found 4.5"),
        ("sample{bits=true}", "option 'bits': expected an integer, found true"),
        ("sample{bits=[4]}", "option 'bits': expected an integer, found ['4']"),
        ("sample{damp=much}", "option 'damp': expected a number, found much"),
        ("sample{symmetric=1}", "option 'symmetric': expected true or false, found 1"),
        ("sample{scheme=[a]}", "option 'scheme': expected text"),
        ("sample{order=column}", "option 'order': expected one of activation, weight, 8, found column"),
        ("sample{strategy=row}", "option 'strategy': expected one of channel, group, found row"),
        ("sample{group_size=wide}", "option 'group_size': expected an integer or none, found wide"),
        ("sample{pair=[1]}", "option 'pair': expected [an integer, a number], found ['1']"),
        ("sample{axes=[1,x]}", "option 'axes': expected a list, each item an integer"),
        ("sample{bits_of={a=b}}", "option 'bits_of': expected a mapping of text to an integer"),
        ("sample{bits=1,bits=2}", "'bits' is given twice"),
        ("sample{bits_of={a=1,a=2}}", "'a' is given twice"),
        ("sample{bits=1", "column 14: expected ',' or '}', found the end"),
        ("sample{bits 1}", "column 13: expected '=' after 'bits', found '1'"),
        ("sample{bits=}", "column 13: expected a value, found '}'"),
        ("sample{ignore=[a b]}", "column 18: expected ',' or ']', found 'b'"),
        ("sample{}}", "column 9: expected ',' or the end, found '}'"),
        ("sample,,plain", "column 8: expected the name of a pass, found ','"),
        ("sample,", "column 8: expected the name of a pass, found the end"),
    ],
)
def test_bad_text_says_what_was_expected(text, message):
    with pytest.raises(PipelineError) as caught:
        Pipeline.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("- sample: {bits: '8'}", "option 'bits': expected an integer, found '8'"),
        ("- sample: {bits: true}", "option 'bits': expected an integer, found True"),
        ("- sample: {symmetric: 1}", "option 'symmetric': expected true or false, found 1"),
        ("- sample: {scheme: 4}", "option 'scheme': expected text, found 4"),
        ("- sample: [bits]", "recipe, item 1: expected the name of a pass"),
        ("- plain\n- 3", "recipe, item 2: expected the name of a pass, found 3"),
        ("- {sample: {}, plain: {}}", "recipe, item 1: expected the name of a pass"),
        ("sample: {bits: 8}", "recipe: expected a list, found dict"),
        ("- [", "the recipe is not YAML"),
    ],
)
def test_bad_yaml_says_what_was_expected(recipe, message):
    with pytest.raises(PipelineError) as caught:
        Pipeline.from_yaml(recipe)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample(ignore="lm_head"), "option 'ignore': expected a list, each item text, found 'lm_head'"),
        (Sample(bits="4"), "option 'bits': expected an integer, found '4'"),
        (Sample(damp="0.1"), "option 'damp': expected a number, found '0.1'"),
    ],
)
def test_pass_objects_are_checked_too(sample, message):
    with pytest.raises(PipelineError) as caught:
        Pipeline.of([sample])
    assert message in str(caught.value)


def test_good_pass_objects_pass_the_check():
    check_options(Sample(damp=1, pair=[1, 2], cache=pathlib.Path("x")))


def test_a_value_without_text_form_is_written_for_people_and_refused_when_read():
    text = str(Pipeline((Sample(bits=range(3)),)))
    assert text == 'sample{bits="range(0, 3)"}'
    with pytest.raises(PipelineError, match=r"option 'bits': expected an integer, found 'range\(0, 3\)'"):
        Pipeline.parse(text)


@dataclass(frozen=True, kw_only=True)
class Picky(Pass):
    """Rejects what the types allow, and needs one option."""

    name: ClassVar[str] = "picky"
    bits: int

    def __post_init__(self) -> None:
        if self.bits < 2:
            raise ValueError(f"bits: expected at least 2, found {self.bits}")

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        return PassResult(modified=False)


def test_a_missing_option_and_one_that_the_pass_rejects_name_the_pass():
    with pytest.raises(PipelineError, match=r"pass 'picky' needs option 'bits': an integer"):
        build_pass(Picky, {})
    with pytest.raises(PipelineError, match=r"pass 'picky': bits: expected at least 2, found 1"):
        build_pass(Picky, {"bits": 1})
