"""Recipes and presets: they read back, and what is no recipe is refused in one line."""

import pytest
from planish.codegen import get_target
from planish.ir.errors import PipelineError
from planish.passes.infrastructure.pipeline import Pipeline
from planish.passes.infrastructure.recipe import Recipe, preset, presets

PASSES = "canonicalize,fuse,quantize{scheme=W4A16,ignore=[lm_head,'re:.*down']}"


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(Pipeline.of("canonicalize")),
        Recipe(Pipeline.of(PASSES), target="portable", seed=3, source="sha256:abc"),
        Recipe(Pipeline(()), seed=0),
    ],
)
def test_recipes_read_back(recipe):
    assert Recipe.parse(recipe.to_yaml()) == recipe


def test_a_list_of_passes_is_a_recipe():
    found = Recipe.parse("- canonicalize\n- quantize: {scheme: W8A8}\n")
    assert found == Recipe(Pipeline.of("canonicalize,quantize{scheme=W8A8}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes: [canonicalize]\nsteps: 3", "key 'steps' is not known: expected some of planish, source"),
        ("target: cuda", "there is no key 'passes'"),
        ("passes: [canonicalize]\nseed: one", "seed: expected int, found 'one'"),
        ("passes: [canonicalize]\nseed: true", "seed: expected int, found True"),
        ("passes: [canonicalize]\ntarget: 3", "target: expected str, found 3"),
        ("passes: {canonicalize: }", "expected a list, found dict"),
        ("passes: [no-such-pass]", "no-such-pass"),
        ("a: [", "the recipe is not YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(text, message):
    with pytest.raises(PipelineError) as caught:
        Recipe.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(PipelineError, match="cannot be read"):
        Recipe.read(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PipelineError, match="cannot be read"):
        Recipe.read(tmp_path / "binary.yaml")


def test_presets_are_legal_and_explained():
    assert list(presets()) == ["cpu-4bit", "cpu-int8", "edge-small", "gpu-4bit", "lossless"]
    for recipe in presets().values():
        recipe.pipeline.check_legal()
        assert len(recipe.description) > 80
        if recipe.target != "cuda":
            get_target(recipe.target)
    with pytest.raises(PipelineError, match=r"no preset 'cpu'.*there are cpu-4bit, cpu-int8"):
        preset("cpu")
