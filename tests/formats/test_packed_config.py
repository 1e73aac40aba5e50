"""The quantization_config of compressed-tensors checkpoints: as the library reads it, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
from compressed_tensors.quantization import QuantizationConfig
from torch import nn

from hf_awq_offload.errors import CheckpointError
from hf_awq_offload.formats.compressed_tensors_config import PackedCheckpointConfig
from hf_awq_offload.formats.grid_choice import GridChoice

FOUR, EIGHT, ROWS = GridChoice(4, 32, True), GridChoice(8, 128, False), GridChoice(3, -1, False)
MIXED = {"Linear": FOUR, r"re:.*down_proj$": EIGHT, "model.head": ROWS, "model.tail": ROWS}


def written(config: PackedCheckpointConfig) -> dict:
    return json.loads(json.dumps(config.to_dict()))


def uniform(weights: dict | None = None, group: dict | None = None, **changes) -> dict:
    """The config of a checkpoint on one grid, with some fields changed."""
    fields = written(PackedCheckpointConfig(grids={"Linear": FOUR}))
    fields["config_groups"]["group_0"]["weights"] |= weights or {}
    fields["config_groups"]["group_0"] |= group or {}
    return fields | changes


def without(fields: dict, *keys: str) -> dict:
    weights = fields["config_groups"]["group_0"]["weights"]
    for key in keys:
        del weights[key]
    return fields


def test_the_library_reads_every_grid_under_its_targets():
    config = QuantizationConfig.model_validate(written(PackedCheckpointConfig(grids=MIXED, ignore=["lm_head"])))
    found = {
        target: GridChoice(group.weights.num_bits, group.weights.group_size or -1, not group.weights.symmetric)
        for group in config.config_groups.values()
        for target in group.targets
    }
    assert found == MIXED
    assert len(config.config_groups) == 3
    assert {group.format for group in config.config_groups.values()} == {"pack-quantized"}
    assert {str(group.weights.strategy) for group in config.config_groups.values()} == {"group", "channel"}
    assert {str(group.weights.type) for group in config.config_groups.values()} == {"int"}
    assert config.ignore == ["lm_head"]
    assert config.format == "pack-quantized"
    assert config.quantization_status.value == "compressed"


def test_what_is_written_is_read_back_and_is_a_copy():
    config = PackedCheckpointConfig(grids=MIXED, ignore=["lm_head"])
    fields = config.to_dict()
    again = PackedCheckpointConfig.from_dict(json.loads(json.dumps(fields)))
    assert (again.grids, again.ignore) == (MIXED, ["lm_head"])
    fields["ignore"].append("x")
    assert config.ignore == ["lm_head"]
    again, rest = PackedCheckpointConfig.from_dict(fields, return_unused_kwargs=True, other=1)
    assert (again.ignore, rest) == (["lm_head", "x"], {"other": 1})


@pytest.mark.parametrize(
    ("fields", "grid"),
    [
        (uniform(), FOUR),
        (without(uniform(), "symmetric"), GridChoice(4, 32, False)),  # symmetric is the standard's default
        (without(uniform(), "strategy"), FOUR),
        (without(uniform({"group_size": -1}), "strategy"), GridChoice(4, -1, True)),
        (uniform({"strategy": "channel"}), GridChoice(4, -1, True)),
        (uniform({"type": None}), FOUR),
        (uniform({"actorder": "static", "dynamic": None}), FOUR),
        (uniform(group={"format": None}), FOUR),
        *((uniform({"num_bits": bits}), GridChoice(bits, 32, True)) for bits in (2, 3, 8)),
        (uniform({"group_size": 1}), GridChoice(4, 1, True)),
    ],
)
def test_grids_as_other_tools_write_them(fields, grid):
    assert PackedCheckpointConfig.from_dict(fields).grids == {"Linear": grid}
    assert PackedCheckpointConfig.from_dict(fields | {"ignore": None}).ignore == []


@pytest.mark.parametrize(
    ("fields", "found", "expected"),
    [
        (uniform(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is {'num_bits': 8}", "none"),
        (uniform(sparsity_config={"format": "x"}), "sparsity_config is {'format': 'x'}", "none"),
        (uniform(transform_config={"a": 1}), "transform_config is {'a': 1}", "none"),
        (uniform(quantization_status="frozen"), "quantization_status is 'frozen'", "'compressed'"),
        (uniform(config_groups={}), "config_groups names no target", "at least one"),
        (uniform(config_groups=None), "config_groups names no target", "at least one"),
        (
            uniform(config_groups={"W4A16": ["Linear"]}),
            "config_groups['W4A16'] is ['Linear']",
            "a dict with targets and weights",
        ),
        (uniform({"num_bits": 16}), "the weights of group_0 are 16 bits of type 'int'", "2 to 8 bits of type 'int'"),
        (uniform({"num_bits": 1}), "the weights of group_0 are 1 bits of type 'int'", "2 to 8 bits of type 'int'"),
        (uniform({"num_bits": 9}), "the weights of group_0 are 9 bits of type 'int'", "2 to 8 bits of type 'int'"),
        (uniform({"num_bits": "4"}), "the weights of group_0 are '4' bits of type 'int'", "2 to 8 bits of type 'int'"),
        (uniform({"type": "float"}), "the weights of group_0 are 4 bits of type 'float'", "2 to 8 bits of type 'int'"),
        (
            uniform({"strategy": "tensor"}),
            "group_0 has the strategy 'tensor' and group_size 32",
            "'group' or 'channel'",
        ),
        (uniform({"group_size": 0}), "group_0 has the strategy 'group' and group_size 0", "'group' or 'channel'"),
        (uniform({"group_size": None}), "group_0 has the strategy 'group' and group_size None", "'group' or 'channel'"),
        (
            uniform({"actorder": "group"}),
            "the weights of group_0 are dynamic or in an order of their own",
            "static, in order",
        ),
        (
            uniform({"dynamic": True}),
            "the weights of group_0 are dynamic or in an order of their own",
            "static, in order",
        ),
        (uniform(group={"format": "int-quantized"}), "the format of group_0 is 'int-quantized'", "'pack-quantized'"),
        (uniform(group={"format": None}, format="dense"), "the format of group_0 is 'dense'", "'pack-quantized'"),
        (
            uniform(group={"input_activations": {"num_bits": 8}}),
            "group_0 has input_activations",
            "quantized weights only",
        ),
        (
            uniform(group={"output_activations": {"num_bits": 8}}),
            "group_0 has output_activations",
            "quantized weights only",
        ),
        (
            uniform(group={"weights": None}),
            "the weights of group_0 are None",
            "a dict with num_bits, type and strategy",
        ),
    ],
)
def test_other_kinds_of_checkpoints_are_refused_with_a_remedy(fields, found, expected):
    words = (
        f"not one that this package loads: {found}; expected {expected}. Install compressed-tensors and leave loading"
    )
    with pytest.raises(CheckpointError, match=re.escape(words)):
        PackedCheckpointConfig.from_dict(fields)


def test_the_grid_of_a_module_is_that_of_its_name_before_its_pattern_before_its_class():
    grids = {"Linear": FOUR, r"re:.*\.up$": EIGHT, "a.up": ROWS}
    config = PackedCheckpointConfig(grids=grids, ignore=["head", r"re:.*gate$"])
    linear = nn.Linear(2, 2)
    assert config.choice_for(["a.up"], linear) == ROWS
    assert config.choice_for(["b.up"], linear) == EIGHT
    assert config.choice_for(["b.down"], linear) == FOUR
    assert config.choice_for(["b.down", "a.up"], linear) == ROWS  # either name
    assert config.choice_for(["b.down"], nn.LayerNorm(2)) is None
    for ignored in (["head"], ["a.gate"], ["other", "head"]):
        assert config.choice_for(ignored, linear) is None


def test_linears_that_become_dense_are_ignored_once():
    config = PackedCheckpointConfig(grids={"Linear": FOUR}, ignore=[r"re:.*gate$"])
    config.leave_out(["a.gate", "b.up"])
    config.leave_out(["b.up"])
    assert config.ignore == [r"re:.*gate$", "b.up"]


def test_zero_points_on_one_grid_make_a_checkpoint_asymmetric():
    assert PackedCheckpointConfig(grids={"Linear": EIGHT, "a": FOUR}).is_asymmetric
    assert not PackedCheckpointConfig(grids={"Linear": EIGHT, "a": ROWS}).is_asymmetric


def test_the_commonest_grid_is_the_default_and_fused_linears_are_named_as_servers_look_them_up():
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    grids = {f"model.layers.{i}.{name}": FOUR for i in range(2) for name in names}
    grids |= {f"model.layers.{i}.{name}": EIGHT for i in range(2) for name in names[:3]}
    grids |= {f"model.layers.{i}.{name}": FOUR for i in range(2) for name in ("fc1", "fc2")}
    config = PackedCheckpointConfig.of_linears(grids, ["lm_head"])
    assert config.grids == {
        "Linear": FOUR,
        **{rf"re:model\.layers\.\d+\.{name}$": EIGHT for name in ("k_proj", "q_proj", "qkv_proj", "v_proj")},
    }
    assert config.ignore == ["lm_head"]


def test_linears_that_servers_fuse_but_that_differ_have_no_common_name():
    grids = {"layers.0.gate_proj": FOUR, "layers.0.up_proj": EIGHT, "layers.0.down_proj": FOUR}
    config = PackedCheckpointConfig.of_linears(grids, [])
    assert config.grids == {"Linear": FOUR, r"re:layers\.\d+\.up_proj$": EIGHT}


def test_what_the_user_left_out_is_kept_unless_it_names_a_quantized_linear():
    grids = {"layers.0.up_proj": FOUR, "layers.0.down_proj": FOUR}
    config = PackedCheckpointConfig.of_linears(grids, ["layers.0.gate", "up"], chosen=["vision", "up_proj"])
    assert config.ignore == ["re:up$", r"re:layers\.\d+\.gate$", r"re:(.*\.)?vision(\..*)?$"]
