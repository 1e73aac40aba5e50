"""On samples with images, every decoder layer is given exactly what it gets in the model's own forward pass: image
features in the hidden states, positions in three directions, masks that let image tokens see each other, visual
features that are added between layers, cross-attention to the image.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from images import image_inputs
from shrink import text_ids, tiny_image_text
from torch import Tensor, nn

from hf_awq_offload.calibration.batches import Batches
from hf_awq_offload.calibration.chain_inputs import ChainInputs
from hf_awq_offload.calibration.opened_inputs import open_layer_inputs
from hf_awq_offload.calibration.paused_inputs import PausedInputs
from hf_awq_offload.calibration.text_decoder import find_decoder
from hf_awq_offload.model.decoder_layers import LayerRunner, tensors_in

MODEL_TYPES = {
    "aria": ChainInputs,
    "deepseek_vl": ChainInputs,
    "gemma3": ChainInputs,
    "glm4v": ChainInputs,
    "idefics": ChainInputs,
    "idefics3": ChainInputs,
    "instructblip": ChainInputs,
    "internvl": ChainInputs,
    "llava": ChainInputs,
    "mistral3": ChainInputs,
    "mllama": ChainInputs,
    "paligemma": ChainInputs,
    "qwen2_5_vl": ChainInputs,
    "qwen2_vl": ChainInputs,
    "qwen3_5": ChainInputs,
    "qwen3_vl": PausedInputs,  # it adds visual features behind its first layers
    "qwen3_vl_moe": PausedInputs,
    "smolvlm": ChainInputs,
}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Watcher:
    """Remembers batch by batch which layers run, in order, and every floating-point tensor that each is given."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        self.layers = layers
        self.seen: list[list[tuple[str, list[Tensor]]]] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        handles = [
            layer.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, layer in self.layers.items()
        ]
        yield
        for handle in handles:
            handle.remove()

    def set_counted_tokens(self, counted: Tensor | None, sequences: Sequence[int] = ()) -> None:
        self.seen.append([])

    def _hook(self, name: str):
        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.current_thread() is not threading.main_thread():
                return  # a paused pass has come to the layer; the layer itself runs in this thread
            tensors = [tensor.clone() for tensor in tensors_in((args, dict(sorted(kwargs.items()))))]
            self.seen[-1].append((name, tensors))

        return remember


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_every_decoder_layer_is_given_what_the_model_gives_it(model_type):
    torch.set_num_threads(1)
    model = tiny_image_text(model_type)
    samples = [image_inputs(model, seed) for seed in (1, 2)]
    run_layer = lambda name, use: use(LayerRunner(model.get_submodule(name), torch.device("cpu")))  # noqa: E731
    decoder, runs_on_text = find_decoder(model, samples, run_layer, needs_text=False)
    probes = (text_ids(1, 16), text_ids(1, 1)) if runs_on_text else (samples[0], samples[0])
    data = [text_ids(2, 20, seed=4), *samples] if runs_on_text else samples
    whole = Watcher(decoder.layers)
    with whole.collecting():
        for batch in data:
            whole.set_counted_tokens(None)
            decoder.forward(batch)
    seen: list[list[tuple[str, list[Tensor]]]] = [[] for _ in data]
    cut = lambda batch_tokens: Batches(probes, data, [None] * len(data), batch_tokens)  # noqa: E731
    with open_layer_inputs(model, cut, 40, run_layer, decoder) as inputs:
        assert isinstance(inputs, MODEL_TYPES[model_type])
        for turn in inputs.turns():
            watcher, outputs = Watcher(decoder.layers), inputs.next_writer()
            inputs.run(LayerRunner(model.get_submodule(turn.name), torch.device("cpu")), watcher, outputs)
            inputs.advance(outputs)
            for of_batch, more in zip(seen, watcher.seen, strict=True):
                of_batch += more
    for of_batch, calls in zip(seen, whole.seen, strict=True):
        assert [name for name, _ in of_batch] == [name for name, _ in calls]
        for (name, tensors), (_, others) in zip(of_batch, calls, strict=True):
            torch.testing.assert_close(
                tensors, others, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert not any("vision" in name for name in decoder.layers)


def test_layers_that_only_images_reach_take_their_place_among_the_others():
    model = tiny_image_text("mllama")
    sample = image_inputs(model)
    run_layer = lambda name, use: use(LayerRunner(model.get_submodule(name), torch.device("cpu")))  # noqa: E731
    decoder, _ = find_decoder(model, [sample], run_layer, needs_text=True)
    batches = Batches((text_ids(1, 8), text_ids(1, 1)), [text_ids(1, 12), sample], [None, None], tokens=12)
    with open_layer_inputs(model, lambda batch_tokens: batches, 12, run_layer, decoder) as inputs:
        assert [name.rpartition(".")[2] for name in inputs.layer_names] == ["0", "1"]
        crossing = inputs.layer_names[1]
        assert isinstance(inputs, ChainInputs)
        assert set(inputs.calls[crossing]) == {3}
        assert inputs.probe_calls(crossing)[0].several == inputs.probe_calls(crossing)[0].single
