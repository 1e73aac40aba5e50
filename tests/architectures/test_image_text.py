"""Every model type that transformers' AutoModelForImageTextToText knows, as a tiny random model, as in
test_causal_lm.py; calibrated on, and compared on, texts with images wherever the tiny model can be fed with them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from behaviour import TEXT, check, load, recipe, save
from images import samples_and_texts
from shrink import tiny_image_text
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from unsupported import IMAGE_TEXT

from hf_awq_offload import AwqOffloadError

SNAPSHOT = Path(__file__).parent / "image_text.json"
RECORDED = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
MODEL_TYPES = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def one_thread():
    """Runs on one thread, as in test_causal_lm.py."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in IMAGE_TEXT])
def test_a_model_type_is_quantized_saved_reloaded_and_folds_as_recorded(model_type, tmp_path):
    model = tiny_image_text(model_type)
    inputs, dataset, with_images = samples_and_texts(model)
    found = check(model, tmp_path, inputs, dataset) | {"images": with_images}
    assert model_type in RECORDED, f"{model_type} is new; look at {found} and run tests/architectures/record.py"
    assert found == RECORDED[model_type]


@pytest.mark.parametrize("model_type", sorted(IMAGE_TEXT))
def test_a_model_type_that_is_listed_as_unsupported_still_is(model_type, tmp_path):
    stage, error, _ = IMAGE_TEXT[model_type]
    if stage == "build":
        with pytest.raises(Exception, match=error):  # of any kind: transformers' own
            tiny_image_text(model_type)
        return
    model = tiny_image_text(model_type)
    if stage == "run":
        with pytest.raises(Exception, match=error):
            model(**TEXT)
        return
    source = save(model, tmp_path)
    if stage == "reload":
        _, info = load(type(model), source)
        assert info["missing_keys"]
        return
    with pytest.raises(AwqOffloadError, match=error):
        load(type(model), source, quantization_config=recipe())


def test_nothing_is_listed_that_transformers_does_not_know():
    assert set(IMAGE_TEXT) | set(RECORDED) <= set(MODEL_TYPES)


def test_at_least_so_many_types_are_quantized_and_most_of_them_see_images():
    assert len(RECORDED) >= 75
    assert sum(found["images"] for found in RECORDED.values()) >= 55
