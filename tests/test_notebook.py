"""The guided notebook runs from top to bottom in an empty folder, and shows what its text says.

python tests/test_notebook.py     runs it and writes its outputs anew
"""

from __future__ import annotations

import gc
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

TOUR = Path(__file__).resolve().parent.parent / "docs" / "tour.ipynb"
ARGV = [sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR", "-f", "{connection_file}"]


class ThisPython(KernelSpecManager):
    """The kernel is the Python that runs this, whatever kernels are installed."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(argv=ARGV, display_name="Python 3", language="python")


def run(folder: Path) -> Any:
    """The notebook with the outputs of a run in a folder; what libraries say on stderr is left out."""
    notebook = nbformat.read(TOUR, as_version=4)
    kernel = AsyncKernelManager(kernel_spec_manager=ThisPython())
    client = NotebookClient(
        notebook, km=kernel, timeout=500, record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    try:
        client.execute()
    finally:
        del client, kernel
        with warnings.catch_warnings():  # jupyter_client leaves two sockets to the collector, which grumbles
            warnings.filterwarnings("ignore", "Unclosed socket", ResourceWarning)
            gc.collect()
    said = "".join(o.get("text", "") for cell in code(notebook) for o in cell.outputs)
    assert "IProgress" not in said, "nobody need install widgets for bars that are not shown"
    for cell in code(notebook):
        cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
    return notebook


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cells: list[Any], written: str, kind: str = "text/plain") -> str:
    """What the cell with these words in it shows."""
    (cell,) = (c for c in cells if written in c.source)
    return "".join(o.data[kind] for o in cell.outputs if o.output_type == "execute_result")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tour")


@pytest.fixture(scope="module")
def cells(folder: Path) -> Iterator[list[Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        yield code(run(folder))


@pytest.fixture(scope="module")
def committed() -> list[Any]:
    return code(nbformat.read(TOUR, as_version=4))


def test_every_cell_runs_and_shows_what_its_text_says(cells: list[Any], folder: Path) -> None:
    assert 10 <= len(cells) <= 12
    assert all(cell.outputs for cell in cells)
    assert "Mike pulls out his" in shown(cells, "load_model")
    assert "<|endoftext|>" in shown(cells, "tokenize(")
    scores = dict(re.findall(r"'(\w+)': ([\d.]+)", shown(cells, "saekit.evaluate")))
    assert float(scores["l0"]) == pytest.approx(32, abs=0.5)
    assert float(scores["ce_recovered"]) > 0.98
    assert "4,096 features of tiny" in shown(cells, "Catalog.build", "text/html")
    assert len(re.findall(r'\(\d+, \'.*" Jedi"', shown(cells, '.search("Jedi", 5)'))) == 5
    jedi = shown(cells, "jedi = ", "text/html")
    assert re.search(r'<b class="peak" title="[\d.]+" style="--a:.75"> Jedi</b>', jedi)
    assert "<title>" in jedi
    assert re.search(r"\(2189, 1\.\d+", shown(cells, '.raising(" lightsaber")'))
    side = shown(cells, "saekit.compare", "text/html")
    assert "add 0.3 × norm feature 2189" in side
    assert side.count('title="log p: plain') > 3
    curve = shown(cells, "saekit.sweep", "text/html")
    assert curve.count("<polygon") == curve.count("<polyline") == 6
    assert "random" in curve
    assert "suggested: " in curve or "no strength is both" in curve
    assert shown(cells, "saekit.read(", "text/html").count("full colour") == 3
    assert (folder / "site" / "index.html").is_file()


def test_the_outputs_that_are_kept_are_those_of_the_same_cells(
    cells: list[Any], committed: list[Any]
) -> None:
    """They may differ in digits, from one processor to another, and in nothing else."""

    def kinds(of: list[Any]) -> list[Any]:
        return [
            (c.execution_count, [(o.output_type, sorted(o.get("data", {}))) for o in c.outputs]) for c in of
        ]

    assert kinds(committed) == kinds(cells)


def test_the_kept_notebook_is_small_and_says_nothing_of_a_machine(committed: list[Any]) -> None:
    text = TOUR.read_text("utf-8")
    assert len(text.encode()) < 600_000
    assert not re.search(r"site-packages|Warning|timestamp|iopub", text)
    assert str(Path.home()) + os.sep not in text
    assert all("execution" not in cell.metadata for cell in committed)


def test_its_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!\w+:)([^)#]+)", TOUR.read_text("utf-8"))
    assert targets
    for target in targets:
        assert (TOUR.parent / target).exists(), target


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as place:
        nbformat.write(run(Path(place)), TOUR)
