"""A wheel built from the tree works without the tree, and the rooms keep their floors."""

import subprocess
import sys
import zipfile
from pathlib import Path

import planish
import pytest

ROOT = Path(planish.__file__).parent


def test_every_room_is_in_the_package_list():
    import tomllib

    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    rooms = ("ir", "codegen", "runtime", "passes", "search", "planning")
    found = {"planish"} | {
        ".".join(("planish", *folder.parent.relative_to(ROOT).parts))
        for room in rooms
        for folder in (ROOT / room).rglob("__init__.py")
    }
    assert declared == found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(source),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "planish/compiler.py" in names
    assert "planish/py.typed" in names
    assert "planish/codegen/cuda/kernels/w4a16.cu" in names
    assert "planish/codegen/cuda/kernels/primitives.cuh" in names
    assert "planish/runtime/report_html/page.html" in names
    assert not [name for name in names if name.startswith(("planish/tests", "planish/benchmarks"))]


def test_wheel_compiles_a_model_without_the_source_tree(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(tmp_path / "site")], check=True)
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
# An editable install's import hook would answer before sys.path does.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import numpy as np, onnx, planish
assert planish.__file__.startswith({str(tmp_path)!r}), planish.__file__
model = onnx.parser.parse_model('''<ir_version: 11, opset_import: ["" : 23]>
g (float[n, 4] x) => (float[n, 4] y) {{ a = Identity(x) y = Relu(a) }}''')
compiled = planish.compile(model, "canonicalize,fuse", target="portable")
out = compiled.run({{"x": -np.ones((2, 4), np.float32)}})["y"]
assert (out == 0).all() and len(compiled.model.graph) == 1
compiled.save("relu.onnx")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "relu.onnx").exists()
