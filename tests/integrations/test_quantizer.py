"""What stays on a model's quantizer after the model was quantized."""

from __future__ import annotations

import gc
import io
import weakref

import torch
from models import tiny_llama, tiny_mixtral, token_recipe

from hf_awq_offload import quantize_model


class Rows(list):
    """A data set that can be watched."""


def test_the_data_set_does_not_travel_with_the_model():
    rows = Rows(token_recipe().dataset)
    watched = weakref.ref(rows)
    model = quantize_model(tiny_llama(), token_recipe(dataset=rows))
    del rows
    gc.collect()
    assert model.hf_quantizer.report.tokens > 0
    assert watched() is None


def test_a_model_that_was_calibrated_on_a_generator_can_be_pickled():
    model = quantize_model(tiny_llama(), token_recipe(dataset=(row for row in token_recipe().dataset)))
    torch.save(model, io.BytesIO())


def test_experts_in_full_precision_are_let_go():
    model = quantize_model(tiny_mixtral(), token_recipe())
    assert model.hf_quantizer.fused == {}
    assert model.hf_quantizer.checkpoint.meta["unfused_experts"]
