"""The command line: ``planish compile | plan | search | inspect | structure | passes | generate | …``.

Exit codes: 0 done, 1 an error of planish or of its input (one red line on stderr), 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from . import cli_cache, cli_explain, cli_generate, cli_plan, cli_pruning, cli_search
from .cli_options import (
    CalibrationOption,
    InputsOption,
    ModelArgument,
    SizesOption,
    TrainingOption,
    check_output,
    format_shapes,
    read_batches,
    read_feeds,
    read_recipe,
    recipe_path,
)
from .ir.errors import InputError, PlanishError

if TYPE_CHECKING:
    import numpy as np

    from .passes.infrastructure.instruments import Instrument

    Feeds = Mapping[str, np.ndarray[Any, Any]]

out = Console()
err = Console(stderr=True)


class _Commands(TyperGroup):
    """Turns planish's errors, and files that cannot be written, into one red line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except (PlanishError, OSError) as error:
            if ctx.params.get("traceback"):
                raise
            err.print(f"[bold red]error:[/] [red]{escape(' '.join(str(error).split()))}[/]", soft_wrap=True)
            for note in getattr(error, "__notes__", ()):
                err.print(note, markup=False, soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        out.print(f"planish {importlib.metadata.version('planish')}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and leave.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Compile neural networks into smaller, faster ones: passes over ONNX, each of them checked.

    ```
    planish inspect model.onnx
    planish compile model.onnx -o small.onnx --passes "canonicalize,fuse,quantize{scheme=W8A8}"
    planish compare small.onnx model.onnx
    planish benchmark model.onnx small.onnx
    ```
    """
    del traceback, version  # the group reads the one, the option's callback the other


@app.command(name="compile", no_args_is_help=True)
def compile_command(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="File *.onnx, or a folder for a decoder.")],
    passes: Annotated[
        str | None,
        typer.Option(
            "--passes",
            "-p",
            help='Pipeline text: "canonicalize,fuse,quantize{scheme=W8A8}"; canonicalize,fuse if absent.',
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", "-r", help="A recipe.yaml, as every compilation writes one.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A recipe that comes with planish: `planish presets` lists them.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="onnxruntime-cpu (if no recipe says another), portable or cuda."),
    ] = None,
    check: Annotated[
        Literal["verify", "contract", "none"],
        typer.Option(help="After each pass: verify the graph, or also run it and check the pass's contract."),
    ] = "verify",
    inputs: InputsOption = None,
    size: SizesOption = None,
    calibration: CalibrationOption = None,
    training: TrainingOption = None,
    seed: Annotated[
        int | None, typer.Option(help="Seeds passes that draw random numbers; 0 if no recipe says another.")
    ] = None,
    cache: Annotated[
        bool,
        typer.Option(
            "--cache/--no-cache",
            help="Keep results of long passes: the same command goes on where it was when it is killed.",
        ),
    ] = True,
    workers: Annotated[
        str | None,
        typer.Option(
            help="Who computes layers side by side: a number of threads (one for each core if absent), "
            "`processes` or `processes:4` for processes of this machine, which GPTQ gains more by, `ray` for "
            "the processes of a Ray cluster (one is started on this machine if none runs), or "
            "`ray://host:10001`. The file that is written is the same.",
        ),
    ] = None,
    dump: Annotated[Path | None, typer.Option(help="Folder for the model after every pass.")] = None,
    print_diff: Annotated[bool, typer.Option("--print-diff", help="Print what every pass changed.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print how often every rewrite hit.")] = False,
    latency: Annotated[
        bool, typer.Option("--latency", help="Time the model before and after every pass.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
    reproducer: Annotated[
        Path | None, typer.Option(help="If a pass fails: folder for the model before it and a command.")
    ] = None,
    bisect_limit: Annotated[int | None, typer.Option(help="Run only the first N passes.", min=0)] = None,
    external_data: Annotated[
        bool, typer.Option("--external-data", help="Write the weights beside the file, whatever their size.")
    ] = False,
    fast_prefill: Annotated[
        bool,
        typer.Option(
            "--fast-prefill", help="For a decoder's folder: write kernels for prompts, too (prefill.onnx)."
        ),
    ] = False,
) -> None:
    """Compile an ONNX file: run passes over it, bind it to a target, write the result.

    ```
    planish compile model.onnx -o fused.onnx
    planish compile model.onnx -o int8.onnx -p "canonicalize,fuse,quantize{scheme=W8A8}"
    planish compile model.onnx -o int4.onnx --preset cpu-4bit
    ```

    Beside the result a recipe is written, which gives the same bytes again:

    ```
    planish compile model.onnx -o again.onnx --recipe int4.recipe.yaml
    ```

    Check every pass by running the model before and after it, and keep what is needed to reproduce a failure:

    ```
    planish compile model.onnx -o out.onnx --check contract --inputs inputs.npz --reproducer crash/
    ```

    `planish passes` lists the passes and their options, and `planish report` explains what was written.
    """
    from .cli_tables import file_bytes
    from .compiler import compile as compile_model
    from .ir.files import write_text
    from .ir.printer import format_bytes
    from .passes.infrastructure.instruments import LatencyAfterEachPass, ProgressBars, RewriteStatistics
    from .runtime.provenance import SOURCE

    chosen = read_recipe(passes, recipe, preset)
    target, seed = target or chosen.target or "onnxruntime-cpu", chosen.seed or 0 if seed is None else seed
    check_output(output)
    if fast_prefill and output.suffix == ".onnx":
        raise InputError(
            f"--fast-prefill: kernels for prompts go into a folder, found --output {output}",
            hint=f"give --output {output.with_suffix('')}",
        )
    runs_model = inputs is not None or latency or check == "contract"
    example_inputs = read_feeds(model, inputs, size) if runs_model else None
    statistics = RewriteStatistics() if stats else None
    with ProgressBars(err) as progress:
        compiled = compile_model(
            model,
            chosen.pipeline,
            example_inputs=example_inputs,
            calibration=read_batches(calibration),
            training=read_batches(training),
            target=target,
            check=check,
            seed=seed,
            cache=cache,
            workers=workers,
            instruments=[
                progress,
                *_instruments(dump, print_diff, reproducer, bisect_limit, check, example_inputs),
                *([statistics] if statistics else []),
                *([LatencyAfterEachPass((example_inputs,))] if latency and example_inputs else []),
            ],
        )
        written = compiled.save(output, external_data=external_data or None, fast_prefill=fast_prefill)
        others = [
            other.save(output.with_stem(f"{output.stem}-{label}"), external_data=external_data or None)
            for label, other in compiled.alternatives.items()
        ]
    out.print(compiled.report)
    if statistics:
        out.print(statistics)
    if report:
        text = json.dumps(compiled.report.as_dict(), indent=2, ensure_ascii=False)
        write_text(report, text + "\n")
    if bisect_limit is None:
        source = compiled.model.metadata_props[SOURCE]
        used = dataclasses.replace(chosen, target=target, seed=seed, source=source)
        write_text(recipe_path(output), used.to_yaml())
    before = file_bytes(model)
    for path in (*others, written):
        after = file_bytes(path)
        out.print(
            f"wrote {path}: {format_bytes(after)}, {after / before:.0%} of {format_bytes(before)}",
            highlight=False,
        )


@app.command(no_args_is_help=True)
def inspect(
    model: ModelArgument,
    all_layers: Annotated[bool, typer.Option("--all", help="List every layer, not the first 20.")] = False,
) -> None:
    """Show what is in an ONNX file: inputs, outputs, weights, linears, ops, and how planish made it.

    ```
    planish inspect model.onnx
    planish inspect small.onnx --all
    ```
    """
    from .cli_tables import (
        facts_table,
        history_table,
        interface_table,
        layers_table,
        linears_table,
        ops_table,
    )
    from .ir import load
    from .ir.load import REMARKS_KEY

    graph = load(model, check_weights=False)
    out.print(facts_table(graph, model))
    out.print(interface_table(graph))
    limit = None if all_layers else 20
    out.print(layers_table(graph.metadata_props, limit=limit) or linears_table(graph, limit=limit))
    out.print(ops_table(graph))
    for remark in graph.meta.get(REMARKS_KEY, ()):
        out.print(f"remark: {remark}", markup=False, highlight=False, soft_wrap=True)
    if history := history_table(graph.metadata_props):
        out.print(history)


app.command(no_args_is_help=True)(cli_generate.generate)
app.command(no_args_is_help=True)(cli_plan.plan)
app.command(no_args_is_help=True)(cli_search.search)
app.command(no_args_is_help=True)(cli_pruning.structure)
app.command(no_args_is_help=True)(cli_pruning.latency)
app.command(no_args_is_help=True)(cli_explain.report)
app.command(no_args_is_help=True)(cli_explain.diff)
app.command(no_args_is_help=True)(cli_explain.bisect)
app.add_typer(cli_cache.app, name="cache")


@app.command()
def presets() -> None:
    """List the recipes that come with planish: what each is good for, and its passes.

    ```
    planish presets
    planish compile model.onnx -o small.onnx --preset cpu-int8
    ```
    """
    from .passes.infrastructure.recipe import presets as all_presets

    for name, recipe in all_presets().items():
        out.print(f"[bold]{name}[/]  {escape(recipe.description)}", highlight=False)
        out.print(f"    {escape(str(recipe.pipeline))} → {recipe.target}\n", highlight=False)


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(help="Describe this pass.", show_default=False)] = None,
) -> None:
    """List the passes, or describe one: what it does, requires and promises, and its options.

    ```
    planish passes
    planish passes quantize
    ```

    Any pass of `onnx_ir.passes.common` can be used by its class name too.
    """
    from .cli_tables import pass_table
    from .passes.infrastructure import registry

    if name is not None:
        out.print(pass_table(registry.describe(registry.find(name))), highlight=False)
        return
    table = Table("pass", "contract", "requires", "establishes", "what it does", box=box.SIMPLE)
    for known in registry.available():
        description = registry.describe(registry.find(known))
        table.add_row(
            known,
            description.contract.value,
            ", ".join(sorted(fact.value for fact in description.requires)),
            ", ".join(sorted(fact.value for fact in description.establishes)),
            escape(description.summary),
        )
    out.print(table)


@app.command(no_args_is_help=True)
def benchmark(
    models: Annotated[list[Path], typer.Argument(help="ONNX files; ratios are to the first.")],
    inputs: InputsOption = None,
    size: SizesOption = None,
    repeats: Annotated[int, typer.Option(help="Counted runs of each file.", min=1)] = 50,
    threads: Annotated[int | None, typer.Option(help="Threads within an op; one per core if absent.")] = None,
) -> None:
    """Time ONNX files against each other as plain onnxruntime runs them, in interleaved runs.

    ```
    planish benchmark model.onnx int8.onnx --size batch_size=1 --size sequence_length=128
    planish benchmark model.onnx int8.onnx --inputs inputs.npz --repeats 200
    ```
    """
    from .cli_tables import file_bytes
    from .ir.printer import format_bytes
    from .runtime.measure import interleaved_latency
    from .runtime.model_file import ModelFile

    feeds = read_feeds(models[0], inputs, size)
    files = [ModelFile(path, threads=threads) for path in models]
    runs: dict[str, Callable[[], object]] = {}
    for index, file in enumerate(files):
        file.run(feeds)  # a file that does not take these inputs is an error before anything is timed
        runs[f"{index} {file.path}"] = lambda file=file: file.run(feeds)  # type: ignore[misc]
    latencies = interleaved_latency(runs, repeats=repeats)
    table = Table("model", box=box.SIMPLE, title=format_shapes(feeds), title_justify="left")
    for heading in ("median ms", "fastest ms", "ratio", "file"):
        table.add_column(heading, justify="right")
    first = next(iter(latencies.values()))
    for file, latency in zip(files, latencies.values(), strict=True):
        table.add_row(
            escape(str(file.path)),
            f"{latency.median_ms:.3f}",
            f"{latency.fastest_ms:.3f}",
            f"{latency.median_ms / first.median_ms:.3f}",
            format_bytes(file_bytes(file.path)),
        )
    out.print(table)


@app.command(no_args_is_help=True)
def compare(
    model: ModelArgument,
    reference: Annotated[Path, typer.Argument(help="The ONNX file to compare with.", show_default=False)],
    inputs: InputsOption = None,
    size: SizesOption = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Exit with code 1 if an output's relative error is larger.")
    ] = None,
    locate: Annotated[
        bool, typer.Option("--locate", help="Name the first tensor that both have and that differs.")
    ] = False,
) -> None:
    """Run two ONNX files on the same inputs and say how far apart their outputs are.

    ```
    planish compare int8.onnx model.onnx --inputs inputs.npz
    planish compare fused.onnx model.onnx --tolerance 1e-4 --locate
    ```

    Cosines are of the rows (last axis); relative errors are to the output's largest value; outputs with
    `logits` in their name get the KL divergence of their softmax in nats.
    """
    from .cli_tables import differences_table
    from .ir import load
    from .runtime.localize import first_difference
    from .runtime.measure import compare_outputs
    from .runtime.model_file import ModelFile

    feeds = read_feeds(reference, inputs, size)
    differences = compare_outputs(ModelFile(model).run(feeds), ModelFile(reference).run(feeds))
    out.print(differences_table(differences, format_shapes(feeds)))
    if locate:
        found = first_difference(
            load(reference), load(model), feeds, tolerance=1e-4 if tolerance is None else tolerance
        )
        out.print(f"first difference: {found or 'none'}", markup=False, highlight=False, soft_wrap=True)
    worst = max(differences, key=lambda name: differences[name].max_relative)
    if tolerance is not None and not differences[worst].max_relative <= tolerance:
        found_error = differences[worst].max_relative
        err.print(f"[red]output {worst!r}: relative error {found_error:.2g} is above {tolerance:g}[/]")
        raise typer.Exit(1)


def _instruments(
    dump: Path | None,
    print_diff: bool,
    reproducer: Path | None,
    bisect_limit: int | None,
    check: str,
    example_inputs: Feeds | None,
) -> Iterator[Instrument]:
    from .passes.infrastructure.instruments import BisectLimit, CrashReproducer, DumpAfterEachPass, PrintDiff

    if bisect_limit is not None:
        yield BisectLimit(bisect_limit, lambda line: err.print(line, markup=False, highlight=False))
    if reproducer is not None:
        examples = (example_inputs,) if example_inputs is not None else ()
        yield CrashReproducer(reproducer, check=check, examples=examples)
    if dump is not None:
        yield DumpAfterEachPass(dump)
    if print_diff:
        yield PrintDiff(lambda text: out.print(text, markup=False, highlight=False, soft_wrap=True))


def _show_one_line(kind: type[BaseException], error: BaseException, traceback: object) -> None:
    """An exception that nobody expected: still one line, and how to see the rest."""
    del traceback
    text = " ".join(str(error).split())
    err.print(
        f"[bold red]internal error:[/] [red]{kind.__name__}: {escape(text)}[/]"
        " — this is a bug in planish; `planish --traceback ...` shows where",
        soft_wrap=True,
    )


def main() -> None:
    """Entry point of the ``planish`` program."""
    if "--traceback" not in sys.argv[1:]:
        sys.excepthook = _show_one_line
    typer.main.get_command(app)(prog_name="planish")
