"""PEFT's adapters do the same on quantized linears as on dense ones of equal weights, and are never lost."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from accelerate import dispatch_model
from models import SHAPE, tiny_llama, token_batch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_awq_offload import AwqLinear, AwqOffloadConfig, ModelStructureError, QuantizedWeightError, quantize_model
from hf_awq_offload.integrations.lora import AwqLoraLinear

pytestmark = [
    # PEFT 0.21 asks for it, transformers 5.23 has another name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning"),
    # PEFT warns of its own lora_bias: such a vector has one dimension.
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape:"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]
TOKENS = token_batch(2, 8)
LINEARS_PER_LAYER, LAYERS = 7, SHAPE["num_hidden_layers"]
ADAPTER_PARTS = ("lora_", "hada_", "lokr_", "ia3_", "vera_lambda", "modules_to_save")
LORA_KINDS = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "with biases": {"lora_bias": True},
}
OTHER_KINDS = {
    "LoHa": lambda targets: LoHaConfig(target_modules=targets, init_weights=False),
    "LoKr": lambda targets: LoKrConfig(target_modules=targets, init_weights=False),
    "IA3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=[], init_ia3_weights=False),
    "VeRA": lambda targets: VeraConfig(target_modules=targets, init_weights=False),
    "AdaLoRA": lambda targets: AdaLoraConfig(target_modules=targets, init_lora_weights=False, total_step=10),
}


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, its linears rounded to nearest; the torch backend computes in the input's dtype, as dense ones do."""
    recipe = AwqOffloadConfig(n_grid=0, clip=False, rounding="nearest", group_size=32, backend="torch")
    return quantize_model(model, recipe)


def quantized(**changes) -> PreTrainedModel:
    return rounded(tiny_llama(**changes))


def lora(**changes) -> LoraConfig:
    """Returns the config of an adapter that has an effect from the start."""
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | changes)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def loss_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the gradients of everything that is trained beside the base's weights."""
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    return {name: gradient for name, gradient in trained.items() if any(part in name for part in ADAPTER_PARTS)}


def dense_twin(model: PeftModel) -> PeftModel:
    """Returns a model with the same adapters on dense linears of equal weights."""
    twin = copy.deepcopy(model)
    twin.get_base_model().dequantize()
    assert not any(isinstance(module, AwqLinear) for module in twin.modules())
    return twin


def awq_linears(model: nn.Module) -> dict[str, AwqLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AwqLinear)}


def packed_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": tensor.clone()
        for name, linear in awq_linears(model).items()
        for part, tensor in linear.packed._asdict().items()
    }


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    assert [name for name in expected if actual[name].dtype != expected[name].dtype] == []


# -- forward and backward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LORA_KINDS)
def test_outputs_and_gradients_are_those_of_the_adapter_on_dense_linears(kind):
    bias = {"attention_bias": True, "mlp_bias": True} if kind == "with biases" else {}
    model = get_peft_model(quantized(**bias), lora(**LORA_KINDS[kind]))
    layers = [module for module in model.modules() if isinstance(module, AwqLoraLinear)]
    assert len(layers) == LINEARS_PER_LAYER * LAYERS
    twin = dense_twin(model)
    torch.testing.assert_close(logits(model), logits(twin))
    gradients, expected = loss_gradients(model), loss_gradients(twin)
    assert len(gradients) >= 2 * len(layers)
    torch.testing.assert_close(gradients, expected)
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_adapters_work_too(kind):
    model = get_peft_model(quantized(), OTHER_KINDS[kind](["q_proj", "v_proj"]))
    twin = dense_twin(model)
    torch.testing.assert_close(logits(model), logits(twin))
    torch.testing.assert_close(loss_gradients(model), loss_gradients(twin))


def test_targets_can_be_named():
    model = get_peft_model(quantized(), lora(target_modules=["q_proj", "down_proj"]))
    targeted = {name for name, module in model.named_modules() if isinstance(module, AwqLoraLinear)}
    assert {name.rpartition(".")[2] for name in targeted} == {"q_proj", "down_proj"}
    assert len(targeted) == 2 * LAYERS


