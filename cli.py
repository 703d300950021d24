"""The command line: ``planish compile | inspect | passes | benchmark | compare | diff | bisect``.

Exit codes: 0 done, 1 an error of planish or of its input (one red line on stderr), 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from .ir.errors import InputError, ModelError, PipelineError, PlanishError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from .passes.infrastructure.bisect import BisectResult
    from .passes.infrastructure.instruments import Instrument
    from .passes.infrastructure.pipeline import Pipeline
    from .passes.infrastructure.registry import PassDescription
    from .runtime.measure import Difference

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
SeedOption = Annotated[int, typer.Option(help="Seeds every pass that draws random numbers.")]


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
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the result.")],
    passes: PassesOption = "canonicalize,fuse",
    target: TargetOption = "onnxruntime-cpu",
    check: Annotated[
        Literal["verify", "contract", "none"],
        typer.Option(help="After each pass: verify the graph, or also run it and check the pass's contract."),
    ] = "verify",
    inputs: InputsOption = None,
    size: SizesOption = None,
    calibration: CalibrationOption = None,
    seed: SeedOption = 0,
    dump: Annotated[Path | None, typer.Option(help="Folder for the model after every pass.")] = None,
    print_diff: Annotated[bool, typer.Option("--print-diff", help="Print what every pass changed.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print how often every rewrite hit.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
    reproducer: Annotated[
        Path | None, typer.Option(help="If a pass fails: folder for the model before it and a command.")
    ] = None,
    bisect_limit: Annotated[int | None, typer.Option(help="Run only the first N passes.", min=0)] = None,
    external_data: Annotated[
        bool, typer.Option("--external-data", help="Write the weights beside the file, whatever their size.")
    ] = False,
) -> None:
    """Compile an ONNX file: run passes over it, bind it to a target, write the result.

    ```
    planish compile model.onnx -o fused.onnx
    planish compile model.onnx -o int8.onnx -p "canonicalize,fuse,quantize{scheme=W8A8}"
    planish compile model.onnx -o int4.onnx -p recipe.yaml --target portable
    ```

    Check every pass by running the model before and after it, and keep what is needed to reproduce a failure:

    ```
    planish compile model.onnx -o out.onnx --check contract --inputs inputs.npz --reproducer crash/
    ```

    `planish passes` lists the passes and their options.
    """
    from .compiler import compile as compile_model
    from .passes.infrastructure.instruments import ProgressBars, RewriteStatistics

    pipeline = _pipeline(passes)
    if not output.parent.is_dir():  # before hours of work, not after
        raise ModelError(f"--output {output}: {output.parent} is not a folder", hint="make it first")
    example_inputs = _inputs(model, inputs, size) if inputs or check == "contract" else None
    statistics = RewriteStatistics() if stats else None
    with ProgressBars(err) as progress:
        compiled = compile_model(
            model,
            pipeline,
            example_inputs=example_inputs,
            calibration=_calibration(calibration),
            target=target,
            check=check,
            seed=seed,
            instruments=[
                progress,
                *_instruments(dump, print_diff, reproducer, bisect_limit, check, example_inputs),
                *([statistics] if statistics else []),
            ],
        )
        written = compiled.save(output, external_data=external_data or None)
    out.print(compiled.report)
    if statistics:
        out.print(statistics)
    if report:
        text = json.dumps(compiled.report.as_dict(), indent=2, ensure_ascii=False)
        report.write_text(text + "\n", encoding="utf-8")
    before, after = _file_bytes(model), _file_bytes(written)
    out.print(
        f"wrote {written}: {_megabytes(after)}, {after / before:.0%} of {_megabytes(before)}", highlight=False
    )


@app.command(no_args_is_help=True)
def inspect(
    model: ModelArgument,
    all_layers: Annotated[bool, typer.Option("--all", help="List every linear, not the first 20.")] = False,
) -> None:
    """Show what is in an ONNX file: inputs, outputs, weights, linears, ops, and how planish made it.

    ```
    planish inspect model.onnx
    planish inspect small.onnx --all
    ```
    """
    from .ir import load
    from .ir.load import REMARKS_KEY

    graph = load(model, check_weights=False)
    out.print(_facts_table(graph, model))
    out.print(_interface_table(graph))
    out.print(_linears_table(graph, limit=None if all_layers else 20))
    out.print(_ops_table(graph))
    for remark in graph.meta.get(REMARKS_KEY, ()):
        out.print(f"remark: {remark}", markup=False, highlight=False, soft_wrap=True)
    if history := _history_table(graph.metadata_props):
        out.print(history)


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
    from .passes.infrastructure import registry

    if name is not None:
        _print_pass(registry.describe(registry.find(name)))
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
    from .runtime.measure import interleaved_latency
    from .runtime.model_file import ModelFile

    feeds = _inputs(models[0], inputs, size)
    files = [ModelFile(path, threads=threads) for path in models]
    runs: dict[str, Callable[[], object]] = {}
    for index, file in enumerate(files):
        file.run(feeds)  # a file that does not take these inputs is an error before anything is timed
        runs[f"{index} {file.path}"] = lambda file=file: file.run(feeds)  # type: ignore[misc]
    latencies = interleaved_latency(runs, repeats=repeats)
    table = Table("model", box=box.SIMPLE, title=_shapes(feeds), title_justify="left")
    for heading in ("median ms", "fastest ms", "ratio", "file"):
        table.add_column(heading, justify="right")
    first = next(iter(latencies.values()))
    for file, latency in zip(files, latencies.values(), strict=True):
        table.add_row(
            escape(str(file.path)),
            f"{latency.median_ms:.3f}",
            f"{latency.fastest_ms:.3f}",
            f"{latency.median_ms / first.median_ms:.3f}",
            _megabytes(_file_bytes(file.path)),
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
    from .ir import load
    from .runtime.localize import first_difference
    from .runtime.model_file import ModelFile

    feeds = _inputs(reference, inputs, size)
    differences = _differences(ModelFile(model).run(feeds), ModelFile(reference).run(feeds))
    out.print(_differences_table(differences, _shapes(feeds)))
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


@app.command(no_args_is_help=True)
def diff(
    before: Annotated[Path, typer.Argument(help="The first ONNX file.", show_default=False)],
    after: Annotated[Path, typer.Argument(help="The second ONNX file.", show_default=False)],
) -> None:
    """Show what differs between the graphs of two ONNX files: nodes, weights, inputs and outputs.

    ```
    planish compile model.onnx -o out.onnx --dump steps/
    planish diff steps/001_canonicalize.onnx steps/002_fuse.onnx
    ```
    """
    from .ir import diff_models, load

    found = diff_models(load(before, check_weights=False), load(after, check_weights=False))
    out.print(str(found) if found else "no difference", markup=False, highlight=False, soft_wrap=True)


@app.command(no_args_is_help=True)
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
) -> None:
    """Find the pass, and the rewrite in it, that breaks a model, by binary search.

    Broken means, without further options, that a pass breaks its own contract:

    ```
    planish bisect model.onnx -p "canonicalize,fuse,quantize{scheme=W8A8}" --inputs inputs.npz
    ```

    or that an output moves too far from the input model's, or that a program of yours says so:

    ```
    planish bisect model.onnx -p recipe.yaml --tolerance 0.05
    planish bisect model.onnx -p recipe.yaml --check-command "python is_good.py"
    ```
    """
    from .codegen import get_target
    from .ir import load
    from .passes.infrastructure.bisect import bisect as find_culprit

    pipeline = _pipeline(passes)
    result = find_culprit(
        load(model),
        pipeline,
        target=get_target(target),
        examples=() if check_command else (_inputs(model, inputs, size),),
        calibration=_calibration(calibration) or (),
        seed=seed,
        check=_command_check(check_command) if check_command else None,
        tolerance=tolerance,
        write=lambda line: err.print(line, markup=False, highlight=False, soft_wrap=True),
    )
    _print_culprit(result, len(pipeline))


def _pipeline(text: str) -> Pipeline:
    from .passes.infrastructure.pipeline import Pipeline

    return Pipeline.of(Path(text) if text.endswith((".yaml", ".yml")) else text)


def _inputs(model: Path, path: Path | None, sizes: Sequence[str] | None) -> Feeds:
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


def _calibration(paths: Sequence[Path] | None) -> list[Feeds] | None:
    from .runtime.model_file import read_inputs

    return [read_inputs(path) for path in paths] if paths else None


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


def _facts_table(graph: ir.Model, path: Path) -> Table:
    tensors = [
        value.const_value
        for subgraph in graph.graphs()
        for value in subgraph.initializers.values()
        if value.const_value is not None
    ]
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in graph.opset_imports.items())
    table = Table(show_header=False, box=box.SIMPLE, title=escape(str(path)), title_justify="left")
    table.add_row("file", _megabytes(_file_bytes(path)))
    table.add_row("producer", escape(f"{graph.producer_name or ''} {graph.producer_version or ''}".strip()))
    table.add_row("opset", f"{opsets} (as loaded), IR {graph.ir_version}")
    table.add_row("parameters", f"{sum(tensor.size for tensor in tensors):,}")
    table.add_row("weights", _megabytes(sum(tensor.nbytes for tensor in tensors)))
    return table


def _interface_table(graph: ir.Model) -> Table:
    from .ir.printer import format_type

    table = Table("input / output", "type", box=box.SIMPLE)
    for direction, values in (("→", graph.graph.inputs), ("←", graph.graph.outputs)):
        for value in values:
            if value.name not in graph.graph.initializers:
                table.add_row(f"{direction} {escape(value.name or '')}", escape(format_type(value)))
    return table


def _linears_table(graph: ir.Model, *, limit: int | None) -> Table:
    from .ir.views import linears

    found = linears(graph)
    shown = found[:limit]
    more = f", the first {len(shown)} of them" if len(shown) < len(found) else ""
    table = Table("linear", title=f"{len(found)} linears{more}", title_justify="left", box=box.SIMPLE)
    products = sum(node.op_type in ("MatMul", "Gemm") for node in graph.graph.all_nodes())
    others = products - sum(linear.node.op_type in ("MatMul", "Gemm") for linear in found)
    if others:
        table.caption = f"{others} more MatMul or Gemm multiply activations, or wait for `canonicalize`"
    for heading in ("in", "out", "weight", "bias"):
        table.add_column(heading, justify="right")
    for linear in shown:
        dtype = linear.weight.dtype.name if linear.weight.dtype is not None else "?"
        bias = "yes" if linear.bias is not None else ""
        table.add_row(escape(linear.name), str(linear.in_features), str(linear.out_features), dtype, bias)
    return table


def _history_table(metadata: Mapping[str, str]) -> Table | None:
    """What planish wrote into the file: its recipe, what each pass did and what that cost."""
    entries = {
        key.removeprefix("planish."): text for key, text in metadata.items() if key.startswith("planish.")
    }
    if not entries:
        return None
    table = Table(title="made by planish", title_justify="left", show_header=False, box=box.SIMPLE)
    report = _parse_report(entries.pop("report", "{}"))
    for key, text in entries.items():
        table.add_row(key, escape(text.strip()))
    for row in report.get("passes", ()):
        table.add_row(row["name"], escape(_history_line(row)))
    return table


def _parse_report(text: str) -> dict[str, Any]:
    """The report in a file; a file edited by others may hold anything, which is then left out."""
    try:
        report = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return report if isinstance(report, dict) else {}


def _history_line(row: Mapping[str, Any]) -> str:
    words = [f"{row.get('nodes_before', '?')} → {row.get('nodes_after', '?')} nodes"]
    if coverage := row.get("coverage"):
        words.append(f"{coverage['covered']} of {coverage['total']} {coverage['unit']}")
    words += [f"{name}: cosine {error['cosine_mean']:.5f}" for name, error in row.get("errors", {}).items()]
    return "; ".join(words)


def _ops_table(graph: ir.Model) -> Table:
    counts = collections.Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.graph.all_nodes()
    )
    table = Table("op", title=f"{counts.total()} nodes", title_justify="left", box=box.SIMPLE)
    table.add_column("count", justify="right")
    for op, count in counts.most_common():
        table.add_row(op, str(count))
    return table


def _print_pass(description: PassDescription) -> None:
    out.print(f"[bold]{description.name}[/]  {escape(description.summary)}")
    facts = Table(show_header=False, box=box.SIMPLE)
    facts.add_row("contract", description.contract.value)
    for heading in ("requires", "forbids", "establishes", "destroys"):
        names = sorted(fact.value for fact in getattr(description, heading))
        if names:
            facts.add_row(heading, ", ".join(names))
    out.print(facts)
    if not description.options:
        return
    table = Table("option", "accepts", "default", "", box=box.SIMPLE)
    for option in description.options:
        default = "required" if option.default is None else escape(option.default)
        table.add_row(option.name, escape(option.accepts), default, escape(option.doc))
    out.print(table)
    option = description.options[0]
    text = f'--passes "{description.name}{{{option.name}={option.default or "..."}}}"'
    out.print(f"for example: {text}", markup=False, highlight=False)


def _differences(outputs: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Difference]:
    from .runtime.measure import difference

    common = [name for name in reference if name in outputs]
    if not common:
        raise InputError(f"the models have no output in common: {list(outputs)} and {list(reference)}")
    differences = {}
    for name in common:
        found, expected = outputs[name], reference[name]
        if found.shape != expected.shape:
            raise InputError(f"output {name!r}: expected shape {expected.shape}, found {found.shape}")
        differences[name] = difference(found, expected, logits="logits" in name)
    return differences


def _differences_table(differences: Mapping[str, Difference], title: str) -> Table:
    table = Table("output", title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("cosine mean", "cosine min", "max absolute", "max relative", "KL"):
        table.add_column(heading, justify="right")
    for name, found in differences.items():
        table.add_row(
            escape(name),
            f"{found.cosine_mean:.6f}",
            f"{found.cosine_min:.6f}",
            f"{found.max_absolute:.2e}",
            f"{found.max_relative:.2e}",
            "" if found.kl_divergence is None else f"{found.kl_divergence:.2e}",
        )
    return table


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
    def say(text: str) -> None:
        out.print(text, markup=False, highlight=False, soft_wrap=True)

    if result.culprit is None:
        say(f"no pass breaks the model ({result.runs} runs)")
        return
    from .passes.infrastructure.options import format_pass

    say(f"culprit: {format_pass(result.culprit)}, pass {result.position + 1} of {total} ({result.runs} runs)")
    if result.rewrite is not None:
        say(f"rewrite: {result.rewrite.rule} at node {result.rewrite.node}")
    say(f"reason:  {result.reason}")


def _shapes(feeds: Feeds) -> str:
    return escape(", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items()))


def _file_bytes(path: Path) -> int:
    """Size of an ONNX file together with the file of external data that planish writes beside it."""
    size = path.stat().st_size
    with contextlib.suppress(FileNotFoundError):
        size += path.with_name(f"{path.name}.data").stat().st_size
    return size


def _megabytes(count: int) -> str:
    from .ir.printer import format_bytes

    return format_bytes(count)


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
