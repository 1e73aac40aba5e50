"""Random processor outputs for tiny image-text models, from nothing but the model: what its forward pass takes, what
its config says of image tokens, and how wide its patch embedding is.

Every way to hand over pixels that forward passes of transformers know is tried in turn; the one that the model runs
on, and whose pixels change the logits, is its way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from shrink import LARGEST_TEXT_ID, text_ids
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_awq_offload.calibration.forward_pass import forward_arguments

MOST_IMAGE_TOKENS = 600
TEXT_TOKENS = 12


def image_inputs(model: PreTrainedModel, seed: int = 0) -> dict[str, Any] | None:
    """Returns a text with an image as the model's processor would return it; None if no format works."""
    for pixels in _ways(model, seed):
        inputs = _with_text(model, pixels, seed)
        if inputs is not None:
            return inputs
    return None


def samples_and_texts(model: PreTrainedModel) -> tuple[list[dict[str, Any]], list[Any], bool]:
    """Returns inputs to compare models on, calibration samples, and whether they hold images."""
    inputs: list[dict[str, Any]] = []
    dataset: list[Any] = []
    text = {"input_ids": text_ids(1, 24, seed=5)}
    if _runs(model, text):
        inputs.append(text)
    with_image = image_inputs(model)
    if with_image is None or inputs:
        dataset += [{"input_ids": row.tolist()} for row in text_ids(3, 32)]
    if with_image is not None:
        inputs.append(with_image)
        calibration = image_inputs(model, seed=1)
        assert calibration is not None
        dataset.append(calibration)
    return inputs, dataset, with_image is not None


