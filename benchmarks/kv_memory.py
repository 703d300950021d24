"""Bytes of a key-value cache, and of generating, as computed and as measured; and a long run in a window.

Each row is a process of its own, which compiles a random Llama (16 layers, hidden 1,024, 4 heads of keys and
values), saves it, and starts another one that opens the file and generates: so nothing of compiling is
measured. Freed memory goes back to the system as in `planish generate`. Measured are the growth of resident
memory at its peak over that before the model was opened, and what one more token of context takes, from runs
at two lengths.

    python benchmarks/kv_memory.py                 # writes results/kv_memory.md
    python benchmarks/kv_memory.py --long 0        # without the long run in a window of 1,024 tokens; prints
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import decode_speed
import numpy as np
import planish
import torch
from planish.runtime.heap import give_back_large_blocks
from rich.console import Console
from sentence_embeddings import processor

LENGTHS = (1024, 4096)
_NEW = 32
_CHUNK = 256
SCHEMES = ("float32", "W4A16", "W4A16, int8 cache", "W4A16, int4 cache", "W4A8 by channel")
"""Of `decode_speed`."""
_FAST_PREFILL = "W4A8 by channel"
"""The scheme that is saved with kernels of their own for prompts, too."""
_WINDOW = (
    "canonicalize,fuse,quantize{scheme=W4A16,group_size=128,ignore=[],algorithm=rtn},"
    "evict{policy=recent,keep=0,tokens=1024,sinks=4,recent=1020,renumber=true},last-logits"
)
_RESULTS = Path(__file__).parent / "results" / "kv_memory.md"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one run.

    Attributes:
        stated: what `CompiledModel.memory` says, in bytes.
        peak: growth of resident memory, in bytes.
        cache: bytes of the cache's buffers.
        stated_per_token: of the cache.
        samples: resident bytes after every so many tokens of a long run.
    """

    stated: int
    peak: int
    cache: int
    stated_per_token: int
    samples: tuple[int, ...] = ()


def run(folder: Path, length: int, new: int, every: int) -> Measured:
    """Open a folder and generate behind a prompt, in this process."""
    give_back_large_blocks()
    before = resident()
    compiled = planish.CompiledModel.open(folder)
    prompt = np.random.default_rng(0).integers(0, decode_speed.VOCABULARY, (1, length - new))
    samples: list[int] = []
    count = 0

    def look(_tokens: object) -> None:
        nonlocal count
        count += 1
        if count % 1000 == 0:
            samples.append(resident())

    fast = compiled.has_fast_prefill
    decoder = compiled.decoder(capacity=length, fast_prefill=fast)
    compiled.generate(prompt, new, decoder=decoder, chunk=_CHUNK, evict_every=every, stream=look)
    stated = compiled.memory(1, length, chunk=_CHUNK, fast_prefill=fast)
    return Measured(
        stated=stated.total,
        peak=resident("VmHWM") - before,
        cache=decoder.cache.bytes,
        stated_per_token=stated.bytes_per_token,
        samples=tuple(samples),
    )


def resident(name: str = "VmRSS") -> int:
    """Of this process, in bytes: now, or at its peak (``VmHWM``)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def in_process(folder: Path, length: int, new: int, every: int = 0) -> Measured:
    """The same in a new process."""
    words = [sys.executable, __file__, "--run", str(folder), str(length), str(new), str(every)]
    process = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    fields = json.loads(process.stdout.splitlines()[-1])
    return Measured(**{**fields, "samples": tuple(fields["samples"])})


def lines(found: dict[str, dict[int, Measured]]) -> list[str]:
    """Markdown."""
    result = [
        "# Memory of generating",
        "",
        f"{processor()}. Random Llama as in decode_speed.md, batch 1, prompt in chunks of {_CHUNK}. MB are "
        "10⁶ bytes of resident memory at its peak, over what the process had before it opened the model. "
        "Written by `benchmarks/kv_memory.py`.",
        "",
        "| | tokens | stated MB | measured MB | off | cache bytes per token, computed | in its buffers |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, by_length in found.items():
        for length, one in by_length.items():
            result.append(
                f"| {name} | {length:,} | {one.stated / 1e6:,.0f} | {one.peak / 1e6:,.0f} "
                f"| {one.stated / one.peak - 1:+.1%} | {one.stated_per_token:,} | {one.cache / length:,.0f} |"
            )
    return [*result, ""]


def long_lines(one: Measured, new: int) -> list[str]:
    """Of the long run."""
    series = ", ".join(f"{sample / 1e6:,.0f}" for sample in one.samples)
    return [
        "## A long run",
        "",
        f"{new:,} tokens in a window of 1,024 (4 sinks), renumbered, evicted every 256 tokens. The cache's "
        f"buffers take {one.cache / 1e6:,.1f} MB. Resident memory of the process after each 1,000 tokens, in "
        "MB:",
        "",
        series,
        "",
    ]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--long", type=int, default=20000, help="tokens of the long run; 0 for none")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        folder, length, new, every = arguments.run
        print(json.dumps(dataclasses.asdict(run(Path(folder), int(length), int(new), int(every)))))
        return
    torch.set_grad_enabled(False)
    console = Console(width=160, highlight=False)
    found: dict[str, dict[int, Measured]] = {}
    graph = decode_speed.traced(decode_speed.module())
    with tempfile.TemporaryDirectory() as name:
        for scheme in SCHEMES:
            folder = Path(name) / "decoder"
            compiled = decode_speed.compiled(graph, decode_speed.SCHEMES[scheme])
            for fast in (False, True) if scheme == _FAST_PREFILL else (False,):
                compiled.save(folder, fast_prefill=fast)
                title = f"{scheme}, two sets of kernels" if fast else scheme
                found[title] = {length: in_process(folder, length, _NEW) for length in LENGTHS}
                console.print(f"[dim]{title}: {found[title]}[/dim]")
            del compiled
        text = lines(found)
        if arguments.long:
            folder = Path(name) / "window"
            decode_speed.compiled(graph, _WINDOW).save(folder)
            text += long_lines(in_process(folder, arguments.long + 64, arguments.long, 256), arguments.long)
            _RESULTS.write_text("\n".join(text))
        else:
            print("\n".join(text))


if __name__ == "__main__":
    main()
