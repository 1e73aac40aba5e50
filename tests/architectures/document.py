"""Writes docs/architectures.md from what the suite recorded."""

from __future__ import annotations

from typing import Any

from baselines import AUTOAWQ, LLM_COMPRESSOR, shares
from unsupported import CAUSAL_LM, IMAGE_TEXT

HEAD = """# Architectures

`python tests/architectures/record.py` writes this page; the suite in `tests/architectures` fails when the page is out
of date.

The package lists no architectures: it measures decoder layers, input groups and folds on the model
([how it works](how-it-works.md)). The suite builds each of the {types} causal language model types below as a tiny
random model, and runs it through `from_pretrained`, `save_pretrained` and loading again. Without rounding, the folded
model has the logits of the original. GPT-2 and other types do not work: [see below](#what-does-not-work).

*Linears* counts the quantized linears of the decoder layers in that model; *with scales* counts those whose input has a
proven fold. The others are rounded without scales; clipping and rounding apply to them too. These inputs can't have a
fold: those of layers that normalize *after* adding to the residual stream (BERT, OLMo 2), the output of a GELU, SiLU or
Mamba's scan (a scale does not pass through them), and attention whose values are shared with later layers.

| model type | linears | with scales | share | left in full precision |
|---|---|---|---|---|
"""

IMAGE_TEXT_HEAD = """
## Image-text models

This table covers the {types} types of `AutoModelForImageTextToText`: the text decoder is quantized; towers and
projectors stay in full precision. {with_images} types are calibrated and compared on texts that contain an image
(*images*); the others on text alone, because the suite does not know how to imitate their processor's output.

| model type | linears | with scales | share | images | left in full precision |
|---|---|---|---|---|---|
"""

UNSUPPORTED_IMAGE_TEXT_HEAD = """
Types of `AutoModelForImageTextToText`:

| model type | where it fails | why |
|---|---|---|
"""

UNSUPPORTED_HEAD = """
## What does not work

| model type | where it fails | why |
|---|---|---|
"""

COMPARISON_HEAD = """
## Beside the mappings of other tools

The table gives the share of the decoder layers' linears that get scales, on the same shrunk configs (grouped queries as
in the type's default config), for the types that have their own mapping in AutoAWQ 0.2.9 or llm-compressor 0.14.0.1.
The figures for these tools are counted from the mappings as published, not from a run: where a tool would stop with an
error, the linears still count here. AutoAWQ scales linears after a GELU with a module of its own around the activation;
an AWQ checkpoint without that module can't. A dash means no mapping of its own (llm-compressor then tries that of
Llama). In both tools, shapes decide whether the output of attention is scaled: AutoAWQ requires the weights of `v_proj`
and `o_proj` to have one shape, llm-compressor requires `v_proj` to have as many outputs as `o_proj` has inputs. The
share of a real model differs where its heads together are not as wide as the hidden size, or where its queries are
grouped in another way than in these shrunk models. Llama 4 is left out: how llm-compressor splits its experts was not
compared. Types that transformers does not have are left out, too: AutoAWQ's Aquila, Baichuan, EXAONE, InternLM 2,
MiniCPM, Phi-3 Vision, Qwen and Yi; llm-compressor's Nanbeige, Phi-3 Vision and Step 3.5.

| model type | here | AutoAWQ | llm-compressor |
|---|---|---|---|
"""

NOTES = """
## Notes

- **Mixture of experts.** Experts are split into one linear per expert and projection, and the checkpoint stores them
  under their original names (`experts.0.w1`, `experts.0.gate_proj`; if the original stores them fused,
  `experts.0.gate_proj`, `up_proj`, `down_proj`). Routers stay in full precision. Stock transformers keeps experts fused
  and can't load them quantized; this package loads them; other servers have not been tried.
- **Fused experts without transformers' experts interface** (DBRX, JetMoe, Llama 4, LongCat-Flash) are split where
  [a proof](mixture-of-experts.md#which-experts-are-split) succeeds. The report names every matrix of a decoder layer
  that no linear holds, and why it stays in full precision.
- **`Conv1D`** (GPT-2) stays in full precision, and a model that consists of nothing else is refused: stock
  transformers' AWQ loader replaces `nn.Linear` only, so it would load packed `Conv1D` weights as random ones.
- **Cross-attention** of decoders that are used without their encoder does not run in calibration and stays in full
  precision. So does that of image-text models (Mllama, BLIP) unless you pass samples with images.
"""

HIDDEN_REASONS = ("outside the decoder layers", "does not run on text alone: not part of the decoder")


def render(causal_lm: dict[str, dict[str, Any]], image_text: dict[str, dict[str, Any]]) -> str:
    """Returns the text of the page."""
    lines = [HEAD.format(types=len(causal_lm), image_text_types=len(image_text)), *map(_row, sorted(causal_lm.items()))]
    with_images = sum(found["images"] for found in image_text.values())
    lines.append(IMAGE_TEXT_HEAD.format(types=len(image_text), with_images=with_images))
    for model_type, found in sorted(image_text.items()):
        lines.append(_row((model_type, found), "yes" if found["images"] else "no"))
    lines.append(UNSUPPORTED_HEAD)
    stages = {
        "build": "transformers can't build it",
        "run": "transformers' model does not run on text",
        "reload": "transformers can't load it",
        "quantize": "refused with an error",
    }
    for listed in (CAUSAL_LM, IMAGE_TEXT):
        lines += [f"| {name} | {stages[each.stage]} | {each.reason} |\n" for name, each in sorted(listed.items())]
        lines.append(UNSUPPORTED_IMAGE_TEXT_HEAD if listed is CAUSAL_LM else "")
    lines.append(COMPARISON_HEAD)
    for suite, recorded in (("causal_lm", causal_lm), ("image_text", image_text)):
        for model_type in sorted(set(AUTOAWQ[suite]) | set(LLM_COMPRESSOR[suite])):
            found = recorded[model_type]
            theirs = ["-" if share is None else f"{share:.0%}" for share in shares(suite, model_type)]
            name = model_type if suite == "causal_lm" else f"{model_type} (image-text)"
            lines.append(f"| {name} | {found['scaled'] / found['quantized']:.0%} | {' | '.join(theirs)} |\n")
    return "".join(lines) + NOTES


def _row(of_type: tuple[str, dict[str, Any]], *more: str) -> str:
    model_type, found = of_type
    left_out = [
        f"{', '.join(f'`{name}`' for name in _short(names))}: {reason}"
        for reason, names in found["left_out"].items()
        if reason not in HIDDEN_REASONS
    ]
    share = f"{found['scaled'] / found['quantized']:.0%}"
    cells = [model_type, str(found["quantized"]), str(found["scaled"]), share, *more, "; ".join(left_out)]
    return f"| {' | '.join(cells)} |\n"


def _short(names: list[str], most: int = 3) -> list[str]:
    """Returns the last parts of names, up to a number of them."""
    short = list(dict.fromkeys(".".join(name.rsplit(".", 2)[-2:]) for name in names))
    return [*short[:most], *(["…"] if len(short) > most else [])]
