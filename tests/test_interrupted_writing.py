"""Ctrl-C and full disks: whatever is written is there whole, old or new, and nothing else is left.

Ctrl-C is raised at every call of the operating system in turn, before it is made and after it was. Full disks
are small file systems in memory, with more and more room.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import onnx
import onnx.parser
import planish
import pytest
from planish import cli
from planish.codegen import get_target
from planish.codegen.machine import fingerprint
from planish.codegen.target import BoundModel
from planish.ir import load, save
from planish.ir.errors import ModelError, PassError
from planish.ir.files import move_all, write_text
from planish.passes.infrastructure.driver import run_pipeline
from planish.passes.infrastructure.instruments import CrashReproducer, DumpAfterEachPass
from planish.passes.infrastructure.pipeline import Pipeline
from planish.passes.prune.memory import Memory
from planish.runtime.folder import save_folder
from planish.runtime.latency_table import LatencyTable
from planish.runtime.training.checkpoint import Checkpoint, CheckpointFile
from typer.testing import CliRunner

CALLS = frozenset({"close", "fsync", "mkdir", "open", "replace", "rmdir", "tofile", "unlink", "write"})
TARGET = get_target("portable")
Content = dict[str, bytes]


def network(seed: int = 0) -> onnx.ModelProto:
    """Two linears, one of them large enough to be written by itself."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[b, 40] x) => (float[b, 3] y) { h = MatMul(x, "up.weight") y = MatMul(h, "down.weight") }""")
    rng = np.random.default_rng(seed)
    for name, shape in {"up.weight": (40, 30), "down.weight": (30, 3)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def content_of(folder: Path) -> Content:
    """By name; of folders, that they are there."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


# --- Ctrl-C at every moment ---------------------------------------------------------------------------


class Interruption(BaseException):
    """Like KeyboardInterrupt, which pytest would take for its own."""


def is_counted(function: object) -> bool:
    if getattr(function, "__name__", "") not in CALLS:
        return False
    owner = getattr(function, "__self__", None)
    # Not the methods of texts that have the same names.
    is_module = getattr(owner, "__name__", "") in ("posix", "_io", "io")
    return is_module or isinstance(owner, (io.IOBase, np.ndarray))


@contextlib.contextmanager
def interrupted(at: int, by: Callable[[], BaseException] = Interruption) -> Iterator[list[str]]:
    """Raises before or after one of the calls in this context; gives their names."""
    seen: list[str] = []

    def watch(frame: FrameType, event: str, argument: object) -> None:
        del frame
        if event in ("c_call", "c_return") and is_counted(argument):
            seen.append(f"{event} {getattr(argument, '__name__', '')}")
            if len(seen) == at + 1:
                sys.setprofile(None)
                raise by()

    sys.setprofile(watch)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def moments(action: Callable[[], object]) -> int:
    """How many calls an action makes, counting both ends of each."""
    with interrupted(-1) as seen:
        action()
    return len(seen)


def assert_old_or_new(
    tmp_path: Path, before: Callable[[Path], object], write: Callable[[Path], object]
) -> None:
    """``write`` changes the folder that ``before`` has filled to what it is meant to be, or not at all."""

    def fresh(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        before(folder)
        return folder

    old = content_of(fresh("old"))
    write(fresh("first"))  # which may import modules
    counted = fresh("counted")
    count, new = moments(lambda: write(counted)), content_of(counted)
    assert old != new
    assert count >= 8
    found = set()
    for moment in range(count):
        folder = fresh(str(moment))
        with pytest.raises(Interruption), interrupted(moment) as seen:
            write(folder)
        content = content_of(folder)
        assert content in (old, new), f"after {seen[-3:]}: {sorted(content)}"
        found.add(content == new)
        shutil.rmtree(folder)
    assert False in found


def nothing(folder: Path) -> None:
    del folder


def older(folder: Path) -> None:
    """A model with its weights in one file, and one with its weights in another."""
    save(load(network(1)), folder / "m.onnx")
    save(load(network(1)), folder / "e.onnx", external_data=True)


@pytest.mark.parametrize("before", [nothing, older])
def test_a_model_in_one_file(tmp_path: Path, before: Callable[[Path], None]) -> None:
    model = load(network(2))
    assert_old_or_new(tmp_path, before, lambda folder: save(model, folder / "m.onnx"))


@pytest.mark.parametrize("before", [nothing, older])
def test_a_model_in_two_files(tmp_path: Path, before: Callable[[Path], None]) -> None:
    model = load(network(2))
    assert_old_or_new(tmp_path, before, lambda folder: save(model, folder / "e.onnx", external_data=True))


def with_folder(folder: Path) -> None:
    """What an earlier model left, kernels for prompts among it."""
    (folder / "model").mkdir()
    for name in ("model.onnx", "model.onnx.data", "prefill.onnx", "tokenizer.json", "notes.txt"):
        (folder / "model" / name).write_text(f"old {name}")


@pytest.mark.parametrize("before", [nothing, with_folder])
def test_a_folder(tmp_path: Path, before: Callable[[Path], None]) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    bound = BoundModel(model=load(network(2)))

    def write(folder: Path) -> None:
        save_folder(bound, folder / "model", tokenizer=tokenizer, external_data=True)

    assert_old_or_new(tmp_path, before, write)


def latency_table(batch: int) -> LatencyTable:
    return LatencyTable(
        target="portable",
        machine=fingerprint(),
        runtime="onnxruntime",
        threads=None,
        batch=batch,
        sequence=8,
        deployed_with="",
        total=1.0,
        seconds={},
    )


def remember(folder: Path, name: str) -> None:
    memory = Memory(folder / "losses.json", "key")
    memory.get(name, lambda: [1.0])
    memory.write()


WRITERS: dict[str, Callable[[Path, int], object]] = {
    "text": lambda folder, number: write_text(folder / "report.json", json.dumps([number] * 5000)),
    "latency table": lambda folder, number: latency_table(number + 1).save(folder / "table.json"),
    "memory": lambda folder, number: remember(folder, f"measurement {number}"),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("is_first", [True, False])
def test_files_of_passes_and_reports(tmp_path: Path, name: str, is_first: bool) -> None:
    write = WRITERS[name]
    before = nothing if is_first else lambda folder: write(folder, 1)
    assert_old_or_new(tmp_path, before, lambda folder: write(folder, 2))


def test_checkpoints(tmp_path: Path) -> None:
    """torch writes them by itself, with their own names in them."""

    def write(step: int) -> None:
        CheckpointFile(tmp_path, "key").save(
            Checkpoint(step=step, parameters={}, optimizer=None, hook={}, before={})
        )

    write(0)
    count = moments(lambda: write(1))
    for moment in range(count):
        step = 2 + moment
        with pytest.raises(Interruption), interrupted(moment):
            write(step)
        (path,) = tmp_path.iterdir()
        kept = CheckpointFile(tmp_path, "key").load()
        assert path.suffix == ".pt"
        assert kept is not None
        assert kept.step in (1, step - 1, step)


def test_dumps_are_whole_as_far_as_they_are_there(tmp_path: Path) -> None:
    pipeline = Pipeline.of("canonicalize")

    def write(folder: Path) -> None:
        run_pipeline(load(network()), pipeline, target=TARGET, instruments=[DumpAfterEachPass(folder)])

    count = moments(lambda: write(tmp_path / "whole"))
    whole = content_of(tmp_path / "whole")
    assert len(whole) == 4
    for moment in range(count):
        folder = tmp_path / str(moment)
        with contextlib.suppress(Interruption), interrupted(moment):
            write(folder)
        content = content_of(folder) if folder.exists() else {}
        assert content.items() <= whole.items()


def test_moving_many_files_can_be_interrupted_while_it_is_undone(tmp_path: Path) -> None:
    """The third file has nowhere to go; on the way back Ctrl-C comes."""

    def attempt(folder: Path) -> None:
        sources = [folder / f"new {number}" for number in range(3)]
        targets = [folder / "0", folder / "1", folder / "nowhere" / "2"]
        move_all(sources, targets)

    def prepare(folder: Path) -> Content:
        folder.mkdir()
        for number in range(3):
            (folder / f"new {number}").write_text("new")
        (folder / "0").write_text("old")
        (folder / "gone").write_text("old")
        return content_of(folder)

    before = prepare(tmp_path / "counted")
    with interrupted(-1) as seen, pytest.raises(FileNotFoundError):
        attempt(tmp_path / "counted")
    assert content_of(tmp_path / "counted") == before
    for moment in range(len(seen)):
        prepare(tmp_path / str(moment))
        with pytest.raises((Interruption, FileNotFoundError)), interrupted(moment):
            attempt(tmp_path / str(moment))
        assert content_of(tmp_path / str(moment)) == before


# --- no space left ------------------------------------------------------------------------------------


def no_space() -> OSError:
    return OSError(28, "No space left on device")


@pytest.mark.parametrize("external", [False, True])
def test_no_space_at_any_moment_is_one_clear_error(tmp_path: Path, external: bool) -> None:
    model = load(network(2))

    def write(folder: Path) -> None:
        save(model, folder / "e.onnx", external_data=external)

    folders = [tmp_path / name for name in ("old", "new")]
    for folder in folders:
        folder.mkdir()
        older(folder)
    count = moments(lambda: write(folders[1]))
    for moment in range(count):
        folder = tmp_path / str(moment)
        shutil.copytree(folders[0], folder)
        message = "cannot be written: No space left on device"
        with pytest.raises(ModelError, match=message), interrupted(moment, no_space):
            write(folder)
        assert content_of(folder) in map(content_of, folders)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def fill(disk: Path, left: int) -> None:
    """Let so many KiB be left."""
    used = disk / "used"
    used.unlink(missing_ok=True)
    free = shutil.disk_usage(disk).free
    used.write_bytes(bytes(max(0, free - left * 1024)))


def write_command(disk: Path, *options: str) -> str:
    result = CliRunner().invoke(cli.app, ["compile", str(disk / "m.onnx"), *options, "--target", "portable"])
    assert isinstance(result.exception, SystemExit) or result.exception is None, result.exception
    return result.output if result.exit_code else ""


@pytest.mark.parametrize("left", [0, 4, 8, 12])
@pytest.mark.parametrize("options", [("--external-data",), (), ("--report", "r.json", "--dump", "dump")])
def test_a_full_disk(
    disk: Path, monkeypatch: pytest.MonkeyPatch, left: int, options: tuple[str, ...]
) -> None:
    """The model needs 5 KB and a bit."""
    monkeypatch.chdir(disk)
    save(load(network()), disk / "m.onnx")
    save(load(network(1)), disk / "o.onnx")
    fill(disk, left)
    before = content_of(disk)
    output = write_command(disk, "-o", "o.onnx", *options)
    after = content_of(disk)
    if output:
        assert len([line for line in output.splitlines() if line.startswith("error:")]) == 1, output
        assert "No space left on device" in output
    whole = [name for name in after if name.endswith(".onnx")]
    for name in whole:
        onnx.checker.check_model(str(disk / name))
    assert not [name for name in after if name.startswith(".") or "/." in name]
    if left == 0:
        assert {name: text for name, text in after.items() if name != "dump"} == before


def test_a_full_cache_costs_time_only(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(disk / "cache"))
    fill(disk, 0)
    target = get_target("onnxruntime-cpu", rows=(1,))
    planish.compile(network(), "canonicalize,quantize{scheme=W8A16}", target=target)
    assert not [path for path in (disk / "cache").rglob("*") if path.is_file()]


def test_a_reproducer_that_finds_no_room_does_not_hide_the_error(disk: Path) -> None:
    fill(disk, 0)

    reproducer = CrashReproducer(disk / "crash")
    pipeline = Pipeline.of("canonicalize,quantize{targets=[nothing]}")
    with pytest.raises(PassError, match="covered nothing") as caught:
        run_pipeline(load(network()), pipeline, target=TARGET, instruments=[reproducer])
    assert re.match("no reproducer: .*No space left on device", caught.value.__notes__[-1])


# --- the program --------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_program_with_130_and_leaves_the_old_file(tmp_path: Path) -> None:
    """The signal comes while the weights are being written, which take as long as a pipe blocks."""
    old = b"what was there"
    (tmp_path / "out.onnx").write_bytes(old)
    onnx.save(network(), tmp_path / "m.onnx")
    script = f"""
import os, signal, sys
from planish import cli
import planish.ir.files
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
fsync = os.fsync
def stop(descriptor):
    os.kill(os.getpid(), signal.SIGINT)
    fsync(descriptor)
os.fsync = stop
sys.argv = ["planish", "compile", {str(tmp_path / "m.onnx")!r}, "-o", {str(tmp_path / "out.onnx")!r}]
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert content_of(tmp_path) == {"m.onnx": (tmp_path / "m.onnx").read_bytes(), "out.onnx": old}
