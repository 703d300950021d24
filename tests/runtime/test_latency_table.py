"""Latency tables as files and as text, and which of them are refused."""

from __future__ import annotations

import json
import os

import pytest
from planish.codegen.machine import fingerprint
from planish.codegen.portable import Portable
from planish.ir.errors import InputError
from planish.runtime.latency_bench import RUNTIME, target_text
from planish.runtime.latency_table import LatencyTable

TARGET = Portable()
SECONDS = {"one": {8: 0.004, 4: 0.003, 0: 0.0}, "two": {8: 0.004, 4: 0.003, 0: 0.0}, "three": {6: 0.002}}


def make_table(**changes) -> LatencyTable:
    fields = {
        "target": target_text(TARGET),
        "machine": fingerprint(),
        "runtime": RUNTIME,
        "threads": None,
        "batch": 1,
        "sequence": 128,
        "deployed_with": "fuse",
        "total": 0.02,
        "seconds": SECONDS,
    }
    return LatencyTable(**{**fields, **changes})


CHECKED = {"target": TARGET, "batch": 1, "sequence": 128, "deployed_with": "fuse", "levels": {"one": [8, 0]}}


def test_saved_and_loaded(tmp_path):
    table = make_table()
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_saving_replaces_the_file_or_leaves_it_alone(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    make_table().save(path)
    before = path.read_text()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        make_table(batch=2).save(path)
    assert path.read_text() == before
    assert [found.name for found in tmp_path.iterdir()] == ["table.json"]


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: cannot be read: No such file"):
        LatencyTable.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be written: No such file"):
        make_table().save(tmp_path / "none" / "table.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(planish_latency_table=0), "does not begin with"),
        (lambda content: content.pop("total"), "expected the fields"),
        (lambda content: content.update(more=1), "expected the fields"),
        (lambda content: content.update(batch="1"), "batch is '1'"),
        (lambda content: content.update(batch=True), "batch is True"),
        (lambda content: content.update(total=float("nan")), "finite numbers"),
        (lambda content: content["seconds"].update(one={}), "every group needs one"),
        (lambda content: content["seconds"].update(one={"8": -1.0}), "finite numbers"),
        (lambda content: content["seconds"].update(one={"many": 1.0}), "seconds: invalid literal"),
        (lambda content: content["seconds"].update(one={"8": None}), "seconds: float"),
        (lambda content: content["seconds"].update(one=[1.0]), "seconds: 'list'"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, change, message):
    path = tmp_path / "table.json"
    make_table().save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        LatencyTable.load(path)


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"planish_latency_table": 1', "\udcff"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"table\.json: not a latency table of this version"):
        LatencyTable.load(path)


def test_a_fitting_table_is_accepted():
    make_table().check(**CHECKED)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("machine", "a laptop", "machine 'a laptop' instead of"),
        ("target", "Other()", r"target 'Other\(\)' instead of 'Portable\(\)'"),
        ("runtime", "onnxruntime 0.1", "runtime 'onnxruntime 0.1' instead of"),
        ("threads", 7, "threads 7 instead of None"),
        ("batch", 8, "batch 8 instead of 1"),
        ("sequence", 64, "sequence 64 instead of 128"),
        ("deployed_with", "", "deployed_with '' instead of 'fuse'"),
    ],
)
def test_tables_for_something_else_are_refused_unless_forced(field, value, message):
    table = make_table(**{field: value})
    with pytest.raises(InputError, match=message) as refusal:
        table.check(**CHECKED)
    assert "force" in str(refusal.value)
    table.check(**CHECKED, force=True)


def test_all_differences_are_named():
    with pytest.raises(InputError, match="batch 2 instead of 1, sequence 3 instead of 128"):
        make_table(batch=2, sequence=3).check(**CHECKED)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ({"one": [8, 5, 4, 0]}, r"lacks group 'one' with 5 structures kept —"),
        ({"one": [8, 6, 5, 4]}, "'one' with 6 structures kept and 1 more levels"),
        ({"four": [8]}, "lacks group 'four' with 8 structures kept"),
    ],
)
def test_levels_must_be_there(levels, message, force):
    with pytest.raises(InputError, match=message):
        make_table().check(**{**CHECKED, "levels": levels}, force=force)


def test_printed():
    text = str(make_table())
    assert "one (and 1 alike)" in text
    assert "20.00 ms in all, 10.00 ms in 3 groups" in " ".join(text.split())
    rows = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    assert "4 3.0000 75.0% 1.33x" in rows
    assert "dropped 0.0000 0.0%" in rows
    assert "three 6 2.0000 100.0% 1.00x" in rows


def test_names_are_no_markup():
    assert "layers[0]" in str(make_table(seconds={"layers[0]": {4: 0.001}}))
