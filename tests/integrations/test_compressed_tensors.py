"""compressed-tensors and transformers read our checkpoints of 2, 3, 4 and 8 bits exactly as we do."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_named_modules, match_targets
from expert_models import mixtral, qwen3_moe
from models import tiny_llama, tiny_qwen2, tiny_qwen3, token_batch
from peft import LoraConfig, get_peft_model
from references.compressed_tensors_reader import decompress
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from hf_awq_offload import (
    AwqLinear,
    AwqOffloadConfig,
    CheckpointError,
    ConfigError,
    PackedLinear,
    quantize_model,
    use_for_compressed_tensors,
)
from hf_awq_offload.formats.grid_choice import GridChoice
from hf_awq_offload.formats.pack_quantized import PackQuantizedWeight

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])
ZERO_POINT = pytest.mark.parametrize("zero_point", [True, False], ids=["asymmetric", "symmetric"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
INPUT = token_batch(2, 16, seed=5)
MIXED = {"down_proj$": {"bits": 8, "group_size": 32}, r"layers\.0\.self_attn\.k_proj": {"bits": 2, "zero_point": False}}


def make_recipe(**changes: Any) -> AwqOffloadConfig:
    fields = {"dataset": token_batch(4, 32), "n_samples": 4, "max_seq_len": 32, "n_grid": 3, "group_size": 32}
    return AwqOffloadConfig(**{"format": "compressed-tensors", **fields, **changes})


CACHE: dict[str, PreTrainedModel] = {}


def quantized(shape: dict[str, Any] | None = None, **fields: Any) -> PreTrainedModel:
    """A quantized tiny Llama, made once; tests must not change it."""
    key = repr((shape, fields))
    if key not in CACHE:
        CACHE[key] = quantize_model(tiny_llama(**shape or {}), make_recipe(**fields))
    return CACHE[key]


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(INPUT).logits


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))["quantization_config"]


def by_the_library(directory: Path, **kwargs: Any) -> PreTrainedModel:
    """Loads a checkpoint with transformers and compressed-tensors alone, without this package's loader."""
    config = CompressedTensorsConfig(dequantize=True)
    with as_registered(), warnings.catch_warnings():
        AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = CompressedTensorsConfig
        AUTO_QUANTIZER_MAPPING["compressed-tensors"] = CompressedTensorsHfQuantizer
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, **kwargs)


@contextmanager
def as_registered() -> Iterator[None]:
    """Restores on exit the quantizer that was registered for compressed-tensors checkpoints."""
    mappings: list[Any] = [AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING]
    before = [mapping["compressed-tensors"] for mapping in mappings]
    yield
    for mapping, value in zip(mappings, before, strict=True):
        mapping["compressed-tensors"] = value


@pytest.fixture
def ours() -> Iterator[None]:
    """Makes this package load every compressed-tensors checkpoint."""
    with as_registered():
        use_for_compressed_tensors()
        yield


def assert_same(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    assert packed_linears(model).keys() == packed_linears(expected).keys() != set()
    state, expected_state = model.state_dict(), expected.state_dict()
    assert state.keys() == expected_state.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected_state[name].dtype, name
        assert torch.equal(tensor, expected_state[name]), name
    assert torch.equal(logits(model), logits(expected))


@BITS
@ZERO_POINT
@pytest.mark.parametrize(("group_size", "shape"), [(-1, {}), (32, {}), (128, WIDE)], ids=["row", "32", "128"])
class TestRoundTrip:
    def test_ours_reloads_to_the_bit_and_saves_the_same_again(
        self, bits, zero_point, group_size, shape, tmp_path, ours
    ):
        model = quantized(bits=bits, zero_point=zero_point, group_size=group_size, shape=shape)
        model.save_pretrained(tmp_path / "first")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
        assert_same(reloaded, model)
        reloaded.save_pretrained(tmp_path / "second")
        assert config_of(tmp_path / "second") == config_of(tmp_path / "first")
        first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    def test_the_library_reads_the_weights_that_we_compute_with(self, bits, zero_point, group_size, shape, tmp_path):
        model = quantized(bits=bits, zero_point=zero_point, group_size=group_size, shape=shape)
        model.save_pretrained(tmp_path)
        dense = by_the_library(tmp_path)
        linears = packed_linears(model)
        assert len(linears) == 14
        for name, linear in linears.items():
            assert type(dense.get_submodule(name)) is nn.Linear
            assert torch.equal(dense.get_submodule(name).weight, linear.weight), name
        assert torch.equal(logits(dense), logits(model))

    def test_what_from_pretrained_does_without_being_told(self, bits, zero_point, group_size, shape, tmp_path):
        """transformers' own loader takes symmetric checkpoints, and leaves weights dense after the first pass."""
        model = quantized(bits=bits, zero_point=zero_point, group_size=group_size, shape=shape)
        model.save_pretrained(tmp_path)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(reloaded), logits(model))
        assert len(packed_linears(reloaded)) == (14 if zero_point else 0)


