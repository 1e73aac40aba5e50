"""Says which compressed-tensors checkpoints of this package transformers loads by itself.

    PYTHONPATH=.:tests python tests/bench/peers/transformers_loads.py make /tmp/loads
    PYTHONPATH=/tmp/transformers-5.20 python tests/bench/peers/transformers_loads.py load /tmp/loads

The second command does not import this package. It runs with any release of transformers and compressed-tensors, here
with one from `pip install --no-deps --target /tmp/transformers-5.20 transformers==5.20.2`. For each checkpoint, it
prints "equal" (logits within 1e-4 of what the package computes), the largest difference of the logits, or the error.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, __version__

TOKENS = torch.arange(3, 35).reshape(2, 16)


def make(folder: Path) -> None:
    from expert_models import mixtral
    from models import tiny_llama, token_batch

    from hf_awq_offload import AwqOffloadConfig, quantize_model

    mixed = {"down_proj$": {"bits": 8}}
    cases = {
        "symmetric": (tiny_llama, {"zero_point": False}),
        "symmetric, mixed": (tiny_llama, {"zero_point": False, "overrides": mixed}),
        "asymmetric": (tiny_llama, {"zero_point": True}),
        "asymmetric, 3 bits": (tiny_llama, {"zero_point": True, "bits": 3}),
        "experts, symmetric": (mixtral, {"zero_point": False}),
        "experts, asymmetric": (mixtral, {"zero_point": True}),
        "experts of one layer dense": (
            mixtral,
            {"zero_point": False, "modules_to_not_convert": [r"model\.layers\.1\.mlp\.experts"]},
        ),
    }
    for name, (build, fields) in cases.items():
        data = {"dataset": token_batch(4, 32), "n_samples": 4, "max_seq_len": 32, "n_grid": 3, "group_size": 32}
        model = quantize_model(build(), AwqOffloadConfig(**{"format": "compressed-tensors", **data, **fields}))
        model.save_pretrained(folder / name)
        with torch.no_grad():
            torch.save(model(TOKENS).logits, folder / name / "logits.pt")


def load(folder: Path) -> None:
    from transformers import CompressedTensorsConfig

    print("transformers", __version__)
    for path in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        for dequantize in (False, True):
            config = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
            try:
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.simplefilter("ignore")
                    logits = AutoModelForCausalLM.from_pretrained(path, **config)(TOKENS).logits
                difference = float((logits - torch.load(path / "logits.pt")).abs().max())
                found = "equal" if difference < 1e-4 else f"differs by {difference:.2g}"
            except Exception as error:  # whatever it is, it is the answer
                found = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            print(f"  {path.name}{', dequantize=True' if dequantize else ''}: {found}")


if __name__ == "__main__":
    {"make": make, "load": load}[sys.argv[1]](Path(sys.argv[2]))
