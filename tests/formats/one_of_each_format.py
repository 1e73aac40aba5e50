"""A small sound checkpoint of every quantized format: its quantization_config, and its tensors by name."""

from __future__ import annotations

import torch
from quantized_checkpoints import float8, random_bytes, uniform

from hf_awq_offload.formats.awq import pack_weight
from hf_awq_offload.formats.grid import GroupParameters


def awq() -> dict:
    codes = torch.randint(0, 16, (16, 32))
    parameters = GroupParameters(uniform((16, 4)), torch.randint(0, 16, (16, 4)))
    return {f"a.{name}": tensor for name, tensor in pack_weight(codes, parameters)._asdict().items()}


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int64).to(torch.int32)


INTEGERS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 8}
CHECKPOINTS = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [8, 8]}, {
        "a.weight": float8((12, 16)), "a.weight_scale_inv": uniform((2, 2)),
        "experts.up": float8((2, 8, 16)), "experts.up_scale_inv": uniform((2, 1, 2)),
    }),
    "fp4": ({"quant_method": "fp8"}, {
        "a.weight": random_bytes((4, 32), dtype=torch.int8), "a.scale": random_bytes((4, 2)).view(torch.float8_e8m0fnu),
    }),
    "modelopt": ({"quant_method": "modelopt"}, {
        "a.weight": random_bytes((4, 16)), "a.weight_scale": float8((4, 2)), "a.weight_scale_2": uniform(()),
        "a.input_scale": uniform(()), "b.weight": float8((4, 4)), "b.weight_scale": uniform(()),
    }),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, {
        "a.e.down": float8((2, 4, 6)), "a.e.down_scale": uniform((2, 6, 1)),
        "b.e.down": float8((2, 4, 6)), "b.e.down_scale": uniform((2, 6, 1)),
    }),
    "mxfp4": ({"quant_method": "mxfp4"}, {
        "a.w_blocks": random_bytes((2, 4, 2, 16)), "a.w_scales": random_bytes((2, 4, 2)),
    }),
    "pack-quantized": ({"config_groups": {"g": {"format": "pack-quantized", "weights": INTEGERS}}}, {
        "a.weight_packed": words(16, 4), "a.weight_scale": uniform((16, 4)), "a.weight_zero_point": words(2, 4),
        "a.weight_shape": torch.tensor([16, 32]), "a.weight_g_idx": (torch.arange(32) // 8).to(torch.int32),
    }),
    "compressed-tensors": ({"config_groups": {}}, {
        "a.weight": random_bytes((4, 8), dtype=torch.int8), "a.weight_scale": uniform((4, 2)),
        "a.weight_zero_point": random_bytes((4, 2), dtype=torch.int8),
        "b.weight_packed": random_bytes((4, 16)), "b.weight_scale": float8((4, 2)),
        "b.weight_global_scale": uniform((1,)),
        "c.weight_packed": random_bytes((4, 16)), "c.weight_scale": random_bytes((4, 1)),
        "d.weight": float8((4, 64)), "d.weight_scale": random_bytes((4, 2)),
    }),
    "awq": ({"quant_method": "awq", "group_size": 8}, awq()),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 8}, {
        "a.qweight": words(4, 16), "a.qzeros": words(4, 2), "a.scales": uniform((4, 16)),
        "a.g_idx": (torch.arange(32) // 8).to(torch.int32),
    }),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, {
        "a.weight": random_bytes((4, 8), dtype=torch.int8), "a.SCB": uniform((4,)),
        "a.weight_format": torch.zeros((), dtype=torch.uint8),
    }),
}  # fmt: skip
