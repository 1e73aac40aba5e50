"""Writes the model card of a quantized checkpoint: metadata, what was done and measured, and how to load it.

An existing README keeps everything: metadata are only added to, and only the text between our two marks is replaced.
The picture of losses per layer needs matplotlib (the extra `report`) and is left out without it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, get_token

from ..checkpoint.durable import replacing
from ..messages import how_to_install, shortened
from ..report import QuantizationReport
from ..reporting.charts import has_matplotlib, loss_chart

BEGIN = "<!-- hf_awq_offload: begin, rewritten when the checkpoint is saved -->"
END = "<!-- hf_awq_offload: end -->"
PICTURE = "awq_losses.png"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
REVISION = re.compile(r"[\w./-]+")
CACHE_FOLDER = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")
SERVED_BITS = (4, 8)
"""Bits that vLLM and SGLang have kernels for in all releases that read packed weights (docs/formats.md)."""
AUTOMATIC = re.compile(r"This is the model card of .* has been automatically generated\.")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{10,}\b|(?<=://)[^/\s@]+@")
"""Matches a hub token, or the credentials in a URL."""


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says."""

    quantization_config: Mapping[str, Any]  # as in config.json
    base_model: str | None = None  # hub id
    commit: str | None = None  # of the base model
    revision_name: str | None = None  # branch or tag of the base model that was asked for
    report: QuantizationReport | None = None
    evaluations: Mapping[str, Any] = field(default_factory=dict)
    """Maps what was evaluated (the name of a text or model) to an `Evaluation`."""
    quantized_bytes: int | None = None
    full_precision_bytes: int | None = None
    repo_id: str = "your-name/your-model"  # in the snippets


def hub_id(
    source: str | os.PathLike | None,  # what a model was loaded from
) -> str | None:
    """Returns the name of `source` on the Hub; None for a local folder, whose path must not be published."""
    source = os.fspath(source or "")
    cached = [match for part in Path(source).parts if (match := CACHE_FOLDER.fullmatch(part))]
    if cached:
        return f"{cached[-1]['owner']}/{cached[-1]['name']}"
    if os.path.exists(source) or not HUB_ID.fullmatch(source):
        return None
    return source


def proposed_name(
    source: str | os.PathLike | None,  # what a model was loaded from
) -> str:
    """Returns a name for the quantized `source`, independent of the target folder, so that runs can be compared."""
    path = Path(source or "model")
    name = (hub_id(source) or path.resolve().name).rpartition("/")[2]
    return name if name.lower().endswith("-awq") else f"{name}-AWQ"


