"""The sdist, and the wheel built from it, are complete: typed, with assets, dependencies and a single version."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import packages_distributions, version
from itertools import chain
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_awq_offload"


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    return wheel, sdist


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def project() -> dict:
    return settings()["project"]


def declared() -> set[str]:
    """Returns the distributions that are dependencies or in an extra, in lower case."""
    requirements = [*project()["dependencies"], *chain(*project()["optional-dependencies"].values())]
    return {re.split(r"[\[<>=;]", requirement)[0].strip().lower() for requirement in requirements} - {"hf_awq_offload"}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    packages = settings()["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    tracked = run("git", "ls-files", *packages, cwd=ROOT).split() if (ROOT / ".git").exists() else []
    assert "hf_awq_offload/py.typed" in names
    assert set(tracked) <= names
    assert {name.split("/")[0] for name in names} == {*packages, f"hf_awq_offload-{project()['version']}.dist-info"}


@pytest.mark.slow
def test_the_sdist_holds_what_the_makefile_needs(built):
    with tarfile.open(built[1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for name in ("Makefile", "constraints.txt", "mkdocs.yml", "README.md", "CHANGELOG.md", "LICENSE", ".ci/run"):
        assert name in names
    assert {"tests/conftest.py", "docs/index.md"} <= names


@pytest.mark.slow
def test_metadata_pass_twine(built):
    printed = run(sys.executable, "-m", "twine", "check", "--strict", *built, cwd=built[0].parent)
    assert printed.count("PASSED") == 2


@pytest.mark.slow
def test_an_installed_wheel_works_in_an_environment_of_its_own(built, tmp_path):
    """Dependencies come from this environment's folder, whose .pth files (an editable install's) are not read."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-I", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", built[0], cwd=tmp_path)
    site = Path(run(python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    program = """
import hf_awq_offload
from importlib.metadata import packages_distributions, version
from itertools import chain
from importlib.resources import files
from hf_awq_offload import AwqOffloadConfig
from transformers import AutoModelForCausalLM
root = files("hf_awq_offload")
assert root.joinpath("py.typed").is_file()
model = root.joinpath("assets", "tiny_llama")
recipe = AwqOffloadConfig(n_grid=0, clip=False, rounding="nearest")
AutoModelForCausalLM.from_pretrained(str(model), quantization_config=recipe).save_pretrained("out")
AutoModelForCausalLM.from_pretrained("out")
print(hf_awq_offload.__file__, version("hf_awq_offload"))
"""
    path, told = run(python, "-I", "-c", program, cwd=tmp_path).split()[-2:]
    assert Path(path).is_relative_to(tmp_path)
    assert told == project()["version"]


def test_the_version_is_semantic_and_told_in_one_place():
    told = project()["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", told)
    assert version("hf_awq_offload") == told
    in_code = [path.name for path in PACKAGE.rglob("*.py") if told in path.read_text(encoding="utf-8")]
    assert in_code == []


def test_the_changelog_is_kept():
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    headings = [line for line in lines if line.startswith("## ")]
    assert headings[0] == "## Unreleased"
    assert all(re.fullmatch(r"## \d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", line) for line in headings[1:])
    kinds = {line for line in lines if line.startswith("### ")}
    assert kinds <= {f"### {kind}" for kind in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")}


def test_what_is_imported_is_declared():
    """Every distribution that the package imports is a dependency or in an extra."""
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add((node.module or "").partition(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"hf_awq_offload"}
    through = {"numpy", "huggingface_hub", "tokenizers", "pandas", "pyarrow"}  # transformers and datasets need these
    homes = packages_distributions()
    undeclared = {
        module
        for module in foreign - through
        if not {home.lower().replace("_", "-") for home in homes.get(module, [module.replace("_", "-")])} & declared()
    }
    assert {"torch", "matplotlib"} <= foreign  # imports inside functions count, too
    assert undeclared == set()


def test_pins_exist_for_all_that_is_declared():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {line.split("==")[0].lower() for line in pins.splitlines() if "==" in line}
    assert declared() <= pinned
