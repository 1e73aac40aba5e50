"""Another choice of linears or grids for one layer leaves the other finished layers in the journal as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from killing import digests
from models import save_model, tiny_llama, token_recipe
from stopped_runs import Stopped, stop_after, stopped_run

from hf_awq_offload import JournalError, quantize
from hf_awq_offload.pipeline import layer_quantization, loop

LAYERS = 5
KEPT: dict[str, Any] = {"modules_to_not_convert": ["model.layers.1.mlp"]}
FINER: dict[str, Any] = {"format": "compressed-tensors", "overrides": {r"layers\.1\.mlp": {"bits": 8}}}
WITHOUT_DATA: dict[str, Any] = {"n_grid": 0, "clip": False, "rounding": "nearest"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_model(tiny_llama(num_hidden_layers=LAYERS), tmp_path_factory.mktemp("llama"))


def quantized_layers(monkeypatch) -> list[int]:
    """Records the indices of layers as they are quantized, with data or without."""
    indices = []

    def watch(name: str) -> None:
        original = getattr(layer_quantization, name)

        def watched(context, *args, **kwargs):
            indices.append(int(context.name.rpartition(".")[2]))
            return original(context, *args, **kwargs)

        monkeypatch.setattr(loop, name, watched)

    watch("quantize_with_statistics")
    watch("quantize_without_data")
    return indices


def expected(llama: Path, folder: Path, **recipe: Any) -> dict[str, str]:
    quantize(llama, folder / "undisturbed", token_recipe(**recipe))
    return digests(folder / "undisturbed")


@pytest.mark.parametrize(
    ("before", "now", "again"),
    [
        ({}, KEPT, [1, 4]),
        (KEPT, {}, [1, 4]),
        ({"format": "compressed-tensors"}, FINER, [1, 4]),
        (FINER, FINER | {"overrides": {r"layers\.1\.mlp": {"bits": 3}, r"layers\.3\.": {"bits": 4}}}, [1, 4]),
        ({"propagate": "quantized"}, KEPT | {"propagate": "quantized"}, [0, 1, 2, 3, 4]),
        ({"propagate": "quantized"}, {"propagate": "quantized", "modules_to_not_convert": ["layers.4.mlp"]}, [4]),
        ({"propagate": "quantized"}, {"propagate": "quantized", "modules_to_not_convert": [r".*layers\.4\..*"]}, [4]),
        (WITHOUT_DATA, WITHOUT_DATA | KEPT, [1, 4]),
    ],
    ids=["left out", "no longer", "override", "other override", "propagated", "next", "next, all of it", "no data"],
)
def test_only_layers_that_change_are_quantized_again(before, now, again, llama, tmp_path, monkeypatch):
    stopped_run(llama, tmp_path, monkeypatch, LAYERS - 1, **before)
    done = quantized_layers(monkeypatch)
    quantize(llama, tmp_path / "out", token_recipe(**now), checkpoint_dir=tmp_path / "journal")
    assert done == again
    monkeypatch.undo()
    assert digests(tmp_path / "out") == expected(llama, tmp_path, **now)


def test_layers_that_are_quantized_again_are_named(llama, tmp_path, monkeypatch, caplog):
    stopped_run(llama, tmp_path, monkeypatch, LAYERS - 1)
    with caplog.at_level("WARNING"):
        quantize(llama, tmp_path / "out", token_recipe(**KEPT), checkpoint_dir=tmp_path / "journal")
    assert "1 of 4 layers in the journal, which are quantized again: model.layers.1." in caplog.text


@pytest.mark.parametrize("propagate", ["original", "quantized"])
def test_a_run_with_other_choices_that_is_stopped_leaves_no_layer_of_both(propagate, llama, tmp_path, monkeypatch):
    """With propagated outputs, layers after the changed one are stale though their own choices are the same."""
    fields = {"propagate": propagate}
    folder = stopped_run(llama, tmp_path, monkeypatch, LAYERS - 1, **fields)
    with monkeypatch.context() as patched:
        stop_after(patched, 2)  # after layer 1, which changes
        with pytest.raises(Stopped):
            quantize(llama, tmp_path / "out", token_recipe(**fields, **KEPT), checkpoint_dir=folder)
    done = quantized_layers(monkeypatch)
    quantize(llama, tmp_path / "out", token_recipe(**fields, **KEPT), checkpoint_dir=folder)
    assert done == ([4] if propagate == "original" else [2, 3, 4])
    monkeypatch.undo()
    assert digests(tmp_path / "out") == expected(llama, tmp_path, **fields, **KEPT)


def test_an_override_that_changes_the_format_is_another_run(llama, tmp_path, monkeypatch):
    folder = stopped_run(llama, tmp_path, monkeypatch, 2)
    assert json.loads((folder / "journal.json").read_text())["recipe"]["format"] == "awq"
    named = r'differ: recipe\.format \("awq" in the journal, "compressed-tensors" now\)\.'
    with pytest.raises(JournalError, match=named):
        quantize(llama, tmp_path / "out", token_recipe(overrides=FINER["overrides"]), checkpoint_dir=folder)
