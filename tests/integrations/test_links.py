"""Links in folders are followed for reading where their owner made them, and never for copying or writing elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_cache import add_to_cache
from models import save_model, tiny_llama, token_recipe
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_awq_offload import CheckpointError, ConfigError, StorageError, quantize
from hf_awq_offload.checkpoint.companion_copies import copy_companions
from hf_awq_offload.checkpoint.durable import replacing
from hf_awq_offload.checkpoint.safetensors import INDEX_NAME, WEIGHTS_NAME
from hf_awq_offload.checkpoint.work_folder import work_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_model(tiny_llama(), tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    quantize(source, out, token_recipe())
    return out


@pytest.fixture
def secret(tmp_path) -> Path:
    file = tmp_path / "private" / "id_rsa"
    file.parent.mkdir()
    file.write_text("secret")
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_picture_in_the_card_that_is_a_link_is_not_copied(quantized, secret, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "theirs")
    (folder / "awq_losses.png").unlink(missing_ok=True)
    (folder / "awq_losses.png").symlink_to(secret)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "mine")
    assert "README.md" in contents(tmp_path / "mine")
    assert b"secret" not in contents(tmp_path / "mine").values()


def test_a_card_that_is_a_link_is_not_copied(quantized, secret, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "theirs")
    secret.write_text((folder / "README.md").read_text() + "secret")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(secret)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "mine")
    assert b"secret" not in (tmp_path / "mine" / "README.md").read_bytes()


def test_a_card_that_is_no_text_does_no_harm(quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "theirs")
    (folder / "README.md").write_bytes(b"\xff\xfe\x00")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").is_file()


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "config.json", "README.md"])
def test_a_model_is_not_saved_through_links(name, quantized, tmp_path):
    """Such as those of a snapshot in the Hub's cache, whose blobs several revisions share."""
    blob = tmp_path / "blob"
    blob.write_bytes(b"shared")
    model = AutoModelForCausalLM.from_pretrained(quantized)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / name).symlink_to(blob)
    with pytest.raises(ConfigError, match=f"holds {name}, a link to .*blob, which would be overwritten"):
        model.save_pretrained(tmp_path / "snapshot")
    assert blob.read_bytes() == b"shared"
    assert [path.name for path in (tmp_path / "snapshot").iterdir()] == [name]


def test_files_that_come_along_do_not_leave_through_a_folder_that_is_a_link(secret, tmp_path, caplog):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "code").mkdir(parents=True)
    (source / "code" / "extra.py").write_text("x = 1")
    target.mkdir()
    (target / "code").symlink_to(secret.parent)
    assert copy_companions(source, ["code/extra.py"], target) == []
    assert [path.name for path in secret.parent.iterdir()] == ["id_rsa"]
    assert "code/extra.py" in caplog.text


def test_a_link_in_the_place_of_the_work_folder_is_not_emptied(secret, tmp_path):
    (tmp_path / ".out.work").symlink_to(secret.parent)
    with pytest.raises(StorageError, match="is a link"), work_folder(tmp_path / "out"):
        pass
    assert secret.read_text() == "secret"


def test_a_link_in_the_place_of_a_partial_file_is_replaced(secret, tmp_path):
    (tmp_path / "report.json.partial").symlink_to(secret)
    with replacing(tmp_path / "report.json") as partial:
        partial.write_text("{}")
    assert secret.read_text() == "secret"
    assert (tmp_path / "report.json").read_text() == "{}"


# -- reading -----------------------------------------------------------------------------------------------------------


def test_links_of_a_users_own_folder_and_of_the_cache_are_followed(source, quantized, tmp_path):
    folder = tmp_path / "linked"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    quantize(folder, tmp_path / "out", token_recipe())
    assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == (quantized / WEIGHTS_NAME).read_bytes()
    repository = add_to_cache(tmp_path / "cache", "org/model", {"main": quantized})
    (snapshot,) = (repository / "snapshots").iterdir()
    assert (snapshot / WEIGHTS_NAME).is_symlink()
    AutoModelForCausalLM.from_pretrained(snapshot)
    AutoModelForCausalLM.from_pretrained("org/model", cache_dir=tmp_path / "cache", local_files_only=True)


def with_index(folder: Path, weights: Path, name: str) -> Path:
    """Puts an index in the place of the weights that names another file for all of them."""
    from hf_awq_offload.checkpoint.safetensors import tensor_places

    names = tensor_places(weights)
    (folder / WEIGHTS_NAME).unlink()
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))
    return folder


@pytest.mark.parametrize("place", ["absolute", "above"])
@pytest.mark.parametrize("kind", ["quantized", "full precision"])
def test_an_index_does_not_lead_out_of_the_folder(kind, place, source, quantized, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(quantized if kind == "quantized" else source, elsewhere)
    folder = shutil.copytree(elsewhere, tmp_path / "theirs")
    outside = elsewhere / WEIGHTS_NAME
    with_index(folder, outside, str(outside) if place == "absolute" else f"../elsewhere/{WEIGHTS_NAME}")
    recipe = {} if kind == "quantized" else {"quantization_config": token_recipe()}
    with pytest.raises(CheckpointError, match=r"not in this folder|files beside it"):
        AutoModelForCausalLM.from_pretrained(folder, **recipe)


def test_a_subfolder_that_the_user_names_may_lie_anywhere(quantized, tmp_path):
    shutil.copytree(quantized, tmp_path / "a" / "b")
    (tmp_path / "c").mkdir()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c", subfolder="../a/b")
    assert model.dtype == torch.bfloat16 or model.dtype.is_floating_point


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT 0.21 asks for it
def test_adapters_in_a_folder_have_their_base_model_in_the_cache(source, tmp_path, monkeypatch):
    add_to_cache(tmp_path / "hub", "org/base", {"main": source})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(source), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "org/base"}))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "adapter", quantization_config=token_recipe(), cache_dir=tmp_path / "hub"
    )
    assert model.hf_quantizer.report.layers
