"""Recurrent layers: RNN, GRU and LSTM, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...ir.errors import TargetError
from .registry import Lowering, standard

Tensor = torch.Tensor
State = tuple[Tensor, ...]
Step = Callable[[Tensor, State], State]
"""From what the input adds to the gates [N, gates · H] and the state to the next state; first of it is H."""
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
}


def rnn(
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
    *,
    activations: Sequence[str] = ("Tanh", "Tanh"),
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> State:
    """``h = f(W x + R h + b)``: all of h [T, directions, N, H], and the last of it."""
    del hidden_size, layout  # the weight has it; the default

    def steps(place: int) -> Step:
        (function,) = _functions(activations, place, 1)
        return lambda added, state: (function(added + state[0] @ recurrence[place].mT),)

    initial = [_initial(x, recurrence, hidden)]
    return _run(steps, x, weight, _whole(bias), lengths, initial, direction)


def gru(
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
    *,
    activations: Sequence[str] = ("Sigmoid", "Tanh") * 2,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> State:
    """Gates update and reset, then the new state: all states [T, directions, N, H], and the last."""
    del hidden_size, layout  # the weight has it; the default
    size = recurrence.shape[-1]
    shape = (recurrence.shape[0], 3 * size)
    of_input, of_state = (x.new_zeros(shape),) * 2 if bias is None else bias.chunk(2, -1)

    def steps(place: int) -> Step:
        gate, function = _functions(activations, place, 2)
        gates, candidate = recurrence[place].split([2 * size, size])
        gates_shift, shift = of_state[place].split([2 * size, size])

        def step(added: Tensor, state: State) -> State:
            (h,) = state
            update, reset = gate(added[:, : 2 * size] + h @ gates.mT + gates_shift).chunk(2, -1)
            if linear_before_reset:
                remembered = reset * (h @ candidate.mT + shift)
            else:
                remembered = (reset * h) @ candidate.mT + shift
            return ((1 - update) * function(added[:, 2 * size :] + remembered) + update * h,)

        return step

    initial = [_initial(x, recurrence, hidden)]
    return _run(steps, x, weight, of_input, lengths, initial, direction)


def lstm(
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    activations: Sequence[str] = ("Sigmoid", "Tanh", "Tanh") * 2,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> State:
    """Gates input, output and forget, and a cell: all states [T, directions, N, H], the last, the last cell.

    ``peepholes`` let the gates see the cell.
    """
    del hidden_size, input_forget, layout  # the weight has it; the defaults
    size = recurrence.shape[-1]

    def steps(place: int) -> Step:
        gate, function, shown = _functions(activations, place, 3)
        views = recurrence.new_zeros(3, size) if peepholes is None else peepholes[place].reshape(3, size)

        def step(added: Tensor, state: State) -> State:
            h, c = state
            entering, leaving, kept, new = (added + h @ recurrence[place].mT).chunk(4, -1)
            c_next = gate(kept + views[2] * c) * c + gate(entering + views[0] * c) * function(new)
            return gate(leaving + views[1] * c_next) * shown(c_next), c_next

        return step

    initial = [_initial(x, recurrence, hidden), _initial(x, recurrence, cell)]
    return _run(steps, x, weight, _whole(bias), lengths, initial, direction)


def _functions(names: Sequence[str], place: int, count: int) -> list[Callable[[Tensor], Tensor]]:
    """The activations of one direction."""
    unknown = [name for name in names if name not in _ACTIVATIONS]
    if unknown:
        raise TargetError(f"torch-fx: recurrent layer with activation {unknown[0]!r} is not lowered")
    return [_ACTIVATIONS[name] for name in names[place * count : (place + 1) * count]]


def _whole(bias: Tensor | None) -> Tensor | None:
    """The shift of the input's part and that of the state's, added up."""
    if bias is None:
        return None
    of_input, of_state = bias.chunk(2, -1)
    return of_input + of_state


def _run(
    steps: Callable[[int], Step],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    initial: Sequence[Tensor],
    direction: str,
) -> State:
    """All results and the last states of each direction."""
    results, finals = [], []
    for place in range(weight.shape[0]):
        added = x @ weight[place].mT
        added = added if bias is None else added + bias[place]
        state = tuple(first[place] for first in initial)
        backward = direction == "reverse" or place == 1
        result, state = _walk(steps(place), added, state, lengths, backward=backward)
        results.append(result)
        finals.append(state)
    return (torch.stack(results, 1), *(torch.stack(last) for last in zip(*finals, strict=True)))


def _walk(
    step: Step, added: Tensor, state: State, lengths: Tensor | None, *, backward: bool
) -> tuple[Tensor, State]:
    """One direction. Behind the end of a sequence, results are 0 and the state stays."""
    results = []
    times = range(len(added))
    for time in reversed(times) if backward else times:
        after = step(added[time], state)
        result = after[0]
        if lengths is not None:
            inside = (time < lengths).unsqueeze(1)
            after = tuple(torch.where(inside, new, old) for new, old in zip(after, state, strict=True))
            result = torch.where(inside, result, 0)
        results.append(result)
        state = after
    return torch.stack(results[::-1] if backward else results), state


def _initial(x: Tensor, recurrence: Tensor, state: Tensor | None) -> Tensor:
    """The first state [directions, N, H], zeros by default."""
    shape = (recurrence.shape[0], x.shape[1], recurrence.shape[-1])
    return x.new_zeros(shape) if state is None else state


OPS = standard(
    {
        "GRU": Lowering(gru, several=True, only={"layout": 0}),
        "LSTM": Lowering(lstm, several=True, only={"input_forget": 0, "layout": 0}),
        "RNN": Lowering(rnn, several=True, only={"layout": 0}),
    }
)
