"""Reads AWQ GEMM checkpoints into plain full-precision models; written from the description of the format alone.

The format (AutoAWQ's `WQLinear_GEMM`, Lin et al. 2023, arXiv:2306.00978), for a linear with weight (out, in) and
groups of g input channels:

    qweight  int32 (in, out / 8)      q, eight values of 4 bits per word
    qzeros   int32 (in / g, out / 8)  z, packed like q
    scales   fp16  (in / g, out)      s
    w[column, row] = (q[row, column] - z[row // g, column]) * s[row // g, column]

Bits 4i ... 4i + 3 of word c hold output column 8c + COLUMN_OF_POSITION[i].

(q - z) has 4 bits and a sign, s has 11 significant bits: their product is exact in fp32.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COLUMN_OF_POSITION = (0, 2, 4, 6, 1, 3, 5, 7)
PACKED_NAMES = ("qweight", "qzeros", "scales")


def unpack_words(
    words: np.ndarray,  # (rows, columns / 8) int32
) -> np.ndarray:
    """Returns (rows, columns) int64, values from 0 to 15."""
    assert words.dtype == np.int32
    unsigned = words.view(np.uint32)
    values = np.empty((words.shape[0], 8 * words.shape[1]), dtype=np.int64)
    for i in range(8):
        values[:, COLUMN_OF_POSITION[i] :: 8] = (unsigned >> np.uint32(4 * i)) & np.uint32(15)
    return values


def dequantize_linear(
    qweight: np.ndarray,  # (in, out / 8) int32
    qzeros: np.ndarray,  # (in / g, out / 8) int32
    scales: np.ndarray,  # (in / g, out) fp16
) -> np.ndarray:
    """Returns the weight (out, in) in fp32, without rounding."""
    q, z = unpack_words(qweight), unpack_words(qzeros)
    assert scales.dtype == np.float16
    assert z.shape == scales.shape
    assert q.shape[1] == z.shape[1]
    assert q.shape[0] % z.shape[0] == 0
    group_size = q.shape[0] // z.shape[0]
    weight = np.empty((q.shape[1], q.shape[0]), dtype=np.float32)
    for row in range(q.shape[0]):
        group = row // group_size
        weight[:, row] = (q[row] - z[group]).astype(np.float32) * scales[group].astype(np.float32)
    return weight


def read_state_dict(directory: str | Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Returns all tensors of a checkpoint in full precision: `*.weight` (out, in) replaces qweight, qzeros and scales.

    Args:
        directory: holds model.safetensors, or its shards and model.safetensors.index.json.
        dtype: of every tensor that is returned; rounding to it is the only rounding.
    """
    state: dict[str, Tensor] = {}
    packed: dict[str, dict[str, np.ndarray]] = {}  # linear -> name of PACKED_NAMES -> tensor
    for name, tensor in _read_tensors(Path(directory)).items():
        prefix, _, last = name.rpartition(".")
        if last in PACKED_NAMES:
            packed.setdefault(prefix, {})[last] = tensor.numpy()
        else:
            state[name] = tensor.to(dtype)
    for prefix, tensors in packed.items():
        assert set(tensors) == set(PACKED_NAMES), f"{prefix} has only {sorted(tensors)}"
        assert f"{prefix}.weight" not in state, f"{prefix} has a weight both packed and in full precision"
        state[f"{prefix}.weight"] = torch.from_numpy(dequantize_linear(**tensors)).to(dtype)
    return state


def read_model(directory: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads the checkpoint as a stock model of plain linears, in evaluation mode, and checks that no tensor is left."""
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    missing, unexpected = model.load_state_dict(read_state_dict(directory, dtype), strict=False)
    model.tie_weights()
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert set(missing) <= set(tied), f"missing in the checkpoint: {missing}"
    assert not unexpected, f"unknown to the model: {unexpected}"
    return model


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    index_path = directory / "model.safetensors.index.json"
    if not index_path.exists():
        return load_file(directory / "model.safetensors")
    shard_of_name: dict[str, str] = json.loads(index_path.read_text())["weight_map"]
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shard_of_name.values())):
        for name, tensor in load_file(directory / shard).items():
            assert shard_of_name[name] == shard, f"{name} is in {shard}, the index says {shard_of_name[name]}"
            tensors[name] = tensor
    assert set(tensors) == set(shard_of_name)
    return tensors
