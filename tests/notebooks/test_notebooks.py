"""Every notebook runs from its first cell to its last, and is stored without what it printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="reading notebooks needs nbformat, of the extra dev")
nbclient = pytest.importorskip("nbclient", reason="running notebooks needs nbclient, of the extra dev")
kernelspec = pytest.importorskip("jupyter_client.kernelspec", reason="running notebooks needs jupyter_client")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
KERNEL = "python3"


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end(path: Path) -> None:
    if KERNEL not in kernelspec.KernelSpecManager().find_kernel_specs():
        pytest.skip(f"no Jupyter kernel {KERNEL} is installed; ipykernel, of the extra dev, brings one")
    client = nbclient.NotebookClient(
        read(path), timeout=300, kernel_name=KERNEL, resources={"metadata": {"path": str(ROOT)}}
    )

    done = client.execute()

    cells = [cell for cell in done.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_checks_its_own_numbers(path: Path) -> None:
    assert any(line.lstrip().startswith("assert ") for cell in code(path) for line in cell.source.splitlines())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    assert all(not cell.outputs and cell.execution_count is None for cell in code(path))
