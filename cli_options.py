"""What several commands share: their options, and how what is given to these is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from .ir.errors import InputError, ModelError

if TYPE_CHECKING:
    import numpy as np

    from .passes.infrastructure.pipeline import Pipeline
    from .passes.infrastructure.recipe import Recipe

    Feeds = Mapping[str, np.ndarray[Any, Any]]

ModelArgument = Annotated[Path, typer.Argument(help="An ONNX file.", show_default=False)]
PassesOption = Annotated[
    str,
    typer.Option(
        "--passes",
        "-p",
        help='Pipeline text, such as "canonicalize,fuse,quantize{scheme=W8A8}", or a recipe.yaml.',
    ),
]
TargetOption = Annotated[str, typer.Option("--target", "-t", help="onnxruntime-cpu or portable.")]
InputsOption = Annotated[
    Path | None,
    typer.Option("--inputs", "-i", help="An .npz with one array per graph input; made up if absent."),
]
SizesOption = Annotated[
    list[str] | None,
    typer.Option("--size", help="Length of a symbolic dimension of made-up inputs: batch_size=1."),
]
CalibrationOption = Annotated[
    list[Path] | None, typer.Option("--calibration", help="An .npz with one batch; may be repeated.")
]
TrainingOption = Annotated[
    list[Path] | None,
    typer.Option("--training", help="An .npz with a batch to train on, and `labels`; may be repeated."),
]
SeedOption = Annotated[int, typer.Option(help="Seeds every pass that draws random numbers.")]


def read_pipeline(text: str) -> Pipeline:
    """A pipeline from its text, or from the file of a recipe."""
    from .passes.infrastructure.pipeline import Pipeline
    from .passes.infrastructure.recipe import Recipe

    return Recipe.read(Path(text)).pipeline if text.endswith((".yaml", ".yml")) else Pipeline.of(text)


def read_recipe(passes: str | None, recipe: Path | None, preset: str | None) -> Recipe:
    """What one of three options says, or the default."""
    from .passes.infrastructure.pipeline import Pipeline
    from .passes.infrastructure.recipe import Recipe
    from .passes.infrastructure.recipe import preset as find_preset

    given = {"--passes": passes, "--recipe": recipe, "--preset": preset}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InputError(f"expected one of {', '.join(given)}, found {' and '.join(names)}")
    if recipe is not None:
        return Recipe.read(recipe)
    if preset is not None:
        return find_preset(preset)
    return Recipe(Pipeline.of("canonicalize,fuse")) if passes is None else Recipe(read_pipeline(passes))


def check_output(output: Path) -> None:
    """Say before hours of work, and not after, that a result cannot be written.

    Raises:
        ModelError: there is no folder to write it to.
    """
    if not output.parent.is_dir():
        raise ModelError(f"--output {output}: {output.parent} is not a folder", hint="make it first")


def recipe_path(output: Path) -> Path:
    """Where the recipe of a result goes: beside the file, or in the folder."""
    return output.with_suffix(".recipe.yaml") if output.suffix == ".onnx" else output / "recipe.yaml"


def read_feeds(model: Path, path: Path | None, sizes: Sequence[str] | None) -> Feeds:
    """Inputs from a file, or made up from the model's declarations."""
    from .ir import load
    from .runtime.example_inputs import example_inputs
    from .runtime.model_file import read_inputs

    if path is not None:
        if sizes:
            raise InputError(
                "--size is for made-up inputs, and --inputs gives real ones", hint="leave one out"
            )
        return read_inputs(path)
    return example_inputs(load(model, check_weights=False), sizes=dict(map(_size, sizes or ())))


def _size(text: str) -> tuple[str, int]:
    name, equals, length = text.rpartition("=")
    if not (equals and name and length.isdigit()):
        raise InputError(f"--size {text}: expected name=length", hint="for example --size batch_size=1")
    return name, int(length)


def read_batches(paths: Sequence[Path] | None) -> list[Feeds] | None:
    """One batch from every file, if there are any."""
    from .runtime.model_file import read_inputs

    return [read_inputs(path) for path in paths] if paths else None


def format_shapes(feeds: Feeds) -> str:
    """``x [3, 32], mask [3, 8]``, to be printed as markup."""
    return escape(", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items()))
