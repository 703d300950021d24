"""Searches under a budget: what is tried, what is chosen, what is said, on a model that takes moments."""

import json

import numpy as np
import planish
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.cli import app
from planish.ir.errors import BudgetError, InputError, PassError, PipelineError
from planish.runtime.provenance import ParetoPoint, Provenance
from planish.search import Budget, measuring, search
from planish.search.budget import Limits
from planish.search.front import best, dominates, front
from planish.search.settings import Setting, combinations, predicted, singles
from small_decoders import traced_llama
from typer.testing import CliRunner

W8 = "quantize{scheme=W8A16,group_size=-1}"
W4 = "quantize{scheme=W4A16,group_size=32}"
W3 = "quantize{scheme=W3A16,group_size=32}"
W2 = "quantize{scheme=W2A16,group_size=32}"


@pytest.fixture(autouse=True)
def _few_calls(monkeypatch):
    """Each burst of calls begins with a pause."""
    monkeypatch.setattr(measuring, "_REPEATS", 2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    return planish.trace(module, torch.ones(2, 64))


@pytest.fixture(scope="module")
def feeds():
    return {"input": np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)}


def point(size, latency, metric, cache=None, label=""):
    return ParetoPoint(label=label, size=size, latency_ms=latency, metric=metric, cache=cache)


class TestChoosing:
    def test_the_front_is_what_nothing_dominates(self):
        small, fast, good, bad = point(1, 5, 0.5), point(5, 1, 0.5), point(5, 5, 0.9), point(5, 5, 0.5)
        assert front([bad, good, fast, small]) == [small, fast, good]
        assert dominates(good, bad)
        assert not dominates(good, good)
        assert not dominates(small, fast)

    @settings(max_examples=200)
    @given(
        st.lists(
            st.builds(point, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
            min_size=1,
            max_size=12,
        )
    )
    def test_everything_is_in_the_front_or_dominated_by_it(self, points):
        found = front(points)
        assert found
        for each in points:
            assert each in found or any(dominates(other, each) for other in found)
        assert not any(dominates(a, b) for a in found for b in found)

    def test_where_sizes_are_limited_the_best_metric_is_meant(self):
        dense, small, tiny = point(100, 10, 1.0), point(50, 9, 0.8), point(25, 5, 0.7)
        limits = Limits(size=50, latency_ms=None, cache=None, metric=None)
        assert best([dense, small, tiny], limits, dense) is small

    def test_where_only_the_drop_is_limited_the_least_is_meant(self):
        dense, small, tiny = point(100, 10, 1.0), point(50, 9, 0.8), point(25, 5, 0.7)
        limits = Limits(size=None, latency_ms=None, cache=None, metric=0.75)
        assert best([dense, small, tiny], limits, dense) is small
        assert best([tiny], limits, dense) is None

    @pytest.mark.parametrize(
        ("name", "least"), [("size", 50), ("latency_ms", 9), ("cache", 7), ("metric", 0.8)]
    )
    def test_every_limit_excludes(self, name, least):
        numbers = dict.fromkeys(("size", "latency_ms", "cache", "metric"))
        at_limit = point(50, 9, 0.8, cache=7)
        assert Limits(**{**numbers, name: least}).allow(at_limit)
        harder = least + 0.01 if name == "metric" else least - 1
        assert not Limits(**{**numbers, name: harder}).allow(at_limit)


class TestBudgets:
    def test_shares_are_of_the_uncompressed_model(self):
        limits = Budget(size="50%", latency_ms="25%", max_drop="10%").limits(point(200, 8, 0.5))
        assert (limits.size, limits.latency_ms, limits.metric) == (100, 2, pytest.approx(0.45))
        assert Budget(size=70, max_drop=0.1).limits(point(200, 8, 0.5)).metric == pytest.approx(0.4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "expected a limit, found none — give one or more of size, latency_ms, cache, max_drop"),
            ({"size": "half"}, "size: expected a number or a share, found 'half'"),
            ({"size": 0}, "size must be positive, found 0"),
            ({"latency_ms": "-3%"}, "latency_ms must be positive"),
            ({"max_drop": -0.1}, "max_drop must not be negative"),
            ({"size": 1, "trials": 0}, "trials must be positive"),
        ],
    )
    def test_what_is_no_budget(self, options, message):
        with pytest.raises(InputError, match=message):
            Budget(**options)

    def test_a_cache_of_a_model_without_one(self, model, feeds):
        with pytest.raises(InputError, match="cache is limited, and the model has none"):
            planish.compile(model, budget=Budget(cache="50%"), example_inputs=feeds)

    def test_a_budget_and_passes(self, model):
        with pytest.raises(PipelineError, match="found several"):
            planish.compile(model, "fuse", budget=Budget(size=1))


