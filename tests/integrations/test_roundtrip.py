"""Quantize, save, reload: nothing changes on the way, and what is saved is what the AWQ format says.

Models are tiny and random, calibration data is token ids, so that no tokenizer is needed.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from references.awq_reader import COLUMN_OF_POSITION, read_model, read_state_dict, unpack_words
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from hf_awq_offload import AwqLinear, AwqOffloadConfig, ConfigError, ModelStructureError, NumericalError, quantize_model

VOCABULARY = 320
N_SAMPLES, SEQ_LEN = 4, 40
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
# Windows are shorter than the sequences, so that the layers' masks differ.
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama_tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama_biases": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=16),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "gemma": lambda: GemmaConfig(**SHAPE),
    "gemma2": lambda: Gemma2Config(**SHAPE, **WINDOW, query_pre_attn_scalar=32),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, **WINDOW, query_pre_attn_scalar=32),
}
MAX_RELATIVE_ERROR = 0.4
"""Allowed error of logits of quantized random weights: 0.02 to 0.31 is seen; a fold that does not cancel costs 1."""
CONFIG_FIELDS = {
    "quant_method",
    "bits",
    "group_size",
    "zero_point",
    "version",
    "modules_to_not_convert",
    "desc_act",
    "lm_head",
    "meta",
}


def make_recipe(**changes) -> AwqOffloadConfig:
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(VOCABULARY, (N_SAMPLES, SEQ_LEN), generator=generator).tolist()
    fields = {"dataset": token_ids, "n_samples": N_SAMPLES, "max_seq_len": SEQ_LEN, "n_grid": 4}
    return AwqOffloadConfig(**{**fields, **changes})


def make_model(architecture: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """Builds a random model whose norms are not all ones and biases not zero, with a few outlier channels."""
    config = ARCHITECTURES[architecture]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.add_(torch.rand_like(parameter) - 0.5)
                if "q_norm" not in name and "k_norm" not in name:  # loud there, attention would be a lottery
                    parameter[:3] *= 8
    return model.to(dtype)


def save_model(directory: Path, *args, **kwargs) -> Path:
    make_model(*args, **kwargs).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A full-precision Llama, saved on disk."""
    return save_model(tmp_path_factory.mktemp("source"))


@dataclass
class Quantized:
    model: PreTrainedModel
    directory: Path


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory) -> Quantized:
    """The source model, quantized and saved; tests must not change it."""
    return quantize_and_save(source, tmp_path_factory.mktemp("quantized"))


def quantize_and_save(source: Path, directory: Path, recipe: AwqOffloadConfig | None = None, **kwargs) -> Quantized:
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=recipe or make_recipe(), **kwargs)
    model.save_pretrained(directory)
    return Quantized(model, directory)


