"""Opens report.html in a real browser: figures, light and dark, wide and narrow, with markup in names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from browser import Dom, dom, overflow_pixels, screenshot
from models import save_model, tiny_mixtral, token_recipe
from report_samples import PLAN, facts, sample

from hf_awq_offload import quantize
from hf_awq_offload.report import LayerReport, QuantizationReport
from hf_awq_offload.reporting.charts import LIGHT
from hf_awq_offload.reporting.files import PICTURES, write_report
from hf_awq_offload.reporting.page import DARK

PAPER = {"light": "#ffffff", "dark": "#15181c"}
FIGURES = {
    "loss-ratio": "loss_ratio", "layers": "layers", "linears": "linears", "left-out": "left_out",
    "identity-share": "identity_share", "clip-ratio-mean": "clip_ratio_mean", "starved-experts": "starved_experts",
    "calibration-tokens": "calibration_tokens", "seconds": "seconds", "peak-bytes": "ram_peak_bytes",
}  # fmt: skip
"""Maps ids on the page to fields of report.json's summary."""

browser = pytest.mark.browser


def page(folder: Path, report: QuantizationReport, plan: dict | None = None) -> Path:
    write_report(folder, report, facts(plan))
    return folder / "report.html"


def figures(found: Dom) -> dict[str, str]:
    """Returns the page's figures by id."""
    return {name: text for name, text in found.text.items() if "data-value" in found.attributes[name]}


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5))


@browser
def test_the_page_of_a_run_says_what_its_json_says(tmp_path):
    source = save_model(tiny_mixtral(), tmp_path / "mixtral")
    quantize(source, tmp_path / "out", token_recipe(report_dir=tmp_path / "report", min_expert_tokens=100))
    document = json.loads((tmp_path / "report" / "report.json").read_text())
    summary = document["summary"]
    found = dom(tmp_path / "report" / "report.html", tmp_path)
    values = {name: found.attributes[name]["data-value"] for name in figures(found)}
    for name, field in FIGURES.items():
        assert float(values[name] or "nan") == summary[field], name
    assert values["planned-peak-bytes"] == str(document["plan"]["ram_peak_bytes"])
    assert found.text["loss-ratio"] == f"{summary['loss'] / summary['loss_nearest']:.1%}"
    assert found.text["linears"] == str(2 * (4 + 3 * 3))
    assert found.text["title"] == "Quantization of mixtral"
    assert found.tags["svg"] == len(PICTURES)
    assert all(found.attributes[name] for name in (*PICTURES, "layer-table", "starved", "full-precision", "settings"))
    assert {f"{layer['seconds']:.2f}" for layer in document["layers"]} <= set(found.cells)
    starved = document["layers"][0]["starved_experts"]
    assert any(all(f"{name} ({tokens})" in cell for name, tokens in starved.items()) for cell in found.cells)
    assert "outside the decoder layers" in found.cells


SIZES = {
    "2 layers": (2, 0, 4),
    "32 layers": (32, 0, 4),
    "96 layers of 8 groups": (96, 0, 8),
    "48 layers of 128 experts": (48, 128, 4),
}


@browser
@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_models_of_all_sizes_have_a_page_that_can_be_read(size, tmp_path):
    layers, experts, groups = SIZES[size]
    report = sample(layers, experts, groups)
    path = page(tmp_path, report, PLAN | {"accelerator_peak_bytes": 7 << 30 if experts else 0})
    found = dom(path, tmp_path)
    assert found.text["layers"] == str(layers)
    assert found.text["linears"] == f"{sum(len(group.consumers) for each in report.layers for group in each.groups):,}"
    assert found.tags["details"] == layers
    assert found.text["planned-seconds"] == "3 min"
    assert found.text["peak-bytes"] == ("6.00 GiB" if experts else f"{max(_ram_gib(report)):.2f} GiB")
    assert found.tags["tr"] < 60 + layers * 14, "experts are summed up"
    named = [cell for cell in found.cells if "mlp.experts.1" in cell]
    assert max(map(len, named), default=0) < 300, "the most starved are named, the others counted"
    assert path.stat().st_size < 1 << 20
    assert overflow_pixels(path, tmp_path, width=400) == overflow_pixels(path, tmp_path, width=1400) == 0


def _ram_gib(report: QuantizationReport) -> list[float]:
    return [layer.memory.ram_peak / 2**30 for layer in report.layers if layer.memory is not None]


