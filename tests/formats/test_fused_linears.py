"""Linears that servers fuse: which they are, and what is said where a recipe treats them differently."""

import pytest

from hf_awq_offload.formats.fused_linears import advice, complete_modules, conflicts, fused_modules
from hf_awq_offload.formats.grid_choice import GridChoice

FOUR, EIGHT = GridChoice(4, 128, True), GridChoice(8, 128, False)
NAMED = "named in modules_to_not_convert"
ATTENTION = [f"self_attn.{part}_proj" for part in "qkvo"]
MLP = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
EXPERTS = [f"mlp.experts.{i}.{part}_proj" for i in range(3) for part in ("gate", "up", "down")]


def model(parts: list[str], changed: dict | None = None, layers: int = 2) -> dict:
    """Linears of a model at 4 bits; `changed`: end of a name -> another state."""
    states = {f"model.layers.{i}.{part}": FOUR for i in range(layers) for part in parts}
    for end, state in (changed or {}).items():
        assert any(name.endswith(end) for name in states)
        states |= {name: state for name in states if name.endswith(end)}
    return states


def test_modules_and_their_parts():
    found = fused_modules(
        model([*ATTENTION, *EXPERTS, "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"], layers=1)
    )
    assert {whole.removeprefix("model.layers.0."): len(parts) for whole, parts in found.items()} == {
        "self_attn.qkv_proj": 3,
        "mlp.experts": 9,
        "mlp.shared_expert.gate_up_proj": 2,
    }


def test_a_module_without_one_of_its_parts_is_not_complete():
    assert not complete_modules(["layer.self_attn.q_proj", "layer.self_attn.k_proj"])
    assert complete_modules(["layer.mlp.gate_proj", "layer.mlp.up_proj"])


@pytest.mark.parametrize(
    "states",
    [
        model(ATTENTION + MLP),
        model(ATTENTION + MLP, {"down_proj": EIGHT}),
        model(ATTENTION + MLP, {"o_proj": NAMED}),
        model(ATTENTION + MLP, {"q_proj": EIGHT, "k_proj": EIGHT, "v_proj": EIGHT}),
        model(ATTENTION + MLP, {"0.mlp.gate_proj": EIGHT, "0.mlp.up_proj": EIGHT}),
        model(ATTENTION + EXPERTS, dict.fromkeys(EXPERTS, EIGHT)),
        model(ATTENTION + EXPERTS, {part: "its shape" if "up" in part else NAMED for part in EXPERTS}),
        model(["q_proj", "fc1", "fc2"], {"fc1": EIGHT}),
        {"q_proj": FOUR, "k_proj": EIGHT},
    ],
)
def test_nothing_is_said_where_servers_can_load_the_result(states):
    assert not conflicts(states)
    assert advice(states) is None


def test_one_of_q_k_and_v_on_another_grid():
    text = advice(model(ATTENTION + MLP, {"v_proj": EIGHT}))
    assert "vLLM" in text
    assert "model.layers.0.self_attn.qkv_proj (and 1 more) has" in text
    assert "q_proj, k_proj at 4 bits in groups of 128, asymmetric" in text
    assert "v_proj at 8 bits in groups of 128, symmetric" in text
    assert r'overrides={r"(q_proj|k_proj|v_proj)$": …}' in text
    assert "gate" not in text
    assert "v_proj at 8 bits in groups of 128, symmetric. For these servers, let every pattern" in text


def test_one_of_q_k_and_v_in_full_precision():
    text = advice(model(ATTENTION + MLP, {"k_proj": NAMED}, layers=1))
    assert f"k_proj in full precision ({NAMED})" in text
    assert "modules_to_not_convert=['q_proj', 'k_proj', 'v_proj']" in text
    assert "more)" not in text


def test_down_proj_of_experts_on_another_grid():
    text = advice(model(ATTENTION + EXPERTS, {"down_proj": EIGHT}))
    assert "model.layers.0.mlp.experts (and 1 more) has experts.0.gate_proj" in text
    assert "experts.0.down_proj, experts.1.down_proj, experts.2.down_proj at 8 bits" in text
    assert r'overrides={r"\.experts\.": …}' in text


def test_one_expert_in_full_precision():
    text = advice(model(EXPERTS, {f"experts.1.{part}_proj": NAMED for part in ("gate", "up", "down")}))
    assert r"modules_to_not_convert=['.*\\.experts\\.']" in text


def test_group_sizes_and_zero_points_are_part_of_a_grid():
    for other in (FOUR._replace(group_size=32), FOUR._replace(zero_point=False), FOUR._replace(group_size=-1)):
        assert set(conflicts(model(MLP, {"up_proj": other}, layers=1))) == {"model.layers.0.mlp.gate_up_proj"}


def test_many_kinds_are_cut_short():
    states = {
        f"block_{letter}.mlp.{part}_proj": grid for letter in "abcdef" for part, grid in (("gate", FOUR), ("up", EIGHT))
    }
    assert "; and 2 more kinds" in advice(states)
