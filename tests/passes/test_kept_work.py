"""Long work of allocate, scale and learned rotations is kept: a second run computes nothing again.

Each case counts the calls of what takes long, and says how the call may change so that all of it is computed
again.
"""

import dataclasses
import itertools

import numpy as np
import onnx_ir as ir
import planish
import pytest
from planish.ir import clone
from planish.passes.allocate import losses
from planish.passes.rotate import learned, learning_memory
from planish.passes.scale import awq, smoothquant
from small_decoders import VOCABULARY, traced_llama

IDS = np.random.default_rng(0).integers(1, VOCABULARY, (4, 16))


@dataclasses.dataclass(frozen=True)
class Case:
    passes: str
    holder: object
    function: str
    option: tuple[str, str]


CASES = {
    "allocate": Case(
        "canonicalize,allocate{candidates=[W2A16,W4A16],group_size=16,bits_per_weight=4,samples=2}",
        losses,
        "trial_loss",
        ("samples=2", "samples=3"),
    ),
    "awq": Case(
        "canonicalize,fuse,scale{method=awq,group_size=16,candidates=4}",
        awq.AWQWatcher,
        "choose",
        ("candidates=4", "candidates=5"),
    ),
    "smoothquant": Case(
        "canonicalize,fuse,scale{alpha=0.5}",
        smoothquant.SmoothQuantWatcher,
        "choose",
        ("alpha=0.5", "alpha=0.6"),
    ),
    "rotate": Case(
        "canonicalize,fold-norms,rotate{rotations=[R1,R2,R4],kind=learned,steps=3,sequences=2}",
        learned._Loss,
        "add_gradients",
        ("steps=3", "steps=4"),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def calls(case, monkeypatch):
    """Grows with each call of what takes long."""
    made = []
    real = getattr(case.holder, case.function)

    def counted(*given, **options):
        made.append(1)
        return real(*given, **options)

    monkeypatch.setattr(case.holder, case.function, counted)
    return made


def compiled(passes, folder, *, model=None, ids=IDS, seed=0, cache=True):
    found = planish.compile(
        clone(traced_llama()) if model is None else model,
        passes,
        calibration=[{"input_ids": row[None]} for row in ids],
        target="portable",
        seed=seed,
        cache=folder / "cache" if cache else False,
    )
    found.save(folder / "out.onnx")
    return (folder / "out.onnx").read_bytes()


def other_weight(name="model.layers.0.mlp.down_proj.weight"):
    model = clone(traced_llama())
    value = next(value for value in model.graph.initializers.values() if value.name == name)
    array = value.const_value.numpy().copy()
    array[0, 0] += 0.5
    value.const_value = ir.tensor(array, name=value.name)
    return model


def test_a_second_run_computes_nothing_and_gives_the_same_bytes(case, calls, tmp_path):
    without = compiled(case.passes, tmp_path, cache=False)
    count = len(calls)
    assert count > 0
    first = compiled(case.passes, tmp_path)
    assert len(calls) == 2 * count
    assert compiled(case.passes, tmp_path) == first == without
    assert len(calls) == 2 * count


def test_what_decides_it_is_computed_again_when_it_changes(case, calls, tmp_path):
    first = compiled(case.passes, tmp_path)
    count = len(calls)
    changes = {
        "option": {"passes": case.passes.replace(*case.option)},
        "weight": {"model": other_weight()},
        "data": {"ids": IDS[::-1]},
        "seed": {"seed": 1},
    }
    for change in changes.values():
        before = len(calls)
        compiled(**{"passes": case.passes, "folder": tmp_path} | change)
        assert len(calls) >= before + count
    before = len(calls)
    assert compiled(case.passes, tmp_path) == first
    assert len(calls) == before


def test_damaged_results_are_computed_again(case, calls, tmp_path):
    first = compiled(case.passes, tmp_path)
    count = len(calls)
    files = sorted((tmp_path / "cache").rglob("*.result"))
    assert files
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert compiled(case.passes, tmp_path) == first
    assert len(calls) == 2 * count


def test_a_part_that_is_missing_is_all_that_is_computed(case, calls, tmp_path):
    """As after a run that was killed: each single result in turn, and all but one."""
    first = compiled(case.passes, tmp_path)
    count = len(calls)
    files = sorted((tmp_path / "cache").rglob("*.result"))
    for missing in (files[:1], files[len(files) // 2 :], files[-1:]):
        for file in missing:
            file.unlink()
        before = len(calls)
        assert compiled(case.passes, tmp_path) == first
        assert len(calls) - before == count * len(missing) // len(files)


@pytest.mark.parametrize("stop", [1, 4])
def test_learning_goes_on_where_it_was_interrupted(stop, tmp_path, monkeypatch):
    passes = "canonicalize,fold-norms,rotate{rotations=[R1,R2],kind=learned,steps=6,sequences=2}"
    monkeypatch.setattr(learning_memory, "_SECONDS_BETWEEN", 0)
    whole = compiled(passes, tmp_path, cache=False)
    real, steps = learned._Loss.add_gradients, itertools.count()

    def interrupted(self, *given):
        if next(steps) == stop:
            raise KeyboardInterrupt
        return real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(learned._Loss, "add_gradients", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compiled(passes, tmp_path)
    made = []
    monkeypatch.setattr(
        learned._Loss, "add_gradients", lambda self, *given: made.append(1) or real(self, *given)
    )
    assert compiled(passes, tmp_path) == whole
    assert len(made) == 6 - stop
    left = list((tmp_path / "cache").rglob("*.result"))
    assert len(left) == 1  # where learning was is forgotten when it is over
