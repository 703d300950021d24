"""Training: updates against equations written out, recovery, resuming in the same bits, what goes wrong."""

from __future__ import annotations

import dataclasses
import math
import signal

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from planish.ir import clone
from planish.ir.errors import PassError
from planish.ir.shapes import infer_shapes
from planish.runtime.training import Batches, Losses, Training, learning_rate, train, write_back

SHAPES = {"fc1.weight": (5, 16), "fc1.bias": (16,), "fc2.weight": (16, 3), "fc2.bias": (3,)}
NAMES = tuple(SHAPES)


def mlp(seed=0, dtype=np.float64, output="logits"):
    kind = {np.float64: "double", np.float32: "float", np.float16: "float16"}[dtype]
    proto = onnx.parser.parse_model(
        f'<ir_version: 11, opset_import: ["": 23]> net ({kind}[n, 5] x) => ({kind}[n, 3] {output})'
        '{ a = MatMul (x, "fc1.weight") b = Add (a, "fc1.bias") h = Tanh (b)'
        f' c = MatMul (h, "fc2.weight") {output} = Add (c, "fc2.bias") }}'
    )
    rng = np.random.default_rng(seed)
    for name, shape in SHAPES.items():
        array = (rng.standard_normal(shape) / math.sqrt(shape[0])).astype(dtype)
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    model = ir.from_proto(proto)
    infer_shapes(model)
    return model


def inputs(count=6, dtype=np.float64):
    rng = np.random.default_rng(5)
    return [{"x": rng.standard_normal((8, 5)).astype(dtype)} for _ in range(count)]


LOGITS = Losses(squarehead=0)


def run(student, teacher, *, data=None, names=NAMES, losses=LOGITS, seed=3, **options):
    arguments = {name: options.pop(name) for name in ("hook", "folder", "progress") if name in options}
    training = Training(**{"steps": 8, "batch": 4, "learning_rate": 0.01} | options)
    return train(
        student,
        teacher,
        inputs() if data is None else data,
        names=names,
        losses=losses,
        training=training,
        seed=seed,
        **arguments,
    )


def same(first, second):
    return all(torch.equal(first.parameters[name], second.parameters[name]) for name in NAMES)


def forward(weights, x):
    hidden = torch.tanh(x @ weights["fc1.weight"] + weights["fc1.bias"])
    return hidden @ weights["fc2.weight"] + weights["fc2.bias"]


def tensors(model):
    values = model.graph.initializers
    return {name: torch.from_numpy(values[name].const_value.numpy().copy()) for name in NAMES}


def test_updates_are_those_of_adamw_on_the_same_batches():
    """The same batches, losses and rates, and the optimiser's equations written out, in float64."""
    student, teacher = mlp(), mlp(1)
    options = {"steps": 7, "learning_rate": 0.02, "weight_decay": 0.1, "clip": 0.05, "warmup": 0.3}
    found = run(student, teacher, **options)
    batches = Batches(inputs(), student, size=4, held_out=0.1, seed=3)
    weights, target = tensors(student), tensors(teacher)
    first, second = ({name: torch.zeros_like(weights[name]) for name in NAMES} for _ in range(2))
    for step in range(7):
        x = torch.from_numpy(batches.at(step)["x"])
        leaves = {name: weights[name].clone().requires_grad_() for name in NAMES}
        p, q = (torch.softmax(forward(each, x), -1) for each in (target, leaves))
        (p * (p / q).log()).sum(-1).mean().backward()
        length = math.sqrt(sum(float(leaves[name].grad.square().sum()) for name in NAMES))
        assert length > 0.05  # so that clipping is tested
        rate = learning_rate(step, peak=0.02, steps=7, warmup=0.3, decay="cosine")
        for name in NAMES:
            gradient = leaves[name].grad * 0.05 / length
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            weights[name] = weights[name] * (1 - rate * 0.1) - rate * mean / (square.sqrt() + 1e-8)
    for name in NAMES:
        # Torch divides the clipped gradient by its length plus 1e-6.
        torch.testing.assert_close(found.parameters[name].detach(), weights[name], rtol=1e-6, atol=1e-6)


