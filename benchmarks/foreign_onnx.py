"""Foreign ONNX: every node test of the onnx package that onnxruntime passes must still pass after planish.

Each test is one op of some opset with its inputs and expected outputs. Its model is loaded (converted to
opset 23), goes through the passes, is saved, loaded by onnxruntime and run. Three forms of each test: as it
is; with all inputs but the first as initializers, so that rewrites that need constants apply; and with all
inputs as initializers, so that constant folding computes the whole of it. Shape inference must agree with the
real outputs too. The tolerance is the test's own.

    python benchmarks/foreign_onnx.py                      # everything; writes results/foreign_onnx.md
    python benchmarks/foreign_onnx.py --match reduce       # some of it; prints only
    python benchmarks/foreign_onnx.py --stages load        # without passes; prints only
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import planish.ir
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner
from planish.ir.errors import PlanishError
from planish.ir.load import REMARKS_KEY
from planish.ir.opset import OLDEST_OPSET

FORMS = ("as it is", "operands constant", "all constant")
STAGES = ("load", "canonicalize", "fuse")
RESULTS = Path(__file__).parent / "results" / "foreign_onnx.md"
NOT_FAILURES = ("passed", "skipped", "too old")
NEWEST_IR_VERSION = 13
"""The newest file format that onnxruntime reads; the tests are written in the newest that onnx writes."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One form of one node test."""

    name: str
    form: str
    model: onnx.ModelProto
    feeds: dict[str, Any]
    expected: Sequence[Any]
    rtol: float
    atol: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case: skipped, too old, passed, wrong, wrong shape, refused, crashed or broken."""

    case: Case
    kind: str
    detail: str = ""
    converted: bool = True


def cases(match: str = "", *, every: int = 1) -> Iterator[Case]:
    """The forms of the node tests whose names contain ``match``, or of one in ``every`` so many of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tests divide by zero on purpose while they are generated
        tests = load_model_tests(kind="node")
    for test in [test for test in tests if match in test.name][::every]:
        inputs, expected = test.data_sets[0]
        feeds = dict(zip((value.name for value in test.model.graph.input), inputs, strict=False))
        for form in FORMS:
            made = _make_constant(test.model, feeds, form)
            if made is not None:
                yield Case(test.name, form, *made, expected, test.rtol, test.atol)


def _make_constant(
    model: onnx.ModelProto, feeds: dict[str, Any], form: str
) -> tuple[onnx.ModelProto, dict[str, Any]] | None:
    """The model with some inputs made initializers, and the feeds that are left; None if no form is made."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    result.ir_version = min(result.ir_version, NEWEST_IR_VERSION)
    _raise_opset(result)
    if form == "as it is":
        return result, feeds
    names = list(feeds) if form == "all constant" else list(feeds)[1:]
    if not names or not all(isinstance(feeds[name], np.ndarray) for name in names):
        return None
    kept = [value for value in model.graph.input if value.name not in names]
    del result.graph.input[:]
    result.graph.input.extend(kept)
    for name in names:
        result.graph.initializer.append(onnx.numpy_helper.from_array(feeds[name], name))
    return result, {name: value for name, value in feeds.items() if name not in names}


def _raise_opset(model: onnx.ModelProto) -> None:
    """State the oldest opset that planish reads, if the model's ops are the same in it."""
    for opset in model.opset_import:
        if opset.domain != "" or opset.version >= OLDEST_OPSET:
            continue
        versions = (opset.version, OLDEST_OPSET)
        schemas = [[onnx.defs.get_schema(n.op_type, v, "") for n in model.graph.node] for v in versions]
        if all(a.since_version == b.since_version for a, b in zip(*schemas, strict=True)):
            opset.version = OLDEST_OPSET


