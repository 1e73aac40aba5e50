"""The file of results: one JSON object per line, appended at once, never overwritten."""

from __future__ import annotations

import json
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("gpu-results")


class Results:
    """Appends records to a file; creates it, and its folders, if it is not there.

    Args:
        path: the file; None: a new one in FOLDER, named after the time and the commit.
        commit: what is measured.
    """

    def __init__(self, path: Path | None, commit: str):
        self.started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.path = path if path is not None else _new(self.started.replace(":", ""), commit)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[dict[str, Any]] = []

    def add(self, record: dict[str, Any]) -> None:
        """Appends a record; every record names the run that it is of."""
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": self.started} | record) + "\n")


def _new(moment: str, commit: str) -> Path:
    """Returns the path of a file that is not there yet."""
    for number in range(1, 1000):
        path = FOLDER / f"{moment}-{commit[:12]}{'' if number == 1 else f'-{number}'}.jsonl"
        if not path.exists():
            return path
    raise FileExistsError(f"{FOLDER} holds a thousand files of this second; pass --out.")


def commit_of_checkout() -> str:
    """Returns the commit that the files are of, with "+" if they were changed since; "unknown" outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
