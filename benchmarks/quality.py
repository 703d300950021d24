"""What quantisation costs in quality: a trained language model and a sentence-embedding model, side by side.

Perplexity is that of the ops' meaning: the graph with the ``planish`` functions' own bodies, not of a kernel
that also rounds activations. The model is traced once; every pipeline starts from that graph.

    python benchmarks/quality.py                  # everything; writes benchmarks/results/quality.md
    python benchmarks/quality.py --only W4A4      # rows whose name contains a text; prints them

Rows are kept in ``--output`` as they are measured; ``--resume`` goes on after an interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import planish
import quality_rows as rows
import sentence_model
import tokenizers
import wikilm
from planish.codegen.target import BoundModel
from planish.ir import ops
from planish.ir.errors import PlanishError
from planish.runtime.session import Session
from quality_rows import MODEL, TWIN, Row
from rich.console import Console
from sentence_embeddings import processor

Array = np.ndarray[Any, Any]
_MEANING = {"session.disable_quant_qdq": "1"}
"""onnxruntime would else merge DequantizeLinear and MatMul into a kernel that rounds activations to int8."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What one row gave.

    Attributes:
        perplexity: NaN where it could not be measured.
        bits: per quantised weight: integers, scales, zero points and side matrices as stored.
        half_bits: the same if the model's floats were 16 bits wide, as they are in most published figures.
        seconds: of the compilation.
        failure: why there is no figure.
    """

    perplexity: float = math.nan
    bits: float = math.nan
    half_bits: float = math.nan
    seconds: float = math.nan
    failure: str = ""


def bits_per_weight(model: ir.Model, float_bits: int | None = None) -> float:
    """Bits that the quantised linears hold, over the number of their weights.

    Args:
        model: with ``planish`` linears; low-rank residuals beside them are counted too.
        float_bits: count floats as so wide; None counts them as they are.
    """
    total = weights = 0
    names = set()
    for node in model.graph:
        if node.op_type not in ops.LINEAR_OPS:
            continue
        weight, bias = ops.operand(node, "W"), ops.operand(node, "bias")
        assert weight is not None
        assert weight.const_value is not None
        weights += weight.const_value.size
        names.add(str(weight.name).removesuffix(".weight_quantized"))
        # Bilevel zero points are as wide as their own container.
        bilevel = ops.operand(node, "scale_scale") is not None
        narrow = (weight,) if bilevel else (weight, ops.operand(node, "zero_point"))
        for value in node.inputs[1:]:
            if value is None or value is bias or value.const_value is None:
                continue
            own = node.attributes.get_int("bits", None) if value in narrow else None
            total += value.const_value.size * _width(value, own, float_bits)
    for name, value in model.graph.initializers.items():
        if name.split(".low_rank_")[0] in names and ".low_rank_" in name and value.const_value is not None:
            total += value.const_value.size * _width(value, None, float_bits)
    return total / weights if weights else math.nan


def _width(value: ir.Value, own: int | None, float_bits: int | None) -> int:
    """Bits of one element: 3-bit integers count 3, though their container is wider."""
    assert value.dtype is not None
    if own is not None:
        return own
    return float_bits if float_bits and value.dtype.is_floating_point() else value.dtype.bitwidth


class Decoder:
    """The trained model and its twin, traced and canonical; pipelines run on them."""

    def __init__(self, found: wikilm.WikiLM, *, calibration: int, windows: int, console: Console) -> None:
        self._found, self._console = found, console
        self._windows = found.evaluation_windows(windows)
        self._calibration = [{"input_ids": ids[None]} for ids in found.calibration_windows(calibration)]
        self._graphs: dict[str, ir.Model] = {}
        self._config = found.load().config

    def _graph(self, subject: str) -> ir.Model:
        if subject not in self._graphs:
            module = self._found.load()
            if subject == TWIN:
                wikilm.make_outlier_twin(module)
            self._console.print(f"[dim]tracing the {subject}[/dim]")
            self._graphs[subject] = planish.compile(module, "canonicalize", target="portable").model
        return self._graphs[subject]

    def dense(self, subject: str) -> float:
        """Perplexity of the float model."""
        return self._perplexity(self._graph(subject))

    def measure(self, row: Row) -> Measured:
        """Run a pipeline and judge what comes out; a refusal by the compiler is the row's outcome."""
        start = time.perf_counter()
        try:
            compiled = planish.compile(
                self._graph(row.subject),
                f"canonicalize,{row.passes}",
                calibration=self._calibration,
                target="portable",
                seed=row.seed,
            )
        except PlanishError as error:
            return Measured(failure=error.message)
        seconds = time.perf_counter() - start
        return Measured(
            perplexity=self._perplexity(compiled.model),
            bits=bits_per_weight(compiled.model),
            half_bits=bits_per_weight(compiled.model, float_bits=16),
            seconds=seconds,
        )

    def _perplexity(self, graph: ir.Model) -> float:
        run = meaning(graph)
        return wikilm.perplexity(wikilm.graph_logits(run, self._config), self._windows)


