"""Makes one small checkpoint for every row of the table in docs/sources.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from image_models import tiny_llava
from models import save_model, tiny_gemma3, tiny_gpt_oss, tiny_llama, tiny_qwen2, tiny_qwen3, token_recipe
from peft import LoraConfig, get_peft_model
from quantized_sources import MXFP4_FIELDS, Stored, fp8_blocks, fp8_per_tensor, mxfp4_experts, save_quantized
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_awq_offload import quantize
from hf_awq_offload.formats.pack_quantized import WORD_BITS

NAME, INDEX = "model.safetensors", "model.safetensors.index.json"
LOST = "model.layers.1.mlp.down_proj.weight"


def full_precision(folder: Path) -> Path:
    return save_model(tiny_gemma3(), folder)


def pickled(folder: Path) -> Path:
    save_model(tiny_qwen2(), folder)
    torch.save(load_file(folder / NAME), folder / "pytorch_model.bin")
    (folder / NAME).unlink()
    return folder


def fp8_in_blocks(folder: Path) -> Path:
    return save_quantized(tiny_qwen3(), folder, *fp8_blocks(32))


def fp8_by_tensor(folder: Path) -> Path:
    fields = {"quant_method": "modelopt", "quant_algo": "FP8"}
    return save_quantized(tiny_llama(), folder, fp8_per_tensor, fields)


def fp8_undescribed(folder: Path) -> Path:
    return save_quantized(tiny_qwen2(), folder, fp8_per_tensor, None)


def fp8_without_scales(folder: Path) -> Path:
    def store(name: str, value: Tensor) -> Stored | None:
        return {name: value.to(torch.float8_e4m3fn)} if name.endswith("_proj.weight") else None

    return save_quantized(tiny_qwen2(), folder, store, None)


def mxfp4(folder: Path) -> Path:
    return save_quantized(tiny_gpt_oss(intermediate_size=64), folder, mxfp4_experts, MXFP4_FIELDS)


def quantized_once(**changes: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        source = save_model(tiny_llama(), folder.with_name("full-precision"))
        quantize(source, folder, token_recipe(**changes))
        return folder

    return make


def gptq(folder: Path) -> Path:
    """Rounds to a grid with the zero point 8, packed as GPTQ packs."""

    def store(name: str, value: Tensor) -> Stored | None:
        if not name.endswith("_proj.weight"):
            return None
        groups = value.float().unflatten(1, (-1, 32))
        scales = groups.abs().amax(-1) / 7  # (out, n)
        codes = (groups / scales.unsqueeze(-1)).round().add(8).clamp(0, 15).flatten(1).to(torch.int64).t()  # (in, out)
        shifts = torch.arange(0, WORD_BITS, 4)
        words = (codes.unflatten(0, (-1, 8)) << shifts[:, None]).sum(1)
        zeros = torch.full((scales.shape[1], scales.shape[0] // 8), 0x77777777)
        stored = {"qweight": _as_int32(words), "qzeros": zeros.to(torch.int32), "scales": scales.t().half()}
        stored["g_idx"] = (torch.arange(value.shape[1]) // 32).to(torch.int32)
        return {name.replace("weight", key): part.contiguous() for key, part in stored.items()}

    fields = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    return save_quantized(tiny_llama(), folder, store, fields)


def _as_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unknown_method(folder: Path) -> Path:
    save_model(tiny_qwen2(), folder)
    return _with_config(folder, quantization_config={"quant_method": "quip"})


def missing_weight(folder: Path) -> Path:
    save_model(tiny_qwen3(), folder)
    save_file({key: value for key, value in load_file(folder / NAME).items() if key != LOST}, folder / NAME)
    return folder


def other_shape(folder: Path) -> Path:
    save_model(tiny_qwen3(), folder)
    return _with_config(folder, intermediate_size=128)


def in_shards(folder: Path) -> Path:
    tiny_qwen2().save_pretrained(folder, max_shard_size="60KB")
    return folder


def index_names_too_much(folder: Path) -> Path:
    index = json.loads((in_shards(folder) / INDEX).read_text())
    index["weight_map"]["model.layers.7.mlp.down_proj.weight"] = next(iter(index["weight_map"].values()))
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def index_names_too_little(folder: Path) -> Path:
    index = json.loads((in_shards(folder) / INDEX).read_text())
    del index["weight_map"][LOST]
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def missing_shard(folder: Path) -> Path:
    sorted(in_shards(folder).glob("*.safetensors"))[-1].unlink()
    return folder


def cut_off(folder: Path) -> Path:
    save_model(tiny_gemma3(), folder)
    data = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(data[: len(data) // 2])
    return folder


def lfs_pointer(folder: Path) -> Path:
    first = sorted(in_shards(folder).glob("*.safetensors"))[0]
    first.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4976698672\n")
    return folder


def adapters(folder: Path) -> Path:
    base = save_model(tiny_qwen2(), folder.with_name("base"))
    model = type(tiny_qwen2()).from_pretrained(base)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


def image_text(folder: Path) -> Path:
    return save_model(tiny_llava(), folder)


def few_positions(folder: Path) -> Path:
    return save_model(tiny_llama(max_position_embeddings=16), folder)


MTP_PREFIX = "model.layers.2."


def with_mtp(folder: Path) -> Path:
    save_model(tiny_qwen2(), folder)
    tensors = load_file(folder / NAME)
    tensors |= {
        name.replace("model.layers.1.", MTP_PREFIX): value.clone()
        for name, value in tensors.items()
        if name.startswith("model.layers.1.")
    }
    tensors[f"{MTP_PREFIX}eh_proj.weight"] = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / NAME, {"format": "pt"})
    return _with_config(folder, num_nextn_predict_layers=1)


def _with_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


AGAIN = ", `from_quantized`"
MADE: dict[str, Callable[[Path], Path]] = {
    "full precision, safetensors": full_precision,
    "full precision, PyTorch `.bin`": pickled,
    "FP8 with block scales (DeepSeek-V3, Qwen3-FP8, MiniMax)": fp8_in_blocks,
    "FP8 with a scale per tensor or channel": fp8_by_tensor,
    "FP8 with scales and no `quantization_config`": fp8_undescribed,
    "FP8 without scales": fp8_without_scales,
    "MXFP4 (gpt-oss)": mxfp4,
    "compressed-tensors, 4 bits": quantized_once(format="compressed-tensors"),
    f"compressed-tensors, 4 bits{AGAIN}": quantized_once(format="compressed-tensors"),
    "AWQ": quantized_once(),
    f"AWQ{AGAIN}": quantized_once(),
    f"GPTQ{AGAIN}": gptq,
    "an unknown `quant_method`": unknown_method,
    "a weight is missing": missing_weight,
    "a weight has another shape than `config.json` says": other_shape,
    "the index names a tensor that is not there": index_names_too_much,
    "a file holds a tensor that the index does not name": index_names_too_little,
    "a shard is missing": missing_shard,
    "a file is cut off": cut_off,
    "a git-lfs pointer in place of a file": lfs_pointer,
    "a folder of adapters": adapters,
    "an image-text model, loaded by the class for text models": image_text,
    "fewer positions than tokens in a sequence": few_positions,
    "layers for multi-token prediction": with_mtp,
}
"""Row of the table -> makes its checkpoint in a folder."""
