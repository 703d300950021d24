"""The commands that explain: a report of a compiled file, and what differs between two."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .cli_options import (
    CalibrationOption,
    InputsOption,
    ModelArgument,
    PassesOption,
    SeedOption,
    SizesOption,
    TargetOption,
    read_batches,
    read_feeds,
    read_pipeline,
)
from .ir.errors import InputError, ModelError, PipelineError, TargetError

if TYPE_CHECKING:
    import onnx_ir as ir

    from .codegen.target import BoundModel
    from .passes.infrastructure.bisect import BisectResult
    from .runtime.provenance import Provenance
    from .runtime.report_html import Measurements

out = Console()
err = Console(stderr=True)


def report(
    model: Annotated[Path, typer.Argument(help="What `planish compile` wrote.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "--out", "-o", help="Where to; beside the model if absent.")
    ] = None,
    before: Annotated[
        Path | None, typer.Option(help="The model it was compiled from, to compare outputs and times with.")
    ] = None,
    inputs: InputsOption = None,
    size: SizesOption = None,
    latency: Annotated[bool, typer.Option("--latency", help="Time the model and its layers.")] = False,
    costs: Annotated[
        Path | None, typer.Option(help="What `planish compile --report` wrote: adds times and memory.")
    ] = None,
) -> None:
    """Explain a compiled model on one HTML page, which needs no network.

    ```
    planish report small.onnx
    planish report small.onnx --before model.onnx --latency --size batch_size=1 --size sequence_length=128
    ```

    It shows the graph by blocks before and after, what each pass did and cost, bits, sparsity and error of
    every layer, where the time goes, the recipe, and the remarks of the passes.
    """
    from .cli_tables import file_bytes
    from .ir.files import write_text
    from .runtime.report_html import Content, render
    from .runtime.saved import read_saved

    file = model / "model.onnx" if model.is_dir() else model
    page = output or file.with_suffix(".html")
    if not page.parent.is_dir():
        raise ModelError(f"--output {page}: {page.parent} is not a folder", hint="make it first")
    bound, _ = read_saved(model)
    provenance = _provenance(file, bound)
    measurements = None
    if before is not None or latency:
        measurements = _measure(file, bound, provenance, before, inputs, size, latency)
    content = Content(
        name=model.resolve().name,
        file_bytes=file_bytes(file),
        file_bytes_before=None if before is None else file_bytes(before),
        provenance=provenance,
        costs=provenance.report if costs is None else _costs(costs, provenance),
        measurements=measurements,
        source_name="SOURCE.onnx" if before is None else before.name,
    )
    write_text(page, render(content))
    out.print(f"wrote {page}", highlight=False, soft_wrap=True)


def _provenance(file: Path, bound: BoundModel) -> Provenance:
    from .runtime.provenance import Provenance

    try:
        return Provenance.read(bound.model.metadata_props)
    except ModelError as error:
        raise ModelError(f"{file}: {error.message}", hint=error.hint) from error


def _measure(
    file: Path,
    bound: BoundModel,
    provenance: Provenance,
    before: Path | None,
    inputs: Path | None,
    size: list[str] | None,
    latency: bool,
) -> Measurements:
    from .runtime.report_html import measure

    feeds = read_feeds(before or file, inputs, size)
    try:
        with err.status("measuring"):
            return measure(file, bound, provenance.after, before=before, feeds=feeds, latency=latency)
    except InputError as error:
        if inputs is not None:
            raise
        raise InputError(
            error.message, hint="these inputs were made up: give --inputs, or lengths, as --size batch_size=1"
        ) from error


def _costs(path: Path, provenance: Provenance) -> Mapping[str, Any]:
    """The report with times and memory, if it is that of the same compilation."""
    try:
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        names = [row["name"] for row in found["passes"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--costs {path}: expected what `planish compile --report` writes, found {error!r}"
        ) from error
    if names != [row["name"] for row in provenance.report["passes"]]:
        raise InputError(
            f"--costs {path}: it is of other passes than the file's: {', '.join(names)}",
            hint="give the report of the compilation that wrote the file",
        )
    return found


def diff(
    before: Annotated[Path, typer.Argument(help="The first ONNX file.", show_default=False)],
    after: Annotated[Path, typer.Argument(help="The second ONNX file.", show_default=False)],
    inputs: InputsOption = None,
    size: SizesOption = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Exit with code 1 if an output's relative error is larger.")
    ] = None,
) -> None:
    """Show what differs between two ONNX files: nodes, weights, inputs and outputs, and what they compute.

    ```
    planish compile model.onnx -o out.onnx --dump steps/
    planish diff steps/001_canonicalize.onnx steps/002_fuse.onnx
    planish diff model.onnx out.onnx --inputs inputs.npz --tolerance 1e-3
    ```

    Where an output differs by more than the tolerance (1e-4), the first tensor that both have and that
    differs is named. Differing is no error, and the exit code 0, unless a tolerance was given.
    """
    from .ir import diff_models, load
    from .runtime.model_difference import model_difference

    models = load(before), load(after)
    structure = diff_models(*models)
    _say(str(structure) if structure else "no difference")
    if not structure:
        return
    try:
        feeds = read_feeds(before, inputs, size)
        found = model_difference(*models, feeds, tolerance=_TOLERANCE if tolerance is None else tolerance)
    except (InputError, TargetError) as error:
        if inputs is not None or size or tolerance is not None:
            raise
        _say(f"outputs: not compared: {error}")
        return
    _say(str(found))
    if tolerance is not None and not found.is_equal:
        raise typer.Exit(1)


_TOLERANCE = 1e-4


def bisect(
    model: ModelArgument,
    passes: PassesOption = "canonicalize,fuse",
    target: TargetOption = "onnxruntime-cpu",
    inputs: InputsOption = None,
    size: SizesOption = None,
    calibration: CalibrationOption = None,
    seed: SeedOption = 0,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative error of any output against the input model.")
    ] = None,
    check_command: Annotated[
        str | None,
        typer.Option("--check-command", help="Run with the path of a model; exit code 0 says it is good."),
    ] = None,
    reproducer: Annotated[
        Path | None,
        typer.Option(help="Folder for the smallest model and pipeline that still fail, and a command."),
    ] = None,
) -> None:
    """Find the pass that breaks a model, then the layer, then the rewrite, by binary search.

    Broken means, without further options, that a pass breaks its own contract:

    ```
    planish bisect model.onnx -p "canonicalize,fuse,quantize{scheme=W8A8}" --inputs inputs.npz
    ```

    or that an output moves too far from the input model's, or that a program of yours says so:

    ```
    planish bisect model.onnx -p recipe.yaml --tolerance 0.05
    planish bisect model.onnx -p recipe.yaml --check-command "python is_good.py" --reproducer crash/
    ```

    A reproducer is cut down to the nodes around the failure as long as these fail in the same way; a program
    that expects the whole model gets the whole model.
    """
    from .codegen import get_target
    from .ir import load
    from .passes.infrastructure.bisect import bisect as find_culprit
    from .passes.infrastructure.bisect_reproducer import Trial, smallest_case, write_case

    if tolerance is not None and check_command is not None:
        raise InputError("bisect: expected --tolerance or --check-command, and not both")
    pipeline, graph = read_pipeline(passes), load(model)
    trial = Trial(
        target=get_target(target),
        seed=seed,
        check=None if check_command is None else _command_check(check_command),
        tolerance=tolerance,
    )
    data: dict[str, Any] = {
        "examples": () if check_command else (read_feeds(model, inputs, size),),
        "calibration": read_batches(calibration) or (),
    }
    result = find_culprit(
        graph,
        pipeline,
        target=trial.target,
        seed=seed,
        check=trial.check,
        tolerance=tolerance,
        write=lambda line: err.print(line, markup=False, highlight=False, soft_wrap=True),
        **data,
    )
    _print_culprit(result, len(pipeline))
    if reproducer is not None and result.culprit is not None:
        trial = dataclasses.replace(trial, error=result.error)
        case = smallest_case(graph, pipeline, result, trial, **data)
        options = [] if tolerance is None else ["--tolerance", f"{tolerance:g}"]
        options += [] if check_command is None else ["--check-command", check_command]
        command = write_case(reproducer, case, trial, options)
        _say(f"reproducer: {len(case.model.graph)} of {len(graph.graph)} nodes in {reproducer}\n{command}")


def _command_check(command: str) -> Callable[[ir.Model], bool]:
    """A check that saves the model and runs a program on it, as ``git bisect run`` does."""
    from .ir import save

    words = shlex.split(command)
    if not words:
        raise PipelineError(
            "--check-command is empty", hint='for example --check-command "python is_good.py"'
        )

    def check(model: ir.Model) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            save(model, path)
            return subprocess.run([*words, str(path)], check=False).returncode == 0

    return check


def _print_culprit(result: BisectResult, total: int) -> None:
    if result.culprit is None:
        _say(f"no pass breaks the model ({result.runs} runs)")
        return
    from .passes.infrastructure.options import format_pass

    _say(
        f"culprit: {format_pass(result.culprit)}, pass {result.position + 1} of {total} ({result.runs} runs)"
    )
    if result.layer:
        _say(f"layer:   {result.layer}")
    if result.rewrite is not None:
        _say(f"rewrite: {result.rewrite.rule} at node {result.rewrite.node}")
    _say(f"reason:  {result.reason}")


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)
