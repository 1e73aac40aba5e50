"""Results whose linears are on several grids or partly in full precision, read as servers read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from expert_models import mixtral, qwen3_moe
from models import tiny_llama, token_recipe
from references.readers_of_config import PARTS
from references.servers import SERVERS, NotServableError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_awq_offload import quantize_model, use_for_compressed_tensors
from hf_awq_offload.checkpoint.inspection import inspect_checkpoint
from hf_awq_offload.formats.compressed_tensors_config import PackedCheckpointConfig
from hf_awq_offload.formats.grid_choice import GridChoice
from hf_awq_offload.nn.quantized_linear import QuantizedLinear

EIGHT = {"bits": 8}
FOUR = GridChoice(4, 32, True)

CASES = {
    "q, k and v on a grid of their own": (tiny_llama, {"overrides": {"[qkv]_proj$": EIGHT}}),
    "gate and up on a grid of their own": (tiny_llama, {"overrides": {"(gate|up)_proj$": EIGHT}}),
    "down_proj of a dense model": (tiny_llama, {"overrides": {"down_proj$": EIGHT}}),
    "one layer": (tiny_llama, {"overrides": {r"layers\.1\.": EIGHT}}),
    "q, k and v dense": (tiny_llama, {"bits": 8, "modules_to_not_convert": ["q_proj", "k_proj", "v_proj"]}),
    "attention dense": (tiny_llama, {"bits": 8, "modules_to_not_convert": [r".*\.self_attn"]}),
    "gate and up of one layer dense": (
        tiny_llama,
        {"bits": 8, "modules_to_not_convert": [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up")]},
    ),
    "experts of Qwen3": (qwen3_moe, {"overrides": {r"\.experts\.": EIGHT}}),
    "experts of one layer of Qwen3": (qwen3_moe, {"overrides": {r"layers\.1\..*\.experts\.": EIGHT}}),
    "experts of Mixtral": (mixtral, {"overrides": {r"\.experts\.": EIGHT}}),
    "experts of one layer of Mixtral": (mixtral, {"overrides": {r"layers\.1\..*\.experts\.": EIGHT}}),
    "attention of Mixtral": (mixtral, {"overrides": {"self_attn": EIGHT}}),
    "experts of Qwen3 dense": (qwen3_moe, {"bits": 8, "modules_to_not_convert": [r".*\.experts\."]}),
    "experts of one layer of Mixtral dense": (mixtral, {"bits": 8, "modules_to_not_convert": ["model.layers.0.mlp"]}),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def folder(request, tmp_path_factory) -> Path:
    """A result that servers can load."""
    make, fields = request.param
    saved = tmp_path_factory.mktemp("served")
    quantize_model(make(), recipe(**fields)).save_pretrained(saved)
    return saved


def recipe(**fields: Any) -> Any:
    return token_recipe(**{"n_grid": 1, "rounding": "nearest", "format": "compressed-tensors", **fields})


def quantization_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def server_modules(folder: Path) -> dict[str, set[Any]]:
    """A server's modules -> how the linears that it puts into them are stored: (bits, group, zero point), or None."""
    stored: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name.endswith(".weight") and ".layers." in name and "norm" not in name:
                    stored[name.removesuffix(".weight")] = None
    for linear in inspect_checkpoint(folder).linears:
        stored[linear.name] = (linear.bits, linear.group_size, linear.zero_point)
    modules: dict[str, set[Any]] = {}
    for name, state in stored.items():
        modules.setdefault(server_module(name), set()).add(state)
    return modules


def server_module(name: str) -> str:
    before, experts, _ = name.partition(".experts.")
    if experts:
        return f"{before}.experts"
    module, _, last = name.rpartition(".")
    return next((f"{module}.{whole}" for whole, parts in PARTS.items() if last in parts), name)


def read(server: Any, config: dict[str, Any], name: str) -> Any:
    ask = server.weights_of_experts if name.endswith(".experts") else server.weights_of_linear
    weights = ask(config, name)
    return weights and (weights["num_bits"], weights["group_size"], not weights["symmetric"])


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_a_server_finds_for_each_module_how_its_linears_are_stored(folder, server):
    modules = server_modules(folder)
    assert any(name.endswith(("qkv_proj", "experts", "gate_up_proj")) for name in modules)
    for name, states in modules.items():
        assert {read(server, quantization_of(folder), name)} == states, name


def test_the_names_listed_for_servers_do_not_mislead_this_package(folder, monkeypatch):
    for mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        monkeypatch.setitem(mapping, "compressed-tensors", mapping["compressed-tensors"])  # restored afterwards
    use_for_compressed_tensors()
    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(loaded) == len(inspect_checkpoint(folder).linears)


REFUSED = {
    "v on another grid": (tiny_llama, {"overrides": {"v_proj$": EIGHT}}, "qkv_proj"),
    "v dense": (tiny_llama, {"modules_to_not_convert": ["v_proj"]}, "qkv_proj"),
    "up dense": (tiny_llama, {"modules_to_not_convert": ["up_proj"]}, "gate_up_proj"),
    "down_proj of experts": (qwen3_moe, {"overrides": {"down_proj$": EIGHT}}, "experts"),
    "up of experts dense": (qwen3_moe, {"modules_to_not_convert": ["up_proj"]}, "experts"),
}


