"""Finds how a module computes with fused expert parameters, and proves that linears per expert compute the same.

1. A small-weighted *twin* of the module, on the CPU in fp32 with random weights, runs on the inputs of each contract
   (`expert_contracts.py`) that fits the number of its arguments, until one works.
2. The same forward runs once more with a `FusedWeight` for each parameter, which records the products.
3. The twin is taken apart and must yield the output of the fused one, however tokens are routed.

The module's own weights are not read: they may be on the meta device, and a checkpoint must load into the modules that
it was saved from.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..machine_errors import reraise_of_machine
from .expert_contracts import CONTRACTS, Contract, RoutedTokens
from .expert_products import ExpertSlice, FusedWeight, NotAProductError
from .experts import Routing
from .linears import LEAST_SIDE, PRODUCT_TOLERANCE
from .replayed_experts import FusedParameter, ProductLayout, replayed

MOST_EXPERTS = 4
"""Experts that a proof reaches; the slices of the others follow from strides."""
LARGE_ELEMENTS = 1 << 24
"""The random slices of larger parameters overlap in memory, so that the twin needs no more than one slice does."""
RANDOM_PERIOD = 1_000_003
"""Random numbers that are repeated in large parameters; a prime, so that no row or slice equals another."""


@dataclass(frozen=True)
class Refusal:
    """Why a module with matrices that look like those of experts can't be taken apart."""

    reason: str


def layout_of(module: nn.Module) -> ProductLayout | Refusal:
    """Returns how to take a module apart that holds fused matrices, itself or in a direct part; or why not."""
    if any(isinstance(part, nn.Linear) for part in module.modules()):
        return Refusal("its module holds linears, too")
    weights = _matrices(module)
    known = _LAYOUTS.setdefault(type(module), {})
    key = _key(module, weights)
    if key not in known:
        with _plain_torch():
            known[key] = _found(module, weights)
    return known[key]


_LAYOUTS: WeakKeyDictionary[type, dict[Any, ProductLayout | Refusal]] = WeakKeyDictionary()
"""Class -> shapes and settings of a module -> its layout."""


def fused_matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the direct parameters of `module` that may hold one matrix for each of many experts."""
    if type(module).__module__.startswith("torch.nn.") or isinstance(module, nn.Linear | nn.Embedding):
        return {}
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim in (2, 3) and sorted(parameter.shape)[-2] >= LEAST_SIDE
    }


def _matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the matrices that `module` holds, or else those of its direct parts."""
    return fused_matrices(module) or {
        f"{part_name}.{name}": parameter
        for part_name, part in module.named_children()
        for name, parameter in fused_matrices(part).items()
    }


def _key(module: nn.Module, weights: Mapping[str, nn.Parameter]) -> Any:
    """Returns what a layout may depend on beside the class: shapes, and settings other than the layer's number."""
    settings = tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str) and "layer" not in name and name != "training"
    )
    parts = tuple((name, type(part)) for name, part in module.named_modules())
    return tuple((name, tuple(weight.shape)) for name, weight in weights.items()), settings, parts


def _found(module: nn.Module, weights: Mapping[str, nn.Parameter]) -> ProductLayout | Refusal:
    required = _required_arguments(module)
    refusal = Refusal(f"its forward takes {required} arguments, of which none are known to work")
    twin = _twin(module)
    for contract in CONTRACTS.get(required, ()):
        for hidden_size in sorted({side for weight in weights.values() for side in weight.shape[-2:]}):
            outcome = _tried(twin, list(weights), contract, hidden_size)
            if isinstance(outcome, ProductLayout):
                return outcome
            refusal = outcome or refusal
    return refusal


