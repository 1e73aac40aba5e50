"""docs/quickstart.ipynb runs as it stands, and is a valid notebook that the site shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "_site"
RUN_AND_PRINT = "import json, notebook; print(json.dumps(notebook.run(notebook.read())))"


@pytest.fixture
def made(monkeypatch):
    monkeypatch.syspath_prepend(str(SITE))
    return __import__("notebook")


def test_all_cells_run_in_an_empty_folder(tmp_path):
    env = environment()
    env["PYTHONPATH"] = f"{SITE}:{env['PYTHONPATH']}"
    command = [sys.executable, "-c", RUN_AND_PRINT]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    printed = "".join(json.loads(result.stdout.splitlines()[-1]))
    assert {path.name for path in tmp_path.iterdir()} == {"my-first-awq", "my-first-adapters"}
    assert float(re.search(r"KL divergence ([\d.]+) nats", printed)[1]) < 0.01
    before, after = map(float, re.search(r"perplexity of the text ([\d.]+) -> ([\d.]+)", printed).groups())
    assert after < before / 2


def test_it_is_a_notebook_whose_stored_output_is_complete(made):
    notebook = made.read()
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert bool(cell["outputs"]) == ("print(" in made.source_of(cell))


def test_the_site_shows_code_and_output(made):
    page = made.as_markdown(made.read())
    assert page.startswith("# From nothing to")
    assert "```python\nfrom pathlib import Path\n" in page
    assert re.search(r"^```text\nperplexity [\d.]+ -> [\d.]+$", page, flags=re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+)", page):
        assert (ROOT / "docs" / target).exists(), target


def test_readers_find_it():
    assert "docs/quickstart.ipynb" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "Notebook: notebook.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
