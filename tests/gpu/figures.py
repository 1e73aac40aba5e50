"""The figures: what each is called in the table, and how it is written. docs/gpu.md has the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CARDS = ("H100", "H200", "RTX 4090", "MI300")
"""The columns of the table in docs/gpu.md."""
LINEAR_ROWS = (1, 4, 16, 64, 256, 2048)
LINEAR_WAYS = {"dense": "dense bf16", "triton": "`triton`", "tinygemm": "`tinygemm`", "torch": "`torch`"}


@dataclass(frozen=True)
class Row:
    """A row of the table: a figure, or several that stand in one cell."""

    label: str
    keys: tuple[str, ...]
    form: str = "{}"

    def cell(self, found: Mapping[str, Any]) -> str:
        """Returns the cell, empty if none of its figures is there; "–" stands for a single one that is missing."""
        values = [found.get(key) for key in self.keys]
        if all(value is None for value in values):
            return ""
        parts = self.form.split("{")
        pieces = [parts[0]]
        for value, part in zip(values, parts[1:], strict=True):
            form, _, rest = part.partition("}")
            pieces += ["–" if value is None else f"{{{form}}}".format(_plain(value)), rest]
        return "".join(pieces)


def _plain(value: Any) -> Any:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def _keys(part: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{part}.{name}" for name in names)


def _phases(part: str, what: str) -> list[Row]:
    names = ("onload", "structure", "forward", "search", "commit")
    seconds = _keys(part, *(f"{name}_seconds" for name in names))
    memory = _keys(part, "planned_gib", "allocated_gib", "reserved_gib")
    return [
        Row(
            f"{what}: seconds, first layer / each further one",
            _keys(part, "first_seconds", "layer_seconds"),
            "{:.2f} / {:.2f}",
        ),
        Row(f"{what}: seconds of a layer in {', '.join(names)}", seconds, " / ".join(["{:.2f}"] * len(names))),
        Row(f"{what}: GiB planned / allocated / reserved at most", memory, "{:.2f} / {:.2f} / {:.2f}"),
    ]


def _errors() -> list[Row]:
    served = {"triton": ("bf16", "fp16", "fp32"), "tinygemm": ("bf16",), "torch": ("bf16", "fp16", "fp32")}
    return [
        Row(
            f"`{name}`: largest relative error, {' / '.join(dtypes)}",
            _keys("kernels", *(f"{name}_{dtype}_error" for dtype in dtypes)),
            " / ".join(["{:.1e}"] * len(dtypes)),
        )
        for name, dtypes in served.items()
    ]


def _linears() -> list[Row]:
    return [
        Row(
            f"4096 → 11008, {rows} row{'s' if rows > 1 else ''}, {label}: µs / in a CUDA graph / GB/s / of the copy's",
            _keys("linears", *(f"{rows}_{way}_{what}" for what in ("us", "graph_us", "gb_per_s", "share"))),
            "{:.1f} / {:.1f} / {:.0f} / {:.0%}",
        )
        for rows in LINEAR_ROWS
        for way, label in LINEAR_WAYS.items()
    ]


def _decoding() -> list[Row]:
    return [
        Row(
            f"decoding, {LINEAR_WAYS[way]}: tokens/s of generate / compiled / steps in a CUDA graph",
            _keys("decoding", *(f"{way}_{what}" for what in ("generate", "compiled", "graph"))),
            "{:.1f} / {:.1f} / {:.1f}",
        )
        for way in ("dense", "triton", "tinygemm")
    ]


ROWS = (
    Row(
        "driver, torch, triton, transformers",
        _keys("environment", "driver", "torch", "triton", "transformers"),
        "{}, {}, {}, {}",
    ),
    Row("copy on the device: GB/s, read and written", ("environment.copy_gb_per_s",), "{:.0f}"),
    Row(
        "copy to the device: GB/s, pinned / pageable",
        _keys("environment", "pinned_gb_per_s", "pageable_gb_per_s"),
        "{:.1f} / {:.1f}",
    ),
    Row(
        "product of 8192³: TFLOP/s, bf16 / fp32", _keys("environment", "bf16_tflops", "fp32_tflops"), "{:.0f} / {:.0f}"
    ),
    *_errors(),
    Row(
        "error feedback: codes as on the CPU / error relative to it",
        _keys("kernels", "feedback_codes", "feedback_error"),
        "{:.3%} / {:.4f}",
    ),
    Row("gram matrix of bf16 inputs: relative error", ("kernels.gram_error",), "{:.1e}"),
    Row("tests of the suite: passed / failed / skipped", _keys("suite", "passed", "failed", "skipped"), "{} / {} / {}"),
    *_phases("model_7b", "7B"),
    Row("least memory limit that a run keeps to, in plans", ("memory.least_limit",), "{:.2f}"),
    Row(
        "out of memory: a run goes on / the final error names the phase",
        _keys("memory", "goes_on", "names_phase"),
        "{} / {}",
    ),
    *_phases("experts", "128 experts"),
    *_phases("model_70b", "70B"),
    *_linears(),
    *_decoding(),
    Row(
        "LoRA step, 2 × 1024 tokens, four layers of a 7B: ms, w4 / bf16",
        _keys("adapters", "w4_ms", "bf16_ms"),
        "{:.0f} / {:.0f}",
    ),
    Row("the same: GiB at most, w4 / bf16", _keys("adapters", "w4_gib", "bf16_gib"), "{:.2f} / {:.2f}"),
    Row("all 32 layers of a 7B, 128 × 512 tokens, from disk to disk: seconds", ("whole_7b.seconds",), "{:.0f}"),
)


def values_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns figure -> value; the last one where a figure was reported twice."""
    return {record["figure"]: record["value"] for record in records if "figure" in record}


def table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a Markdown table with a column for each card: its heading -> its figures."""
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    lines += [[row.label, *(row.cell(found) for found in columns.values())] for row in ROWS]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
