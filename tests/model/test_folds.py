"""Tests that folds are found by measuring, and that only those that preserve the layer's function are accepted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import tiny_gemma, tiny_gemma2, tiny_gemma3, tiny_llama, tiny_qwen2, tiny_qwen3, token_batch
from torch import Tensor, nn

from hf_awq_offload.calibration.skeleton import record_skeleton
from hf_awq_offload.model.decoder_layers import HIDDEN, LayerCall, LayerRunner, ProbeCalls
from hf_awq_offload.model.fold_probing import discover_structure, without_refuted_folds
from hf_awq_offload.model.folds import Fold, LayerStructure, ProducerKind, absorb, storable_scales, structure_key

CPU = torch.device("cpu")
Q, K, V, O = (f"self_attn.{part}_proj" for part in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"mlp.{part}_proj" for part in ("gate", "up", "down"))


def probe_calls(model: nn.Module, layer: int = 0) -> ProbeCalls:
    skeleton = record_skeleton(model, [token_batch(1, 32), token_batch(1, 1)])
    calls = skeleton.calls[f"model.layers.{layer}"]
    return ProbeCalls((calls[0], skeleton.hidden[0]), (calls[1], skeleton.hidden[1]))


def structure_of(model: nn.Module, layer: int = 0) -> LayerStructure:
    return discover_structure(model.model.layers[layer], probe_calls(model, layer), CPU, seed=0)


def grouped_query_rows(model: nn.Module) -> Tensor:
    """Returns the row of v_proj that feeds each input channel of o_proj: query head h reads KV head h // (heads per KV
    head)."""
    config = model.config
    per_kv_head = config.num_attention_heads // config.num_key_value_heads
    rows = [
        head // per_kv_head * config.head_dim + i
        for head in range(config.num_attention_heads)
        for i in range(config.head_dim)
    ]
    return torch.tensor(rows)


def expected_folds(model: nn.Module, kind: ProducerKind, mlp_norm: str) -> dict[tuple[str, ...], tuple]:
    hidden, intermediate = torch.arange(model.config.hidden_size), torch.arange(model.config.intermediate_size)
    return {
        (Q, K, V): ("input_layernorm", kind, hidden),
        (O,): (V, ProducerKind.ROWS, grouped_query_rows(model)),
        (GATE, UP): (mlp_norm, kind, hidden),
        (DOWN,): (UP, ProducerKind.ROWS, intermediate),
    }


NORM, PLUS_ONE = ProducerKind.NORM, ProducerKind.NORM_PLUS_ONE
MODELS = {
    "llama with grouped queries": (tiny_llama, {}, NORM, "post_attention_layernorm"),
    "llama with a KV head per query head": (tiny_llama, {"num_key_value_heads": 4}, NORM, "post_attention_layernorm"),
    "llama with one KV head": (tiny_llama, {"num_key_value_heads": 1}, NORM, "post_attention_layernorm"),
    "llama with biases": (tiny_llama, {"attention_bias": True, "mlp_bias": True}, NORM, "post_attention_layernorm"),
    "llama with small weights": (tiny_llama, {"initializer_range": 0.02}, NORM, "post_attention_layernorm"),
    "llama with more rows than two digits hold": (
        tiny_llama,
        {"intermediate_size": 1100},
        NORM,
        "post_attention_layernorm",
    ),
    "qwen2": (tiny_qwen2, {}, NORM, "post_attention_layernorm"),
    "qwen3": (tiny_qwen3, {}, NORM, "post_attention_layernorm"),
    "gemma": (tiny_gemma, {}, PLUS_ONE, "post_attention_layernorm"),
    "gemma2": (tiny_gemma2, {}, PLUS_ONE, "pre_feedforward_layernorm"),
    "gemma3": (tiny_gemma3, {}, PLUS_ONE, "pre_feedforward_layernorm"),
}
EVERY_MODEL = pytest.mark.parametrize(
    ("build", "changes", "kind", "mlp_norm"), [pytest.param(*case, id=name) for name, case in MODELS.items()]
)


@EVERY_MODEL
def test_every_input_of_a_layer_folds_into_what_produces_it(build, changes, kind, mlp_norm):
    model = build(**changes)
    for layer in (0, 1):
        structure = structure_of(model, layer)
        expected = expected_folds(model, kind, mlp_norm)
        assert [group.consumers for group in structure.groups] == list(expected)
        for group in structure.groups:
            producer, fold_kind, row_of_channel = expected[group.consumers]
            assert group.fold is not None, group.consumers
            assert (group.fold.producer, group.fold.kind) == (producer, fold_kind)
            assert torch.equal(group.fold.row_of_channel, row_of_channel)
            assert group.fold.rows == model.model.layers[layer].get_submodule(producer).weight.shape[0]
        assert structure.softmax_only == {Q, K}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma], ids=lambda build: build.__name__)
def test_a_layer_in_half_precision_is_probed_as_well_as_one_in_fp32(build, dtype):
    structure = structure_of(build().to(dtype))
    assert [group.fold and group.fold.producer for group in structure.groups] == [
        "input_layernorm",
        V,
        "post_attention_layernorm",
        UP,
    ]
    assert structure.softmax_only == {Q, K}


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma3], ids=lambda build: build.__name__)
def test_probing_changes_nothing(build):
    model = build()
    layer, probes = model.model.layers[0], probe_calls(model)
    tensors = {name: (tensor, tensor.clone()) for name, tensor in layer.state_dict(keep_vars=True).items()}
    attributes = {name: set(vars(module)) for name, module in layer.named_modules()}
    inputs = probes.several[1].clone()
    rng_state = torch.get_rng_state()
    structure = discover_structure(layer, probes, CPU, seed=0)
    without_refuted_folds(layer, structure, probes, CPU, seed=0)
    for name, tensor in layer.state_dict(keep_vars=True).items():
        assert tensor is tensors[name][0]
        assert torch.equal(tensor, tensors[name][1])
    for name, module in layer.named_modules():
        assert set(vars(module)) == attributes[name]
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert torch.equal(probes.several[1], inputs)
    assert torch.equal(torch.get_rng_state(), rng_state)


class ToyMlp(nn.Module):
    """Computes x + fc2(act(fc1(norm(x)))); if `leak` is not zero, the norm's output also bypasses the linears."""

    def __init__(
        self,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        leak: float = 0.0,
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
        bias: bool = True,
    ):
        super().__init__()
        torch.manual_seed(0)
        self.norm = norm(16)
        self.fc1 = nn.Linear(16, 40, bias=bias)
        self.fc2 = nn.Linear(40, 16, bias=bias)
        self.register_buffer("leak", torch.tensor(leak))
        self.activation = activation

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = self.norm(hidden_states)
        return hidden_states + self.fc2(self.activation(self.fc1(normed))) + self.leak * normed


