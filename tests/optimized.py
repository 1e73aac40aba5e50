"""Runs the package as `python -O` does, without its asserts, while tests keep theirs.

    TEST_OPTIMIZED=1 python -m pytest tests/cli tests/formats        (or `make test-optimized`)

`python -O -m pytest` would take the asserts out of helpers of tests, too. Processes that tests start run under -O
(`started_optimized` in conftest.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

PACKAGE = "hf_awq_offload"
VARIABLE = "TEST_OPTIMIZED"


class WithoutAsserts(SourceFileLoader):
    """Compiles a module at optimization level 1; what is cached is compiled with asserts."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return compile(self.get_data(path), path, "exec", dont_inherit=True, optimize=1)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = WithoutAsserts(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Has the package imported without asserts from here on; it must not have been imported before."""
    assert not any(name.partition(".")[0] == PACKAGE for name in sys.modules)
    sys.meta_path.insert(0, _Finder())


if os.environ.get(VARIABLE):
    install()
