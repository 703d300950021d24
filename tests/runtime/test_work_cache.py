"""Results of long work on disk: found again whole, and never when they are damaged or of something else."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time

import filelock
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import planish
import pytest
from planish.ir import save
from planish.ir.content_hash import graph_hash
from planish.ir.errors import InputError
from planish.runtime.work_cache import WorkCache, code_version, without_cache, work_key

ARRAYS = {
    "integers": np.arange(-6, 6, dtype=np.int8).reshape(3, 4),
    "scale": np.array([[0.5, 2]], np.float16),
    "floats8": np.array([1.0, -448.0], ml_dtypes.float8_e4m3fn),
    "half": np.array([[1.5], [-2.5]], ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.int64),
    "number": np.array(7, np.int64),
    "half number": np.array(2.5, ml_dtypes.bfloat16),
    "turned": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3).T,
}
ABOUT = {"pass": "quantize", "pipeline": "canonicalize,quantize", "model": "m"}


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


@pytest.fixture
def cache(tmp_path):
    return WorkCache(tmp_path / "work")


def test_what_was_kept_is_found_again(cache):
    with cache.opened("quantize", "k" * 64, ABOUT) as work:
        assert work.recall("layer", "options") is None
        work.keep("layer", "options", ARRAYS)
        equal(work.recall("layer", "options"), ARRAYS)
    with cache.opened("quantize", "k" * 64, ABOUT) as work:
        equal(work.recall("layer", "options"), ARRAYS)
        for other in (("layer", "other options"), ("other layer", "options"), ("layeroptions", "")):
            assert work.recall(*other) is None
    with cache.opened("quantize", "l" * 64, ABOUT) as work:
        assert work.recall("layer", "options") is None


def test_damaged_results_count_as_not_there(cache):
    with cache.opened("quantize", "k" * 64, ABOUT) as work:
        work.keep("layer", "", ARRAYS)
        (path,) = work.folder.glob("*.result")
        whole = path.read_bytes()
        for position in range(0, len(whole), 7):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
            assert work.recall("layer", "") is None
            assert not path.exists()
        for length in range(0, len(whole), 11):
            path.write_bytes(whole[:length])
            assert work.recall("layer", "") is None
        path.write_bytes(whole)
        equal(work.recall("layer", ""), ARRAYS)


def test_a_full_disk_costs_time_only(cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with cache.opened("quantize", "k" * 64, ABOUT) as work:
        with monkeypatch.context() as context:
            context.setattr("planish.runtime.work_cache.write_whole", full)
            work.keep("layer", "", ARRAYS)
        assert work.recall("layer", "") is None


def test_a_second_process_works_by_itself(cache):
    with cache.opened("quantize", "k" * 64, ABOUT) as first:
        first.keep("layer", "", ARRAYS)
        with cache.opened("quantize", "k" * 64, ABOUT) as second:
            assert second.folder != first.folder
            assert second.recall("layer", "") is None
            second.keep("layer", "", {"integers": np.zeros(3)})
        assert cache.clear() == 0  # in use
        equal(first.recall("layer", ""), ARRAYS)
    assert cache.clear() > 0
    assert cache.entries() == []


def test_the_oldest_are_deleted_first(cache):
    sizes = {}
    for age, key in ((300, "a"), (100, "b"), (200, "c")):
        with cache.opened("prune", key * 64, ABOUT) as work:
            work.keep("layer", "", ARRAYS)
        for file in work.folder.iterdir():
            os.utime(file, (time.time() - age,) * 2)
        sizes[key] = sum(file.stat().st_size for file in work.folder.iterdir())
    assert [entry.path.name[-1] for entry in cache.entries()] == ["b", "c", "a"]
    assert cache.entries()[0].about == ABOUT
    assert cache.entries()[0].bytes == sizes["b"]
    cache.trim(sizes["b"] + sizes["c"])
    assert [entry.path.name[-1] for entry in cache.entries()] == ["b", "c"]


def test_without_a_cache_there_is_a_folder_for_a_while():
    with without_cache() as work:
        work.keep("layer", "", ARRAYS)
        assert work.recall("layer", "") is None
        (work.folder / "file").write_text("kept by the pass itself")
    assert not work.folder.exists()


TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
agraph (float[n, 2] x) => (float[n, 2] y) <float[2, 2] w = {1, 2, 3, 4}>
{
    a = MatMul (x, w)
    y = LeakyRelu <alpha = 0.1> (a)
}
"""


