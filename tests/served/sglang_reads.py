"""Runs SGLang on a CPU on checkpoints of this package; the environment needs SGLang and nothing of this repository.

    python sglang_reads.py CHECKPOINT...

Prints one line of JSON for each checkpoint: what SGLang computed, or its error. SGLang itself reads config.json,
matches names, fuses and loads tensors, and runs the model. Its int4 kernels want AMX or CUDA: in their place, functions
below dequantize the tensors that SGLang has loaded, in the layout of the checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from answering import answer, dequantized, experts, multiplied, unpacked, unpacked_awq
from torch import Tensor

os.environ |= {"SGLANG_USE_CPU_ENGINE": "1"}

# torchvision of the package index is built for CUDA. Without that its operators are not there, and its import fails as
# it describes them; SGLang only wants its transformations of images.
TORCHVISION = torch.library.Library("torchvision", "DEF")
for _operator in ("nms", "qnms", "roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d"):
    for _name in (_operator, f"_{_operator}_backward"):
        TORCHVISION.define(f"{_name}(Tensor unused) -> Tensor")


class _Absent(ModuleType):
    """Stands for SGLang's compiled kernels: they import, and calling one is an error that names it."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"{self.__name__}.{name} is a compiled kernel")

        return absent


sys.modules["sgl_kernel"] = _Absent("sgl_kernel")

PREFIX = 16
"""Tokens that come at once; the others of a prompt come one by one, as generated tokens do."""


def awq_weight(words: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """Returns the weight of AWQ tensors, (..., in, out)."""
    return dequantized(unpacked_awq(words), unpacked_awq(zeros), scales)


class AwqLinear:
    def __init__(self, quant_config: Any) -> None:
        pass

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.dequantized = awq_weight(layer.qweight.data, layer.qzeros.data, layer.scales.data)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return multiplied(x, layer.dequantized, bias)


class AwqExperts:
    def __init__(self, quant_config: Any) -> None:
        pass

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        for name in ("w13", "w2"):
            tensors = (getattr(layer, f"{name}_{part}").data for part in ("qweight", "qzeros", "scales"))
            setattr(layer, f"{name}_dequantized", awq_weight(*tensors))

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        pass

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

        weights, chosen, _ = dispatch_output.topk_output
        hidden_states = dispatch_output.hidden_states
        return StandardCombineInput(
            hidden_states=experts(hidden_states, layer.w13_dequantized, layer.w2_dequantized, weights, chosen)
        )


def compressed_weight(words: Tensor, zeros: Tensor | None, scales: Tensor, bits: int) -> Tensor:
    """Returns the weight of pack-quantized tensors of SGLang's experts, (..., in, out).

    `words` are (..., in · bits / 32, out), `scales` (..., groups, out), `zeros` (..., groups, out · bits / 32).
    """
    codes = unpacked(words.transpose(-1, -2), bits).transpose(-1, -2)
    return dequantized(codes, 2 ** (bits - 1) if zeros is None else unpacked(zeros, bits), scales)


def compressed_linear_loaded(scheme: Any, layer: torch.nn.Module) -> None:
    zeros = None if scheme.symmetric else layer.weight_zero_point.data.t()
    packed, scales = layer.weight_packed.data.t(), layer.weight_scale.data.t()
    layer.dequantized = compressed_weight(packed, zeros, scales, 32 // scheme.pack_factor)


def compressed_linear(scheme: Any, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    return multiplied(x, layer.dequantized, bias)


def compressed_experts_loaded(scheme: Any, layer: torch.nn.Module) -> None:
    for name in ("w13", "w2"):
        zeros = None if scheme.sym else getattr(layer, f"{name}_weight_zero_point").data
        packed, scales = (getattr(layer, f"{name}_weight_{part}").data for part in ("packed", "scale"))
        setattr(layer, f"{name}_dequantized", compressed_weight(packed, zeros, scales, scheme.num_bits))


def compressed_experts(scheme: Any, layer: torch.nn.Module, dispatch_output: Any) -> Any:
    return AwqExperts(None).apply(layer, dispatch_output)


def substitute() -> list[str]:
    """Puts what is above in place of SGLang's int4 kernels; returns the kernels' names."""
    from sglang.srt.layers import quantization
    from sglang.srt.layers.quantization.awq.schemes import awq_cpu
    from sglang.srt.layers.quantization.compressed_tensors import schemes

    quantization.cpu_has_amx_support = lambda: True  # or "awq" would be read by classes for CUDA
    torch.cuda.get_device_capability = lambda *unused: (9, 0)  # schemes of compressed-tensors ask for the card's
    awq_cpu.AWQIntelAMXLinearKernel = AwqLinear
    awq_cpu.AWQIntelAMXMoEKernel = AwqExperts
    for scheme, loaded, applied in (
        (schemes.CompressedTensorsWNA16, compressed_linear_loaded, compressed_linear),
        (schemes.CompressedTensorsWNA16MoE, compressed_experts_loaded, compressed_experts),
    ):
        scheme.process_weights_after_loading = loaded
        scheme.apply_weights = applied
    schemes.CompressedTensorsWNA16MoE.create_moe_runner = lambda *unused: None
    return ["int4_scaled_mm_cpu", "fused_experts_cpu", "Marlin"]


def read(folder: Path) -> dict[str, Any]:
    """Returns the log-probabilities of the prompts' last tokens, and greedy continuations."""
    from sglang.benchmark import one_batch
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.server_args import PortArgs, ServerArgs

    asked = json.loads((folder / "prompts.json").read_text())
    args = ServerArgs(
        model_path=str(folder),
        device="cpu",
        dtype="bfloat16",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        skip_tokenizer_init=True,
        disable_cuda_graph=True,
        max_total_tokens=2048,
        mem_fraction_static=0.2,
    )
    args.resolve_once()
    one_batch._set_envs_and_config(args)
    rank = one_batch.spawn_world_rank(args, tp_rank=0, pp_rank=0)
    one_batch.publish(args, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=rank, gpu_id=0))
    one_batch._init_process_global_configs()
    one_batch.get_tokenizer = lambda *unused, **options: None  # token ids are all that is asked
    runner, _ = one_batch.load_model(args, PortArgs.init_new(args), 0, 0)
    prompts = torch.tensor(asked["prompts"])
    requests = []
    for index, prompt in enumerate(asked["prompts"]):
        prefix = array("q", prompt[:PREFIX])
        request = Req(
            rid=index,
            origin_input_text="",
            origin_input_ids=prefix,
            sampling_params=SamplingParams(temperature=0, max_new_tokens=prompts.shape[1] + asked["new_tokens"]),
        )
        request.full_untruncated_fill_ids = prefix
        request.logprob_start_len = -1
        request.extend_end = PREFIX
        requests.append(request)
    torch_runner = runner.torch_runner
    _, logits, batch = one_batch.extend(requests, torch_runner)
    log_p, follow = [], []
    for place in range(PREFIX, prompts.shape[1] + asked["new_tokens"]):
        everything = logits.float().log_softmax(-1)
        if place < prompts.shape[1]:
            token = prompts[:, place]
            log_p.append(everything.gather(-1, token[:, None]))
        else:
            token = everything.argmax(-1)
            follow.append(token[:, None])
        _, logits = one_batch.decode(token, batch, torch_runner)
    return {"log_p": torch.cat(log_p, 1).tolist(), "follow": torch.cat(follow, 1).tolist()}


if __name__ == "__main__":
    import sglang

    answer(read, {"reader": "SGLang", "version": sglang.__version__, "substituted": substitute()})
