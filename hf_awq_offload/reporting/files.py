"""Checks `report_dir` before calibration starts, and writes the report when the run is done."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from ..checkpoint.durable import replacing
from ..errors import ConfigError, StorageError
from ..logs import get_logger
from ..report import QuantizationReport
from .charts import charts_of, has_matplotlib
from .document import RunFacts, document_of
from .page import page_of

logger = get_logger(__name__)

ROOM_BYTES = 32 << 20
"""Required free space: more than the report of a mixture of 128 experts in 96 layers takes."""
PICTURES = ("loss", "groups", "gains", "alpha", "identity", "clipping", "time", "memory")


def prepare_folder(
    folder: str | os.PathLike[str] | None,  # None: no report
) -> None:
    """Creates the folder and checks that a report can be written to it.

    Raises:
        ConfigError: matplotlib is missing, or `folder` is a file.
        StorageError: the folder can't be created or written to, or the disk is full.
    """
    if folder is None:
        return
    path = Path(folder)
    if not has_matplotlib():
        raise ConfigError(
            f"report_dir is {os.fspath(folder)!r}, but matplotlib, which draws the report, is not installed. "
            "Run `pip install matplotlib`, or leave report_dir out."
        )
    if path.exists() and not path.is_dir():
        raise ConfigError(f"report_dir {path} is a file; name a folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with replacing(path / ".writable") as partial:
            partial.write_bytes(b" " * 4096)
        (path / ".writable").unlink()
        free_bytes = shutil.disk_usage(path).free
    except OSError as error:
        raise StorageError(
            f"report_dir {path} can't be written to: {error}. Correct the folder's permissions, or name another one."
        ) from error
    if free_bytes < ROOM_BYTES:
        raise StorageError(
            f"report_dir {path} is on a disk with {free_bytes / 2**20:.0f} MiB free; expected {ROOM_BYTES >> 20} MiB. "
            "Make room, or name another folder."
        )


def write_report(folder: str | os.PathLike[str] | None, report: QuantizationReport, facts: RunFacts) -> None:
    """Writes report.json, the pictures and report.html, replacing those of an earlier run; other files stay.

    Errors are logged, never raised: when this is called, memory holds the result of hours of work.
    """
    if folder is None:
        return
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        document = document_of(report, facts)
        _write(path / "report.json", json.dumps(document, allow_nan=False).encode())
        charts = charts_of(report, facts)
        for chart in charts:
            _write(path / f"{chart.name}.png", chart.png())
        for name in set(PICTURES) - {chart.name for chart in charts}:
            (path / f"{name}.png").unlink(missing_ok=True)  # from an earlier run
        _write(path / "report.html", page_of(report, document, charts).encode())
        logger.info("The report is in %s.", path / "report.html")
    except Exception as error:
        logger.error(
            f"The report could not be written to {path} ({type(error).__name__}: {error}). The quantized model is not "
            "affected.",
            exc_info=not isinstance(error, OSError),
        )


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(content)