def test_a_fresh_adapter_changes_nothing():
    model = quantized()
    before = logits(model)
    assert torch.equal(logits(get_peft_model(model, LoraConfig(target_modules="all-linear"))), before)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    model = get_peft_model(quantized(), lora())
    expected = loss_gradients(copy.deepcopy(model))
    enable_checkpointing(model.get_base_model(), {"use_reentrant": use_reentrant})
    model.get_base_model().enable_input_require_grads()  # the Trainer does this for adapters
    runs = []
    model.get_base_model().model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: runs.append(1))
    torch.testing.assert_close(loss_gradients(model), expected)
    assert len(runs) == 2  # the backward pass runs it again


def enable_checkpointing(model: PreTrainedModel, kwargs: dict) -> None:
    """Enables gradient checkpointing, by the name that the installed transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_under_autocast_it_does_what_dense_linears_do(kind, dtype):
    model = get_peft_model(quantized(), lora(**LORA_KINDS[kind]))
    twin = dense_twin(model)
    with torch.autocast("cpu", dtype=dtype):
        output, expected = logits(model), logits(twin)
        gradients, dense_gradients = loss_gradients(model), loss_gradients(twin)
    assert relative_error(output, expected) < 8 * torch.finfo(dtype).eps
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, dense_gradients[name]) < 16 * torch.finfo(dtype).eps, name


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_half_precision_trains_with_adapters_in_fp32(dtype):
    model = get_peft_model(quantized().to(dtype), lora())
    gradients = loss_gradients(model)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())


# -- preparing, saving, loading --------------------------------------------------------------------------------------


def test_prepare_model_for_kbit_training_leaves_what_kernels_and_checkpoints_need(tmp_path):
    model = quantized().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "before")
    packed = packed_tensors(model)
    model = prepare_model_for_kbit_training(model)
    assert model.model.norm.weight.dtype == torch.float32
    logits(model)
    assert_equal(packed_tensors(model), packed)
    again = prepare_model_for_kbit_training(model)
    again.save_pretrained(tmp_path / "after")  # without a forward pass in between
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    packed_names = [name for name in before if name.endswith(("qweight", "qzeros", "scales"))]
    assert len(packed_names) == 3 * LINEARS_PER_LAYER * LAYERS
    assert_equal({name: after[name] for name in packed_names}, {name: before[name] for name in packed_names})
    assert len(loss_gradients(get_peft_model(again, lora()))) == 2 * LINEARS_PER_LAYER * LAYERS


def test_modules_to_save_are_trained_and_saved(tmp_path):
    model = get_peft_model(quantized(), lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    gradients = loss_gradients(model)
    (name,) = (name for name in gradients if "lm_head" in name)
    with torch.no_grad():
        model.get_parameter(name).add_(gradients[name])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(quantized(), tmp_path)), logits(model))


def test_a_quantized_linear_among_modules_to_save_is_refused():
    with pytest.raises(QuantizedWeightError, match=r"can't be trained.*modules_to_save"):
        get_peft_model(quantized(), lora(target_modules=["q_proj"], modules_to_save=["v_proj"]))


@pytest.mark.parametrize("kind", LORA_KINDS)
def test_adapters_are_saved_and_loaded_in_all_of_the_ways_that_there_are(kind, tmp_path):
    bias = {"attention_bias": True, "mlp_bias": True} if kind == "with biases" else {}
    base = quantized(**bias)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora(**LORA_KINDS[kind]))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not [name for name in saved if "qweight" in name or "scales" in name]

    assert torch.equal(logits(PeftModel.from_pretrained(quantized(**bias), tmp_path / "adapter")), expected)
    if kind == "DoRA":
        return  # transformers 5.23 misses the magnitudes, on dense linears too
    loaded = quantized(**bias)
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "adapter again")
    assert_equal(load_file(tmp_path / "adapter again" / "adapter_model.safetensors"), saved)
    from_disk = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(from_disk, tmp_path / "adapter")), expected, rtol=0.05, atol=0.05
    )  # by the CPU's int4 kernel
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    in_one_go = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(in_one_go), expected, rtol=0.05, atol=0.05)


def test_several_adapters_live_side_by_side():
    model = get_peft_model(quantized(), lora())
    base, first = logits(model.get_base_model()), logits(model)
    with model.disable_adapter():
        base = logits(model)
    model.add_adapter("other", lora(r=2, target_modules=["q_proj", "up_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    torch.testing.assert_close(second, logits(dense_twin(model)))
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    torch.testing.assert_close(both, logits(dense_twin(model)))
    outputs = [base, first, second, both]
    assert not any(torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_a_model_with_adapters_can_be_copied_and_pickled():
    model = get_peft_model(quantized(), lora())
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


# -- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe_merge", [False, True], ids=["in place", "safe"])
@pytest.mark.parametrize("kind", LORA_KINDS)
def test_merging_keeps_the_function_and_unmerging_brings_every_bit_back(kind, safe_merge):
    bias = {"attention_bias": True, "mlp_bias": True} if kind == "with biases" else {}
    model = get_peft_model(quantized(**bias), lora(**LORA_KINDS[kind]))
    expected, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter(safe_merge=safe_merge)
    assert not awq_linears(model)
    assert not [name for name in model.state_dict() if name.endswith("qweight")]
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert_equal(dict(model.state_dict()), state)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_several_adapters_are_merged_in_turn(kind):
    model = get_peft_model(quantized(), lora(**LORA_KINDS[kind]))
    model.add_adapter("other", lora(r=2, target_modules=["q_proj", "up_proj"]))
    expected = logits(model)
    twin = dense_twin(model)
    for each in (model, twin):
        each.merge_adapter(["default"])
        each.merge_adapter(["other"])
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")
def test_switching_adapters_off_while_merged_brings_the_base_back():
    base = quantized()
    expected = logits(base)
    model = get_peft_model(base, lora())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_a_merge_that_fails_leaves_the_quantized_linear():
    model = get_peft_model(quantized(), lora(target_modules=["q_proj"]))
    layer = next(module for module in model.modules() if isinstance(module, AwqLoraLinear))
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert isinstance(layer.base_layer, AwqLinear)
    assert not layer.merged


def test_while_merged_the_model_can_be_moved_cast_and_copied():
    model = get_peft_model(quantized(), lora())
    expected = logits(copy.deepcopy(model).to(torch.bfloat16))
    model.merge_adapter()
    model = copy.deepcopy(model).to(torch.bfloat16)
    model.unmerge_adapter()
    assert {linear.dtype for linear in awq_linears(model).values()} == {torch.bfloat16}
    assert torch.equal(logits(model), expected)


def test_all_linears_merged_and_unloaded_are_a_dense_model_that_saves_as_one(tmp_path):
    model = get_peft_model(quantized(), lora())
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert {type(module) for name, module in merged.named_modules() if name.endswith("_proj")} == {nn.Linear}
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded), logits(merged))


def test_some_linears_merged_and_unloaded_are_named_in_the_checkpoint(tmp_path):
    model = get_peft_model(quantized(), lora(target_modules=["q_proj"]))
    expected = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    not_converted = [name for name in config["modules_to_not_convert"] if name != "lm_head"]
    assert not_converted == [f"model.layers.{i}.self_attn.q_proj" for i in range(LAYERS)]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(awq_linears(reloaded)) == (LINEARS_PER_LAYER - 1) * LAYERS
    torch.testing.assert_close(logits(reloaded), expected, rtol=0.05, atol=0.05)  # by the CPU's int4 kernel


def test_a_merged_model_can_be_quantized_again():
    merged = get_peft_model(quantized(), lora()).merge_and_unload().dequantize()
    expected = logits(merged)
    again = rounded(merged)
    assert len(awq_linears(again)) == LINEARS_PER_LAYER * LAYERS
    assert relative_error(logits(again), expected) < 0.5


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_adapters_that_write_to_the_weight_are_refused_and_lose_nothing(kind):
    model = get_peft_model(quantized(), OTHER_KINDS[kind](["q_proj", "v_proj"]))
    expected, packed = logits(model), packed_tensors(model)
    with pytest.raises(QuantizedWeightError, match=r"model\.dequantize\(\) first"):
        model.merge_and_unload()
    assert_equal(packed_tensors(model), packed)
    assert torch.equal(logits(model), expected)
    model.get_base_model().dequantize()  # what the message says
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_adapters_of_any_kind_can_be_taken_off():
    for kind, config in OTHER_KINDS.items():
        model = quantized()
        before = logits(model)
        unloaded = get_peft_model(model, config(["q_proj", "v_proj"])).unload()
        assert torch.equal(logits(unloaded), before), kind
        assert len(awq_linears(unloaded)) == LINEARS_PER_LAYER * LAYERS, kind


# -- mixture of experts, several devices, offload --------------------------------------------------------------------


def mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)).eval()


def qwen3_moe() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    return Qwen3MoeForCausalLM(config).eval()


@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
@pytest.mark.parametrize("targets", ["all-linear", "experts alone"])
def test_experts_taken_apart_get_adapters_of_their_own(build, targets, tmp_path):
    names = ["w1", "w2", "w3"] if build is mixtral else ["gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(rounded(build()), lora(target_modules=names if targets == "experts alone" else targets))
    layers = [name for name, module in model.named_modules() if isinstance(module, AwqLoraLinear)]
    assert len([name for name in layers if ".experts." in name]) == LAYERS * 4 * 3
    assert len(layers) == LAYERS * (4 * 3 + (4 if targets == "all-linear" else 0))
    expected = logits(model)
    torch.testing.assert_close(expected, logits(dense_twin(model)))
    assert sum(bool(gradient.any()) for gradient in loss_gradients(model).values() if gradient is not None) > 4
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(rounded(build()), tmp_path)), expected)
    loaded = rounded(build())
    loaded.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(loaded), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_experts_of_a_model_that_is_not_ours_are_left_to_peft():
    """Fused experts have parameters instead of linears: PEFT rewrites the targets, as it does without this package."""
    rounded(mixtral())  # registers
    model = get_peft_model(mixtral(), LoraConfig(target_modules=["w1", "w2", "w3"]))
    assert model.peft_config["default"].target_parameters


def test_a_model_that_accelerate_has_dispatched_is_trained_merged_and_unmerged():
    """With accelerate's hooks on every module, as on several devices; this test has but one."""
    base = quantized()
    dispatch_model(base, device_map={"": "cpu"}, force_hooks=True)
    assert all(hasattr(linear, "_hf_hook") for linear in awq_linears(base).values())
    model = get_peft_model(base, lora())
    expected, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    assert all(gradient.any() for gradient in loss_gradients(model).values())
    model.merge_adapter()
    layers = [module for module in model.modules() if isinstance(module, AwqLoraLinear)]
    assert all(hasattr(layer.base_layer, "_hf_hook") for layer in layers)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert_equal(dict(model.state_dict()), state)
    assert torch.equal(logits(model), expected)


@pytest.fixture
def offloaded(tmp_path) -> PreTrainedModel:
    """Returns a model whose second layer is on disk."""
    quantized().save_pretrained(tmp_path / "base")
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "offload"
    )


def test_adapters_on_an_offloaded_model_are_refused_before_anything_is_trained(offloaded, tmp_path):
    with pytest.raises(ModelStructureError, match=r"layers\.1\.self_attn.* is offloaded.*device_map="):
        get_peft_model(offloaded, lora())
    get_peft_model(quantized(), lora()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelStructureError, match="is offloaded"):  # PEFT would load them in vain, and not say so
        offloaded.load_adapter(str(tmp_path / "adapter"))
    with pytest.raises(ModelStructureError, match=r"layers\.1\.self_attn.* is offloaded.*device_map="):
        _ = offloaded.hf_quantizer.is_trainable
