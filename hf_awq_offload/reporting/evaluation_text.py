"""The text on which models are evaluated: a file, or a data set by its name."""

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
"""Its test split, whole and in order, paragraphs joined by blank lines: what published perplexities are of."""

PARAGRAPHS = "\n\n"


def evaluation_tokens(
    dataset: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    most_tokens: int,
    text_column: str | None = None,
) -> Tensor:
    """Token ids of the beginning of a text, (tokens,) int64, at most `most_tokens`.

    Args:
        dataset: "wikitext2", or what `AwqOffloadConfig.dataset` takes as a name or file (docs/calibration.md), as far
            as it is text. Of a list of documents, those that fit are a random choice that is always the same.
        tokenizer: of the model.
        most_tokens: reading stops there.
        text_column: the column of the data set that holds text.

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
                "plain text. Name a text file, or a data set with a column of text by --text-column."
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
    except Exception as error:  # dozens of kinds: network, cache, hub
        raise CalibrationDataError(
            f"The data set 'wikitext2' can't be had ({type(error).__name__}: {str(error)[:300]}). It is downloaded; "
            "without a network, evaluate on a text file: --dataset FILE."
        ) from error
    return rows["text"]
