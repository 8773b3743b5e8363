"""The notebooks of examples/ run from the first cell to the last, with small numbers."""

import re

import pytest
from pages import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
_MOST = {"count": 8, "steps": 3}
_TOLERANCE = 0.5  # so few questions cannot tell less


def small(source):
    """A cell with little work."""
    source = re.sub(r"\b(count|steps)=(\d+)", lambda given: f"{given[1]}={min(int(given[2]), _MOST[given[1]])}", source)
    return re.sub(r"TOLERANCE = [\d.]+", f"TOLERANCE = {_TOLERANCE}", source).replace("multi_key:256", "multi_key:64")


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_every_cell_runs(file, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra docs: make docs")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra docs: make docs")
    pytest.importorskip("ipykernel", reason="needs the extra docs: make docs")
    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = small(cell.source)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum(str(output.get("text", "")).count("\n") for output in outputs) < 10  # progress is one bar
    shown = [str(output.get("data", {}).get("text/html", "")) for output in outputs]
    assert any("<table>" in html for html in shown) and sum(map(len, shown)) < 20_000


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_committed_without_pictures_or_long_outputs(file):
    assert file.stat().st_size < 40_000 and "image/png" not in file.read_text(encoding="utf-8")
