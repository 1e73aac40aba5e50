"""Runs the command line for tests: in this process, or as the installed console scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sysconfig.get_path("scripts"))
FAST = ["--n-samples", "4", "--max-seq-len", "32", "--n-grid", "2", "--no-clip"]
"""Options of a quantization that takes a second or two."""


def environment(**changes: str) -> dict[str, str]:
    """Returns a script's environment: the package under test, one thread, no network."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | changes


def script(
    name: str, *arguments: str | Path, cwd: Path, code: int = 0, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs an installed script; asserts that it ends with this exit code and prints no traceback."""
    command = [str(SCRIPTS / name), *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=env or environment(), capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stdout[-2000:] + result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    return result


def document(printed: str) -> dict[str, Any]:
    """Parses the single JSON document that --json prints."""
    parsed = json.loads(printed)
    assert isinstance(parsed, dict)
    return parsed