def write_card(folder: Path, facts: CardFacts) -> Path:
    """Writes or updates README.md (and the picture) in `folder`; returns the path of README.md."""
    path = folder / "README.md"
    existing = path.read_text(encoding="utf-8") if path.exists() else None
    has_picture = facts.report is not None and draw_losses(facts.report, folder / PICTURE)
    text = updated(existing, facts, has_picture or (existing is not None and (folder / PICTURE).exists()))
    partial = path.with_suffix(".md.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)  # a card is never half-written
    return path


def updated(existing: str | None, facts: CardFacts, has_picture: bool) -> str:
    """Returns the text of README.md: `existing` with our metadata and section added or replaced."""
    if existing is None or _is_template(existing):
        existing = f"# {facts.repo_id.rpartition('/')[2]}\n"
    if not existing.startswith("---"):
        existing = f"---\n{{}}\n---\n{existing}"
    card = ModelCard(existing, ignore_metadata_errors=True)
    data: Any = card.data
    own = _metadata(facts)
    for name, value in own.items():
        if name != "tags" and getattr(data, name, None) is None:
            setattr(data, name, value)
    data.tags = list(dict.fromkeys([*(data.tags or []), *own["tags"]]))
    section = f"{BEGIN}\n{without_secrets(_section(facts, has_picture))}\n{END}"
    body = card.text
    before, begin, rest = body.partition(BEGIN)
    if begin:
        after = rest.partition(END)[2]
        card.text = f"{before}{section}{after}"
    else:
        card.text = f"{body.rstrip()}\n\n{section}\n" if body.strip() else f"{section}\n"
    return str(card)


def _is_template(card: str) -> bool:
    """Returns whether `card` is the blank template that transformers pushes to a repository without a card."""
    description = AUTOMATIC.search(card)
    if description is None:
        return False
    template = ModelCard.from_template(ModelCardData(), model_description=description[0])
    return ModelCard(card).text.split() == template.text.split()


def without_secrets(text: str) -> str:
    """Returns `text` without hub tokens and without credentials in URLs."""
    own_token = get_token()
    if own_token:
        text = text.replace(own_token, "")
    return TOKEN.sub("", text)


def draw_losses(report: QuantizationReport, path: Path) -> bool:
    """Draws every layer's loss to the PNG file `path`; returns False without matplotlib or losses."""
    chart = loss_chart(report)
    if chart is None or not has_matplotlib():
        return False
    with replacing(path) as partial:
        partial.write_bytes(chart.png())
    return True


def _grids(config: Mapping[str, Any]) -> list[tuple[int, int | None, bool]]:
    """Returns (bits, group size, has zero points) of every kind of quantized linear, the most common first."""
    groups = [group["weights"] for group in config.get("config_groups", {}).values()]
    if not groups:
        return [(config.get("bits", 4), config.get("group_size"), config.get("zero_point", True))]
    return [(weights["num_bits"], weights["group_size"] or -1, not weights["symmetric"]) for weights in groups]


def _metadata(facts: CardFacts) -> dict[str, Any]:
    method = str(facts.quantization_config.get("quant_method", "awq"))
    bits = sorted({bits for bits, *_ in _grids(facts.quantization_config)})
    tags = list(dict.fromkeys(["awq", method, *(f"{width}-bit" for width in bits)]))
    metadata: dict[str, Any] = {"library_name": "transformers", "tags": tags}
    if facts.base_model:
        metadata |= {"base_model": facts.base_model, "base_model_relation": "quantized"}
    return metadata


def _section(facts: CardFacts, has_picture: bool) -> str:
    parts = [_introduction(facts), _how(facts)]
    measured = _measured(facts)
    if measured:
        parts.append(f"### Measured\n\n{measured}")
    if has_picture:
        parts.append(f"![Output error of every decoder layer]({PICTURE})")
    parts.append(_loading(facts))
    return "\n\n".join(parts)


def _introduction(facts: CardFacts) -> str:
    page = f"https://huggingface.co/{facts.base_model}" + (f"/tree/{facts.commit}" if facts.commit else "")
    base = f" of [{facts.base_model}]({page})" if facts.base_model else ""
    kinds = [_described(*grid) for grid in _grids(facts.quantization_config)]
    if len(kinds) == 1:
        bits, rest = kinds[0]
        return f"## AWQ quantization\n\nA{'n' if bits == 8 else ''} {bits}-bit version{base}: {rest}."
    mixture = "; ".join(f"{bits} bits, {rest}" for bits, rest in kinds)
    return (
        f"## AWQ quantization\n\nA mixed-precision version{base}: {mixture}. config.json says which linear has which."
    )


def _revision(facts: CardFacts) -> str:
    """Returns the branch or tag, and the commit, of the base model; empty if they are not known."""
    names = [f"`{name}`" for name in (facts.revision_name, facts.commit) if name and REVISION.fullmatch(name)]
    return ", commit ".join(names) if facts.revision_name else "".join(f"commit {name}" for name in names)


def _described(bits: int, group_size: int | None, zero_point: bool) -> tuple[int, str]:
    kind = "asymmetric" if zero_point else "symmetric"
    if group_size is None:
        return bits, kind
    return bits, kind + (f", groups of {group_size} input channels" if group_size > 0 else ", one group per row")


def _how(facts: CardFacts) -> str:
    meta = dict(facts.quantization_config.get("meta") or {})
    rows = [(name, meta[name]) for name in meta if name != "quantizer"]
    revision = _revision(facts)
    if revision:
        rows.insert(0, ("revision of the original", revision))
    quantizer = ", ".join(map(str, meta.get("quantizer", ()))) or "hf_awq_offload"
    kept = facts.quantization_config.get("modules_to_not_convert") or facts.quantization_config.get("ignore")
    if kept:
        rows.append(("in full precision", shortened([f"`{name}`" for name in kept], 4)))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    heading = f"### How it was quantized\n\nBy {quantizer}."
    return f"{heading}\n\n| | |\n|---|---|\n{table}" if rows else heading


def _measured(facts: CardFacts) -> str:
    parts = []
    if facts.evaluations:
        lines = ["| | perplexity | KL to full precision (nats) | same top-1 | tokens |", "|---|---|---|---|---|"]
        for name, evaluation in facts.evaluations.items():
            kl = "" if evaluation.kl_nats is None else f"{evaluation.kl_nats:.5f}"
            top1 = "" if evaluation.top1_agreement is None else f"{evaluation.top1_agreement:.1%}"
            lines.append(f"| {name} | {evaluation.perplexity:.3f} | {kl} | {top1} | {evaluation.tokens} |")
        parts.append("\n".join(lines))
    if facts.quantized_bytes:
        of = f", {facts.full_precision_bytes / 1e6:.1f} MB before" if facts.full_precision_bytes else ""
        parts.append(f"Weights: {facts.quantized_bytes / 1e6:.1f} MB{of}.")
    if facts.report is not None:
        nearest = sum(layer.loss_nearest for layer in facts.report.layers)
        if nearest > 0:
            loss = sum(layer.loss for layer in facts.report.layers)
            caveat = f" ({facts.report.loss_caveat})" if facts.report.loss_caveat else ""
            parts.append(
                "Calibration loss (squared output error of the quantized linears): "
                f"{loss / nearest:.2f} × round-to-nearest{caveat}."
            )
    return "\n\n".join(parts)


def _loading(facts: CardFacts) -> str:
    repo = facts.repo_id
    is_awq = facts.quantization_config.get("quant_method", "awq") == "awq"
    instead = "gptqmodel" if is_awq else "compressed-tensors, if there are no zero points"
    transformers = f"""### How to load it

To install hf_awq_offload: {how_to_install()}.

```python
import hf_awq_offload  # registers the loader; without it, transformers needs {instead}
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```"""
    if any(bits not in SERVED_BITS for bits, *_ in _grids(facts.quantization_config)):
        return transformers
    return (
        transformers
        + f"""

```bash
vllm serve {repo}                                  # vLLM
python -m sglang.launch_server --model-path {repo} # SGLang
```"""
    )