@BITS
@ZERO_POINT
@DTYPES
def test_from_pretrained_quantizes_in_every_dtype_and_reloads_in_it(bits, zero_point, dtype, tmp_path, ours):
    source = tiny_llama().to(dtype)
    source.save_pretrained(tmp_path / "source")
    recipe = make_recipe(bits=bits, zero_point=zero_point)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=recipe, dtype="auto")
    assert model.dtype == dtype
    model.save_pretrained(tmp_path / "quantized")
    stored = load_file(tmp_path / "quantized" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == dtype
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype="auto")
    assert_same(reloaded, model)
    dense = by_the_library_with_weights(tmp_path / "quantized", model)
    for name, linear in packed_linears(model).items():
        assert torch.equal(dense[name], linear.weight), name


def by_the_library_with_weights(directory: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the weights by name, decompressed linear by linear from the files' tensors."""
    stored = load_file(directory / "model.safetensors")
    weights = {}
    for name, linear in packed_linears(model).items():
        tensors = [stored.get(f"{name}.{tensor}") for tensor in PackQuantizedWeight._fields]
        weights[name] = decompress(PackQuantizedWeight(*tensors), linear.grid)
    return weights


@pytest.mark.parametrize("build", [tiny_qwen2, tiny_qwen3, tiny_llama])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "not tied"])
def test_biases_norms_and_tied_embeddings(build, tie, tmp_path, ours):
    model = quantize_model(build(tie_word_embeddings=tie), make_recipe(bits=8))
    model.save_pretrained(tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert torch.equal(logits(by_the_library(tmp_path)), logits(model))
    assert config_of(tmp_path)["ignore"] == ["lm_head"]


class TestFormats:
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({}, "awq"),
            ({"zero_point": False}, "awq"),
            ({"overrides": {"down_proj": {"bits": 4}}}, "awq"),
            ({"bits": 8}, "compressed-tensors"),
            ({"overrides": {"down_proj": {"bits": 8}}}, "compressed-tensors"),
            ({"overrides": {"down_proj": {"group_size": 64}}}, "compressed-tensors"),
            ({"overrides": {"down_proj": {"zero_point": False}}}, "compressed-tensors"),
            ({"format": "awq"}, "awq"),
            ({"format": "compressed-tensors"}, "compressed-tensors"),
        ],
        ids=str,
    )
    def test_auto_is_awq_where_it_can_hold_the_model(self, fields, expected):
        assert AwqOffloadConfig(**fields).checkpoint_format == expected

    @pytest.mark.parametrize("fields", [{"bits": 3}, {"bits": 8}, {"overrides": {"k_proj": {"bits": 8}}}], ids=str)
    def test_awq_of_other_bits_or_mixed_is_refused_at_once(self, fields):
        with pytest.raises(ConfigError, match=r"format is 'awq'.*compressed-tensors"):
            AwqOffloadConfig(format="awq", **fields)

    def test_the_same_model_in_both_formats_computes_the_same(self):
        awq = quantized(format="awq", backend="torch")
        packed = quantized(format="compressed-tensors")
        for name, linear in packed_linears(packed).items():
            other = awq.get_submodule(name)
            assert isinstance(other, AwqLinear)
            assert torch.equal(other.weight, linear.weight)
        torch.testing.assert_close(logits(packed), logits(awq))

    def test_what_is_saved_as_awq_says_nothing_of_it(self, tmp_path):
        quantized(format="auto").save_pretrained(tmp_path)
        assert config_of(tmp_path)["quant_method"] == "awq"


