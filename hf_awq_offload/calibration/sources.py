"""Opens whatever the user passed as `dataset`: an object, a file or a name.

Data with a length and random access (a list, a 2-D tensor, a `datasets.Dataset`, a .json list) is visited in a seeded
random order, so that sorted data is sampled evenly. Everything else (other files, streams, generators) is read from
the start, and no further than needed.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import AwqOffloadConfig
from ..errors import CalibrationDataError
from ..json_text import parse_json
from ..messages import type_name
from .dataset_names import DatasetName, in_a_folder, on_the_hub, streamed_rows
from .documents import names_of, require_one_form

OPTIMUM_NAMES = ("wikitext2", "c4", "c4-new")
"""The names that `optimum.gptq.data.get_dataset` supports, which GPTQ users know."""

_FORMS = (
    "'builtin', a list of texts, a list of token-id lists, a 2-D tensor of token ids, an iterable of dicts "
    "(a datasets.Dataset, for instance), a file or a data set name"
)


@dataclass(frozen=True)
class Source:
    """The elements of a data set, whose form has not been checked yet."""

    name: str | None  # None = in-memory data without a name
    elements: Iterator[tuple[int, Any]]  # (row, element), in the order in which they are visited
    string_columns: list[str] | None = None  # None = unknown before the first row


def open_source(config: AwqOffloadConfig, get_tokenizer: Callable[[], PreTrainedTokenizerBase]) -> Source:
    """Opens `config.dataset`; calls `get_tokenizer` only for optimum's data sets.

    Raises:
        CalibrationDataError: the form or name is unknown, or the data could not be opened.
    """
    dataset = config.dataset
    if not isinstance(dataset, str | os.PathLike):
        return _open_object(dataset, config.seed)
    if dataset == "builtin":
        return Source("builtin", _visit(_builtin_texts(), config.seed))
    if dataset in OPTIMUM_NAMES:
        return Source(str(dataset), _visit(_optimum_rows(str(dataset), config, get_tokenizer()), config.seed))
    path = Path(os.path.expanduser(dataset))
    if os.path.isfile(path):
        return Source(path.name, _visit(_open_file(path), config.seed))
    folder = in_a_folder(os.fspath(dataset))
    if folder is not None:
        return _open_with_datasets(folder, os.fspath(dataset), name=path.resolve().name)
    on_hub = None if isinstance(dataset, os.PathLike) else on_the_hub(dataset)
    if isinstance(dataset, os.PathLike) or _looks_like_path(dataset, on_hub):
        raise CalibrationDataError(
            f"The dataset {os.fspath(dataset)!r} looks like a path, but there is no such file (working "
            f"directory: {os.getcwd()}). Pass the path of an existing {', '.join(_FILE_READERS)} file."
        )
    if on_hub is None:
        raise CalibrationDataError(
            f"The dataset is a string of {len(dataset)} characters that is neither a file nor a data set "
            "name. To calibrate on that text itself, pass it in a list: dataset=[text]."
        )
    return _open_with_datasets(on_hub, dataset, name=dataset)


# ---- opening: objects


def _open_object(dataset: Any, seed: int) -> Source:
    if isinstance(dataset, Tensor | np.ndarray):
        is_text = isinstance(dataset, np.ndarray) and dataset.dtype.kind in "OUS"
        if dataset.ndim != (1 if is_text else 2):
            raise CalibrationDataError(
                f"The dataset is an array of shape {tuple(dataset.shape)} and type {dataset.dtype}; expected "
                "token ids of shape (sequences, tokens). Wrap a single sequence in a list: "
                "dataset=[token_ids]."
            )
        return Source(None, _visit(list(dataset) if is_text else dataset, seed))
    if isinstance(dataset, Mapping) or hasattr(dataset, "iterrows"):
        raise CalibrationDataError(
            f"The dataset is {type_name(dataset)} with the keys {names_of(dataset)}; expected rows. "
            "Pass one split of a DatasetDict (dataset['train']), wrap columns in "
            "datasets.Dataset.from_dict(...), or a DataFrame in datasets.Dataset.from_pandas(...)."
        )
    if isinstance(dataset, list | tuple):
        require_one_form(dataset)
        return Source(None, _visit(dataset, seed))
    # `dataset` can be a datasets.Dataset only if that module has been imported already.
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        elements = dataset if isinstance(dataset, datasets.Dataset) else iter(dataset)
        return Source(_own_name(dataset), _visit(elements, seed), _string_columns(dataset))
    try:
        elements = iter(dataset)
    except TypeError:
        raise CalibrationDataError(f"The dataset is {type_name(dataset)}; expected {_FORMS}.") from None
    return Source(None, _visit(elements, seed))


def _visit(elements: Any, seed: int) -> Iterator[tuple[int, Any]]:
    """Yields (row, element), in a random order unless `elements` is an iterator.

    Raises:
        CalibrationDataError: the data set raised an error; the message names the row.
    """
    remedy = "Correct the data set or what it computes (a generator, a transform), or leave that row out."
    if isinstance(elements, Iterator):
        row, end = 0, object()
        while (element := _guarded(next, f"Row {row} of the dataset", remedy, elements, end)) is not end:
            yield row, element
            row += 1
        return
    generator = torch.Generator().manual_seed(seed)
    for row in torch.randperm(len(elements), generator=generator).tolist():
        yield row, _guarded(elements.__getitem__, f"Row {row} of the dataset", remedy, row)


def _own_name(dataset: Any) -> str | None:
    """Returns the name under which a datasets.Dataset was loaded; None if it was made from memory or loose files."""
    name, builder = dataset.info.dataset_name, dataset.info.builder_name
    return None if name == builder else name  # both are "json", "generator", … for data without a name


def _string_columns(dataset: Any) -> list[str] | None:
    if dataset.features is None:
        return None
    is_string = {name: getattr(kind, "dtype", "").endswith("string") for name, kind in dataset.features.items()}
    return [name for name, yes in is_string.items() if yes]


# ---- opening: files


def _open_file(path: Path) -> Sequence[Any] | Iterator[Any]:
    """Returns the elements of a local file: a list if its format is read at once, else an iterator."""
    reader = _FILE_READERS.get(path.suffix.lower())
    if reader is None:
        raise CalibrationDataError(
            f"The dataset file {path} ends in {path.suffix!r}; expected {', '.join(_FILE_READERS)}. Load it "
            "yourself (datasets.load_dataset reads more formats) and pass the resulting data set."
        )
    what = f"The dataset file {path}"
    remedy = "Check that the file is complete and has the format of its suffix."
    elements = _guarded(reader, what, remedy, path)
    if not isinstance(elements, list):
        return _guarded_iterator(elements, what, remedy)
    require_one_form(elements)
    return elements


def _read_txt(path: Path) -> list[str]:
    # The file is one document: splitting at blank lines would put an EOS between the paragraphs of a text.
    return [path.read_text(encoding="utf-8-sig")]


def _read_json(path: Path) -> list[Any]:
    """Reads a list, a single object, or one value per line (which often has this suffix by mistake)."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        parsed = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise CalibrationDataError(_json_message(path, error.lineno, error)) from error
        return list(_parse_lines(path, text.split("\n")))
    return parsed if isinstance(parsed, list) else [parsed]


