"""``planish search``: the smallest or fastest model that a budget allows."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cli_options import (
    CalibrationOption,
    InputsOption,
    ModelArgument,
    SizesOption,
    check_output,
    read_batches,
    read_feeds,
    recipe_path,
)
from .ir.errors import InputError

if TYPE_CHECKING:
    from .runtime.compiled_model import CompiledModel
    from .runtime.provenance import ParetoPoint

out = Console()
err = Console(stderr=True)


def search(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="File *.onnx, or a folder for a decoder.")],
    max_size: Annotated[
        str | None, typer.Option("--max-size", help="Bytes of weights, or a share: 50%.")
    ] = None,
    max_latency: Annotated[
        str | None, typer.Option(help="Milliseconds of a call, or a share; for decoders, of a token.")
    ] = None,
    max_cache: Annotated[
        str | None, typer.Option(help="Bytes of a decoder's cache for 1,024 tokens, or a share.")
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option(help="How much worse the metric may become: 0.01, or relative: 1%.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="file.py:function that takes a compiled model and returns a number, more is better. "
            "By default how much outputs resemble those of the uncompressed model."
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Models to compile and measure at most.", min=1)] = 16,
    target: Annotated[
        str, typer.Option("--target", "-t", help="As for `planish compile`.")
    ] = "onnxruntime-cpu",
    inputs: InputsOption = None,
    size: SizesOption = None,
    calibration: CalibrationOption = None,
    seed: Annotated[int, typer.Option(help="Seeds passes that draw random numbers.")] = 0,
    cache: Annotated[
        bool,
        typer.Option("--cache/--no-cache", help="Keep results of long passes, as `planish compile` does."),
    ] = True,
) -> None:
    """Search for the best compressed model within a budget, by measuring.

    ```
    planish search model.onnx -o small.onnx --max-size 30% --max-drop 0.01 --calibration batch.npz
    planish search model.onnx -o fast.onnx --max-latency 60% --metric accuracy.py:top1
    ```

    Pruning, bits and, for decoders, the compression of the cache are tried by themselves and then together.
    Where size, time or cache are limited, the best metric is sought; where only the drop is, the least size
    and time. What was measured is printed, and `planish report` draws it.
    """
    from .compiler import compile as compile_model
    from .ir.files import write_text
    from .passes.infrastructure.pipeline import Pipeline
    from .passes.infrastructure.recipe import Recipe
    from .runtime.provenance import RECIPE, SOURCE
    from .search import Budget

    budget = Budget(
        size=max_size,
        latency_ms=max_latency,
        cache=max_cache,
        max_drop=max_drop,
        metric=_metric(metric) if metric is not None else None,
        trials=trials,
        on_trial=_show,
    )
    check_output(output)
    feeds = read_feeds(model, inputs, size)
    compiled = compile_model(
        model,
        budget=budget,
        example_inputs=feeds,
        calibration=read_batches(calibration),
        target=target,
        seed=seed,
        cache=cache,
    )
    written = compiled.save(output)
    properties = compiled.model.metadata_props
    used = Recipe(Pipeline.from_yaml(properties[RECIPE]))
    used = dataclasses.replace(used, target=target, seed=seed, source=properties[SOURCE])
    write_text(recipe_path(output), used.to_yaml())
    out.print(_front_table(compiled.front))
    out.print(f"wrote {written}", markup=False, highlight=False, soft_wrap=True)


def _metric(text: str) -> Callable[[CompiledModel], float]:
    """A function in a file.

    Raises:
        InputError: there is no such file or function.
    """
    file, colon, name = text.rpartition(":")
    path = Path(file)
    if not colon or not path.is_file():
        raise InputError(f"--metric {text}: expected file.py:function, and the file to exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"--metric {text}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"--metric {text}: {path} has no function {name!r}")
    return function  # type: ignore[no-any-return]


def _show(point: ParetoPoint, allowed: bool) -> None:
    cells = ", ".join(cell for cell in _cells(point)[:-1] if cell)
    err.print(f"{'within' if allowed else 'beyond'}: {point.label}: {cells}", markup=False, soft_wrap=True)


def _front_table(points: tuple[ParetoPoint, ...]) -> Table:
    table = Table(
        title="What nothing beats in every respect", title_justify="left", box=box.SIMPLE, pad_edge=False
    )
    for heading in ("size", "latency", "cache", "metric", "pipeline"):
        table.add_column(
            heading, justify="left" if heading == "pipeline" else "right", no_wrap=heading != "pipeline"
        )
    for point in points:
        table.add_row(*map(escape, _cells(point)), style="bold" if point.chosen else None)
    return table


def _cells(point: ParetoPoint) -> list[str]:
    from .ir.printer import format_bytes

    return [
        format_bytes(round(point.size)),
        "" if point.latency_ms is None else f"{point.latency_ms:.3g} ms",
        "" if point.cache is None else format_bytes(round(point.cache)),
        f"{point.metric:.5g}",
        f"{point.passes}{'  ← chosen' if point.chosen else ''}",
    ]
