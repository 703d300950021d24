"""Single layers of GPTQ, AWQ and compressed-tensors: their integers, scales, groups and what is refused."""

import checkpoints
import numpy as np
import pytest
import torch
from planish.ir.checkpoint.awq import Awq
from planish.ir.checkpoint.bit_fields import add_one_to_each, unpack, unpack_whole
from planish.ir.checkpoint.compressed_tensors import CompressedTensors
from planish.ir.checkpoint.gptq import Gptq
from planish.ir.checkpoint.stored_linear import Activations, StoredLinear
from planish.ir.checkpoint.tensors import Tensors
from planish.ir.errors import ModelError

NAME = "model.layers.0.mlp.up_proj"
OUTPUTS, INPUTS = 32, 96


def tensors_of(arrays) -> Tensors:
    tensors = {
        f"{NAME}.{key}": torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()
    }
    return Tensors({name: (lambda tensor=tensor: tensor) for name, tensor in tensors.items()}, "a test")


def rows_as_packed(stored: StoredLinear) -> np.ndarray:
    """[K, N] in the order of the checkpoint's inputs."""
    if stored.order is None:
        return stored.integers
    return stored.integers[np.argsort(stored.order)]


def check(stored: StoredLinear, layer: checkpoints.Layer, bits: int, *, signed: bool) -> None:
    """The very integers, and the weight that they stand for, without any rounding."""
    integers = rows_as_packed(stored).astype(int)
    if not signed and stored.integers.dtype == np.int8:
        integers += 1 << (bits - 1)
    np.testing.assert_array_equal(integers.T, layer.integers)
    assert stored.bits == bits
    blocks = np.atleast_2d(stored.scale)
    values = stored.integers.reshape(len(blocks), -1, OUTPUTS).astype(np.float32)
    if stored.zero_point is not None:
        assert stored.zero_point.dtype == stored.integers.dtype
        values = values - np.atleast_2d(stored.zero_point)[:, None]
    weight = (values * blocks[:, None]).reshape(INPUTS, OUTPUTS)
    if stored.order is not None:
        weight = weight[np.argsort(stored.order)]
    np.testing.assert_array_equal(weight.T, layer.weight().numpy())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16, 32])
@pytest.mark.parametrize("format_", ["gptq", "gptq_v2"])
def test_gptq_integers_are_those_packed(bits, group_size, format_):
    layer = checkpoints.random_layer((OUTPUTS, INPUTS), bits=bits, group_size=group_size)
    layout = Gptq.of_config({"bits": bits, "group_size": group_size, "checkpoint_format": format_}, "test")
    arrays = checkpoints.gptq(layer, bits, minus_one=format_ == "gptq")
    stored = layout.read(tensors_of(arrays), NAME, INPUTS, OUTPUTS)
    check(stored, layer, bits, signed=False)
    assert stored.order is None
    assert stored.block_size == (0 if group_size == -1 else group_size)
    assert stored.zero_point is not None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_symmetric_weights_are_signed(bits):
    layer = checkpoints.random_layer((OUTPUTS, INPUTS), bits=bits, group_size=32, symmetric=True)
    stored = Gptq(32, True).read(tensors_of(checkpoints.gptq(layer, bits)), NAME, INPUTS, OUTPUTS)
    assert stored.zero_point is None
    assert stored.integers.dtype == np.int8
    check(stored, layer, bits, signed=False)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("minus_one", [True, False])
def test_gptq_zero_points_of_zero_do_not_change_their_neighbours(bits, minus_one):
    """Minus one in a word borrows from the next field, and plus one gives it back."""
    layer = checkpoints.random_layer((OUTPUTS, INPUTS), bits=bits, group_size=16, lowest_zero=0)
    assert (layer.zero_points == 0).any()
    arrays = checkpoints.gptq(layer, bits, minus_one=minus_one)
    stored = Gptq(16, minus_one).read(tensors_of(arrays), NAME, INPUTS, OUTPUTS)
    check(stored, layer, bits, signed=False)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_act_order_sorts_rows_by_their_group(symmetric):
    layer = checkpoints.random_layer(
        (OUTPUTS, INPUTS), bits=4, group_size=32, act_order=True, symmetric=symmetric
    )
    stored = Gptq(32, True).read(tensors_of(checkpoints.gptq(layer, 4)), NAME, INPUTS, OUTPUTS)
    check(stored, layer, 4, signed=False)
    assert stored.block_size == 32
    assert (np.diff(layer.groups[stored.order]) >= 0).all()


