"""What holds for all tests."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _no_warnings_of_onnx_ir(caplog):
    """Its log is what a user would see, such as values whose shape is known and type is not."""
    yield
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]
    found = [
        record.getMessage()
        for record in records
        if record.name.startswith("onnx_ir") and record.levelno >= logging.WARNING
    ]
    assert not found
