"""The notebook runs from beginning to end, and its page shows what it printed."""

import nbclient
import nbformat
import pytest
from generators import notebook


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    book = nbformat.read(notebook.NOTEBOOK, as_version=4)
    printed = [cell.outputs for cell in book.cells if cell.cell_type == "code"]
    client = nbclient.NotebookClient(book, timeout=300, kernel_name="python3")
    client.resources = {"metadata": {"path": str(tmp_path)}}
    client.execute()
    again = [cell.outputs for cell in book.cells if cell.cell_type == "code"]
    assert [bool(outputs) for outputs in again] == [bool(outputs) for outputs in printed]
    assert {output.output_type for outputs in again for output in outputs} == {"stream"}


def test_its_page_has_its_cells():
    book, page = nbformat.read(notebook.NOTEBOOK, as_version=4), notebook.page()
    for cell in book.cells:
        assert cell.source in page
        for output in cell.get("outputs", ()):
            assert output.text.strip() in page
