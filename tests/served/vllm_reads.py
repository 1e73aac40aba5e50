"""Runs vLLM on a CPU on checkpoints of this package; the environment needs vLLM and nothing of this repository.

    python vllm_reads.py CHECKPOINT...

Prints one line of JSON for each checkpoint: what vLLM computed, or its error. vLLM itself reads config.json, matches
names, fuses and loads tensors, and runs the model. Functions below take the place of its int4 kernels for CPUs. They
read the layouts that vLLM's own code has made for these.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from answering import answer, dequantized, experts, multiplied, unpacked, unpacked_awq
from torch import Tensor

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}


def gemm_wna16(
    input: Tensor,
    q_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> Tensor:
    """Multiplies by a weight in blocks of 16 output channels; `q_weight` is (out / 16, in · bits / 2) words."""
    out_features = scales.shape[1]
    bits = 2 * q_weight.shape[1] // input.shape[-1]
    codes = unpacked(q_weight.view(out_features // 16, -1, bits // 2), bits).transpose(0, 1).flatten(1)  # (in, out)
    zero_points = 2 ** (bits - 1) if zeros is None else unpacked(zeros)
    return multiplied(input, dequantized(codes, zero_points, scales), bias)


def dequantized_experts(
    q_weight: Tensor, zeros: Tensor, scales: Tensor, algorithm: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns weights of experts, (experts, in, out), in place of words in tiles of AMX."""
    if algorithm.name == "AWQ":
        codes, zero_points = unpacked_awq(q_weight), unpacked_awq(zeros)
    else:  # packed along the input, zero points stored one too small
        codes, zero_points = unpacked(q_weight.transpose(1, 2)).transpose(1, 2), unpacked(zeros) + 1
    return dequantized(codes, zero_points, scales), zeros, scales


def run_experts(
    output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, chosen: Tensor, *unused: Any
) -> None:
    """Writes the sum of the chosen experts' outputs to `output`."""
    output.copy_(experts(hidden_states, w1, w2, weights, chosen))


def substitute() -> list[str]:
    """Puts the functions above in place of vLLM's int4 kernels for CPUs; returns the kernels' names."""
    from vllm import _custom_ops
    from vllm.model_executor.kernels.linear.mixed_precision import cpu as linear
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.scalar_type import scalar_types

    linear._CPUWNA16_SUPPORTED_QUANT_TYPES += (scalar_types.uint8b128,)  # 8 bits, which vLLM serves on GPUs
    _custom_ops.cpu_gemm_wna16 = gemm_wna16
    cpu_moe.CPUExpertsInt4._supports_current_device = staticmethod(lambda: True)
    cpu_moe.convert_weight_packed_scale_zp = dequantized_experts
    cpu_moe.fused_experts_cpu = run_experts
    return ["cpu_gemm_wna16", "fused_experts_cpu"]


def read(folder: Path) -> dict[str, Any]:
    """Returns the log-probabilities of the prompts' tokens, and greedy continuations."""
    from vllm import LLM, SamplingParams

    asked = json.loads((folder / "prompts.json").read_text())
    model = LLM(str(folder), dtype="bfloat16", enforce_eager=True, skip_tokenizer_init=True, max_model_len=128)
    greedy = SamplingParams(
        temperature=0, max_tokens=asked["new_tokens"], prompt_logprobs=0, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    outputs = model.generate(prompts, greedy, use_tqdm=False)
    log_p = [
        [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        for output, prompt in zip(outputs, asked["prompts"], strict=True)
    ]
    return {"log_p": log_p, "follow": [list(output.outputs[0].token_ids) for output in outputs]}


if __name__ == "__main__":
    import vllm

    answer(read, {"reader": "vLLM", "version": vllm.__version__, "substituted": substitute()})
