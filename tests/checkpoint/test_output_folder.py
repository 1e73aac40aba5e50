"""A folder is replaced only if it holds a checkpoint and nothing else; some folders never are."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_awq_offload import ConfigError
from hf_awq_offload.checkpoint import output_folder as module
from hf_awq_offload.checkpoint.output_folder import foreign_entry, output_folder

CHECKPOINT = (
    *(
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "chat_template.jinja",
    ),
    *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model", "awq_losses.png"),
    *("modeling_own.py", "additional_chat_templates/tools.jinja", "preprocessor_config.json", "merges.txt"),
)


def folder_of(path: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    return path


def test_a_checkpoint_is_replaced_where_that_is_asked_for(tmp_path):
    out = folder_of(tmp_path / "out", CHECKPOINT)
    assert foreign_entry(out) is None
    assert output_folder(out, overwrite=True) == out
    with pytest.raises(ConfigError, match=r"exists and is not empty; nothing was changed.*pass overwrite=True"):
        output_folder(out, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_new_or_empty_folder_is_taken(overwrite, tmp_path):
    assert output_folder(tmp_path / "new" / "out", overwrite) == tmp_path / "new" / "out"
    (tmp_path / "empty").mkdir()
    assert output_folder(tmp_path / "empty", overwrite) == tmp_path / "empty"


@pytest.mark.parametrize(
    "name", ["notes.txt", ".git/HEAD", "config.yaml", "train.py", "run/model.safetensors", "data.json", ".hidden",
             "additional_chat_templates/notes.txt", "model.safetensors.bak", "adapter_config.json",
             "adapter_model.safetensors", "my-lora.safetensors"],
)  # fmt: skip
def test_a_file_that_is_no_part_of_a_checkpoint_protects_its_folder(name, tmp_path):
    out = folder_of(tmp_path / "out", (*CHECKPOINT, name))
    top = name.partition("/")[0]
    with pytest.raises(ConfigError, match=rf"{top}.* is not part of a checkpoint, and would be deleted"):
        output_folder(out, overwrite=True)
    assert (out / name).read_text() == name


def test_weights_without_a_config_are_no_checkpoint(tmp_path):
    out = folder_of(tmp_path / "out", ("model.safetensors",))
    with pytest.raises(ConfigError, match=r"model\.safetensors is not part of a checkpoint"):
        output_folder(out, overwrite=True)


def test_a_folder_with_the_name_of_a_file_is_no_checkpoint(tmp_path):
    out = folder_of(tmp_path / "out", ("config.json", "model.safetensors/precious"))
    assert foreign_entry(out) == out / "model.safetensors"


def test_links_are_resolved_first(tmp_path):
    precious = folder_of(tmp_path / "precious", ("notes.txt",))
    (tmp_path / "link").symlink_to(precious)
    with pytest.raises(ConfigError, match=r"notes\.txt is not part"):
        output_folder(tmp_path / "link", overwrite=True)
    source = folder_of(tmp_path / "source", CHECKPOINT)
    (tmp_path / "other").symlink_to(source)
    with pytest.raises(ConfigError, match="is the source"):
        output_folder(tmp_path / "other", overwrite=True, kept={"the source": source})


def test_homes_and_mount_points_are_never_replaced(tmp_path, monkeypatch):
    home = folder_of(tmp_path / "homes" / "me", CHECKPOINT)
    monkeypatch.setenv("HOME", str(home))
    for path, message in ((home, "is your home folder"), (home.parent, "holds your home folder"), ("/", "mount point")):
        with pytest.raises(ConfigError, match=message):
            output_folder(path, overwrite=True)
    monkeypatch.setattr(module.os.path, "ismount", lambda path: path == tmp_path / "disk")
    with pytest.raises(ConfigError, match="is a mount point"):
        output_folder(tmp_path / "disk", overwrite=True)


def test_the_working_directory_is_never_replaced(tmp_path, monkeypatch):
    work = folder_of(tmp_path / "work", CHECKPOINT)
    monkeypatch.chdir(work)
    for path in (".", work, work / "..", ""):
        with pytest.raises(ConfigError, match=r"working directory|out_dir is empty"):
            output_folder(path, overwrite=True)


@pytest.mark.parametrize(
    "weights",
    ["model-00001-of-00002.safetensors", "model.fp16.safetensors", "consolidated.safetensors",
     "awq_model_w4_g128.safetensors", "gptq_model-4bit-128g.safetensors", "pytorch_model.bin"],
)  # fmt: skip
def test_weights_under_the_names_that_tools_give_them_are_of_a_checkpoint(weights, tmp_path):
    out = folder_of(tmp_path / "out", ("config.json", weights))
    assert output_folder(out, overwrite=True) == out


def test_weights_that_the_index_names_are_of_the_checkpoint(tmp_path):
    out = folder_of(tmp_path / "out", (*CHECKPOINT, "text.safetensors", "other.safetensors"))
    (out / "model.safetensors.index.json").write_text('{"weight_map": {"a.weight": "text.safetensors"}}')
    with pytest.raises(ConfigError, match=r"other\.safetensors is not part of a checkpoint"):
        output_folder(out, overwrite=True)
    (out / "other.safetensors").unlink()
    assert output_folder(out, overwrite=True) == out


def test_an_index_that_no_parser_takes_names_nothing(tmp_path):
    out = folder_of(tmp_path / "out", (*CHECKPOINT, "text.safetensors"))
    (out / "model.safetensors.index.json").write_text('{"a":' * 50_000)
    with pytest.raises(ConfigError, match=r"text\.safetensors is not part of a checkpoint"):
        output_folder(out, overwrite=True)
