"""Experts with transformers' experts interface: flags on the module say how to read its fused parameters.

Letters: E experts, H hidden size, I intermediate size, T tokens, k experts per token.

The parameters are `gate_up_proj` (E, 2I, H), or `up_proj` (E, I, H) without a gate, and `down_proj` (E, H, I). The
flags: `has_gate`, `has_bias`, `is_transposed` ((E, H, 2I) and (E, I, H)), `is_concatenated` (gate rows first; otherwise
gate and up rows alternate).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .expert_names import merged_from
from .experts import Routing, UnfusedExperts, add_linear, without_fused

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")


class Projections(NamedTuple):
    """The names of an expert's linears; `gate` is empty if there is no gate."""

    gate: str
    up: str
    down: str


def is_fused_experts(module: nn.Module) -> bool:
    """Returns whether `module` has the experts interface and its fused parameters."""
    has_flags = all(hasattr(module, flag) for flag in FLAGS)
    return has_flags and all(
        isinstance(parameter := getattr(module, name, None), nn.Parameter) and parameter.ndim == 3
        for name in fused_names(module)
    )


def fused_names(module: nn.Module) -> list[str]:
    """Returns the names of the fused weights, first and second projection."""
    return ["gate_up_proj" if cast(Any, module).has_gate else "up_proj", "down_proj"]


def original_projections(module_name: str, module: nn.Module, conversions: Sequence[Any]) -> Projections | None:
    """Reads the names of the checkpoint's per-expert linears from the converters that merge them; None if none does."""
    first, second = (merged_from(f"{module_name}.{fused}", conversions) for fused in fused_names(module))
    has_gate = cast(Any, module).has_gate
    if first is None or second is None or len(first) != 1 + has_gate or len(second) != 1:
        return None
    return Projections(*(first if has_gate else ["", *first]), *second)


def unfused(module: nn.Module, names: Projections | None = None) -> InterfaceExperts:
    """Returns a module that computes what `module` does, with one linear per expert and projection.

    The result is on the meta device if `module` is. Otherwise the linears' weights are views of the fused ones unless
    these are transposed or interleaved, so that taking experts apart needs no memory.
    """
    names = names or Projections("gate_proj" if cast(Any, module).has_gate else "", "up_proj", "down_proj")
    first, second = fused_names(module)
    fused = [name for name in module._parameters if name.removesuffix("_bias") in (first, second)]
    result = without_fused(module, fused, InterfaceExperts)
    result.projections, result.was_fused, result.routing = names, tuple(fused), Routing.TOP_K
    result.experts_total = cast(Tensor, getattr(module, second)).shape[0]
    requires_grad = cast(Tensor, getattr(module, second)).requires_grad
    tensors = result.taken_apart({name: cast(Tensor, module._parameters[name]) for name in fused})
    for name in result.parts(""):
        add_linear(result, name, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), requires_grad)
    return result


class InterfaceExperts(UnfusedExperts):
    """Experts with transformers' interface, taken apart; it uses their gate, activation and norm."""

    projections: Projections

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the experts: (T, H) hidden states, (T, k) int64 experts of each token, (T, k) weights -> (T, H)."""
        signature = inspect.signature(self.fused_class.forward)
        _, hidden_states, top_k_index, top_k_weights = signature.bind(self, *args, **kwargs).args
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        top_k_index = top_k_index.reshape(x.shape[0], -1)
        top_k_weights = top_k_weights.reshape(x.shape[0], -1)
        output = torch.zeros_like(x)
        if self.routing is Routing.TOP_K:
            chosen_weights = top_k_weights.reshape(-1)
            for expert, chosen in enumerate(_chosen_by_expert(top_k_index, self.experts_total)):
                if len(chosen):
                    token = chosen // top_k_index.shape[1]
                    weighted = self._compute(expert, x[token]) * chosen_weights[chosen, None]
                    output.index_add_(0, token, weighted.to(output.dtype))
            return output.view_as(hidden_states)
        for expert in range(self.experts_total):
            weight = (top_k_weights * (top_k_index == expert)).sum(dim=1, keepdim=True)
            if self.routing is Routing.UNIFORM:
                weight = torch.full_like(weight, 1 / self.experts_total)
            output += (self._compute(expert, x) * weight).to(output.dtype)
        return output.view_as(hidden_states)

    def linears_of(self, expert: int) -> list[tuple[str, str]]:
        return [(f"{expert}.{projection}", projection) for projection in self.projections if projection]

    def taken_apart(self, fused: Mapping[str, Tensor]) -> dict[str, Tensor]:
        flags = cast(Any, self)
        first, second = fused_names(self)
        width = fused[first].shape[2 if flags.is_transposed else 1]
        everything = slice(None)
        gate, up = slice(0, width // 2), slice(width // 2, None)
        if not flags.is_concatenated:
            gate, up = slice(0, None, 2), slice(1, None, 2)
        rows = {self.projections.up: (first, up if flags.has_gate else everything)}
        rows |= {self.projections.down: (second, everything)}
        if flags.has_gate:
            rows[self.projections.gate] = (first, gate)
        tensors = {}
        for expert in range(self.experts_total):
            for name, projection in self.linears_of(expert):
                source, chosen = rows[projection]
                weight = fused[source].detach()[expert]  # (out, in), or (in, out)
                tensors[f"{name}.weight"] = (weight.t() if flags.is_transposed else weight)[chosen].contiguous()
                if flags.has_bias:
                    tensors[f"{name}.bias"] = fused[f"{source}_bias"].detach()[expert][chosen].contiguous()
        return tensors

    def _compute(self, expert: int, x: Tensor) -> Tensor:
        """Runs one expert: (t, H) -> (t, H)."""
        flags, linears = cast(Any, self), cast(Any, self.get_submodule(str(expert)))
        up = linears.get_submodule(self.projections.up)(x)
        if flags.has_gate:
            gate = linears.get_submodule(self.projections.gate)(x)
            both = torch.cat([gate, up], -1) if flags.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
            inner = flags._apply_gate(both)
        else:
            inner = flags.act_fn(up)
        output = linears.get_submodule(self.projections.down)(inner)
        return flags.post_expert_norm(output) if getattr(flags, "has_post_expert_norm", False) else output


def _chosen_by_expert(
    top_k_index: Tensor,  # (T, k) int64
    experts: int,
) -> Sequence[Tensor]:
    """Returns the places in the flattened index where each expert is chosen, in order. The host waits once, for sizes.

    Places that name no expert of 0 … `experts` - 1 are left out.
    """
    sorted_index, order = top_k_index.reshape(-1).sort(stable=True)
    borders = torch.arange(experts + 1, dtype=sorted_index.dtype, device=sorted_index.device)
    begin, *ends = torch.searchsorted(sorted_index, borders).tolist()
    return order[begin : ends[-1]].split([end - start for start, end in zip([begin, *ends], ends, strict=False)])
