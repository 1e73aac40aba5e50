"""Reads what users write for a data set: its name, with a configuration and a split if they want them.

someone/texts                      a data set on the Hub; of which "train" is read, or else the first split
someone/texts:validation           its split "validation"
someone/texts/german:validation    that of its configuration "german"; without a split, it would look like a path
texts/german:validation            the same, if the Hub has no data set "texts/german"
my-folder/german:validation        a folder on this machine whose README.md has configurations
wikitext2:test, pileval            short names
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CalibrationDataError

SHORT_NAMES = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None),
    "c4": ("allenai/c4", "en", None),
    "c4-new": ("allenai/c4", "en", None),
    "pileval": ("mit-han-lab/pile-val-backup", None, "validation"),
}
"""Name -> data set, configuration and split. AutoAWQ's users know "pileval", GPTQ's users the others."""

PART = r"\w[\w.-]*"
SPLIT = r":(?P<split>\w+(?:\.\w+)*)"
HUB_NAME = re.compile(rf"(?P<path>{PART}(?:/{PART})?)(?:{SPLIT})?")
WITH_CONFIGURATION = re.compile(rf"(?P<path>{PART}/{PART})/(?P<configuration>{PART}){SPLIT}")
CARD = "README.md"
"""Names the configurations of a data set in a folder."""


@dataclass(frozen=True)
class DatasetName:
    """What `datasets.load_dataset` takes."""

    path: str  # a name on the Hub, or a folder
    configuration: str | None = None
    split: str | None = None


def on_the_hub(written: str) -> DatasetName | None:
    """Returns the data set on the Hub that `written` names, or None if it has another form."""
    found = WITH_CONFIGURATION.fullmatch(written) or HUB_NAME.fullmatch(written)
    if found is None:
        return None
    parts = found.groupdict()
    if parts["path"] in SHORT_NAMES:
        path, configuration, split = SHORT_NAMES[parts["path"]]
        return DatasetName(path, configuration, parts["split"] or split)
    return DatasetName(parts["path"], parts.get("configuration"), parts["split"])


def in_a_folder(written: str) -> DatasetName | None:
    """Returns the data set in a folder on this machine that `written` names, or None if there is no such folder.

    Raises:
        CalibrationDataError: there is a file, with a split behind it.
    """
    expanded = os.path.expanduser(written)
    found = re.fullmatch(rf"(?P<path>.+?){SPLIT}", expanded)
    if os.path.isdir(expanded):  # whose name may have a colon
        return DatasetName(expanded)
    path, split = (found["path"], found["split"]) if found is not None else (expanded, None)
    if os.path.isdir(path):
        return DatasetName(path, None, split)
    if os.path.isfile(path):
        raise CalibrationDataError(f"{path} is a file, which has no split {split!r}: leave out ':{split}'.")
    folder, configuration = os.path.split(path)
    if configuration and configuration in _configurations(Path(folder or ".", CARD)):
        return DatasetName(folder or ".", configuration, split)
    return None


def _configurations(card: Path) -> list[str]:
    """Returns the configurations that a data set's card names, in its block of YAML; none if there is no card."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    block = text.split("\n---")[0] if text.startswith("---") else ""
    return re.findall(r"""^[\s-]*config_name:\s*["']?([^"'\s]+)["']?\s*$""", block, flags=re.MULTILINE)


def streamed_rows(name: DatasetName) -> Any:
    """Returns the rows of a data set as a stream; raises whatever `datasets` raises if there are none."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        return _loaded(name)
    except DatasetNotFoundError as error:
        owner, slash, configuration = name.path.partition("/")
        if name.configuration is not None or not slash or os.path.isdir(name.path):
            raise
        try:
            return _loaded(DatasetName(owner, configuration, name.split))
        except DatasetNotFoundError:
            raise error from None


def _loaded(name: DatasetName) -> Any:
    import datasets

    names = [name.path] if name.configuration is None else [name.path, name.configuration]
    if name.split is not None:
        return datasets.load_dataset(*names, split=name.split, streaming=True)
    splits = datasets.load_dataset(*names, streaming=True)
    return splits["train"] if "train" in splits else next(iter(splits.values()))
