"""The same inputs give the same bytes, whatever the way that weights take and however often a run begins.

`tests/bench/determinism.py` measures what is not exact: other micro-batches, other numbers of threads.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from killing import digests
from models import save_model, tiny_llama, tiny_mixtral, token_recipe
from safetensors.torch import load_file
from stopped_runs import stopped_run
from transformers import AutoModelForCausalLM

from hf_awq_offload import quantize, quantize_model

MODELS = {"llama": tiny_llama, "mixture of experts": tiny_mixtral}


def weights(folder: Path) -> dict[str, str]:
    """Returns the digests of a checkpoint's weights and config."""
    return {name: value for name, value in digests(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("kind", MODELS)
def test_every_way_gives_the_same_bytes(kind, tmp_path, monkeypatch):
    source = save_model(MODELS[kind](), tmp_path / "source")
    quantize(source, tmp_path / "first", token_recipe())
    expected = weights(tmp_path / "first")
    assert expected
    quantize(source, tmp_path / "again", token_recipe())
    assert weights(tmp_path / "again") == expected
    quantize(source, tmp_path / "without prefetch", token_recipe(prefetch=False))
    assert weights(tmp_path / "without prefetch") == expected
    for offload in ("cpu", "disk"):
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=token_recipe(offload=offload))
        model.save_pretrained(tmp_path / offload)
        assert weights(tmp_path / offload) == expected, offload
    in_memory = quantize_model(AutoModelForCausalLM.from_pretrained(source), token_recipe())
    in_memory.save_pretrained(tmp_path / "in memory")
    assert weights(tmp_path / "in memory") == expected
    journal = stopped_run(source, tmp_path / "stopped", monkeypatch, commits=1)
    quantize(source, tmp_path / "stopped" / "out", token_recipe(), checkpoint_dir=journal)
    assert weights(tmp_path / "stopped" / "out") == expected


def test_the_state_of_random_generators_neither_matters_nor_changes(tmp_path):
    torch.manual_seed(1)
    first = quantize_model(tiny_llama(), token_recipe()).state_dict()
    torch.manual_seed(2)
    model = tiny_llama()  # seeds the generator itself
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = quantize_model(model, token_recipe()).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_micro_batches_move_few_codes(tmp_path):
    """They sum in another order. The limit is that of tests/bench/determinism.py."""
    source = save_model(tiny_llama(num_hidden_layers=1), tmp_path / "source")
    codes = []
    for batch_tokens in (20, 120):
        quantize(source, tmp_path / str(batch_tokens), token_recipe(batch_tokens=batch_tokens, format="awq"))
        tensors = load_file(tmp_path / str(batch_tokens) / "model.safetensors")
        words = torch.cat([value.flatten() for name, value in tensors.items() if name.endswith("qweight")])
        codes.append(torch.stack([words >> shift & 15 for shift in range(0, 32, 4)]))
    assert float((codes[0] != codes[1]).float().mean()) <= 0.005
