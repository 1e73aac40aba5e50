"""Checkpoints from one format into another and back, to the byte; what can't be exact is refused and leaves nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from models import save_model, tiny_llama, tiny_mixtral, tiny_qwen2, token_batch, token_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_awq_offload import CheckpointError, ConfigError, quantize
from hf_awq_offload.checkpoint.conversion import convert_checkpoint
from hf_awq_offload.formats.awq import pack_weight
from hf_awq_offload.formats.awq_variants import to_gemm, to_gemv
from hf_awq_offload.formats.grid import Grid, group_parameters, group_range
from hf_awq_offload.formats.grid import quantize as to_codes

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"
MODELS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "mixtral": tiny_mixtral}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[tuple[str, str, bool], Path]:
    """(model, format, zero points) -> a checkpoint that was quantized to it, in shards, with a file of the user's."""
    root = tmp_path_factory.mktemp("made")
    folders = {}
    for model, build in MODELS.items():
        source = save_model(build(), root / model)
        for format in ("awq", "compressed-tensors"):
            for zero_point in (True, False) if model == "llama" else (True,):
                folder = root / f"{model}-{format}-{zero_point}"
                recipe = token_recipe(format=format, zero_point=zero_point)
                quantize(source, folder, recipe, max_shard_size="60KB")
                (folder / "notes").mkdir()
                (folder / "notes" / "mine.txt").write_text("mine")
                folders[model, format, zero_point] = folder
    return folders


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(one: Path, other: Path) -> None:
    a, b = tensors_of(one), tensors_of(other)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


CASES = [("llama", True), ("llama", False), ("qwen2", True), ("mixtral", True)]


@pytest.mark.parametrize(("model", "zero_point"), CASES)
@pytest.mark.parametrize(("origin", "to"), [("awq", "compressed-tensors"), ("compressed-tensors", "gemm")])
def test_converted_is_what_quantizing_into_that_format_gives(made, tmp_path, model, zero_point, origin, to):
    direct = made[model, "awq" if to == "gemm" else to, zero_point]
    done = convert_checkpoint(made[model, origin, zero_point], tmp_path / "out", to)
    assert done.format == to
    assert_same_tensors(tmp_path / "out", direct)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (direct / "config.json").read_text()
    )


@pytest.mark.parametrize(("model", "zero_point"), CASES)
@pytest.mark.parametrize("through", ["gemv", "compressed-tensors"])
def test_there_and_back_is_the_same_folder_byte_by_byte(made, tmp_path, model, zero_point, through):
    origin = made[model, "awq", zero_point]
    convert_checkpoint(origin, tmp_path / "there", through, scale_dtype=torch.float16)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", "gemm")
    assert contents(tmp_path / "back") == contents(origin)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "there"]


def test_by_way_of_all_formats(made, tmp_path):
    origin = made["llama", "compressed-tensors", True]
    convert_checkpoint(origin, tmp_path / "1", "gemv")
    convert_checkpoint(tmp_path / "1", tmp_path / "2", "compressed-tensors")
    assert_same_tensors(tmp_path / "2", origin)


@pytest.mark.parametrize(
    ("origin", "to"), [("gemm", "gemv"), ("gemv", "gemm"), ("gemv-fast", "gemm"), ("gemv-fast", "gemv")]
)
def test_converted_is_what_autoawq_writes(tmp_path, origin, to):
    convert_checkpoint(CHECKPOINTS / f"autoawq-{origin}", tmp_path / "out", to)
    assert_same_tensors(tmp_path / "out", CHECKPOINTS / f"autoawq-{to}")
    theirs = json.loads((CHECKPOINTS / f"autoawq-{to}" / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == theirs


def test_other_tools_words_in_the_config_stay(tmp_path):
    convert_checkpoint(CHECKPOINTS / "gptqmodel-gemm", tmp_path / "out", "gemv")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (fields["version"], fields["format"], fields["checkpoint_format"]) == ("gemv", "gemv", "gemv")
    assert fields["meta"]["quantizer"] == ["gptqmodel:7.7.0"]


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("in_features", [256, 1280])
def test_gemv_is_undone_by_its_own_reader(group_size, in_features):
    weight = torch.randn(16, in_features)
    grid = Grid(4, group_size, True)
    parameters = group_parameters(group_range(weight, grid), grid)
    packed = pack_weight(to_codes(weight, parameters, grid), parameters)
    gemv = to_gemv(packed)
    n = in_features // group_size
    assert gemv.scales.shape[1] == 8 * gemv.qzeros.shape[1] >= n
    for one, other in zip(to_gemm("gemv", gemv, n), packed, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("to", ["gemv", "compressed-tensors"])
def test_the_converted_model_computes_the_same(made, tmp_path, to, monkeypatch):
    monkeypatch.setenv("HF_AWQ_OFFLOAD_BACKEND", "torch")  # a kernel of one format would round in another way
    origin = made["llama", "awq", True]
    convert_checkpoint(origin, tmp_path / "out", to)
    ids = token_batch(2, 12)
    one, other = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (origin, tmp_path / "out"))
    assert torch.allclose(one, other, rtol=0, atol=1e-5)


def test_bf16_scales_that_fp16_has_are_exact(tmp_path):
    source = save_model(tiny_llama().to(torch.bfloat16), tmp_path / "source")
    quantize(source, tmp_path / "packed", token_recipe(format="compressed-tensors"))
    convert_checkpoint(tmp_path / "packed", tmp_path / "awq", "gemm")
    convert_checkpoint(tmp_path / "awq", tmp_path / "back", "compressed-tensors")
    assert contents(tmp_path / "back") == contents(tmp_path / "packed")


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, source: Path, to: str, match: str, error=CheckpointError, **options) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=match):
        convert_checkpoint(source, tmp_path / "refused", to, **options)
    assert sorted(tmp_path.iterdir()) == before


