"""Charts for reports and model cards: matplotlib figures as PNG, and as SVG that takes on the page's colours.

Figures are drawn in the colours of `LIGHT`. In SVG, each colour becomes a CSS variable of the same name, which the page
defines for light and dark mode. matplotlib comes with the extra `report`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ..report import QuantizationReport
from .document import CLIP_RATIOS, RunFacts
from .families import Family, all_families, families_of

LIGHT = {
    "ink": "#1b1f25", "muted": "#5b6570", "line": "#d4dae1", "nothing": "#c9ced4",
    "series-1": "#1f6fb3", "series-2": "#c4581b", "series-3": "#2f8b58", "series-4": "#8458b3", "series-5": "#9a7a1f",
    "series-6": "#b13a6e",
    "ramp-0": "#dceaf7", "ramp-1": "#c7ddf1", "ramp-2": "#aed0ea", "ramp-3": "#90c0e2", "ramp-4": "#70add8",
    "ramp-5": "#529acc", "ramp-6": "#3884be", "ramp-7": "#226bac", "ramp-8": "#10508f", "ramp-9": "#08306c",
}  # fmt: skip
RAMP = [LIGHT[f"ramp-{step}"] for step in range(10)]
SERIES = [LIGHT[f"series-{number}"] for number in range(1, 7)]

WIDTH_INCHES = 8.0
MOST_FAMILIES = 12
"""A chart shows at most this many families; those with the least loss are merged into one."""
MOST_TICKS = 12
LOG_TICKS: Sequence[tuple[float, Sequence[float]]] = (
    (3, (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)), (20, (1, 2, 3, 5, 7)), (500, (1, 2, 5)), (float("inf"), (1,))
)  # fmt: skip
"""A logarithmic axis whose ends are in a ratio below the first number labels these multiples of powers of ten."""
MOST_MARKERS = 40
"""With more layers than this, lines are drawn without markers."""
LONGEST_LABEL = 44
NEGLIGIBLE = 0.01
"""A part below this share of the whole is left out of the chart and its legend."""
PHASES = {"onload": SERIES[4], "structure": SERIES[3], "forward": SERIES[2], "search": SERIES[0]}
OTHERS = "all others"

STYLE: dict[Any, Any] = {
    "text.color": LIGHT["ink"], "axes.labelcolor": LIGHT["ink"], "axes.edgecolor": LIGHT["muted"],
    "xtick.color": LIGHT["muted"], "ytick.color": LIGHT["muted"], "xtick.labelcolor": LIGHT["ink"],
    "ytick.labelcolor": LIGHT["ink"], "axes.grid": True, "grid.color": LIGHT["line"], "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 9.0,
    "axes.titlesize": 9.5, "axes.titlelocation": "left", "font.family": "sans-serif", "svg.fonttype": "none",
    "text.parse_math": False,
}  # fmt: skip


def has_matplotlib() -> bool:
    return find_spec("matplotlib") is not None


class Chart:
    """A chart that is drawn when it is rendered.

    Args:
        name: file name without its extension.
        title: shown as the caption.
        draw: draws the chart on an empty matplotlib figure.
        height_inches: height of the figure.
    """

    def __init__(self, name: str, title: str, draw: Callable[[Any], None], height_inches: float):
        self.name, self.title = name, title
        self._draw, self._height_inches = draw, height_inches

    def png(self, dots_per_inch: int = 110) -> bytes:
        return self._rendered("png", dpi=dots_per_inch, facecolor="#ffffff", metadata={"Software": None})

    def svg(self) -> str:
        """Returns SVG to embed in a page: without fixed size or ids, with CSS variables for colours."""
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        text = self._rendered("svg", transparent=True, metadata=nothing).decode("utf-8")
        text = text[text.index("<svg") :]
        text = re.sub(r"<g id=\"[^\"]*\">", "<g>", text)
        text = re.sub(r"^<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 xmlns:xlink="http://www.w3.org/1999/xlink" '
                      'role="img" aria-hidden="true">', text, count=1)  # fmt: skip
        names = {colour: name for name, colour in LIGHT.items()}
        return re.sub("|".join(names), lambda match: f"var(--{names[match[0]]})", text)

    def _rendered(self, file_format: str, **options: Any) -> bytes:
        import matplotlib
        from matplotlib.figure import Figure

        # Ids of clip paths and markers are hashes with this salt, so that two charts on one page share none.
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": self.name}):
            figure = Figure(figsize=(WIDTH_INCHES, self._height_inches), layout="constrained")
            self._draw(figure)
            content = io.BytesIO()
            figure.savefig(content, format=file_format, **options)
        return content.getvalue()


def loss_chart(report: QuantizationReport) -> Chart | None:
    """Returns the chart of every layer's loss, rounded to nearest and as quantized; None if no losses were measured."""
    if not any(layer.loss_nearest > 0 for layer in report.layers):
        return None

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        _draw_losses(axes, [layer.loss_nearest for layer in report.layers], [layer.loss for layer in report.layers])
        axes.set(xlabel="decoder layer", ylabel="mean squared output error")
        _legend(figure, axes.get_lines())

    return Chart("loss", "Loss by layer", draw, 3.2)


