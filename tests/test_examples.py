"""Every example runs as it is, in a folder of its own."""

import pytest
from docs_helpers import ROOT, example

EXPECTED = {
    "compile_module": "cosine to the module: 0.99",
    "custom_pass": "node_div_1: the divisor is computed",
    "prune_encoder": "times as fast",
    "quantize_decoder": "rotated, GPTQ: relative error of the logits",
}
"""What each prints, among other things."""
SLOW = {"prune_encoder", "quantize_decoder"}


def test_every_example_is_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in EXPECTED]
)
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example(name).main()
    assert EXPECTED[name] in capsys.readouterr().out
