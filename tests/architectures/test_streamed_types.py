"""Streaming writes the same bytes for types whose weights are laid out differently when they are read one by one."""

from __future__ import annotations

import pytest
from shrink import text_ids, tiny_causal_lm
from transformers import AutoModelForCausalLM

from hf_awq_offload import AwqOffloadConfig, quantize

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("model_type", ["inkling2_text", "gemma3n_text"])
def test_streamed_and_in_memory_give_the_same_bytes(model_type, tmp_path):
    """transformers converts the experts of the first; forward passes of the second are paused."""
    tiny_causal_lm(model_type).save_pretrained(tmp_path / "source")
    fields = {"n_samples": 6, "max_seq_len": 20, "batch_tokens": 40, "group_size": 32, "n_grid": 3}
    recipe = AwqOffloadConfig(dataset=text_ids(6, 20).tolist(), **fields)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=recipe, dtype="auto")
    model.save_pretrained(tmp_path / "memory")
    quantize(tmp_path / "source", tmp_path / "streamed", AwqOffloadConfig(dataset=text_ids(6, 20).tolist(), **fields))
    name = "model.safetensors"
    assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
