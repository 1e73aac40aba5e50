"""Whichever way a model takes from one folder to another, the same files come along."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import FAST
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load_file, save_file
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_awq_offload import AwqOffloadConfig, quantize
from hf_awq_offload.checkpoint.conversion import convert_checkpoint
from hf_awq_offload.cli.main import main
from hf_awq_offload.integrations import companions as module
from hf_awq_offload.integrations.companions import bring_companions
from hf_awq_offload.integrations.origin import Origin

ROWS = [torch.randint(0, 300, (32,), generator=torch.Generator().manual_seed(index)).tolist() for index in range(4)]
COMPANIONS = {
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"),
    *("2_Dense/config.json", "2_Dense/model.safetensors", "LICENSE", "USE_POLICY.md", "own/deeper/code.py"),
    *("own.unheard_of", "generation_config.json", "config.json"),
}
LEFT_BEHIND = {
    *("README.md", "logo.png", "pytorch_model.bin", "onnx/model.onnx", "onnx/tokenizer.json", "optimizer.pt"),
    *(".gitattributes", "checkpoint-5/model.safetensors", "checkpoint-5/tokenizer.json", "adapter_config.json.bak"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """An embedding model with everything that a repository may hold beside weights."""
    folder = tmp_path_factory.mktemp("embedding")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        dtype="bfloat16",
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    for name in sorted(COMPANIONS | LEFT_BEHIND):
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{name} as it was")
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    save_file({"linear.weight": torch.randn(8, 64)}, folder / "2_Dense" / "model.safetensors")
    generation = {"do_sample": True, "temperature": 0.6, "eos_token_id": [1, 2], "own_setting": {"a": [1, 2]}}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def recipe(**fields: Any) -> AwqOffloadConfig:
    return AwqOffloadConfig(dataset=ROWS, n_samples=4, max_seq_len=32, n_grid=2, clip=False, group_size=32, **fields)


def by_quantize(source: Path, out: Path) -> None:
    quantize(source, out, recipe())
    quantize(source, out, recipe(), overwrite=True)  # whatever came along may be replaced


def by_from_pretrained(source: Path, out: Path) -> None:
    AutoModelForCausalLM.from_pretrained(source, quantization_config=recipe()).save_pretrained(out)


def by_command_line(source: Path, out: Path) -> None:
    assert main(["quantize", str(source), str(out), "--group-size", "32", *FAST]) == 0


def saved_again(source: Path, out: Path) -> None:
    by_from_pretrained(source, out.parent / "first")
    AutoModelForCausalLM.from_pretrained(out.parent / "first").save_pretrained(out)


def converted(source: Path, out: Path) -> None:
    by_from_pretrained(source, out.parent / "first")
    convert_checkpoint(out.parent / "first", out, "compressed-tensors", scale_dtype=torch.float16)
    convert_checkpoint(out.parent / "first", out, "gemv", overwrite=True)


@pytest.mark.parametrize("way", [by_quantize, by_from_pretrained, by_command_line, saved_again, converted])
def test_every_way_brings_the_same_files(way, source, tmp_path):
    out = tmp_path / "out"
    way(source, out)
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert there == COMPANIONS | {"README.md", "awq_losses.png", "model.safetensors"}
    for name in COMPANIONS - {"config.json", "generation_config.json"}:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert "embedding model" not in (out / "README.md").read_text()
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation.items() >= json.loads((source / "generation_config.json").read_text()).items()
    dense = load_file(out / "2_Dense" / "model.safetensors")
    assert torch.equal(dense["linear.weight"], load_file(source / "2_Dense" / "model.safetensors")["linear.weight"])


def test_folders_in_folders_are_pushed_in_one_commit(source, tmp_path, monkeypatch):
    commits = []

    def create_commit(self: HfApi, **fields: Any) -> str:
        commits.append(fields)
        return "done"

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=recipe())
    out = tmp_path / "out"
    model.save_pretrained(out)
    before = {"old.txt": 1e12}
    (out / "old.txt").write_text("unchanged")
    assert model._upload_modified_files(out, "me/model", before, token="hf_x", commit_message="Mine") == "done"
    (commit,) = commits
    assert commit["repo_id"] == "me/model"
    assert commit["commit_message"] == "Mine"
    assert all(isinstance(operation, CommitOperationAdd) for operation in commit["operations"])
    pushed = {operation.path_in_repo for operation in commit["operations"]}
    assert pushed == COMPANIONS | {"README.md", "awq_losses.png", "model.safetensors"}


def test_a_broken_file_is_copied_as_it_is(source, tmp_path):
    (tmp_path / "source").mkdir()
    for name, text in {"tokenizer_config.json": "{", "preprocessor_config.json": "[1]", "modules.json": "null"}.items():
        (tmp_path / "source" / name).write_text(text)
    (tmp_path / "out").mkdir()
    bring_companions(Origin(str(tmp_path / "source")), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{"
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == "[1]"


def test_a_download_that_fails_loses_no_model_and_is_told(tmp_path, monkeypatch):
    told: list[str] = []
    files = [SimpleNamespace(path=name, size=9) for name in ("tokenizer.json", "modules.json", "LICENSE")]
    monkeypatch.setattr(HfApi, "list_repo_tree", lambda self, *args, **kwargs: files)
    monkeypatch.setattr(module.logger, "warning", told.append)

    def fail(*args: Any, **kwargs: Any) -> str:
        raise OSError("the line is dead")

    monkeypatch.setattr(module, "snapshot_download", fail)
    bring_companions(Origin("nobody/nothing", {"cache_dir": tmp_path / "cache"}), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "LICENSE, modules.json, tokenizer.json" in told[-1]


def test_the_hub_is_asked_for_what_comes_along_at_the_commit_and_with_the_token(source, tmp_path, monkeypatch):
    asked: list[dict[str, Any]] = []
    paths = [path for path in source.rglob("*") if path.is_file()]
    files = [SimpleNamespace(path=str(path.relative_to(source)), size=path.stat().st_size) for path in paths]

    def list_repo_tree(self: HfApi, repository: str, **kwargs: Any) -> list[SimpleNamespace]:
        asked.append(kwargs | {"token": self.token})
        return files

    monkeypatch.setattr(HfApi, "list_repo_tree", list_repo_tree)

    def download(repository: str, **kwargs: Any) -> str:
        asked.append(kwargs)
        return str(source)

    monkeypatch.setattr(module, "snapshot_download", download)
    arguments = {"revision": "v2", "token": "hf_secret", "cache_dir": tmp_path / "cache"}
    bring_companions(Origin("me/private", arguments, "0" * 40), tmp_path / "out")
    copied = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "out").as_posix() for path in copied} == COMPANIONS
    assert all(call["revision"] == "0" * 40 and call["token"] == "hf_secret" for call in asked)
    assert all(call["cache_dir"] == tmp_path / "cache" for call in asked[1:])
    assert {pattern for call in asked[1:] for pattern in call["allow_patterns"]} == COMPANIONS
