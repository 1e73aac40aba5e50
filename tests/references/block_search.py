"""Implements AWQ as its paper describes it: every candidate is tried in the model and judged by its block's output.

Lin et al. 2023, arXiv:2306.00978 (section 3.2), with the formulas and constants of AutoAWQ 0.2.9. Slow and obvious;
for decoders of Llama's shape (no biases needed, norm * weight). For each decoder layer, with inputs recorded from
the full-precision model:

    1. scales, for each group of linears that share an input X:
           x_j = mean |X_tj|,  w_j = mean over rows of |W_ij| / max |W| in its quantization group
           s   = max(x^α / (w^(1-α) + 1e-4), 1e-4),  s ← s / sqrt(max s * min s),  α = 0, 1/20, ..., 19/20
       the α whose Q(W s) / s changes the block's output least; then W ← W s, and the producer is divided by s
    2. clipping, per output row and group of all linears but q and k (their outputs meet in a softmax product):
           |w| ≤ (1 - i/20) max |w|,  i = 0, ..., 9, by the error of the group's contribution to the output
    3. rounding to nearest on the asymmetric grid

Letters: T tokens, n groups of a row, g group size. Everything is in fp32.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

MAX_Q = 15  # 4 bits
N_GRID = 20
MAX_SHRINK = 0.5
CLIP_TOKENS = 512
CLIP_ROWS = 64
"""Output rows that the clip search takes at a time; bounds its memory, not its result."""

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NEVER_CLIPPED = ("self_attn.q_proj", "self_attn.k_proj")


@torch.no_grad()
def quantize_by_block_search(
    model: PreTrainedModel,
    batches: Sequence[Tensor],  # each (batch, tokens) int64
    group_size: int = 128,
) -> PreTrainedModel:
    """A copy of `model` in fp32 whose decoder linears hold quantize-dequantized weights.

    Args:
        model: a Llama-shaped decoder (`model.model.layers`), which is left alone.
        batches: calibration tokens without padding.
        group_size: input channels per scale and zero point.
    """
    full = copy.deepcopy(model).float().eval()
    quantized = copy.deepcopy(full)
    for full_layer, layer in zip(full.model.layers, quantized.model.layers, strict=True):
        recorded = _record(full, full_layer, batches)
        for group in _scale_groups(layer, recorded):
            scales = _search_scales(group, group_size)
            _apply_scales(group, scales)
        for name in LINEARS:
            linear = layer.get_submodule(name)
            if name not in NEVER_CLIPPED:
                limits = _search_clip(linear.weight, recorded.inputs_of(name), group_size)
                linear.weight.copy_(_clamp_groups(linear.weight, limits))
            linear.weight.copy_(quantize_dequantize(linear.weight, group_size))
    return quantized


def quantize_dequantize(
    weight: Tensor,  # (out, in)
    group_size: int,
) -> Tensor:
    """Round to nearest on the asymmetric grid of each row's groups; (out, in)."""
    grouped = weight.reshape(weight.shape[0], -1, group_size)  # (out, n, g)
    low, high = grouped.amin(dim=-1, keepdim=True), grouped.amax(dim=-1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / MAX_Q
    zero = (-torch.round(low / scale)).clamp(0, MAX_Q)
    q = (torch.round(grouped / scale) + zero).clamp(0, MAX_Q)
    return ((q - zero) * scale).reshape(weight.shape)


@dataclass
class _Recorded:
    """The inputs of one decoder layer, per batch."""

    inputs: dict[str, list[Tensor]]  # linear -> its input per batch, (batch, tokens, in)
    attention_kwargs: list[dict]  # arguments of the attention block, without its hidden_states

    def inputs_of(self, name: str) -> list[Tensor]:
        """q, k, v share one list, and so do gate and up: what is scaled for one of them is scaled for all."""
        shared = {
            "self_attn.k_proj": "self_attn.q_proj",
            "self_attn.v_proj": "self_attn.q_proj",
            "mlp.up_proj": "mlp.gate_proj",
        }
        return self.inputs[shared.get(name, name)]


@dataclass
class _ScaleGroup:
    """Linears that share an input, what can absorb the inverse of their scales, and the block that judges."""

    producer: nn.Module  # a norm (its weight) or a linear (its rows)
    linears: list[nn.Linear]
    inputs: list[Tensor]  # per batch (batch, tokens, in)
    run_block: Callable[[int, Tensor], Tensor]  # (index of the batch, input) -> output


def _record(model: PreTrainedModel, layer: nn.Module, batches: Sequence[Tensor]) -> _Recorded:
    """Runs the whole model and records the inputs of `layer`'s blocks and linears."""
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    attention_kwargs: list[dict] = []

    def note_attention(module: nn.Module, args: tuple, kwargs: dict) -> None:
        kwargs = dict(kwargs)
        del kwargs["hidden_states"]
        attention_kwargs.append(kwargs)

    def note_input(name: str) -> Callable[[nn.Module, tuple], None]:
        return lambda module, args: inputs[name].append(args[0].clone())

    handles = [layer.self_attn.register_forward_pre_hook(note_attention, with_kwargs=True)]
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        handles.append(layer.get_submodule(name).register_forward_pre_hook(note_input(name)))
    for batch in batches:
        model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return _Recorded(inputs, attention_kwargs)


def _scale_groups(layer: nn.Module, recorded: _Recorded) -> list[_ScaleGroup]:
    """Returns the groups in AutoAWQ's order; like AutoAWQ, o ← v only without grouped queries."""
    attention, mlp = layer.self_attn, layer.mlp

    def run_attention(index: int, x: Tensor) -> Tensor:
        return attention(hidden_states=x, **recorded.attention_kwargs[index])[0]

    groups = [
        _ScaleGroup(
            layer.input_layernorm,
            [attention.q_proj, attention.k_proj, attention.v_proj],
            recorded.inputs_of("self_attn.q_proj"),
            run_attention,
        )
    ]
    if attention.v_proj.weight.shape == attention.o_proj.weight.shape:
        groups.append(
            _ScaleGroup(
                attention.v_proj,
                [attention.o_proj],
                recorded.inputs_of("self_attn.o_proj"),
                lambda index, x: attention.o_proj(x),
            )
        )
    groups.append(
        _ScaleGroup(
            layer.post_attention_layernorm,
            [mlp.gate_proj, mlp.up_proj],
            recorded.inputs_of("mlp.gate_proj"),
            lambda index, x: mlp(x),
        )
    )
    groups.append(
        _ScaleGroup(
            mlp.up_proj,
            [mlp.down_proj],
            recorded.inputs_of("mlp.down_proj"),
            lambda index, x: mlp.down_proj(x),
        )
    )
    return groups


def _search_scales(group: _ScaleGroup, group_size: int) -> Tensor:
    """(in,): the candidate with which the block's output has the least mean squared error."""
    expected = [group.run_block(index, x) for index, x in enumerate(group.inputs)]
    originals = [linear.weight.clone() for linear in group.linears]  # copies: the weights are overwritten below
    x_mean = _mean_abs(group.inputs)
    w_mean = _mean_relative_weight(originals, group_size)
    best_mse, best_scales = float("inf"), None
    for step in range(N_GRID):
        scales = _candidate(x_mean, w_mean, alpha=step / N_GRID)
        for linear, original in zip(group.linears, originals, strict=True):
            linear.weight.copy_(quantize_dequantize(original * scales, group_size) / scales)
        mse = _mean_squared_error(group, expected)
        if mse < best_mse:
            best_mse, best_scales = mse, scales
    for linear, original in zip(group.linears, originals, strict=True):
        linear.weight.copy_(original)
    assert best_scales is not None, "no candidate gives a finite output"
    return best_scales


def _mean_abs(inputs: list[Tensor]) -> Tensor:
    """Returns the mean of |X| over all tokens, (in,)."""
    tokens = torch.cat([x.flatten(0, -2) for x in inputs])  # (T, in)
    return tokens.abs().mean(dim=0)


def _mean_relative_weight(weights: list[Tensor], group_size: int) -> Tensor:
    """Returns the mean over the rows of all weights of |W| / max |W| in its group, (in,)."""
    weight = torch.cat(weights)  # (rows, in)
    grouped = weight.abs().reshape(weight.shape[0], -1, group_size)  # (rows, n, g)
    relative = grouped / (grouped.amax(dim=-1, keepdim=True) + 1e-6)
    return relative.reshape(weight.shape).mean(dim=0)


def _candidate(
    x_mean: Tensor,  # (in,)
    w_mean: Tensor,  # (in,)
    alpha: float,
) -> Tensor:
    """Returns the scales of one candidate with duo scaling, (in,)."""
    scales = (x_mean**alpha / (w_mean ** (1 - alpha) + 1e-4)).clamp(min=1e-4)
    scales = scales / (scales.max() * scales.min()).sqrt()
    return torch.where(scales.isfinite(), scales, 1.0)


def _mean_squared_error(group: _ScaleGroup, expected: list[Tensor]) -> float:
    squared_sum, elements = 0.0, 0
    for index, x in enumerate(group.inputs):
        difference = group.run_block(index, x) - expected[index]
        squared_sum += difference.square().sum().item()
        elements += difference.numel()
    return squared_sum / elements


def _apply_scales(
    group: _ScaleGroup,
    scales: Tensor,  # (in,)
) -> None:
    """Multiplies the scales into the linears, and divides the producer and the recorded inputs by them."""
    for linear in group.linears:
        linear.weight.mul_(scales)
    if isinstance(group.producer, nn.Linear):
        group.producer.weight.div_(scales[:, None])
        if group.producer.bias is not None:
            group.producer.bias.div_(scales)
    else:
        group.producer.weight.div_(scales)
    for x in group.inputs:
        x.div_(scales)


def _search_clip(
    weight: Tensor,  # (out, in)
    inputs: list[Tensor],  # per batch (batch, tokens, in)
    group_size: int,
) -> Tensor:
    """(out, n): the limit of |w| in each row's groups with which the group's contribution errs least."""
    tokens = torch.cat([x.flatten(0, -2) for x in inputs])  # (T, in)
    tokens = tokens[:: max(1, tokens.shape[0] // CLIP_TOKENS)]
    grouped_tokens = tokens.reshape(tokens.shape[0], -1, group_size)  # (T, n, g)
    best_limits = []
    for rows in weight.split(CLIP_ROWS):
        largest = rows.reshape(rows.shape[0], -1, group_size).abs().amax(dim=-1)  # (rows, n)
        best_mse = torch.full_like(largest, float("inf"))
        best_limit = largest.clone()
        for step in range(int(MAX_SHRINK * N_GRID)):
            limit = largest * (1 - step / N_GRID)
            difference = quantize_dequantize(_clamp_groups(rows, limit), group_size) - rows
            grouped_difference = difference.reshape(rows.shape[0], -1, group_size)  # (rows, n, g)
            contribution = torch.einsum("tng,rng->rnt", grouped_tokens, grouped_difference)
            mse = contribution.square().mean(dim=-1)  # (rows, n)
            is_better = mse < best_mse
            best_mse = torch.where(is_better, mse, best_mse)
            best_limit = torch.where(is_better, limit, best_limit)
        best_limits.append(best_limit)
    return torch.cat(best_limits)


def _clamp_groups(
    weight: Tensor,  # (out, in)
    limits: Tensor,  # (out, n)
) -> Tensor:
    """Returns the weight with each group of each row clamped to ±limit, (out, in)."""
    grouped = weight.reshape(*limits.shape, -1)
    return grouped.clamp(-limits[..., None], limits[..., None]).reshape(weight.shape)
