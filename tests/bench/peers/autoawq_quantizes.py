"""AutoAWQ 0.2.9, in fp32 on a CPU.

    python -m venv /tmp/autoawq
    /tmp/autoawq/bin/pip install torch==2.13.0 autoawq==0.2.9 transformers==4.51.3 "huggingface_hub<1" "datasets<4"

Its grid search keeps the original weights with `v.cpu()`, which on a CPU is the very tensor that it then changes: given
a real copy here, or it would destroy the model. It packs 4 bits only; weights of another width are rounded by its own
function and saved dense.
"""

from __future__ import annotations

import task
import torch
from awq import AutoAWQForCausalLM
from awq.utils.module import get_named_linears
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
    config = {"zero_point": True, "q_group_size": task.GROUP_SIZE, "w_bit": task.BITS, "version": "GEMM"}
    model.quantize(
        model.tokenizer, quant_config=config, calib_data=sequences, max_calib_samples=len(sequences),
        max_calib_seq_len=len(sequences[0]), export_compatible=task.BITS != 4,
    )  # fmt: skip
    if task.BITS != 4:
        for layer in model.get_model_layers(model.model):
            for linear in get_named_linears(layer).values():
                linear.weight.data = model.quantizer.pseudo_quantize_tensor(linear.weight.data)[0]
    return model


def save(model, out: str) -> None:
    if task.BITS == 4:
        model.save_quantized(out)
    else:
        model.model.save_pretrained(out)


task.run(load, quantize, save)
