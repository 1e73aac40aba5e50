"""Runs stock transformers on checkpoints of this package, with the libraries that it uses for each format.

    python transformers_reads.py CHECKPOINT...

The environment must not have this package. Prints one line of JSON for each checkpoint: what the model computed, or the
error.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from answering import answer
from transformers import AutoModelForCausalLM


@torch.no_grad()
def read(folder: Path) -> dict[str, Any]:
    """Returns the log-probabilities of the prompts' tokens, and greedy continuations."""
    asked = json.loads((folder / "prompts.json").read_text())
    tokens = torch.tensor(asked["prompts"])
    given = tokens.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for _ in range(asked["new_tokens"]):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    log_p = model(tokens[:, :given]).logits.float().log_softmax(-1)[:, :-1]
    at_tokens = log_p.gather(-1, tokens[:, 1:given, None]).squeeze(-1)
    return {"log_p": at_tokens.tolist(), "follow": tokens[:, given:].tolist()}


if __name__ == "__main__":
    if importlib.util.find_spec("hf_awq_offload") is not None:
        raise SystemExit("This is about transformers without hf_awq_offload; use an environment that lacks it.")
    answer(read, {"reader": "transformers", "version": transformers.__version__, "substituted": []})
