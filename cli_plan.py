"""``planish plan``: what a compilation will do and cost, before it is begun."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from .cli_options import CalibrationOption, ModelArgument, TrainingOption, read_batches, read_recipe

if TYPE_CHECKING:
    from .planning import Plan

out = Console()
err = Console(stderr=True)


def plan(
    model: ModelArgument,
    passes: Annotated[
        str | None,
        typer.Option("--passes", "-p", help="As for `planish compile`."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", "-r", help="A recipe.yaml.")] = None,
    preset: Annotated[str | None, typer.Option(help="A recipe that comes with planish.")] = None,
    target: Annotated[str | None, typer.Option("--target", "-t", help="As for `planish compile`.")] = None,
    calibration: CalibrationOption = None,
    training: TrainingOption = None,
    samples: Annotated[
        int, typer.Option(help="How many samples of data there will be, where none are given.", min=1)
    ] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a compilation will cover, skip, bind, write, need and cost, before a weight is read.

    ```
    planish plan model.onnx --preset cpu-int8
    planish plan llama.onnx -p "canonicalize,fuse,quantize{scheme=W4A16,algorithm=gptq}" --samples 256
    ```

    A few layers with made-up weights are compiled, and the rest is extrapolated: seconds for a model that
    takes minutes, minutes for one that takes hours. Times are of this machine as busy as it is now.
    """
    from .planning import plan as make_plan

    chosen = read_recipe(passes, recipe, preset)
    found = make_plan(
        model,
        chosen.pipeline,
        target=target or chosen.target,
        calibration=read_batches(calibration),
        training=read_batches(training),
        samples=samples,
        seed=chosen.seed,
        progress=_track,
    )
    if as_json:
        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False, default=str))
    else:
        _print(found)
    if found.error:
        raise typer.Exit(1)


def _track(items: Sequence[Any]) -> Iterator[Any]:
    return iter(track(items, "rehearse", console=err, transient=True, disable=not err.is_terminal))


def _print(found: Plan) -> None:
    from .ir.printer import format_bytes

    def say(text: str) -> None:
        out.print(escape(text), highlight=False, soft_wrap=True)

    rehearsed, layers = found.layers
    say(f"Plan for {found.target}: {found.pipeline}")
    if found.error:
        err.print(f"[bold red]this will fail:[/] [red]{escape(found.error)}[/]", soft_wrap=True)
        return
    out.print(_passes_table(found))
    for planned in found.passes:
        for name, reason, count in planned.skipped:
            say(f"{planned.name} will skip {name}{f' ({count})' if count > 1 else ''}: {reason}")
    out.print(_forms_table(found))
    for kernel, count in sorted(found.kernels.items()):
        say(f"{count} × {kernel}")
    say(f"file: {format_bytes(found.file_bytes)}, from {format_bytes(found.weight_bytes)} of weights")
    peak = "" if found.peak_memory is None else f", peak memory {format_bytes(found.peak_memory)}"
    say(f"time: {_duration(found.seconds)}{peak}")
    for line in _data_lines(found):
        say(line)
    if found.better:
        say(f'better: "{found.better}", because {"; ".join(found.reasons)}')
    what = f"{rehearsed} of {layers} layers" if layers else "the whole model"
    say(f"from rehearsals of {what} with made-up weights in {_duration(found.probe_seconds)}")


def _passes_table(found: Plan) -> Table:
    from .ir.printer import format_bytes

    table = Table("pass", "will cover", box=box.SIMPLE, pad_edge=False)
    for heading in ("nodes", "weights", "time", "peak memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for planned in found.passes:
        covers = f"{planned.covered} of {planned.total} {planned.unit}" if planned.unit else ""
        peak = "" if planned.peak_memory is None else format_bytes(planned.peak_memory)
        table.add_row(
            planned.name,
            escape(covers),
            str(planned.nodes),
            format_bytes(planned.weight_bytes),
            _duration(planned.seconds),
            peak,
        )
    return table


def _forms_table(found: Plan) -> Table:
    from .ir.printer import format_bytes

    table = Table("stored as", box=box.SIMPLE, pad_edge=False)
    for heading in ("weights", "size"):
        table.add_column(heading, justify="right")
    for form, (count, size) in sorted(found.forms.items(), key=lambda item: -item[1][1]):
        table.add_row(escape(form), f"{count:,}", format_bytes(size))
    return table


def _data_lines(found: Plan) -> Iterator[str]:
    asking = {planned.name: planned.data for planned in found.passes if planned.data}
    for name, kinds in asking.items():
        yield f"{name} looks at {' and '.join(kinds)} data"
    if found.made_up:
        inputs = ", ".join(text for text in found.inputs if not text.startswith("past_key_values."))
        yield (
            f"data is needed and none was given: planned with {found.made_up} made-up samples; "
            f"give --calibration with {inputs}"
        )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
