"""A handful of architectures from tracing to a reloaded file; `benchmarks/tracing.py` has all of them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = ("DistilBERT", "GPT-2", "T5 encoder", "CLIP", "ResNet")
MORE = ("Mistral", "Gemma 3", "SegFormer")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*NAMES, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE)]
)
def test_architecture_agrees_with_torch_at_other_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tracing = importlib.import_module("tracing")
    row = tracing.measure(importlib.import_module("architectures").by_name(name))
    assert not row.failure
    assert max(row.errors["fuse"]) <= tracing.TOLERANCE
    kept, total = row.names_kept.split("/")
    assert kept == total
    assert "batch_size" in row.dims
