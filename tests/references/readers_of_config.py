"""States what readers make of a checkpoint's config.json, written from what they do.

Which linears they take for quantized ones; which rotary embedding and dtype a program built on transformers 4 finds.
Names are those that the reader itself uses for the linear.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Fused linear of a server -> the linears in the files."""


def part_of_a_name(name: str, entries: Sequence[str]) -> bool:
    """SGLang, Text Generation Inference, vLLM before 0.9, transformers 4: whether the linear is left dense."""
    return any(entry in name for entry in entries)


def part_of_every_fused_name(name: str, entries: Sequence[str]) -> bool:
    """vLLM now: asks for a fused linear's parts, which have to agree."""
    module, _, last = name.rpartition(".")
    answers = {part_of_a_name(f"{module}.{part}", entries) for part in PARTS.get(last, (last,))}
    assert len(answers) == 1, f"some but not all parts of {name} are quantized"
    return answers.pop()


def start_or_end_of_a_name(name: str, entries: Sequence[str]) -> bool:
    """transformers 5.17 to 5.20."""
    return any(re.match(entry, name) is not None or name.endswith(entry) for entry in entries)


def whole_parts_of_a_name(name: str, entries: Sequence[str]) -> bool:
    """transformers 5.21 to 5.24: a match from the start has to end before or behind a dot, or with the name."""
    for entry in entries:
        for end in [place for place, letter in enumerate(name) if letter == "."] + [len(name)]:
            if re.fullmatch(entry, name[:end]) or re.fullmatch(entry, name[: end + 1]):
                return True
        if name.endswith(entry):
            return True
    return False


Rule = Callable[[str, Sequence[str]], bool]
"""Whether a reader leaves a linear dense, given the config's `modules_to_not_convert`."""

SERVERS: dict[str, Rule] = {"parts of names": part_of_a_name, "vLLM": part_of_every_fused_name}
"""Readers that fuse linears and use the names in the files, or names made from them."""
TRANSFORMERS: dict[str, Rule] = {
    "transformers 4": part_of_a_name,
    "transformers 5.17 to 5.20": start_or_end_of_a_name,
    "transformers 5.21 to 5.24": whole_parts_of_a_name,
}
"""Readers that use the names in the model."""


def rotary_embedding(config: Mapping[str, Any], base_key: str = "rope_theta") -> tuple[float, dict[str, Any]]:
    """Base and scaling that a program built on transformers 4 computes with."""
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", None) or scaling.get("type", "default")
    if "type" in scaling:
        assert scaling.pop("type") == kind, "vLLM refuses a type and a rope_type that differ"
    return config.get(base_key, 10000.0), {"rope_type": kind, **scaling}


def model_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that a program built on transformers 4 loads the weights in."""
    return config.get("torch_dtype") or "float32"