class TestSettings:
    def test_pipelines(self):
        setting = Setting("prune{sparsity=0.5}", "kv-cache{bits=8}", W4)
        assert setting.passes == f"canonicalize,prune{{sparsity=0.5}},fuse,kv-cache{{bits=8}},{W4}"
        assert Setting().passes == "canonicalize,fuse"
        assert Setting().label == "uncompressed"
        assert setting.alone() == [
            Setting(pruning=setting.pruning),
            Setting(cache=setting.cache),
            Setting(weights=W4),
        ]

    def test_knobs_alone_and_together(self):
        knobs = (("p",), ("c", "d"), ("w",))
        assert len(singles(*knobs)) == 4
        found = list(combinations(*knobs))
        assert len(found) == len(set(found)) == 2 * 3 * 2 - 1 - 4

    def test_independent_knobs_multiply_and_losses_add(self):
        dense = point(100, 10, 1.0, cache=8)
        measured = {
            Setting(): dense,
            Setting(pruning="p"): point(80, 6, 0.9, cache=8),
            Setting(weights="w"): point(50, 5, 0.8, cache=8),
        }
        found = predicted(Setting(pruning="p", weights="w"), measured, dense)
        assert found.size == pytest.approx(40)
        assert found.latency_ms == pytest.approx(3)
        assert found.metric == pytest.approx(0.7)
        assert found.cache == 8
        assert predicted(Setting(pruning="p", cache="c"), measured, dense) is None


class TestSearches:
    def test_the_best_within_a_size(self, model, feeds):
        seen = []
        budget = Budget(
            size="40%", weights=(W8, W4, W2), on_trial=lambda point, allowed: seen.append((point, allowed))
        )
        compiled = planish.compile(model, budget=budget, example_inputs=feeds)
        (chosen,) = (point for point in compiled.front if point.chosen)
        assert W8 in chosen.passes
        assert compiled.run(feeds).keys() == {"output"} or len(compiled.run(feeds)) == 1
        by_passes = {point.passes: allowed for point, allowed in seen}
        assert by_passes == {
            "canonicalize,fuse": False,
            f"canonicalize,fuse,{W8}": True,
            f"canonicalize,fuse,{W4}": True,
            f"canonicalize,fuse,{W2}": True,
        }
        sizes = [point.size for point in compiled.front]
        assert sizes == sorted(sizes)

    def test_the_smallest_within_a_drop_of_ones_own_metric(self, model, feeds):
        def bits(compiled):
            recipe = compiled.model.metadata_props["planish.recipe"]
            return {"W8": 0.9, "W3": 0.7, "W2": 0.2}.get(recipe.partition("scheme: ")[2][:2], 1.0)

        budget = Budget(max_drop=0.3001, metric=bits, weights=(W8, W3, W2))
        compiled = planish.compile(model, budget=budget, example_inputs=feeds)
        chosen = next(point for point in compiled.front if point.chosen)
        assert chosen.metric in (0.9, 0.7)
        assert {point.metric for point in compiled.front} <= {1.0, 0.9, 0.7, 0.2}
        assert chosen.passes != f"canonicalize,fuse,{W2}"

    def test_knobs_are_combined(self, model, feeds):
        seen = []
        budget = Budget(
            size="14%",
            pruning=("prune{sparsity=0.5}",),
            weights=(W8, W4),
            on_trial=lambda point, _: seen.append(point.passes),
        )
        compiled = planish.compile(model, budget=budget, example_inputs=feeds, calibration=[feeds] * 4)
        chosen = next(point for point in compiled.front if point.chosen)
        assert chosen.passes == f"canonicalize,prune{{sparsity=0.5}},fuse,{W8}"
        # It was predicted to be smaller, but what pruning leaves is no multiple of the groups.
        assert f"canonicalize,prune{{sparsity=0.5}},fuse,{W4}" in seen

    def test_trials_are_limited(self, model, feeds):
        seen = []
        budget = Budget(
            size="99%", trials=2, weights=(W8, W4, W2), on_trial=lambda point, _: seen.append(point)
        )
        planish.compile(model, budget=budget, example_inputs=feeds)
        assert len(seen) == 1 + 2

    def test_the_file_keeps_the_front_and_its_passes_repeat_it(self, model, feeds, tmp_path):
        budget = Budget(size="40%", weights=(W8, W4))
        compiled = planish.compile(model, budget=budget, example_inputs=feeds)
        compiled.save(tmp_path / "found.onnx")
        opened = planish.load(tmp_path / "found.onnx")
        assert Provenance.read(opened.metadata_props).pareto == compiled.front
        chosen = next(point for point in compiled.front if point.chosen)
        again = planish.compile(model, chosen.passes)
        for name, array in again.run(feeds).items():
            np.testing.assert_array_equal(array, compiled.run(feeds)[name])

    def test_nothing_within_the_budget(self, model, feeds):
        message = r"none of 3 models .* nearest in what it takes is quantize.*W4A16"
        with pytest.raises(BudgetError, match=message):
            planish.compile(model, budget=Budget(size="3%", weights=(W8, W4)), example_inputs=feeds)

    def test_settings_that_fail_are_told_where_nothing_else_is_found(self, model, feeds):
        broken = "quantize{ignore=['re:.*']}"
        with pytest.raises(BudgetError, match="failed: pass 'quantize': covered nothing"):
            planish.compile(model, budget=Budget(size="3%", weights=(W8, broken)), example_inputs=feeds)
        found = planish.compile(model, budget=Budget(size="50%", weights=(broken, W8)), example_inputs=feeds)
        assert any(W8 in point.passes and point.chosen for point in found.front)

    def test_a_model_that_does_not_compile_at_all(self, feeds):
        def fail(passes):
            raise PassError("no")

        with pytest.raises(PassError, match="no"):
            search(fail, Budget(size=1), feeds=feeds, samples=[feeds], has_data=False)

    def test_a_metric_that_is_no_number(self, model, feeds):
        with pytest.raises(InputError, match="the metric of uncompressed is nan"):
            planish.compile(
                model, budget=Budget(size="50%", metric=lambda _: float("nan")), example_inputs=feeds
            )

    @pytest.mark.slow
    def test_decoders_compress_their_cache(self):
        seen = []
        budget = Budget(
            cache="60%",
            pruning=(),
            weights=(),
            caches=("kv-cache{bits=8}",),
            on_trial=lambda point, _: seen.append(point),
        )
        data = [{"input_ids": np.random.default_rng(0).integers(0, 64, (4, 24))}]
        compiled = planish.compile(traced_llama(), budget=budget, calibration=data)
        dense, small = seen
        assert small.cache < 0.6 * dense.cache
        assert next(point for point in compiled.front if point.chosen).passes == small.passes
        assert 0.9 < small.metric <= 1.0


