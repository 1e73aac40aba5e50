"""The documentation's parts that are made from others: pictures, the reference, the table in README.md."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import hf_awq_offload
from hf_awq_offload.recipe_fields import RecipeFields

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def script(name: str) -> ModuleType:
    """A module of docs/_site, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "_site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_are_what_the_script_draws():
    pictures = script("pictures").PICTURES
    assert {path.name for path in (DOCS / "images").iterdir()} == set(pictures)
    for name, draw in pictures.items():
        assert (DOCS / "images" / name).read_text(encoding="utf-8") == draw(), (
            f"run python docs/_site/pictures.py: {name}"
        )


def test_the_map_of_the_packages_is_what_the_code_says():
    page = (DOCS / "contributing.md").read_text(encoding="utf-8")
    assert script("pictures").with_package_table(page) == page, "run python docs/_site/pictures.py"


def test_the_chart_shows_every_tool_that_was_measured():
    tools = [name for name, _, _ in script("pictures").measured()]
    assert len(tools) == 6
    assert sum("hf_awq_offload" in name for name in tools) == 2


def test_readme_has_the_figures_of_the_comparison():
    page = (ROOT / "README.md").read_text(encoding="utf-8").split("## Compared with other tools")[1]
    shown = [
        (float(t), float(kl)) for t, kl in re.findall(r"\| \**([\d.]+)\** \| \**([\d.]+)\** \|$", page, flags=re.M)
    ]
    measured = {
        (time, round(kl, 4)) for name, time, kl in script("pictures").measured() if not name.endswith("nearest")
    }
    assert set(shown) == measured


def test_formulas_become_mathml():
    made = script("mathml").on_page_content('a <span class="arithmatex">\\(x &lt; 1\\)</span> b')
    assert "arithmatex" not in made
    assert made.startswith('a <math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">')
    assert "x" in made
    assert made.endswith("</math> b")


def test_names_of_options_do_not_break_at_hyphens():
    made = script("option_names").on_page_content("<p>a-b <code>run --max-seq-len N</code></p>")
    assert made == '<p>a-b <code>run <span style="white-space: nowrap">--max-seq-len</span> N</code></p>'
    block = "<pre><code>run --max-seq-len N</code></pre>"
    assert script("option_names").on_page_content(block) == block


def test_the_reference_describes_every_field_of_the_recipe(monkeypatch):
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object))
    config = "hf_awq_offload.config.AwqOffloadConfig"
    read = SimpleNamespace(path=config, docstring=SimpleNamespace(value="The recipe.\n\nRaises:\n    ConfigError: no."))
    script("recipe_fields").DescribeRecipeFields().on_class(cls=read)
    described = " ".join(read.docstring.value.split())
    assert described.startswith("The recipe. Args: bits: ")
    assert described.endswith(" Raises: ConfigError: no.")
    for field in fields(RecipeFields):
        assert f" {field.name}: {field.metadata['help']} " in described


@pytest.mark.parametrize("name", hf_awq_offload.__all__)
def test_every_public_name_is_in_the_reference(name):
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: (\S+)", page, flags=re.MULTILINE)
    value = getattr(hf_awq_offload, name)
    assert f"{value.__module__}.{value.__qualname__}" in shown or value.__module__ in shown


def test_what_the_reference_shows_is_there():
    for shown in re.findall(r"^::: (\S+)", (DOCS / "reference.md").read_text(encoding="utf-8"), flags=re.MULTILINE):
        module, _, name = shown.rpartition(".")
        assert hasattr(importlib.import_module(module), name), shown


def test_the_links_of_readme_lead_somewhere():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", page) if "://" not in target]
    assert len(targets) > 15
    assert [target for target in targets if not (ROOT / target.split("#")[0]).exists()] == []