def _read_jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        yield from _parse_lines(path, file)


def _parse_lines(path: Path, lines: Iterable[str]) -> Iterator[Any]:
    for line_number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield parse_json(line)
            except json.JSONDecodeError as error:
                raise CalibrationDataError(_json_message(path, line_number, error)) from error
            except ValueError as error:
                raise CalibrationDataError(
                    f"{path}, line {line_number}: {error}. Correct or remove that line."
                ) from error


def _json_message(path: Path, line_number: int, error: json.JSONDecodeError) -> str:
    return (
        f"{path}, line {line_number}: not valid JSON ({error.msg}, column {error.colno}). Expected one JSON "
        "value per line (.jsonl) or one list (.json); correct or remove that line."
    )


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    # pyarrow, unlike datasets, neither copies the file to a cache nor expands patterns in its path.
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    # pandas, because csv limits fields to 131072 characters and can lift that only for the whole process.
    import pandas

    with pandas.read_csv(path, dtype=str, keep_default_na=False, chunksize=256, encoding="utf-8-sig") as chunks:
        for chunk in chunks:
            yield from chunk.to_dict("records")


_FILE_READERS: dict[str, Callable[[Path], list[Any] | Iterator[Any]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def reads_suffix(path: str | os.PathLike[str]) -> bool:
    """Returns whether the suffix of a file says how its rows are read."""
    return Path(path).suffix.lower() in _FILE_READERS


def _looks_like_path(name: str, on_hub: DatasetName | None) -> bool:
    """Returns whether `name` is a path: it does not name a data set on the Hub, or it has a file's suffix."""
    has_suffix = name.lower().endswith(tuple(_FILE_READERS))
    has_separators = on_hub is None and (name.count("/") > 1 or name.endswith("/") or "\\" in name)
    is_short = len(name) < 256 and "\n" not in name  # otherwise it is text, which gets a different error
    return is_short and (has_suffix or has_separators or name.startswith((".", "/", "~")))


# ---- opening: names


def _builtin_texts() -> list[str]:
    """Returns about 460 kB of English text about Python: the help texts that ship with CPython."""
    from pydoc_data.topics import topics  # imported here because of its size

    return list(topics.values())


def _open_with_datasets(dataset: DatasetName, written: str, name: str) -> Source:
    """Streams a data set through `datasets.load_dataset`; `written` is what the user calls it."""
    what, remedy = (
        f"The data set {written!r}",
        "A configuration and a split follow its name: 'owner/name/configuration:split'. Or pass 'builtin', the path "
        "of a local file, or a list of texts instead.",
    )
    rows = _guarded(streamed_rows, what, remedy, dataset)
    elements = _guarded_iterator(iter(rows), what, remedy)
    return Source(name, _visit(elements, 0), _string_columns(rows))


def _optimum_rows(name: str, config: AwqOffloadConfig, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Returns rows of `config.max_seq_len` tokens; restores the random states that optimum overwrites."""

    def load() -> Any:
        from optimum.gptq.data import get_dataset

        quiet_tokenizer = partial(cast(Any, tokenizer), verbose=False)  # the texts are longer than any model_max_length
        return get_dataset(name, quiet_tokenizer, config.n_samples, config.max_seq_len, config.seed)

    python_state, numpy_state = random.getstate(), np.random.get_state()
    cuda_devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=cuda_devices):
            return _guarded(
                load,
                f"optimum's data set {name!r}",
                "Downloading it needs optimum, datasets and a network; without these, pass 'builtin', the "
                "path of a local file, or a list of texts.",
            )
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _guarded(function: Callable[..., Any], what: str, remedy: str, *arguments: Any) -> Any:
    """Calls `function`, and turns any error into a CalibrationDataError, because readers raise dozens of kinds."""
    try:
        return function(*arguments)
    except (CalibrationDataError, MemoryError):
        raise
    except Exception as error:
        raise CalibrationDataError(
            f"{what} could not be read ({type(error).__name__}: {str(error)[:500]}). {remedy}"
        ) from error


def _guarded_iterator(elements: Iterator[Any], what: str, remedy: str) -> Iterator[Any]:
    rows, end, said = 0, object(), remedy
    while (element := _guarded(next, what, said, elements, end)) is not end:
        yield element
        rows += 1
        said = f"Rows read before: {rows}. {remedy}"