class TestCommand:
    def test_it_writes_the_model_and_prints_the_front(self, model, feeds, tmp_path):
        path, output = tmp_path / "model.onnx", tmp_path / "small.onnx"
        planish.save(model, path)
        (tmp_path / "own.py").write_text(
            "def bits(compiled):\n"
            "    return -float('quantize' not in compiled.model.metadata_props['planish.recipe'])\n"
        )
        limits = ["--max-size", "90%", "--metric", f"{tmp_path}/own.py:bits", "--trials", "2"]
        run = CliRunner().invoke(app, ["search", str(path), "-o", str(output), *limits, "--no-cache"])
        assert run.exit_code == 0, run.output
        assert "chosen" in run.output
        properties = planish.load(output).metadata_props
        assert any(point["chosen"] for point in json.loads(properties["planish.pareto"]))
        assert "quantize" in (tmp_path / "small.recipe.yaml").read_text()

    def test_a_folder_that_is_not_there_is_said_before_the_work(self, model, tmp_path):
        path, output = tmp_path / "model.onnx", tmp_path / "absent" / "small.onnx"
        planish.save(model, path)
        run = CliRunner().invoke(app, ["search", str(path), "-o", str(output), "--max-size", "50%"])
        assert run.exit_code == 1
        assert "is not a folder" in " ".join(run.output.split())
        assert "uncompressed" not in run.output  # nothing was measured

    @pytest.mark.parametrize("text", ["nothing", "absent.py:metric"])
    def test_metrics_that_are_not_there(self, model, tmp_path, text):
        path = tmp_path / "model.onnx"
        planish.save(model, path)
        run = CliRunner().invoke(
            app, ["search", str(path), "-o", str(tmp_path / "o.onnx"), "--max-size", "50%", "--metric", text]
        )
        assert run.exit_code == 1
        assert "expected file.py:function" in " ".join(run.output.split())
        assert not (tmp_path / "o.onnx").exists()