def _runs(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    try:
        _logits(model, inputs)
    except Exception:  # of any kind: modeling code raises what it likes
        return False
    return True


def _ways(model: PreTrainedModel, seed: int) -> Iterator[dict[str, Any]]:
    """Yields image inputs in every known format, without the text."""
    takes = forward_arguments(model)
    size = _find(model.config, "image_size", 32)
    size = size[0] if isinstance(size, list | tuple) else size["height"] if isinstance(size, dict) else size
    random = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random) * 2 - 1

    if "flattened_patches" in takes:
        width = _find(model.config, "patch_embed_hidden_size", 768)
        yield {"flattened_patches": noise(1, 16, width)}
    if "image_grid_thw" in takes:
        merge = _find(model.config, "spatial_merge_size", 2) or 2
        for width in _patch_widths(model):
            for side in (2 * merge, merge, 4 * merge):
                grid = {"image_grid_thw": torch.tensor([[1, side, side]])}
                yield {"pixel_values": noise(side * side, width), **grid}
                if "image_merge_sizes" in takes:
                    yield {
                        "pixel_values": noise(side * side, width),
                        "image_merge_sizes": torch.tensor([merge]),
                        **grid,
                    }
        patch = _find(model.config, "patch_size", 14)
        yield {"pixel_values": noise(16, 3, patch, patch), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        yield {"pixel_values": noise(1, 16, 3, patch, patch), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    patches = {"spatial_shapes", "image_position_ids", "pixel_position_ids", "target_sizes", "tgt_sizes"} & takes
    for name in sorted(patches):
        for width in _patch_widths(model):
            side = 4
            grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1).view(1, -1, 2)
            what = grid if "position" in name else torch.tensor([[side, side]])
            extra = {"pixel_attention_mask": torch.ones(1, side * side, dtype=torch.int64)}
            mask = extra if "pixel_attention_mask" in takes else {}
            yield {"pixel_values": noise(1, side * side, width), name: what, **mask}
    sizes = torch.tensor([[size, size]])
    for shape in ((1, 3, size, size), (1, 1, 3, size, size), (1, 2, 3, size, size), (1, 1, 4, 3, size, size)):
        inputs: dict[str, Any] = {"pixel_values": noise(*shape)}
        if "image_sizes" in takes:
            inputs["image_sizes"] = sizes
        if "high_res_pixel_values" in takes:
            side = _find(model.config, "high_res_vision_config", model.config)
            side = _find(side, "image_size", size)
            inputs["high_res_pixel_values"] = noise(1, 3, side, side)
        if "aspect_ratio_ids" in takes and len(shape) == 6:
            inputs |= {
                "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.int64),
                "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.int64),
                "cross_attention_mask": torch.ones(1, 2 * TEXT_TOKENS, 1, 4, dtype=torch.int64),
            }
        if "image_attention_mask" in takes:
            inputs["image_attention_mask"] = torch.ones(1, 2 * TEXT_TOKENS, 1, dtype=torch.int64)
        if "qformer_input_ids" in takes:
            inputs |= {"qformer_input_ids": text_ids(1, 4), "qformer_attention_mask": torch.ones(1, 4).long()}
        if "image_embeds_position_mask" in takes:
            inputs["image_embeds_position_mask"] = "placeholders"
        yield inputs
        if "image_sizes" in inputs:
            yield {name: value for name, value in inputs.items() if name != "image_sizes"}


def _with_text(model: PreTrainedModel, pixels: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """Adds the required number of image tokens to `pixels`; None if the model fails, or ignores the image."""
    tried: set[int] = set()
    counts = [_features(model, pixels), _find(model.config, "num_query_tokens", 0), 0]
    while counts:
        count = counts.pop(0)
        if count is None or count in tried or count > MOST_IMAGE_TOKENS:
            continue
        tried.add(count)
        for inputs in _texts(model, pixels, count, seed):
            try:
                logits = _logits(model, inputs)
                changed = _logits(model, {name: _changed(value) for name, value in inputs.items()})
            except Exception as error:  # of any kind: modeling code raises what it likes
                said = re.findall(r"features?:? (\d+)|[(\[](\d+), \d+[\])]", str(error))
                said = re.findall(r"features?:? (\d+)|[(\[](\d+), \d+[\])]", str(error))
                counts += [int(number) for numbers in said for number in numbers if number][:2]
                continue
            if torch.isfinite(logits).all() and not torch.equal(logits, changed):
                return inputs
    return None


def _texts(model: PreTrainedModel, pixels: dict[str, Any], count: int, seed: int) -> Iterator[dict[str, Any]]:
    takes = forward_arguments(model)
    text = text_ids(1, 2 * TEXT_TOKENS, seed + 3)
    for token in _image_tokens(model.config):
        image = torch.full((1, count), token, dtype=torch.int64)
        ids = torch.cat([text[:, :TEXT_TOKENS], image, text[:, TEXT_TOKENS:]], dim=1)
        is_image = torch.zeros_like(ids)
        is_image[:, TEXT_TOKENS : TEXT_TOKENS + count] = 1
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
        for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"):
            if name in takes:
                inputs[name] = is_image
        if "image_embeds_position_mask" in pixels:
            inputs["image_embeds_position_mask"] = is_image
        yield inputs


def _features(model: PreTrainedModel, pixels: dict[str, Any]) -> int | None:
    """Returns the number of image features."""
    for owner in (model, model.base_model):
        if hasattr(owner, "get_image_features"):
            try:
                with torch.no_grad():
                    found = owner.get_image_features(**pixels)
            except Exception:  # of any kind, see above
                continue
            found = getattr(found, "pooler_output", found)
            tensors = [found] if isinstance(found, Tensor) else [t for t in found or [] if isinstance(t, Tensor)]
            if tensors:
                return sum(tensor.numel() // tensor.shape[-1] for tensor in tensors)
    return None


def _image_tokens(config: PreTrainedConfig) -> list[int]:
    names = (
        "image_token_id",
        "image_token_index",
        "image_patch_id",
        "im_patch_id",
        "image_context_token_id",
        "video_token_index",
    )
    found = [value for name in names if isinstance(value := _find(config, name, None), int)]
    return list(dict.fromkeys(found)) or [LARGEST_TEXT_ID]


def _find(config: PreTrainedConfig, name: str, default: Any) -> Any:
    """Finds a field of the config, or of a config nested in it."""
    if getattr(config, name, None) is not None:
        return getattr(config, name)
    for sub in config.sub_configs:
        inner = getattr(config, sub, None)
        if isinstance(inner, PreTrainedConfig) and (found := _find(inner, name, None)) is not None:
            return found
    return default


def _patch_widths(model: nn.Module) -> list[int]:
    """Returns the possible lengths of a flattened patch, from the patch embeddings."""
    found = []
    for name, module in model.named_modules():
        if "embed" in name or "patch" in name or "proj" in name:
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                found.append(module.weight[0].numel())
            elif isinstance(module, nn.Linear):
                found.append(module.in_features)
    return list(dict.fromkeys(width for width in found if width % 3 == 0))[:4]


def _changed(value: Any) -> Any:
    return value.flip(-1) * 0.5 + 0.1 if isinstance(value, Tensor) and value.is_floating_point() else value


@torch.no_grad()
def _logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).logits
