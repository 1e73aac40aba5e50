"""An option for every field of `AwqOffloadConfig`, read from the source of config.py.

Importing that module imports torch, which takes seconds; its text tells names, annotations, defaults and, in the
docstring of the class, meanings. A new field has its option without a change here.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent.parent / "config.py"
CLASS = "AwqOffloadConfig"


@dataclass(frozen=True)
class Field:
    """One field of the recipe."""

    name: str
    annotation: str  # without "| None"
    default: Any
    meaning: str

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def kind(self) -> str:
        """How its option is written: "flag", "integer", "list", "limits", "json" or "text"."""
        if self.annotation in ("bool", "int"):
            return {"bool": "flag", "int": "integer"}[self.annotation]
        if self.annotation.startswith("list["):
            return "list"
        if self.annotation.startswith(("dict[", "Mapping[")):
            return "json" if "dict[" in self.annotation.partition("[")[2] else "limits"
        return "text"


def recipe_fields() -> dict[str, Field]:
    """Name -> field, in the order of the constructor."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    (definition,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == CLASS)
    (init,) = (node for node in definition.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    arguments = init.args.args[1:]
    assert len(arguments) == len(init.args.defaults), "every field has a default"
    meanings = _meanings(ast.get_docstring(definition) or "")
    fields = {}
    for argument, default in zip(arguments, init.args.defaults, strict=True):
        assert argument.annotation is not None
        annotation = ast.unparse(argument.annotation).removesuffix(" | None")
        meaning = meanings.get(argument.arg, "")
        fields[argument.arg] = Field(argument.arg, annotation, ast.literal_eval(default), meaning)
    return fields


def _meanings(docstring: str) -> dict[str, str]:
    """Field -> what the docstring's "Args:" says of it, on one line."""
    block = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", docstring, flags=re.DOTALL | re.MULTILINE)
    entries = re.split(r"^    (?=\w+: )", block[1] if block else "", flags=re.MULTILINE)
    pairs = (entry.partition(": ") for entry in entries if entry)
    return {name: " ".join(meaning.split()) for name, _, meaning in pairs}


def add_recipe_options(parser: argparse._ActionsContainer) -> None:
    """Options that are not given leave no trace in what is parsed: then the config file, or the default, holds."""
    for field in recipe_fields().values():
        default = "none" if field.default is None else str(field.default).lower()
        arguments: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": f"{field.meaning} [{default}]".replace("%", "%%"),
        }
        parser.add_argument(field.option, **arguments, **_arguments(field))


def _arguments(field: Field) -> dict[str, Any]:
    if field.kind == "flag":
        return {"action": argparse.BooleanOptionalAction}
    if field.kind == "integer":
        return {"type": int, "metavar": "N"}
    if field.kind == "list":
        return {"action": "append", "metavar": "NAME"}
    if field.kind == "limits":
        return {"action": _Merge, "type": _pairs, "metavar": "KEY=VALUE"}
    if field.kind == "json":
        return {"action": _Merge, "type": _json_object, "metavar": "JSON"}
    return {"metavar": "TEXT"}


def given_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields that the command line names."""
    return {name: getattr(options, name) for name in recipe_fields() if hasattr(options, name)}


class _Merge(argparse.Action):
    """An option that may be repeated, each time with more entries of one dict."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, getattr(namespace, self.dest, {}) | values)


def _pairs(text: str) -> dict[str, str]:
    """From "cuda:0=8GiB" or '{"cuda:0": "8GiB"}'."""
    if text.lstrip().startswith("{"):
        return _json_object(text)
    key, equals, value = text.rpartition("=")
    if not (equals and key and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE, such as cpu=8GiB")
    return {key: value}


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error.msg}, column {error.colno})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object; expected {{"name": ...}}')
    return value