def charts_of(report: QuantizationReport, facts: RunFacts) -> list[Chart]:
    """Returns all charts of a report, leaving out those of quantities that were not measured."""
    if not report.layers:
        return []
    families = _drawn_families(report)
    charts = []
    loss = loss_chart(report)
    if loss is not None:
        charts += [loss, _group_losses(report, families), _gains(families), _alphas(report, families)]
    if families:
        charts.append(_identity(families))
    if any(family.clip_counts for family in families.values()):
        charts.append(_clipping({name: family for name, family in families.items() if family.clip_counts}))
    charts.append(_seconds(report, facts.plan))
    if any(layer.memory is not None for layer in report.layers):
        charts.append(_memory(report, facts.plan))
    return charts


def _group_losses(report: QuantizationReport, families: Mapping[str, Family]) -> Chart:
    lines = -(-len(families) // 2)

    def draw(figure: Any) -> None:
        cells = _cells(report, families)
        for position, name in enumerate(families):
            axes = figure.add_subplot(lines, 2, position + 1)
            axes.set_title(_short(name))
            _draw_losses(
                axes,
                [float("nan") if cell is None else cell.loss_nearest for cell in cells[name]],
                [float("nan") if cell is None else cell.loss for cell in cells[name]],
                most_ticks=MOST_TICKS // 2,
            )
        _legend(figure, axes.get_lines())
        figure.supxlabel("decoder layer", fontsize=9)
        figure.supylabel("mean squared output error", fontsize=9)

    return Chart("groups", "Loss by layer and group", draw, 0.4 + 1.7 * lines)


def _gains(families: Mapping[str, Family]) -> Chart:
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        named = {name: family for name, family in families.items() if family.loss_nearest > 0}
        final = [family.loss / family.loss_nearest for family in named.values()]
        scaled = [
            float("nan") if family.loss_scaled is None else family.loss_scaled / family.loss_nearest
            for family in named.values()
        ]
        places = range(len(named))
        axes.hlines(places, final, 1, color=LIGHT["nothing"], linewidth=2, zorder=1)
        axes.plot([1] * len(named), places, "|", color=LIGHT["series-2"], markersize=9, label="rounded to nearest")
        axes.plot(scaled, places, "D", color=LIGHT["series-3"], markersize=5, label="with scales")
        axes.plot(final, places, "o", color=LIGHT["series-1"], label="with clipping and error feedback as well")
        axes.set(xlabel="loss relative to rounding to nearest", xlim=(0, None))
        _legend(figure, axes.get_legend_handles_labels()[0])
        _name_rows(axes, named)

    return Chart("gains", "Gains from scales, clipping and rounding", draw, 1.1 + 0.27 * len(families))


def _alphas(report: QuantizationReport, families: Mapping[str, Family]) -> Chart:
    def draw(figure: Any) -> None:
        from matplotlib.colors import ListedColormap

        axes = figure.add_subplot()
        values = [
            [-2 if cell is None else sum(cell.alphas) / len(cell.alphas) if cell.alphas else -1 for cell in row]
            for row in _cells(report, families).values()
        ]
        steps = [[min(int(value * 10), 9) if value >= 0 else value for value in row] for row in values]
        _draw_cells(axes, steps, ListedColormap(["none", LIGHT["nothing"], *RAMP]), low=-2, high=9)
        axes.set(xlabel="decoder layer")
        _name_rows(axes, families)
        patches = [(LIGHT["nothing"], "no scale")]
        patches += [(RAMP[step], f"{step / 10:.1f}") for step in range(10)]
        _legend(figure, _patches(patches), title="α from")

    return Chart("alpha", "Chosen α by group", draw, 1.5 + 0.27 * len(families))


def _identity(families: Mapping[str, Family]) -> Chart:
    reasons = dict.fromkeys(reason for family in families.values() for reason in family.reasons)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        counts = {"scaled": [len(family.alphas) for family in families.values()]}
        counts |= {reason: [family.reasons.get(reason, 0) for family in families.values()] for reason in reasons}
        colours = {"scaled": LIGHT["series-1"]} | dict(zip(reasons, [LIGHT["nothing"], *SERIES[1:]], strict=False))
        _draw_shares(axes, families, counts, [colours.get(name, LIGHT["muted"]) for name in counts])
        axes.set(xlabel="share of the groups")
        _legend(figure, _patches([(colours.get(name, LIGHT["muted"]), name) for name in counts]), ncols=1)

    return Chart("identity", "Groups with and without a scale", draw, 1.0 + 0.27 * len(families) + 0.2 * len(reasons))


def _clipping(families: Mapping[str, Family]) -> Chart:
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        counts = {
            f"{ratio:.2f}": [family.clip_counts[step] for family in families.values()]
            for step, ratio in enumerate(CLIP_RATIOS)
        }
        _draw_shares(axes, families, counts, RAMP)
        axes.set(xlabel="share of the groups of weights")
        _legend(figure, _patches(zip(RAMP, counts, strict=True)), title="share of the range kept (1.00: not clipped)")

    return Chart("clipping", "Clipping ratios", draw, 1.5 + 0.27 * len(families))


def _seconds(report: QuantizationReport, plan: Mapping[str, Any] | None) -> Chart:
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        places = range(len(report.layers))
        known = [name for name in PHASES if any(name in layer.phase_seconds for layer in report.layers)]
        bottom = [0.0] * len(report.layers)
        for name in known:
            heights = [layer.phase_seconds.get(name, 0.0) for layer in report.layers]
            axes.bar(places, heights, bottom=bottom, color=PHASES[name], width=0.9, label=name)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        rest = [max(0.0, layer.seconds - low) for layer, low in zip(report.layers, bottom, strict=True)]
        if sum(rest) > NEGLIGIBLE * sum(layer.seconds for layer in report.layers):
            axes.bar(places, rest, bottom=bottom, color=LIGHT["nothing"], width=0.9, label="other")
        seconds = None if plan is None else plan.get("seconds")
        if seconds is not None and plan is not None:
            mean = seconds / max(1, plan["layers"])
            axes.axhline(mean, color=LIGHT["series-2"], linestyle="--", label="planned mean per layer")
        _layer_axis(axes, len(report.layers))
        axes.set(xlabel="decoder layer", ylabel="seconds")
        _legend(figure, axes.get_legend_handles_labels()[0])

    return Chart("time", "Time by layer", draw, 3.0)


def _memory(report: QuantizationReport, plan: Mapping[str, Any] | None) -> Chart:
    on_accelerator = any(layer.memory and layer.memory.accelerator_peak for layer in report.layers)
    kinds = ["accelerator", "ram"] if on_accelerator else ["ram"]

    def draw(figure: Any) -> None:
        for position, kind in enumerate(kinds):
            axes = figure.add_subplot(1, len(kinds), position + 1)
            uses, peaks = (
                [
                    float("nan") if layer.memory is None else getattr(layer.memory, name) / 2**30
                    for layer in report.layers
                ]
                for name in (kind, f"{kind}_peak")
            )
            marker = "." if len(report.layers) <= MOST_MARKERS else ""
            axes.plot(peaks, color=LIGHT["series-1"], marker=marker, label="peak so far")
            axes.plot(uses, color=LIGHT["series-3"], marker=marker, label="in use after the layer")
            planned = None if plan is None else plan.get(f"{kind}_peak_bytes")
            if planned:
                axes.axhline(planned / 2**30, color=LIGHT["series-2"], linestyle="--", label="planned peak")
            _layer_axis(axes, len(report.layers))
            axes.set(xlabel="decoder layer", ylabel="GiB", ylim=(0, None))
            if len(kinds) > 1:
                axes.set_title({"ram": "RAM", "accelerator": "Accelerator"}[kind])
        _legend(figure, axes.get_legend_handles_labels()[0])

    return Chart("memory", "Memory beyond what was in use before the run", draw, 3.0)


# -- parts of figures --------------------------------------------------------------------------------------------------


def _draw_losses(axes: Any, nearest: Sequence[float], loss: Sequence[float], most_ticks: int = MOST_TICKS) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    marker = "o" if len(loss) <= MOST_MARKERS else ""
    axes.plot(nearest, color=LIGHT["series-2"], marker=marker, markersize=3.5, linestyle="--", label="nearest")
    axes.plot(loss, color=LIGHT["series-1"], marker=marker, markersize=3.5, label="as quantized")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = next(subs for most, subs in LOG_TICKS if high / low < most)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    _layer_axis(axes, len(loss), most_ticks)


def _layer_axis(axes: Any, layers: int, most_ticks: int = MOST_TICKS) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=most_ticks))
    axes.set_xlim(-0.6, layers - 0.4)
    axes.grid(visible=False, axis="x")