@browser
@pytest.mark.parametrize("view", ["light", "dark"])
def test_pictures_follow_the_reader_s_colours(view, tmp_path):
    path = page(tmp_path, sample(6), PLAN)
    image = screenshot(path, tmp_path, view)
    colours = {colour for _, colour in image.getcolors(maxcolors=image.width * image.height) or []}
    assert image.getpixel((2, 2)) == rgb(PAPER[view])
    ours, others = (LIGHT, DARK) if view == "light" else (DARK, LIGHT)
    for name in ("ink", "series-1", "series-2", "series-3", "ramp-0", "ramp-9"):
        assert rgb(ours[name]) in colours, name
        assert name == "ink" or rgb(others[name]) not in colours, name  # anti-aliased text has greys of all kinds


@browser
def test_names_that_are_markup_are_text(tmp_path):
    evil = "<script>document.title='owned'</script>"
    report = sample(2, more_names=(f"mlp.{evil}", "x$\\frac{1}{2}$]]>"))
    layers = [LayerReport(f"{layer.name}<img src=x onerror=alert(1)>", layer.groups, 1.0) for layer in report.layers]
    report = QuantizationReport(layers, {f"{evil}.lm_head": f"because {evil}"}, 10)
    path = page(tmp_path, report)
    found = dom(path, tmp_path)
    assert found.text["title"] == "Quantization of org/model"
    assert not found.tags.keys() & {"script", "img", "iframe", "object", "embed", "link", "base", "form"}
    assert f"mlp.{evil}" in found.cells
    assert f"because {evil}" in found.cells
    assert "model.layers.0<img src=x onerror=alert(1)>" in found.cells
    assert overflow_pixels(path, tmp_path, width=400) == 0


@pytest.mark.parametrize("experts", [0, 4])
def test_only_the_page_of_a_mixture_speaks_of_experts(experts, tmp_path):
    report = replace(sample(2, experts), left_out={})  # its reasons speak of routers
    text = page(tmp_path, report).read_text(encoding="utf-8")
    assert ("expert" in text) == bool(experts)


def test_a_run_of_no_layers_has_a_page_too(tmp_path):
    found = Dom()
    found.feed(page(tmp_path, QuantizationReport()).read_text(encoding="utf-8"))
    assert found.text["layers"] == "0"
    assert "svg" not in found.tags


@browser
def test_a_run_without_data_has_a_page_too(tmp_path):
    bare = QuantizationReport([LayerReport(f"model.layers.{index}", (), 0.5) for index in range(3)])
    found = dom(page(tmp_path, bare), tmp_path)
    assert set(figures(found)) == {
        "layers", "linears", "left-out", "calibration-tokens", "seconds"
    }  # fmt: skip
    assert found.tags["svg"] == 1


def test_nothing_is_fetched_and_nothing_is_run(tmp_path):
    found = Dom()
    found.feed(page(tmp_path, sample(3), PLAN).read_text(encoding="utf-8"))
    policy = dict.fromkeys(value for tag, name, value in found.all_attributes if (tag, name) == ("meta", "content"))
    assert "default-src 'none'; style-src 'unsafe-inline'" in policy
    loading = {"src", "srcset", "data", "action", "poster", "background"}
    for tag, name, value in found.all_attributes:
        assert name not in loading, (tag, name)
        assert not name.startswith("on"), (tag, name)
        assert name not in ("href", "xlink:href") or value.startswith("#"), value
        assert "url(" not in value.replace("url(#", ""), value
        assert "http" not in value or name.startswith("xmlns"), value
    assert "@import" not in found.text and "script" not in found.tags  # noqa: PT018
    identifiers = [value for _, name, value in found.all_attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.parametrize("view", ["light", "dark"])
def test_colours_stand_out_from_the_paper(view):
    """WCAG 2.1 asks for a contrast of 4.5 for text and 3 for graphics."""
    colours = {"light": LIGHT, "dark": DARK}[view]
    assert LIGHT.keys() == DARK.keys()
    for name, colour in colours.items():
        least = 4.5 if name in ("ink", "muted") else 3.0 if name.startswith("series") else 1.1
        assert contrast(colour, PAPER[view]) > least, name
    ramp = [contrast(colours[f"ramp-{step}"], PAPER[view]) for step in range(10)]
    assert ramp == sorted(ramp), "more stands out more"


def contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(rgb(one)), _luminance(rgb(other))), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(channels: tuple[int, ...]) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
