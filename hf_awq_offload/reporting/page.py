"""Renders report.html: one file without scripts or requests, in light or dark colours as the reader prefers.

Names and reasons come from checkpoints and data sets, so all text is escaped, and a content security policy allows
only the page's own style.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..messages import size_text
from ..report import LayerReport, MemoryUse, QuantizationReport
from .charts import LIGHT, Chart
from .document import CLIP_RATIOS
from .families import Family, collapsed, families_of, has_experts

DARK = {
    "ink": "#e7eaee", "muted": "#a3adb8", "line": "#3a424c", "nothing": "#565f6a",
    "series-1": "#62a8e5", "series-2": "#f0935a", "series-3": "#5fc48d", "series-4": "#b797e0", "series-5": "#d3b153",
    "series-6": "#e880ad",
    "ramp-0": "#1d3347", "ramp-1": "#20415d", "ramp-2": "#245074", "ramp-3": "#2a608c", "ramp-4": "#3372a4",
    "ramp-5": "#4285ba", "ramp-6": "#5b99cd", "ramp-7": "#7bafdd", "ramp-8": "#a0c7eb", "ramp-9": "#cbe2f8",
}  # fmt: skip
MOST_EXPERTS_NAMED = 8
"""A layer's row names this many experts, those with the fewest tokens; report.json has them all."""
LONG_TEXT = 30
"""Table cells longer than this may wrap; shorter ones, and so figures, don't."""

STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem 1.25rem 3rem;max-width:68rem;background:var(--paper);color:var(--ink);
 font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.5rem 0 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .4rem;border-bottom:1px solid var(--line);padding-bottom:.2rem}
p,figcaption{color:var(--muted);margin:.3rem 0 .6rem;max-width:50rem}
dl.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0}
dl.figures div{background:var(--card);border-radius:.5rem;padding:.5rem .75rem;display:flex;flex-direction:column;
 justify-content:space-between}