@pytest.mark.parametrize(("make", "fields", "module"), REFUSED.values(), ids=REFUSED)
def test_what_no_server_can_load_is_warned_of(make, fields, module, tmp_path, caplog):
    quantize_model(make(), recipe(**fields)).save_pretrained(tmp_path)
    refused = [name for name in server_modules(tmp_path) if cannot_be_served(tmp_path, name)]
    assert {name.rpartition(".")[2] for name in refused} == {module}
    (text,) = [record.getMessage() for record in caplog.records if "vLLM and SGLang" in record.getMessage()]
    assert refused[0] in text or refused[1] in text
    assert f"(and {len(refused) - 1} more)" in text


def cannot_be_served(folder: Path, name: str) -> bool:
    try:
        return {read(SERVERS["vLLM"], quantization_of(folder), name)} != server_modules(folder)[name]
    except NotServableError:
        return True


@pytest.mark.parametrize(
    ("make", "fields"),
    [(make, fields) for make, fields in CASES.values()] + [(tiny_llama, {}), (qwen3_moe, {}), (mixtral, {})],
)
def test_nothing_is_said_of_what_servers_can_load(make, fields, caplog):
    quantize_model(make(), recipe(**fields))
    assert "vLLM and SGLang" not in caplog.text


def test_the_warning_comes_before_the_first_layer(caplog, monkeypatch):
    def stop(*args: Any, **kwargs: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr("hf_awq_offload.integrations.quantizer.quantize_layers", stop)
    with pytest.raises(InterruptedError):
        quantize_model(tiny_llama(), token_recipe(modules_to_not_convert=["v_proj"]))
    assert "vLLM and SGLang" in caplog.text


class TestZeroPoints:
    def model(self, **fields: Any) -> PreTrainedModel:
        return quantize_model(tiny_llama(), token_recipe(n_grid=0, clip=False, rounding="nearest", **fields))

    @pytest.mark.parametrize("fields", [{"bits": 2}, {"bits": 8, "zero_point": True}, {"format": "compressed-tensors"}])
    def test_a_warning_says_that_transformers_does_not_load_them(self, fields, caplog):
        self.model(**fields)
        assert "14 linears get zero points in the compressed-tensors format" in caplog.text
        assert "zero_point=False" in caplog.text

    @pytest.mark.parametrize("fields", [{}, {"bits": 8}, {"bits": 2, "zero_point": False}])
    def test_nothing_is_said_without_them_or_in_awq(self, fields, caplog):
        self.model(**fields)
        assert "zero points" not in caplog.text

    def test_8_bits_have_none_and_the_report_says_so(self, tmp_path):
        model = self.model(bits=8, report_dir=tmp_path)
        assert {module.grid.zero_point for module in model.modules() if isinstance(module, QuantizedLinear)} == {False}
        assert json.loads((tmp_path / "report.json").read_text())["settings"]["zero_point"] is False


def test_what_the_user_wrote_is_kept_where_no_reader_finds_it_in_a_quantized_name():
    """For linears that a server names in its own way, such as `self_attn.in_proj`."""
    attention = "model.layers.0.self_attn"
    chosen = {"n_grid": 0, "clip": False, "rounding": "nearest", "modules_to_not_convert": [attention, "up_proj"]}
    awq = quantize_model(tiny_llama(), token_recipe(**chosen)).config.quantization_config.modules_to_not_convert
    assert {attention, "up_proj"} <= {*awq}
    chosen["modules_to_not_convert"] = [attention, "model.layers.1"]
    deep = tiny_llama(num_hidden_layers=11)
    awq = quantize_model(deep, token_recipe(**chosen)).config.quantization_config.modules_to_not_convert
    assert "model.layers.1" not in awq, "part of the names in model.layers.10, which are quantized"
    assert "model.layers.1.mlp.up_proj" in awq
    chosen["modules_to_not_convert"] = [attention, "model.layers.0.mlp.up_proj"]
    packed = quantize_model(tiny_llama(), recipe(**chosen)).config.quantization_config.to_dict()
    server = SERVERS["SGLang, parts unknown"]
    assert server.weights_of_linear(packed, f"{attention}.in_proj") is None
    assert server.weights_of_linear(packed, f"{attention.replace('0', '1')}.in_proj") is not None


def test_a_name_is_not_found_within_that_of_a_quantized_linear():
    """SGLang looks for names of `ignore` anywhere in a name."""
    packed = PackedCheckpointConfig.of_linears(
        {"layer.mlp.gate_proj": FOUR, "layer.mlp.up_proj": FOUR}, {"layer.mlp.gate", "lm_head"}
    ).to_dict()
    assert "lm_head" in packed["ignore"]
    for server in SERVERS.values():
        assert server.weights_of_linear(packed, "layer.mlp.gate") is None
        assert server.weights_of_linear(packed, "layer.mlp.gate_up_proj") is not None
