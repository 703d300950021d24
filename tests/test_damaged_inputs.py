"""Damaged files end in one clear error wherever they are read: no crash, no partial file, no read outside.

What cannot be told from the file is not refused: the data of a product that runtimes refuse, say. So each
entry of the corpus says what the error says, or that there is none.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import planish
import pytest
from damaged_models import CORPUS, HARMLESS, linear
from onnx import TensorProto, helper
from planish import cli
from planish.ir.errors import ModelError, PlanishError
from typer.testing import CliRunner

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
COMMANDS = ("inspect", "structure", "diff", "compile")
FLIPS, CUTS = 300, 60


# --- what is opened -----------------------------------------------------------------------------------


class _Opened:
    """The files below some folder that Python opened while this was watching."""

    folder: Path | None = None
    paths: list[Path] = []  # noqa: RUF012 (there is one audit hook, and it stays for good)


def _note(event: str, arguments: tuple[object, ...]) -> None:
    path = arguments[0] if event == "open" and arguments else None
    if _Opened.folder is not None and isinstance(path, (str, bytes, os.PathLike)):
        opened = Path(os.path.realpath(os.fsdecode(path)))
        if opened.is_relative_to(_Opened.folder) or opened.parts[:2] == ("/", "dev"):
            _Opened.paths.append(opened)


sys.addaudithook(_note)


@contextlib.contextmanager
def watching(folder: Path) -> Iterator[list[Path]]:
    _Opened.folder, _Opened.paths = folder.resolve(), []
    try:
        yield _Opened.paths
    finally:
        _Opened.folder = None


# --- one error, or none -------------------------------------------------------------------------------


def assert_one_line(error: PlanishError) -> None:
    assert str(error).isprintable()
    assert len(str(error)) < 3000
    unexpected = error.__cause__
    # What the driver makes of an exception that nobody foresaw.
    assert unexpected is None or f": {type(unexpected).__name__}: " not in error.message, error


def write(folder: Path, name: str) -> Path:
    built = CORPUS[name][0]()
    path = folder / "m.onnx"
    path.write_bytes(built if isinstance(built, bytes) else built.SerializeToString())
    return path


@pytest.mark.parametrize("name", CORPUS)
def test_reading_and_compiling(tmp_path: Path, name: str) -> None:
    path, message = write(tmp_path, name), CORPUS[name][1]
    is_read_whole = name not in ("unknown op", "endless op", "facts that are none")
    for read in (planish.load, lambda path: planish.compile(path, target="portable")):
        if message == HARMLESS or (read is planish.load and not is_read_whole):
            read(path)
            continue
        with pytest.raises(PlanishError) as caught:
            read(path)
        assert message in str(caught.value)
        assert_one_line(caught.value)
    assert os.listdir(tmp_path) == ["m.onnx"]


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(cli.err, "_width", 200)
    source = tmp_path / "source"
    source.mkdir()
    for name, (_, message) in CORPUS.items():
        path = write(source, name)
        options = {
            "diff": [path],
            "compile": ["-o", tmp_path / "out.onnx", "--target", "portable", "--report", tmp_path / "r.json"],
        }
        code, output = run(command, path, *options.get(command, []))
        if code == 0:
            for written in tmp_path.glob("*.*"):
                written.unlink()
        else:
            assert code == 1, name
            errors = [line for line in output.splitlines() if line.startswith("error:")]
            assert len(errors) == 1, (name, output)
            # `structure` enumerates channels, and says that no model has so many.
            assert message in errors[0] or "no axis can have so many" in errors[0], (name, output)
        assert sorted(os.listdir(tmp_path)) == ["source"], name
        assert os.listdir(source) == ["m.onnx"], name


@pytest.mark.parametrize("name", ["cycle", "2^40 elements", "line breaks"])
def test_a_process_of_its_own(tmp_path: Path, name: str) -> None:
    words = ["compile", str(write(tmp_path, name)), "-o", str(tmp_path / "out.onnx")]
    script = "from planish.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_little_memory_is_enough_to_say_no(tmp_path: Path) -> None:
    """Whatever a file says of its sizes, one gigabyte beside what the libraries take is enough."""
    names = [name for name in CORPUS if "2^40" in name or "product" in name or "endless" in name]
    for name in names:
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        write(folder, name)
    script = f"""
        import resource, sys
        from pathlib import Path
        import planish, planish.compiler, planish.ir.structure
        from planish.ir.errors import PlanishError
        resource.setrlimit(resource.RLIMIT_AS, (resource_used() + 2**30,) * 2)
        for path in sorted(Path({str(tmp_path)!r}).glob("*/m.onnx")):
            try:
                compiled = planish.compile(path, target="portable")
                planish.ir.structure.discover(compiled.model)
                print("compiled", path.parent.name)
            except PlanishError as error:
                print("refused", path.parent.name)
    """
    used = "int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()"
    script = textwrap.dedent(script).replace("resource_used()", used)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(names)


# --- bits and ends ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources() -> list[bytes]:
    """Random models, in which more can break than in one product."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        random_models = importlib.import_module("random_models")
        return [random_models.random_model(seed, traced=False).proto.SerializeToString() for seed in range(6)]


def read_or_refused(path: Path, *, compiled: bool) -> None:
    try:
        if compiled:
            planish.compile(path, target="portable")
        else:
            planish.load(path)
    except PlanishError as error:
        assert_one_line(error)