def _draw_cells(axes: Any, values: Sequence[Sequence[float]], colours: Any, low: int, high: int) -> None:
    """Draws a coloured cell per (row, layer); values are integers from `low` to `high`."""
    from matplotlib.ticker import MaxNLocator

    columns, rows = ([edge - 0.5 for edge in range(count + 1)] for count in (len(values[0]), len(values)))
    axes.grid(visible=False)
    axes.pcolormesh(
        columns, rows, values, cmap=colours, vmin=low - 0.5, vmax=high + 0.5, edgecolors="face", linewidth=0.2
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=MOST_TICKS))


def _draw_shares(
    axes: Any, families: Mapping[str, Family], counts: Mapping[str, Sequence[int]], colours: Sequence[str]
) -> None:
    """Draws a bar of length 1 per family, divided in proportion to the counts of its parts."""
    totals = [max(1, sum(parts)) for parts in zip(*counts.values(), strict=True)]
    left = [0.0] * len(totals)
    for numbers, colour in zip(counts.values(), colours, strict=True):
        widths = [number / total for number, total in zip(numbers, totals, strict=True)]
        axes.barh(range(len(totals)), widths, left=left, color=colour, height=0.72)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_xlim(0, 1)
    _name_rows(axes, families)


def _name_rows(axes: Any, names: Mapping[str, Any]) -> None:
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def _patches(entries: Iterable[tuple[str, str]]) -> list[Any]:
    """Returns legend squares for pairs of (colour, label)."""
    from matplotlib.patches import Patch

    return [Patch(facecolor=colour, label=label) for colour, label in entries]


