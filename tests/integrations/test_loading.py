"""AWQ checkpoints of every version and maker load to the right weights, and broken ones are refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from references.awq_reader import read_model, read_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel

from hf_awq_offload import AwqLinear, AwqOffloadConfig, CheckpointError, ConfigError, quantize_model

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"
MAKERS = ["autoawq-gemm", "autoawq-gemv", "autoawq-gemv-fast", "gptqmodel-gemm"]
GEMM_OF = {"autoawq-gemv": "autoawq-gemm", "autoawq-gemv-fast": "autoawq-gemm", "llm-awq": "autoawq-gemm"}
"""Maps a checkpoint to one of the same weights in the GEMM layout, which the independent reader knows."""

Q_PROJ = "model.layers.0.self_attn.q_proj"
ALL_BUT_ONE_ON_DISK = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers": "disk"} | {
    "model.norm": "cpu",
    "lm_head": "cpu",
}


def load(directory: Path, **kwargs) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **{"dtype": torch.float32} | kwargs)


def copy_of(name: str, directory: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINTS / name, directory / name))


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


@pytest.fixture(params=[*MAKERS, "llm-awq"])
def checkpoint(request, tmp_path) -> tuple[str, Path]:
    """llm-awq's is AutoAWQ's gemv_fast with the zero points under llm-awq's name."""
    if request.param != "llm-awq":
        return request.param, CHECKPOINTS / request.param
    directory = copy_of("autoawq-gemv-fast", tmp_path)
    edit_config(directory, version="llm-awq")

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".qzeros")]:
            tensors[name.replace("qzeros", "scaled_zeros")] = tensors.pop(name)

    edit_tensors(directory, rename)
    return "llm-awq", directory


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(torch.arange(64)[None]).logits


def assert_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, AwqLinear)}
    assert len(linears) == 7
    for name, linear in linears.items():
        assert torch.equal(linear.weight.float(), expected[f"{name}.weight"]), name


class TestMakersAndVersions:
    def test_weights_and_logits_are_those_of_an_independent_reader(self, checkpoint):
        name, directory = checkpoint
        model = load(directory)
        reference = CHECKPOINTS / GEMM_OF.get(name, name)
        assert_weights(model, read_state_dict(reference))
        torch.testing.assert_close(logits(model), logits(read_model(reference)))

    def test_it_is_saved_in_the_gemm_layout(self, checkpoint, tmp_path):
        name, directory = checkpoint
        model = load(directory, dtype="auto")
        logits(model)
        model.save_pretrained(tmp_path / "saved")
        stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
        assert (stored["quant_method"], stored["version"]) == ("awq", "gemm")
        expected = load_file(CHECKPOINTS / GEMM_OF.get(name, name) / "model.safetensors")
        saved = load_file(tmp_path / "saved" / "model.safetensors")
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[key], tensor) for key, tensor in expected.items() if "scales" not in key)
        assert_weights(load(tmp_path / "saved"), read_state_dict(tmp_path / "saved"))

    def test_from_disk_layer_by_layer(self, checkpoint, tmp_path):
        name, directory = checkpoint
        model = load(directory, device_map=ALL_BUT_ONE_ON_DISK, offload_folder=tmp_path / "offload")
        assert model.get_submodule(Q_PROJ).scales.is_meta
        expected = logits(read_model(CHECKPOINTS / GEMM_OF.get(name, name)))
        for _ in range(2):
            torch.testing.assert_close(logits(model), expected)
        with pytest.raises(ConfigError, match="offloaded"):
            model.dequantize()

    def test_in_shards(self, checkpoint, tmp_path):
        name, directory = checkpoint
        load(directory).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
        assert_weights(load(tmp_path / "shards"), read_state_dict(CHECKPOINTS / GEMM_OF.get(name, name)))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_a_dtype_stays_what_was_asked_for(self, checkpoint, dtype):
        model = load(checkpoint[1], dtype=dtype)
        assert model.dtype == dtype
        linear = model.get_submodule(Q_PROJ)
        assert (linear.dtype, linear.scales.dtype) == (dtype, torch.float16)
        assert logits(model).dtype == dtype

    def test_dequantize_gives_a_plain_model(self, checkpoint):
        name, directory = checkpoint
        model = load(directory)
        expected = logits(model)
        plain = model.dequantize(torch.float32)
        assert {type(module) for module in plain.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
        assert not hasattr(plain.config, "quantization_config")
        state = read_state_dict(CHECKPOINTS / GEMM_OF.get(name, name))
        assert torch.equal(plain.get_submodule(Q_PROJ).weight, state[f"{Q_PROJ}.weight"])
        torch.testing.assert_close(logits(plain), expected)

    def test_a_plain_model_saves_and_loads_as_one(self, tmp_path):
        model = load(CHECKPOINTS / "autoawq-gemm")
        model.dequantize().save_pretrained(tmp_path)
        again = load(tmp_path)
        assert not any(isinstance(module, AwqLinear) for module in again.modules())
        torch.testing.assert_close(logits(again), logits(model))


class TestWhichLinears:
    """The tensors decide, whatever config.json says of modules_to_not_convert."""

    @pytest.fixture
    def directory(self, tmp_path) -> Path:
        directory = copy_of("autoawq-gemm", tmp_path)
        weight = read_state_dict(directory)[f"{Q_PROJ}.weight"]

        def unpack(tensors: dict[str, Tensor]) -> None:
            for name in ("qweight", "qzeros", "scales"):
                del tensors[f"{Q_PROJ}.{name}"]
            tensors[f"{Q_PROJ}.weight"] = weight

        edit_tensors(directory, unpack)
        return directory

    @pytest.mark.parametrize("names", [None, [], ["q_proj"], ["lm_head"], ["k_proj"]], ids=str)
    def test_a_dense_linear_stays_dense_and_a_packed_one_packed(self, directory, names):
        edit_config(directory, modules_to_not_convert=names)
        model = load(directory)
        assert type(model.get_submodule(Q_PROJ)) is nn.Linear
        assert sum(isinstance(module, AwqLinear) for module in model.modules()) == 6
        torch.testing.assert_close(logits(model), logits(read_model(CHECKPOINTS / "autoawq-gemm")))

    def test_a_packed_output_head_loads_packed(self, tmp_path):
        directory = copy_of("autoawq-gemm", tmp_path)
        down = "model.layers.0.mlp.down_proj"

        def pack_head(tensors: dict[str, Tensor]) -> None:
            del tensors["lm_head.weight"]
            shapes = {"qweight": (256, 8), "qzeros": (2, 8), "scales": (2, 64)}
            for name, (rows, columns) in shapes.items():
                tensors[f"lm_head.{name}"] = tensors[f"{down}.{name}"][:rows, :columns].clone()

        edit_tensors(directory, pack_head)
        model = load(directory)
        assert isinstance(model.lm_head, AwqLinear)
        assert torch.equal(model.lm_head.weight, read_state_dict(directory)["lm_head.weight"])

    def test_files_that_are_not_safetensors_load_by_the_config(self, tmp_path):
        directory = copy_of("autoawq-gemm", tmp_path)
        torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
        assert_weights(load(directory, use_safetensors=False), read_state_dict(CHECKPOINTS / "autoawq-gemm"))


def replaced(name: str, edit: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"{Q_PROJ}.{name}": edit(tensors[f"{Q_PROJ}.{name}"])})


