"""The quantized linear, by each backend, beside a dense one in bf16: µs, GB/s, share of the rate of a copy.

Each call reads the weight from memory, not from the card's cache: the calls take turns among as many weights as exceed
the cache several times. GB/s counts the bytes of the weight (packed, with scales and zero points; or dense) and of the
inputs and outputs, in the time of a call in a CUDA graph, where the host's part is gone. The other time is that of
calls one after the other as PyTorch runs them, by events around them. Both include everything between `linear(x)` and
its result, such as adding up partial sums.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_awq_offload import AwqLinear, ConfigError

from .device import copy_gb_per_s, graph_of, milliseconds, rate
from .figures import LINEAR_ROWS, LINEAR_WAYS
from .kernels import linear_of, random_packed
from .recorder import NotRunError, Recorder

SHAPES = ((11008, 4096), (4096, 4096), (4096, 11008))
"""Output and input channels; the first is in the table."""
GROUP_SIZE = 128
CACHES = 5
"""The weights of a case are together so many times as large as the card's cache."""


@torch.inference_mode()
def run(recorder: Recorder) -> None:
    copied = copy_gb_per_s((1 << 20) if recorder.is_small else (1 << 30))
    recorder.details("copy", gb_per_s=copied)
    for out_features, in_features in ((64, 128),) if recorder.is_small else SHAPES:
        is_first = (out_features, in_features) in (SHAPES[0], (64, 128))
        for way in LINEAR_WAYS:
            with recorder.attempt(f"{way}, {in_features} to {out_features}"):
                linears = _linears(recorder, way, out_features, in_features)
                for rows in LINEAR_ROWS:
                    recorder.require_seconds(3)
                    found = _measured(recorder, linears, rows, copied)
                    recorder.details("linear", shape=[out_features, in_features], rows=rows, way=way, **found)
                    for name, value in found.items() if is_first else ():
                        recorder.figure(f"linears.{rows}_{way}_{name}", value)


def _linears(recorder: Recorder, way: str, out_features: int, in_features: int) -> list[nn.Module]:
    """Returns linears of this shape, together larger than the cache."""
    cache_bytes = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 100 << 20
    own_bytes = out_features * in_features * (2 if way == "dense" else 0.5)
    count = 2 if recorder.is_small else max(2, min(64, int(CACHES * cache_bytes / own_bytes) + 1))
    if way == "dense":
        made = {"bias": False, "device": "cuda", "dtype": torch.bfloat16}
        return [nn.Linear(in_features, out_features, **made) for _ in range(count)]
    packed = random_packed(out_features, in_features, GROUP_SIZE)
    linears: list[nn.Module] = []
    for _ in range(count):
        own = type(packed)(*(tensor.clone() for tensor in packed))
        linears.append(linear_of(own, GROUP_SIZE, torch.bfloat16, way))
    try:
        linears[0](torch.zeros(1, in_features, device="cuda", dtype=torch.bfloat16))
    except ConfigError as error:
        raise NotRunError(str(error)) from error
    return linears


def _measured(recorder: Recorder, linears: list[nn.Module], rows: int, copied: float) -> dict[str, float]:
    first = linears[0]
    x = torch.randn(rows, first.in_features, device="cuda", dtype=torch.bfloat16)
    calls = [lambda linear=linear: linear(x) for linear in linears]
    few = recorder.is_small
    found = {"us": milliseconds(calls, 2 if few else 9, warm_up=1 if few else 2) * 1e3}
    if recorder.is_simulated:
        return found
    graph = graph_of(calls)
    found["graph_us"] = milliseconds([graph.replay], 9, warm_up=2) * 1e3 / len(calls)
    moved = _weight_bytes(first) + rows * 2 * (first.in_features + first.out_features)
    found["gb_per_s"] = rate(moved, found["graph_us"] / 1e3) / 1e9
    found["share"] = found["gb_per_s"] / copied
    return found


def _weight_bytes(linear: nn.Module) -> int:
    """Returns what the card holds of a weight, in whatever layout its backend reads."""
    if not isinstance(linear, AwqLinear):
        weight = linear.weight
        assert isinstance(weight, Tensor)
        return weight.nbytes
    return sum(parameter.nbytes for parameter in linear.parameters())
