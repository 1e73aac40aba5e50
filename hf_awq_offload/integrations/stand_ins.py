"""Registers with transformers at no cost: importing the package imports neither transformers nor torch.

transformers looks quantizers up in two dicts of `transformers.quantizers.auto`. When anything imports that module,
stand-ins are put into the dicts. The first use of a stand-in, or of a public name of the package, replaces them by the
real classes. Importing transformers' quantizers here instead would cost as much as importing torch, and importing our
own in the middle of transformers' import would be circular.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, cast

WATCHED = "transformers.quantizers.auto"
CONFIGS, QUANTIZERS = "AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"


def register_when_needed() -> None:
    """Puts stand-ins into transformers' mappings: now if they are imported already, else once they are."""
    if WATCHED in sys.modules:
        put_stand_ins(sys.modules[WATCHED])
    else:
        sys.meta_path.insert(0, _Watch())


def put_stand_ins(auto: ModuleType) -> None:
    """Puts a stand-in wherever `registration.register` will put a real class, under the same conditions."""
    from transformers.utils.import_utils import is_compressed_tensors_available, is_gptqmodel_available

    places = [(CONFIGS, "awq_offload"), (QUANTIZERS, "awq_offload"), (QUANTIZERS, "compressed-tensors")]
    if not is_gptqmodel_available():
        places.append((QUANTIZERS, "awq"))
    if not is_compressed_tensors_available():
        places.append((CONFIGS, "compressed-tensors"))
    for mapping, method in places:
        getattr(auto, mapping)[method] = StandIn(mapping, method)


class StandIn:
    """Stands in a mapping of transformers until a quantizer or config is asked for, then registers the real one."""

    def __init__(self, mapping: str, method: str):
        self.mapping = mapping
        self.method = method

    def resolved(self) -> Any:
        """Registers the package, and returns the class that takes this stand-in's place."""
        importlib.import_module("hf_awq_offload.integrations.registration").register()
        return getattr(sys.modules[WATCHED], self.mapping)[self.method]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.resolved()(*args, **kwargs)

    def from_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.resolved().from_dict(*args, **kwargs)


class _Watch:  # not a MetaPathFinder: importing importlib.abc takes as long as all of this package's import
    """Finds WATCHED through the other finders, and has the stand-ins put there after its code has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = cast(Any, _ThenRegister(spec.loader))
        return spec


class _ThenRegister:
    def __init__(self, loader: Any):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        put_stand_ins(module)
