"""A data set or tokenizer that fails halfway is an error that names the row, before any layer is quantized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from models import save_model, tiny_llama, token_recipe
from tiny_tokenizer import TEXTS, make_tokenizer
from transformers import AutoModelForCausalLM

from hf_awq_offload import AwqOffloadConfig, CalibrationDataError, CheckpointError, quantize
from hf_awq_offload.integrations import preparation
from hf_awq_offload.pipeline import loop


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = save_model(tiny_llama(vocab_size=300), tmp_path_factory.mktemp("llama"))
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def layers(monkeypatch) -> list[str]:
    """Fails a test in which a layer is quantized."""

    def refuse(context, *args, **kwargs):
        raise AssertionError(f"{context.name} is quantized")

    monkeypatch.setattr(loop, "quantize_with_statistics", refuse)
    return []


def recipe(dataset: Any, **changes: Any) -> AwqOffloadConfig:
    return token_recipe(dataset=dataset, n_samples=50, n_grid=1, **changes)


def generator():
    yield from TEXTS[:3]
    raise RuntimeError("the connection broke")


class Rows:
    """A data set with random access; row 7 is damaged."""

    def __len__(self) -> int:
        return 20

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, str]:
        if index == 7:
            raise OSError("cannot identify image file")
        return {"text": TEXTS[index]}


def broken_transform() -> Any:
    def transform(batch):
        if TEXTS[7] in batch["text"]:
            raise KeyError("caption")
        return batch

    return datasets.Dataset.from_dict({"text": TEXTS}).with_transform(transform)


def streamed_transform() -> Any:
    def failing(row):
        if row["text"] == TEXTS[7]:
            raise ZeroDivisionError("division by zero")
        return row

    return datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset().map(failing)


DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "generator": (generator, r"Row 3 of the dataset could not be read \(RuntimeError: the connection broke\)"),
    "rows": (Rows, r"Row 7 of the dataset could not be read \(OSError: cannot identify image file\)"),
    "transform": (broken_transform, r"Row 7 of the dataset could not be read \(KeyError: 'caption'\)"),
    "stream": (streamed_transform, r"Row 7 of the dataset could not be read \(ZeroDivisionError: division by zero\)"),
}


@pytest.mark.parametrize("kind", DATA)
def test_data_that_raises_names_the_row(kind, llama, tmp_path):
    make, message = DATA[kind]
    with pytest.raises(CalibrationDataError, match=message):
        quantize(llama, tmp_path / "out", recipe(make()), checkpoint_dir=tmp_path / "journal")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_broken_json_names_the_line(suffix, llama, tmp_path):
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines[6] = lines[6][:-9]
    (tmp_path / f"data{suffix}").write_text("\n".join(lines))
    with pytest.raises(CalibrationDataError, match=rf"data\{suffix}, line 7: not valid JSON"):
        quantize(llama, tmp_path / "out", recipe(str(tmp_path / f"data{suffix}")))
    assert [path.name for path in tmp_path.iterdir()] == [f"data{suffix}"]


class Tokenizer:
    """Gives the same for every text."""

    eos_token_id = bos_token_id = chat_template = None

    def __init__(self, gives: Any):
        self.gives = gives

    def __call__(self, text: str, **kwargs: Any) -> Any:
        return self.gives


TOKENIZERS = {
    "None": (None, r"failed on row \d+ of the dataset \(TypeError"),
    "nothing": ({}, r"failed on row \d+ of the dataset \(KeyError: 'input_ids'\)"),
    "no ids": ({"input_ids": None}, r"failed on row \d+ of the dataset \(TypeError"),
    "empty": ({"input_ids": []}, r"has 0 usable tokens in 20 documents; expected at least .*20 empty documents"),
    "words": (
        {"input_ids": ["the", "dog"]},
        r"failed on row \d+ .*input_ids holds a str, where token ids are expected",
    ),
    "batch": ({"input_ids": [[1, 2]]}, r"failed on row \d+ .*input_ids holds a list, where token ids are expected"),
    "fractions": ({"input_ids": [1.5]}, r"failed on row \d+ .*input_ids holds a float"),
    "too large": (
        {"input_ids": [300]},
        r"has the token id 300 at position 0; the model's vocabulary has ids",
    ),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_that_gives_no_token_ids(kind, llama, tmp_path):
    gives, message = TOKENIZERS[kind]
    with pytest.raises(CalibrationDataError, match=message):
        quantize(llama, tmp_path / "out", recipe(TEXTS, tokenizer=Tokenizer(gives)))
    assert list(tmp_path.iterdir()) == []


# -- shapes ------------------------------------------------------------------------------------------------------------


LOADINGS: dict[str, Callable[[Path, Path], object]] = {
    "streamed": lambda source, out: quantize(source, out, recipe(TEXTS)),
    "in memory": lambda source, out: AutoModelForCausalLM.from_pretrained(source, quantization_config=recipe(TEXTS)),
}


@pytest.mark.parametrize("loading", LOADINGS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, r"has the shape \(\d+, 64\) in the checkpoint; LlamaForCausalLM expects \(\d+, 32\)"),
        ({"intermediate_size": 128}, r"has the shape \(\d+, \d+\) in the checkpoint; LlamaForCausalLM expects"),
        ({"vocab_size": 400}, r"has the shape \(300, 64\) in the checkpoint; LlamaForCausalLM expects \(400, 64\)"),
        ({"num_hidden_layers": 3}, r"holds no model\.layers\.2\."),
    ],
)
def test_shapes_that_contradict_the_config_are_found_in_headers(
    changes, message, loading, llama, tmp_path, monkeypatch
):
    source = shutil.copytree(llama, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    monkeypatch.setattr(preparation, "load_calibration_set", None)  # which comes before the weights
    with pytest.raises(CheckpointError, match=message):
        LOADINGS[loading](source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
