"""Tables of plans, measured by made-up timers: how they are made and kept, and what plans make of them."""

import argparse
import json
import warnings

import pytest
import torch
from cuda_simulator import Simulator, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.codegen.cuda import layers, torch_ops, tuning, validate, w4a16
from planish.codegen.cuda.hardware import GPUS
from planish.codegen.cuda.products import LIBRARY, Fallback, Plan
from planish.codegen.cuda.tuning import Case, Table, add, tuned
from planish.codegen.cuda.variants import Recorder
from planish.ir.errors import TargetError

H100, H200 = GPUS["H100"], GPUS["H200"]
N, K = 264, 1104
"""Of a small weight, whose depth may be split in two."""
CASE = Case("w4a16", 16, N, K, "torch.float16", 128)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path))
    tuned.cache_clear()
    yield tmp_path
    tuned.cache_clear()


def plan_of(m=16, n=N, k=K, table=None, gpu=H100, **options):
    options = {"group_size": 128, "dtype": torch.float16, "shifted": False, "bias": False} | options
    return w4a16.plan(m, n, k, **options, gpu=gpu, table=table or tuned(gpu.name))


def configuration_of(plan):
    if isinstance(plan, Fallback):
        return LIBRARY
    return int(dict(plan.product.kernel.constants)["TILE_M"]), plan.splits


class Preferring:
    """A timer that finds one configuration the fastest, and of the others the last."""

    def __init__(self, configuration):
        self.launcher, self.configuration, self.calls = Recorder(), configuration, 0

    def __call__(self, call):
        self.launcher.launches.clear()
        call()
        kernel, grid = self.launcher.launches[0].kernel, self.launcher.launches[0].grid
        self.calls += 1
        found = LIBRARY if kernel.name == "dequantize" else (dict(kernel.constants)["TILE_M"], grid[2])
        return 0.0 if found == self.configuration else 1 / self.calls


@pytest.mark.parametrize("preferred", [(16, 1), (32, 2), (64, 1), LIBRARY], ids=str)
def test_plans_are_those_that_were_measured_to_be_the_fastest(preferred, monkeypatch):
    """In every format, for every number of rows, with a bias and without."""
    monkeypatch.setattr(layers, "ROWS", (1, 2, 4, 8, 64, 128))
    timer = Preferring(preferred)
    validate.tune(timer.launcher, H100, timer, validate.Shapes(weights=((N, K),)), "cpu")
    for make in layers.TUNED:
        layer = make(N, K)
        for m in (1, 2, 3, 5, 8, 33, 64, 65, 100, 128):
            candidates = layer.candidates(m, H100)
            expected = preferred if preferred in candidates else list(candidates)[-1]
            found = layer.plan(m, H100, tuned("H100"))
            assert found == candidates[expected]
            assert configuration_of(layer.plan(m, H200, tuned("H200"))) == predicted(layer, m, H200)


def predicted(layer, m, gpu):
    return configuration_of(layer.plan(m, gpu, tuning.NOTHING))


@pytest.mark.parametrize("make", layers.TUNED)
def test_what_was_not_measured_is_predicted(make):
    """To take the least time of all candidates, but for the library where rows are few."""
    layer = make(N, K)
    for m in (1, 13, 100, 1000):
        seconds = {
            configuration: layer.kernel.predicted(plan, m, N, K, **layer.options, gpu=H100)
            for configuration, plan in layer.candidates(m, H100).items()
            if configuration != LIBRARY or m >= 128
        }
        assert predicted(layer, m, H100) == min(seconds, key=seconds.get)


@settings(max_examples=50, deadline=None)
@given(m=st.integers(1, 10_000))
def test_rows_of_a_table_hold_down_to_the_next_power_of_two(m):
    table = Table("H100", {Case("w4a16", 1 << i, N, K, "torch.float16", 128): (i, 1) for i in range(13)})
    fastest = table.fastest(Case("w4a16", m, N, K, "torch.float16", 128), H100)
    if m > 4096:
        assert fastest is None
    else:
        exponent = fastest[0]
        assert (1 << exponent) // 2 < m <= 1 << exponent


def other_than_predicted():
    """A configuration that a measurement has to have chosen."""
    return next(
        found for found in ((64, 2), (32, 2)) if found != configuration_of(plan_of(table=tuning.NOTHING))
    )


@pytest.mark.parametrize(
    "other",
    [{"n": N + 1}, {"k": K + 1}, {"m": 17}, {"m": 8}, {"group_size": 64}, {"dtype": torch.bfloat16},
     {"shifted": True}, {"gpu": H200}],
    ids=str,
)  # fmt: skip
def test_a_row_is_of_one_product_on_one_gpu(other):
    add("H100", {CASE: other_than_predicted()})
    table = tuned("H100")
    assert configuration_of(plan_of(table=table)) == other_than_predicted()
    assert plan_of(table=table, **other) == plan_of(table=tuning.NOTHING, **other)


def test_the_library_may_have_been_the_fastest():
    """Also of few rows, where it is not predicted."""
    assert isinstance(plan_of(), Plan)
    add("H100", {CASE: LIBRARY})
    plan, recorder = plan_of(), Recorder()
    assert isinstance(plan, Fallback)
    packed = w4a16.pack(torch.zeros(K, N, dtype=torch.uint8), torch.ones(9, N).half(), None, 128)
    w4a16.run(plan, recorder, torch.ones(16, K).half(), packed, None)
    assert [launch.kernel.name for launch in recorder.launches] == ["dequantize"]