def load(directory: Path, **kwargs) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **kwargs)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Returns logits (2, tokens, vocabulary) on token ids unseen in calibration, longer than the sliding windows."""
    generator = torch.Generator().manual_seed(2)
    token_ids = torch.randint(VOCABULARY, (2, SEQ_LEN), generator=generator)
    result = model.eval()(input_ids=token_ids).logits
    assert result.isfinite().all()
    return result


def decoder_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)}


def not_quantized(model: PreTrainedModel) -> set[str]:
    return {name for name, linear in decoder_linears(model).items() if not isinstance(linear, AwqLinear)}


def assert_same_state(
    model: PreTrainedModel | dict[str, Tensor],
    expected: PreTrainedModel | dict[str, Tensor],
) -> None:
    """Asserts equal names, dtypes and bits."""
    actual_state = model if isinstance(model, dict) else model.state_dict()
    expected_state = expected if isinstance(expected, dict) else expected.state_dict()
    assert actual_state.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        assert actual_state[name].dtype == tensor.dtype, name
        assert torch.equal(actual_state[name], tensor), name


def assert_close_to_reader(model: PreTrainedModel, directory: Path) -> None:
    """`model`, in fp32, computes what the independent reader's model does.

    Dequantization is exact in fp32, so that only the order of the sums in the products may differ: 2⁻²⁴ relative
    per operation, some hundred operations on the way to a logit; 1e-5 of the largest logit is a few times that.
    A wrong nibble, zero or scale shows at 1e-2.
    """
    expected = logits(read_model(directory))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


class TestSaveAndReload:
    def test_reloaded_tensors_and_logits_are_the_same(self, quantized):
        reloaded = load(quantized.directory)
        assert not not_quantized(reloaded)
        assert_same_state(reloaded, quantized.model)
        assert torch.equal(logits(reloaded), logits(quantized.model))

    def test_the_reader_agrees(self, quantized):
        assert_close_to_reader(load(quantized.directory), quantized.directory)

    def test_dequantized_weights_are_the_readers_bits(self, quantized):
        state = read_state_dict(quantized.directory)
        for name, linear in decoder_linears(quantized.model).items():
            assert torch.equal(linear.weight, state[f"model.layers.{name}.weight"])

    def test_tensors_have_the_formats_shapes_and_dtypes(self, quantized):
        for linear in decoder_linears(load(quantized.directory)).values():
            groups, words = linear.in_features // 128, linear.out_features // 8
            assert (linear.qweight.dtype, linear.qweight.shape) == (torch.int32, (linear.in_features, words))
            assert (linear.qzeros.dtype, linear.qzeros.shape) == (torch.int32, (groups, words))
            assert (linear.scales.dtype, linear.scales.shape) == (torch.float16, (groups, linear.out_features))

    def test_saving_the_reloaded_model_changes_nothing(self, quantized, tmp_path):
        load(quantized.directory).save_pretrained(tmp_path)
        assert (tmp_path / "config.json").read_text() == (quantized.directory / "config.json").read_text()
        assert_same_state(load(tmp_path), quantized.model)

    @pytest.mark.parametrize(
        ("dtype", "epsilon"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=["bf16", "fp16"]
    )
    def test_half_precision_source(self, tmp_path, dtype, epsilon):
        source = save_model(tmp_path / "source", dtype=dtype)
        result = quantize_and_save(source, tmp_path / "quantized", dtype="auto")
        reloaded = load(result.directory, dtype="auto")
        assert reloaded.dtype == dtype
        assert_same_state(reloaded, result.model)
        assert torch.equal(logits(reloaded), logits(result.model))
        # The same checkpoint read in fp32: no rounding but the sums'.
        assert_close_to_reader(load(result.directory, dtype=torch.float32), result.directory)
        # Read in its own dtype: weights are rounded once more, or twice (the scale, then the product) ...
        state = read_state_dict(result.directory, dtype=dtype)
        for name, linear in decoder_linears(reloaded).items():
            torch.testing.assert_close(linear.weight, state[f"model.layers.{name}.weight"], rtol=2 * epsilon, atol=0)
        # ... and so is what every block returns; such errors add up to some epsilons in a logit.
        expected = logits(read_model(result.directory, dtype=dtype)).float()
        bound = 8 * epsilon * expected.abs().max().item()
        torch.testing.assert_close(logits(reloaded).float(), expected, rtol=0, atol=bound)

    def test_sharded(self, source, quantized, tmp_path):
        quantized.model.save_pretrained(tmp_path, max_shard_size="200KB")
        shards = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
        assert len(shards) > 1
        reloaded = load(tmp_path)
        assert_same_state(reloaded, quantized.model)
        assert_close_to_reader(reloaded, tmp_path)
        assert_same_state(read_state_dict(tmp_path), read_state_dict(quantized.directory))

    def test_sharded_source(self, quantized, tmp_path):
        make_model().save_pretrained(tmp_path / "source", max_shard_size="200KB")
        assert (tmp_path / "source" / "model.safetensors.index.json").exists()
        assert_same_state(load(tmp_path / "source", quantization_config=make_recipe()), quantized.model)

    def test_reloaded_model_is_in_evaluation_mode(self, quantized):
        for model in (quantized.model, load(quantized.directory)):
            assert not [name for name, module in model.named_modules() if module.training]

    def test_generation_after_reload(self, quantized):
        reloaded = load(quantized.directory)
        prompt = torch.tensor([[5, 6, 7]])
        generated = reloaded.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert generated.shape == (1, 8)
        reader = read_model(quantized.directory)
        assert torch.equal(generated, reader.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False))

    def test_no_gptqmodel_is_needed(self, quantized):
        if importlib.util.find_spec("gptqmodel") is not None:
            pytest.skip("gptqmodel is installed, and transformers' own loader is left in charge")
        assert not not_quantized(load(quantized.directory))
        assert "gptqmodel" not in sys.modules


class TestFormats:
    @pytest.mark.parametrize("zero_point", [True, False], ids=["asymmetric", "symmetric"])
    @pytest.mark.parametrize("group_size", [-1, 32, 64])
    def test_group_sizes_and_grids(self, source, tmp_path, group_size, zero_point):
        recipe = make_recipe(group_size=group_size, zero_point=zero_point)
        result = quantize_and_save(source, tmp_path, recipe)
        reloaded = load(tmp_path)
        assert_same_state(reloaded, result.model)
        assert torch.equal(logits(reloaded), logits(result.model))
        assert_close_to_reader(reloaded, tmp_path)
        for linear in decoder_linears(reloaded).values():
            effective = linear.in_features if group_size == -1 else group_size
            assert linear.scales.shape[0] == linear.in_features // effective
        stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        assert (stored["group_size"], stored["zero_point"]) == (group_size, zero_point)

    def test_symmetric_grids_have_their_zero_at_eight(self, source):
        model = load(source, quantization_config=make_recipe(zero_point=False))
        eights = torch.tensor(0x88888888 - 2**32, dtype=torch.int32)
        for linear in decoder_linears(model).values():
            assert (linear.qzeros == eights).all()

    def test_rounding_to_nearest_errs_by_half_a_step(self, source, tmp_path):
        """Without searches the stored weight is the original one, rounded; scales rounded to fp16 add 1 %."""
        quantize_and_save(source, tmp_path, make_recipe(n_grid=0, clip=False, rounding="nearest"))
        reloaded, rounded = load(tmp_path), read_state_dict(tmp_path)
        for name, original in make_model().state_dict().items():
            if name.endswith("proj.weight"):
                step = reloaded.get_submodule(name.removesuffix(".weight")).scales.float()  # (in / g, out)
                step = step.repeat_interleave(128, dim=0).T  # (out, in)
                assert ((rounded[name] - original).abs() <= 0.51 * step).all()
            else:
                assert torch.equal(rounded[name], original)

    def test_the_reader_unpacks_the_documented_order(self):
        """Guards the reference itself: value i of the word goes to the column that the format names."""
        word = sum(column << (4 * i) for i, column in enumerate(COLUMN_OF_POSITION))
        words = torch.tensor([[word - 2**32 if word >= 2**31 else word]], dtype=torch.int32).numpy()
        assert unpack_words(words).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


class TestStoredConfig:
    def test_exactly_the_standard_fields(self, quantized):
        stored = json.loads((quantized.directory / "config.json").read_text())["quantization_config"]
        assert stored.keys() == CONFIG_FIELDS
        meta = stored.pop("meta")
        assert isinstance(meta, dict)
        names = stored.pop("modules_to_not_convert")
        assert names is None or set(names) <= {"lm_head"}
        assert stored == {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "version": "gemm",
            "desc_act": False,
            "lm_head": False,
        }

    def test_no_calibration_text_is_saved(self, source, tmp_path):
        words = ["confidential", "payroll", "diagnosis", "passphrase"]
        vocabulary = {"<unk>": 0, **{word: index + 1 for index, word in enumerate(words)}}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        recipe = make_recipe(
            dataset=[" ".join(words * 10)] * N_SAMPLES,
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"),
        )
        quantize_and_save(source, tmp_path, recipe)
        for path in tmp_path.iterdir():
            content = path.read_bytes()
            assert " ".join(words).encode() not in content, path.name
            if path.name != "tokenizer.json":  # the tokenizer's vocabulary is not the text
                assert not [word for word in words if word.encode() in content], path.name

    def test_no_calibration_token_ids_are_saved(self, quantized):
        text = (quantized.directory / "config.json").read_text()
        first_ids = make_recipe().dataset[0][:3]
        assert ", ".join(map(str, first_ids)) not in " ".join(text.split())

    def test_an_unknown_field_is_named_with_the_nearest_one(self):
        with pytest.raises(ConfigError, match=r"grup_size.*group_size"):
            AwqOffloadConfig(grup_size=64)


class TestWhatStaysInFullPrecision:
    def test_unpackable_shapes_are_listed_in_one_warning(self, tmp_path, caplog):
        """72 input channels hold no group of 128: both down projections stay as they are."""
        source = save_model(tmp_path / "source", intermediate_size=72)
        left_out = {"0.mlp.down_proj", "1.mlp.down_proj"}
        with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
            warnings.simplefilter("always")
            result = quantize_and_save(source, tmp_path / "quantized")
        messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        messages += [str(warning.message) for warning in caught]
        about = [message for message in messages if "down_proj" in message]
        assert len(about) == 1
        assert all(f"layers.{name}" in about[0] for name in left_out)
        assert not [name for name in ("q_proj", "up_proj", "gate_proj") if name in about[0]]

        assert not_quantized(result.model) == left_out
        reloaded = load(result.directory)
        assert not_quantized(reloaded) == left_out
        assert_same_state(reloaded, result.model)
        assert_close_to_reader(reloaded, result.directory)

    def test_output_channels_that_fill_no_word(self, tmp_path):
        """Heads of 30 channels: 60 outputs of k and v are no multiple of 8, 120 inputs of o hold no group of 128."""
        source = save_model(tmp_path / "source", head_dim=30)
        result = quantize_and_save(source, tmp_path / "quantized")
        left_out = {f"{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "kvo"}
        assert not_quantized(result.model) == left_out
        reloaded = load(result.directory)
        assert not_quantized(reloaded) == left_out
        assert torch.equal(logits(reloaded), logits(result.model))
        assert_close_to_reader(reloaded, result.directory)

    @pytest.mark.parametrize(
        ("names", "left_out"),
        [
            (["down_proj"], {"0.mlp.down_proj", "1.mlp.down_proj"}),
            (["model.layers.1.self_attn.v_proj"], {"1.self_attn.v_proj"}),
            (["lm_head", "model.layers.0.mlp"], {f"0.mlp.{name}_proj" for name in ("gate", "up", "down")}),
        ],
        ids=["suffix", "full name", "prefix"],
    )
    def test_modules_to_not_convert(self, source, tmp_path, names, left_out):
        result = quantize_and_save(source, tmp_path, make_recipe(modules_to_not_convert=names))
        assert not_quantized(result.model) == left_out
        reloaded = load(tmp_path)
        assert not_quantized(reloaded) == left_out
        assert_same_state(reloaded, result.model)
        assert_close_to_reader(reloaded, tmp_path)

    def test_embeddings_and_head_stay(self, quantized):
        state, original = quantized.model.state_dict(), make_model().state_dict()
        for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
            assert torch.equal(state[name], original[name])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture, tmp_path):
    source = save_model(tmp_path / "source", architecture)
    result = quantize_and_save(source, tmp_path / "quantized")
    assert len(decoder_linears(result.model)) == 14
    assert not not_quantized(result.model)
    reloaded = load(result.directory)
    assert not not_quantized(reloaded)
    assert_same_state(reloaded, result.model)
    assert torch.equal(logits(reloaded), logits(result.model))
    assert_close_to_reader(reloaded, result.directory)
    expected = logits(load(source))
    error = (logits(result.model) - expected).norm() / expected.norm()
    assert error < MAX_RELATIVE_ERROR


DEGENERATE: dict[str, Callable[[nn.Module], object]] = {
    "dead input channel": lambda layer: layer.input_layernorm.weight[5].zero_(),
    "negative norm weight": lambda layer: layer.input_layernorm.weight[5].neg_(),
    "row of zeros": lambda layer: layer.mlp.up_proj.weight[5].zero_(),
    "weight of zeros": lambda layer: layer.mlp.down_proj.weight.zero_(),
    "constant weight": lambda layer: layer.mlp.up_proj.weight.fill_(0.3),
    "far from zero": lambda layer: layer.mlp.up_proj.weight.abs_().add_(1),
    "tiny": lambda layer: layer.mlp.down_proj.weight.mul_(1e-5),
}


@pytest.mark.parametrize("change", DEGENERATE)
def test_degenerate_weights(change, tmp_path):
    model = make_model()
    with torch.no_grad():
        DEGENERATE[change](model.model.layers[0])
    expected = logits(model)
    quantize_model(model, make_recipe())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert (logits(model) - expected).norm() / expected.norm() < MAX_RELATIVE_ERROR
    model.save_pretrained(tmp_path)
    assert_close_to_reader(model, tmp_path)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_device_maps(source, quantized, device_map):
    model = load(source, quantization_config=make_recipe(), device_map=device_map)
    assert_same_state(model, quantized.model)
    assert_same_state(load(quantized.directory, device_map=device_map), quantized.model)
    assert torch.equal(logits(model), logits(quantized.model))


class TestInMemory:
    def test_bit_identical_to_from_pretrained(self, source, quantized):
        model = load(source)
        assert quantize_model(model, make_recipe()) is model
        assert_same_state(model, quantized.model)

    def test_a_model_that_was_never_saved(self, quantized, tmp_path):
        model = quantize_model(make_model(), make_recipe())
        assert_same_state(model, quantized.model)
        model.save_pretrained(tmp_path)
        assert_same_state(load(tmp_path), quantized.model)

    def test_bit_identical_in_bf16(self, tmp_path):
        source = save_model(tmp_path, dtype=torch.bfloat16)
        expected = load(source, dtype="auto", quantization_config=make_recipe())
        assert_same_state(quantize_model(load(source, dtype="auto"), make_recipe()), expected)

    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    def test_modes_are_restored(self, use_cache, training):
        model = make_model().train(training)
        model.config.use_cache = use_cache
        quantize_model(model, make_recipe(n_grid=1))
        assert model.config.use_cache is use_cache
        assert all(module.training is training for module in model.modules())

    def test_modes_are_restored_per_module(self):
        model = make_model().train()
        model.model.layers[0].eval()
        expected = {name: module.training for name, module in model.named_modules()}
        quantize_model(model, make_recipe(n_grid=1))
        assert {name: module.training for name, module in model.named_modules()} == expected

    def test_no_hooks_are_left(self):
        model = quantize_model(make_model(), make_recipe(n_grid=1))
        for name, module in model.named_modules():
            assert not module._forward_pre_hooks, name
            assert not module._forward_hooks, name
            assert "forward" not in vars(module), name

    def test_what_is_no_transformers_model_is_refused(self):
        with pytest.raises(ModelStructureError, match="Linear"):
            quantize_model(torch.nn.Linear(8, 8), make_recipe())

    def test_quantizing_twice_is_refused_and_harmless(self):
        model = quantize_model(make_model(), make_recipe(n_grid=1))
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="quantized"):
            quantize_model(model, make_recipe(n_grid=1))
        assert_same_state(model, before)


class TestFailureInTheMiddle:
    def test_infinite_weight(self):
        """Layer 0 is quantized when layer 1 turns out to be broken; afterwards the model is as it was."""
        model = make_model().train()
        model.config.use_cache = True
        weight = model.model.layers[1].mlp.up_proj.weight
        intact = weight[0, 0].item()
        with torch.no_grad():
            weight[0, 0] = float("inf")
        before = copy.deepcopy(model.state_dict())
        parameters = dict(model.named_parameters())
        with pytest.raises(NumericalError, match=r"layers\.1"):
            quantize_model(model, make_recipe())
        assert_same_state(model, before)
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert model.training
        assert model.config.use_cache is True
        assert getattr(model.config, "quantization_config", None) is None

        with torch.no_grad():
            weight[0, 0] = intact
        assert torch.equal(logits(model), logits(make_model()))
        assert_same_state(quantize_model(model, make_recipe()), quantize_model(make_model(), make_recipe()))

    def test_interruption(self):
        """Ctrl-C inside layer 1, after layer 0 was done."""
        model = make_model()
        before = copy.deepcopy(model.state_dict())
        calls = 0

        def interrupt(module: nn.Module, args: tuple) -> None:
            nonlocal calls
            calls += 1
            if isinstance(model.model.layers[0].mlp.up_proj, AwqLinear):
                raise KeyboardInterrupt

        handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(model, make_recipe())
        handle.remove()
        assert calls
        assert_same_state(model, before)
        assert torch.equal(logits(model), logits(make_model()))

    @pytest.mark.parametrize("changes", [{}, {"n_grid": 0, "clip": False}], ids=["searches", "round to nearest"])
    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    @pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.down_proj"])
    def test_every_weight_must_be_finite(self, name, value, changes):
        """Holds even where no activation shows it: in the last weights, and without calibration."""
        model = make_model()
        with torch.no_grad():
            model.model.layers[1].get_submodule(name).weight[3, 5] = value
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(NumericalError, match=r"layers\.1"):
            quantize_model(model, make_recipe(**changes))
        for tensor_name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[tensor_name], rtol=0, atol=0, equal_nan=True)

    def test_from_pretrained_names_the_layer(self, tmp_path):
        model = make_model()
        with torch.no_grad():
            model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("inf")
        model.save_pretrained(tmp_path)
        with pytest.raises(NumericalError, match=r"layers\.1"):
            load(tmp_path, quantization_config=make_recipe())
