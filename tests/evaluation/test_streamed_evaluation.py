"""Models that run one decoder layer at a time give the figures that they give whole, whatever kind they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_models import tiny_llava
from models import save_model, tiny_gemma2, tiny_gpt_oss, tiny_llama, tiny_mixtral, token_batch, token_recipe
from peft import LoraConfig, get_peft_model
from tiny_tokenizer import make_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    PreTrainedModel,
)

from hf_awq_offload import (
    CalibrationDataError,
    CheckpointError,
    ConfigError,
    MemoryLimitError,
    ModelStructureError,
    evaluate,
    evaluating,
    quantize,
)
from hf_awq_offload.calibration import paused_inputs
from hf_awq_offload.checkpoint.conversion import convert_checkpoint
from hf_awq_offload.evaluation.gate import too_far
from hf_awq_offload.reporting.evaluation import Evaluation

TEXT = token_batch(1, 90, seed=5)[0]
WINDOWS = {"dataset": TEXT, "window_tokens": 24, "stride_tokens": 16, "batch_tokens": 48}
"""Windows of two lengths, the first with more scored tokens than the others, in micro-batches of two."""
WINDOWS_ALONE = {name: value for name, value in WINDOWS.items() if name != "dataset"}


def tiny_gemma3n() -> PreTrainedModel:
    """A model whose layers form no chain: its forward passes are paused at each layer."""
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=[96] * 4,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=2,
        laurel_rank=16,
        activation_sparsity_pattern=[0.0] * 4,
        initializer_range=0.1,
    )
    return Gemma3nForCausalLM(config).eval()


def quantized(folder: Path, target: Path, **changes: Any) -> Path:
    """Quantizes in few steps, by rounding to nearest: how well does not matter here."""
    model_class = changes.pop("model_class", AutoModelForCausalLM)
    recipe = token_recipe(**{"n_grid": 0, "clip": False, "rounding": "nearest"} | changes)
    quantize(folder, target, recipe, model_class=model_class)
    return target


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "llama, tied": (lambda: tiny_llama(tie_word_embeddings=True), {}),
    "scales that differ by 3-bit overrides": (tiny_llama, {"bits": 8, "overrides": {"down_proj": {"bits": 3}}}),
    "experts stored one by one": (tiny_mixtral, {}),
    "experts stored fused": (tiny_gpt_oss, {"format": "compressed-tensors"}),
    "soft caps and sliding windows": (tiny_gemma2, {}),
    "paused forward passes": (tiny_gemma3n, {}),
    "image and text": (tiny_llava, {"model_class": AutoModelForImageTextToText}),
}


def assert_equal(streamed: Evaluation, whole: Evaluation) -> None:
    assert streamed.streamed
    assert not whole.streamed
    assert streamed.tokens == whole.tokens == len(TEXT) - 1
    assert streamed.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
    assert streamed.reference_perplexity == pytest.approx(whole.reference_perplexity, rel=1e-5)
    assert whole.kl_nats > 1e-6
    assert streamed.kl_nats == pytest.approx(whole.kl_nats, rel=1e-3)
    assert streamed.top1_agreement == pytest.approx(whole.top1_agreement, abs=1.5 / len(TEXT))
    assert [bucket.tokens for bucket in streamed.positions] == [bucket.tokens for bucket in whole.positions]
    for bucket, expected in zip(streamed.positions, whole.positions, strict=True):
        assert bucket.kl_nats == pytest.approx(expected.kl_nats, rel=1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_layer_by_layer_is_as_whole(kind, tmp_path):
    build, changes = MODELS[kind]
    source = save_model(build(), tmp_path / "source")
    out = quantized(source, tmp_path / "out", **changes)
    loading = {"model_class": changes.get("model_class", AutoModelForCausalLM), "device_map": "cpu"}
    whole = evaluate(out, against=source, streamed=False, **WINDOWS, **loading)
    streamed = evaluate(out, against=source, streamed=True, **WINDOWS, **loading)
    assert_equal(streamed, whole)
    assert [layer.name for layer in streamed.layers] == [layer.name for layer in streamed.layers if layer.name]
    assert len(streamed.layers) >= 2
    assert all(0 < layer.relative_error < 1 for layer in streamed.layers)


def test_layers_that_form_no_chain_are_paused(tmp_path, monkeypatch):
    """The model of the case above does take that way."""
    built = []
    build = paused_inputs.PausedInputs.__init__
    monkeypatch.setattr(
        paused_inputs.PausedInputs, "__init__", lambda self, *given: (built.append(self), build(self, *given))[1]
    )
    source = save_model(tiny_gemma3n(), tmp_path / "source")
    found = evaluate(source, streamed=True, **WINDOWS)
    assert len(built) == 1
    assert found.perplexity == pytest.approx(evaluate(source, streamed=False, **WINDOWS).perplexity, rel=1e-5)
    assert (found.kl_nats, found.layers) == (None, ())


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A quantized model and its original."""
    source = save_model(tiny_llama(hidden_size=128), tmp_path_factory.mktemp("pair") / "source")
    return quantized(source, source.with_name("out"), group_size=64), source


