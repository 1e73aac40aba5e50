"""config.json of results, read as servers and other releases of transformers read it (tests/references)."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import mixtral, qwen3_moe
from image_models import tiny_llava
from models import SHAPE, tiny_gemma3, tiny_gpt_oss, tiny_llama, token_batch, token_recipe
from references.readers_of_config import PARTS, SERVERS, TRANSFORMERS, model_dtype, rotary_embedding
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_awq_offload import AwqLinear, quantize, quantize_model
from hf_awq_offload.checkpoint.conversion import convert_checkpoint
from hf_awq_offload.checkpoint.inspection import inspect_checkpoint
from hf_awq_offload.nn.packed_linear import PackedLinear

MODELS = {
    "llama": tiny_llama,
    "llama-without-attention": tiny_llama,
    "mixtral": mixtral,
    "qwen3-moe": qwen3_moe,
    "gpt-oss": tiny_gpt_oss,
    "gemma3": tiny_gemma3,
    "llava": tiny_llava,
}
FIELDS: dict[str, dict[str, Any]] = {"llama-without-attention": {"modules_to_not_convert": [r".*\.self_attn"]}}


@pytest.fixture(scope="module", params=MODELS)
def result(request, tmp_path_factory) -> tuple[PreTrainedModel, Path]:
    """A quantized model, and where it was saved."""
    folder = tmp_path_factory.mktemp(request.param)
    fields = {"n_grid": 1, "rounding": "nearest", **FIELDS.get(request.param, {})}
    model = quantize_model(MODELS[request.param](), token_recipe(**fields))
    model.save_pretrained(folder)
    assert (request.param in FIELDS) == (
        "named in modules_to_not_convert" in model.hf_quantizer.report.left_out.values()
    )
    return model, folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def not_converted(folder: Path) -> list[str]:
    return config_of(folder)["quantization_config"]["modules_to_not_convert"]


def modules_in_files(folder: Path) -> tuple[set[str], set[str]]:
    """Names of packed linears, and of modules with a matrix `weight` that is no table of embeddings."""
    packed, dense = set(), set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                module, _, tensor = name.rpartition(".")
                if tensor == "qweight":
                    packed.add(module)
                elif tensor == "weight" and len(opened.get_slice(name).get_shape()) == 2 and "embed" not in module:
                    dense.add(module)
    return packed, dense


def fused(names: set[str]) -> set[str]:
    """`names`, with those that a server fuses under the name of the whole."""
    found = set(names)
    for whole, parts in PARTS.items():
        of_module: defaultdict[str, set[str]] = defaultdict(set)
        for name in names:
            module, _, last = name.rpartition(".")
            of_module[module] |= {last} & set(parts)
        for module, there in of_module.items():
            if there == set(parts):
                found = found - {f"{module}.{part}" for part in parts} | {f"{module}.{whole}"}
    return found


@pytest.mark.parametrize("rule", SERVERS.values(), ids=SERVERS)
def test_servers_take_exactly_the_packed_linears_for_quantized_ones(result, rule):
    _, folder = result
    packed, dense = modules_in_files(folder)
    assert packed
    for name in fused(packed):
        assert not rule(name, not_converted(folder)), name
    for name in fused(dense):
        assert rule(name, not_converted(folder)), name


@pytest.mark.parametrize("rule", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_transformers_replaces_exactly_the_quantized_linears(result, rule):
    model, folder = result
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | AwqLinear):
            assert rule(name, not_converted(folder)) != isinstance(module, AwqLinear), name


def test_routers_are_named(result):
    model, folder = result
    routers = {name for name, _ in model.named_modules() if name.endswith(("mlp.gate", "mlp.router"))}
    assert routers <= set(not_converted(folder))


def test_the_result_loads_again(result):
    model, folder = result
    again = type(model).from_pretrained(folder)
    expected = {name for name, module in model.named_modules() if isinstance(module, AwqLinear)}
    assert {name for name, module in again.named_modules() if isinstance(module, AwqLinear)} == expected


def test_weights_that_are_no_safetensors_are_recognized_by_the_config_alone(tmp_path):
    model = quantize_model(tiny_llama(), token_recipe(n_grid=1, modules_to_not_convert=[r".*\.self_attn"]))
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = token_batch(1, 8)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


class Router(nn.Module):
    """Holds a matrix and is no linear, as routers of transformers 5."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, SHAPE["hidden_size"]))


def with_router() -> PreTrainedModel:
    """A model with a router whose name is part of that of a linear."""
    model = tiny_llama()
    model.model.layers[1].mlp.gate = Router()
    return model