def toy_probes() -> ProbeCalls:
    call = LayerCall((HIDDEN,), {})
    generator = torch.Generator().manual_seed(0)
    several, single = (torch.randn(1, tokens, 16, generator=generator) for tokens in (32, 1))
    return ProbeCalls((call, several), (call, single))


def toy_producers(layer: nn.Module) -> dict[tuple[str, ...], str | None]:
    structure = discover_structure(layer, toy_probes(), CPU, seed=0)
    return {group.consumers: group.fold and group.fold.producer for group in structure.groups}


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm], ids=["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_relu_lets_a_scale_pass(norm, bias):
    assert toy_producers(ToyMlp(norm=norm, bias=bias)) == {("fc1",): "norm", ("fc2",): "fc1"}


def test_a_relu_channel_that_is_dead_on_the_probe_does_not_hide_the_fold():
    layer = ToyMlp()
    with torch.no_grad():
        layer.fc1.bias[7] = -100
    structure = discover_structure(layer, toy_probes(), CPU, seed=0)
    assert structure.groups[1].fold is not None
    assert torch.equal(structure.groups[1].fold.row_of_channel, torch.arange(40))


@pytest.mark.parametrize(
    "activation", [nn.functional.gelu, nn.functional.silu, torch.tanh, torch.sigmoid, lambda x: torch.relu(x).square()]
)
def test_an_activation_that_is_not_homogeneous_gets_no_fold(activation):
    assert toy_producers(ToyMlp(activation)) == {("fc1",): "norm", ("fc2",): None}


@pytest.mark.parametrize("leak", [1.0, 0.1, -1.0])
def test_a_norm_whose_output_is_used_elsewhere_too_gets_no_fold(leak):
    assert toy_producers(ToyMlp(leak=leak)) == {("fc1",): None, ("fc2",): "fc1"}


def test_a_linear_whose_output_is_used_elsewhere_too_gets_no_fold():
    class Leaky(ToyMlp):
        def forward(self, hidden_states):
            inner = torch.relu(self.fc1(self.norm(hidden_states)))
            return hidden_states + self.fc2(inner) + inner.mean(dim=-1, keepdim=True)

    assert toy_producers(Leaky()) == {("fc1",): "norm", ("fc2",): None}


def test_a_linear_that_also_reads_another_input_gets_no_fold():
    class ReadsTwice(ToyMlp):
        def forward(self, hidden_states):
            return hidden_states + self.fc2(torch.relu(self.fc1(hidden_states) + self.fc1(self.norm(hidden_states))))

    assert toy_producers(ReadsTwice())[("fc1",)] is None


def test_an_input_that_nothing_inside_the_layer_produces_gets_no_fold():
    class NoNorm(ToyMlp):
        def forward(self, hidden_states):
            return hidden_states + self.fc2(torch.relu(self.fc1(hidden_states)))

    assert toy_producers(NoNorm()) == {("fc1",): None, ("fc2",): "fc1"}


def test_a_linear_feeding_a_permuted_and_repeated_input_is_found_with_its_row_map():
    channels = torch.randint(0, 40, (64,), generator=torch.Generator().manual_seed(0))

    class Permuted(ToyMlp):
        def __init__(self):
            super().__init__()
            self.fc2 = nn.Linear(64, 16)

        def forward(self, hidden_states):
            return hidden_states + self.fc2(self.fc1(self.norm(hidden_states))[..., channels])

    structure = discover_structure(Permuted(), toy_probes(), CPU, seed=0)
    fold = structure.groups[1].fold
    assert fold is not None
    assert (fold.producer, fold.rows) == ("fc1", 40)
    assert torch.equal(fold.row_of_channel, channels)
    row_scale = torch.rand(40)
    assert torch.equal(fold.channel_scale(row_scale), row_scale[channels])


def test_a_structure_found_on_one_layer_is_proven_anew_on_another():
    """The layers have equal classes and shapes, but a buffer of the second leaks the norm's output past the linears."""
    sound, leaky = ToyMlp(), ToyMlp(leak=1.0)
    assert structure_key(sound) == structure_key(leaky)
    structure = discover_structure(sound, toy_probes(), CPU, seed=0)
    assert without_refuted_folds(sound, structure, toy_probes(), CPU, seed=0) is structure
    kept = without_refuted_folds(leaky, structure, toy_probes(), CPU, seed=0)
    assert [group.consumers for group in kept.groups] == [("fc1",), ("fc2",)]
    assert kept.groups[0].fold is None
    assert kept.groups[1].fold is structure.groups[1].fold
    assert kept.softmax_only == structure.softmax_only


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_seed_the_same_folds_are_found(seed):
    model = tiny_llama()
    structure = discover_structure(model.model.layers[0], probe_calls(model), CPU, seed=seed)
    assert [group.fold and group.fold.producer for group in structure.groups] == [
        "input_layernorm",
        V,
        "post_attention_layernorm",
        UP,
    ]


def wide_scale(rows: int, seed: int = 0) -> Tensor:
    """Returns scales from 1/20 to 20."""
    return torch.exp((torch.rand(rows, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * 3)


def fold_in(layer: nn.Module, fold: Fold, scale: Tensor) -> Tensor:
    """Folds the storable scale for `scale`, and returns it."""
    effective, fits = storable_scales(layer, fold, scale[None])
    assert fits.tolist() == [True]
    absorb(layer, fold, effective[0])
    return effective[0]


def relative_change(output: Tensor, reference: Tensor) -> float:
    return float((output.double() - reference.double()).norm() / reference.double().norm())


@EVERY_MODEL
def test_absorbed_scales_compensated_in_the_consumers_keep_the_layers_function(build, changes, kind, mlp_norm):
    model = build(**changes)
    layer, probes = model.model.layers[0], probe_calls(model)
    structure = discover_structure(layer, probes, CPU, seed=0)
    reference = LayerRunner(layer, CPU)(*probes.several)
    for index, group in enumerate(structure.groups):
        effective = fold_in(layer, group.fold, wide_scale(group.fold.rows, seed=index))
        for consumer in group.consumers:
            layer.get_parameter(f"{consumer}.weight").data.mul_(group.fold.channel_scale(effective))
    assert relative_change(LayerRunner(layer, CPU)(*probes.several), reference) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [ProducerKind.NORM, ProducerKind.NORM_PLUS_ONE])
def test_a_norm_rounded_to_its_dtype_is_exact_again_with_the_effective_scale(dtype, kind):
    """w_folded · s_eff = w up to fp32 rounding, so consumers that are multiplied by s_eff in fp32 lose nothing."""
    layer = ToyMlp().to(dtype)
    offset = 1 if kind is ProducerKind.NORM_PLUS_ONE else 0
    with torch.no_grad():
        layer.norm.weight.copy_(1 - offset + 0.2 * torch.randn(16, generator=torch.Generator().manual_seed(1)))
    before = layer.norm.weight.detach().float() + offset
    scale = wide_scale(16)
    effective = fold_in(layer, Fold("norm", kind, torch.arange(16), 16), scale)
    folded = layer.norm.weight.detach().float() + offset
    assert layer.norm.weight.dtype == dtype
    torch.testing.assert_close(folded * effective, before, rtol=3e-7, atol=0)
    # … and it is the requested scale, up to the resolution of the dtype around the stored weight.
    stored_precision = torch.finfo(dtype).eps * layer.norm.weight.detach().float().abs() / folded.abs()
    assert bool(((effective / scale - 1).abs() <= 0.51 * stored_precision + 1e-5).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [ProducerKind.NORM, ProducerKind.NORM_PLUS_ONE])
@pytest.mark.parametrize("size", [300.0, 3000.0, 1e-3])
def test_a_scale_is_folded_exactly_or_said_not_to_be_storable(dtype, kind, size):
    """bf16 lacks precision where 1 + w is near zero: (1 + w) / 3000 - 1 rounds to -1, and the channel would vanish."""
    layer = ToyMlp().to(dtype)
    offset = 1 if kind is ProducerKind.NORM_PLUS_ONE else 0
    with torch.no_grad():
        layer.norm.weight.fill_(1.25 - offset)
    fold = Fold("norm", kind, torch.arange(16), 16)
    (effective,), fits = storable_scales(layer, fold, torch.full((1, 16), size))
    if kind is ProducerKind.NORM_PLUS_ONE and dtype == torch.bfloat16 and size == 3000.0:
        assert not fits
        return
    assert fits
    absorb(layer, fold, effective)
    folded = layer.norm.weight.detach().float() + offset
    torch.testing.assert_close(folded * effective, torch.full((16,), 1.25), rtol=3e-7, atol=0)


def test_a_norm_weight_that_is_zero_keeps_the_scale_that_was_asked_for():
    layer = ToyMlp()
    with torch.no_grad():
        layer.norm.weight[3] = 0
    scale = wide_scale(16)
    effective = fold_in(layer, Fold("norm", ProducerKind.NORM, torch.arange(16), 16), scale)
    assert effective[3] == scale[3]
    assert layer.norm.weight[3] == 0
    torch.testing.assert_close(effective, scale)


def test_absorbing_divides_weight_and_bias_in_place():
    layer = ToyMlp(norm=nn.LayerNorm)
    with torch.no_grad():
        layer.norm.bias.copy_(torch.arange(16.0))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    parameters = dict(layer.named_parameters())
    norm_scale, rows_scale = wide_scale(16), wide_scale(40, seed=1)
    absorb(layer, Fold("norm", ProducerKind.NORM, torch.arange(16), 16), norm_scale)
    effective = fold_in(layer, Fold("fc1", ProducerKind.ROWS, torch.arange(40), 40), rows_scale)
    assert torch.equal(effective, rows_scale)
    assert all(parameter is parameters[name] for name, parameter in layer.named_parameters())
    torch.testing.assert_close(layer.norm.weight.detach(), before["norm.weight"] / norm_scale)
    torch.testing.assert_close(layer.norm.bias.detach(), before["norm.bias"] / norm_scale)
    torch.testing.assert_close(layer.fc1.weight.detach(), before["fc1.weight"] / rows_scale.unsqueeze(1))
    torch.testing.assert_close(layer.fc1.bias.detach(), before["fc1.bias"] / rows_scale)
    for name in ("fc2.weight", "fc2.bias"):
        assert torch.equal(layer.state_dict()[name], before[name])


@pytest.mark.parametrize(
    ("fold", "key"),
    [
        (Fold("norm", ProducerKind.NORM, torch.arange(16), 16), "norm.weight"),
        (Fold("norm", ProducerKind.NORM_PLUS_ONE, torch.arange(16), 16), "norm.weight"),
        (Fold("fc1", ProducerKind.ROWS, torch.arange(40), 40), "fc1.weight"),
        (Fold("fc1", ProducerKind.ROWS, torch.arange(40), 40), "fc1.bias"),
    ],
    ids=["norm", "norm plus one", "rows", "bias"],
)
def test_a_scale_that_would_overflow_fp16_is_not_storable(fold, key):
    layer = ToyMlp().half()
    with torch.no_grad():
        layer.get_parameter(key)[5] = 3e4
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert storable_scales(layer, fold, torch.tensor([0.4, 0.5])[:, None].expand(2, fold.rows))[1].tolist() == [
        False,
        True,
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    fold_in(layer, fold, torch.full((fold.rows,), 0.5))
    assert all(bool(torch.isfinite(parameter).all()) for parameter in layer.parameters())


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, tiny_qwen3, tiny_gemma], ids=lambda build: build.__name__)
def test_layers_of_one_model_have_one_structure_whatever_their_weights(build):
    first, second = build(seed=0).model.layers
    (other, _) = build(seed=1).model.layers
    assert structure_key(first) == structure_key(second) == structure_key(other)
    assert hash(structure_key(first)) == hash(structure_key(second))
    assert structure_key(first) == structure_key(first.train())


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 128},
        {"num_key_value_heads": 4},
        {"attention_bias": True},
        {"hidden_act": "relu"},
        {"rms_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_layers_of_other_shape_or_setting_have_another_structure(changes):
    assert structure_key(tiny_llama().model.layers[0]) != structure_key(tiny_llama(**changes).model.layers[0])


def test_layers_of_other_classes_have_another_structure():
    assert structure_key(tiny_llama().model.layers[0]) != structure_key(tiny_qwen2().model.layers[0])
