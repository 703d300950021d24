"""Measuring with an injected clock: what is timed, taken off and cached, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import onnx_ir as ir
import planish
import pytest
from planish.codegen.onnxruntime_cpu.target import OnnxruntimeCpu
from planish.codegen.portable import Portable
from planish.ir.errors import InputError
from planish.ir.structure import discover
from planish.runtime import latency_bench
from planish.runtime.latency_bench import RUNTIME, interleaved
from planish.runtime.latency_table import measure_latency_table
from planish.runtime.measure import Latency

TARGET = Portable()


def residual_model(widths: tuple[int, ...] = (8, 8)) -> ir.Model:
    """x + Relu(x·U)·D, once for each width."""
    lines, previous = [], "x"
    for index in range(len(widths)):
        lines.append(
            f"h{index} = MatMul({previous}, up{index}) r{index} = Relu(h{index}) "
            f"d{index} = MatMul(r{index}, down{index}) s{index} = Add({previous}, d{index})"
        )
        previous = f"s{index}"
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
        g (float[n, 4] x) => (float[n, 4] y) {{ {" ".join(lines)} y = Neg({previous}) }}"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for index, width in enumerate(widths):
        for name, shape in ((f"up{index}", (4, width)), (f"down{index}", (width, 4))):
            array = rng.standard_normal(shape).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = planish.ir.load(proto)
    planish.ir.infer_shapes(model)
    return model


class Clock:
    """A timer by which a call takes the seconds that are given, and that writes down what it was asked.

    The quickest run is so many times quicker than the median.
    """

    def __init__(self, seconds=None, spread=1.0):
        self.asked: list[list[str]] = []
        self._seconds = seconds or {}
        self._spread = spread

    def __call__(self, runs):
        self.asked.append(list(runs))
        for run in runs.values():
            run()
        medians = {name: 1e3 * self._seconds.get(name, 1.0) for name in runs}
        return {
            name: Latency(
                median_ms=median,
                fastest_ms=median / self._spread,
                steady_ms=median,
                samples=1,
                rounds_ms=(median,),
            )
            for name, median in medians.items()
        }


def nothing(model: ir.Model) -> None:
    """No pass comes after pruning."""


def measure(model, clock, *, levels=None, target=TARGET, prepare=nothing, structure=None):
    structure = structure or discover(model)
    return measure_latency_table(
        model,
        structure,
        levels or {group.name: [8, 4, 0] for group in structure.groups if group.kind == "ffn"},
        target=target,
        feeds={"x": np.ones((3, 4), np.float32)},
        batch=3,
        sequence=1,
        deployed_with="",
        prepare=prepare,
        timer=clock,
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latency"


def ffn_names(model):
    return [group.name for group in discover(model).groups if group.kind == "ffn"]


def test_the_price_of_a_call_is_taken_off_and_a_dropped_module_is_free():
    model = residual_model()
    clock = Clock({"8": 0.010, "4": 0.006, "overhead": 0.002, "dense": 0.5})
    table = measure(model, clock)
    assert len(table.seconds) == 2
    for row in table.seconds.values():
        # Differences of two floats: one rounding of numbers of this size.
        assert row == {8: pytest.approx(0.008, abs=1e-15), 4: pytest.approx(0.004, abs=1e-15), 0: 0.0}
    assert table.total == 0.5
    assert (table.batch, table.sequence, table.runtime) == (3, 1, RUNTIME)


def test_a_call_that_is_all_overhead_does_not_go_below_zero():
    table = measure(residual_model(), Clock({"8": 0.001, "4": 0.003, "overhead": 0.002}))
    assert {row[8] for row in table.seconds.values()} == {0.0}


def test_levels_are_timed_together_and_alike_pieces_once():
    clock = Clock()
    measure(residual_model((8, 8, 8)), clock)
    assert clock.asked == [["8", "4", "overhead"], ["dense"]]


def test_pieces_of_other_sizes_are_timed_for_themselves():
    clock = Clock()
    model = residual_model((8, 12))
    first, second = ffn_names(model)
    measure(model, clock, levels={first: [8, 4], second: [12, 5]})
    assert clock.asked == [["8", "4", "overhead"], ["12", "5", "overhead"], ["dense"]]


def test_a_level_that_is_another_piece_s_level_is_timed_once():
    clock = Clock()
    model = residual_model((8, 12))
    first, second = ffn_names(model)
    measure(model, clock, levels={first: [8, 4], second: [12, 8, 4]})
    assert clock.asked == [["8", "4", "overhead"], ["12", "overhead"], ["dense"]]


def test_the_dense_level_is_always_there():
    model = residual_model()
    table = measure(model, Clock(), levels={name: [2] for name in ffn_names(model)})
    assert [list(row) for row in table.seconds.values()] == [[8, 2], [8, 2]]


def test_what_was_timed_is_read_from_the_cache():
    measure(residual_model(), Clock({"8": 0.010, "4": 0.006, "overhead": 0.002}))
    clock = Clock()
    again = measure(residual_model(), clock)
    assert clock.asked == [["dense"]]
    assert next(iter(again.seconds.values()))[4] == pytest.approx(0.004, abs=1e-15)
    more = Clock()
    model = residual_model()
    measure(model, more, levels={name: [8, 4, 3] for name in ffn_names(model)})
    assert more.asked == [["3", "overhead"], ["dense"]]


def test_another_target_or_other_passes_are_timed_anew():
    measure(residual_model(), Clock())
    other = Clock()
    measure(residual_model(), other, target=OnnxruntimeCpu(threads=1))
    assert ["8", "4", "overhead"] in other.asked

    def square(model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type == "Relu":
                node.op_type = "Sigmoid"

    changed = Clock()
    measure(residual_model(), changed, prepare=square)
    assert ["8", "4", "overhead"] in changed.asked


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seconds": 1}', '{"key": {}, "seconds": 1.0}'])
def test_damaged_cache_entries_are_measured_again(cache, content):
    measure(residual_model(), Clock())
    entries = list(cache.iterdir())
    assert len(entries) == 2
    for entry in entries:
        entry.write_text(content)
    clock = Clock()
    measure(residual_model(), clock)
    assert ["8", "4", "overhead"] in clock.asked


@pytest.mark.parametrize("seconds", ["-1.0", "NaN"])
def test_impossible_cached_times_are_measured_again(cache, seconds):
    measure(residual_model(), Clock())
    for entry in cache.iterdir():
        known = json.loads(entry.read_text())
        entry.write_text(json.dumps({**known, "seconds": float(seconds)}))
    clock = Clock()
    measure(residual_model(), clock)
    assert ["8", "4", "overhead"] in clock.asked


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path / "file"))
    assert measure(residual_model(), Clock()).total == 1.0


def test_only_so_many_weights_are_open_at_a_time(monkeypatch):
    monkeypatch.setattr(latency_bench, "_MOST_WEIGHT_BYTES", 1)
    clock = Clock()
    measure(residual_model(), clock)
    assert clock.asked == [["8", "overhead"], ["4", "overhead"], ["dense"]]


def test_the_model_is_not_changed():
    model = residual_model()
    before = planish.ir.format_model(model)
    measure(model, Clock())
    assert planish.ir.format_model(model) == before


def test_progress_is_over_distinct_pieces():
    seen = []

    def progress(items, description):
        seen.append((len(items), description))
        return iter(items)

    model = residual_model((8, 8, 12))
    structure = discover(model)
    measure_latency_table(
        model,
        structure,
        {name: [4] for name in ffn_names(model)},
        target=TARGET,
        feeds={"x": np.ones((3, 4), np.float32)},
        batch=3,
        sequence=1,
        deployed_with="",
        prepare=nothing,
        progress=progress,
        timer=Clock(),
    )
    assert seen == [(2, "time pieces of the model")]


@pytest.mark.parametrize("count", [-1, 9])
def test_impossible_levels_are_refused(count):
    model = residual_model()
    name = ffn_names(model)[0]
    with pytest.raises(InputError, match=f"{count} structures of group '{name}' cannot be kept, it has 8"):
        measure(model, Clock(), levels={name: [count]})


def test_level_zero_needs_a_module_that_goes():
    model = residual_model()
    structure = discover(model)
    name = ffn_names(model)[0]
    bare = dataclasses.replace(structure, modules=())
    with pytest.raises(InputError, match="has no residual module to itself"):
        measure(model, Clock(), levels={name: [8, 0]}, structure=bare)
    clock = Clock()
    measure(model, clock, levels={name: [8, 4]}, structure=bare)
    assert ["8", "4", "overhead"] in clock.asked


def test_unknown_groups_are_refused():
    with pytest.raises(InputError, match="no channel group is named 'mlp'"):
        measure(residual_model(), Clock(), levels={"mlp": [4]})


def test_times_of_a_busy_machine_are_used_but_not_kept():
    busy = measure(residual_model(), Clock({"8": 0.010, "overhead": 0.002}, spread=1.6))
    assert next(iter(busy.seconds.values()))[8] == pytest.approx(0.008, abs=1e-15)
    clock = Clock(spread=1.4)
    measure(residual_model(), clock)
    assert clock.asked == [["8", "4", "overhead"], ["dense"]]
    again = Clock()
    measure(residual_model(), again)
    assert again.asked == [["dense"]]


def test_every_run_is_timed_equally_often():
    calls = {"a": 0, "b": 0}

    def counted(name):
        def run():
            calls[name] += 1

        return run

    latency = interleaved({name: counted(name) for name in calls})
    assert {row.samples for row in latency.values()} == {latency_bench._MOST_REPEATS}
    assert calls["a"] == calls["b"]
