"""The package's layout: imports go only to lower packages, files stay readable, public names are pinned here."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from imports import LEVELS, MODULES, imported_modules, package_of, rank_of

import hf_awq_offload

MAX_FILE_LINES, MAX_CLASS_LINES = 415, 200

PUBLIC_NAMES = [
    "AwqLinear",
    "AwqOffloadConfig",
    "AwqOffloadError",
    "AwqOffloadQuantizer",
    "CalibrationDataError",
    "CheckpointError",
    "ConfigError",
    "JournalError",
    "MemoryLimitError",
    "ModelStructureError",
    "NumericalError",
    "PackedLinear",
    "Plan",
    "QuantizedWeightError",
    "StorageError",
    "evaluate",
    "plan",
    "quantize",
    "quantize_model",
    "use_for_awq",
    "use_for_compressed_tensors",
]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_is_in_a_package_that_has_a_place(module):
    listed = [name for level in LEVELS for name in level]
    assert listed.count(package_of(module)) == 1, f"give {package_of(module)} a place in LEVELS of tests/imports.py"


@pytest.mark.parametrize("module", MODULES)
def test_a_package_imports_only_what_is_to_its_left(module):
    own = package_of(module)
    others = {name for name in imported_modules(module) if package_of(name) != own}
    wrong = sorted(name for name in others if rank_of(name) >= rank_of(module))
    assert not wrong, f"{module} imports {wrong}, which LEVELS of tests/imports.py puts beside it or to its right"


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: imported_modules(module) for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_this_test_sees_the_imports_that_there_are():
    assert {"config", "pipeline.loop", "errors"} <= imported_modules("integrations.quantizer")
    assert {"formats.grid", "search.statistics"} <= imported_modules("search.scale")
    assert "search.chunks" in imported_modules("search.clip")
    assert "integrations.registration" in imported_modules("integrations.stand_ins"), "import_module with a string"
    assert imported_modules("errors") == set()


@pytest.mark.parametrize("module", [name for name in MODULES if package_of(name) in ("formats", "search")])
def test_formats_and_searches_open_no_file(module):
    names = _names_in(module)
    assert names.isdisjoint({"open", "Path", "accelerate"})


@pytest.mark.parametrize("module", [name for name in MODULES if package_of(name) == "search"])
def test_searches_see_no_module_and_no_model(module):
    assert _names_in(module).isdisjoint({"nn", "Module", "transformers"})


def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def _names_in(module: str) -> set[str]:
    return {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.Attribute | ast.Name)
    }


ACCELERATE_HOOKS = {"accelerate.hooks", "accelerate.big_modeling", "accelerate"}
HOOKING = {
    "offload.onloader": "a decoder layer goes to the device and back",
    "integrations.dispatching": "the finished model goes where the caller wants it",
    "integrations.lazy_loading": "hooks that transformers has put on a model are taken off",
    "in_memory": "hooks of the model that the caller has passed are taken off",
}
"""Maps modules that may add or remove accelerate's hooks to the reason."""


def test_accelerates_hooks_are_set_in_few_places():
    found = set()
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if ACCELERATE_HOOKS & set(names):
                found.add(module)
    assert found == HOOKING.keys()


@pytest.mark.parametrize("module", MODULES)
def test_no_assert_is_there_to_be_caught(module):
    """`python -O` leaves asserts out: what a user may have got wrong is told by `raise`."""
    caught = [
        statement.lineno
        for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))
        if isinstance(node, ast.Try) and any("AssertionError" in _caught_by(handler) for handler in node.handlers)
        for part in node.body
        for statement in ast.walk(part)
        if isinstance(statement, ast.Assert)
    ]
    assert not caught, f"{module} catches its own asserts in the lines {caught}; raise an exception instead"


def _caught_by(handler: ast.ExceptHandler) -> set[str]:
    """Names of the exceptions that a handler is for."""
    named = [] if handler.type is None else ast.walk(handler.type)
    return {node.id for node in named if isinstance(node, ast.Name)}


def test_no_file_is_a_drawer_of_odds_and_ends():
    assert not [path for path in MODULES.values() if path.stem in ("utils", "helpers", "misc", "common")]


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_too_long_to_read(module):
    lines = MODULES[module].read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE_LINES, f"{module} has {lines} lines; split it"


@pytest.mark.parametrize("module", MODULES)
def test_no_class_is_too_long_to_read(module):
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ClassDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MAX_CLASS_LINES, f"{module}.{node.name} has {lines} lines; split it"


def _docstrings(module: str) -> list[str]:
    """Every string that stands for itself: docstrings of modules, classes and functions, and those of attributes."""
    return [
        node.value.value.strip()
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_begin_with_what_is_done_or_what_it_is(module):
    riddles = [text for text in _docstrings(module) if text.startswith(("Of ", "The same ", "As ", "Let go "))]
    assert not riddles


@pytest.mark.parametrize("module", [name for name in MODULES if package_of(name) == "pipeline"])
def test_the_pipeline_sets_attributes_of_its_own_objects_alone(module):
    set_from_outside = {
        ast.unparse(node)
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    }
    assert set_from_outside <= {"error.__traceback__"}, "let the owner set it, in a method"


def test_the_public_names_are_these():
    assert hf_awq_offload.__all__ == PUBLIC_NAMES
    assert all(hasattr(hf_awq_offload, name) for name in PUBLIC_NAMES)
