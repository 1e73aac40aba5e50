"""The parts, the most important first. Imports neither torch nor the package: the command reads it before it starts."""

from __future__ import annotations

from dataclasses import dataclass

QUANTIZES = ("transformers", "accelerate", "safetensors", "psutil", "tqdm", "yaml", "regex")
"""What quantizing a model needs beside torch."""


@dataclass(frozen=True)
class Part:
    """A module of this package with a function `run(recorder)`."""

    name: str
    """Of the part and of its module."""
    seconds: int
    """It is ended after so many; where the total leaves fewer, after those."""
    what: str
    needs: tuple[str, ...] = ()
    """Packages without which it is not run, by the names that they are imported by."""
    worth_seconds: int = 10
    """With fewer seconds left it isn't started."""
    is_extra: bool = False
    """It is for what time is left; if there is none, nothing is missing."""


PARTS = (
    Part("environment", 45, "card, driver, versions, speed of copies and products"),
    Part("kernels", 90, "every kernel against a reference", ("triton", "numpy", "transformers", "accelerate")),
    Part("suite", 130, "tests of the suite that need a card", ("pytest", "hypothesis", *QUANTIZES)),
    Part("model_7b", 100, "four decoder layers of a 7B, from disk to disk", QUANTIZES, 25),
    Part("memory", 60, "limits, and memory that runs out", QUANTIZES, 20),
    Part("experts", 90, "a decoder layer of 128 experts", QUANTIZES, 25),
    Part("model_70b", 75, "a decoder layer of a 70B", QUANTIZES, 25),
    Part("linears", 60, "the quantized linear beside a dense one", ("transformers", "accelerate"), 15),
    Part("decoding", 100, "tokens per second of generate", QUANTIZES, 20),
    Part("adapters", 40, "a training step of LoRA", ("peft", *QUANTIZES), 15),
    Part("whole_7b", 200, "all 32 decoder layers of a 7B", QUANTIZES, 60, is_extra=True),
)
BY_NAME = {part.name: part for part in PARTS}
