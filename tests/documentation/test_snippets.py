"""The documentation's code runs: every python and bash block of README.md and docs/, as tests/snippets.py says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub
from image_models import llava_processor, tiny_llava
from models import tiny_llama, tiny_mixtral
from snippets import PLACEHOLDERS, RUN, SHOWN, blocks
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
GENERATED = {"architectures.md", "changelog.md", "reference.md"}  # by scripts, or by mkdocs from what is elsewhere
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name not in GENERATED)]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

NOT_RUN = {
    "README.md": 2,  # sets up environments
    "docs/quickstart.md": 2,  # the same
    "docs/training.md": 1,  # installs packages
    "docs/contributing.md": 1,  # this very test among others
    "docs/gpu.md": 2,  # needs a GPU; runs tests for minutes
    "docs/from-autoawq.md": 1,  # AutoAWQ's side
    "docs/serving.md": 3,  # servers on GPUs
}
"""How many blocks of a page are marked as not run; the reasons stand in the pages."""


def runnable(page: Path) -> bool:
    return any(block.language in RUN and block.reason is None for block in blocks(page))


@pytest.fixture(scope="session")
def models(tmp_path_factory, tiny_llama_dir) -> Path:
    """A folder with what PLACEHOLDERS name: models of random weights, one or two layers of hidden 128, and texts."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": len(tokenizer)}
    sizes |= {"max_position_embeddings": 1024, "bos_token_id": tokenizer.bos_token_id}
    sizes |= {"eos_token_id": tokenizer.eos_token_id}
    for name, model in (("dense", tiny_llama(**sizes)), ("mixture", tiny_mixtral(**sizes, num_hidden_layers=1))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tiny_llava(hidden_size=256).save_pretrained(folder / "image-text")
    llava_processor().save_pretrained(folder / "image-text")
    shutil.copytree(ROOT / "tests" / "data" / "checkpoints" / "autoawq-gemv", folder / "autoawq-gemv")
    text = (tiny_llama_dir / "heldout.txt").read_text(encoding="utf-8")
    rows = [json.dumps({"text": text[start : start + 4000]}) for start in range(0, len(text) - 20_000, 4000)]
    (folder / "texts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "held-out.txt").write_text(text[-20_000:], encoding="utf-8")
    assert {path.name for path in folder.iterdir()} == set(PLACEHOLDERS.values())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.stem)
def test_the_code_of_the_page_runs(page, models, tmp_path):
    with Hub("hf_" + "onlyForThisTest") as hub:
        environment = hub.environment(tmp_path / "home")
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        (tmp_path / "work").mkdir()
        command = [sys.executable, str(ROOT / "tests" / "snippets.py"), str(page), str(models)]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=tmp_path / "work", check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert hub.unknown == []


def test_what_is_not_run_is_counted():
    found = {
        name: sum(block.reason is not None for block in blocks(page)) for name, page in zip(NAMES, PAGES, strict=True)
    }
    assert {name: count for name, count in found.items() if count} == NOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_block_is_run_or_known_to_be_no_program(page):
    text = page.read_text(encoding="utf-8")
    assert {block.language for block in blocks(page)} <= {*RUN, *SHOWN}
    assert text.count("```") == 2 * len(blocks(page))  # none is indented, or left open
    assert text.count("<!-- not run") == sum(block.reason is not None for block in blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_scripts_and_tests_that_figures_name_are_there(page):
    for path in re.findall(r"\b((?:tests|docs)/[\w/-]+\.(?:py|json|md|svg))\b", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path
