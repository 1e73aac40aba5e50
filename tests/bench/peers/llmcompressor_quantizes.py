"""llm-compressor 0.14, AWQ, in fp32 on a CPU.

    python -m venv /tmp/llmcompressor
    /tmp/llmcompressor/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1

It pins memory for an accelerator even where there is none.
"""

from __future__ import annotations

import task
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from transformers import AutoModelForCausalLM


def quantize(model, sequences: list[list[int]]):
    torch.Tensor.pin_memory = lambda tensor, *args: tensor
    weights = QuantizationArgs(num_bits=task.BITS, symmetric=False, strategy="group", group_size=task.GROUP_SIZE)
    groups = {"linears": QuantizationScheme(targets=["Linear"], weights=weights)}
    data = Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * len(ids) for ids in sequences]})
    oneshot(
        model=model, dataset=data, max_seq_length=len(sequences[0]), num_calibration_samples=len(sequences),
        recipe=[AWQModifier(ignore=["lm_head"], config_groups=groups)],
    )  # fmt: skip
    return model


task.run(
    lambda model: AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
    quantize,
    lambda model, out: model.save_pretrained(out, save_compressed=True),
)
