"""On samples with images, every decoder layer is given exactly what it gets in the model's own forward pass: image
features in the hidden states, positions in three directions, masks that let image tokens see each other, visual
features that are added between layers, cross-attention to the image.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from images import image_inputs
from shrink import text_ids, tiny_image_text
from torch import Tensor, nn

from hf_awq_offload.calibration.layer_inputs import PROBES, HaltedFeed, SkeletonFeed, open_feed
from hf_awq_offload.calibration.text_decoder import find_decoder
from hf_awq_offload.model.decoder_layers import LayerRunner, tensors_in

MODEL_TYPES = {
    "aria": SkeletonFeed,
    "deepseek_vl": SkeletonFeed,
    "gemma3": SkeletonFeed,
    "glm4v": SkeletonFeed,
    "idefics": SkeletonFeed,
    "idefics3": SkeletonFeed,
    "instructblip": SkeletonFeed,
    "internvl": SkeletonFeed,
    "llama4": SkeletonFeed,
    "llava": SkeletonFeed,
    "mistral3": SkeletonFeed,
    "mllama": SkeletonFeed,
    "paligemma": SkeletonFeed,
    "qwen2_5_vl": SkeletonFeed,
    "qwen2_vl": SkeletonFeed,
    "qwen3_5": SkeletonFeed,
    "qwen3_vl": HaltedFeed,  # it adds visual features behind its first layers
    "qwen3_vl_moe": HaltedFeed,
    "smolvlm": SkeletonFeed,
}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def given(layers: dict[str, nn.Module], run) -> list[tuple[str, list[Tensor]]]:
    """Returns the layers in call order, with the floating-point tensors that each is given."""
    seen: list[tuple[str, list[Tensor]]] = []

    def remember(name: str):
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.current_thread() is not threading.main_thread():
                return  # a paused forward pass has reached the layer, which runs in this thread
            tensors = [tensor.clone() for tensor in tensors_in((args, dict(sorted(kwargs.items()))))]
            seen.append((name, tensors))

        return hook

    handles = [layer.register_forward_pre_hook(remember(name), with_kwargs=True) for name, layer in layers.items()]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_every_decoder_layer_is_given_what_the_model_gives_it(model_type):
    torch.set_num_threads(1)
    model = tiny_image_text(model_type)
    samples = [image_inputs(model, seed) for seed in (1, 2)]
    run_layer = lambda name, use: use(LayerRunner(model.get_submodule(name), torch.device("cpu")))  # noqa: E731
    decoder, runs_on_text = find_decoder(model, samples, run_layer, needs_text=False)
    probes = [text_ids(1, 16), text_ids(1, 1)] if runs_on_text else [samples[0]] * PROBES
    texts = [text_ids(2, 20, seed=4)] if runs_on_text else []
    batches = [*probes, *texts, *samples]
    expected = {
        index: given(decoder.layers, lambda batch=batch: decoder.forward(batch))
        for index, batch in enumerate(batches)
        if index >= PROBES
    }
    seen: dict[int, list[tuple[str, list[Tensor]]]] = {index: [] for index in expected}
    with open_feed(model, batches, run_layer, decoder) as feed:
        assert isinstance(feed, MODEL_TYPES[model_type])
        for visit in feed.visits():
            runner = LayerRunner(model.get_submodule(visit.name), torch.device("cpu"))
            feed.run_probes(runner)
            for index in expected:
                seen[index] += given(
                    decoder.layers,
                    lambda index=index, visit=visit, runner=runner: feed.run(runner, visit.name, index),
                )
    for index, calls in expected.items():
        assert [name for name, _ in seen[index]] == [name for name, _ in calls]
        for (name, tensors), (_, others) in zip(seen[index], calls, strict=True):
            torch.testing.assert_close(
                tensors, others, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert not any("vision" in name for name in decoder.layers)


def test_layers_that_only_images_reach_take_their_place_among_the_others():
    model = tiny_image_text("mllama")
    sample = image_inputs(model)
    run_layer = lambda name, use: use(LayerRunner(model.get_submodule(name), torch.device("cpu")))  # noqa: E731
    decoder, _ = find_decoder(model, [sample], run_layer, needs_text=True)
    with open_feed(model, [text_ids(1, 8), text_ids(1, 1), text_ids(1, 12), sample], run_layer, decoder) as feed:
        assert [name.rpartition(".")[2] for name in feed.layer_names] == ["0", "1"]
        crossing = feed.layer_names[1]
        assert set(feed.skeleton.calls[crossing]) == {3}
        assert feed.probes(crossing)[0].several == feed.probes(crossing)[0].single
