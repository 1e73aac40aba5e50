"""The package's layers: imports go downward only, files stay readable, the public names are as pinned here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hf_awq_offload

PACKAGE = Path(hf_awq_offload.__file__).parent
MAX_LINES = 450

LEVELS = {
    0: [
        *("errors", "config", "overrides", "checkpoint_config", "packed_checkpoint_config", "patterns", "report"),
        *("grid", "packing", "pack_quantized", "conversion", "formats", "logs", "ops", "ops.*"),
    ],
    1: [
        *("search", "search.*", "statistics"),
        *("linear", "quantized_linear", "packed_linear", "linear_classes", "weight_view"),
        *("checkpoint", "data", "data_*"),
        *("safetensors_files", "durable", "work_folder", "hidden_states"),
        *("layers", "linears", "names", "inputs", "skeleton", "halted", "decoder", "feeds"),
        *("folds", "probing", "rowmaps", "experts", "gathering"),
    ],
    2: [
        "memory",
        "budget",
        "offload_folder",
        "stored_weights",
        "streaming",
        "journal",
        "fingerprint",
        "layer_quantization",
        "left_out",
        "batches",
        "workplace",
        *("progress", "reporting", "reporting.*"),
    ],
    3: ["pipeline"],
    4: [
        *("offloading", "dispatching", "planning", "streamed", "quantizer", "in_memory"),
        *("loading", "saving", "registration", "deferred"),
        *("evaluate", "evaluation_text", "demo", "demo.*"),
        *("quantized_files", "inspection", "checkpoint_conversion", "cli", "cli.*"),
        *("hub", "model_card", "integrations", "integrations.*", "__init__", "__main__"),
    ],
}

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
    "plan",
    "quantize",
    "quantize_model",
    "use_for_awq",
    "use_for_compressed_tensors",
]


def module_name(path: Path) -> str:
    """As LEVELS has it: search/scale.py is "search.scale", search/__init__.py "search", the package's "__init__"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def level_of(module: str) -> int | None:
    for level, patterns in LEVELS.items():
        for pattern in patterns:
            if module == pattern or (pattern.endswith("*") and module.startswith(pattern[:-1])):
                return level
    return None


def imported_modules(module: str) -> set[str]:
    """Modules of the package that `module` imports anywhere in its code, also inside functions."""
    path = MODULES[module]
    folder = path.relative_to(PACKAGE).parent.parts  # the package that relative imports start from
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {known(name[1:], []) for name in names if name[0] == PACKAGE.name}
        elif isinstance(node, ast.ImportFrom):
            start = (node.module or "").split(".") if node.module else []
            if node.level:
                start = [*folder[: len(folder) - node.level + 1], *start]
            elif start[:1] == [PACKAGE.name]:
                start = start[1:]
            else:
                continue
            found |= {known(start, [alias.name]) for alias in node.names}
    return found - {module}


def known(start: list[str], name: list[str]) -> str:
    """The module that "from start import name" reads: start.name if that is one, else start."""
    longer = ".".join([*start, *name])
    return longer if longer in MODULES else ".".join(start) or "__init__"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_level(module):
    assert level_of(module) is not None, f"{module} has no level yet; place it in LEVELS of {Path(__file__).name}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward_or_sideways(module):
    own = level_of(module)
    assert own is not None
    upward = {name: level_of(name) for name in imported_modules(module) if (level_of(name) or 0) > own}
    assert not upward, f"{module} is on level {own} and imports {upward} from above"


def test_no_imports_go_in_a_circle():
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "imports in a circle: " + " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(imported_modules(module)):
                walk(name, (*path, module))
            done.add(module)

    for module in MODULES:
        walk(module, ())


def test_this_test_sees_the_imports_that_there_are():
    assert {"config", "pipeline", "streaming"} <= imported_modules("quantizer")
    assert {"grid", "statistics"} <= imported_modules("search.scale")
    assert "search.loss" in imported_modules("search.clip")
    assert imported_modules("errors") == set()


def test_the_searches_see_no_module_no_model_and_no_file():
    for module in ("search.loss", "search.scale", "search.clip", "search.rounding", "grid", "packing"):
        names = {
            node.attr if isinstance(node, ast.Attribute) else node.id
            for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute | ast.Name)
        }
        assert names.isdisjoint({"nn", "Module", "open", "Path", "transformers", "accelerate"}), module


def test_accelerate_offloads_only_in_streaming():
    allowed = {"streaming", "dispatching", "config"}  # the finished model is dispatched; sizes are written as there
    for module, path in MODULES.items():
        if module not in allowed:
            assert "accelerate import" not in path.read_text(encoding="utf-8"), module


def test_no_file_is_a_drawer_of_odds_and_ends():
    assert not [path for path in MODULES.values() if path.stem in ("utils", "helpers", "misc", "common")]


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_too_long_to_read(module):
    lines = MODULES[module].read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{module} has {lines} lines; split it"


def test_the_public_names_are_these():
    assert hf_awq_offload.__all__ == PUBLIC_NAMES
    assert all(hasattr(hf_awq_offload, name) for name in PUBLIC_NAMES)