def _legend(figure: Any, handles: Sequence[Any], ncols: int | None = None, title: str | None = None) -> None:
    """Draws the legend above the axes, aligned with the figure's left edge, on one line by default."""
    figure.legend(
        handles=handles, ncols=ncols or len(handles), title=title, loc="outside upper left", alignment="left",
        handlelength=1.2, handletextpad=0.4, columnspacing=1.0,
    )  # fmt: skip


def _drawn_families(report: QuantizationReport) -> dict[str, Family]:
    """Returns the families of all layers, at most MOST_FAMILIES of them."""
    families = all_families(report)
    if len(families) <= MOST_FAMILIES:
        return families
    by_loss = sorted(families, key=lambda name: families[name].loss, reverse=True)
    kept = {name: family for name, family in families.items() if name in by_loss[: MOST_FAMILIES - 1]}
    rest = [group for name, family in families.items() if name not in kept for group in family.groups]
    return kept | {OTHERS: Family(tuple(rest))}


def _cells(report: QuantizationReport, families: Mapping[str, Family]) -> dict[str, list[Family | None]]:
    """Maps each family to its members in every layer (None where a layer has none)."""
    cells: dict[str, list[Family | None]] = {name: [] for name in families}
    for layer in report.layers:
        own = families_of(layer)
        rest = tuple(group for name, family in own.items() if name not in families for group in family.groups)
        for name in families:
            cell = own.get(name) if name != OTHERS else Family(rest) if rest else None
            cells[name].append(cell)
    return cells


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…"