dt{color:var(--muted);font-size:.82rem}
dd{margin:0;font-size:1.25rem;font-weight:600;font-variant-numeric:tabular-nums}
figure{margin:1rem 0 1.6rem}
figcaption{font-weight:600;color:var(--ink)}
.wide{overflow-x:auto}
.wide svg{display:block;width:100%;min-width:36rem;height:auto}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;width:100%}
th,td{text-align:right;padding:.2rem .55rem;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
th{color:var(--muted);font-weight:600}
th:first-child,td:first-child{text-align:left}
.text{text-align:left}
td.text{min-width:13rem;white-space:normal;overflow-wrap:anywhere}
details{margin:.2rem 0}
summary{cursor:pointer;overflow-wrap:anywhere}
code{font:.92em ui-monospace,monospace;overflow-wrap:anywhere}
"""

EXPLAINED = {
    "loss": "Squared output error per token, summed over a layer's linears, on the calibration data.",
    "groups": "Linears that read the same input share a chart.",
    "gains": "Over all layers: the remaining loss, relative to round-to-nearest.",
    "alpha": "The exponent of the scales that the search chose.",
    "identity": "Why some groups have no scale. They are still clipped and rounded as the recipe says.",
    "clipping": "The share of a weight group's range that the search kept, where clipping lowers a row's error.",
    "time": "By phase: read, probe, run on the calibration data, search and round.",
    "memory": "The peak is the highest so far in the run.",
}
EXPLAINED_FOR_EXPERTS = {
    "groups": "All experts of a layer share a chart, too.",
    "alpha": "For experts, it is the mean over those of a layer.",
}
EXPERT_SETTINGS = ("min_expert_tokens", "all_experts")
"""Left out of the page of a model without experts."""


def page_of(report: QuantizationReport, document: Mapping[str, Any], charts: Sequence[Chart]) -> str:
    """Returns the page's HTML; `document` is the content of report.json."""
    title = f"Quantization of {document['model']}"
    are_experts = has_experts(report)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(document['quantizer'])}, {escape(document['created'])}, on {escape(document['device'])}</p>",
        _figures(document, are_experts),
        *([] if document["summary"]["loss_nearest"] else [NO_LOSSES]),
        _caveat(document["summary"]),
        *(_figure(chart, are_experts) for chart in charts),
        _reasons(document["summary"]),
        _layers(report),
        _starved(report, document["settings"].get("min_expert_tokens")),
        _left_out(report.left_out),
        _settings(document, are_experts),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_colours()}{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


NO_LOSSES = "<p>Quantized without calibration data: there are no losses to show.</p>"


def _caveat(summary: Mapping[str, Any]) -> str:
    caveat = summary["loss_caveat"]
    return "" if caveat is None else f'<p id="loss-caveat"><strong>Losses: {escape(caveat)}.</strong></p>'


def _colours() -> str:
    def variables(colours: Mapping[str, str], paper: str, card: str) -> str:
        return ";".join(f"--{name}:{value}" for name, value in {**colours, "paper": paper, "card": card}.items())

    light, dark = variables(LIGHT, "#ffffff", "#f2f4f7"), variables(DARK, "#15181c", "#20252b")
    return f":root{{color-scheme:light dark;{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def _figures(document: Mapping[str, Any], are_experts: bool) -> str:
    """Returns the headline figures; each `data-value` is the value in report.json."""
    summary, plan = document["summary"], document["plan"] or {}
    peak = "accelerator_peak_bytes" if summary["accelerator_peak_bytes"] else "ram_peak_bytes"
    entries: list[tuple[str, str, Any, Callable[[Any], str]]] = [
        ("loss-ratio", "loss relative to nearest", summary["loss_ratio"], _percent),
        ("layers", "decoder layers", summary["layers"], "{:,}".format),
        ("linears", "quantized linears", summary["linears"], "{:,}".format),
        ("left-out", "left in full precision", summary["left_out"], "{:,}".format),
        ("identity-share", "groups without a scale", summary["identity_share"], _percent),
        ("clip-ratio-mean", "mean clipping ratio", summary["clip_ratio_mean"], "{:.3f}".format),
        ("starved-experts", "starved experts", summary["starved_experts"] if are_experts else None, "{:,}".format),
        ("calibration-tokens", "calibration tokens", summary["calibration_tokens"], "{:,}".format),
        ("seconds", "time in layers", summary["seconds"], _duration),
        ("planned-seconds", "time planned", plan.get("seconds"), _duration),
        ("peak-bytes", "peak memory", summary[peak], size_text),
        ("planned-peak-bytes", "peak planned", plan.get(peak), size_text),
    ]
    shown = "".join(
        f'<div><dt>{label}</dt><dd id="{name}" data-value="{value}">{escape(text(value))}</dd></div>'
        for name, label, value, text in entries
        if value is not None
    )
    return f'<dl class="figures">{shown}</dl>'


def _figure(chart: Chart, are_experts: bool) -> str:
    explained = EXPLAINED[chart.name]
    if are_experts and chart.name in EXPLAINED_FOR_EXPERTS:
        explained += f" {EXPLAINED_FOR_EXPERTS[chart.name]}"
    return (
        f'<figure id="{chart.name}"><figcaption>{escape(chart.title)}</figcaption><p>{explained}</p>'
        f'<div class="wide">{chart.svg()}</div></figure>'
    )


def _reasons(summary: Mapping[str, Any]) -> str:
    reasons = summary["identity_reasons"]
    if not reasons:
        return ""
    rows = [[reason, str(count), _percent(count / summary["groups"])] for reason, count in reasons.items()]
    return '<h2 id="without-a-scale">Groups without a scale</h2>' + _table(["why", "groups", "share"], rows)


def _layers(report: QuantizationReport) -> str:
    titles = ["layer", "loss, nearest", "loss", "relative", "scaled", "mean α", "clip ratio", "seconds", "peak"]
    rows = [_layer_row(layer) for layer in report.layers]
    details = "".join(
        f"<details><summary>{escape(layer.name)}</summary>{_groups_table(families_of(layer))}</details>"
        for layer in report.layers
    )
    return (
        f'<h2 id="layer-table">Layers</h2>{_table(titles, rows)}'
        f'<h2 id="group-tables">Groups of every layer</h2>{details}'
    )


def _layer_row(layer: LayerReport) -> list[str]:
    whole = Family(layer.groups)
    return [layer.name, *_family_cells(whole), f"{layer.seconds:.2f}", _peak(layer.memory)]


def _groups_table(families: Mapping[str, Family]) -> str:
    titles = ["group", "loss, nearest", "loss", "relative", "scaled", "mean α", "clip ratio", "rows rounded to nearest"]
    rows = [
        [name, *_family_cells(family), f"{family.rows_nearest} / {family.rows}"] for name, family in families.items()
    ]
    return _table(titles, rows)


def _family_cells(family: Family) -> list[str]:
    counts = family.clip_counts
    kept = sum(n * ratio for n, ratio in zip(counts, CLIP_RATIOS, strict=False)) / sum(counts) if sum(counts) else None
    alphas = family.alphas
    return [
        f"{family.loss_nearest:.3g}" if family.loss_nearest else "–",
        f"{family.loss:.3g}" if family.loss_nearest else "–",
        _percent(family.loss / family.loss_nearest) if family.loss_nearest else "–",
        f"{len(alphas)} / {len(family.groups)}",
        f"{sum(alphas) / len(alphas):.2f}" if alphas else "–",
        "–" if kept is None else f"{kept:.3f}",
    ]


def _starved(report: QuantizationReport, minimum: int | None) -> str:
    layers = [layer for layer in report.layers if layer.starved_experts]
    if not layers:
        return ""
    less = "" if minimum is None else f" (fewer than {minimum})"
    rows = []
    for layer in layers:
        experts = sorted(layer.starved_experts.items(), key=lambda expert: expert[1])
        named = ", ".join(f"{name} ({tokens})" for name, tokens in experts[:MOST_EXPERTS_NAMED])
        more = len(experts) - MOST_EXPERTS_NAMED
        named += f" and {more} more" if more > 0 else ""
        rows.append([layer.name, str(len(experts)), str(experts[0][1]), named])
    return (
        f'<h2 id="starved">Starved experts</h2><p>Experts that saw few calibration tokens{less}; the '
        f"layer's pooled statistics make up for the tokens that they lack.</p>"
        + _table(["layer", "experts", "fewest tokens", "which (tokens)"], rows)
    )


def _left_out(left_out: Mapping[str, str]) -> str:
    if not left_out:
        return ""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    rows = [
        [reason, str(len(names)), ", ".join(f"{name} × {n}" if n > 1 else name for name, n in collapsed(names).items())]
        for reason, names in by_reason.items()
    ]
    return '<h2 id="full-precision">Left in full precision</h2>' + _table(["why", "modules", "which"], rows)


def _settings(document: Mapping[str, Any], are_experts: bool) -> str:
    settings = document["settings"].items()
    rows = [[name, str(value)] for name, value in settings if are_experts or name not in EXPERT_SETTINGS]
    seconds = [[f"seconds: {name}", f"{value:.1f}"] for name, value in document["phase_seconds"].items()]
    if not rows and not seconds:
        return ""
    return '<h2 id="settings">Settings</h2>' + _table(["", ""], rows + seconds)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    columns = zip(titles, *rows, strict=True)
    kinds = [' class="text"' if max(map(len, column)) > LONG_TEXT else "" for column in columns]
    head = "".join(f"<th{kind}>{escape(title)}</th>" for kind, title in zip(kinds, titles, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{escape(text)}</td>' for kind, text in zip(kinds, row, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _peak(memory: MemoryUse | None) -> str:
    return "–" if memory is None else size_text(memory.accelerator_peak or memory.ram_peak)


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
