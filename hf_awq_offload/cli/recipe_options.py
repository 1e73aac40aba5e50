"""A command-line option for every field of the recipe, made from the table in recipe_fields.py.

A new field gets its option without a change here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..json_text import parse_json
from ..recipe_fields import RecipeFields


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
        """How users write its value: "flag", "integer", "list", "limits", "json" or "text"."""
        if self.annotation in ("bool", "int"):
            return {"bool": "flag", "int": "integer"}[self.annotation]
        if self.annotation.startswith("list["):
            return "list"
        if self.annotation.startswith(("dict[", "Mapping[")):
            return "json" if "dict[" in self.annotation.partition("[")[2] else "limits"
        return "text"


LIMITS = ("execution_device", "batch_tokens", "prefetch", "max_memory")
"""Fields that say how much of a model is in memory, and where."""


def recipe_fields() -> dict[str, Field]:
    """Name -> field, in the order of the recipe."""
    return {
        field.name: Field(
            field.name,
            str(field.type).removesuffix(" | None"),
            field.default,
            field.metadata["help"],
        )
        for field in dataclasses.fields(RecipeFields)
    }


def add_recipe_options(parser: argparse._ActionsContainer, names: Collection[str] = ()) -> None:
    """Add the options of these fields, by default of all.

    One that the user leaves out is absent from the namespace, so that the config file or the default decides.
    """
    for field in recipe_fields().values():
        if names and field.name not in names:
            continue
        default = "" if field.default is None else f" [{str(field.default).lower()}]"
        arguments: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": f"{field.meaning.removesuffix('.')}{default}".replace("%", "%%"),
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


def given_fields(options: argparse.Namespace, names: Collection[str] = ()) -> dict[str, Any]:
    """The fields that the command line sets, by default among all of them."""
    return {name: getattr(options, name) for name in names or recipe_fields() if hasattr(options, name)}


def with_options(message: str) -> str:
    """Returns an error message of the package with options in place of the recipe's fields.

    "n_samples is 0" -> "--n-samples is 0", "prefetch=False" -> "--no-prefetch", "max_memory['cpu']" -> "--max-memory
    cpu". Names that are English words, such as `format`, are left alone unless a value or "is" follows.
    """
    fields = recipe_fields()
    names = "|".join(fields)
    in_two_words = "|".join(name for name in fields if "_" in name)
    before, after = r"(?<![\w./'\"-])", r"(?![\w/]|\.\w)"

    def assigned(found: re.Match[str]) -> str:
        field, value = fields[found[1]], found[2].strip("'\"")
        if field.kind == "flag":
            return field.option if value == "True" else field.option.replace("--", "--no-")
        return f"{field.option} {value}"

    def named(found: re.Match[str]) -> str:
        return fields[found[1]].option

    message = re.sub(rf"{before}({names})=('[^']*'|\"[^\"]*\"|[\w-]+)", assigned, message)
    message = re.sub(rf"{before}(max_memory|overrides)\[('[^']*')\]", lambda m: f"{named(m)} {m[2]}", message)
    message = re.sub(rf"^({names})(?= is )|(?<=`)({names})(?=`)", lambda m: fields[m[1] or m[2]].option, message)
    message = re.sub(rf"{before}({in_two_words}){after}", named, message)
    return re.sub(r"(--[\w-]+) \(\1\)", r"\1", message.replace("out_dir ", "OUT "))


class _Merge(argparse.Action):
    """An option that users may repeat: each use adds entries to one dict."""

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
        value = parse_json(text, unique_keys=True)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON ({error.msg}, column {error.colno})") from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:200]!r} is refused: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object; expected {{"name": ...}}')
    return value