class TestANameWithinAnother:
    def test_the_longer_one_stays_dense_and_the_report_says_why(self, tmp_path):
        model = quantize_model(with_router(), token_recipe(n_grid=1))
        clashing = model.model.layers[1].mlp.gate_proj
        assert not isinstance(clashing, AwqLinear)
        assert isinstance(model.model.layers[0].mlp.gate_proj, AwqLinear)
        reason = model.hf_quantizer.report.left_out["model.layers.1.mlp.gate_proj"]
        assert reason.startswith("its name contains that of a module in full precision (….gate)")
        model.save_pretrained(tmp_path)
        for rule in [*SERVERS.values(), *TRANSFORMERS.values()]:
            assert rule("model.layers.1.mlp.gate", not_converted(tmp_path))
            assert rule("model.layers.1.mlp.gate_proj", not_converted(tmp_path))
            assert not rule("model.layers.1.mlp.down_proj", not_converted(tmp_path))

    def test_compressed_tensors_compares_whole_names(self):
        model = quantize_model(with_router(), token_recipe(n_grid=1, format="compressed-tensors"))
        assert isinstance(model.model.layers[1].mlp.gate_proj, PackedLinear)
        ignored = model.config.quantization_config.ignore
        assert "model.layers.1.mlp.gate" in ignored or r"re:model\.layers\.\d+\.mlp\.gate$" in ignored

    def test_a_linear_that_turns_out_to_be_unused_is_warned_of(self, caplog):
        model = tiny_llama()
        model.model.layers[1].mlp.gate = nn.Linear(SHAPE["hidden_size"], 64)  # calibration does not reach it
        quantize_model(model, token_recipe(n_grid=1))
        assert "model.layers.1.mlp.gate stays in full precision, and its name is part of that of" in caplog.text


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(scope="module")
def scaled(tmp_path_factory) -> Path:
    """A checkpoint whose config.json transformers 4 has written."""
    folder = tmp_path_factory.mktemp("scaled")
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)
    fields = {name: value for name, value in config_of(folder).items() if name not in ("rope_parameters", "dtype")}
    older = {"rope_theta": 500000.0, "rope_scaling": SCALED, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(fields | older))
    return folder


def write_streamed(source: Path, folder: Path) -> None:
    quantize(source, folder, token_recipe(n_grid=1))


def write_saved(source: Path, folder: Path) -> None:
    recipe = token_recipe(n_grid=1)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=recipe).save_pretrained(folder)


def write_loaded_and_saved(source: Path, folder: Path) -> None:
    write_saved(source, folder.parent / "first")
    AutoModelForCausalLM.from_pretrained(folder.parent / "first").save_pretrained(folder)


def write_converted(source: Path, folder: Path) -> None:
    write_saved(source, folder.parent / "first")
    fields = config_of(folder.parent / "first")
    for name in ("rope_theta", "rope_scaling", "torch_dtype"):  # as an earlier release of this package wrote it
        del fields[name]
    (folder.parent / "first" / "config.json").write_text(json.dumps(fields))
    convert_checkpoint(folder.parent / "first", folder, "compressed-tensors", scale_dtype=torch.float16)


@pytest.mark.parametrize("write", [write_streamed, write_saved, write_loaded_and_saved, write_converted])
def test_a_reader_built_on_transformers_4_finds_base_scaling_and_dtype(scaled, tmp_path, write):
    write(scaled, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert rotary_embedding(config) == (500000.0, SCALED)
    assert model_dtype(config) == "bfloat16"
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == SCALED
    assert config["rope_parameters"] == {**SCALED, "rope_theta": 500000.0}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.rope_parameters == {**SCALED, "rope_theta": 500000.0}
    assert not hasattr(again.config, "rope_theta")


def test_parts_of_a_model_have_the_older_keys_too(tmp_path):
    model = tiny_llava().to(torch.bfloat16)
    model.config.text_config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 20000.0}
    quantize_model(model, token_recipe(n_grid=1)).save_pretrained(tmp_path)
    text = config_of(tmp_path)["text_config"]
    assert rotary_embedding(text) == (20000.0, {"rope_type": "linear", "factor": 2.0})
    assert model_dtype(config_of(tmp_path)) == "bfloat16"


def test_a_base_per_layer_type(tmp_path):
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    }
    quantize_model(tiny_gemma3(rope_parameters=rope), token_recipe(n_grid=1)).save_pretrained(tmp_path)
    config = config_of(tmp_path)
    assert rotary_embedding(config) == (2e6, {"rope_type": "linear", "factor": 8.0})
    assert config["rope_local_base_freq"] == 5000.0
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.rope_parameters == rope


def test_converting_names_what_is_dense(tmp_path):
    """Also of experts, which the model holds in one module and the files one by one."""
    quantize_model(mixtral(), token_recipe(n_grid=1, format="compressed-tensors")).save_pretrained(tmp_path / "packed")
    convert_checkpoint(tmp_path / "packed", tmp_path / "awq", "gemm")
    quantize_model(mixtral(), token_recipe(n_grid=1)).save_pretrained(tmp_path / "direct")
    assert not_converted(tmp_path / "awq") == not_converted(tmp_path / "direct")
    assert not inspect_checkpoint(tmp_path / "awq").findings
    convert_checkpoint(tmp_path / "direct", tmp_path / "back", "compressed-tensors", scale_dtype=torch.float32)
    ignored = [config_of(tmp_path / name)["quantization_config"]["ignore"] for name in ("packed", "back")]
    assert ignored[0] == ignored[1]


def test_the_report_says_over_how_many_devices_the_model_can_be_split(tmp_path):
    tiny_llama(intermediate_size=96).save_pretrained(tmp_path / "source")  # three groups of 32
    report = quantize(tmp_path / "source", tmp_path / "out", token_recipe(n_grid=1))
    assert "down_proj has 3 groups of 32 input channels" in report.tensor_parallel
    assert report.tensor_parallel.startswith("Tensor parallelism: servers can't split this model over 2, 4 or 8")