def test_a_configuration_that_is_no_candidate_is_passed_over():
    """For it was measured in another shape, or with other kernels."""
    add("H100", {CASE: (48, 2)})
    assert plan_of() == plan_of(table=tuning.NOTHING)


def test_rows_are_added_to_those_that_are_there(cache):
    more = Case("w8a8", 4, N, K, "torch.bfloat16", 0, bits=8)
    path = add("H100", {CASE: (16, 2), more: (32, 1)})
    add("H100", {CASE: LIBRARY})
    add("H200", {CASE: (64, 1)})
    assert tuned("H100").rows == {CASE: LIBRARY, more: (32, 1)}
    assert tuned("H200").rows == {CASE: (64, 1)}
    assert path == cache / "tuning" / "h100.json"
    assert sorted(file.name for file in path.parent.iterdir()) == ["h100.json", "h200.json"]


def changed(**changes):
    return lambda content: json.dumps(json.loads(content) | changes)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:-9],
        lambda content: "[]",
        changed(planish_tuning_table=0),
        changed(gpu="H200"),
        changed(rows=[{"case": {"kernel": "w4a16"}, "fastest": [16, 2]}]),
        changed(rows=[{"fastest": [16, 2]}]),
        changed(rows=7),
        lambda content: content.replace('"fastest": [', '"fastest": [1,'),
    ],
    ids=["cut off", "a list", "format", "GPU", "a field", "no case", "no rows", "three numbers"],
)
def test_a_file_that_is_no_table_is_warned_of_once(spoil):
    path = add("H100", {CASE: other_than_predicted()})
    path.write_text(spoil(path.read_text()))
    tuned.cache_clear()
    with pytest.warns(
        UserWarning, match=r"plans are predicted, because .*h100\.json is no tuning table"
    ) as caught:
        assert plan_of() == plan_of(table=tuning.NOTHING)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_of(m=3)
    with pytest.warns(UserWarning, match="--tune"):
        add("H100", {CASE: other_than_predicted()})
    assert configuration_of(plan_of()) == other_than_predicted()


def test_a_table_of_another_gpu_is_not_taken_for_this_ones():
    path = add("H100", {CASE: other_than_predicted()})
    path.rename(path.with_name("h200.json"))
    with pytest.warns(UserWarning, match="no tuning table of this version"):
        assert not tuned("H200").rows


def test_a_folder_that_cannot_be_written(cache):
    (cache / "tuning").write_text("a file")
    with (
        pytest.raises(TargetError, match=r"h100\.json cannot be written: "),
        pytest.warns(UserWarning, match="no tuning table"),
    ):
        add("H100", {CASE: (16, 2)})


class RecordedGpu(Recorder):
    """A launcher that says what GPU it is."""

    gpu = H100


def test_the_ops_of_torch_use_what_was_tuned_in_the_same_process(monkeypatch):
    recorder = RecordedGpu()
    monkeypatch.setattr(torch_ops, "_launcher_of", lambda _tensor: recorder)
    packed = w4a16.pack(torch.zeros(K, N, dtype=torch.uint8), torch.ones(9, N).half(), None, 128)

    def launched():
        recorder.launches.clear()
        operands = (packed.weights, packed.scales, None, None, K, N, 128)
        found = torch.ops.planish.w4a16(torch.ones(2, 8, K).half(), *operands)
        assert found.shape == (2, 8, N)
        return recorder.launches[0]

    before = launched()
    assert launched() == before == plan_of(table=tuning.NOTHING).product
    add("H100", {CASE: other_than_predicted()})
    assert launched() == plan_of().product != before


def test_validation_says_which_plans_were_measured():
    add("H100", {CASE: (16, 2)})
    shapes = validate.Shapes(weights=((N, K),), m=(9, 100), row=(64, 2), tokens=())

    def timer(call):
        call()
        return 1.0

    found = list(validate.timings(Recorder(), H100, timer, shapes, tuned("H100"), "cpu"))
    plans = [(one.kernel, one.case.split()[0], one.plan) for one in found if one.plan]
    assert plans[0] == ("w4a16", "9", "measured")
    assert plans[1:] == [("w4a16", "100", "predicted")] + [
        (kernel, m, "predicted") for kernel in ("sparse_w4a16", "w8a8") for m in ("9", "100")
    ]
    lines = validate.times(iter(found))
    assert len({line.count("|") for line in lines}) == 1
    assert "| measured |" in lines[2]


def test_shapes_of_the_command_line():
    assert validate._weights("8192x8192,28672x4096") == ((8192, 8192), (28672, 4096))
    for text in ("8192", "8192x", "0x5", "8x8,", "8x8x8", "axb"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected columns x rows"):
            validate._weights(text)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "make",
    [
        layers.TIMED[0],
        *(pytest.param(make, marks=pytest.mark.exhaustive) for make in (*layers.TIMED[1:], layers.TUNED[5])),
    ],
)
def test_every_candidate_gives_the_product(make):
    """For any of them may be measured to be the fastest."""
    layer = make(N, K)
    operands = layer.operands(70)
    expected = layer.kernel.reference(*operands)
    for plan in layer.candidates(70, H100).values():
        found = layer.run(plan, Simulator(order="shuffled"), operands)
        # Sums in another order, rounded to 11 bits.
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)