def test_held_out_losses_are_those_of_the_held_out_samples():
    student, teacher = mlp(), mlp(1)
    data = inputs()
    found = run(student, teacher, data=data, held_out=0.25)
    batches = Batches(data, student, size=4, held_out=0.25, seed=3)
    x = torch.from_numpy(np.concatenate([batches.assemble(chunk)["x"] for chunk in batches.held_out]))
    assert len(x) == 12
    for weights, losses in ((tensors(student), found.before), (found.parameters, found.after)):
        p, q = (torch.softmax(forward(each, x), -1) for each in (tensors(teacher), weights))
        assert losses == {"logits": pytest.approx((p * (p / q).log()).sum(-1).mean().item())}


def test_a_damaged_student_recovers():
    teacher = mlp(dtype=np.float32)
    student = clone(teacher)
    damaged = student.graph.initializers["fc2.weight"].const_value.numpy().copy()
    damaged[::2] = 0
    student.graph.initializers["fc2.weight"].const_value = ir.tensor(damaged, name="fc2.weight")
    found = run(student, teacher, data=inputs(dtype=np.float32), steps=150, learning_rate=0.02)
    assert found.is_better
    assert found.after["logits"] < 0.02 * found.before["logits"]


def test_only_named_weights_move_and_the_graphs_stay():
    student, teacher = mlp(), mlp(1)
    before = tensors(student)
    found = run(student, teacher, names=("fc2.bias",))
    assert list(found.parameters) == ["fc2.bias"]
    assert not torch.equal(found.parameters["fc2.bias"], before["fc2.bias"])
    for name, tensor in tensors(student).items():
        assert torch.equal(tensor, before[name])


def test_write_back_keeps_types_and_takes_the_weights():
    student = mlp(dtype=np.float16)
    found = run(student, mlp(1, dtype=np.float16), data=inputs(dtype=np.float16))
    parameters = dict(found.parameters)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    write_back(student, found.parameters)
    assert found.parameters == {}
    for name, parameter in parameters.items():
        value = student.graph.initializers[name]
        assert value.const_value.dtype == value.dtype == ir.DataType.FLOAT16
        np.testing.assert_array_equal(
            value.const_value.numpy(), parameter.detach().numpy().astype(np.float16)
        )


def test_a_weight_too_large_for_its_type_is_named():
    student = mlp(dtype=np.float16)
    parameters = {"fc1.bias": torch.nn.Parameter(torch.full((16,), 1e6))}
    with pytest.raises(PassError, match=r"'fc1\.bias' is not finite as FLOAT16"):
        write_back(student, parameters)


# --- going on --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Stops:
    """Interrupts the run after some updates, by a signal or an exception; shifts weights by a state."""

    after: int | None = dataclasses.field(default=None, repr=False)
    by_signal: bool = dataclasses.field(default=True, repr=False)
    shift: float = dataclasses.field(default=0.0, repr=False)

    def before_step(self, parameters):
        parameters["fc1.bias"].grad.mul_(0.5)

    def after_step(self, step, parameters):
        self.shift += 1e-3
        parameters["fc2.bias"].data.add_(self.shift)
        if step == self.after:
            if not self.by_signal:
                raise RuntimeError("power cut")
            signal.raise_signal(signal.SIGINT)

    def state(self):
        return {"shift": torch.tensor(self.shift, dtype=torch.float64)}

    def restore(self, state):
        self.shift = state["shift"].item()


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_ctrl_c_saves_and_the_next_run_ends_in_the_same_bits(tmp_path, stop):
    whole = run(mlp(), mlp(1), hook=Stops())
    previous = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(mlp(), mlp(1), hook=Stops(stop), folder=tmp_path)
    assert signal.getsignal(signal.SIGINT) is previous
    resumed = run(mlp(), mlp(1), hook=Stops(), folder=tmp_path)
    assert resumed.resumed_at == stop
    assert same(resumed, whole)
    assert (resumed.before, resumed.after) == (whole.before, whole.after)


def test_a_crash_loses_no_more_than_the_steps_since_the_last_checkpoint(tmp_path):
    whole = run(mlp(), mlp(1), hook=Stops())
    with pytest.raises(RuntimeError, match="power cut"):
        run(mlp(), mlp(1), hook=Stops(7, by_signal=False), folder=tmp_path, checkpoint_every=3)
    # How often it is saved does not matter to what is saved.
    resumed = run(mlp(), mlp(1), hook=Stops(), folder=tmp_path, checkpoint_every=2)
    assert resumed.resumed_at == 6
    assert same(resumed, whole)