def run(model: Path | bytes, feeds: dict[str, Any]) -> list[Any]:
    """Run a model in onnxruntime, with onnxruntime's own graph optimisation off."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    return session.run(None, {name: value for name, value in feeds.items() if name in names})


def check(case: Case, stages: Sequence[str], folder: Path) -> Outcome:
    """Take one case through planish and back to onnxruntime."""
    try:
        _compare(case, run(case.model.SerializeToString(), case.feeds))
    except Exception as error:  # noqa: BLE001 (what onnxruntime cannot do is no test of planish)
        return Outcome(case, "skipped", _first_line(error))
    if any(opset.domain == "" and opset.version < OLDEST_OPSET for opset in case.model.opset_import):
        return Outcome(case, "too old")
    try:
        model = planish.ir.load(case.model, check_weights=False)
        shape_error = _shape_error(case, model)
        _run_passes(model, stages)
        planish.ir.save(model, folder / "model.onnx")
        converted = not model.meta.get(REMARKS_KEY)
    except PlanishError as error:
        return Outcome(case, "refused", _first_line(error))
    except Exception as error:  # noqa: BLE001 (a crash is a result here)
        return Outcome(case, "crashed", f"{type(error).__name__}: {_first_line(error)}")
    try:
        outputs = run(folder / "model.onnx", case.feeds)
    except Exception as error:  # noqa: BLE001 (onnxruntime's errors share no base)
        return Outcome(case, "broken", _first_line(error))
    try:
        _compare(case, outputs)
    except AssertionError as error:
        return Outcome(case, "wrong", _first_line(error))
    if shape_error:
        return Outcome(case, "wrong shape", shape_error)
    return Outcome(case, "passed", converted=converted)


def _run_passes(model: ir.Model, stages: Sequence[str]) -> None:
    if tuple(stages) == ("load",):
        return
    # Imported here: loading alone can be tested without the passes.
    from planish.codegen import get_target
    from planish.passes.canonicalize import Canonicalize
    from planish.passes.fuse import Fuse
    from planish.passes.infrastructure.base import PassContext

    context = PassContext(target=get_target("portable"))
    if "canonicalize" in stages:
        Canonicalize().run(model, context)
        planish.ir.verify(model)
    if "fuse" in stages:
        Fuse().run(model, context)
        planish.ir.verify(model)


def _compare(case: Case, outputs: Sequence[Any]) -> None:
    Runner.assert_similar_outputs(case.expected, outputs, rtol=case.rtol, atol=case.atol)


def _shape_error(case: Case, model: ir.Model) -> str:
    """What shape inference says wrongly about the outputs, when the model does not tell it."""
    model = planish.ir.clone(model)
    for value in model.graph.outputs:
        if not value.is_graph_input():
            value.type = value.shape = None
    planish.ir.infer_shapes(model)
    for value, array in zip(model.graph.outputs, case.expected, strict=False):
        if value.shape is None or not isinstance(array, np.ndarray):
            continue
        dims = [dim for dim in value.shape if isinstance(dim, int)]
        sizes = zip(value.shape, array.shape, strict=False)
        fixed = [size for dim, size in sizes if isinstance(dim, int)]
        if len(value.shape) != array.ndim or dims != fixed:
            return f"{value.name}: inferred {value.shape}, is {list(array.shape)}"
        if value.dtype is not None and value.dtype != ir.DataType.from_numpy(array.dtype):
            return f"{value.name}: inferred {value.dtype}, is {array.dtype}"
    return ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:200] if lines else type(error).__name__


def report(outcomes: Sequence[Outcome], seconds: float) -> str:
    """The results as Markdown."""
    kinds = ("passed", "wrong", "wrong shape", "broken", "refused", "crashed")
    lines = [
        "# Foreign ONNX",
        "",
        f"Node tests of onnx {onnx.__version__} through load, canonicalize, fuse and save to onnxruntime "
        f"{onnxruntime.__version__} (CPU). Written by `benchmarks/foreign_onnx.py` in {seconds:.0f} s.",
        "",
        "Skipped tests are those that onnxruntime itself fails; those that are too old use an op as it was "
        f"before opset {OLDEST_OPSET}. *Kept* tests passed without being converted: "
        "they use an op that opset 23 does not have. *Broken* models are refused by onnxruntime, *refused* "
        "ones by planish with an error of its own, *crashed* ones by anything else.",
        "",
        "| Form | tests | skipped | too old | " + " | ".join(kinds) + " | kept |",
        "|---" * (len(kinds) + 5) + "|",
    ]
    for form in (*FORMS, "all"):
        chosen = [outcome for outcome in outcomes if form in (outcome.case.form, "all")]
        counts = collections.Counter(outcome.kind for outcome in chosen)
        kept = sum(outcome.kind == "passed" and not outcome.converted for outcome in chosen)
        cells = [
            form,
            len(chosen),
            counts["skipped"],
            counts["too old"],
            *(counts[kind] for kind in kinds),
            kept,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    failures = [outcome for outcome in outcomes if outcome.kind not in NOT_FAILURES]
    if failures:
        lines += ["", "## Not passed", "", "| Test | Form | Kind | Detail |", "|---|---|---|---|"]
        lines += [
            f"| {o.case.name} | {o.case.form} | {o.kind} | {o.detail.replace('|', '¦')} |" for o in failures
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the tests; 1 if one that onnxruntime passes does not pass any more."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--match", default="", help="only tests whose names contain this")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [check(case, arguments.stages, Path(folder)) for case in cases(arguments.match)]
    text = report(outcomes, time.perf_counter() - start)
    print(text)
    if not arguments.match and tuple(arguments.stages) == STAGES:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text)
    return int(any(outcome.kind not in NOT_FAILURES for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
