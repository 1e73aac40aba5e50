"""Reads the text that models are evaluated on: a file, or a data set by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..calibration.dataset_names import SHORT_NAMES
from ..calibration.documents import Text, read_documents
from ..calibration.sources import OPTIMUM_NAMES, open_source, reads_suffix
from ..config import AwqOffloadConfig
from ..errors import CalibrationDataError

WIKITEXT2 = "wikitext2"
"""The whole test split in order, paragraphs joined by blank lines: what published perplexities are measured on."""

PARAGRAPHS = "\n\n"


def evaluation_tokens(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    most_tokens: int,
    text_column: str | None = None,
) -> Tensor:
    """Returns the token ids of the beginning of a text, (tokens,) int64, at most `most_tokens`.

    Args:
        dataset: "wikitext2", also with another split ("wikitext2:validation"); a file of text, whatever its suffix; or
            what else of text `AwqOffloadConfig.dataset` names (docs/calibration.md). A data set of many documents is
            sampled, with a fixed seed.
        tokenizer: the model's tokenizer.
        most_tokens: where reading stops.
        text_column: the column of the data set that holds the text.

    Raises:
        CalibrationDataError: the data can't be read, or is not text.
    """
    is_named = isinstance(dataset, str | os.PathLike)
    name, _, split = os.fspath(dataset).partition(":") if is_named else ("", "", "")
    if name == WIKITEXT2:
        return _token_ids(tokenizer, PARAGRAPHS.join(_wikitext2(split or "test")))[:most_tokens]
    if is_named and dataset in OPTIMUM_NAMES:
        raise CalibrationDataError(
            f"The data set {dataset!r} is read as rows of token ids; models are evaluated on plain text. Name the "
            f"split to read, such as {dataset}:validation."
        )
    file = os.path.expanduser(dataset) if is_named else ""
    if os.path.isfile(file) and not reads_suffix(file):
        if text_column is not None:
            raise CalibrationDataError(
                f"The file {dataset} is read as plain text, which has no column {text_column!r}; leave the column out, "
                "or name a file of rows (.jsonl, .csv, .parquet)."
            )
        return _token_ids(tokenizer, _plain_text(Path(file)))[:most_tokens]
    config = AwqOffloadConfig(dataset=dataset, text_column=text_column)
    source = open_source(config, lambda: tokenizer)
    texts: list[tuple[int, str]] = []
    tokens = 0
    for document in read_documents(source.elements, text_column, source.string_columns):
        if not isinstance(document, Text):
            where = dataset if is_named else "the data set"
            raise CalibrationDataError(
                f"Row {document.row} of {where} is a {type(document).__name__}; models are evaluated on plain text. "
                "Name a text file, or a data set whose column of text --text-column names."
            )
        texts.append((document.row, document.text))
        tokens += len(_token_ids(tokenizer, document.text))
        if tokens >= most_tokens:
            break
    return _token_ids(tokenizer, PARAGRAPHS.join(text for _, text in sorted(texts)))[:most_tokens]


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _plain_text(path: Path) -> str:
    """Returns the text of a file that has no suffix of data, such as a README.md, a source file or a log."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise CalibrationDataError(
            f"The file {path} could not be read as text ({type(error).__name__}: {error}). Name a file of UTF-8 text."
        ) from error
    if "\0" in text:
        raise CalibrationDataError(f"The file {path} has zero bytes: it is not text. Name a file of UTF-8 text.")
    return text


def _wikitext2(split: str) -> list[str]:
    import datasets

    path, configuration, _ = SHORT_NAMES[WIKITEXT2]
    try:
        rows: Any = datasets.load_dataset(path, configuration, split=split)
    except Exception as error:  # of dozens of kinds: network, cache, hub
        raise CalibrationDataError(
            f"The data set 'wikitext2' could not be downloaded ({type(error).__name__}: {str(error)[:300]}). Without a "
            "network, evaluate on a text file: --dataset FILE."
        ) from error
    return rows["text"]