def test_a_finished_run_is_not_repeated(tmp_path):
    whole = run(mlp(), mlp(1), folder=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]
    again = run(mlp(), mlp(1), folder=tmp_path)
    assert again.resumed_at == 8
    assert same(again, whole)
    assert again.after == whole.after


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.02},
        {"seed": 4},
        {"losses": Losses(squarehead=0, temperature=2.0)},
        {"data": inputs(5)},
        {"names": ("fc2.bias",)},
        {"student": 2},
        {"teacher": 2},
        {"hook": Stops()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_checkpoints_of_another_run_are_not_used(tmp_path, change):
    change = dict(change)
    run(mlp(), mlp(1), folder=tmp_path)
    student, teacher = mlp(change.pop("student", 0)), mlp(change.pop("teacher", 1))
    assert run(student, teacher, folder=tmp_path, **change).resumed_at == 0


def test_a_damaged_checkpoint_is_named(tmp_path):
    run(mlp(), mlp(1), folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PassError, match="cannot be read — delete it to train from the beginning"):
        run(mlp(), mlp(1), folder=tmp_path)


def test_progress_sees_the_steps_that_are_left(tmp_path):
    seen = []

    def progress(steps, description):
        seen.append((list(steps), description))
        return iter(steps)

    with pytest.raises(KeyboardInterrupt):
        run(mlp(), mlp(1), hook=Stops(5), folder=tmp_path, progress=progress)
    run(mlp(), mlp(1), hook=Stops(), folder=tmp_path, progress=progress)
    assert seen == [(list(range(8)), "train"), (list(range(5, 8)), "train")]


# --- what goes wrong -------------------------------------------------------------------------------------


def test_a_broken_weight_is_named():
    student = mlp()
    array = np.full((16,), np.nan)
    student.graph.initializers["fc1.bias"].const_value = ir.tensor(array, name="fc1.bias")
    with pytest.raises(PassError, match=r"the student's weight 'fc1\.bias' holds NaN or infinity"):
        run(student, mlp(1))
    with pytest.raises(PassError, match=r"the teacher's weight 'fc1\.bias' holds NaN or infinity"):
        run(mlp(1), student)


def test_a_loss_that_becomes_infinite_ends_training():
    with pytest.raises(PassError, match=r"the loss is (nan|inf) at step 1 — lower the learning rate"):
        run(mlp(), mlp(1), losses=Losses(squarehead=0, outputs="features"), learning_rate=1e300, warmup=0.0)


def test_training_that_makes_it_worse_says_so():
    teacher = mlp()
    found = run(clone(teacher), teacher, learning_rate=10.0, weight_decay=0.1)
    assert found.before["logits"] == pytest.approx(0, abs=1e-12)
    assert not found.is_better


def test_weights_that_nothing_compared_depends_on_are_not_trained():
    states = mlp(output="y")
    proto = ir.to_proto(states)
    proto.graph.node.extend(
        onnx.parser.parse_model(
            '<ir_version: 11, opset_import: ["": 23]> net (double[n, 5] x, double[n, 3] y)'
            ' => (double[n, 5] z) { up = MatMul (y, "out.weight") z = Add (x, up) }'
        ).graph.node
    )
    del proto.graph.output[0]
    for name in ("z", "y"):
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, None))
    weight = np.random.default_rng(0).standard_normal((3, 5))
    proto.graph.initializer.append(ir.to_proto(ir.tensor(weight, name="out.weight")))
    teacher = ir.from_proto(proto)
    infer_shapes(teacher)
    student = clone(teacher)
    student.graph.outputs[:] = [value for value in student.graph.outputs if value.name == "y"]
    losses = Losses(squarehead=0)
    assert list(run(student, teacher, losses=losses, names=("out.weight", "fc2.bias")).parameters) == [
        "fc2.bias"
    ]
    with pytest.raises(PassError, match="no weight to train"):
        run(student, teacher, losses=losses, names=("out.weight",))