class TestConfig:
    def test_uniform(self, tmp_path):
        quantized(bits=3).save_pretrained(tmp_path)
        assert config_of(tmp_path) == {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "version": "0.18.0",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 3,
                        "type": "int",
                        "symmetric": False,
                        "strategy": "group",
                        "group_size": 32,
                        "dynamic": False,
                    },
                    "input_activations": None,
                    "output_activations": None,
                    "format": "pack-quantized",
                }
            },
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def test_how_it_was_made_stands_beside_the_standard(self, tmp_path, ours):
        quantized(bits=3).save_pretrained(tmp_path / "first")
        AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
        for name in ("first", "second"):
            meta = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))["quantization_meta"]
            assert meta["n_samples"] == 4
            assert meta["quantizer"][0].startswith("hf_awq_offload")

    @pytest.mark.parametrize("names", [["down_proj"], [r"model\.layers\.1\."], ["model.layers.0.mlp.up_proj"]], ids=str)
    def test_modules_not_converted_are_ignored_by_the_library_too(self, names, tmp_path, ours):
        model = quantized(bits=8, zero_point=False, modules_to_not_convert=names)
        model.save_pretrained(tmp_path)
        assert 0 < len(packed_linears(model)) < 14
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
        assert torch.equal(logits(by_the_library(tmp_path)), logits(model))
        assert library_grids(tmp_path) == grids(model)

    def test_mixed(self, tmp_path, ours):
        model = quantized(overrides=MIXED)
        assert grids(model) == {
            name: GridChoice(8, 32, False)
            if name.endswith("down_proj")
            else GridChoice(2, 32, False)
            if name == "model.layers.0.self_attn.k_proj"
            else GridChoice(4, 32, True)
            for name in packed_linears(model)
        }
        model.save_pretrained(tmp_path)
        assert library_grids(tmp_path) == grids(model)
        groups = config_of(tmp_path)["config_groups"].values()
        assert [group["targets"] for group in groups] == [
            ["Linear"],
            ["model.layers.0.self_attn.k_proj"],
            [r"re:model\.layers\.\d+\.mlp\.down_proj$"],
        ]
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
        dense = by_the_library_with_weights(tmp_path, model)
        assert all(torch.equal(dense[name], linear.weight) for name, linear in packed_linears(model).items())

    def test_mixed_and_symmetric_loads_in_transformers_alone(self, tmp_path):
        overrides = {"down_proj$": {"bits": 8}, "k_proj$": {"bits": 3}, r"layers\.1.*v_proj": {"group_size": -1}}
        model = quantized(overrides=overrides, zero_point=False)
        model.save_pretrained(tmp_path)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not packed_linears(stock)
        assert torch.equal(logits(stock), logits(model))


def grids(model: nn.Module) -> dict[str, GridChoice]:
    return {
        name: GridChoice(linear.grid.bits, linear.grid.group_size, linear.grid.zero_point)
        for name, linear in packed_linears(model).items()
    }


def library_grids(directory: Path) -> dict[str, GridChoice]:
    """Returns the grid of every linear as compressed-tensors reads config.json."""
    config = QuantizationConfig.model_validate(config_of(directory))
    schemes = {target: group.weights for group in config.config_groups.values() for target in group.targets}
    model = tiny_llama()
    found = {}
    for name, module in match_named_modules(model, schemes, config.ignore):
        weights = schemes[match_targets(name, module, schemes)[0]]
        group_size = weights.group_size or module.in_features
        found[name] = GridChoice(weights.num_bits, group_size, not weights.symmetric)
    return found


WITHOUT_THE_LIBRARY = """
import sys
sys.modules["compressed_tensors"] = None  # as if it were not installed
import torch
import hf_awq_offload
from transformers import AutoModelForCausalLM
source, target, tokens = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source)
assert any(isinstance(module, hf_awq_offload.PackedLinear) for module in model.modules())
model.save_pretrained(target)
with torch.no_grad():
    torch.save(model(torch.load(tokens)).logits, tokens)
"""


def test_where_compressed_tensors_is_not_installed_models_load_and_save(tmp_path, ours):
    model = quantized(bits=3, zero_point=False)
    model.save_pretrained(tmp_path / "first")
    torch.save(INPUT, tmp_path / "tokens.pt")
    paths = [str(tmp_path / name) for name in ("first", "second", "tokens.pt")]
    subprocess.run([sys.executable, "-c", WITHOUT_THE_LIBRARY, *paths], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "tokens.pt"), logits(model))
    assert config_of(tmp_path / "second") == config_of(tmp_path / "first")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "second"), model)


