"""New weights in a file: the same numbers, out of memory, and no file that is left behind."""

import contextvars
import gc
import os
import threading

import numpy as np
import onnx_ir as ir
import pytest
from planish.ir import ops, release
from planish.ir.errors import ModelError
from planish.ir.spill import kept, spilling


def test_outside_of_a_block_arrays_stay_in_memory():
    array = np.zeros(1 << 20)
    assert kept(array) is array
    with spilling(None):
        assert kept(array) is array


@pytest.mark.parametrize("shape", [(1 << 20,), (1024, 1025), (3, 7, 1 << 16)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_large_arrays_are_read_from_the_file(tmp_path, shape, order):
    array = np.asarray(np.random.default_rng(0).integers(0, 255, shape, np.uint8), order=order)
    small = np.ones(5)
    with spilling(tmp_path):
        found = kept(array)
        assert kept(small) is small
    assert found is not array
    assert not found.flags.writeable
    tensor = ir.Tensor(found)
    for _ in range(2):  # what was let go of is read again
        np.testing.assert_array_equal(tensor.numpy(), array)
        release(tensor)
    assert list(tmp_path.iterdir()) == []


def test_many_arrays_take_few_descriptors(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with spilling(tmp_path):
        found = [kept(np.full(1 << 20, index, np.uint8)) for index in range(64)]
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    assert all((array == index).all() for index, array in enumerate(found))
    del found
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with spilling(tmp_path / "none"), pytest.raises(ModelError, match=r"cannot be kept in .*none: .*PLANISH"):
        kept(np.zeros(1 << 20))


def test_threads_share_a_file(tmp_path):
    found = {}

    def write(index):
        found[index] = kept(np.full(1 << 20, index, np.uint8))

    with spilling(tmp_path):
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(write, index)) for index in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    gc.collect()
    assert all((array == index).all() for index, array in found.items())


@pytest.mark.parametrize("dtype", [ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.UINT8])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(8, 6), (3, 5), (1, 4), (4, 1)])
def test_integers_read_back_however_they_lie(dtype, order, shape):
    low, high = (-8, 8) if dtype == ir.DataType.INT4 else (0, 16)
    values = np.asarray(np.random.default_rng(0).integers(low, high, shape, np.int8), order=order)
    tensor = ops.integer_tensor(values, dtype, "w")
    assert tuple(tensor.shape) == shape
    np.testing.assert_array_equal(ops.integer_values(tensor), values)
    by_rows = ops.integer_tensor(np.ascontiguousarray(values), dtype, "w")
    assert tensor.tobytes() == by_rows.tobytes()