def meaning(graph: ir.Model) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    """How to run a graph by its ops' bodies."""
    return Session(BoundModel(model=graph, session_options=_MEANING)).run


def decoder_results(
    decoder: Decoder, chosen: Sequence[Row], known: dict[str, Measured], keep: Callable[[], None]
) -> Iterator[tuple[Row, Measured]]:
    """Every row's figures; what is known already is not measured again."""
    for row in chosen:
        if row.key not in known:
            known[row.key] = decoder.measure(row)
            keep()
        yield row, known[row.key]


def sentence_results(found: wikilm.WikiLM, console: Console) -> dict[str, sentence_model.Quality]:
    """The sentence-embedding model: calibrated on encyclopaedia sentences, judged on all of the demo's."""
    module = sentence_model.load_module()
    reference = sentence_model.reference_embeddings(module)
    calibration = sentence_calibration(found)
    results = {}
    for name, passes in rows.SENTENCE_PIPELINES.items():
        compiled = planish.compile(
            module,
            passes,
            example_inputs=sentence_model.example(),
            calibration=calibration,
            target="portable",
        )
        run = meaning(compiled.model)
        output = compiled.output_names[0]
        results[name] = sentence_model.judge(
            lambda feeds, run=run, output=output: run(feeds)[output], reference
        )
        console.print(f"sentences: {name}: cosine {results[name].cosine_mean:.4f}")
    return results


def sentence_calibration(found: wikilm.WikiLM, batches: int = 32, batch: int = 16) -> list[dict[str, Array]]:
    """Sentences of the calibration text, none of which is among those that are judged, padded in batches."""
    return tokenised(calibration_sentences(found), batches, batch)


def calibration_sentences(found: wikilm.WikiLM) -> list[str]:
    """The calibration text in sentences, as it stands there: signs apart from words, rare words missing."""
    text = (found.data / "calibration.txt").read_text(encoding="utf-8")
    return [part.strip() for line in text.splitlines() for part in line.split(" . ")]


