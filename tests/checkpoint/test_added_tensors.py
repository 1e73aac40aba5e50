"""Tensors that a model has no place for are added to a checkpoint that has been written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_awq_offload import CheckpointError
from hf_awq_offload.checkpoint.added_tensors import add_tensors
from hf_awq_offload.checkpoint.safetensors import tensor_places
from hf_awq_offload.checkpoint.stored_tensor import DequantizedTensor, StoredTensor
from hf_awq_offload.formats.source import StoredWeight

OWN = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.arange(4, dtype=torch.int32)}


def extra(folder: Path) -> tuple[dict[str, StoredTensor], dict[str, Tensor]]:
    """Returns a tensor as it is stored and one in two parts, and their values in bf16."""
    plain = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    stored = {"mtp.norm.weight": plain, "q": torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8), "s": torch.tensor(0.5)}
    save_file(stored, folder / "source.safetensors")
    places = tensor_places(folder / "source.safetensors")
    weight = StoredWeight(
        "mtp.fc.weight", {"q": "q", "s": "s"}, (2, 2), torch.float32, lambda parts: parts["q"].float() * parts["s"]
    )
    tensors = {
        "mtp.norm.weight": places["mtp.norm.weight"],
        "mtp.fc.weight": DequantizedTensor(weight, {"q": places["q"], "s": places["s"]}),
    }
    half = torch.tensor([[0.5, 1.0], [1.5, 2.0]], dtype=torch.bfloat16)
    return tensors, {"mtp.norm.weight": plain, "mtp.fc.weight": half}


def written(folder: Path, shards: int) -> Path:
    folder.mkdir()
    if shards == 1:
        save_file(OWN, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for number, (name, value) in enumerate(OWN.items(), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: value}, folder / file, {"format": "pt"})
        weight_map[name] = file
    index = {"metadata": {"total_size": 40, "total_parameters": 10}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shards", [1, 2])
def test_added_tensors_stand_beside_those_that_were_there(shards, tmp_path):
    folder = written(tmp_path / "saved", shards)
    tensors, values = extra(tmp_path)
    add_tensors(folder, tensors, torch.bfloat16)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert files == [f"model-{number:05}-of-{shards + 1:05}.safetensors" for number in range(1, shards + 2)]
    found = {name: value for file in files for name, value in load_file(folder / file).items()}
    assert found.keys() == OWN.keys() | values.keys()
    for name, value in (OWN | values).items():
        assert torch.equal(found[name], value)
        assert found[name].dtype == value.dtype
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 40 + 30 + 8
    for name, file in index["weight_map"].items():
        assert name in load_file(folder / file)
    assert index["weight_map"].keys() == found.keys()


def test_what_is_there_already_is_not_written_twice(tmp_path):
    folder = written(tmp_path / "saved", 1)
    tensors, _ = extra(tmp_path)
    add_tensors(folder, tensors, torch.bfloat16)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    add_tensors(folder, tensors, torch.bfloat16)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_folder_with_other_file_names_is_refused_and_left_alone(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    save_file(OWN, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor shards"):
        add_tensors(folder, extra(tmp_path)[0], torch.bfloat16)
    assert [file.name for file in folder.iterdir()] == ["adapter_model.safetensors"]
