"""Reads the text that models are evaluated on: a file, or a data set by name."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..calibration.documents import Text, read_documents
from ..calibration.sources import open_source
from ..config import AwqOffloadConfig
from ..errors import CalibrationDataError

WIKITEXT2 = "wikitext2"
"""The whole test split in order, paragraphs joined by blank lines: what published perplexities are measured on."""

PARAGRAPHS = "\n\n"


def evaluation_tokens(
    dataset: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    most_tokens: int,
    text_column: str | None = None,
) -> Tensor:
    """Returns the token ids of the beginning of a text, (tokens,) int64, at most `most_tokens`.

    Args:
        dataset: "wikitext2", or a name or file of text that `AwqOffloadConfig.dataset` takes (docs/calibration.md). A
            data set of many documents is sampled, with a fixed seed.
        tokenizer: the model's tokenizer.
        most_tokens: where reading stops.
        text_column: the column of the data set that holds the text.

    Raises:
        CalibrationDataError: the data can't be read, or is not text.
    """
    if dataset == WIKITEXT2:
        return _token_ids(tokenizer, PARAGRAPHS.join(_wikitext2()))[:most_tokens]
    config = AwqOffloadConfig(dataset=dataset, text_column=text_column)
    source = open_source(config, lambda: tokenizer)
    texts: list[tuple[int, str]] = []
    tokens = 0
    for document in read_documents(source.elements, text_column, source.string_columns):
        if not isinstance(document, Text):
            raise CalibrationDataError(
                f"Row {document.row} of {os.fspath(dataset)} is a {type(document).__name__}; models are evaluated on "
                "plain text. Name a text file, or a data set whose column of text --text-column names."
            )
        texts.append((document.row, document.text))
        tokens += len(_token_ids(tokenizer, document.text))
        if tokens >= most_tokens:
            break
    return _token_ids(tokenizer, PARAGRAPHS.join(text for _, text in sorted(texts)))[:most_tokens]


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _wikitext2() -> list[str]:
    import datasets

    try:
        rows: Any = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    except Exception as error:  # of dozens of kinds: network, cache, hub
        raise CalibrationDataError(
            f"The data set 'wikitext2' could not be downloaded ({type(error).__name__}: {str(error)[:300]}). Without a "
            "network, evaluate on a text file: --dataset FILE."
        ) from error
    return rows["text"]