@pytest.mark.parametrize("layout", ["gemv", "compressed-tensors"])
def test_other_layouts_are_read(layout, pair, tmp_path):
    out, source = pair
    scale_dtype = torch.float32 if layout == "compressed-tensors" else None
    convert_checkpoint(out, tmp_path / "other", layout, scale_dtype=scale_dtype)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"].pop("meta", None)  # as other tools write it
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    expected = evaluate(out, against=source, streamed=True, **WINDOWS)
    found = evaluate(tmp_path / "other", against=source, streamed=True, **WINDOWS)
    assert found.kl_nats == pytest.approx(expected.kl_nats, rel=1e-4)


def test_a_model_in_memory_is_streamed_and_stays_as_it_was(pair):
    out, source = pair
    model, original = (AutoModelForCausalLM.from_pretrained(folder, device_map=None) for folder in pair)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    forwards = [name for name, module in original.named_modules() if "forward" in vars(module)]
    found = evaluate(model, against=original, streamed=True, **WINDOWS)
    assert found.kl_nats == pytest.approx(evaluate(out, against=source, streamed=True, **WINDOWS).kl_nats, rel=1e-3)
    assert [name for name, module in original.named_modules() if "forward" in vars(module)] == forwards
    after = original.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert evaluate(model, against=original, **WINDOWS).kl_nats == pytest.approx(found.kl_nats, rel=1e-3)


def test_files_stay_as_they_were_and_nothing_is_left_behind(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluating, "HIDDEN_SHARE", 0.0)  # hidden states go to a file
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {file: file.read_bytes() for folder in pair for file in folder.iterdir()}
    spilled = evaluate(pair[0], against=pair[1], streamed=True, **WINDOWS)
    assert {file: file.read_bytes() for folder in pair for file in folder.iterdir()} == before
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert spilled == evaluate(pair[0], against=pair[1], streamed=True, **WINDOWS)


def test_prefetching_and_micro_batches_change_nothing(pair):
    found = evaluate(pair[0], against=pair[1], streamed=True, **WINDOWS)
    assert evaluate(pair[0], against=pair[1], streamed=True, prefetch=False, **WINDOWS) == found
    whole = evaluate(pair[0], against=pair[1], streamed=True, **WINDOWS | {"batch_tokens": None})
    assert whole.kl_nats == pytest.approx(found.kl_nats, rel=1e-3)


def test_models_that_do_not_fit_are_streamed(pair, monkeypatch):
    assert not evaluate(pair[0], against=pair[1], **WINDOWS).streamed
    monkeypatch.setattr(evaluating, "RAM_SHARE", 0.0)
    assert evaluate(pair[0], against=pair[1], **WINDOWS).streamed
    assert not evaluate(pair[0], against=pair[1], device_map={"": "cpu"}, **WINDOWS).streamed


def test_a_limit_that_one_layer_exceeds_is_refused(pair):
    with pytest.raises(MemoryLimitError, match=r"Evaluating takes about .* on cpu: one decoder layer and 24 tokens"):
        evaluate(pair[0], against=pair[1], streamed=True, max_memory={"cpu": "1MiB"}, **WINDOWS)


def test_a_head_that_looks_at_several_tokens_is_refused():
    class MixingHead(nn.Module):
        def __init__(self, head: nn.Module):
            super().__init__()
            self.head = head

        def forward(self, hidden: Tensor) -> Tensor:
            return self.head(hidden.cumsum(1))

    model = tiny_llama()
    model.lm_head = MixingHead(model.lm_head)
    with pytest.raises(ModelStructureError, match=r"several tokens at once.*streamed=False"):
        evaluate(model, streamed=True, **WINDOWS)


# -- wrong pairs and texts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 72}, "vocab_size is 64 .* and 72 .*different vocabularies"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 2 .* and 3"),
        ({"hidden_size": 64}, "hidden_size is 128 .* and 64"),
    ],
)
@pytest.mark.parametrize("streamed", [True, False])
def test_models_of_other_shapes_are_no_pair(pair, tmp_path, changes, message, streamed):
    model = tiny_llama(**{"hidden_size": 128} | changes)
    model.config.save_pretrained(tmp_path)  # no weights: it fails before these are looked for
    with pytest.raises(CheckpointError, match=message):
        evaluate(pair[0], against=tmp_path, streamed=streamed, **WINDOWS)


def test_models_of_other_types_are_no_pair(pair, tmp_path):
    tiny_gemma2().config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="The model is a llama, the one that it is compared with a gemma2"):
        evaluate(pair[0], against=tmp_path, **WINDOWS)


@pytest.mark.parametrize("name", ["./nothing-there", "/nothing/there"])
def test_an_original_that_is_not_there(pair, name):
    with pytest.raises(CheckpointError, match=f"There is no folder {name}"):
        evaluate(pair[0], against=name, **WINDOWS)