def test_act_order_of_one_group_permutes_nothing():
    layer = checkpoints.random_layer((OUTPUTS, INPUTS), bits=4, act_order=True)
    stored = Gptq(-1, True).read(tensors_of(checkpoints.gptq(layer, 4)), NAME, INPUTS, OUTPUTS)
    assert stored.order is None
    assert stored.scale.shape == (OUTPUTS,)


@pytest.mark.parametrize("act_order", [True, False])
def test_groups_of_different_sizes_share_blocks_that_divide_them(act_order):
    """96 inputs in groups of 64: the last one has 32."""
    layer = checkpoints.random_layer((OUTPUTS, INPUTS), bits=4, group_size=64, act_order=act_order)
    stored = Gptq(64, True).read(tensors_of(checkpoints.gptq(layer, 4)), NAME, INPUTS, OUTPUTS)
    check(stored, layer, 4, signed=False)
    assert (stored.block_size, stored.scale.shape) == (32, (3, OUTPUTS))


def test_gptq_without_groups_of_inputs_takes_them_in_order():
    layer = checkpoints.random_layer((OUTPUTS, INPUTS), bits=4, group_size=32)
    arrays = checkpoints.gptq(layer, 4, with_groups=False)
    check(Gptq(32, True).read(tensors_of(arrays), NAME, INPUTS, OUTPUTS), layer, 4, signed=False)


