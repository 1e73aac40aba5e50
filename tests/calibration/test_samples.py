"""Tests a processor's output as calibration data: what is accepted, what is refused, and that nothing is cut."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from image_models import IMAGE_TOKENS, llava_processor, picture, sample

from hf_awq_offload.calibration.dataset import CalibrationSet, load_calibration_set
from hf_awq_offload.config import AwqOffloadConfig
from hf_awq_offload.errors import CalibrationDataError

ACCEPTS = frozenset(("input_ids", "attention_mask", "pixel_values", "image_sizes", "token_type_ids", "position_ids"))
TEXT = {"input_ids": list(range(10, 30))}


@pytest.fixture(scope="module")
def processor():
    return llava_processor()


def load(dataset: Any, accepts: frozenset[str] = ACCEPTS, **fields: Any) -> CalibrationSet:
    own = fields.pop("own", None)
    return load_calibration_set(
        AwqOffloadConfig(dataset=dataset, **{"max_seq_len": 16} | fields),
        load_tokenizer=lambda: None,  # type: ignore[arg-type, return-value]
        load_processor=None if own is None else lambda: own,
        vocab_size=300,
        accepts=accepts,
        placeholders=frozenset((300,)),
    )


def ids(rows: int = 1, tokens: int = 20) -> torch.Tensor:
    return torch.arange(rows * tokens).view(rows, tokens) % 200


def test_a_processors_output_is_taken_whole(processor):
    output = sample(processor)
    calibration = load([output])
    (taken,) = calibration.samples
    assert not calibration.sequences
    assert taken.inputs.keys() == output.keys()
    assert all(torch.equal(taken.inputs[name], output[name]) for name in output)
    assert output["input_ids"].shape[1] > 16, "longer than max_seq_len"
    assert calibration.tokens == output["input_ids"].numel()
    assert int((taken.inputs["input_ids"] == 300).sum()) == IMAGE_TOKENS
    assert taken.counted is None


def test_texts_and_samples_may_be_mixed(processor):
    calibration = load([TEXT, sample(processor), TEXT, sample(processor, seed=1)])
    assert [len(sequence) for sequence in calibration.sequences] == [16, 4, 16, 4]
    assert len(calibration.samples) == 2


def test_padding_is_kept_but_does_not_count():
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :5] = 0
    (taken,) = load([{"input_ids": ids(2), "attention_mask": mask, "pixel_values": torch.rand(2, 3, 8, 8)}]).samples
    assert torch.equal(taken.inputs["attention_mask"], mask)
    assert torch.equal(taken.counted, mask.bool())
    assert len(taken.token_ids) == 35


def test_labels_and_loss_masks_say_what_counts():
    labels = ids()
    labels = labels.masked_fill(labels < 5, -100)
    row = {"input_ids": ids(), "labels": labels, "pixel_values": torch.rand(1, 3, 8, 8)}
    (taken,) = load([row]).samples
    assert torch.equal(taken.counted, ids() >= 5)
    assert "labels" not in taken.inputs


@pytest.mark.parametrize("convert", [lambda x: x, np.asarray, lambda x: x.tolist()], ids=["tensor", "array", "list"])
def test_values_may_be_tensors_arrays_or_lists(convert):
    row = {"input_ids": convert(ids()), "pixel_values": convert(torch.ones(1, 3, 8, 8)), "image_sizes": [[8, 8]]}
    (taken,) = load([row]).samples
    assert torch.equal(taken.inputs["pixel_values"], torch.ones(1, 3, 8, 8))
    assert taken.inputs["pixel_values"].dtype == torch.float32
    assert torch.equal(taken.inputs["image_sizes"], torch.tensor([[8, 8]]))


def test_pictures_of_unequal_size_stay_a_list():
    pixels = [torch.rand(3, 8, 8), torch.rand(3, 8, 16)]
    (taken,) = load([{"input_ids": ids(), "pixel_values": pixels}]).samples
    assert [value.shape for value in taken.inputs["pixel_values"]] == [(3, 8, 8), (3, 8, 16)]


def test_a_row_with_nothing_but_one_value_per_token_is_text():
    row = {"input_ids": ids(), "token_type_ids": torch.zeros(1, 20), "attention_mask": torch.ones(1, 20).long()}
    calibration = load([row])
    assert not calibration.samples
    assert [len(sequence) for sequence in calibration.sequences] == [16, 4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"pixel_values": torch.rand(1, 3, 8, 8)}, "has 'pixel_values' but no 'input_ids'"),
        ({"input_ids": torch.arange(20), "pixel_values": torch.rand(3, 8, 8)}, "of shape (batch, tokens)"),
        ({"input_ids": ids().float(), "pixel_values": torch.rand(1, 3, 8, 8)}, "of shape (batch, tokens)"),
        ({"input_ids": ids(), "pixel_values": "a picture"}, "column 'pixel_values', holds values of type"),
        ({"input_ids": ids(), "input_features": torch.rand(1, 3, 8)}, "'input_features', which the model's forward"),
        (
            {"input_ids": ids(), "attention_mask": torch.ones(1, 3), "pixel_values": torch.rand(1, 3, 8, 8)},
            "expected one value per token",
        ),
        ({"input_ids": ids() + 290, "pixel_values": torch.rand(1, 3, 8, 8)}, "the model's vocabulary has ids"),
    ],
)
def test_what_can_not_be_used_is_refused(row, message):
    with pytest.raises(CalibrationDataError, match=re.escape(message)):
        load([row])


def test_pixels_for_a_model_of_text_alone_are_refused():
    row = {"input_ids": ids(), "pixel_values": torch.rand(1, 3, 8, 8)}
    with pytest.raises(CalibrationDataError, match="'pixel_values', which the model's forward pass does not take"):
        load([row], accepts=frozenset(("input_ids", "attention_mask")))


def chat(image: Any) -> dict[str, Any]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize("given", ["own", "tokenizer"])
def test_conversations_with_images_are_rendered_by_the_processor(processor, given):
    calibration = load([chat(picture(seed)) for seed in range(2)], **{given: processor})
    assert len(calibration.samples) == 2
    assert all(int((taken.inputs["input_ids"] == 300).sum()) == IMAGE_TOKENS for taken in calibration.samples)
    assert calibration.samples[0].inputs["pixel_values"].shape == (1, 3, 32, 32)


def test_images_may_stand_in_a_column_of_their_own(processor):
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    (taken,) = load([{"messages": [message], "images": [picture()]}], tokenizer=processor).samples
    assert taken.inputs["pixel_values"].shape == (1, 3, 32, 32)


def test_texts_go_through_a_processors_tokenizer(processor):
    (sequence, *_) = load(["while wizards watch the lazy dog " * 4], tokenizer=processor).sequences
    assert processor.tokenizer.decode(sequence).startswith("while wizards watch")


@pytest.mark.parametrize("tokenizer", [None, "processor.tokenizer"])
def test_conversations_with_images_need_a_processor(processor, tokenizer):
    with pytest.raises(CalibrationDataError, match="their processor could not be loaded"):
        load([chat(picture())], tokenizer=None if tokenizer is None else processor.tokenizer)


def test_what_a_processor_can_not_render_is_an_error(processor):
    with pytest.raises(CalibrationDataError, match="could not render row 0"):
        load([chat("no such file.png")], tokenizer=processor)


def test_the_name_tells_one_data_set_from_another(processor):
    names = [load([sample(processor, f"<s>user: <image> {text}</s>")]).name for text in ("one", "two", "one")]
    assert names[0] == names[2] != names[1]