def test_a_model_is_not_compared_with_itself():
    model = tiny_llama()
    with pytest.raises(ConfigError, match="compared with itself"):
        evaluate(model, against=model, **WINDOWS)


def test_a_checkpoint_is_not_compared_with_itself_but_with_another_place_of_one_name(pair, tmp_path):
    with pytest.raises(ConfigError, match="against_revision"):
        evaluate(str(pair[0]), against=pair[0], **WINDOWS)
    shutil.copytree(pair[1], tmp_path / "repository")
    shutil.copytree(pair[0], tmp_path / "repository" / "quantized")
    both = str(tmp_path / "repository")
    found = evaluate(both, against=both, subfolder="quantized", **WINDOWS)
    assert found.kl_nats == pytest.approx(evaluate(pair[0], against=pair[1], **WINDOWS).kl_nats, rel=1e-4)
    assert found.kl_nats > 1e-4


@pytest.mark.parametrize(
    "wrong", [{"window_tokens": 1}, {"stride_tokens": 0}, {"window_tokens": 8, "stride_tokens": 9}, {"most_tokens": -1}]
)
def test_windows_that_make_no_sense_are_refused_before_the_text_is_read(pair, wrong):
    with pytest.raises(ConfigError, match="stride between 1 and the window"):
        evaluate(pair[0], dataset="no-such-file.txt", **wrong)


def test_texts_and_token_ids_in_memory(pair, tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    save_model(tiny_llama(vocab_size=512), tmp_path)
    texts = ["one two three four five " * 4, "six seven eight nine ten " * 4]
    found = evaluate(tmp_path, dataset=texts, window_tokens=16)
    assert found.tokens > 20
    assert evaluate(tmp_path, dataset=(text for text in texts), window_tokens=16) == found
    ids = torch.randint(3, 64, (40,), generator=torch.Generator().manual_seed(0))
    assert evaluate(pair[0], dataset=ids.numpy(), **WINDOWS_ALONE) == evaluate(pair[0], dataset=ids, **WINDOWS_ALONE)
    with pytest.raises(ConfigError, match="text_column"):
        evaluate(pair[0], dataset=ids, text_column="text", **WINDOWS_ALONE)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_evaluated_whole_and_not_layer_by_layer(pair, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    assert evaluate(tmp_path, against=pair[1], **WINDOWS).kl_nats == pytest.approx(0, abs=1e-6)
    with pytest.raises(ConfigError, match=r"is an adapter of .*streamed=False"):
        evaluate(tmp_path, against=pair[1], streamed=True, **WINDOWS)


def test_other_tokenizers_are_no_pair(pair, tmp_path):
    for folder, first in (("model", "a"), ("original", "b")):
        shutil.copytree(pair[0] if folder == "model" else pair[1], tmp_path / folder)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([f"{first}x"])
        tokenizer.save_pretrained(tmp_path / folder)
    text = tmp_path / "text.txt"
    text.write_text("one ax two bx three " * 5)
    with pytest.raises(CheckpointError, match=r"tokenizers of the two models differ: token \d+ of the text is"):
        evaluate(tmp_path / "model", against=tmp_path / "original", dataset=text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([], "The text has 0 tokens"),
        ([5], "The text has 1 tokens"),
        ([1, 2, 64], "token ids from 1 to 64, and the model has 64 tokens"),
        ([3] * 200, "Windows of the text have 200 tokens, but the model has 128 positions"),
    ],
)
def test_a_text_that_does_not_do(pair, text, message):
    with pytest.raises(CalibrationDataError, match=message):
        evaluate(pair[0], against=pair[1], dataset=torch.tensor(text, dtype=torch.int64))


# -- the bound on the divergence ---------------------------------------------------------------------------------------


def test_the_layer_that_lost_most_is_named(tmp_path):
    source = save_model(tiny_llama(num_hidden_layers=4), tmp_path / "source")
    coarse = {"bits": 8, "overrides": {r"layers\.2\.": {"bits": 2}}, "format": "compressed-tensors"}
    found = evaluate(quantized(source, tmp_path / "out", **coarse), against=source, streamed=True, **WINDOWS)
    assert too_far(found, None) is None
    assert too_far(found, found.kl_nats) is None
    refused = too_far(found, found.kl_nats * 0.99)
    assert [layer.name for layer in refused.layers] == ["model.layers.2"]
    assert refused.layers[0].share > 0.5
    finer = quantized(source, tmp_path / "finer", **coarse | {"overrides": refused.overrides})
    assert evaluate(finer, against=source, streamed=True, **WINDOWS).kl_nats < 0.1 * found.kl_nats


def test_without_figures_of_layers_streaming_is_suggested(pair):
    found = evaluate(pair[0], against=pair[1], streamed=False, **WINDOWS)
    assert "Evaluate with --streamed" in str(too_far(found, 1e-9))
