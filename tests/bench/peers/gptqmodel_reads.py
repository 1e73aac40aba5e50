"""Checks that stock transformers with gptqmodel loads what this package writes, and agrees with it.

gptqmodel replaces torch, so that it lives in an environment of its own:

    .venv/bin/python -m hf_awq_offload demo --out /tmp/tiny-llama-awq
    python -m venv /tmp/gptqmodel
    /tmp/gptqmodel/bin/pip install gptqmodel==7.7.0 transformers==5.23.0 accelerate optimum
    .venv/bin/python tests/bench/peers/gptqmodel_reads.py write /tmp/tiny-llama-awq
    /tmp/gptqmodel/bin/python tests/bench/peers/gptqmodel_reads.py compare /tmp/tiny-llama-awq
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(step: str, checkpoint: str) -> None:
    expected = Path(checkpoint) / "logits.st"
    if step == "write":
        import hf_awq_offload  # noqa: F401
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    input_ids = torch.arange(256).reshape(2, 128)
    with torch.no_grad():
        logits = model(input_ids=input_ids).logits.float()
    kind = type(model.model.layers[0].self_attn.q_proj)
    print(f"{kind.__module__}.{kind.__name__}, torch {torch.__version__}")
    if step == "write":
        save_file({"logits": logits.contiguous()}, expected)
        return
    ours = load_file(expected)["logits"]
    kl = torch.nn.functional.kl_div(logits.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="sum")
    difference = float((logits - ours).abs().max() / ours.abs().max())
    print(
        f"largest logit difference {difference:.2e} of the largest logit, KL {float(kl) / input_ids.numel():.2e} nats"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