def test_scales_that_lose_bits_are_refused_and_leave_nothing(made, tmp_path):
    source = made["llama", "awq", True]
    match = r"model\.layers\.\d.*scales are not exact in bfloat16.*--scale-dtype float16"
    refused(tmp_path, source, "compressed-tensors", match, scale_dtype=torch.bfloat16)


def test_other_bits_and_mixtures_are_refused(tmp_path):
    source = save_model(tiny_llama(), tmp_path / "source")
    quantize(source, tmp_path / "three", token_recipe(bits=3))
    quantize(source, tmp_path / "mixed", token_recipe(overrides={"up_proj$": {"group_size": 64}}))
    refused(tmp_path, tmp_path / "three", "gemm", "has 1 grids, with 3 bits; AWQ checkpoints hold one grid of 4 bits")
    refused(tmp_path, tmp_path / "mixed", "gemv", "has 2 grids, with 4 bits")


def test_shapes_that_awq_can_not_hold_are_refused(tmp_path):
    source = save_model(tiny_llama(intermediate_size=100, num_hidden_layers=1), tmp_path / "source")
    quantize(source, tmp_path / "packed", token_recipe(format="compressed-tensors"))
    refused(tmp_path, tmp_path / "packed", "gemm", "has 100 output channels; the AWQ layouts hold multiples of 8")


@pytest.mark.parametrize("to", ["gemv_fast", "llm-awq", "GEMM", ""])
def test_formats_that_are_only_read_are_refused(to, tmp_path):
    with pytest.raises(ConfigError, match=f"to is '{to}'; pass one of 'gemm', 'gemv', 'compressed-tensors'"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


def test_the_format_that_it_has_is_refused(made, tmp_path):
    refused(tmp_path, made["llama", "awq", True], "gemm", "is in the format gemm already")


def test_full_precision_is_refused(tmp_path):
    source = save_model(tiny_llama(), tmp_path / "source")
    refused(tmp_path, source, "gemm", "not quantized, or has no packed linears")


def test_damage_is_refused(made, tmp_path):
    shutil.copytree(made["llama", "awq", True], tmp_path / "damaged")
    file = next((tmp_path / "damaged").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("qweight"))
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, file)
    refused(tmp_path, tmp_path / "damaged", "gemv", "is damaged")


def test_an_output_that_exists_stays_unless_it_is_to_be_replaced(made, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    source = made["llama", "awq", True]
    with pytest.raises(ConfigError, match="exists and is not empty"):
        convert_checkpoint(source, tmp_path / "out", "gemv")
    assert contents(tmp_path / "out").keys() == {"thesis.txt"}
    with pytest.raises(ConfigError, match=r"thesis\.txt is not part of a checkpoint"):
        convert_checkpoint(source, tmp_path / "out", "gemv", overwrite=True)
    assert contents(tmp_path / "out").keys() == {"thesis.txt"}
    (tmp_path / "out" / "thesis.txt").rename(tmp_path / "out" / "config.json")
    convert_checkpoint(source, tmp_path / "out", "gemv", overwrite=True)
    assert (tmp_path / "out" / "config.json").read_text() != "mine"
    assert list((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_transformers_classes_names_come_from_the_files(made, tmp_path, caplog):
    shutil.copytree(made["llama", "awq", True], tmp_path / "unknown")
    config = json.loads((tmp_path / "unknown" / "config.json").read_text())
    (tmp_path / "unknown" / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysModel"]}))
    convert_checkpoint(tmp_path / "unknown", tmp_path / "out", "compressed-tensors", scale_dtype=torch.float16)
    assert "the names in the files tell which linears are in full precision" in caplog.text
    fields = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert fields["ignore"] == ["lm_head"]
