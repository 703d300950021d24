"""What the presets do to two real models: one of sentence embeddings, and a small decoder with a cache.

Sizes are of the written files; times are ratios to the preset ``lossless`` in the same run, in turns; the
sentence model's numbers are compared with the module in float32, the language model's by its perplexity.
The preset ``gpu-4bit`` runs on the references of its kernels, which take no measurable time: its rows have
none.

    python benchmarks/presets.py --shared ../shared        # writes results/presets.md
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import planish
import sentence_model
import wikilm
from planish.codegen.target import Target
from planish.passes.infrastructure.recipe import presets
from planish.runtime.measure import Latency, interleaved_latency

Array = np.ndarray[Any, Any]

_RESULTS = Path(__file__).parent / "results" / "presets.md"
_WINDOWS = 12
_REPEATS = 24
_REFERENCES = "cuda"


def target_of(name: str) -> Target:
    """Of a preset; the references where there is no GPU to run it."""
    target = presets()[name].target or ""
    return planish.get_target(target, device="cpu") if target == _REFERENCES else planish.get_target(target)


def sentence_rows(folder: Path) -> list[list[str]]:
    """Size, time and error of the sentence model under each preset."""
    module = sentence_model.load_module()
    reference = sentence_model.reference_embeddings(module)
    example = sentence_model.example()
    rows, runs = {}, {}
    for name in presets():
        compiled = planish.compile(module, preset=name, target=target_of(name), example_inputs=example)
        quality = sentence_model.judge(functools.partial(_embed, compiled), reference)
        rows[name] = [_size(compiled, folder / f"{name}.onnx"), f"{quality.cosine_mean:.4f}"]
        if compiled.target.name != _REFERENCES:
            runs[name] = functools.partial(compiled.run, sentence_model.random_feeds(1, 128))
    return _with_times(rows, runs)


def _embed(compiled: planish.CompiledModel, feeds: Mapping[str, Array]) -> Array:
    return np.asarray(next(iter(compiled.run(feeds).values())), np.float32)


def language_rows(found: wikilm.WikiLM, folder: Path) -> list[list[str]]:
    """Size, time and perplexity of the language model under each preset."""
    windows = found.evaluation_windows(_WINDOWS)
    module = found.load()
    rows, runs = {}, {}
    for name in presets():
        compiled = planish.compile(module, preset=name, target=target_of(name))
        perplexity = wikilm.perplexity(wikilm.graph_logits(compiled.run, module.config), windows)
        rows[name] = [_size(compiled, folder / f"lm-{name}.onnx"), f"{perplexity:.2f}"]
        if compiled.target.name != _REFERENCES:
            runs[name] = functools.partial(compiled.generate, windows[:1, :128], 32)
    return _with_times(rows, runs)


def _size(compiled: planish.CompiledModel, path: Path) -> str:
    compiled.save(path)
    return f"{path.stat().st_size / 1e6:.1f}"


def _with_times(rows: Mapping[str, list[str]], runs: Mapping[str, Callable[[], object]]) -> list[list[str]]:
    latencies: Mapping[str, Latency] = interleaved_latency(runs, repeats=_REPEATS)
    dense = latencies["lossless"]
    table = []
    for name, facts in rows.items():
        times = ["–", "–"]
        if name in latencies:
            times = [f"{latencies[name].median_ms:.1f}", f"{latencies[name].speedup_over(dense):.2f}"]
        table.append([f"`{name}`", *facts, *times])
    return table


def _lines(headings: list[str], rows: list[list[str]]) -> list[str]:
    ruler = "|" + "---|" * len(headings)
    return [f"| {' | '.join(headings)} |", ruler, *(f"| {' | '.join(row)} |" for row in rows)]


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    wikilm.add_arguments(parser)
    found = wikilm.WikiLM.find(parser.parse_args().shared)
    with tempfile.TemporaryDirectory() as folder:
        sentences = sentence_rows(Path(folder))
        language = language_rows(found, Path(folder))
    lines = [
        "# Presets",
        "",
        "`python benchmarks/presets.py`; 2 cores. Times are medians of calls in turns; × is to `lossless`.",
        "",
        "Sentence embeddings (MiniLM, 22.7 M parameters, 90.9 MB): one text of 128 tokens.",
        "",
        *_lines(["preset", "MB", "cosine to float32", "ms", "×"], sentences),
        "",
        f"Language model (Llama, 6.5 M parameters): perplexity of {_WINDOWS} windows; 32 tokens behind 128.",
        "",
        *_lines(["preset", "MB", "perplexity", "ms", "×"], language),
        "",
    ]
    _RESULTS.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
