"""Runs vLLM on a CPU on checkpoints of this package; the environment needs vLLM and nothing of this repository.

    python vllm_reads.py CHECKPOINT...

Prints one line of JSON for each checkpoint: what vLLM computed, or its error. vLLM itself reads config.json, matches
names, fuses and loads tensors, and runs the model. Its int4 kernels for CPUs want AVX-512 or AMX; on other CPUs, the
three functions below take their place. They read the layouts that vLLM's own code has made for its kernels.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


def unpacked(words: Tensor, bits: int = 4) -> Tensor:
    """Returns the values of int32 words along the last dimension, lowest bits first."""
    return ((words.unsqueeze(-1) >> torch.arange(0, 32, bits, dtype=torch.int32)) & (2**bits - 1)).flatten(-2)


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
    groups, out_features = scales.shape
    bits = 2 * q_weight.shape[1] // input.shape[-1]
    codes = unpacked(q_weight.view(out_features // 16, -1, bits // 2), bits).transpose(0, 1).flatten(1)  # (in, out)
    zero_points = 2 ** (bits - 1) if zeros is None else unpacked(zeros).repeat_interleave(len(codes) // groups, 0)
    weight = (codes - zero_points) * scales.float().repeat_interleave(len(codes) // groups, 0)
    product = input.float() @ weight
    return (product if bias is None else product + bias.float()).to(input.dtype)


def dequantized_experts(
    q_weight: Tensor, zeros: Tensor, scales: Tensor, algorithm: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns weights of experts, (experts, in, out), in place of words in tiles of AMX."""
    if algorithm.name == "AWQ":
        codes, zero_points = (
            unpacked(words).unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2) for words in (q_weight, zeros)
        )
    else:  # packed along the input, zero points stored one too small
        codes = unpacked(q_weight.transpose(1, 2)).transpose(1, 2)
        zero_points = unpacked(zeros) + 1
    repeats = codes.shape[1] // scales.shape[1]
    weight = (codes - zero_points.repeat_interleave(repeats, 1)) * scales.float().repeat_interleave(repeats, 1)
    return weight, zeros, scales


def run_experts(
    output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, chosen: Tensor, *unused: Any
) -> None:
    """Writes the sum of the chosen experts' outputs to `output`."""
    total = torch.zeros(output.shape)
    for expert in chosen.unique().tolist():
        tokens, place = (chosen == expert).nonzero(as_tuple=True)
        gate, up = (hidden_states[tokens].float() @ w1[expert]).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        total.index_add_(0, tokens, (inner @ w2[expert]) * weights[tokens, place, None].float())
    output.copy_(total)


def substitute() -> list[str]:
    """Puts the functions above in place of kernels that this CPU lacks; returns the kernels' names."""
    from vllm import _custom_ops
    from vllm.model_executor.kernels.linear.mixed_precision import cpu as linear
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.scalar_type import scalar_types

    names = []
    linear._CPUWNA16_SUPPORTED_QUANT_TYPES += (scalar_types.uint8b128,)  # 8 bits, which vLLM serves on GPUs
    _custom_ops.cpu_gemm_wna16 = gemm_wna16
    names.append("cpu_gemm_wna16")
    if not torch.cpu._is_amx_tile_supported():
        cpu_moe.CPUExpertsInt4._supports_current_device = staticmethod(lambda: True)
        cpu_moe.convert_weight_packed_scale_zp = dequantized_experts
        cpu_moe.fused_experts_cpu = run_experts
        names.append("fused_experts_cpu")
    return names


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


def main(folders: list[Path]) -> None:
    import vllm

    about = {"reader": "vLLM", "version": vllm.__version__, "substituted": substitute()}
    for folder in folders:
        try:
            found = read(folder)
        except BaseException as error:  # whatever it is, it is the answer
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps({"kind": folder.name, **about, **found}), flush=True)


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
