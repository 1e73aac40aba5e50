"""Quantizes a tiny LLaVA on samples with images, from a checkpoint and in memory; bad samples are refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from image_models import llava_processor, sample, tiny_llava
from models import tiny_llama, token_batch
from transformers import AutoModelForImageTextToText

from hf_awq_offload import AwqLinear, AwqOffloadConfig, CalibrationDataError, ModelStructureError, quantize_model
from hf_awq_offload.calibration.forward_pass import ForwardPass, forward_arguments, placeholder_ids, text_in
from hf_awq_offload.calibration.skeleton import merged

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def processor():
    return llava_processor()


@pytest.fixture
def folder(tmp_path, processor):
    tiny_llava().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def recipe(dataset, **changes) -> AwqOffloadConfig:
    return AwqOffloadConfig(**{"dataset": dataset, "group_size": 32, "n_grid": 4, "n_samples": 4} | changes)


def packed(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, AwqLinear)}


@pytest.mark.filterwarnings("ignore")  # transformers on loading processors without torchvision
def test_the_decoder_is_quantized_and_all_else_stays(folder, processor):
    samples = [sample(processor, seed=seed) for seed in range(3)]
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=recipe(samples))
    names = packed(model)
    assert len(names) == 14
    assert all(".language_model.layers." in name for name in names)
    original = tiny_llava().state_dict()
    kept = {name: tensor for name, tensor in model.state_dict().items() if "language_model.layers" not in name}
    assert any("vision_tower" in name for name in kept)
    assert all(torch.equal(tensor, original[name]) for name, tensor in kept.items())
    left_out = model.hf_quantizer.report.left_out
    assert {reason for name, reason in left_out.items() if "vision_tower" in name} == {
        "does not run on text alone: not part of the decoder"
    }


@pytest.mark.filterwarnings("ignore")
def test_the_checkpoints_own_processor_renders_conversations(folder):
    from PIL import Image

    image = folder / "picture.png"
    Image.new("RGB", (40, 40), (10, 200, 30)).save(image)
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": "what is it?"}]
    chats = [{"messages": [{"role": "user", "content": content}]}]
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=recipe(chats))
    assert len(packed(model)) == 14
    assert model.config.quantization_config.meta["n_samples"] == 1


def test_samples_change_what_is_found(processor):
    """Image features enter the statistics."""
    text = [{"input_ids": row.tolist()} for row in token_batch(3, 32)]
    losses = []
    for dataset in (text, [sample(processor, seed=seed) for seed in range(3)]):
        model = quantize_model(tiny_llava(), recipe(dataset))
        losses.append([layer.loss_nearest for layer in model.hf_quantizer.report.layers])
    assert losses[0] != losses[1]


def test_a_model_in_half_precision_takes_pixels_in_full_precision(processor):
    model = quantize_model(tiny_llava().to(torch.bfloat16), recipe([sample(processor)]))
    assert len(packed(model)) == 14


def test_a_failing_sample_leaves_the_model_as_it_was(processor):
    model = tiny_llava()
    before = copy.deepcopy(model.state_dict())
    broken = dict(sample(processor))
    broken["input_ids"] = broken["input_ids"][:, :5]
    broken["attention_mask"] = broken["attention_mask"][:, :5]
    with pytest.raises(CalibrationDataError, match="failed on a sample with the keys"):
        quantize_model(model, recipe([sample(processor), broken]))
    assert not packed(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_pixels_for_a_text_model_are_refused_before_anything_happens(processor):
    with pytest.raises(CalibrationDataError, match="'pixel_values', which the model's forward pass does not take"):
        quantize_model(tiny_llama(vocab_size=304), recipe([sample(processor)]))


def test_a_model_that_does_not_run_on_text_alone_says_so():
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    small = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"embed_dim": 32, "image_size": 16, "patch_size": 8, **small}
    config = IdeficsConfig(hidden_size=64, vocab_size=100, additional_vocab_size=0, vision_config=vision, **small)
    with pytest.raises(ModelStructureError, match="does not run on text alone"):
        quantize_model(IdeficsForVisionText2Text(config), recipe([list(range(20))] * 3))


def test_what_a_forward_pass_takes_is_read_off_it():
    assert {"input_ids", "pixel_values", "attention_mask"} <= forward_arguments(tiny_llava())
    assert "pixel_values" not in forward_arguments(tiny_llama())
    assert "use_cache" not in forward_arguments(tiny_llama())


def test_text_for_probes_is_free_of_image_tokens(processor):
    model = tiny_llava()
    assert 300 in placeholder_ids(model)
    ids = text_in(model, [sample(processor)])
    assert 300 not in ids
    assert len(ids) > 5
    assert len(text_in(model, [{"input_ids": torch.full((1, 20), 300)}])) == 8


def test_an_error_of_the_model_names_the_keys():
    with pytest.raises(CalibrationDataError, match=re.escape("'input_ids', 'pixel_values'")):
        ForwardPass(tiny_llava())({"input_ids": token_batch(1, 4), "pixel_values": torch.rand(1, 3, 32, 32)})


def test_orders_are_merged_and_contradictions_refused():
    assert merged([("a", "b", "d"), ("a", "b", "c", "d")], "M") == ["a", "b", "c", "d"]
    with pytest.raises(ModelStructureError, match="another order"):
        merged([("a", "b"), ("b", "a")], "M")


@pytest.mark.filterwarnings("ignore")
def test_the_example_in_the_documentation_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "vision-language.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(blocks[-1], "vision-language.md", "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert all("layers" in line and "None" not in line for line in printed[:2])
    assert float(re.fullmatch(r"tensor\((.*?)(, .*)?\)", printed[2]).group(1)) < 1e-4
