"""Runs docs/quickstart.ipynb, and turns it into a page of the site.

`python docs/_site/notebook.py` runs all cells in an empty folder and stores what they print in the notebook. The site
is built with `on_files`, a mkdocs hook that shows cells and stored output as the page "Notebook". Neither needs
Jupyter: cells are plain Python and print what they have to show.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "quickstart.ipynb"
PAGE = "notebook.md"


def read(path: Path = NOTEBOOK) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def source_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def run(notebook: dict[str, Any]) -> list[str]:
    """Runs the code cells one after the other in one namespace, in the working directory. Returns what each printed."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for number, cell in enumerate(notebook["cells"], start=1):
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(compile(source_of(cell), f"quickstart.ipynb, cell {number}", "exec"), namespace)
            printed.append(stdout.getvalue())
    return printed


def store(notebook: dict[str, Any], printed: list[str]) -> None:
    """Puts what the code cells printed into the notebook."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, (cell, text) in enumerate(zip(code, printed, strict=True), start=1):
        cell["execution_count"] = count
        lines = text.splitlines(keepends=True)
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []


def as_markdown(notebook: dict[str, Any]) -> str:
    """Returns the page: texts as they are, and code with its stored output."""
    parts = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append(source_of(cell))
            continue
        parts.append(f"```python\n{source_of(cell)}\n```")
        printed = "".join(line for output in cell["outputs"] for line in output["text"])
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """mkdocs calls this with the files of the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=as_markdown(read())))
    return files


if __name__ == "__main__":
    notebook = read()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        store(notebook, run(notebook))
        os.chdir(NOTEBOOK.parent)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