def tokenised(sentences: Sequence[str], batches: int, batch: int) -> list[dict[str, Array]]:
    """Inputs of the sentence model: sentences of middling length, evenly over all, padded in batches."""
    sentences = [sentence for sentence in sentences if 40 < len(sentence) < 400]
    step = max(1, len(sentences) // (batches * batch))
    chosen = sentences[::step][: batches * batch]
    tokenizer = tokenizers.Tokenizer.from_file(str(sentence_model.model_folder() / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(128)
    encoded = [
        tokenizer.encode_batch(chosen[start : start + batch]) for start in range(0, len(chosen), batch)
    ]
    return [
        {
            "input_ids": np.array([item.ids for item in items], np.int64),
            "attention_mask": np.array([item.attention_mask for item in items], np.int64),
        }
        for items in encoded
    ]


@dataclasses.dataclass(frozen=True)
class Goal:
    """Something asked for: what was measured and what is asked, and whether that holds."""

    text: str
    measured: str
    met: bool


def goals(
    dense: float, known: Mapping[str, Measured], sentences: Mapping[str, sentence_model.Quality]
) -> list[Goal]:
    """The goals, judged by the figures of this run; a row that failed fails its goals."""

    def perplexity(scheme: str, method: str, subject: str = MODEL) -> float:
        return known[f"{subject}: {scheme}: {method}"].perplexity

    def over(value: float, base: float, limit: float, text: str) -> Goal:
        return Goal(text, f"{value / base - 1:+.2%}", value <= (1 + limit) * base)

    found = []
    w4 = perplexity("W4A16 g32", rows.GPTQ)
    found.append(over(w4, dense, 0.004, "W4A16 g32: GPTQ within 0.4 % of dense"))
    for scheme in ("W3A16 per channel", "W2A16 per channel"):
        rtn, gptq = perplexity(scheme, rows.RTN), perplexity(scheme, rows.GPTQ)
        share = (rtn - gptq) / (rtn - dense)
        found.append(Goal(f"{scheme}: GPTQ closes at least 50 % of RTN's gap", f"{share:.0%}", share >= 0.5))
    for method in (rows.GPTQ, rows.GPTAQ):
        w2 = perplexity("W2A16 g32", method)
        found.append(over(w2, dense, 0.06, f"W2A16 g32: {method} within 6 % of dense"))
    found.append(_side_matrix_goal(dense, known))
    plain = perplexity("W4A4", rows.GPTQ)
    rotated = perplexity("W4A4", rows.ROTATED_GPTQ, TWIN)
    found.append(over(rotated, plain, 0.03, "twin, W4A4: rotate + GPTQ within 3 % of the model's own GPTQ"))
    found.append(over(rotated, dense, 0.08, "twin, W4A4: rotate + GPTQ within 8 % of dense"))
    found.append(over(plain, dense, 0.08, "model, W4A4: GPTQ within 8 % of dense"))
    for subject in (MODEL, TWIN):
        values = [
            perplexity("W4A4", method, subject)
            for method in (rows.LEARNED_GPTQ, rows.ROTATED_GPTQ, rows.GPTQ)
        ]
        text = f"{subject}, W4A4 with GPTQ: learned ≤ random Hadamard ≤ no rotation"
        measured = " ≤ ".join(f"{value:.2f}" for value in values)
        found.append(Goal(text, measured, values[0] <= values[1] <= values[2]))
    for name, least in ((rows.W4_GPTQ, 0.99), (rows.W8_TENSOR, 0.995), (rows.W8_GOAL, 0.995)):
        mean = sentences[name].cosine_mean
        found.append(Goal(f"sentences, {name}: mean cosine at least {least}", f"{mean:.4f}", mean >= least))
    return found


def _side_matrix_goal(dense: float, known: Mapping[str, Measured]) -> Goal:
    fitting = {
        row.method: known[row.key]
        for row in rows.side_matrix_rows()
        if known[row.key].half_bits <= 2.5 and not known[row.key].failure
    }
    text = "best of SpQR and EoRA at 2.5 bits or fewer (16-bit floats) within 4 % of dense"
    if not fitting:
        return Goal(text, "no row has so few bits", met=False)
    name, best = min(fitting.items(), key=lambda item: item[1].perplexity)
    measured = f"{best.perplexity / dense - 1:+.2%} at {best.half_bits:.2f} bits ({name})"
    return Goal(text, measured, best.perplexity <= 1.04 * dense)


def section_lines(chosen: Sequence[Row], known: Mapping[str, Measured], dense: float) -> list[str]:
    """One table for each section, subjects apart."""
    lines: list[str] = []
    heading = "| scheme | method | perplexity | over dense | of RTN's gap | bits | with 16-bit floats | s |"
    for section, subject in dict.fromkeys((row.section, row.subject) for row in chosen):
        title = f"{section}: {subject}" if subject == TWIN else section
        lines += ["", f"## {title}", "", heading, "|---" * 8 + "|"]
        for row in chosen:
            if (row.section, row.subject) == (section, subject):
                lines.append(_line(row, known, dense))
    return lines


def _line(row: Row, known: Mapping[str, Measured], dense: float) -> str:
    measured = known[row.key]
    if measured.failure:
        return f"| {row.scheme} | {row.method} | {measured.failure} | | | | | |"
    rtn = known.get(row.rtn_key)
    gap = ""
    if rtn is not None and rtn.perplexity > dense and row.method != rows.RTN:
        gap = f"{(rtn.perplexity - measured.perplexity) / (rtn.perplexity - dense):.0%}"
    cells = [
        f"{measured.perplexity:.2f}",
        f"{measured.perplexity / dense - 1:+.2%}",
        gap,
        f"{measured.bits:.2f}",
        f"{measured.half_bits:.2f}",
        f"{measured.seconds:.0f}",
    ]
    return f"| {row.scheme} | {row.method} | " + " | ".join(cells) + " |"


def write_markdown(
    path: Path,
    dense: Mapping[str, float],
    known: Mapping[str, Measured],
    sentences: Mapping[str, sentence_model.Quality],
    arguments: argparse.Namespace,
) -> None:
    """The tables as the repository keeps them."""
    lines = [
        "# Quality of quantised models",
        "",
        f"{processor()}. A Llama of 6.5 M parameters trained on English text; perplexity per token, context "
        f"{wikilm.CONTEXT}, {arguments.windows} windows; calibration on {arguments.calibration} windows. All "
        "linears but the head are quantised; embeddings stay. RTN is min-max. *Of RTN's gap*: the share of "
        "RTN's distance to the dense model that a method closes. *Bits* per quantised weight: integers, "
        "scales, zero points and side matrices, floats as stored (32 bits in this float32 model), and as 16 "
        "bits. A learned row that equals its random one is the random start: learning did not lower the loss "
        f"on data kept from it. Dense: {dense[MODEL]:.3f}; outlier twin (same function): {dense[TWIN]:.3f}.",
        "",
        "| goal | measured | met |",
        "|---|---|---|",
        *(
            f"| {goal.text} | {goal.measured} | {'yes' if goal.met else 'no'} |"
            for goal in goals(dense[MODEL], known, sentences)
        ),
        *section_lines(rows.DECODER_ROWS, known, dense[MODEL]),
        "",
        "## Sentence embeddings: all-MiniLM-L6-v2",
        "",
        "Calibrated on 512 sentences of the calibration text, judged on the demo's 240.",
        "",
        "| scheme | cosine mean | cosine min | nearest |",
        "|---|---|---|---|",
        *(
            f"| {name} | {quality.cosine_mean:.4f} | {quality.cosine_min:.4f} "
            f"| {quality.nearest_agreement:.1%} |"
            for name, quality in sentences.items()
        ),
        "",
        "Written by `benchmarks/quality.py`.",
        "",
    ]
    path.write_text("\n".join(lines))


def main() -> None:
    """Measure the rows and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    wikilm.add_arguments(parser)
    parser.add_argument("--calibration", type=int, default=64, help="calibration windows")
    parser.add_argument("--only", help="rows whose name contains this; prints, writes no table")
    parser.add_argument("--sentences", action="store_true", help="only the sentence model; prints")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an interrupted run")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where rows are kept")
    arguments = parser.parse_args()
    console = Console(width=120)
    found = wikilm.WikiLM.find(arguments.shared)
    if arguments.sentences:
        sentence_results(found, console)
        return
    kept = arguments.output / "quality.json"
    arguments.output.mkdir(parents=True, exist_ok=True)
    known: dict[str, Measured] = {}
    if arguments.resume and kept.exists():
        known = {key: Measured(**values) for key, values in json.loads(kept.read_text()).items()}
    decoder = Decoder(found, calibration=arguments.calibration, windows=arguments.windows, console=console)
    chosen = [row for row in rows.DECODER_ROWS if not arguments.only or arguments.only in row.key]
    dense = {subject: decoder.dense(subject) for subject in dict.fromkeys(row.subject for row in chosen)}
    console.print(f"dense: {dense}")

    def keep() -> None:
        kept.write_text(json.dumps({key: dataclasses.asdict(row) for key, row in known.items()}, indent=1))

    for number, (row, measured) in enumerate(decoder_results(decoder, chosen, known, keep), 1):
        said = measured.failure or f"{measured.perplexity:.2f} at {measured.bits:.2f} bits"
        console.print(f"{number}/{len(chosen)} {row.key}: {said}", highlight=False)
    if not arguments.only:
        path = Path(__file__).parent / "results" / "quality.md"
        write_markdown(path, dense, known, sentence_results(found, console), arguments)


if __name__ == "__main__":
    main()