class TestDamage:
    """Errors name what is wrong with a checkpoint before any of its tensors is used."""

    def change(self, directory: Path, **tensors: Tensor | None) -> None:
        from safetensors.torch import save_file

        state = load_file(directory / "model.safetensors")
        for name, tensor in tensors.items():
            key = f"model.layers.0.mlp.up_proj.{name}"
            state = {other: value for other, value in state.items() if other != key}
            if tensor is not None:
                state[key] = tensor
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})

    @pytest.mark.parametrize("name", PackQuantizedWeight._fields[1:])
    def test_a_tensor_that_is_missing(self, name, tmp_path, ours):
        quantized(bits=3).save_pretrained(tmp_path)
        self.change(tmp_path, **{name: None})
        with pytest.raises(CheckpointError, match=rf"up_proj\.{name} is missing"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_the_layout_that_compressed_tensors_had_for_3_bits(self, tmp_path, ours):
        quantized(bits=3).save_pretrained(tmp_path)
        self.change(tmp_path, weight_packed=torch.zeros(96, 7, dtype=torch.int32))  # ten values to a word
        with pytest.raises(
            CheckpointError, match=r"up_proj\.weight_packed is int32 \(96, 7\); expected int32 \(96, 6\)"
        ):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_an_order_of_channels(self, tmp_path, ours):
        quantized(bits=3).save_pretrained(tmp_path)
        self.change(tmp_path, weight_g_idx=torch.arange(64))
        with pytest.raises(CheckpointError, match="permuted"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_a_packed_linear_that_the_config_ignores(self, tmp_path, ours):
        quantized(bits=3).save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["quantization_config"]["ignore"].append("model.layers.0.mlp.up_proj")
        path.write_text(json.dumps(fields), encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj is packed"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_linears_that_awq_can_not_hold_are_quantized(tmp_path, ours):
    """Output channels need not be a multiple of 8; zero points, which are packed along them, are padded."""
    shape = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}
    model = quantized(bits=3, shape=shape | {"hidden_size": 64})
    assert {linear.out_features for linear in packed_linears(model).values()} == {24, 12, 64}
    model.save_pretrained(tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert torch.equal(logits(by_the_library(tmp_path)), logits(model))


def test_a_group_size_that_does_not_divide_leaves_the_linear_dense(tmp_path, ours):
    model = quantized(bits=8, group_size=64, zero_point=False)
    assert {name.rpartition(".")[2] for name in packed_linears(model)}.isdisjoint({"down_proj"})
    model.save_pretrained(tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert torch.equal(logits(by_the_library(tmp_path)), logits(model))


class TestExperts:
    @pytest.mark.parametrize("build", [mixtral, qwen3_moe])
    @ZERO_POINT
    @pytest.mark.parametrize("bits", [3, 8])
    def test_they_are_stored_one_by_one_under_their_original_names_and_load(
        self, build, zero_point, bits, tmp_path, ours
    ):
        model = quantize_model(build(), make_recipe(bits=bits, zero_point=zero_point))
        model.save_pretrained(tmp_path)
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
        experts = {name for name in packed_linears(model) if ".experts." in name}
        assert len(experts) == 2 * 4 * 3
        assert any(".experts.3." in name and name.endswith("weight_packed") for name in load_file_of(tmp_path))

    @pytest.mark.parametrize("build", [mixtral, qwen3_moe])
    def test_transformers_alone_loads_symmetric_ones(self, build, tmp_path):
        model = quantize_model(build(), make_recipe(bits=8, zero_point=False))
        model.save_pretrained(tmp_path)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not packed_linears(stock)
        torch.testing.assert_close(logits(stock), logits(model))

    def test_routers_are_ignored_by_their_names_in_the_model_and_in_the_checkpoint(self, tmp_path):
        quantize_model(mixtral(), make_recipe(bits=8)).save_pretrained(tmp_path)
        assert config_of(tmp_path)["ignore"] == [
            "lm_head",
            r"re:model\.layers\.\d+\.block_sparse_moe\.gate$",
            r"re:model\.layers\.\d+\.mlp\.gate$",
        ]

    def test_overrides_of_experts(self, tmp_path, ours):
        overrides = {r"experts\.[02]\.": {"bits": 8}, "self_attn": {"zero_point": False}}
        model = quantize_model(qwen3_moe(), make_recipe(overrides=overrides))
        found = {name: linear.grid for name, linear in packed_linears(model).items()}
        assert all(grid.bits == (8 if ".experts.0." in n or ".experts.2." in n else 4) for n, grid in found.items())
        model.save_pretrained(tmp_path)
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
class TestAdapters:
    @pytest.mark.parametrize("bits", [3, 8])
    def test_lora_on_all_linears_trains_merges_and_comes_off_again(self, bits):
        model = copy.deepcopy(quantized(bits=bits))
        before = logits(model)
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
        adapted(INPUT, labels=INPUT).loss.backward()
        gradients = {name: value.grad for name, value in adapted.named_parameters() if value.requires_grad}
        assert len(gradients) == 2 * 14
        assert all(bool(gradient.abs().sum() > 0) for gradient in gradients.values())
        expected = logits(adapted)
        adapted.merge_adapter()
        torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
        adapted.unmerge_adapter()
        assert torch.equal(logits(adapted.unload()), before)

    def test_what_is_merged_is_dense_in_the_checkpoint(self, tmp_path, ours):
        model = copy.deepcopy(quantized(bits=8, zero_point=False))
        names = ["v_proj", "down_proj"]
        merged = get_peft_model(
            model, LoraConfig(target_modules=names, r=2, init_lora_weights=False)
        ).merge_and_unload()
        assert len(packed_linears(merged)) == 10
        merged.save_pretrained(tmp_path)
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), merged)
        assert torch.equal(logits(by_the_library(tmp_path)), logits(merged))


def load_file_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def test_dequantize_puts_plain_linears_back(tmp_path, ours):
    model = quantized(bits=3)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    dense.dequantize()
    assert not packed_linears(dense)
    torch.testing.assert_close(logits(dense), expected)
