"""Tensors that are others transposed or joined: nothing is read before they are, and memory is let go of."""

import mmap
from pathlib import Path

import numpy as np
import onnx_ir as ir
from planish.ir import release
from planish.ir.derived import DerivedTensor
from planish.ir.rearranged import JoinedTensor, TransposedTensor, alias


class Watched(DerivedTensor):
    """A tensor that counts how often it is read."""

    def __init__(self, array):
        self.reads = 0
        super().__init__(self._values, [], dtype=ir.DataType.from_numpy(array.dtype), shape=array.shape)
        self._array = array

    def _values(self):
        self.reads += 1
        return ir.Tensor(self._array)


def test_values_and_when_they_are_read():
    first, second = (Watched(np.arange(6 * n, dtype=np.float32).reshape(2, 3 * n)) for n in (1, 2))
    turned = TransposedTensor(first, (1, 0), "t")
    joined = JoinedTensor([first, second], axis=1)
    same = alias(first, "a")
    assert (first.reads, second.reads) == (0, 0)
    assert tuple(turned.shape) == (3, 2)
    assert tuple(joined.shape) == (2, 9)
    np.testing.assert_array_equal(turned.numpy(), first._array.T)
    np.testing.assert_array_equal(joined.numpy(), np.concatenate([first._array, second._array], axis=1))
    np.testing.assert_array_equal(same.numpy(), first._array)
    assert (first.reads, second.reads) == (3, 1)
    assert same.name == "a"


def test_joined_transposed_tensors_keep_their_order_of_memory():
    parts = [
        TransposedTensor(ir.Tensor(np.random.default_rng(n).normal(size=(4, 3))), (1, 0)) for n in (0, 1)
    ]
    joined = JoinedTensor(parts, axis=1).numpy()
    assert joined.flags.f_contiguous
    np.testing.assert_array_equal(joined, np.concatenate([part.numpy() for part in parts], axis=1))


def test_release_reaches_the_file(tmp_path):
    pages = 64
    (tmp_path / "weights").write_bytes(bytes(pages * mmap.PAGESIZE))
    with (tmp_path / "weights").open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(mapping, np.float32).reshape(pages, -1)
    tensor = JoinedTensor([TransposedTensor(ir.Tensor(array), (1, 0))] * 2, axis=1)

    def resident():
        text = Path("/proc/self/smaps").read_text().split(str(tmp_path / "weights"), 1)[1]
        return int(text.split("Rss:", 1)[1].split()[0])

    assert array.sum() == 0
    assert resident() > 0
    release(tensor)
    assert resident() == 0
    found = tensor.numpy()
    assert resident() == 0  # parts are let go of as they are copied
    np.testing.assert_array_equal(found, np.concatenate([array.T] * 2, axis=1))