@pytest.mark.parametrize("group_size", [-1, 16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_integers_are_those_packed(group_size, symmetric):
    layer = checkpoints.random_layer(
        (OUTPUTS, INPUTS), bits=4, group_size=group_size, symmetric=symmetric, lowest_zero=0
    )
    layout = Awq.of_config({"bits": 4, "group_size": group_size, "version": "GEMM"}, "test")
    stored = layout.read(tensors_of(checkpoints.awq(layer)), NAME, INPUTS, OUTPUTS)
    check(stored, layer, 4, signed=False)
    assert (stored.zero_point is None) == symmetric


def scheme(bits, *, group_size=None, activations=None, targets=("Linear",), symmetric=True) -> dict:
    strategy = "channel" if group_size is None else "group"
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    return {
        "targets": list(targets),
        "weights": weights | {"group_size": group_size},
        "input_activations": activations,
    }


TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": False}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("whole", [True, False], ids=["field by field", "dense"])
def test_packed_integers_are_those_packed(bits, symmetric, whole):
    layer = checkpoints.random_layer(
        (OUTPUTS, INPUTS), bits=bits, group_size=32, symmetric=symmetric, signed=True
    )
    arrays = checkpoints.pack_quantized(layer, bits, symmetric=symmetric, whole=whole)
    layout = CompressedTensors((scheme(bits, group_size=32),))
    stored = layout.read(tensors_of(arrays), NAME, INPUTS, OUTPUTS)
    check(stored, layer, bits, signed=True)
    assert (stored.zero_point is None) == symmetric


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [None, 32])
def test_packed_groups(group_size, act_order):
    layer = checkpoints.random_layer(
        (OUTPUTS, INPUTS), bits=4, group_size=group_size or -1, act_order=act_order, signed=True
    )
    arrays = checkpoints.pack_quantized(layer, 4, symmetric=False, act_order=act_order)
    layout = CompressedTensors((scheme(4, group_size=group_size, symmetric=False),))
    stored = layout.read(tensors_of(arrays), NAME, INPUTS, OUTPUTS)
    check(stored, layer, 4, signed=True)
    assert (stored.order is not None) == (act_order and group_size is not None)


def test_groups_that_were_never_ordered_are_taken_in_order():
    layer = checkpoints.random_layer((OUTPUTS, INPUTS), bits=4, group_size=32, signed=True)
    arrays = checkpoints.pack_quantized(layer, 4, symmetric=False)
    arrays["weight_g_idx"] = np.full(INPUTS, -1, np.int32)
    layout = CompressedTensors((scheme(4, group_size=32),))
    check(layout.read(tensors_of(arrays), NAME, INPUTS, OUTPUTS), layer, 4, signed=True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_whole_integers_are_those_stored(symmetric):
    layer = checkpoints.random_layer((OUTPUTS, INPUTS), bits=8, symmetric=symmetric, signed=True)
    arrays = checkpoints.int_quantized(layer, symmetric=symmetric)
    layout = CompressedTensors((scheme(8, activations=TOKEN),))
    stored = layout.read(tensors_of(arrays), NAME, INPUTS, OUTPUTS)
    check(stored, layer, 8, signed=True)
    assert stored.activations == Activations("token", 8)


def test_one_scale_for_a_whole_weight():
    layer = checkpoints.random_layer((OUTPUTS, INPUTS), bits=8, symmetric=True, signed=True)
    arrays = checkpoints.int_quantized(layer) | {"weight_scale": np.array([0.01], np.float32)}
    stored = CompressedTensors((scheme(8),)).read(tensors_of(arrays), NAME, INPUTS, OUTPUTS)
    assert stored.scale.tolist() == [np.float32(0.01)] * OUTPUTS
    assert stored.activations is None


def test_static_grids_have_their_numbers():
    layer = checkpoints.random_layer((OUTPUTS, INPUTS), bits=8, symmetric=True, signed=True)
    grid = {"input_scale": np.array([0.5], np.float32), "input_zero_point": np.array([-3], np.int8)}
    layout = CompressedTensors((scheme(8, activations=STATIC),))
    stored = layout.read(tensors_of(checkpoints.int_quantized(layer) | grid), NAME, INPUTS, OUTPUTS)
    assert stored.activations == Activations("static", 8, 0.5, -3)


@pytest.mark.parametrize(
    ("changes", "group_size"),
    [
        ({"symmetric": False}, None),
        ({"strategy": "tensor"}, None),
        ({"strategy": "group", "group_size": 32}, None),
        ({"type": "float"}, None),
        ({"strategy": "tensor", "dynamic": False}, 32),
    ],
)
def test_grids_of_activations_that_no_op_has_are_left_out_and_said(changes, group_size):
    layer = checkpoints.random_layer(
        (OUTPUTS, INPUTS), bits=8, group_size=group_size or -1, symmetric=True, signed=True
    )
    layout = CompressedTensors((scheme(8, group_size=group_size, activations=TOKEN | changes),))
    stored = layout.read(tensors_of(checkpoints.int_quantized(layer)), NAME, INPUTS, OUTPUTS)
    assert stored.activations is None
    (remark,) = layout.remarks(frozenset({NAME}))
    assert remark.startswith("1 of 1 linears quantise activations by a grid that no op has")


def test_a_name_goes_before_a_pattern_and_a_pattern_before_a_class():
    schemes = [
        scheme(2, targets=["Linear"]),
        scheme(3, targets=["re:.*up_proj$"]),
        scheme(4, targets=[NAME]),
    ]
    layer = checkpoints.random_layer((OUTPUTS, INPUTS), bits=4, symmetric=True, signed=True)
    arrays = checkpoints.pack_quantized(layer, 4, symmetric=True)
    for bits, known in ((4, schemes), (4, schemes[::-1])):
        stored = CompressedTensors(tuple(known)).read(tensors_of(arrays), NAME, INPUTS, OUTPUTS)
        assert stored.bits == bits
    with pytest.raises(ModelError, match="12 words do not hold 96 integers of 3 bits"):
        CompressedTensors(tuple(schemes[:2])).read(tensors_of(arrays), NAME, INPUTS, OUTPUTS)
    with pytest.raises(ModelError, match="no group of the configuration says how"):
        CompressedTensors((scheme(4, targets=["re:.*down_proj$"]),)).read(
            tensors_of(arrays), NAME, INPUTS, OUTPUTS
        )


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_compressed_tensors_packs_as_the_helper_does(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    layer = checkpoints.random_layer((OUTPUTS, 50), bits=bits, signed=True)
    theirs = helpers.pack_to_int32(torch.from_numpy(layer.integers).to(torch.int8), bits).numpy()
    np.testing.assert_array_equal(theirs, checkpoints.packed(layer.integers + (1 << (bits - 1)), bits))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_what_compressed_tensors_compresses_is_read_as_it_decompresses(bits, symmetric):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    stated = scheme(bits, group_size=32, symmetric=symmetric)
    theirs = quantization.QuantizationScheme.model_validate(stated)
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    layer = checkpoints.random_layer(
        (OUTPUTS, INPUTS), bits=bits, group_size=32, symmetric=symmetric, signed=True
    )
    state = {
        "weight": layer.weight(),
        "weight_scale": torch.from_numpy(layer.scales),
        "weight_zero_point": torch.from_numpy(layer.zero_points).to(torch.int8),
    }
    compressed = compressor.compress(state, theirs)
    arrays = {name: tensor.numpy() for name, tensor in compressed.items()}
    stored = CompressedTensors((stated,)).read(tensors_of(arrays), NAME, INPUTS, OUTPUTS)
    check(stored, layer, bits, signed=True)


@pytest.mark.parametrize("words", [np.int8, np.int16, np.int32, np.int64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fields_do_not_depend_on_the_width_of_words(words, bits):
    fields = np.random.default_rng(bits).integers(0, 1 << bits, (3, 64))
    found = unpack(checkpoints.packed(fields, bits).view(words), bits, 64)
    np.testing.assert_array_equal(found, fields)


def test_words_that_are_not_filled():
    fields = np.random.default_rng(0).integers(0, 8, (3, 25))
    np.testing.assert_array_equal(unpack_whole(checkpoints.packed_whole(fields, 3), 3, 25), fields)


def test_one_is_added_with_carries():
    words = np.array([[0x0000003F]], np.int32)
    assert add_one_to_each(words, 4).tolist() == [[0x11111150]]


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (Gptq, {"checkpoint_format": "marlin"}, "expected the GPTQ format gptq or gptq_v2, found 'marlin'"),
        (Awq, {"version": "gemv"}, "found gemv with 4"),
        (Awq, {"bits": 8}, "found gemm with 8"),
        (CompressedTensors, {"format": "nvfp4-pack-quantized"}, "found 'nvfp4-pack-quantized'"),
        (CompressedTensors, {"config_groups": {"g": {"format": "float-quantized"}}}, "'float-quantized'"),
        (CompressedTensors, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse compressed"),
        (CompressedTensors, {"transform_config": {"config_groups": {}}}, "online transforms"),
    ],
)
def test_what_is_not_read_is_said(kind, config, message):
    with pytest.raises(ModelError, match=message):
        kind.of_config(config, "a test")


def damaged(**changes) -> dict:
    layer = checkpoints.random_layer((OUTPUTS, INPUTS), bits=4, group_size=32)
    return {
        name: array for name, array in (checkpoints.gptq(layer, 4) | changes).items() if array is not None
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qzeros": None}, r"no tensor '.*qzeros'"),
        ({"qweight": np.zeros((13, OUTPUTS), np.int32)}, r"qweight: expected \[96 · bits / 32, 32\]"),
        ({"scales": np.zeros((3, 31), np.float16)}, r"scales: expected \[groups, 32\], found \[3, 31\]"),
        ({"qzeros": np.zeros((2, 4), np.int32)}, r"zero points of \[3, 32\], found \[2, 32\]"),
        ({"g_idx": np.full(INPUTS, 3, np.int32)}, "a group from 0 to 2 for each of 96 inputs"),
    ],
)
def test_tensors_that_do_not_fit_are_one_clear_error(changes, message):
    with pytest.raises(ModelError, match=message):
        Gptq(32, True).read(tensors_of(damaged(**changes)), NAME, INPUTS, OUTPUTS)


def test_floats_in_packed_words_are_refused():
    arrays = {"weight_packed": np.zeros((OUTPUTS, INPUTS // 2), np.uint8), "weight_scale": np.ones((1, 1))}
    with pytest.raises(ModelError, match="expected int32, found uint8"):
        CompressedTensors((scheme(4),)).read(tensors_of(arrays), NAME, INPUTS, OUTPUTS)
    stated = scheme(4)
    stated["weights"]["type"] = "float"
    with pytest.raises(ModelError, match="of type int, found 4 bits of 'float'"):
        CompressedTensors((stated,)).read(tensors_of(arrays), NAME, INPUTS, OUTPUTS)


def test_blocks_of_inputs_and_outputs_are_refused():
    layer = checkpoints.random_layer((OUTPUTS, INPUTS), bits=8, symmetric=True, signed=True)
    arrays = checkpoints.int_quantized(layer) | {"weight_scale": np.ones((OUTPUTS, 5), np.float32)}
    with pytest.raises(ModelError, match="5 groups of 32 do not make 96 inputs"):
        CompressedTensors((scheme(8, group_size=32),)).read(tensors_of(arrays), NAME, INPUTS, OUTPUTS)
