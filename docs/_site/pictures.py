"""Draws the pictures of the documentation: `python docs/_site/pictures.py` writes them to docs/images.

before-and-after.svg plots what `make demo` prints (docs/quickstart.md). memory.svg is a diagram. comparison.svg plots
the table "Time and divergence" of docs/comparison.md, which names its command. packages.svg shows the imports of the
code (tests/imports.py). The colours are readable on white and on black, because an image on GitHub does not know the
page's theme.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent.parent
sys.path.append(str(DOCS.parent / "tests"))

imports = importlib.import_module("imports")
TEXT = "#768390"
FULL, PACKED, WORK, OTHERS = "#6e7781", "#3b82f6", "#c9660f", "#8b949e"
LABEL_AT = {"llm-compressor": (-11, 5, "end"), "gptqmodel": (0, -13, "middle")}
"""Labels that do not fit to the right of their point: offset (dx, dy) in pixels, and text anchor."""


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="14" fill="{TEXT}">'
    )
    return "\n".join([head, f"<title>{title}</title>", *parts, "</svg>", ""])


def text(x: float, y: float, words: str, anchor: str = "start", **attributes: str) -> str:
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{extra}>{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str = "none", stroke: str = "none") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" stroke="{stroke}"/>'


def arrow(x: float, y: float, length: float, colour: str) -> str:
    tip = x + length
    head = 7 if length > 0 else -7
    return (
        f'<path d="M{x:g} {y:g}H{tip - head:g}" stroke="{colour}" stroke-width="2" fill="none"/>'
        f'<path d="M{tip:g} {y:g}l{-head:g} -5v10z" fill="{colour}"/>'
    )


def memory() -> str:
    """A diagram of where each part of a model is during quantization."""
    layers, at_work, step = 8, 3, 24
    parts = [
        text(20, 26, "RAM, or the checkpoint's files on disk"),
        box(20, 38, 300, layers * step + 16, stroke=TEXT),
    ]
    for index in range(layers):
        y = 46 + index * step
        if index < at_work:
            parts += [box(32, y, 72, 17, PACKED), text(114, y + 13, f"layer {index}, 4 bits", font_size="12")]
        elif index == at_work:
            parts += [box(32, y, 276, 17, stroke=WORK), text(170, y + 13, "being quantized", "middle", font_size="12")]
        else:
            parts += [
                box(32, y, 276, 17, FULL),
                text(170, y + 13, f"layer {index}, 16 bits", "middle", font_size="12", fill="#ffffff"),
            ]
    y = 46 + at_work * step + 8
    parts += [arrow(326, y - 5, 88, FULL), arrow(414, y + 9, -88, PACKED)]
    parts += [text(424, 60, "accelerator"), box(424, 72, 276, 128, stroke=WORK)]
    rows = ((WORK, 252, "one decoder layer"), (OTHERS, 130, "statistics"), (OTHERS, 84, "micro-batch"))
    for index, (colour, width, words) in enumerate(rows):
        parts.append(box(436, 84 + index * 38, width, 26, colour))
        inside = width > 200
        parts.append(text(446 if inside else 446 + width, 102 + index * 38, words, fill="#ffffff" if inside else TEXT))
    parts.append(text(424, 224, "the same for a model of 8 layers and of 80", font_size="12"))
    return svg(720, 262, "One decoder layer at a time is on the accelerator; the rest stays in RAM or on disk", parts)


def measured() -> list[tuple[str, float, float]]:
    """Returns (tool, time in bare forward passes, KL in nats) for the Llama in docs/comparison.md."""
    page = (DOCS / "comparison.md").read_text(encoding="utf-8")
    section = page.split("## Time and divergence")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.*]+) \|", section, flags=re.MULTILINE)
    return [(name.strip("* "), float(time), float(kl.strip("*"))) for name, time, kl in rows]


def comparison() -> str:
    """A chart of KL divergence over time; down and to the left is better."""
    left, top, width, height = 70, 30, 600, 224
    most_kl = 0.022

    def x_of(time: float) -> float:
        return left + width * (math.log10(time) - math.log10(0.25)) / (math.log10(1000) - math.log10(0.25))

    def y_of(kl: float) -> float:
        return top + height * (1 - kl / most_kl)

    parts = []
    for time in (1, 10, 100):
        parts.append(f'<path d="M{x_of(time):g} {top}v{height}" stroke="{TEXT}" stroke-opacity="0.35"/>')
        parts.append(text(x_of(time), top + height + 20, f"{time}×", "middle"))
    for kl in (0, 0.005, 0.01, 0.015, 0.02):
        parts.append(f'<path d="M{left} {y_of(kl):g}h{width}" stroke="{TEXT}" stroke-opacity="0.35"/>')
        parts.append(text(left - 8, y_of(kl) + 5, f"{kl:g}", "end"))
    parts.append(text(left + width, top + height + 42, "time, in bare forward passes over the same tokens", "end"))
    parts.append(text(left, top - 10, "KL divergence from full precision (nats)"))
    for name, time, kl in measured():
        ours = name.startswith("hf_awq_offload")
        parts.append(f'<circle cx="{x_of(time):.1f}" cy="{y_of(kl):.1f}" r="6" fill="{WORK if ours else OTHERS}"/>')
        weight = {"font_weight": "bold", "fill": WORK} if ours else {}
        dx, dy, anchor = LABEL_AT.get(name.split()[0], (11, 5, "start"))
        parts.append(text(round(x_of(time) + dx, 1), round(y_of(kl) + dy, 1), name, anchor, **weight))
    return svg(720, 306, "KL divergence over quantization time, for several tools on one small Llama", parts)


def demonstrated() -> dict[str, tuple[float, float]]:
    """Returns method -> (MB on disk, share of equal predictions), as docs/quickstart.md quotes `make demo`."""
    page = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    rows = re.findall(r"^(\w[\w ,]*?) +[\d.]+ +[\d.]+ +([\d.]+)% +([\d.]+)", page, flags=re.MULTILINE)
    return {name: (float(size), float(same) / 100) for name, same, size in rows}


def before_and_after() -> str:
    """A chart of the shipped model before and after: its size, and how many of its predictions have changed."""
    shown = demonstrated()
    (full, _), (nearest, nearest_same), (packed, same) = shown.values()
    assert nearest == packed
    charts = (
        (
            "Weights on disk",
            [("before: 16 bits", full, f"{full:.1f} MB", FULL), ("after: 4 bits", packed, f"{packed:.1f} MB", PACKED)],
        ),
        (
            "Predictions of the next token that have changed",
            [
                ("rounding to nearest", 1 - nearest_same, f"{1 - nearest_same:.1%}", OTHERS),
                ("hf_awq_offload", 1 - same, f"{1 - same:.1%}", WORK),
            ],
        ),
    )
    left, width, parts, y = 150, 230, [], 8
    for title, rows in charts:
        parts.append(text(0, y + 14, title, font_weight="bold"))
        most = max(value for _, value, _, _ in rows)
        for row, (label, value, words, colour) in enumerate(rows):
            top = y + 26 + 28 * row
            length = round(width * value / most, 1)
            parts += [text(0, top + 15, label), box(left, top, length, 20, colour)]
            parts.append(text(left + length + 8, top + 15, words))
        y += 96
    return svg(
        450, y - 6, "The shipped model before and after: less than half the size, and few predictions change", parts
    )


def packages() -> str:
    """Draws which package imports which, from the code's own imports: a dot in row r and column c says r imports c."""
    levels, used = imports.LEVELS, imports.package_imports()
    names = [name for level in levels for name in level]
    cell, left, top = 26, 130, 96
    side = cell * len(names)
    middle = {name: cell * index + cell / 2 for index, name in enumerate(names)}
    parts = []
    start = 0
    for level in levels:
        size = cell * len(level)
        shade = f'fill="{OTHERS}" fill-opacity="0.25"'
        parts.append(f'<rect x="{left + start}" y="{top + start}" width="{size}" height="{size}" {shade}/>')
        start += size
    for name in names:
        x, y = left + middle[name], top + middle[name]
        parts.append(text(left - 8, y + 5, name, "end"))
        parts.append(text(0, 0, name, transform=f"translate({x + 5:g} {top - 8}) rotate(-60)"))
        parts.append(f'<path d="M{left} {y:g}H{x:g}" stroke="{TEXT}" stroke-opacity="0.2"/>')
    for (importer, imported), count in sorted(used.items()):
        x, y = left + middle[imported], top + middle[importer]
        parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{min(3 + count**0.5, 11):.1f}" fill="{PACKED}"/>')
    return svg(left + side + 60, top + side + 10, "Which package imports which: all imports go to the left", parts)