def test_all_that_decides_is_in_the_key():
    feeds = [{"x": np.ones((3, 2), np.float32)}]

    def key(text=TEXT, data=feeds, *others):
        return work_key(ir.from_onnx_text(text), (data, ()), *others)

    assert key() == key()
    changes = [
        key(TEXT.replace("0.1", "0.2")),
        key(TEXT.replace("{1, 2, 3, 4}", "{1, 2, 3, 5}")),
        key(TEXT.replace("MatMul (x, w)", "MatMul (w, x)")),
        key(TEXT.replace("LeakyRelu", "Elu")),
        key(TEXT.replace("float[n, 2] x", "float[4, 2] x")),
        key(TEXT.replace('"" : 23', '"" : 22')),
        key(TEXT, [{"x": np.zeros((3, 2), np.float32)}]),
        key(TEXT, feeds * 2),
        key(TEXT, feeds, 1),
    ]
    assert len({key(), *changes}) == len(changes) + 1
    assert code_version() == code_version()


def test_weights_inside_of_nodes_count():
    def model(weight):
        body = onnx.helper.make_graph(
            [onnx.helper.make_node("Identity", ["w"], ["u"])],
            "then",
            [],
            [onnx.helper.make_tensor_value_info("u", 1, [2])],
            [onnx.numpy_helper.from_array(np.array(weight, np.float32), "w")],
        )
        node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
        inputs = [onnx.helper.make_tensor_value_info("c", 9, [])]
        outputs = [onnx.helper.make_tensor_value_info("y", 1, [2])]
        return ir.from_proto(onnx.helper.make_model(onnx.helper.make_graph([node], "g", inputs, outputs)))

    assert graph_hash(model([1, 2])) == graph_hash(model([1, 2]))
    assert graph_hash(model([1, 2])) != graph_hash(model([1, 3]))


