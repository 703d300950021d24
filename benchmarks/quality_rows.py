"""The pipelines whose quality is measured: data, one row each.

Everything is quantised but lm_head and the embeddings. Text of a pipeline has ``$grid`` where the scheme,
group size and symmetry go, so that passes that search for the same grid are given the same one.
"""

from __future__ import annotations

import dataclasses
import string
from typing import Literal

MODEL, TWIN = "model", "outlier twin"
RTN, GPTQ, GPTAQ = "RTN", "GPTQ", "GPTAQ"
ROTATED_GPTQ, LEARNED_GPTQ = "rotate + GPTQ", "learned + GPTQ"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One pipeline on one model.

    Attributes:
        section: the table that the row is in.
        scheme: as the table shows it.
        method: as the table shows it.
        passes: the pipeline behind ``canonicalize``, as text.
        subject: the model or its outlier twin.
        seed: of the compilation; rotations are drawn with it.
    """

    section: str
    scheme: str
    method: str
    passes: str
    subject: Literal["model", "outlier twin"] = MODEL
    seed: int = 0

    @property
    def key(self) -> str:
        """A unique name."""
        return f"{self.subject}: {self.scheme}: {self.method}"

    @property
    def rtn_key(self) -> str:
        """The row whose gap to the dense model this one closes a share of."""
        return f"{self.subject}: {self.scheme}: {RTN}"


_QUANTIZE = "quantize{$grid,embeddings=false"
_AWQ = "scale{method=awq,$grid}"
_ROTATE = "fold-norms,rotate{rotations=[R1,R2,R4],kind=random-hadamard}"
_LEARNED = "fold-norms,rotate{rotations=[R1,R2,R4],kind=learned,steps=40,sequences=5}"

WEIGHT_METHODS = {
    RTN: _QUANTIZE + ",clip=false}",
    "RTN clip": _QUANTIZE + ",clip=true}",
    GPTQ: _QUANTIZE + ",algorithm=gptq}",
    GPTAQ: _QUANTIZE + ",algorithm=gptaq}",
    "AWQ + GPTQ": f"{_AWQ},{_QUANTIZE},algorithm=gptq}}",
}
PUBLISHED = {"GPTQ as published": _QUANTIZE + ",algorithm=gptq,clip=false,sweeps=0,act_order=false}"}
SYMMETRIC_METHODS = {name: WEIGHT_METHODS[name] for name in (RTN, "RTN clip", GPTQ)}
ACTIVATION_METHODS = {
    RTN: _QUANTIZE + "}",
    GPTQ: _QUANTIZE + ",algorithm=gptq}",
    "rotate + RTN": f"{_ROTATE},{_QUANTIZE}}}",
    ROTATED_GPTQ: f"{_ROTATE},{_QUANTIZE},algorithm=gptq}}",
    LEARNED_GPTQ: f"{_LEARNED},{_QUANTIZE},algorithm=gptq}}",
}
GROUPS = {"per channel": -1, "g64": 64, "g32": 32}


def _grid(scheme: str, group_size: int) -> str:
    return f"scheme={scheme},group_size={group_size}"


def _rows(section: str, scheme: str, grid: str, methods: dict[str, str], subject: str = MODEL) -> list[Row]:
    return [
        Row(
            section=section,
            scheme=scheme,
            method=method,
            passes=string.Template(text).substitute(grid=grid),
            subject=subject,  # type: ignore[arg-type]
        )
        for method, text in methods.items()
    ]


def weight_rows() -> list[Row]:
    """Weights only: bits, groups and algorithms."""
    rows = _rows("Weights", "W8A16", _grid("W8A16_ASYM", -1), {RTN: WEIGHT_METHODS[RTN]})
    for bits in (4, 3, 2):
        for group, size in GROUPS.items():
            grid = _grid(f"W{bits}A16_ASYM", size)
            methods = WEIGHT_METHODS if size > 0 else WEIGHT_METHODS | PUBLISHED
            rows += _rows("Weights", f"W{bits}A16 {group}", grid, methods)
    for group, size in GROUPS.items():
        grid = _grid("W4A16", size)
        rows += _rows("Symmetric weights", f"W4A16 {group} symmetric", grid, SYMMETRIC_METHODS)
    return rows


def side_matrix_rows() -> list[Row]:
    """Two bits with something beside the integers: outliers, or a low-rank residual."""
    section = "Two bits and a side matrix"
    rows = []
    for group, size in (("g16", 16), ("g32", 32), ("g64", 64)):
        grid = _grid("W2A16_ASYM", size)
        spqr = {f"SpQR {group}": _QUANTIZE + ",algorithm=spqr}"}
        rows += _rows(section, "W2A16", grid, spqr)
    fewer = {"SpQR g64, at most 0.8 % outliers": _QUANTIZE + ",algorithm=spqr,outlier_share=0.008}"}
    rows += _rows(section, "W2A16", _grid("W2A16_ASYM", 64), fewer)
    for group, size, rank in (("per channel", -1, 2), ("per channel", -1, 4), ("g64", 64, 2)):
        grid = _grid("W2A16_ASYM", size)
        for method, algorithm in ((GPTQ, "gptq"), (GPTAQ, "gptaq")):
            text = f"{_QUANTIZE},algorithm={algorithm},compensate_rank={rank}}}"
            rows += _rows(section, "W2A16", grid, {f"{method} {group} + EoRA rank {rank}": text})
    return rows


def activation_rows() -> list[Row]:
    """Weights and activations, on the model and on its outlier twin."""
    return [
        row
        for subject in (MODEL, TWIN)
        for scheme in ("W4A8", "W4A4")
        for row in _rows(
            "Weights and activations", scheme, _grid(scheme, -1), ACTIVATION_METHODS, subject=subject
        )
    ]


def seed_rows() -> list[Row]:
    """The same pipeline with other random rotations: how far apart equal methods are."""
    grid = _grid("W4A4", -1)
    (row,) = _rows(
        "Other draws of the rotation", "W4A4", grid, {ROTATED_GPTQ: ACTIVATION_METHODS[ROTATED_GPTQ]}
    )
    return [
        dataclasses.replace(row, method=f"{row.method}, seed {seed}", seed=seed, subject=TWIN)
        for seed in (1, 2, 3)
    ]


DECODER_ROWS = (*weight_rows(), *side_matrix_rows(), *activation_rows(), *seed_rows())

W4_GPTQ, W8_TENSOR, W8_GOAL = "W4A16 GPTQ", "W8A8 per tensor GPTQ", "W8A8 per token"
SENTENCE_PIPELINES = {
    "W4A16 RTN": "canonicalize,fuse,quantize{scheme=W4A16_ASYM,group_size=32}",
    W4_GPTQ: "canonicalize,fuse,quantize{scheme=W4A16_ASYM,group_size=32,algorithm=gptq}",
    "W8A8 per tensor": "canonicalize,fuse,quantize{scheme=W8A8,reduce_range=true}",
    W8_TENSOR: "canonicalize,fuse,quantize{scheme=W8A8,reduce_range=true,algorithm=gptq}",
    "W8A8 per tensor SmoothQuant": (
        "canonicalize,scale{method=smoothquant},fuse,quantize{scheme=W8A8,reduce_range=true}"
    ),
    W8_GOAL: "canonicalize,fuse,quantize{scheme=W8A8,activations=token,reduce_range=true}",
}
"""By name. ``reduce_range`` asks for the grid of processors without VNNI, the coarser one."""
