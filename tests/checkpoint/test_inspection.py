"""What a checkpoint holds is told from its files; every kind of damage is found, and sound checkpoints have none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import save_model, tiny_llama, tiny_mixtral, token_recipe
from safetensors.torch import load_file, save_file

from hf_awq_offload import CheckpointError, quantize
from hf_awq_offload.checkpoint.inspection import inspect_checkpoint
from hf_awq_offload.formats.awq import pack_columns, pack_weight, unpack_columns, unpack_weight
from hf_awq_offload.formats.grid import Grid, group_parameters, group_range
from hf_awq_offload.formats.grid import quantize as to_codes

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"
LINEAR = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """Sound checkpoints of a tiny Llama, by their formats; in shards."""
    root = tmp_path_factory.mktemp("made")
    source = save_model(tiny_llama(), root / "source")
    recipes = {
        "awq": token_recipe(),
        "packed": token_recipe(format="compressed-tensors"),
        "mixed": token_recipe(bits=3, overrides={"down_proj$": {"bits": 8, "zero_point": False}}),
    }
    for name, recipe in recipes.items():
        quantize(source, root / name, recipe, max_shard_size="40KB")
    return {"source": source} | {name: root / name for name in recipes}


@pytest.fixture
def changed(made, tmp_path):
    """Copies a checkpoint as one file, with its tensors changed."""

    def change(name: str, edit) -> Path:
        folder = tmp_path / "changed"
        folder.mkdir()
        tensors = {}
        for file in made[name].glob("*.safetensors"):
            tensors |= load_file(file)
        edit(tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
        shutil.copy(made[name] / "config.json", folder)
        return folder

    return change


def damages(folder: Path, **options) -> list[tuple[str, str]]:
    return [(f.where, f.what) for f in inspect_checkpoint(folder, **options).findings if f.is_damage]


@pytest.mark.parametrize("headers_only", [False, True])
@pytest.mark.parametrize("name", ["source", "awq", "packed", "mixed"])
def test_what_this_package_writes_is_sound(made, name, headers_only):
    found = inspect_checkpoint(made[name], headers_only)
    assert found.findings == []
    assert not found.is_damaged
    assert found.files == len(list(made[name].glob("*.safetensors")))
    assert set(found.layer_bytes) == {"outside", "model.layers.0", "model.layers.1"}
    assert sum(found.layer_bytes.values()) < found.size_bytes
    assert len(found.linears) == (0 if name == "source" else 14)


@pytest.mark.parametrize("folder", sorted(CHECKPOINTS.glob("*/")), ids=lambda folder: folder.name)
def test_what_other_tools_wrote_is_sound(folder):
    found = inspect_checkpoint(folder)
    assert not found.is_damaged
    assert found.format == folder.name.partition("-")[2].replace("-", "_")
    assert {(linear.bits, linear.group_size) for linear in found.linears} == {(4, 128)}
    assert sum(linear.groups for linear in found.linears) == 4608


def test_experts_are_linears_of_their_layer(tmp_path):
    source = save_model(tiny_mixtral(), tmp_path / "source")
    quantize(source, tmp_path / "out", token_recipe())
    found = inspect_checkpoint(tmp_path / "out")
    assert not found.is_damaged
    assert len(found.linears) == 2 * (4 + 3 * 3)


def test_facts_of_a_linear_are_those_of_its_tensors(made):
    awq, packed = (
        {linear.name: linear for linear in inspect_checkpoint(made[name]).linears} for name in ("awq", "packed")
    )
    assert awq == packed
    facts = awq[LINEAR]
    assert (facts.in_features, facts.out_features, facts.groups, facts.zero_point) == (64, 96, 192, True)
    tensors = {}
    for file in made["awq"].glob("*.safetensors"):
        tensors |= load_file(file)
    from hf_awq_offload.formats.awq import PackedWeight

    stored = PackedWeight(*(tensors[f"{LINEAR}.{name}"] for name in PackedWeight._fields))
    assert facts.largest_weight == pytest.approx(float(unpack_weight(stored, torch.float32).abs().max()))


def test_bits_of_a_mixed_checkpoint_are_told_per_linear(made):
    found = {linear.name: linear for linear in inspect_checkpoint(made["mixed"]).linears}
    assert (found[LINEAR].bits, found[LINEAR].zero_point) == (3, True)
    down = found[LINEAR.replace("up", "down")]
    assert (down.bits, down.zero_point) == (8, False)


@pytest.mark.parametrize(("name", "scales"), [("awq", "scales"), ("packed", "weight_scale")])
@pytest.mark.parametrize(
    ("value", "what"),
    [
        (float("nan"), "1 of 192 scales are not finite"),
        (float("inf"), "1 of 192 scales are not finite"),
        (0.0, "1 of 192 groups have a scale of zero: their weights are lost"),
    ],
)
def test_a_broken_scale_is_damage(changed, name, scales, value, what):
    folder = changed(name, lambda tensors: tensors[f"{LINEAR}.{scales}"].view(-1)[7:8].fill_(value))
    assert damages(folder) == [(LINEAR, what)]
    assert damages(folder, headers_only=True) == []


def test_a_scale_of_zero_where_all_weights_are_zero_is_no_damage(changed):
    def edit(tensors):
        codes, zeros = (unpack_columns(tensors[f"{LINEAR}.{name}"]) for name in ("qweight", "qzeros"))
        codes[:32, 5] = zeros[0, 5]
        tensors[f"{LINEAR}.qweight"] = pack_columns(codes)
        tensors[f"{LINEAR}.scales"][0, 5] = 0

    found = inspect_checkpoint(changed("awq", edit))
    assert not found.is_damaged
    assert sum(linear.zero_scales for linear in found.linears) == 1


def test_saturated_groups_and_overflow_are_warnings(changed):
    def edit(tensors):
        weight = torch.where(torch.rand(96, 64) < 0.9, torch.randn(96, 64).sign(), 0.5)
        grid = Grid(4, 32, True)
        parameters = group_parameters(group_range(weight, grid), grid)
        packed = pack_weight(to_codes(weight, parameters, grid), parameters)
        packed = packed._replace(scales=torch.full_like(packed.scales, 60000.0))
        tensors |= {f"{LINEAR}.{name}": value for name, value in packed._asdict().items()}
        tensors["model.norm.weight"] = torch.full((64,), 7e4)

    found = inspect_checkpoint(changed("awq", edit))
    assert not found.is_damaged
    said = {finding.where: finding.what for finding in found.findings}
    assert "overflow in fp16" in said[LINEAR]
    assert said["model.norm.weight"] == "numbers up to 7e+04 overflow in fp16"
    (facts,) = (linear for linear in found.linears if linear.name == LINEAR)
    assert facts.saturated_groups > 150
    assert any("of their integers at the ends of the grid" in finding.what for finding in found.findings)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_dense_tensors_must_be_finite(changed, value):
    folder = changed("awq", lambda tensors: tensors["model.norm.weight"][3:5].fill_(value))
    assert damages(folder) == [("model.norm.weight", "2 of 64 numbers are not finite")]


def remove(name):
    return lambda tensors: tensors.pop(name)


def cut(name):
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


@pytest.mark.parametrize(
    ("name", "edit", "what"),
    [
        ("awq", remove(f"{LINEAR}.scales"), "scales is missing"),
        ("awq", remove(f"{LINEAR}.qzeros"), "qzeros is missing"),
        ("awq", cut(f"{LINEAR}.qzeros"), "qzeros is int32 (1, 12); expected int32 (2, 12)"),
        ("awq", cut(f"{LINEAR}.qweight"), "63 input channels are not a multiple of the group size 32"),
        ("packed", remove(f"{LINEAR}.weight_scale"), "weight_scale is missing"),
        ("packed", remove(f"{LINEAR}.weight_shape"), "weight_shape is missing"),
        ("packed", cut(f"{LINEAR}.weight_packed"), "weight_packed is int32 (95, 8); expected"),
    ],
)
def test_tensors_that_contradict_each_other_are_damage(changed, name, edit, what):
    ((where, said),) = damages(changed(name, edit), headers_only=True)
    assert where == LINEAR
    assert what in said


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(made, tmp_path) -> Path:
    shutil.copytree(made["awq"], tmp_path / "sharded")
    return tmp_path / "sharded"


def test_a_file_that_is_cut_off_is_damage(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    wheres = dict(damages(sharded))
    assert "is not a complete safetensors file" in wheres[file.name]
    assert f"{file.name} lacks" in wheres["index"]


def test_a_missing_file_is_damage(sharded):
    file = sorted(sharded.glob("*.safetensors"))[-1]
    file.unlink()
    assert any(where == "index" and f"{file.name}, which" in what for where, what in damages(sharded))


def test_a_missing_index_is_damage(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    ((where, what),) = damages(sharded)
    assert (where, what) == ("index", f"there are {len(list(sharded.glob('*.safetensors')))} safetensors files and no "
                             "model.safetensors.index.json")  # fmt: skip


def test_an_index_that_is_no_json_is_damage(sharded):
    (sharded / "model.safetensors.index.json").write_text("{")
    assert any("can't be read" in what for _, what in damages(sharded))


def test_a_tensor_in_two_files_is_damage(sharded):
    files = sorted(sharded.glob("*.safetensors"))
    both = load_file(files[0]) | {"model.norm.weight": torch.ones(64)}
    if "model.norm.weight" in load_file(files[0]):
        files.reverse()
        both = load_file(files[0]) | {"model.norm.weight": torch.ones(64)}
    save_file(both, files[0])
    said = [what for _, what in damages(sharded)]
    assert any("1 tensors are in another file too, such as model.norm.weight" in what for what in said)
    assert any("does not place there" in what for what in said)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"bits": 3}, "bits"),
        ({"version": "exotic"}, "exotic"),
        ({"group_size": 0}, "group_size"),
        ({"quant_method": None}, "has no quant_method"),
    ],
)
def test_a_config_that_says_nonsense_is_damage(sharded, fields, what):
    config = json.loads((sharded / "config.json").read_text())
    config["quantization_config"] |= fields
    config["quantization_config"] = {k: v for k, v in config["quantization_config"].items() if v is not None}
    (sharded / "config.json").write_text(json.dumps(config))
    assert what in dict(damages(sharded))["config.json"]


def test_a_config_of_another_group_size_is_damage(sharded):
    config = json.loads((sharded / "config.json").read_text())
    config["quantization_config"]["group_size"] = 64
    (sharded / "config.json").write_text(json.dumps(config))
    assert len(damages(sharded, headers_only=True)) == 14


def test_a_config_that_says_quantized_where_nothing_is(made, tmp_path):
    shutil.copytree(made["source"], tmp_path / "liar")
    config = json.loads((tmp_path / "liar" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    (tmp_path / "liar" / "config.json").write_text(json.dumps(config))
    assert damages(tmp_path / "liar") == [("config.json", "it says gemm, and no linear is packed")]


def test_other_quantizations_are_told_by_name(made, tmp_path):
    shutil.copytree(made["source"], tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    found = inspect_checkpoint(tmp_path / "other")
    assert (found.format, found.findings) == ("bitsandbytes", [])


def test_no_checkpoint_is_an_error(tmp_path, made):
    with pytest.raises(CheckpointError, match=r"config\.json can't be read"):
        inspect_checkpoint(tmp_path)
    shutil.copy(made["awq"] / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="has no safetensors files"):
        inspect_checkpoint(tmp_path)
