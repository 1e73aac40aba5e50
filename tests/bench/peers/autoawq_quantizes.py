"""AutoAWQ 0.2.9, in fp32 on a CPU.

    python -m venv /tmp/autoawq
    /tmp/autoawq/bin/pip install torch==2.13.0 autoawq==0.2.9 transformers==4.51.3 "huggingface_hub<1" "datasets<4"

Its grid search keeps the original weights with `v.cpu()`, which on a CPU is the very tensor that it then changes: given
a real copy here, or it would destroy the model.
"""

from __future__ import annotations

import task
import torch
from awq import AutoAWQForCausalLM
from transformers import AutoTokenizer

alias = torch.Tensor.cpu


def copy_to_cpu(tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    copy = alias(tensor, *args, **kwargs)
    return copy.clone() if copy.data_ptr() == tensor.data_ptr() else copy


def load(model: str):
    awq = AutoAWQForCausalLM.from_pretrained(model, torch_dtype=torch.float32, device_map="cpu", use_cache=False)
    awq.tokenizer = AutoTokenizer.from_pretrained(model)
    return awq


def quantize(model, sequences: list[list[int]]):
    torch.Tensor.cpu = copy_to_cpu
    config = {"zero_point": True, "q_group_size": task.GROUP_SIZE, "w_bit": 4, "version": "GEMM"}
    model.quantize(
        model.tokenizer, quant_config=config, calib_data=sequences, max_calib_samples=len(sequences),
        max_calib_seq_len=len(sequences[0]),
    )  # fmt: skip
    return model


task.run(load, quantize, lambda model, out: model.save_quantized(out))
