"""Quantizing from disk to disk gives the same bits as in memory, with little in memory at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    save_model,
    tiny_ernie_moe,
    tiny_gemma3,
    tiny_gpt_oss,
    tiny_llama,
    tiny_mixtral,
    token_batch,
    token_recipe,
)
from stopped_runs import stopped_run
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_awq_offload import AwqLinear, ConfigError, MemoryLimitError, NumericalError, quantize
from hf_awq_offload.checkpoint.work_folder import work_folder
from hf_awq_offload.integrations import assembly
from hf_awq_offload.pipeline import run_storage

pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "llama in bf16, tied": lambda: tiny_llama(tie_word_embeddings=True).to(torch.bfloat16),
    "gemma3": tiny_gemma3,
    "mixtral": tiny_mixtral,
    "ernie4_5_moe in bf16": lambda: tiny_ernie_moe().to(torch.bfloat16),
    "gpt_oss in bf16": lambda: tiny_gpt_oss().to(torch.bfloat16),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A Llama of four layers."""
    return save_model(tiny_llama(num_hidden_layers=4), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def quantized(llama, tmp_path_factory) -> Path:
    """The Llama, quantized from disk to disk."""
    target = tmp_path_factory.mktemp("out") / "llama-awq"
    quantize(llama, target, token_recipe())
    return target


def in_memory(source: Path, target: Path, **changes) -> PreTrainedModel:
    recipe = token_recipe(**changes)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=recipe, dtype="auto")
    model.save_pretrained(target)
    return model


