"""The pass protocol: what a pass is, what it may ask of the world, and what it answers.

A pass is a frozen dataclass; its fields are its options, read alike by Python, the command line and YAML.
It rewrites the model in place and never opens a session, a file or a progress bar itself: the driver hands
it a `PassContext` for that.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import onnx_ir as ir

from ...codegen.target import Target
from ...ir.errors import MissingDataError, PassError
from ...runtime.calibration import ActivationStream
from ...runtime.work_cache import Work
from ...runtime.workers import LocalWorkers, Workers

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")
Feeds = Mapping[str, np.ndarray[Any, Any]]
ProgressHook = Callable[[Iterator[Any], int, str], Iterator[Any]]


class Fact(enum.Enum):
    """Something that is true of a model between two passes; passes require, establish and destroy facts."""

    CANONICAL = "canonical"
    """The canonical form holds: linears own their weights, attention, rotary and norms are single nodes."""
    FUSED = "fused"
    """Linears that read the same input are merged and activations are single nodes."""
    QUANTIZED = "quantized"
    """Some linears are quantised: their weights can no longer be rotated, scaled or pruned."""


class Contract(enum.Enum):
    """What a pass promises about the function that the model computes."""

    EXACT = "exact"
    """The outputs agree to floating-point reassociation; checked against `Pass.tolerance`."""
    APPROXIMATE = "approximate"
    """The outputs change on purpose; the error caused is measured and reported."""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """One thing a pass looked at and left alone."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """What a pass covered of what it looked at, for example 187 of 196 linears."""

    unit: str
    covered: int
    skipped: tuple[Skipped, ...] = ()
    required: bool = True
    """Covering nothing is an error (asked-for work), not just a remark."""

    @property
    def total(self) -> int:
        """How many there were: covered and skipped."""
        return self.covered + len(self.skipped)

    def __str__(self) -> str:
        text = f"{self.covered} of {self.total} {self.unit}"
        if not self.skipped:
            return text
        reasons: dict[str, int] = {}
        for skip in self.skipped:
            reasons[skip.reason] = reasons.get(skip.reason, 0) + 1
        return f"{text}; {len(self.skipped)} skipped: " + ", ".join(
            f"{reason} ({count})" if len(reasons) > 1 else reason for reason, count in reasons.items()
        )


@dataclasses.dataclass(frozen=True)
class LayerErrors:
    """What a pass that approximates weights did to one layer.

    Attributes:
        weight: ‖W − Ŵ‖ / ‖W‖.
        output: ‖X(W − Ŵ)‖ / ‖XW‖ on the calibration data; None without.
    """

    weight: float
    output: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassResult:
    """What a pass did.

    Attributes:
        modified: the model is not what it was.
        coverage: what was covered of what was looked at.
        statistics: counts of rewrites by rule name.
        layers: errors by the names of the layers, for passes that approximate weights.
        redefined_outputs: graph outputs that a pass gives in another form on purpose, or no longer gives:
            the rotated keys of a cache, or those of a dropped layer. A cache that was filled before does not
            fit any more.
        alternatives: further results of the pass beside the model that it rewrote, by a short label: the rest
            of the pipeline is run on each of them, too.
    """

    modified: bool
    coverage: Coverage | None = None
    statistics: Mapping[str, int] = dataclasses.field(default_factory=dict)
    layers: Mapping[str, LayerErrors] = dataclasses.field(default_factory=dict)
    redefined_outputs: frozenset[str] = frozenset()
    alternatives: Mapping[str, ir.Model] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Remark:
    """A sentence that a pass says about one node or one weight."""

    subject: str
    text: str


class PassContext:
    """What a pass may ask of the world. The driver makes one for each pass that it runs.

    Attributes:
        target: where the model will run; answers what its kernels can do and cost.
        examples: real inputs, each a mapping from graph-input name to array; may be empty.
        calibration: further real inputs, see `planish.runtime.calibration`; may be empty.
        training: inputs to train on, each a batch by graph-input name, with ``labels`` where the user gave
            them; the calibration data where nothing else was given.
        workers: who does work that falls into independent pieces; threads of this process if none were given.
        rng: a generator seeded by the pipeline's seed, the pass's name, and how often it ran before.
        remarks: what the pass has said so far.
        on_progress: set by the driver; wraps the iterator of a `progress` loop to show how far it is, given
            the iterator, the number of items and the description.
    """

    def __init__(
        self,
        *,
        target: Target,
        examples: Sequence[Feeds] = (),
        calibration: Iterable[Feeds] = (),
        training: Sequence[Feeds] = (),
        original: ir.Model | None = None,
        open_work: Callable[[ir.Model], Work] | None = None,
        workers: Workers | None = None,
        seed: int | Sequence[int] = 0,
    ) -> None:
        self.target = target
        self.examples = examples
        self.calibration = calibration if isinstance(calibration, Sequence) else tuple(calibration)
        self.training = training or self.calibration
        self._original = original
        self._open_work = open_work
        self._work: Work | None = None
        self.workers: Workers = LocalWorkers() if workers is None else workers
        self.rng = np.random.default_rng(seed)
        self.remarks: list[Remark] = []
        self.on_progress: ProgressHook | None = None

    def remark(self, subject: ir.Node | ir.Value | str, text: str) -> None:
        """Say something about a node or weight: why it was skipped, or what fell back."""
        name = subject if isinstance(subject, str) else (subject.name or repr(subject))
        self.remarks.append(Remark(name, text))

    @property
    def original(self) -> ir.Model:
        """The model as it was before the first pass of the pipeline that changes its function. Not changed.

        Kept only where a pass of the pipeline says `Pass.uses_original`.
        """
        if self._original is None:
            raise PassError("no original was kept: the pass does not say that it uses it")
        return self._original

    def work(self, model: ir.Model) -> Work:
        """What is kept of this pass's long work on a model, for a run that goes on after it was killed.

        Nothing is kept of a pass that is run by itself; its folder is gone with this context.

        Args:
            model: not rewritten yet; the first call decides.
        """
        if self._work is None:
            if self._open_work is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="planish-")
                self._work = Work(Path(self._temporary.name), keeps=False)
            else:
                self._work = self._open_work(model)
        return self._work

    def activation_stream(self, model: ir.Model, *, releases_weights: bool = False) -> ActivationStream:
        """The calibration data at the beginning of ``model``, to be moved on block by block.

        Raises:
            InputError: there is no calibration data.
        """
        if not self.calibration:
            raise MissingDataError(
                "this needs calibration data, and there is none",
                hint="give compile(..., calibration=inputs), or --calibration inputs.npz",
            )
        return ActivationStream(model, self.calibration, releases_weights=releases_weights)

    def progress(self, items: Sequence[T], description: str) -> Iterator[T]:
        """Iterate ``items`` and let the driver's instruments show how far the work is."""
        iterator = iter(items)
        return self.on_progress(iterator, len(items), description) if self.on_progress else iterator

    def map(
        self, function: Callable[[S, T], R], shared: S, items: Iterable[T], *, total: int, description: str
    ) -> Iterator[R]:
        """Have the workers do ``function(shared, item)`` for ``total`` items, and show how far they are.

        See `planish.runtime.workers.Workers.map`, also for what a function may be.
        """
        results = self.workers.map(function, shared, items)
        return self.on_progress(results, total, description) if self.on_progress else results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass(abc.ABC):
    """Base of all passes. Subclasses are frozen dataclasses whose fields are the options."""

    name: ClassVar[str]
    contract: ClassVar[Contract] = Contract.EXACT
    requires: ClassVar[frozenset[Fact]] = frozenset()
    establishes: ClassVar[frozenset[Fact]] = frozenset()
    destroys: ClassVar[frozenset[Fact]] = frozenset()
    forbids: ClassVar[frozenset[Fact]] = frozenset()
    """Facts that must not hold: a rotation forbids `Fact.QUANTIZED`."""
    uses_original: ClassVar[bool] = False
    """Whether the pass reads `PassContext.original`, such as a teacher or what a speed-up is relative to."""
    works_by_layer: ClassVar[bool] = True
    """Whether what it does to one layer says what it does to others like it: a plan is made from a few."""
    tolerance: ClassVar[float] = 1e-4
    """Exact passes: the largest allowed ‖after − before‖∞ / ‖before‖∞ of any float32 output."""

    @abc.abstractmethod
    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Rewrite ``model`` in place."""

    @property
    def training_steps(self) -> int | None:
        """How often it repeats a step of training, by its option ``steps``; None: it does not train."""
        steps = getattr(self, "steps", None)
        return steps if isinstance(steps, int) and steps > 0 else None

    def changed_options(self) -> dict[str, Any]:
        """The options that differ from their defaults, in order of definition."""
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            value = getattr(self, field.name)
            if field.init and (default is dataclasses.MISSING or value != default):
                changed[field.name] = value
        return changed
