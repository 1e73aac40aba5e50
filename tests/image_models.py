"""Builds a tiny random image-text model with a real processor, and samples that the processor returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tiny_tokenizer import make_tokenizer
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE_SIDE, PATCH = 32, 8
IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
)


def llava_processor() -> LlavaProcessor:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 1000
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIDE}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llava(vocab_size: int = 304, image_token: int = 300, hidden_size: int = 64) -> PreTrainedModel:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 3 // 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.1,
    }
    text = LlamaConfig(**small, num_key_value_heads=2, vocab_size=vocab_size)
    vision = CLIPVisionConfig(**small, image_size=IMAGE_SIDE, patch_size=PATCH)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    ).eval()


def picture(seed: int = 0) -> np.ndarray:
    """Returns a random picture, (height, width, channels) uint8."""
    return np.random.RandomState(seed).randint(0, 255, (40, 40, 3), dtype=np.uint8)


def sample(processor: LlavaProcessor, text: str = "<s>user: <image> what is it?</s>", seed: int = 0) -> Any:
    return processor(text=[text], images=[picture(seed)], return_tensors="pt")