def assert_same_files(directory: Path, other: Path, *more: str) -> None:
    names = {path.name for path in directory.iterdir()} - {"README.md"}
    assert names == {path.name for path in other.iterdir()} - {"README.md"}
    assert {"model.safetensors.index.json" if more else "model.safetensors", "config.json"} <= names
    for name in names:
        assert (directory / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_streamed_and_from_the_disk_is_what_comes_from_memory_byte_by_byte(build, tmp_path):
    source = save_model(build(), tmp_path / "source")
    in_memory(source, tmp_path / "cpu", offload="cpu")
    model = in_memory(source, tmp_path / "disk", offload="disk")
    quantize(source, tmp_path / "streamed", token_recipe())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert any(isinstance(module, AwqLinear) for module in model.modules())
    assert_same_files(tmp_path / "disk", tmp_path / "cpu")
    assert_same_files(tmp_path / "streamed", tmp_path / "cpu")


def test_in_the_other_format_too(llama, tmp_path):
    in_memory(llama, tmp_path / "cpu", offload="cpu", format="compressed-tensors", bits=3)
    quantize(llama, tmp_path / "streamed", token_recipe(format="compressed-tensors", bits=3))
    assert_same_files(tmp_path / "streamed", tmp_path / "cpu")


def test_without_data_too(llama, tmp_path):
    plain = {"n_grid": 0, "clip": False, "rounding": "nearest"}
    in_memory(llama, tmp_path / "cpu", offload="cpu", **plain)
    quantize(llama, tmp_path / "streamed", token_recipe(**plain))
    assert_same_files(tmp_path / "streamed", tmp_path / "cpu")


def test_shards_and_their_index_are_those_of_save_pretrained(llama, quantized, tmp_path):
    quantize(llama, tmp_path / "streamed", token_recipe(), max_shard_size="24KB")
    AutoModelForCausalLM.from_pretrained(quantized).save_pretrained(tmp_path / "saved", max_shard_size="24KB")
    index = json.loads((tmp_path / "streamed" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert_same_files(tmp_path / "streamed", tmp_path / "saved", "sharded")


def test_what_is_not_quantized_is_copied_from_file_to_file(llama, quantized, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a tensor was read into memory to be written again")

    monkeypatch.setattr(assembly, "_value", fail)
    quantize(llama, tmp_path / "out", token_recipe())
    assert_same_files(tmp_path / "out", quantized)


def test_in_another_dtype_than_the_checkpoint(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=token_recipe(), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "cpu")
    quantize(llama, tmp_path / "streamed", token_recipe(), dtype=torch.bfloat16)
    assert_same_files(tmp_path / "streamed", tmp_path / "cpu")


def test_reading_ahead_changes_no_bit(llama, quantized, tmp_path):
    quantize(llama, tmp_path / "out", token_recipe(), prefetch=False)
    assert_same_files(tmp_path / "out", quantized)


def test_a_sharded_source_gives_the_same(quantized, tmp_path):
    tiny_llama(num_hidden_layers=4).save_pretrained(tmp_path / "source", max_shard_size="100KB")
    assert (tmp_path / "source" / "model.safetensors.index.json").exists()
    quantize(tmp_path / "source", tmp_path / "out", token_recipe())
    assert_same_files(tmp_path / "out", quantized)


def test_the_checkpoint_is_complete(tiny_llama_dir, tmp_path):
    report = quantize(tiny_llama_dir, tmp_path / "out", token_recipe(group_size=64))
    assert [layer.name for layer in report.layers] == [f"model.layers.{i}" for i in range(len(report.layers))]
    text = "a tokenizer"
    expected = AutoTokenizer.from_pretrained(tiny_llama_dir)(text).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == expected
    assert "awq" in (tmp_path / "out" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.tensor([expected])).logits.isfinite().all()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_there_is_refused_or_replaced(llama, quantized, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"exists and is not empty.*overwrite=True"):
        quantize(llama, target, token_recipe())
    with pytest.raises(ConfigError, match=r"mine\.txt is not part of a checkpoint"):
        quantize(llama, target, token_recipe(), overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]
    (target / "mine.txt").unlink()
    (target / "config.json").write_text("{}")
    (target / "model.safetensors").write_bytes(b"of an earlier run")
    quantize(llama, target, token_recipe(), overwrite=True)
    assert_same_files(target, quantized)


def test_no_folder_is_replaced_that_holds_something_else(llama, tmp_path, monkeypatch):
    """The source, the journal, the report, the data, or the working directory."""
    own = tmp_path / "own"
    shutil.copytree(llama, own / "source")
    (own / "data.txt").write_text("some text " * 100)
    before = sorted(path.name for path in tmp_path.rglob("*"))

    def refused(out: Path | str, message: str, source: Path = llama, **recipe: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            quantize(source, out, token_recipe(**recipe), overwrite=True)
        assert sorted(path.name for path in tmp_path.rglob("*")) == before

    refused("", "out_dir is empty")
    refused(own / "source", "is the source itself", own / "source")
    refused(own, r"holds the source itself \(", own / "source")
    refused(own / "new", r"holds checkpoint_dir", checkpoint_dir=own / "new" / "journal")
    refused(own / "new", r"holds report_dir", report_dir=own / "new" / "report")
    refused(own, r"holds the data set", dataset=str(own / "data.txt"))
    monkeypatch.chdir(own)
    refused(".", "is the working directory")
    refused("..", "holds the working directory")


def killed_run(target: Path) -> Path:
    """Creates the work folder that a killed run would leave."""
    work = target.with_name(f".{target.name}.work")
    (work / "checkpoint").mkdir(parents=True)
    (work / "rest-00000.safetensors").write_bytes(b"half")
    (work / "lock").write_text("")
    return work


def test_what_a_killed_run_left_is_removed(llama, quantized, tmp_path):
    killed_run(tmp_path / "out")
    quantize(llama, tmp_path / "out", token_recipe())
    assert_same_files(tmp_path / "out", quantized)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_to_be_replaced_survives_a_kill_before_its_successor_took_its_place(llama, quantized, tmp_path):
    replaced = killed_run(tmp_path / "out") / "replaced"
    replaced.mkdir()
    (replaced / "config.json").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        quantize(llama, tmp_path / "out", token_recipe())
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "config.json"]
    quantize(llama, tmp_path / "out", token_recipe(), overwrite=True)
    assert_same_files(tmp_path / "out", quantized)


def test_two_runs_do_not_write_to_one_place(llama, tmp_path):
    with work_folder(tmp_path / "out") as work:
        (work / "half").write_text("half")
        with pytest.raises(ConfigError, match=r"is being written by process \d+ on \S+; wait"):
            quantize(llama, tmp_path / "out", token_recipe())
        assert (work / "half").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_leaves_nothing(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    source = save_model(model, tmp_path / "source")
    with pytest.raises(NumericalError):
        quantize(source, tmp_path / "out", token_recipe())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_weight_that_the_checkpoint_lacks_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    source = save_model(tiny_llama(), tmp_path / "source")
    state = load_file(source / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"holds no model\.layers\.1\.mlp\.up_proj\.weight"):
        quantize(source, tmp_path / "out", token_recipe())


def test_files_that_can_not_be_read_lazily_are_refused(tmp_path):
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"offload is 'disk'.*pytorch_model\.bin.*save_pretrained"):
        quantize(tmp_path, tmp_path / "out", token_recipe())


def test_a_journal_keeps_what_from_pretrained_did(llama, quantized, tmp_path, monkeypatch):
    in_memory(llama, tmp_path / "first", offload="cpu", checkpoint_dir=tmp_path / "journal")

    def fail(*args, **kwargs):
        raise AssertionError("a layer that is in the journal was quantized again")

    monkeypatch.setattr("hf_awq_offload.pipeline.loop.quantize_with_statistics", fail)
    in_memory(llama, tmp_path / "second", offload="disk", checkpoint_dir=tmp_path / "journal")
    assert_same_files(tmp_path / "second", quantized)
    assert_same_files(tmp_path / "first", quantized)


# -- memory ----------------------------------------------------------------------------------------------------------


def bytes_in_memory(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters() if not p.is_meta)


@pytest.mark.parametrize("n_layers", [2, 6])
def test_one_layer_at_a_time_is_in_memory_whatever_the_depth(n_layers, tmp_path, monkeypatch):
    model = tiny_llama(num_hidden_layers=n_layers)
    source = save_model(model, tmp_path / "source")
    layer_bytes = bytes_in_memory(model.model.layers[0])
    seen = []
    forward, store_layer = LlamaDecoderLayer.forward, run_storage.RunStorage.store_layer

    def watched_forward(self, *args, **kwargs):
        seen.append(bytes_in_memory(running[0]))
        return forward(self, *args, **kwargs)

    def watched_store_layer(self, *args, **kwargs):
        seen.append(bytes_in_memory(self.onloader.model))
        store_layer(self, *args, **kwargs)

    running: list[nn.Module] = []
    build = run_storage.RunStorage.__init__

    def watched_init(self, onloader, *args, **kwargs):
        running.append(onloader.model)
        build(self, onloader, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", watched_forward)
    monkeypatch.setattr(run_storage.RunStorage, "store_layer", watched_store_layer)
    monkeypatch.setattr(run_storage.RunStorage, "__init__", watched_init)
    quantize(source, tmp_path / "out", token_recipe())
    embedding_and_norm = bytes_in_memory(model.model.embed_tokens) + bytes_in_memory(model.model.norm)
    assert len(seen) > 4 * n_layers
    assert max(seen) <= layer_bytes + embedding_and_norm
    assert sum(seen_bytes > layer_bytes for seen_bytes in seen) == 1, "embeddings are there in the skeleton pass only"
    assert bytes_in_memory(running[0]) == 0


def small_memory(monkeypatch, most_tokens: int) -> list[int]:
    """Makes layers run out of memory on more tokens than this; returns the batch sizes that were tried."""
    tried: list[int] = []
    forward = LlamaDecoderLayer.forward

    def limited(self, hidden_states, *args, **kwargs):
        tokens = hidden_states.shape[0] * hidden_states.shape[1]
        tried.append(tokens)
        if tokens > most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", limited)
    return tried


def test_running_out_of_memory_on_the_way_back_is_said_and_does_not_repeat(llama, tmp_path, monkeypatch):
    journal = stopped_run(llama, tmp_path, monkeypatch, 2, batch_tokens=120)
    for file in journal.glob("hidden-*.bin"):
        file.unlink()
    small_memory(monkeypatch, most_tokens=45)
    with pytest.raises(MemoryLimitError, match="ran out of memory while finished layers ran again"):
        quantize(llama, tmp_path / "out", token_recipe(batch_tokens=120), checkpoint_dir=journal)


def test_running_out_of_memory_halves_the_micro_batch_and_goes_on(llama, quantized, tmp_path, monkeypatch):
    tried = small_memory(monkeypatch, most_tokens=45)
    quantize(llama, tmp_path / "out", token_recipe(batch_tokens=120))
    assert {120, 60, 20} <= set(tried)
    monkeypatch.undo()
    quantize(llama, tmp_path / "small", token_recipe(batch_tokens=30))
    assert_same_files(tmp_path / "out", tmp_path / "small")


def test_running_out_of_memory_half_way_keeps_what_is_done(llama, tmp_path, monkeypatch):
    """Memory is short from layer 2 on; from there, statistics equal those of a run with small micro-batches."""
    forward = LlamaDecoderLayer.forward
    reached = []

    def limited(self, hidden_states, *args, **kwargs):
        if self.self_attn.layer_idx == 2 and hidden_states.shape[0] > 1:
            reached.append(hidden_states.shape[0])
            if len(reached) > 1:  # not on the first batch, so that statistics are half done
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", limited)
    report = quantize(llama, tmp_path / "out", token_recipe())
    monkeypatch.undo()
    exact = quantize(llama, tmp_path / "exact", token_recipe())
    assert len(reached) == 2
    for layer, expected in zip(report.layers, exact.layers, strict=True):
        assert layer.loss == pytest.approx(expected.loss, rel=0.02), "sums in another order, the same statistics"


def test_when_smaller_batches_can_not_help_the_error_says_what_may(llama, tmp_path, monkeypatch):
    small_memory(monkeypatch, most_tokens=32)
    long = token_batch(2, 100).tolist()
    with pytest.raises(MemoryLimitError, match=r"ran out of memory on layer model\.layers\.0.*max_seq_len"):
        quantize(llama, tmp_path / "out", token_recipe(dataset=long, max_seq_len=100))
    assert not (tmp_path / "out").exists()
