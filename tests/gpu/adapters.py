"""A training step of LoRA (PEFT) on four decoder layers of a 7B, quantized and in bf16: ms, and memory at most.

Forward, backward and AdamW on 2 × 1024 random tokens, adapters of rank 16 on the query, value and down projections,
without gradient checkpointing. Memory is that of weights, activations and optimizer.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
from transformers import PreTrainedModel
from transformers.integrations import peft as transformers_peft
from transformers.utils import logging

from hf_awq_offload import AwqOffloadConfig, quantize_model

from .decoding import QUICK
from .device import GIB, host_milliseconds
from .made_models import SHAPE_7B, SHAPE_SMALL, random_llama
from .recorder import Recorder

TARGETS = ["q_proj", "v_proj", "down_proj"]

logging.disable_progress_bar()


def run(recorder: Recorder) -> None:
    shape = SHAPE_SMALL if recorder.is_small else SHAPE_7B
    # As tests/conftest.py says, a release of transformers asks for a PEFT that is not out.
    transformers_peft.MIN_PEFT_VERSION = min(transformers_peft.MIN_PEFT_VERSION, "0.20.0")
    for name in ("bf16", "w4"):
        with recorder.attempt(name):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before_bytes = torch.cuda.memory_allocated()
            model = random_llama(2 if recorder.is_small else 4, shape)
            if name == "w4":
                quantize_model(model, AwqOffloadConfig(**QUICK))
            torch.cuda.reset_peak_memory_stats()
            took, losses = _step_ms(model.to("cuda"), shape["vocab_size"], recorder.is_small)
            recorder.figure(f"adapters.{name}_ms", took)
            recorder.figure(f"adapters.{name}_gib", (torch.cuda.max_memory_allocated() - before_bytes) / GIB)
            recorder.details("losses", way=name, losses=losses)
            recorder.check(name, losses[-1] < losses[0], f"the loss does not fall: {losses}")
            del model


def _step_ms(model: PreTrainedModel, vocabulary: int, is_small: bool) -> tuple[float, list[float]]:
    torch.manual_seed(0)
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=TARGETS))
    adapted.train()
    tokens = torch.randint(3, vocabulary, (2, 32 if is_small else 1024), device="cuda")
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []

    def step() -> None:
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    took = host_milliseconds(step, 2 if is_small else 7, warm_up=2)
    return took, [float(loss) for loss in losses]