def test_a_limit_that_is_no_number_is_named(cache, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE_LIMIT", "20GB")
    with pytest.raises(InputError, match="PLANISH_CACHE_LIMIT: expected a number of bytes, found '20GB'"):
        cache.trim()


def test_graphs_inside_of_nodes_and_functions_count():
    text = """
    <ir_version: 10, opset_import: ["" : 23, "d" : 1]>
    agraph (bool c, float[2] x) => (float[2] y)
    {
        a = If (c) <then_branch = t () => (float[2] u) { u = Neg (x) }, else_branch = e () => (float[2] v) { v = Abs (x) }>
        y = d.f (a)
    }
    <domain: "d", opset_import: ["" : 23]> f (p) => (q) { q = Sin (p) }
    """  # noqa: E501
    found = {
        graph_hash(ir.from_onnx_text(text.replace(*change)))
        for change in (("Neg", "Neg"), ("Neg", "Exp"), ("Abs", "Exp"), ("Sin", "Cos"))
    }
    assert len(found) == 4


SCRIPT = textwrap.dedent(
    """
    import sys
    import numpy as np
    import planish
    ids = np.load(sys.argv[2])
    compiled = planish.compile(
        sys.argv[1], sys.argv[3], calibration=[{"input_ids": row[None]} for row in ids], cache=sys.argv[5],
        target="portable",
    )
    compiled.save(sys.argv[4])
    """
)
PASSES = "canonicalize,fuse,quantize{scheme=W4A16,group_size=16,algorithm=gptq,compensate_rank=2,ignore=[]}"


@pytest.mark.slow
def test_twenty_killed_runs_end_with_the_bytes_of_one(tmp_path):
    from small_decoders import VOCABULARY, traced_llama

    model, data = tmp_path / "model.onnx", tmp_path / "ids.npy"
    save(traced_llama(), model)
    np.save(data, np.random.default_rng(0).integers(1, VOCABULARY, (24, 32)))

    def start(output, cache):
        command = [sys.executable, "-c", SCRIPT, model, data, PASSES, output, cache]
        return subprocess.Popen([str(part) for part in command])

    began = time.monotonic()
    assert start(tmp_path / "whole.onnx", tmp_path / "other").wait() == 0
    seconds = time.monotonic() - began
    moments = np.random.default_rng(1).uniform(0.2, 1.0, 20) * seconds
    killed, kept = 0, []
    for moment in moments:
        process = start(tmp_path / "resumed.onnx", tmp_path / "cache")
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
        kept.append(len(list((tmp_path / "cache").rglob("*.result"))))
    assert start(tmp_path / "resumed.onnx", tmp_path / "cache").wait() == 0
    assert killed >= 5
    assert kept == sorted(kept)
    assert (tmp_path / "resumed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    left = {path.name for path in tmp_path.iterdir()}
    assert {name for name in left if name.startswith("resumed")} == {"resumed.onnx"}


TOGETHER = """
import time
from pathlib import Path
import planish.passes.quantize, planish.passes.canonicalize, planish.passes.fuse  # which takes seconds
Path(sys.argv[6]).touch()
while not Path(sys.argv[7]).exists():
    time.sleep(0.01)
"""


def contents(cache):
    """Of all results. A layer's file has one name for all models; its folder is that of the model."""
    return {(path.parent.name, path.name): path.read_bytes() for path in cache.rglob("*.result")}


@pytest.mark.slow
def test_processes_that_share_a_cache_do_not_disturb_each_other(tmp_path):
    """Two compile one model and two another, all at once, into one cache; then each once more."""
    from small_decoders import VOCABULARY, small_decoder, traced_llama

    save(traced_llama(), tmp_path / "one.onnx")
    save(planish.trace_causal_lm(small_decoder(intermediate_size=96)), tmp_path / "two.onnx")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(1, VOCABULARY, (24, 32)))
    script = SCRIPT.replace("ids = np.load", TOGETHER + "ids = np.load")

    def start(model, output, cache, go="go"):
        files = [tmp_path / name for name in (f"{model}.onnx", "ids.npy")]
        more = [tmp_path / name for name in (output, cache, f"{output}.ready", go)]
        command = [sys.executable, "-c", script, *files, PASSES, *more]
        return subprocess.Popen([str(part) for part in command])

    def run(processes):
        assert [process.wait() for process in processes] == [0] * len(processes)

    (tmp_path / "at once").touch()
    for model in ("one", "two"):
        run([start(model, f"{model}.whole.onnx", f"{model}.cache", "at once")])
    whole = {model: (tmp_path / f"{model}.whole.onnx").read_bytes() for model in ("one", "two")}
    together = [start(model, f"{model}.{number}.onnx", "cache") for model in whole for number in (1, 2)]
    while len(list(tmp_path.glob("*.[12].onnx.ready"))) < 4:
        assert all(process.poll() is None for process in together)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    run(together)
    run([start(model, f"{model}.3.onnx", "cache") for model in whole])
    for model, expected in whole.items():
        for number in (1, 2, 3):
            assert (tmp_path / f"{model}.{number}.onnx").read_bytes() == expected
    results = contents(tmp_path / "cache")
    assert results == contents(tmp_path / "one.cache") | contents(tmp_path / "two.cache")
    for content in results.values():
        assert hashlib.sha256(content[32:]).digest() == content[:32]
    assert {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {
        ".result",
        ".json",
        "",  # the locks
    }


def test_a_second_run_computes_nothing_again(tmp_path, monkeypatch):
    from planish.ir import clone
    from small_decoders import VOCABULARY, traced_llama

    ids = np.random.default_rng(0).integers(1, VOCABULARY, (4, 16))

    def compiled(passes=PASSES, samples=ids):
        data = [{"input_ids": row[None]} for row in samples]
        found = planish.compile(
            clone(traced_llama()), passes, calibration=data, cache=tmp_path, target="portable"
        )
        found.save(tmp_path / "out.onnx")
        return (tmp_path / "out.onnx").read_bytes(), found.report

    first, report = compiled()
    solved = []
    solve = planish.passes.quantize.algorithms.gptq.GPTQ.__call__
    monkeypatch.setattr(
        planish.passes.quantize.algorithms.gptq.GPTQ,
        "__call__",
        lambda self, *given: solved.append(1) or solve(self, *given),
    )
    second, again = compiled()
    assert second == first
    assert again.passes[-1].remarks == report.passes[-1].remarks
    assert again.passes[-1].layers == report.passes[-1].layers
    assert not solved
    compiled(samples=ids + (ids < 5))
    count = len(solved)
    assert count > 0
    compiled(PASSES.replace("rank=2", "rank=3"))
    assert len(solved) == 2 * count
    # What follows the first layer reads what it gives: without it, all but it are others.
    fewer, _ = compiled(PASSES.replace("ignore=[]", "ignore=['re:.*layers\\.0\\.self_attn\\.qkv_proj']"))
    assert len(solved) == 3 * count - 1
    for file in tmp_path.rglob("*.result"):
        file.unlink()
    again, _ = compiled(PASSES.replace("ignore=[]", "ignore=['re:.*layers\\.0\\.self_attn\\.qkv_proj']"))
    assert again == fewer
    assert {json.loads(path.read_text())["pass"] for path in tmp_path.glob("*/about.json")} == {"quantize"}


def test_the_lock_is_gone_with_its_process(tmp_path):
    cache = WorkCache(tmp_path)
    hold = f"""
import time
from pathlib import Path
from planish.runtime.work_cache import WorkCache
with WorkCache(Path({str(tmp_path)!r})).opened("p", "k" * 64, {{}}) as work:
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(filelock.Timeout), filelock.FileLock(next(tmp_path.iterdir()) / "lock", timeout=0):
        pass
    process.kill()
    process.wait()
    with cache.opened("p", "k" * 64, {}) as work:
        assert work.keeps