BROKEN = {
    "qweight is short": ("qweight", replaced("qweight", lambda t: t[:32])),
    "qweight is narrow": ("qweight", replaced("qweight", lambda t: t[:, :16])),
    "qweight is huge": ("qweight", replaced("qweight", lambda t: t.repeat(4, 1))),
    "qweight is fp16": ("qweight", replaced("qweight", lambda t: t.to(torch.float16))),
    "qweight is int64": ("qweight", replaced("qweight", lambda t: t.to(torch.int64))),
    "qweight is flat": ("qweight", replaced("qweight", lambda t: t.flatten())),
    "qzeros are short": ("qzeros", replaced("qzeros", lambda t: t[:1])),
    "qzeros are fp16": ("qzeros", replaced("qzeros", lambda t: t.to(torch.float16))),
    "scales are of another group size": ("scales", replaced("scales", lambda t: t.repeat(2, 1))),
    "scales are int32": ("scales", replaced("scales", lambda t: t.to(torch.int32))),
    "scales are empty": ("scales", replaced("scales", lambda t: t[:0])),
    "qweight is missing": ("qweight", lambda tensors: tensors.pop(f"{Q_PROJ}.qweight")),
    "qzeros are missing": ("qzeros", lambda tensors: tensors.pop(f"{Q_PROJ}.qzeros")),
    "scales are missing": ("scales", lambda tensors: tensors.pop(f"{Q_PROJ}.scales")),
    "channels are permuted": ("g_idx", lambda tensors: tensors.update({f"{Q_PROJ}.g_idx": torch.zeros(256)})),
}


