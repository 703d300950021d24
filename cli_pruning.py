"""The commands about pruning: what can be pruned, and what every size of it takes on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from .ir.errors import InputError, ModelError

if TYPE_CHECKING:
    from .runtime.latency_table import LatencyTable

out = Console()
err = Console(stderr=True)


def structure(
    model: Annotated[Path, typer.Argument(help="An ONNX file.", show_default=False)],
) -> None:
    """Show what `prune` could remove: channels, heads and whole modules, and why the rest must stay.

    ```
    planish structure model.onnx
    ```
    """
    from .codegen import get_target
    from .ir import load
    from .ir.structure import discover
    from .passes.infrastructure.driver import run_pipeline
    from .passes.infrastructure.pipeline import Pipeline

    graph = load(model)
    run_pipeline(graph, Pipeline.of("canonicalize"), target=get_target("portable"))
    out.print(str(discover(graph)), markup=False, highlight=False, soft_wrap=True)


def latency(
    model: Annotated[
        Path | None, typer.Argument(help="An ONNX file; leave out with --show.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the table as JSON.")] = None,
    show: Annotated[Path | None, typer.Option(help="Show a table that was written before.")] = None,
    batch: Annotated[int, typer.Option(help="Samples of a call.", min=1)] = 1,
    sequence: Annotated[int, typer.Option(help="Tokens of a sample, where there are any.", min=1)] = 128,
    multiple: Annotated[int, typer.Option(help="As in `prune`: sizes are multiples of this.", min=1)] = 8,
    deployed_with: Annotated[str, typer.Option(help="As in `prune`: passes applied before timing.")] = "fuse",
    target: Annotated[str, typer.Option("--target", "-t", help="Where it runs.")] = "onnxruntime-cpu",
) -> None:
    """Measure what every level of pruning takes on this machine, or show such a table.

    ```
    planish latency model.onnx -o table.json --batch 8 --sequence 128
    planish latency --show table.json
    planish compile model.onnx -o half.onnx --calibration inputs.npz \\
        -p "canonicalize,prune{speedup=2,batch=8,latency_table=table.json},fuse"
    ```
    """
    from .runtime.latency_table import LatencyTable

    if (model is None) == (show is None):
        raise InputError("latency: expected a model or --show, and not both")
    if output is not None and not output.parent.is_dir():  # before minutes of timing, not after
        raise ModelError(f"--output {output}: {output.parent} is not a folder", hint="make it first")
    if show is not None:
        out.print(LatencyTable.load(show))
        return
    assert model is not None
    table = _measure(model, batch, sequence, multiple, deployed_with, target)
    out.print(table)
    if output is not None:
        table.save(output)


def _measure(
    path: Path, batch: int, sequence: int, multiple: int, deployed_with: str, target_name: str
) -> LatencyTable:
    from .codegen import get_target
    from .ir import load
    from .passes.infrastructure.driver import run_pipeline
    from .passes.infrastructure.pipeline import Pipeline
    from .passes.prune import Prune

    graph, target = load(path), get_target(target_name)
    run_pipeline(graph, Pipeline.of("canonicalize"), target=target)
    # The goal does not matter for the table; the other options say what is timed.
    prune = Prune(
        speedup=(2.0,), batch=batch, sequence=sequence, multiple=multiple, deployed_with=deployed_with
    )
    with Progress(console=err, transient=True) as bars:
        return prune.table(graph, target, lambda items, text: iter(bars.track(items, description=text)))