PICTURES = {
    "before-and-after.svg": before_and_after,
    "memory.svg": memory,
    "comparison.svg": comparison,
    "packages.svg": packages,
}

PACKAGES_BEGIN, PACKAGES_END = (
    "<!-- packages: written by python docs/_site/pictures.py -->\n",
    "<!-- end of packages -->",
)


def with_package_table(page: str) -> str:
    """Returns docs/contributing.md with the table of the packages as the code has them."""
    ideas = imports.ideas()
    lines = ["", "| package or module | |", "|---|---|"]
    for level in imports.LEVELS:
        for name in level:
            shown = f"`{name}/`" if (imports.PACKAGE / name).is_dir() else f"`{name}.py`"
            lines.append(f"| {shown} | {ideas[name].rstrip('.')} |")
    before, rest = page.split(PACKAGES_BEGIN)
    return before + PACKAGES_BEGIN + "\n".join([*lines, "", ""]) + PACKAGES_END + rest.split(PACKAGES_END)[1]


if __name__ == "__main__":
    contributing = DOCS / "contributing.md"
    contributing.write_text(with_package_table(contributing.read_text(encoding="utf-8")), encoding="utf-8")
    for file_name, draw in PICTURES.items():
        (DOCS / "images" / file_name).write_text(draw(), encoding="utf-8")
