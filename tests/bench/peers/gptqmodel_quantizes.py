"""gptqmodel 7.7, AWQ, in bf16: it refuses fp32.

    python -m venv /tmp/gptqmodel
    /tmp/gptqmodel/bin/pip install gptqmodel==7.7.0 transformers==5.23.0 accelerate optimum

Its loader wants two workers, and on a machine of two cores its pool has one unless told otherwise.
"""

from __future__ import annotations

import os

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"

import task
import torch
from gptqmodel import GPTQModel
from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig


def load(model: str):
    config = QuantizeConfig(bits=task.BITS, group_size=task.GROUP_SIZE, method=METHOD.AWQ, format=FORMAT.GEMM)
    return GPTQModel.load(model, config, dtype=torch.bfloat16)


def quantize(model, sequences: list[list[int]]):
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sequences], batch_size=1)
    return model


task.run(load, quantize, lambda model, out: model.save(out))
