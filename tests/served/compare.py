"""Compares what a server computed with what this package computes from the same checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_awq_offload import use_for_compressed_tensors

from .checkpoints import SOURCE

# A server computes in bf16, the reference in fp32. Quantizing these models to 4 bits moves log-probabilities by 0.4 to
# 0.7 on average, and bf16 by 0.01 to 0.05; at 8 bits the bound on the difference itself decides.
SHARE_OF_QUANTIZATION = 0.15
DIFFERENCE = 0.06
REGRET = 0.1


@dataclass
class Agreement:
    """How close a server is to the reference, in nats.

    Attributes:
        difference: Mean difference of the log-probabilities of the prompts' tokens.
        to_source: The same against the model in full precision.
        regret: Mean of what the server's greedy tokens lose to the reference's most probable ones, each given the
            server's own tokens before it.
    """

    difference: float
    to_source: float
    regret: float

    @property
    def holds(self) -> bool:
        close = self.difference <= max(DIFFERENCE, SHARE_OF_QUANTIZATION * self.to_source)
        return close and self.regret <= REGRET


def agreement(folder: Path, prompts: list[list[int]], found: dict[str, Any]) -> Agreement:
    """Returns how close `found`, the server's "log_p" and "follow", is to the checkpoint in `folder`."""
    use_for_compressed_tensors()  # this package is the reference, whatever else is installed
    tokens, server = torch.tensor(prompts), torch.tensor(found["log_p"])
    everything = torch.cat([tokens, torch.tensor(found["follow"])], 1)
    quantized, source = (_log_p(path, everything) for path in (folder, folder.with_name(folder.name + SOURCE)))
    steps = quantized[:, tokens.shape[1] - 1 : -1]
    chosen = steps.gather(-1, everything[:, tokens.shape[1] :, None]).squeeze(-1)
    return Agreement(
        difference=float((_at(quantized, tokens, server.shape[1]) - server).abs().mean()),
        to_source=float((_at(source, tokens, server.shape[1]) - server).abs().mean()),
        regret=float((steps.amax(-1) - chosen).mean()),
    )


@torch.no_grad()
def _log_p(folder: Path, tokens: Tensor) -> Tensor:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(tokens).logits.float().log_softmax(-1)


def _at(log_p: Tensor, tokens: Tensor, last: int) -> Tensor:
    """Returns the log-probability of each of the last tokens, (sequences, last)."""
    return log_p[:, : tokens.shape[1] - 1].gather(-1, tokens[:, 1:, None]).squeeze(-1)[:, -last:]
