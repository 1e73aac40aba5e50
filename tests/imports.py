"""Finds the package's modules and what each imports, and defines the order of the packages."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "hf_awq_offload"
if __name__ == "__main__" and sys.argv[1:]:
    PACKAGE = Path(sys.argv[1]).resolve()

LEVELS: list[list[str]] = [
    ["dtype_names", "errors", "json_text", "logs", "messages"],
    ["formats", "machine_errors", "precision", "recipe_fields", "report"],
    ["config_checks", "transfers", "triton_trial"],
    ["checkpoint", "ops", "search"],
    ["config"],
    ["nn"],
    ["model"],
    ["offload"],
    ["calibration"],
    ["reporting"],
    ["evaluation"],
    ["pipeline"],
    ["integrations"],
    ["in_memory", "planning"],
    ["evaluating", "streamed", "trainer"],
    ["__init__", "cli"],
    ["__main__"],
]
"""Packages and root modules, lowest first. Each may import what stands on a line above its own."""


def module_name(path: Path) -> str:
    """search/scale.py is "search.scale", search/__init__.py "search", the package's own "__init__"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def package_of(module: str) -> str:
    """Returns the package that a module is in; a root module is its own package."""
    return module.partition(".")[0]


def rank_of(module: str) -> int:
    """Returns the index in LEVELS of a module's package."""
    return next(rank for rank, level in enumerate(LEVELS) if package_of(module) in level)


def imported_modules(module: str) -> set[str]:
    """Returns the package's modules that `module` imports anywhere in its code, function bodies included.

    `import_module` with a literal name counts, too.
    """
    path = MODULES[module]
    folder = path.relative_to(PACKAGE).parent.parts  # the package that relative imports start from
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {_known(name[1:], []) for name in names if name[0] == PACKAGE.name}
        elif isinstance(node, ast.ImportFrom):
            start = (node.module or "").split(".") if node.module else []
            if node.level:
                start = [*folder[: len(folder) - node.level + 1], *start]
            elif start[:1] == [PACKAGE.name]:
                start = start[1:]
            else:
                continue
            found |= {_known(start, [alias.name]) for alias in node.names}
        elif isinstance(node, ast.Call) and _called(node) == "import_module":
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
            if name.startswith(f"{PACKAGE.name}."):
                found.add(name.removeprefix(f"{PACKAGE.name}."))
            elif name.startswith("."):
                found.add(".".join([*folder, name[1:]]))
    return found - {module}


def package_imports() -> Counter[tuple[str, str]]:
    """(importing package, imported package) -> number of imports between their modules."""
    return Counter(
        (package_of(module), package_of(name))
        for module in MODULES
        for name in imported_modules(module)
        if package_of(module) != package_of(name)
    )


def ideas() -> dict[str, str]:
    """Package, or module of the root -> the first sentence of its docstring."""
    found = {}
    for module, path in MODULES.items():
        if package_of(module) == module:
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[module] = " ".join(text.split("\n\n")[0].split())
    return found


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _known(start: list[str], name: list[str]) -> str:
    """Returns the module that "from start import name" loads: start.name if it is a module, else start."""
    longer = ".".join([*start, *name])
    return longer if longer in MODULES else ".".join(start) or "__init__"


def longest(kind: type[ast.AST]) -> tuple[int, str]:
    """Lines and name of the longest class or function, docstring included."""
    return max(
        ((node.end_lineno or 0) - node.lineno + 1, f"{module}.{node.name}")
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, kind) and isinstance(node, ast.ClassDef | ast.FunctionDef)
    )


def main() -> None:
    edges = [(module, name) for module in MODULES for name in imported_modules(module)]
    within = sum(package_of(module) == package_of(name) for module, name in edges)
    print(f"modules: {len(MODULES)}, in the root: {sum(path.parent == PACKAGE for path in MODULES.values())}")
    print(f"imports: {len(edges)}, between packages or modules of the root: {len(edges) - within}")
    print("longest class: {} lines, {}".format(*longest(ast.ClassDef)))
    print("longest function: {} lines, {}".format(*longest(ast.FunctionDef)))


if __name__ == "__main__":
    main()
