"""Tests that the skeleton pass gives every layer exactly what the model would, and leaves the model unchanged."""

from __future__ import annotations

import pytest
import torch
from models import (
    tiny_gemma,
    tiny_gemma2,
    tiny_gemma3,
    tiny_llama,
    tiny_qwen2,
    tiny_qwen3,
    token_batch,
)
from torch import Tensor, nn

from hf_awq_offload.calibration.skeleton import Skeleton, record_skeleton
from hf_awq_offload.errors import ModelStructureError
from hf_awq_offload.model.decoder_layers import (
    HIDDEN,
    LayerCall,
    LayerRunner,
    calibration_mode,
    candidate_layers,
    output_hidden,
)
from hf_awq_offload.model.linears import linears_in

CPU = torch.device("cpu")
BUILDERS = [tiny_llama, tiny_qwen2, tiny_qwen3, tiny_gemma, tiny_gemma2, tiny_gemma3]


class ToyLayer(nn.Module):
    """A residual layer that returns a tensor, or a tuple as older models' layers do."""

    def __init__(self, returns_tuple: bool = False):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, bias: Tensor | None = None, flag: bool = True):
        output = hidden_states + torch.tanh(self.fc(hidden_states))
        if bias is not None and flag:
            output = output + bias
        return (output, "extra") if self.returns_tuple else output


class ToyModel(nn.Module):
    """An embedding and layers, nothing else; subclasses override `run`, which runs the layers."""

    def __init__(self, layers: int = 3, returns_tuple: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 8)
        self.layers = nn.ModuleList(ToyLayer(returns_tuple) for _ in range(layers))

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
        assert not use_cache
        return self.run(self.embed(input_ids))

    def run(self, hidden: Tensor) -> Tensor:
        bias = torch.arange(8.0)
        for layer in self.layers:
            hidden = output_hidden(layer(hidden, bias=bias))
        return hidden


def layer_outputs(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """Returns the output of every decoder layer in the model's own forward pass."""
    outputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda m, args, output, name=name: outputs.update({name: output_hidden(output)}))
        for name, layer in candidate_layers(model).items()
    ]
    with torch.no_grad():
        model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_candidate_layers_are_the_decoder_layers_in_order(build):
    model = build(num_hidden_layers=3) if build is not tiny_gemma3 else build()
    layers = candidate_layers(model)
    assert list(layers) == [f"model.layers.{i}" for i in range(model.config.num_hidden_layers)]
    assert all(layers[name] is model.get_submodule(name) for name in layers)
    assert list(candidate_layers(model.model)) == [f"layers.{i}" for i in range(model.config.num_hidden_layers)]


def test_lists_inside_layers_and_lists_without_linears_are_no_candidates():
    model = ToyModel(2)
    model.layers[0].experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    model.norms = nn.ModuleList([nn.LayerNorm(8)])
    assert list(candidate_layers(model)) == ["layers.0", "layers.1"]


def test_names_that_begin_alike_are_told_apart():
    """layers.1 is not the parent of layers.10, and "layers" is not the parent of "layers_after"."""
    model = ToyModel(11)
    model.layers_after = nn.ModuleList([ToyLayer()])
    assert list(candidate_layers(model)) == [*(f"layers.{i}" for i in range(11)), "layers_after.0"]


