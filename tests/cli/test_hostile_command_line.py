"""Recipe files and options that nobody writes in good faith end soon, in one line that no terminal obeys."""

from __future__ import annotations

import json
import time

import pytest
import torch
from safetensors.torch import save_file

from hf_awq_offload.checkpoint import safetensors as reader
from hf_awq_offload.cli.main import main
from hf_awq_offload.cli.outcome import UsageError
from hf_awq_offload.cli.recipe_file import MAX_BYTES, read_recipe_file

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {
    "aliases that unfold to a billion": (LAUGHS, "unfolds to more than"),
    "an alias of itself": ("overrides: &a {x: *a}\n", "unfolds to more than"),
    "deep brackets": ("overrides: " + "[" * 20_000, "is not valid YAML"),
    "a key twice": ("bits: 4\nbits: 8\n", "a key twice"),
    "a day that no month has": ("seed: 2001-99-99\n", "is not valid YAML: month must be"),
    "a number without digits": ("bits: !!int ''\n", "is not valid YAML"),
    "a flag that is none": ("clip: !!bool maybe\n", "is not valid YAML"),
    "a time that is none": ("seed: !!timestamp x\n", "is not valid YAML"),
    "a Python object": ("bits: !!python/object/apply:os.system ['touch canary']\n", "is not valid YAML"),
    "a Python name": ("bits: !!python/name:os.system\n", "is not valid YAML"),
    "too much": ("#" * (MAX_BYTES + 1), "longer than"),
    "no text": ("bits: \x00\n", "is not valid YAML"),
    "a key of many letters": ("? " + "b" * 100_000 + "\n: 4\n", "not a field"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_recipe_file_is_refused_soon(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, why = FILES[what]
    (tmp_path / "recipe.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(UsageError, match=why) as caught:
        read_recipe_file("recipe.yaml")
    assert time.process_time() - start < 10
    assert len(str(caught.value)) < 2000
    assert not (tmp_path / "canary").exists()


def test_anchors_and_merges_are_read(tmp_path):
    (tmp_path / "recipe.yaml").write_text("overrides:\n  a: &x {bits: 8}\n  b: *x\n  c: {<<: *x, bits: 3}\n")
    assert read_recipe_file(str(tmp_path / "recipe.yaml")) == {
        "overrides": {"a": {"bits": 8}, "b": {"bits": 8}, "c": {"bits": 3}}
    }


@pytest.mark.parametrize("value", ['{"a":' * 20_000, '{"a": {"bits": 8}, "a": {"bits": 3}}'], ids=["deep", "twice"])
def test_an_option_in_json_is_refused(value, capsys):
    assert main(["quantize", "a/b", "out", "--overrides", value]) == 2
    assert "is refused: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"], ids=["long", "zero"])
@pytest.mark.parametrize(
    "command", [["inspect"], ["quantize"], ["convert", "--to", "gemm"]], ids=lambda words: words[0]
)
def test_a_name_that_no_file_can_have_is_refused(command, name, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    outs = [] if command == ["inspect"] else [str(tmp_path / "out")]
    assert main([*command, name, *outs]) == 1
    if outs:
        assert main([*command, str(tmp_path), name]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_what_a_checkpoint_says_is_printed_so_that_no_terminal_obeys(as_json, tmp_path, capsys, monkeypatch):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "\x1b]0;owned\x07\ud800"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path), *as_json]) in (0, 3)
    printed = capsys.readouterr()
    assert "owned" in printed.out
    assert not set(printed.out + printed.err) & {"\x1b", "\x07", "\ud800"}
    assert reader.MAX_NAME_CHARACTERS < 2000
