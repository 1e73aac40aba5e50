"""Registers with transformers at no cost: importing the package imports neither transformers nor torch.

transformers asks two dicts of `transformers.quantizers.auto` for a quantizer. As soon as that module is imported, by
whomever, stand-ins are put there; the first of them that is used, or the first public name of the package, puts the
real classes in their places. Importing transformers' quantizers here instead would cost what torch costs; importing the
package's own in the middle of transformers' import would run in a circle.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

WATCHED = "transformers.quantizers.auto"
CONFIGS, QUANTIZERS = "AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"


def register_when_needed() -> None:
    """Stand-ins go into transformers' mappings: now if these are there, else when they are imported."""
    if WATCHED in sys.modules:
        put_stand_ins(sys.modules[WATCHED])
    else:
        sys.meta_path.insert(0, _Watch())


def put_stand_ins(auto: ModuleType) -> None:
    """For what `registration.register` registers; the conditions are looked up there once one of them is used."""
    from transformers.utils.import_utils import is_compressed_tensors_available, is_gptqmodel_available

    places = [(CONFIGS, "awq_offload"), (QUANTIZERS, "awq_offload"), (QUANTIZERS, "compressed-tensors")]
    if not is_gptqmodel_available():
        places.append((QUANTIZERS, "awq"))
    if not is_compressed_tensors_available():
        places.append((CONFIGS, "compressed-tensors"))
    for mapping, method in places:
        getattr(auto, mapping)[method] = StandIn(mapping, method)


class StandIn:
    """In a mapping of transformers, until it is asked for a quantizer or a config."""

    def __init__(self, mapping: str, method: str):
        self.mapping = mapping
        self.method = method

    def resolved(self) -> Any:
        """What stands in the place once the package is registered."""
        importlib.import_module("hf_awq_offload.integrations.registration").register()
        return getattr(sys.modules[WATCHED], self.mapping)[self.method]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.resolved()(*args, **kwargs)

    def from_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.resolved().from_dict(*args, **kwargs)


class _Watch(MetaPathFinder):
    """Finds one module, by all other finders, and has something done after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        put_stand_ins(module)