@pytest.mark.parametrize(
    ("build", "attention"),
    [(build, "eager") for build in BUILDERS] + [(build, "sdpa") for build in BUILDERS if build is not tiny_gemma2],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_layers_run_alone_on_their_recorded_calls_reproduce_the_models_hidden_states_exactly(build, attention):
    model = build(attn_implementation=attention)
    batches = [token_batch(2, 20), token_batch(1, 5, seed=1), token_batch(2, 20, seed=2)]
    skeleton = record_skeleton(model, batches)
    assert skeleton.layer_names == ["model.layers.0", "model.layers.1"]
    assert [tuple(hidden.shape) for hidden in skeleton.hidden] == [(2, 20, 64), (1, 5, 64), (2, 20, 64)]
    for index, batch in enumerate(batches):
        expected = layer_outputs(model, batch)
        hidden = skeleton.hidden[index]
        for name in skeleton.layer_names:
            hidden = LayerRunner(model.get_submodule(name), CPU)(skeleton.calls[name][index], hidden)
            assert torch.equal(hidden, expected[name])


@pytest.mark.parametrize("returns_tuple", [False, True])
def test_a_layer_may_return_a_tensor_or_a_tuple(returns_tuple):
    model = ToyModel(returns_tuple=returns_tuple).eval()
    batch = token_batch(2, 5)
    skeleton = record_skeleton(model, [batch])
    hidden = skeleton.hidden[0]
    for name, expected in layer_outputs(model, batch).items():
        hidden = LayerRunner(model.get_submodule(name), CPU)(skeleton.calls[name][0], hidden)
        assert torch.equal(hidden, expected)


def masks(skeleton: Skeleton, batch: int = 0) -> list[Tensor]:
    return [skeleton.calls[name][batch].kwargs["attention_mask"] for name in skeleton.layer_names]


@pytest.mark.parametrize("build", [tiny_gemma2, tiny_gemma3], ids=lambda build: build.__name__)
def test_sliding_and_global_layers_are_given_masks_of_their_own(build):
    """Uses 20 tokens, of which a sliding layer sees the last 8."""
    skeleton = record_skeleton(build(attn_implementation="eager"), [token_batch(1, 20)])
    sliding, full = masks(skeleton)
    assert [int((mask[0, 0, -1] == 0).sum()) for mask in (sliding, full)] == [8, 20]


def test_layers_with_two_rotary_bases_are_given_their_own():
    skeleton = record_skeleton(tiny_gemma3(), [token_batch(1, 20)])
    (cos_0, _), (cos_1, _) = (skeleton.calls[name][0].kwargs["position_embeddings"] for name in skeleton.layer_names)
    assert not torch.equal(cos_0, cos_1)


def tensors_of(call: LayerCall) -> list[Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten((call.args, call.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def test_tensors_that_layers_and_batches_share_are_stored_once():
    model = tiny_llama(attn_implementation="eager")
    skeleton = record_skeleton(model, [token_batch(2, 20, seed=seed) for seed in range(3)])
    calls = [skeleton.calls[name][batch] for name in skeleton.layer_names for batch in range(3)]
    first = [id(tensor) for tensor in tensors_of(calls[0])]
    assert len(first) >= 3, "a mask and two rotary tensors at least"
    assert all([id(tensor) for tensor in tensors_of(call)] == first for call in calls)


def test_tensors_of_batches_of_other_shape_are_not_mixed_up():
    skeleton = record_skeleton(tiny_llama(attn_implementation="eager"), [token_batch(1, 20), token_batch(1, 6)])
    assert [tuple(masks(skeleton, batch)[0].shape) for batch in (0, 1)] == [(1, 1, 20, 20), (1, 1, 6, 6)]


def test_hidden_states_are_replaced_by_a_mark_wherever_they_stand():
    class TwoPlaces(ToyModel):
        def run(self, hidden):
            for layer in self.layers:
                hidden = layer(hidden, bias=hidden)
            return hidden

    model = TwoPlaces().eval()
    skeleton = record_skeleton(model, [token_batch(1, 4)])
    call = skeleton.calls["layers.1"][0]
    assert call.args == (HIDDEN,)
    assert call.kwargs == {"bias": HIDDEN}
    args, kwargs = call.bind(torch.ones(1, 4, 8), lambda tensor: tensor * 2)
    assert torch.equal(args[0], torch.full((1, 4, 8), 2.0))
    assert torch.equal(kwargs["bias"], torch.full((1, 4, 8), 2.0))


def test_hidden_states_may_be_given_by_name():
    class ByName(ToyModel):
        def run(self, hidden):
            for layer in self.layers:
                hidden = layer(hidden_states=hidden, flag=False)
            return hidden

    model = ByName().eval()
    batch = token_batch(1, 4)
    skeleton = record_skeleton(model, [batch])
    assert skeleton.calls["layers.0"][0].kwargs == {"hidden_states": HIDDEN, "flag": False}
    hidden = skeleton.hidden[0]
    for name, expected in layer_outputs(model, batch).items():
        hidden = LayerRunner(model.get_submodule(name), CPU)(skeleton.calls[name][0], hidden)
        assert torch.equal(hidden, expected)


def snapshot(model: nn.Module) -> tuple:
    """Returns everything that a skeleton pass must not change; module attributes by identity."""
    return (
        {name: dict(vars(module)) for name, module in model.named_modules()},
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        torch.get_rng_state(),
    )


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    attributes, tensors, rng_state = before
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        assert all(vars(module)[key] is value for key, value in attributes[name].items())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng_state)


def test_the_model_is_left_as_it_was():
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.layers[1].mlp.eval()
    model.config.use_cache = True
    before = snapshot(model)
    record_skeleton(model, [token_batch(1, 6)])
    assert_unchanged(model, before)
    assert model.training
    assert not model.model.layers[1].mlp.training
    assert model.config.use_cache is True


@pytest.mark.parametrize("use_cache", [True, False])
def test_use_cache_is_off_inside_and_restored_after_an_error(use_cache):
    model = tiny_llama().train()
    model.config.use_cache = use_cache

    def fail():
        assert model.config.use_cache is False
        assert not any(module.training for module in model.modules())
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"), calibration_mode(model):
        fail()
    assert model.config.use_cache is use_cache
    assert all(module.training for module in model.modules())


def test_a_models_layers_are_run_in_evaluation_mode():
    model = tiny_llama(attention_dropout=0.5).train()
    first, second = (record_skeleton(model, [token_batch(1, 6)]) for _ in range(2))
    assert torch.equal(first.hidden[0], second.hidden[0])


def test_the_models_forward_is_restored_when_a_layer_fails():
    model = ToyModel().eval()

    def fail(*args, **kwargs):
        raise KeyError("inside")

    model.layers[0].forward = fail  # on the instance, as wrappers of a module's forward do
    before = snapshot(model)
    with pytest.raises(KeyError, match="inside"):
        record_skeleton(model, [token_batch(1, 4)])
    assert_unchanged(model, before)
    assert model.layers[0].forward is fail
    assert "forward" not in vars(model.layers[1])


def test_no_layer_but_the_first_of_its_class_is_run():
    model = ToyModel().eval()
    runs = []
    for name, layer in candidate_layers(model).items():
        layer.fc.register_forward_hook(lambda m, args, output, name=name: runs.append(name))
    record_skeleton(model, [token_batch(1, 4), token_batch(1, 4, seed=1)])
    assert runs == ["layers.0"]


def test_a_model_without_a_list_of_layers_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ModelStructureError, match=r"Sequential has no list of layers.*Expected a decoder"):
        record_skeleton(model, [token_batch(1, 4)])


class Odd(ToyModel):
    """A model that runs its layers in a way that cannot be calibrated layer by layer."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.passes = 0

    def run(self, hidden):
        self.passes += 1
        first, second, third = self.layers
        if self.how == "nothing":
            return hidden
        if self.how == "twice":
            return second(first(first(hidden)))
        if self.how == "between":
            return second(first(hidden) * 2)
        if self.how == "another order" and self.passes == 2:
            return third(first(second(hidden)))
        if self.how == "skipped" and self.passes == 2:
            return third(first(hidden))
        if self.how == "integers":
            return first(torch.ones(1, 4, dtype=torch.int64))
        if self.how == "no tensor":
            return first(None)
        return third(second(first(hidden)))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nothing", "ran none of its candidate decoder layers"),
        ("twice", r"layers\.0 runs twice in one forward pass"),
        ("between", r"layers\.1 does not receive what layers\.0 returned"),
        ("another order", "ran its layers in another order"),
        ("skipped", "switched off for calibration"),
        ("integers", "expected the hidden states, a floating-point tensor"),
        ("no tensor", "NoneType for its first parameter 'hidden_states'"),
    ],
)
def test_a_model_that_runs_its_layers_in_an_odd_way_is_refused_and_left_as_it_was(how, message):
    model = Odd(how)
    with pytest.raises(ModelStructureError, match=message):
        record_skeleton(model, [token_batch(1, 4), token_batch(1, 4, seed=1)])
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(module.training for module in model.modules())


def test_layers_that_are_not_run_are_not_named():
    class LastUnused(ToyModel):
        def run(self, hidden):
            return self.layers[1](self.layers[0](hidden))

    assert record_skeleton(LastUnused(), [token_batch(1, 4)]).layer_names == ["layers.0", "layers.1"]


def test_a_runner_casts_weights_and_floating_point_arguments_but_not_the_layers_own():
    layer = ToyLayer()
    call = LayerCall((HIDDEN,), {"bias": torch.arange(8)})
    hidden = torch.randn(1, 4, 8)
    weight = layer.fc.weight
    output = LayerRunner(layer, CPU, torch.float64)(call, hidden)
    assert output.dtype == torch.float64
    expected = ToyLayer.forward(layer.double(), hidden.double(), torch.arange(8))
    assert torch.equal(output, expected)
    assert layer.fc.weight is weight


def test_linears_are_found_by_their_names_in_the_layer():
    names = list(linears_in(tiny_llama().model.layers[0]))
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    assert names == [*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