def _tried(twin: nn.Module, names: list[str], contract: Contract, hidden_size: int) -> ProductLayout | Refusal | None:
    """Returns what comes of one contract and width; None if the twin does not run on their inputs."""
    stacks = [twin.get_parameter(name).shape[0] for name in names if twin.get_parameter(name).ndim == 3]
    total = min(stacks, default=2)
    reached = [0, min(1, total - 1)] if stacks else [0, 1]
    arguments = contract.inputs(hidden_size, reached, total, torch.Generator().manual_seed(0))
    if _output(twin, arguments) is None:
        return None
    recorder = _Recorder(twin, names)
    try:
        recorder.run(arguments)
    except NotAProductError as error:
        others = [name for name in names if name != error.parameter]
        if not others:
            return Refusal(str(error))
        outcome = _tried(twin, others, contract, hidden_size)
        if not isinstance(outcome, ProductLayout):
            return Refusal(str(error))
        return replace(outcome, refused={**outcome.refused, error.parameter: str(error)})
    except Exception as error:  # the module's own forward may need anything of a parameter
        reraise_of_machine(error)
        return Refusal(f"its forward does not run with linears ({type(error).__name__}: {error})")
    parameters = recorder.parameters()
    if isinstance(parameters, Refusal):
        return parameters
    return _proven(twin, ProductLayout(contract, parameters), hidden_size)


def _proven(twin: nn.Module, layout: ProductLayout, hidden_size: int) -> ProductLayout | Refusal | None:
    """Returns the layout if the twin, taken apart, computes what it did before; None if it takes other arguments."""
    apart = replayed(twin, layout, as_views=True)
    total = layout.experts_computing
    reached = sorted({round(index * (total - 1) / (MOST_EXPERTS - 1)) for index in range(MOST_EXPERTS)})
    choices = [reached]
    if layout.experts_total > total and isinstance(layout.contract, RoutedTokens):
        choices.append([*reached, layout.experts_total - 1])  # a token may choose an expert that computes nothing
    for experts in choices:
        arguments = layout.contract.inputs(hidden_size, experts, total, torch.Generator().manual_seed(1))
        expected = _output(twin, arguments)
        if expected is None:
            if experts is reached:
                return None
            continue
        for routing in (Routing.TOP_K, Routing.EVERY_TOKEN):
            apart.routing = routing
            output = _output(apart, arguments)
            if output is None or not _are_close(output, expected):
                return Refusal(f"linears per expert compute something else when tokens go {routing.value}")
        apart.routing = Routing.UNIFORM
        if _output(apart, arguments) is None:
            return Refusal("it does not run when every expert computes every token")
    return layout


class _Recorder:
    """Runs a twin with `FusedWeight` in place of parameters, and records the slices that are multiplied."""

    def __init__(self, twin: nn.Module, names: list[str]):
        self.twin = twin
        self.tensors = {name: twin.get_parameter(name) for name in names}
        self.slices: dict[str, set[tuple[int, int, bool]]] = {name: set() for name in names}

    def run(self, arguments: tuple[Any, ...]) -> None:
        module = _shallow(self.twin)
        for name, tensor in self.tensors.items():
            owner_name, _, last = name.rpartition(".")
            owner = module.get_submodule(owner_name)
            del owner._parameters[last]
            object.__setattr__(owner, last, FusedWeight.of(self, name, tuple(tensor.shape), tensor.dtype))
        type(module).forward(module, *arguments)

    def multiply(self, x: Tensor, expert_slice: ExpertSlice) -> Tensor:
        name, expert, rows, columns, is_transposed = expert_slice
        tensor = self.tensors[name]
        whole = tuple(tensor.shape[1:]) if tensor.ndim == 3 else (rows, tensor.shape[1])
        if (rows, columns) != whole:
            raise NotAProductError(name, f"a product with a part of an expert's slice, {(rows, columns)} of {whole}")
        self.slices[name].add((rows, columns, is_transposed))
        stored = FusedParameter(tuple(tensor.shape), rows, columns, is_transposed, ("",)).slice_of(tensor, expert)
        return nn.functional.linear(x, stored)

    def compute_device(self) -> torch.device:
        return torch.device("cpu")

    def parameters(self) -> dict[str, FusedParameter] | Refusal:
        """Returns what was recorded; parameters that no product reached are left as they are."""
        found = {}
        for name, seen in self.slices.items():
            if len(seen) > 1:
                return Refusal(f"{name} is multiplied in several shapes")
            for rows, columns, is_transposed in seen:
                shape = tuple(self.tensors[name].shape)
                parameter = FusedParameter(shape, rows, columns, is_transposed, ("",))
                if parameter.experts > 1 or len(shape) == 3:
                    is_alone = len(self.slices) == 1
                    projections = _projections(name.rpartition(".")[2], parameter.out_features, is_alone)
                    found[name] = FusedParameter(shape, rows, columns, is_transposed, projections)
        if not found:
            return Refusal("no product of one expert's slice was seen")
        return found


