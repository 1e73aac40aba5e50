"""What is full precision is left alone, what is quantized in an unknown way is refused by name."""

from __future__ import annotations

import pytest
import torch
from quantized_checkpoints import float8, random_bytes, recognize, uniform

from hf_awq_offload.errors import CheckpointError


def plain() -> dict:
    return {
        "model.embed_tokens.weight": torch.ones(8, 4, dtype=torch.bfloat16),
        "model.layers.0.attn.logit_scale": torch.ones(1),
        "model.layers.0.attn.q_scale": torch.ones(4),
        "model.layers.0.layer_scale": torch.ones(4),
        "model.layers.0.router.scales": torch.ones(4),
        "model.layers.0.conv_scale": torch.ones(4, 4),
        "model.layers.0.altup.correct_output_scale": torch.ones(4),
        "model.layers.0.attn.scale": torch.ones(()),
        "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "model.layers.0.attn.causal_mask": torch.ones(4, 4, dtype=torch.bool),
        "model.layers.0.attn.relative_position_index": torch.ones(4, 4, dtype=torch.int64),
        "model.layers.0.steps": torch.ones(3, dtype=torch.uint8),
        "model.layers.0.norm.num_batches_tracked": torch.tensor(3),
    }


@pytest.mark.parametrize("fields", [None, {}])
def test_full_precision_is_none(fields):
    assert recognize(plain(), fields) is None
    assert recognize({}, fields) is None


def test_parameters_called_scale_stay_in_a_checkpoint_that_has_fp8_weights():
    tensors = plain() | {"a.weight": float8((4, 4)), "a.weight_scale": uniform(())}
    source = recognize(tensors, {"quant_method": "modelopt"})
    assert [weight.name for weight in source.weights] == ["a.weight"]
    assert source.unused == ()


@pytest.mark.parametrize("method", ["modelopt", "modelopt_fp4", "ModelOpt", "modelopt_mixed", None])
def test_spellings_of_a_method(method):
    tensors = {"a.weight": float8((4, 4)), "a.weight_scale": uniform(())}
    fields = {"quant_method": method, "quant_algo": "FP8", "config_groups": {"group_0": {"weights": {}}}}
    assert recognize(tensors, fields).name == "fp8 (one scale for each tensor)"


def test_only_scales_of_the_cache():
    tensors = plain() | {"k_proj.k_scale": uniform(()), "v_proj.v_scale": uniform(())}
    source = recognize(tensors, {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"})
    assert (source.weights, source.unused) == ((), ("k_proj.k_scale", "v_proj.v_scale"))


@pytest.mark.parametrize("method", [
    "hqq", "aqlm", "quip", "higgs", "vptq", "quark", "torchao", "eetq", "quanto", "spqr", "bitnet", "gguf", "nvfp4",
    "auto-round", "fp_quant", "none", 3, ["fp8"],
])  # fmt: skip
def test_an_unknown_method_is_refused_by_name(method):
    with pytest.raises(CheckpointError, match=r"quant_method is .*(dequantize|quantize the result)") as error:
        recognize(plain(), {"quant_method": method})
    assert repr(method) in str(error.value)


@pytest.mark.parametrize("fields", [{"bits": 4}, {"quant_method": None, "sym": True}])
def test_a_config_without_a_method_is_refused(fields):
    with pytest.raises(CheckpointError, match="has no quant_method"):
        recognize(plain(), fields)


@pytest.mark.parametrize("fields", [["fp8"], "fp8", 1])
def test_a_config_that_is_no_dict_is_refused(fields):
    with pytest.raises(CheckpointError, match="a dict"):
        recognize(plain(), fields)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("a.qweight", torch.ones(4, 4, dtype=torch.int32)),
        ("a.qzeros", torch.ones(4, 4, dtype=torch.int32)),
        ("a.weight_packed", torch.ones(4, 4, dtype=torch.int32)),
        ("a.weight_shape", torch.ones(2, dtype=torch.int64)),
        ("a.weight_scale", torch.ones(4, 1)),
        ("a.weight_scale_inv", torch.ones(4, 1)),
        ("experts.up_proj_scale_inv", torch.ones(4, 1)),
        ("experts.up_proj_scales", random_bytes((4, 4))),
        ("a.weight", random_bytes((4, 4))),
        ("a.weight", random_bytes((4, 4), dtype=torch.int8)),
        ("experts.up_proj", random_bytes((4, 4, 4), dtype=torch.int8)),
        ("a.some_scale", random_bytes((4, 4)).view(torch.float8_e8m0fnu)),
        ("a.SCB", torch.ones(4)),
    ],
)
def test_a_part_of_a_quantized_weight_that_nothing_explains_is_refused_by_name(name, tensor):
    with pytest.raises(CheckpointError, match=name):
        recognize(plain() | {name: tensor}, None)


def test_a_scale_beside_a_matrix_in_full_precision_is_refused_in_a_quantized_checkpoint():
    tensors = {"a.weight": float8((4, 4)), "a.weight_scale": uniform(())}
    tensors |= {"experts.up_proj": torch.ones(2, 4, 4), "experts.up_proj_scale": uniform((2, 1, 1))}
    with pytest.raises(CheckpointError, match=r"experts\.up_proj_scale"):
        recognize(tensors, None)


def test_scales_of_activations_belong_to_a_quantized_weight():
    tensors = plain() | {
        "a.weight": float8((4, 4)), "a.weight_scale": uniform(()), "a.input_scale": uniform(()),
        "experts.up_proj": float8((2, 4, 4)), "experts.up_proj_scale": uniform((2, 1, 1)),
        "experts.up_proj_input_scale": uniform((2,)), "experts.up_proj_activation_scale": uniform((2,)),
        "attn.q_scale": uniform(()), "attn.k_scale": uniform(()), "attn.v_scale": uniform(()), "b.q_scale": uniform(()),
    }  # fmt: skip
    assert set(recognize(tensors, None).unused) == {
        "a.input_scale", "experts.up_proj_input_scale", "experts.up_proj_activation_scale",
        "attn.q_scale", "attn.k_scale", "attn.v_scale",
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"b\.input_scale"):
        recognize(tensors | {"b.weight": torch.ones(4, 4), "b.input_scale": uniform(())}, None)


def test_a_name_of_many_kinds_is_short():
    tensors = {}
    for i in range(5):
        tensors |= {f"{i}.weight": float8((2 ** (i + 1), 8)), f"{i}.weight_scale": uniform((2**i, 2))}
    tensors |= {"a.weight": float8((3, 3)), "a.weight_scale": uniform(())}
    assert len(recognize(tensors, None).name) < 120
