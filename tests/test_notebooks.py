"""Every notebook runs on the artifacts of the smoke run and of a second point beside it."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from runs import SMOKE, Finished, completed

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
SHOWN = {
    "01_critic_quality": ("balanced accuracy, %", "'stage': 'gate_responses'"),
    "02_rejection_filter": ("what each threshold accepts", "below_threshold", "Tokens per response"),
    "03_lambda_beta": ("not told from the best", "dpo: rewards margin"),
    "04_error_browser": ("'verdict': 'incorrect'", "family"),
}


@pytest.fixture(scope="module")
def runs(smoke: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both runs."""
    folder = tmp_path_factory.mktemp("points")
    shutil.copytree(smoke.store, folder / "store")  # other tests count what the session's store lacks
    points = completed(folder, *SMOKE, "dpo.loss.beta=2", "logger=none").out.parent
    (points / "first").symlink_to(smoke.out)
    return points


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, runs: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "clear its outputs"
    assert not re.search(r"^(def|class|for|while|if) ", "\n".join(cell.source for cell in code), re.MULTILINE)
    code[0].source, replaced = re.subn(r'RUNS = "[^"]+"', f'RUNS = "{runs}/*"', code[0].source)
    assert replaced == 1
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type in ("error", "stream")]
    text = "".join(str(value) for o in outputs for value in o.data.values())
    assert not [part for part in SHOWN[path.stem] if part not in text]


def test_all_notebooks_are_known() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(SHOWN)