def _projections(name: str, out_features: int, is_alone: bool) -> tuple[str, ...]:
    """Returns the names of a fused parameter's linears: "gate_up_proj" is two, one below the other."""
    if name == "weight" and is_alone:
        return ("",)
    if "gate_up" in name and out_features % 2 == 0:
        return name.replace("gate_up", "gate"), name.replace("gate_up", "up")
    return (name,)


def _required_arguments(module: nn.Module) -> int:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in kinds and parameter.default is parameter.empty for parameter in parameters)


def _twin(module: nn.Module) -> nn.Module:
    """Returns a copy on the CPU in fp32 with random weights, without hooks."""
    generator = torch.Generator().manual_seed(0)
    twin = _shallow(module)
    for part in twin.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(_random(parameter.shape, generator), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                is_number = buffer.is_floating_point()
                part._buffers[name] = (
                    _random(buffer.shape, generator) if is_number else torch.zeros_like(buffer, device="cpu")
                )
            elif buffer is not None:
                part._buffers[name] = buffer.to("cpu", torch.float32) if buffer.is_floating_point() else buffer.cpu()
    return twin.eval()


def _shallow(module: nn.Module) -> nn.Module:
    """Returns a copy of the tree of modules that holds the same tensors; it has no hooks, nor others' forwards."""
    result = copy.copy(module)
    result.__dict__.pop("forward", None)  # of accelerate
    result.__dict__.pop("_hf_hook", None)
    result._forward_hooks, result._forward_pre_hooks = OrderedDict(), OrderedDict()
    result._parameters, result._buffers = dict(module._parameters), dict(module._buffers)
    result._modules = {name: part if part is None else _shallow(part) for name, part in module._modules.items()}
    return result


def _random(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
    """Returns random numbers that keep the size of activations about what it is."""
    if len(shape) < 2:
        return torch.rand(shape, generator=generator) + 0.5
    scale = max(shape[-2:]) ** -0.5
    elements = torch.Size(shape).numel()
    if elements <= LARGE_ELEMENTS:
        return torch.randn(shape, generator=generator) * scale
    shift = LEAST_SIDE + 1  # between slices, or between the rows of a matrix
    size = elements // shape[0]
    period = torch.randn(RANDOM_PERIOD, generator=generator) * scale
    numbers = period.repeat(-(-(size + shape[0] * shift) // RANDOM_PERIOD))
    stride = (shift, shape[-1], 1) if len(shape) == 3 else (shift, 1)
    return numbers.as_strided(tuple(shape), stride)


def _output(module: nn.Module, arguments: tuple[Any, ...]) -> Tensor | None:
    """Returns what a module computes; None if it fails, or does not yield one tensor of finite numbers."""
    copies = tuple(argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments)
    try:
        output = type(module).forward(module, *copies)
    except Exception as error:  # any other error means that it needs other arguments
        reraise_of_machine(error)
        return None
    is_tensor = isinstance(output, Tensor) and output.is_floating_point()
    return output if is_tensor and bool(torch.isfinite(output).all()) and bool(output.any()) else None


def _are_close(output: Tensor, expected: Tensor) -> bool:
    return output.shape == expected.shape and bool((output - expected).norm() <= PRODUCT_TOLERANCE * expected.norm())


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Computes on the CPU in fp32 inside the context; transformers builds models under the meta device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)