def test_flipped_bits(tmp_path: Path, sources: list[bytes]) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "m.onnx"
    for number in range(FLIPS):
        content = bytearray(sources[number % len(sources)])
        for position in rng.integers(0, len(content), rng.integers(1, 4)):
            content[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        read_or_refused(path, compiled=number % 5 == 0)
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_cut_off_ends(tmp_path: Path, sources: list[bytes]) -> None:
    rng = np.random.default_rng(1)
    path = tmp_path / "m.onnx"
    for number in range(CUTS):
        content = sources[number % len(sources)]
        path.write_bytes(content[: rng.integers(len(content))])
        read_or_refused(path, compiled=False)


def test_an_archive_and_inputs_that_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(linear(), path)
    np.savez(tmp_path / "inputs.npz", x=np.ones((1, 3), np.float32))
    whole = (tmp_path / "inputs.npz").read_bytes()
    for content in (b"", b"text", whole[:100], whole[: len(whole) // 2]):
        (tmp_path / "inputs.npz").write_bytes(content)
        code, output = run("compile", path, "-o", tmp_path / "o.onnx", "--inputs", tmp_path / "inputs.npz")
        assert code == 1
        assert "cannot be read as inputs" in output
        assert not (tmp_path / "o.onnx").exists()


# --- weights in other files ---------------------------------------------------------------------------

WEIGHT = np.arange(600, dtype=np.float32).reshape(300, 2)
OUTSIDE = "lies outside of its folder"
MISSING = "which does not exist"
PLACES: dict[str, tuple[dict[str, str], str]] = {
    "beside": ({"location": "w.bin"}, HARMLESS),
    "missing": ({"location": "nothing.bin"}, MISSING),
    "above": ({"location": "../secret.bin"}, OUTSIDE),
    "above, by a detour": ({"location": "folder/../../secret.bin"}, OUTSIDE),
    "absolute": ({"location": "{secret}"}, OUTSIDE),
    "a link out": ({"location": "link.bin"}, OUTSIDE),
    "a linked folder": ({"location": "up/secret.bin"}, OUTSIDE),
    "links in a circle": ({"location": "round"}, MISSING),
    "a pipe": ({"location": "pipe"}, MISSING),
    "a device": ({"location": "/dev/zero"}, MISSING),
    "a link to a device": ({"location": "device"}, MISSING),
    "a folder": ({"location": "folder"}, "which is a folder"),
    "no place": ({}, "which is a folder"),
    "a zero byte": ({"location": "a\0b"}, MISSING),
    "an endless name": ({"location": "a" * 5000}, "cannot be read: File name too long"),
    "offset beyond the end": ({"location": "w.bin", "offset": "4"}, "which is 2400 bytes long"),
    "huge offset": ({"location": "w.bin", "offset": "9" * 40}, "which is 2400 bytes long"),
    "negative offset": ({"location": "w.bin", "offset": "-4"}, "must be non-negative, got -4"),
    "offset that is no number": ({"location": "w.bin", "offset": "abc"}, "'abc'"),
    "too long": ({"location": "w.bin", "length": "2404"}, "but its external data is 2404 bytes long"),
    "negative length": ({"location": "w.bin", "length": "-1"}, "must be non-negative, got -1"),
    "the model itself": ({"location": "m.onnx"}, "m.onnx, which is"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with all kinds of things in it, and beside it a file that must not be read."""
    folder = tmp_path / "model"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "secret.bin").write_bytes(WEIGHT.tobytes())
    (folder / "w.bin").write_bytes(WEIGHT.tobytes())
    os.mkfifo(folder / "pipe")
    links = {"link.bin": "../secret.bin", "up": "..", "round": "round", "device": "/dev/zero"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    return folder


def external(folder: Path, entries: dict[str, str], *, in_attribute: bool) -> Path:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=WEIGHT.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value.format(secret=folder.parent / "secret.bin"))
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[b, 300] x) => (float[b, 2] y) { y = MatMul(x, w) }'
    )
    if in_attribute:
        model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
    else:
        model.graph.initializer.append(tensor)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("in_attribute", [False, True], ids=["initializer", "attribute"])
@pytest.mark.parametrize("place", PLACES)
def test_weights_in_other_files(folder: Path, place: str, in_attribute: bool) -> None:
    entries, message = PLACES[place]
    path = external(folder, entries, in_attribute=in_attribute)
    for read in (planish.load, lambda path: planish.compile(path, target="portable")):
        with watching(folder.parent) as opened:
            if message == HARMLESS:
                read(path)
            else:
                with pytest.raises(ModelError) as caught:
                    read(path)
                assert message in str(caught.value)
                assert_one_line(caught.value)
        assert {path.parent for path in opened} == {folder}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_data_file_that_must_not_be_read(folder: Path) -> None:
    (folder / "w.bin").chmod(0)
    with pytest.raises(ModelError, match="cannot be read: Permission denied"):
        planish.load(external(folder, {"location": "w.bin"}, in_attribute=False))


# --- what planish wrote itself ------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["{", "[1, 2]", "[" * 100_000], ids=["cut", "a list", "deep"])
@pytest.mark.parametrize("key", ["planish.session_options", "planish.report"])
def test_metadata_of_a_compiled_file(tmp_path: Path, key: str, text: str) -> None:
    path = planish.compile(linear(), target="portable").save(tmp_path / "m.onnx")
    model = onnx.load(path)
    kept = [entry for entry in model.metadata_props if entry.key != key]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=key, value=text)
    onnx.save(model, path)
    with pytest.raises(ModelError, match=f"its metadata is damaged: {key}: ") as found:
        planish.CompiledModel.open(path)
    assert_one_line(found.value)