class TestBrokenCheckpoints:
    @pytest.mark.parametrize("maker", ["autoawq-gemm", "autoawq-gemv", "autoawq-gemv-fast"])
    @pytest.mark.parametrize("broken", BROKEN)
    def test_the_error_names_the_tensor_before_any_is_read(self, broken, maker, tmp_path, monkeypatch):
        name, edit = BROKEN[broken]
        directory = copy_of(maker, tmp_path)
        if (maker, broken) == ("autoawq-gemv-fast", "qzeros are fp16"):
            edit = replaced("qzeros", lambda tensor: tensor.to(torch.int32))  # where fp16 is right
        if maker != "autoawq-gemm" and broken == "scales are of another group size":
            edit = replaced("scales", lambda t: t[:, :1] if maker == "autoawq-gemv" else t[:1])  # padded: too few, then
        if maker == "autoawq-gemv" and broken == "qzeros are short":
            edit = replaced("qzeros", lambda tensor: tensor[:, :0])
        edit_tensors(directory, edit)

        def reads_nothing(*args, **kwargs):
            raise AssertionError("weights are being loaded")

        monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", reads_nothing)
        with pytest.raises(CheckpointError, match=rf"{Q_PROJ}\.{name}"):
            load(directory)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"group_size": 64}, "qzeros is int32"),
            ({"group_size": 96}, "multiple of the group size 96"),
            ({"version": "gemv"}, "qzeros is int32"),
            ({"version": "gemv_fast"}, "qweight is int32"),
            ({"bits": 3}, "bits=3"),
            ({"group_size": 0}, "group_size=0"),
        ],
        ids=str,
    )
    def test_a_config_that_contradicts_the_tensors(self, changes, words, tmp_path):
        directory = copy_of("autoawq-gemm", tmp_path)
        edit_config(directory, **changes)
        with pytest.raises(CheckpointError, match=words):
            load(directory)

    def test_a_damaged_file(self, tmp_path):
        directory = copy_of("autoawq-gemm", tmp_path)
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is not a safetensors file"):
            load(directory)

    def test_a_missing_bias(self, tmp_path):
        directory = copy_of("autoawq-gemm", tmp_path)
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": True}))
        with pytest.raises(CheckpointError, match=r"self_attn\.\w+_proj\.bias is missing"):
            load(directory)


class TestInMemory:
    @pytest.fixture
    def model(self) -> PreTrainedModel:
        return load(CHECKPOINTS / "autoawq-gemm", dtype=torch.bfloat16)

    def test_the_memory_footprint_is_what_the_tensors_take(self, model):
        def resident() -> int:
            tensors = [*model.parameters(), *model.buffers()]
            return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

        assert model.get_memory_footprint() == resident()
        before = resident()
        logits(model)
        assert model.get_memory_footprint() == resident()
        assert resident() < 1.1 * before

    def test_the_weights_take_less_than_a_third_of_bf16_after_a_forward_pass(self, model):
        logits(model)
        linears = [module for module in model.modules() if isinstance(module, AwqLinear)]
        packed = sum(p.untyped_storage().nbytes() for linear in linears for p in linear.parameters())
        assert packed <= 0.30 * sum(2 * linear.in_features * linear.out_features for linear in linears)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_to_another_dtype(self, model, dtype):
        logits(model)
        model.to(dtype)
        linear = model.get_submodule(Q_PROJ)
        assert (model.dtype, linear.dtype, linear.scales.dtype) == (dtype, dtype, torch.float16)
        reference = read_model(CHECKPOINTS / "autoawq-gemm")
        assert torch.equal(linear.weight, reference.get_submodule(Q_PROJ).weight.to(dtype))
        error = (logits(model).float() - logits(reference)).norm() / logits(reference).norm()
        assert error < 1e-2

    def test_it_is_compileable_and_generates_with_a_static_cache(self, model):
        assert model.hf_quantizer.is_compileable
        tokens = torch.arange(1, 8)[None]
        arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        eager = model.generate(tokens, **arguments)
        config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
        config._compile_all_devices = True
        torch.compiler.reset()
        compiled = model.generate(tokens, **arguments, cache_implementation="static", compile_config=config)
        assert torch.equal(compiled, eager)

    def test_a_copy_computes_the_same(self, model):
        expected = logits(model)
        assert torch.equal(logits(copy.deepcopy(model)), expected)

    def test_the_environment_chooses_the_backend(self, model, monkeypatch):
        monkeypatch.setenv("HF_AWQ_OFFLOAD_BACKEND", "torch")
        logits(model)
        assert model.get_submodule(Q_PROJ).native_words is None
        monkeypatch.setenv("HF_AWQ_OFFLOAD_BACKEND", "xpu")
        with pytest.raises(ConfigError, match=r"HF_AWQ_OFFLOAD_BACKEND=xpu can't serve .* Intel GPUs only"):
            logits(model)
        monkeypatch.setenv("HF_AWQ_OFFLOAD_BACKEND", "fast")
        with pytest.raises(ConfigError, match="HF_AWQ_OFFLOAD_BACKEND=fast is not a backend; expected one of auto"):
            logits(model)


def test_the_recipe_chooses_the_backend():
    model = load(CHECKPOINTS / "autoawq-gemm").dequantize()
    quantize_model(model, AwqOffloadConfig(n_grid=0, clip=False, rounding="nearest", backend="cpu"))
    logits(model)
    linear = model.get_submodule(Q_PROJ)
    assert linear.backend == "cpu"
    assert linear.native_words is not None  # of all backends for a CPU it alone has its own layout


def test_a_backend_that_there_is_not():
    with pytest.raises(ConfigError, match="backend is 'marlin'; pass one of 'auto', 'torch', 'c', 'cpu'"):
        AwqOffloadConfig(backend="marlin")


def test_symmetric_checkpoints_load(tmp_path):
    model = load(CHECKPOINTS / "autoawq-gemm").dequantize()
    quantize_model(model, AwqOffloadConfig(n_grid=0, clip=False, rounding="nearest", zero_point=False))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert not again.get_submodule(Q_PROJ).grid.zero_point
    assert_weights(again, read_state_dict(tmp_path))
