"""The list of dense modules in an AWQ config, read by each reader's rule (tests/references/readers_of_config.py)."""

import pytest
from references.readers_of_config import SERVERS, TRANSFORMERS

from hf_awq_offload.formats.names_left_out import clashes, entries

RULES = SERVERS | TRANSFORMERS
ATTENTION = [f"{part}_proj" for part in "qkvo"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def same(*names: str) -> dict[str, str]:
    """Modules whose names in the model and in the files are equal."""
    return {name: name for name in names}


def layers(numbers: range, block: str, parts: list[str]) -> dict[str, str]:
    return same(*(f"model.layers.{i}.{block}.{part}" for i in numbers for part in parts))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
class TestEveryReader:
    def test_layers_whose_numbers_begin_alike_are_told_apart(self, rule):
        dense, quantized = layers(range(1, 2), "mlp", MLP), layers(range(10, 20), "mlp", MLP)
        found = entries(dense, quantized)
        assert all(rule(name, found) for name in dense)
        assert not any(rule(name, found) for name in quantized)
        assert rule("model.layers.1.mlp.gate_up_proj", found)

    def test_routers_and_the_experts_beside_them(self, rule):
        dense = same(*(f"model.layers.{i}.mlp.gate" for i in range(12)), "lm_head")
        quantized = layers(range(12), "mlp.experts.0", MLP) | layers(range(12), "mlp.shared_experts", MLP)
        found = entries(dense, quantized)
        assert found == sorted(dense)
        assert not any(rule(name, found) for name in quantized)
        assert not any(rule(f"model.layers.{i}.mlp.experts", found) for i in range(12))  # as servers name all of them

    def test_a_tower_is_dense_under_the_names_of_fused_linears_too(self, rule):
        dense = same(*(f"model.visual.blocks.{i}.mlp.{part}" for i in range(2) for part in MLP))
        quantized = layers(range(2), "mlp", MLP)
        found = entries(dense, quantized)
        assert all(rule(name, found) for name in dense)
        assert rule("model.visual.blocks.1.mlp.gate_up_proj", found)
        assert not rule("model.layers.1.mlp.gate_up_proj", found)

    def test_a_short_name_at_the_top_hides_nothing(self, rule):
        """The output embedding is left dense by all readers anyway, so its name can be missing."""
        quantized = same("encoder.layer.0.attention.output.dense")
        found = entries(same("output", "encoder.pooler"), quantized, optional={"output"})
        assert found == ["encoder.pooler"]
        assert not any(rule(name, found) for name in quantized)


@pytest.mark.parametrize("rule", SERVERS.values(), ids=SERVERS)
def test_linears_that_servers_fuse_are_dense_together(rule):
    dense = layers(range(2), "self_attn", ATTENTION[:3])
    quantized = layers(range(2), "self_attn", ATTENTION[3:]) | layers(range(2), "mlp", MLP)
    found = entries(dense, quantized)
    assert rule("model.layers.0.self_attn.qkv_proj", found)
    assert not rule("model.layers.0.self_attn.o_proj", found)
    assert not rule("model.layers.0.mlp.gate_up_proj", found)


def test_modules_are_listed_by_both_names():
    dense = {"model.layers.0.mlp.gate": "model.layers.0.block_sparse_moe.gate"}
    quantized = {"model.layers.0.mlp.experts.0.up_proj": "model.layers.0.block_sparse_moe.experts.0.w3"}
    assert entries(dense, quantized) == ["model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"]


def test_names_that_servers_rename_are_written_out():
    """A server may know "vision.encoder." but not "vision."; transformers needs only the latter."""
    dense = {f"model.vision.{i}.fc": f"vision.encoder.{i}.fc" for i in range(3)}
    found = entries(dense, same("model.layers.0.mlp.up_proj"))
    assert {*dense.values()} <= {*found}
    assert {name for name in found if name.startswith("model.")} == {"model.vision."}


def test_a_name_within_another_is_found():
    quantized = ["model.layers.1.mlp.gate_proj", "model.layers.10.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
    assert clashes(["model.layers.1.mlp.gate"], quantized) == {quantized[0]: "model.layers.1.mlp.gate"}
    assert not clashes(["model.layers.1.mlp.router"], quantized)


@pytest.mark.parametrize("rule", SERVERS.values(), ids=SERVERS)
def test_no_entry_tells_a_router_from_a_linear_whose_name_begins_alike(rule):
    """Why such a linear has to stay dense: every text that is found in the router's name is found in the linear's."""
    router, linear = "model.layers.1.mlp.gate", "model.layers.1.mlp.gate_proj"
    texts = {router[start:end] for start in range(len(router)) for end in range(start + 1, len(router) + 1)}
    assert not [text for text in texts if rule(router, [text]) and not rule(linear, [text])]
    assert not rule(router, [f"{router}."])
