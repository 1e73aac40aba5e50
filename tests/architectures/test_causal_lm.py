"""Every model type that transformers' AutoModelForCausalLM knows, as a tiny random model, through the whole package.

What is folded must be what `causal_lm.json` says; `python tests/architectures/record.py` writes it and the table in
docs/architectures.md anew. A type that is new in transformers fails here until it is recorded, or listed with its
reason in `unsupported.py`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from behaviour import TEXT, check, load, recipe, save
from shrink import tiny_causal_lm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from unsupported import CAUSAL_LM

from hf_awq_offload import ModelStructureError

SNAPSHOT = Path(__file__).parent / "causal_lm.json"
RECORDED = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

pytestmark = [
    pytest.mark.slow,
    # What transformers' own modeling code warns about when models are as small as these.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def one_thread():
    """Runs on one thread: products are small, and xdist already uses all cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in CAUSAL_LM])
def test_a_model_type_is_quantized_saved_reloaded_and_folds_as_recorded(model_type, tmp_path):
    found = check(tiny_causal_lm(model_type), tmp_path)
    assert model_type in RECORDED, f"{model_type} is new; look at {found} and run tests/architectures/record.py"
    assert found == RECORDED[model_type]


@pytest.mark.parametrize("model_type", sorted(CAUSAL_LM))
def test_a_model_type_that_is_listed_as_unsupported_still_is(model_type, tmp_path):
    stage, error, _ = CAUSAL_LM[model_type]
    if stage == "build":
        with pytest.raises(Exception, match=error):  # of any kind: transformers' own
            tiny_causal_lm(model_type)
        return
    model = tiny_causal_lm(model_type)
    if stage == "run":
        with pytest.raises(Exception, match=error):
            model(**TEXT)
        return
    source = save(model, tmp_path)
    with pytest.raises(ModelStructureError, match=error):
        load(type(model), source, quantization_config=recipe())


def test_nothing_is_listed_that_transformers_does_not_know():
    known = set(MODEL_TYPES)
    assert set(CAUSAL_LM) <= known
    assert set(RECORDED) <= known


def test_at_least_so_many_types_are_quantized():
    assert len(RECORDED) >= 160


def test_no_file_of_the_package_names_an_architecture():
    package = Path(__file__).parents[2] / "hf_awq_offload"
    words = {name for name in MODEL_TYPES if len(name) > 3 and name not in ("beam", "llama", "data")}
    for path in package.glob("*.py"):
        code = re.sub(r'""".*?"""|#.*', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        found = {word for word in words if re.search(rf"\b{re.escape(word)}\b", code)}
        assert not found, f"{path.name} names {found}"
