"""Runs a part of the suite with the oldest and the newest releases that pyproject.toml allows (docs/compatibility.md).

    python tests/bench/compatibility.py --folder /tmp/compatibility oldest newest
    python tests/bench/compatibility.py --folder /tmp/compatibility transformers==5.20.2 transformers==5.17.0

`oldest` has each dependency at its lower bound, on the oldest Python; `newest` has the newest releases, whatever
constraints.txt says, on the newest Python. Any other word is a requirement: one release in place of the one that is
installed here, all else as it is here; it goes into a folder that is before everything else on the path.

Environments are made once, in --folder, and used again; delete the folder when done. torch comes from the package
index, for Linux a build with CUDA: 5 GB for each environment. Pythons are looked up on PATH. Warnings are no errors
here: releases warn of what later ones change.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHONS = {"oldest": "python3.10", "newest": "python3.12"}
READERS = ("peft", "compressed-tensors")
"""Extras that work on the checkpoints; bounded like the dependencies."""
TOOLS = ("pytest", "hypothesis", "jsonschema", "pillow", "scipy", "matplotlib")
"""What the tests need beside; the newest, because nobody who uses the package needs it."""
SHOWN = ("torch", "transformers", "huggingface_hub", "accelerate", "optimum", "safetensors", "datasets", *READERS)
TESTS = (
    "tests/calibration/test_dataset.py",
    "tests/integrations/test_compressed_tensors.py",
    "tests/integrations/test_fused_experts.py",
    "tests/integrations/test_hub.py",
    "tests/integrations/test_loading.py",
    "tests/integrations/test_peft.py",
    "tests/integrations/test_roundtrip.py",
    "tests/integrations/test_vision_language.py",
    "tests/nn/test_awq_linear.py",
    "tests/ops/test_schema.py",
    "tests/sources/test_quantized_sources.py",
    "tests/sources/test_source_look.py",
    "tests/test_streamed.py",
)
"""What meets other packages: reading, loading, saving, PEFT, data sets, the Hub, custom ops."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs a part of the suite with other releases.")
    parser.add_argument("environments", nargs="+", help="oldest, newest, or a requirement such as transformers==5.17.0")
    parser.add_argument("--folder", type=Path, required=True, help="where the environments are made")
    parser.add_argument("--tests", nargs="*", default=TESTS)
    args = parser.parse_args()
    failed = False
    for name in args.environments:
        python, environment = _environment(name, args.folder.resolve())
        versions = "import sys; from importlib.metadata import version as v; print(sys.version.split()[0], "
        versions += ", ".join(f"'{package}', v('{package}')" for package in SHOWN) + ")"
        print(f"\n{name}:", _output([python, "-c", versions], environment), flush=True)
        command = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", "filterwarnings=", "--tb=short"]
        failed |= subprocess.run([*command, *args.tests], cwd=REPOSITORY, env=environment, check=False).returncode != 0
    sys.exit(failed)


def _environment(name: str, folder: Path) -> tuple[str, dict[str, str]]:
    """Makes an environment unless it is there; returns its interpreter and the variables to run it with."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    place, done = folder / name, folder / f"{name}.made"
    if name in PYTHONS:
        python = str(place / "bin" / "python")
        if not done.exists():
            base = shutil.which(PYTHONS[name])
            if base is None:
                raise SystemExit(f"{PYTHONS[name]} is not on PATH; install it, or put its folder there.")
            subprocess.run([base, "-m", "venv", place], check=True)
            wanted = _requirements(lower_bounds=name == "oldest")
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, *[line for line in wanted if line.startswith("torch")]], check=True)
            subprocess.run([*pip, *wanted, *TOOLS], check=True)
            subprocess.run([*pip, "--no-deps", "--editable", REPOSITORY], check=True)
    else:
        python = sys.executable
        environment["PYTHONPATH"] = f"{place}:{REPOSITORY}"
        if not done.exists():
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--target", place, name], check=True)
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()
    return python, environment


def _requirements(lower_bounds: bool) -> list[str]:
    """What pyproject.toml says, at the lowest releases allowed or without them."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    lines = [*project["dependencies"], *sorted({line for line in extras if re.split("[<>=~!]", line)[0] in READERS})]
    return [re.sub(r">=([\w.]+).*", r"==\1" if lower_bounds else "", line) for line in lines]


def _output(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
