"""This package, in fp32 on a CPU; the recipe's fields are read from the environment variable RECIPE (JSON)."""

from __future__ import annotations

import json
import os

import task
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_awq_offload import AwqOffloadConfig, quantize_model


def quantize(model: PreTrainedModel, sequences: list[list[int]]) -> PreTrainedModel:
    fields = json.loads(os.environ["RECIPE"])
    recipe = AwqOffloadConfig(
        dataset=sequences, n_samples=len(sequences), bits=task.BITS, group_size=task.GROUP_SIZE, **fields
    )
    quantize_model(model, recipe)
    return model


task.run(
    lambda model: AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
    quantize,
    lambda model, out: model.save_pretrained(out),
)
